"""Measure the time that a labeling loses when a worker node dies.

    python benchmarks/node_loss.py [--images 240] [--seconds 0.5] [--rounds 3]

A head and three worker nodes of one logical GPU each, on one machine; two actors label, each on a
node of its own, and the third node waits, as a replacement would. Everything is real but the
model, which sleeps `--seconds` an image. In every second run all processes of a node at work are
killed (kill -9) when a third of the blocks is done.

`lost` is what such a run takes longer than the mean of the unbroken runs before and after it.
`detection` is the time from the kill until the head declares the node dead, by Ray's own settings;
`block` what a block of images takes an actor. The aim is lost < detection + block. The table goes
to stdout, the numbers with hardware, versions, settings and date to
benchmarks/results/node_loss.json.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
from measured import measured_on, write_results
from PIL import Image

from hts_ray.classes import hico_classes
from hts_ray.config import LabelConfig, RayConfig
from hts_ray.engine.image_pass import committed_names
from hts_ray.engine.session import ray_cluster
from hts_ray.images.manifest import open_manifest
from hts_ray.store.run import StageFolder
from hts_ray.store.tables import MANIFEST_SCHEMA, write_table
from hts_ray.teacher.stage import label_images

RESULTS = Path(__file__).parent / "results" / "node_loss.json"
ENVIRONMENT = {  # read when Ray is imported and started
    "RAY_AUTH_MODE": "disabled",
    "RAY_agent_register_timeout_ms": "120000",
    "RAY_prestart_worker_first_driver": "0",
    "RAY_worker_niceness": "0",
}
NODES = 3
ACTORS = 2
BLOCK = 8
CLASSES = 20
TEACHER = "TeacherActor"  # stands in the titles of the processes that label
_DETECTION_SECONDS = 120


class Killer(threading.Thread):
    """Kills a node at work when so many blocks of a stage are done, and times its detection."""

    def __init__(self, cluster: Any, stage: StageFolder, blocks: int) -> None:
        super().__init__(daemon=True)
        self.cluster, self.stage, self.blocks = cluster, stage, blocks
        self._detection: float | None = None
        self._error: BaseException | None = None

    def run(self) -> None:
        """Wait for the moment, and kill."""
        try:
            while len(committed_names(self.stage)) < self.blocks:
                time.sleep(0.05)
            self._kill()
        except BaseException as error:  # raised by `detection`, in the main thread
            self._error = error

    def detection(self) -> float:
        """Return the seconds from the kill until the head declared the node dead."""
        self.join(_DETECTION_SECONDS)
        if self._error is not None:
            raise self._error
        assert self._detection is not None, "no node was killed, or its death was not noticed"
        return self._detection

    def _kill(self) -> None:
        node = next(node for node in self.cluster.worker_nodes if works(node))
        for process in processes(node):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        killed = time.monotonic()
        self.cluster.remove_node(node, allow_graceful=False)
        while is_alive(node):
            time.sleep(0.05)
        self._detection = time.monotonic() - killed


def processes(node: Any) -> list[psutil.Process]:
    """Return a node's raylet and all that it started."""
    raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
    return [raylet, *raylet.children(recursive=True)]


def works(node: Any) -> bool:
    """Tell whether a teacher runs on a node."""
    for process in processes(node):
        with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
            if TEACHER in " ".join(process.cmdline()):
                return True
    return False


def is_alive(node: Any) -> bool:
    """Tell whether the head takes a node for alive."""
    import ray

    return any(entry["NodeID"] == node.node_id and entry["Alive"] for entry in ray.nodes())


def save_images(folder: Path, count: int) -> str:
    """Write small images and a manifest, and return its path."""
    rng = np.random.default_rng(0)
    rows = []
    for number in range(count):
        path = folder / f"{number:05d}.jpg"
        pixels = rng.integers(0, 256, (48, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
        rows.append({"image_id": path.stem, "uri": str(path), "split": "train"})
    manifest = str(folder / "manifest.parquet")
    write_table(manifest, pa.Table.from_pylist(rows, schema=MANIFEST_SCHEMA))
    return manifest


def new_stage(folder: Path) -> StageFolder:
    """Return a stage that was never run."""
    return StageFolder(str(folder), "region_scores", str(time.time_ns()))


def label(manifest: str, stage: StageFolder, seconds: float) -> float:
    """Label all images, and return the seconds that it took."""
    config = LabelConfig.model_validate(
        {
            "teacher": {"model": f"builtin:dummy:{seconds}", "prior": "none"},
            "regions": {"whole": True, "grid_scales": [], "grid_steps": []},
            "pool": {"min_size": ACTORS, "max_size": ACTORS, "num_gpus": 1},
            "batch_images": BLOCK,
            "block_rows": BLOCK,
        }
    )
    started = time.monotonic()
    classes = hico_classes().subset(range(CLASSES))
    stats = label_images(config, manifest=open_manifest(manifest), class_table=classes, stage=stage)
    assert stats["quarantined"] == 0  # that every image came out once, label_images has checked
    return time.monotonic() - started


def add_worker(cluster: Any) -> None:
    """Start a worker node of one logical GPU."""
    cluster.add_node(num_cpus=2, num_gpus=1)


def measure(manifest: str, folder: Path, options: argparse.Namespace) -> list[dict[str, float]]:
    """Return one row a round, and print it."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 4, "num_gpus": 0})
    rows = []
    try:
        for _ in range(NODES):
            add_worker(cluster)
        with ray_cluster(RayConfig.model_validate({"address": cluster.address})):
            label(manifest, new_stage(folder), 0.0)  # whatever is slow the first time
            before = label(manifest, new_stage(folder), options.seconds)
            print("round   unbroken s   broken s   lost s   detection s   block s   lost / aim")
            for number in range(options.rounds):
                stage = new_stage(folder)
                killer = Killer(cluster, stage, options.images // BLOCK // 3)
                killer.start()
                broken = label(manifest, stage, options.seconds)
                detection = killer.detection()
                add_worker(cluster)
                after = label(manifest, new_stage(folder), options.seconds)
                usual, block = statistics.mean([before, after]), BLOCK * options.seconds
                row = {
                    "unbroken_s": usual,
                    "broken_s": broken,
                    "lost_s": broken - usual,
                    "detection_s": detection,
                    "block_s": block,
                    "lost_over_aim": (broken - usual) / (detection + block),
                }
                rows.append(row)
                before = after
                print(
                    f"{number:5d} {usual:12.1f} {broken:10.1f} {row['lost_s']:8.1f}"
                    f" {detection:13.1f} {block:9.1f} {row['lost_over_aim']:12.2f}",
                    flush=True,
                )
    finally:
        cluster.shutdown()
    return rows


def main() -> None:
    """Print and store what a node's death costs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--images", type=int, default=240)
    parser.add_argument("--seconds", type=float, default=0.5, help="a GPU's time an image")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    os.environ.update(ENVIRONMENT)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = measure(save_images(folder, options.images), folder, options)
    shares = [row["lost_over_aim"] for row in rows]
    print(
        f"lost / (detection + block): median {statistics.median(shares):.2f},"
        f" at most {max(shares):.2f}"
    )
    chosen = {key: value for key, value in vars(options).items() if key != "out"}
    report = {
        **measured_on(),
        "settings": {
            **chosen, "actors": ACTORS, "worker_nodes": NODES, "images_per_block": BLOCK,
        },
        "rounds": rows,
    }  # fmt: skip
    write_results(options.out, report)


if __name__ == "__main__":
    main()
