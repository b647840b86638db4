"""One trial of a sweep: filter the stored evidence, fit classifiers on cached features, judge them.

The teacher is never called and no image is opened. A trial is a function of `SweepData`, its
settings and a seed. It uses the filter stage's own functions, so that its pseudo-labels are those
of `hts filter` to the last bit. No Ray here.

Shapes: N images, G regions of all images, C classes, D features.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from hts_ray.config import HtsConfig, TrainConfig
from hts_ray.errors import ConfigError, DataError
from hts_ray.labels.evidence import aggregate_regions
from hts_ray.labels.select import Selection
from hts_ray.labels.stage import choose_labels
from hts_ray.metrics import hico_average_precision, mean_average_precision
from hts_ray.store.aliases import BoolArray, FloatArray
from hts_ray.student.head import HeadData, fit_head, head_logits
from hts_ray.sweep.data import SweepData, image_logits
from hts_ray.sweep.objectives import OBJECTIVES, VALIDATION, Outcome
from hts_ray.sweep.space import trial_config

_COUNTS = (
    "positives_per_image",
    "images_without_positive",
    "classes_without_positive",
    "ignored_share",
)


@dataclass(frozen=True, eq=False)
class TrialLabels:
    """What the filter makes of all images: `targets_NC` and, where asked for, `weights_NC`.

    Images without a counting region are ignored throughout and not in `selection`.
    """

    targets_NC: npt.NDArray[np.int8]
    weights_NC: FloatArray | None
    seen_N: BoolArray
    selection: Selection


def run_trial(data: SweepData, settings: Mapping[str, Any], seed: int) -> dict[str, float]:
    """Return what `settings` (dotted names, such as `filter.positive_threshold`) lead to.

    Keys: every objective of `OBJECTIVES` (higher is better), `mAP_validation` in [0, 1] with a
    labeled validation set, counts of the pseudo-labels (`positives_per_image`,
    `images_without_positive`, `classes_without_positive`, `ignored_share`) and `seconds`. `seed`
    orders the training images and halves them for the objectives. Raises ConfigError for settings
    that do not fit, DataError when the filter leaves no positive or the loss stops being finite.
    """
    started = time.perf_counter()
    config = trial_config(data.config, settings)
    labels = pseudo_label(data, config)
    summary = labels.selection.summary()
    if summary["positives"] == 0:
        raise DataError("the filter leaves no pseudo-label")
    result = {name: float(summary[name]) for name in _COUNTS} | _judge(data, config, labels, seed)
    return {**result, "seconds": time.perf_counter() - started}


def pseudo_label(data: SweepData, config: HtsConfig) -> TrialLabels:
    """Filter the stored evidence as `hts filter` does, without writing anything.

    Unlike there, nothing is raised when no positive is left.
    """
    evidence = aggregate_regions(data.regions, config.filter)
    seen_N, seen = evidence.seen_N, evidence.seen()
    if not seen_N.any():
        raise ConfigError(
            field="filter.region_kinds",
            value=config.filter.region_kinds,
            remedy=f"the teacher stored only {', '.join(np.unique(data.regions.kinds_G))}",
        )
    overrides = data.overrides
    if overrides is not None:
        known = pc.is_in(overrides["image_id"], pa.array(seen.image_ids, pa.string()))
        overrides = overrides.filter(known)
    class_ids = np.asarray(data.regions.info["class_ids"], dtype=np.int16)
    labels = choose_labels(seen, config.filter, class_ids, overrides)
    positive_NC = labels.selection.targets_NC == 1
    targets_NC = np.zeros(evidence.probabilities_NC.shape, np.int8)
    targets_NC[seen_N] = labels.selection.targets_NC
    weights_NC = None
    if config.train.weighs_labels:
        weights_NC = np.ones(targets_NC.shape, np.float32)
        weights_NC[seen_N] = np.where(positive_NC, labels.evidence.probabilities_NC, np.float32(1))
    return TrialLabels(targets_NC, weights_NC, seen_N, labels.selection)


def fit_classifier(
    data: SweepData,
    config: TrainConfig,
    labels: TrialLabels,
    seed: int,
    chosen_N: BoolArray | None = None,
) -> FloatArray:
    """Fit the classifier (C, D) on the pseudo-labels of the images that have features.

    Labeled images are left out: what is measured on them would else be known to the student.
    `chosen_N` narrows them; they are then repeated until there are as many rows as without it.
    The zero-shot classifier comes back where no positive is left.
    """
    used = np.flatnonzero(labels.seen_N & (data.feature_row_N >= 0) & ~data.labeled_N)
    if chosen_N is not None and chosen_N[used].any():
        # Few steps can be worse than none, so a part takes as many steps as the whole would.
        used = np.resize(used[chosen_N[used]], len(used))
    targets = labels.targets_NC[used]
    if not (targets == 1).any():
        return data.classifier_CD
    rows = data.feature_row_N[used]
    known = HeadData(
        data.features_MD[rows],
        targets,
        label_weights_NC=None if labels.weights_NC is None else labels.weights_NC[used],
        flipped_ND=None if data.flipped_MD is None else data.flipped_MD[rows],
        image_ids=data.regions.image_ids[used].tolist(),
    )
    scale = data.config.student.logit_scale
    return fit_head(
        known, data.classifier_CD, logit_scale=scale, config=config, seed=seed
    ).classifier_CD


def _judge(data: SweepData, config: HtsConfig, labels: TrialLabels, seed: int) -> dict[str, float]:
    """Fit a classifier on all images and one on each half, and measure them."""
    half = np.arange(len(data.feature_row_N)) % 2
    fold_N = np.asarray(np.random.default_rng([seed, 2]).permutation(half), dtype=np.int8)

    def fit(chosen_N: BoolArray | None = None) -> FloatArray:
        return fit_classifier(data, config.train, labels, seed, chosen_N)

    def logits(classifier_CD: FloatArray) -> FloatArray:
        return image_logits(data.config, data.features_MD, data.feature_row_N, classifier_CD)

    whole_CD = fit()
    logits_2NC = np.stack([logits(fit(fold_N == fold)) for fold in (0, 1)])
    outcome = Outcome(data.reference_NC, fold_N, logits_2NC, logits(whole_CD))
    result = {name: judge(outcome) for name, judge in OBJECTIVES.items()}
    if data.validation is not None:
        scale = config.student.logit_scale
        logits_VC = head_logits(data.validation.features_VD, whole_CD, scale)
        ap_C = hico_average_precision(logits_VC, data.validation.labels_VC)
        result[VALIDATION] = mean_average_precision(ap_C)
    return result
