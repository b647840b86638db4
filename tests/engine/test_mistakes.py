"""A user's mistakes, found by a worker."""

from __future__ import annotations

import pytest

from hts_ray.engine.mistakes import user_error, users_mistakes_unwrapped
from hts_ray.errors import ConfigError


def test_users_mistakes_lose_rays_wrapping():
    """Catches a worker's one-line message that reaches the user as a traceback."""
    from ray.exceptions import RayTaskError

    mistake = ConfigError("wrong")
    wrapped = RayTaskError("f", "Traceback ...", mistake).as_instanceof_cause()
    outer = RuntimeError("outer")
    outer.__cause__ = wrapped
    assert user_error(outer) is mistake
    assert user_error(RuntimeError("other")) is None
    for raised in (mistake, wrapped):
        with pytest.raises(ConfigError) as found, users_mistakes_unwrapped():
            raise raised
        assert found.value is mistake


def test_a_mistake_that_ray_keeps_as_text_is_found():
    """Catches a teacher refused in its actor's start that reaches the user as a traceback."""
    text = "The actor died\n  File x\nhts_ray.errors.ConfigError: label.x = 1: do y\n"
    found = user_error(RuntimeError(text))
    assert isinstance(found, ConfigError)
    assert str(found) == "label.x = 1: do y"
    assert user_error(RuntimeError("hts_ray.errors.Other: z")) is None
