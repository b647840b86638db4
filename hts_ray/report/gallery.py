"""The gallery: which images of a run to show, small enough to embed, and what to say beside each.

Shapes: R regions of one image, C classes.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from hts_ray.images.thumbnail import stored_thumbnail
from hts_ray.labels.evidence import class_probabilities, iter_region_rows, kept_regions
from hts_ray.labels.passes import TeacherPass
from hts_ray.report.content import GalleryItem, GalleryLabel, GalleryRegion, Verdict
from hts_ray.report.formatting import finite
from hts_ray.report.label_quality import Row, judge
from hts_ray.report.read_run import RunTables
from hts_ray.store import storage

MAX_IGNORED_LABELS = 6
BEST_CLASSES = 3
GALLERY_CANDIDATES = 4000  # images that are looked at to choose from
GALLERY_BYTES = 14_000_000  # JPEG bytes of a gallery: 2,000 images are about 21 MB of HTML
_IMAGE_BYTES, _IMAGE_SIDE = 14_000, 360  # the most for one image
_THREADS = 8  # storage is mostly waited for, and Pillow works without the interpreter's lock


def run_gallery(found: RunTables, max_images: int) -> list[GalleryItem]:
    """Return up to `max_images` images that show many classes and every verdict.

    Images that cannot be read any more are left out.
    """
    if not found.passes or found.labels is None or max_images < 1:
        return []
    candidates = {row["image_id"]: row for row in _candidates(found.labels)}
    annotated = found.annotations
    judged = {name: judge(row, annotated.get(name)) for name, row in candidates.items()}
    chosen = choose_images(judged, max_images)
    max_bytes = min(_IMAGE_BYTES, GALLERY_BYTES // max(len(chosen), 1))
    info = storage.read_object(found.passes[0].folder.file("table.json"))
    class_ids = [int(i) for i in info.get("class_ids") or found.names]
    split = found.config.train.split
    return [
        gallery_item(
            image,
            row,
            p_RC,
            class_ids,
            found.names,
            candidates[row["image_id"]],
            annotated.get(row["image_id"]),
        )
        for image, row, p_RC in scored_images(found.passes, split, chosen, _IMAGE_SIDE, max_bytes)
    ]


def scored_images(
    passes: Sequence[TeacherPass],
    split: str | None,
    chosen: Sequence[str],
    side: int,
    max_bytes: int,
) -> Iterator[tuple[str, Row, npt.NDArray[Any]]]:
    """Yield (image, row of region_scores, class probabilities (R, C)) of the chosen images.

    `passes` and `split` are those that made the labels. A row has the regions of all passes, and
    `counts` (R,) says which of them the filter counted. An image is a JPEG data URI of at most
    `max_bytes` and `side` pixels. Images that were not scored or cannot be read any more are left
    out.
    """
    scored: dict[str, tuple[Row, npt.NDArray[Any]]] = {}
    for one in passes:
        info = one.reading(split)
        for row in iter_region_rows(one.folder.path, chosen):
            row["counts"] = kept_regions(row["region_kinds"], row["margins"] or None, one.config)
            said = row, class_probabilities(row["scores"], info, one.config)
            seen = scored.get(row["image_id"])
            scored[row["image_id"]] = said if seen is None else _joined(*seen, *said)
    found = [scored[image_id] for image_id in chosen if image_id in scored]
    with ThreadPoolExecutor(_THREADS) as threads:
        images = threads.map(lambda row: stored_thumbnail(row[0]["uri"], side, max_bytes), found)
        for (whole, p_RC), image in zip(found, images, strict=True):
            if image is not None:
                yield image, whole, p_RC


def _joined(
    first: Row, p_RC: npt.NDArray[Any], second: Row, more_RC: npt.NDArray[Any]
) -> tuple[Row, npt.NDArray[Any]]:
    """Put the regions of a second pass behind those of the first."""
    row = dict(first)
    for name in ("boxes", "region_kinds", "counts"):
        row[name] = [*first[name], *second[name]]
    both = ((first, p_RC), (second, more_RC))
    row["captions"] = [c for of, p in both for c in of.get("captions") or [[]] * len(p)]
    return row, np.concatenate([p_RC, more_RC])


def _candidates(labels: pa.Table) -> list[dict[str, Any]]:
    """Return rows from all over the table, and for every class the first that has it."""
    stride = max(1, -(-len(labels) // GALLERY_CANDIDATES))
    positive = labels["positive_ids"].combine_chunks()
    _, firsts = np.unique(pc.list_flatten(positive).to_numpy(), return_index=True)
    parents = pc.list_parent_indices(positive).to_numpy()
    rows = np.union1d(np.arange(0, len(labels), stride), parents[firsts])
    chosen: list[dict[str, Any]] = labels.take(pa.array(rows)).to_pylist()
    return chosen


def gallery_item(
    image: str,
    scored: Row,
    p_RC: npt.NDArray[Any],
    class_ids: Sequence[int],
    names: Mapping[int, str],
    labeled: Row,
    annotated: Row | None = None,
) -> GalleryItem:
    """Build what the gallery shows of one image.

    - `image` is a data URI, `scored` the image's row of `region_scores`;
    - `p_RC` (R, C) are the probabilities over `class_ids`, `names` are by class id;
    - `labeled` is the image's row of `pseudo_labels`, `annotated` that of the manifest.

    Ignored classes beyond the most probable few are only counted.
    """
    columns = {class_id: column for column, class_id in enumerate(class_ids)}
    given = dict(zip(labeled["positive_ids"], labeled["probability"], strict=True))
    ambiguous = set() if annotated is None else set(annotated["ambiguous_ids"] or ())
    labels = []
    for class_id, verdict in judge(labeled, annotated):
        region, best = None, None  # where the class is most probable, and how much
        if class_id in columns and len(p_RC):
            p_R = p_RC[:, columns[class_id]]
            region, best = int(np.argmax(p_R)), float(p_R.max())
        known = annotated is not None and class_id not in ambiguous
        labels.append(
            GalleryLabel(
                class_id=class_id,
                name=names.get(class_id, f"class {class_id}"),
                verdict=verdict,
                probability=given.get(class_id, best),
                region=region,
                annotated=class_id in annotated["positive_ids"] if known and annotated else None,
            )
        )
    # Of the ignored classes those that matter most: annotated ones, then the most probable.
    ignored = [label for label in labels if label.verdict == "ignored"]
    ignored.sort(key=lambda label: (label.annotated is not True, -(label.probability or 0.0)))
    shown = [label for label in labels if label.verdict != "ignored"]
    size = scored["width"], scored["height"]
    regions = tuple(_regions(scored, p_RC, [names.get(i, f"class {i}") for i in class_ids]))
    labels = [*shown, *ignored[:MAX_IGNORED_LABELS]]
    more = max(len(ignored) - MAX_IGNORED_LABELS, 0)
    return GalleryItem(scored["image_id"], image, *size, regions, tuple(labels), more)


def choose_images(
    judged: Mapping[str, Sequence[tuple[int, Verdict]]], max_images: int
) -> list[str]:
    """Choose image ids that together show many classes and every verdict.

    Greedy: each step takes the image whose classes and verdicts were shown least so far.
    Ignored classes count only as a verdict, or an image with many of them would always win.
    Images without any label come last.
    """
    tokens: dict[str, list[tuple[str, object]]] = {}
    for image_id, labels in judged.items():
        # No sets: their order, and so the last bit of a sum, changes from process to process.
        tokens[image_id] = [
            *dict.fromkeys(("verdict", verdict) for _, verdict in labels),
            *(("class", class_id) for class_id, verdict in labels if verdict != "ignored"),
        ]
    left = [image_id for image_id, found in tokens.items() if found]
    shown: Counter[tuple[str, object]] = Counter()

    def gain(place: int) -> float:
        return sum(1.0 / (1 + shown[token]) ** 2 for token in tokens[left[place]])

    # What an image adds can only fall: a stale value that is the best after an update is final.
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
    bare = [image_id for image_id, found in tokens.items() if not found]
    return [*chosen, *bare[: max_images - len(chosen)]]


def gallery_classes(gallery: Sequence[GalleryItem]) -> list[tuple[int, str, int]]:
    """Return (class id, name, images) of the classes that the gallery shows, by name."""
    shown = [{label.class_id: label.name for label in item.labels} for item in gallery]
    counts = Counter(named for classes in shown for named in classes.items())
    found = [(class_id, name, images) for (class_id, name), images in counts.items()]
    return sorted(found, key=lambda entry: entry[1].casefold())


def gallery_data(gallery: Sequence[GalleryItem]) -> dict[str, Any]:
    """Return what the page's script needs; each text is stored once, to keep the page small.

    An image is its width, its height and its regions; a region is a kind, a caption, a box
    (x, y, width, height) and the best classes as (text, probability).
    """
    numbers: dict[str, int] = {}

    def text(value: str) -> int:
        return numbers.setdefault(value, len(numbers))

    def packed(region: GalleryRegion) -> list[Any]:
        x1, y1, x2, y2 = map(round, region.box)
        kind, caption = text(region.kind), text(region.caption)
        best = [[text(name), round(p, 3) if finite(p) else 0.0] for name, p in region.best]
        return [kind, caption, [x1, y1, max(x2 - x1, 1), max(y2 - y1, 1)], best]

    images = [[item.width, item.height, [*map(packed, item.regions)]] for item in gallery]
    return {"texts": list(numbers), "images": images}


def _regions(
    scored: Row, p_RC: npt.NDArray[Any], column_names: Sequence[str]
) -> Iterator[GalleryRegion]:
    captions, kinds = scored.get("captions") or (), scored["region_kinds"] or ()
    for r, (box, p_C) in enumerate(zip(scored["boxes"], p_RC, strict=True)):
        order = np.argsort(-p_C, kind="stable")[:BEST_CLASSES]
        best = tuple((column_names[column], float(p_C[column])) for column in order)
        caption = " / ".join(captions[r] or ()) if r < len(captions) else ""
        yield GalleryRegion(tuple(box), best, kinds[r] if r < len(kinds) else "", caption)
