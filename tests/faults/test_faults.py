"""The stages under faults: nothing lost, nothing doubled, the same answer as an unbroken run's.

`HTS_FAULT_RUNS=30 HTS_FAULT_SEED=0 make test-faults` runs thirty of the random faults, the seeds
from 0 on. `HTS_FAULT_KINDS=disk,network` runs these kinds only, and fails rather than skips where
the machine cannot make one of them.
"""

from __future__ import annotations

import os
import random
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest
from fault_checks import check_no_orphans, check_same, check_told, outcome
from fault_cluster import Driver, stopped_at_the_end
from fault_kinds import KINDS, ON_S3, STAGES, Scene, await_moment, small_disk
from fault_lab import ASKED, Lab, finish, require, to_bucket, to_shards
from PIL import Image, PngImagePlugin
from servers import BUCKET

from hts_ray.demo.world import write_world
from hts_ray.store.run import find_stage
from hts_ray.store.tables import read_table

pytestmark = [pytest.mark.faults, pytest.mark.timeout(600)]

RUNS = int(os.environ.get("HTS_FAULT_RUNS", "6"))
FIRST_SEED = int(os.environ.get("HTS_FAULT_SEED", "0"))
STEPS = {"label": 7, "train": 5, "sweep": 2}  # moments at which every stage is still at work
HANG_SECONDS = 240.0


@dataclass(frozen=True)
class Draw:
    """A random fault: everything follows from its seed."""

    seed: int
    stage: str
    kind: str
    steps: int
    seconds: float

    @classmethod
    def of(cls, seed: int) -> Draw:
        """Draw the seed's fault; any run of seeds goes through all pairs of stage and kind."""
        kinds = [kind for kind in KINDS if not ASKED or kind in ASKED]
        pairs = [(stage, kind) for stage in STAGES for kind in kinds]
        if not pairs:
            return cls(seed, "label", "", 0, 0.0)
        random.Random(seed // len(pairs)).shuffle(pairs)
        stage, kind = pairs[seed % len(pairs)]
        moment = random.Random(seed)
        return cls(seed, stage, kind, moment.randint(0, STEPS[stage]), moment.uniform(0, 1))

    @property
    def shards(self) -> bool:
        """Whether the images lie in tar shards: with every other seed that breaks `label`."""
        return self.stage == "label" and self.seed % 2 == 1

    def __str__(self) -> str:
        stage = f"{self.stage}{'-of-shards' if self.shards else ''}"
        return f"seed{self.seed}-{stage}-{self.kind}-step{self.steps}+{self.seconds:.2f}s"


@pytest.mark.parametrize("draw", [Draw.of(FIRST_SEED + n) for n in range(RUNS)], ids=str)
def test_random_faults(lab: Lab, tmp_path: Path, draw: Draw) -> None:
    """Would catch rows lost or doubled, work begun anew, another answer, a hang, or orphans."""
    root = os.geteuid() == 0 or draw.kind != "disk"
    require(draw.kind, "" if root else "mounting a small disk needs root")
    expected = lab.expected(draw.stage)  # first: nothing must stand in the unbroken run's way
    with ExitStack() as stack:
        if draw.kind in ON_S3:
            path = f"s3://{BUCKET}/run-{draw.seed}"
        elif draw.kind == "disk":
            path = str(stack.enter_context(small_disk(tmp_path / "disk")))
        else:
            path = str(tmp_path / "run")
        run_dir = lab.run_dir(draw.stage, path)
        if draw.kind in ON_S3 and draw.stage == "label":
            to_bucket(lab, run_dir)
        if draw.shards:
            to_shards(run_dir)
        drivers: list[Driver] = []

        def start() -> Driver:
            drivers.append(lab.start(draw.stage, run_dir))
            return stack.enter_context(stopped_at_the_end(drivers[-1]))

        driver = start()
        scene = Scene(lab.cluster, driver, draw.stage, run_dir, lab.store, random.Random(draw.seed))
        await_moment(scene, draw.steps, draw.seconds)
        with KINDS[draw.kind](scene) as struck:
            print(f"{draw}: {struck.what}")
            code = driver.wait(HANG_SECONDS)
        check_told(driver, draw.stage, code)
        assert code == 0 or not struck.survives, (
            f"{struck.what}, exit code {code}:\n{driver.output}"
        )
        if code != 0:
            finish(start(), draw.stage, HANG_SECONDS)
        check_same(outcome(draw.stage, run_dir), expected)
        check_no_orphans(lab.cluster, *drivers)


def quarantined(run_dir: Path) -> dict[str, str]:
    """Return the kinds of error by the images' names."""
    folder = find_stage(str(run_dir), "region_scores")
    assert folder is not None
    rows = read_table(folder.file("quarantine")).to_pylist()
    return {Path(row["uri"]).name: row["error_kind"] for row in rows}


def test_bad_images_cost_nothing_but_themselves(lab: Lab, tmp_path: Path) -> None:
    """Would catch an image that kills its decoder for ever, and NaN that is stored as a score."""
    require("images")
    world = write_world(tmp_path / "world", 559, 16, 1) / "images" / "train2015"
    plain = tmp_path / "plain"
    lab.prepare(world, plain)
    finish(lab.start("label", str(plain)), "label")
    poison = PngImagePlugin.PngInfo()
    poison.add_text("poison", "1")
    Image.new("RGB", (64, 64), (0, 90, 0)).save(world / "poison.png", pnginfo=poison)
    Image.new("RGB", (64, 64), (255, 0, 0)).save(world / "red.png")
    bad = tmp_path / "bad"
    lab.prepare(world, bad)  # in this process, which has no such teacher
    driver = lab.start("label", str(bad), "label.teacher.model=import:fault_teacher:NanTeacher")
    finish(driver, "label")
    assert quarantined(bad) == {"poison.png": "killed_worker", "red.png": "not_finite"}
    found, expected = (outcome("label", str(path))["rows"] for path in (bad, plain))
    assert [row for row in found if row["status"] == "ok"] == expected
    check_no_orphans(lab.cluster, driver)


def test_images_larger_than_the_object_store_pass_through(lab: Lab, tmp_path: Path) -> None:
    """Would catch a deadlock or a crash when decoded images do not fit into memory."""
    require("memory")
    folder = tmp_path / "images"
    folder.mkdir()
    count, side = 40, 2000
    stores = lab.cluster.store_bytes * 3
    assert count * side * side * 3 > 1.5 * stores
    for number in range(count):
        Image.new("RGB", (side, side), (5 * number, 90, 0)).save(folder / f"{number}.jpg")
    run_dir = tmp_path / "run"
    lab.prepare(folder, run_dir, "label.teacher.model=builtin:dummy")
    driver = lab.start("label", str(run_dir))
    finish(driver, "label")
    rows = outcome("label", str(run_dir))["rows"]
    assert [row["status"] for row in rows] == ["ok"] * count
    check_no_orphans(lab.cluster, driver)
