"""What a sweep costs beside full runs, and what its choice gains on unseen worlds.

    python benchmarks/sweep.py [--seeds 0 1 2] [--trials 100] [--run-dir runs/sweep] [--out FILE]

Time: full label-filter-train runs and whole sweeps (features, trials and finalists, from nothing
but region scores) in turn on the first world; 100 full runs are extrapolated from the measured
ones. Quality: on every world the preset, the best of a label-free sweep and the best of a sweep
with 200 labeled training images, each trained on all pseudo-labels and scored on the test split,
which no sweep sees. Prints tables; writes them with hardware, versions, settings and date to
benchmarks/results/sweep.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from hts_ray import pipeline, report, storage
from hts_ray.config import HtsConfig, load_config, override
from hts_ray.console import percent, print_rows
from hts_ray.demo import HTS, SUPERVISED, ZERO_SHOT, Variant, demo_config, make_world, train_here
from hts_ray.provenance import measured_on
from hts_ray.runtime import ray_cluster
from hts_ray.sweep.space import nested
from hts_ray.sweep.stage import TRIALS_FILE, plan_sweep, run_sweep
from hts_ray.tables import StageFolder, read_table, write_table

RESULTS = Path(__file__).parent / "results" / "sweep.json"
LABELED = 200
LABEL_FREE, WITH_LABELS = "label-free sweep", f"sweep with {LABELED} labels"


def elsewhere(run: pipeline.Run, name: str, **settings: Any) -> pipeline.Run:
    """Return the run with a folder of its own, where nothing is finished yet."""
    folder = storage.join(run.config.run_dir, f"{name}-{time.time_ns():x}")
    return pipeline.Run(override(run.config, {"run_dir": folder, **settings}), run.class_table)


def full_run(run: pipeline.Run, manifest: str) -> dict[str, float]:
    """Return the seconds of labeling, filtering and training anew."""
    own = elsewhere(run, "full")
    seconds, started = {}, time.perf_counter()
    scores = pipeline.label(own, manifest)
    seconds["label"] = time.perf_counter() - started
    labels = pipeline.filter_labels(own, scores)
    pipeline.train(own, pipeline.training_labels(own, labels, manifest))
    seconds["total"] = time.perf_counter() - started
    return seconds


def whole_sweep(run: pipeline.Run, scores: StageFolder, seed: int) -> dict[str, Any]:
    """Return the seconds of a sweep that has nothing but region scores, and what became of it."""
    started = time.perf_counter()
    stage = run_sweep(plan_sweep(elsewhere(run, "timed", sweep={"seed": seed}), scores))
    seconds = time.perf_counter() - started
    trials = read_table(stage.file(TRIALS_FILE))
    return {
        "total": seconds,
        "until_finalists": stage.stats["seconds_trials"],
        "mean_trial": float(np.mean(trials["seconds"].to_numpy())),
        "statuses": stage.stats["statuses"],
    }


def measure_time(config: HtsConfig, seed: int, rounds: int) -> dict[str, Any]:
    """Time full runs and sweeps in turn, a full run first and last."""
    run = pipeline.open_run(demo_config(config, seed))
    manifest = make_world(run)
    scores = pipeline.label(run, manifest)
    full, sweeps = [full_run(run, manifest)], []
    for number in range(rounds):
        sweeps.append(whole_sweep(run, scores, number))
        full.append(full_run(run, manifest))
    per_run = statistics.fmean(entry["total"] for entry in full)
    sweep = statistics.fmean(entry["total"] for entry in sweeps)
    trials = run.config.sweep.trials
    return {
        "full_runs": full,
        "sweeps": sweeps,
        "full_run_seconds": per_run,
        "extrapolated_full_seconds": trials * per_run,
        "sweep_seconds": sweep,
        "times_faster": trials * per_run / sweep,
    }


def labeled_sample(run: pipeline.Run, manifest: str) -> str:
    """Write a manifest of `LABELED` training images drawn by the run's seed; return its path."""
    table = pipeline.read_manifest(manifest)
    train = table.filter(pc.equal(table["split"], "train")).sort_by("image_id")
    rows = np.random.default_rng(run.config.seed).choice(len(train), LABELED, replace=False)
    path = storage.join(run.run_dir, "labeled.parquet")
    write_table(path, train.take(pa.array(np.sort(rows))))
    return path


def measure_quality(config: HtsConfig, seed: int) -> dict[str, Any]:
    """Return test mAP, and the gap closed, of the preset and of both sweeps' choices."""
    run = pipeline.open_run(demo_config(config, seed))
    manifest = make_world(run)
    scores = pipeline.label(run, manifest)
    mean_ap = {
        variant.name: train_here(run, manifest, scores, variant).metrics["mAP"]
        for variant in (ZERO_SHOT, SUPERVISED, HTS)
    }
    verdicts: dict[str, Any] = {}
    for name, settings in (
        (LABEL_FREE, {}),
        (WITH_LABELS, {"validation": labeled_sample(run, manifest)}),
    ):
        own = pipeline.Run(override(run.config, {"sweep": settings}), run.class_table)
        plan = plan_sweep(own, scores)
        stage = run_sweep(plan)
        table = read_table(stage.file(TRIALS_FILE))
        row = table.filter(pc.equal(table["trial"], stage.stats["best_trial"])).to_pylist()[0]
        best = {p.name: row[p.name] for p in plan.space.parameters}
        variant = Variant(name, "", nested(best), uses_teacher=True)
        mean_ap[name] = train_here(own, manifest, scores, variant).metrics["mAP"]
        verdicts[name] = {"verdict": stage.stats["verdict"], "settings": best}
    closed = {
        name: report.gap_closed(mean_ap[ZERO_SHOT.name], mean_ap[name], mean_ap[SUPERVISED.name])
        for name in (HTS.name, LABEL_FREE, WITH_LABELS)
    }
    return {"seed": seed, "mAP": mean_ap, "gap_closed": closed, "sweeps": verdicts}


def print_results(timing: dict[str, Any] | None, quality: list[dict[str, Any]]) -> None:
    """Print what was measured."""
    if timing is not None:
        cells = [
            ["a full run", f"{timing['full_run_seconds']:.0f}"],
            ["as many full runs as trials", f"{timing['extrapolated_full_seconds']:.0f}"],
            ["the whole sweep", f"{timing['sweep_seconds']:.0f}"],
            ["times faster", f"{timing['times_faster']:.1f}"],
        ]
        print_rows("seconds", ["", ""], cells)
    names = list(quality[0]["mAP"]) if quality else []
    cells = []
    for name in names:
        values = [entry["mAP"][name] for entry in quality]
        gaps = [entry["gap_closed"].get(name) for entry in quality]
        shown = [f"{gap:.2f}" if gap is not None else "-" for gap in gaps]
        cells.append([name, *(percent(value) for value in values), *shown])
    seeds = [str(entry["seed"]) for entry in quality]
    header = ["", *(f"mAP, seed {s}" for s in seeds), *(f"gap, seed {s}" for s in seeds)]
    print_rows("test mAP in % and gap closed", header, cells)


def main() -> None:
    """Measure, print the tables and write the JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--trials", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=2, help="sweeps that are timed; 0: none")
    parser.add_argument("--run-dir", default="runs/sweep")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("overrides", nargs="*", metavar="section.name=value")
    options = parser.parse_args()
    config = load_config(
        preset="demo",
        overrides=[f"sweep.trials={options.trials}", *options.overrides],
        extra={"run_dir": options.run_dir},
    )
    with ray_cluster(config.ray):
        timing = None
        if options.rounds:
            timing = measure_time(config, options.seeds[0], options.rounds)
        quality = [measure_quality(config, seed) for seed in options.seeds]
    print_results(timing, quality)
    results = {
        **measured_on(),
        "trials": options.trials,
        "settings": config.model_dump(mode="json"),
        "time": timing,
        "quality": quality,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
