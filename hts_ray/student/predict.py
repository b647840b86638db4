"""Scoring images with a student, on Ray Data: manifest in, one row of logits per image out."""

from __future__ import annotations

import time
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from hts_ray.config import PoolConfig, PredictConfig
from hts_ray.engine.decoding import stack_pixels
from hts_ray.engine.image_pass import OK
from hts_ray.engine.ray_data import image_dataset
from hts_ray.engine.run import Run, Stage
from hts_ray.errors import ConfigError, DataError
from hts_ray.images.manifest import Manifest
from hts_ray.store import storage
from hts_ray.store.aliases import FloatArray, ImagesDone
from hts_ray.store.run import settings_hash
from hts_ray.store.tables import predictions_schema
from hts_ray.student.checkpoints import (
    DESCRIPTION,
    description_of,
    find_student,
    student_fingerprint,
)
from hts_ray.student.pool import StudentPass, StudentWorker


def plan_predict(run: Run, student: str, manifest: Manifest) -> Stage:
    """Plan scoring a manifest's images of `predict.split` with the student at a path.

    The work writes one row of `predictions_schema(C)` per image, whose scores are logits; images
    that cannot be read have null scores and are listed in the quarantine. A run that was cut off
    goes on after the last block that was written. Raises DataError when there is no student; the
    work does when there is no image, or none that can be read.
    """
    description = storage.join(student, DESCRIPTION)
    if not storage.exists(description):
        raise DataError(f"no student at {student}: `hts train` writes one")
    config = run.config.predict
    key = settings_hash(
        config.answer_settings(),
        student.rsplit("/", 1)[-1],
        storage.read_json(description),
        manifest.fingerprint,
    )
    folder, task = run.stage("predictions", key), _pass(config, student)

    def work(progress: ImagesDone | None) -> object:
        splits = None if config.split is None else (config.split,)
        ids = manifest.rows(splits)["image_id"]
        read = partial(image_dataset, manifest.path, splits)
        return task.publish(folder, read, ids, "predict", progress, student_info(task.folder))

    return Stage(folder, {"student": student, "manifest": manifest.path}, work)


def student_info(folder: str) -> dict[str, Any]:
    """Return what a table of logits says of the student that made them, in `table.json`."""
    return {
        "class_ids": description_of(folder)["class_ids"],
        "student": folder,
        "student_fingerprint": student_fingerprint(folder),
    }


def _pass(config: PredictConfig, student_path: str) -> StudentPass:
    folder = find_student(student_path)
    if config.center and "class_means" not in description_of(folder):
        raise ConfigError(
            f"the student at {folder} kept no mean logits",
            field="predict.center",
            value=True,
            remedy="train it with train.center_images=500",
        )
    given = (("center", config.center),)
    return StudentPass(
        folder, StudentScorer, config.pool, config.images, config.batch_images, given
    )


def score_images(
    student_path: str, images: pa.Table, config: PredictConfig
) -> tuple[list[str], FloatArray]:
    """Score a few images in this process, without Ray: ids and logits (N, C) of what decodes.

    `images` has image_id, uri and split. The scores are those of a predictions table. Raises
    DataError when there is no student, or no image that can be read.
    """
    rows = _pass(config, student_path).here(images) if len(images) else None
    good = None if rows is None else rows.filter(pc.equal(rows["status"], OK))
    if good is None or not len(good):
        raise DataError(f"none of {len(images)} images can be used")
    scores = good["scores"].combine_chunks()
    flat: FloatArray = scores.flatten().to_numpy(zero_copy_only=False)
    return good["image_id"].to_pylist(), flat.reshape(len(good), -1)


def estimate(
    config: PredictConfig, student_path: str, manifest: Manifest, sample: int = 8
) -> dict[str, Any]:
    """Measure the student on a few images in this process and extrapolate; writes nothing.

    Returns images, sample, seconds_per_image, seconds (of the run with pool.max_size workers)
    and gpu_hours; times are None when no sampled image could be read. Raises DataError when
    there is no student or no image.
    """
    images = manifest.rows(None if config.split is None else (config.split,))
    task = _pass(config, student_path)
    scorer = task.make()
    rows = np.linspace(0, len(images) - 1, min(sample, len(images))).astype(int)
    chosen = images.take(pa.array(rows))
    seconds = 0.0
    for _ in range(2):  # the first pass warms up
        started = time.monotonic()
        good = pc.sum(pc.equal(scorer(task.decode(chosen))["status"], OK)).as_py() or 0
        seconds = time.monotonic() - started
    per_image = seconds / len(chosen) if good else None
    total = None if per_image is None else per_image * len(images) / config.pool.max_size
    gpu_hours = None if total is None else total * config.pool.gpus / 3600
    return {
        "images": len(images),
        "sample": good,
        "seconds_per_image": per_image,
        "seconds": total,
        "gpu_hours": gpu_hours,
    }


class StudentScorer(StudentWorker):
    """Turns rows with `pixels` into rows of `predictions`; with `center` see `centered`."""

    def __init__(self, folder: str, pool: PoolConfig, *, center: bool = False) -> None:
        super().__init__(folder, pool)
        self._center = center

    @property
    def schema(self) -> pa.Schema:
        """The table's schema, for the student's classes."""
        return predictions_schema(len(self.student.class_table))

    def vectors(self, table: pa.Table) -> dict[str, FloatArray]:
        """Return the logits."""
        pixels = stack_pixels(table, self.student.image_size)
        logits_GC = self.student.compute(self.student.normalise(pixels))
        if self._center:
            means_C = np.array(self.student.class_means, dtype=np.float32)
            logits_GC = centered(logits_GC, means_C)
        return {"scores": logits_GC}


def centered(logits_NC: FloatArray, means_C: FloatArray) -> FloatArray:
    """Return log-probabilities (N, C): a softmax over an image's logits less the classes' means.

    A class that a student prefers on every image loses that advantage, as the prior of a caption
    does in the filter. Among classes that exclude each other nothing else is taken away.
    """
    shifted_NC = logits_NC - means_C
    top_N1 = shifted_NC.max(axis=1, keepdims=True)
    total_N1 = np.exp(shifted_NC - top_N1).sum(axis=1, keepdims=True)
    return np.asarray(shifted_NC - top_N1 - np.log(total_N1), dtype=np.float32)
