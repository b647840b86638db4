"""Scoring images with a student, on Ray Data: manifest in, one row of logits an image out."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from hts_ray.config import PredictConfig
from hts_ray.engine.image_pass import (
    CHECKPOINT,
    OK,
    data_context,
    decode_batch,
    finish,
    image_dataset,
    row_progress,
    rows_per_block,
    stack_pixels,
    users_mistakes_unwrapped,
)
from hts_ray.engine.run import Run, Stage
from hts_ray.engine.telemetry import Meter
from hts_ray.errors import DataError
from hts_ray.images.manifest import Manifest
from hts_ray.store import storage
from hts_ray.store.run import StageFolder, settings_hash
from hts_ray.store.tables import predictions_schema
from hts_ray.student.checkpoints import (
    description_of,
    find_student,
    student_fingerprint,
)
from hts_ray.student.pool import StudentWorker, map_on_students, vector_rows

if TYPE_CHECKING:
    import ray.data


def plan_predict(run: Run, student: str, manifest: Manifest) -> Stage:
    """Plan scoring a manifest's images with the student at a path.

    Raises DataError when there is no student.
    """
    weights = storage.join(student, "student.json")
    if not storage.exists(weights):
        raise DataError(f"no student at {student}: `hts train` writes one")
    config = run.config.predict
    key = settings_hash(
        config.answer_settings(),
        student.rsplit("/", 1)[-1],
        storage.read_json(weights),
        manifest.fingerprint,
    )
    folder = run.stage("predictions", key)

    def work(progress: Callable[[int, int, int], None] | None) -> object:
        return predict_images(
            config=config,
            student_path=student,
            manifest=manifest,
            stage=folder,
            progress=progress,
        )

    return Stage(folder, {"student": student, "manifest": manifest.path}, work)


def predict_images(
    *,
    config: PredictConfig,
    student_path: str,
    manifest: Manifest,
    stage: StageFolder,
    progress: Callable[[int, int, int], None] | None = None,
) -> dict[str, Any]:
    """Score the manifest's images of `config.split` and publish them in `stage`.

    Writes one row of `predictions_schema(C)` an image, the scores being logits; images that
    cannot be read have null scores and stand in the quarantine. A run that was cut off goes on
    after the last block that was written; a finished stage is returned as it is.
    `progress(done, total, quarantined)` is called every few seconds. Raises DataError when there
    is no student, no image, or no image that can be read.
    """
    if stage.finished:
        return stage.stats
    started = time.monotonic()
    splits = None if config.split is None else (config.split,)
    expected = manifest.rows(splits)["image_id"].combine_chunks()
    folder = find_student(student_path)
    description = description_of(folder)
    with data_context(stage.file(CHECKPOINT)):
        blocks = image_dataset(manifest.path, splits).repartition(
            target_num_rows_per_block=rows_per_block(len(expected), config.batch_images)
        )
        dataset = _scored(blocks, config, folder, description, Meter.of(stage, "predict"))
    with row_progress(stage, len(expected), progress), users_mistakes_unwrapped():
        # Appending, because overwriting would delete what a resumed run counts as done.
        dataset.write_parquet(stage.path)
    return finish(
        stage,
        expected,
        name="predict",
        seconds=time.monotonic() - started,
        table_info={
            "class_ids": description["class_ids"],
            "student": folder,
            "student_fingerprint": student_fingerprint(folder),
        },
    )


def _scored(
    dataset: ray.data.Dataset,
    config: PredictConfig,
    folder: str,
    description: dict[str, Any],
    meter: Meter,
) -> ray.data.Dataset:
    """Add decoding on CPU tasks and scoring on an actor pool, or on CPU tasks without GPUs."""
    decoded = dataset.map_batches(
        partial(decode_batch, images=config.images, square=int(description["image_size"])),
        batch_format="pyarrow",
        batch_size=config.batch_images,
    )
    return map_on_students(
        decoded,
        StudentScorer,
        folder=folder,
        pool=config.pool,
        batch_images=config.batch_images,
        meter=meter,
    )


def score_images(
    student_path: str, images: pa.Table, config: PredictConfig
) -> tuple[list[str], npt.NDArray[np.float32]]:
    """Score a few images in this process, without Ray: ids and logits (N, C) of what decodes.

    `images` has image_id, uri and split. The scores are those of `predict_images`. Raises
    DataError when there is no student, or no image that can be read.
    """
    folder = find_student(student_path)
    scorer = StudentScorer(folder, student_fingerprint(folder), config.pool)
    size = scorer.student.image_size
    parts = [
        scorer(decode_batch(images.slice(start, config.batch_images), config.images, square=size))
        for start in range(0, len(images), config.batch_images)
    ]
    rows = pa.concat_tables(parts) if parts else images.slice(0, 0)
    good = rows.filter(pc.equal(rows["status"], OK)) if parts else rows
    if not len(good):
        raise DataError(f"none of {len(images)} images can be used")
    scores = good["scores"].combine_chunks()
    flat: npt.NDArray[np.float32] = scores.flatten().to_numpy(zero_copy_only=False)
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
    folder = find_student(student_path)
    scorer = StudentScorer(folder, student_fingerprint(folder), config.pool)
    rows = np.linspace(0, len(images) - 1, min(sample, len(images))).astype(int)
    chosen = images.take(pa.array(rows))
    seconds = 0.0
    for _ in range(2):  # the first pass warms up
        started = time.monotonic()
        decoded = decode_batch(chosen, config.images, square=scorer.student.image_size)
        good = pc.sum(pc.equal(scorer(decoded)["status"], OK)).as_py() or 0
        seconds = time.monotonic() - started
    per_image = seconds / len(chosen) if good else None
    total = None if per_image is None else per_image * len(images) / config.pool.max_size
    gpu_hours = None if total is None else total * config.pool.num_gpus / 3600
    return {
        "images": len(images),
        "sample": good,
        "seconds_per_image": per_image,
        "seconds": total,
        "gpu_hours": gpu_hours,
    }


class StudentScorer(StudentWorker):
    """Scores decoded batches."""

    def __call__(self, table: pa.Table) -> pa.Table:
        """Turn rows with `pixels` into rows of `predictions`."""
        good = np.asarray(table["error_kind"].is_null())
        pixels = stack_pixels(table.filter(pa.array(good)), self.student.image_size)
        logits_GC = np.zeros((0, len(self.student.class_table)), np.float32)
        if len(pixels):
            logits_GC = self.run(self.student, pixels)
        return prediction_rows(table, good, logits_GC)


def prediction_rows(
    table: pa.Table, good: npt.NDArray[np.bool_], logits_GC: npt.NDArray[np.float32]
) -> pa.Table:
    """Return rows of `predictions` for N decoded rows, of which `good` (N,) have G logit rows.

    A row whose logits are not finite is quarantined as well: no ranking could hold it.
    """
    return vector_rows(
        table,
        good,
        {"scores": logits_GC},
        predictions_schema(logits_GC.shape[1]),
        "the student's logits are not finite",
    )
