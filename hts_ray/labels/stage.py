"""The filter stage: region_scores in, pseudo_labels out; no teacher, no annotation, no Ray.

Shapes: N images, R regions of one image, C classes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pads

from hts_ray.config import FilterConfig
from hts_ray.engine.run import Run, Stage
from hts_ray.errors import ConfigError, DataError
from hts_ray.labels import select as pseudo_labels
from hts_ray.labels.corrections import (
    Corrected,
    apply_overrides,
    overrides_key,
    read_overrides,
)
from hts_ray.store import storage
from hts_ray.store.run import StageFolder, settings_hash
from hts_ray.store.tables import PSEUDO_LABELS_SCHEMA, write_table

# Changes the probabilities (R, C) of an image's regions, given its id and which were kept.
Opinion = Callable[[str, np.ndarray, np.ndarray], np.ndarray]

_BATCH_ROWS = 256
_IGNORED_PREFIXES = [".", "_", "checkpoint", "quarantine", "stats.json", "table.json"]


@dataclass(frozen=True)
class ImageEvidence:
    """What the regions say of N images together.

    `probabilities_NC` float32 in [0, 1], `support_NC` int16: regions that agree on a class.
    """

    image_ids: list[str]
    uris: list[str]
    splits: list[str]
    probabilities_NC: np.ndarray
    support_NC: np.ndarray

    def of_split(self, split: str | None) -> ImageEvidence:
        """Return the images of one split; all for None."""
        rows = [i for i, name in enumerate(self.splits) if split is None or name == split]
        return ImageEvidence(
            [self.image_ids[i] for i in rows],
            [self.uris[i] for i in rows],
            [self.splits[i] for i in rows],
            self.probabilities_NC[rows],
            self.support_NC[rows],
        )


def iter_region_rows(path: str, batch_rows: int = _BATCH_ROWS) -> Iterator[dict[str, Any]]:
    """Yield the rows of a region_scores folder that were scored, `scores` as (R, C) float32."""
    filesystem, inner = storage.resolve(path)
    dataset = pads.dataset(
        inner, format="parquet", filesystem=filesystem, ignore_prefixes=_IGNORED_PREFIXES
    )
    for batch in dataset.to_batches(batch_size=batch_rows, filter=pc.field("status") == "ok"):
        rows = batch.drop_columns(["scores"]).to_pylist()
        offsets = batch.column("scores").offsets.to_numpy()
        flat = batch.column("scores").values.to_numpy(zero_copy_only=False)
        for row, start, end in zip(rows, offsets[:-1], offsets[1:], strict=True):
            row["scores"] = flat[start:end].reshape(len(row["boxes"]), -1)
            yield row


def image_evidence(
    path: str, config: FilterConfig, opinion: Opinion | None = None
) -> ImageEvidence:
    """Aggregate every image's regions into class probabilities and support.

    `opinion(image_id, kept (R,), probabilities)` may change the probabilities of an image's kept
    regions before they are aggregated. Rows come back sorted by `image_id`, so that the result
    does not depend on how the files were written. Raises DataError when no region is left,
    ConfigError for region kinds that were not stored.
    """
    info = read_info(path)
    found: list[tuple[str, str, str]] = []
    probabilities: list[np.ndarray] = []
    agreement: list[np.ndarray] = []
    kinds_seen: set[str] = set()
    for row in iter_region_rows(path):
        kinds_seen.update(row["region_kinds"])
        keep = kept_regions(row, config)
        if not keep.any():
            continue
        probabilities_RC = class_probabilities(row["scores"][keep], info, config)
        if opinion is not None:
            probabilities_RC = opinion(row["image_id"], keep, probabilities_RC)
        found.append((row["image_id"], row["uri"], row["split"]))
        probabilities.append(
            pseudo_labels.aggregate(probabilities_RC, config.aggregation, config.top_k)
        )
        agreement.append(
            pseudo_labels.support(probabilities_RC, config.support_threshold).astype(np.int16)
        )
    if not found:
        if config.region_kinds and not kinds_seen.intersection(config.region_kinds):
            raise ConfigError(
                field="filter.region_kinds",
                value=list(config.region_kinds),
                remedy=f"the teacher stored only {', '.join(sorted(kinds_seen)) or 'nothing'}",
            )
        raise DataError(f"{path} holds no scored region: run `hts label` on images that decode")
    order = sorted(range(len(found)), key=lambda i: found[i][0])
    return ImageEvidence(
        [found[i][0] for i in order],
        [found[i][1] for i in order],
        [found[i][2] for i in order],
        np.stack([probabilities[i] for i in order]),
        np.stack([agreement[i] for i in order]),
    )


def read_info(path: str) -> dict[str, Any]:
    """Return `table.json` of a region_scores folder: what was scored, and by what.

    Keys: those of `hts_ray.teacher.actor.table_info`. DataError when it is not there.
    """
    try:
        info = storage.read_json(storage.join(path, "table.json"))
    except FileNotFoundError:
        raise DataError(f"no table.json in {path}: run `hts label` first") from None
    assert isinstance(info, dict)
    return info


def class_probabilities(
    scores_RC: np.ndarray, info: dict[str, Any], config: FilterConfig
) -> np.ndarray:
    """Return class probabilities (R, C) of regional scores, whichever kind `info` says they are.

    Log-likelihoods of prompts lose alpha times their prior and compete in a softmax. What
    captions state is a probability already; prior_alpha, temperature and null_score say nothing
    about it. Raises ConfigError for an alpha without a stored prior.
    """
    if info.get("score_kind") == "log_probability":
        return np.asarray(np.exp(scores_RC))
    prior_C = None
    if config.prior_alpha > 0:
        stored = info.get("prior_log_likelihoods")
        if stored is None:
            raise ConfigError(
                field="filter.prior_alpha",
                value=config.prior_alpha,
                remedy="the teacher stored no prior: set it to 0, or label.teacher.prior=plain",
            )
        prior_C = np.asarray(stored, dtype=np.float32)
    return pseudo_labels.region_probabilities(
        scores_RC,
        prior_C,
        config.prior_alpha,
        config.temperature,
        null_score=config.null_score,
    )


def kept_regions(row: dict[str, Any], config: FilterConfig) -> np.ndarray:
    """Return which regions (R,) bool of a row have a kind and a context margin that count.

    Margins are asked of regions that have one to choose, around persons and unions.
    """
    kinds, margins = row["region_kinds"], row.get("margins") or [0.0] * len(row["region_kinds"])
    keep = np.ones(len(kinds), dtype=bool)
    if config.region_kinds is not None:
        keep &= np.isin(kinds, config.region_kinds)
    if config.margins is not None:
        with_context = np.isin(kinds, ("person", "union"))
        nearest = np.abs(np.subtract.outer(margins, config.margins)).min(axis=1, initial=np.inf)
        keep &= ~with_context | (nearest < 1e-4)
    return keep


def plan_filter(run: Run, region_scores: StageFolder) -> Stage:
    """Plan the filter over a region_scores folder: regional scores in, `pseudo_labels` out.

    Raises DataError for corrections that cannot be read.
    """
    config, split = run.config.filter, run.config.train.split
    parts = [config.answer_settings(), split, region_scores.key, run.class_table.fingerprint()]
    if config.overrides is not None:
        parts += ["overrides", overrides_key(config.overrides)]
    folder = run.stage("pseudo_labels", settings_hash(*parts))

    def work(_progress: object) -> object:
        return filter_regions(
            config,
            region_scores_path=region_scores.path,
            class_ids=stored_class_ids(region_scores),
            split=split,
            stage=folder,
        )

    return Stage(folder, {"region_scores": region_scores.path}, work)


def stored_class_ids(region_scores: StageFolder) -> np.ndarray:
    """Return the class ids (C,) of a stage's score columns, in their order."""
    ids = storage.read_json(region_scores.file("table.json"))["class_ids"]
    return np.asarray(ids, dtype=np.int16)


def filter_regions(
    config: FilterConfig,
    *,
    region_scores_path: str,
    class_ids: np.ndarray,
    split: str | None,
    stage: StageFolder,
    opinion: Opinion | None = None,
    progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Write `pseudo_labels` for the images of `split` and return the stage's counts.

    `opinion` is what `image_evidence` takes. The counts hold how many candidates were dropped for
    each reason. Raises DataError when no image keeps a positive class.
    """
    if stage.finished:
        return stage.stats
    started = time.perf_counter()
    evidence = image_evidence(region_scores_path, config, opinion).of_split(split)
    if not evidence.image_ids:
        raise DataError(f"no scored image of split {split!r}: check train.split and label.splits")
    selection = pseudo_labels.select(
        evidence.probabilities_NC,
        evidence.support_NC,
        positive_threshold=config.positive_threshold,
        negative_threshold=config.negative_threshold,
        per_class_quantile=config.per_class_quantile,
        quantile_floor=config.quantile_floor,
        min_support=config.min_support,
        max_positives_per_image=config.max_positives_per_image,
    )
    corrections: dict[str, int] = {}
    corrected_ids: tuple[str, ...] = ()
    if config.overrides is not None:
        evidence, selection, found = corrected(
            evidence, selection, class_ids, read_overrides(config.overrides)
        )
        corrections, corrected_ids = found.counts(), found.image_ids
    table = pseudo_label_table(evidence, selection, class_ids)
    summary = selection.summary()
    if summary["positives"] == 0:
        dropped = ", ".join(f"{name} {n}" for name, n in selection.reason_totals().items())
        raise DataError(
            f"no pseudo-label is left ({dropped}): look at the teacher's scores with"
            " `hts label --dry-run`, lower filter.positive_threshold or filter.min_support"
        )
    write_table(stage.file("part-0.parquet"), table)
    storage.write_json(
        stage.file("table.json"),
        {
            "class_ids": class_ids.tolist(),
            "filter": config.answer_settings(),
            "region_scores": region_scores_path.rstrip("/").rsplit("/", 1)[-1],
            "split": split,
            "corrected_ids": list(corrected_ids),
        },
    )
    seconds = time.perf_counter() - started
    positives_C = (selection.targets_NC == 1).sum(axis=0)
    stage.publish(
        {
            **summary,
            **corrections,
            "rows_in": len(table),
            "rows_out": len(table),
            "quarantined": 0,
            "seconds": round(seconds, 3),
            "rows_per_second": round(len(table) / max(seconds, 1e-9), 1),
            "positives_per_class": {
                str(i): int(n) for i, n in zip(class_ids, positives_C, strict=True)
            },
        }
    )
    if progress is not None:
        progress(f"{summary['positives']} positives on {len(table)} images")
    return stage.stats


def corrected(
    evidence: ImageEvidence,
    selection: pseudo_labels.Selection,
    class_ids: np.ndarray,
    overrides: pa.Table,
) -> tuple[ImageEvidence, pseudo_labels.Selection, Corrected]:
    """Put what people decided in place of the selection; a positive of theirs has probability 1.

    Raises DataError when the corrections belong to other images.
    """
    found = apply_overrides(overrides, evidence.image_ids, class_ids, selection.targets_NC)
    given_NC = found.decided_NC & (found.targets_NC == 1)
    certain_NC = np.where(given_NC, np.float32(1), evidence.probabilities_NC)
    return (
        replace(evidence, probabilities_NC=certain_NC),
        replace(selection, targets_NC=found.targets_NC),
        found,
    )


def pseudo_label_table(
    evidence: ImageEvidence, selection: pseudo_labels.Selection, class_ids: np.ndarray
) -> pa.Table:
    """Return the `pseudo_labels` rows of N images; positives by falling probability."""
    rows = []
    reasons = pseudo_labels.REASONS
    for i, image_id in enumerate(evidence.image_ids):
        target_C, probability_C = selection.targets_NC[i], evidence.probabilities_NC[i]
        positive = np.flatnonzero(target_C == 1)
        positive = positive[np.argsort(-probability_C[positive], kind="stable")]
        rows.append(
            {
                "image_id": image_id,
                "uri": evidence.uris[i],
                "split": evidence.splits[i],
                "positive_ids": class_ids[positive].tolist(),
                "ignored_ids": class_ids[target_C == 0].tolist(),
                "probability": probability_C[positive].tolist(),
                "support": evidence.support_NC[i][positive].tolist(),
                "dropped": [(name, int(selection.reason_counts_N[i][name])) for name in reasons],
            }
        )
    return pa.Table.from_pylist(rows, schema=PSEUDO_LABELS_SCHEMA)
