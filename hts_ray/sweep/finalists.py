"""The best trials and the run's own settings, trained in full and compared once more.

Trials keep the tower frozen; what is best there need not be best when it learns too. The
students lie inside the sweep's folder, so that no later stage takes one of them for the run's.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray

from hts_ray.config import TrainConfig, override
from hts_ray.engine.run import Run
from hts_ray.errors import UserError
from hts_ray.evaluate import label_matrix, read_predictions
from hts_ray.images.manifest import IMAGE_COLUMNS, sampled
from hts_ray.labels.stage import plan_filter
from hts_ray.metrics import hico_average_precision, mean_average_precision
from hts_ray.store import storage
from hts_ray.store.aliases import FloatArray
from hts_ray.store.run import StageFolder
from hts_ray.store.tables import write_table
from hts_ray.student.predict import plan_predict, score_images
from hts_ray.student.targets import training_labels
from hts_ray.student.train import plan_train
from hts_ray.sweep.data import SweepData
from hts_ray.sweep.log import OWN, Trial
from hts_ray.sweep.objectives import (
    VALIDATION,
    Outcome,
    unseen_expected_ap,
)
from hts_ray.sweep.plan import Plan
from hts_ray.sweep.space import Settings, trial_config

FOLDER = "finalists"
HELD_OUT = "unseen_ap"
FOLDS = 2


@dataclass(frozen=True)
class Finalist:
    """A trial that was trained in full; `value` is None where that failed, as `message` tells.

    `gain_error` is the standard error of the value's difference to that of the run's own settings.
    """

    number: int
    settings: Settings
    objective: str
    trial_value: float | None
    value: float | None
    seconds: float
    message: str = ""
    gain_error: float | None = None


def final_objective(name: str) -> str:
    """Return what finalists are compared by: labels, or else held-out images alone.

    The other objectives would take a further training, on all images at once.
    """
    return name if name == VALIDATION else HELD_OUT


def run_finalists(
    plan: Plan, data: SweepData, trials: Sequence[Trial], tell: Callable[[str], None]
) -> list[Finalist]:
    """Train every trial's settings in full and compare the students on images they did not see.

    Without labels the images are halved, a student is trained on the pseudo-labels of each half
    for twice the epochs, which are as many steps, and the objective compares them as it does in a
    trial; with labels one student is trained on all images that are not labeled, and its mAP is
    that of the labeled ones. So many trainings run at a time as the cluster holds. Raises what the
    training of the run's own settings raises.
    """
    final = _Final(plan, data, final_objective(plan.objective))
    train = plan.run.config.train
    students: list[list[Callable[[], StageFolder]]]
    students = [[partial(final.train, trial, ids) for ids in final.parts] for trial in trials]
    found: list[Finalist] = []
    own_ap_C = None
    with ExitStack() as stack:
        if train.num_workers:  # those inside this process share its random state: one by one
            pool = ThreadPoolExecutor(training_slots(train))
            stack.callback(pool.shutdown, wait=False, cancel_futures=True)
            students = [[pool.submit(job).result for job in halves] for halves in students]
        for trial, halves in zip(trials, students, strict=True):
            last, ap_C = final.compare(trial, halves)
            if trial.number == OWN:
                own_ap_C = ap_C
            elif ap_C is not None and own_ap_C is not None:
                last = replace(last, gain_error=paired_error(ap_C, own_ap_C))
            found.append(last)
            shown = last.message if last.value is None else f"{last.objective} {last.value:.4f}"
            tell(f"finalist {trial.number}: {shown}, {last.seconds:.0f} s of training")
    return found


def paired_error(ap_C: FloatArray, other_C: FloatArray) -> float:
    """Return the standard error of the difference of two mAP over the same classes.

    A class that has no AP in one of them does not count. Infinite for fewer than two classes.
    Source: the paired t-test over queries of information retrieval, Smucker et al. 2007.
    """
    difference_C = (ap_C - other_C)[np.isfinite(ap_C) & np.isfinite(other_C)]
    if len(difference_C) < 2:
        return float("inf")
    return float(difference_C.std(ddof=1) / np.sqrt(len(difference_C)))


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


class _Final:
    """What all finalists share: `parts` are the ids of the images of each of their students."""

    def __init__(self, plan: Plan, data: SweepData, objective: str) -> None:
        self._plan, self._data, self._objective = plan, data, objective
        self._folder = plan.stage.file(FOLDER)
        ids, sweep = data.regions.image_ids, plan.run.config.sweep
        kept = plan.run.config.train.center_images
        self._center = sampled(plan.images, kept, plan.run.config.seed) if kept else None
        if plan.validation is not None and objective == VALIDATION:
            self.parts = [ids[~data.labeled_N].tolist()]
        else:
            random = np.random.default_rng([sweep.seed, 3])
            fold_N = random.permutation(np.arange(len(ids)) % FOLDS)
            self.parts = [ids[fold_N == fold].tolist() for fold in range(FOLDS)]

    def train(self, trial: Trial, image_ids: Sequence[str]) -> StageFolder:
        """Filter with a trial's settings and train on the pseudo-labels of one of the parts."""
        plan, parts = self._plan, len(self.parts)
        config = trial_config(plan.run.config, trial.settings)
        optim = {"restart_epochs": config.train.optim.restart_epochs * parts}
        longer = {"epochs": config.train.epochs * parts, "optim": optim}
        config = override(config, {"run_dir": self._folder, "train": longer})
        run = Run(config, plan.run.class_table)
        labels = training_labels(run, plan_filter(run, plan.region_scores).run(), None)
        assert labels is not None
        labels = labels.filter(pc.is_in(labels["image_id"], pa.array(image_ids)))
        return plan_train(run, labels.combine_chunks(), center=self._center).run()

    def compare(
        self, trial: Trial, students: Sequence[Callable[[], StageFolder]]
    ) -> tuple[Finalist, FloatArray | None]:
        """Return a finalist and the AP (C,) that its value is the mean of."""
        name, ap_C = self._objective, None
        finalist = Finalist(trial.number, trial.settings, name, trial.objective, None, 0.0)
        try:
            trained = [student() for student in students]
            labeled = name == VALIDATION
            ap_C = self._labeled_ap(trained[0]) if labeled else self._expected_ap(trained)
        except UserError as error:
            if trial.number == OWN:
                raise
            return replace(finalist, message=str(error)), None
        seconds = sum(float(student.stats["seconds"]) for student in trained)
        return replace(finalist, value=mean_average_precision(ap_C), seconds=seconds), ap_C

    def _expected_ap(self, students: Sequence[StageFolder]) -> FloatArray:
        """Return the expected AP (C,) of two students, each trained on one half of the images."""
        data, images = self._data, self._plan.images
        ids = data.regions.image_ids.tolist()
        logits_2NC = np.stack([self._logits(student, images, ids) for student in students])
        fold_N = np.where(np.isin(ids, self.parts[0]), 0, 1).astype(np.int8)
        return unseen_expected_ap(Outcome(data.reference_NC, fold_N, logits_2NC))

    def _labeled_ap(self, student: StageFolder) -> FloatArray:
        """Return the student's AP (C,) on the labeled images."""
        images = self._plan.validation
        assert images is not None
        logits_VC = self._logits(student, images, images["image_id"].to_pylist())
        labels_VC = label_matrix(images, self._plan.run.class_table)
        return np.asarray(hico_average_precision(logits_VC, labels_VC))

    def _logits(self, student: StageFolder, images: pa.Table, ids: Sequence[str]) -> FloatArray:
        """Return logits (N, C) of images by id; one that cannot be read is below all others."""
        found, logits_MC = self._score(student, images)
        row_of = {image_id: row for row, image_id in enumerate(found)}
        rows = np.array([row_of.get(image_id, -1) for image_id in ids])
        floor = np.float32(logits_MC.min() - 1)
        return np.where((rows >= 0)[:, None], logits_MC[rows], floor)

    def _score(self, student: StageFolder, images: pa.Table) -> tuple[list[str], FloatArray]:
        """Score images: few in this process, as features are, many as `hts predict` does."""
        config, class_table = self._plan.run.config, self._plan.run.class_table
        if config.predict.pool.gpus == 0 and len(images) <= config.train.features.local_images:
            return score_images(student.path, images, config.predict)
        manifest = storage.join(self._folder, "images.parquet")
        write_table(manifest, images.select(IMAGE_COLUMNS))
        values = {"run_dir": self._folder, "predict": {"split": None}}
        run = Run(override(config, values), class_table)
        stage = plan_predict(run, student.path, run.manifest(manifest)).run()
        return read_predictions(stage.path, class_table)
