"""What a measurement depends on, and the file that it is written to."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from hts_ray.store.provenance import git_commit, hardware, versions


def measured_on() -> dict[str, Any]:
    """Return what a measurement depends on: date, hardware, versions and commit."""
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "hardware": hardware(),
        "versions": versions(),
        "git_commit": git_commit(),
    }


def read_results(path: Path) -> dict[str, Any]:
    """Return what a benchmark wrote earlier; empty where it never did."""
    found: dict[str, Any] = json.loads(path.read_text("utf-8")) if path.exists() else {}
    return found


def write_results(path: Path, results: Mapping[str, Any]) -> None:
    """Write a benchmark's results in one step: the earlier file stays until they are complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    unfinished.replace(path)
