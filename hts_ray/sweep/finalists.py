"""The best trials and the run's own settings, trained in full and compared once more.

Trials keep the tower frozen; what is best there need not be best when it learns too. The
students lie inside the sweep's folder, so that no later stage takes one of them for the run's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from hts_ray.config import override
from hts_ray.engine.run import Run
from hts_ray.errors import UserError
from hts_ray.evaluate import label_matrix, read_predictions
from hts_ray.images.manifest import IMAGE_COLUMNS, sampled
from hts_ray.metrics import hico_average_precision, mean_average_precision
from hts_ray.store import storage
from hts_ray.store.aliases import BoolArray, FloatArray
from hts_ray.store.run import StageFolder
from hts_ray.store.tables import MANIFEST_SCHEMA, write_table
from hts_ray.student.predict import plan_predict, score_images
from hts_ray.sweep.data import Judging
from hts_ray.sweep.log import OWN, Trial
from hts_ray.sweep.objectives import HELD_OUT, VALIDATION, Outcome, unseen_expected_ap
from hts_ray.sweep.plan import Plan
from hts_ray.sweep.space import Settings
from hts_ray.sweep.trainings import Training, train_students

FOLDER = "finalists"
FOLDS = 2
# From which probability of the reference on an image counts as positive, or is left out, in the
# curve of a full trial without labels.
_POSITIVE, _AMBIGUOUS = 0.5, 0.2


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
    plan: Plan, data: Judging, trials: Sequence[Trial], tell: Callable[[str], None]
) -> list[Finalist]:
    """Train every trial's settings in full and compare the students on images they did not see.

    Without labels the images are halved, a student is trained on the pseudo-labels of each half
    for twice the epochs, which are as many steps, and the objective compares them as it does in a
    trial; with labels one student is trained on all images that are not labeled, and its mAP is
    that of the labeled ones. So many trainings run at a time as the cluster holds. Raises what the
    training of the run's own settings raises.
    """
    final = _Final(plan, data)
    parts = range(len(final.training.parts))
    jobs = [(trial.number, trial.settings, part) for trial in trials for part in parts]
    students = iter(train_students(final.training, jobs))
    found: list[Finalist] = []
    own_ap_C = None
    for trial in trials:
        last, ap_C = final.compare(trial, [next(students) for _ in parts])
        if trial.number == OWN:
            own_ap_C = ap_C
        elif ap_C is not None and own_ap_C is not None:
            last = replace(last, gain_error=paired_error(ap_C, own_ap_C))
        found.append(last)
        shown = last.message if last.value is None else f"{last.objective} {last.value:.4f}"
        tell(f"finalist {trial.number}: {shown}, {last.seconds:.0f} s of training")
    return found


def full_training(plan: Plan, data: Judging) -> Training:
    """Return what full trainings share: halves of the images, or with labels all but the labeled.

    Where trials train in full too, a student of the first part is measured after every epoch: its
    mAP on labeled images, or on the other half by what the reference is sure of. These students are
    the finalists' then, and not trained again.
    """
    ids, run = data.image_ids, plan.run
    full = run.config.sweep.train == "full"
    curve_on = plan.validation if full else None
    if final_objective(plan.objective) == VALIDATION:
        parts = [ids[~data.labeled_N]]
    else:
        random = np.random.default_rng([run.config.sweep.seed, 3])
        fold_N = random.permutation(np.arange(len(ids)) % FOLDS)
        parts = [ids[fold_N == fold] for fold in range(FOLDS)]
        curve_on = sure_annotations(plan, data, fold_N != 0) if full else None
    listed = tuple(tuple(part.tolist()) for part in parts)
    kept = run.config.train.center_images
    center = sampled(plan.images, kept, run.config.seed) if kept else None
    folder = plan.stage.file(FOLDER)
    return Training(run, plan.region_scores, folder, listed, curve_on, center)


def sure_annotations(plan: Plan, data: Judging, chosen_N: BoolArray) -> pa.Table:
    """Return images as annotated rows: positive from probability 0.5 on, ambiguous from 0.2 on."""
    class_ids = plan.run.class_table.ids
    images = plan.images.sort_by("image_id")
    images = images.filter(pc.is_in(images["image_id"], pa.array(data.image_ids[chosen_N])))
    rows = []
    for row, p_C in zip(images.to_pylist(), data.reference_NC[chosen_N], strict=True):
        positive_C = p_C >= _POSITIVE
        ambiguous_C = (p_C >= _AMBIGUOUS) & ~positive_C
        annotated = {"positive_ids": class_ids[positive_C], "ambiguous_ids": class_ids[ambiguous_C]}
        rows.append({**row, **annotated, "negative_ids": []})
    return pa.Table.from_pylist(rows, schema=MANIFEST_SCHEMA)


def paired_error(ap_C: FloatArray, other_C: FloatArray) -> float:
    """Return the standard error of the difference of two mAP over the same classes.

    A class that has no AP in one of them does not count. Infinite for fewer than two classes.
    Source: the paired t-test over queries of information retrieval, Smucker et al. 2007.
    """
    difference_C = (ap_C - other_C)[np.isfinite(ap_C) & np.isfinite(other_C)]
    if len(difference_C) < 2:
        return float("inf")
    return float(difference_C.std(ddof=1) / np.sqrt(len(difference_C)))


class _Final:
    """How finalists are compared."""

    def __init__(self, plan: Plan, data: Judging) -> None:
        self._plan, self._data = plan, data
        self._objective = final_objective(plan.objective)
        self.training = full_training(plan, data)

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
        ids = data.image_ids.tolist()
        logits_2NC = np.stack([self._logits(student, images, ids) for student in students])
        fold_N = np.where(np.isin(ids, self.training.parts[0]), 0, 1).astype(np.int8)
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
        folder = self.training.folder
        manifest = storage.join(folder, "images.parquet")
        write_table(manifest, images.select(IMAGE_COLUMNS))
        values = {"run_dir": folder, "predict": {"split": None}}
        run = Run(override(config, values), class_table)
        stage = plan_predict(run, student.path, run.manifest(manifest)).run()
        return read_predictions(stage.path, class_table)
