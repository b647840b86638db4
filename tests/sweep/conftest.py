"""Region scores of a small rendered world, made up rather than taught: they cost nothing."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from hts_ray.config import load_config
from hts_ray.demo.world import world_class_ids, write_world
from hts_ray.engine.run import open_run
from hts_ray.evaluate import label_matrix
from hts_ray.images.manifest import open_manifest
from hts_ray.images.stage import prepare_manifest
from hts_ray.store import storage
from hts_ray.store.tables import REGION_SCORES_SCHEMA, write_table

KINDS = ["whole", "grid", "grid", "person"]


@pytest.fixture(scope="session")
def swept_run(tmp_path_factory):
    """A run with a manifest of 60 scenes and region scores that mostly know their classes."""
    folder = tmp_path_factory.mktemp("swept")
    write_world(str(folder / "hico"), 557, 60, 20)
    config = load_config(
        preset="demo",
        overrides=["train.epochs=1", "train.num_workers=0", "train.batch_size=16"],
        extra={"run_dir": str(folder / "run"), "classes": {"ids": list(world_class_ids())}},
    )
    run = open_run(config)
    manifest = prepare_manifest(run.config.prepare, run.run_dir, "hico", str(folder / "hico")).file(
        "manifest.parquet"
    )
    write_scores(run, open_manifest(manifest).table)
    return run


def write_scores(run, manifest):
    """Publish made-up log-likelihoods: those of an image's classes are about 6 nats higher."""
    rng = np.random.default_rng(3)
    positive_NC = label_matrix(manifest, run.class_table) == 1
    rows = []
    for row, positive_C in zip(manifest.to_pylist(), positive_NC, strict=True):
        noise_RC = 0.7 * rng.normal(size=(len(KINDS), len(run.class_table)))
        rows.append(
            {
                **{name: row[name] for name in ("image_id", "uri", "split", "width", "height")},
                "boxes": [[0.0, 0.0, 9.0, 9.0]] * len(KINDS),
                "region_kinds": KINDS,
                "margins": [0.0, 0.0, 0.0, 0.2],
                "scores": (-6 + 6 * positive_C + noise_RC).astype(np.float32).ravel().tolist(),
                "status": "ok",
            }
        )
    stage = run.stage("region_scores", "madeup")
    table = pa.Table.from_pylist(rows, schema=REGION_SCORES_SCHEMA)
    write_table(stage.file("part-0.parquet"), table)
    info = {"class_ids": run.class_table.ids.tolist(), "prior_log_likelihoods": None}
    storage.write_json(stage.file("table.json"), info)
    stage.publish({"rows_in": len(rows), "rows_out": len(rows), "quarantined": 0})


@pytest.fixture
def with_sweep(swept_run):
    """Return a function that gives the run other settings of the sweep."""

    def change(**settings):
        return swept_run.changed(settings)

    return change
