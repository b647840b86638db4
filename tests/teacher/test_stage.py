"""Tests of the teacher pass: what a run leaves behind, also when it is killed."""

from __future__ import annotations

import io
import json
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from servers import Chat, ChatFault, chat_server

from hts_ray.classes import ClassTable, hico_classes
from hts_ray.config import ImagesConfig, LabelConfig, RegionsConfig, TeacherConfig, load_config
from hts_ray.engine.compaction import BLOCKS
from hts_ray.engine.decoding import decode_batch, decoded_image
from hts_ray.engine.image_pass import committed_files, committed_names, committed_rows
from hts_ray.engine.run import Run
from hts_ray.errors import ConfigError, DataError
from hts_ray.images.crops import crop_region
from hts_ray.images.manifest import Manifest, open_manifest
from hts_ray.images.regions import Region
from hts_ray.labels.evidence import read_info
from hts_ray.store import storage
from hts_ray.store.run import StageFolder
from hts_ray.store.tables import (
    MANIFEST_SCHEMA,
    QUARANTINE_SCHEMA,
    REGION_SCORES_SCHEMA,
    check_table,
    read_table,
    write_table,
)
from hts_ray.teacher import assignment
from hts_ray.teacher.captioner import DummyCaptioner
from hts_ray.teacher.stage import block_rows, label_images, plan_label

BAD_FILES = {
    "empty.jpg": b"",
    "text.jpg": b"this is not an image",
    "cut.png": None,  # filled in by the fixture: half of a good file
}


def png(seed: int, size: tuple[int, int] = (64, 48)) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="png")
    return buffer.getvalue()


def make_manifest(folder: Path, good: int, bad: Sequence[str] = (), split: str = "train") -> str:
    """Write images and a manifest that lists them, good ones first."""
    images = folder / "images"
    images.mkdir(parents=True)
    names = [f"good-{i:04d}.png" for i in range(good)]
    for i, name in enumerate(names):
        (images / name).write_bytes(png(i))
    for name in bad:
        if name != "missing.jpg":
            content = BAD_FILES[name]
            (images / name).write_bytes(png(0)[:300] if content is None else content)
    rows = [
        {
            "image_id": name,
            "uri": str(images / name),
            "width": 64,
            "height": 48,
            "split": split,
            "positive_ids": [1, 2],
        }
        for name in [*names, *bad]
    ]
    path = str(folder / "manifest.parquet")
    write_table(path, pa.Table.from_pylist(rows, schema=MANIFEST_SCHEMA))
    return path


def classes(count: int = 6) -> ClassTable:
    return hico_classes().subset(range(count))


def dummy_config(**changes: Any) -> LabelConfig:
    return LabelConfig(
        teacher=TeacherConfig(model="builtin:dummy"),
        **{"block_rows": 4, "batch_images": 4} | changes,
    )


def test_blocks_are_small_enough_to_keep_every_actor_busy() -> None:
    """Catches a small run whose last blocks keep one actor at work while the others idle."""

    def rows(images: int, actors: int, **changes: int) -> int:
        pool = {"min_size": 1, "max_size": actors}
        return block_rows(LabelConfig.model_validate({"pool": pool, **changes}), images)

    assert rows(100_000, 64) == 64  # large runs: what a crash can cost
    assert rows(10_000, 16) == 40
    assert rows(1_000, 16) == 16  # never less than an actor's batch
    assert rows(1_000, 16, block_rows=8) == 8


def test_every_way_to_ask_is_another_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches answers of one mode, question or spelling of yes read as those of another."""
    config = load_config(overrides=["label.teacher.model=builtin:dummy", f"run_dir={tmp_path}"])
    run, manifest = Run(config, classes()), Manifest("m", MANIFEST_SCHEMA.empty_table())

    def key(**teacher: object) -> str:
        return plan_label(run.changed({"label": {"teacher": teacher}}), manifest).folder.key

    ways = [{"mode": mode} for mode in ("prompts", "captions", "questions")]
    ways += [{"mode": "questions", "question": "Is it {}?"}]
    ways += [{"mode": "questions", "object_bound": 0.0}]
    keys = [key(**way) for way in ways]
    assert len(set(keys)) == len(ways)
    assert key(**ways[2]) == keys[2]
    monkeypatch.setattr(assignment, "ANSWERS", {"yes": ["oui"], "no": ["non"]})
    assert key(**ways[2]) not in keys
    assert key(**ways[0]) == keys[0]


def test_run_with_bad_images(ray_session: None, tmp_path: Path) -> None:
    """Catches lost, doubled or misplaced rows, and a bad image that costs its neighbours."""
    bad = [*BAD_FILES, "missing.jpg"]
    manifest = make_manifest(tmp_path, 10, bad)
    stage = StageFolder(str(tmp_path / "run"), "region_scores", "k")
    before = labeling_context()
    seen: list[tuple[int, int, int]] = []
    stats = label_images(
        dummy_config(),
        manifest=open_manifest(manifest),
        class_table=classes(),
        stage=stage,
        progress=lambda *counts: seen.append(counts),
    )
    assert labeling_context() == before  # other datasets of the driver must not checkpoint here
    assert stage.finished
    assert stats == stage.stats
    assert (stats["rows_in"], stats["rows_out"], stats["quarantined"]) == (14, 10, 4)
    assert stats["quarantined_by_kind"] == {
        "empty": 1,
        "not_an_image": 1,
        "truncated": 1,
        "missing": 1,
    }
    assert seen[-1] == (14, 14, 4)
    table = check_table(read_table(stage.path), REGION_SCORES_SCHEMA, stage.path)
    assert table.schema.metadata[b"hts_table"] == b"region_scores"
    rows = {row["image_id"]: row for row in table.to_pylist()}
    assert len(rows) == table.num_rows == 14
    for name in bad:
        assert rows[name]["status"] == "quarantined"
        assert rows[name]["scores"] is None
    info = read_info(stage.path)
    assert info["class_ids"] == list(range(6))
    assert [len(counts) for counts in info["token_counts"]] == [1] * 6
    assert len(info["prior_log_likelihoods"]) == 6
    check_scores_in_process(rows)
    quarantine = read_table(stage.file("quarantine"))
    assert quarantine.schema.names == QUARANTINE_SCHEMA.names
    assert sorted(quarantine["image_id"].to_pylist()) == sorted(bad)
    assert stats["regions"] == sum(len(row["region_kinds"] or []) for row in rows.values())
    again = label_images(
        dummy_config(), manifest=open_manifest(manifest), class_table=classes(), stage=stage
    )
    assert again == stats


def labeling_context() -> tuple[Any, ...]:
    from ray.data import DataContext

    context = DataContext.get_current()
    return id(context), context.checkpoint_config, context.enable_progress_bars


def check_scores_in_process(rows: dict[str, Any]) -> None:
    """Compare with the same crops scored without Ray."""
    prompts = classes().primary_prompts
    for i in (0, 9):
        row = rows[f"good-{i:04d}.png"]
        pixels = np.asarray(Image.open(io.BytesIO(png(i))))
        crops = [
            pixels[int(top) : int(bottom), int(left) : int(right)]
            for left, top, right, bottom in row["boxes"]
        ]
        assert len(crops) == 14
        expected = DummyCaptioner().score(crops, prompts).log_likelihoods
        scores = np.array(row["scores"], np.float32).reshape(14, 6)
        np.testing.assert_allclose(scores, expected, rtol=1e-6)
        assert row["captions"] == [[]] * 14
        assert (row["width"], row["height"]) == (64, 48)


def test_all_bad_is_an_error(ray_session: None, tmp_path: Path) -> None:
    """Catches a run that ends well with nothing in it, and one that can never be repeated."""
    manifest = make_manifest(tmp_path, 0, list(BAD_FILES))
    stage = StageFolder(str(tmp_path / "run"), "region_scores", "k")
    with pytest.raises(DataError, match=r"none of 3 images can be used \(.*empty 1"):
        label_images(
            dummy_config(), manifest=open_manifest(manifest), class_table=classes(), stage=stage
        )
    assert not stage.finished
    assert read_table(stage.file("quarantine")).num_rows == 3
    assert not committed_names(stage)
    assert storage.list_names(stage.path) == ["quarantine"]


@pytest.mark.slow
def test_an_endpoint_that_goes_and_comes_back(ray_session: None, tmp_path: Path) -> None:
    """Catches images lost or paid for twice by an outage, and tokens that no stats show."""
    manifest = open_manifest(make_manifest(tmp_path, 12))
    stage = StageFolder(str(tmp_path / "run"), "region_scores", "k")

    def answer(words: str, image: Image.Image, request: dict[str, Any]) -> list[dict[str, Any]]:
        message = {"role": "assistant", "content": "a person riding a bicycle"}
        return [{"index": 0, "finish_reason": "stop", "message": message}]

    def is_image(seed: int) -> Any:
        pixels = np.asarray(Image.open(io.BytesIO(png(seed))))
        return lambda words, image: np.array_equal(np.asarray(image), pixels)

    with chat_server(Chat(answer)) as chat:
        config = LabelConfig.model_validate({
            "block_rows": 4, "batch_images": 4,
            "regions": {"grid_scales": [], "grid_steps": []},
            "teacher": {
                "engine": "openai", "endpoint": chat.url, "model": "tiny", "mode": "captions",
                "image_format": "png", "requests": {"retries": 0, "price_in": 5.0},
            },
        })  # fmt: skip
        arguments: dict[str, Any] = {"manifest": manifest, "class_table": classes(), "stage": stage}
        gone = ChatFault(lambda *_: len(chat.requests) > 6, status=500)
        chat.faults = [ChatFault(is_image(3), status=500), gone]
        with pytest.raises(ConfigError, match=r"label\.teacher\.endpoint = .*no longer answers"):
            label_images(config, **arguments)
        assert not stage.finished
        wait_for_quiet(stage)
        chat.faults.remove(gone)
        before = len(chat.requests)
        stats = label_images(config, **arguments)
        later = chat.requests[before:]
    table = read_table(stage.path).to_pylist()
    assert sorted(row["image_id"] for row in table) == [f"good-{i:04d}.png" for i in range(12)]
    (bad,) = (row for row in table if row["status"] == "quarantined")
    assert (bad["image_id"], bad["error_kind"]) == ("good-0003.png", "teacher_error")
    assert "HTTP 500" in bad["error"]
    resumed = stats["rows_resumed"]
    assert len(later) - (12 - resumed) in {0, 1}  # one more to see whether the server is there
    assert stats["requests"] >= 11 - resumed
    assert stats["tokens_read"] == 100 * stats["requests"]
    assert stats["cost"] == pytest.approx(5e-6 * stats["tokens_read"])


def test_bad_teacher_is_the_user_s_mistake(ray_session: None, tmp_path: Path) -> None:
    """Catches a wrong model name ending in a Ray traceback with exit code 1."""
    manifest = make_manifest(tmp_path, 2)
    stage = StageFolder(str(tmp_path / "run"), "region_scores", "k")
    config = dummy_config().model_copy(update={"teacher": TeacherConfig(model="/no/such/model")})
    with pytest.raises(ConfigError, match=r"label\.teacher\.model = '/no/such/model'") as caught:
        label_images(config, manifest=open_manifest(manifest), class_table=classes(), stage=stage)
    assert "Traceback" not in str(caught.value)


KILLED_RUN = """
import json, sys
import ray
from hts_ray.classes import hico_classes
from hts_ray.config import LabelConfig
from hts_ray.images.manifest import open_manifest
from hts_ray.store.run import StageFolder
from hts_ray.teacher.stage import block_rows, label_images

arguments = json.loads(sys.argv[1])
ray.init(address=arguments["address"], log_to_driver=False)
label_images(
    LabelConfig.model_validate(arguments["config"]),
    manifest=open_manifest(arguments["manifest"]),
    class_table=hico_classes().subset(range(150)),
    stage=StageFolder(arguments["run_dir"], "region_scores", "k"),
)
"""


def test_kill_and_rerun(tmp_path: Path, ray_session: None) -> None:
    """Catches rows lost or doubled by kill -9, and a rerun that starts from the beginning."""
    import ray

    total, block = 600, 4
    manifest = make_manifest(tmp_path, total)
    config = dummy_config(block_rows=block, batch_images=block)
    stage = StageFolder(str(tmp_path / "run"), "region_scores", "k")
    arguments = {
        "config": config.model_dump(mode="json"),
        "manifest": manifest,
        "run_dir": stage.run_dir,
        "address": ray.get_runtime_context().gcs_address,
    }
    log = tmp_path / "killed.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-c", KILLED_RUN, json.dumps(arguments)],
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    deadline = time.monotonic() + 120
    while len(committed_names(stage)) < 2:
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    wait_for_quiet(stage)
    first = committed_names(stage)
    done = committed_rows(stage)
    assert 2 * block <= done < total
    assert not stage.finished
    # A write that never committed must not survive beside the rows that replace it.
    stray = Path(stage.file(BLOCKS, "stray_000000-0.parquet"))
    stray.write_bytes(Path(committed_files(stage)[0]).read_bytes())
    stats = label_images(
        config, manifest=open_manifest(manifest), class_table=classes(150), stage=stage
    )
    assert stats["rows_resumed"] == done
    assert stats["rows_out"] == total
    ids = Counter(read_table(stage.path, ["image_id"])["image_id"].to_pylist())
    assert len(ids) == total
    assert set(ids.values()) == {1}
    # Finished rows were not redone: their blocks are among those that were merged.
    assert stats["blocks"] > len(first)
    assert [n for n in storage.list_names(stage.path) if "part" in n] == ["part-00000.parquet"]


def wait_for_quiet(stage: StageFolder) -> None:
    """Wait until the killed driver's workers are gone: they may commit for a moment more."""
    names, since = committed_names(stage), time.monotonic()
    while time.monotonic() - since < 1.5:
        time.sleep(0.1)
        if (now := committed_names(stage)) != names:
            names, since = now, time.monotonic()


def test_decode_keeps_rows_and_sizes(tmp_path: Path) -> None:
    """Catches rows that shift against their pixels, and boxes in downscaled coordinates."""
    make_manifest(tmp_path, 1, ["empty.jpg"])
    (tmp_path / "images" / "large.png").write_bytes(png(7, (200, 100)))
    names = ["good-0000.png", "empty.jpg", "large.png"]
    batch = pa.table(
        {
            "image_id": names,
            "uri": [str(tmp_path / "images" / name) for name in names],
            "split": ["train"] * 3,
        }
    )
    decoded = decode_batch(batch, ImagesConfig(max_side=100))
    assert decoded["image_id"].to_pylist() == names
    assert decoded["error_kind"].to_pylist() == [None, "empty", None]
    assert decoded["width"].to_pylist() == [64, None, 200]
    assert decoded["pixel_width"].to_pylist() == [64, None, 100]
    assert decoded["pixels"].type == pa.large_binary()
    image = decoded_image(decoded, 2)
    assert crop_region(image, Region((100, 50, 200, 100), "grid")).shape == (25, 50, 3)
    assert crop_region(image, Region((199, 0, 200, 1), "grid")).shape == (1, 1, 3)


def test_missing_table_info(tmp_path: Path) -> None:
    """Catches a bare FileNotFoundError where a command should be named."""
    with pytest.raises(DataError, match="hts label"):
        read_info(storage.absolute(str(tmp_path)))


DEADLY_TEACHER = """
import os
from hts_ray.teacher.captioner import DummyCaptioner

class Deadly(DummyCaptioner):
    def __init__(self, config, device):
        super().__init__()

    def score(self, images, prompts):
        if any((image == (255, 0, 0)).all() for image in images):
            os._exit(1)
        return super().score(images, prompts)
"""


def test_a_deadly_image_costs_nothing_but_itself(
    ray_session: None, tmp_path: Path, plugins: Path
) -> None:
    """Catches an image that kills the teacher's process and is handed to the next for ever."""
    (plugins / "deadly_teacher.py").write_text(DEADLY_TEACHER)
    manifest = make_manifest(tmp_path, 9)
    Image.new("RGB", (64, 48), (255, 0, 0)).save(tmp_path / "images" / "good-0005.png")
    boxes = {
        "images": [{"id": 1, "file_name": "good-0002.png", "width": 64, "height": 48}],
        "annotations": [
            {"image_id": 1, "category_id": 1, "bbox": [4, 4, 30, 30]},
            {"image_id": 1, "category_id": 1, "bbox": [900, 4, 30, 30]},
        ],
        "categories": [{"id": 1, "name": "dog"}],
    }
    (tmp_path / "boxes.json").write_text(json.dumps(boxes))
    stage = StageFolder(str(tmp_path / "run"), "region_scores", "k")
    config = LabelConfig(
        teacher=TeacherConfig(model="import:deadly_teacher:Deadly"),
        regions=RegionsConfig(
            grid_scales=(0.5,), grid_steps=(3,), boxes=str(tmp_path / "boxes.json"), budget=27
        ),
        block_rows=4,
        batch_images=4,
        max_attempts=1,
    )
    stats = label_images(
        config, manifest=open_manifest(manifest), class_table=classes(), stage=stage
    )
    assert (stats["rows_out"], stats["quarantined"], stats["bad_boxes"]) == (8, 1, 1)
    assert stats["quarantined_by_kind"] == {"killed_worker": 1}
    assert stats["regions"] == 8 * 3  # a budget of 27 regions leaves 3 to each of 9 images
    rows = {row["image_id"]: row for row in read_table(stage.path).to_pylist()}
    assert rows["good-0005.png"]["error_kind"] == "killed_worker"
    assert rows["good-0002.png"]["region_kinds"] == ["whole", "given", "grid"]
    assert rows["good-0002.png"]["boxes"][1] == [4, 4, 34, 34]
    quarantine = {row["image_id"]: row for row in read_table(stage.file("quarantine")).to_pylist()}
    assert quarantine["good-0002.png"]["error_kind"] == "bad_box"
    assert "outside the image" in quarantine["good-0002.png"]["error"]
