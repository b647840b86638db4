"""`hts review` and its section of the report: how far the machine's labels agree with people's.

An agreement is over what people decided, and JSON-able, as it is stored, printed and shown:

- `images` that both have labels of, `images_equal` of them without a difference, and
  `images_without_machine_labels`;
- `overall` and, by class, `per_class`: see `Counts`;
- `disagreements`: every label that people changed, by image, the machine's most probable
  mistakes first; `probability` is the machine's, where it was positive.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from markupsafe import Markup

from hts_ray.classes import ClassTable
from hts_ray.engine.run import Run
from hts_ray.errors import DataError
from hts_ray.images.manifest import FILE as MANIFEST
from hts_ray.images.thumbnail import stored_thumbnail
from hts_ray.labels.corrections import OVERRIDES, read_overrides
from hts_ray.metrics import wilson_interval
from hts_ray.report.content import Section, Verdict
from hts_ray.report.page import environment
from hts_ray.store import storage
from hts_ray.store.run import StageFolder, content_hash, find_stage, finished_stages, settings_hash
from hts_ray.store.tables import CORRECTIONS_SCHEMA

Row = Mapping[str, Any]

TABLE = "review"
AGREEMENT = "agreement.json"
SAMPLE = "agreement_sample.json"  # of an import: which of its images were drawn at random
# What the machine and people said of a label that is counted as such.
_SAID = {
    "wrong": ("positive", "negative"),
    "undecided": ("ignored", "positive"),
    "missed": ("negative", "positive"),
}
# What the page calls a label that people changed, by what the machine had said.
_VERDICTS: dict[str, Verdict] = {"positive": "wrong", "negative": "missed", "ignored": "ignored"}
MAX_IMAGES = 24
_TEMPLATES = Path(__file__).parent
_THUMBNAIL = (360, 12_000)  # pixels of a side, bytes


@dataclass(frozen=True)
class Counts:
    """Labels that people decided, by what the machine had said.

    - `confirmed` and `wrong` are the machine's positives that people call positive and negative;
    - `undecided` and `missed` are people's positives that the machine ignored and called negative;
    - `absent` are negatives of both.

    What the machine ignored is therefore not found where people see it, and no mistake where
    they do not.
    """

    confirmed: int = 0
    wrong: int = 0
    undecided: int = 0
    missed: int = 0
    absent: int = 0

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
        """Return counts, shares with 95 % intervals, and kappa; None for a share of nothing.

        `precision` is the share of the machine's positives that are right, `recall` the share of
        people's positives that the machine has.
        """
        judged = self.confirmed + self.wrong
        present = self.confirmed + self.undecided + self.missed
        return {
            **asdict(self),
            "precision": self.confirmed / judged if judged else None,
            "precision_interval": wilson_interval(self.confirmed, judged) if judged else None,
            "recall": self.confirmed / present if present else None,
            "recall_interval": wilson_interval(self.confirmed, present) if present else None,
            "kappa": self.kappa,
        }


def measure_agreement(
    pseudo_labels: pa.Table, corrections: pa.Table, class_table: ClassTable
) -> dict[str, Any]:
    """Compare rows of `pseudo_labels` with corrections (CORRECTIONS_SCHEMA) of the same images.

    Only classes that a correction calls positive or negative count. Raises DataError when no
    image is in both.
    """
    people = {row["image_id"]: row for row in corrections.to_pylist()}
    rows = [row for row in pseudo_labels.to_pylist() if row["image_id"] in people]
    if not rows:
        raise DataError(
            f"no image is among both {len(people)} corrected ones and {len(pseudo_labels)} with"
            " pseudo-labels: the corrections belong to other labels"
        )
    names = dict(zip(class_table.positions, class_table.names, strict=True))
    tallies: dict[int, Counter[str]] = defaultdict(Counter)
    disagreements: list[dict[str, Any]] = []
    equal = 0
    for row in rows:
        changed = []
        for class_id, outcome in _outcomes(row, people[row["image_id"]]):
            if class_id in names:
                tallies[class_id][outcome] += 1
                if outcome in _SAID:
                    changed.append(_disagreement(row, class_id, names[class_id], outcome))
        equal += not changed
        disagreements += sorted(changed, key=lambda entry: -(entry["probability"] or 0.0))
    return {
        "images": len(rows),
        "images_equal": equal,
        "images_without_machine_labels": len(people) - len(rows),
        "overall": Counts(**sum(tallies.values(), Counter[str]())).to_dict(),
        "per_class": [
            {"class_id": class_id, "name": name, **Counts(**tallies[class_id]).to_dict()}
            for class_id, name in names.items()
            if class_id in tallies and tallies[class_id].keys() - {"absent"}
        ],
        "disagreements": disagreements,
    }


def _outcomes(row: Row, correction: Row) -> Iterator[tuple[int, str]]:
    """Yield (class id, name of its count) of the classes that people decided."""
    machine, ignored = set(row["positive_ids"]), set(row["ignored_ids"])
    present, absent = set(correction["positive_ids"]), set(correction["negative_ids"] or ())
    for class_id in row["positive_ids"]:
        if class_id in present:
            yield class_id, "confirmed"
        elif class_id in absent:
            yield class_id, "wrong"
    for class_id in sorted(present - machine):
        yield class_id, "undecided" if class_id in ignored else "missed"
    for class_id in absent - machine - ignored:
        yield class_id, "absent"


def _disagreement(row: Row, class_id: int, name: str, outcome: str) -> dict[str, Any]:
    machine, human = _SAID[outcome]
    probability = dict(zip(row["positive_ids"], row["probability"] or (), strict=False))
    return {
        "image_id": row["image_id"],
        "uri": row["uri"],
        "class_id": class_id,
        "name": name,
        "machine": machine,
        "human": human,
        "probability": probability.get(class_id),
    }


def corrections_of(path: str) -> pa.Table:
    """Return all corrections of an import's folder, those for validation and those to apply.

    `path` may also be one Parquet file of corrections or annotations.
    """
    if path.endswith(".parquet"):
        return read_overrides(path)
    overrides = read_overrides(storage.join(path, OVERRIDES))
    manifest = storage.join(path, MANIFEST)
    if not storage.exists(manifest):
        return overrides
    validation = read_overrides(manifest)
    taken = set(overrides["image_id"].to_pylist())
    more = [image_id not in taken for image_id in validation["image_id"].to_pylist()]
    schema = pa.schema(CORRECTIONS_SCHEMA, metadata=None)
    parts = [overrides.cast(schema), validation.filter(pa.array(more, pa.bool_())).cast(schema)]
    return pa.concat_tables(parts).sort_by("image_id")


def agreement_of(
    class_table: ClassTable,
    corrections: pa.Table,
    labels: StageFolder,
    sample: Collection[str] | None = None,
) -> dict[str, Any] | None:
    """Return the agreement of corrections with a pseudo_labels folder.

    Images whose corrections the folder has applied are left out: they agree because they were
    made to. If there are no others they count, and `applied` says so. Where some images were
    chosen, `sample` are those that were drawn: they alone count, or the doubtful images that
    people looked at first would speak for all. Returns None when none of them was corrected.
    """
    drawn = corrections
    if sample is not None:
        drawn = corrections.filter(pc.is_in(corrections["image_id"], pa.array(sample, pa.string())))
        if not len(drawn):
            return None
    corrected = storage.read_object(labels.file("table.json")).get("corrected_ids", ())
    applied = pc.is_in(drawn["image_id"], pa.array(corrected, pa.string()))
    others = drawn.filter(pc.invert(applied))
    judged = others if len(others) else drawn
    columns = ["image_id", "uri", "positive_ids", "ignored_ids", "probability"]
    return {
        **measure_agreement(labels.read(columns), judged, class_table),
        "pseudo_labels": f"{labels.table}-{labels.key}",
        "left_out_as_applied": len(drawn) - len(judged),
        "left_out_as_chosen": len(corrections) - len(drawn),
        "applied": len(others) == 0,
    }


def review(run: Run, path: str, labels: StageFolder) -> dict[str, Any]:
    """Measure the corrections at `path`, publish `review-KEY/agreement.json` and return it.

    Raises DataError when only chosen images were corrected, which say nothing about the others.
    """
    corrections, file = corrections_of(path), storage.join(path, SAMPLE)
    sample = storage.read_json(file)["image_ids"] if storage.exists(file) else None
    found = agreement_of(run.class_table, corrections, labels, sample)
    if found is None:
        raise DataError(
            f"{path}: none of the corrected images was drawn at random, so that they cannot tell"
            " how good the labels are: finish the review page from its first image on"
        )
    stage = run.stage(TABLE, settings_hash(labels.key, content_hash(corrections), sample))
    storage.write_json(stage.file(AGREEMENT), found)
    rows = {"rows_in": len(corrections), "rows_out": found["images"], "quarantined": 0}
    stage.publish({**rows, **found["overall"]})
    return found


def review_sections(run_dir: str) -> list[Section]:
    """Return the report's section about a run's latest `hts review`; none without one."""
    files = [stage.file(AGREEMENT) for stage in finished_stages(run_dir, TABLE)]
    files = [file for file in files if storage.exists(file)]  # not all folders review-* are ours
    if not files:
        return []
    history = [storage.read_json(file) for file in files]
    found, latest = history[-1], find_stage(run_dir, "pseudo_labels")
    labels = None if latest is None else f"{latest.table}-{latest.key}"
    images = disagreed_images(found["disagreements"])
    by_class = sorted(
        found["per_class"], key=lambda row: (-(row["wrong"] + row["missed"]), row["name"])
    )
    html = environment(_TEMPLATES).get_template("review.html.j2").render(
        found=found,
        rows=[{**found["overall"], "name": "all classes"}, *by_class],
        file=files[-1],
        images=[(stored_thumbnail(of[0]["uri"] or "", *_THUMBNAIL), of)
                for of in images[:MAX_IMAGES]],
        verdicts=_VERDICTS,
        differing=len(images),
        history=history if len(history) > 1 else [],
        newer=None if labels == found["pseudo_labels"] else labels,
    )  # fmt: skip
    return [Section("review", "Agreement with people", Markup(html))]  # noqa: S704 - escaped there


def disagreed_images(disagreements: Iterable[Row]) -> list[list[Row]]:
    """Return the disagreements of each image that has some, the worst image first.

    Wrong and missed labels come before those that the machine left undecided: only they teach
    the student something wrong.
    """
    images: dict[str, list[Row]] = defaultdict(list)
    for entry in disagreements:
        images[entry["image_id"]].append(entry)
    return sorted(images.values(), key=_badness, reverse=True)


def _badness(entries: list[Row]) -> tuple[int, int, float]:
    mistakes = sum(entry["machine"] != "ignored" for entry in entries)
    return mistakes, len(entries), max(entry["probability"] or 0.0 for entry in entries)
