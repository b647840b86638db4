"""What the terminal shows: progress with ETA where there is a terminal, plain lines where not."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from hts_ray.tables import StageFolder

# In a file or a pipe there is no width to keep to.
_WIDTH = None if sys.stdout.isatty() else 160

console = Console(highlight=False, soft_wrap=True, width=_WIDTH)
errors = Console(highlight=False, soft_wrap=True, stderr=True)

_PLAIN_INTERVAL_S = 15.0


@contextmanager
def image_progress(title: str) -> Iterator[Callable[[int, int, int], None]]:
    """Give a callback (done, total, quarantined) that shows a long step's progress.

    On a terminal this is a bar with rate and ETA; elsewhere one line every 15 seconds.
    """
    if not console.is_terminal:
        yield _plain_progress(title)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[bad]}"),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(title, total=None, rate="", bad="")
        started, first = time.monotonic(), -1

        def update(done: int, total: int, quarantined: int) -> None:
            nonlocal first
            # What an earlier run finished must not count into this run's rate.
            first = done if first < 0 else first
            rate = (done - first) / max(time.monotonic() - started, 1e-6)
            bar.update(
                task,
                completed=done,
                total=total,
                rate=f"{rate:.1f} images/s" if done > first else "",
                bad=f"{quarantined} quarantined" if quarantined else "",
            )

        yield update


def _plain_progress(title: str) -> Callable[[int, int, int], None]:
    started = last = time.monotonic()
    first = -1

    def update(done: int, total: int, quarantined: int) -> None:
        nonlocal last, first
        first = done if first < 0 else first
        now = time.monotonic()
        if now - last < _PLAIN_INTERVAL_S:
            return
        last = now
        rate = (done - first) / max(now - started, 1e-6)
        left = f", ETA {duration((total - done) / rate)}" if rate > 0 else ""
        bad = f", {quarantined} quarantined" if quarantined else ""
        console.print(f"{title}: {done}/{total} images, {rate:.1f} images/s{left}{bad}")

    return update


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
    console.print(f"[bold]{name}[/bold]: {', '.join(parts)} -> {stage.path}")


def print_mapping(title: str, values: Mapping[str, Any]) -> None:
    """Print names and values in two columns."""
    table = Table(title=title, title_justify="left", show_header=False, box=None, pad_edge=False)
    for name, value in values.items():
        table.add_row(name, str(value))
    console.print(table)


def print_rows(
    title: str, header: Sequence[str], rows: Sequence[Sequence[str]], text_columns: int = 1
) -> None:
    """Print a table; the first `text_columns` columns are text, the others are numbers."""
    table = Table(title=title, title_justify="left", box=None, header_style="bold")
    for place, name in enumerate(header):
        table.add_column(name, justify="left" if place < text_columns else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    console.print(table)


def percent(value: float | None) -> str:
    """Return a fraction as a percentage with one decimal; a dash for None."""
    return "-" if value is None else f"{100 * value:.1f}"
