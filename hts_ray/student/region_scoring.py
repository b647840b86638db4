"""A student scores regions as a teacher would: region_scores in, student_scores out.

The student looks at the same crops that the teacher scored, on Ray Data like every other pass
over images: one row per image, resumable, bad images quarantined.

Shape legend: R regions, C classes, S image size.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from hts_ray.config import PoolConfig
from hts_ray.engine.decoding import decoded_image, squash
from hts_ray.engine.image_pass import OK
from hts_ray.engine.run import Run, Stage
from hts_ray.errors import DataError
from hts_ray.images.crops import pixel_span
from hts_ray.images.regions import Region
from hts_ray.store.aliases import FloatArray, ImagesDone
from hts_ray.store.run import StageFolder, settings_hash
from hts_ray.store.tables import STUDENT_SCORES_SCHEMA, read_table, write_table
from hts_ray.student.checkpoints import find_student, student_fingerprint
from hts_ray.student.pool import StudentPass, StudentWorker
from hts_ray.student.predict import student_info

TABLE = "student_scores"
_INPUT = "_input"  # readers of tables leave out what starts so
_COLUMNS = ["image_id", "uri", "split", "boxes"]


def plan_score(run: Run, student_path: str, region_scores: StageFolder) -> Stage:
    """Plan scoring with a student the training split's regions that a teacher scored.

    The work writes one row of STUDENT_SCORES_SCHEMA for every image of `train.split` that the
    teacher scored: logits (R, C) in the regions' stored order and the student's class order,
    which `table.json` names. Images are decoded as they were for the teacher; those that can no
    longer be read are quarantined. A run that was cut off goes on after the last block that was
    written. Raises DataError when there is no student; the work does when there is no scored
    image, or none that can be read.
    """
    folder = find_student(student_path)
    images, split = run.config.label.images, run.config.train.split
    key = settings_hash(
        region_scores.key, student_fingerprint(folder), images.answer_settings(), split
    )
    stage, config = run.stage(TABLE, key), run.config.score
    task = StudentPass(
        folder,
        StudentRegionScorer,
        config.pool,
        images,
        config.batch_images,
        (("batch_regions", config.batch_regions),),
        square=False,
    )

    def work(progress: ImagesDone | None) -> object:
        regions = _regions(region_scores.path, split)
        source = stage.file(_INPUT, "regions.parquet")
        write_table(source, regions)

        def read() -> Any:
            import ray.data

            return ray.data.read_parquet(source)

        ids = regions["image_id"]
        count = pc.sum(pc.list_value_length(regions["boxes"])).as_py()
        info = {**student_info(folder), "region_scores": region_scores.path}
        return task.publish(stage, read, ids, TABLE, progress, info, regions=count)

    return Stage(stage, {"student": folder, "region_scores": region_scores.path}, work)


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


class StudentRegionScorer(StudentWorker):
    """Turns rows with `pixels` and `boxes` into rows of `student_scores`.

    `batch_regions` of an image go through the student in one forward pass.
    """

    schema = STUDENT_SCORES_SCHEMA

    def __init__(self, folder: str, pool: PoolConfig, *, batch_regions: int) -> None:
        super().__init__(folder, pool)
        self._batch_regions = batch_regions

    def vectors(self, table: pa.Table) -> dict[str, list[FloatArray]]:
        """Return the logits of each image's regions, row-major."""
        return {"scores": [self._scores(table, row).ravel() for row in range(len(table))]}

    def _scores(self, table: pa.Table, row: int) -> FloatArray:
        """Return logits (R, C) of one image's regions."""
        image, size = decoded_image(table, row), self.student.image_size
        boxes, step = table["boxes"][row].as_py(), self._batch_regions
        parts = []
        for start in range(0, len(boxes), step):
            spans = [pixel_span(image, Region(box, "")) for box in boxes[start : start + step]]
            crops = [squash(image.pixels[y0:y1, x0:x1], size) for x0, y0, x1, y1 in spans]
            parts.append(self.student.compute(self.student.normalise(np.stack(crops))))
        return np.concatenate(parts)
