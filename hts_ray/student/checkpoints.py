"""The student's folder: a description, weights and classes, enough to rebuild it anywhere.

`student.json` (architecture, preprocessing, settings, hashes of itself and the other two files),
`model.safetensors` and `classes.csv`. The description is written last, so a folder holds a
whole student or none. Nothing is pickled.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor, nn

from hts_ray.classes import parse_class_csv
from hts_ray.errors import ConfigError, DataError
from hts_ray.store import storage
from hts_ray.store.run import find_stage
from hts_ray.student.model import ARCHITECTURE, Student, rebuild_student

FORMAT = "hts_ray.student"
FORMAT_VERSION = 1
DESCRIPTION, WEIGHTS, CLASSES = "student.json", "model.safetensors", "classes.csv"


def save_student(student: Student, path: str, info: Mapping[str, Any] | None = None) -> None:
    """Write the student to a folder or URI; `info` (JSON-able) is kept in its description.

    The same student and info give the same bytes.
    """
    weights = state_bytes(student)
    classes = student.class_table.csv_bytes()
    description: dict[str, Any] = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "student": student.config.model_dump(mode="json"),
        "model_cfg": student.model_cfg,
        "image_size": student.image_size,
        "image_mean": student.image_mean.tolist(),
        "image_std": student.image_std.tolist(),
        "class_ids": student.class_table.ids.tolist(),
        "class_fingerprint": student.class_table.fingerprint(),
        "sha256": {WEIGHTS: _sha256(weights), CLASSES: _sha256(classes)},
        "info": dict(info or {}),
        **({} if student.class_means is None else {"class_means": student.class_means}),
    }
    description["sha256"][DESCRIPTION] = _description_hash(description)
    target = storage.join(path, DESCRIPTION)
    if storage.exists(target):  # an old description must not describe new weights
        storage.delete_file(target)
    storage.write_bytes(storage.join(path, WEIGHTS), weights)
    storage.write_bytes(storage.join(path, CLASSES), classes)
    storage.write_json(target, description)


def load_student(path: str) -> Student:
    """Read the student of a run directory, a student stage's folder or an exported folder.

    It comes in evaluation mode on the CPU. Raises DataError, naming the file, when there is no
    student or its files are missing, damaged or not of this format.
    """
    folder = find_student(path)
    description = description_of(folder)
    weights = _checked(folder, WEIGHTS, description)
    class_file = storage.join(folder, CLASSES)
    class_table = parse_class_csv(_checked(folder, CLASSES, description), class_file)
    if class_table.fingerprint() != description["class_fingerprint"]:
        raise DataError(f"{class_file}: other classes than the student's")
    try:
        return rebuild_student(description, class_table, safetensors.torch.load(weights))
    except (KeyError, TypeError, ValueError, RuntimeError, ConfigError) as error:
        raise DataError(f"the student at {folder} does not fit its description: {error}") from error
    except safetensors.SafetensorError as error:
        raise DataError(f"{storage.join(folder, WEIGHTS)} is damaged: {error}") from error


def find_student(path: str) -> str:
    """Return the folder that holds the student meant by `path`; DataError when there is none."""
    path = storage.absolute(path)
    if storage.exists(storage.join(path, DESCRIPTION)):
        return path
    if path.endswith((".pt", ".pth", ".bin")):
        raise DataError(f"{path} is no student folder: `hts import-checkpoint` turns it into one")
    stage = find_stage(path, "student")
    if stage is not None and storage.exists(stage.file(DESCRIPTION)):
        return stage.path
    if not storage.exists(path):
        raise DataError(f"no student at {path}: nothing is there")
    raise DataError(f"no student at {path}: it has no {DESCRIPTION}, `hts train` writes one")


def student_fingerprint(path: str) -> str:
    """Return 12 hexadecimal digits of what a stored student computes."""
    return _description_hash(description_of(find_student(path)))[:12]


def state_bytes(module: nn.Module) -> bytes:
    """Return the file of a module's weights; the same weights give the same bytes."""
    return bytes(safetensors.torch.save(cpu_state(module)))


def cpu_state(module: nn.Module) -> dict[str, Tensor]:
    """Return copies of a module's weights on the CPU; no two share memory."""
    return {
        name: value.detach().cpu().contiguous().clone()
        for name, value in module.state_dict().items()
    }


def description_of(folder: str) -> dict[str, Any]:
    """Return a student folder's `student.json`; DataError when it cannot be used."""
    path = storage.join(folder, DESCRIPTION)
    try:
        description = json.loads(storage.read_bytes(path))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    if not isinstance(description, dict) or description.get("format") != FORMAT:
        raise DataError(f"{path} does not describe a student of hts_ray")
    if description.get("format_version") != FORMAT_VERSION:
        raise DataError(
            f"{path} has format version {description.get('format_version')}, this hts_ray reads"
            f" {FORMAT_VERSION}: use the version that wrote it"
        )
    needed = {"student", *ARCHITECTURE, "class_ids", "class_fingerprint", "sha256"}
    missing = sorted(needed - description.keys())
    if missing:
        raise DataError(f"{path} is incomplete: {', '.join(missing)} missing")
    hashes = description["sha256"]
    own = _description_hash(description) if isinstance(hashes, dict) else None
    # Some earlier versions wrote no hash of the description itself.
    if own is None or hashes.get(DESCRIPTION, own) != own:
        raise DataError(f"{path} was changed or damaged: copy or train the student again")
    return description


def _description_hash(description: Mapping[str, Any]) -> str:
    """Return a hash of what a description says, `info` and this hash itself left out."""
    hashes = {name: value for name, value in description["sha256"].items() if name != DESCRIPTION}
    kept = {name: value for name, value in description.items() if name != "info"}
    return _sha256(json.dumps({**kept, "sha256": hashes}, sort_keys=True).encode())


def _checked(folder: str, name: str, description: Mapping[str, Any]) -> bytes:
    path = storage.join(folder, name)
    try:
        data = storage.read_bytes(path)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    if _sha256(data) != description["sha256"].get(name):
        raise DataError(f"{path} is damaged, its hash differs: copy or train the student again")
    return data


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
