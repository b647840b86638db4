"""Pseudo-labels against annotations: verdicts, calibration and confusions."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hts_ray.classes import HoiClass, hico_classes
from hts_ray.report.label_quality import expected_calibration_error, judge, measure, reliability

RIDE, PUSH, WASH, NEAR, OTHER = range(5)
CLASSES = [
    HoiClass(RIDE, "ride bicycle", "ride", "bicycle", ("x",)),
    HoiClass(PUSH, "push bicycle", "push", "bicycle", ("x",)),
    HoiClass(WASH, "wash bicycle", "wash", "bicycle", ("x",)),
    HoiClass(NEAR, "bicycle alone", "no_interaction", "bicycle", ("x",)),
    HoiClass(OTHER, "ride horse", "ride", "horse", ("x",)),
]
UNDECIDED, NONE = -2, -1


def labels(positive, ignored=()):
    probability = [0.9] * len(positive)
    return {"positive_ids": positive, "probability": probability, "ignored_ids": list(ignored)}


def image(positive, annotated, ignored=(), ambiguous=()):
    """Return an image's rows of pseudo_labels and manifest."""
    truth = {"positive_ids": annotated, "ambiguous_ids": list(ambiguous)}
    return labels(positive, ignored), truth


def confusion(*images):
    (table,) = measure(images, CLASSES).confusions
    assert table.title == "bicycle"
    return np.array(table.counts)


def test_verdicts_follow_the_annotations():
    """Catches swapped right and wrong, and verdicts where nothing is annotated."""
    verdicts = dict(judge(*image([1, 2, 3], [1, 4, 6], [4, 5], [3, 9])))
    assert verdicts == {
        1: "right",
        2: "wrong",
        3: "unjudged",
        6: "missed",
        4: "ignored",
        5: "ignored",
    }
    alone = dict(judge(labels([1, 2], [4]), None))
    assert alone == {1: "unjudged", 2: "unjudged", 4: "ignored"}
    assert dict(judge(*image([1], []))) == {1: "wrong"}


def test_a_wrong_verb_stands_for_the_missed_one():
    """Catches a confusion read the wrong way round: rows are annotated, columns labeled."""
    counts = confusion(image([PUSH], [RIDE]))
    assert counts[RIDE, PUSH] == 1
    assert counts.sum() == 1


def test_a_wrong_verb_beside_a_right_one_stands_for_it():
    """Catches mistakes lost where the annotated verb was found as well."""
    counts = confusion(image([RIDE, PUSH], [RIDE]))
    assert (counts[RIDE, RIDE], counts[RIDE, PUSH], counts.sum()) == (1, 1, 2)
    blamed = confusion(image([RIDE, PUSH], [RIDE, WASH]))
    assert (blamed[WASH, PUSH], blamed[RIDE, PUSH]) == (1, 0)


def test_objects_do_not_mix_and_nothing_annotated_has_a_row():
    """Catches riding a horse taken for riding a bicycle."""
    counts = confusion(image([RIDE, OTHER], [OTHER]))
    assert counts[len(counts) - 1, RIDE] == 1
    assert counts.sum() == 1


def test_undecided_and_missed_verbs_are_no_confusions():
    """Catches an ignored class shown as missed, and one not annotated shown as undecided."""
    counts = confusion(
        image([PUSH], [RIDE]), image([], [RIDE, WASH], ignored=[WASH, PUSH]), image([NEAR], [NEAR])
    )
    assert (counts[RIDE, NONE], counts[WASH, UNDECIDED], counts[NEAR, NEAR]) == (1, 1, 1)
    assert counts[:, UNDECIDED].sum() == 1


def test_ambiguous_labels_count_nowhere():
    """Catches a label that annotators left open counted as a mistake."""
    quality = measure([image([PUSH], [RIDE], ambiguous=[PUSH])], CLASSES)
    assert quality.confusions == []
    assert quality.judged == []


def test_plain_classes_are_one_group_while_they_are_few():
    """Catches a crash on classes without verbs, and a table of hundreds of columns."""
    few = [HoiClass(i, f"thing {i}", None, None, ("x",)) for i in range(4)]
    (table,) = measure([image([1], [2])], few).confusions
    assert (table.title, table.verbs[2], table.counts[2][1]) == ("", "thing 2", 1)
    many = [HoiClass(i, f"thing {i}", None, None, ("x",)) for i in range(200)]
    assert measure([image([1], [2])], many).confusions == []


def test_names_of_hico_read_as_words():
    """Catches "no_interaction" and "sports_ball" on the page."""
    ball = [c for c in hico_classes() if c.object == "sports_ball"]
    table = measure([image([ball[0].class_id], [ball[1].class_id])], ball).confusions[0]
    assert table.title == "sports ball"
    assert "no interaction" in table.verbs


@given(
    st.lists(
        st.tuples(st.floats(0, 1, width=32), st.booleans()),
        max_size=60,
    )
)
def test_reliability_keeps_every_label(judged):
    """Catches labels lost at the borders of bins, 1.0 above all."""
    bins = reliability(judged)
    assert sum(entry.labels for entry in bins) == len(judged)
    assert sum(entry.right for entry in bins) == sum(right for _, right in judged)
    for entry in bins:
        assert entry.low - 1e-6 <= entry.mean_probability <= entry.high + 1e-6


def test_borders_count_to_the_upper_bin():
    """Catches thresholds such as 0.3, just below which a float32 lies, one bin too low."""
    bins = reliability([(float(np.float32(k / 10)), True) for k in range(10)])
    assert [entry.low for entry in bins] == [k / 10 for k in range(10)]


def test_calibration_error_is_the_mean_gap():
    """Catches bins weighted alike however many labels they hold."""
    judged = [(0.95, True)] * 8 + [(0.25, True)] * 2
    assert expected_calibration_error(reliability(judged)) == pytest.approx(0.8 * 0.05 + 0.2 * 0.75)
