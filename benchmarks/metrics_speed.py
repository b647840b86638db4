"""Time `hico_average_precision` against a plain numpy loop that sorts each class once.

    nice -n 10 python benchmarks/metrics_speed.py [--images 9658] [--classes 600] [--rounds 7]

The table goes to stdout, the same numbers with hardware, versions, settings and date to
benchmarks/results/metrics_speed.json. Both are timed in turn, round by round, and compared by the
median of the rounds' ratios, so that a busy machine slows both alike.

Shapes: N images, C classes.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
from measured import measured_on, write_results
from numpy.typing import NDArray

from hts_ray.metrics import RECALL_THRESHOLDS, evaluate, hico_average_precision

RESULTS = Path(__file__).parent / "results" / "metrics_speed.json"
Sort = Literal["stable", "quicksort"]


def plain_loop(
    scores_NC: NDArray[Any], annotations_NC: NDArray[np.int8], kind: Sort
) -> NDArray[np.float64]:
    """Default-setting AP (C,), one argsort per class; "quicksort" leaves ties in any order."""
    ap_C = np.full(scores_NC.shape[1], np.nan)
    for c in range(scores_NC.shape[1]):
        labels = annotations_NC[:, c]
        kept = labels != 0
        labels = labels[kept]
        order = np.argsort(-scores_NC[kept, c], kind=kind)
        hits = labels[order] == 1
        found = np.cumsum(hits)
        if found[-1] == 0:
            continue
        recall = found / found[-1]
        precision = found / np.arange(1, len(found) + 1)
        best = np.maximum.accumulate(precision[::-1])[::-1]
        ap_C[c] = best[np.searchsorted(recall, RECALL_THRESHOLDS)].mean()
    return ap_C


def hico_like(
    images: int, classes: int, dtype: type[np.floating[Any]], seed: int
) -> tuple[NDArray[Any], NDArray[np.int8]]:
    """Random scores and annotations with HICO's long tail: 1 to some 1,000 positives a class."""
    rng = np.random.default_rng(seed)
    annotations_NC = rng.choice(
        np.array([-1, 0, -2], dtype=np.int8), p=[0.02, 0.005, 0.975], size=(images, classes)
    )
    top = min(1000, images // 2)
    for c, share in enumerate(np.linspace(0, 1, classes)):
        positives = rng.choice(images, size=max(1, int(top ** (1 - share))), replace=False)
        annotations_NC[positives, c] = 1
    scores_NC = rng.standard_normal((images, classes)) + (annotations_NC == 1)
    return scores_NC.astype(dtype), annotations_NC


def seconds(call: Callable[[], object]) -> float:
    """Wall-clock seconds of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def compare(
    scores_NC: NDArray[Any], annotations_NC: NDArray[np.int8], kind: Sort, rounds: int
) -> dict[str, Any]:
    """Medians of interleaved timings and of their ratios, ours over the loop's."""
    loop, ours, both = [], [], []
    for _ in range(rounds):
        loop.append(seconds(lambda: plain_loop(scores_NC, annotations_NC, kind)))
        ours.append(seconds(lambda: hico_average_precision(scores_NC, annotations_NC)))
        both.append(seconds(lambda: evaluate(scores_NC, annotations_NC)))
    ratios = [mine / theirs for mine, theirs in zip(ours, loop, strict=True)]
    difference = np.abs(
        plain_loop(scores_NC, annotations_NC, kind)
        - hico_average_precision(scores_NC, annotations_NC)
    )
    return {
        "scores": str(scores_NC.dtype),
        "loop_sort": kind,
        "loop_s": statistics.median(loop),
        "ours_s": statistics.median(ours),
        "evaluate_both_settings_s": statistics.median(both),
        "ratio": statistics.median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
        "max_ap_difference": float(np.nanmax(difference)),
    }


def main() -> None:
    """Run every pair, print the table and write the JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--images", type=int, default=9658)
    parser.add_argument("--classes", type=int, default=600)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    rows = []
    print("scores    loop sorts   loop s   ours s   ours/loop (min..max)   evaluate s   max |dAP|")
    for dtype in (np.float32, np.float16, np.float64):
        data = hico_like(options.images, options.classes, dtype, options.seed)
        for kind in ("stable", "quicksort"):
            row = compare(*data, kind=kind, rounds=options.rounds)
            rows.append(row)
            print(
                f"{row['scores']:9} {kind:11} {row['loop_s']:7.3f}  {row['ours_s']:7.3f}"
                f"   {row['ratio']:.2f} ({row['ratio_min']:.2f}..{row['ratio_max']:.2f})"
                f"      {row['evaluate_both_settings_s']:7.3f}"
                f"      {row['max_ap_difference']:.1e}",
                flush=True,
            )
    settings = {key: value for key, value in vars(options).items() if key != "out"}
    report = {
        **measured_on(),
        "load_average": os.getloadavg()[0],
        "settings": settings,
        "rows": rows,
    }
    write_results(options.out, report)


if __name__ == "__main__":
    main()
