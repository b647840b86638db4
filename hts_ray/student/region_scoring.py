"""The student's opinion of the teacher's regions: region_scores in, student_scores out.

The student looks at the very crops that the teacher scored, one row an image, on Ray Data like
every other pass over images: resumable, bad images quarantined.

Shape legend: R regions, C classes, S image size.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from hts_ray.config import ImagesConfig, PoolConfig, SelfTrainingConfig
from hts_ray.engine.image_pass import (
    CHECKPOINT,
    OK,
    QUARANTINED,
    data_context,
    decode_batch,
    decoded_image,
    finish,
    row_progress,
    rows_per_block,
    squash,
    users_mistakes_unwrapped,
)
from hts_ray.engine.telemetry import Meter
from hts_ray.errors import DataError
from hts_ray.images.crops import pixel_span
from hts_ray.images.regions import Region
from hts_ray.store import storage
from hts_ray.store.run import StageFolder
from hts_ray.store.tables import STUDENT_SCORES_SCHEMA, read_table, write_table
from hts_ray.student.checkpoints import description_of, find_student, student_fingerprint
from hts_ray.student.pool import StudentWorker, map_on_students

FloatArray = npt.NDArray[np.float32]
Progress = Callable[[int, int, int], None]

TABLE = "student_scores"
_INPUT = "_input"  # readers of tables leave out what starts so
_COLUMNS = ["image_id", "uri", "split", "boxes"]
_OPEN_FILES = 4


def score_regions(
    config: SelfTrainingConfig,
    *,
    images: ImagesConfig,
    student_path: str,
    region_scores_path: str,
    split: str | None,
    stage: StageFolder,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Score with a student the regions that a teacher scored, and publish them in `stage`.

    Writes one row of STUDENT_SCORES_SCHEMA for every image of `split` (None: all) that the
    teacher scored: logits (R, C) in the regions' stored order and the student's class order,
    which `table.json` names. `images` are the limits that the teacher's images were decoded
    under. Images that can no longer be read are quarantined; a run that was cut off goes on after
    the last block that was written; a finished stage is returned as it is.
    `progress(done, total, quarantined)` is called every few seconds. Returns the stage's stats.
    Raises DataError when there is no student, no scored image, or none that can be read.
    """
    if stage.finished:
        return stage.stats
    started = time.monotonic()
    stage = StageFolder(storage.absolute(stage.run_dir), stage.table, stage.key)
    regions = _regions(region_scores_path, split)
    folder = find_student(student_path)
    source = stage.file(_INPUT, "regions.parquet")
    write_table(source, regions)
    with data_context(stage.file(CHECKPOINT)):
        meter = Meter.of(stage, TABLE)
        dataset = _scored(source, len(regions), config, images, folder, meter)
    with row_progress(stage, len(regions), progress), users_mistakes_unwrapped():
        # Appending, because overwriting would delete what a resumed run counts as done.
        dataset.write_parquet(stage.path)
    return finish(
        stage,
        regions["image_id"].combine_chunks(),
        name=TABLE,
        seconds=time.monotonic() - started,
        table_info={
            "class_ids": description_of(folder)["class_ids"],
            "student": folder,
            "student_fingerprint": student_fingerprint(folder),
            "region_scores": region_scores_path,
        },
        more_stats={"regions": pc.sum(pc.list_value_length(regions["boxes"])).as_py()},
    )


def _regions(path: str, split: str | None) -> pa.Table:
    """Return id, uri, split and boxes of what the teacher scored, in the order of its files."""
    table = read_table(path, [*_COLUMNS, "status"])
    table = table.filter(pc.equal(table["status"], OK)).select(_COLUMNS)
    chosen = table if split is None else table.filter(pc.equal(table["split"], split))
    if not len(chosen):
        found = ", ".join(sorted(str(name) for name in table["split"].unique().to_pylist()))
        asked = "" if split is None else f" of split {split!r}"
        raise DataError(f"{path} holds no scored image{asked}: it has {found or 'none'}")
    return chosen


def _scored(
    source: str,
    rows: int,
    config: SelfTrainingConfig,
    images: ImagesConfig,
    folder: str,
    meter: Meter,
) -> Any:
    """Read the regions, decode their images on CPU tasks and score them on students."""
    import ray.data

    blocks = ray.data.read_parquet(source).repartition(
        target_num_rows_per_block=rows_per_block(rows, config.batch_images)
    )
    decoded = blocks.map_batches(
        partial(decode_batch, images=images),
        batch_format="pyarrow",
        batch_size=config.batch_images,
    )
    return map_on_students(
        decoded,
        StudentRegionScorer,
        folder=folder,
        pool=config.pool,
        batch_images=config.batch_images,
        meter=meter,
        batch_regions=config.batch_regions,
    )


class StudentRegionScorer(StudentWorker):
    """Scores the regions of decoded images, `batch_regions` in one forward."""

    def __init__(
        self, folder: str, fingerprint: str, pool: PoolConfig, *, batch_regions: int
    ) -> None:
        super().__init__(folder, fingerprint, pool)
        self._batch_regions = batch_regions

    def __call__(self, table: pa.Table) -> pa.Table:
        """Turn rows with `pixels` and `boxes` into rows of `student_scores`."""
        rows = [self._row(table, row) for row in range(len(table))]
        return pa.Table.from_pylist(rows, schema=STUDENT_SCORES_SCHEMA)

    def _row(self, table: pa.Table, row: int) -> dict[str, Any]:
        names = ("image_id", "uri", "split", "error_kind", "error")
        output = {name: table[name][row].as_py() for name in names}
        if output["error_kind"] is not None:
            return {**output, "status": QUARANTINED}
        scores_RC = self._scores(table, row)
        if not np.isfinite(scores_RC).all():
            failed = {"error_kind": "not_finite", "error": "the student's logits are not finite"}
            return {**output, **failed, "status": QUARANTINED}
        return {**output, "scores": scores_RC.ravel(), "status": OK}

    def _scores(self, table: pa.Table, row: int) -> FloatArray:
        """Return logits (R, C) of one image's regions."""
        image, size = decoded_image(table, row), self.student.image_size
        boxes, step = table["boxes"][row].as_py(), self._batch_regions
        parts = []
        for start in range(0, len(boxes), step):
            spans = [pixel_span(image, Region(box, "")) for box in boxes[start : start + step]]
            crops = [squash(image.pixels[y0:y1, x0:x1], size) for x0, y0, x1, y1 in spans]
            parts.append(self.run(self.student, np.stack(crops)))
        return np.concatenate(parts)


class StudentScores:
    """The rows of a student_scores folder by image id, a few files in memory at a time.

    Files hold neighbours in the teacher's order, so that whoever asks in that order opens each
    file about once.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self.class_ids: list[int] = storage.read_json(storage.join(path, "table.json"))["class_ids"]
        self._file_of: dict[str, str] = {}
        for name in storage.list_names(path):
            if name.endswith(".parquet"):
                ids = read_table(storage.join(path, name), ["image_id"])["image_id"].to_pylist()
                self._file_of.update(dict.fromkeys(ids, name))
        self._read = lru_cache(maxsize=_OPEN_FILES)(self._read_file)

    def get(self, image_id: str) -> FloatArray | None:
        """Return logits (R, C) of an image's regions; None where the student has no answer."""
        name = self._file_of.get(image_id)
        return None if name is None else self._read(name).get(image_id)

    def _read_file(self, name: str) -> dict[str, FloatArray]:
        table = read_table(storage.join(self._path, name), ["image_id", "scores"])
        scores = table["scores"].combine_chunks()
        return {
            image_id: values.values.to_numpy(zero_copy_only=False).reshape(-1, len(self.class_ids))
            for image_id, values in zip(table["image_id"].to_pylist(), scores, strict=True)
            if values.is_valid
        }
