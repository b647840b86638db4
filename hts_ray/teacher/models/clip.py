"""A model of open_clip as a teacher: a class is as likely as its sentences are similar to a region.

Shapes: R regions, P prompts, C classes, E features, H x W the tower's image size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate, normalize

from hts_ray.config import CaptionConfig, TeacherConfig
from hts_ray.engine.clip import LOCAL, class_embeddings
from hts_ray.store.aliases import FloatArray, Pixels
from hts_ray.teacher.captioner import Caption, ClassPrompts, PromptScores
from hts_ray.teacher.models.catalog import clip_model, hub_clip
from hts_ray.teacher.models.inputs import on_device


def load_clip(config: TeacherConfig, device: str) -> ClipTeacher:
    """Load the model that `open_clip:...` names; ConfigError when it is not to be had."""
    source, hub = clip_model(config), hub_clip(config)
    weights = source if hub is None else replace(source, model=f"{LOCAL}{hub.folder()}")
    # One such model fits any GPU: there is nothing to spread.
    device = "cuda" if device == "auto" else device
    clip = weights.load().requires_grad_(False).to(device, getattr(torch, config.dtype))
    return ClipTeacher(clip, source.tokenizer(), device)


class ClipTeacher:
    """Scores are logits: the model's logit scale times the cosine of a region and a class.

    A region is squashed to the tower's size, as it is for a student. The sentences are encoded
    once; those of one class make one direction, the mean of theirs.
    """

    def __init__(self, clip: Any, tokenizer: Any, device: str) -> None:
        import open_clip

        settings = open_clip.get_model_preprocess_cfg(clip)
        mean, std = (torch.tensor(settings[name], device=device) for name in ("mean", "std"))
        self._mean_311, self._std_311 = mean[:, None, None], std[:, None, None]
        size = clip.visual.image_size
        self._size: tuple[int, int] = tuple(size) if isinstance(size, tuple | list) else (size,) * 2
        self._clip, self._tokenizer, self._device = clip, tokenizer, device
        self._dtype = next(clip.parameters()).dtype
        self._directions: dict[ClassPrompts, Tensor] = {}

    def score(self, images: Sequence[Pixels], prompts: Sequence[str]) -> PromptScores:
        """Return the logits (R, P) of every sentence by itself; no token is summed."""
        alone = ClassPrompts.of([(prompt,) for prompt in prompts], 1)
        return PromptScores(self.score_classes(images, alone), np.zeros(len(prompts), np.int64))

    @torch.inference_mode()
    def score_classes(self, images: Sequence[Pixels], prompts: ClassPrompts) -> FloatArray:
        """Return the logits (R, C) of every class on every image."""
        if prompts not in self._directions:
            texts = prompts.by_class(prompts.texts)
            self._directions[prompts] = class_embeddings(self._clip, self._tokenizer, texts)
        pixels = self._pixels(images).to(self._dtype)
        features_RE = normalize(self._clip.encode_image(pixels).float(), dim=-1)
        cosine_RC = features_RE @ self._directions[prompts].T
        logits_RC = self._clip.logit_scale.float().exp() * cosine_RC
        bias = getattr(self._clip, "logit_bias", None)  # of models trained with a sigmoid
        if bias is not None:
            logits_RC = logits_RC + bias.float()
        scores: FloatArray = logits_RC.cpu().numpy()
        return scores

    def caption(self, images: Sequence[Pixels], settings: CaptionConfig) -> list[list[Caption]]:
        """Return an empty caption an image: it writes none."""
        return [[Caption("", 0.0)] for _ in images]

    def _pixels(self, images: Sequence[Pixels]) -> Tensor:
        """Return images of any sizes as the tower takes them, (R, 3, H, W).

        CPUs resize bytes faster than floats, by the kernel of Pillow, as it was trained with.
        """
        squashed = []
        for image in on_device(images, self._device):
            pixels = image.permute(2, 0, 1)[None]
            pixels = pixels if self._device == "cpu" else pixels.float()
            squashed.append(interpolate(pixels, self._size, mode="bicubic", antialias=True))
        pixels_R3HW = torch.cat(squashed).float().round().clamp(0, 255) / 255
        return (pixels_R3HW - self._mean_311) / self._std_311
