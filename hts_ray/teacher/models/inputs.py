"""Turn regions into what a captioner takes: pixels alone, or a processor's image and text.

Shape legend: R regions, H x W pixels, L tokens.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hts_ray.images.crops import CropBatch
from hts_ray.store.aliases import Pixels
from hts_ray.teacher.scoring.memory import WORKSPACE

# Most regions that are prepared and not yet used, and most bytes: some groups for a GPU, and for a
# CPU, which does both, no more than a group may take. One for each thread always is.
_AHEAD = 64
_AHEAD_BYTES = {"cuda": 2 << 30, "cpu": WORKSPACE}
# Inputs with one entry a token, and what a token of a prompt has there.
TOKEN_INPUTS: Mapping[str, int] = {
    "input_ids": 0,
    "attention_mask": 1,
    "token_type_ids": 0,
    "mm_token_type_ids": 0,
    "image_embeds_position_mask": 0,
}


def cuts_ends(processor: Any) -> bool:
    """Return whether an image processor leaves only the middle of an image that is no square."""
    size = getattr(processor, "size", None) or {}
    return (
        bool(getattr(processor, "do_center_crop", False)) and size.get("shortest_edge") is not None
    )


def margin_color(processor: Any) -> Tensor:
    """Return the colour (3,) uint8 that becomes 0 in the model's eyes, or grey."""
    mean = getattr(processor, "image_mean", None) or (0.5, 0.5, 0.5)
    return (255 * torch.tensor(mean)).round().byte()


def squared(image: Tensor, color: Tensor) -> Tensor:
    """Return an image (H, W, 3) in the middle of a square of one colour, as LLaVA pads."""
    height, width, _ = image.shape
    side = max(height, width)
    square = color.to(image.device).expand(side, side, 3).clone()
    top, left = (side - height) // 2, (side - width) // 2
    square[top : top + height, left : left + width] = image
    return square


def pixel_preparation(
    processor: Any, device: str, dtype: torch.dtype, *, pad: bool = False
) -> Callable[[Sequence[Pixels]], Tensor]:
    """Return what makes pixel values (R, 3, H, W) on a device of R images of any sizes.

    The checkpoint's image processor resizes and crops, images of equal size together. With `pad`
    they are made squares before.
    """
    color = margin_color(processor)
    scale = processor.rescale_factor if processor.do_rescale else 1.0
    mean, std = (processor.image_mean, processor.image_std) if processor.do_normalize else (0, 1)
    mean, std = (torch.tensor(value, device=device).view(-1, 1, 1) for value in (mean, std))

    def prepare(images: Sequence[Pixels]) -> Tensor:
        sources = on_device(images, device)
        pixels: Tensor = processor(
            [squared(source, color) if pad else source for source in sources],
            input_data_format="channels_last",
            do_rescale=False,
            do_normalize=False,
            return_tensors="pt",
        ).pixel_values
        return ((pixels.float() * scale - mean) / std).to(dtype)

    return prepare


def to_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """Return a tensor on a device; a GPU copies it while the host goes on."""
    if tensor.device.type == "cpu" and torch.device(device).type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def on_device(images: Sequence[Pixels], device: str) -> Sequence[Any]:
    """Return uint8 images (H, W, 3) as tensors on a device, those that are crops as views.

    Each image that is cropped travels once, however much its crops overlap and however many slices
    of the batch are asked for.
    """
    whole = images.images if isinstance(images, CropBatch) else images
    kept = images.kept if isinstance(images, CropBatch) else {}
    if device not in kept:
        # A copy, since pixels out of Arrow are read-only, which torch does not know.
        kept[device] = [to_device(torch.from_numpy(np.array(image)), device) for image in whole]
    if not isinstance(images, CropBatch):
        tensors: list[Tensor] = kept[device]
        return tensors
    return CropBatch(kept[device], images.whole, images.part, kept)


class RegionInputs:
    """What a processor makes of R regions: the model's inputs with a batch dimension of 1.

    A thread or more (as many as torch has) prepare regions while earlier ones are scored. Those of
    a `CropBatch` go on behind a slice's end, so that the next slice finds its own begun. Not all
    are made at once: the tiles of one region can take 50 MB. `device` is the type of the model's.
    """

    def __init__(
        self,
        images: Sequence[Any],
        process: Callable[[Any], dict[str, Tensor]],
        device: str = "cpu",
    ) -> None:
        self.images = images
        self.process = process
        self.most = _AHEAD_BYTES.get(device, WORKSPACE)

    def __len__(self) -> int:
        return len(self.images)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        images = self.images
        if not isinstance(images, CropBatch) or images.part.step != 1:
            yield from _made_ahead(images, self.process, self.most)
            return
        # What is kept must not hold the batch that keeps it, or its threads would outlive it.
        at, made = images.kept.get(self.process, (None, None))
        if made is None or at != images.part.start:
            rest = range(images.part.start, len(images.whole))
            following = CropBatch(images.images, images.whole, rest)
            made = _made_ahead(following, self.process, self.most)
        for number in images.part:
            images.kept[self.process] = (number + 1, made)
            yield next(made)


def _made_ahead(
    images: Sequence[Any], process: Callable[[Any], dict[str, Tensor]], most: int
) -> Iterator[dict[str, Tensor]]:
    """Yield each image's inputs in order, later ones of at most about so many bytes made meanwhile.

    An exception is raised in the place of the image that caused it.
    """
    workers, waiting = torch.get_num_threads(), iter(range(len(images)))
    threads = ThreadPoolExecutor(workers, "prepare")
    upcoming: deque[Future[dict[str, Tensor]]] = deque()

    def fill(count: int) -> None:
        for number in islice(waiting, max(0, count - len(upcoming))):
            upcoming.append(threads.submit(lambda n: process(images[n]), number))

    try:
        fill(workers)
        while upcoming:
            made = upcoming.popleft().result()
            held = sum(value.numel() * value.element_size() for value in made.values())
            fill(max(workers, min(_AHEAD, most // max(1, held))))
            yield made
    finally:
        threads.shutdown(wait=False, cancel_futures=True)


def collate(regions: Sequence[Mapping[str, Tensor]], pad_id: int) -> dict[str, Tensor]:
    """Join the inputs of R regions for one forward, tokens padded on the left.

    `attention_mask` (R, L) is 0 for padding. Pixels of unequal shape (a differing number of tiles)
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


def extended(
    inputs: Mapping[str, Tensor], tokens: Tensor, token_type: int = 0
) -> dict[str, Tensor]:
    """Return one region's inputs with L prompt tokens (1, L) behind the image and instruction."""
    longer = dict(inputs)
    for name, value in {**TOKEN_INPUTS, "token_type_ids": token_type}.items():
        if name in longer:
            part = tokens if name == "input_ids" else torch.full_like(tokens, value)
            longer[name] = torch.cat([longer[name], part.to(longer[name].dtype)], dim=1)
    return longer
