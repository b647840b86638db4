"""Class tables: look-up, subsets, fingerprints."""

from __future__ import annotations

import pickle

import numpy as np
import pytest

from hts_ray.classes import ClassTable, HoiClass, hico_classes
from hts_ray.errors import ConfigError, DataError


def test_names_are_unique_and_readable():
    """Reports print names; an underscore or a repeat would confuse their readers."""
    table = hico_classes()
    assert table.names[:2] == ["board airplane", "direct airplane"]
    assert "no interaction with hair drier" in table.names
    assert len(set(table.names)) == 600


def test_lookup_and_subset():
    """An index taken for an id, or masks left uncut, would score the wrong classes."""
    table = hico_classes().subset([153, 18, 599])
    assert table.ids.tolist() == [153, 18, 599]
    assert [table.index_of(i) for i in (153, 18, 599)] == [0, 1, 2]
    assert table.few_shot[10].tolist() == hico_classes().few_shot[10][[153, 18, 599]].tolist()
    with pytest.raises(DataError, match=r"class_id 20 .* nearest is 18 \(ride bicycle\)"):
        table.index_of(20)
    with pytest.raises(DataError, match="class_id 600"):
        hico_classes().subset([600])
    with pytest.raises(DataError, match="twice"):
        hico_classes().subset([1, 1])
    with pytest.raises(DataError, match="at least one class"):
        hico_classes().subset([])


def test_the_table_survives_pickling_and_cannot_be_changed():
    """Ray sends it to workers; a worker that writes into it would change others' classes."""
    table = hico_classes()
    table.ids  # noqa: B018  (cached before pickling)
    again = pickle.loads(pickle.dumps(table))
    assert again == table
    assert again.fingerprint() == table.fingerprint()
    with pytest.raises(ValueError, match="read-only"):
        table.ids[0] = 5
    with pytest.raises(ValueError, match="read-only"):
        table.few_shot[1][0] = True


def test_fingerprint_changes_with_ids_prompts_and_order():
    """A stale fingerprint would reuse the scores of other prompts."""
    one, two = (HoiClass(i, f"n{i}", None, None, (f"p{i}",)) for i in (1, 2))
    other = HoiClass(1, "n1", None, None, ("p1", "more"))
    tables = [(one,), (one, two), (two, one), (other,)]
    assert len({ClassTable(t).fingerprint() for t in tables}) == 4
    renamed = HoiClass(1, "another", None, None, ("p1",))
    assert ClassTable((renamed,)).fingerprint() == ClassTable((one,)).fingerprint()


def test_bad_classes_are_refused():
    """An id beyond int16 would wrap around in every table."""
    with pytest.raises(ConfigError, match="32768"):
        HoiClass(32768, "x", None, None, ("x",))
    with pytest.raises(ConfigError, match="prompt"):
        HoiClass(1, "x", None, None, ())
    with pytest.raises(DataError, match="few_shot"):
        ClassTable((HoiClass(1, "x", None, None, ("x",)),), {1: np.zeros(2, dtype=bool)})
