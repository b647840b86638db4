"""Settings that contradict each other, and those of the published students."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hts_ray.config import (
    FilterConfig,
    load_config,
)


def test_published_student_settings():
    """Would catch a slip in the settings that reproduce the paper's students."""
    for name, lr, batch in (("hico-vitb32", 1.5e-5, 128), ("hico-vitb16", 5e-6, 32)):
        config = load_config(preset=name)
        assert (config.train.optim.lr, config.train.batch_size) == (lr, batch)
        assert config.student.image_size == 672
        assert config.student.feature_space == "backbone"
        assert config.train.min_positives_per_class == 40
        assert config.train.augment.crop_ratio == (0.7, 1.3)
        assert config.train.loss_temperature == 1.0


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
