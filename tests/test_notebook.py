"""The example notebook: its code runs on the package as it is, and its outputs are there.

`jupyter execute --inplace docs/example.ipynb` makes them anew, with nbclient and ipykernel.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from hts_ray import stages
from hts_ray.store.run import find_stage

NOTEBOOK = Path(__file__).parents[1] / "docs" / "example.ipynb"
SIZE = re.compile(r"^TRAIN, TEST = \d+, \d+", re.M)


@pytest.fixture(scope="module")
def cells() -> list[dict[str, Any]]:
    """Return the code cells in their order."""
    content = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    return [cell for cell in content["cells"] if cell["cell_type"] == "code"]


def test_the_notebook_was_executed_from_top_to_bottom(cells):
    """Catches outputs that are missing, failed, of another order, or too large to open."""
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert "error" not in {output["output_type"] for output in outputs}
    kinds = {kind for output in outputs for kind in output.get("data", ())}
    assert {"image/jpeg", "text/html"} <= kinds
    assert NOTEBOOK.stat().st_size < 1_000_000


def test_outputs_name_no_folder_of_the_machine(cells):
    """Catches outputs that tell where, and as whom, the notebook was executed."""
    told = json.dumps([cell["outputs"] for cell in cells])
    images = re.sub(r'"image/jpeg": "[^"]*"', "", told)
    assert not re.findall(r"/(?:home|root|tmp|work|Users)/", images)


@pytest.mark.slow
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
