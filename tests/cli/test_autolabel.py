"""`hts autolabel`: one command from a folder to labels, and what it says when that cannot be."""

from __future__ import annotations

import csv
import re
import shlex
from pathlib import Path

import pyarrow as pa
import pytest
from PIL import Image

import hts_ray
from hts_ray.cli import main
from hts_ray.config import load_config
from hts_ray.errors import ConfigError, NoLabelsError
from hts_ray.stages import autolabel
from hts_ray.store import storage
from hts_ray.store.run import StageFolder, find_stage
from hts_ray.store.tables import REGION_SCORES_SCHEMA, write_table

DUMMY = ["--teacher", "builtin:dummy", "label.teacher.background=none"]
CLASSES = ["a red bicycle", "an empty shelf", "a dog"]


def hts(*arguments: str) -> int:
    try:
        main(arguments)
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Make a folder of images, and go beside it."""
    monkeypatch.chdir(tmp_path)
    draw(range(5))
    (tmp_path / "photos" / "broken.jpg").write_text("no image")
    return "photos"


def here() -> list[str]:
    return sorted(path.name for path in Path().iterdir())


def draw(numbers: range) -> None:
    Path("photos").mkdir(exist_ok=True)
    for number in numbers:
        Image.new("RGB", (60, 40), (40 * number % 255, 90, 60)).save(f"photos/{number}.png")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "no folder is named"),
        (["nowhere", "a dog"], "PATH = 'nowhere': no such folder"),
        (["photos/0.png", "a dog"], "this is a file: give the folder"),
        (["https://example.org/photos", "a dog"], "a web address cannot be listed"),
        (["s3://bucket", "a dog"], "nothing is beside it: give --run-dir"),
        (["photos"], "no class is named"),
        (["photos", "a dog", " "], "class 2 of 2 is empty"),
        (["photos", "a dog", "a cat", "A  dog"], "class 'A dog' is given twice"),
        (["photos", "red car", "a red car"], "are both asked as 'a red car'"),
        (["photos", "a dog", "--classes", "x.csv"], "name classes or give a file"),
        (["photos", "--classes", "x.csv"], "no such file"),
        (["photos", "a dog", "label.nothing=3"], "unknown setting"),
        (["photos", "a dog", "--teacher", "/no/such/model"], "no such folder"),
        (["photos", "a dog", "--run-dir", "photos/0.png"], "nothing can be written there"),
    ],
)
def test_what_cannot_be_is_said_at_once(photos, arguments, words, capsys):
    """Catches a mistake that is found after the images were read, or told by a traceback."""
    assert hts("autolabel", *arguments) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert words in error
    assert "Traceback" not in error
    assert here() == ["photos"]


def test_an_empty_folder_fails_and_leaves_nothing(tmp_path, monkeypatch, capsys):
    """Catches a run directory for nothing, and a count of zeros for a reason."""
    monkeypatch.chdir(tmp_path)
    Path("photos").mkdir()
    assert hts("autolabel", "photos", "a dog") == 1
    assert "no usable image under photos: it is empty" in capsys.readouterr().err
    assert here() == ["photos"]
    Path("photos/notes.txt").write_text("x")
    assert hts("autolabel", "photos", "a dog") == 1
    error = capsys.readouterr().err
    assert "other_files 1" in error
    assert "hts prepare webdataset" in error
    assert hts("autolabel", "photos", "a dog", "--dry-run") == 1


def test_a_dry_run_touches_nothing(photos, capsys):
    """Catches classes taken for settings, or 2,000 of them that fill the screen."""
    names = [f"a thing of kind {number}" for number in range(2000)]
    assert hts("autolabel", photos, *names, "filter.top_k=2", "--dry-run") == 0
    out = capsys.readouterr().out
    assert "classes: 2,000 (a thing of kind 0, a thing of kind 1," in out
    assert "6 images to look at" in out
    assert all(len(line) <= 80 for line in out.splitlines())
    assert here() == ["photos"]


def test_the_run_lies_beside_the_images(photos, tmp_path, monkeypatch):
    """Catches a run among the images, or one in another place for every way to name a folder."""
    assert autolabel.beside("photos") == autolabel.beside("photos/") == "photos-labels"
    assert autolabel.beside("s3://bucket/a/photos/") == "s3://bucket/a/photos-labels"
    monkeypatch.chdir(photos)
    assert autolabel.beside(".") == f"{tmp_path}/photos-labels"
    with pytest.raises(ConfigError, match="--run-dir"):
        autolabel.beside("/")


def test_from_a_folder_to_labels_and_again(photos, capsys, monkeypatch, ray_session):
    """Catches a pass that nobody agreed to, work done twice, and labels that are lost.

    The calls in Python are those of docs/own-images.md.
    """
    assert hts("autolabel", photos, *CLASSES, *DUMMY) == 0
    out = capsys.readouterr().out
    assert "not used:" in out
    assert "broken.jpg: not an image" in out
    assert "without a terminal nobody can be asked" in out
    assert Path("photos-labels/preview.html").exists()
    assert not Path("photos-labels/labels.csv").exists()
    words = shlex.split(re.search(r"to label all images: hts (.*)", out)[1])
    assert words == ["autolabel", "photos", "--yes"]
    assert hts(*words) == 0
    out = capsys.readouterr().out
    assert "labels -> photos-labels/labels.csv" in out
    assert find_stage("photos-labels", "region_scores").stats["rows_taken_over"] == 5  # the sample
    check_rows(5)

    draw(range(5, 7))
    assert hts("autolabel", photos, *reversed(CLASSES)) == 0  # their order is no other question
    stats = find_stage("photos-labels", "region_scores").stats
    assert (stats["rows_taken_over"], stats["rows_out"]) == (5, 7)
    check_rows(7)

    labels = hts_ray.label(photos)
    assert labels.table().num_rows == sum(1 for _ in rows())
    assert repr(labels).endswith("of 7 images in photos-labels>")
    opened = []
    monkeypatch.setattr("webbrowser.open", opened.append)
    labels.show()
    assert opened == [Path("photos-labels/report.html").resolve().as_uri()]
    monkeypatch.setattr(autolabel.stages, "train", lambda run, stage: stage)
    monkeypatch.setattr(autolabel, "load", lambda path: f"the model of {path}")
    assert labels.train() == f"the model of {labels.stage.path}"


def test_no_label_at_all_is_told_and_written(photos, monkeypatch):
    """Catches the labels.csv of other classes beside a pass that found none."""
    run_dir = f"{Path().resolve()}/photos-labels"
    config = load_config(
        extra={"run_dir": run_dir, "filter": {"prior_alpha": 0.0, "per_class_quantile": None}}
    )
    run = autolabel.open_folder(photos, config, CLASSES, teacher="builtin:dummy")
    manifest = autolabel.list_images(run, photos).read(["image_id", "uri", "split"]).to_pylist()
    scores = StageFolder(run_dir, "region_scores", "x")
    same = {"boxes": [[0, 0, 9, 9]], "region_kinds": ["whole"], "scores": [0.0] * 3, "status": "ok"}
    found = pa.Table.from_pylist([row | same for row in manifest], schema=REGION_SCORES_SCHEMA)
    write_table(scores.file("part-0.parquet"), found)
    storage.write_json(scores.file("table.json"), {"class_ids": [0, 1, 2], "background": ["x"]})
    scores.publish({"rows_out": 5})
    Path("photos-labels/labels.csv").write_text("of other classes")
    monkeypatch.setattr(autolabel.stages, "label", lambda run: scores)
    with pytest.raises(NoLabelsError, match=r"no image shows one .*labels\.csv.*preview\.html"):
        autolabel.label_all(run)
    assert [row["class"] for row in rows()] == [""] * 5


def rows() -> list[dict[str, str]]:
    with open("photos-labels/labels.csv", encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


def check_rows(images: int) -> None:
    """Check that every image has its rows, and every label a box in its image."""
    found = rows()
    assert list(found[0]) == ["path", "class", "probability", "x0", "y0", "x1", "y1"]
    assert len({row["path"] for row in found}) == images
    assert all(Path(row["path"]).is_absolute() for row in found)
    for row in found:
        if not row["class"]:
            assert not any(row[name] for name in ("probability", "x0"))
            continue
        assert row["class"] in CLASSES
        assert 0 < float(row["probability"]) <= 1
        assert 0 <= float(row["x0"]) < float(row["x1"]) <= 60
        assert 0 <= float(row["y0"]) < float(row["y1"]) <= 40
