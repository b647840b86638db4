"""The report: one self-contained HTML file that shows a run to a reader.

`ReportData` is everything that a report can show, `render_report` turns it into HTML and
`report_for_run` gathers it from a run directory. Fractions (AP, precision, probabilities)
lie in [0, 1] here and become percents on the page; None means "not known".
"""

from __future__ import annotations

import base64
import io
import math
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow.dataset as pads
import yaml
from jinja2 import Environment, StrictUndefined
from PIL import Image

from hts_ray import storage, tables
from hts_ray.assets import asset_path
from hts_ray.classes import ClassTable, load_class_table
from hts_ray.config import HtsConfig, parse_config
from hts_ray.data.images import ImageError, decode_image, read_image_bytes
from hts_ray.errors import ConfigError

Role = Literal["", "zero_shot", "hts", "supervised"]
Verdict = Literal["right", "wrong", "ignored", "missed", "unjudged"]
FloatArray = npt.NDArray[np.floating[Any]]

MAX_QUARANTINE_ROWS = 200
MAX_IGNORED_LABELS = 6
BEST_CLASSES = 3
NOTHING = "\u2013"  # a dash where a number is not known
GALLERY_CANDIDATES = 2000
GALLERY_BYTES = 1_500_000  # JPEG bytes of a run's gallery: keeps the page quick to open
VERDICTS: dict[Verdict, tuple[str, str]] = {
    "right": ("✓", "pseudo-label that the annotations confirm"),
    "wrong": ("✗", "pseudo-label that the annotations do not have"),
    "ignored": ("~", "undecided: left out of the loss"),
    "missed": ("○", "annotated, but not pseudo-labeled"),
    "unjudged": ("•", "pseudo-label of an image or class without a clear annotation"),
}
STAGE_TABLES = ("manifest", "region_scores", "pseudo_labels", "student", "predictions")
DROP_REASONS = {
    "ignored_band": "below the class's threshold",
    "below_support": "too few regions agree",
    "over_cap": "over the cap of one image",
}
LABEL_SOURCES = {"pseudo": "HTS", "annotations": "Supervised", "none": "Zero-shot"}


@dataclass(frozen=True)
class ComparisonRow:
    """One method's results: means of AP in [0, 1], None where not measured.

    `role` tells which rows the gap is measured between; when empty it is read off a name that
    begins with "zero-shot", "HTS" or "supervised", the first such row counting: give it where
    several rows do. `gap_closed` is worked out when None.
    """

    name: str
    mean_ap: float | None
    note: str = ""
    mean_ap_known_object: float | None = None
    few_1: float | None = None
    few_5: float | None = None
    few_10: float | None = None
    seconds: float | None = None
    gap_closed: float | None = None
    role: Role = ""


@dataclass(frozen=True)
class FunnelStep:
    """A count on the way from images to labels; `of` names an earlier step to relate it to."""

    name: str
    count: int
    of: str = ""
    note: str = ""


@dataclass(frozen=True)
class StageRow:
    """What one stage counted and how long it took."""

    name: str
    rows_in: int | None = None
    rows_out: int | None = None
    quarantined: int | None = None
    seconds: float | None = None


@dataclass(frozen=True)
class ClassRow:
    """One class: counts among the training images, pseudo-label quality, AP by method name."""

    class_id: int
    name: str
    annotated: int | None = None
    pseudo: int | None = None
    precision: float | None = None
    recall: float | None = None
    ap: Mapping[str, float | None] = field(default_factory=dict)


@dataclass(frozen=True)
class QuarantineRow:
    """An image that a stage could not use, and why."""

    image_id: str
    stage: str
    error_kind: str
    error: str = ""


@dataclass(frozen=True)
class GalleryRegion:
    """A region of an image: xyxy `box` in its pixels and its best (class name, probability)."""

    box: tuple[float, float, float, float]
    best: tuple[tuple[str, float], ...] = ()
    kind: str = ""
    caption: str = ""


@dataclass(frozen=True)
class GalleryLabel:
    """A class on an image; `region` is the index of the region that speaks most for it.

    `annotated` says whether the annotations have the class, None when they do not tell.
    """

    class_id: int
    name: str
    verdict: Verdict
    probability: float | None = None
    region: int | None = None
    annotated: bool | None = None


@dataclass(frozen=True)
class GalleryItem:
    """An image to look at; `image` is a data URI, `width` and `height` are what boxes refer to."""

    image_id: str
    image: str
    width: int
    height: int
    regions: tuple[GalleryRegion, ...] = ()
    labels: tuple[GalleryLabel, ...] = ()
    more_ignored: int = 0


@dataclass(frozen=True)
class ReportData:
    """Everything a report can show; what is empty is left out of the page.

    `history` maps a method to its mean training loss after each epoch.
    """

    title: str
    intro: Sequence[str] = ()
    settings: str = ""
    provenance: Mapping[str, Any] = field(default_factory=dict)
    comparison: Sequence[ComparisonRow] = ()
    funnel: Sequence[FunnelStep] = ()
    stages: Sequence[StageRow] = ()
    per_class: Sequence[ClassRow] = ()
    history: Mapping[str, Sequence[float]] = field(default_factory=dict)
    quarantine: Sequence[QuarantineRow] = ()
    gallery: Sequence[GalleryItem] = ()


def render_report(data: ReportData) -> str:
    """Return the report as one HTML document that needs no other file and no network."""
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(
        percent=_percent, count=_count, seconds=_seconds, raw=_raw, width=_width
    )
    template = environment.from_string(asset_path("report.html.j2").read_text(encoding="utf-8"))
    methods = list(dict.fromkeys(name for row in data.per_class for name in row.ap))
    zero, hts = (_method_of(role, methods, data.comparison) for role in ("zero_shot", "hts"))
    main = _by_role(data.comparison).get("hts")
    return template.render(
        data=data,
        comparison=[(row, row is main, _row_gap(row, data.comparison)) for row in data.comparison],
        gap_sentence=gap_sentence(data.comparison),
        wins_sentence=_wins_sentence(data.per_class, zero, hts),
        funnel=_funnel_view(data.funnel),
        methods=[(name, name == hts) for name in methods],
        chart=_loss_chart(data.history),
        kinds=Counter(row.error_kind for row in data.quarantine).most_common(),
        max_quarantine=MAX_QUARANTINE_ROWS,
        provenance=list(_flat(data.provenance)),
        verdicts=_used_verdicts(data.gallery),
        marks={verdict: mark for verdict, (mark, _) in VERDICTS.items()},
        gallery_classes=_gallery_classes(data.gallery),
        gallery_data=_gallery_data(data.gallery),
        overlays=[_overlay(item) for item in data.gallery],
    )


def write_report(path: str, data: ReportData) -> None:
    """Render a report and write it to a path or URI in one step."""
    storage.write_bytes(path, render_report(data).encode("utf-8"))


def gap_closed(
    zero_shot: float | None, method: float | None, supervised: float | None
) -> float | None:
    """Return the share of the way from zero-shot to supervised that a method went.

    Below 0 when the method is worse than zero-shot, above 1 when it beats supervision; None
    when a number is missing or supervision is no better than zero-shot, so there is no gap.
    """
    if zero_shot is None or method is None or supervised is None:
        return None
    share = (method - zero_shot) / (supervised - zero_shot) if supervised > zero_shot else math.nan
    return share if math.isfinite(share) else None


def gap_sentence(rows: Sequence[ComparisonRow]) -> str:
    """Say in one sentence how much of the gap HTS closed; empty when that cannot be said."""
    by_role = _by_role(rows)
    zero, hts, supervised = (by_role.get(role) for role in ("zero_shot", "hts", "supervised"))
    if zero is None or hts is None or not (_finite(zero.mean_ap) and _finite(hts.mean_ap)):
        return ""
    assert zero.mean_ap is not None
    assert hts.mean_ap is not None
    gain = f"{abs(hts.mean_ap - zero.mean_ap) * 100:.1f}"
    if float(gain) == 0:
        change = f"{hts.name} equals {zero.name} at {_percent(zero.mean_ap)} % mAP"
    else:
        way = "above" if hts.mean_ap > zero.mean_ap else "below"
        change = (
            f"{hts.name} reaches {_percent(hts.mean_ap)} % mAP, {gain} points {way} {zero.name}"
        )
    closed = hts.gap_closed
    if closed is None and supervised is not None:
        closed = gap_closed(zero.mean_ap, hts.mean_ap, supervised.mean_ap)
    if closed is None or supervised is None or not _finite(supervised.mean_ap):
        return f"{change}."
    top = f"{supervised.name} ({_percent(supervised.mean_ap)} %)"
    if closed < 0:
        return f"{change}: none of the gap to {top} is closed."
    return f"{change}: {closed * 100:.0f} % of the gap to {top} is closed."


def _name_role(name: str) -> Role:
    start = name.casefold().replace("_", "-").replace(" ", "-")
    prefixes: tuple[tuple[str, Role], ...] = (
        ("zero-shot", "zero_shot"),
        ("hts", "hts"),
        ("supervised", "supervised"),
    )
    return next((role for prefix, role in prefixes if start.startswith(prefix)), "")


def _role(row: ComparisonRow) -> Role:
    return row.role or _name_role(row.name)


def _by_role(rows: Sequence[ComparisonRow]) -> dict[Role, ComparisonRow]:
    """Return one row a role: the first that was given it, else the first whose name says so."""
    ordered = sorted(rows, key=lambda row: not row.role)
    return {_role(row): row for row in reversed(ordered)}


def _row_gap(row: ComparisonRow, rows: Sequence[ComparisonRow]) -> float | None:
    """Return the gap a row closed; None for the two rows that span the gap."""
    if row.gap_closed is not None:
        return row.gap_closed
    by_role = _by_role(rows)
    zero, supervised = by_role.get("zero_shot"), by_role.get("supervised")
    if zero is None or supervised is None or row is zero or row is supervised:
        return None
    return gap_closed(zero.mean_ap, row.mean_ap, supervised.mean_ap)


def _method_of(
    role: str, methods: Sequence[str], comparison: Sequence[ComparisonRow]
) -> str | None:
    """Return the per-class method that plays a role: as the comparison says, else by its name."""
    row = {str(key): row for key, row in _by_role(comparison).items()}.get(role)
    if row is not None and row.name in methods:
        return row.name
    return next((name for name in methods if _name_role(name) == role), None)


def _wins_sentence(rows: Sequence[ClassRow], zero: str | None, hts: str | None) -> str:
    """Count the classes where HTS is above zero-shot, so that a mean is not all there is."""
    if zero is None or hts is None:
        return ""
    pairs = [(row.ap.get(zero), row.ap.get(hts)) for row in rows]
    both = [(a, b) for a, b in pairs if a is not None and b is not None and _finite(a + b)]
    if not both:
        return ""
    better, worse = sum(b > a for a, b in both), sum(b < a for a, b in both)
    return (
        f"Against {zero}, {hts} has a higher AP in {better} of {len(both)}"
        f" {_plural('class', len(both))} and a lower one in {worse}."
    )


def _funnel_view(steps: Sequence[FunnelStep]) -> list[tuple[FunnelStep, float | None, str]]:
    """Each step with its share of the step it refers to (None above 1) and that in words."""
    counts = {step.name: step.count for step in steps}
    view: list[tuple[FunnelStep, float | None, str]] = []
    for step in steps:
        whole = counts.get(step.of, 0)
        if not whole:
            view.append((step, None, ""))
        elif step.count <= whole:
            share = step.count / whole
            view.append((step, share, f"{_share(share)} of {step.of}"))
        else:
            view.append((step, None, f"{step.count / whole:,.1f} \u00d7 {step.of}"))
    return view


def _share(share: float) -> str:
    if 0 < share < 0.001:
        return "under 0.1 %"
    if 0.999 < share < 1:
        return "over 99.9 %"
    return f"{share * 100:.1f} %"


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, str]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        elif value is None or value in ("", [], ()):
            yield f"{prefix}{key}", NOTHING
        elif isinstance(value, (list, tuple)):
            yield f"{prefix}{key}", ", ".join(str(entry) for entry in value)
        else:
            yield f"{prefix}{key}", str(value)


def _loss_chart(history: Mapping[str, Sequence[float]]) -> dict[str, Any] | None:
    """Lay out the loss curves in a 640 x 240 box; None when no curve has a finite point."""
    finite = {
        name: [(epoch, loss) for epoch, loss in enumerate(losses, 1) if _finite(loss)]
        for name, losses in history.items()
    }
    curves = {name: points for name, points in finite.items() if points}
    if not curves:
        return None
    everything = [point for points in curves.values() for point in points]
    last = max(epoch for epoch, _ in everything)
    ticks = _ticks(min(loss for _, loss in everything), max(loss for _, loss in everything))
    low, high = ticks[0], ticks[-1]
    left, right, top, bottom = 56.0, 624.0, 12.0, 204.0

    def x_of(epoch: float) -> float:
        return left + (right - left) * (epoch - 1) / max(last - 1, 1)

    def y_of(loss: float) -> float:
        return bottom - (bottom - top) * (loss - low) / (high - low)

    step = max(1, math.ceil(last / 10))
    return {
        "series": [
            {
                "name": name,
                "dots": [(f"{x_of(epoch):.1f}", f"{y_of(loss):.1f}") for epoch, loss in points],
                "last": f"{points[-1][1]:.3g}",
                "epochs": points[-1][0],
            }
            for name, points in curves.items()
        ],
        "y_ticks": [(f"{tick:g}", f"{y_of(tick):.1f}") for tick in ticks],
        "x_ticks": [(epoch, f"{x_of(epoch):.1f}") for epoch in range(1, last + 1, step)],
    }


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers from at most `low` to at least `high`, about four steps."""
    if high <= low:
        pad = abs(low) * 0.1 or 1.0
        low, high = low - pad, high + pad
    rough = (high - low) / 4
    scale = 10.0 ** math.floor(math.log10(rough))
    step = next(scale * m for m in (1, 2, 2.5, 5, 10) if scale * m >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{index * step:.12g}") for index in range(first, last + 1)]


def _used_verdicts(gallery: Sequence[GalleryItem]) -> list[tuple[Verdict, str, str]]:
    used = {label.verdict for item in gallery for label in item.labels}
    return [(name, mark, text) for name, (mark, text) in VERDICTS.items() if name in used]


def _gallery_classes(gallery: Sequence[GalleryItem]) -> list[tuple[int, str, int]]:
    """(class id, name, images) of the classes that the gallery shows, by name."""
    names = {label.class_id: label.name for item in gallery for label in item.labels}
    counts = Counter(
        class_id for item in gallery for class_id in {label.class_id for label in item.labels}
    )
    return sorted(
        ((class_id, name, counts[class_id]) for class_id, name in names.items()),
        key=lambda entry: entry[1].casefold(),
    )


def _gallery_data(gallery: Sequence[GalleryItem]) -> dict[str, Any]:
    """Return what the page's script needs; names stand once, or they would be its bulk."""
    numbers: dict[str, int] = {}
    images = [
        [
            [
                region.kind,
                region.caption,
                [
                    [numbers.setdefault(name, len(numbers)), round(_clean(p), 4)]
                    for name, p in region.best
                ],
            ]
            for region in item.regions
        ]
        for item in gallery
    ]
    return {"names": list(numbers), "images": images}


def _overlay(item: GalleryItem) -> list[tuple[int, int, int, int, int]]:
    """(region, x, y, width, height), large ones first, so that small ones lie on top."""
    boxes = []
    for index, region in enumerate(item.regions):
        x1, y1, x2, y2 = (round(_clean(value)) for value in region.box)
        boxes.append((index, x1, y1, max(x2 - x1, 1), max(y2 - y1, 1)))
    return sorted(boxes, key=lambda box: -box[3] * box[4])


def _finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _clean(value: float) -> float:
    return float(value) if math.isfinite(value) else 0.0


def _percent(value: float | None, digits: int = 1) -> str:
    if value is None or not math.isfinite(value):
        return NOTHING
    text = f"{value * 100:.{digits}f}"
    return text.removeprefix("-") if float(text) == 0 else text


def _count(value: int | None) -> str:
    return NOTHING if value is None else f"{value:,}"


def _raw(value: float | None) -> str:
    """Return a sort key; empty when there is no number, which the page sorts last."""
    return "" if value is None or not math.isfinite(value) else f"{value:.6g}"


def _width(value: float | None) -> str:
    """Return a bar's width in percent, kept inside its track."""
    return f"{min(max(_clean(value or 0.0), 0.0), 1.0) * 100:.1f}"


def _seconds(value: float | None) -> str:
    if value is None or not math.isfinite(value):
        return NOTHING
    if value < 9.95:
        return f"{value:.1f} s"
    whole = round(value)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    minutes = round(value / 60)
    return f"{minutes // 60} h {minutes % 60} min"


def _plural(word: str, count: int) -> str:
    return word if count == 1 else word + ("es" if word.endswith("s") else "s")


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
    labels = []
    for class_id, verdict in judge(positive_ids, ignored_ids, truth, ambiguous_ids):
        region, best = _best_region(p_RC, columns.get(class_id))
        known = truth is not None and class_id not in set(ambiguous_ids)
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


def _best_region(p_RC: FloatArray, column: int | None) -> tuple[int | None, float | None]:
    """Return the region where a class is most probable, and that probability."""
    if column is None or not len(p_RC):
        return None, None
    region = int(np.argmax(p_RC[:, column]))
    return region, float(p_RC[region, column])


def judge(
    positive_ids: Iterable[int],
    ignored_ids: Iterable[int] = (),
    annotation_ids: Iterable[int] | None = None,
    ambiguous_ids: Iterable[int] = (),
) -> list[tuple[int, Verdict]]:
    """Return (class id, verdict) of every class that was labeled, ignored or missed.

    A pseudo-label is wrong when the annotations do not list it, which counts unknown classes
    as negatives as HICO's metric does; ambiguous ones are not judged. Without annotations
    nothing is.
    """
    ambiguous = set(map(int, ambiguous_ids))
    truth = None if annotation_ids is None else set(map(int, annotation_ids))
    positive = [int(class_id) for class_id in positive_ids]
    result: list[tuple[int, Verdict]] = []
    for class_id in positive:
        if truth is not None and class_id in truth:
            result.append((class_id, "right"))
        elif truth is None or class_id in ambiguous:
            result.append((class_id, "unjudged"))
        else:
            result.append((class_id, "wrong"))
    ignored = [i for i in map(int, ignored_ids) if i not in set(positive)]
    missed = sorted((truth or set()) - set(positive) - set(ignored))
    result += [(class_id, "missed") for class_id in missed]
    return result + [(class_id, "ignored") for class_id in ignored]


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


def choose_images(
    judged: Mapping[str, Sequence[tuple[int, Verdict]]], max_images: int
) -> list[str]:
    """Choose image ids that together show many classes and every verdict.

    Greedy: each step takes the image whose classes and verdicts were shown least so far.
    Ignored classes count only as a verdict, or an image with many of them would always win.
    """
    tokens: dict[str, set[tuple[str, object]]] = {}
    for image_id, labels in judged.items():
        tokens[image_id] = {("verdict", verdict) for _, verdict in labels} | {
            ("class", class_id) for class_id, verdict in labels if verdict != "ignored"
        }
    left = [image_id for image_id, found in tokens.items() if found]
    stride = max(1, math.ceil(len(left) / GALLERY_CANDIDATES))
    left = left[::stride]
    shown: Counter[tuple[str, object]] = Counter()
    chosen: list[str] = []
    while left and len(chosen) < max_images:
        best = max(left, key=lambda i: sum(1.0 / (1 + shown[t]) ** 2 for t in tokens[i]))
        left.remove(best)
        chosen.append(best)
        shown.update(tokens[best])
    return chosen


def report_for_run(
    run_dir: str, max_images: int = 48, *, labels_stage: tables.StageFolder | None = None
) -> ReportData:
    """Gather what a run directory holds so far; a stage that has not run is left out.

    `labels_stage` names the pseudo_labels folder where the run has several; the latest counts
    otherwise. Raises DataError when a table that is there cannot be read.
    """
    config_text = _read_text(storage.join(run_dir, "config.yaml"))
    classes = _run_classes(run_dir)
    stage = labels_stage or tables.find_stage(run_dir, "pseudo_labels")
    found = _Found(
        names=dict(zip(map(int, classes.ids), classes.names, strict=True)) if classes else {},
        config=_run_config(config_text),
        manifest=_read_rows(
            tables.find_stage(run_dir, "manifest"), ["image_id", *tables.ANNOTATION_COLUMNS]
        ),
        regions=_read_rows(
            tables.find_stage(run_dir, "region_scores"), ["image_id", "boxes", "status"]
        ),
        labels=_read_rows(
            stage, ["image_id", "positive_ids", "ignored_ids", "probability", "dropped"]
        ),
        metrics=_evaluations(run_dir),
    )
    return ReportData(
        title=f"HTS report: {_last_part(run_dir)}",
        intro=_run_intro(found),
        settings=config_text,
        provenance=_read_json_object(storage.join(run_dir, "provenance.json")),
        comparison=[_comparison_row(name, values) for name, values in found.metrics.items()],
        funnel=_run_funnel(found),
        stages=_stage_rows(run_dir),
        per_class=_class_rows(found),
        history=_histories(run_dir, found.metrics),
        quarantine=_quarantine(run_dir),
        gallery=_run_gallery(run_dir, found, max_images),
    )


Row = dict[str, Any]


@dataclass(frozen=True)
class _Found:
    """What was read from a run directory; empty where a stage has not run."""

    names: Mapping[int, str]
    config: HtsConfig
    manifest: Sequence[Row]
    regions: Sequence[Row]
    labels: Sequence[Row]
    metrics: Mapping[str, Mapping[str, Any]]

    @cached_property
    def annotations(self) -> dict[str, Row]:
        """The manifest's annotated rows by image id."""
        return {row["image_id"]: row for row in self.manifest if row["positive_ids"] is not None}

    @cached_property
    def judged(self) -> dict[str, list[tuple[int, Verdict]]]:
        """The verdicts on every pseudo-labeled image."""
        result = {}
        for row in self.labels:
            truth = self.annotations.get(row["image_id"])
            result[row["image_id"]] = judge(
                row["positive_ids"],
                row["ignored_ids"],
                None if truth is None else truth["positive_ids"],
                () if truth is None else truth["ambiguous_ids"] or (),
            )
        return result


def _read_text(path: str) -> str:
    return storage.read_bytes(path).decode("utf-8", "replace") if storage.exists(path) else ""


def _read_json_object(path: str) -> dict[str, Any]:
    value = storage.read_json(path) if storage.exists(path) else {}
    return value if isinstance(value, dict) else {}


def _read_rows(folder: tables.StageFolder | None, columns: Sequence[str]) -> list[Row]:
    if folder is None:
        return []
    rows: list[Row] = tables.read_table(folder.path, columns).to_pylist()
    return rows


def _run_classes(run_dir: str) -> ClassTable | None:
    path = storage.join(run_dir, "classes.csv")
    if not storage.exists(path):
        return None
    if not storage.is_remote(path):
        return load_class_table(path)
    with tempfile.TemporaryDirectory() as folder:
        local = Path(folder) / "classes.csv"
        local.write_bytes(storage.read_bytes(path))
        return load_class_table(local)


def _run_config(text: str) -> HtsConfig:
    """Return the run's settings; the defaults when an older version wrote them in another form."""
    try:
        values = yaml.safe_load(text)
        return parse_config(values if isinstance(values, dict) else {})
    except (yaml.YAMLError, ConfigError):
        return parse_config({})


def _evaluations(run_dir: str) -> dict[str, dict[str, Any]]:
    """Return the metrics of every `evaluation-*` folder by a unique display name, by mAP."""
    found: dict[str, dict[str, Any]] = {}
    for folder in storage.list_names(run_dir):
        if not folder.startswith("evaluation-"):
            continue
        values = _read_json_object(storage.join(run_dir, folder, "metrics.json"))
        if values:
            key = folder.removeprefix("evaluation-")
            values["student"] = _evaluated_student(run_dir, values)
            name = str(values.get("name") or _student_name(values["student"]) or key)
            found[f"{name} ({key})" if name in found else name] = values
    return dict(sorted(found.items(), key=lambda entry: _number(entry[1], "mAP") or 0.0))


def _evaluated_student(run_dir: str, metrics: Mapping[str, Any]) -> str:
    """Return the folder of the student whose predictions were evaluated; empty if not told.

    Only names are taken from the stored paths: the run directory may have been moved.
    """
    predictions = _last_part(str(metrics.get("predictions") or ""))
    info = _read_json_object(storage.join(run_dir, predictions, "table.json"))
    student = _last_part(str(info.get("student") or ""))
    return storage.join(run_dir, student) if student else ""


def _student_name(folder: str) -> str:
    """Name a student by the labels it was trained on; empty if that is not told."""
    if not folder:
        return ""
    info = _read_json_object(storage.join(folder, "student.json")).get("info") or {}
    return LABEL_SOURCES.get((info.get("train") or {}).get("labels", ""), "")


def _number(values: Mapping[str, Any], key: str) -> float | None:
    value = values.get(key)
    usable = isinstance(value, (int, float)) and math.isfinite(value)
    return float(value) if usable and value is not None else None


def _comparison_row(name: str, values: Mapping[str, Any]) -> ComparisonRow:
    return ComparisonRow(
        name=name,
        mean_ap=_number(values, "mAP"),
        note=str(values.get("note") or ""),
        mean_ap_known_object=_number(values, "mAP_known_object"),
        few_1=_number(values, "few@1"),
        few_5=_number(values, "few@5"),
        few_10=_number(values, "few@10"),
        seconds=_number(values, "seconds"),
    )


def _run_intro(found: _Found) -> list[str]:
    lines = []
    if found.manifest:
        known = f", {_count(len(found.annotations))} of them annotated" if found.annotations else ""
        of_classes = f", {_count(len(found.names))} classes" if found.names else ""
        lines.append(f"{_count(len(found.manifest))} images{known}{of_classes}.")
    counts: Counter[Verdict] = Counter()
    true_labels = 0
    for image_id in found.judged.keys() & found.annotations.keys():
        counts.update(verdict for _, verdict in found.judged[image_id])
        true_labels += len(found.annotations[image_id]["positive_ids"])
    decided = counts["right"] + counts["wrong"]
    if decided and true_labels:
        lines.append(
            f"Of the pseudo-labels on annotated images {_percent(counts['right'] / decided)} % are"
            f" right (precision); they find {_percent(counts['right'] / true_labels)} % of the"
            " annotated labels (recall). Annotations are used here to judge the pseudo-labels,"
            " never to make them."
        )
    return lines


def _run_funnel(found: _Found) -> list[FunnelStep]:
    steps = []
    if found.manifest:
        steps.append(FunnelStep("images", len(found.manifest)))
    if found.regions:
        usable = [row for row in found.regions if row["status"] == "ok"]
        count = sum(len(row["boxes"] or ()) for row in usable)
        steps.append(FunnelStep("images scored", len(usable), of="images"))
        steps.append(FunnelStep("regions", count, of="images scored"))
    if not found.labels:
        return steps
    dropped: Counter[str] = Counter()
    for row in found.labels:
        dropped.update(dict(row["dropped"] or ()))
    positive = sum(len(row["positive_ids"]) for row in found.labels)
    pairs, decided = "candidate classes", "images filtered"
    steps += [
        FunnelStep(decided, len(found.labels), of="images scored"),
        FunnelStep(
            pairs, positive + dropped.total(), of=decided, note="at or above the negative threshold"
        ),
        FunnelStep("positives kept", positive, of=pairs),
        FunnelStep("ignored", dropped.total(), of=pairs, note="left out of the loss"),
    ]
    return steps + [
        FunnelStep(f"ignored: {DROP_REASONS.get(reason, reason)}", count, of=pairs)
        for reason, count in dropped.most_common()
        if count
    ]


def _stage_rows(run_dir: str) -> list[StageRow]:
    rows = []
    for table in STAGE_TABLES:
        folder = tables.find_stage(run_dir, table)
        if folder is not None:
            stats = folder.stats
            counts = (_number(stats, key) for key in ("rows_in", "rows_out", "quarantined"))
            rows_in, rows_out, bad = (None if value is None else int(value) for value in counts)
            seconds = _number(stats, "seconds")
            rows.append(StageRow(table.replace("_", " "), rows_in, rows_out, bad, seconds))
    return rows


def _class_rows(found: _Found) -> list[ClassRow]:
    """Return one row a class; precision and recall count annotated images only."""
    pseudo: Counter[int] = Counter()
    verdicts: Counter[tuple[int, Verdict]] = Counter()
    annotated: Counter[int] = Counter()
    for row in found.labels:
        pseudo.update(row["positive_ids"])
        truth = found.annotations.get(row["image_id"])
        if truth is not None:
            verdicts.update(found.judged[row["image_id"]])
            annotated.update(truth["positive_ids"])
    ap = {name: _class_ap(values, list(found.names)) for name, values in found.metrics.items()}
    if not found.labels and not any(ap.values()):
        return []
    rows = []
    for class_id, name in found.names.items():
        right, wrong = verdicts[class_id, "right"], verdicts[class_id, "wrong"]
        rows.append(
            ClassRow(
                class_id=class_id,
                name=name,
                annotated=annotated[class_id] if annotated else None,
                pseudo=pseudo[class_id] if found.labels else None,
                precision=right / (right + wrong) if right + wrong else None,
                recall=right / annotated[class_id] if annotated[class_id] else None,
                ap={method: values.get(class_id) for method, values in ap.items() if values},
            )
        )
    return rows


def _class_ap(values: Mapping[str, Any], class_ids: Sequence[int]) -> dict[int, float | None]:
    """AP by class id; empty when the list does not fit the run's classes."""
    ap = values.get("ap")
    ids = [int(i) for i in values.get("class_ids") or class_ids]
    if not isinstance(ap, list) or len(ap) != len(ids):
        return {}
    return dict(zip(ids, ap, strict=True))


def _histories(run_dir: str, metrics: Mapping[str, Mapping[str, Any]]) -> dict[str, list[float]]:
    """Return the loss by epoch of every finished student, named as its evaluation is."""
    names = {_last_part(str(values["student"])): name for name, values in metrics.items()}
    result: dict[str, list[float]] = {}
    for entry in storage.list_names(run_dir):
        folder = tables.StageFolder(run_dir, "student", entry.removeprefix("student-"))
        path = folder.file("history.json")
        if not (entry.startswith("student-") and folder.finished and storage.exists(path)):
            continue
        history = storage.read_json(path)
        losses = [_epoch_loss(epoch) for epoch in history if isinstance(epoch, dict)]
        name = names.get(entry) or _student_name(folder.path) or folder.key
        if losses:
            result[f"{name} ({folder.key})" if name in result else name] = losses
    return result


def _last_part(path: str) -> str:
    return path.rstrip("/").rsplit("/", 1)[-1]


def _epoch_loss(epoch: Mapping[str, Any]) -> float:
    loss = _number(epoch, "loss")
    return math.nan if loss is None else loss


def _quarantine(run_dir: str) -> list[QuarantineRow]:
    """Return every stage's quarantined images, an image once a stage."""
    rows: dict[tuple[str, str], QuarantineRow] = {}
    for table in STAGE_TABLES:
        folder = tables.find_stage(run_dir, table)
        path = "" if folder is None else folder.file("quarantine")
        if not path or not storage.exists(path):
            continue
        found = tables.check_table(tables.read_table(path), tables.QUARANTINE_SCHEMA, path)
        for row in found.to_pylist():
            rows[row["image_id"], row["stage"]] = QuarantineRow(
                row["image_id"], row["stage"], row["error_kind"], row["error"] or ""
            )
    return list(rows.values())


def _run_gallery(run_dir: str, found: _Found, max_images: int) -> list[GalleryItem]:
    folder = tables.find_stage(run_dir, "region_scores")
    if folder is None or not found.labels or max_images < 1:
        return []
    scored_ids = {row["image_id"] for row in found.regions if row["status"] == "ok"}
    judged = {i: verdicts for i, verdicts in found.judged.items() if i in scored_ids}
    chosen = choose_images(judged, max_images)
    scored = {row["image_id"]: row for row in _rows_of(folder.path, chosen)}
    labels = {row["image_id"]: row for row in found.labels}
    sidecar = _read_json_object(folder.file("table.json"))
    budget = min(24_000, GALLERY_BYTES // max(len(chosen), 1))
    items = []
    for image_id in chosen:
        row = scored.get(image_id)
        image = None if row is None else _stored_thumbnail(row["uri"], budget)
        if row is not None and image is not None and row["boxes"]:
            items.append(_run_item(row, image, labels[image_id], sidecar, found))
    return items


def _run_item(
    row: Row, image: str, label: Row, sidecar: Mapping[str, Any], found: _Found
) -> GalleryItem:
    class_ids = [int(i) for i in sidecar.get("class_ids") or found.names]
    truth = found.annotations.get(row["image_id"])
    return gallery_item(
        image_id=row["image_id"],
        image=image,
        width=row["width"],
        height=row["height"],
        names=found.names,
        class_ids=class_ids,
        boxes=row["boxes"],
        probabilities=_probabilities(row, len(class_ids), sidecar, found.config),
        positive_ids=label["positive_ids"],
        positive_probabilities=label["probability"],
        ignored_ids=label["ignored_ids"],
        annotation_ids=None if truth is None else truth["positive_ids"],
        ambiguous_ids=() if truth is None else truth["ambiguous_ids"] or (),
        kinds=row["region_kinds"] or (),
        captions=[" / ".join(texts or ()) for texts in row["captions"] or ()],
    )


def _rows_of(path: str, image_ids: Sequence[str]) -> list[Row]:
    """Read some images' rows only: all of a run's scores need not fit into memory."""
    filesystem, inner = storage.resolve(path)
    dataset = pads.dataset(
        inner,
        format="parquet",
        filesystem=filesystem,
        exclude_invalid_files=False,
        ignore_prefixes=[".", "_", "checkpoint", tables.STATS_FILE, "table.json", "quarantine"],
    )
    found = dataset.to_table(filter=pads.field("image_id").isin(list(image_ids)))
    rows: list[Row] = tables.check_table(found, tables.REGION_SCORES_SCHEMA, path).to_pylist()
    return rows


def _probabilities(
    row: Row, num_classes: int, sidecar: Mapping[str, Any], config: HtsConfig
) -> FloatArray:
    """Return a region's class probabilities as the filter saw them."""
    from hts_ray.filtering import class_probabilities

    scores_RC = np.asarray(row["scores"], dtype=np.float32).reshape(len(row["boxes"]), num_classes)
    settings = config.filter
    if sidecar.get("prior_log_likelihoods") is None:
        settings = settings.model_copy(update={"prior_alpha": 0.0})
    probabilities_RC: FloatArray = class_probabilities(scores_RC, dict(sidecar), settings)
    return probabilities_RC


def _stored_thumbnail(uri: str, max_bytes: int) -> str | None:
    """Return a stored image as a data URI; None when it cannot be read any more."""
    try:
        image = decode_image(read_image_bytes(uri), max_side=400)
    except ImageError:
        return None
    return thumbnail_data_uri(image.pixels, max_side=400, max_bytes=max_bytes)
