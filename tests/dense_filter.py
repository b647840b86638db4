"""The filter as images x classes in memory: what the one in blocks must equal, bit for bit.

It is how `hts filter` worked before, kept as the reference.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from hts_ray.labels.evidence import image_evidence
from hts_ray.labels.select import REASON_DTYPE, REASONS
from hts_ray.store.tables import PSEUDO_LABELS_SCHEMA


def dense_labels(path, config, split, overrides=None):
    """Return the `pseudo_labels` rows of a pass, by id."""
    evidence = image_evidence(path, config, split)
    probabilities_NC, support_NC = evidence.probabilities_NC, evidence.support_NC
    targets_NC, counts_N = dense_select(probabilities_NC, support_NC, config)
    class_ids = np.arange(targets_NC.shape[1], dtype=np.int16) * 3 + 1
    if overrides is not None:
        targets_NC, decided_NC = dense_overrides(
            overrides, evidence.image_ids, class_ids, targets_NC
        )
        certain_NC = decided_NC & (targets_NC == 1)
        probabilities_NC = np.where(certain_NC, np.float32(1), probabilities_NC)
    rows = []
    for i, image in enumerate(evidence.images.to_pylist()):
        target_C, probability_C = targets_NC[i], probabilities_NC[i]
        positive = np.flatnonzero(target_C == 1)
        positive = positive[np.argsort(-probability_C[positive], kind="stable")]
        rows.append(
            {
                **image,
                "positive_ids": class_ids[positive].tolist(),
                "ignored_ids": class_ids[target_C == 0].tolist(),
                "probability": probability_C[positive].tolist(),
                "support": support_NC[i][positive].tolist(),
                "dropped": [(name, int(counts_N[i][name])) for name in REASONS],
            }
        )
    return pa.Table.from_pylist(rows, schema=PSEUDO_LABELS_SCHEMA)


def dense_select(probabilities, regions_NC, config):
    """Return targets (N, C) and the reasons (N,)."""
    candidate_NC = probabilities >= probabilities.dtype.type(config.negative_threshold)
    positive_NC = probabilities >= dense_thresholds(probabilities, config)
    counts_N = np.zeros(len(probabilities), dtype=REASON_DTYPE)
    counts_N["ignored_band"] = candidate_NC.sum(axis=1) - positive_NC.sum(axis=1)
    unsupported_NC = positive_NC & (regions_NC < config.min_support)
    counts_N["below_support"] = unsupported_NC.sum(axis=1)
    positive_NC &= ~unsupported_NC
    rows, columns = np.nonzero(positive_NC)
    keys = (columns, -regions_NC[rows, columns].astype(float), -probabilities[rows, columns], rows)
    order = np.lexsort(keys)
    rows, columns = rows[order], columns[order]
    over = np.arange(len(rows)) - np.searchsorted(rows, rows) >= config.max_positives_per_image
    counts_N["over_cap"] = np.bincount(rows[over], minlength=len(probabilities))
    positive_NC[rows[over], columns[over]] = False
    return candidate_NC.astype(np.int8) + positive_NC.astype(np.int8) - np.int8(1), counts_N


def dense_thresholds(probabilities_NC, config):
    """Return the threshold (C,) of every class, from a partition of its N probabilities."""
    images, classes = probabilities_NC.shape
    thresholds_C = np.full(classes, config.positive_threshold, dtype=probabilities_NC.dtype)
    if config.per_class_quantile is None:
        return thresholds_C
    claim = int((1 - config.per_class_quantile) * images + 1e-9)
    if claim == 0:
        return thresholds_C
    kth, floor = images - claim, max(config.quantile_floor, config.negative_threshold)
    kth_largest_C = np.partition(probabilities_NC, kth, axis=0)[kth]
    return np.minimum(thresholds_C, np.maximum(kth_largest_C, floor))


def dense_overrides(overrides, image_ids, class_ids, targets_NC):
    """Return corrected targets, and where a person decided, both (N, C)."""
    targets, decided = targets_NC.copy(), np.zeros(targets_NC.shape, dtype=bool)
    row_of = {image_id: row for row, image_id in enumerate(image_ids)}
    column_of = {int(class_id): column for column, class_id in enumerate(class_ids)}
    values = {"positive_ids": 1, "negative_ids": -1, "ambiguous_ids": 0}
    for correction in overrides.to_pylist():
        row = row_of.get(correction["image_id"])
        if row is None:
            continue
        for name, value in values.items():
            columns = [column_of[i] for i in correction[name] or () if i in column_of]
            targets[row, columns] = value
            decided[row, columns] = True
    return targets, decided
