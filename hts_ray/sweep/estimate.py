"""What a sweep will take, from one measured trial; for `hts sweep --dry-run`."""

from __future__ import annotations

import os
import tempfile
import time
from dataclasses import replace
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from hts_ray.labels.stage import plan_filter
from hts_ray.store.run import StageFolder
from hts_ray.student.features import plan_features
from hts_ray.student.targets import training_labels
from hts_ray.student.train import estimate as estimate_training
from hts_ray.sweep.data import load_sweep_data, read_regions
from hts_ray.sweep.finalists import FOLDS, final_objective
from hts_ray.sweep.objectives import VALIDATION
from hts_ray.sweep.plan import TABLE, Plan
from hts_ray.sweep.stage import one_trial, start_student


def estimate(plan: Plan, sample: int = 200) -> dict[str, Any]:
    """Measure features and a trial of the run's own settings on `sample` images, and scale.

    Everything lies in a temporary folder, nothing of the run is touched and Ray is not started:
    trials at a time are `sweep.concurrency` or this machine's CPUs. Returns readable names:
    features seconds (0 when they are stored), trial seconds (all seeds), trials seconds (an upper
    bound, since trials are stopped early) and finalists seconds (one training after the other,
    without start-up). Raises what the run's own settings raise.
    """
    config, full = plan.run.config, plan.run.config.sweep.train == "full"
    with tempfile.TemporaryDirectory() as folder:
        elsewhere = replace(plan, stage=StageFolder(folder, TABLE, "estimate"))
        features_seconds = seed_seconds = 0.0
        if not full:
            features_seconds, seed_seconds = _measure(elsewhere, folder, sample)
        training_seconds = _training_seconds(elsewhere, folder)
    sweep = config.sweep
    at_a_time = sweep.concurrency or min(sweep.trials, os.cpu_count() or 1)
    finalists = min(sweep.finalists + 1, sweep.trials) if sweep.finalists else 0
    trainings = 1 if final_objective(plan.objective) == VALIDATION else FOLDS
    trial_seconds = training_seconds if full else seed_seconds * sweep.repeats
    if full:  # the first student of a finalist is its trial's; how many run at a time Ray tells
        at_a_time, trainings = sweep.concurrency or 1, trainings - 1
    return {
        "images": len(plan.images),
        "scored images": plan.scored,
        "labeled images": 0 if plan.validation is None else len(plan.validation),
        "features seconds": features_seconds,
        "trials": sweep.trials,
        "trials at a time": at_a_time,
        "trial seconds": trial_seconds,
        "trials seconds": trial_seconds * sweep.trials / at_a_time,
        "finalists": finalists,
        "finalists seconds": finalists * trainings * training_seconds,
    }


def _measure(plan: Plan, folder: str, sample: int) -> tuple[float, float]:
    """Return the seconds of all images' features and of a trial with one seed."""
    run, scores = plan.run, plan.region_scores.path
    seed, split = run.config.sweep.seed, run.config.train.split
    student = start_student(plan, folder)
    settings, flipped = run.config.train.features, plan.flipped
    found = plan_features(settings, run.run_dir, student, plan.images, flipped=flipped).folder
    stored = found.finished
    ids = read_regions(scores, split, seed, sample, plan.images).image_ids.tolist()
    images = plan.images.filter(pc.is_in(plan.images["image_id"], pa.array(ids)))
    started = time.monotonic()
    if not stored:
        found = plan_features(settings, folder, student, images, flipped=flipped).run()
    share = len(plan.images) / len(images)
    features_seconds = 0.0 if stored else (time.monotonic() - started) * share
    data = load_sweep_data(run.config, run.class_table, scores, found.path, max_images=sample)
    for _ in range(2):  # the first one warms up
        started = time.monotonic()
        one_trial(data, {}, seed)
    return features_seconds, (time.monotonic() - started) * share


def _training_seconds(plan: Plan, folder: str) -> float:
    """Return the seconds of a training in full with the run's own settings."""
    run = plan.run.changed({"run_dir": folder})
    labels = training_labels(run, plan_filter(run, plan.region_scores).run(), None)
    return float(estimate_training(run, labels)["seconds"])
