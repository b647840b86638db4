"""Tests that the documentation's commands run, one after the other, as a reader would run them."""

from __future__ import annotations

import io
import json
import re
import shutil
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
from documented import PAGES, ROOT, Command, blocks, commands

from hts_ray import cli
from hts_ray.demo.world import world_class_ids, write_world
from hts_ray.store.run import find_stage

pytestmark = pytest.mark.slow

# Commands of ours that no test of this module runs, by how they begin, and why. They are parsed
# all the same, by tests/test_docs.py.
NOT_RUN = {
    "hts autolabel photos": "downloads a model; that with --run-dir runs/mine is run",
    "hts prepare folder --root ~/photos --preset own-images": "would set back the tiny models",
    "hts submit": "needs a cluster: tests/cluster/test_submit.py and tests/test_jobs.py start one",
    "hts pipeline --run-dir s3://bucket": "needs labeled nodes: tests/faults/test_placement.py",
    "hts doctor": "judges the machine it runs on: tests/cluster/test_doctor.py",
    "hts import-checkpoint": "needs the paper's file: tests/cli/test_app.py reads one made there",
    "hts predict --student students/defr": "needs the paper's file",
    "hts predict --run-dir runs/hico --student students/defr": "needs the paper's file",
    "hts prepare hico --root s3://BUCKET": "needs a bucket: tests/test_s3.py has one",
    "hts prepare list": "tests/images/test_listed.py reads lists of every kind",
    "hts prepare webdataset": "needs a bucket; tests/images/test_shards.py reads local shards",
    "hts prepare parquet": "needs a bucket; tests/images/test_shards.py reads local shards",
    "hts prepare huggingface": "needs the hub; tests/images/test_listed.py reads local folders",
    "hts import-labels review-mine-": "needs a file of the page: tests/review/test_in_browser.py",
    "hts label --run-dir runs/mine label.teacher.model=open_clip:ViT": "downloads a model",
    "hts label --run-dir runs/mine label.teacher.model=Salesforce": "downloads a model",
    "hts label --run-dir runs/mine label.teacher.model=Qwen": "downloads a model for a GPU",
    "hts label --run-dir runs/mine --dry-run label.teacher.engine": "needs an endpoint",
    "hts train --run-dir runs/mine student.model=": "downloads models",
    "hts train --config mine.yaml": "downloads a model",
    "hts sweep --run-dir runs/mine sweep.validation=labeled": "that by `corrected` is run",
}
# Where a page's Python is run: here, or by the test that is named.
PYTHON = {
    "README.md": ["here"],
    "docs/own-images.md": ["tests/cli/test_autolabel.py"],
    "docs/predict.md": ["here"],
    "docs/report.md": ["tests/report/test_collect.py"],
    "docs/teacher.md": ["tests/test_docs.py", "tests/test_docs.py"],
}
_MODELS = [
    "label.teacher.model=builtin:dummy",
    "label.teacher.background=none",  # among 250 sentences a dummy is sure of none
    "student.model=builtin:world_clip",
    "student.pretrained=null",
    "student.image_size=null",
    "student.feature_space=projected",
    "train.num_workers=0",
    "train.epochs=1",
    "train.batch_size=8",
    "train.min_positives_per_class=1",
]
# What is set beside the page's own settings by the first command of a run, which remembers it.
SMALL = {
    "runs/mine": [
        *_MODELS,
        "train.trainable_blocks=1",
        "sweep.trials=1",
        "sweep.repeats=1",
        "sweep.finalists=0",
    ],
    "runs/hico": [
        *_MODELS,
        f"classes.ids={list(world_class_ids())}",
        "label.pool.num_gpus=0",
        "predict.pool={min_size: 1, max_size: 1, num_gpus: 0}",
        "student.precision='no'",
        "train.use_gpu=false",
    ],
    "runs/load": ["label.limit=2"],
}


class Reader:
    """Follows the pages in an empty folder, with drawn scenes for photographs.

    Commands run as they stand but for `SMALL`, for folders that lie elsewhere, and for the numbers
    of images. Files that a page takes for granted are made. An output that is there already is
    taken away first: a page may show two ways to the same place.
    """

    def __init__(self, home: Path) -> None:
        self.home = home
        self.done: set[str] = set()
        self.tasks = b""
        world = home / "world"
        write_world(str(world), 557, 24, 16)
        scenes = sorted((world / "images").rglob("*.jpg"))
        for folder in ("photos", "more-photos"):
            (home / folder).mkdir()
            for scene in scenes[:12]:
                shutil.copy(scene, home / folder)
        for name, scene in zip(("a.jpg", "b.jpg"), scenes, strict=False):
            shutil.copy(scene, home / name)
        (home / "classes.csv").write_text(blocks("docs/own-images.md", "csv")[0])
        self.places = {
            "~": str(home),
            "/data/hico_20150920": str(world),
            "s3://bucket/more": str(home / "more-photos"),
            "s3://bucket/run": "runs/mine",
            "200": "4",  # images to review, of 12
        }

    def follow(self, page: str) -> None:
        """Run a page's commands of ours in their order, but for those that another page had."""
        ours = [command for command in commands(page) if command.program == "hts"]
        for command in ours:
            text = str(command)
            if text not in self.done and not text.startswith(tuple(NOT_RUN)):
                self.run(command)
        self.done.update(map(str, ours))

    def run(self, command: Command) -> None:
        """Run one command in this process; an exit code other than 0 fails the test."""
        arguments = [word for entry in command.arguments for word in self.expand(entry)]
        if arguments[0] == "label" and "--limit" in arguments:
            # More than those that are corrected, since a sweep comes after it.
            arguments[arguments.index("--limit") + 1] = "10"
        for word in arguments:
            self.make_input(Path(word.rpartition("=")[2]))
        for option in ("--output", "--draw"):
            if option in arguments:
                remove(Path(value_of(option, arguments)))
        run_dir = value_of("--run-dir", arguments)
        if run_dir in SMALL and not Path(run_dir, "config.yaml").exists():
            arguments += SMALL[run_dir]
        code, printed = run_here(arguments)
        assert code == 0, f"{command.page}: {command}\n{printed[-3000:]}"
        if command.output:
            Path(command.output).write_text(printed)
        if "label-studio" in arguments:
            self.tasks = Path(value_of("--output", arguments), "tasks.json").read_bytes()

    def make_input(self, path: Path) -> None:
        """Write a file that a person or another program would have made."""
        if path.name in ("project-1-export.json", "corrected.json"):
            path.write_bytes(annotated(self.tasks))

    def expand(self, word: str) -> list[str]:
        """Do what the shell does, and put what is there in the place of examples of keys."""
        for place, real in self.places.items():
            if word == place or word.startswith(f"{place}/"):
                word = real + word[len(place) :]
        if example := re.fullmatch(r"(runs/\w+)/(\w+)-[0-9a-f]{12}", word):
            stage = find_stage(example[1], example[2])
            assert stage is not None, word
            return [stage.path]
        return sorted(map(str, Path().glob(word))) or [word] if "*" in word else [word]


def run_here(arguments: list[str]) -> tuple[int, str]:
    """Run a command in this process; returns its exit code and what it printed."""
    printed = io.StringIO()
    with redirect_stdout(printed), redirect_stderr(printed):
        try:
            cli.main(arguments)
        except SystemExit as stop:
            return int(stop.code or 0), printed.getvalue()
    return 0, printed.getvalue()


def value_of(option: str, arguments: list[str]) -> str:
    return arguments[arguments.index(option) + 1] if option in arguments else ""


def remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def annotated(tasks: bytes) -> bytes:
    """Return what Label Studio exports when a person agrees with every prediction."""
    entries = json.loads(tasks)
    for entry in entries:
        entry["annotations"] = [{"result": entry["predictions"][0]["result"]}]
    return json.dumps(entries).encode()


def test_what_is_not_run_is_said_to_be() -> None:
    """Catches reasons for commands that are gone."""
    found = [str(command) for page in PAGES for command in commands(page)]
    for beginning in NOT_RUN:
        assert any(text.startswith(beginning) for text in found), beginning


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory, ray_session: None) -> Iterator[Reader]:
    """A reader who has followed the two pages that make the runs of all others."""
    home = tmp_path_factory.mktemp("reader")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        found = Reader(home)
        found.follow("docs/own-images.md")
        found.follow("docs/hico.md")
        yield found


def test_the_page_on_own_images_leads_to_a_classifier(reader: Reader) -> None:
    """Catches steps that do not follow from one another: an input missing, an output elsewhere."""
    assert (reader.home / "runs" / "mine" / "report.html").stat().st_size > 10_000
    assert (reader.home / "student.onnx").is_file()
    assert len(list((reader.home / "drawn").glob("*.jpg"))) == 12
    assert "## " in (reader.home / "dataset" / "README.md").read_text(encoding="utf-8")


def test_the_page_on_hico_leads_to_figures(reader: Reader) -> None:
    """Catches a sequence that trains, predicts or evaluates with the wrong student."""
    measured = json.loads((reader.home / "runs/hico/metrics.json").read_text(encoding="utf-8"))
    assert 0 < measured["mAP"] < 1
    evaluations = list((reader.home / "runs/hico").glob("evaluation-*/metrics.json"))
    assert len(evaluations) == 3  # zero-shot, supervised, HTS


@pytest.mark.parametrize("page", [name for name in PAGES if commands(name)])
def test_commands_run(page: str, reader: Reader) -> None:
    """Catches commands that are well-formed and fail."""
    reader.follow(page)


def test_python_runs(reader: Reader) -> None:
    """Catches examples of Python that the code has left behind, and new ones that nobody runs."""
    assert {page for page in PAGES if blocks(page, "python")} == set(PYTHON)
    demo = reader.home / "runs" / "demo"
    demo.mkdir()
    (demo / "seed-0").symlink_to(reader.home / "runs" / "mine")
    for page, places in PYTHON.items():
        sources = blocks(page, "python")
        assert len(sources) == len(places), f"{page}: a block is new, or gone"
        for source, place in zip(sources, places, strict=True):
            if place == "here":
                with redirect_stdout(io.StringIO()):
                    exec(compile(source, page, "exec"), {})
            else:
                assert Path(page).name in (ROOT / place).read_text(encoding="utf-8")
