"""A trained student as a classifier of images: paths, folders, URIs or pixels in, labels out.

It runs in this process, without Ray and without a run directory. For millions of images use
`hts predict --manifest`.

Shapes: N images, R regions of one image, C classes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
import numpy.typing as npt

from hts_ray.config import ImagesConfig, RegionsConfig
from hts_ray.errors import ConfigError, DataError
from hts_ray.images.crops import crop_region
from hts_ray.images.decode import DecodedImage, ImageError, decode_image
from hts_ray.images.folder import read_folder
from hts_ray.images.prepared import inspect_images
from hts_ray.images.regions import Region, propose_regions
from hts_ray.images.retry import read_image_bytes
from hts_ray.store import storage
from hts_ray.store.aliases import FloatArray, Pixels

if TYPE_CHECKING:
    from PIL import Image

    from hts_ray.student.model import Student

    ImageLike = str | Path | bytes | Image.Image | npt.NDArray[np.uint8]

Box = tuple[float, float, float, float]

_READ_THREADS = 4
_IMAGES = ImagesConfig()


@dataclass(frozen=True)
class Label:
    """A class that an image has, with the student's logit.

    `box` is the region where it scores most, xyxy in pixels of the upright image, and `box_score`
    the logit there; both None unless regions were asked for.
    """

    class_id: int
    name: str
    score: float
    box: Box | None = None
    box_score: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the label as JSON-able values."""
        values = {"class_id": self.class_id, "name": self.name, "score": round(self.score, 4)}
        if self.box is None:
            return values
        return {**values, "box": list(self.box), "box_score": round(self.box_score or 0.0, 4)}


@dataclass(frozen=True, eq=False)
class Prediction:
    """The labels of one image, best first; `source` is its path, or its number in the call.

    `width` and `height` are those of the upright image. If the image could not be used, `error`
    says why, and there are no labels. `pixels` are what the student saw, at most 2048 a side.
    """

    source: str
    labels: tuple[Label, ...] = ()
    width: int = 0
    height: int = 0
    error: str | None = None
    pixels: Pixels | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the prediction as JSON-able values, without pixels."""
        if self.error is not None:
            return {"image": self.source, "error": self.error}
        return {
            "image": self.source,
            "width": self.width,
            "height": self.height,
            "labels": [label.to_dict() for label in self.labels],
        }


class Classifier:
    """A student in evaluation mode with its preprocessing and class names.

    `student` is the torch module.
    """

    def __init__(self, student: Student, device: str | None = None) -> None:
        import torch

        name = device or ("cuda" if torch.cuda.is_available() else "cpu")
        try:
            self.student = student.eval().to(torch.device(name))
        except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
            raise ConfigError(field="device", value=name, remedy=str(error)) from error

    @property
    def class_names(self) -> list[str]:
        """C display names."""
        return self.student.class_table.names

    def predict(
        self,
        images: ImageLike | Iterable[ImageLike],
        top_k: int | None = 5,
        threshold: float | None = None,
        *,
        regions: bool = False,
        batch_size: int = 32,
        on_error: Literal["raise", "keep"] = "raise",
    ) -> list[Prediction]:
        """Return the labels of images: paths, URIs, bytes, PIL images or uint8 arrays (H, W, 3).

        A label is kept among the `top_k` best (None: all) and from the logit `threshold` on.
        `regions` scores a grid of crops too, some 14 times the work, and gives each label the crop
        where it scores most. An image that cannot be used raises DataError naming it; with
        on_error="keep" its prediction has `error` instead.
        """
        if isinstance(images, str | Path | bytes | np.ndarray) or not isinstance(images, Iterable):
            images = cast("list[ImageLike]", [images])
        return list(
            self.iterate(
                images, top_k, threshold, regions=regions, batch_size=batch_size, on_error=on_error
            )
        )

    def iterate(
        self,
        images: Iterable[ImageLike],
        top_k: int | None = 5,
        threshold: float | None = None,
        *,
        regions: bool = False,
        batch_size: int = 32,
        on_error: Literal["raise", "keep"] = "raise",
    ) -> Iterator[Prediction]:
        """Yield what `predict` returns, one batch after the other, for many images."""
        if top_k is not None and top_k < 1:
            raise ConfigError(field="top_k", value=top_k, remedy="give 1 or more, or None for all")
        if batch_size < 1:
            raise ConfigError(field="batch_size", value=batch_size, remedy="give 1 or more")
        numbered = enumerate(images)
        with ThreadPoolExecutor(_READ_THREADS) as threads:
            while batch := list(islice(numbered, batch_size)):
                sources = [str(i) if isinstance(i, str | Path) else f"image {n}" for n, i in batch]
                decoded = list(threads.map(_decoded, [image for _, image in batch]))
                for source, image in zip(sources, decoded, strict=True):
                    if on_error == "raise" and isinstance(image, ImageError):
                        raise DataError(f"{source} cannot be used: {image}") from image
                pixels = [image.pixels for image in decoded if isinstance(image, DecodedImage)]
                logits_NC = iter(self.logits(pixels, batch_size))
                for source, image in zip(sources, decoded, strict=True):
                    if isinstance(image, ImageError):
                        yield Prediction(source, error=str(image))
                        continue
                    scores_C = next(logits_NC)
                    if not np.isfinite(scores_C).all():
                        yield Prediction(source, error="the student's logits are not finite")
                        continue
                    crops = grid(image.width, image.height) if regions else []
                    scores_RC = self.logits([crop_region(image, c) for c in crops], batch_size)
                    labels = tuple(
                        self._label(c, scores_C, crops, scores_RC)
                        for c in np.argsort(-scores_C, kind="stable")[:top_k].tolist()
                        if threshold is None or scores_C[c] >= threshold
                    )
                    yield Prediction(source, labels, image.width, image.height, pixels=image.pixels)

    def _label(
        self, column: int, scores_C: FloatArray, crops: Sequence[Region], scores_RC: FloatArray
    ) -> Label:
        """Return a class as a label, with the crop in which it scores highest.

        The whole image is one of the crops.
        """
        found = self.student.class_table[column]
        label = Label(found.class_id, found.name, float(scores_C[column]))
        if not crops:
            return label
        best = int(np.argmax(scores_RC[:, column]))
        return replace(label, box=crops[best].box, box_score=float(scores_RC[best, column]))

    def logits(self, images: Sequence[Pixels], batch_size: int = 32) -> FloatArray:
        """Return logits (N, C) float32 of uint8 images (H, W, 3) of any size."""
        parts: list[FloatArray] = [np.zeros((0, len(self.student.class_table)), np.float32)]
        for start in range(0, len(images), batch_size):
            batch = self.student.preprocess(images[start : start + batch_size])
            parts.append(self.student.compute(batch))
        return np.concatenate(parts)


def load(path: str, device: str | None = None) -> Classifier:
    """Return the student at `path` (run directory, student folder or export) as a classifier.

    `device` is torch's name of one; without it, a GPU is used if there is one. Raises DataError
    when there is no student, ConfigError for a device that does not exist.
    """
    from hts_ray.student import load_student  # torch loads slowly

    return Classifier(load_student(str(path)), device)


def find_images(paths: Sequence[str], *, workers: int = 16) -> tuple[list[str], list[Prediction]]:
    """Return the images at files, folders and URIs, and what cannot be used.

    Folders are read with the folders below them, their images ordered by name. A path that does
    not exist and a folder without images cannot be used. Raises DataError for a storage that
    cannot be opened.
    """
    found: list[str] = []
    bad: list[Prediction] = []
    for path in paths:
        kind = storage.kind(path)
        if kind == "NotFound":
            bad.append(Prediction(path, error="nothing is there"))
        if kind == "File":
            found.append(path)
        if kind != "Directory":
            continue
        prepared = inspect_images(read_folder(path), workers=workers)
        for row in prepared.quarantine.to_pylist():
            bad.append(Prediction(row["uri"], error=row["error"]))
        if not len(prepared.manifest) and not len(prepared.quarantine):
            counts = ", ".join(f"{name} {n}" for name, n in prepared.counts.items() if n)
            bad.append(Prediction(path, error=f"holds no image: {counts or 'it is empty'}"))
        found += prepared.manifest["uri"].to_pylist()
    return found, bad


def grid(width: int, height: int) -> list[Region]:
    """Return the regions that are scored to locate labels: the teacher's default grid."""
    return propose_regions(width, height, RegionsConfig())


def _decoded(image: Any) -> DecodedImage | ImageError:
    """Decode any kind of input as the stages over images do."""
    from PIL import Image

    try:
        if isinstance(image, np.ndarray):
            if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
                raise ConfigError(
                    field="images",
                    value=f"{image.dtype} {image.shape}",
                    remedy="give uint8 RGB arrays of shape (H, W, 3)",
                )
            return DecodedImage(image, image.shape[1], image.shape[0])
        if isinstance(image, Image.Image):  # a PNG is decoded as files are: palettes, alpha, EXIF
            sink = BytesIO()
            image.save(sink, "PNG", exif=image.getexif())
            image = sink.getvalue()
        if not isinstance(image, str | Path | bytes):
            raise ConfigError(
                field="images",
                value=type(image).__name__,
                remedy="give paths, URIs, bytes, PIL images or uint8 arrays (H, W, 3)",
            )
        return decode_image(
            image if isinstance(image, bytes) else read_image_bytes(str(image)),
            max_pixels=_IMAGES.max_pixels,
            min_side=_IMAGES.min_side,
            max_side=_IMAGES.max_side,
        )
    except ImageError as error:
        return error
