"""The filter stage: region_scores in, pseudo_labels out; no teacher, no annotation, no Ray.

Shapes: N images, C classes.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from hts_ray.config import FilterConfig
from hts_ray.engine.run import Run, Stage
from hts_ray.errors import DataError
from hts_ray.labels.corrections import Corrected, apply_overrides, overrides_key, read_overrides
from hts_ray.labels.evidence import Evidence
from hts_ray.labels.passes import TeacherPass, chosen_passes, together
from hts_ray.labels.select import REASONS, Selection, select
from hts_ray.store import storage
from hts_ray.store.run import StageFolder, settings_hash
from hts_ray.store.tables import PSEUDO_LABELS_SCHEMA, write_table


@dataclass(frozen=True, eq=False)
class PseudoLabels:
    """What the filter makes of N images, in the evidence's order.

    `corrections` is what people decided, which is in `evidence` and `selection` already: their
    positives have probability 1.
    """

    evidence: Evidence
    selection: Selection
    corrections: Corrected | None = None


def plan_filter(run: Run, region_scores: StageFolder | None = None) -> Stage:
    """Plan the filter: regional scores in, `pseudo_labels` out.

    It reads the passes that `filter.passes` names, else `region_scores`. Raises DataError for
    corrections that cannot be read, and as `chosen_passes`.
    """
    config, split = run.config.filter, run.config.train.split
    passes = chosen_passes(run.run_dir, config, region_scores)
    parts: list[Any] = [config.answer_settings(), split]
    if config.passes is None:
        parts += [passes[0].folder.key]
    else:
        parts += [[one.record() for one in passes], config.combine, config.calibrate]
    parts += [run.class_table.fingerprint()]
    if config.overrides is not None:
        parts += ["overrides", overrides_key(config.overrides)]
    folder = run.stage("pseudo_labels", settings_hash(*parts))

    def work(_progress: object) -> object:
        return filter_regions(config, passes, split, folder)

    read = ", ".join(one.folder.path for one in passes)
    return Stage(folder, {"region_scores": read}, work)


def labels_so_far(one: TeacherPass, split: str | None) -> pa.Table:
    """Return the `pseudo_labels` rows of what an unfinished pass has written, without storing them.

    They are provisional: quantiles and a sample's prior move with every image that is added.
    Raises DataError when nothing of the split is there yet.
    """
    evidence, _ = together([one], one.config, split)
    class_ids = np.asarray(one.info["class_ids"], dtype=np.int16)
    return pseudo_label_table(choose_labels(evidence, one.config, class_ids), class_ids)


def filter_regions(
    config: FilterConfig, passes: Sequence[TeacherPass], split: str | None, stage: StageFolder
) -> dict[str, Any]:
    """Write `pseudo_labels` for the images of `split` (None: all) and return the stage's counts.

    The counts hold how many candidates were dropped for each reason. Raises DataError when no
    image keeps a positive class.
    """
    if stage.finished:
        return stage.stats
    started = time.perf_counter()
    class_ids = np.asarray(passes[0].info["class_ids"], dtype=np.int16)
    overrides = None if config.overrides is None else read_overrides(config.overrides)
    evidence, combined = together(passes, config, split)
    labels = choose_labels(evidence, config, class_ids, overrides)
    selection, corrections = labels.selection, labels.corrections
    summary = selection.summary()
    if summary["positives"] == 0:
        dropped = ", ".join(f"{name} {n}" for name, n in selection.reason_totals().items())
        raise DataError(
            f"no pseudo-label is left ({dropped}): look at the teacher's scores with"
            " `hts label --dry-run`, lower filter.positive_threshold or filter.min_support, or set"
            " filter.background=false if every image shows one of the classes"
        )
    table = pseudo_label_table(labels, class_ids)
    write_table(stage.file("part-0.parquet"), table)
    storage.write_json(
        stage.file("table.json"),
        {
            "class_ids": class_ids.tolist(),
            "filter": config.answer_settings(),
            "region_scores": passes[0].name,
            **({"passes": [one.record() for one in passes]} if combined else {}),
            "combine": config.combine if combined else None,
            "split": split,
            "corrected_ids": [] if corrections is None else list(corrections.image_ids),
        },
    )
    seconds = time.perf_counter() - started
    positives_C = (selection.targets_NC == 1).sum(axis=0)
    stage.publish(
        {
            **summary,
            **combined,
            **({} if corrections is None else corrections.counts()),
            "rows_in": len(table),
            "rows_out": len(table),
            "quarantined": 0,
            "seconds": round(seconds, 3),
            "rows_per_second": round(len(table) / max(seconds, 1e-9), 1),
            "positives_per_class": dict(
                zip(map(str, class_ids.tolist()), positives_C.tolist(), strict=True)
            ),
        }
    )
    return stage.stats


def choose_labels(
    evidence: Evidence,
    config: FilterConfig,
    class_ids: npt.NDArray[np.int16],
    overrides: pa.Table | None = None,
) -> PseudoLabels:
    """Select the labels of N images, and put what people decided in place of them.

    `class_ids` (C,) are those of the evidence's columns, `overrides` rows of corrections. Raises
    DataError when none of the corrected images is among the N.
    """
    selection = select(evidence.probabilities_NC, evidence.support_NC, config)
    if overrides is None:
        return PseudoLabels(evidence, selection)
    found = apply_overrides(overrides, evidence.image_ids, class_ids, selection.targets_NC)
    given_NC = found.decided_NC & (found.targets_NC == 1)
    certain_NC = np.where(given_NC, np.float32(1), evidence.probabilities_NC)
    return PseudoLabels(
        replace(evidence, probabilities_NC=certain_NC),
        replace(selection, targets_NC=found.targets_NC),
        found,
    )


def pseudo_label_table(labels: PseudoLabels, class_ids: npt.NDArray[np.int16]) -> pa.Table:
    """Return the `pseudo_labels` rows of N images; positives by falling probability."""
    evidence, selection = labels.evidence, labels.selection
    rows = []
    for i, image in enumerate(evidence.images.to_pylist()):
        target_C, probability_C = selection.targets_NC[i], evidence.probabilities_NC[i]
        positive = np.flatnonzero(target_C == 1)
        positive = positive[np.argsort(-probability_C[positive], kind="stable")]
        rows.append(
            {
                **image,
                "positive_ids": class_ids[positive].tolist(),
                "ignored_ids": class_ids[target_C == 0].tolist(),
                "probability": probability_C[positive].tolist(),
                "support": evidence.support_NC[i][positive].tolist(),
                "dropped": [(name, int(selection.reason_counts_N[i][name])) for name in REASONS],
            }
        )
    return pa.Table.from_pylist(rows, schema=PSEUDO_LABELS_SCHEMA)
