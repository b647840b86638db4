"""How far the machine's labels agree with people's, over the classes that people decided."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import pyarrow as pa

from hts_ray.classes import ClassTable
from hts_ray.errors import DataError
from hts_ray.metrics import wilson_interval

Machine = Literal["positive", "ignored", "negative"]


@dataclass(frozen=True)
class Counts:
    """Labels that people decided, by what the machine had said.

    `confirmed` and `wrong` are the machine's positives that people call positive and negative;
    `undecided` and `missed` people's positives that the machine ignored and called negative;
    `absent` are negatives of both.
    """

    confirmed: int = 0
    wrong: int = 0
    undecided: int = 0
    missed: int = 0
    absent: int = 0

    @property
    def precision(self) -> float | None:
        """Share of the machine's positives that are right; None without any."""
        return _share(self.confirmed, self.confirmed + self.wrong)

    @property
    def recall(self) -> float | None:
        """Share of people's positives that the machine has; what it ignored it does not have."""
        return _share(self.confirmed, self.confirmed + self.undecided + self.missed)

    @property
    def kappa(self) -> float | None:
        """Agreement beyond chance, at most 1; None without labels or where all are of one kind.

        What the machine ignored is left out. Source: Cohen 1960.
        """
        both = self.confirmed + self.absent
        total = both + self.wrong + self.missed
        if not total:
            return None
        machine = (self.confirmed + self.wrong) / total
        people = (self.confirmed + self.missed) / total
        chance = machine * people + (1 - machine) * (1 - people)
        return None if chance == 1 else (both / total - chance) / (1 - chance)

    def to_dict(self) -> dict[str, Any]:
        """Return counts and shares, with 95 % intervals, JSON-able."""
        judged = self.confirmed + self.wrong
        present = self.confirmed + self.undecided + self.missed
        return {
            **asdict(self),
            "precision": self.precision,
            "precision_interval": wilson_interval(self.confirmed, judged) if judged else None,
            "recall": self.recall,
            "recall_interval": wilson_interval(self.confirmed, present) if present else None,
            "kappa": self.kappa,
        }


@dataclass(frozen=True)
class Disagreement:
    """A label that people changed; `probability` is the machine's, where it was positive."""

    image_id: str
    uri: str
    class_id: int
    name: str
    machine: Machine
    human: Literal["positive", "negative"]
    probability: float | None = None


@dataclass(frozen=True)
class Agreement:
    """Agreement over `images` that both have labels of; `images_equal` have no disagreement.

    What the machine ignored counts as not found where people found it, and as no mistake where
    they did not. `unlabeled` corrected images have no machine labels.
    """

    images: int
    images_equal: int
    unlabeled: int
    overall: Counts
    per_class: Mapping[int, Counts]
    disagreements: tuple[Disagreement, ...]

    def to_dict(self, class_table: ClassTable) -> dict[str, Any]:
        """Return everything as JSON: overall, by class (those with a positive) and one by one."""
        names = dict(zip(class_table.positions, class_table.names, strict=True))
        return {
            "images": self.images,
            "images_equal": self.images_equal,
            "images_without_machine_labels": self.unlabeled,
            "overall": self.overall.to_dict(),
            "per_class": [
                {"class_id": class_id, "name": names[class_id], **counts.to_dict()}
                for class_id, counts in self.per_class.items()
            ],
            "disagreements": [asdict(entry) for entry in self.disagreements],
        }


def measure_agreement(
    pseudo_labels: pa.Table, corrections: pa.Table, class_table: ClassTable
) -> Agreement:
    """Compare rows of `pseudo_labels` with corrections (CORRECTIONS_SCHEMA) of the same images.

    Only classes that a correction calls positive or negative count. Disagreements come by image,
    the machine's most probable mistakes first. Raises DataError when no image is in both.
    """
    people = {row["image_id"]: row for row in corrections.to_pylist()}
    rows = [row for row in pseudo_labels.to_pylist() if row["image_id"] in people]
    if not rows:
        raise DataError(
            f"no image is among both {len(people)} corrected ones and {len(pseudo_labels)} with"
            " pseudo-labels: the corrections belong to other labels"
        )
    names = dict(zip(class_table.positions, class_table.names, strict=True))
    tallies: dict[int, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    disagreements: list[Disagreement] = []
    equal = 0
    for row in rows:
        found = list(_compared(row, people[row["image_id"]], names))
        changed = [entry for outcome, entry in found if outcome != "confirmed"]
        for outcome, entry in found:
            tallies[entry.class_id][outcome] += 1
        for class_id in _absent(row, people[row["image_id"]], names):
            tallies[class_id]["absent"] += 1
        equal += not changed
        disagreements += sorted(changed, key=lambda entry: -(entry.probability or 0.0))
    per_class = {i: Counts(**tallies[i]) for i in names if i in tallies}
    overall = _sum(per_class.values())
    return Agreement(
        images=len(rows),
        images_equal=equal,
        unlabeled=len(people) - len(rows),
        overall=overall,
        per_class={i: counts for i, counts in per_class.items() if tallies[i].keys() - {"absent"}},
        disagreements=tuple(disagreements),
    )


def _compared(
    row: Mapping[str, Any], correction: Mapping[str, Any], names: Mapping[int, str]
) -> Iterable[tuple[str, Disagreement]]:
    """Yield (name of a count, label) for every label that is positive for either side."""
    probability = dict(zip(row["positive_ids"], row["probability"] or (), strict=False))
    machine, ignored = set(row["positive_ids"]), set(row["ignored_ids"])
    present, absent = set(correction["positive_ids"]), set(correction["negative_ids"] or ())

    def label(class_id: int, said: Machine, human: Literal["positive", "negative"]) -> Disagreement:
        return Disagreement(
            row["image_id"], row["uri"], class_id, names[class_id], said, human,
            probability.get(class_id),
        )  # fmt: skip

    for class_id in row["positive_ids"]:
        if class_id in names and class_id in present:
            yield "confirmed", label(class_id, "positive", "positive")
        elif class_id in names and class_id in absent:
            yield "wrong", label(class_id, "positive", "negative")
    for class_id in sorted(present - machine):
        if class_id not in names:
            continue
        if class_id in ignored:
            yield "undecided", label(class_id, "ignored", "positive")
        else:
            yield "missed", label(class_id, "negative", "positive")


def _absent(
    row: Mapping[str, Any], correction: Mapping[str, Any], names: Mapping[int, str]
) -> set[int]:
    """Return the classes that both sides call negative."""
    said = {*row["positive_ids"], *row["ignored_ids"]}
    return (set(correction["negative_ids"] or ()) & names.keys()) - said


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def _sum(counts: Iterable[Counts]) -> Counts:
    listed = list(counts)
    return Counts(
        confirmed=sum(entry.confirmed for entry in listed),
        wrong=sum(entry.wrong for entry in listed),
        undecided=sum(entry.undecided for entry in listed),
        missed=sum(entry.missed for entry in listed),
        absent=sum(entry.absent for entry in listed),
    )
