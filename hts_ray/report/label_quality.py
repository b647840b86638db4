"""Pseudo-labels against annotations: verdicts, calibration, and which verbs are taken for which.

Annotations judge finished labels here; they never make them.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from hts_ray.classes import HoiClass
from hts_ray.classes.prompts import spaced
from hts_ray.report.content import Confusion, ReliabilityBin, Verdict

Row = Mapping[str, Any]

BINS = 10
# Without objects to split it, one table of all classes is readable up to here.
MAX_PLAIN_CLASSES = 30


@dataclass
class LabelQuality:
    """Counts over all annotated images: verdicts and annotations by class id.

    `judged` holds (probability, right) of every pseudo-label that the annotations judge.
    """

    verdicts: Counter[tuple[int, Verdict]] = field(default_factory=Counter)
    annotated: Counter[int] = field(default_factory=Counter)
    judged: list[tuple[float, bool]] = field(default_factory=list)
    confusions: list[Confusion] = field(default_factory=list)

    def total(self, verdict: Verdict) -> int:
        """Return how many classes of all images got a verdict."""
        return sum(number for (_, found), number in self.verdicts.items() if found == verdict)


def judge(row: Row, annotated: Row | None) -> list[tuple[int, Verdict]]:
    """Return (class id, verdict) of every class that was labeled, ignored or missed.

    `row` is one of `pseudo_labels`, `annotated` the manifest's row of the same image. A
    pseudo-label is wrong when the annotations do not list it, which counts unknown classes as
    negatives as HICO's metric does; ambiguous ones are not judged. Without annotations nothing is.
    """
    positive = row["positive_ids"]
    if annotated is None:
        verdicts: list[tuple[int, Verdict]] = [(class_id, "unjudged") for class_id in positive]
        truth, ambiguous = set[int](), set[int]()
    else:
        truth = set(annotated["positive_ids"])
        ambiguous = set(annotated["ambiguous_ids"] or ()) - truth
        verdicts = [
            (i, "right" if i in truth else "unjudged" if i in ambiguous else "wrong")
            for i in positive
        ]
    ignored = [i for i in row["ignored_ids"] if i not in positive]
    verdicts += [(i, "missed") for i in sorted(truth - {*positive, *ignored})]
    return verdicts + [(i, "ignored") for i in ignored]


def measure(pairs: Iterable[tuple[Row, Row]], classes: Sequence[HoiClass]) -> LabelQuality:
    """Count what the report says of the pseudo-labels, over (pseudo-labels, annotations) of images.

    The rows are those that `judge` takes.
    """
    quality = LabelQuality()
    table = ConfusionTable(classes)
    for row, annotated in pairs:
        verdicts = judge(row, annotated)
        verdict_of = dict(verdicts)
        quality.verdicts.update(verdicts)
        quality.annotated.update(annotated["positive_ids"])
        for class_id, probability in zip(row["positive_ids"], row["probability"], strict=True):
            verdict = verdict_of[class_id]
            if verdict != "unjudged":
                quality.judged.append((probability, verdict == "right"))
        table.add(verdict_of, set(annotated["positive_ids"]))
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
    for place in np.unique(places).tolist():
        chosen = places == place
        labels, mean = int(chosen.sum()), float(probabilities[chosen].mean())
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


class ConfusionTable:
    """Counts, within each object, which verbs were labeled where which are annotated.

    An image can have several verbs of an object. A wrong label is therefore counted against the
    verbs that were missed there, else against all that are annotated, else against "none of
    these". Classes that are not pairs are one group, if there are few. Source: Heydarian et al.
    2022, MLCM: Multi-Label Confusion Matrix, to which "undecided" is added.
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

    def add(self, verdicts: Mapping[int, Verdict], truth: set[int]) -> None:
        """Count one image by its verdicts and annotated class ids."""
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
            instead_of = missed or [*right, *found["ignored"]] or [len(counts) - 1]
            counts[np.ix_(instead_of, wrong)] += 1

    def confusions(self) -> list[Confusion]:
        """Return the tables that hold a mistake and have several classes, worst first."""
        tables = []
        for group, members in self._groups.items():
            names = [entry.name for entry in members]
            verbs = [spaced(entry.verb or "") for entry in members] if group else names
            tables.append(Confusion(spaced(group), verbs, names, self._counts[group].tolist()))
        chosen = [table for table in tables if table.mistakes and len(table.verbs) > 1]
        return sorted(chosen, key=lambda table: -table.mistakes)
