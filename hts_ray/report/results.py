"""What was measured in a run: every evaluation, the students' training, and the gap that is left.

The gap is the one from zero-shot to supervised; the page says how much of it a method closed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from hts_ray.metrics import RECALL_THRESHOLDS
from hts_ray.report.content import ClassRow, ComparisonRow, Role, TrainingCurve
from hts_ray.report.formatting import finite, percent, plural
from hts_ray.store import storage
from hts_ray.store.run import finished_stages

Metrics = Mapping[str, Any]

LABEL_SOURCES = {"pseudo": "HTS", "annotations": "Supervised", "none": "Zero-shot"}
_ROLES: dict[str, Role] = {"zero-shot": "zero_shot", "hts": "hts", "supervised": "supervised"}


def read_evaluations(run_dir: str) -> dict[str, dict[str, Any]]:
    """Return the metrics of every `evaluation-*` folder by a unique display name, by mAP.

    `student` is added: the folder of the student that was evaluated, empty where unknown.
    """
    found: dict[str, dict[str, Any]] = {}
    for folder in storage.list_names(run_dir):
        if not folder.startswith("evaluation-"):
            continue
        values = storage.read_object(storage.join(run_dir, folder, "metrics.json"))
        if values:
            key = folder.removeprefix("evaluation-")
            values["student"] = _evaluated_student(run_dir, values)
            name = str(values.get("name") or _student_name(values["student"]) or key)
            found[f"{name} ({key})" if name in found else name] = values
    return dict(sorted(found.items(), key=lambda entry: number(entry[1], "mAP") or 0.0))


def comparison_rows(metrics: Mapping[str, Metrics], student: str) -> list[ComparisonRow]:
    """Return every evaluation as a row; that of `student`, a folder, is the main one.

    The main row gets its role from the labels that the student learned from.
    """
    role = _ROLES.get(_student_name(student).lower(), "")
    return [
        ComparisonRow(
            name=name,
            mean_ap=number(values, "mAP"),
            note=str(values.get("note") or ""),
            mean_ap_known_object=number(values, "mAP_known_object"),
            few_1=number(values, "few@1"),
            few_5=number(values, "few@5"),
            few_10=number(values, "few@10"),
            seconds=number(values, "seconds"),
            role=role if student and last_part(values["student"]) == last_part(student) else "",
        )
        for name, values in metrics.items()
    ]


def by_class(values: Metrics, key: str, class_ids: Sequence[int]) -> dict[int, Any]:
    """Return a list of an evaluation by class id; empty when it does not fit the run's classes."""
    entries = values.get(key)
    ids = [int(i) for i in values.get("class_ids") or class_ids]
    if not isinstance(entries, list) or len(entries) != len(ids):
        return {}
    return dict(zip(ids, entries, strict=True))


def precision_recall(values: Metrics, class_ids: Sequence[int]) -> dict[int, list[float]]:
    """Return the interpolated precision (11,) of every class that has one."""
    found = by_class(values, "interpolated_precision", class_ids)
    return {
        class_id: [float(value) for value in curve]
        for class_id, curve in found.items()
        if isinstance(curve, list) and len(curve) == len(RECALL_THRESHOLDS)
    }


def read_training(run_dir: str, metrics: Mapping[str, Metrics]) -> list[TrainingCurve]:
    """Return the record of every finished student, named as its evaluation is, in that order."""
    names = {last_part(str(values["student"])): name for name, values in metrics.items()}
    curves: dict[str, TrainingCurve] = {}
    for folder in sorted(finished_stages(run_dir, "student"), key=lambda folder: folder.key):
        path = folder.file("history.json")
        history = storage.read_json(path) if storage.exists(path) else []
        epochs = [epoch for epoch in history if isinstance(epoch, dict)]
        loss, validation = (
            [math.nan if (value := number(epoch, key)) is None else value for epoch in epochs]
            for key in ("loss", "validation_mAP")
        )
        if epochs:
            name = names.get(last_part(folder.path)) or _student_name(folder.path) or folder.key
            name = f"{name} ({folder.key})" if name in curves else name
            curves[name] = TrainingCurve(name, loss, validation)
    order = {name: place for place, name in enumerate(metrics)}
    return sorted(curves.values(), key=lambda curve: order.get(curve.name, len(order)))


def _evaluated_student(run_dir: str, metrics: Metrics) -> str:
    """Return the folder of the student whose predictions were evaluated; empty where unknown.

    Only names are taken from the stored paths: the run directory may have been moved.
    """
    source = last_part(str(metrics.get("predictions") or ""))
    if source.startswith("student-"):  # it was scored without a table of predictions
        return storage.join(run_dir, source)
    info = storage.read_object(storage.join(run_dir, source, "table.json"))
    student = last_part(str(info.get("student") or ""))
    return storage.join(run_dir, student) if student else ""


def _student_name(folder: str) -> str:
    """Name a student by the labels it was trained on; empty where that is unknown."""
    if not folder:
        return ""
    info = storage.read_object(storage.join(folder, "student.json")).get("info") or {}
    return LABEL_SOURCES.get((info.get("train") or {}).get("labels", ""), "")


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
    roles = by_role(rows)
    zero, hts, supervised = (roles.get(role) for role in ("zero_shot", "hts", "supervised"))
    if zero is None or hts is None or not (finite(zero.mean_ap) and finite(hts.mean_ap)):
        return ""
    gain = f"{abs(hts.mean_ap - zero.mean_ap) * 100:.1f}"
    if float(gain) == 0:
        change = f"{hts.name} equals {zero.name} at {percent(zero.mean_ap)} % mAP"
    else:
        way = "above" if hts.mean_ap > zero.mean_ap else "below"
        change = f"{hts.name} reaches {percent(hts.mean_ap)} % mAP, {gain} points {way} {zero.name}"
    closed = row_gap(hts, rows)
    if closed is None or supervised is None:
        return f"{change}."
    top = f"{supervised.name} ({percent(supervised.mean_ap)} %)"
    part = "none" if closed < 0 else f"{closed * 100:.0f} %"
    return f"{change}: {part} of the gap to {top} is closed."


def row_gap(row: ComparisonRow, rows: Sequence[ComparisonRow]) -> float | None:
    """Return the share of the gap that a row closed; None for the two rows that define it."""
    roles = by_role(rows)
    zero, supervised = roles.get("zero_shot"), roles.get("supervised")
    if zero is None or supervised is None or row is zero or row is supervised:
        return None
    return gap_closed(zero.mean_ap, row.mean_ap, supervised.mean_ap)


def by_role(rows: Sequence[ComparisonRow]) -> dict[Role, ComparisonRow]:
    """Return one row a role: the first that was given it, else the first whose name says so."""
    ordered = sorted(rows, key=lambda row: not row.role)
    return {row.role or _name_role(row.name): row for row in reversed(ordered)}


def _name_role(name: str) -> Role:
    start = name.casefold().replace("_", "-").replace(" ", "-")
    return next((role for prefix, role in _ROLES.items() if start.startswith(prefix)), "")


def wins_sentence(rows: Sequence[ClassRow], zero: str | None, hts: str | None) -> str:
    """Count the classes where HTS is above zero-shot, because a mean hides them."""
    pairs = [(row.ap.get(zero or ""), row.ap.get(hts or "")) for row in rows]
    both = [(a, b) for a, b in pairs if finite(a) and finite(b)]
    if not both:
        return ""
    better, worse = sum(b > a for a, b in both), sum(b < a for a, b in both)
    return (
        f"Against {zero}, {hts} has a higher AP in {better} of {len(both)}"
        f" {plural('class', len(both))} and a lower one in {worse}."
    )


def number(values: Metrics, key: str) -> float | None:
    """Return a finite number of a mapping, or None."""
    value = values.get(key)
    return float(value) if isinstance(value, (int, float)) and finite(value) else None


def last_part(path: str) -> str:
    """Return the last name of a path or URI."""
    return path.rstrip("/").rsplit("/", 1)[-1]
