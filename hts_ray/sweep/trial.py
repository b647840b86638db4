"""One trial of a sweep: filter the stored evidence, fit classifiers on cached features, judge them.

The teacher is never called and no image is opened. `load_sweep_data` reads everything once and
packs it into arrays, which Ray's object store shares between trials without copies; `run_trial`
is a function of these arrays, the trial's settings and a seed. It uses the filter stage's own
functions, so that its pseudo-labels are those of `hts filter` to the last bit. No Ray here.

Shapes: N images, G regions of all images, R regions of one image, C classes, D features, V labeled
images.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from hts_ray import metrics
from hts_ray.classes import ClassTable
from hts_ray.config import FilterConfig, HtsConfig, TrainConfig, override
from hts_ray.errors import ConfigError, DataError
from hts_ray.labels import select as pseudo_labels
from hts_ray.labels import stage as filtering
from hts_ray.labels.corrections import read_overrides
from hts_ray.sweep import objectives
from hts_ray.sweep.objectives import OBJECTIVES, Outcome, Reference, find_objective, make_reference

if TYPE_CHECKING:
    from hts_ray.student.features import Features

FloatArray = npt.NDArray[np.float32]
BoolArray = npt.NDArray[np.bool_]

VALIDATION = "mAP_validation"
# What a trial without a single pseudo-label is worth by every criterion: it cannot be trained.
WORST = -1.0
_BLOCK_BYTES = 64 << 20  # of scores that are turned into probabilities at a time
# Of `train`, what a fit of the classifier on stored features feels.
_FELT = re.compile(
    r"loss(_temperature)?|positive_weight|focal_\w+|asl_\w+|class_balance|epochs|batch_size"
    r"|min_positives_per_class|soft_labels|augment\.flip|optim\.(?!layer_decay)\w+"
)


@dataclass(frozen=True, eq=False)
class StoredRegions:
    """The teacher's scores of N images, image i having the regions offsets_N1[i]:offsets_N1[i + 1].

    `scores_GC` float32 as they were stored, `kinds_G`, `margins_G`, and `view_G` int8 in {0, 1},
    which halves every image's regions at random; images in the order of their ids. `info` is the
    contents of `table.json`.
    """

    image_ids: npt.NDArray[np.str_]
    offsets_N1: npt.NDArray[np.int64]
    scores_GC: FloatArray
    kinds_G: npt.NDArray[np.str_]
    margins_G: FloatArray
    view_G: npt.NDArray[np.int8]
    info: dict[str, Any]


@dataclass(frozen=True, eq=False)
class Validation:
    """Features (V, D) and annotations (V, C) in {1, -1, 0, -2} of images a user has labeled."""

    features_VD: FloatArray
    labels_VC: npt.NDArray[np.int8]


@dataclass(frozen=True, eq=False)
class SweepData:
    """Everything a trial reads: arrays and the run's own settings, which a trial's are laid over.

    `feature_row_N` is an image's row of `features_MD` (M images), or -1 where it has no features;
    `flipped_MD` are those of the mirrored images, None where none are stored; `classifier_CD` is
    the zero-shot classifier; `overrides` are the corrections of `filter.overrides`.
    """

    config: HtsConfig
    regions: StoredRegions
    feature_row_N: npt.NDArray[np.int64]
    features_MD: FloatArray
    flipped_MD: FloatArray | None
    classifier_CD: FloatArray
    reference: Reference
    validation: Validation | None
    overrides: pa.Table | None

    @property
    def nbytes(self) -> int:
        """Memory of the arrays in bytes, what the object store has to hold."""
        reference = self.reference
        arrays = [self.regions.scores_GC, self.features_MD, self.classifier_CD]
        arrays += [reference.consensus_NC, reference.calibrated_NC, reference.agreed_NC]
        arrays += [reference.views_2NC, reference.start_NC]
        if self.flipped_MD is not None:
            arrays.append(self.flipped_MD)
        if self.validation is not None:
            arrays.append(self.validation.features_VD)
        return sum(array.nbytes for array in arrays)


@dataclass(frozen=True, eq=False)
class Evidence:
    """Class probabilities (N, C) float32 and support (N, C) int16 of N images.

    Where `seen_N` is false no region of the image counts and its rows mean nothing.
    """

    probabilities_NC: FloatArray
    support_NC: npt.NDArray[np.int16]
    seen_N: BoolArray


@dataclass(frozen=True, eq=False)
class PseudoLabels:
    """What the filter makes of all images: `targets_NC` and, where asked for, `weights_NC`.

    Images without a counting region are ignored throughout and not in `selection`.
    """

    targets_NC: npt.NDArray[np.int8]
    weights_NC: FloatArray | None
    seen_N: BoolArray
    selection: pseudo_labels.Selection


def load_sweep_data(
    config: HtsConfig,
    class_table: ClassTable,
    region_scores_path: str,
    features_path: str,
    seed: int,
    validation: pa.Table | None = None,
    max_images: int | None = None,
) -> SweepData:
    """Read the region scores and features of the images of `train.split` once for all trials.

    `validation` has annotated rows of a manifest (of any split); their features must be stored
    too, and only `mAP_validation` ever sees their labels. `max_images` takes a sample by `seed`,
    which also halves every image's regions for the objectives that compare halves. Memory: 4 N R C
    bytes of scores and 24 N C of reference (38,116 x 15 x 600: 1.4 + 0.5 GB). Raises
    DataError when no image has scores and features, when classes differ, or when no labeled
    image has features.
    """
    from hts_ray.student.features import read_feature_table

    regions = read_regions(region_scores_path, config.train.split, seed, max_images)
    _check_classes(regions.info, class_table, region_scores_path)
    stored = read_feature_table(features_path)
    feature_row_N, wanted = _feature_rows(regions.image_ids, stored)
    if not len(wanted):
        raise DataError(
            f"{features_path} has features of no image in split {config.train.split!r}"
            f" of {region_scores_path}"
        )
    return make_data(
        config,
        regions,
        feature_row_N,
        stored.features_ND[wanted],
        None if stored.flipped_ND is None else stored.flipped_ND[wanted],
        _zero_shot_classifier(config, class_table),
        _validation(validation, stored, class_table, features_path),
    )


def make_data(
    config: HtsConfig,
    regions: StoredRegions,
    feature_row_N: npt.NDArray[np.int64],
    features_MD: FloatArray,
    flipped_MD: FloatArray | None,
    classifier_CD: FloatArray,
    validation: Validation | None = None,
) -> SweepData:
    """Return arrays, as `SweepData` describes them, with the reference that objectives need.

    Raises DataError when the teacher expects no positive of any class.
    """
    reference = _reference(config, regions, features_MD, feature_row_N, classifier_CD)
    overrides = config.filter.overrides
    return SweepData(
        config=config,
        regions=regions,
        feature_row_N=feature_row_N,
        features_MD=features_MD,
        flipped_MD=flipped_MD,
        classifier_CD=classifier_CD,
        reference=reference,
        validation=validation,
        overrides=None if overrides is None else read_overrides(overrides),
    )


def run_trial(
    data: SweepData,
    settings: Mapping[str, Any],
    seed: int,
    names: Sequence[str] | None = None,
) -> dict[str, float]:
    """Return what `settings` (dotted names, such as `filter.positive_threshold`) lead to.

    Keys: every objective of `names` (all of `OBJECTIVES` if not given; higher is better),
    `mAP_validation` in [0, 1] with a labeled validation set, counts of the pseudo-labels
    (`positives_per_image`, `images_without_positive`, `classes_without_positive`, `ignored_share`)
    and `seconds`. `seed` orders the training images and halves them for the objectives. Where
    the filter leaves no positive every criterion is -1, which no other setting can have. Raises
    ConfigError for settings that do not fit or that a trial cannot feel, DataError when the loss
    stops being finite.
    """
    started = time.perf_counter()
    names = list(OBJECTIVES) if names is None else names
    chosen = [find_objective(name) for name in names]
    config = trial_config(data.config, settings)
    labels = pseudo_label(data, config)
    summary = labels.selection.summary()
    result = {name: float(summary[name]) for name in _COUNTS}
    criteria = [*names, *([] if data.validation is None else [VALIDATION])]
    if summary["positives"] == 0:
        result.update(dict.fromkeys(criteria, WORST))
    else:
        result.update(_judge(data, config, labels, seed, chosen))
    return {**result, "seconds": time.perf_counter() - started}


_COUNTS = (
    "positives_per_image",
    "images_without_positive",
    "classes_without_positive",
    "ignored_share",
)


def trial_config(base: HtsConfig, settings: Mapping[str, Any]) -> HtsConfig:
    """Return the run's configuration with a trial's settings laid over it.

    Raises ConfigError for unknown settings, values that do not fit, and settings that a trial
    does not feel.
    """
    nested: dict[str, Any] = {}
    for name, value in settings.items():
        if not feels(name):
            raise ConfigError(
                field=name,
                value=value,
                remedy="a trial fits the classifier on stored features and scores, which this"
                " setting does not change: leave it out of the sweep",
            )
        inner = nested
        *sections, last = name.split(".")
        for section in sections:
            inner = inner.setdefault(section, {})
        inner[last] = value
    return override(base, nested)


def feels(name: str) -> bool:
    """Tell whether a setting, by its dotted name, can change what a trial measures."""
    section, _, rest = name.partition(".")
    if name == "filter.overrides":
        return False  # people's word is not for a sweep to choose
    return section == "filter" or (section == "train" and _FELT.fullmatch(rest) is not None)


def read_regions(
    path: str, split: str | None, seed: int, max_images: int | None = None
) -> StoredRegions:
    """Pack the scored images of a split (all for None), or a sample of them by `seed`.

    DataError when there is none.
    """
    rows = {
        row["image_id"]: (row["scores"], row["region_kinds"], row.get("margins"))
        for row in _rows_of(path, split, seed, max_images)
    }
    if not rows:
        raise DataError(f"no scored image of split {split!r} in {path}")
    ids = sorted(rows)
    counts = np.array([len(rows[i][1]) for i in ids])
    margins = [rows[i][2] or [0.0] * len(rows[i][1]) for i in ids]
    return StoredRegions(
        image_ids=np.asarray(ids),
        offsets_N1=np.concatenate([[0], np.cumsum(counts)]),
        scores_GC=np.concatenate([rows[i][0] for i in ids]),
        kinds_G=np.asarray([kind for i in ids for kind in rows[i][1]]),
        margins_G=np.asarray([m for given in margins for m in given], dtype=np.float32),
        view_G=_halves(counts, seed),
        info=filtering.read_info(path),
    )


def _rows_of(
    path: str, split: str | None, seed: int, max_images: int | None
) -> Iterator[dict[str, Any]]:
    rows = (
        row for row in filtering.iter_region_rows(path) if split is None or row["split"] == split
    )
    if max_images is None:
        yield from rows
        return
    from hts_ray.store.tables import read_table

    table = read_table(path, columns=["image_id", "split", "status"])
    ids = sorted(
        row["image_id"]
        for row in table.to_pylist()
        if row["status"] == "ok" and (split is None or row["split"] == split)
    )
    size = min(max_images, len(ids))
    sample = np.random.default_rng([seed, len(ids)]).choice(len(ids), size, replace=False)
    kept = {ids[place] for place in sample}
    yield from (row for row in rows if row["image_id"] in kept)


def _halves(counts_N: npt.NDArray[np.int64], seed: int) -> npt.NDArray[np.int8]:
    """Deal each image's regions, shuffled, alternately into two halves; (G,) in {0, 1}."""
    random = np.random.default_rng([seed, 1])
    owner_G = np.repeat(np.arange(len(counts_N)), counts_N)
    order_G = np.lexsort((random.random(len(owner_G)), owner_G))
    starts_N = np.concatenate([[0], np.cumsum(counts_N)[:-1]])
    place_G = np.empty(len(owner_G), dtype=np.int64)
    place_G[order_G] = np.arange(len(owner_G)) - np.repeat(starts_N, counts_N)
    # The odd region goes to either half, or the first half would see more of every image.
    first_N = random.integers(2, size=len(counts_N))
    return np.asarray((place_G + first_N[owner_G]) % 2, dtype=np.int8)


def aggregate_regions(
    regions: StoredRegions, config: FilterConfig, chosen_G: BoolArray | None = None
) -> Evidence:
    """Aggregate every image's counting regions as `filtering.image_evidence` does.

    `chosen_G` narrows them further. Images with equally many counting regions are aggregated
    together: laid side by side they look like one image with more classes.
    """
    row: dict[str, Any] = {"region_kinds": regions.kinds_G}
    if config.margins is not None:
        row["margins"] = regions.margins_G.tolist()
    keep_G = filtering.kept_regions(row, config)
    if chosen_G is not None:
        keep_G &= chosen_G
    images, classes = len(regions.image_ids), regions.scores_GC.shape[1]
    probabilities_NC = np.zeros((images, classes), np.float32)
    support_NC = np.zeros((images, classes), np.int16)
    # Summing an empty slice is fine where reduceat is not.
    kept_before = np.concatenate([[0], np.cumsum(keep_G)])[regions.offsets_N1]
    counts_N = np.diff(kept_before)
    for start, end in _blocks(regions):
        inside = slice(int(regions.offsets_N1[start]), int(regions.offsets_N1[end]))
        scores_KC = regions.scores_GC[inside][keep_G[inside]]
        if not len(scores_KC):
            continue
        probabilities_KC = filtering.class_probabilities(scores_KC, regions.info, config)
        block_counts = counts_N[start:end]
        firsts = kept_before[start:end] - kept_before[start]
        for count in np.unique(block_counts[block_counts > 0]):
            rows = np.flatnonzero(block_counts == count)
            index_RI = firsts[rows] + np.arange(count)[:, None]
            beside = probabilities_KC[index_RI].reshape(count, -1)
            found = pseudo_labels.aggregate(beside, config.aggregation, config.top_k)
            agree = pseudo_labels.support(beside, config.support_threshold)
            probabilities_NC[start + rows] = found.reshape(len(rows), classes)
            support_NC[start + rows] = agree.reshape(len(rows), classes)
    return Evidence(probabilities_NC, support_NC, counts_N > 0)


def _blocks(regions: StoredRegions) -> Iterator[tuple[int, int]]:
    """Yield ranges of images whose scores come to about `_BLOCK_BYTES`."""
    images = len(regions.image_ids)
    per_image = max(1, regions.scores_GC.nbytes // max(images, 1))
    step = max(1, _BLOCK_BYTES // per_image)
    for start in range(0, images, step):
        yield start, min(start + step, images)


def pseudo_label(
    data: SweepData, config: HtsConfig, chosen_G: BoolArray | None = None
) -> PseudoLabels:
    """Filter the stored evidence as `filtering.filter_regions` does, without writing anything.

    Unlike it, nothing is raised when no positive is left.
    """
    settings = config.filter
    evidence = aggregate_regions(data.regions, settings, chosen_G)
    seen_N = evidence.seen_N
    if not seen_N.any() and chosen_G is None:
        raise ConfigError(
            field="filter.region_kinds",
            value=settings.region_kinds,
            remedy=f"the teacher stored only {', '.join(np.unique(data.regions.kinds_G))}",
        )
    selection = pseudo_labels.select(
        evidence.probabilities_NC[seen_N],
        evidence.support_NC[seen_N],
        positive_threshold=settings.positive_threshold,
        negative_threshold=settings.negative_threshold,
        per_class_quantile=settings.per_class_quantile,
        quantile_floor=settings.quantile_floor,
        min_support=settings.min_support,
        max_positives_per_image=settings.max_positives_per_image,
    )
    probabilities_NC = evidence.probabilities_NC
    if data.overrides is not None and seen_N.any():
        selection, probabilities_NC[seen_N] = _corrected(data, evidence, selection)
    targets_NC = np.zeros(probabilities_NC.shape, np.int8)
    targets_NC[seen_N] = selection.targets_NC
    weights_NC = None
    if config.train.soft_labels:
        weights_NC = np.where(targets_NC == 1, probabilities_NC, np.float32(1))
    return PseudoLabels(targets_NC, weights_NC, seen_N, selection)


def _corrected(
    data: SweepData, evidence: Evidence, selection: pseudo_labels.Selection
) -> tuple[pseudo_labels.Selection, FloatArray]:
    """Put what people decided in place of the selection, as the filter stage does."""
    assert data.overrides is not None
    seen_N = evidence.seen_N
    ids = data.regions.image_ids[seen_N].tolist()
    known = data.overrides.filter(pc.is_in(data.overrides["image_id"], pa.array(ids)))
    found = filtering.ImageEvidence(
        ids, ids, ids, evidence.probabilities_NC[seen_N], evidence.support_NC[seen_N]
    )
    class_ids = np.asarray(data.regions.info["class_ids"], dtype=np.int16)
    corrected, selection, _ = filtering.corrected(found, selection, class_ids, known)
    return selection, corrected.probabilities_NC


def fit_classifier(
    data: SweepData,
    config: TrainConfig,
    labels: PseudoLabels,
    seed: int,
    chosen_N: BoolArray | None = None,
) -> FloatArray:
    """Fit the classifier (C, D) on the pseudo-labels of the images that have features.

    `chosen_N` narrows them; they are then repeated until there are as many rows as without it.
    The zero-shot classifier comes back where no positive is left.
    """
    from hts_ray.student.head import HeadData, fit_head

    use_N = labels.seen_N & (data.feature_row_N >= 0)
    used = np.flatnonzero(use_N)
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


def image_logits(data: SweepData, classifier_CD: FloatArray) -> FloatArray:
    """Return a classifier's logits (N, C) of all images; rows without features are 0."""
    return _image_logits(data.config, data.features_MD, data.feature_row_N, classifier_CD)


def _image_logits(
    config: HtsConfig,
    features_MD: FloatArray,
    feature_row_N: npt.NDArray[np.int64],
    classifier_CD: FloatArray,
) -> FloatArray:
    from hts_ray.student.head import head_logits

    logits_MC = head_logits(features_MD, classifier_CD, config.student.logit_scale)
    return np.where((feature_row_N >= 0)[:, None], logits_MC[feature_row_N], np.float32(0))


def _judge(
    data: SweepData,
    config: HtsConfig,
    labels: PseudoLabels,
    seed: int,
    chosen: Sequence[objectives.Objective],
) -> dict[str, float]:
    """Fit what the chosen objectives and the labeled images ask for, and measure them."""
    whole_CD = None
    if data.validation is not None or any(objective.needs_whole for objective in chosen):
        whole_CD = fit_classifier(data, config.train, labels, seed)
    fold_N = _folds(len(data.feature_row_N), seed)
    view_labels: list[PseudoLabels] = []
    if any(objective.needs_views for objective in chosen):
        view_labels = [pseudo_label(data, config, data.regions.view_G == v) for v in (0, 1)]
    logits = view_logits = None
    if any(objective.needs_students for objective in chosen):
        logits = _fold_logits(data, config, [labels, labels], fold_N, seed)
    if any(objective.needs_view_students for objective in chosen):
        view_logits = _fold_logits(data, config, view_labels, fold_N, seed)
    outcome = Outcome(
        data.reference,
        fold_N,
        labels.targets_NC,
        np.stack([view.targets_NC for view in view_labels]) if view_labels else None,
        logits,
        view_logits,
        None if whole_CD is None else image_logits(data, whole_CD),
    )
    result = {objective.name: objective.compute(outcome) for objective in chosen}
    if data.validation is not None and whole_CD is not None:
        result[VALIDATION] = _validation_map(data.validation, config, whole_CD)
    return result


def _folds(images: int, seed: int) -> npt.NDArray[np.int8]:
    """Halve the images at random: (N,) in {0, 1}."""
    half = np.arange(images) % 2
    return np.asarray(np.random.default_rng([seed, 2]).permutation(half), dtype=np.int8)


def _fold_logits(
    data: SweepData,
    config: HtsConfig,
    labels: Sequence[PseudoLabels],
    fold_N: npt.NDArray[np.int8],
    seed: int,
) -> FloatArray:
    """Logits (2, N, C) of two students, student f trained on labels f of fold f alone."""
    return np.stack(
        [
            image_logits(data, fit_classifier(data, config.train, labels[f], seed, fold_N == f))
            for f in (0, 1)
        ]
    )


def _validation_map(validation: Validation, config: HtsConfig, classifier_CD: FloatArray) -> float:
    """Mean AP (HICO's protocol) of a classifier on the labeled images."""
    from hts_ray.student.head import head_logits

    logits_VC = head_logits(validation.features_VD, classifier_CD, config.student.logit_scale)
    ap_C = metrics.hico_average_precision(logits_VC, validation.labels_VC)
    return metrics.mean_average_precision(ap_C)


def _reference(
    config: HtsConfig,
    regions: StoredRegions,
    features_MD: FloatArray,
    feature_row_N: npt.NDArray[np.int64],
    classifier_CD: FloatArray,
) -> Reference:
    """Read the teacher's evidence in fixed ways, from all regions and from each half of them."""
    start_NC = _image_logits(config, features_MD, feature_row_N, classifier_CD)
    consensus = _consensus(regions, config.filter, None)
    halves = [_consensus(regions, config.filter, regions.view_G == v) for v in (0, 1)]
    for half in halves:
        half.probabilities_NC[~half.seen_N] = np.nan
    # An image without features is scored by no student: it must not count against any.
    consensus.probabilities_NC[feature_row_N < 0] = 0
    for half in halves:
        half.probabilities_NC[feature_row_N < 0] = np.nan
    return make_reference(
        consensus.probabilities_NC, np.stack([half.probabilities_NC for half in halves]), start_NC
    )


_READINGS: tuple[dict[str, Any], ...] = (
    {"aggregation": "max"},
    {"aggregation": "top_k_mean", "top_k": 2},
    {"aggregation": "mean"},
    {"aggregation": "noisy_or"},
)


def _consensus(
    regions: StoredRegions, config: FilterConfig, chosen_G: BoolArray | None
) -> Evidence:
    """Mean probability over all aggregations, of all stored kinds of regions and margins."""
    every = config.model_copy(update={"region_kinds": None, "margins": None})
    found = [
        aggregate_regions(regions, every.model_copy(update=reading), chosen_G)
        for reading in _READINGS
    ]
    mean_NC = np.mean([evidence.probabilities_NC for evidence in found], axis=0, dtype=np.float32)
    return Evidence(np.asarray(mean_NC), found[0].support_NC, found[0].seen_N)


def _feature_rows(
    ids: Sequence[str] | npt.NDArray[np.str_], stored: Features
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return each image's place among the rows that are needed, -1 without one, and those rows."""
    row_of = {image_id: row for row, image_id in enumerate(stored.image_ids)}
    row_N = np.array([row_of.get(str(image_id), -1) for image_id in ids], dtype=np.int64)
    wanted = np.unique(row_N[row_N >= 0])
    return np.where(row_N >= 0, np.searchsorted(wanted, row_N), -1), wanted


def _zero_shot_classifier(config: HtsConfig, class_table: ClassTable) -> FloatArray:
    from hts_ray.student.model import build_student

    classifier = build_student(config.student, class_table).classifier
    return np.asarray(classifier.detach().cpu().numpy(), dtype=np.float32)


def _validation(
    rows: pa.Table | None, stored: Features, class_table: ClassTable, path: str
) -> Validation | None:
    if rows is None:
        return None
    from hts_ray.evaluate import label_matrix

    annotated = rows.filter(rows["positive_ids"].is_valid())
    place_V, wanted = _feature_rows(annotated["image_id"].to_pylist(), stored)
    known = place_V >= 0
    labels_VC = label_matrix(annotated, class_table)[known]
    if not (labels_VC == metrics.POSITIVE).any():
        raise DataError(
            f"none of {len(rows)} validation images has features in {path} and a positive class:"
            " compute the features of their split too"
        )
    return Validation(stored.features_ND[wanted][place_V[known]], labels_VC)


def _check_classes(info: Mapping[str, Any], class_table: ClassTable, path: str) -> None:
    if list(info["class_ids"]) != class_table.ids.tolist():
        raise DataError(f"{path} was scored with other classes: use the run's own classes")
