"""What made a run: versions, code, inputs and hardware."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import hts_ray

_PACKAGES = (
    "ray", "torch", "torchvision", "transformers", "open_clip_torch", "accelerate", "pyarrow",
    "numpy", "pillow",
)  # fmt: skip


def versions() -> dict[str, str]:
    """Return the versions of Python, this package and the libraries that matter."""
    found = {"python": platform.python_version(), "hts_ray": hts_ray.__version__}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "missing"
    return found


def hardware() -> dict[str, Any]:
    """Return processor, cores, memory and GPUs of this machine."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "processor": _processor(),
        "cores": _cores(),
        "memory_gib": round(memory / 2**30, 1),
        "gpus": _gpus(),
    }


def git_commit() -> str | None:
    """Return the source tree's commit, with `+changes` if it is not clean; None outside git."""
    root = Path(hts_ray.__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    commit = command_output(["git", "-C", str(root), "rev-parse", "HEAD"])
    if commit is None:
        return None
    status = ["git", "-C", str(root), "status", "--porcelain", "--untracked-files=no"]
    dirty = command_output(status)
    return commit + ("+changes" if dirty else "")


def _cores() -> int | None:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _gpus() -> list[str]:
    query = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"]
    listed = command_output(query)
    return listed.splitlines() if listed else []


def command_output(command: list[str]) -> str | None:
    """Return what a command prints; None when it is not there, fails or hangs."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)  # noqa: S603
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
