"""What all faults need once: a cluster to break, an object store, and unbroken runs."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import fault_checks
import pyarrow as pa
import pytest
import servers
from fault_cluster import Driver, FaultCluster
from fault_kinds import ALONE, KINDS
from servers import BUCKET, FaultyStore

from hts_ray import cli
from hts_ray.demo.world import world_class_ids, write_world
from hts_ray.images import inside
from hts_ray.store import storage
from hts_ray.store.run import find_stage
from hts_ray.store.tables import read_table, write_table

ASKED = tuple(filter(None, os.environ.get("HTS_FAULT_KINDS", "").split(",")))
KEPT = os.environ.get("HTS_FAULT_LAB", "")  # a folder that keeps the unbroken runs between calls
IMAGES = 32
# Small enough for seconds, slow enough that a fault finds every stage at work.
SETTINGS = [
    f"classes.ids={list(world_class_ids()[:12])}",
    "label.splits=[train]", "label.teacher.model=builtin:dummy:0.25", "label.teacher.prior=none",
    "label.regions.grid_scales=[]", "label.regions.grid_steps=[]",
    "label.pool.min_size=1", "label.pool.max_size=2", "label.pool.num_gpus=1",
    "label.batch_images=2", "label.block_rows=2",
    "filter.null_score=null", "filter.per_class_quantile=null", "filter.quantile_floor=0.2",
    "train.epochs=2", "train.batch_size=8", "train.checkpoint_every_steps=1",
    "train.cpus_per_worker=2",
    "sweep.trials=4", "sweep.repeats=1", "sweep.finalists=1", "sweep.concurrency=2",
    "sweep.space={filter.positive_threshold: {low: 0.3, high: 0.6},"
    " train.optim.head_lr: {low: 0.001, high: 0.1, log: true}}",
]  # fmt: skip
# Its finalists are fitted in the driver's process: their training is what `train` is broken for.
MORE = {"sweep": ["train.trainable=head", "train.checkpoint_every_steps=null"]}


class Lab:
    """A cluster to break, an object store in front of which faults are put, and what is right."""

    def __init__(self, folder: Path, cluster: FaultCluster, store: FaultyStore) -> None:
        self.folder, self.cluster, self.store = folder, cluster, store
        self._kept = Path(KEPT) if KEPT else folder
        self._expected: dict[str, dict[str, object]] = {}

    @property
    def folders(self) -> list[Path]:
        """Where what the drivers open lies."""
        return [self.folder, self._kept]

    def expected(self, stage: str) -> dict[str, object]:
        """Return what a stage says that nothing stood in the way of; it is run once."""
        if stage not in self._expected:
            run = str(self._kept / f"unbroken-{stage}")
            if find_stage(run, fault_checks.TABLE_OF[stage]) is None:
                finish(self.start(stage, self.run_dir(stage, run), name="unbroken"), stage)
            self._expected[stage] = fault_checks.outcome(stage, run)
        return self._expected[stage]

    def run_dir(self, stage: str, path: str) -> str:
        """Make a run directory at a path or URI that has all that a stage takes."""
        source = self._prepared() if stage == "label" else self._filtered()
        for file in sorted(source.rglob("*")):
            if file.is_file():
                target = storage.join(path, file.relative_to(source).as_posix())
                storage.write_bytes(target, file.read_bytes())
        return path

    def _prepared(self) -> Path:
        world, run = self._kept / "world", self._kept / "prepared"
        if not run.exists():
            write_world(world, 558, IMAGES, 4)
            cli.main(["prepare", "hico", "--root", str(world), "--preset", "demo",
                      "--run-dir", str(run), *SETTINGS])  # fmt: skip
        return run

    def _filtered(self) -> Path:
        self.expected("label")
        run = self._kept / "unbroken-label"
        if find_stage(str(run), "pseudo_labels") is None:
            cli.main(["filter", "--run-dir", str(run)])
        return run

    def prepare(self, root: Path, run_dir: Path, *settings: str) -> None:
        """Prepare a folder of images with the settings of all these runs."""
        cli.main(["prepare", "folder", "--root", str(root), "--preset", "demo",
                  "--run-dir", str(run_dir), *SETTINGS, *settings])  # fmt: skip

    def start(self, stage: str, run_dir: str, *settings: str, name: str = "driver") -> Driver:
        """Start a stage's command on the cluster, all of whose nodes are there."""
        self.cluster.repair()
        log = self.folder / f"{name}-{len(list(self.folder.glob('*.log')))}.log"
        more = MORE.get(stage, [])
        return Driver(self.cluster, log, [stage, "--run-dir", run_dir, *more, *settings])


@contextmanager
def open_lab(folder: Path) -> Iterator[Lab]:
    """Start the object store and the cluster."""
    with (
        servers.s3_server(folder) as s3,
        servers.faulty_store(s3["AWS_ENDPOINT_URL"]) as store,
        pytest.MonkeyPatch.context() as patch,
    ):
        for name, value in s3.items():
            patch.setenv(name, value)
        environment = {**s3, "AWS_ENDPOINT_URL": store.url}
        with FaultCluster(folder, environment=environment) as cluster:
            yield Lab(folder, cluster, store)


def finish(driver: Driver, stage: str, seconds: float = 240) -> None:
    """Wait for a command that has to end well."""
    code = driver.wait(seconds)
    assert code == 0, f"exit code {code}:\n{driver.output}"
    fault_checks.check_told(driver, stage, code)


def to_bucket(lab: Lab, run_dir: str) -> None:
    """Let a run's images lie in the bucket too."""
    names = [n for n in storage.list_names(run_dir) if n.startswith("manifest-")]
    path = storage.join(run_dir, names[0], "manifest.parquet")
    table = read_table(path)
    uris = []
    for uri in table["uri"].to_pylist():
        uris.append(f"s3://{BUCKET}/images/{Path(uri).name}")
        if not storage.exists(uris[-1]):
            storage.write_bytes(uris[-1], Path(uri).read_bytes())
    write_uris(path, table, uris)


def to_shards(run_dir: str, shard_images: int = 6) -> None:
    """Let a run's images lie in tar shards beside its manifest, each under the id that it has."""
    names = [n for n in storage.list_names(run_dir) if n.startswith("manifest-")]
    path = storage.join(run_dir, names[0], "manifest.parquet")
    table = read_table(path)
    uris: list[str] = []
    for start in range(0, len(table), shard_images):
        data = io.BytesIO()
        shard = storage.join(run_dir, "shards", f"{start:03d}.tar")
        with tarfile.open(fileobj=data, mode="w") as tar:
            for uri in table["uri"].slice(start, shard_images).to_pylist():
                image = storage.read_bytes(uri)
                member = tarfile.TarInfo(Path(uri).name)
                member.size = len(image)
                tar.addfile(member, io.BytesIO(image))
                uris.append(inside.Span(shard, data.tell() - _padded(len(image)), len(image)).uri)
        storage.write_bytes(shard, data.getvalue())
    write_uris(path, table, uris)


def _padded(size: int) -> int:
    return -(-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE


def write_uris(path: str, table: pa.Table, uris: list[str]) -> None:
    """Write a manifest with other URIs."""
    place = table.column_names.index("uri")
    field = table.schema.field(place)
    write_table(path, table.set_column(place, field, pa.array(uris, pa.string())))


def require(kind: str, missing: str = "") -> None:
    """Skip a fault that was not asked for, or that this machine cannot make.

    `missing` tells what the machine lacks: an error where the fault was asked for by name.
    """
    unknown = set(ASKED) - {*KINDS, *ALONE}
    if unknown:
        known = ", ".join([*KINDS, *ALONE])
        raise RuntimeError(f"HTS_FAULT_KINDS names {', '.join(sorted(unknown))}; there are {known}")
    if ASKED and kind not in ASKED:
        pytest.skip(f"HTS_FAULT_KINDS names {', '.join(ASKED)}")
    if missing and kind in ASKED:
        raise RuntimeError(f"HTS_FAULT_KINDS names {kind}: {missing}")
    if missing:
        pytest.skip(missing)
