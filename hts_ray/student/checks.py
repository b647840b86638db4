"""What a training will refuse of the settings, as far as that is known without torch.

`hts prepare` and `hts label` ask too: nobody shall wait for a teacher to hear of a student that
does not fit.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hts_ray.config import HtsConfig, StudentConfig
from hts_ray.engine.clip import ClipModel
from hts_ray.errors import ConfigError
from hts_ray.student.loggers import check_loggers

_RESNET_STEP, _RESNET_BLOCKS = 32, 4


def student_clip(config: StudentConfig) -> ClipModel:
    """Return the open_clip model that the student starts from."""
    return ClipModel(config.model, config.pretrained)


def check_train(config: HtsConfig) -> None:
    """Raise ConfigError for settings that a training cannot use; files of a hub stay unread."""
    train = config.train
    check_loggers(train.loggers)
    workers = max(1, train.num_workers)
    if train.batch_size % workers:
        raise ConfigError(
            "every worker needs an equal share",
            field="train.batch_size",
            value=train.batch_size,
            remedy=f"use a multiple of train.num_workers = {workers}",
        )
    if config.student.precision == "fp16" and train.use_gpu is False:
        raise ConfigError(
            field="student.precision",
            value="fp16",
            remedy="a CPU trains in no or bf16, or set train.use_gpu=true",
        )
    architecture = student_clip(config.student).read_architecture()
    if architecture is not None:
        check_tower(architecture.get("vision_cfg") or {}, config)


def check_tower(vision: Mapping[str, Any], config: HtsConfig) -> None:
    """Raise ConfigError for settings that an image tower, by open_clip's `vision_cfg`, lacks."""
    student, train = config.student, config.train
    timm, resnet = "timm_model_name" in vision, isinstance(vision.get("layers"), list)
    linear = vision.get("timm_proj", "linear") == "linear" and not vision.get("timm_proj_bias")
    if student.feature_space == "backbone" and (resnet or (timm and not linear)):
        raise no_projection(student)
    if timm:
        return  # its trunk's patches and blocks are timm's to know
    step = _RESNET_STEP if resnet else vision.get("patch_size", 16)
    native = vision.get("image_size", 224)
    if isinstance(step, int) and student.image_size not in (None, native):
        check_size(student.image_size or 0, step)
    blocks = _RESNET_BLOCKS if resnet else vision.get("layers", 12)
    if train.trainable == "last" and train.trainable_blocks > blocks:
        raise too_many_blocks(train.trainable_blocks, blocks)


def no_projection(config: StudentConfig) -> ConfigError:
    """Return the error of a tower without a linear projection at its end."""
    remedy = f"{config.model} has no projection to leave out: write projected"
    return ConfigError(field="student.feature_space", value="backbone", remedy=remedy)


def check_size(size: int, step: int) -> None:
    """Raise ConfigError for a side that is no multiple of a patch's."""
    if size % step:
        below = size // step * step
        near = f"{below} or {below + step}" if below else f"{step}"
        remedy = f"use a multiple of the patch size {step}, such as {near}"
        raise ConfigError(field="student.image_size", value=size, remedy=remedy)


def too_many_blocks(asked: int, blocks: int) -> ConfigError:
    """Return the error of more blocks to train than there are."""
    remedy = f"the tower has {blocks} blocks, or write train.trainable=all"
    return ConfigError(field="train.trainable_blocks", value=asked, remedy=remedy)
