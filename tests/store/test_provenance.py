"""Tests of what is recorded beside runs and measurements."""

import json

import pytest

from hts_ray.store import provenance


def test_results_are_replaced_whole_or_not_at_all(tmp_path):
    """Would catch a benchmark that fails while writing and takes the earlier results along."""
    path = tmp_path / "results" / "x.json"
    assert provenance.read_results(path) == {}
    provenance.write_results(path, {"rows": [1]})
    with pytest.raises(TypeError):
        provenance.write_results(path, {"rows": [1, 2], "settings": object()})
    assert provenance.read_results(path) == {"rows": [1]}


def test_measurements_name_hardware_versions_and_commit():
    """Would catch figures that nobody can place."""
    found = json.loads(json.dumps(provenance.measured_on()))
    assert found["hardware"]["cores"] >= 1
    assert found["hardware"]["memory_gib"] > 0
    assert all(version[0].isdigit() for version in found["versions"].values())
    assert found["git_commit"] is None or len(found["git_commit"].partition("+")[0]) == 40


def test_a_program_that_is_missing_or_fails_prints_nothing():
    """Would catch a machine without git or a GPU driver on which no run can start."""
    assert provenance.command_output(["no-such-program-here"]) is None
    assert provenance.command_output(["false"]) is None
    assert provenance.command_output(["echo", "x"]) == "x"
