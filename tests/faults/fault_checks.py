"""What has to hold when a fault is over: everything once, the same answer, a clear end."""

from __future__ import annotations

import json
import re
import time

import pyarrow as pa
from fault_cluster import Driver, FaultCluster

from hts_ray.store import storage
from hts_ray.store.run import StageFolder, find_stage
from hts_ray.store.tables import read_table

TABLE_OF = {"label": "region_scores", "train": "student", "sweep": "sweep"}
# Ray ends the process of a driver whose head is gone by itself, with these words.
_HEAD_LOST = "Failed to connect to GCS within"
_TIMES = {"seconds", "images_per_second"}


def check_told(driver: Driver, stage: str, code: int) -> None:
    """The driver said how the command ended, in words and not in a traceback."""
    output = driver.output
    assert "Traceback (most recent call last)" not in output, output
    if driver.killed:
        return
    assert code in {0, 1}, f"exit code {code}:\n{output}"
    if code == 0:
        assert re.search(rf"^{stage}: \d+ of \d+ rows", output, re.M), output
    else:
        assert re.search(r"^error: .{20,}", output, re.M) or _HEAD_LOST in output, output


def check_no_orphans(cluster: FaultCluster, *drivers: Driver, seconds: float = 40) -> None:
    """Nothing of the commands is left at work, and no process outlived its node."""
    deadline = time.monotonic() + seconds
    while left := [
        *cluster.workers(),
        *(process for driver in drivers for process in driver.orphans()),
        *cluster.strays(),
    ]:
        assert time.monotonic() < deadline, f"left behind: {left}"
        time.sleep(0.3)


def outcome(stage: str, run_dir: str, without: tuple[str, ...] = ("uri",)) -> dict[str, object]:
    """Return what a finished stage says, without times and places."""
    folder = find_stage(run_dir, TABLE_OF[stage])
    assert folder is not None, f"{run_dir} has no finished {TABLE_OF[stage]}"
    answers = {"label": _labels, "train": _student, "sweep": _sweep}
    return answers[stage](folder, without)


def _labels(folder: StageFolder, without: tuple[str, ...]) -> dict[str, object]:
    rows = read_table(folder.path)
    ids = rows["image_id"].to_pylist()
    assert len(set(ids)) == len(ids), "an image stands in several rows"
    assert folder.stats["blocks"] > 1, "one commit: a crash would cost the whole run"
    counts = ("rows_in", "rows_out", "quarantined", "quarantined_by_kind", "regions")
    return {
        "rows": _plain(rows.sort_by("image_id"), without),
        "quarantine": _plain(read_table(folder.file("quarantine")).sort_by("image_id"), without),
        "info": storage.read_json(folder.file("table.json")),
        "counts": {name: folder.stats[name] for name in counts},
    }


def _student(folder: StageFolder, _without: tuple[str, ...]) -> dict[str, object]:
    history = storage.read_json(folder.file("history.json"))
    counts = ("rows_in", "rows_out", "quarantined", "epochs", "final_loss")
    return {
        "weights": storage.read_bytes(folder.file("model.safetensors")),
        "history": [{k: v for k, v in epoch.items() if k not in _TIMES} for epoch in history],
        "counts": {name: folder.stats[name] for name in counts},
        "left": storage.exists(folder.file("ray_train")),
    }


def _sweep(folder: StageFolder, _without: tuple[str, ...]) -> dict[str, object]:
    trials = read_table(folder.file("trials.parquet"))
    finalists = storage.read_json(folder.file("finalists.json"))
    return {
        "trials": trials.drop_columns(["seconds"]).to_pylist(),
        "finalists": [{k: v for k, v in f.items() if k not in _TIMES} for f in finalists],
        "best": storage.read_bytes(folder.file("best.yaml")),
        "left": [name for name in storage.list_names(folder.path) if name == "trials"],
    }


def _plain(table: pa.Table, without: tuple[str, ...]) -> list[dict[str, object]]:
    return [
        {name: value for name, value in row.items() if name not in without}
        for row in table.to_pylist()
    ]


def check_same(found: dict[str, object], expected: dict[str, object]) -> None:
    """Both outcomes are the same, to the last bit; tells where they part."""
    assert found.keys() == expected.keys()
    for name, value in found.items():
        if value == expected[name]:
            continue
        told = value if not isinstance(value, bytes) else f"{len(value)} bytes"
        raise AssertionError(f"{name} differ: {json.dumps(told, default=str)[:2000]}")
