"""What a report can show, as plain data: collected from a run, rendered into a page.

Fractions (AP, precision, probabilities) lie in [0, 1] here and become percents on the page; None
means "not known".
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
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
    "unjudged": ("•", "label that no annotation confirms or denies"),
}


@dataclass(frozen=True)
class ComparisonRow:
    """One method's results: means of AP in [0, 1], None where not measured.

    The gap is measured between the rows with a `role`. A row without one gets it from its name
    if that begins with "zero-shot", "HTS" or "supervised"; the first such row counts.
    """

    name: str
    mean_ap: float | None
    note: str = ""
    mean_ap_known_object: float | None = None
    few_1: float | None = None
    few_5: float | None = None
    few_10: float | None = None
    seconds: float | None = None
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
    """What one stage counted and how long it took.

    `rate` is in `unit` a second; `gpu_hours` is an upper bound.
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
    smallest n of Few@n that includes the class, None when there is none or it is not known.
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
    """Which verb of one object was labeled where another one is annotated.

    `names` are the classes' names. `counts` has a row for each annotated verb and one for "none
    of these". Its columns are the labeled verbs, "undecided" and "none": (V + 1, V + 2) numbers
    of images.
    """

    title: str
    verbs: Sequence[str]
    names: Sequence[str]
    counts: Sequence[Sequence[int]]

    @property
    def mistakes(self) -> int:
        """Wrong pseudo-labels, each counted once for every verb it was given in place of."""
        return sum(number for *_, number in self.pairs())

    def pairs(self) -> Iterator[tuple[str, str, int]]:
        """Yield (annotated class, labeled class, images) of every mistake."""
        annotated = [*self.names, "none of these"]
        for row, values in enumerate(self.counts):
            for column, (labeled, number) in enumerate(zip(self.names, values, strict=False)):
                if row != column and number:
                    yield annotated[row], labeled, number


@dataclass(frozen=True)
class TrainingCurve:
    """One student's record after each epoch; NaN where something was not measured."""

    name: str
    loss: Sequence[float]
    validation_map: Sequence[float] = ()


@dataclass(frozen=True)
class GalleryRegion:
    """A region of an image: xyxy `box` in its pixels and its best (class name, probability)."""

    box: tuple[float, float, float, float]
    best: tuple[tuple[str, float], ...] = ()
    kind: str = ""
    caption: str = ""


@dataclass(frozen=True)
class GalleryLabel:
    """A class on an image; `region` is the index of the region where it is most probable.

    `annotated` says whether the annotations have the class, None when they do not say.
    """

    class_id: int
    name: str
    verdict: Verdict
    probability: float | None = None
    region: int | None = None
    annotated: bool | None = None


@dataclass(frozen=True)
class GalleryItem:
    """An image to look at; `image` is a data URI, boxes are in a `width` x `height` image."""

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

    `html` is a whole `<section id="ANCHOR">` with its heading and is inserted unchanged: its maker
    escapes what comes from users. `title` is its entry in the table of contents.
    """

    anchor: str
    title: str
    html: Markup


@dataclass(frozen=True)
class ReportData:
    """Everything a report can show; what is empty is left out of the page.

    - `facts` says what was run: a title (data, teacher, ...), and under it names and values;
    - `precision_recall` has, by method and class id, the interpolated precision (11,) at recalls
      of 0, 0.1, ..., 1;
    - `quarantine` has rows of the table of that name.
    """

    title: str
    intro: Sequence[str] = ()
    settings: str = ""
    provenance: Mapping[str, Any] = field(default_factory=dict)
    facts: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    comparison: Sequence[ComparisonRow] = ()
    funnel: Sequence[FunnelStep] = ()
    stages: Sequence[StageRow] = ()
    per_class: Sequence[ClassRow] = ()
    precision_recall: Mapping[str, Mapping[int, Sequence[float]]] = field(default_factory=dict)
    reliability: Sequence[ReliabilityBin] = ()
    confusions: Sequence[Confusion] = ()
    training: Sequence[TrainingCurve] = ()
    sections: Sequence[Section] = ()
    quarantine: Sequence[Mapping[str, Any]] = ()
    gallery: Sequence[GalleryItem] = ()
