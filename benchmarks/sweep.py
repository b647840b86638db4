"""What a sweep costs beside full runs, and what its choice gains on unseen worlds.

    python benchmarks/sweep.py [--seeds 0 1 2] [--trials 100] [--run-dir runs/sweep] [--out FILE]

Time: full label-filter-train runs and whole sweeps (features, trials and finalists, from nothing
but region scores) in turn on the first world; 100 full runs are extrapolated from the measured
ones. CPU seconds of all processes are told beside the clock, which other load on the machine
slows. Quality: on every world the preset, the best of a label-free sweep and the best of a sweep
with 200 labeled training images, each trained on all pseudo-labels and scored on the test split,
which no sweep sees; trainings run in this process. Prints tables; writes them with hardware,
versions, settings and date to benchmarks/results/sweep.json, and keeps there what was not measured
again (--rounds 0, or no seed).
"""

from __future__ import annotations

import argparse
import os
import statistics
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.compute as pc
from measured import measured_on, read_results, write_results

from hts_ray import report
from hts_ray.config import HtsConfig, load_config, override
from hts_ray.demo.run import (
    HTS,
    SUPERVISED,
    ZERO_SHOT,
    Variant,
    demo_config,
    make_world,
    run_variant,
)
from hts_ray.engine.console import percent, print_rows
from hts_ray.engine.run import Run, open_run
from hts_ray.engine.session import ray_cluster
from hts_ray.images.manifest import open_manifest
from hts_ray.labels.stage import plan_filter
from hts_ray.store import storage
from hts_ray.store.run import StageFolder
from hts_ray.store.tables import read_table, write_table
from hts_ray.student.targets import training_labels
from hts_ray.student.train import plan_train
from hts_ray.sweep.plan import plan_sweep
from hts_ray.sweep.space import nested
from hts_ray.sweep.stage import TRIALS_FILE, run_sweep
from hts_ray.teacher.stage import plan_label

RESULTS = Path(__file__).parent / "results" / "sweep.json"
LABELED = 200
LABEL_FREE, WITH_LABELS = "label-free sweep", f"sweep with {LABELED} labels"


def elsewhere(run: Run, name: str, **settings: Any) -> Run:
    """Return the run with a folder of its own, where nothing is finished yet."""
    folder = storage.join(run.config.run_dir, f"{name}-{time.time_ns():x}")
    return run.changed({"run_dir": folder, **settings})


@contextmanager
def metered() -> Iterator[dict[str, float]]:
    """Give a mapping that holds `seconds` and `cpu_seconds`, of this process and all below it.

    Processes that come and go are looked at five times a second; what one used in its last moments
    is missed.
    """
    used: dict[int, float] = {}
    ended = threading.Event()

    def look() -> None:
        me = psutil.Process(os.getpid())
        for process in [me, *me.children(recursive=True)]:
            try:
                times = process.cpu_times()
                used[process.pid] = times.user + times.system
            except psutil.NoSuchProcess:
                continue

    def watch() -> None:
        while not ended.wait(0.2):
            look()

    look()
    before, started, figures = dict(used), time.perf_counter(), dict[str, float]()
    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    yield figures
    ended.set()
    thread.join()
    look()
    figures["seconds"] = time.perf_counter() - started
    figures["cpu_seconds"] = sum(value - before.get(pid, 0.0) for pid, value in used.items())


def full_run(run: Run, manifest: str) -> dict[str, Any]:
    """Return the seconds of labeling, filtering and training anew."""
    own = elsewhere(run, "full")
    with metered() as label:
        scores = plan_label(own, own.manifest(manifest)).run()
    with metered() as train:
        labels = plan_filter(own, scores).run()
        plan_train(own, training_labels(own, labels, manifest)).run()
    total = {name: label[name] + train[name] for name in label}
    return {**total, "label": label, "filter_and_train": train}


def whole_sweep(run: Run, scores: StageFolder, seed: int) -> dict[str, Any]:
    """Return the seconds of a sweep that has nothing but region scores, and what became of it."""
    plan = plan_sweep(elsewhere(run, "timed", sweep={"seed": seed}), scores)
    with metered() as total:
        stage = run_sweep(plan)
    trials = read_table(stage.file(TRIALS_FILE))
    return {
        **total,
        "seconds_until_finalists": stage.stats["seconds_trials"],
        "median_trial_seconds": float(np.median(trials["seconds"].to_numpy())),
        "seeds_run": sum(len(reports) for reports in trials["reports"].to_pylist()),
        "statuses": stage.stats["statuses"],
    }


def measure_time(config: HtsConfig, seed: int, rounds: int) -> dict[str, Any]:
    """Time full runs and sweeps in turn, a full run first and last."""
    run = open_run(demo_config(config, seed))
    manifest = make_world(run)
    scores = plan_label(run, run.manifest(manifest)).run()
    full, sweeps = [full_run(run, manifest)], []
    for number in range(rounds):
        sweeps.append(whole_sweep(run, scores, number))
        full.append(full_run(run, manifest))
    summary: dict[str, Any] = {"full_runs": full, "sweeps": sweeps}
    for name in ("seconds", "cpu_seconds"):
        one_run = statistics.fmean(entry[name] for entry in full)
        sweep = statistics.fmean(entry[name] for entry in sweeps)
        all_runs = run.config.sweep.trials * one_run
        summary[name] = {
            "full_run": one_run,
            "as_many_full_runs": all_runs,
            "sweep": sweep,
            "times_faster": all_runs / sweep,
        }
    return summary


def labeled_sample(run: Run, manifest: str) -> str:
    """Write a manifest of `LABELED` training images drawn by the run's seed; return its path."""
    table = open_manifest(manifest).table
    train = table.filter(pc.equal(table["split"], "train")).sort_by("image_id")
    rows = np.random.default_rng(run.config.seed).choice(len(train), LABELED, replace=False)
    path = storage.join(run.run_dir, "labeled.parquet")
    write_table(path, train.take(pa.array(np.sort(rows))))
    return path


def measure_quality(config: HtsConfig, seed: int) -> dict[str, Any]:
    """Return test mAP, and the gap closed, of the preset and of both sweeps' choices."""
    run = open_run(demo_config(override(config, {"train": {"num_workers": 0}}), seed))
    manifest = make_world(run)
    scores = plan_label(run, run.manifest(manifest)).run()
    mean_ap = {
        variant.name: run_variant(run, manifest, scores, variant).metrics["mAP"]
        for variant in (ZERO_SHOT, SUPERVISED, HTS)
    }
    verdicts: dict[str, Any] = {}
    for name, settings in (
        (LABEL_FREE, {}),
        (WITH_LABELS, {"validation": labeled_sample(run, manifest)}),
    ):
        own = run.changed({"sweep": settings})
        plan = plan_sweep(own, scores)
        stage = run_sweep(plan)
        table = read_table(stage.file(TRIALS_FILE))
        row = table.filter(pc.equal(table["trial"], stage.stats["best_trial"])).to_pylist()[0]
        best = {p.name: row[p.name] for p in plan.space.parameters}
        variant = Variant(name, "", nested(best))
        mean_ap[name] = run_variant(own, manifest, scores, variant).metrics["mAP"]
        verdicts[name] = {"verdict": stage.stats["verdict"], "settings": best}
    closed = {
        name: report.gap_closed(mean_ap[ZERO_SHOT.name], mean_ap[name], mean_ap[SUPERVISED.name])
        for name in (HTS.name, LABEL_FREE, WITH_LABELS)
    }
    return {"seed": seed, "mAP": mean_ap, "gap_closed": closed, "sweeps": verdicts}


def print_time(timing: dict[str, Any]) -> None:
    """Print what runs and sweeps took."""
    clock, cpu = timing["seconds"], timing["cpu_seconds"]
    cells = [[name, f"{clock[name]:.1f}", f"{cpu[name]:.1f}"] for name in clock]
    print_rows("seconds", ["", "clock", "CPU"], cells)


def print_quality(worlds: list[dict[str, Any]]) -> None:
    """Print the test mAP and the gap closed in every world."""
    cells = []
    for name in worlds[0]["mAP"]:
        gaps = [world["gap_closed"].get(name) for world in worlds]
        shown = [f"{gap:.2f}" if gap is not None else "-" for gap in gaps]
        cells.append([name, *(percent(world["mAP"][name]) for world in worlds), *shown])
    seeds = [str(world["seed"]) for world in worlds]
    header = ["", *(f"mAP, seed {s}" for s in seeds), *(f"gap, seed {s}" for s in seeds)]
    print_rows("test mAP in % and gap closed", header, cells)


def main() -> None:
    """Measure, print the tables and write the JSON, each part as soon as it is known."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--trials", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=2, help="sweeps that are timed; 0: none")
    parser.add_argument("--run-dir", default="runs/sweep")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    config = load_config(
        preset="demo",
        overrides=[f"sweep.trials={options.trials}"],
        extra={"run_dir": options.run_dir},
    )
    results = read_results(options.out)
    results["settings"] = config.model_dump(mode="json")

    def keep(part: str, value: dict[str, Any]) -> None:
        results[part] = {**measured_on(), **value}
        write_results(options.out, results)

    with ray_cluster(config.ray):
        if options.rounds:
            timing = measure_time(config, (options.seeds or [0])[0], options.rounds)
            keep("time", timing)
            print_time(timing)
        worlds: list[dict[str, Any]] = []
        for seed in options.seeds:
            worlds.append(measure_quality(config, seed))
            keep("quality", {"worlds": worlds})
            print_quality(worlds)


if __name__ == "__main__":
    main()
