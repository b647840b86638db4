"""Pseudo-labels against annotations: verdicts, calibration, and which verbs are taken for which.

Everything here only looks at labels that are finished: annotations judge them, never make them.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from hts_ray.classes import HoiClass
from hts_ray.report.data import Confusion, ReliabilityBin, Verdict

BINS = 10
# A table of all classes stays readable up to here where no objects cut it into smaller ones.
MAX_PLAIN_CLASSES = 30


@dataclass(frozen=True)
class LabeledImage:
    """An annotated image's pseudo-labels, as class ids; `probabilities` go with `positive`."""

    positive: Sequence[int]
    probabilities: Sequence[float]
    ignored: Sequence[int]
    annotated: Sequence[int]
    ambiguous: Sequence[int] = ()

    def verdicts(self) -> list[tuple[int, Verdict]]:
        """Judge every class of the image."""
        return judge(self.positive, self.ignored, self.annotated, self.ambiguous)


@dataclass
class LabelQuality:
    """Counts over all annotated images: verdicts and annotations by class id, and two sums.

    `judged` holds (probability, right) of every pseudo-label that the annotations judge.
    """

    verdicts: Counter[tuple[int, Verdict]] = field(default_factory=Counter)
    annotated: Counter[int] = field(default_factory=Counter)
    judged: list[tuple[float, bool]] = field(default_factory=list)
    confusions: list[Confusion] = field(default_factory=list)

    def total(self, verdict: Verdict) -> int:
        """Return how many classes of all images got a verdict."""
        return sum(number for (_, found), number in self.verdicts.items() if found == verdict)


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


def measure(images: Iterable[LabeledImage], classes: Sequence[HoiClass]) -> LabelQuality:
    """Go once over annotated images and count what the report says of the pseudo-labels."""
    quality = LabelQuality()
    table = ConfusionTable(classes)
    for image in images:
        verdicts = image.verdicts()
        verdict_of = dict(verdicts)
        quality.verdicts.update(verdicts)
        quality.annotated.update(map(int, image.annotated))
        for class_id, probability in zip(image.positive, image.probabilities, strict=True):
            verdict = verdict_of[int(class_id)]
            if verdict != "unjudged":
                quality.judged.append((float(probability), verdict == "right"))
        table.add(verdict_of, image.annotated)
    quality.confusions = table.confusions()
    return quality


def reliability(judged: Sequence[tuple[float, bool]], bins: int = BINS) -> list[ReliabilityBin]:
    """Sort (probability, right) into `bins` equal parts of [0, 1] and drop the empty ones.

    A probability on the border of two counts to the upper one, 1 to the last.
    """
    if not judged:
        return []
    probabilities = np.array([probability for probability, _ in judged], dtype=np.float64)
    right = np.array([hit for _, hit in judged])
    # The small number puts 0.3, which is 2.9999999999999996 tenths in float32, where it belongs.
    places = np.clip((probabilities * bins + 1e-6).astype(int), 0, bins - 1)
    result = []
    for place in range(bins):
        chosen = places == place
        labels = int(chosen.sum())
        if labels:
            mean = float(probabilities[chosen].mean())
            low, high = place / bins, (place + 1) / bins
            result.append(ReliabilityBin(low, high, labels, int(right[chosen].sum()), mean))
    return result


def expected_calibration_error(bins: Sequence[ReliabilityBin]) -> float:
    """Return the mean distance of probability and precision over all labels, in [0, 1].

    Source: Guo et al. 2017, On Calibration of Modern Neural Networks.
    """
    labels = sum(entry.labels for entry in bins)
    gaps = sum(entry.labels * abs(entry.precision - entry.mean_probability) for entry in bins)
    return gaps / labels if labels else math.nan


def wilson_interval(right: int, labels: int, z: float = 1.96) -> tuple[float, float]:
    """Return the interval that holds a share `right` of `labels` in 95 % of cases, in [0, 1].

    Source: Wilson 1927; unlike the normal one it is sensible for few labels and near 0 and 1.
    """
    share = right / labels
    weight = z * z / labels
    centre = (share + weight / 2) / (1 + weight)
    half = z * math.sqrt(share * (1 - share) / labels + weight / (4 * labels)) / (1 + weight)
    return max(centre - half, 0.0), min(centre + half, 1.0)


class ConfusionTable:
    """Counts, within each object, which verbs were labeled where which are annotated.

    An image can have several verbs of an object, so a wrong label stands for the verbs that were
    missed there, else for all that are annotated, else for none of them. Classes that are not
    pairs are one group, if there are few. Source: Heydarian et al. 2022, MLCM: Multi-Label
    Confusion Matrix, to which "undecided" is added.
    """

    def __init__(self, classes: Sequence[HoiClass]) -> None:
        self._groups: dict[str, list[HoiClass]] = defaultdict(list)
        for entry in classes:
            if entry.verb and entry.object:
                self._groups[entry.object].append(entry)
        if not self._groups and len(classes) <= MAX_PLAIN_CLASSES:
            self._groups[""] = list(classes)
        self._place = {
            entry.class_id: (group, position)
            for group, members in self._groups.items()
            for position, entry in enumerate(members)
        }
        self._counts: dict[str, npt.NDArray[np.int64]] = {
            group: np.zeros((len(members) + 1, len(members) + 2), dtype=np.int64)
            for group, members in self._groups.items()
        }

    def add(self, verdicts: Mapping[int, Verdict], annotated: Iterable[int]) -> None:
        """Count one image by its verdicts and annotated class ids."""
        truth = set(map(int, annotated))
        by_group: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
        for class_id, verdict in verdicts.items():
            if class_id not in self._place:
                continue
            group, position = self._place[class_id]
            if verdict == "ignored" and class_id not in truth:
                continue
            by_group[group][verdict].append(position)
        for group, found in by_group.items():
            counts = self._counts[group]
            wrong, missed, right = found["wrong"], found["missed"], found["right"]
            counts[right, right] += 1
            counts[found["ignored"], -2] += 1
            if not wrong:
                counts[missed, -1] += 1
                continue
            stands_for = missed or [*right, *found["ignored"]] or [len(counts) - 1]
            counts[np.ix_(stands_for, wrong)] += 1

    def confusions(self) -> list[Confusion]:
        """Return the tables that hold a mistake and have several classes, worst first."""
        tables = []
        for group, members in self._groups.items():
            names = [entry.name for entry in members]
            verbs = [_spaced(entry.verb or "") for entry in members] if group else names
            tables.append(Confusion(_spaced(group), verbs, names, self._counts[group].tolist()))
        chosen = [table for table in tables if table.mistakes and len(table.verbs) > 1]
        return sorted(chosen, key=lambda table: -table.mistakes)


def _spaced(name: str) -> str:
    """Return one of HICO's names as people write it."""
    return name.replace("_", " ")
