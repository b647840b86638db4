"""Tests of what measurements record."""

import json

import measured
import pytest


def test_results_are_replaced_whole_or_not_at_all(tmp_path):
    """Would catch a benchmark that fails while writing and takes the earlier results along."""
    path = tmp_path / "results" / "x.json"
    assert measured.read_results(path) == {}
    measured.write_results(path, {"rows": [1]})
    with pytest.raises(TypeError):
        measured.write_results(path, {"rows": [1, 2], "settings": object()})
    assert measured.read_results(path) == {"rows": [1]}


def test_measurements_name_hardware_versions_and_commit():
    """Would catch figures that nobody can place."""
    found = json.loads(json.dumps(measured.measured_on()))
    assert found["hardware"]["cores"] >= 1
    assert found["hardware"]["memory_gib"] > 0
    assert all(version[0].isdigit() for version in found["versions"].values())
    assert found["git_commit"] is None or len(found["git_commit"].partition("+")[0]) == 40
