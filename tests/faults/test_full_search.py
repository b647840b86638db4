"""A search over full trainings on three nodes, whose driver is killed and goes on."""

from __future__ import annotations

import importlib.util
import json
import sys
import time
from pathlib import Path

import pytest
from fault_cluster import Driver, FaultCluster
from fault_lab import require

from hts_ray.config import load_config
from hts_ray.demo.world import world_class_ids, write_world
from hts_ray.engine.run import open_run
from hts_ray.images.manifest import open_manifest
from hts_ray.images.stage import prepare_manifest
from hts_ray.store.run import find_stage
from hts_ray.store.tables import read_table
from hts_ray.sweep.log import OWN

pytestmark = pytest.mark.faults

MADE_UP = Path(__file__).parent.parent / "sweep" / "conftest.py"
SETTINGS = [
    "sweep.train=full", "sweep.trials=3", "sweep.finalists=1", "sweep.reduction=2",
    # What a fit on features could not feel: the trunk's rate, and a setting of the student.
    "sweep.space={train.optim.lr: {low: 1.0e-5, high: 1.0e-2, log: true},"
    " student.logit_scale: {choices: [20.0, 30.0]},"
    " filter.positive_threshold: {low: 0.3, high: 0.7}}",
    "train.num_workers=1", "train.use_gpu=true", "train.epochs=2", "train.batch_size=8",
]  # fmt: skip


def made_up_run(folder: Path) -> str:
    """Write a small world with region scores that no teacher was needed for."""
    spec = importlib.util.spec_from_file_location("made_up", MADE_UP)
    assert spec is not None
    assert spec.loader is not None
    made_up = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made_up)
    write_world(str(folder / "hico"), 557, 60, 20)
    classes = {"ids": list(world_class_ids())}
    config = load_config(
        preset="demo", extra={"run_dir": str(folder / "run"), "classes": classes, "ray": {}}
    )
    run = open_run(config)
    stage = prepare_manifest(run.config.prepare, run.run_dir, "hico", str(folder / "hico"))
    made_up.write_scores(run, open_manifest(stage.file("manifest.parquet")).table)
    run.record()
    return run.run_dir


@pytest.mark.timeout(900)
def test_a_search_over_full_trainings_uses_the_cluster_and_goes_on(tmp_path: Path) -> None:
    """Would catch trainings that wait for each other's GPUs, run on one node, or run twice."""
    require("search")
    run_dir = made_up_run(tmp_path)
    with FaultCluster(tmp_path, nodes=3, store_bytes=120_000_000) as cluster:
        command = ["sweep", "--run-dir", run_dir, *SETTINGS]
        driver = Driver(cluster, tmp_path / "driver-0.log", command)
        together = 0
        deadline = time.monotonic() + 400
        while not (done := finished_trials(run_dir)):
            assert driver.running, driver.output
            assert time.monotonic() < deadline, driver.output
            together = max(together, sum(trains(cluster, node) for node in range(3)))
            time.sleep(0.2)
        driver.kill()
        before = {path: path.read_bytes() for path in done}
        assert together >= 2, "one training at a time"
        again = Driver(cluster, tmp_path / "driver-1.log", command)
        assert again.wait(400) == 0, again.output
        assert all(not path.exists() for path in before), "an ended sweep keeps no single trials"
    stage = find_stage(run_dir, "sweep")
    assert stage is not None
    rows = read_table(stage.file("trials.parquet")).to_pylist()
    assert [row["trial"] for row in rows] == list(range(3))
    assert rows[OWN]["status"] == "complete"
    assert len(rows[OWN]["reports"]) == 4  # half the images, twice the epochs
    for path, content in before.items():
        assert json.loads(content)["reports"] == rows[int(path.stem)]["reports"]
    for row in rows:
        assert row["status"] == ("complete" if len(row["reports"]) == 4 else "stopped")
    assert "error" in stage.stats["verdict"]


def finished_trials(run_dir: str) -> list[Path]:
    """Return the files of the trials that ended."""
    return sorted(Path(run_dir).glob("sweep-*/trials/[0-9]*.json"))


def trains(cluster: FaultCluster, node: int) -> bool:
    """Tell whether a node runs a worker of Ray Train."""
    return any("TrainWorker" in title for title in cluster.workers(node))


if __name__ == "__main__":
    sys.exit(pytest.main([__file__, "-m", "faults", "-s"]))
