"""Time a fit of the classifier on stored features, at the demo's size and at HICO's.

    python benchmarks/head_fit.py [--rounds 3] [--threads 2] [--out FILE]

Random features (the cost does not depend on them), every image with its mirror image, the demo's
and the paper's settings. Wall and CPU seconds of each size, the best of the rounds, and what the
process's memory grew by. Prints a table; writes the same with hardware, versions and date to
benchmarks/results/head_fit.json.
"""

from __future__ import annotations

import argparse
import resource
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measured import measured_on, write_results

from hts_ray.config import HtsConfig, load_config
from hts_ray.engine.console import print_rows
from hts_ray.student.head import HeadData, fit_head

RESULTS = Path(__file__).parent / "results" / "head_fit.json"
# Preset, images, features, classes
SIZES = (("demo", 1_200, 256, 55), ("hico-vitb32", 38_000, 768, 600))


def measure(config: HtsConfig, images: int, dimension: int, classes: int) -> dict[str, Any]:
    """Fit once; returns wall and CPU seconds, epochs, images a second and GiB at the peak."""
    random = np.random.default_rng(0)
    features_ND = random.standard_normal((images, dimension), dtype=np.float32)
    flipped_ND = random.standard_normal((images, dimension), dtype=np.float32)
    classifier_CD = random.standard_normal((classes, dimension), dtype=np.float32)
    positive_NC = random.random((images, classes), dtype=np.float32) < 3 / classes
    targets_NC = np.where(positive_NC, 1, -1).astype(np.int8)
    wall, cpu = time.perf_counter(), time.process_time()
    fit = fit_head(
        HeadData(features_ND, targets_NC, flipped_ND=flipped_ND),
        classifier_CD,
        logit_scale=config.student.logit_scale,
        config=config.train,
        seed=0,
    )
    seconds = time.perf_counter() - wall
    return {
        "seconds": seconds,
        "cpu_seconds": time.process_time() - cpu,
        "epochs": len(fit.history),
        "images_per_second": sum(record["images"] for record in fit.history) / seconds,
        "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }


def main() -> None:
    """Run the rounds, print the table and write the JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    results = []
    for preset, images, dimension, classes in SIZES:
        rounds = [
            measure(load_config(preset=preset), images, dimension, classes)
            for _ in range(options.rounds)
        ]
        best = min(rounds, key=lambda entry: float(entry["seconds"]))
        shape = {"preset": preset, "images": images, "features": dimension, "classes": classes}
        results.append({**shape, **best, "rounds": rounds})
    names = ("preset", "images", "features", "classes", "epochs", "seconds", "cpu_seconds")
    rows = [
        [f"{entry[n]:.2f}" if isinstance(entry[n], float) else str(entry[n]) for n in names]
        for entry in results
    ]
    print_rows(f"fits of the classifier, {options.threads} threads", list(names), rows)
    report = {**measured_on(), "threads": options.threads, "results": results}
    write_results(options.out, report)


if __name__ == "__main__":
    main()
