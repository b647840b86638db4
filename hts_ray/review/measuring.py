"""`hts review`: corrections that were imported against the pseudo-labels that a run has now."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from hts_ray.engine.run import Run
from hts_ray.labels.corrections import OVERRIDES, read_overrides
from hts_ray.review.agreement import Agreement, measure_agreement
from hts_ray.review.importing import MANIFEST
from hts_ray.store import storage
from hts_ray.store.run import StageFolder, content_hash, settings_hash
from hts_ray.store.tables import CORRECTIONS_SCHEMA, read_table

TABLE = "review"
AGREEMENT = "agreement.json"


def corrections_of(path: str) -> pa.Table:
    """Return all corrections of an import's folder, those for validation and those to apply.

    `path` may also be one Parquet file of corrections or annotations.
    """
    if path.endswith(".parquet"):
        return read_overrides(path)
    overrides = read_overrides(storage.join(path, OVERRIDES))
    manifest = storage.join(path, MANIFEST)
    if not storage.exists(manifest):
        return overrides
    validation = read_overrides(manifest)
    taken = set(overrides["image_id"].to_pylist())
    more = [image_id not in taken for image_id in validation["image_id"].to_pylist()]
    schema = pa.schema(CORRECTIONS_SCHEMA, metadata=None)
    parts = [overrides.cast(schema), validation.filter(pa.array(more, pa.bool_())).cast(schema)]
    return pa.concat_tables(parts).sort_by("image_id")


def agreement_of(
    run: Run, corrections: pa.Table, labels: StageFolder
) -> tuple[Agreement, dict[str, Any]]:
    """Compare corrections with a pseudo_labels folder; returns the figures, as JSON as well.

    Images whose corrections the folder has applied are left out: there it agrees because it was
    made to. If there are no others they count, and `applied` in the JSON says so.
    """
    columns = ["image_id", "uri", "positive_ids", "ignored_ids", "probability"]
    applied = pc.is_in(corrections["image_id"], pa.array(_corrected_ids(labels), pa.string()))
    others = corrections.filter(pc.invert(applied))
    judged = others if len(others) else corrections
    found = measure_agreement(read_table(labels.path, columns), judged, run.class_table)
    content = found.to_dict(run.class_table)
    content["pseudo_labels"] = f"{labels.table}-{labels.key}"
    content["left_out_as_applied"] = len(corrections) - len(judged)
    content["applied"] = len(others) == 0
    return found, content


def _corrected_ids(labels: StageFolder) -> list[str]:
    path = labels.file("table.json")
    return list(storage.read_json(path).get("corrected_ids", ())) if storage.exists(path) else []


def review(run: Run, path: str, labels: StageFolder) -> tuple[Agreement, dict[str, Any]]:
    """Measure the corrections at `path` and publish `review-KEY/agreement.json` in the run.

    Returns what `agreement_of` does.
    """
    corrections = corrections_of(path)
    found, content = agreement_of(run, corrections, labels)
    stage = run.stage(TABLE, settings_hash(labels.key, content_hash(corrections)))
    storage.write_json(stage.file(AGREEMENT), content)
    rows = {"rows_in": len(corrections), "rows_out": found.images, "quarantined": 0}
    stage.publish({**rows, **content["overall"]})
    return found, content
