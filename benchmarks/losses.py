"""Which temperature and learning rate each loss does best with, on validation worlds.

    python benchmarks/losses.py [--seeds 111 114] [--run-dir runs/losses] [--out FILE]

The demo's losses were compared only after each was tuned here, over the same grid; the worlds
are not those of benchmarks/world.py. Prints a table; writes the same with hardware, versions,
settings and date to benchmarks/results/losses.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from hts_ray import pipeline
from hts_ray.config import HtsConfig, load_config
from hts_ray.console import percent, print_rows
from hts_ray.demo import FEW, Variant, demo_config, make_world, train_here
from hts_ray.provenance import measured_on
from hts_ray.runtime import ray_cluster

RESULTS = Path(__file__).parent / "results" / "losses.json"
TEMPERATURES = (0.125, 0.25, 0.5, 1.0, 2.0)
RATE_FACTORS = (1.0, 2.0, 4.0)


def grid(config: HtsConfig) -> list[Variant]:
    """Every loss with every temperature at the demo's rate, and with higher rates at 1."""
    optim = config.train.optim
    assert optim.head_lr is not None
    variants = []
    for loss in ("lse_sign", "bce"):
        for temperature in TEMPERATURES:
            for factor in RATE_FACTORS if temperature == 1.0 else (1.0,):
                rates = {"lr": factor * optim.lr, "head_lr": factor * optim.head_lr}
                variants.append(
                    Variant(
                        f"{loss} T={temperature} rate x{factor:g}",
                        loss,
                        {
                            "train": {
                                "loss": loss,
                                "loss_temperature": temperature,
                                "optim": rates,
                            }
                        },
                        uses_teacher=True,
                    )
                )
    return variants


def run_seed(config: HtsConfig, seed: int) -> dict[str, dict[str, Any]]:
    """Train every entry of the grid on one world's pseudo-labels; metrics by name."""
    run = pipeline.open_run(demo_config(config, seed))
    manifest = make_world(run)
    scores = pipeline.label(run, manifest)
    return {v.name: train_here(run, manifest, scores, v).metrics for v in grid(config)}


def main() -> None:
    """Run the seeds, print the table and write the JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[111, 114])
    parser.add_argument("--run-dir", default="runs/losses")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    config = load_config(preset="demo", extra={"run_dir": options.run_dir})
    with ray_cluster(config.ray):
        by_seed = [run_seed(config, seed) for seed in options.seeds]
    keys = ("mAP", f"few@{FEW}", "few@5")
    names = list(by_seed[0])
    values = {name: {key: [r[name][key] for r in by_seed] for key in keys} for name in names}
    cells = [[n, *(percent(statistics.fmean(values[n][key])) for key in keys)] for n in names]
    print_rows(f"test mAP in %, mean over seeds {options.seeds}", ["", *keys], cells)
    report = {
        **measured_on(),
        "seeds": options.seeds,
        "settings": config.model_dump(mode="json"),
        "values": values,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
