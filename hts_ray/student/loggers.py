"""Training curves for TensorBoard, Weights & Biases and MLflow, through Accelerate's trackers."""

from __future__ import annotations

import importlib.util
import logging
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hts_ray.errors import ConfigError
from hts_ray.store import storage

PROJECT = "hts_ray"
_OF_AN_EPOCH = ("loss", "images_per_second", "validation_mAP")
_MODULES = {"tensorboard": ("tensorboardX", "tensorboard"), "wandb": ("wandb",)}
logger = logging.getLogger(__name__)


def check_loggers(names: Sequence[str]) -> None:
    """Raise ConfigError for a logger whose library is not installed."""
    for name in names:
        modules = _MODULES.get(name, (name,))
        if not any(importlib.util.find_spec(module) for module in modules):
            raise ConfigError(
                "its library is not installed",
                field="train.loggers",
                value=name,
                remedy=f"pip install {modules[0]} on every node, or leave it out",
            )


class CurveLog:
    """Writes scalars by step to every tracker; `folder` (path or URI) gets TensorBoard's files.

    To be used by one worker only. A tracker that fails, for example because its server is gone,
    is left out with a warning: no training ends because its curves cannot be written.
    """

    def __init__(
        self,
        names: Sequence[str],
        folder: str,
        settings: Mapping[str, Any],
        first_step: int = 0,
    ) -> None:
        from accelerate import PartialState
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        PartialState(cpu=True)  # trackers ask it whether theirs is the main process
        self._folder = folder
        self._temporary = tempfile.TemporaryDirectory() if storage.is_remote(folder) else None
        self._local = Path(self._temporary.name if self._temporary else folder)
        # After a crash some steps are taken again: what was logged of them is dropped.
        board = {"logging_dir": self._local, "purge_step": first_step}
        self._trackers: dict[str, Any] = {
            name: LOGGER_TYPE_TO_CLASS[name](PROJECT, **(board if name == "tensorboard" else {}))
            for name in names
        }

        def start(tracker: Any) -> None:
            tracker.start()
            if tracker.name != "tensorboard":  # it writes settings as a run of their own
                tracker.store_init_configuration(dict(_flat(settings)))

        self._each(start)

    def _each(self, work: Callable[[Any], object]) -> None:
        """Do something with every tracker, and leave those out that fail."""
        for name, tracker in list(self._trackers.items()):
            try:
                work(tracker)
            except Exception as error:
                del self._trackers[name]
                logger.warning("train.loggers: %s is left out from here on: %s", name, error)

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Write values that belong to an optimizer step, counted over all epochs."""
        self._each(lambda tracker: tracker.log(dict(values), step=step))

    def log_step(self, loss: float, lr: float, norm: float, step: int) -> None:
        """Write a step's mean loss, its rate and its gradient's norm, where that is known."""
        values = {"train/loss": loss, "train/lr": lr, "train/gradient_norm": norm}
        self.log({name: value for name, value in values.items() if not math.isnan(value)}, step)

    def log_epoch(self, record: Mapping[str, Any], step: int) -> None:
        """Write an epoch's record, which ends at an optimizer step."""
        shown = {f"epoch/{name}": record[name] for name in _OF_AN_EPOCH}
        self.log({name: value for name, value in shown.items() if value is not None}, step)
        self.flush()

    def flush(self) -> None:
        """Make what was logged visible to others."""
        if "tensorboard" in self._trackers:
            self._trackers["tensorboard"].writer.flush()
        if self._temporary is None:
            return
        for path in sorted(self._local.rglob("*")):
            if path.is_file():
                name = str(path.relative_to(self._local))
                storage.write_bytes(storage.join(self._folder, name), path.read_bytes())

    def close(self) -> None:
        """Flush and end every tracker."""
        self.flush()
        self._each(lambda tracker: tracker.finish())
        if self._temporary is not None:
            self._temporary.cleanup()


def _flat(settings: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Return nested settings as dotted names; what a tracker cannot hold becomes text."""
    pairs: list[tuple[str, Any]] = []
    for key, value in settings.items():
        if isinstance(value, Mapping):
            pairs += _flat(value, f"{prefix}{key}.")
        else:
            plain = isinstance(value, int | float | str | bool)
            pairs.append((f"{prefix}{key}", value if plain else str(value)))
    return pairs
