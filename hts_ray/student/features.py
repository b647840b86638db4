"""The student's image features, computed once for many classifiers: images in, one row each out.

With the tower frozen, features depend on the images and the tower alone, not on classes or
labels. So a stage's key holds a hash of the tower's weights and of the images, and a training,
another filter and every trial of a sweep find the same folder.

Shape legend: N images, D features, G good rows of a batch.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import safetensors.torch

from hts_ray.config import FeaturesConfig, ImagesConfig, PoolConfig
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
from hts_ray.engine.telemetry import Meter
from hts_ray.errors import DataError
from hts_ray.images.manifest import IMAGE_COLUMNS
from hts_ray.store import storage
from hts_ray.store.run import StageFolder, content_hash, settings_hash
from hts_ray.store.tables import features_schema, read_table, require_unique_ids, write_table
from hts_ray.student.checkpoints import WEIGHTS, description_of, find_student, student_fingerprint
from hts_ray.student.pool import StudentWorker, map_on_students, vector_rows

FloatArray = npt.NDArray[np.float32]
Progress = Callable[[int, int, int], None]

TABLE = "features"
_INPUT = "_input"  # readers of tables leave out what starts so
_IMAGE_SCHEMA = pa.schema([(name, pa.string()) for name in IMAGE_COLUMNS])


@dataclass(frozen=True, eq=False)
class Features:
    """Features (N, D) float32 of N images, in the order of their ids.

    `flipped_ND` are those of the mirrored images, None where they were not asked for.
    """

    image_ids: list[str]
    splits: list[str]
    features_ND: FloatArray
    flipped_ND: FloatArray | None

    def take(self, image_ids: list[str]) -> Features:
        """Return the rows of `image_ids`, in that order; KeyError for one that is not there."""
        row_of = {image_id: row for row, image_id in enumerate(self.image_ids)}
        rows = np.array([row_of[image_id] for image_id in image_ids], dtype=np.int64)
        flipped = None if self.flipped_ND is None else self.flipped_ND[rows]
        splits = [self.splits[row] for row in rows]
        return Features(list(image_ids), splits, self.features_ND[rows], flipped)


def read_features(path: str) -> tuple[list[str], list[str], FloatArray]:
    """Return the ids, splits and features (N, D) of a features table, sorted by id.

    Quarantined images are left out. Raises DataError when there is no table, or none of its
    images has features.
    """
    found = read_feature_table(path)
    return found.image_ids, found.splits, found.features_ND


def read_feature_table(path: str) -> Features:
    """Return what `read_features` returns, and the mirrored images' features."""
    table = read_table(path)
    return _features(table, path)


def _features(table: pa.Table, path: str) -> Features:
    if TABLE not in table.column_names:
        raise DataError(f"{path} is not a features table: column {TABLE!r} is missing")
    # By id: the order in which workers wrote must not be the order of a training.
    good = table.filter(pc.equal(table["status"], OK)).sort_by("image_id")
    if not len(good):
        raise DataError(f"{path} holds no image with features: see its quarantine")
    flipped = _matrix(good["flipped"]) if "flipped" in good.column_names else None
    return Features(
        good["image_id"].to_pylist(), good["split"].to_pylist(), _matrix(good[TABLE]), flipped
    )


def _matrix(column: pa.ChunkedArray) -> FloatArray:
    parts = [chunk.flatten().to_numpy(zero_copy_only=False) for chunk in column.chunks]
    return np.concatenate(parts).reshape(len(column), column.type.list_size)


def ensure_features(
    config: FeaturesConfig,
    *,
    run_dir: str,
    student_path: str,
    images: pa.Table,
    flipped: bool = False,
    decoding: ImagesConfig | None = None,
    progress: Progress | None = None,
) -> StageFolder:
    """Return a finished features folder of the run that holds these images; compute it if need be.

    `images` has image_id, uri and split, as `Manifest.rows` returns them. A folder
    of more images serves as well. Raises what `compute_features` raises.
    """
    decoding = decoding or ImagesConfig.model_validate({})
    found = find_features(run_dir, student_path, images, flipped=flipped, decoding=decoding)
    if found is not None:
        return found
    stage = features_stage(run_dir, student_path, images, flipped=flipped, decoding=decoding)
    compute_features(
        config,
        student_path=student_path,
        images=images,
        stage=stage,
        flipped=flipped,
        decoding=decoding,
        progress=progress,
    )
    return stage


def features_stage(
    run_dir: str, student_path: str, images: pa.Table, *, flipped: bool, decoding: ImagesConfig
) -> StageFolder:
    """Return the folder that `compute_features` writes to for these images."""
    key = settings_hash(
        encoder_fingerprint(student_path),
        decoding.answer_settings(),
        flipped,
        content_hash(_checked(images).sort_by("image_id")),
    )
    return StageFolder(run_dir, TABLE, key)


def find_features(
    run_dir: str, student_path: str, images: pa.Table, *, flipped: bool, decoding: ImagesConfig
) -> StageFolder | None:
    """Return a finished features folder of the run that holds all these images, or None."""
    encoder = encoder_fingerprint(student_path)
    images = _checked(images)
    wanted = set(zip(images["image_id"].to_pylist(), images["uri"].to_pylist(), strict=True))
    for name in storage.list_names(run_dir):
        stage = StageFolder(run_dir, TABLE, name.removeprefix(f"{TABLE}-"))
        if not name.startswith(f"{TABLE}-") or not stage.finished:
            continue
        info = storage.read_json(stage.file("table.json"))
        if info["encoder"] != encoder or info["decoding"] != decoding.answer_settings():
            continue
        if flipped and not info["flipped"]:
            continue
        stored = read_table(stage.path, ["image_id", "uri"])
        if wanted <= set(zip(*(stored[c].to_pylist() for c in ("image_id", "uri")), strict=True)):
            return stage
    return None


def encoder_fingerprint(student_path: str) -> str:
    """Return 12 hexadecimal digits of what a stored student's tower computes.

    Weights, architecture, image size, feature space and precision count; classes and classifier
    do not.
    """
    folder = find_student(student_path)
    return _encoder_fingerprint(folder, student_fingerprint(folder))


@lru_cache(maxsize=8)
def _encoder_fingerprint(folder: str, fingerprint: str) -> str:
    """Read the weights once; the fingerprint sees a folder that was written anew."""
    del fingerprint
    description = description_of(folder)
    names = ("model_cfg", "image_size", "image_mean", "image_std")
    settings = {name: description["student"][name] for name in ("feature_space", "precision")}
    state = safetensors.torch.load(storage.read_bytes(storage.join(folder, WEIGHTS)))
    tower = {name: value for name, value in state.items() if name.startswith("visual.")}
    weights = hashlib.sha256(safetensors.torch.save(tower)).hexdigest()
    return settings_hash([description[name] for name in names], settings, weights)


def compute_features(
    config: FeaturesConfig,
    *,
    student_path: str,
    images: pa.Table,
    stage: StageFolder,
    flipped: bool = False,
    decoding: ImagesConfig | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Encode images with a stored student's tower and publish `features` in `stage`.

    `images` has image_id, uri and split. Writes one row of `features_schema` an image; images
    that cannot be read have null features and stand in the quarantine. Many images, and any with
    a GPU in the pool, go through Ray Data, where a run that was cut off goes on after the last
    block that was written; few are encoded here. A finished stage is returned as it is.
    `progress(done, total, quarantined)` is called every few seconds. Returns the stage's stats.
    Raises DataError when there is no student, no image, or no image that can be read.
    """
    if stage.finished:
        return stage.stats
    started = time.monotonic()
    images = _checked(images)
    folder = find_student(student_path)
    decoding = decoding or ImagesConfig.model_validate({})
    if config.pool.num_gpus == 0 and len(images) <= config.local_images:
        storage.remove_tree(stage.path)  # what a run on Ray left would not fit to these files
        rows = encode_images(folder, images, config, flipped=flipped, decoding=decoding)
        write_table(stage.file("part-0.parquet"), rows)
    else:
        stage = StageFolder(storage.absolute(stage.run_dir), stage.table, stage.key)
        _encode_on_ray(config, folder, images, stage, flipped, decoding, progress)
    return finish(
        stage,
        images["image_id"].combine_chunks(),
        name=TABLE,
        seconds=time.monotonic() - started,
        table_info={
            "student": folder,
            "encoder": encoder_fingerprint(folder),
            "decoding": decoding.answer_settings(),
            "flipped": flipped,
        },
    )


def encode_images(
    student_path: str,
    images: pa.Table,
    config: FeaturesConfig,
    *,
    flipped: bool = False,
    decoding: ImagesConfig | None = None,
) -> pa.Table:
    """Encode images in this process, without Ray; returns rows of `features_schema`.

    The features are those of `compute_features`.
    """
    import torch

    folder = find_student(student_path)
    threads = torch.get_num_threads()
    try:
        encoder = FeatureEncoder(folder, student_fingerprint(folder), config.pool, flipped=flipped)
        size, step = encoder.student.image_size, config.batch_images
        decoding = decoding or ImagesConfig.model_validate({})
        parts = [
            encoder(decode_batch(images.slice(start, step), decoding, square=size))
            for start in range(0, len(images), step)
        ]
    finally:
        torch.set_num_threads(threads)  # the pool's threads are meant for workers
    return pa.concat_tables(parts)


def _encode_on_ray(
    config: FeaturesConfig,
    folder: str,
    images: pa.Table,
    stage: StageFolder,
    flipped: bool,
    decoding: ImagesConfig,
    progress: Progress | None,
) -> None:
    """Append the rows that are not there yet to the stage's folder."""
    manifest = stage.file(_INPUT, "images.parquet")
    write_table(manifest, images)
    with data_context(stage.file(CHECKPOINT)):
        blocks = image_dataset(manifest).repartition(
            target_num_rows_per_block=rows_per_block(len(images), config.batch_images)
        )
        decoded = blocks.map_batches(
            partial(
                decode_batch, images=decoding, square=int(description_of(folder)["image_size"])
            ),
            batch_format="pyarrow",
            batch_size=config.batch_images,
        )
        dataset = map_on_students(
            decoded,
            FeatureEncoder,
            folder=folder,
            pool=config.pool,
            batch_images=config.batch_images,
            meter=Meter.of(stage, TABLE),
            flipped=flipped,
        )
    with row_progress(stage, len(images), progress), users_mistakes_unwrapped():
        # Appending, because overwriting would delete what a resumed run counts as done.
        dataset.write_parquet(stage.path)


class FeatureEncoder(StudentWorker):
    """Encodes decoded batches, and their mirror images where `flipped` asks for them."""

    def __init__(
        self, folder: str, fingerprint: str, pool: PoolConfig, *, flipped: bool = False
    ) -> None:
        super().__init__(folder, fingerprint, pool)
        self._flipped = flipped

    def __call__(self, table: pa.Table) -> pa.Table:
        """Turn rows with `pixels` into rows of `features`."""
        good = np.asarray(table["error_kind"].is_null())
        pixels = stack_pixels(table.filter(pa.array(good)), self.student.image_size)
        dimension = self.student.classifier.shape[1]
        sides = {TABLE: pixels}
        if self._flipped:
            sides["flipped"] = np.ascontiguousarray(pixels[:, :, ::-1])
        vectors_GD = {
            name: self.run(self.student.visual, side)
            if len(side)
            else np.zeros((0, dimension), np.float32)
            for name, side in sides.items()
        }
        schema = features_schema(dimension, self._flipped)
        return vector_rows(table, good, vectors_GD, schema, "the student's features are not finite")


def _checked(images: pa.Table) -> pa.Table:
    """Return image_id, uri and split of images as one chunk; DataError for none, or an id twice."""
    images = images.select(list(IMAGE_COLUMNS)).cast(_IMAGE_SCHEMA).combine_chunks()
    if not len(images):
        raise DataError("no image to encode: the manifest's splits or the labels are empty")
    require_unique_ids(images, "the images to encode")
    return images
