"""What the terminal shows: progress with ETA where there is a terminal, plain lines where not."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Column, Table
from rich.text import Text

if TYPE_CHECKING:
    from hts_ray.store.aliases import ImagesDone, TrainingTold
    from hts_ray.store.run import StageFolder

# In a file or a pipe there is no width to keep to.
_WIDTH = None if sys.stdout.isatty() else 160

console = Console(highlight=False, soft_wrap=True, width=_WIDTH)
errors = Console(highlight=False, soft_wrap=True, stderr=True)

_PLAIN_INTERVAL_S = 15.0
_BAR_INTERVAL_S = 0.1
_WIDE, _BAR_WIDTH, _NARROW_BAR_WIDTH = 120, 40, 10
_SHORTEST_S = 0.5  # what advanced in less says nothing about the rest


class Pace:
    """How fast a step goes, and what is left of it.

    The rate is measured from the first advance on: neither what an earlier run finished nor the
    time until a model is loaded counts.
    """

    def __init__(self, clock: Callable[[], float] | None = None) -> None:
        self._clock = clock or time.monotonic
        self._first: int | None = None
        self.done = self.total = 0
        self._started = self._updated = self._clock()
        self._base: tuple[float, int] | None = None

    def resume(self, done: int) -> None:
        """Take in what was finished before; the step counts from when this pace was made."""
        if self._first is None:
            self._first = self.done = done

    def update(self, done: int, total: int) -> None:
        """Take in that `done` of `total` are finished now."""
        now = self._clock()
        if self._first is None or done < self.done:  # a worker that died does its part again
            self._first, self._started, self._base = done, now, None
        if done > self.done:
            self._updated = now
        if self._base is None and done > self._first:
            self._base = (now, done)
        self.done, self.total = done, total

    @property
    def rate(self) -> float | None:
        """How many a second, None until there was enough of an advance."""
        if self._base is None or self._first is None:
            return None
        since, before = self._base
        if self.done == before:  # one advance so far: all there is to go by
            since, before = self._started, self._first
        seconds = self._updated - since
        return (self.done - before) / seconds if seconds >= _SHORTEST_S else None

    @property
    def left(self) -> float | None:
        """Seconds until the step is done, None while there is no rate; counts down by itself."""
        if self.rate is None:
            return None
        passed = self._clock() - self._updated
        return max((self.total - self.done) / self.rate - passed, 0.0)


class _Plain:
    """Prints a line at most every 15 seconds, and the end of what it has told of, once.

    With `always` the end is told of what took less than 15 seconds too.
    """

    def __init__(self, *, always: bool = False) -> None:
        self._last = time.monotonic()
        self._told, self._ended = always, False

    def tell(self, line: str, *, ending: bool) -> None:
        now = time.monotonic()
        due = now - self._last >= _PLAIN_INTERVAL_S or (ending and self._told)
        if due and not (ending and self._ended):
            self._last, self._told, self._ended = now, True, ending
            console.print(line, markup=False)


class _Eta(ProgressColumn):
    """The time that is left, by the step's own pace: rich's forgets steps of over 30 seconds."""

    def render(self, task: Task) -> Text:
        left = task.fields["pace"].left
        if left is None or task.finished:
            return Text()
        return Text(f"ETA {duration(left)}", style="progress.remaining")


class _Note(ProgressColumn):
    """What else there is to tell; the only part that a narrow terminal cuts."""

    def render(self, task: Task) -> Text:
        return Text(task.fields["note"], no_wrap=True, overflow="ellipsis")


class Steps:
    """How the long steps of one command go: bars on a terminal, elsewhere a line at times.

    Its callbacks may be called from other threads. Steps that had nothing to do leave no bar.
    """

    def __init__(self, bars: Progress | None) -> None:
        self._bars = bars
        self._silent: set[TaskID] = set()

    def images(self, title: str, unit: str = "images") -> ImagesDone:
        """Return a callback (done, total, quarantined) for a step over images."""
        pace = Pace()
        tell = self._teller(title, unit, pace, _Plain())

        def update(done: int, total: int, quarantined: int) -> None:
            pace.update(done, total)
            tell(f"{quarantined} quarantined" if quarantined else "")

        return update

    def epochs(self, title: str, epochs: int) -> TrainingTold:
        """Return a callback for what a training of so many epochs tells.

        It takes the records that `student.progress` lists.
        """
        pace, quality = Pace(), ""
        tell = self._teller(title, "images", pace, _Plain(always=True))
        encoded: ImagesDone | None = None

        def update(record: Mapping[str, Any]) -> None:
            nonlocal encoded, quality
            if "encoded" in record:  # which few trainings tell of
                encoded = encoded or self.images(f"{title}: features")
                encoded(record["encoded"], record["of"], record["quarantined"])
                return
            epoch, images = int(record["epoch"]), int(record["images"])
            of = int(record.get("of", images))
            if "of" not in record:
                pace.resume(epoch * images)
            pace.update(epoch * of + images, epochs * of)
            if (measured := record.get("validation_mAP")) is not None:
                quality = f"validation mAP {percent(measured)}"
            tell(_joined(f"epoch {epoch + 1} of {epochs}", f"loss {record['loss']:.4f}", quality))

        return update

    def _teller(self, title: str, unit: str, pace: Pace, plain: _Plain) -> Callable[[str], None]:
        """Return what shows a pace and a note: on a bar, elsewhere as a line."""
        show = self._shown(title, unit)

        def tell(note: str) -> None:
            rate = None if pace.rate is None else f"{pace.rate:.1f}"
            if show is not None:
                show(pace, rate and f"{rate}/s", note)
                return
            ended = pace.done >= pace.total
            left = None if pace.left is None or ended else f"ETA {duration(pace.left)}"
            speed = rate and f"{rate} {unit}/s"
            line = _joined(f"{title}: {pace.done}/{pace.total} {unit}", speed, left, note)
            plain.tell(line, ending=ended)

        return tell

    def _shown(self, title: str, unit: str) -> Callable[[Pace, str | None, str], None] | None:
        """Add a bar and return what moves it; None where there is no terminal."""
        bars = self._bars
        if bars is None:
            return None
        task = bars.add_task(escape(title), total=None, unit=unit, rate="", note="", pace=Pace())
        self._silent.add(task)
        last = 0.0

        def show(pace: Pace, rate: str | None, note: str) -> None:
            nonlocal last
            now = time.monotonic()
            if now - last < _BAR_INTERVAL_S and pace.done < pace.total:
                return
            last = now
            self._silent.discard(task)
            told: dict[str, Any] = {"rate": rate or "", "note": note, "pace": pace}
            bars.update(task, completed=pace.done, total=pace.total, **told)

        return show

    def clean(self) -> None:
        """Take away the bars of steps that never told anything."""
        if self._bars is not None:
            for task in self._silent:
                self._bars.remove_task(task)


@contextmanager
def steps() -> Iterator[Steps]:
    """Show how the steps go that the block asks callbacks for."""
    if not console.is_interactive:
        yield Steps(None)
        return
    width = _BAR_WIDTH if console.width >= _WIDE else _NARROW_BAR_WIDTH
    columns: list[ProgressColumn] = [
        TextColumn("{task.description}"),
        BarColumn(width, table_column=Column(width=width)),
        MofNCompleteColumn(table_column=Column(no_wrap=True)),
        TextColumn("{task.fields[unit]}"),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(table_column=Column(no_wrap=True)),
        _Eta(table_column=Column(no_wrap=True)),
        _Note(),
    ]
    # What is written to a terminal's standard error stands above the bars, not within them.
    above = sys.stderr.isatty()
    with Progress(*columns, console=console, redirect_stderr=above) as bars:
        shown = Steps(bars)
        try:
            yield shown
        finally:
            shown.clean()


@contextmanager
def image_progress(title: str) -> Iterator[ImagesDone]:
    """Give a callback (done, total, quarantined) that shows one step's progress."""
    with steps() as shown:
        yield shown.images(title)


@contextmanager
def busy(title: str) -> Iterator[None]:
    """Show on a terminal that something of unknown length is being done."""
    if not console.is_interactive:
        yield
        return
    with console.status(escape(title)):
        yield


def _joined(*parts: str | None) -> str:
    return ", ".join(part for part in parts if part)


def duration(seconds: float) -> str:
    """Return seconds in the units a person reads: 42 s, 3 min 5 s, 2 h 10 min."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 100:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def print_stage(name: str, stage: StageFolder) -> None:
    """Print one line on a finished stage: rows in and out, quarantined, seconds, folder."""
    stats = stage.stats
    parts = [f"{stats.get('rows_out', 0)} of {stats.get('rows_in', 0)} rows"]
    if stats.get("quarantined"):
        parts.append(f"{stats['quarantined']} quarantined (see {stage.file('quarantine')})")
    if stats.get("seconds"):
        parts.append(duration(float(stats["seconds"])))
    console.print(f"[bold]{name}[/bold]: {escape(', '.join(parts))} -> {escape(stage.path)}")


def print_written(what: str, path: str) -> None:
    """Print where something was written that the user asked for."""
    console.print(f"[bold]{what}[/bold] -> {escape(path)}")


def print_line(text: str) -> None:
    """Print text as it is, whatever brackets it holds."""
    console.print(text, markup=False)


def print_note(text: str) -> None:
    """Print something that a user should know and need not act on."""
    print_line(f"note: {text}")


def print_next(*words: str, why: str = "next") -> None:
    """Print a command to run next, as it can be copied into a shell."""
    line = shlex.join(words)
    console.print(f"{why}: [bold]{escape(line)}[/bold]")


def print_mapping(title: str, values: Mapping[str, Any]) -> None:
    """Print names and values in two columns."""
    table = Table(
        title=escape(title), title_justify="left", show_header=False, box=None, pad_edge=False
    )
    for name, value in values.items():
        table.add_row(name, escape(str(value)))
    console.print(table)


def print_rows(
    title: str, header: Sequence[str], rows: Sequence[Sequence[str]], text_columns: int = 1
) -> None:
    """Print a table; the first `text_columns` columns are text, the others are numbers."""
    table = Table(title=escape(title), title_justify="left", box=None, header_style="bold")
    for place, name in enumerate(header):
        table.add_column(name, justify="left" if place < text_columns else "right", no_wrap=True)
    for row in rows:
        table.add_row(*map(escape, row))
    console.print(table)


def percent(value: float | None) -> str:
    """Return a fraction as a percentage with one decimal; a dash for None."""
    return "-" if value is None else f"{100 * value:.1f}"
