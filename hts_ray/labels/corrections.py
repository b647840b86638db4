"""Corrections as the filter applies them: what people decided replaces the machine's labels.

Shapes: N images, C classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from hts_ray.errors import ConfigError, DataError
from hts_ray.store import storage
from hts_ray.store.run import content_hash
from hts_ray.store.tables import CORRECTIONS_SCHEMA, check_table, read_table, require_unique_ids

OVERRIDES = "overrides.parquet"
_VALUES = {"positive_ids": 1, "negative_ids": -1, "ambiguous_ids": 0}


@dataclass(frozen=True, eq=False)
class Corrected:
    """Targets after the corrections, and what they changed.

    - `targets_NC` int8 in {1, 0, -1}: positive, ignored, negative.
    - `decided_NC`: where a person decided.
    - `image_ids`: the images that were corrected; `labels`: how many labels that changed.
    - `unused`: how many corrections belong to images that are not among the N.
    """

    targets_NC: npt.NDArray[np.int8]
    decided_NC: npt.NDArray[np.bool_]
    image_ids: tuple[str, ...]
    labels: int
    unused: int

    def counts(self) -> dict[str, int]:
        """Return the counts as the filter stage publishes them."""
        return {
            "corrected_images": len(self.image_ids),
            "corrected_labels": self.labels,
            "overrides_unused": self.unused,
        }


def read_overrides(path: str) -> pa.Table:
    """Return the corrections at `path`, sorted by image: a folder of `hts import-labels` or a file.

    Any manifest with annotations will do; rows without are left out. Raises ConfigError when
    nothing is there, DataError for another table or an image that is in it twice.
    """
    file = path if path.endswith(".parquet") else storage.join(path, OVERRIDES)
    if not storage.exists(file):
        raise ConfigError(
            "no corrections there",
            field="filter.overrides",
            value=path,
            remedy="give the folder that `hts import-labels` wrote, or a Parquet file",
        )
    table = check_table(read_table(file), CORRECTIONS_SCHEMA, file)
    table = table.filter(table["positive_ids"].is_valid())
    require_unique_ids(table, file)
    return table.sort_by("image_id")


def overrides_key(path: str) -> str:
    """Return a hash of what the corrections at `path` say, whatever the path is."""
    return content_hash(read_overrides(path))


def apply_overrides(
    overrides: pa.Table,
    image_ids: list[str],
    class_ids: npt.NDArray[np.int16],
    targets_NC: npt.NDArray[np.int8],
) -> Corrected:
    """Return the targets with what people decided in place of what was there.

    Classes that a correction lists nowhere keep the machine's label. The input is left as it is.
    Raises DataError when no corrected image is among `image_ids`: they belong to other labels.
    """
    targets, decided = targets_NC.copy(), np.zeros(targets_NC.shape, dtype=bool)
    row_of = {image_id: row for row, image_id in enumerate(image_ids)}
    column_of = {int(class_id): column for column, class_id in enumerate(class_ids)}
    used: list[str] = []
    for correction in overrides.to_pylist():
        row = row_of.get(correction["image_id"])
        if row is None:
            continue
        used.append(correction["image_id"])
        for name, value in _VALUES.items():
            columns = [column_of[i] for i in correction[name] or () if i in column_of]
            targets[row, columns] = value
            decided[row, columns] = True
    if len(overrides) and not used:
        first = overrides["image_id"][0].as_py()
        raise DataError(
            f"none of {len(overrides)} corrected images is among the {len(image_ids)} that are"
            f" filtered: the first is {first!r}, theirs {image_ids[0]!r}; check filter.overrides"
        )
    changed = int((targets != targets_NC).sum())
    return Corrected(targets, decided, tuple(used), changed, len(overrides) - len(used))
