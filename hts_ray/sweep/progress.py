"""How a sweep stands: a live table on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import yaml
from rich.console import Console
from rich.live import Live
from rich.table import Table

from hts_ray.engine.console import Steps, console, duration, print_rows
from hts_ray.store import storage
from hts_ray.store.aliases import ImagesDone
from hts_ray.store.run import StageFolder
from hts_ray.sweep.log import OWN, TRIALS_FOLDER, Trial, TrialLog
from hts_ray.sweep.plan import Plan
from hts_ray.sweep.stage import BEST_FILE, FINALISTS_FILE

_PLAIN_INTERVAL_S = 15.0


class SweepState:
    """What is known of a sweep's trials while they run; `known` ended in an earlier run."""

    def __init__(self, total: int, objective: str, known: Sequence[Trial] = ()) -> None:
        self.total, self.objective = total, objective
        self.statuses: Counter[str] = Counter()
        self.own: float | None = None
        self.best: Trial | None = None
        self._known, self._started = len(known), time.monotonic()
        for trial in known:
            self.add(trial)

    def add(self, trial: Trial) -> None:
        """Take in a trial that ended."""
        self.statuses[trial.status] += 1
        if trial.status != "complete" or trial.objective is None:
            return
        if trial.number == OWN:
            self.own = trial.objective
        if self.best is None or trial.objective > (self.best.objective or 0.0):
            self.best = trial

    @property
    def done(self) -> int:
        """Trials that ended."""
        return self.statuses.total()

    @property
    def rate(self) -> float:
        """Trials a second, of this run."""
        return (self.done - self._known) / max(time.monotonic() - self._started, 1e-9)

    def rows(self) -> list[tuple[str, str]]:
        """Return what there is to tell, with its name."""
        ended = ", ".join(f"{count} {name}" for name, count in sorted(self.statuses.items()))
        rows = [("trials", f"{self.done}/{self.total}{f' ({ended})' if ended else ''}")]
        if self.best is not None:
            name = "own settings" if self.best.number == OWN else f"trial {self.best.number}"
            rows.append((f"best {self.objective}", f"{self.best.objective:.4f} ({name})"))
        if self.own is not None:
            rows.append(("own settings", f"{self.own:.4f}"))
        if self.rate:
            rows.append(("trials/s", f"{self.rate:.1f}"))
        if self.rate and self.done < self.total:
            rows.append(("ETA", duration((self.total - self.done) / self.rate)))
        return rows

    def table(self) -> Table:
        """Return it as a table."""
        table = Table(title="sweep", title_justify="left", box=None, show_header=False)
        for row in self.rows():
            table.add_row(*row)
        return table


@contextmanager
def sweep_progress(plan: Plan, target: Console = console) -> Iterator[Callable[[Trial], None]]:
    """Give a callback that shows every trial of a sweep that ends."""
    known = list(TrialLog(plan.stage.file(TRIALS_FOLDER)).read().values())
    state = SweepState(plan.run.config.sweep.trials, plan.objective, known)
    if target.is_terminal:
        with Live(state.table(), console=target, refresh_per_second=4) as live:

            def show(trial: Trial) -> None:
                state.add(trial)
                live.update(state.table())

            yield show
        return
    last = time.monotonic()

    def tell(trial: Trial) -> None:
        nonlocal last
        state.add(trial)
        if time.monotonic() - last >= _PLAIN_INTERVAL_S or state.done == state.total:
            last = time.monotonic()
            target.print("sweep: " + ", ".join(f"{name} {value}" for name, value in state.rows()))

    yield tell


def features_progress() -> ImagesDone:
    """Return a callback that tells of images as their features are computed, by lines.

    A bar would stand in the way of the table of trials.
    """
    return Steps().images("sweep: features")


def print_sweep(stage: StageFolder) -> None:
    """Print a finished sweep's finalists, its verdict and the settings that it found best."""
    finalists = storage.read_json(stage.file(FINALISTS_FILE))
    cells = [
        [
            "own settings" if entry["number"] == OWN else f"trial {entry['number']}",
            f"{entry['trial_value']:.4f}",
            "failed" if entry["value"] is None else f"{entry['value']:.4f}",
            duration(entry["seconds"]),
        ]
        for entry in finalists
    ]
    if cells:
        header = ["", "as a trial", "in full", "trained in"]
        print_rows(f"finalists, {finalists[0]['objective']}", header, cells)
    console.print(f"[bold]{stage.stats['verdict']}[/bold]")
    if not stage.stats["kept_own"]:
        best = yaml.safe_load(storage.read_bytes(stage.file(BEST_FILE)))
        console.print(yaml.safe_dump(best, sort_keys=False).rstrip())
