"""Boxes that the user gives: a table of all images, and which of them belong to one image.

The file is read once, on the driver; workers get an Arrow table with one row an image. Only boxes
and object names are taken: which interaction an annotator saw is never read.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

import pyarrow as pa

from hts_ray.config import RegionsConfig
from hts_ray.errors import ConfigError, DataError
from hts_ray.images.box_files import FORMATS, LayoutError, clean_label, read_box_file
from hts_ray.images.regions import Box, Detection, clip_box
from hts_ray.store import storage

PERSON_LABELS: tuple[str, ...] = RegionsConfig.model_fields["person_labels"].default
# Sides of a resized copy differ from the exact ratio by rounding.
ASPECT_TOLERANCE = 0.02


class GivenImage(NamedTuple):
    """What a file says of one image.

    `detections` are boxes with labels, for unions and persons; `boxes` become regions unchanged.
    Both are inside the image. `problems` names each box that was left out, and why.
    """

    detections: list[Detection]
    boxes: list[Box]
    problems: list[str]


_LABEL = pa.dictionary(pa.int32(), pa.string())
_BOX = pa.struct({"box": pa.list_(pa.float64(), 4), "label": _LABEL, "score": pa.float32()})
_SIZE = {"width": pa.int32(), "height": pa.int32()}
_SCHEMA = pa.schema(
    {"image_id": pa.string(), "path": pa.string(), **_SIZE, "boxes": pa.list_(_BOX)}
)


@dataclass(frozen=True, eq=False)
class GivenBoxes:
    """The boxes of all images of a file: a table that costs little to send, and a look-up.

    `uri` is where the file lay, `table` has the columns of `_SCHEMA`.
    """

    uri: str
    table: pa.Table
    person_labels: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.table)

    def __reduce__(self) -> tuple[Any, ...]:
        # The look-up is built where it is used: it is larger than the boxes.
        return GivenBoxes, (self.uri, self.table, self.person_labels)

    def count_found(self, image_ids: Sequence[str], uris: Sequence[str]) -> int:
        """Return how many of these images the file knows.

        Raises DataError as `of`, and where two images would get the boxes of one: a file name
        alone can lead to an image of the same name in another folder.
        """
        owners: dict[int, str] = {}
        found = 0
        for image_id, uri in zip(image_ids, uris, strict=True):
            rows = self._rows(image_id, uri)
            found += bool(rows)
            owner = owners.setdefault(rows[0], image_id) if rows else image_id
            if owner != image_id:
                raise DataError(
                    f"{self.uri} has {self._paths[rows[0]]!r} once, and both images"
                    f" {owner!r} and {image_id!r} would get its boxes: write the images' paths"
                    " or ids into the file"
                )
        return found

    def of(self, image_id: str, uri: str, width: int, height: int) -> GivenImage:
        """Return the boxes of an image of `width` x `height` pixels; none for an unknown one.

        - An image is found by its id, by its path or the path without its extension, or else by
          the file name at the end of `uri`.
        - Boxes are clipped to the image. If the file has another size of the same aspect, they are
          scaled; with another aspect (a turned or cropped copy) they are all left out.
        - Boxes with a label become detections if the file has any persons. Without a person there
          is no pair, and they are plain boxes.

        Raises DataError where file names do not tell two images apart.
        """
        given = GivenImage([], [], [])
        number = 0
        for row in self._rows(image_id, uri):
            image = self.table.slice(row, 1).to_pylist()[0]
            scale = _scale((image["width"], image["height"]), (width, height))
            for found in image["boxes"]:
                box = _inside(found["box"], found["score"], scale, width, height)
                label = found["label"] or ""
                if isinstance(box, str):
                    shown = ", ".join(f"{value:g}" for value in found["box"])
                    name = f" ({label})" if label else ""
                    given.problems.append(f"box {number}{name} [{shown}]: {box}")
                elif label and self._has_persons:
                    is_person = label in self.person_labels
                    given.detections.append(Detection(box, label, found["score"], is_person))
                else:
                    given.boxes.append(box)
                number += 1
        return given

    @cached_property
    def _has_persons(self) -> bool:
        labels = self.table["boxes"].combine_chunks().values.field("label")
        return not set(labels.dictionary.to_pylist()).isdisjoint(self.person_labels)

    @cached_property
    def _paths(self) -> list[str]:
        paths: list[str] = self.table["path"].to_pylist()
        return paths

    @cached_property
    def _by_key(self) -> tuple[Mapping[str | None, list[int]], ...]:
        """Rows by id, path, path without extension and file name, the surest key first."""
        ids, stems = self.table["image_id"].to_pylist(), map(_stem, self._paths)
        names = (_path_of(path).rpartition("/")[2] for path in self._paths)
        by_key: tuple[dict[str | None, list[int]], ...] = ({}, {}, {}, {})
        for row, keys in enumerate(zip(ids, self._paths, stems, names, strict=True)):
            for rows_of, key in zip(by_key, keys, strict=True):
                rows_of.setdefault(key, []).append(row)
        return by_key

    def _rows(self, image_id: str, uri: str) -> list[int]:
        by_id, by_path, by_stem, by_name = self._by_key
        for rows in (by_id.get(image_id), by_path.get(image_id), by_path.get(uri)):
            if rows:
                return rows
        path = _path_of(uri)
        rows = by_stem.get(image_id) or by_name.get(path.rpartition("/")[2]) or []
        return self._one_path(rows, image_id, path)

    def _one_path(self, rows: list[int], image_id: str, path: str) -> list[int]:
        """Return the rows of one path, the one that `path` ends in if there are several."""
        paths = {row: _path_of(self._paths[row]) for row in rows}
        if len(set(paths.values())) < 2:
            return rows
        ending = [row for row in rows if f"/{path}".endswith(f"/{paths[row].lstrip('/')}")]
        longest = max((len(paths[row]) for row in ending), default=0)
        chosen = [row for row in ending if len(paths[row]) == longest]
        if not chosen:
            first, second, *_ = sorted(set(paths.values()))
            raise DataError(
                f"{self.uri} has both {first!r} and {second!r}, and either may be the image"
                f" {image_id!r} ({path}): write the images' paths or ids into the file"
            )
        return chosen


def _inside(
    values: Sequence[float], score: float, scale: tuple[float, float] | str, width: int, height: int
) -> Box | str:
    """Return a box scaled and clipped to an image, or what is wrong with it."""
    if isinstance(scale, str):
        return scale
    left, top, right, bottom = values
    if not all(map(math.isfinite, values)):
        return "not four finite numbers"
    if right <= left or bottom <= top:
        return "no area"
    if not 0 <= score <= 1:
        return f"the score {score:g} is not in [0, 1]"
    x, y = scale
    box = clip_box((left * x, top * y, right * x, bottom * y), width, height)
    return box or f"outside the image of {width}x{height} pixels"


def _scale(own: tuple[int, int], image: tuple[int, int]) -> tuple[float, float] | str:
    """Return the factors from the file's pixels to the image's, or why there are none."""
    if min(own) < 1:
        return 1.0, 1.0
    x, y = image[0] / own[0], image[1] / own[1]
    if abs(x - y) > ASPECT_TOLERANCE * max(x, y):
        return (
            f"drawn on {own[0]}x{own[1]} pixels, which is another shape than {image[0]}x{image[1]}"
        )
    return x, y


def box_bytes(uri: str) -> bytes:
    """Return the content of a file of boxes; ConfigError if it cannot be read."""
    try:
        return storage.read_bytes(uri)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"cannot be read: {error}",
            field="label.regions.boxes",
            value=uri,
            remedy="give the path or URI of a HICO-DET json, COCO json or Parquet file",
        ) from None


def read_given_boxes(uri: str, person_labels: Sequence[str] = PERSON_LABELS) -> GivenBoxes:
    """Read the boxes of a file at a path or URI. Its content decides the format, see FORMATS.

    - HICO-DET's `boxes_h` and `boxes_o` count pixels from 1 and include the last one; they are
      brought to this package's pixels, as UPT's loader does.
    - The other layouts are taken unchanged, as QPIC's loader does. Of the widespread pair,
      trainval_hico.json counts from 0 and test_hico.json from 1, which is off by a pixel.
    - Humans of HICO-DET are labelled "person"; labels are in lower case with spaces.
    - COCO's crowd boxes are skipped: they show no single thing.

    Raises ConfigError for a file that cannot be read, DataError for one of another layout.
    `GivenBoxes.of` reports what is wrong with single boxes.
    """
    try:
        images = read_box_file(box_bytes(uri))
    except LayoutError as error:
        raise DataError(
            f"{uri} has no boxes that can be read: found {error}; accepted are {FORMATS}"
        ) from None
    table = pa.Table.from_pylist([vars(image) for image in images], _SCHEMA)
    return GivenBoxes(uri, table, tuple(dict.fromkeys(map(clean_label, person_labels))))


def _path_of(uri: str) -> str:
    """Return the path of a URI, without escapes; a local path unchanged."""
    return unquote(urlsplit(uri).path) if "://" in uri else uri


def _stem(path: str) -> str:
    folder, slash, name = path.rpartition("/")
    return folder + slash + (name.rpartition(".")[0] or name)
