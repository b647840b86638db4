"""Settings that contradict each other, and those of the published students."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hts_ray.config import (
    FilterConfig,
    load_config,
)

# What the paper's training code sets, by our names; rates and batch sizes are by model.
PUBLISHED = {
    "student.image_size": 672,
    "student.feature_space": "backbone",  # visual.proj removed, the classifier is proj @ text
    "student.logit_scale": 100.48,  # exp(4.61), fixed
    "train.learn_logit_scale": False,
    "train.loss": "lse_sign",
    "train.loss_temperature": 1.0,
    "train.epochs": 10,
    "train.trainable": "all",
    "train.min_positives_per_class": 40,
    "train.optim.weight_decay": 0.0,
    "train.optim.schedule": "warm_restarts",
    "train.optim.restart_epochs": 5,
    "train.optim.warmup_steps": 0,
    "train.optim.grad_clip": None,
    "train.optim.layer_decay": 1.0,
    "train.augment.flip": True,
    "train.augment.crop_scale": (0.7, 1.0),
    "train.augment.crop_ratio": (0.7, 1.3),
    "train.augment.color_jitter": 0.4,
}


@pytest.mark.parametrize(
    ("name", "model", "lr", "batch"),
    [
        ("hico-vitb32", "ViT-B-32-quickgelu", 1.5e-5, 128),
        ("hico-vitb16", "ViT-B-16-quickgelu", 5e-6, 32),
    ],
)
def test_published_student_settings(name, model, lr, batch):
    """Would catch a slip in the settings that reproduce the paper's students."""
    config = load_config(preset=name)
    assert (config.student.model, config.student.pretrained) == (model, "openai")
    assert (config.train.optim.lr, config.train.batch_size) == (lr, batch)
    for dotted, published in PUBLISHED.items():
        value = config
        for part in dotted.split("."):
            value = getattr(value, part)
        assert value == published, dotted


def test_a_bare_no_is_a_precision():
    """Would catch YAML's false where the command line says `student.precision=no`."""
    assert load_config(overrides=["student.precision=no"]).student.precision == "no"


@given(st.floats(0, 1), st.floats(0, 1))
def test_threshold_order_is_enforced_for_all_values(low, high):
    """Would catch a band of ignored classes that is turned inside out."""
    if low <= high:
        FilterConfig(negative_threshold=low, positive_threshold=high)
    else:
        with pytest.raises(ValueError, match="negative_threshold"):
            FilterConfig(negative_threshold=low, positive_threshold=high)
