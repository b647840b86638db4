"""The model card of a student: `model_card.md`, filled with what is recorded about it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

from hts_ray.classes import hico_classes
from hts_ray.store import storage
from hts_ray.store.run import finished_stages
from hts_ray.student.checkpoints import description_of, student_fingerprint
from hts_ray.student.model import Student

CARD = "README.md"
_LISTED_CLASSES = 20
_LABELS = {
    "annotations": "Labels: human annotations (supervised).",
    "none": "None: zero-shot. The classifier holds the text embeddings of the class prompts.",
}
_METRICS = ("mAP", "mAP_known_object", "few@1", "few@5", "few@10")


def model_card(student: Student, folder: str) -> str:
    """Return the model card (Markdown) of the student that lies in `folder`.

    It states what is recorded: settings, the run's teacher, and the metrics of those evaluations
    in the student's run directory that measured this very student.
    """
    info = description_of(folder).get("info", {})
    run_dir, _, name = folder.rpartition("/")
    in_run = name.startswith("student-")
    table, config = student.class_table, student.config
    more = len(table) - _LISTED_CLASSES
    listed = [f"- {name}" for name in table.names[:_LISTED_CLASSES]]
    template = Template(files(__package__).joinpath("model_card.md").read_text("utf-8"))
    return template.substitute(
        count=len(table),
        scale=f"{float(student.logit_scale):.4g}",
        start=_starting_point(student),
        size=student.image_size,
        features=student.classifier.shape[1],
        space=config.feature_space,
        parameters=f"{sum(value.numel() for value in student.parameters()) / 1e6:.1f}",
        classes="HICO's 600 verb-object pairs"
        if table == hico_classes()
        else f"{len(table)} classes",
        listed="\n".join([*listed, f"- and {more} more"] if more > 0 else listed),
        **_training(info, _provenance(run_dir) if in_run else {}),
        evaluation=_evaluation(list(_evaluations(run_dir, folder)) if in_run else []),
        terms=_terms(student, info),
    )


def _starting_point(student: Student) -> str:
    config = student.config
    # A path of the machine that trained it says nothing to others.
    name = Path(config.model).name if config.model.startswith("local-dir:") else config.model
    pretrained = config.pretrained
    return f"{name}, weights {Path(pretrained).name}" if pretrained else name


def _training(info: Mapping[str, Any], provenance: Mapping[str, Any]) -> dict[str, str]:
    """Return what the student learned from, and its settings and versions as far as known."""
    train = info.get("train", {})
    parts = []
    if train and train.get("labels") != "none":
        rows = {
            "loss": train.get("loss"),
            "epochs": info.get("epochs"),
            "batch size": train.get("batch_size"),
            "learning rate": train.get("optim", {}).get("lr"),
            "trained part": train.get("trainable"),
            "seed": info.get("seed"),
        }
        parts.append(_table(("", ""), rows.items()))
    versions = provenance.get("versions", {})
    known = [f"{key} {versions[key]}" for key in ("hts_ray", "torch", "ray") if key in versions]
    if known:
        commit = provenance.get("git_commit")
        parts.append(f"Made with {', '.join(known)}{f', commit {commit}' if commit else ''}.")
    return {
        "labels": _labels(info, train, provenance),
        "training": "".join(f"\n{part}\n" for part in parts),
    }


def _labels(info: Mapping[str, Any], train: Mapping[str, Any], made: Mapping[str, Any]) -> str:
    imported = info.get("imported")
    if imported:
        return (
            f"Imported from `{imported.get('file')}` (sha256 {imported.get('sha256')}), a"
            " checkpoint of the paper's code. Its training is not recorded there."
        )
    if train.get("labels") == "pseudo":
        teacher = made.get("teacher_model")
        named = f" ({teacher})" if teacher else ""
        return (
            f"Labels: pseudo-labels of a generative captioner{named}, filtered. No human label of"
            " an image was used."
        )
    return _LABELS.get(train.get("labels", ""), "Not recorded.")


def _evaluation(evaluations: Iterable[Mapping[str, Any]]) -> str:
    rows = []
    for result in evaluations:
        values = [result.get(name) for name in _METRICS]
        cells = ["-" if value is None else f"{100 * value:.1f}" for value in values]
        rows.append([result.get("num_images"), result.get("num_classes"), *cells])
    if not rows:
        return "None was found beside the student."
    head = ("images", "classes with a positive", "mAP", "known object", "Few@1", "Few@5", "Few@10")
    return f"HICO's protocol, mean average precision in %:\n\n{_table(head, rows)}"


def _table(head: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    """Return a Markdown table."""
    cells = [list(head), *(list(row) for row in rows)]
    cells.insert(1, ["---"] * len(cells[0]))
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in cells)


def _terms(student: Student, info: Mapping[str, Any]) -> str:
    if "imported" in info:
        return "The checkpoint that it was imported from has terms of its own."
    if student.config.model.startswith("builtin:"):
        return "The model it started from ships with hts_ray, under Apache-2.0."
    return f"The weights it started from ({_starting_point(student)}) have terms of their own."


def _provenance(run_dir: str) -> Mapping[str, Any]:
    path = storage.join(run_dir, "provenance.json")
    found = storage.read_json(path) if storage.exists(path) else {}
    return found if isinstance(found, dict) else {}


def _evaluations(run_dir: str, folder: str) -> Iterator[dict[str, Any]]:
    """Yield the metrics of finished evaluations that measured the student in `folder`."""
    fingerprint = student_fingerprint(folder)
    for stage in finished_stages(run_dir, "evaluation"):
        metrics = storage.read_json(stage.file("metrics.json"))
        measured = str(metrics.get("predictions", "")).rstrip("/").rsplit("/", 1)[-1]
        # Names and not paths: a run may have been moved. Predictions know whose they are.
        sidecar = storage.join(run_dir, measured, "table.json")
        scored_by = storage.read_json(sidecar) if storage.exists(sidecar) else {}
        if measured == folder.rsplit("/", 1)[-1] or (
            scored_by.get("student_fingerprint") == fingerprint
        ):
            yield metrics
