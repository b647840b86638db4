"""What every part of the method gains on the built-in world: mean and spread over seeds.

    python benchmarks/world.py [--seeds 0 1 2] [--run-dir runs/benchmark] [--out FILE]

The rows of the demo, labels that are not filtered, and the paper's loss with surer labels, on
worlds whose seeds were not looked at while world, models and settings were chosen (those used seeds
100 and up). Prints a table; writes the same with hardware, versions, settings and date to
benchmarks/results/world.json.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fits import PAPER
from measured import measured_on, write_results

from hts_ray.config import HtsConfig, load_config
from hts_ray.demo.run import (
    FEW,
    HTS,
    VARIANTS,
    Row,
    Variant,
    demo_config,
    gap_closed,
    make_world,
    run_variants,
)
from hts_ray.engine.console import print_rows
from hts_ray.engine.run import open_run
from hts_ray.engine.session import ray_cluster

RESULTS = Path(__file__).parent / "results" / "world.json"

ABLATIONS = (
    Variant(
        "HTS unfiltered",
        "every candidate of the best region is a positive, nothing is ignored",
        {
            "filter": {
                "aggregation": "max",
                "positive_threshold": 0.2,
                "negative_threshold": 0.2,
                "per_class_quantile": None,
                "min_support": 1,
            }
        },
    ),
    # With the rates and the clip that LSE-Sign did best with (benchmarks/losses.py).
    Variant(
        "HTS as the paper",
        "fewer, surer labels and LSE-Sign",
        {
            **PAPER,
            "train": {
                **PAPER["train"],
                "optim": {"lr": 2e-3, "head_lr": 2e-2, "grad_clip": 0.19},
            },
        },
    ),
)
METRICS = ("mAP", "mAP_known_object", "few@1", "few@5", "few@10")


def run_seed(config: HtsConfig, seed: int) -> list[Row]:
    """Run all rows on the world of one seed."""
    run = open_run(demo_config(config, seed))
    return run_variants(run, make_world(run), [*VARIANTS, *ABLATIONS])


def summarize(by_seed: Sequence[Sequence[Row]]) -> list[dict[str, Any]]:
    """Mean and standard deviation of every metric of every row over the seeds."""
    summary = []
    for rows in zip(*by_seed, strict=True):
        entry: dict[str, Any] = {"name": rows[0].name, "note": rows[0].note}
        for metric in METRICS:
            values = [row.metrics[metric] for row in rows if row.metrics.get(metric) is not None]
            entry[metric] = _spread(values)
        entry["seconds"] = _spread([row.seconds for row in rows])
        closed = [gap_closed(seed, rows[0].name) for seed in by_seed]
        entry["gap_closed"] = _spread([share for share in closed if share is not None])
        summary.append(entry)
    return summary


def _spread(values: Sequence[float]) -> dict[str, Any]:
    deviation = statistics.stdev(values) if len(values) > 1 else None
    mean = statistics.fmean(values) if values else None
    return {"mean": mean, "sd": deviation, "values": list(values)}


def _cell(spread: dict[str, Any], factor: float = 100, digits: int = 1) -> str:
    if spread["mean"] is None:
        return "-"
    deviation = f" ± {factor * spread['sd']:.{digits}f}" if spread["sd"] is not None else ""
    return f"{factor * spread['mean']:.{digits}f}{deviation}"


def main() -> None:
    """Run the seeds, print the table and write the JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--run-dir", default="runs/benchmark")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("overrides", nargs="*", metavar="section.name=value")
    options = parser.parse_args()
    config = load_config(
        preset="demo", overrides=options.overrides, extra={"run_dir": options.run_dir}
    )
    with ray_cluster(config.ray):
        by_seed = [run_seed(config, seed) for seed in options.seeds]
    summary = summarize(by_seed)
    header = ["", "default", "known object", f"few@{FEW}", "few@5", "gap closed", "seconds"]
    cells = [
        [
            entry["name"],
            _cell(entry["mAP"]),
            _cell(entry["mAP_known_object"]),
            _cell(entry[f"few@{FEW}"]),
            _cell(entry["few@5"]),
            _cell(entry["gap_closed"], 1, 2),
            _cell(entry["seconds"], 1, 0),
        ]
        for entry in summary
    ]
    print_rows(f"test mAP in %, mean ± sd over seeds {options.seeds}", header, cells)
    gap = next(entry for entry in summary if entry["name"] == HTS.name)["gap_closed"]
    print(f"gap closed by {HTS.name}: {gap['mean']:.2f} ({', '.join(map(str, gap['values']))})")
    report = {
        **measured_on(),
        "seeds": options.seeds,
        "settings": config.model_dump(mode="json"),
        "rows": summary,
    }
    write_results(options.out, report)


if __name__ == "__main__":
    main()
