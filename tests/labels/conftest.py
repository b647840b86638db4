"""A small table of region scores, written by hand."""

import numpy as np
import pyarrow as pa
import pytest

from hts_ray.config import FilterConfig
from hts_ray.store import storage
from hts_ray.store.run import StageFolder
from hts_ray.store.tables import REGION_SCORES_SCHEMA, write_table

IDS = [7, 3, 11]


def row(image_id, scores_RC, kinds, split="train", status="ok"):
    scored = status == "ok"
    return {
        "image_id": image_id,
        "uri": f"/{image_id}.jpg",
        "split": split,
        "boxes": [[0, 0, 9, 9]] * len(kinds) if scored else None,
        "region_kinds": kinds if scored else None,
        "scores": np.asarray(scores_RC, dtype=np.float32).ravel().tolist() if scored else None,
        "status": status,
    }


@pytest.fixture
def scores(tmp_path):
    """Two images: one clear by its grid regions only, one quarantined, one of another split."""
    stage = StageFolder(str(tmp_path), "region_scores", "k")
    rows = [
        row("b", [[-9, -9.1, -9], [-1, -9, -9], [-1, -9, -9]], ["whole", "grid", "grid"]),
        row("a", [[-9, -9, -1]], ["whole"]),
        row("bad", [], [], status="quarantined"),
        row("t", [[-1, -9, -9]], ["whole"], split="test"),
    ]
    write_table(stage.file("part.parquet"), pa.Table.from_pylist(rows, schema=REGION_SCORES_SCHEMA))
    storage.write_json(
        stage.file("table.json"), {"class_ids": IDS, "prior_log_likelihoods": [-1.0, -9.0, -9.0]}
    )
    return stage


@pytest.fixture
def plain():
    """A filter without the prior and without thresholds by class."""
    return FilterConfig(
        prior_alpha=0.0, per_class_quantile=None, negative_threshold=0.05, support_threshold=0.4
    )
