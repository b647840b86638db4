"""Boxes that the user gives, from HICO-DET json, COCO json or Parquet.

The file is read once, on the driver; what workers get is a handful of flat arrays. Only boxes
and object names are taken: which interaction an annotator saw is never read.

Shape legend: N images, M boxes of all images, K label names.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from hts_ray.config import RegionsConfig
from hts_ray.errors import DataError
from hts_ray.images.regions import Box, Detection, clip_box
from hts_ray.store import storage

FORMATS = (
    "COCO json (images, annotations, categories), HICO-DET json (a list of file_name,"
    " annotations, hoi_annotation; or filenames, annotation with boxes_h and boxes_o), or"
    " Parquet (image_id, file_name or uri; boxes; optional labels and scores)"
)
PERSON_LABELS: tuple[str, ...] = RegionsConfig.model_fields["person_labels"].default
# Sides of a resized copy differ from the exact ratio by rounding.
ASPECT_TOLERANCE = 0.02

# MS COCO's object names in the order of their category ids (Lin et al. 2014), which HICO-DET's
# files use too, and the ids that COCO leaves out.
_COCO_NAMES = (
    "person,bicycle,car,motorcycle,airplane,bus,train,truck,boat,traffic light,fire hydrant,"
    "stop sign,parking meter,bench,bird,cat,dog,horse,sheep,cow,elephant,bear,zebra,giraffe,"
    "backpack,umbrella,handbag,tie,suitcase,frisbee,skis,snowboard,sports ball,kite,baseball bat,"
    "baseball glove,skateboard,surfboard,tennis racket,bottle,wine glass,cup,fork,knife,spoon,"
    "bowl,banana,apple,sandwich,orange,broccoli,carrot,hot dog,pizza,donut,cake,chair,couch,"
    "potted plant,bed,dining table,toilet,tv,laptop,mouse,remote,keyboard,cell phone,microwave,"
    "oven,toaster,sink,refrigerator,book,clock,vase,scissors,teddy bear,hair drier,toothbrush"
)
_COCO_GAPS = (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)
_COCO = dict(
    zip((n for n in range(1, 91) if n not in _COCO_GAPS), _COCO_NAMES.split(","), strict=True)
)
_PERSON = "person"
_NOT_A_BOX: Box = (math.nan, math.nan, math.nan, math.nan)


class GivenImage(NamedTuple):
    """What a file says of one image.

    `detections` are boxes with labels, for unions and persons; `boxes` are regions as they
    stand. Both lie inside the image. `problems` names each box that was left out and why.
    """

    detections: list[Detection]
    boxes: list[Box]
    problems: list[str]


@dataclass(frozen=True, eq=False)
class GivenBoxes:
    """The boxes of all images of a file, in flat arrays that cost little to send to workers.

    `ids` and `paths` are (N,) strings, `sizes_N2` (width, height) in pixels or 0 where the file
    tells none. Image n has the boxes `starts[n]` to `starts[n + 1]`: `boxes_M4` (left, top,
    right, bottom) in pixels, NaN for what is no box; `labels_M` positions in `label_names`, -1
    for none; `scores_M`. `uri` is where the file lay, `digest` a hash of its bytes.
    """

    uri: str
    digest: str
    ids: pa.StringArray
    paths: pa.StringArray
    sizes_N2: npt.NDArray[np.int32]
    starts: npt.NDArray[np.int64]
    boxes_M4: npt.NDArray[np.float64]
    labels_M: npt.NDArray[np.int16]
    scores_M: npt.NDArray[np.float32]
    label_names: tuple[str, ...]
    person_labels: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getstate__(self) -> dict[str, Any]:
        # The look-up tables are built where they are used: they are larger than the boxes.
        return {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}

    def fingerprint(self) -> str:
        """Return 12 hexadecimal digits that change whenever the file's bytes do."""
        return self.digest

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
                    f"{self.uri} has {self.paths[rows[0]].as_py()!r} once, and both images"
                    f" {owner!r} and {image_id!r} would get its boxes: write the images' paths"
                    " or ids into the file"
                )
        return found

    def of(self, image_id: str, uri: str, width: int, height: int) -> GivenImage:
        """Return the boxes of an image of `width` x `height` pixels; none for an unknown one.

        An image is found by its id, by its path or the path without its extension, or else by
        the file name at the end of `uri`. Boxes are clipped to the image. Where the file tells
        another size of the same shape, its boxes are scaled; with another shape (a turned or
        cut copy) they are all left out. Boxes with a label become detections, if the file has
        persons at all: without a person there is no pair, and they are plain boxes.
        Raises DataError where file names do not tell two images apart.
        """
        detections: list[Detection] = []
        boxes: list[Box] = []
        problems: list[str] = []
        number = 0
        for row in self._rows(image_id, uri):
            scale = self._scale(row, width, height)
            for index in range(int(self.starts[row]), int(self.starts[row + 1])):
                found = self._detection(index, scale, width, height)
                if isinstance(found, str):
                    problems.append(f"box {number}{found}")
                elif found.label and self._has_persons:
                    detections.append(found)
                else:
                    boxes.append(found.box)
                number += 1
        return GivenImage(detections, boxes, problems)

    def _detection(
        self, index: int, scale: tuple[float, float] | str, width: int, height: int
    ) -> Detection | str:
        """Return a box with its label, "" for none; or what is wrong with it."""
        position = int(self.labels_M[index])
        label = self.label_names[position] if position >= 0 else ""
        values = self.boxes_M4[index].tolist()
        shown = ", ".join(f"{value:g}" for value in values)
        name = f" ({label}) [{shown}]" if label else f" [{shown}]"
        if isinstance(scale, str):
            return f"{name}: {scale}"
        if not all(map(math.isfinite, values)):
            return f"{name}: not four finite numbers"
        if values[2] <= values[0] or values[3] <= values[1]:
            return f"{name}: no area"
        score = float(self.scores_M[index])
        if not 0 <= score <= 1:
            return f"{name}: the score {score:g} is not in [0, 1]"
        x, y = scale
        box = clip_box((values[0] * x, values[1] * y, values[2] * x, values[3] * y), width, height)
        if box is None:
            return f"{name}: outside the image of {width}x{height} pixels"
        return Detection(box, label, score, is_person=label in self.person_labels)

    def _scale(self, row: int, width: int, height: int) -> tuple[float, float] | str:
        """Return the factors from the file's pixels to the image's, or why there are none."""
        own_width, own_height = self.sizes_N2[row].tolist()
        if own_width < 1 or own_height < 1:
            return 1.0, 1.0
        x, y = width / own_width, height / own_height
        if abs(x - y) > ASPECT_TOLERANCE * max(x, y):
            return (
                f"drawn on {own_width}x{own_height} pixels, which is another shape than"
                f" {width}x{height}"
            )
        return x, y

    @cached_property
    def _has_persons(self) -> bool:
        return not set(self.label_names).isdisjoint(self.person_labels)

    @cached_property
    def _by_key(self) -> tuple[Mapping[str, list[int]], ...]:
        """Rows by id, path, path without extension and file name, in the order of trust."""
        paths = self.paths.to_pylist()
        return tuple(
            _index(keys)
            for keys in (
                self.ids.to_pylist(),
                paths,
                map(_stem, paths),
                (_file_name(_path_of(path)) for path in paths),
            )
        )

    def _rows(self, image_id: str, uri: str) -> list[int]:
        by_id, by_path, by_stem, by_name = self._by_key
        for rows in (by_id.get(image_id), by_path.get(image_id), by_path.get(uri)):
            if rows:
                return rows
        path = _path_of(uri)
        rows = by_stem.get(image_id) or by_name.get(_file_name(path)) or []
        return self._one_path(rows, image_id, path)

    def _one_path(self, rows: list[int], image_id: str, path: str) -> list[int]:
        """Return the rows of one path, the one that `path` ends in if there are several."""
        paths = {row: _path_of(self.paths[row].as_py()) for row in rows}
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


def read_given_boxes(uri: str, person_labels: Sequence[str] = PERSON_LABELS) -> GivenBoxes:
    """Read the boxes of a file, a path or a URI, whatever its name ends in.

    Formats: see FORMATS. HICO-DET's `boxes_h` and `boxes_o` count pixels from 1 and include the
    last one, and are brought to this package's pixels, as UPT's loader does. The other layouts
    are taken as they stand, as QPIC's loader does: of the widespread pair, trainval_hico.json
    counts from 0 and test_hico.json from 1, which is off by a pixel. Humans of HICO-DET are
    labelled "person"; labels are in lower case with spaces. COCO's crowd boxes are skipped:
    they show no single thing. Raises DataError for a file that cannot be read or whose layout
    is none of these; single bad boxes are told by `GivenBoxes.of`.
    """
    try:
        data = storage.read_bytes(uri)
    except FileNotFoundError as error:
        raise DataError(f"no file {uri}: check label.regions.boxes") from error
    except (OSError, ValueError) as error:
        raise DataError(f"{uri} cannot be read: {error}") from error
    if data.startswith(b"PAR1"):
        builder = _read_parquet(data, uri)
    else:
        builder = _read_layout(_parse_json(data, uri), uri)
    if not builder.paths:
        raise _unknown(uri, "no image")
    persons = tuple(dict.fromkeys(map(_label, person_labels)))
    return builder.finish(uri, hashlib.sha256(data).hexdigest()[:12], persons)


class _Builder:
    """Collects images and boxes in any order, then sorts the boxes by image."""

    def __init__(self) -> None:
        self.ids: list[str] = []
        self.paths: list[str] = []
        self.sizes: list[tuple[int, int]] = []
        self.rows: list[int] = []
        self.boxes: list[Box] = []
        self.labels: list[int] = []
        self.scores: list[float] = []
        self.names: dict[str, int] = {}

    def add_image(self, path: str, image_id: str = "", size: tuple[int, int] = (0, 0)) -> int:
        if "\0" in path or any("\ud800" <= letter <= "\udfff" for letter in path):
            raise _LayoutError(f"the file name {path!r}")
        self.ids.append(image_id or path)
        self.paths.append(path)
        self.sizes.append(size)
        return len(self.paths) - 1

    def add_box(self, row: int, box: Box, label: str | None, score: float = 1.0) -> None:
        self.rows.append(row)
        self.boxes.append(box)
        self.labels.append(self.names.setdefault(label, len(self.names)) if label else -1)
        self.scores.append(score)

    def finish(self, uri: str, digest: str, person_labels: tuple[str, ...]) -> GivenBoxes:
        rows = np.array(self.rows, dtype=np.int64)
        order = np.argsort(rows, kind="stable")
        counts = np.bincount(rows, minlength=len(self.paths))
        if len(self.names) > np.iinfo(np.int16).max:
            raise DataError(f"{uri} has {len(self.names)} different labels: too many")
        paths = pa.array(self.paths, pa.string())
        return GivenBoxes(
            uri=uri,
            digest=digest,
            ids=paths if self.ids == self.paths else pa.array(self.ids, pa.string()),
            paths=paths,
            sizes_N2=np.array(self.sizes, dtype=np.int32).reshape(-1, 2),
            starts=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
            boxes_M4=np.array(self.boxes, dtype=np.float64).reshape(-1, 4)[order],
            labels_M=np.array(self.labels, dtype=np.int16)[order],
            scores_M=np.array(self.scores, dtype=np.float32)[order],
            label_names=tuple(self.names),
            person_labels=person_labels,
        )


def _parse_json(data: bytes, uri: str) -> Any:
    if not data.strip():
        raise _unknown(uri, "an empty file")
    if data[0] == 0x80 and 2 <= (data[1] if len(data) > 1 else 0) <= 5:
        raise _unknown(uri, "a Python pickle, which runs code when it is loaded")
    if data.startswith(b"MATLAB"):
        raise _unknown(uri, "a MATLAB file")
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise _unknown(uri, f"neither Parquet nor readable JSON ({reason})") from None


def _read_layout(value: Any, uri: str) -> _Builder:
    """Read parsed JSON in the layout that it has."""
    try:
        if isinstance(value, dict):
            if {"images", "annotations"} <= value.keys():
                return _read_coco(value, uri)
            if {"filenames", "annotation"} <= value.keys():
                return _read_hicodet(value, uri)
            keys = ", ".join(map(repr, value))[:200] or "no keys"
            raise _unknown(uri, f"an object with {keys}")
        if isinstance(value, list):
            first = value[0] if value else None
            if isinstance(first, dict) and {"file_name", "annotations"} <= first.keys():
                return _read_image_list(value, uri)
            if isinstance(first, dict) and {"image_id", "bbox"} <= first.keys():
                raise _unknown(uri, "COCO results, which name no files: give them with `images`")
            keys = f" with {', '.join(map(repr, first))}"[:200] if isinstance(first, dict) else ""
            raise _unknown(uri, f"a list that begins with {_kind(first)}{keys}")
    except _LayoutError as error:
        raise _unknown(uri, str(error)) from None
    raise _unknown(uri, _kind(value))


def _read_coco(value: dict[str, Any], uri: str) -> _Builder:
    builder = _Builder()
    names = {
        _key(category, "id", f"categories[{n}]"): _label(
            _text(category, "name", f"categories[{n}]")
        )
        for n, category in enumerate(_list(value.get("categories") or [], "categories"))
    }
    rows: dict[Any, int] = {}
    for n, image in enumerate(_list(value["images"], "images")):
        where = f"images[{n}]"
        key = _key(image, "id", where)
        if key in rows:
            raise _LayoutError(f"two images with the id {key!r}")
        size = (_whole(image.get("width")), _whole(image.get("height")))
        rows[key] = builder.add_image(_text(image, "file_name", where), size=size)
    for n, annotation in enumerate(_list(value["annotations"], "annotations")):
        where = f"annotations[{n}]"
        row = rows.get(_key(annotation, "image_id", where))
        # Subsets of COCO often keep the annotations of the images that they left out.
        if row is None or annotation.get("iscrowd") in (1, True):
            continue
        label = None
        if names and annotation.get("category_id") is not None:
            key = _key(annotation, "category_id", where)
            if key not in names:
                raise _LayoutError(f"{where} with the category {key!r}, which categories lack")
            label = names[key]
        left, top, width, height = _box(annotation.get("bbox"))
        score = annotation.get("score")
        score = 1.0 if score is None else _number(score)
        builder.add_box(row, (left, top, left + width, top + height), label, score)
    return builder


def _read_image_list(value: list[Any], uri: str) -> _Builder:
    """Read the layout of trainval_hico.json (PPDM, QPIC): boxes as corners, COCO's ids."""
    builder = _Builder()
    for n, image in enumerate(value):
        where = f"[{n}]"
        row = builder.add_image(_text(image, "file_name", where))
        for m, item in enumerate(_list(image.get("annotations"), f"{where}.annotations")):
            place = f"{where}.annotations[{m}]"
            key = _key(item, "category_id", place)
            name = _COCO.get(int(key)) if str(key).isdecimal() else None
            if name is None:
                raise _LayoutError(f"{place} with the category {key!r}, which is none of COCO's")
            builder.add_box(row, _box(item.get("bbox")), name)
    return builder


def _read_hicodet(value: dict[str, Any], uri: str) -> _Builder:
    """Read the layout of instances_train2015.json (pocket, SCG, UPT)."""
    builder = _Builder()
    files = _list(value["filenames"], "filenames")
    annotations = _list(value["annotation"], "annotation")
    sizes = _list(value.get("size") or [[0, 0]] * len(files), "size")
    names = [
        _label(name) if isinstance(name, str) else ""
        for name in _list(value.get("objects") or [], "objects")
    ]
    if not len(files) == len(annotations) == len(sizes):
        raise _LayoutError(
            f"{len(files)} filenames, {len(annotations)} annotation and {len(sizes)} size entries"
        )
    for n, (file, annotation, size) in enumerate(zip(files, annotations, sizes, strict=True)):
        where = f"annotation[{n}]"
        if not isinstance(file, str) or not file:
            raise _LayoutError(f"filenames[{n}] = {_kind(file)}")
        pair = _list(size, f"size[{n}]")
        known = (_whole(pair[0]), _whole(pair[1])) if len(pair) == 2 else (0, 0)
        row = builder.add_image(file, size=known)
        if not isinstance(annotation, dict):
            raise _LayoutError(f"{where} = {_kind(annotation)}")
        humans = _list(annotation.get("boxes_h"), f"{where}.boxes_h")
        things = _list(annotation.get("boxes_o"), f"{where}.boxes_o")
        objects = _list(annotation.get("object") or [None] * len(things), f"{where}.object")
        if not len(humans) == len(things) == len(objects):
            raise _LayoutError(
                f"{where} with {len(humans)} boxes_h, {len(things)} boxes_o and"
                f" {len(objects)} object entries"
            )
        for human in dict.fromkeys(map(_box_from_1, humans)):
            builder.add_box(row, human, _PERSON)
        labels = [_object_name(names, index, where) for index in objects]
        for thing, label in dict.fromkeys(zip(map(_box_from_1, things), labels, strict=True)):
            builder.add_box(row, thing, label)
    return builder


def _object_name(names: Sequence[str], index: Any, where: str) -> str:
    if not names or index is None:
        return "object"
    if not isinstance(index, int) or not 0 <= index < len(names):
        raise _LayoutError(f"{where} with the object {index!r}, which objects lack")
    return names[index] or "object"


def _read_parquet(data: bytes, uri: str) -> _Builder:
    try:
        table = pq.read_table(io.BytesIO(data))
    except (pa.ArrowException, OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise _unknown(uri, f"damaged Parquet ({reason})") from None
    names = table.column_names
    keys = [name for name in ("image_id", "file_name", "uri") if name in names]
    if not keys or "boxes" not in names:
        raise _unknown(uri, f"Parquet with the columns {', '.join(names) or 'none'}")
    try:
        return _read_columns(table, keys)
    except _LayoutError as error:
        raise _unknown(uri, f"Parquet with {error}") from None


def _read_columns(table: pa.Table, keys: Sequence[str]) -> _Builder:
    builder = _Builder()
    path_key = keys[1] if len(keys) > 1 and keys[0] == "image_id" else keys[0]
    boxes, counts = _box_column(table["boxes"])
    labels = _list_column(table, "labels", counts, pa.string())
    scores = _list_column(table, "scores", counts, pa.float64())
    ids, paths = (_text_column(table, key) for key in (keys[0], path_key))
    position = 0
    for n, count in enumerate(counts):
        image_id, path = ids[n], paths[n]
        if not image_id or not path:
            raise _LayoutError(f"no {path_key if image_id else keys[0]} in row {n}")
        row = builder.add_image(path, image_id=image_id)
        for index in range(position, position + count):
            label = labels[index] if labels is not None else None
            score = scores[index] if scores is not None else None
            builder.add_box(
                row, boxes[index], _label(label) if label else None, 1.0 if score is None else score
            )
        position += count
    return builder


def _text_column(table: pa.Table, name: str) -> list[str | None]:
    column = table[name]
    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    # A cast would make strings of numbers and so hide that no image has such an id.
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise _LayoutError(f"a column {name} of type {column.type}: it must be string")
    texts: list[str | None] = column.to_pylist()
    return texts


def _box_column(column: pa.ChunkedArray) -> tuple[list[Box], list[int]]:
    """Return the boxes of all rows and how many each row has; null rows have none."""
    try:
        lists = column.cast(pa.list_(pa.list_(pa.float64()))).to_pylist()
    except (pa.ArrowException, ValueError):
        raise _LayoutError(
            f"boxes of type {column.type}: it must be list<list<float>> with four numbers a box"
        ) from None
    rows = [row or [] for row in lists]
    return [_box(box) for row in rows for box in row], [len(row) for row in rows]


def _list_column(
    table: pa.Table, name: str, counts: Sequence[int], kind: pa.DataType
) -> list[Any] | None:
    """Return the flat values of an optional column that has one entry a box."""
    if name not in table.column_names:
        return None
    try:
        lists = table[name].cast(pa.list_(kind)).to_pylist()
    except (pa.ArrowException, ValueError):
        raise _LayoutError(
            f"{name} of type {table[name].type}: it must be list<{kind}>, one a box"
        ) from None
    for n, (row, count) in enumerate(zip(lists, counts, strict=True)):
        if row is not None and len(row) != count:
            raise _LayoutError(f"{len(row)} {name} for {count} boxes in row {n}")
    rows = zip(lists, counts, strict=True)
    return [item for row, count in rows for item in (row if row is not None else [None] * count)]


class _LayoutError(Exception):
    """What was found in a file instead of one of the layouts."""


def _unknown(uri: str, found: str) -> DataError:
    return DataError(f"{uri} has no boxes that can be read: found {found}; accepted are {FORMATS}")


def _list(value: Any, where: str) -> list[Any]:
    if not isinstance(value, list):
        raise _LayoutError(f"{where} = {_kind(value)} where a list belongs")
    return value


def _text(item: Any, name: str, where: str) -> str:
    text = item.get(name) if isinstance(item, dict) else None
    if not isinstance(text, str) or not text:
        raise _LayoutError(f"{where} without a {name}")
    return text


def _key(item: Any, name: str, where: str) -> int | str:
    key = item.get(name) if isinstance(item, dict) else None
    if isinstance(key, bool) or not isinstance(key, int | str):
        raise _LayoutError(f"{where} without a {name}")
    return key


def _kind(value: Any) -> str:
    kinds = {dict: "object", list: "list", str: "text", type(None): "null", bool: "boolean"}
    return kinds.get(type(value), "number")


def _box(value: Any) -> Box:
    """Return four numbers as they stand; NaN for what is no box."""
    if not isinstance(value, list) or len(value) != 4:
        return _NOT_A_BOX
    left, top, right, bottom = map(_number, value)
    return (left, top, right, bottom)


def _box_from_1(value: Any) -> Box:
    """Bring pixels counted from 1, the last one included, to corners counted from 0."""
    left, top, right, bottom = _box(value)
    return (left - 1, top - 1, right, bottom)


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return math.nan
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _whole(value: Any) -> int:
    """Return a side in pixels, 0 where it is not told."""
    number = _number(value)
    return int(number) if 1 <= number < 1 << 31 else 0


def _label(text: str) -> str:
    return " ".join(text.replace("_", " ").lower().split())


def _index(keys: Iterable[str]) -> dict[str, list[int]]:
    index: dict[str, list[int]] = {}
    for row, key in enumerate(keys):
        index.setdefault(key, []).append(row)
    return index


def _path_of(uri: str) -> str:
    """Return the path of a URI, its escapes undone; a local path as it stands."""
    return unquote(urlsplit(uri).path) if "://" in uri else uri


def _file_name(path: str) -> str:
    return path.rpartition("/")[2]


def _stem(path: str) -> str:
    folder, slash, name = path.rpartition("/")
    return folder + slash + (name.rpartition(".")[0] or name)
