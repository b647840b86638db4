"""Precision and recall of the machine against people."""

from __future__ import annotations

import pyarrow as pa
import pytest

from hts_ray.classes import hico_classes
from hts_ray.errors import DataError
from hts_ray.review.agreement import Counts, measure_agreement
from hts_ray.store.tables import CORRECTIONS_SCHEMA, PSEUDO_LABELS_SCHEMA

CLASSES = hico_classes().subset([18, 19, 74])


def machine(*rows):
    keys = ("image_id", "positive_ids", "ignored_ids", "probability")
    full = [
        {**dict(zip(keys, row, strict=True)), "uri": f"/{row[0]}", "support": [], "dropped": []}
        for row in rows
    ]
    return pa.Table.from_pylist(full, PSEUDO_LABELS_SCHEMA)


def people(*rows):
    names = CORRECTIONS_SCHEMA.names
    return pa.Table.from_pylist(
        [dict(zip(names, r, strict=True)) for r in rows], CORRECTIONS_SCHEMA
    )


def test_every_outcome_is_counted_once_and_only_where_people_decided():
    """Catches ambiguous or unjudged classes that count as mistakes, and ignored ones as found."""
    found = measure_agreement(
        machine(
            ("a", [18, 19], [], [0.9, 0.6]),  # 18 right, 19 wrong
            ("b", [18], [19], [0.8]),  # 18 right; 19 was undecided, 74 was missed
            ("c", [18, 19], [], [0.7, 0.5]),  # 18 ambiguous, 19 not judged
            ("d", [], [74], []),  # undecided and absent: no mistake
            ("not reviewed", [18], [], [0.9]),
        ),
        people(
            ("a", [18], [19, 74], []),
            ("b", [18, 19, 74], [], []),
            ("c", [], [], [18]),
            ("d", [], [18, 19, 74], []),
            ("no labels", [18], [], []),
        ),
        CLASSES,
    )
    assert (found.images, found.images_equal, found.unlabeled) == (4, 2, 1)
    # Absent for both: 74 in a, 18 and 19 in d, where the machine left 74 open.
    assert found.overall == Counts(confirmed=2, wrong=1, undecided=1, missed=1, absent=3)
    assert found.overall.precision == pytest.approx(2 / 3)
    assert found.overall.recall == pytest.approx(1 / 2)
    assert found.per_class[19] == Counts(wrong=1, undecided=1, absent=1)
    assert found.per_class[74] == Counts(missed=1, absent=1)
    assert [(d.image_id, d.class_id, d.machine, d.human) for d in found.disagreements] == [
        ("a", 19, "positive", "negative"),
        ("b", 19, "ignored", "positive"),
        ("b", 74, "negative", "positive"),
    ]
    assert found.disagreements[0].probability == pytest.approx(0.6)
    content = found.to_dict(CLASSES)
    assert content["per_class"][0]["name"] == "ride bicycle"
    assert content["overall"]["precision_interval"][0] < 2 / 3


def test_shares_of_nothing_are_unknown():
    """Catches a precision of 0 (or 1) where the machine said nothing."""
    assert (Counts(missed=1).precision, Counts(missed=1).recall) == (None, 0.0)
    assert Counts().to_dict()["recall_interval"] is None
    with pytest.raises(DataError, match="no image is among both"):
        measure_agreement(machine(("a", [18], [], [0.9])), people(("b", [18], [], [])), CLASSES)


def test_kappa_is_what_chance_does_not_explain():
    """Catches a kappa that praises absent classes, or fails where there is nothing to agree on."""
    # Worked by hand: 90 of 100 agree; by chance 0.1 * 0.1 + 0.9 * 0.9 = 0.82 would.
    counts = Counts(confirmed=5, wrong=5, missed=5, absent=85, undecided=7)
    assert counts.kappa == pytest.approx((0.90 - 0.82) / (1 - 0.82))
    assert Counts(confirmed=3, absent=3).kappa == 1.0
    assert Counts(wrong=3, missed=3).kappa == -1.0
    assert Counts(absent=9).kappa is None
    assert Counts(undecided=2).kappa is None
