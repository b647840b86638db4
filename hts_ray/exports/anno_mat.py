"""HICO's `anno.mat` (MATLAB v5), as the benchmark's and the paper's code read it.

1 is positive, -1 negative, 0 ambiguous (in pseudo-labels: undecided), NaN unknown. Pseudo-labels
have no unknowns: what the teacher gave no evidence for is -1. Those of HICO's 600 classes that a
run leaves out are NaN. Source: Chao et al., "HICO", ICCV 2015, and the files of its download.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hts_ray.classes import NO_INTERACTION, VERB_PHRASES, ClassTable, hico_classes
from hts_ray.errors import ConfigError, DataError
from hts_ray.exports.records import Context, LabeledImage
from hts_ray.images.hico import SPLITS

_LARGEST_MATRIX = 2**31 - 2**20  # bytes of a variable in MATLAB v5


def anno_variables(images: Iterable[LabeledImage], context: Context) -> dict[str, Any]:
    """Return `list_action`, and `list_SPLIT` and `anno_SPLIT` of both splits.

    Raises ConfigError for classes that are not HICO's or splits other than train and test,
    DataError when two images have the same file name: the format keeps nothing else of them.
    """
    classes = hico_classes()
    _require_hico(context.class_table, classes)
    files: dict[str, list[str]] = {split: [] for split in SPLITS}
    columns: dict[str, list[npt.NDArray[np.int8]]] = {split: [] for split in SPLITS}
    known = np.array([classes.index_of(i) for i in context.class_table.ids], dtype=np.int64)
    for image in images:
        if image.split not in SPLITS:
            raise ConfigError(
                f"anno.mat has the splits train and test, this run has {image.split!r}",
                field="--format",
                value="anno-mat",
                remedy="export one with --split, or take another format",
            )
        files[image.split].append(image.uri.rstrip("/").replace("\\", "/").rsplit("/", 1)[-1])
        columns[image.split].append(_codes(image, known, classes))
    _require_unique([name for names in files.values() for name in names])
    variables: dict[str, Any] = {"list_action": _actions(classes)}
    for split in SPLITS:
        if files[split]:  # readers do not expect an empty one
            variables[f"list_{split}"] = np.array(files[split], dtype=object).reshape(-1, 1)
            variables[f"anno_{split}"] = _matrix(columns[split])
    return variables


def write_anno_mat(images: Iterable[LabeledImage], context: Context, target: Path) -> None:
    """Write `anno_variables`, compressed as HICO's file is."""
    from scipy.io import savemat

    variables = anno_variables(images, context)
    for name, value in variables.items():
        if value.dtype == np.float64 and value.nbytes > _LARGEST_MATRIX:
            raise DataError(
                f"{name} has {value.nbytes / 2**30:.1f} GiB, a MATLAB v5 variable at most 2:"
                " export the splits apart, or take another format"
            )
    with open(target, "wb") as stream:
        savemat(stream, variables, format="5", do_compression=True)


_UNKNOWN = 9  # in bytes, which have no NaN


def _codes(
    image: LabeledImage, known: npt.NDArray[np.int64], classes: ClassTable
) -> npt.NDArray[np.int8]:
    """Return one column in bytes: 600 doubles an image would be eight times as large."""
    column = np.full(len(classes), _UNKNOWN, dtype=np.int8)
    if image.negative_ids is None:
        column[known] = -1
    else:
        column[[classes.index_of(i) for i in image.negative_ids]] = -1
    column[[classes.index_of(i) for i in image.ignored_ids]] = 0
    column[[classes.index_of(i) for i in image.positive_ids]] = 1
    return column


def _matrix(columns: Sequence[npt.NDArray[np.int8]]) -> npt.NDArray[np.float64]:
    matrix = np.stack(columns, axis=1).astype(np.float64)
    matrix[matrix == _UNKNOWN] = np.nan
    return matrix


def _actions(classes: ClassTable) -> npt.NDArray[np.void]:
    fields = [("nname", object), ("vname", object), ("vname_ing", object)]
    # HICO writes its own name where there is no interaction.
    words = VERB_PHRASES | {NO_INTERACTION: NO_INTERACTION}
    rows = [(c.object, c.verb, words[c.verb or ""].replace(" ", "_")) for c in classes]
    return np.array(rows, dtype=fields).reshape(len(classes), 1)


def _require_hico(table: ClassTable, classes: ClassTable) -> None:
    for of_class in table:
        place = classes.positions.get(of_class.class_id)
        known = None if place is None else classes[place]
        if known is None or (known.verb, known.object) != (of_class.verb, of_class.object):
            raise ConfigError(
                f"class {of_class.class_id} is {of_class.name!r}, and anno.mat holds HICO's 600"
                " verb-object pairs alone",
                field="--format",
                value="anno-mat",
                remedy="take csv, parquet, coco, huggingface or webdataset",
            )


def _require_unique(files: Sequence[str]) -> None:
    stems = Counter(name.rpartition(".")[0] or name for name in files)
    twice = [stem for stem, count in stems.items() if count > 1]
    if twice:
        raise DataError(
            f"{len(twice)} file names occur more than once ({twice[0]!r} is one), and anno.mat"
            " knows images only by their file names without suffix: take another format"
        )
