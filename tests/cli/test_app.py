"""The command line, run as a user would run it."""

import errno
import runpy
import subprocess
import sys
from pathlib import Path

import click
import pytest
from PIL import Image

from hts_ray import cli
from hts_ray.cli.commands import MODULES, SHORT_HELP

REPOSITORY = Path(__file__).resolve().parents[2]
STAGES = [
    "prepare", "label", "filter", "train", "sweep", "predict", "evaluate", "pipeline", "demo"
]  # fmt: skip


def hts(*arguments, capsys):
    """Run the command in this process; return exit code, standard output and error."""
    code = 0
    try:
        cli.main(list(arguments))
    except SystemExit as stop:
        code = stop.code
    out, err = capsys.readouterr()
    return code, out, err


def test_every_stage_prints_a_config_that_reads_back(tmp_path, capsys):
    """Would catch a command whose --print-config starts work or prints what cannot be read."""
    for stage in STAGES:
        needed = {"prepare": ["folder", "--root", str(tmp_path)]}.get(stage, [])
        code, out, err = hts(stage, *needed, "--print-config", "train.epochs=3", capsys=capsys)
        assert (code, err) == (0, ""), stage
        path = tmp_path / f"{stage}.yaml"
        path.write_text(out)
        code, again, _ = hts(stage, *needed, "--config", str(path), "--print-config", capsys=capsys)
        assert (code, again) == (0, out)
        assert "epochs: 3" in again


def test_the_table_of_commands_agrees_with_the_commands():
    """Would catch a help text that was changed in one place only, or a command of no module."""
    context = click.Context(cli.cli)
    for name in cli.cli.list_commands(context):
        command = cli.cli.get_command(context, name)
        assert command.name == name
        assert command.get_short_help_str(120) == SHORT_HELP[name]


def test_the_list_of_commands_loads_nothing_slow():
    """Would catch an import that makes `hts --help` wait for what only some commands need."""
    lines = """
import sys
from hts_ray.cli import main
main(["--help"])
slow = {"torch", "ray", "transformers", "matplotlib", "pyarrow", "numpy", "pydantic"}
own = {f"hts_ray.cli.{name}" for name in ("stages", "runs", "exchange", "cluster", "options")}
print(sorted((slow | own) & set(sys.modules)), file=sys.stderr)
"""
    done = subprocess.run(
        [sys.executable, "-c", lines], capture_output=True, text=True, check=True, timeout=120
    )
    assert "evaluate" in done.stdout
    assert done.stderr.strip() == "[]"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["label", "label.regoins.whole=1"], "did you mean regions?"),
        (["train", "--preset", "hico-vitb23"], "did you mean hico-vitb"),
        (["filter", "--config", "/none.yaml"], "no such file"),
        (["evaluate", "--nonsense"], "No such option"),
        (["unknown"], "No such command"),
        (["prepare", "folder"], "Missing option '--root'"),
        (["train", "train.epochs=many"], "train.epochs = 'many'"),
    ],
)
def test_bad_usage_is_exit_code_2_without_traceback(arguments, words, capsys):
    """Would catch a mistake that is found late, told badly or returned as success."""
    code, out, err = hts(*arguments, capsys=capsys)
    assert code == 2
    assert words in err
    assert "Traceback" not in out + err


@pytest.mark.parametrize(
    ("error", "words", "others"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "/runs/a"), "a disk is full", "fault"),
        (
            RuntimeError("ray::Write() (pid=1)\n  File x\nOSError: [/b] No space left on device\n"),
            "a disk is full: OSError: [/b]",
            "pid=1",
        ),
        (RuntimeError("what is this?"), "RuntimeError: what is this?", "disk"),
    ],
)
def test_unforeseen_errors_are_told_by_what_helps(error, words, others, monkeypatch, capsys):
    """Would catch a full disk told as a fault of the program, or in Ray's wrapping."""

    def fail(*_):
        raise error

    monkeypatch.setattr("hts_ray.cli.options.open_run", fail)
    code, _, err = hts("filter", capsys=capsys)
    assert code == 1
    assert words in " ".join(err.split())
    assert others not in err


@pytest.mark.parametrize(
    ("stage", "words"),
    [
        ("label", "hts prepare"),
        ("filter", "hts label"),
        ("train", "hts filter"),
        ("predict", "hts train"),
        ("evaluate", "hts predict"),
    ],
)
def test_a_stage_without_its_input_names_the_command_before(stage, words, tmp_path, capsys):
    """Would catch a stage that starts Ray, or fails deep inside, when there is nothing to do."""
    code, _, err = hts(stage, "--run-dir", str(tmp_path), capsys=capsys)
    assert code == 1
    assert words in err


def test_dry_run_touches_nothing(tmp_path, capsys):
    """Would catch a plan that leaves folders behind."""
    images = tmp_path / "images"
    images.mkdir()
    run = tmp_path / "run"
    code, out, _ = hts(
        "prepare",
        "folder",
        "--root",
        str(images),
        "--run-dir",
        str(run),
        "--dry-run",
        capsys=capsys,
    )
    assert code == 0
    assert "plan" in out
    assert not run.exists()
    code, _, err = hts(
        "prepare", "folder", "--root", str(tmp_path / "no"), "--dry-run", capsys=capsys
    )
    assert code == 2
    assert "no such file or folder" in err


def test_a_report_of_no_run_is_a_failure(tmp_path, capsys, monkeypatch):
    """Would catch a mistyped run that becomes a folder with an empty page, or one among photos."""
    code, _, err = hts("report", str(tmp_path / "no"), capsys=capsys)
    assert code == 1
    assert "holds no run" in err
    assert not (tmp_path / "no").exists()
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").touch()
    assert hts("report", "--run-dir", str(tmp_path / "photos"), capsys=capsys)[0] == 1
    assert hts("report", "a", "--run-dir", "b", capsys=capsys)[0] == 2
    monkeypatch.chdir(tmp_path)
    assert "no run is found here" in hts("report", capsys=capsys)[2]
    assert [path.name for path in (tmp_path / "photos").iterdir()] == ["a.jpg"]


def test_a_mistyped_command_is_told_the_nearest(capsys):
    """Would catch a reader of `--help` for want of one letter."""
    code, _, err = hts("autolabl", capsys=capsys)
    assert code == 2
    assert "did you mean 'autolabel'?" in err


def test_empty_folder_is_a_failure_with_a_reason(tmp_path, capsys):
    """Would catch success reported for a run without images."""
    code, _, err = hts(
        "prepare",
        "folder",
        "--root",
        str(tmp_path),
        "--run-dir",
        str(tmp_path / "r"),
        capsys=capsys,
    )
    assert code == 1
    assert "no usable image" in err or "no image" in err


def test_hico_s_classes_are_not_taken_in_silence(tmp_path, capsys):
    """Would catch somebody's photographs labeled with 600 classes of another data set."""
    Image.new("RGB", (40, 30)).save(tmp_path / "a.png")
    prepare = ("prepare", "folder", "--root", str(tmp_path), "--run-dir", str(tmp_path / "r"))
    code, out, err = hts(*prepare, capsys=capsys)
    assert code == 0
    assert "classes.source=FILE" in out + err
    (tmp_path / "classes.csv").write_text("name\na dog\n")
    _, out, err = hts(*prepare, f"classes.source={tmp_path}/classes.csv", capsys=capsys)
    assert "classes.source=FILE" not in out + err


def test_a_run_is_gone_on_with_from_another_folder(tmp_path, monkeypatch, capsys):
    """Would catch a run whose class list is found from one folder only."""
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (40, 30)).save("a.png")
    Path("classes.csv").write_text("name\na dog\n")
    prepare = ("prepare", "folder", "--root", str(tmp_path), "--run-dir", str(tmp_path / "r"))
    assert hts(*prepare, "classes.source=classes.csv", capsys=capsys)[0] == 0
    (tmp_path / "there").mkdir()
    monkeypatch.chdir("there")
    code, out, _ = hts(*prepare, capsys=capsys)
    assert code == 0
    assert "as there is no classes.csv here" in " ".join(out.split())
    assert hts(*prepare, "classes.source=mistyped.csv", capsys=capsys)[0] == 2


def test_unexpected_faults_keep_their_traceback_for_debugging_only(monkeypatch, capsys):
    """Would catch a traceback shown to users, or one that developers cannot get."""

    def fail(*_):
        raise RuntimeError("boom [bold]")

    monkeypatch.setattr("hts_ray.cli.options.open_run", fail)
    code, _, err = hts("label", capsys=capsys)
    assert code == 1
    assert "RuntimeError: boom [bold]" in err
    monkeypatch.setenv("HTS_DEBUG", "1")
    with pytest.raises(RuntimeError, match="boom"):
        cli.main(["label"])


def test_without_a_command_the_run_s_state_is_shown(tmp_path, capsys):
    """Would catch an overview that fails on a run that has not begun."""
    code, out, _ = hts("--run-dir", str(tmp_path), capsys=capsys)
    assert code == 0
    assert "hts prepare" in out
    assert out.count("not yet") == 6


def test_jobs_take_the_arguments_of_their_commands(monkeypatch, capsys):
    """Would catch an entry point that names another command."""
    scripts = sorted((REPOSITORY / "jobs").glob("*.py"))
    assert {"label", "train", "predict", "evaluate", "pipeline"} <= {s.stem for s in scripts}
    for script in scripts:
        monkeypatch.setattr(sys, "argv", [str(script), "--print-config", "seed=77"])
        called = []
        monkeypatch.setattr(cli, "main", called.append)
        runpy.run_path(str(script), run_name="__main__")
        assert called == [[script.stem, "--print-config", "seed=77"]]
        assert script.stem in MODULES


def test_a_limited_pass_is_not_remembered(tmp_path, capsys, ray_session):
    """Would catch a trial on a sample whose limit quietly holds for the whole run after it."""
    images = tmp_path / "images"
    images.mkdir()
    for number in range(5):
        Image.new("RGB", (40, 30), (number * 40, 0, 0)).save(images / f"{number}.png")
    (tmp_path / "classes.csv").write_text("name\na red thing\nno blue thing\n")
    run = tmp_path / "run"
    settings = ["label.teacher.model=builtin:dummy", f"classes.source={tmp_path / 'classes.csv'}"]
    code, _, err = hts(
        "prepare", "folder", "--root", str(images), "--run-dir", str(run), *settings, capsys=capsys
    )
    assert code == 0, err
    page = tmp_path / "preview.html"
    code, out, err = hts(
        "label", "--run-dir", str(run), "--dry-run", "--sample", "2", "--preview", str(page),
        capsys=capsys,
    )  # fmt: skip
    assert code == 0, err
    assert "a red thing" in out
    assert "GPU-hours" in out
    assert "mode=captions, not prompts: no blue thing" in out
    assert page.exists()
    assert not list(run.glob("region_scores-*"))
    code, out, err = hts("label", "--run-dir", str(run), "--limit", "3", capsys=capsys)
    assert code == 0, err
    assert "3 of 3 rows" in out
    assert "limit: null" in (run / "config.yaml").read_text()
    code, _, err = hts("label", "--run-dir", str(run), "--preview", "x.html", capsys=capsys)
    assert code == 2
    assert "--dry-run" in err


def test_a_student_goes_out_in_the_paper_s_format_and_comes_back(tmp_path, capsys):
    """Would catch a command that names another function, or succeeds where nothing was written."""
    import torch
    from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD

    from hts_ray.classes import hico_classes
    from hts_ray.config import StudentConfig
    from hts_ray.engine.compat import build_image_tower
    from hts_ray.student import load_student
    from hts_ray.student.checkpoints import save_student
    from hts_ray.student.model import Student

    vision = {"image_size": 16, "layers": 1, "width": 64, "patch_size": 8}
    model_cfg = {"embed_dim": 8, "quick_gelu": True, "vision_cfg": vision}
    visual = build_image_tower(model_cfg)
    visual.proj = None
    student = Student(
        visual,
        torch.randn(600, 64),
        config=StudentConfig(feature_space="backbone"),
        class_table=hico_classes(),
        model_cfg=model_cfg,
        image_size=16,
        image_mean=OPENAI_DATASET_MEAN,
        image_std=OPENAI_DATASET_STD,
    )
    save_student(student.eval(), str(tmp_path / "student"))
    checkpoint, again = str(tmp_path / "c.pt"), str(tmp_path / "again")
    export = ["export", "--student", str(tmp_path / "student"), "--format"]
    code, out, err = hts(*export, "hts", "--output", checkpoint, capsys=capsys)
    assert code == 0, err
    assert "largest difference of logits" in out
    code, out, err = hts("import-checkpoint", checkpoint, "--output", again, capsys=capsys)
    assert code == 0, err
    assert "600" in out
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        assert (load_student(again)(images) - student(images)).abs().max() < 1e-4
    code, _, err = hts(*export, "hts", "--output", checkpoint, capsys=capsys)
    assert code == 2
    assert "something is there already" in err
    code, _, err = hts(*export, "tf", "--output", str(tmp_path / "x"), capsys=capsys)
    assert code == 2
    (tmp_path / "text.pt").write_text("hello")
    output = str(tmp_path / "x")
    code, _, err = hts(
        "import-checkpoint", str(tmp_path / "text.pt"), "--output", output, capsys=capsys
    )
    assert code == 1
    assert "text.pt cannot be read" in err
