"""Labels on the command line, as a user would go round: export, correct, import, filter, review."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from labeled_run import save_run

from hts_ray import cli
from hts_ray.engine.run import open_run
from hts_ray.store.run import find_stage


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
    open_run(config).record()
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


def saved_page(run_dir, done, **changes):
    """Return what the review page of the run saves when the first `done` images are done."""
    stage = find_stage(run_dir, "pseudo_labels")
    names = ["a/2", "b/2", "a/1", "b/1", "b/3"]
    images = [
        {"image_id": name, "part": ("random", "uncertain")[place % 2], "done": place < done}
        | {"seen": place + 1 if place <= done else None}
        for place, name in enumerate(names)
    ]
    images[0] |= {"right": ["ride bicycle"], "wrong": ["sit on bicycle"]}
    images[1] |= {"wrong": ["wash car"], "missing": ["ride bicycle"]}
    head = {"format": "hts-review", "version": 1, "pseudo_labels": f"pseudo_labels-{stage.key}"}
    head |= {"classes": ["ride bicycle", "sit on bicycle", "wash car"]}
    return {**head, "images": images, **changes}


def test_the_review_page_goes_round(run_dir, tmp_path, capsys):
    """Catches figures of doubtful images, at the import or at a later review of it."""
    page = tmp_path / "page.html"
    code, out, err = hts("report", run_dir, "--review", "--output", page, capsys=capsys)
    assert code == 0, err
    assert page.exists()
    for words in ("of them drawn at random", "any more  1 images", "MB", "import-labels FILE"):
        assert words in out, words
    saved, corrected = tmp_path / "saved.json", tmp_path / "corrected"
    saved.write_text(json.dumps(saved_page(run_dir, 2)))
    arguments = ["import-labels", saved, "--run-dir", run_dir, "--output", corrected]
    code, out, err = hts(*arguments, capsys=capsys)
    assert code == 0, err
    out = " ".join(out.split())
    for words in (
        "3 images of the page are open: finish them, save, import with --force",
        "1 of 3 images drawn at random tell precision and recall",
        "1 images that were chosen, not drawn",
        "precision 50.0 % (95 % interval",  # of a/2 alone; b/2 would make it a third
        "recall 100.0 %",
        "hts filter --run-dir",
        "hts review",
    ):
        assert words in out, words
    code, out, err = hts("review", corrected, "--run-dir", run_dir, capsys=capsys)
    assert code == 0, err
    assert "precision" in out
    assert "50.0 %" in out
    saved.write_text(json.dumps(saved_page(run_dir, 5)))
    code, out, err = hts(*arguments, "--force", capsys=capsys)
    assert code == 0, err
    assert "are open" not in out
    code, out, err = hts("report", run_dir, "--output", tmp_path / "r.html", capsys=capsys)
    assert code == 0, err
    assert (
        "Only images that were drawn at random count; 1 more was corrected"
        in (tmp_path / "r.html").read_text()
    )


def test_pages_that_do_not_fit_are_told_by_their_field(run_dir, tmp_path, capsys):
    """Catches corrections of another run or other classes that are taken, and half a file."""
    saved, output = tmp_path / "saved.json", tmp_path / "corrected"
    arguments = ["import-labels", saved, "--run-dir", run_dir, "--output", output]
    whole = json.dumps(saved_page(run_dir, 2))
    for text, words in (
        (json.dumps(saved_page(run_dir, 2, pseudo_labels="pseudo_labels-other")),
         ("field pseudo_labels", "the page showed pseudo_labels-other", "--run-dir")),
        (json.dumps(saved_page(run_dir, 2, classes=["ride bicycle", "eat"])),
         ("field classes", "only the page has 'eat'", "write the page anew")),
        (whole[: len(whole) // 2], ("not complete JSON", "save or export it once more")),
        (json.dumps(saved_page(run_dir, 0)), ("5 images are there, and none was reviewed",)),
    ):  # fmt: skip
        saved.write_text(text)
        code, out, err = hts(*arguments, capsys=capsys)
        assert code == 1, out
        for expected in words:
            assert expected in " ".join(err.split()), expected
        assert "Traceback" not in err
        assert not output.exists()
    page = saved_page(run_dir, 2)
    page["images"][1]["missing"] = ["ride bycicle"]
    page["images"][2] = page["images"][0]
    saved.write_text(json.dumps(page))
    code, out, err = hts(*arguments, capsys=capsys)
    assert code == 0, err
    out = " ".join(out.split())
    for words in (
        "b/2: no class 'ride bycicle', did you mean 'ride bicycle'?",
        "a/2: the file has this image more than once: its first entry counts",
        f"correct them in {saved} and import again with --force",
    ):
        assert words in out, words
