"""A CLIP's text tower as what finds classes in captions that the lexicon says nothing about."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from hts_ray.errors import ConfigError
from hts_ray.teacher.builtin import BUILTIN, builtin_folder

FIELD = "label.teacher.caption.text_encoder"
_BATCH = 256


class ClipTextEncoder:
    """Embeds texts with an open_clip model's text tower.

    `name` is `MODEL` or `MODEL@TAG` of open_clip, `hf-hub:...`, `local-dir:PATH` or
    `builtin:NAME`. Raises ConfigError for a model that does not load.
    """

    def __init__(self, name: str, device: str = "cpu") -> None:
        import open_clip
        import torch

        model, _, tag = name.partition("@")
        if model.startswith(BUILTIN):
            try:
                model = f"local-dir:{builtin_folder(model, 'open_clip_config.json')}"
            except FileNotFoundError as error:
                raise ConfigError(str(error), field=FIELD, value=name) from None
        if not (tag or ":" in model):
            tags = open_clip.list_pretrained_tags_by_model(model)
            raise ConfigError(
                "without a tag its weights are random numbers",
                field=FIELD,
                value=name,
                remedy=f"write {model}@{tags[0]}" if tags else "see open_clip.list_pretrained()",
            )
        try:
            clip = open_clip.create_model(model, pretrained=tag or None, weights_only=True)
            self._tokenizer: Any = open_clip.get_tokenizer(model)
        except (OSError, ValueError, RuntimeError, KeyError) as error:
            raise ConfigError(f"does not load: {error}", field=FIELD, value=name) from error
        self._clip = clip.eval().to(torch.device(device))
        self._device = device

    def __call__(self, texts: Sequence[str], /) -> npt.NDArray[np.floating[Any]]:
        """Return unit vectors (N, D) float32 of N texts."""
        import torch

        parts = []
        with torch.inference_mode():
            for first in range(0, len(texts), _BATCH):
                tokens = self._tokenizer(list(texts[first : first + _BATCH])).to(self._device)
                parts.append(self._clip.encode_text(tokens, normalize=True).float().cpu().numpy())
        return np.concatenate(parts) if parts else np.zeros((0, 1), np.float32)
