"""Corrections in place of the machine's labels."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from hts_ray.errors import ConfigError, DataError
from hts_ray.labels.corrections import (
    decisions,
    overrides_key,
    read_overrides,
    require_used,
)
from hts_ray.labels.select import UNDECIDED
from hts_ray.store.tables import CORRECTIONS_SCHEMA, MANIFEST_SCHEMA, write_table

IDS = np.array([18, 19, 74], np.int16)


def corrections(*rows):
    names = CORRECTIONS_SCHEMA.names
    return pa.Table.from_pylist(
        [dict(zip(names, r, strict=True)) for r in rows], CORRECTIONS_SCHEMA
    )


def decided(table, *image_ids):
    decided_NC, used = decisions(table, pa.array(image_ids), IDS)
    return decided_NC.tolist(), used


def test_what_people_decided_is_found_and_the_rest_stays():
    """Catches a partial correction that wipes the other labels, and rows of other images."""
    table = corrections(("a", [74], None, [18]), ("c", [19], [18], []), ("elsewhere", [18], [], []))
    found = [[0, UNDECIDED, 1], [UNDECIDED] * 3, [-1, 1, UNDECIDED]]
    assert decided(table, "a", "b", "c") == (found, ["a", "c"])
    assert decided(table, "b") == ([[UNDECIDED] * 3], [])


def test_classes_of_another_list_are_left_alone():
    """Catches an id that is taken for a position."""
    assert decided(corrections(("a", [2, 500], [-1], [])), "a") == ([[UNDECIDED] * 3], ["a"])


def test_corrections_of_other_images_are_an_error():
    """Catches a forgotten path after which nothing was corrected, reported as success."""
    with pytest.raises(DataError, match="none of 1 corrected images is among the 5"):
        require_used(corrections(("z", [18], [], [])), 0, 5)


def test_folders_files_and_manifests_are_read(tmp_path):
    """Catches a key that changes with the place, or not with the content."""
    table = corrections(("b", [18], [], []), ("a", [], [18], []))
    write_table(str(tmp_path / "one" / "overrides.parquet"), table)
    write_table(str(tmp_path / "two.parquet"), table.take([1, 0]))
    read = read_overrides(str(tmp_path / "one"))
    assert read["image_id"].to_pylist() == ["a", "b"]
    key = overrides_key(str(tmp_path / "one"))
    assert key == overrides_key(str(tmp_path / "two.parquet"))
    write_table(str(tmp_path / "two.parquet"), corrections(("a", [19], [], [])))
    assert key != overrides_key(str(tmp_path / "two.parquet"))
    rows = [
        {"image_id": "a", "uri": "/a", "split": "x", "positive_ids": [18]},
        {"image_id": "b", "uri": "/b", "split": "x"},
    ]
    manifest = pa.Table.from_pylist(rows, MANIFEST_SCHEMA)
    write_table(str(tmp_path / "manifest.parquet"), manifest)
    assert read_overrides(str(tmp_path / "manifest.parquet"))["image_id"].to_pylist() == ["a"]
    with pytest.raises(ConfigError, match=r"filter\.overrides = .*no corrections there"):
        read_overrides(str(tmp_path / "none"))
    write_table(str(tmp_path / "two.parquet"), corrections(("a", [], [], []), ("a", [], [], [])))
    with pytest.raises(DataError, match="several rows"):
        read_overrides(str(tmp_path / "two.parquet"))
