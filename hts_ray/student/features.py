"""The student's image features, computed once for many classifiers: images in, one row each out.

With the tower frozen, features depend on the images and the tower alone, not on classes or
labels. So a stage's key holds a hash of the tower's weights and of the images, and a training,
another filter and every trial of a sweep find the same folder.

Shape legend: N images, D features, G good rows of a batch.
"""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import safetensors.torch

from hts_ray.config import FeaturesConfig, ImagesConfig, PoolConfig
from hts_ray.engine.decoding import stack_pixels
from hts_ray.engine.image_pass import OK, finish
from hts_ray.engine.ray_data import image_dataset
from hts_ray.engine.run import Stage
from hts_ray.errors import DataError
from hts_ray.images.manifest import IMAGE_COLUMNS
from hts_ray.store import storage
from hts_ray.store.aliases import FloatArray, ImagesDone
from hts_ray.store.run import StageFolder, content_hash, finished_stages, settings_hash
from hts_ray.store.tables import features_schema, read_table, require_unique_ids, write_table
from hts_ray.student.checkpoints import WEIGHTS, description_of, find_student, student_fingerprint
from hts_ray.student.model import ARCHITECTURE
from hts_ray.student.pool import StudentPass, StudentWorker

TABLE, FLIPPED = "features", "flipped"
_INPUT = "_input"  # readers of tables leave out what starts so
_IMAGE_SCHEMA = pa.schema([(name, pa.string()) for name in IMAGE_COLUMNS])
_DECODING = ImagesConfig.model_validate({})


@dataclass(frozen=True, eq=False)
class Features:
    """Features (N, D) float32 of N images, in the order of their ids.

    `flipped_ND` are those of the mirrored images, None where they were not asked for.
    """

    image_ids: list[str]
    features_ND: FloatArray
    flipped_ND: FloatArray | None

    def take(self, image_ids: list[str]) -> Features:
        """Return the rows of `image_ids`, in that order; KeyError for one that is not there."""
        row_of = {image_id: row for row, image_id in enumerate(self.image_ids)}
        rows = np.array([row_of[image_id] for image_id in image_ids], dtype=np.int64)
        flipped = None if self.flipped_ND is None else self.flipped_ND[rows]
        return Features(list(image_ids), self.features_ND[rows], flipped)


def read_feature_table(path: str) -> Features:
    """Return the features in a table, quarantined images left out.

    Raises DataError when there is no table, or none of its images has features.
    """
    table = read_table(path)
    if TABLE not in table.column_names:
        raise DataError(f"{path} is not a features table: column {TABLE!r} is missing")
    # By id: the order in which workers wrote must not be the order of a training.
    good = table.filter(pc.equal(table["status"], OK)).sort_by("image_id")
    if not len(good):
        raise DataError(f"{path} holds no image with features: see its quarantine")
    flipped = feature_matrix(good[FLIPPED]) if FLIPPED in good.column_names else None
    return Features(good["image_id"].to_pylist(), feature_matrix(good[TABLE]), flipped)


def feature_matrix(column: pa.ChunkedArray) -> FloatArray:
    """Return the features (N, D) of a table's column, which has no null."""
    parts = [chunk.flatten().to_numpy(zero_copy_only=False) for chunk in column.chunks]
    return np.concatenate(parts).reshape(len(column), column.type.list_size)


def plan_features(
    config: FeaturesConfig,
    run_dir: str,
    student_path: str,
    images: pa.Table,
    *,
    flipped: bool = False,
) -> Stage:
    """Plan encoding images with a stored student's tower, unless the run has their features.

    `images` has image_id, uri and split, as `Manifest.rows` returns them. A finished folder of
    more images serves as well. The work writes one row of `features_schema` per image; images that
    cannot be read have null features and are listed in the quarantine. Many images, and any with a
    GPU in the pool, go through Ray Data, where a run that was cut off goes on after the last block
    that was written; few are encoded in this process. Raises DataError when there is no student or
    no image; the work does when no image can be read.
    """
    images, folder = _checked(images), find_student(student_path)
    made_by = {"encoder": encoder_fingerprint(folder), "decoding": _DECODING.answer_settings()}
    key = settings_hash(*made_by.values(), flipped, content_hash(images.sort_by("image_id")))
    stage = StageFolder(storage.absolute(run_dir), TABLE, key)
    stage = _find(run_dir, made_by, images, flipped) or stage
    settings = (("flipped", flipped),)
    task = StudentPass(
        folder, FeatureEncoder, config.pool, _DECODING, config.batch_images, settings
    )

    def work(progress: ImagesDone | None) -> object:
        ids = images["image_id"]
        info = {"student": folder, **made_by, "flipped": flipped}
        if config.pool.gpus > 0 or len(images) > config.local_images:
            source = stage.file(_INPUT, "images.parquet")
            write_table(source, images)
            read = partial(image_dataset, source)
            return task.publish(stage, read, ids, TABLE, progress, info)
        started = time.monotonic()
        storage.remove_tree(stage.path)  # what a run on Ray left would not fit to these files
        write_table(stage.file("part-0.parquet"), task.here(images))
        seconds = time.monotonic() - started
        return finish(stage, ids, name=TABLE, seconds=seconds, table_info=info)

    return Stage(stage, {"student": folder}, work)


def _find(
    run_dir: str, made_by: dict[str, Any], images: pa.Table, flipped: bool
) -> StageFolder | None:
    """Return a finished features folder of the run that holds all these images, or None."""
    for stage in finished_stages(run_dir, TABLE):
        info = storage.read_json(stage.file("table.json"))
        fits = made_by.items() <= info.items() and (info["flipped"] or not flipped)
        if fits and _holds(stage.read(["image_id", "uri"]), images):
            return stage
    return None


def _holds(stored: pa.Table, images: pa.Table) -> bool:
    """Return whether all images are among the stored ones, with the same URI."""
    place = pc.index_in(images["image_id"], value_set=stored["image_id"])
    if place.null_count:
        return False
    uris, wanted = (table["uri"].cast(pa.large_string()) for table in (stored, images))
    return bool(uris.take(place).equals(wanted))


def encoder_fingerprint(student_path: str) -> str:
    """Return 12 hexadecimal digits of what a stored student's tower computes.

    Weights, architecture, image size, feature space and precision count; classes and classifier
    do not.
    """
    folder = find_student(student_path)
    return _encoder_fingerprint(folder, student_fingerprint(folder))


@lru_cache(maxsize=8)
def _encoder_fingerprint(folder: str, fingerprint: str) -> str:
    """Read the weights once; the fingerprint changes when the folder is written again."""
    del fingerprint
    description = description_of(folder)
    settings = {name: description["student"][name] for name in ("feature_space", "precision")}
    state = safetensors.torch.load(storage.read_bytes(storage.join(folder, WEIGHTS)))
    tower = {name: value for name, value in state.items() if name.startswith("visual.")}
    weights = hashlib.sha256(safetensors.torch.save(tower)).hexdigest()
    return settings_hash([description[name] for name in ARCHITECTURE], settings, weights)


class FeatureEncoder(StudentWorker):
    """Turns rows with `pixels` into rows of `features`; `flipped` has mirror images encoded too."""

    problem = "the student's features are not finite"

    def __init__(self, folder: str, pool: PoolConfig, *, flipped: bool = False) -> None:
        super().__init__(folder, pool)
        self._flipped = flipped

    @property
    def schema(self) -> pa.Schema:
        """The table's schema, for the tower's features."""
        return features_schema(self.student.classifier.shape[1], self._flipped)

    def vectors(self, table: pa.Table) -> dict[str, FloatArray]:
        """Return the features, and those of the mirror images."""
        pixels = stack_pixels(table, self.student.image_size)
        sides = {TABLE: pixels}
        if self._flipped:
            sides[FLIPPED] = np.ascontiguousarray(pixels[:, :, ::-1])
        student = self.student
        return {n: student.compute(student.normalise(p), student.visual) for n, p in sides.items()}


def _checked(images: pa.Table) -> pa.Table:
    """Return image_id, uri and split of images as one chunk; DataError for none, or an id twice."""
    images = images.select(list(IMAGE_COLUMNS)).cast(_IMAGE_SCHEMA).combine_chunks()
    if not len(images):
        raise DataError("no image to encode: the manifest's splits or the labels are empty")
    require_unique_ids(images, "the images to encode")
    return images
