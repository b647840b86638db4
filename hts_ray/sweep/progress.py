"""The progress of a sweep while it runs, and what it found."""

from __future__ import annotations

from collections import Counter

import yaml

from hts_ray.engine.console import Steps, console, duration, print_rows
from hts_ray.store import storage
from hts_ray.store.run import StageFolder
from hts_ray.sweep.log import OWN, TRIALS_FOLDER, Trial, TrialLog, best_first
from hts_ray.sweep.plan import Plan
from hts_ray.sweep.stage import BEST_FILE, FINALISTS_FILE
from hts_ray.sweep.trainings import CURVE
from hts_ray.sweep.tune import OnTrial


def trials_progress(plan: Plan, shown: Steps) -> OnTrial:
    """Return a callback for every trial of a sweep that ends; it shows the best one so far."""
    sweep, trials = plan.run.config.sweep, TrialLog(plan.stage.file(TRIALS_FOLDER)).read()
    total, objective = sweep.trials, CURVE if sweep.train == "full" else plan.objective
    show = shown.counts("sweep", "trials")
    show(len(trials), total, describe(trials, objective))  # of an earlier run

    def update(trial: Trial) -> None:
        trials[trial.number] = trial
        show(len(trials), total, describe(trials, objective))

    return update


def describe(trials: dict[int, Trial], objective: str) -> str:
    """Return the best of the complete trials, the own settings, and how many ended otherwise."""
    parts = []
    if complete := best_first(trials):
        best = complete[0]
        parts.append(f"best {objective} {best.objective:.4f} ({_name(best.number)})")
        if best.number != OWN and OWN in trials and trials[OWN].objective is not None:
            parts.append(f"own settings {trials[OWN].objective:.4f}")
    others = Counter(trial.status for trial in trials.values() if trial.status != "complete")
    return ", ".join([*parts, *(f"{count} {name}" for name, count in sorted(others.items()))])


def print_sweep(stage: StageFolder) -> None:
    """Print a finished sweep's finalists, its verdict and the settings that it found best."""
    finalists = storage.read_json(stage.file(FINALISTS_FILE))
    cells = [
        [
            _name(entry["number"]),
            f"{entry['trial_value']:.4f}",
            "failed" if entry["value"] is None else f"{entry['value']:.4f}",
            "-" if entry["gain_error"] is None else f"{entry['gain_error']:.4f}",
            duration(entry["seconds"]),
        ]
        for entry in finalists
    ]
    if cells:
        header = ["", "as a trial", "in full", "error of the gain", "trained in"]
        print_rows(f"finalists, {finalists[0]['objective']}", header, cells)
    console.print(f"[bold]{stage.stats['verdict']}[/bold] ({stage.stats['images']})")
    if not stage.stats["kept_own"]:
        best = yaml.safe_load(storage.read_bytes(stage.file(BEST_FILE)))
        console.print(yaml.safe_dump(best, sort_keys=False).rstrip())


def _name(number: int) -> str:
    return "own settings" if number == OWN else f"trial {number}"
