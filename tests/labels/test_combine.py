"""Several opinions made into one, on arrays."""

import numpy as np
import pyarrow as pa
import pytest

from hts_ray.errors import DataError
from hts_ray.labels.combine import combine, only_some
from hts_ray.labels.evidence import Evidence

METHODS = ["geometric", "mean"]


def said(probabilities_NC, ids=None, support=1):
    """Evidence of images "000", "001" and on."""
    p_NC = np.asarray(probabilities_NC, dtype=np.float32)
    ids = [f"{n:03}" for n in range(len(p_NC))] if ids is None else ids
    images = pa.table({"image_id": ids, "uri": ids, "split": ["train"] * len(ids)})
    support_NC = np.full(p_NC.shape, support, np.int16)
    return Evidence(images, p_NC, support_NC, np.ones(len(ids), dtype=bool))


@pytest.fixture
def opinion():
    """60 images, 4 classes, many of them at exactly 0, as captions leave them."""
    random = np.random.default_rng(3)
    p_NC = random.random((60, 4)) ** 3
    p_NC[random.random(p_NC.shape) < 0.3] = 0
    return said(p_NC)


def ranks(evidence):
    return np.argsort(evidence.probabilities_NC, axis=0, kind="stable")


@pytest.mark.parametrize("method", METHODS)
def test_passes_that_say_the_same_are_as_good_as_one(opinion, method):
    """Catches a mean that shrinks, broken ties, or thresholds that change their meaning."""
    found = combine([opinion, opinion], [1, 3], method)
    np.testing.assert_allclose(found.probabilities_NC, opinion.probabilities_NC, atol=2e-4)
    assert (ranks(found) == ranks(opinion)).all()
    assert found.image_ids == opinion.image_ids


@pytest.mark.parametrize("method", METHODS)
def test_weight_0_removes_a_pass_and_the_order_changes_nothing(opinion, method):
    """Catches a pass that still counts for support, and a first pass that leads."""
    other = said(np.random.default_rng(5).random((60, 4)), support=7)
    alone = combine([opinion, other], [2, 0], method)
    np.testing.assert_allclose(alone.probabilities_NC, opinion.probabilities_NC, atol=2e-4)
    assert (alone.support_NC == 1).all()
    one = combine([opinion, other], [2, 1], method)
    two = combine([other, opinion], [1, 2], method)
    np.testing.assert_allclose(one.probabilities_NC, two.probabilities_NC, atol=1e-6)
    assert (one.support_NC == two.support_NC).all()
    assert (one.support_NC == 8).all()
    with pytest.raises(DataError, match="weight above 0"):
        combine([opinion, other], [0, 0], method)


def test_both_means_by_hand():
    """Catches another mean than the one that is documented."""
    found = said([[0.9, 0.2]]), said([[0.5, 0.0]])
    p_NC = combine(found, [1, 1], "mean").probabilities_NC
    np.testing.assert_allclose(p_NC, [[0.7, 0.1]], atol=1e-6)
    p_NC = combine(found, [1, 3], "geometric").probabilities_NC
    odds = 9**0.25 * 1**0.75, (0.2 / 0.8) ** 0.25 * 1e-4**0.75
    np.testing.assert_allclose(p_NC, [[o / (1 + o) for o in odds]], atol=2e-4)


@pytest.mark.parametrize("method", METHODS)
def test_images_that_a_pass_lacks_are_judged_by_the_others(opinion, method):
    """Catches an image that is lost, pulled to 0 by a missing opinion, or counted wrong."""
    rows = np.arange(5, 60)
    fewer = opinion.take(rows)
    found = combine([fewer, opinion], [1, 1], method)
    assert found.image_ids == opinion.image_ids
    assert (found.support_NC[:5] == 1).all()
    assert (found.support_NC[5:] == 2).all()
    np.testing.assert_allclose(found.probabilities_NC[:5], opinion.probabilities_NC[:5], atol=0.1)
    assert only_some([fewer, opinion]).tolist() == [True] * 5 + [False] * 55


def test_two_noisy_opinions_are_better_than_each():
    """Catches a combination that throws away what the second pass knows."""
    random = np.random.default_rng(0)
    truth_NC = random.random((400, 3)) < 0.2
    passes = [
        said(1 / (1 + np.exp(-(scale * (2 * truth_NC - 1) + 2 * random.normal(size=(400, 3))))))
        for scale in (1.0, 1.3)
    ]

    def precision(evidence):
        top = np.argsort(-evidence.probabilities_NC, axis=0)[:80]
        return np.take_along_axis(truth_NC, top, axis=0).mean()

    single = max(precision(one) for one in passes)
    for method in METHODS:
        assert precision(combine(passes, [1, 1], method)) > single + 0.05
