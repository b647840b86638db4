"""The gallery: which images to show, small enough to embed, and what stands beside each.

Shapes: R regions of one image, C classes.
"""

from __future__ import annotations

import base64
import heapq
import io
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from hts_ray.report.data import GalleryItem, GalleryLabel, GalleryRegion, Verdict
from hts_ray.report.formatting import finite
from hts_ray.report.quality import judge

FloatArray = npt.NDArray[np.floating[Any]]

MAX_IGNORED_LABELS = 6
BEST_CLASSES = 3
GALLERY_CANDIDATES = 4000  # images that are looked at to choose from


def thumbnail_data_uri(
    pixels: npt.NDArray[np.uint8], max_side: int = 320, max_bytes: int = 8_000
) -> str:
    """Return (H, W, 3) or (H, W) uint8 pixels as a JPEG data URI of at most `max_bytes` JPEG.

    Large images are scaled down to `max_side`, small ones keep their size. Quality falls
    first, then size, because a page full of noisy images must still open quickly.
    """
    array = np.asarray(pixels)
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or 0 in array.shape:
        raise ValueError(f"pixels are {array.dtype} {array.shape}: give uint8 (H, W, 3) or (H, W)")
    image = Image.fromarray(array).convert("RGB")
    side = min(max_side, max(image.size))
    while True:
        small = image.copy()
        small.thumbnail((side, side), Image.Resampling.LANCZOS)
        for quality in (80, 65, 50, 35):
            sink = io.BytesIO()
            small.save(sink, "JPEG", quality=quality, optimize=True)
            if sink.tell() <= max_bytes or (quality == 35 and side <= 32):
                text = base64.b64encode(sink.getvalue()).decode()
                return f"data:image/jpeg;base64,{text}"
        side = max(32, int(side * 0.75))


def gallery_item(
    *,
    image_id: str,
    image: str,
    width: int,
    height: int,
    names: Mapping[int, str],
    class_ids: Sequence[int],
    boxes: npt.ArrayLike,
    probabilities: npt.ArrayLike,
    positive_ids: Sequence[int],
    positive_probabilities: Sequence[float] = (),
    ignored_ids: Sequence[int] = (),
    annotation_ids: Sequence[int] | None = None,
    ambiguous_ids: Sequence[int] = (),
    kinds: Sequence[str] = (),
    captions: Sequence[str] = (),
) -> GalleryItem:
    """Build what the gallery shows of one image.

    `boxes` (R, 4) xyxy in pixels of the `width` x `height` image; `probabilities` (R, C) over
    `class_ids`; `names` by class id. `annotation_ids` are the true classes, None without
    annotations; a pseudo-label among `ambiguous_ids` is not judged. Ignored classes beyond the
    most probable few are only counted. Raises ValueError for unequal shapes.
    """
    boxes_r4 = np.asarray(boxes, dtype=np.float64).reshape(-1, 4)
    p_RC = np.asarray(probabilities, dtype=np.float64).reshape(len(boxes_r4), -1)
    if len(boxes_r4) and p_RC.shape[1] != len(class_ids):
        raise ValueError(f"probabilities have {p_RC.shape[1]} columns, {len(class_ids)} class ids")
    truth = None if annotation_ids is None else set(map(int, annotation_ids))
    columns = {int(class_id): column for column, class_id in enumerate(class_ids)}
    given = dict(zip(map(int, positive_ids), map(float, positive_probabilities), strict=False))
    ambiguous = set(map(int, ambiguous_ids))
    labels = []
    for class_id, verdict in judge(positive_ids, ignored_ids, truth, ambiguous):
        region, best = _best_region(p_RC, columns.get(class_id))
        known = truth is not None and class_id not in ambiguous
        labels.append(
            GalleryLabel(
                class_id=class_id,
                name=names.get(class_id, f"class {class_id}"),
                verdict=verdict,
                probability=given.get(class_id, best),
                region=region,
                annotated=class_id in truth if known and truth is not None else None,
            )
        )
    shown, more_ignored = _limit_ignored(labels)
    column_names = [names.get(int(i), f"class {i}") for i in class_ids]
    regions = _gallery_regions(boxes_r4, p_RC, column_names, kinds, captions)
    return GalleryItem(
        image_id, image, int(width), int(height), tuple(regions), tuple(shown), more_ignored
    )


def choose_images(
    judged: Mapping[str, Sequence[tuple[int, Verdict]]], max_images: int
) -> list[str]:
    """Choose image ids that together show many classes and every verdict.

    Greedy: each step takes the image whose classes and verdicts were shown least so far.
    Ignored classes count only as a verdict, or an image with many of them would always win.
    """
    tokens: dict[str, list[tuple[str, object]]] = {}
    for image_id, labels in judged.items():
        # No sets: their order, and so the last bit of a sum, changes from process to process.
        tokens[image_id] = [
            *dict.fromkeys(("verdict", verdict) for _, verdict in labels),
            *(("class", class_id) for class_id, verdict in labels if verdict != "ignored"),
        ]
    left = [image_id for image_id, found in tokens.items() if found]
    left = left[:: max(1, math.ceil(len(left) / GALLERY_CANDIDATES))]
    shown: Counter[tuple[str, object]] = Counter()

    def gain(place: int) -> float:
        return sum(1.0 / (1 + shown[token]) ** 2 for token in tokens[left[place]])

    # What an image adds can only fall, so a stale value that is still the best needs no others.
    heap = [(-gain(place), place) for place in range(len(left))]
    heapq.heapify(heap)
    chosen: list[str] = []
    while heap and len(chosen) < max_images:
        stale, place = heap[0]
        fresh = -gain(place)
        if fresh > stale:
            heapq.heapreplace(heap, (fresh, place))
            continue
        heapq.heappop(heap)
        chosen.append(left[place])
        shown.update(tokens[left[place]])
    return chosen


def gallery_classes(gallery: Sequence[GalleryItem]) -> list[tuple[int, str, int]]:
    """Return (class id, name, images) of the classes that the gallery shows, by name."""
    names = {label.class_id: label.name for item in gallery for label in item.labels}
    counts = Counter(
        class_id for item in gallery for class_id in {label.class_id for label in item.labels}
    )
    return sorted(
        ((class_id, name, counts[class_id]) for class_id, name in names.items()),
        key=lambda entry: entry[1].casefold(),
    )


def gallery_data(gallery: Sequence[GalleryItem]) -> dict[str, Any]:
    """Return what the page's script needs; texts stand once, or they would be its bulk.

    An image is its width, its height and its regions; a region is a kind, a caption, a box
    (x, y, width, height) and the best classes as (text, probability).
    """
    numbers: dict[str, int] = {}

    def text(value: str) -> int:
        return numbers.setdefault(value, len(numbers))

    images = [
        [
            item.width,
            item.height,
            [
                [
                    text(region.kind),
                    text(region.caption),
                    _corner_and_size(region),
                    [[text(name), round(_clean(p), 3)] for name, p in region.best],
                ]
                for region in item.regions
            ],
        ]
        for item in gallery
    ]
    return {"texts": list(numbers), "images": images}


def _corner_and_size(region: GalleryRegion) -> list[int]:
    x1, y1, x2, y2 = (round(_clean(value)) for value in region.box)
    return [x1, y1, max(x2 - x1, 1), max(y2 - y1, 1)]


def _clean(value: float) -> float:
    return float(value) if finite(value) else 0.0


def _best_region(p_RC: FloatArray, column: int | None) -> tuple[int | None, float | None]:
    """Return the region where a class is most probable, and that probability."""
    if column is None or not len(p_RC):
        return None, None
    region = int(np.argmax(p_RC[:, column]))
    return region, float(p_RC[region, column])


def _limit_ignored(labels: Sequence[GalleryLabel]) -> tuple[list[GalleryLabel], int]:
    """Keep the ignored classes that say most: annotated ones, then the most probable."""
    ignored = [label for label in labels if label.verdict == "ignored"]
    ignored.sort(key=lambda label: (label.annotated is not True, -(label.probability or 0.0)))
    others = [label for label in labels if label.verdict != "ignored"]
    more = max(len(ignored) - MAX_IGNORED_LABELS, 0)
    return others + ignored[:MAX_IGNORED_LABELS], more


def _gallery_regions(
    boxes_r4: FloatArray,
    p_RC: FloatArray,
    column_names: Sequence[str],
    kinds: Sequence[str],
    captions: Sequence[str],
) -> list[GalleryRegion]:
    regions = []
    for r, (box, p_C) in enumerate(zip(boxes_r4, p_RC, strict=True)):
        order = np.argsort(-p_C, kind="stable")[:BEST_CLASSES]
        best = tuple((column_names[column], float(p_C[column])) for column in order)
        x1, y1, x2, y2 = (float(value) for value in box)
        kind = kinds[r] if r < len(kinds) else ""
        caption = captions[r] if r < len(captions) else ""
        regions.append(GalleryRegion((x1, y1, x2, y2), best, kind, caption))
    return regions
