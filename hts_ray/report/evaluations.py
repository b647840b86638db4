"""What was measured in a run: the metrics of every evaluation and the students' training."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from hts_ray.metrics import RECALL_THRESHOLDS
from hts_ray.report.data import ComparisonRow, Role, TrainingCurve
from hts_ray.report.formatting import finite
from hts_ray.store import storage
from hts_ray.store.run import StageFolder

Metrics = Mapping[str, Any]

LABEL_SOURCES = {"pseudo": "HTS", "annotations": "Supervised", "none": "Zero-shot"}


def read_evaluations(run_dir: str) -> dict[str, dict[str, Any]]:
    """Return the metrics of every `evaluation-*` folder by a unique display name, by mAP.

    `student` is added: the folder of the student that was evaluated, empty if not told.
    """
    found: dict[str, dict[str, Any]] = {}
    for folder in storage.list_names(run_dir):
        if not folder.startswith("evaluation-"):
            continue
        values = read_object(storage.join(run_dir, folder, "metrics.json"))
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
    roles: dict[str, Role] = {"HTS": "hts", "Supervised": "supervised", "Zero-shot": "zero_shot"}
    main = {
        name: roles.get(_student_name(student), "")
        for name, values in metrics.items()
        if student and last_part(str(values["student"])) == last_part(student)
    }
    return [_row(name, values, main.get(name, "")) for name, values in metrics.items()]


def _row(name: str, values: Metrics, role: Role) -> ComparisonRow:
    return ComparisonRow(
        name=name,
        mean_ap=number(values, "mAP"),
        note=str(values.get("note") or ""),
        mean_ap_known_object=number(values, "mAP_known_object"),
        few_1=number(values, "few@1"),
        few_5=number(values, "few@5"),
        few_10=number(values, "few@10"),
        seconds=number(values, "seconds"),
        role=role,
    )


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
    for entry in storage.list_names(run_dir):
        folder = StageFolder(run_dir, "student", entry.removeprefix("student-"))
        path = folder.file("history.json")
        if not (entry.startswith("student-") and folder.finished and storage.exists(path)):
            continue
        history = storage.read_json(path)
        epochs = [epoch for epoch in history if isinstance(epoch, dict)]
        if epochs:
            name = names.get(entry) or _student_name(folder.path) or folder.key
            name = f"{name} ({folder.key})" if name in curves else name
            curves[name] = TrainingCurve(
                name, _column(epochs, "loss"), _column(epochs, "validation_mAP")
            )
    order = {name: place for place, name in enumerate(metrics)}
    return sorted(curves.values(), key=lambda curve: order.get(curve.name, len(order)))


def _column(epochs: Sequence[Metrics], key: str) -> list[float]:
    values = [number(epoch, key) for epoch in epochs]
    return [math.nan if value is None else value for value in values]


def _evaluated_student(run_dir: str, metrics: Metrics) -> str:
    """Return the folder of the student whose predictions were evaluated; empty if not told.

    Only names are taken from the stored paths: the run directory may have been moved.
    """
    source = last_part(str(metrics.get("predictions") or ""))
    if source.startswith("student-"):  # it was scored without a table of predictions
        return storage.join(run_dir, source)
    info = read_object(storage.join(run_dir, source, "table.json"))
    student = last_part(str(info.get("student") or ""))
    return storage.join(run_dir, student) if student else ""


def _student_name(folder: str) -> str:
    """Name a student by the labels it was trained on; empty if that is not told."""
    if not folder:
        return ""
    info = read_object(storage.join(folder, "student.json")).get("info") or {}
    return LABEL_SOURCES.get((info.get("train") or {}).get("labels", ""), "")


def number(values: Metrics, key: str) -> float | None:
    """Return a finite number of a mapping, or None."""
    value = values.get(key)
    return float(value) if isinstance(value, (int, float)) and finite(value) else None


def read_object(path: str) -> dict[str, Any]:
    """Return a JSON object; empty when the file is not there or holds something else."""
    value = storage.read_json(path) if storage.exists(path) else {}
    return value if isinstance(value, dict) else {}


def last_part(path: str) -> str:
    """Return the last name of a path or URI."""
    return path.rstrip("/").rsplit("/", 1)[-1]
