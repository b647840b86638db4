"""What an unfinished training keeps so that it can go on: weights, optimizer, position.

A position is an epoch and a step in it. Everything random in a step follows from the seed, the
epoch, the step and the worker, and the batches of an epoch from its number, so no state of a
random generator has to be kept: a run that goes on does what an unbroken one would have done.
"""

from __future__ import annotations

import io
import json
import pickle
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import safetensors
import safetensors.torch
import torch

from hts_ray.engine.compat import TRAIN_SNAPSHOT
from hts_ray.errors import ConfigError
from hts_ray.store import storage
from hts_ray.student.checkpoints import state_bytes
from hts_ray.student.optimizer import Optimizer

MODEL, OPTIMIZER, STATE = "model.safetensors", "optimizer.pt", "state.json"
KEPT_CHECKPOINTS = 2
_FILES = (MODEL, OPTIMIZER, STATE)


@dataclass(frozen=True)
class Position:
    """How far a training is: its finished epochs, and the steps done of the one that runs.

    `loss_sum`, `images` and `seconds` are of those steps, over all `workers`.
    """

    history: list[dict[str, Any]] = field(default_factory=list)
    step: int = 0
    loss_sum: float = 0.0
    images: int = 0
    seconds: float = 0.0
    workers: int = 1

    @property
    def epoch(self) -> int:
        """The number of the epoch that runs, from 0."""
        return len(self.history)


def checkpoint_files(optimizer: Optimizer, scaler: Any, position: Position) -> dict[str, bytes]:
    """Return a checkpoint's files by name, the one that makes it valid last.

    `scaler` is that of fp16's gradients, or None. The model file is the student as it would be
    published: the moving average, where one is kept.
    """
    average = optimizer.average
    buffer = io.BytesIO()
    torch.save(
        {
            "optimizer": optimizer.inner.state_dict(),
            "scaler": scaler.state_dict() if scaler is not None else {},
            "weights": {} if average is None else optimizer.model.state_dict(),
            "averaged": optimizer.averaged,
        },
        buffer,
    )
    return {
        MODEL: state_bytes(optimizer.published),
        OPTIMIZER: buffer.getvalue(),
        STATE: json.dumps(asdict(position)).encode(),
    }


def restore(
    files: Mapping[str, bytes], optimizer: Optimizer, scaler: Any, workers: int
) -> Position:
    """Load a checkpoint into its owners and return how far the run was.

    Raises ConfigError when it was written within an epoch by another number of workers: which
    images they had left is not known to these.
    """
    position = Position(**json.loads(files[STATE]))
    if position.step and position.workers != workers:
        raise ConfigError(
            f"training was cut off within epoch {position.epoch}, with {position.workers} workers",
            field="train.num_workers",
            value=workers,
            remedy=f"go on with {position.workers}, or start again in another run directory",
        )
    weights, average = safetensors.torch.load(files[MODEL]), optimizer.average
    # weights_only: a checkpoint that someone else wrote cannot run code
    saved = torch.load(io.BytesIO(files[OPTIMIZER]), map_location="cpu", weights_only=True)
    if average is not None:
        average.load_state_dict(weights)
        optimizer.averaged = saved["averaged"]
    optimizer.model.load_state_dict(weights if average is None else saved["weights"])
    optimizer.inner.load_state_dict(saved["optimizer"])
    if scaler is not None and saved["scaler"]:
        scaler.load_state_dict(saved["scaler"])
    return position


def find_unlisted(folder: str) -> str | None:
    """Return the newest whole checkpoint of a folder in which Ray Train would find none, or None.

    Ray Train writes its list of checkpoints in place. A full disk or a kill at that moment leaves a
    part of it, over which every later start would fail: such a list is removed.
    """
    path = storage.join(folder, TRAIN_SNAPSHOT)
    if storage.exists(path):
        try:
            storage.read_json(path)
        except ValueError:
            storage.delete_file(path)
        else:
            return None
    return newest_whole(folder)


def newest_whole(folder: str) -> str | None:
    """Return the newest checkpoint of a folder whose files are whole, or None."""
    names = [name for name in storage.list_names(folder) if name.startswith("checkpoint")]
    newest_first = (storage.join(folder, name) for name in reversed(names))  # named by their time
    return next((place for place in newest_first if _is_whole(place)), None)


def _is_whole(folder: str) -> bool:
    """Return whether a checkpoint's upload was finished; even its last byte may be missing."""
    try:
        files = read_files(folder)
        Position(**json.loads(files[STATE]))
        safetensors.torch.load(files[MODEL])
        torch.load(io.BytesIO(files[OPTIMIZER]), map_location="cpu", weights_only=True)
    except (OSError, ValueError, TypeError, RuntimeError, EOFError):
        return False
    except (safetensors.SafetensorError, pickle.UnpicklingError):
        return False
    return True


def read_files(folder: str) -> dict[str, bytes]:
    """Return the files of the checkpoint at a path or URI."""
    return {name: storage.read_bytes(storage.join(folder, name)) for name in _FILES}


def write_local(folder: str, files: Mapping[str, bytes]) -> None:
    """Write a checkpoint of a training in the driver's own process, and remove old ones."""
    names = storage.list_names(folder)
    number = 1 + max((int(name.rpartition("-")[2]) for name in names), default=0)
    for name, data in files.items():
        storage.write_bytes(storage.join(folder, f"checkpoint-{number:06d}", name), data)
    places = [storage.join(folder, name) for name in storage.list_names(folder)]
    complete = [place for place in places if storage.exists(storage.join(place, STATE))]
    for old in complete[:-KEPT_CHECKPOINTS]:
        storage.remove_tree(old)
