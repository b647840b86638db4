"""`hts predict PATH`: images labeled, printed and drawn."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from hts_ray import cli


def hts(*arguments, capsys):
    """Run the command in this process; return exit code, standard output and error."""
    code = 0
    try:
        cli.main([str(argument) for argument in arguments])
    except SystemExit as stop:
        code = stop.code
    out, err = capsys.readouterr()
    return code, out, err


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    from hts_ray.classes import hico_classes
    from hts_ray.config import StudentConfig
    from hts_ray.student.checkpoints import save_student
    from hts_ray.student.model import build_student

    path = tmp_path_factory.mktemp("student") / "clip"
    save_student(build_student(StudentConfig(), hico_classes().subset([18, 74])), str(path))
    return str(path)


def test_paths_are_labeled_at_once(student, tmp_path, capsys):
    """Catches a prediction that needs a manifest, and bad images that end it or go unsaid."""
    images = tmp_path / "a=b"
    images.mkdir()
    for name in ("1.jpg", "2.png"):
        Image.new("RGB", (64, 48), (200, 10, 10)).save(images / name)
    (images / "3.jpg").write_text("no image")
    drawn = tmp_path / "drawn"
    one = images / "1.jpg"
    arguments = ["predict", images, one, "--student", student, "--top-k", "1", "--draw", drawn]
    code, out, err = hts(*arguments, "--regions", capsys=capsys)
    assert code == 0, err
    assert "2.png" in out
    assert "where" in out
    assert "1 of 4 images could not be used" in err
    assert sorted(path.name for path in drawn.iterdir()) == ["1.jpg", "1_2.jpg", "2.jpg"]
    with Image.open(drawn / "1.jpg") as picture:
        assert picture.width == 480
    code, _, err = hts(*arguments, capsys=capsys)
    assert code == 2
    assert "holds something already" in err
    code, out, err = hts("predict", images, "--student", student, "--json-lines", capsys=capsys)
    assert code == 0, err
    lines = [json.loads(line) for line in out.splitlines()]
    assert [Path(line["image"]).name for line in lines] == ["3.jpg", "1.jpg", "2.png"]
    assert "error" in lines[0]
    assert {label["name"] for label in lines[1]["labels"]} == {"ride bicycle", "wash car"}
    code, _, err = hts("predict", images / "3.jpg", "--student", student, capsys=capsys)
    assert code == 1
    assert "no image could be used" in err


def test_what_belongs_to_paths_is_refused_without_them(tmp_path, capsys):
    """Catches --top-k that is taken and does nothing to a table of scores."""
    run = ["--run-dir", str(tmp_path)]
    Image.new("RGB", (64, 48)).save(tmp_path / "1.jpg")
    for arguments, words in (
        (["--top-k", "3"], "hts predict PATH"),
        ([tmp_path, "--images", tmp_path], "leave the PATHs out"),
        (["predict.splitt=x"], "did you mean split"),
        ([tmp_path / "1.jpg"], "no student at"),
        ([tmp_path / "none.jpg"], "no image could be used"),
    ):
        code, _, err = hts("predict", *arguments, *run, capsys=capsys)
        assert code in (1, 2)
        assert words in err, err
