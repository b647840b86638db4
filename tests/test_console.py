"""How long steps are told of, on a terminal and elsewhere."""

from __future__ import annotations

import io

import pytest
from rich.console import Console
from rich.progress import Progress

from hts_ray import console


class Clock:
    """A clock that a test sets."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        """Return the time that was set."""
        return self.now


def test_neither_loading_nor_resuming_counts_into_the_rate():
    """Catches an ETA of days while a model loads, or of nothing after a resume."""
    clock = Clock()
    pace = console.Pace(clock)
    clock.now += 60  # a model is loaded
    pace.update(500, 1000)  # what an earlier run finished
    assert (pace.rate, pace.left) == (None, None)
    clock.now += 10
    pace.update(520, 1000)
    assert pace.rate == pytest.approx(2.0)
    clock.now += 10
    pace.update(620, 1000)  # ten a second since the first advance
    assert pace.rate == pytest.approx(10.0)
    assert pace.left == pytest.approx(38.0)
    clock.now += 8  # nothing new: the time goes on
    assert pace.left == pytest.approx(30.0)
    assert pace.rate == pytest.approx(10.0)
    clock.now += 1000
    assert pace.left == 0.0


def test_the_first_epoch_of_a_resumed_training_tells_the_pace():
    """Catches a training that goes on in epoch 8 and is thought to have done 8 in a moment."""
    clock = Clock()
    pace = console.Pace(clock)
    clock.now += 30
    pace.resume(7)
    pace.update(8, 10)
    assert pace.left == pytest.approx(60.0)


@pytest.fixture
def plain(monkeypatch):
    """Return what is written to a console that is no terminal."""
    sink = io.StringIO()
    monkeypatch.setattr(console, "console", Console(file=sink, width=160))
    return sink


def test_elsewhere_a_line_now_and_then(plain, monkeypatch):
    """Catches logs that fill with one line an image, or bars in a file."""
    clock = Clock()
    monkeypatch.setattr(console.time, "monotonic", clock)
    with console.steps() as shown:
        tell = shown.images("label [x]")
        for done in range(0, 1001, 100):
            clock.now += 5
            tell(done, 1000, 3)
    lines = plain.getvalue().splitlines()
    assert len(lines) == 3  # 55 seconds
    assert lines[-1] == "label [x]: 800/1000 images, 20.0 images/s, ETA 10 s, 3 quarantined"
    assert "\x1b" not in plain.getvalue()


def test_elsewhere_the_last_epoch_is_always_told(plain):
    """Catches a short training of which a log says nothing."""
    with console.steps() as shown:
        tell = shown.epochs("train", 3)
        for epoch in range(3):
            tell({"epoch": epoch, "loss": 0.5, "images_per_second": 12.3, "validation_mAP": 0.25})
    assert plain.getvalue().splitlines() == [
        "train: epoch 3 of 3, loss 0.5000, 12 images/s, validation mAP 25.0"
    ]


def test_a_terminal_gets_bars_of_what_goes_on(monkeypatch):
    """Catches a bar without rate, ETA or quarantine, and bars of stages that were done before."""
    monkeypatch.setenv("TERM", "xterm")
    sink = io.StringIO()
    terminal = Console(file=sink, width=160, force_terminal=True, color_system=None)
    monkeypatch.setattr(console, "console", terminal)
    monkeypatch.setattr(console, "_SHORTEST_S", 1e-9)
    with console.steps() as shown:
        shown.images("predict")  # finished before: never told of
        tell = shown.images("label")
        tell(0, 10, 0)
        tell(10, 10, 2)
        shown.epochs("train", 4)({"epoch": 0, "loss": 1.25, "images_per_second": 7.0})
    last = sink.getvalue().rpartition("label")[2]
    assert "10/10" in last
    assert "images/s" in last
    assert "2 quarantined" in last
    assert "loss 1.2500" in last
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
