"""How long steps are told of, on a terminal and elsewhere."""

from __future__ import annotations

import io

import pytest
from rich.console import Console
from rich.progress import Progress

from hts_ray.engine import console
from hts_ray.store.run import StageFolder


class Clock:
    """A clock that a test sets."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        """Return the time that was set."""
        return self.now


@pytest.fixture
def plain(monkeypatch):
    """Return what is written to a console that is no terminal."""
    sink = io.StringIO()
    monkeypatch.setattr(console, "console", Console(file=sink, width=160))
    return sink


@pytest.fixture
def clock(monkeypatch):
    """Return the clock that the console's rates go by."""
    clock = Clock()
    monkeypatch.setattr(console.time, "monotonic", clock)
    return clock


def test_neither_loading_nor_resuming_counts_into_the_rate(plain, clock):
    """Catches an ETA of days while a model loads, or of nothing after a resume."""
    tell = console.Steps().images("predict")
    clock.now += 60  # a model is loaded
    tell(500, 1000, 0)  # what an earlier run finished
    for done in (520, 620):
        clock.now += 20
        tell(done, 1000, 0)
    assert plain.getvalue().splitlines() == [
        "predict: 500/1000 images",
        "predict: 520/1000 images",
        "predict: 620/1000 images, 5.0 images/s, ETA 76 s",
    ]


def test_epochs_of_an_earlier_run_do_not_count_into_the_rate(plain, clock):
    """Catches a training that goes on in epoch 8 and is thought to have done 8 in a moment."""
    tell = console.Steps().epochs("train", 10)
    for epoch in (7, 8):
        clock.now += 50
        tell({"epoch": epoch, "images": 100, "loss": 0.5})
    assert plain.getvalue().splitlines() == [
        "train: 800/1000 images, epoch 8 of 10, loss 0.5000",
        "train: 900/1000 images, 2.0 images/s, ETA 50 s, epoch 9 of 10, loss 0.5000",
    ]


def test_work_that_is_done_again_is_timed_anew(plain, clock):
    """Catches a negative rate, or an ETA of nothing, after a worker died."""
    tell = console.Steps().images("label")
    for done in (0, 50, 90, 60, 70, 80):
        clock.now += 20
        tell(done, 100, 0)
    assert plain.getvalue().splitlines()[2:] == [
        "label: 90/100 images, 2.0 images/s, ETA 5 s",
        "label: 60/100 images",
        "label: 70/100 images",
        "label: 80/100 images, 0.5 images/s, ETA 40 s",
    ]


def test_a_slow_step_keeps_its_rate(plain, clock):
    """Catches rich's 30 seconds, after which a slow step would have no ETA."""
    tell = console.Steps().images("label")
    for done in range(4):
        tell(done, 10, 0)
        clock.now += 300
    assert plain.getvalue().splitlines()[-1] == "label: 3/10 images, 0.0 images/s, ETA 35 min 0 s"


def test_elsewhere_a_line_now_and_then(plain, clock):
    """Catches logs that fill with one line an image, or bars in a file."""
    with console.steps() as shown:
        tell = shown.images("label [x]")
        for done in range(0, 1001, 100):
            clock.now += 5
            tell(done, 1000, 3)
    lines = plain.getvalue().splitlines()
    assert len(lines) == 4  # of 55 seconds, and the end
    assert lines[-2] == "label [x]: 800/1000 images, 20.0 images/s, ETA 10 s, 3 quarantined"
    assert "\x1b" not in plain.getvalue()


def test_elsewhere_what_was_told_of_is_told_to_its_end(plain, clock):
    """Catches a log that stops at 65 of 150 images, an end told twice, and lines of short steps."""
    with console.steps() as shown:
        tell = shown.images("predict")
        for done in (0, 65, 150, 150):
            tell(done, 150, 0)
            clock.now += 16
        shown.images("prepare")(7, 7, 0)
    assert plain.getvalue().splitlines() == [
        "predict: 65/150 images",
        "predict: 150/150 images, 5.3 images/s",
    ]


def test_elsewhere_the_last_epoch_is_always_told(plain):
    """Catches a short training of which a log says nothing."""
    with console.steps() as shown:
        tell = shown.epochs("train", 3)
        for epoch in range(3):
            tell({"epoch": epoch, "loss": 0.5, "images": 100, "validation_mAP": 0.25})
    (line,) = plain.getvalue().splitlines()
    assert line.startswith("train: 300/300 images")
    assert line.endswith("epoch 3 of 3, loss 0.5000, validation mAP 25.0")


def test_a_training_is_told_of_within_its_epochs(plain, clock):
    """Catches an epoch of an hour without a word, and an ETA that is of this epoch alone."""
    with console.steps() as shown:
        tell = shown.epochs("train", 2)
        for images in (0, 10, 20):
            clock.now += 20
            tell({"epoch": 0, "images": images, "of": 100, "loss": 0.75})
        clock.now += 160
        tell({"epoch": 0, "images": 100, "loss": 0.5, "validation_mAP": 0.1})
        clock.now += 20
        tell({"epoch": 1, "images": 10, "of": 100, "loss": 0.4})
        for encoded in (0, 1, 3):
            tell({"encoded": encoded, "of": 4, "quarantined": 1})
            clock.now += 20
    assert plain.getvalue().splitlines() == [
        "train: 0/200 images, epoch 1 of 2, loss 0.7500",
        "train: 10/200 images, epoch 1 of 2, loss 0.7500",
        "train: 20/200 images, 0.5 images/s, ETA 6 min 0 s, epoch 1 of 2, loss 0.7500",
        "train: 100/200 images, 0.5 images/s, ETA 3 min 20 s, epoch 1 of 2, loss 0.5000,"
        " validation mAP 10.0",
        "train: 110/200 images, 0.5 images/s, ETA 3 min 0 s, epoch 2 of 2, loss 0.4000,"
        " validation mAP 10.0",
        "train: features: 1/4 images, 1 quarantined",
        "train: features: 3/4 images, 0.1 images/s, ETA 10 s, 1 quarantined",
    ]


def test_a_terminal_gets_bars_of_what_goes_on(monkeypatch):
    """Catches a bar without rate, ETA or quarantine, and bars of stages that were done before."""
    monkeypatch.setenv("TERM", "xterm")
    sink = io.StringIO()
    terminal = Console(file=sink, width=160, force_terminal=True, color_system=None)
    monkeypatch.setattr(console, "console", terminal)
    monkeypatch.setattr(console, "_UPDATE_INTERVAL_S", 0.0)
    with console.steps() as shown:
        shown.images("predict")  # finished before: never told of
        tell = shown.images("label")
        for done in (0, 4, 10):
            tell(done, 10, 2)
        told = shown.epochs("train", 4)
        for epoch in range(2):
            told({"epoch": epoch, "loss": 1.25, "images": 7})
    last = sink.getvalue().rpartition("label")[2]
    assert "10/10" in last
    assert "/s" in last
    assert "2 quarantined" in last
    assert "loss 1.2500" in last
    assert "14/28" in last
    assert "ETA" in last.partition("train")[2]


def test_bars_of_steps_that_had_nothing_to_do_go():
    """Catches `predict 0/?` under a finished run."""
    bars = Progress(console=Console(file=io.StringIO()))
    shown = console.Steps(bars)
    shown.images("predict")
    shown.images("label")(1, 2, 0)
    shown.clean()
    assert [(task.description, task.completed, task.total) for task in bars.tasks] == [
        ("label", 1, 2)
    ]


def test_the_next_command_can_be_copied(plain):
    """Catches paths that a shell takes apart, or that the terminal takes for markup."""
    console.print_next("hts", "label", "--run-dir", "my runs/[1]")
    assert plain.getvalue() == "next: hts label --run-dir 'my runs/[1]'\n"


def test_brackets_are_no_markup(plain):
    """Catches paths, classes and settings of which a terminal shows the half without brackets."""
    console.print_rows("run [a]", ["class"], [["a [red] car"]])
    console.print_mapping("plan [b]", {"read": "photos [c]"})
    console.print_written("report", "runs/[d]/report.html")
    console.print_line("features -> runs/[e]")
    told = plain.getvalue()
    for words in ("run [a]", "a [red] car", "plan [b]", "photos [c]", "runs/[d]/", "runs/[e]"):
        assert words in told


def test_a_stage_without_rows_tells_of_none(plain, monkeypatch):
    """Catches "0 of 0 rows" of a zero-shot student, which looks like a failure."""
    stage = StageFolder("run", "student", "k")
    for stats in ({"rows_in": 0, "rows_out": 0, "seconds": 37}, {"rows_in": 5, "rows_out": 4}, {}):
        monkeypatch.setattr(StageFolder, "stats", stats)
        console.print_stage("train", stage)
    told = [line.partition(" -> ")[0] for line in plain.getvalue().splitlines()]
    assert told == ["train: 37 s", "train: 4 of 5 rows", "train"]
