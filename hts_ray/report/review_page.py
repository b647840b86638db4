"""`hts report --review`: a page on which people correct the machine's labels, without a server.

The page holds its images and keeps what was decided in the browser; what it saves is read by
`hts_ray.review.corrected_files`.

Shapes: N images, R regions of one image, C classes.
"""

from __future__ import annotations

import shlex
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from hts_ray.errors import DataError
from hts_ray.labels.passes import made_from
from hts_ray.report.formatting import finite
from hts_ray.report.gallery import scored_images
from hts_ray.report.label_quality import Row
from hts_ray.report.page import content_security_hash, environment, packaged
from hts_ray.report.read_run import read_run
from hts_ray.report.results import last_part
from hts_ray.store import storage
from hts_ray.store.run import require_stage

FORMAT, VERSION = "hts-review", 1  # of the file that the page saves
PAGE_BYTES = 30_000_000  # JPEG bytes of a page's images, which are a third more in the file
_IMAGE_BYTES, _IMAGE_SIDE = 60_000, 900  # the most for one image
_SIDE_OF_BYTES = 4  # a photograph of s x 3/4 s pixels has about (s / 4) ** 2 bytes
_ROWS, _LEAST_OTHERS = 9, 3  # classes that a digit reaches; listed beside the machine's labels
_POSITIVE, _UNDECIDED, _NEGATIVE = range(3)  # what the machine says of a listed class


@dataclass(frozen=True)
class ReviewPage:
    """A page that was written: its path and bytes, its images and those among them drawn at random.

    `unreadable` images could not be shown, `corrected` ones were corrected before.
    """

    path: str
    size: int
    images: int
    random: int
    unreadable: int
    corrected: int


def write_review_page(run_dir: str, path: str | None = None, max_images: int = 200) -> ReviewPage:
    """Write the page for up to `max_images` labeled images, `review.html` in the run by default.

    Raises DataError when the run has no pseudo-labels, when their teacher pass is gone, or when
    no labeled image is left to look at.
    """
    stage = require_stage(run_dir, "pseudo_labels", "filter")
    found = read_run(run_dir, stage)
    made = storage.read_object(stage.file("table.json"))
    passes = made_from(stage.run_dir, made)
    if found.labels is None or found.classes is None or not passes:
        raise DataError(
            f"{stage.path} has lost its teacher pass or classes.csv, which say where a label was"
            " seen: run `hts label` and `hts filter`"
        )
    corrected = {*made.get("corrected_ids", ())} & {*found.labels["image_id"].to_pylist()}
    order = review_order(found.labels, corrected, found.config.seed, max_images)
    labels = found.labels.filter(
        pc.is_in(found.labels["image_id"], pa.array([*order], pa.string()))
    )
    labeled = {row["image_id"]: row for row in labels.to_pylist()}
    class_ids = [int(i) for i in passes[0].info["class_ids"]]
    columns = {class_id: column for column, class_id in enumerate(class_ids)}
    max_bytes = min(_IMAGE_BYTES, PAGE_BYTES // max(len(order), 1))
    side = min(_IMAGE_SIDE, round(_SIDE_OF_BYTES * max_bytes**0.5))
    pictures, images = [], []
    split = made.get("split")
    for picture, row, p_RC in scored_images(passes, split, [*order], side, max_bytes):
        name = row["image_id"]
        kept = np.asarray(row["counts"])
        listed = listed_classes(labeled[name], row, np.where(kept[:, None], p_RC, 0.0), columns)
        rows = [[found.classes.index_of(i), *more] for i, *more in listed if i in found.names]
        pictures.append(picture.partition(",")[2])
        images.append([name, int(order[name]), row["width"], row["height"], rows])
    if not images:
        raise DataError(
            f"none of {len(order) or len(found.labels)} labeled images can be shown: they were"
            " corrected before, or their files are gone"
        )
    data = {
        "format": FORMAT,
        "version": VERSION,
        "run": last_part(run_dir),
        "pseudo_labels": f"{stage.table}-{stage.key}",
        "seed": found.config.seed,
        "classes": found.classes.names,
        "images": images,
    }
    path = path or storage.join(run_dir, "review.html")
    page = render_review_page(data, pictures, run_dir).encode()
    storage.write_bytes(path, page)
    unreadable, drawn = len(order) - len(images), sum(image[1] for image in images)
    return ReviewPage(path, len(page), len(images), drawn, unreadable, len(corrected))


def review_order(
    labels: pa.Table, corrected: Collection[str], seed: int, count: int
) -> dict[str, bool]:
    """Return up to `count` image ids in the page's order, and whether each was drawn at random.

    Every second one, the first among them, is drawn at random from all images, the same for the
    same seed: only such images tell how good the labels are on the whole. Between them come the
    others, that with the least probable label first, and those without a label last. `corrected`
    images are left out: their labels are people's.
    """
    labels = labels.filter(
        pc.invert(pc.is_in(labels["image_id"], pa.array(corrected, pa.string())))
    )
    count = min(count, len(labels))
    drawn = np.random.default_rng(seed).permutation(len(labels))[: -(-count // 2)]
    probability = labels["probability"].combine_chunks()
    least_N = np.full(len(labels), np.inf)
    parents = pc.list_parent_indices(probability).to_numpy()
    np.minimum.at(least_N, parents, pc.list_flatten(probability).to_numpy())
    undecided_N = pc.list_value_length(labels["ignored_ids"]).to_numpy()
    doubtful = np.lexsort((-undecided_N, least_N))
    doubtful = doubtful[~np.isin(doubtful, drawn)][: count - len(drawn)]
    at_random = {*drawn.tolist()}
    mixed = chain.from_iterable(zip_longest(drawn.tolist(), doubtful.tolist()))
    ids = labels["image_id"].to_pylist()
    return {ids[row]: row in at_random for row in mixed if row is not None}


def listed_classes(
    labeled: Row, scored: Row, p_RC: npt.NDArray[Any], columns: dict[int, int]
) -> Iterable[tuple[int, float | None, list[int] | None, int]]:
    """Yield (class id, probability, box, what the machine says) of the classes that are listed.

    The machine's positives come first. The most probable others follow, so that a digit reaches
    them too. The box (x, y, width, height) is that of the region where the class is most probable,
    None for the whole image. `columns` says where in `p_RC` (R, C) a class is.
    """
    given = dict(zip(labeled["positive_ids"], labeled["probability"], strict=True))
    undecided = {*labeled["ignored_ids"]}
    best_C = p_RC.max(axis=0, initial=0.0)
    others = [i for i in columns if i not in given]
    others.sort(key=lambda i: -best_C[columns[i]])
    others = others[: max(_ROWS - len(given), _LEAST_OTHERS)]
    for class_id in (*given, *others):
        column = columns.get(class_id)
        p = given.get(class_id, None if column is None else float(best_C[column]))
        region = None if column is None or not len(p_RC) else int(np.argmax(p_RC[:, column]))
        box = None
        if region is not None and scored["region_kinds"][region] != "whole":
            x1, y1, x2, y2 = map(round, scored["boxes"][region])
            box = [x1, y1, max(x2 - x1, 1), max(y2 - y1, 1)]
        said = (
            _POSITIVE if class_id in given else _UNDECIDED if class_id in undecided else _NEGATIVE
        )
        yield class_id, round(p, 4) if finite(p) else None, box, said


def render_review_page(data: Mapping[str, Any], pictures: Sequence[str], run_dir: str) -> str:
    """Return the page as HTML: `data` is what its script needs, a picture base64 of a JPEG."""
    script = packaged("review_page.js")
    words = ["--run-dir", run_dir, "--output", "corrected"]
    return (
        environment()
        .get_template("review_page.html.j2")
        .render(
            data=data,
            pictures=pictures,
            drawn=sum(image[1] for image in data["images"]),
            command=f"hts import-labels FILE {shlex.join(words)}",
            style=packaged("palette.css", "review_page.css"),
            script=script,
            script_hash=content_security_hash(script),
        )
    )
