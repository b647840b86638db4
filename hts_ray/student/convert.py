"""A student in other forms: a folder with a model card, open_clip, ONNX, the paper's format.

Every export is read again the way its users will read it and compared with the student before
it is put in place; nothing is ever written over.

Shapes: N images, S image size, C classes, D features.
"""

from __future__ import annotations

import json
import logging
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from jinja2 import ChainableUndefined, Environment, FileSystemLoader
from torch import Tensor

from hts_ray.classes import hico_classes
from hts_ray.errors import ConfigError, DataError, UserError
from hts_ray.store import storage
from hts_ray.store.outputs import new_output, refuse_existing
from hts_ray.store.packaged import BUILTIN
from hts_ray.store.run import finished_stages
from hts_ray.student import checkpoints
from hts_ray.student.checks import student_clip
from hts_ray.student.model import Student
from hts_ray.student.official import HICO_CLASSES, format_error, official_checkpoint, read_official

TOLERANCE = 1e-3
CARD = "README.md"
_ONNX_LIMIT = 2**31 - 2**24  # a protobuf's size, less the graph itself
_Compute = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Exported:
    """An export that was read again: `again` computes what `expected` does.

    `compared` names what they compute, `difference` is the largest absolute one between them, and
    `notes` say how the export is used.
    """

    expected: _Compute
    again: _Compute
    notes: tuple[str, ...]
    compared: str = "logits"
    difference: float = math.nan


@dataclass(frozen=True)
class _Source:
    student: Student
    folder: str
    output: str


def export_student(path: str, form: str, output: str) -> Exported:
    """Write the student at `path` (run directory or folder) in a form of `FORMATS` to `output`.

    Raises ConfigError when `output` exists, has another suffix than the form, or the form cannot
    hold this student; DataError when there is no student, or what was written computes something
    else (by more than 1e-3): then nothing is left at `output`.
    """
    if form not in FORMATS:
        raise format_error(form, f"choose one of {', '.join(FORMATS)}")
    _check_suffix(form, output)
    refuse_existing(output)
    folder = checkpoints.find_student(path)
    source = _Source(checkpoints.load_student(folder), folder, output)
    with new_output(output, last=checkpoints.DESCRIPTION) as target:
        written = _WRITERS[form](source, target)
        difference = _difference(written, source.student)
        if not difference <= TOLERANCE:
            raise DataError(
                f"the {form} export computes other {written.compared} than the student, by"
                f" {difference:.2g}: it was not kept"
            )
    return replace(written, difference=difference)


@torch.inference_mode()
def _difference(written: Exported, student: Student) -> float:
    """Return the largest absolute difference over a batch of one image and a batch of two."""
    generator = torch.Generator().manual_seed(0)
    shape = (3, student.image_size, student.image_size)
    worst = 0.0
    for count in (1, 2):  # an export that is fixed to one batch size fails at the other
        images = torch.randn(count, *shape, generator=generator)
        expected, found = written.expected(images), written.again(images)
        difference = float((expected - found).abs().max())
        if math.isnan(difference) or expected.shape != found.shape:
            return math.nan
        worst = max(worst, difference)
    return worst


def _check_suffix(form: str, output: str) -> None:
    suffixes = _SUFFIXES[form]
    name = output.rstrip("/").rsplit("/", 1)[-1]
    if suffixes and not name.endswith(suffixes):
        remedy = f"--format {form} writes a file: end its name in {' or '.join(suffixes)}"
    elif not suffixes and name.endswith((".safetensors", ".pt", ".pth", ".onnx")):
        remedy = f"--format {form} writes a folder: name a folder"
    else:
        return
    raise ConfigError(field="--output", value=output, remedy=remedy)


def _write_safetensors(source: _Source, target: Path) -> Exported:
    """Write the student's own folder with a model card; it loads without any other file."""
    info = checkpoints.description_of(source.folder).get("info")
    checkpoints.save_student(source.student, str(target), info)
    (target / CARD).write_text(model_card(source.student, source.folder), encoding="utf-8")
    notes = (
        f"hts_ray.student.load_student({source.output!r})",
        f"{storage.join(source.output, CARD)} is its model card: add what you know of the data",
    )
    return Exported(source.student, checkpoints.load_student(str(target)), notes=notes)


def _write_hts(source: _Source, target: Path) -> Exported:
    """Write the paper's checkpoint and import it again."""
    student, table = source.student, source.student.class_table
    epochs = checkpoints.description_of(source.folder).get("info", {}).get("epochs")
    epoch = max(0, epochs - 1) if isinstance(epochs, int) else 0
    torch.save(official_checkpoint(student, epoch), target)
    again = read_official(str(target), table)
    notes = [f"hts import-checkpoint {source.output} --output DIR"]
    if table != hico_classes():
        notes[0] += f" --classes {storage.join(source.folder, checkpoints.CLASSES)}"
        notes.append("the format names no classes, and these are not HICO's: keep their list")
    if len(table) != HICO_CLASSES:
        notes.append(f"the paper's code expects 600 classes (HICO), this student has {len(table)}")
    return Exported(student, again, notes=tuple(notes))


def _write_open_clip(source: _Source, target: Path) -> Exported:
    """Write the image tower's state dict and load it by open_clip's own function."""
    student = source.student
    state = checkpoints.cpu_state(student.visual)
    name, arguments = _open_clip_model(student)
    if student.config.feature_space == "backbone":
        # open_clip's towers always project, so this one projects by the identity.
        name_of_it = "head.proj.weight" if hasattr(student.visual, "trunk") else "proj"
        state[name_of_it] = torch.eye(student.classifier.shape[1])
    if target.suffix == ".safetensors":
        target.write_bytes(safetensors.torch.save(state))
    else:
        torch.save(state, target)
    again = _open_clip_tower(name, {**arguments, "pretrained_image_path": str(target)}, state)
    arguments["pretrained_image_path"] = source.output
    given = "".join(f", {key}={value!r}" for key, value in arguments.items())
    notes = (
        f"open_clip.create_model({name!r}{given}).eval().encode_image(images)",
        "it holds the image tower only; the classes are in the safetensors export",
    )
    return Exported(student.visual, again, compared="image features", notes=notes)


def _open_clip_model(student: Student) -> tuple[str, dict[str, Any]]:
    """Return open_clip's name of the student's architecture and what to create it with."""
    try:
        source = replace(student_clip(student.config), pretrained=None)
        name, plain = source.resolve(), source.description()
    except ConfigError as error:
        problem = f"open_clip has no model for this student ({error})"
        raise format_error("open_clip", problem=problem) from error
    arguments: dict[str, Any] = {}
    if name.startswith(("local-dir:", "hf-hub:")):
        arguments["load_weights"] = False
    if plain["vision_cfg"].get("image_size", 224) != student.image_size:
        if hasattr(getattr(student.visual, "trunk", None), "set_input_size"):
            problem = f"open_clip loads the weights of timm's {name} at its own image size only"
            raise format_error("open_clip", problem=problem)
        arguments["force_image_size"] = student.image_size
    if student.model_cfg.get("quick_gelu") and not plain.get("quick_gelu"):
        arguments["force_quick_gelu"] = True
    if student.config.feature_space == "backbone":
        arguments["embed_dim"] = student.classifier.shape[1]
    return name, arguments


def _open_clip_tower(
    name: str, arguments: Mapping[str, Any], state: Mapping[str, Tensor]
) -> _Compute:
    import open_clip

    with _quiet():
        try:
            clip = open_clip.create_model(name, pretrained_text=False, **arguments).eval()
        except (RuntimeError, ValueError, OSError, TypeError) as error:
            raise UserError(f"open_clip cannot build {name} again: {error}") from error
    # open_clip loads what fits and is silent about the rest, which would stay random.
    stored = clip.visual.state_dict()
    if stored.keys() != state.keys():
        odd = sorted(stored.keys() ^ state.keys())
        raise DataError(f"the tower is not that of open_clip's {name}: {odd[0]} is not in both")
    encode: _Compute = clip.encode_image
    return encode


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide warnings about random text towers, which are not exported, and of torch's exporter."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _write_onnx(source: _Source, target: Path) -> Exported:
    """Write a graph from images (N, 3, S, S), normalised, to logits (N, C), and run it."""
    try:
        import onnx
        import onnxruntime
        import onnxscript  # noqa: F401 - torch's exporter needs it
    except ImportError as error:
        problem = f"{error.name} is not installed"
        raise format_error("onnx", "pip install 'hts-ray[onnx]'", problem) from error
    student = source.student
    size = sum(value.numel() * value.element_size() for value in student.state_dict().values())
    if size > _ONNX_LIMIT:
        problem = f"the student has {size / 2**30:.1f} GiB, an ONNX file holds at most 2"
        raise format_error("onnx", problem)
    opset = _export_graph(student, target)
    onnx.checker.check_model(str(target))
    session = onnxruntime.InferenceSession(str(target), providers=["CPUExecutionProvider"])

    def again(images: Tensor) -> Tensor:
        return torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])

    side, classes = student.image_size, len(student.class_table)
    notes = (
        f"opset {opset}; images (N, 3, {side}, {side}) float32 to logits (N, {classes})",
        "images are RGB, squashed to the square; mean, deviation and classes are in the metadata",
    )
    return Exported(student, again, notes=notes)


def _export_graph(student: Student, target: Path) -> int:
    """Write the student as ONNX with any batch size; returns the opset."""
    example = torch.zeros(2, 3, student.image_size, student.image_size)
    with _quiet():
        try:
            program = torch.onnx.export(
                student,
                (example,),
                dynamo=True,
                input_names=["images"],
                output_names=["logits"],
                dynamic_shapes={"images": {0: torch.export.Dim("N")}},
                verbose=False,
            )
            assert program is not None
        except Exception as error:  # each operator that is missing has its own
            reason = str(error).strip().splitlines() or [type(error).__name__]
            raise UserError(
                f"torch cannot write {student.config.model} as ONNX: {reason[0][:300]}"
            ) from error
        table = student.class_table
        program.model.metadata_props.update(
            {
                "class_ids": json.dumps(table.ids.tolist()),
                "class_names": json.dumps(table.names),
                "image_size": str(student.image_size),
                "image_mean": json.dumps(student.image_mean.tolist()),
                "image_std": json.dumps(student.image_std.tolist()),
            }
        )
        program.save(target, external_data=False)
    return int(program.model.opset_imports[""])


def model_card(student: Student, folder: str) -> str:
    """Return the model card (Markdown) of the student that lies in `folder`.

    It states what is recorded: settings, the run's teacher, and the metrics of those evaluations
    in the student's run directory that measured this very student.
    """
    info = checkpoints.description_of(folder).get("info", {})
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
    fingerprint = checkpoints.student_fingerprint(folder)
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


_WRITERS: dict[str, Callable[[_Source, Path], Exported]] = {
    "safetensors": _write_safetensors,
    "open_clip": _write_open_clip,
    "onnx": _write_onnx,
    "hts": _write_hts,
}
_SUFFIXES: dict[str, tuple[str, ...]] = {
    "safetensors": (),
    "open_clip": (".pt", ".pth", ".safetensors"),
    "onnx": (".onnx",),
    "hts": (".pt", ".pth"),
}
FORMATS = tuple(_WRITERS)
