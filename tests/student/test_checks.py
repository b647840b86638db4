"""What is known of a student without torch, against what is found when it is built."""

from __future__ import annotations

import subprocess
import sys

import pytest

from hts_ray.config import HtsConfig, load_config
from hts_ray.errors import ConfigError
from hts_ray.student.checks import check_tower, check_train
from hts_ray.student.model import build_student, set_trainable


def settings(*overrides: str) -> HtsConfig:
    return load_config(overrides=overrides)


def test_what_is_refused_early_is_what_building_refuses(vit_path, resnet_path, color_table):
    """Catches a rule that is not the tower's own: a good student refused, a bad one let in."""
    bad = 0
    for path in (vit_path, resnet_path):
        for more in (
            "student.feature_space=projected",
            "student.feature_space=backbone",
            "student.image_size=33",
            "student.image_size=64",
            "train.trainable_blocks=9",
            "train.trainable_blocks=1",
        ):
            config = settings(f"student.model=local-dir:{path}", "train.trainable=last", more)
            told = []
            for work in (check_train, lambda c: built(c, color_table)):
                try:
                    work(config)
                except ConfigError as error:
                    told.append(str(error))
            bad += bool(told)
            assert told in ([], told[:1] * 2), more
    assert bad == 5


def built(config: HtsConfig, color_table) -> None:
    student = build_student(config.student, color_table)
    set_trainable(student, config.train.trainable, config.train.trainable_blocks)


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["student.model=local-dir:/no/such/folder"], "student.model = .*has no open_clip_config"),
        (["student.model=ViT-B-33"], "did you mean ViT-B-32"),
        (["train.loggers=[mlflow]"], "train.loggers = 'mlflow': its library is not installed"),
        (["train.batch_size=5", "train.num_workers=2"], "every worker needs an equal share"),
        (["student.precision=fp16", "train.use_gpu=false"], "a CPU trains in no or bf16"),
        (
            ["student.model=RN50", "student.pretrained=openai", "student.feature_space=backbone"],
            "RN50 has no projection to leave out",
        ),
        (["student.model=ViT-B-32", "student.image_size=200"], "such as 192 or 224"),
    ],
)
def test_settings_are_refused_by_name(overrides, told):
    """Catches a training that refuses after the teacher's pass what was named before it."""
    with pytest.raises(ConfigError, match=told):
        check_train(settings(*overrides))


def test_trunks_of_timm_are_known_by_their_projection():
    """Catches SigLIP and the like refused, or let through without a linear projection."""
    backbone = settings("student.feature_space=backbone")
    check_tower({"timm_model_name": "vit", "timm_proj": "linear"}, backbone)
    for proj in ("", "mlp", None):
        with pytest.raises(ConfigError, match="no projection"):
            check_tower({"timm_model_name": "vit", "timm_proj": proj}, backbone)


def test_no_torch_is_needed():
    """Catches `hts prepare` taking seconds longer for a look at the student."""
    code = """
import sys
from hts_ray.config import load_config
from hts_ray.stages.checks import check_later
check_later(load_config(preset="own-images"), "prepare")
assert "torch" not in sys.modules and "open_clip" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)
