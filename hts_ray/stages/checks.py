"""What a later stage will refuse, as far as it can be known, said by the first command."""

from __future__ import annotations

from collections.abc import Callable

from hts_ray.config import HtsConfig
from hts_ray.store import storage
from hts_ray.student.checks import check_train, student_clip
from hts_ray.teacher.detector import check_detector
from hts_ray.teacher.models.catalog import check_teacher


def check_label(config: HtsConfig) -> None:
    """Raise ConfigError for a teacher or a detector that cannot be used; hub ids stay unread."""
    check_teacher(config.labeling.teacher)
    check_detector(config.label.regions)


# A check for each stage that has settings of its own to refuse, in the order in which they run.
CHECKS: dict[str, Callable[[HtsConfig], None]] = {"label": check_label, "train": check_train}


def check_later(config: HtsConfig, command: str) -> None:
    """Raise ConfigError for what the stages behind `command` would refuse of the settings.

    Files are not looked for where the run is on remote storage and this is `prepare`: the later
    stages run elsewhere then. Before a teacher pass the student's weights are looked for too,
    which costs an import of torch.
    """
    if command == "prepare" and storage.is_remote(config.run_dir):
        return
    later = list(CHECKS)[list(CHECKS).index(command) + 1 :] if command in CHECKS else CHECKS
    for stage in later:
        CHECKS[stage](config)
    if command == "label":
        student_clip(config.student).check()
