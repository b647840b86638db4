"""LSE-Sign and its rivals on the built-in world, each at the settings that suit it best.

    python benchmarks/losses.py [--tune 111 114] [--seeds 0 1 2 3 4] [--run-dir runs/losses]

Every loss gets the same budget: seven temperatures at the demo's learning rate and three more rates
at the best of them, trained on the pseudo-labels of the worlds `--tune`. The best setting of each
then trains on the worlds `--seeds`, which nothing was tuned on. Prints both tables; the second
has 95 % intervals of the mean over worlds (Student's t), and of the difference to LSE-Sign within
a world. Writes benchmarks/results/losses.json with hardware, versions, settings and date.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from measured import measured_on, write_results
from scipy import stats

from hts_ray.config import HtsConfig, load_config
from hts_ray.demo.run import IN_PROCESS, Variant, demo_config, make_world, run_variant
from hts_ray.engine.console import percent, print_rows
from hts_ray.engine.run import open_run
from hts_ray.engine.session import ray_cluster
from hts_ray.teacher.stage import plan_label

RESULTS = Path(__file__).parent / "results" / "losses.json"
LOSSES = ("lse_sign", "bce", "focal", "asl")
TEMPERATURES = (0.03125, 0.0625, 0.125, 0.25, 0.5, 1.0, 2.0)
RATE_FACTORS = (0.5, 2.0, 4.0)
METRICS = ("mAP", "mAP_known_object", "few@1", "few@5", "few@10")


class World:
    """One labeled world, on whose pseudo-labels students are trained."""

    def __init__(self, config: HtsConfig, seed: int) -> None:
        self.run = open_run(demo_config(config, seed))
        self.manifest = make_world(self.run)
        self.scores = plan_label(self.run, self.run.manifest(self.manifest)).run()

    def metrics(self, loss: str, temperature: float, rate: float) -> dict[str, Any]:
        """Train with one setting and return the test metrics."""
        optim = self.run.config.train.optim
        assert optim.head_lr is not None
        rates = {"lr": rate * optim.lr, "head_lr": rate * optim.head_lr}
        settings = {"loss": loss, "loss_temperature": temperature, "optim": rates}
        name = f"{loss} T={temperature:g} rate x{rate:g}"
        variant = Variant(name, loss, {"train": settings})
        run = self.run.changed(IN_PROCESS)
        return dict(run_variant(run, self.manifest, self.scores, variant).metrics)


def tune(worlds: Sequence[World], loss: str) -> dict[str, float]:
    """Return the mAP, a mean over worlds, of every setting tried, by "temperature rate"."""
    found: dict[str, float] = {}

    def attempt(temperature: float, rate: float) -> None:
        values = [world.metrics(loss, temperature, rate)["mAP"] for world in worlds]
        found[f"{temperature:g} {rate:g}"] = statistics.fmean(values)

    for temperature in TEMPERATURES:
        attempt(temperature, 1.0)
    best, _ = best_setting(found)
    for rate in RATE_FACTORS:
        attempt(best, rate)
    return found


def best_setting(found: Mapping[str, float]) -> tuple[float, float]:
    """Return the temperature and the rate's factor with the highest mAP."""
    temperature, rate = max(found, key=lambda name: found[name]).split()
    return float(temperature), float(rate)


def interval(values: Sequence[float]) -> dict[str, Any]:
    """Return the mean with its 95 % interval over worlds."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return {"mean": mean, "low": None, "high": None, "values": list(values)}
    error = statistics.stdev(values) / len(values) ** 0.5
    reach = float(stats.t.ppf(0.975, len(values) - 1)) * error
    return {"mean": mean, "low": mean - reach, "high": mean + reach, "values": list(values)}


def compare(
    worlds: Sequence[World], settings: Mapping[str, tuple[float, float]]
) -> dict[str, dict[str, Any]]:
    """Return every loss's metrics, and their differences to LSE-Sign's, over the worlds."""
    by_loss = {
        loss: [world.metrics(loss, *setting) for world in worlds]
        for loss, setting in settings.items()
    }
    rows: dict[str, dict[str, Any]] = {}
    for loss, measured in by_loss.items():
        rows[loss] = {"temperature": settings[loss][0], "rate_factor": settings[loss][1]}
        for metric in METRICS:
            pairs = [
                (mine[metric], other[metric])
                for mine, other in zip(measured, by_loss["lse_sign"], strict=True)
                if mine.get(metric) is not None
            ]
            if pairs:
                rows[loss][metric] = interval([mine for mine, _ in pairs])
                rows[loss][f"{metric}_minus_lse_sign"] = interval([a - b for a, b in pairs])
    return rows


def print_comparison(rows: Mapping[str, Mapping[str, Any]], seeds: Sequence[int]) -> None:
    """Print means and intervals in %."""

    def cell(value: Mapping[str, Any] | None) -> str:
        if value is None:
            return "-"
        if value["low"] is None:
            return percent(value["mean"])
        return f"{percent(value['mean'])} ({percent(value['low'])} to {percent(value['high'])})"

    header = ["", "T", "rate", *METRICS, "mAP - LSE-Sign"]
    cells = [
        [
            loss,
            f"{row['temperature']:g}",
            f"x{row['rate_factor']:g}",
            *(cell(row.get(metric)) for metric in METRICS),
            cell(row["mAP_minus_lse_sign"]),
        ]
        for loss, row in rows.items()
    ]
    print_rows(f"test AP in %, mean and 95 % interval over worlds {list(seeds)}", header, cells)


def main() -> None:
    """Tune every loss, compare them on other worlds, print and store both."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tune", type=int, nargs="+", default=[111, 114])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--run-dir", default="runs/losses")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    config = load_config(preset="demo", extra={"run_dir": options.run_dir})
    with ray_cluster(config.ray):
        worlds = [World(config, seed) for seed in options.tune]
        tuned = {loss: tune(worlds, loss) for loss in LOSSES}
        settings = {loss: best_setting(found) for loss, found in tuned.items()}
        rows = compare([World(config, seed) for seed in options.seeds], settings)
    header = ["T, rate", *LOSSES]
    names = sorted({name for found in tuned.values() for name in found})
    cells = [
        [name, *(percent(tuned[loss][name]) if name in tuned[loss] else "-" for loss in LOSSES)]
        for name in names
    ]
    print_rows(f"tuning: test mAP in %, mean over worlds {options.tune}", header, cells)
    print_comparison(rows, options.seeds)
    report = {
        **measured_on(),
        "tuned_on": options.tune,
        "seeds": options.seeds,
        "settings": config.model_dump(mode="json"),
        "tuning_mAP": tuned,
        "rows": rows,
    }
    write_results(options.out, report)


if __name__ == "__main__":
    main()
