"""Packaged models: found by name, and nothing outside the room."""

from pathlib import Path

import pytest

import hts_ray
from hts_ray.store.packaged import packaged_model

STUDENT = Path(hts_ray.__file__).parent / "student"


@pytest.mark.parametrize("name", ["builtin:none", "builtin:", "builtin:..", "builtin:/etc"])
def test_only_packaged_models_are_found(name):
    """A name that leads out of the package would load files that nobody shipped."""
    folder = packaged_model(STUDENT, "builtin:world_clip", "open_clip_config.json")
    assert (folder / "open_clip_model.safetensors").is_file()
    with pytest.raises(FileNotFoundError, match=r"no packaged model .*builtin:world_clip"):
        packaged_model(STUDENT, name, "open_clip_config.json")
