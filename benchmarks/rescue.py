"""What a sweep wins back for runs that start from bad settings, beside simpler searches.

    python benchmarks/rescue.py --cache runs/losses [--worlds 5 6 7] [--trials 24]

On each world the demo's settings are spoilt in turn (STARTS), and a search starts from there: the
sweep as `hts sweep` runs it, a plain grid of the threshold and the loss's temperature, and settings
drawn at random from the sweep's own space, each trained in full and compared as the sweep's
finalists are. The random search tries as many settings as cost what the sweep costs (DRAWN); the
seconds of all are told. Every search must be clear of chance to leave its start. What it chooses is
trained once more, on all images, and scored on the test split, which no search sees. `back` is the
share of the mAP lost by the bad settings that the choice wins back: summed over a world's starts.

Trials and verdicts are the package's own functions, in this process. What is trained in full is the
stand-in of `benchmarks/fits.py`, whose last block stays frozen too. Every measurement is kept in
rescue.jsonl of --cache.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fits import AS_IT_IS, Cache, World, open_world, sweep_data
from measured import measured_on, write_results

from hts_ray.config import override
from hts_ray.engine.console import percent, print_rows
from hts_ray.errors import UserError
from hts_ray.metrics import hico_average_precision, mean_average_precision
from hts_ray.store.aliases import FloatArray
from hts_ray.sweep.data import SweepData, Validation
from hts_ray.sweep.finalists import FOLDS, Finalist, final_objective, paired_error
from hts_ray.sweep.log import OWN, Trial, promising_first
from hts_ray.sweep.objectives import (
    Outcome,
    choose_objective,
    unseen_expected_ap,
)
from hts_ray.sweep.space import Settings, Space, build_space, nested
from hts_ray.sweep.stage import choose_winner
from hts_ray.sweep.trial import run_trial
from hts_ray.sweep.tune import Halving

RESULTS = Path(__file__).parent / "results" / "rescue.json"
STARTS: dict[str, Settings] = {
    "positive_threshold 0.9": {"filter.positive_threshold": 0.9},
    "loss_temperature 1": {"train.loss_temperature": 1.0},
    "prior_alpha 1": {"filter.prior_alpha": 1.0},
    "aggregation max": {"filter.aggregation": "max"},
    "all four": {
        "filter.positive_threshold": 0.9,
        "train.loss_temperature": 1.0,
        "filter.prior_alpha": 1.0,
        "filter.aggregation": "max",
    },
}
GRID = {
    "filter.positive_threshold": (0.3, 0.5, 0.7),
    "train.loss_temperature": (1.0, 2.0, 4.0, 8.0),
}
DRAWN = 36  # settings of the random search: their trainings cost what a sweep of 24 trials does
LABELS = (0, 200, 50)
SEARCHES = ("sweep", "grid", "random")
SEED = 0


class Rescue:
    """The searches on one world, from bad settings, with so many labeled training images."""

    def __init__(self, world: World, labels: int, trials: int, kept: Cache) -> None:
        self.world, self.labels, self.kept = world, labels, kept
        self.config = override(world.config, {"sweep": {"trials": trials}})
        data = sweep_data(world, AS_IT_IS, self.config)
        if labels:
            random = np.random.default_rng([world.seed, labels])
            rows = random.choice(len(data.regions.image_ids), labels, replace=False)
            truth_VC = world.truth["train"].labels()[rows]
            labeled_N = np.isin(np.arange(len(data.regions.image_ids)), rows)
            validation = Validation(data.features_MD[rows], truth_VC)
            data = replace(data, labeled_N=labeled_N, validation=validation)
            self._rows, self._truth_VC = rows, truth_VC
        self.data: SweepData = data
        self.objective = choose_objective(None, bool(labels))

    def _key(self, what: str, settings: Settings, *more: Any) -> list[Any]:
        return [what, self.world.seed, self.labels, sorted(settings.items()), *more]

    def trial(self, settings: Settings, seed: int) -> dict[str, Any]:
        """Return a trial's metrics of one seed, with what it took."""

        def measure() -> dict[str, Any]:
            started = time.process_time()
            try:
                found = run_trial(self.data, settings, seed)
            except UserError as error:
                return {"message": str(error)}
            return {**found, "cpu_seconds": time.process_time() - started}

        found: dict[str, Any] = self.kept.once(self._key("trial", settings, seed), measure)
        return found

    def trained(self, settings: Settings) -> dict[str, Any]:
        """Train in full as a finalist: its AP of every class, and what it took."""

        def measure() -> dict[str, Any]:
            started = time.process_time()
            ap_C = self._labeled_ap(settings) if self.labels else self._held_out_ap(settings)
            cpu = time.process_time() - started
            return {
                "ap": [None if np.isnan(v) else v for v in ap_C],
                "cpu_seconds": cpu,
            }

        found: dict[str, Any] = self.kept.once(self._key("finalist", settings), measure)
        return found

    def _fit(self, settings: Settings, rows_N: Any = None, times: int = 1) -> Any:
        config = override(self.config, nested(settings))
        train = override(config, {"train": {"epochs": times * config.train.epochs}}).train
        labels = self.world.labels(AS_IT_IS, config.filter)
        return self.world.fit(labels, train, SEED, rows_N)[0]

    def _held_out_ap(self, settings: Settings) -> FloatArray:
        images = len(self.data.regions.image_ids)
        fold_N = np.random.default_rng([SEED, 3]).permutation(np.arange(images) % FOLDS)
        students = [self._fit(settings, np.flatnonzero(fold_N == f), FOLDS) for f in range(FOLDS)]
        logits_2NC = np.stack([self.world.logits(student, "train") for student in students])
        outcome = Outcome(self.data.reference_NC, fold_N.astype(np.int8), logits_2NC)
        return unseen_expected_ap(outcome)

    def _labeled_ap(self, settings: Settings) -> FloatArray:
        student = self._fit(settings, np.flatnonzero(~self.data.labeled_N))
        logits_VC = self.world.logits(student, "train")[self._rows]
        return np.asarray(hico_average_precision(logits_VC, self._truth_VC))

    def test(self, settings: Settings) -> float:
        """Return the test mAP of a student that is trained with some settings on all images."""

        def measure() -> dict[str, Any]:
            return {"mAP": self.world.judge(self._fit(settings))["mAP"]}

        key = ["test", self.world.seed, sorted(settings.items())]
        return float(self.kept.once(key, measure)["mAP"])

    def sweep(
        self, start: Settings, space: Space, finalists: int | None = None
    ) -> tuple[Settings, float, str]:
        """Search as `hts sweep`; returns the choice, its CPU seconds and the verdict."""
        sweep, own = self.config.sweep, {**space.own(), **start}
        halving = Halving(sweep.repeats, sweep.reduction, {})
        trials: dict[int, Trial] = {}
        seconds = 0.0
        for number in range(sweep.trials):
            settings = own if number == OWN else space.draw(sweep.seed, number)
            reports: list[float] = []
            status = "complete"
            for repeat in range(sweep.repeats):
                found = self.trial(settings, sweep.seed + repeat)
                if "message" in found:
                    status = "infeasible"
                    break
                seconds += found["cpu_seconds"]
                so_far = sum(reports[-1:]) * repeat
                reports.append((so_far + found[self.objective]) / (repeat + 1))
                on = halving.goes_on(number, repeat + 1, reports[-1])
                if repeat + 1 < sweep.repeats and not on:
                    status = "stopped"
                    break
            trials[number] = Trial(number, settings, status, {}, tuple(reports))  # type: ignore[arg-type]
        best = [trial for trial in promising_first(trials) if trial.number != OWN]
        chosen = [trials[OWN], *best[: finalists or sweep.finalists]]
        winner, verdict, more = self._compare(chosen, trials)
        return winner, seconds + more, verdict

    def plainly(self, start: Settings, space: Space, tried: Sequence[Settings]) -> Any:
        """Train all settings in full; returns the choice, its CPU seconds and the verdict."""
        own = {**space.own(), **start}
        trials = {
            number: Trial(number, {**own, **settings}, "complete", {}, (0.0,))
            for number, settings in enumerate([own, *tried])
        }
        winner, verdict, seconds = self._compare(list(trials.values()), trials)
        return winner, seconds, verdict

    def _compare(
        self, chosen: Sequence[Trial], trials: dict[int, Trial]
    ) -> tuple[Settings, str, float]:
        name, finalists, seconds, own_ap_C = (
            final_objective(self.objective),
            [],
            0.0,
            None,
        )
        for trial in chosen:
            found = self.trained(trial.settings)
            seconds += found["cpu_seconds"]
            ap_C = np.array([np.nan if v is None else v for v in found["ap"]])
            error: float | None = None if own_ap_C is None else paired_error(ap_C, own_ap_C)
            own_ap_C = ap_C if own_ap_C is None else own_ap_C
            value = mean_average_precision(ap_C)
            finalists.append(
                Finalist(trial.number, trial.settings, name, None, value, 0.0, "", error)
            )
        winner, verdict = choose_winner(self.objective, trials, finalists)
        return winner.settings, verdict, seconds


def rescue_world(
    world: World, path: str, labels: int, trials: int, searches: Sequence[str], kept: Cache
) -> list[Any]:
    """Return what every search makes of every start on a world."""
    rescue = Rescue(world, labels, trials, kept)
    good = rescue.test(build_space(rescue.config, path).own())
    grid = [dict(zip(GRID, values, strict=True)) for values in itertools.product(*GRID.values())]
    rows = []
    for name, start in STARTS.items():
        space = build_space(override(rescue.config, nested(start)), path)
        drawn = [space.draw(SEED + 1, number) for number in range(1, DRAWN + 1)]
        before = rescue.test(space.own())
        row = {
            "world": world.seed,
            "labels": labels,
            "start": name,
            "good": good,
            "before": before,
        }
        for search in searches:
            if search == "sweep":
                settings, seconds, verdict = rescue.sweep(start, space)
            else:
                tried = {"grid": grid, "random": drawn}[search]
                settings, seconds, verdict = rescue.plainly(start, space, tried)
            after = rescue.test(settings)
            row[search] = {"after": after, "cpu_seconds": seconds, "verdict": verdict}
        rows.append(row)
        print(
            row["world"],
            labels,
            name,
            *(f"{k} {row[k]['after']:.3f}" for k in searches),
        )
    return rows


def summary(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return, by labels and search, the share of lost mAP that came back, and what it took."""
    found = []
    for labels in LABELS:
        some = [row for row in rows if row["labels"] == labels]
        worlds = sorted({row["world"] for row in some})
        for search in (name for name in SEARCHES if some and name in some[0]):
            back = []
            for world in worlds:
                mine = [row for row in some if row["world"] == world]
                lost = sum(row["good"] - row["before"] for row in mine)
                back.append(sum(row[search]["after"] - row["before"] for row in mine) / lost)
            if not back:
                continue
            gains = [row[search]["after"] - row["before"] for row in some]
            error = None if len(back) < 2 else statistics.stdev(back) / len(back) ** 0.5
            found.append(
                {
                    "labels": labels,
                    "search": search,
                    "worlds": worlds,
                    "back": statistics.fmean(back),
                    "error": error,
                    "worst_gain": min(gains),
                    "mean_gain": statistics.fmean(gains),
                    "cpu_seconds": statistics.fmean(row[search]["cpu_seconds"] for row in some),
                }
            )
    return found


def main() -> None:
    """Search on every world, print and store the summary after each."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--worlds", type=int, nargs="+", default=[5, 6, 7])
    parser.add_argument("--trials", type=int, default=24)
    parser.add_argument("--labels", type=int, nargs="+", default=list(LABELS))
    parser.add_argument("--searches", nargs="+", default=list(SEARCHES), choices=SEARCHES)
    parser.add_argument("--cache", type=Path, default=Path("runs/losses"))
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    kept, rows = Cache(options.cache / "rescue.jsonl"), []
    for labels in options.labels:
        for seed in options.worlds:
            world = open_world(seed, str(options.cache / "worlds")).stand_in()
            path = str(next((options.cache / "worlds" / f"seed-{seed}").glob("region_scores-*")))
            rows += rescue_world(world, path, labels, options.trials, options.searches, kept)
            report = {"trials": options.trials, "summary": summary(rows), "rows": rows}
            write_results(options.out, {**measured_on(), **report})
    cells = [
        [
            str(row["labels"]),
            row["search"],
            percent(row["back"]),
            percent(row["worst_gain"]),
            f"{row['cpu_seconds']:.0f}",
        ]
        for row in summary(rows)
    ]
    print_rows("lost mAP won back", ["labels", "", "back in %", "worst gain", "CPU s"], cells)


if __name__ == "__main__":
    main()
