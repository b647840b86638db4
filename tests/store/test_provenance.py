"""Tests of what is recorded beside runs."""

from hts_ray.store import provenance


def test_a_program_that_is_missing_or_fails_prints_nothing():
    """Would catch a machine without git or a GPU driver on which no run can start."""
    assert provenance.command_output(["no-such-program-here"]) is None
    assert provenance.command_output(["false"]) is None
    assert provenance.command_output(["echo", "x"]) == "x"
