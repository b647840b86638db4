"""Labels on the command line, as a user would go round: export, correct, import, filter, review."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from labeled_run import save_run

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


@pytest.fixture
def run_dir(tmp_path):
    config = save_run(tmp_path)
    (tmp_path / "run" / "config.yaml").write_text(config.to_yaml())
    return str(tmp_path / "run")


def test_a_review_goes_round(run_dir, tmp_path, capsys):
    """Catches commands that do not take what the one before wrote."""
    folder, corrected = tmp_path / "review", tmp_path / "corrected"
    export = ["export", "--run-dir", run_dir, "--format", "label-studio", "--output", folder]
    code, out, err = hts(*export, "--dry-run", capsys=capsys)
    assert (code, folder.exists()) == (0, False), err
    code, out, err = hts(*export, "export.image_url_prefix=http://host/", capsys=capsys)
    assert code == 0, err
    assert "left out: missing" in out
    assert "labeling_config.xml" in out
    tasks = json.loads((folder / "tasks.json").read_text())
    for number, task in enumerate(tasks):
        task["annotations"] = [{"result": task["predictions"][0]["result"]}]
        if task["data"]["image_id"] == "a/2":  # a person unticks the second class
            task["annotations"][0]["result"][0]["value"]["choices"].pop()
        if task["data"]["image_id"] == "b/1":
            task["annotations"][0]["result"][0]["value"]["choices"] = ["wash cra"]
        if number == len(tasks) - 1:
            del task["annotations"]
    (tmp_path / "done.json").write_text(json.dumps(tasks))
    arguments = ["import-labels", tmp_path / "done.json", "--output", corrected]
    code, out, err = hts(*arguments, "--run-dir", run_dir, capsys=capsys)
    assert code == 0, err
    for words in ("not_reviewed", "did you mean 'wash car'?", "precision", "filter.overrides="):
        assert words in out, words
    agreement = json.loads((corrected / "agreement.json").read_text())
    assert agreement["overall"]["wrong"] == 1
    assert agreement["disagreements"][0]["name"] == "sit on bicycle"
    code, _, err = hts(*arguments, "--run-dir", run_dir, capsys=capsys)
    assert code == 2
    assert "--force" in err
    applied = f"filter.overrides={corrected}"
    code, out, err = hts("filter", "--run-dir", run_dir, applied, capsys=capsys)
    assert code == 0, err
    assert "corrected_images" in out
    figures = tmp_path / "figures.json"
    code, out, err = hts(
        "review", corrected, "--run-dir", run_dir, "--json", figures, capsys=capsys
    )
    assert code == 0, err
    assert "made from these corrections" in out
    assert json.loads(figures.read_text())["overall"]["precision"] == 1.0
    assert list(Path(run_dir).glob("review-*/agreement.json"))


def test_labels_and_students_do_not_mix(run_dir, tmp_path, capsys):
    """Catches options that are taken and have no effect."""
    for arguments, words in (
        (["--format", "coco", "--output", "x.json", "--student", "s"], "writes labels"),
        (["--format", "onnx", "--output", "x.onnx", "--limit", "3"], "writes a student"),
        (["--format", "cocoo", "--output", "x.json"], "label-studio (labels)"),
        (["--format", "coco", "--output", "x"], "end its name in .json"),
    ):
        code, _, err = hts("export", "--run-dir", run_dir, *arguments, capsys=capsys)
        assert code == 2, arguments
        assert words in err
    truth = tmp_path / "truth.csv"
    code, out, err = hts(
        "export", "--run-dir", run_dir, "--format", "csv", "--output", truth,
        "--manifest", f"{run_dir}/manifest-m", capsys=capsys,
    )  # fmt: skip
    assert code == 0, err
    assert "manifest-m" in out
    assert "negative" in truth.read_text(encoding="utf-8-sig").splitlines()[0]
