"""The image files that an export refers to or holds: looked at, read and named."""

from __future__ import annotations

import io
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import islice

from PIL import Image

from hts_ray.exports.records import ImageFile, LabeledImage, Needs, Tally
from hts_ray.images.decode import FORMATS, ImageError, probe_image
from hts_ray.images.retry import probe_uri, read_image_bytes

_BATCH = 64  # images whose files are read before the first of them is written
_LONGEST_STEM = 120
_SUFFIXES = {"JPEG": "jpg", "MPO": "jpg", "TIFF": "tif", "JPEG2000": "jp2"}


def with_files(
    images: Iterable[LabeledImage], needs: Needs, tally: Tally, workers: int, *, check: bool = True
) -> Iterator[LabeledImage]:
    """Give every image the size or the file that a format `needs`, and count what passes.

    What is no image is left out and counted. Without `check` a file is opened only for what is
    missing: its bytes, or a size that is not known.
    """

    def look(image: LabeledImage) -> LabeledImage | ImageError:
        try:
            if needs == "files":
                data = read_image_bytes(image.uri)
                width, height = probe_image(data)
                file = ImageFile(data, image_suffix(data))
                return replace(image, width=width, height=height, file=file)
            if check or (needs == "sizes" and not (image.width and image.height)):
                header = probe_uri(image.uri)
                return replace(image, width=header.width, height=header.height)
            return image
        except ImageError as error:
            return error

    remaining = iter(images)
    with ThreadPoolExecutor(workers) as threads:
        while batch := list(islice(remaining, _BATCH)):
            for image, found in zip(batch, threads.map(look, batch), strict=True):
                if isinstance(found, ImageError):
                    tally.reject(image, found.kind, str(found))
                else:
                    tally.count(found)
                    yield found


def image_suffix(data: bytes) -> str:
    """Return the usual suffix, without the dot, of an encoded image's format."""
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        name = image.format or "JPEG"
    return _SUFFIXES.get(name, name.lower())


class FileNames:
    """Hands out file names that are unique, even where case does not count.

    A name keeps the last part of the image's id or path, as far as its characters are plain, and
    never leaves its folder.
    """

    def __init__(self) -> None:
        self._taken: set[str] = set()
        self._numbers: Counter[str] = Counter()

    def of(self, image_id: str, suffix: str) -> str:
        """Return a new name for an image."""
        stem = image_id.rstrip("/").rsplit("/", 1)[-1]
        stem = re.sub(r"\.[A-Za-z0-9]{1,5}$", "", stem)
        stem = re.sub(r"[^\w-]+", "_", stem, flags=re.ASCII).strip("_-")[:_LONGEST_STEM] or "image"
        name = f"{stem}.{suffix}"
        while name.casefold() in self._taken:
            self._numbers[stem.casefold()] += 1
            name = f"{stem}_{self._numbers[stem.casefold()] + 1}.{suffix}"
        self._taken.add(name.casefold())
        return name
