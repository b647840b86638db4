"""The model card of a student: `model_card.md.j2`, filled with what is recorded about it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jinja2 import ChainableUndefined, Environment, FileSystemLoader

from hts_ray.classes import hico_classes
from hts_ray.store import storage
from hts_ray.store.packaged import BUILTIN
from hts_ray.store.run import finished_stages
from hts_ray.student.checkpoints import description_of, student_fingerprint
from hts_ray.student.model import Student

CARD = "README.md"


def model_card(student: Student, folder: str) -> str:
    """Return the model card (Markdown) of the student that lies in `folder`.

    It states what is recorded: settings, the run's teacher, and the metrics of those evaluations
    in the student's run directory that measured this very student.
    """
    info = description_of(folder).get("info", {})
    run_dir, _, name = folder.rpartition("/")
    in_run = name.startswith("student-")
    provenance = storage.join(run_dir, "provenance.json")
    recorded = in_run and storage.exists(provenance)
    templates = FileSystemLoader(Path(__file__).parent)
    markdown = Environment(  # noqa: S701 - the card is Markdown, not HTML
        loader=templates,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=ChainableUndefined,
    )
    return markdown.get_template("model_card.md.j2").render(
        names=student.class_table.names,
        hico=student.class_table == hico_classes(),
        scale=f"{float(student.logit_scale):.4g}",
        start=_starting_point(student),
        builtin=student.config.model.startswith(BUILTIN),
        size=student.image_size,
        features=student.classifier.shape[1],
        space=student.config.feature_space,
        parameters=f"{sum(value.numel() for value in student.parameters()) / 1e6:.1f}",
        info=info,
        train=info.get("train", {}),
        run=storage.read_json(provenance) if recorded else {},
        evaluations=list(_evaluations(run_dir, folder)) if in_run else [],
    )


def _starting_point(student: Student) -> str:
    config = student.config
    # A path of the machine that trained it says nothing to others.
    name = Path(config.model).name if config.model.startswith("local-dir:") else config.model
    pretrained = config.pretrained
    return f"{name}, weights {Path(pretrained).name}" if pretrained else name


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
