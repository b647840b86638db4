"""Fitting a classifier on stored features: the settings' steps, the seed alone, clear refusals."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import normalize

from hts_ray.config import AugmentConfig, OptimConfig, TrainConfig
from hts_ray.errors import DataError
from hts_ray.losses import make_loss
from hts_ray.student.head import HeadData, fit_head, head_logits
from hts_ray.student.optimizer import learning_rate_factor
from hts_ray.student.targets import class_weights

IMAGES, DIMENSION, CLASSES, SCALE = 40, 6, 4, 10.0
CONFIG = TrainConfig(
    epochs=4, batch_size=8, optim=OptimConfig(lr=1e-4, head_lr=0.03, weight_decay=0.1)
)


@pytest.fixture
def data():
    """Features that a linear classifier can tell apart, their targets and where to start."""
    random = np.random.default_rng(0)
    truth = random.normal(size=(CLASSES, DIMENSION))
    features = random.normal(size=(IMAGES, DIMENSION)).astype(np.float32)
    targets = np.where(features @ truth.T > 0, 1, -1).astype(np.int8)
    targets[random.random(targets.shape) < 0.1] = 0
    start = random.normal(size=(CLASSES, DIMENSION)).astype(np.float32)
    return features, targets, start


def fit(data, config=CONFIG, seed=3, on_epoch=None, **arguments):
    features, targets, start = data
    known = HeadData(features, targets, **arguments)
    return fit_head(known, start, logit_scale=SCALE, config=config, seed=seed, on_epoch=on_epoch)


def changed(config=CONFIG, **values):
    return TrainConfig.model_validate({**config.model_dump(), **values})


def full_batch_reference(data, config, class_weights=None):
    """The same training as nested loops over torch's own parts, all images in every step."""
    features, targets, start = (torch.tensor(array) for array in data)
    weight = torch.nn.Parameter(start.float().clone())
    optimizer = torch.optim.AdamW([weight], lr=1.0, weight_decay=config.optim.weight_decay)
    loss = make_loss(config.loss, config.loss_temperature, class_weights=class_weights)
    losses = []
    for step in range(config.epochs):
        optimizer.param_groups[0]["lr"] = config.optim.head_lr * learning_rate_factor(
            step, config.epochs, config.optim, 1
        )
        value = loss(SCALE * normalize(features) @ normalize(weight).T, targets)
        optimizer.zero_grad()
        value.backward()
        torch.nn.utils.clip_grad_norm_([weight], config.optim.grad_clip)
        optimizer.step()
        losses.append(value.item())
    return weight.detach().numpy(), losses


@pytest.mark.parametrize("loss", ["lse_sign", "asl"])
def test_steps_are_those_of_the_settings(data, loss):
    """Catches another rate, schedule, decay, clipping or mean than the settings name."""
    config = changed(batch_size=IMAGES, loss=loss)
    expected, losses = full_batch_reference(data, config)
    found = fit(data, config)
    np.testing.assert_allclose(found.classifier_CD, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose([record["loss"] for record in found.history], losses, rtol=1e-5)
    assert found.history[-1]["lr"] < found.history[0]["lr"] == pytest.approx(0.03)
    assert found.logit_scale == SCALE


def test_a_fit_learns_what_its_start_did_not_know(data):
    """Catches rows of features and targets that slip against each other."""
    features, targets, start = data
    found = fit(data, changed(epochs=30))
    known = targets != 0
    right = [
        (np.sign(head_logits(features, classifier, SCALE)) == targets)[known].mean()
        for classifier in (start, found.classifier_CD)
    ]
    assert right[0] < 0.7
    assert right[1] > 0.9
    assert found.history[-1]["loss"] < 0.5 * found.history[0]["loss"]
    assert all(record["images"] == IMAGES for record in found.history)


def test_the_seed_alone_decides(data):
    """Catches global random state that is read, or disturbed for whoever comes after."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        first = fit(data)
        torch.manual_seed(2)
        state = torch.random.get_rng_state()
        second = fit(data)
        assert torch.equal(torch.random.get_rng_state(), state)
    assert first.classifier_CD.tobytes() == second.classifier_CD.tobytes()
    other = fit(data, seed=4)
    assert other.classifier_CD.tobytes() != first.classifier_CD.tobytes()


def test_inputs_stay_as_they_are(data):
    """Catches a fit in place, which would spoil the arrays that a sweep's trials share."""
    copies = [array.copy() for array in data]
    for array in data:
        array.flags.writeable = False
    fit(data, flipped_ND=data[0])
    assert all(np.array_equal(a, b) for a, b in zip(data, copies, strict=True))


def test_weights_of_zero_are_ignored_targets(data):
    """Catches label weights that are lost, or rows of them in another order."""
    features, targets, start = data
    filled = np.where(targets == 0, 1, targets).astype(np.int8)
    weights = (targets != 0).astype(np.float32)
    weighted = fit((features, filled, start), label_weights_NC=weights)
    assert weighted.classifier_CD.tobytes() == fit(data).classifier_CD.tobytes()
    assert (
        fit((features, filled, start)).classifier_CD.tobytes() != fit(data).classifier_CD.tobytes()
    )


def test_flips_show_the_other_side_where_they_are_asked_for(data):
    """Catches a flip that is always or never made, and one that the settings forbid."""
    features, targets, _ = data
    other = -features
    plain = fit(data).classifier_CD.tobytes()
    still = changed(augment=AugmentConfig(flip=False))
    assert fit(data, flipped_ND=features).classifier_CD.tobytes() == plain
    assert fit(data, flipped_ND=other).classifier_CD.tobytes() != plain
    assert fit(data, still, flipped_ND=other).classifier_CD.tobytes() == plain
    # Where both sides call for opposite classifiers, half of the images pull either way.
    losses = [
        fit((side, targets, data[2]), changed(epochs=30), flipped_ND=turned).history[-1]["loss"]
        for side, turned in ((features, features), (features, other), (other, other))
    ]
    assert losses[1] > 1.5 * max(losses[0], losses[2])


def test_rare_classes_are_repeated_and_weighed(data):
    """Catches settings of rare classes that only the full training follows."""
    features, targets, start = data
    rare = targets.copy()
    rare[:, 0] = -1
    rare[:3, 0] = 1
    repeated = fit((features, rare, start), changed(min_positives_per_class=12))
    assert repeated.history[0]["images"] >= IMAGES + 9
    weights = torch.tensor(class_weights((rare == 1).sum(axis=0), 1.0))
    balanced = changed(class_balance=1.0, batch_size=IMAGES)
    expected, _ = full_batch_reference((features, rare, start), balanced, weights)
    found = fit((features, rare, start), balanced)
    np.testing.assert_allclose(found.classifier_CD, expected, rtol=1e-4, atol=1e-5)
    plain = fit((features, rare, start), changed(batch_size=IMAGES))
    assert not np.allclose(found.classifier_CD, plain.classifier_CD, atol=1e-3)


def test_the_moving_average_lags_behind(data):
    """Catches an average that starts at zero, or that is made and not returned."""
    one_step = changed(epochs=1, batch_size=IMAGES)
    averaged = fit(data, changed(one_step, ema_decay=0.9)).classifier_CD
    np.testing.assert_allclose(averaged, fit(data, one_step).classifier_CD, rtol=1e-6)
    _, _, start = data
    last = fit(data).classifier_CD
    lagging = fit(data, changed(ema_decay=0.99)).classifier_CD
    assert 0 < np.linalg.norm(lagging - start) < np.linalg.norm(last - start)


def test_the_logit_scale_learns_only_when_asked(data):
    """Catches a learnt scale that is thrown away with the fit."""
    learnt = fit(data, changed(learn_logit_scale=True, epochs=10))
    assert abs(learnt.logit_scale - SCALE) > 0.1
    assert fit(data).logit_scale == SCALE


def test_every_epoch_is_told_with_the_fit_so_far(data):
    """Catches a callback that sees the start, or whose measurement is lost."""
    seen = []

    def look(fit_so_far):
        seen.append(fit_so_far)
        return {"agreement": len(fit_so_far.history)}

    found = fit(data, on_epoch=look)
    assert [len(entry.history) for entry in seen] == [1, 2, 3, 4]
    assert [record["agreement"] for record in found.history] == [1, 2, 3, 4]
    assert np.array_equal(seen[-1].classifier_CD, found.classifier_CD)
    assert not np.array_equal(seen[0].classifier_CD, found.classifier_CD)


def test_an_infinite_loss_names_its_images(data):
    """Catches a NaN that spreads into the classifier, and a message that blames another image."""
    features, targets, start = data
    features[17, 0] = np.nan
    ids = [f"image-{row}" for row in range(IMAGES)]
    with pytest.raises(DataError, match=r"epoch 0; images image-17: lower train.optim.head_lr"):
        fit((features, targets, start), image_ids=ids)
    with pytest.raises(DataError, match="images row 17:"):
        fit((features, targets, start))
    with pytest.raises(DataError, match="no image"):
        fit((features[:0], targets[:0], start))


def test_shapes_that_do_not_fit_are_refused(data):
    """Catches broadcasting where a transposed or shorter array was given by mistake."""
    features, targets, start = data
    with pytest.raises(ValueError, match=r"classifier_CD \(4, 6\).*targets_NC \(40, 3\)"):
        fit((features, targets[:, :3], start))
    with pytest.raises(ValueError, match=r"targets_NC \(39, 4\): 40 images"):
        fit((features, targets[1:], start))
    with pytest.raises(ValueError, match="flipped_ND"):
        fit(data, flipped_ND=features[:1])
    with pytest.raises(ValueError, match="classifier_CD"):
        fit((features, targets, start[0]))
    with pytest.raises(ValueError, match="same number of columns"):
        head_logits(features, start[:, :3], SCALE)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(0.01, 100.0))
def test_logits_are_scaled_cosines(seed, factor):
    """Catches a missing normalisation on either side, and a division by zero."""
    random = np.random.default_rng(seed)
    features = random.normal(size=(5, 3)).astype(np.float32)
    features[0] = 0
    classifier = random.normal(size=(4, 3)).astype(np.float32)
    logits = head_logits(features, classifier, SCALE)
    expected = SCALE * normalize(torch.tensor(features)) @ normalize(torch.tensor(classifier)).T
    np.testing.assert_allclose(logits, expected.numpy(), rtol=1e-4, atol=1e-4)
    assert (np.abs(logits) <= SCALE * 1.0001).all()
    assert (logits[0] == 0).all()
    stretched = head_logits(factor * features, factor * classifier, SCALE)
    np.testing.assert_allclose(stretched, logits, rtol=1e-4, atol=1e-4)
