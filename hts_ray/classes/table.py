"""The classes of a run: their ids, names and prompts, in the order of every score vector.

A class is a verb-object pair ("ride", "bicycle") or any named thing ("red car").
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt

from hts_ray.errors import ConfigError, DataError
from hts_ray.store import storage

MAX_CLASS_ID = 32767  # class ids are stored as int16


@dataclass(frozen=True)
class HoiClass:
    """One class: its id (0 to 32767), display name, optional verb and object, and prompts.

    `prompts[0]` is the primary sentence; there is at least one.
    """

    class_id: int
    name: str
    verb: str | None
    object: str | None
    prompts: tuple[str, ...]

    def __post_init__(self) -> None:
        if not 0 <= self.class_id <= MAX_CLASS_ID:
            raise ConfigError(
                field="class_id", value=self.class_id, remedy=f"use 0 to {MAX_CLASS_ID}"
            )
        if not self.prompts:
            raise ConfigError(field="prompts", value=self.name, remedy="give at least one prompt")


@dataclass(frozen=True, eq=False)
class ClassTable:
    """The C classes of a run, in the order of every score vector.

    `few_shot` maps 1, 5 and 10 to a (C,) bool mask of the classes with at most that many
    training positives, which becomes read-only; it is empty where that is not known. Raises
    DataError for no classes, and for ids, names or primary prompts that occur twice.
    """

    classes: tuple[HoiClass, ...]
    few_shot: Mapping[int, npt.NDArray[np.bool_]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.classes:
            raise DataError("a class table needs at least one class")
        for label, values in (
            ("class_id", [str(c.class_id) for c in self.classes]),
            ("name", self.names),
            ("primary prompt", self.primary_prompts),
        ):
            twice = first_repeat(values)
            if twice is not None:
                raise DataError(f"{label} {values[twice[1]]!r} occurs twice: make it unique")
        for level, mask in self.few_shot.items():
            if mask.shape != (len(self.classes),):
                raise DataError(
                    f"few_shot[{level}] has shape {mask.shape}, not ({len(self.classes)},)"
                )
            mask.setflags(write=False)

    def __len__(self) -> int:
        return len(self.classes)

    def __iter__(self) -> Iterator[HoiClass]:
        return iter(self.classes)

    def __getitem__(self, position: int) -> HoiClass:
        return self.classes[position]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ClassTable) and self.csv_bytes() == other.csv_bytes()

    def __hash__(self) -> int:
        return hash(self.classes)

    @cached_property
    def ids(self) -> npt.NDArray[np.int16]:
        """(C,) int16, read-only."""
        ids = np.array([c.class_id for c in self.classes], dtype=np.int16)
        ids.setflags(write=False)
        return ids

    @property
    def names(self) -> list[str]:
        """C display names."""
        return [c.name for c in self.classes]

    @property
    def primary_prompts(self) -> list[str]:
        """C primary sentences."""
        return [c.prompts[0] for c in self.classes]

    @property
    def prompts(self) -> list[tuple[str, ...]]:
        """C tuples of prompts, the primary one first."""
        return [c.prompts for c in self.classes]

    @cached_property
    def positions(self) -> Mapping[int, int]:
        """Class id to position in the table."""
        return {c.class_id: position for position, c in enumerate(self.classes)}

    def index_of(self, class_id: int) -> int:
        """Return the position of a class id; DataError naming the nearest id when unknown."""
        position = self.positions.get(int(class_id))
        if position is None:
            near = min(self.positions, key=lambda known: abs(known - int(class_id)))
            raise DataError(
                f"class_id {class_id} is not among the {len(self)} classes: the nearest is"
                f" {near} ({self.classes[self.positions[near]].name})"
            )
        return position

    def subset(self, ids: Iterable[int]) -> ClassTable:
        """Return the table of these class ids, in the order given; DataError for unknown ids."""
        rows = [self.index_of(class_id) for class_id in ids]
        return ClassTable(
            tuple(self.classes[row] for row in rows),
            {level: mask[rows] for level, mask in self.few_shot.items()},
        )

    def fingerprint(self) -> str:
        """Return a sha256 in hex that changes with any id, prompt, or their order."""
        content = [[c.class_id, list(c.prompts)] for c in self.classes]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def csv_bytes(self) -> bytes:
        """Return the CSV file from which `parse_class_csv` makes an equal table."""
        width = max(len(c.prompts) for c in self.classes)
        levels = sorted(self.few_shot)
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(
            ["class_id", "name", "verb", "object"]
            + [f"prompt_{i + 1}" for i in range(width)]
            + [f"few_{level}" for level in levels]
        )
        for row, c in enumerate(self.classes):
            padded = [*c.prompts, *[""] * (width - len(c.prompts))]
            flags = [int(self.few_shot[level][row]) for level in levels]
            writer.writerow([c.class_id, c.name, c.verb or "", c.object or "", *padded, *flags])
        return text.getvalue().encode()

    def to_csv(self, path: str | Path) -> None:
        """Write the table to a path or URI so that `read_class_csv` returns an equal one."""
        storage.write_bytes(str(path), self.csv_bytes())


def first_repeat(texts: Sequence[str]) -> tuple[int, int] | None:
    """Return the positions of the first text that was there before, whatever its case."""
    seen: dict[str, int] = {}
    for index, text in enumerate(texts):
        earlier = seen.setdefault(text.casefold(), index)
        if earlier != index:
            return earlier, index
    return None
