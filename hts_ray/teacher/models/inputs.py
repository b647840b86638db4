"""Turn regions into what a captioner takes: pixels alone, or a processor's image and text.

Shape legend: R regions, H x W pixels, L tokens.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from torch import Tensor

from hts_ray.config import TeacherConfig
from hts_ray.images.crops import CropBatch
from hts_ray.store.aliases import Pixels
from hts_ray.teacher.models.catalog import model_error

# PIL's numbers of the interpolations that torch has; 1 (Lanczos) is not among them.
_RESAMPLE = {0: "nearest-exact", 2: "bilinear", 3: "bicubic", 1: "bicubic"}

# Inputs with one entry a token, and what a token of a prompt has there.
TOKEN_INPUTS: Mapping[str, int] = {
    "input_ids": 0,
    "attention_mask": 1,
    "token_type_ids": 1,  # PaliGemma: read causally, unlike its image and instruction
    "mm_token_type_ids": 0,
    "image_embeds_position_mask": 0,
}


@dataclass(frozen=True)
class ImagePreparation:
    """Resize, crop and normalize R images in one batch on the model's device.

    Does what the checkpoint's own image processor does (bit for bit on the CPU where both
    resize 8-bit pixels), without a Python loop over images and without building one: images
    of equal size are resized together. `size` is (height, width), or one number for the
    shorter side, which needs a `crop` (height, width) after it.
    """

    size: tuple[int, int] | int
    crop: tuple[int, int] | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    scale: float
    resample: str
    device: str
    dtype: torch.dtype

    def __call__(self, images: Sequence[Pixels]) -> Tensor:
        """Return pixel values (R, 3, H, W)."""
        crops = on_device(images, self.device)
        same_size: dict[tuple[int, ...], list[int]] = {}
        for index, crop in enumerate(crops):
            same_size.setdefault(tuple(crop.shape), []).append(index)
        parts, order = [], []
        for indices in same_size.values():
            stacked = torch.stack([crops[i] for i in indices])
            parts.append(self._resized(stacked.permute(0, 3, 1, 2)))
            order += indices
        pixels = torch.cat(parts)[torch.tensor(order, device=self.device).argsort()]
        mean = torch.tensor(self.mean, device=self.device).view(1, 3, 1, 1)
        std = torch.tensor(self.std, device=self.device).view(1, 3, 1, 1)
        return ((pixels * self.scale - mean) / std).to(self.dtype)

    def _resized(self, pixels: Tensor) -> Tensor:
        """Resize and crop uint8 (N, 3, h, w) to whole numbers in 0..255, (N, 3, H, W) float."""
        height, width = pixels.shape[-2:]
        target = self.size
        if isinstance(target, int):
            short, long = sorted((height, width))
            other = int(target * long / short)
            target = (target, other) if height <= width else (other, target)
        if target != (height, width):
            if pixels.device.type != "cpu":  # no 8-bit kernel there
                pixels = pixels.float()
            pixels = torch.nn.functional.interpolate(
                pixels,
                target,
                mode=self.resample,
                antialias=self.resample in {"bilinear", "bicubic"},
            )
        pixels = pixels.float().round().clamp(0, 255)
        return _center_crop(pixels, self.crop) if self.crop else pixels


def on_device(images: Sequence[Pixels], device: str) -> list[Tensor]:
    """Return uint8 images (H, W, 3) as tensors on a device, those that are crops as views.

    Each image that is cropped travels once, however much its crops overlap.
    """
    if not isinstance(images, CropBatch):
        return [torch.from_numpy(np.array(image)).to(device) for image in images]
    # A copy, since pixels out of Arrow are read-only, which torch does not know.
    sources = [torch.from_numpy(np.array(image)).to(device) for image in images.images]
    return [
        sources[number][top:bottom, left:right]
        for number, (left, top, right, bottom) in images.spans
    ]


def _center_crop(pixels: Tensor, size: tuple[int, int]) -> Tensor:
    """Cut the middle (height, width) out of (N, 3, h, w), padding with black where it is less."""
    height, width = size
    missing = (max(0, width - pixels.shape[-1]), max(0, height - pixels.shape[-2]))
    if any(missing):
        left, top = missing[0] // 2, missing[1] // 2
        pixels = torch.nn.functional.pad(pixels, (left, missing[0] - left, top, missing[1] - top))
    top, left = (pixels.shape[-2] - height) // 2, (pixels.shape[-1] - width) // 2
    return pixels[..., top : top + height, left : left + width]


def image_preparation(
    config: TeacherConfig, folder: Path, device: str, dtype: torch.dtype
) -> ImagePreparation:
    """Read an ImagePreparation from a checkpoint's preprocessor or processor settings.

    Raises ConfigError when they are missing or do not lead to images of one size.
    """
    settings = _processor_settings(config, folder)
    size: Any = settings.get("size")
    short_side = "CLIP" in str(settings.get("image_processor_type", ""))
    if isinstance(size, dict):
        size = size.get("shortest_edge") or (size.get("height"), size.get("width"))
    elif isinstance(size, int) and not short_side:
        size = (size, size)
    crop = settings.get("crop_size") if settings.get("do_center_crop") else None
    if isinstance(crop, dict):
        crop = (crop["height"], crop["width"])
    elif isinstance(crop, int):
        crop = (crop, crop)
    known = isinstance(size, int) or (
        isinstance(size, tuple) and all(isinstance(side, int) for side in size)
    )
    complete = settings.get("image_mean") and settings.get("image_std")
    if not known or not complete or (isinstance(size, int) and crop is None):
        raise model_error(
            config,
            f"its image processor settings (size {settings.get('size')}, crop {crop}) do not"
            " give images of one size",
            "save the processor with a height and a width, a mean and a std",
        )
    normalize = settings.get("do_normalize", True)
    scale = settings.get("rescale_factor", 1 / 255) if settings.get("do_rescale", True) else 1.0
    return ImagePreparation(
        size=size,
        crop=crop,
        mean=tuple(settings["image_mean"]) if normalize else (0.0, 0.0, 0.0),
        std=tuple(settings["image_std"]) if normalize else (1.0, 1.0, 1.0),
        scale=float(scale),
        resample=_RESAMPLE.get(int(settings.get("resample", 2)), "bicubic"),
        device=device,
        dtype=dtype,
    )


def _processor_settings(config: TeacherConfig, folder: Path) -> dict[str, Any]:
    """Return the image processor's settings from whichever file the checkpoint has."""
    for name in ("preprocessor_config.json", "processor_config.json"):
        path = folder / name
        if path.is_file():
            settings = json.loads(path.read_text(encoding="utf-8"))
            found = settings.get("image_processor", settings)
            if "size" in found:
                return dict(found)
    raise model_error(
        config, f"{folder} holds no image processor settings", "save the model's processor with it"
    )


class RegionInputs(Sequence[dict[str, Tensor]]):
    """What a processor makes of R regions, computed when a region is asked for.

    Tiles of one region can take 50 MB, so that all of a batch are not held at once. Entries are
    the model's inputs with a batch dimension of 1.
    """

    def __init__(
        self, images: Sequence[Pixels], process: Callable[[Pixels], dict[str, Tensor]]
    ) -> None:
        self.images = images
        self.process = process

    def __len__(self) -> int:
        return len(self.images)

    @overload
    def __getitem__(self, index: int) -> dict[str, Tensor]: ...

    @overload
    def __getitem__(self, index: slice) -> RegionInputs: ...

    def __getitem__(self, index: int | slice) -> dict[str, Tensor] | RegionInputs:
        if isinstance(index, slice):
            return RegionInputs(self.images[index], self.process)
        return self.process(self.images[index])


def collate(regions: Sequence[Mapping[str, Tensor]], pad_id: int) -> dict[str, Tensor]:
    """Join the inputs of R regions for one forward, tokens padded on the left.

    `attention_mask` (R, L) tells padding. Pixels of unequal shape (a differing number of tiles)
    are filled up with zeros behind, which the models that cut images into tiles leave out.
    """
    joined: dict[str, Tensor] = {}
    for name in regions[0]:
        parts = [region[name] for region in regions]
        fill = pad_id if name == "input_ids" else 0
        largest = [max(sizes) for sizes in zip(*(part.shape[1:] for part in parts), strict=True)]
        padded = []
        for part in parts:
            widths: list[int] = []  # torch counts dimensions from the last
            for size, have in zip(reversed(largest), reversed(part.shape[1:]), strict=True):
                missing = size - have
                widths += [missing, 0] if name in TOKEN_INPUTS else [0, missing]
            padded.append(torch.nn.functional.pad(part, widths, value=fill))
        joined[name] = torch.cat(padded)
    return joined


def extended(inputs: Mapping[str, Tensor], tokens: Tensor) -> dict[str, Tensor]:
    """Return one region's inputs with L prompt tokens (1, L) behind the image and instruction."""
    longer = dict(inputs)
    for name, value in TOKEN_INPUTS.items():
        if name in longer:
            part = tokens if name == "input_ids" else torch.full_like(tokens, value)
            longer[name] = torch.cat([longer[name], part.to(longer[name].dtype)], dim=1)
    return longer
