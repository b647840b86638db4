"""Full trainings of a sweep: functions that Ray Tune runs and that launch Ray Train.

Such a function filters, starts the workers and waits. Ray Train reserves all workers of a training
in one placement group, so that none holds a part of what another waits for; Tune starts only as
many as the cluster has room for. What a training writes lies in the sweep's folder, which all nodes
see: one that was cut off goes on from its checkpoint, and a finished one is not run again.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import ray
from ray import tune

from hts_ray.config import HtsConfig, TrainConfig, override
from hts_ray.engine.run import Run, Stage
from hts_ray.errors import DataError, UserError
from hts_ray.labels.stage import plan_filter
from hts_ray.store import storage
from hts_ray.store.run import StageFolder
from hts_ray.student.progress import read_history
from hts_ray.student.targets import training_labels
from hts_ray.student.train import plan_train
from hts_ray.sweep.space import Settings, trial_config
from hts_ray.sweep.tune import Work, report_fields, run_jobs

CURVE = "mAP_curve"  # the name of the validation mAP in full trials
Student = Callable[[], StageFolder]
Job = tuple[int, Settings, int]  # a trial's number and settings, and the part of the images
# What a function holds while its workers train: it takes no CPU from them.
_DRIVER = {"memory": 64 << 20}


@dataclass(frozen=True)
class Training:
    """What all full trainings of a sweep share.

    `parts` are the ids of the images of each student of a trial. With several, each is trained for
    as many times the epochs, which are as many steps as one on all images takes. `validation`,
    annotated rows of a manifest, is measured after every epoch of a student of the first part.
    `center` are the images whose means a student keeps for `predict.center`.
    """

    run: Run
    region_scores: StageFolder
    folder: str
    parts: tuple[tuple[str, ...], ...]
    validation: pa.Table | None = None
    center: pa.Table | None = None

    def config(self, settings: Settings) -> HtsConfig:
        """Return the settings of a trial's students."""
        parts = len(self.parts)
        config = trial_config(self.run.config, settings)
        optim = {"restart_epochs": config.train.optim.restart_epochs * parts}
        longer = {"epochs": config.train.epochs * parts, "optim": optim}
        return override(config, {"train": longer})

    def plan(self, number: int, settings: Settings, part: int) -> Stage:
        """Filter with a trial's settings, and plan the training on one of the parts.

        Each has a folder of its own: trials of different settings may come to the same labels and
        so to the same student, and two trainings cannot write one at the same time.
        """
        own = {"run_dir": storage.join(self.folder, f"{number}-{part}")}
        run = Run(override(self.config(settings), own), self.run.class_table)
        labels = training_labels(run, plan_filter(run, self.region_scores).run(), None)
        assert labels is not None
        labels = labels.filter(pc.is_in(labels["image_id"], pa.array(self.parts[part])))
        if not len(labels):
            raise DataError("the filter leaves no pseudo-label of the images to train on")
        validation = self.validation if part == 0 else None
        return plan_train(run, labels.combine_chunks(), validation, self.center)


def training_slots(train: TrainConfig) -> int:
    """Return how many trainings run at a time, so that each finds all its workers' resources.

    Each needs its workers' CPUs and GPUs, and a CPU for the tasks that feed them. On a single
    machine, which may have more logical CPUs than real ones, the workers of all trainings need a
    real one each too; the tasks that feed them do little after the first epoch.
    """
    resources = ray.cluster_resources()
    cpus = train.num_workers * train.worker_cpus
    slots = int(float(resources.get("CPU", 1.0)) // (cpus + 1))
    if sum(bool(node["Alive"]) for node in ray.nodes()) == 1:
        slots = min(slots, int((os.cpu_count() or 1) // cpus))
    if train.gpu:
        slots = min(slots, int(resources.get("GPU", 0.0) // train.num_workers))
    return max(1, slots)


def train_students(training: Training, jobs: Sequence[Job]) -> list[Student]:
    """Train the students of trials; a call returns each, or raises why it failed.

    Those that Ray Train does not run are trained in this process, whose random state they share:
    one by one, when they are called for.
    """

    def student(job: Job, message: str) -> StageFolder:
        if message:
            raise UserError(message)
        return training.plan(*job).run()

    messages, train = [""] * len(jobs), training.run.config.train
    if train.num_workers and train.trainable != "head":
        trainable = tune.with_parameters(_train_job, training=training)
        work = Work(trainable, _DRIVER, training_slots(train))
        messages = run_jobs(work, jobs, storage.join(training.folder, "tune"))
    return [partial(student, job, said) for job, said in zip(jobs, messages, strict=True)]


def _train_job(config: dict[str, Any], *, training: Training) -> None:
    """Train one student; runs in a Tune actor."""
    started, message = time.monotonic(), ""
    try:
        training.plan(*json.loads(config["job"])).run()
    except UserError as error:
        message = str(error)
    report_fields("complete", {}, (), started, message)


def curve_work(training: Training) -> Work:
    """Return the trials that train a student of the first part, and report after every epoch."""
    trainable = tune.with_parameters(_train_trial, training=training)
    config = training.run.config
    slots = training_slots(config.train)
    return Work(trainable, _DRIVER, min(config.sweep.concurrency or slots, slots))


def _train_trial(config: dict[str, Any], *, training: Training) -> None:
    """Train a student and report its validation curve so far after each epoch; in a Tune actor.

    Tune stops a trial by ending this process, and Ray Train's workers end with it.
    """
    started = time.monotonic()
    settings = json.loads(config["settings"])
    try:
        epochs = training.config(settings).train.epochs
        stage = training.plan(config["number"], settings, 0)
        told: list[float] = []

        def look(_record: object = None) -> None:
            history = _history(stage.folder)
            curve = _curve(history)
            # The last epoch is reported when the student is written: nothing is left to stop.
            if len(curve) > len(told) and len(history) < epochs:
                told[:] = curve
                report_fields("stopped", {CURVE: curve[-1]}, curve, started)

        look()  # what a training that was cut off had come to
        stage.run(look)
        curve = _curve(_history(stage.folder))
    except UserError as error:
        report_fields("infeasible", {}, (), started, str(error))
        return
    except Exception as error:  # not raised: Tune would train it again from its checkpoint
        report_fields("failed", {}, (), started, f"{type(error).__name__}: {error}")
        return
    if not curve or not math.isfinite(curve[-1]):
        message = "no validation image of a class with a positive could be scored"
        report_fields("infeasible", {}, (), started, message)
        return
    report_fields("complete", {CURVE: curve[-1]}, curve, started)


def _history(student: StageFolder) -> list[dict[str, Any]]:
    return read_history(student.file("history.json"))


def _curve(history: Sequence[Mapping[str, Any]]) -> list[float]:
    """Return the validation mAP after each epoch that was measured."""
    values = [record["validation_mAP"] for record in history]
    return [value for value in values if value is not None]
