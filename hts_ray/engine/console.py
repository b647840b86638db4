"""What the terminal shows: progress with ETA where there is a terminal, plain lines where not."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Column, Table

if TYPE_CHECKING:
    from hts_ray.store.aliases import ImagesDone, TrainingTold
    from hts_ray.store.run import StageFolder

# In a file or a pipe there is no width to keep to.
_WIDTH = None if sys.stdout.isatty() else 160

console = Console(highlight=False, soft_wrap=True, width=_WIDTH)
errors = Console(highlight=False, soft_wrap=True, stderr=True)

_PLAIN_INTERVAL_S = 15.0
_UPDATE_INTERVAL_S = 0.1
_HINT_INTERVAL_S = 300.0
_RATE_PERIOD_S = 3600.0  # rich's own 30 s forget steps that take longer
_WIDE, _BAR_WIDTH, _NARROW_BAR_WIDTH = 120, 40, 10


class Steps:
    """How the long steps of one command go: bars on a terminal, elsewhere a line now and then.

    Its callbacks may be called from other threads. Without `bars` it prints lines.
    """

    def __init__(self, bars: Progress | None = None) -> None:
        self._bars = bars or _progress(disable=True)

    def images(self, title: str, unit: str = "images", hint: str = "") -> ImagesDone:
        """Return a callback (done, total, quarantined) for a step over images.

        `hint` is a line that a long step prints every five minutes.
        """
        step = _Step(self._bars, title, unit, hint=hint)

        def update(done: int, total: int, quarantined: int) -> None:
            step.update(done, total, f"{quarantined} quarantined" if quarantined else "")

        return update

    def counts(self, title: str, unit: str) -> Callable[[int, int, str], None]:
        """Return a callback (done, total, note) for a step over anything that can be counted."""
        return _Step(self._bars, title, unit, always=True).update

    def epochs(self, title: str, epochs: int) -> TrainingTold:
        """Return a callback for the progress of a training of `epochs` epochs.

        It takes the records that `student.progress` lists.
        """
        step, quality = _Step(self._bars, title, "images", always=True), ""
        encoded: ImagesDone | None = None

        def update(record: Mapping[str, Any]) -> None:
            nonlocal encoded, quality
            if "encoded" in record:  # only when a head is fitted
                encoded = encoded or self.images(f"{title}: features")
                encoded(record["encoded"], record["of"], record["quarantined"])
                return
            epoch, images = int(record["epoch"]), int(record["images"])
            of = int(record.get("of", images))
            if "of" not in record:
                step.begin(epoch * images, epochs * of)
            if (measured := record.get("validation_mAP")) is not None:
                quality = f"validation mAP {percent(measured)}"
            note = _joined(f"epoch {epoch + 1} of {epochs}", f"loss {record['loss']:.4f}", quality)
            step.update(epoch * of + images, epochs * of, note)

        return update

    def clean(self) -> None:
        """Remove the bars of steps that had nothing to do."""
        for task in self._bars.tasks:
            if task.total is None:
                self._bars.remove_task(task.id)


class _Step:
    """One step: its task among rich's, which keeps the rate, and when a line was last printed.

    What an earlier run finished and the time until a model is loaded do not count into the rate.
    With `always` the end of a step is printed even if it took less than 15 seconds.
    """

    def __init__(
        self, bars: Progress, title: str, unit: str, *, always: bool = False, hint: str = ""
    ) -> None:
        self._bars, self._title, self._unit, self._hint = bars, title, unit, hint
        self._task = bars.add_task(escape(title), total=None, unit=unit, note="")
        self._updated = self._printed = self._hinted = time.monotonic()
        self._begun, self._printing, self._ended = False, always, False

    def begin(self, done: int, total: int) -> None:
        """Say what was finished before this step began, if nothing was said yet."""
        if not self._begun:
            self._begun = True
            self._bars.reset(self._task, completed=done, total=total)

    def update(self, done: int, total: int, note: str) -> None:
        """Show that `done` of `total` are finished now."""
        now = time.monotonic()
        if self._begun and now - self._updated < _UPDATE_INTERVAL_S and done < total:
            return
        self._updated = now
        task = next(task for task in self._bars.tasks if task.id == self._task)
        self._begun = self._begun and done >= task.completed  # a worker that died works again
        self.begin(done, total)
        self._bars.update(self._task, completed=done, total=total)
        rate = None if task.speed is None else f"{task.speed:.1f} {self._unit}/s"
        left = None if done >= total or not task.speed else task.time_remaining
        note = _joined(rate, None if left is None else f"ETA {duration(left)}", note)
        self._bars.update(self._task, note=note)
        if self._bars.disable:
            self._print(_joined(f"{self._title}: {done}/{total} {self._unit}", note), done >= total)
        if self._hint and done < total and now - self._hinted >= _HINT_INTERVAL_S:
            self._hinted = now
            console.print(self._hint, markup=False)

    def _print(self, line: str, ending: bool) -> None:
        now = time.monotonic()
        due = now - self._printed >= _PLAIN_INTERVAL_S or (ending and self._printing)
        if due and not (ending and self._ended):
            self._printed, self._printing, self._ended = now, True, ending
            console.print(line, markup=False)


def _progress(*columns: ProgressColumn, disable: bool = False) -> Progress:
    return Progress(
        *columns,
        console=console,
        speed_estimate_period=_RATE_PERIOD_S,
        get_time=time.monotonic,
        disable=disable,
        # On a terminal, what goes to standard error is printed above the bars.
        redirect_stderr=sys.stderr.isatty(),
    )


@contextmanager
def steps() -> Iterator[Steps]:
    """Show how the steps go that the block asks callbacks for."""
    if not console.is_interactive:
        yield Steps()
        return
    width = _BAR_WIDTH if console.width >= _WIDE else _NARROW_BAR_WIDTH
    columns: list[ProgressColumn] = [
        TextColumn("{task.description}"),
        BarColumn(width, table_column=Column(width=width)),
        MofNCompleteColumn(table_column=Column(no_wrap=True)),
        TextColumn("{task.fields[unit]}"),
        TimeElapsedColumn(table_column=Column(no_wrap=True)),
        # The only part that a narrow terminal cuts.
        TextColumn("{task.fields[note]}", markup=False, table_column=Column(no_wrap=True)),
    ]
    with _progress(*columns) as bars:
        shown = Steps(bars)
        try:
            yield shown
        finally:
            shown.clean()


@contextmanager
def image_progress(title: str, hint: str = "") -> Iterator[ImagesDone]:
    """Give a callback (done, total, quarantined) that shows one step's progress.

    `hint` is a line that a long step prints every five minutes.
    """
    with steps() as shown:
        yield shown.images(title, hint=hint)


def busy(title: str) -> AbstractContextManager[object]:
    """Show on a terminal that something of unknown length is being done."""
    return console.status(escape(title)) if console.is_interactive else nullcontext()


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
    rows = stats.get("rows_in")  # none of a zero-shot student
    parts = [f"{stats.get('rows_out', 0)} of {rows} rows"] if rows else []
    if stats.get("quarantined"):
        parts.append(f"{stats['quarantined']} quarantined (see {stage.file('quarantine')})")
    if stats.get("seconds"):
        parts.append(duration(float(stats["seconds"])))
    told = f": {escape(', '.join(parts))}" if parts else ""
    console.print(f"[bold]{name}[/bold]{told} -> {escape(stage.path)}")


def print_written(what: str, path: str) -> None:
    """Print where something was written that the user asked for."""
    console.print(f"[bold]{what}[/bold] -> {escape(path)}")


def print_line(text: str) -> None:
    """Print text without reading brackets as markup."""
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
