"""Looking at, reading and naming the image files that an export holds or refers to."""

from __future__ import annotations

import io
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import islice
from typing import TypeVar

from PIL import Image

from hts_ray.exports.records import ImageFile, LabeledImage, Tally
from hts_ray.images.decode import FORMATS, ImageError, probe_image
from hts_ray.images.retry import probe_uri, read_image_bytes

T = TypeVar("T")
_BATCH = 64  # images whose files are read before the first of them is written
_LONGEST_STEM = 120
_SUFFIXES = {"JPEG": "jpg", "MPO": "jpg", "TIFF": "tif", "JPEG2000": "jp2"}


def listed(images: Iterable[LabeledImage], tally: Tally) -> Iterator[LabeledImage]:
    """Count images as they pass, without looking at their files."""
    for image in images:
        tally.count(image)
        yield image


def measured(
    images: Iterable[LabeledImage], tally: Tally, workers: int, *, known_sizes: bool = False
) -> Iterator[LabeledImage]:
    """Give every image the size that its file has, and leave out what is no image.

    With `known_sizes` files are opened only where no size is known.
    """

    def measure(image: LabeledImage) -> LabeledImage:
        if known_sizes and image.width and image.height:
            return image
        header = probe_uri(image.uri)
        return replace(image, width=header.width, height=header.height)

    for _, found in _each(images, measure, tally, workers):
        tally.count(found)
        yield found


def with_files(
    images: Iterable[LabeledImage], tally: Tally, workers: int
) -> Iterator[tuple[LabeledImage, ImageFile]]:
    """Pair every image with its bytes, and leave out what is no image."""

    def read(image: LabeledImage) -> tuple[LabeledImage, ImageFile]:
        data = read_image_bytes(image.uri)
        width, height = probe_image(data)
        return replace(image, width=width, height=height), ImageFile(data, image_suffix(data))

    for _, found in _each(images, read, tally, workers):
        tally.count(found[0])
        yield found


def _each(
    images: Iterable[LabeledImage],
    work: Callable[[LabeledImage], T],
    tally: Tally,
    workers: int,
) -> Iterator[tuple[LabeledImage, T]]:
    """Do `work` in threads, a batch at a time, in order; images that fail are counted."""

    def try_one(image: LabeledImage) -> T | ImageError:
        try:
            return work(image)
        except ImageError as error:
            return error

    remaining = iter(images)
    with ThreadPoolExecutor(workers) as threads:
        while batch := list(islice(remaining, _BATCH)):
            for image, found in zip(batch, threads.map(try_one, batch), strict=True):
                if isinstance(found, ImageError):
                    tally.reject(image, found.kind, str(found))
                else:
                    yield image, found


def image_suffix(data: bytes) -> str:
    """Return the usual suffix, without the dot, of an encoded image's format."""
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        name = image.format or "JPEG"
    return _SUFFIXES.get(name, name.lower())


class FileNames:
    """Hands out file names that are unique, also where case does not count.

    They keep the image id's last part as far as it is plain, and never leave their folder.
    """

    def __init__(self) -> None:
        self._taken: set[str] = set()
        self._numbers: Counter[str] = Counter()

    def of(self, image_id: str, suffix: str) -> str:
        """Return a new name for an image."""
        stem = image_id.rsplit("/", 1)[-1]
        stem = re.sub(r"\.[A-Za-z0-9]{1,5}$", "", stem)
        stem = re.sub(r"[^\w-]+", "_", stem, flags=re.ASCII).strip("_-")[:_LONGEST_STEM] or "image"
        name = f"{stem}.{suffix}"
        while name.casefold() in self._taken:
            self._numbers[stem.casefold()] += 1
            name = f"{stem}_{self._numbers[stem.casefold()] + 1}.{suffix}"
        self._taken.add(name.casefold())
        return name
