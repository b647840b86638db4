"""Checkpoints of the paper's own code (DEFR, the student of HTS), read and written.

The file is `torch.save({"epoch", "model_state_dict", "optimizer_state_dict"})`. Its state dict
holds `visual_encoder.visual.*` (OpenAI's names of a CLIP ViT with QuickGELU, the position
embedding at the trained size), `classifier` (C, D) and `logit_scale`, the logarithm of the factor;
every name may begin with `module.`. A logit is exp(logit_scale) times the cosine of class and
features. What the file does not say, the code fixes: heads of 64 channels, an MLP of 4 times the
width, CLIP's mean and deviation, images squashed to a square.

Shapes: W width, P patch size, C classes, D features (W in the paper, where `proj` is left out).
"""

from __future__ import annotations

import hashlib
import io
import math
import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from hts_ray.classes import ClassTable, hico_classes, load_class_table
from hts_ray.errors import ConfigError, DataError
from hts_ray.store import storage
from hts_ray.store.outputs import new_output, refuse_existing
from hts_ray.student.checkpoints import DESCRIPTION, cpu_state, save_student
from hts_ray.student.model import Student, rebuild_student

HICO_CLASSES = 600
_MODULE, _VISUAL = "module.", "visual_encoder.visual."
_HEAD_WIDTH = 64
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
_MAX_LOG_SCALE = 10.0  # the paper's is 4.61; a plain factor of 100 must not pass for a logarithm
# What the paper started from, by width, layers and patch; others have no name in open_clip.
_KNOWN = {
    (768, 12, 32): "ViT-B-32-quickgelu",
    (768, 12, 16): "ViT-B-16-quickgelu",
    (1024, 24, 14): "ViT-L-14-quickgelu",
}
_OTHERS = "the formats safetensors and onnx hold every student"
_BLOCK = re.compile(r"transformer\.resblocks\.(\d{1,4})\.")
_REFUSED_GLOBAL = re.compile(r"GLOBAL ([\w.]+)")


def import_checkpoint(file: str, output: str, classes: str | None = None) -> dict[str, Any]:
    """Turn a checkpoint of the paper's code into a student folder at `output`; returns what it is.

    `classes` is `hico` or a CSV file; HICO's 600 when it is left out and the checkpoint has 600
    classes. Nothing in the file is run. Raises DataError, naming file and reason, for files that
    are not of this format or hold more than tensors and plain values, ConfigError when the classes
    do not fit or `output` is there already.
    """
    refuse_existing(output)
    content, digest = _load(file)
    student = _student(content, file, classes)
    epoch = content.get("epoch")
    source = {
        "file": file.rstrip("/").rsplit("/", 1)[-1],
        "sha256": digest,
        "epoch": epoch if isinstance(epoch, int) else None,
    }
    with new_output(output, last=DESCRIPTION) as folder:
        save_student(student, str(folder), {"imported": source})
    vision = student.model_cfg["vision_cfg"]
    return {
        "model": student.config.model,
        "width": vision["width"],
        "layers": vision["layers"],
        "patch size": vision["patch_size"],
        "image size": student.image_size,
        "features": student.config.feature_space,
        "logit scale": f"{float(student.logit_scale):.4g}",
        "classes": len(student.class_table),
        "epoch": source["epoch"],
    }


def read_official(file: str, classes: str | ClassTable | None = None) -> Student:
    """Return the student in a checkpoint of the paper's code, in evaluation mode on the CPU.

    Arguments and errors are those of `import_checkpoint`; `classes` may also be a class table.
    """
    return _student(_load(file)[0], file, classes)


def official_checkpoint(student: Student, epoch: int = 0) -> dict[str, Any]:
    """Return what the paper's code would save for this student, without optimizer state.

    Raises ConfigError naming what the format has no place for: any tower but a CLIP ViT with
    QuickGELU, the projected feature space, or another mean and deviation than CLIP's.
    """
    reason = _obstacle(student)
    if reason is not None:
        raise format_error("hts", f"{reason}; {_OTHERS}")
    state = cpu_state(student)
    state = {k.replace("visual.", _VISUAL, 1): value for k, value in state.items()}
    state["logit_scale"] = state["logit_scale"].log()
    optimizer: dict[str, Any] = {"state": {}, "param_groups": []}
    return {"epoch": epoch, "model_state_dict": state, "optimizer_state_dict": optimizer}


def format_error(form: str, remedy: str = _OTHERS, problem: str = "") -> ConfigError:
    """Return the error of a form that cannot be written."""
    return ConfigError(problem, field="--format", value=form, remedy=remedy)


def _load(file: str) -> tuple[dict[str, Any], str]:
    """Return the file's dictionary and sha256 without running anything that is in it."""
    if not storage.exists(file):
        raise DataError(f"{file}: no such file")
    data = b""
    try:
        data = storage.read_bytes(file)
        _check_sums(data)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what it warns of, it refuses in the next line
            content = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # of damaged files torch raises nearly anything
        raise DataError(_why_unreadable(file, data, error)) from error
    if not isinstance(content, dict):
        raise DataError(f"{file} holds a {type(content).__name__}, not the paper's dictionary")
    if not isinstance(content.get("model_state_dict"), Mapping):
        found = ", ".join(map(str, list(content)[:6])) or "nothing"
        raise DataError(
            f"{file} is not in the paper's format: model_state_dict is missing (found {found})"
        )
    return content, hashlib.sha256(data).hexdigest()


def _check_sums(data: bytes) -> None:
    """Raise BadZipFile for an archive with a damaged part: torch does not look at its checksums."""
    if zipfile.is_zipfile(io.BytesIO(data)):
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise zipfile.BadZipFile(f"{damaged} is damaged, its checksum differs")


def _why_unreadable(file: str, data: bytes, error: Exception) -> str:
    text = str(error)
    found = _REFUSED_GLOBAL.search(text)
    if found:
        return (
            f"{file} is refused: loading it would call {found[1]}, and code in a checkpoint is"
            " never run; save it again with nothing but tensors, numbers and texts"
        )
    if "TorchScript" in text:
        return f"{file} is refused: a TorchScript archive holds code, which is never run"
    # torch's own text goes on with advice to switch the protection off.
    detail = text.rsplit("WeightsUnpickler error:", 1)[-1].strip().splitlines()
    reason = detail[0][:200] if detail else type(error).__name__
    # PK begins a zip archive, 0x80 a pickle.
    if isinstance(error, pickle.UnpicklingError) and data.startswith((b"PK", b"\x80")):
        return (
            f"{file} is refused: it holds a pickle of more than tensors and plain values"
            f" ({reason}), and pickled code is never run"
        )
    return f"{file} cannot be read as a checkpoint of tensors: {reason}"


def _student(content: Mapping[str, Any], file: str, classes: str | ClassTable | None) -> Student:
    try:
        state = _tensors(content["model_state_dict"])
        visual = {k[len(_VISUAL) :]: state.pop(k) for k in list(state) if k.startswith(_VISUAL)}
        _check_names(state, visual)
        classifier_CD = _classifier(state)
        scale = _scale(state["logit_scale"])
        name, model_cfg, size = _architecture(visual)
    except ValueError as error:
        raise DataError(f"{file}: {error}") from error
    projected = "proj" in visual
    features = visual["proj"].shape[1] if projected else visual["conv1.weight"].shape[0]
    if classifier_CD.shape[1] != features:
        raise DataError(
            f"{file}: the classifier has {classifier_CD.shape[1]} columns for {features} features"
        )
    class_table = _class_table(len(classifier_CD), file, classes)
    description = {
        "student": {
            "model": name,
            "image_size": size,
            "feature_space": "projected" if projected else "backbone",
            "logit_scale": float(scale),
        },
        "model_cfg": model_cfg,
        "image_size": size,
        "image_mean": CLIP_MEAN,
        "image_std": CLIP_STD,
    }
    tower = {f"visual.{name}": value for name, value in visual.items()}
    whole = {**tower, "classifier": classifier_CD, "logit_scale": scale}
    try:
        return rebuild_student(description, class_table, whole)
    except (RuntimeError, ValidationError) as error:
        reason = " ".join(str(error).split())[:400]
        raise DataError(f"{file} does not hold a whole CLIP ViT: {reason}") from error


def _tensors(stored: Mapping[Any, Any]) -> dict[str, Tensor]:
    """Return the state dict in float32, `module.` removed; ValueError for other values."""
    state: dict[str, Tensor] = {}
    for key, value in stored.items():
        name = str(key).removeprefix(_MODULE)
        if name in state:
            raise ValueError(f"{name} occurs twice, with and without {_MODULE}")
        dense = isinstance(value, Tensor) and value.layout == torch.strided
        if not dense or not value.is_floating_point():
            kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"{key} is not a tensor of floats but {kind}")
        if value.numel() * value.element_size() > value.untyped_storage().nbytes():
            raise ValueError(f"{key} claims {value.numel()} values, the file holds fewer")
        state[name] = value.detach().float().contiguous()
        if not state[name].isfinite().all():
            raise ValueError(f"{key} holds values that are not finite")
    return state


def _check_names(state: Mapping[str, Tensor], visual: Mapping[str, Tensor]) -> None:
    """Refuse the paper's other experiments by their tensors' names, and foreign files."""
    if any(name.startswith("vit.") for name in state):
        raise ValueError("its backbone is an ImageNet ViT of timm, only CLIP ViTs can be imported")
    if any(name.startswith(("layer1.", "attnpool.")) for name in visual):
        raise ValueError("its backbone is a CLIP ResNet, only CLIP ViTs can be imported")
    if "classifier.weight" in state:
        raise ValueError("its classifier is linear, with a bias: a student's logits are cosines")
    needed = {"conv1.weight", "class_embedding", "positional_embedding"}
    missing = {"classifier", "logit_scale"} - state.keys()
    missing |= {_VISUAL + name for name in needed - visual.keys()}
    unknown = state.keys() - {"classifier", "logit_scale", "m_classifier"}
    found = [f"{name} missing" for name in sorted(missing)]
    found += [f"{name} unknown" for name in sorted(unknown)]
    if found:
        more = f" and {len(found) - 4} more" if len(found) > 4 else ""
        raise ValueError(f"not in the paper's format: {', '.join(found[:4])}{more}")


def _classifier(state: Mapping[str, Tensor]) -> Tensor:
    """Return the classes' directions (C, D), a stored mixing matrix (C, C) applied."""
    classifier_CD = state["classifier"]
    mixing_CC = state.get("m_classifier")  # the paper's `i-clip`: a learned mixture of embeddings
    shapes = [list(classifier_CD.shape), None if mixing_CC is None else list(mixing_CC.shape)]
    rows = len(classifier_CD) if classifier_CD.ndim == 2 else 0
    if rows == 0 or (mixing_CC is not None and shapes[1] != [rows, rows]):
        raise ValueError(f"the classifier has the shape {shapes[0]}, mixed by {shapes[1]}")
    return classifier_CD if mixing_CC is None else mixing_CC @ classifier_CD


def _scale(log_scale: Tensor) -> Tensor:
    """Return the factor of the cosine, a scalar tensor; the file holds its logarithm."""
    if log_scale.numel() != 1:
        raise ValueError(f"logit_scale has {log_scale.numel()} values instead of one")
    value = float(log_scale)
    if value == 0:
        raise ValueError("with logit_scale 0 the paper's code takes no cosine at all")
    if abs(value) > _MAX_LOG_SCALE:
        raise ValueError(f"logit_scale {value:g} is no logarithm (4.61 in the paper)")
    return log_scale.reshape(()).exp()


def _architecture(visual: Mapping[str, Tensor]) -> tuple[str, dict[str, Any], int]:
    """Return name, open_clip description and image size of the tower with these tensors."""
    kernel, positions = visual["conv1.weight"], visual["positional_embedding"]
    blocks = {int(found[1]) for name in visual if (found := _BLOCK.match(name))}
    layers = len(blocks)
    if kernel.ndim != 4 or kernel.shape[1] != 3 or kernel.shape[2] != kernel.shape[3]:
        raise ValueError(f"conv1.weight of shape {list(kernel.shape)} cuts no patches")
    width, patch = kernel.shape[0], kernel.shape[2]
    heads = width // _HEAD_WIDTH
    if not layers or blocks != set(range(layers)) or not heads or width % heads:
        raise ValueError(f"no ViT has width {width} and the blocks {sorted(blocks)[:30]}")
    grid = math.isqrt(max(0, positions.shape[0] - 1)) if positions.ndim == 2 else 0
    if not grid or grid * grid + 1 != positions.shape[0]:
        raise ValueError(
            f"position embeddings of shape {list(positions.shape)} are not those of a class token"
            " and a square grid"
        )
    if "proj" in visual and visual["proj"].ndim != 2:
        raise ValueError("visual.proj is no matrix")
    embed_dim = visual["proj"].shape[1] if "proj" in visual else None
    name = _KNOWN.get((width, layers, patch))
    if name is not None:
        import open_clip

        model_cfg: dict[str, Any] = open_clip.get_model_config(name)
        if embed_dim in (None, model_cfg["embed_dim"]):
            return name, model_cfg, grid * patch
    vision_cfg = {
        "image_size": grid * patch, "layers": layers, "width": width, "patch_size": patch,
    }  # fmt: skip
    model_cfg = {"embed_dim": embed_dim or width, "quick_gelu": True, "vision_cfg": vision_cfg}
    return f"ViT of width {width}, {layers} layers, patch {patch}", model_cfg, grid * patch


def _class_table(count: int, file: str, classes: str | ClassTable | None) -> ClassTable:
    if classes is None:
        if count == HICO_CLASSES:
            return hico_classes()
        raise ConfigError(
            field="--classes",
            remedy=f"{file} has {count} classes and no names: give the CSV file of its class list",
        )
    class_table = load_class_table(classes) if isinstance(classes, str) else classes
    if len(class_table) != count:
        raise ConfigError(
            field="--classes",
            value=classes if isinstance(classes, str) else None,
            remedy=f"it lists {len(class_table)} classes, {file} has {count}",
        )
    return class_table


def _obstacle(student: Student) -> str | None:
    """Return why the paper's format cannot hold this student, or None."""
    from open_clip.model import CLIPVisionCfg

    given = asdict(CLIPVisionCfg(**student.model_cfg["vision_cfg"]))
    plain = asdict(CLIPVisionCfg())
    # These matter to training only, or are known from the tensors' shapes.
    free = {"layers", "width", "patch_size", "image_size", "patch_dropout", "output_tokens",
            "timm_model_pretrained"}  # fmt: skip
    other = [key for key in plain if key not in free and given[key] != plain[key]]
    scale = float(student.logit_scale)
    expected = torch.tensor([CLIP_MEAN, CLIP_STD])
    found = torch.stack([student.image_mean, student.image_std]).cpu()
    reason = None
    if "timm_model_name" in other or not isinstance(given["layers"], int):
        reason = f"{student.config.model} is not a CLIP ViT, which the format is made for"
    elif other:
        reason = f"the format has no place for vision_cfg.{other[0]} = {given[other[0]]}"
    elif not student.model_cfg.get("quick_gelu"):
        reason = "the paper's code computes QuickGELU, this tower the exact GELU"
    elif student.config.feature_space != "backbone":
        reason = "the paper takes the cosine before the projection (student.feature_space=backbone)"
    elif scale == 1 or abs(math.log(scale)) > _MAX_LOG_SCALE:
        reason = f"the paper's code cannot use the logit scale {scale:g}"
    elif not torch.allclose(found, expected, atol=1e-5):
        reason = "the paper's code normalises images by CLIP's mean and deviation"
    return reason
