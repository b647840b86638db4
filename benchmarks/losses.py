"""Losses compared fairly: each at its own temperature, rate and gradient clip, then on new worlds.

    python benchmarks/losses.py --cache runs/losses [--tune 111 114] [--worlds 5 6 7 8 9]

A grid of temperature x rate x clip is searched for every loss, on two validation worlds with the
teacher as it is, and with --weaker once more with a worse one. A clip is a multiple of the median
norm of the loss's own gradients at that temperature, or none: a common clip cuts the loss whose
gradients are large and leaves the others alone, and one far below the norm makes every step equally
long, so nothing is left to try below the smallest. Successive halving gives every loss the same
budget: the grid is fitted on one world, the best eight of it on both, then three times what lies at
half and at twice the best one's temperature and rate, beyond the grid's edges too. These are fits
of a stand-in whose last block stays frozen; the best three are trained as the demo trains, and the
best of them is the loss's setting. With it students are trained on worlds and with seeds that
nothing was chosen on, for three teachers: as the demo trains (--full-seeds), and the stand-in.

With --images the same is done where labels are scarce: so many training images of a world, epochs
in proportion, the teacher as it is.

A fit is the demo's training from the last frozen layer on (`benchmarks/fits.py`). Every fit is
kept in fits.jsonl of --cache, so a run that was cut off goes on; the results are written after
every seed and name the seeds they are of. Intervals are 95 % bootstrap intervals over worlds
and, within a world, seeds.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fits import (
    AS_IT_IS,
    METRICS,
    PAPER,
    TEACHERS,
    WEAK,
    WEAKER,
    Cache,
    Labels,
    Teacher,
    World,
    open_world,
)
from measured import measured_on, read_results, write_results

from hts_ray.config import TrainConfig, load_config, override
from hts_ray.engine.console import percent, print_rows
from hts_ray.errors import DataError
from hts_ray.student.model import Student

RESULTS = Path(__file__).parent / "results" / "losses.json"
LOSSES = ("lse_sign", "bce", "weighted_bce", "focal", "asl")
TEMPERATURES = (1 / 16, 1 / 4, 1.0, 4.0)
RATES = (0.5, 1.0, 2.0)
CLIPS = (0.1, 1.0, None)  # of the median norm
TUNING_SEED = 100
KEPT = 8  # settings of the grid that are fitted on the second world too
REFINED = 3  # times that the best one's neighbours are tried
FINALISTS = 3  # that are trained as the demo trains
RESAMPLES = 10_000
Json = Mapping[str, Any]
# The seed whose gradients without a clip are measured.
_NORM_SEED = 99
_UNBOUNDED = 1e9  # a clip that cuts nothing: norms are only told where there is one


@dataclass(frozen=True)
class Setting:
    """What is chosen for a loss; `rate` is a factor of the demo's, `clip` one of the median norm.

    Without a temperature the training is PAPER's (`benchmarks/fits.py`), with LSE-Sign.
    """

    loss: str
    temperature: float | None = None
    rate: float = 1.0
    clip: float | None = None

    @property
    def name(self) -> str:
        """How it is shown."""
        if self.temperature is None:
            return self.loss
        clip = "none" if self.clip is None else f"x{self.clip:g}"
        return f"T={self.temperature:g} rate x{self.rate:g} clip {clip}"


PUBLISHED = Setting("paper")
SUPERVISED = Setting("supervised")


class Lab(Cache):  # type: ignore[misc]
    """Fits by setting, world, seed and teacher."""

    def __init__(self, cache: Path, norms_of: int, images: int | None = None) -> None:
        super().__init__(cache / ("fits.jsonl" if images is None else f"fits-{images}.jsonl"))
        self._runs, self._norms_of, self._images = cache / "worlds", norms_of, images
        self._worlds: dict[tuple[int, bool], World] = {}
        self._labels: dict[tuple[int, str], Labels] = {}

    def world(self, seed: int, stand_in: bool = False) -> World:
        """Return the world of a seed."""
        if (seed, stand_in) not in self._worlds:
            found = self.world(seed).stand_in() if stand_in else open_world(seed, str(self._runs))
            self._worlds[seed, stand_in] = found
        return self._worlds[seed, stand_in]

    def labels(self, seed: int, teacher: Teacher) -> Labels:
        """Return the sure labels of a teacher's scores."""
        if (seed, teacher.name) not in self._labels:
            world = self.world(seed)
            config = override(world.config, PAPER)
            self._labels[seed, teacher.name] = world.labels(teacher, config.filter)
        return self._labels[seed, teacher.name]

    def fit(
        self, place: World, labels: Labels, config: TrainConfig, seed: int
    ) -> tuple[Student, list[float]]:
        """Train on all images, or on those that are left, for as many steps."""
        total = len(labels.targets_NC)
        fitted: tuple[Student, list[float]]
        if self._images is None:
            fitted = place.fit(labels, config, seed)
            return fitted
        rows_N = np.random.default_rng([place.seed, 11]).permutation(total)[: self._images]
        epochs = config.epochs * total // self._images
        fitted = place.fit(labels, config.model_copy(update={"epochs": epochs}), seed, rows_N)
        return fitted

    def norm(
        self, loss: str, temperature: float, teacher: Teacher, stand_in: bool = False
    ) -> float:
        """Return the median norm of a loss's gradients, over a training without a clip."""

        def measure() -> dict[str, Any]:
            world = self.world(self._norms_of, stand_in)
            config = training(Setting(loss, temperature), _UNBOUNDED)
            labels = self.labels(self._norms_of, teacher)
            return {"norm": statistics.median(self.fit(world, labels, config, _NORM_SEED)[1])}

        key = ["norm", loss, temperature, teacher.name, stand_in]
        return float(self.once(key, measure)["norm"])

    def clip(self, setting: Setting, teacher: Teacher, stand_in: bool = False) -> float | None:
        """Return a setting's clip as a norm."""
        if setting.clip is None or setting.temperature is None:
            return None
        return setting.clip * self.norm(setting.loss, setting.temperature, teacher, stand_in)

    def metrics(
        self,
        setting: Setting,
        world: int,
        seed: int,
        teacher: Teacher,
        tuned_with: Teacher,
        stand_in: bool = False,
    ) -> dict[str, Any]:
        """Return a fit's test metrics; a clip's norm is one with the teacher `tuned_with`."""

        def measure() -> dict[str, Any]:
            place = self.world(world, stand_in)
            supervised = setting == SUPERVISED
            labels = place.annotations() if supervised else self.labels(world, teacher)
            config = training(setting, self.clip(setting, tuned_with, stand_in))
            try:
                judged: dict[str, Any] = place.judge(self.fit(place, labels, config, seed)[0])
            except DataError:  # the loss is not finite: as bad as can be
                return dict.fromkeys(METRICS, 0.0)
            return judged

        names = [teacher.name, tuned_with.name, stand_in]
        found: dict[str, Any] = self.once(
            ["fit", *asdict(setting).values(), world, seed, *names], measure
        )
        return found


def training(setting: Setting, clip: float | None) -> TrainConfig:
    """Return the demo's training with a setting in place of loss, temperature, rates and clip."""
    config = override(load_config(preset="demo"), PAPER)
    if setting.temperature is None:
        return config.train
    optim = config.train.optim
    assert optim.head_lr is not None
    rates = {"lr": setting.rate * optim.lr, "head_lr": setting.rate * optim.head_lr}
    changed = {
        "loss": setting.loss,
        "loss_temperature": setting.temperature,
        "optim": {**rates, "grad_clip": clip},
    }
    return override(config, {"train": changed}).train


def tune(lab: Lab, loss: str, worlds: Sequence[int], teacher: Teacher) -> dict[str, Any]:
    """Search the best setting of a loss; returns it, its mAP and how the search went."""
    at = {1: [(worlds[0], TUNING_SEED)], 2: [(world, TUNING_SEED) for world in worlds]}

    def value(setting: Setting, count: int, stand_in: bool = True) -> float:
        return statistics.fmean(
            lab.metrics(setting, world, seed, teacher, teacher, stand_in)["mAP"]
            for world, seed in at[count]
        )

    def best_of(settings: Iterable[Setting], kept: int) -> list[Setting]:
        return sorted(settings, key=lambda s: value(s, 2), reverse=True)[:kept]

    grid = [Setting(loss, t, r, c) for t in TEMPERATURES for r in RATES for c in CLIPS]
    left = best_of(sorted(grid, key=lambda s: value(s, 1), reverse=True)[:KEPT], KEPT)
    tried = set(left)
    for _ in range(REFINED):
        new = [setting for setting in neighbours(left[0]) if setting not in tried]
        tried |= set(new)
        left = best_of([*left, *new], KEPT)
    finalists = left[:FINALISTS]
    best = max(finalists, key=lambda setting: value(setting, 2, stand_in=False))
    return {
        "setting": asdict(best),
        "clip_norm": lab.clip(best, teacher),
        "mAP": value(best, 2, stand_in=False),
        "finalists": {s.name: value(s, 2, stand_in=False) for s in finalists},
        "grid": {s.name: value(s, 1) for s in grid},
        "refined": {s.name: value(s, 2) for s in sorted(tried, key=lambda s: s.name)},
        "at_edge": any(setting not in tried for setting in neighbours(left[0])),
    }


def neighbours(best: Setting) -> list[Setting]:
    """Return the settings at half and at twice the temperature and the rate."""
    assert best.temperature is not None
    return [
        replace(best, temperature=best.temperature / 2),
        replace(best, temperature=best.temperature * 2),
        replace(best, rate=best.rate / 2),
        replace(best, rate=best.rate * 2),
    ]


def interval(by_world: Sequence[Sequence[float]]) -> dict[str, Any]:
    """Return the mean of (worlds, seeds) values with its 95 % bootstrap interval over both."""
    values_WS = np.asarray(by_world, dtype=np.float64)
    worlds, seeds = values_WS.shape
    random = np.random.default_rng(0)
    chosen_KW1 = random.integers(worlds, size=(RESAMPLES, worlds, 1))
    chosen_KWS = random.integers(seeds, size=(RESAMPLES, worlds, seeds))
    means_K = values_WS[chosen_KW1, chosen_KWS].mean(axis=(1, 2))
    low, high = np.quantile(means_K, (0.025, 0.975))
    return {"mean": float(values_WS.mean()), "low": float(low), "high": float(high)}


def compare(
    lab: Lab,
    chosen: Mapping[str, Setting],
    tuned_with: Teacher,
    worlds: Sequence[int],
    seeds: Sequence[int],
    teacher: Teacher,
    stand_in: bool,
) -> dict[str, Any]:
    """Return every loss's metrics with a teacher, and the paired differences to LSE-Sign's."""
    found = {
        loss: [
            [lab.metrics(setting, world, seed, teacher, tuned_with, stand_in) for seed in seeds]
            for world in worlds
        ]
        for loss, setting in chosen.items()
    }
    rows: list[dict[str, Any]] = []
    for loss, by_world in found.items():
        row: dict[str, Any] = {"name": loss, "setting": chosen[loss].name}
        for metric in METRICS:
            pairs = [  # a world without so rare a class says nothing of it
                [(fit[metric], other[metric]) for fit, other in zip(mine, own, strict=True)]
                for mine, own in zip(by_world, found["lse_sign"], strict=True)
                if mine[0][metric] is not None
            ]
            if pairs:
                row[metric] = interval([[a for a, _ in world] for world in pairs])
                difference = [[a - b for a, b in world] for world in pairs]
                row[f"{metric}_minus_lse_sign"] = interval(difference)
        rows.append(row)
    return {
        "student": "stand-in" if stand_in else "full",
        "teacher": teacher.name,
        "tuned_with": tuned_with.name,
        "worlds": list(worlds),
        "seeds": list(seeds),
        "rows": rows,
    }


def print_tuning(tuned: Json, teacher: str) -> None:
    """Print what the search found for every loss."""
    cells = [
        [
            loss,
            Setting(**found["setting"]).name,
            percent(found["mAP"]),
            str(found["at_edge"]),
        ]
        for loss, found in tuned.items()
    ]
    header = ["", "best setting", "mAP", "at an edge"]
    print_rows(f"tuning, teacher {teacher}: mAP in % of two worlds and seeds", header, cells)


def print_comparison(part: Json) -> None:
    """Print means and intervals in %."""

    def cell(value: Json | None) -> str:
        if value is None:
            return "-"
        return f"{percent(value['mean'])} ({percent(value['low'])} to {percent(value['high'])})"

    columns = [*METRICS, "mAP_minus_lse_sign"]
    cells = [[row["name"], *(cell(row.get(column)) for column in columns)] for row in part["rows"]]
    title = (
        f"{part['student']}, teacher {part['teacher']}, settings chosen with {part['tuned_with']}"
    )
    print_rows(f"{title}: test AP in %, worlds {part['worlds']}", ["", *columns], cells)


def run(lab: Lab, options: argparse.Namespace) -> None:
    """Search and compare, and write what is known after every seed."""
    results: dict[str, Any] = {"tuned_on": options.tune, "worlds": options.worlds}
    results |= {"grid": {"temperatures": TEMPERATURES, "rates": RATES, "clips": CLIPS}}
    results |= {"tuning": {}, "comparison": []}
    parts_of = [(AS_IT_IS, TEACHERS if options.images is None else (AS_IT_IS,))]
    if options.weaker:
        parts_of.append((WEAKER, (WEAKER, WEAK)))
    for tuned_with, judged in parts_of:
        tuned = {loss: tune(lab, loss, options.tune, tuned_with) for loss in LOSSES}
        results["tuning"][tuned_with.name] = tuned
        print_tuning(tuned, tuned_with.name)
        chosen = {loss: Setting(**found["setting"]) for loss, found in tuned.items()}
        others: list[dict[str, Any]] = results["comparison"]
        parts: list[dict[str, Any]] = []
        for stand_in, seeds in ((False, options.full_seeds), (True, options.seeds)):
            before = parts
            for count in range(1, len(seeds) + 1):  # seed by seed: what is written is complete
                known = chosen, tuned_with, options.worlds, seeds[:count]
                some = judged if stand_in else judged[: options.full_teachers]
                parts = before + [compare(lab, *known, judge, stand_in) for judge in some]
                results["comparison"] = [*others, *parts]
                told = {**measured_on(), **results, "fits": len(lab.known)}
                if options.images is not None:
                    scarce = {**told, "images": options.images}
                    told = {**read_results(options.out), "scarce": scarce}
                write_results(options.out, told)
        for part in parts:
            print_comparison(part)


def main() -> None:
    """Tune every loss, compare the winners on new worlds, print and store both."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tune", type=int, nargs=2, default=[111, 114])
    parser.add_argument("--worlds", type=int, nargs="+", default=[5, 6, 7, 8, 9])
    parser.add_argument("--full-seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--full-teachers", type=int, default=3, help="the first so many")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2], help="of the stand-in")
    parser.add_argument("--weaker", action="store_true", help="tune with the weaker teacher too")
    parser.add_argument("--images", type=int, help="training images; all if not set")
    parser.add_argument("--cache", type=Path, default=Path("runs/losses"))
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    run(Lab(options.cache, options.tune[0], options.images), options)


if __name__ == "__main__":
    main()
