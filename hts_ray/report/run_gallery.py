"""The gallery of a run: some of its images, read again and made small, with their regions.

Shapes: R regions of one image, C classes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pads

from hts_ray.images.decode import ImageError, decode_image
from hts_ray.images.retry import read_image_bytes
from hts_ray.report.data import GalleryItem
from hts_ray.report.evaluations import read_object
from hts_ray.report.found import Found, Row
from hts_ray.report.gallery import (
    GALLERY_CANDIDATES,
    choose_images,
    gallery_item,
    thumbnail_data_uri,
)
from hts_ray.store import storage, tables

GALLERY_BYTES = 14_000_000  # JPEG bytes of a gallery: 2,000 images are about 21 MB of HTML
_IMAGE_BYTES, _IMAGE_SIDE = 14_000, 360  # at most so much an image
_THREADS = 8  # storage is mostly waited for, and Pillow works without the interpreter's lock


def run_gallery(found: Found, max_images: int) -> list[GalleryItem]:
    """Return up to `max_images` images that show many classes and every verdict.

    Images that cannot be read any more are left out.
    """
    if found.regions is None or found.labels is None or max_images < 1:
        return []
    candidates = {row["image_id"]: row for row in _candidates(found.labels)}
    judged = {image_id: found.judge(row) for image_id, row in candidates.items()}
    chosen = choose_images(judged, max_images)
    info = read_object(found.regions.file("table.json"))
    max_bytes = min(_IMAGE_BYTES, GALLERY_BYTES // max(len(chosen), 1))
    scored = {row["image_id"]: row for row in _scored_rows(found.regions.path, chosen)}
    rows = [scored[image_id] for image_id in chosen if image_id in scored]
    with ThreadPoolExecutor(_THREADS) as threads:
        images = threads.map(lambda row: stored_thumbnail(row["uri"], max_bytes), rows)
        return [
            _item(row, image, candidates[row["image_id"]], info, found)
            for row, image in zip(rows, images, strict=True)
            if image is not None and row["boxes"]
        ]


def _candidates(labels: pa.Table) -> list[Row]:
    """Return rows from all over the table, and for every class the first that has it."""
    stride = max(1, -(-len(labels) // GALLERY_CANDIDATES))
    positive = labels["positive_ids"].combine_chunks()
    _, firsts = np.unique(pc.list_flatten(positive).to_numpy(), return_index=True)
    parents = pc.list_parent_indices(positive).to_numpy()
    rows = np.union1d(np.arange(0, len(labels), stride), parents[firsts])
    chosen: list[Row] = labels.drop_columns(["support", "dropped"]).take(pa.array(rows)).to_pylist()
    return chosen


def _scored_rows(path: str, image_ids: Sequence[str]) -> Iterator[Row]:
    """Yield some images' rows, `scores` as (R, C) float32.

    Scores are nearly all of a run's bytes: only files that hold such an image are opened for them.
    """
    filesystem, inner = storage.resolve(path)
    dataset = pads.dataset(
        inner,
        format="parquet",
        filesystem=filesystem,
        exclude_invalid_files=False,
        ignore_prefixes=[".", "_", "checkpoint", tables.STATS_FILE, "table.json", "quarantine"],
    )
    wanted = pads.field("image_id").isin(list(image_ids))
    for fragment in dataset.get_fragments():
        if not fragment.count_rows(filter=wanted):
            continue
        found = fragment.to_table(schema=dataset.schema, filter=wanted)
        checked = tables.check_table(found, tables.REGION_SCORES_SCHEMA, path)
        scores = checked["scores"]
        for place, row in enumerate(checked.drop_columns(["scores"]).to_pylist()):
            flat = scores[place].values
            if row["boxes"] and flat is not None:
                scores_R = flat.to_numpy(zero_copy_only=False)
                yield {**row, "scores": scores_R.reshape(len(row["boxes"]), -1)}


def _item(row: Row, image: str, label: Row, info: Mapping[str, Any], found: Found) -> GalleryItem:
    from hts_ray.labels.stage import class_probabilities

    settings = found.config.filter
    if info.get("prior_log_likelihoods") is None:
        settings = settings.model_copy(update={"prior_alpha": 0.0})
    truth = found.annotations.get(row["image_id"])
    return gallery_item(
        image_id=row["image_id"],
        image=image,
        width=row["width"],
        height=row["height"],
        names=found.names,
        class_ids=[int(i) for i in info.get("class_ids") or found.names],
        boxes=row["boxes"],
        probabilities=class_probabilities(row["scores"], dict(info), settings),
        positive_ids=label["positive_ids"],
        positive_probabilities=label["probability"],
        ignored_ids=label["ignored_ids"],
        annotation_ids=None if truth is None else truth["positive_ids"],
        ambiguous_ids=() if truth is None else truth["ambiguous_ids"] or (),
        kinds=row["region_kinds"] or (),
        captions=[" / ".join(texts or ()) for texts in row["captions"] or ()],
    )


def stored_thumbnail(uri: str, max_bytes: int) -> str | None:
    """Return a stored image as a data URI; None when it cannot be read any more."""
    try:
        image = decode_image(read_image_bytes(uri), max_side=_IMAGE_SIDE)
    except ImageError:
        return None
    return thumbnail_data_uri(image.pixels, max_side=_IMAGE_SIDE, max_bytes=max_bytes)
