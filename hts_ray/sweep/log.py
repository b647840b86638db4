"""The trials of a sweep that ended, kept so that none is lost and none is run twice.

Ray Tune saves the state of an experiment every ten seconds or later, so `Tuner.restore` runs again
what ended since; its restored scheduler has lost its rungs (ray#35812); and the state is a pickle,
which runs the code of whoever could write it. Here every trial that ends is a small JSON file at
once, and a sweep that goes on asks Tune for the others only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from hts_ray.store import storage
from hts_ray.sweep.space import Settings

OWN = 0  # the number of the trial that has the run's own settings
TRIALS_FOLDER = "trials"  # in the sweep's folder, while it runs

Status = Literal["complete", "stopped", "infeasible", "failed"]
Metrics = dict[str, float]


@dataclass(frozen=True)
class Trial:
    """One trial that ended.

    `metrics` are means over the seeds that ran, `reports` the objective's mean after each of
    them. `status`: all seeds ran; stopped early by the scheduler; the settings lead to nothing
    that could be compared (`message` tells why); or an error of ours.
    """

    number: int
    settings: Settings
    status: Status
    metrics: Metrics = field(default_factory=dict)
    reports: tuple[float, ...] = ()
    seconds: float = 0.0
    message: str = ""

    @property
    def objective(self) -> float | None:
        """The objective after the last seed that ran; None where nothing could be compared."""
        return self.reports[-1] if self.reports else None


class TrialLog:
    """The trials that ended, a JSON file each, written in one step."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def write(self, trial: Trial) -> None:
        """Keep a trial."""
        storage.write_json(storage.join(self.folder, f"{trial.number:06d}.json"), asdict(trial))

    def read(self) -> dict[int, Trial]:
        """Return the trials kept, by number."""
        found = {}
        for name in storage.list_names(self.folder):
            if name.endswith(".json") and not name.startswith("."):
                values: Any = storage.read_json(storage.join(self.folder, name))
                trial = Trial(**{**values, "reports": tuple(values["reports"])})
                found[trial.number] = trial
        return dict(sorted(found.items()))


def best_first(trials: Mapping[int, Trial]) -> list[Trial]:
    """Return the complete trials by falling objective; of equal ones the earlier first."""
    complete = [trial for trial in trials.values() if trial.status == "complete"]
    return sorted(complete, key=_rank)


def promising_first(trials: Mapping[int, Trial]) -> list[Trial]:
    """Return the complete trials, best first, and then those stopped early, best first.

    A stopped trial lost to others after fewer seeds; it is still the next best that there is.
    """
    stopped = [trial for trial in trials.values() if trial.status == "stopped"]
    return best_first(trials) + sorted(stopped, key=lambda t: (-len(t.reports), *_rank(t)))


def _rank(trial: Trial) -> tuple[float, int]:
    return -(trial.objective or 0.0), trial.number
