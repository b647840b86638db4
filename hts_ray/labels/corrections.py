"""Corrections as the filter applies them: what people decided replaces the machine's labels.

Shapes: N images, C classes.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from hts_ray.errors import ConfigError, DataError
from hts_ray.evaluate import label_codes
from hts_ray.labels.select import UNDECIDED
from hts_ray.store import storage
from hts_ray.store.run import content_hash
from hts_ray.store.tables import CORRECTIONS_SCHEMA, check_table, read_table, require_unique_ids

OVERRIDES = "overrides.parquet"


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


def decisions(
    overrides: pa.Table, image_ids: pa.Array, class_ids: npt.NDArray[np.int16]
) -> tuple[npt.NDArray[np.int8], list[str]]:
    """Return what people decided about N images, (N, C), and which of these they corrected.

    1 is positive, -1 negative, 0 ignored (ambiguous), `UNDECIDED` what a correction lists nowhere;
    classes that are not among `class_ids` (C,) are left out.
    """
    decided_NC = np.full((len(image_ids), len(class_ids)), UNDECIDED, np.int8)
    row = pc.index_in(overrides["image_id"], value_set=image_ids)
    known = row.is_valid()
    mine = overrides.filter(known)
    decided_NC[row.filter(known).to_numpy()] = label_codes(mine, class_ids)
    return decided_NC, mine["image_id"].to_pylist()


def require_used(overrides: pa.Table, used: int, images: int) -> None:
    """Raise DataError when none of the corrected images is among those that are filtered."""
    if len(overrides) and not used:
        raise DataError(
            f"none of {len(overrides)} corrected images is among the {images} that are filtered,"
            f" for example {overrides['image_id'][0].as_py()!r}: check filter.overrides"
        )
