"""Settings that contradict each other, and those of the published students."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hts_ray.config import (
    FilterConfig,
    load_config,
)

# Each setting of the paper's training code and where it stands there (github.com/drjinying/hts),
# by our names; what depends on the model is in the test below.
PUBLISHED = {
    "student.image_size": 672,  # configs/defaults.yaml: model.image_size
    "student.feature_space": "backbone",  # clip_hico.py: visual.proj = None, classifier proj @ text
    "student.logit_scale": 100.48,  # model.log_scale: exp(4.61)
    "train.learn_logit_scale": False,  # model.log_scale_trainable
    "student.prompt_templates": 1,  # scripts/prompts.json: one sentence a class
    "student.precision": "no",  # train_dist.py: no autocast
    "train.loss": "lse_sign",  # loss.name: Sign
    "train.loss_temperature": 1.0,  # criterion.py has none
    "train.soft_labels": False,
    "train.class_balance": 0.0,
    "train.epochs": 10,  # configs/clip/*.yaml
    "train.trainable": "all",  # train.py: model.parameters()
    "train.ema_decay": None,
    "train.accumulation": 1,
    "train.min_positives_per_class": 40,  # data.min_samples
    "train.num_workers": 8,  # README: nproc_per_node=8
    "train.optim.head_lr": None,  # one rate: optim.slow_lr_backbone is off
    "train.optim.weight_decay": 0.0,  # optim.weight_decay
    "train.optim.schedule": "warm_restarts",  # scheduler: CosineAnnealingWarmRestarts
    "train.optim.restart_epochs": 5,  # T_0: 5, T_mult: 1
    "train.optim.warmup_steps": 0,
    "train.optim.grad_clip": None,  # train_dist.py clips nothing
    "train.optim.layer_decay": 1.0,
    "train.augment.flip": True,  # dataloader.py: RandomHorizontalFlip
    "train.augment.crop_scale": (0.7, 1.0),  # data.aug_crop_scale
    "train.augment.crop_ratio": (0.7, 1.3),  # data.aug_crop_ratio
    "train.augment.color_jitter": 0.4,  # data.aug_bright, data.aug_contra
}


@pytest.mark.parametrize(
    ("name", "model", "lr", "batch"),
    [
        # clip_clip_sign.yaml and p16.yaml: optim.base_lr, and 8 GPUs x data.batch_size
        ("hico-vitb32", "ViT-B-32-quickgelu", 1.5e-5, 8 * 16),
        ("hico-vitb16", "ViT-B-16-quickgelu", 5e-6, 8 * 4),
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
