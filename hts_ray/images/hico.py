"""The HICO download as a manifest: `anno.mat` and the image folders beside it.

Source: Chao et al., "HICO: A Benchmark for Recognizing Human-Object Interactions in Images",
ICCV 2015.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from hts_ray.classes import ClassTable, hico_classes
from hts_ray.errors import ConfigError, DataError
from hts_ray.images.mat5 import Mat5Error, read_mat5
from hts_ray.images.prepared import Candidate, Found, Rows, manifest_table
from hts_ray.store import storage

SPLITS = ("train", "test")
ANNO_FILE = "anno.mat"
LABELS = (1, -1, 0)  # positive, negative, ambiguous; NaN is unknown

_LAYOUT = "expected anno.mat, images/train2015 and images/test2015"


def read_hico(root: str, splits: Sequence[str] = SPLITS) -> Found:
    """Read a HICO download: `root` holds `anno.mat` and `images/{train,test}2015`.

    `image_id` is the file name without its extension. `counts` has `unlisted`, the files of the
    image folders that `anno.mat` does not name, and `class_order_unchecked`, 1 for an `anno.mat`
    without `list_action`. Raises DataError when the layout or `anno.mat` is not HICO's,
    ConfigError for other splits.
    """
    if not splits or not set(splits) <= set(SPLITS):
        raise ConfigError(field="splits", value=list(splits), remedy="choose train, test or both")
    root = storage.absolute(root)
    path = storage.join(root, ANNO_FILE)
    if not storage.exists(path):
        raise DataError(
            f"no {ANNO_FILE} in {root} ({_LAYOUT}){_nested(root)}:"
            " images without annotations are read with `hts prepare folder`"
        )
    variables = _load(path)
    chosen = list(dict.fromkeys(splits))
    found = Rows()
    found.counts["unlisted"] = 0
    found.counts["class_order_unchecked"] = int("list_action" not in variables)
    for split, candidates in _read_splits(variables, chosen, path).items():
        folder = storage.join(root, "images", f"{split}2015")
        if not storage.exists(folder):
            raise DataError(
                f"no folder {folder} ({_LAYOUT}): unpack the images there, or leave"
                f" {split!r} out of splits"
            )
        listed = {image.uri for image in candidates}
        found.counts["unlisted"] += len(set(storage.list_names(folder)) - listed)
        for image in candidates:
            found.add(replace(image, uri=storage.join(folder, image.uri)))
    return Found(found.table(), found.counts)


def read_anno_table(path: str) -> pa.Table:
    """Return the annotations of an `anno.mat` as a manifest, without looking at images.

    Reads the splits that the file has. `uri` is the file name, width and height are null. Raises
    DataError when the file is not HICO's.
    """
    variables = _load(path)
    there = [s for s in SPLITS if f"anno_{s}" in variables or f"list_{s}" in variables]
    if not there:
        raise DataError(f"{path} has neither anno_train nor anno_test: it is no HICO anno.mat")
    images = chain(*_read_splits(variables, there, path).values())
    return manifest_table(images)


def _nested(root: str) -> str:
    """Name the folder below `root` that holds anno.mat: the archive has one of its own."""
    for name in storage.list_names(root):
        inner = storage.join(root, name)
        if storage.exists(storage.join(inner, ANNO_FILE)):
            return f", but {inner} has one: give that folder"
    return ""


def _load(path: str) -> dict[str, Any]:
    """Return the HICO variables of a MATLAB v5 file; DataError for any other file."""
    try:
        data = storage.read_bytes(path)
    except FileNotFoundError as error:
        raise DataError(f"no file {path}: check the path") from error
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    _check_format(data, path)
    names = ["list_action", *(f"{kind}_{split}" for kind in ("list", "anno") for split in SPLITS)]
    try:
        loaded = read_mat5(data, names)
    except Mat5Error as error:
        raise DataError(
            f"{path} is damaged or cut short ({len(data)} bytes): {error}: download it again"
        ) from error
    return {name: loaded[name] for name in names if name in loaded}


def _check_format(data: bytes, path: str) -> None:
    if not data:
        raise DataError(f"{path} is empty: download it again")
    if data.startswith(b"MATLAB 7.3") or b"\x89HDF\r\n" in data[:1024]:
        raise DataError(
            f"{path} is a MATLAB 7.3 (HDF5) file: save it with `save -v7` in MATLAB, or take"
            " the original anno.mat (version 5)"
        )
    if data[0] == 0x80 and data[1:2] and 2 <= data[1] <= 5:
        raise DataError(
            f"{path} is a Python pickle, which runs code when it is loaded: refused; give a"
            " MATLAB v5 file"
        )
    if data[124:128] not in (b"\x00\x01IM", b"\x01\x00MI"):  # version and byte order
        raise DataError(
            f"{path} is not a MATLAB v5 file (it begins with {data[:16]!r}): give HICO's anno.mat"
        )


def _read_splits(
    variables: dict[str, Any], splits: Sequence[str], path: str
) -> dict[str, list[Candidate]]:
    """Return the images of each split; their `uri` is the file name alone."""
    classes = hico_classes()
    for split in splits:
        for name in (f"list_{split}", f"anno_{split}"):
            if name not in variables:
                raise DataError(
                    f"{path} has no variable {name} (it has {', '.join(variables) or 'none'}):"
                    " give HICO's anno.mat, or leave the split out"
                )
    if "list_action" in variables:
        _check_actions(variables["list_action"], classes, path)
    read = {split: _read_split(variables, split, classes, path) for split in splits}
    seen: dict[str, str] = {}
    for image in chain(*read.values()):
        if image.image_id in seen:
            raise DataError(
                f"{path}: {seen[image.image_id]!r} and {image.uri!r} have the same image id"
                f" {image.image_id!r}: list every image once"
            )
        seen[image.image_id] = image.uri
    return read


def _read_split(
    variables: dict[str, Any], split: str, classes: ClassTable, path: str
) -> list[Candidate]:
    files = _strings(variables[f"list_{split}"], f"list_{split}", path)
    for row, file in enumerate(files):
        if not file or "/" in file or "\\" in file or file in (".", ".."):
            raise DataError(f"{path}: list_{split}[{row}] = {file!r} is not a file name")
    anno = _checked_anno(variables[f"anno_{split}"], f"anno_{split}", len(files), classes, path)
    ids = ([classes.ids[row].tolist() for row in (anno == label).T] for label in LABELS)
    return [
        Candidate(file.rpartition(".")[0] or file, file, split, *of_image)
        for file, *of_image in zip(files, *ids, strict=True)
    ]


def _checked_anno(
    anno: Any, name: str, images: int, classes: ClassTable, path: str
) -> npt.NDArray[np.floating[Any]]:
    count = len(classes)
    if not isinstance(anno, np.ndarray) or anno.dtype.kind != "f":
        kind = getattr(anno, "dtype", type(anno).__name__)
        raise DataError(
            f"{path}: {name} is {kind}: it must be a full matrix of doubles, in which NaN is"
            " unknown (integers cannot hold it)"
        )
    if anno.shape != (count, images):
        turned = " (it is transposed)" if anno.shape == (images, count) else ""
        raise DataError(
            f"{path}: {name} is {'x'.join(map(str, anno.shape))}{turned}: it must be"
            f" {count}x{images}, classes by files of list_{name.removeprefix('anno_')}"
        )
    wrong = ~(np.isnan(anno) | np.isin(anno, LABELS))
    if wrong.any():
        row, column = np.argwhere(wrong)[0]
        raise DataError(
            f"{path}: {name}[{row}, {column}] = {anno[row, column]:g}, {int(wrong.sum())} such"
            " values: only 1, -1, 0 and NaN have a meaning"
        )
    return anno


def _check_actions(actions: Any, classes: ClassTable, path: str) -> None:
    """Raise DataError unless `list_action` names the packaged classes in their order."""
    pairs = [(_field(a, "vname"), _field(a, "nname")) for a in np.asarray(actions).ravel()]
    if len(pairs) != len(classes):
        raise DataError(
            f"{path}: list_action has {len(pairs)} classes, HICO has {len(classes)}:"
            " give HICO's anno.mat"
        )
    for row, (pair, known) in enumerate(zip(pairs, classes, strict=True)):
        if pair != (known.verb, known.object):
            raise DataError(
                f"{path}: list_action[{row}] is {pair[0]!r} {pair[1]!r}, HICO's order has"
                f" {known.verb!r} {known.object!r} there: the rows of this file mean other"
                " classes"
            )


def _plain(value: Any) -> Any:
    """Take a value out of the 1x1 arrays that MATLAB puts around cells and structs."""
    while isinstance(value, np.ndarray) and value.size == 1:
        value = value.ravel()[0]
    return value


def _field(action: Any, name: str) -> str | None:
    try:
        value = _plain(_plain(action)[name])
    except (IndexError, KeyError, TypeError, ValueError):
        return None
    return "_".join(value.replace("_", " ").split()) if isinstance(value, str) else None


def _strings(cells: Any, name: str, path: str) -> list[str]:
    strings = []
    for row, cell in enumerate(np.asarray(cells).ravel()):
        value = _plain(cell)
        if not isinstance(value, str):
            raise DataError(f"{path}: {name}[{row}] is {type(value).__name__}, not a file name")
        strings.append(str(value).strip())
    if not strings:
        raise DataError(f"{path}: {name} is empty")
    return strings
