"""What later stages refuse, said by the first command."""

from __future__ import annotations

import pytest

from hts_ray import stages
from hts_ray.config import load_config
from hts_ray.errors import ConfigError
from hts_ray.stages.checks import check_later

WRONG_TEACHER = "label.teacher.model=/no/such/teacher"
WRONG_STUDENT = "student.model=local-dir:/no/such/student"
WRONG_TAG = ["student.model=ViT-B-32", "student.pretrained=laion3b"]


def test_every_command_asks_the_stages_behind_it():
    """Catches 11 minutes of teacher pass before a student that was named before is refused."""

    def refused(command: str, *overrides: str) -> str:
        try:
            check_later(load_config(overrides=overrides), command)
        except ConfigError as error:
            return error.field
        return ""

    assert refused("prepare", WRONG_TEACHER) == "label.teacher.model"
    assert refused("prepare", WRONG_STUDENT) == "student.model"
    assert refused("label", WRONG_STUDENT) == "student.model"
    assert refused("label", WRONG_TEACHER) == ""  # the command's own plan says it
    assert refused("label", *WRONG_TAG) == "student.pretrained"
    assert refused("prepare", "run_dir=s3://bucket/run", WRONG_STUDENT) == ""  # it runs elsewhere


def test_prepare_writes_nothing_for_a_run_that_cannot_be_trained(tmp_path):
    """Catches a check that no command makes."""
    config = load_config(overrides=[f"run_dir={tmp_path}/run", WRONG_STUDENT])
    with pytest.raises(ConfigError, match="student"):
        stages.prepare(config, "folder", str(tmp_path))
    assert not (tmp_path / "run").exists()
