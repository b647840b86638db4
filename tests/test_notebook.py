"""The example notebook: its code runs on the package as it is.

`jupyter execute --inplace docs/example.ipynb` adds its outputs, with nbclient and ipykernel.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from hts_ray import stages
from hts_ray.tables import find_stage

NOTEBOOK = Path(__file__).parents[1] / "docs" / "example.ipynb"
SIZE = re.compile(r"^TRAIN, TEST = \d+, \d+", re.M)


@pytest.fixture(scope="module")
def cells() -> list[dict[str, Any]]:
    """Return the code cells in their order."""
    content = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    return [cell for cell in content["cells"] if cell["cell_type"] == "code"]


def test_the_code_runs_on_a_small_world(cells, ray_session, tmp_path, monkeypatch):
    """Catches a notebook that the package has left behind."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(stages, "start", lambda config: None)  # the tests have a cluster
    source = ["".join(cell["source"]) for cell in cells]
    source[0], changed = SIZE.subn("TRAIN, TEST = 24, 16", source[0])
    assert changed == 1
    names: dict[str, Any] = {}
    for cell in source:
        exec(compile(cell, "example.ipynb", "exec"), names)
    run_dir = str(tmp_path / "runs" / "notebook")
    for table in ("region_scores", "pseudo_labels", "student", "predictions", "evaluation"):
        assert find_stage(run_dir, table) is not None, table
    assert names["results"]["HTS"]["num_images"] == 16
    assert names["results"]["HTS"]["mAP"] != names["results"]["zero-shot CLIP"]["mAP"]
    assert len(names["found"]) == 3
    assert names["report"].exists()
