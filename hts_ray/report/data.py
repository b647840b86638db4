"""What a report can show, as plain data: gathered from a run, rendered into a page.

Fractions (AP, precision, probabilities) lie in [0, 1] here and become percents on the page; None
means "not known".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from markupsafe import Markup

Role = Literal["", "zero_shot", "hts", "supervised"]
Verdict = Literal["right", "wrong", "ignored", "missed", "unjudged"]

VERDICTS: dict[Verdict, tuple[str, str]] = {
    "right": ("✓", "pseudo-label that the annotations confirm"),
    "wrong": ("✗", "pseudo-label that the annotations do not have"),
    "ignored": ("~", "undecided: left out of the loss"),
    "missed": ("○", "annotated, but not pseudo-labeled"),
    "unjudged": ("•", "pseudo-label of an image or class without a clear annotation"),
}


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
class Facts:
    """One part of what was run (data, teacher, ...): names and values to read."""

    title: str
    entries: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class FunnelStep:
    """A count on the way from images to labels; `of` names an earlier step to relate it to."""

    name: str
    count: int
    of: str = ""
    note: str = ""


@dataclass(frozen=True)
class StageRow:
    """What one stage counted and how long it took.

    `rate` is in `unit` a second; `gpu_hours` is at most so many.
    """

    name: str
    rows_in: int | None = None
    rows_out: int | None = None
    quarantined: int | None = None
    seconds: float | None = None
    rate: float | None = None
    unit: str = "images"
    gpu_hours: float | None = None
    note: str = ""


@dataclass(frozen=True)
class ClassRow:
    """One class: counts among the training images, pseudo-label quality, AP by method name.

    `support` is the mean number of regions that agree on a pseudo-label. `few_shot` is the
    smallest n of Few@n that has the class, None when none has or that is not known.
    """

    class_id: int
    name: str
    annotated: int | None = None
    pseudo: int | None = None
    precision: float | None = None
    recall: float | None = None
    ap: Mapping[str, float | None] = field(default_factory=dict)
    support: float | None = None
    few_shot: int | None = None


@dataclass(frozen=True)
class ReliabilityBin:
    """Pseudo-labels of similar probability, and how many of them the annotations confirm."""

    low: float
    high: float
    labels: int
    right: int
    mean_probability: float

    @property
    def precision(self) -> float:
        """Share of the labels that are right."""
        return self.right / self.labels


@dataclass(frozen=True)
class Confusion:
    """Which verb of one object was labeled where the annotations have which.

    `names` are the classes' names. `counts` has a row an annotated verb and one for "none of
    these", and a column a labeled verb, one for "undecided" and one for "none": (V + 1, V + 2)
    numbers of images.
    """

    title: str
    verbs: Sequence[str]
    names: Sequence[str]
    counts: Sequence[Sequence[int]]

    @property
    def mistakes(self) -> int:
        """Wrong pseudo-labels, each counted once for every verb that it stands for."""
        return sum(
            count
            for row, values in enumerate(self.counts)
            for column, count in enumerate(values[: len(self.verbs)])
            if row != column
        )


@dataclass(frozen=True)
class TrainingCurve:
    """One student's record after each epoch; NaN where something was not measured."""

    name: str
    loss: Sequence[float]
    validation_map: Sequence[float] = ()


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
class Section:
    """A part of the page that another module makes.

    `html` is a whole `<section id="ANCHOR">` with its heading and is put in as it is: whoever makes
    it escapes what comes from users. `title` is its entry in the table of contents.
    """

    anchor: str
    title: str
    html: Markup


@dataclass(frozen=True)
class ReportData:
    """Everything a report can show; what is empty is left out of the page.

    `precision_recall` maps a method to the interpolated precision (11,) of each class id at
    recalls of 0, 0.1, ..., 1.
    """

    title: str
    intro: Sequence[str] = ()
    settings: str = ""
    provenance: Mapping[str, Any] = field(default_factory=dict)
    facts: Sequence[Facts] = ()
    comparison: Sequence[ComparisonRow] = ()
    funnel: Sequence[FunnelStep] = ()
    stages: Sequence[StageRow] = ()
    per_class: Sequence[ClassRow] = ()
    precision_recall: Mapping[str, Mapping[int, Sequence[float]]] = field(default_factory=dict)
    reliability: Sequence[ReliabilityBin] = ()
    confusions: Sequence[Confusion] = ()
    training: Sequence[TrainingCurve] = ()
    sections: Sequence[Section] = ()
    quarantine: Sequence[QuarantineRow] = ()
    gallery: Sequence[GalleryItem] = ()
