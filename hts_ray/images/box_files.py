"""Files of boxes: HICO-DET json, COCO json and Parquet, each read into images with boxes."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PlainValidator,
    TypeAdapter,
    ValidationError,
)

from hts_ray.images.regions import Box

FORMATS = (
    "COCO json (images, annotations, categories), HICO-DET json (a list of file_name,"
    " annotations, hoi_annotation; or filenames, annotation with boxes_h and boxes_o), or"
    " Parquet (image_id, file_name or uri; boxes; optional labels and scores)"
)
# MS COCO's object names by category id (Lin et al. 2014), which HICO-DET's files use too.
_COCO_LINES = Path(__file__).with_name("coco_objects.txt").read_text(encoding="utf-8").splitlines()
_COCO = {int(key): name for key, name in (line.split(" ", 1) for line in _COCO_LINES)}
_PERSON = "person"
_NOT_A_BOX: Box = (math.nan, math.nan, math.nan, math.nan)


class LayoutError(Exception):
    """What was found in a file instead of one of the layouts."""


@dataclass
class BoxedImage:
    """An image of a file and its boxes; `width` and `height` in pixels, 0 if the file has none."""

    path: str
    image_id: str | None = None
    width: int = 0
    height: int = 0
    boxes: list[dict[str, Any]] = field(default_factory=list)

    def add(self, box: Box, label: str | None, score: float = 1.0) -> None:
        """Add a box (left, top, right, bottom) in pixels, NaN for what is no box."""
        self.boxes.append({"box": box, "label": label, "score": score})


def read_box_file(data: bytes) -> list[BoxedImage]:
    """Return the images of a file, in its order.

    Raises LayoutError for bytes that are none of FORMATS, and for a file without images.
    """
    images = _read_parquet(data) if data.startswith(b"PAR1") else _read_json(data)
    if not images:
        raise LayoutError("no image")
    return images


def clean_label(text: str) -> str:
    """Return a label in lower case, with single spaces for spaces and underscores."""
    return " ".join(text.replace("_", " ").lower().split())


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return math.nan
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _side(value: Any) -> int:
    """Return a side in pixels, 0 if it is unknown."""
    number = _number(value)
    return int(number) if 1 <= number < 1 << 31 else 0


def _box(value: Any) -> Box:
    """Return four numbers unchanged; NaN for anything else."""
    if not isinstance(value, list) or len(value) != 4:
        return _NOT_A_BOX
    left, top, right, bottom = map(_number, value)
    return (left, top, right, bottom)


def _box_from_1(value: Any) -> Box:
    """Bring pixels counted from 1, the last one included, to corners counted from 0."""
    left, top, right, bottom = _box(value)
    return (left - 1, top - 1, right, bottom)


# A bad box, score or size costs no more than itself, so none of these validators raises.
Key = int | str
Text = Annotated[str, Field(min_length=1)]
Label = Annotated[str, AfterValidator(clean_label)]
Side = Annotated[int, PlainValidator(_side)]
Corners = Annotated[Box, PlainValidator(_box)]
CornersFrom1 = Annotated[Box, PlainValidator(_box_from_1)]
Score = Annotated[float, PlainValidator(lambda score: 1.0 if score is None else _number(score))]


class _Part(BaseModel):
    """A part of a JSON file."""

    model_config = ConfigDict(strict=True)


class _CocoImage(_Part):
    id: Key
    file_name: Text
    width: Side = 0
    height: Side = 0


class _CocoBox(_Part):
    image_id: Key
    category_id: Key | None = None
    bbox: Corners = _NOT_A_BOX
    score: Score = 1.0
    iscrowd: Any = 0


class _CocoCategory(_Part):
    id: Key
    name: Annotated[Text, AfterValidator(clean_label)]


class _Coco(_Part):
    images: list[_CocoImage]
    annotations: list[_CocoBox]
    categories: list[_CocoCategory] | None = None


class _ListedBox(_Part):
    category_id: Key
    bbox: Corners = _NOT_A_BOX


class _ListedImage(_Part):
    """Of trainval_hico.json (PPDM, QPIC): boxes as corners, COCO's category ids."""

    file_name: Text
    annotations: list[_ListedBox]


class _Pairs(_Part):
    boxes_h: list[CornersFrom1]
    boxes_o: list[CornersFrom1]
    object: list[int | None] | None = None


class _HicoDet(_Part):
    """The layout of instances_train2015.json (pocket, SCG, UPT)."""

    filenames: list[Text]
    annotation: list[_Pairs]
    objects: list[Label] | None = None
    size: list[list[Any]] | None = None


Layout = TypeVar("Layout")


def _checked(layout: type[Layout], value: Any) -> Layout:
    try:
        return TypeAdapter(layout).validate_python(value)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        # Of a union the place ends in the type that was tried.
        place = [part for part in first["loc"] if part not in ("int", "str")]
        where = "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in place)
        reason = first["msg"].partition(" or instance of ")[0]
        raise LayoutError(f"{where.lstrip('.')}: {reason}") from None


def _read_json(data: bytes) -> list[BoxedImage]:
    """Read JSON in the layout that it has."""
    value = _parsed(data)
    if isinstance(value, dict):
        if {"images", "annotations"} <= value.keys():
            return _read_coco(_checked(_Coco, value))
        if {"filenames", "annotation"} <= value.keys():
            return _read_hicodet(_checked(_HicoDet, value))
        raise LayoutError(f"an object with {', '.join(map(repr, value))[:200] or 'no keys'}")
    if isinstance(value, list):
        first = value[0] if value else None
        keys = first.keys() if isinstance(first, dict) else set()
        if {"file_name", "annotations"} <= keys:
            return _read_listed(_checked(list[_ListedImage], value))
        if {"image_id", "bbox"} <= keys:
            raise LayoutError("COCO results, which name no files: give them with `images`")
        more = f" with {', '.join(map(repr, keys))}"[:200] if keys else ""
        raise LayoutError(f"a list that begins with {_kind(first)}{more}")
    raise LayoutError(_kind(value))


def _parsed(data: bytes) -> Any:
    if not data.strip():
        raise LayoutError("an empty file")
    if data[0] == 0x80 and 2 <= (data[1] if len(data) > 1 else 0) <= 5:
        raise LayoutError("a Python pickle, which runs code when it is loaded")
    if data.startswith(b"MATLAB"):
        raise LayoutError("a MATLAB file")
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise LayoutError(f"neither Parquet nor readable JSON ({reason})") from None


def _read_coco(file: _Coco) -> list[BoxedImage]:
    names = {category.id: category.name for category in file.categories or []}
    images: dict[Key, BoxedImage] = {}
    for image in file.images:
        if image.id in images:
            raise LayoutError(f"two images with the id {image.id!r}")
        images[image.id] = BoxedImage(image.file_name, None, image.width, image.height)
    for n, found in enumerate(file.annotations):
        # Subsets of COCO often keep the annotations of the images that they left out.
        if found.image_id not in images or found.iscrowd in (1, True):
            continue
        key = found.category_id
        if names and key is not None and key not in names:
            raise LayoutError(f"annotations[{n}] with the category {key!r}, which categories lack")
        left, top, width, height = found.bbox
        label = None if key is None else names.get(key)
        images[found.image_id].add((left, top, left + width, top + height), label, found.score)
    return list(images.values())


def _read_listed(file: list[_ListedImage]) -> list[BoxedImage]:
    images = []
    for n, listed in enumerate(file):
        image = BoxedImage(listed.file_name)
        for m, found in enumerate(listed.annotations):
            key = found.category_id
            name = _COCO.get(int(key)) if str(key).isdecimal() else None
            if name is None:
                raise LayoutError(
                    f"[{n}].annotations[{m}] with the category {key!r}, which is none of COCO's"
                )
            image.add(found.bbox, name)
        images.append(image)
    return images


def _read_hicodet(file: _HicoDet) -> list[BoxedImage]:
    sizes = file.size or [[0, 0]] * len(file.filenames)
    _require_equal("", filenames=file.filenames, annotation=file.annotation, size=sizes)
    images = []
    names: dict[int | None, str] = dict(enumerate(file.objects or []))
    rows = zip(file.filenames, file.annotation, sizes, strict=True)
    for n, (path, pairs, size) in enumerate(rows):
        where, things = f"annotation[{n}]", pairs.boxes_o
        objects = pairs.object or [None] * len(things)
        _require_equal(f"{where} with ", boxes_h=pairs.boxes_h, boxes_o=things, object=objects)
        unknown = [index for index in objects if names and not (index is None or index in names)]
        if unknown:
            raise LayoutError(f"{where} with the object {unknown[0]!r}, which objects lack")
        labels = [names.get(index, "") or "object" for index in objects]
        image = BoxedImage(path, None, *(map(_side, size) if len(size) == 2 else ()))
        # Every pair repeats its boxes.
        for box in dict.fromkeys(pairs.boxes_h):
            image.add(box, _PERSON)
        for box, label in dict.fromkeys(zip(things, labels, strict=True)):
            image.add(box, label)
        images.append(image)
    return images


def _require_equal(where: str, **lists: Sequence[Any]) -> None:
    if len({len(values) for values in lists.values()}) > 1:
        *first, last = (f"{len(values)} {name}" for name, values in lists.items())
        raise LayoutError(f"{where}{', '.join(first)} and {last} entries")


def _read_parquet(data: bytes) -> list[BoxedImage]:
    try:
        table = pq.read_table(io.BytesIO(data))
    except (pa.ArrowException, OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise LayoutError(f"damaged Parquet ({reason})") from None
    names = table.column_names
    keys = [name for name in ("image_id", "file_name", "uri") if name in names]
    if not keys or "boxes" not in names:
        raise LayoutError(f"Parquet with the columns {', '.join(names) or 'none'}")
    path_key = keys[1] if len(keys) > 1 and keys[0] == "image_id" else keys[0]
    ids, paths = (_text_column(table, key) for key in (keys[0], path_key))
    boxes = _list_column(table, "boxes", pa.list_(pa.float64()))
    labels = _list_column(table, "labels", pa.string())
    scores = _list_column(table, "scores", pa.float64())
    images = []
    for n, (image_id, path) in enumerate(zip(ids, paths, strict=True)):
        if not image_id or not path:
            raise LayoutError(f"Parquet with no {path_key if image_id else keys[0]} in row {n}")
        count = len(boxes[n] or [])
        image = BoxedImage(path, None if image_id == path else image_id)
        for name, column in (("labels", labels), ("scores", scores)):
            if column[n] is not None and len(column[n]) != count:
                raise LayoutError(
                    f"Parquet with {len(column[n])} {name} for {count} boxes in row {n}"
                )
        rows = (boxes[n] or [], labels[n] or [None] * count, scores[n] or [None] * count)
        for box, label, mark in zip(*rows, strict=True):
            score = 1.0 if mark is None else mark
            image.add(_box(box), clean_label(label) if label else None, score)
        images.append(image)
    return images


def _text_column(table: pa.Table, name: str) -> list[str | None]:
    column = table[name]
    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    # A cast would make strings of numbers and so hide that no image has such an id.
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise LayoutError(f"Parquet with a column {name} of type {column.type}: it must be string")
    texts: list[str | None] = column.to_pylist()
    return texts


def _list_column(table: pa.Table, name: str, kind: pa.DataType) -> list[Any]:
    """Return each row's list of a column that has one entry a box; None where there is none."""
    if name not in table.column_names:
        return [None] * len(table)
    try:
        rows: list[Any] = table[name].cast(pa.list_(kind)).to_pylist()
    except (pa.ArrowException, ValueError):
        raise LayoutError(
            f"Parquet with {name} of type {table[name].type}: it must be list<{kind}>, one entry a"
            " box, and a box four numbers"
        ) from None
    return rows


def _kind(value: Any) -> str:
    kinds = {dict: "object", list: "list", str: "text", type(None): "null", bool: "boolean"}
    return kinds.get(type(value), "number")
