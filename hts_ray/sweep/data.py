"""What all trials of a sweep read: stored scores and features, packed once into arrays.

Ray's object store shares the arrays between trials without copies.

Shapes: N images, G regions of all images, C classes, D features, M images with features, V labeled
images.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from hts_ray.classes import ClassTable
from hts_ray.config import FilterConfig, HtsConfig
from hts_ray.engine.blocks import Here
from hts_ray.errors import DataError
from hts_ray.evaluate import label_matrix
from hts_ray.images.manifest import IMAGE_COLUMNS
from hts_ray.labels.blocks import entries_of
from hts_ray.labels.corrections import read_overrides
from hts_ray.labels.evidence import (
    COMPETING,
    LOG_LIKELIHOOD,
    Evidence,
    Regions,
    aggregate_regions,
    pack_regions,
    read_info,
    with_sample_prior,
)
from hts_ray.labels.evidence import read_regions as read_blocks
from hts_ray.labels.passes import TABLE, TeacherPass
from hts_ray.labels.select import Aggregation
from hts_ray.labels.stage import gather
from hts_ray.metrics import POSITIVE
from hts_ray.store.aliases import BoolArray, FloatArray
from hts_ray.store.run import given_stage
from hts_ray.store.tables import read_table
from hts_ray.student.features import Features, read_feature_table
from hts_ray.student.head import head_logits
from hts_ray.student.model import build_student
from hts_ray.sweep.objectives import make_reference


@dataclass(frozen=True, eq=False)
class Validation:
    """Features (V, D) and annotations (V, C) in {1, -1, 0, -2} of images a user has labeled."""

    features_VD: FloatArray
    labels_VC: npt.NDArray[np.int8]


@dataclass(frozen=True, eq=False)
class Judging:
    """What students are compared by.

    `regions` are the teacher's scores of N images, in the order of their ids; `reference_NC` is the
    evidence that objectives compare with, see `reference`; `labeled_N` are the images that have
    labels to compare with, on which no student is trained.
    """

    regions: Regions
    reference_NC: FloatArray
    labeled_N: BoolArray

    @property
    def image_ids(self) -> npt.NDArray[Any]:
        """The ids (N,) of the images."""
        return self.regions.image_ids


@dataclass(frozen=True, eq=False)
class SweepData(Judging):
    """Everything a trial reads: arrays and the run's own settings, which a trial's replace.

    - `feature_row_N` is an image's row of `features_MD`, or -1 where it has no features.
    - `flipped_MD` are the features of the mirrored images, None where none are stored.
    - `classifier_CD` is the zero-shot classifier, `overrides` the rows of `filter.overrides`.
    """

    config: HtsConfig
    feature_row_N: npt.NDArray[np.int64]
    features_MD: FloatArray
    flipped_MD: FloatArray | None
    classifier_CD: FloatArray
    validation: Validation | None
    overrides: pa.Table | None


def load_judging(
    config: HtsConfig,
    class_table: ClassTable,
    region_scores_path: str,
    validation: pa.Table | None = None,
    max_images: int | None = None,
) -> Judging:
    """Read the region scores of the images of `train.split`; see `load_sweep_data`."""
    split = config.train.split
    images = None
    if config.sweep.max_images is not None:
        images = scored_images(region_scores_path, split)
        images = swept_images(images, region_scores_path, config, validation)
    regions = read_regions(region_scores_path, split, config.sweep.seed, max_images, images)
    if list(regions.info["class_ids"]) != class_table.ids.tolist():
        raise DataError(
            f"{region_scores_path} was scored with other classes: use the run's own classes"
        )
    return Judging(regions, reference(regions), labeled_among(regions.image_ids, validation))


def load_sweep_data(
    config: HtsConfig,
    class_table: ClassTable,
    region_scores_path: str,
    features_path: str,
    validation: pa.Table | None = None,
    max_images: int | None = None,
) -> SweepData:
    """Read the region scores and features of the images of `train.split` once for all trials.

    `validation` has annotated rows of a manifest (of any split); their features must be stored
    too, and only `mAP_validation` ever sees their labels. The images are `swept_images`, of which
    `max_images` takes a sample by `sweep.seed`. Memory: 4 N R C bytes of scores and 4 N C of
    reference (38,116 x 15 x 600: 1.4 + 0.1 GB). Raises DataError when no image has scores and
    features, when classes differ, when no labeled image has features, or when the teacher expects
    no positive of any class.
    """
    known = load_judging(config, class_table, region_scores_path, validation, max_images)
    stored = read_feature_table(features_path)
    feature_row_N, wanted = _feature_rows(known.image_ids.tolist(), stored)
    if not len(wanted):
        raise DataError(
            f"{features_path} has features of no image in split {config.train.split!r} of"
            f" {region_scores_path}"
        )
    overrides = config.filter.overrides
    return SweepData(
        config=config,
        regions=known.regions,
        feature_row_N=feature_row_N,
        features_MD=stored.features_ND[wanted],
        flipped_MD=None if stored.flipped_ND is None else stored.flipped_ND[wanted],
        classifier_CD=zero_shot_classifier(config, class_table),
        # An image without features is scored by no student: it must not count against any.
        reference_NC=np.where((feature_row_N >= 0)[:, None], known.reference_NC, np.float32(0)),
        labeled_N=known.labeled_N,
        validation=_validation(validation, stored, class_table, features_path),
        overrides=None if overrides is None else read_overrides(overrides),
    )


def scored_images(path: str, split: str) -> pa.Table:
    """Return image_id, uri and split of the images of a split that the teacher scored, by id.

    DataError when there is none.
    """
    table = read_table(path, [*IMAGE_COLUMNS, "status"])
    chosen = table.filter(pc.and_(pc.equal(table["status"], "ok"), pc.equal(table["split"], split)))
    if not len(chosen):
        raise DataError(f"no scored image of split {split!r}: check train.split and label.splits")
    return chosen.select(IMAGE_COLUMNS).sort_by("image_id").combine_chunks()


def swept_images(
    images: pa.Table, path: str, config: HtsConfig, validation: pa.Table | None
) -> pa.Table:
    """Return those of all `scored_images` that a sweep looks at.

    They are all, or a sample of `sweep.max_images`, see `balanced`: the labeled ones, and for each
    class equally many that may show it, as far as there are. An image may show what has a
    probability of 0.1 by the filter's defaults, whatever the run's own settings are.
    """
    most = config.sweep.max_images
    if most is None or len(images) <= most:
        return images
    alpha = FilterConfig().prior_alpha if read_info(path).get("prior_log_likelihoods") else 0.0
    fixed = FilterConfig(prior_alpha=alpha)
    one = TeacherPass(given_stage(path, TABLE), fixed)
    found, _ = gather([one], fixed, config.train.split, None, Here())
    tables = [table for part in found.parts for table in part]
    table = pa.concat_tables(tables).select(["image_id", "entries"]).sort_by("image_id")
    row_N = pc.index_in(table["image_id"], value_set=images["image_id"].combine_chunks()).to_numpy()
    entries = entries_of(table)
    labeled_N = labeled_among(images["image_id"].to_numpy(), validation)
    row_E = row_N[entries.row_E]
    chosen_N = balanced(row_E, entries.column_E, labeled_N, most, config.sweep.seed)
    return images.filter(pa.array(chosen_N)).combine_chunks()


def balanced(
    row_E: npt.NDArray[np.integer[Any]],
    class_E: npt.NDArray[np.integer[Any]],
    always_N: BoolArray,
    most: int,
    seed: int,
) -> BoolArray:
    """Choose about `most` of N images (N,), of E pairs of an image and a class that it may show.

    What is `always_N` is chosen. Images of no class keep their share. Of the others every class
    deals its own in a random order, one a round, until there are enough.
    """
    images = len(always_N)
    place_N = np.random.default_rng([seed, images]).permutation(images)
    order_E = np.lexsort((place_N[row_E], class_E))
    sorted_E = class_E[order_E]
    round_E = np.arange(len(order_E)) - np.searchsorted(sorted_E, sorted_E)
    round_N = np.full(images, images)  # an image is dealt in the round of the first of its classes
    np.minimum.at(round_N, row_E[order_E], round_E)
    bare_N = round_N == images
    chosen_N = always_N.copy()
    left = max(0, most - int(always_N.sum()))
    of_bare = round(left * bare_N.mean())
    for some_N, count in ((bare_N, of_bare), (~bare_N, left - of_bare)):
        rows = np.flatnonzero(some_N & ~always_N)
        chosen_N[rows[np.lexsort((place_N[rows], round_N[rows]))][:count]] = True
    return chosen_N


def read_regions(
    path: str, split: str, seed: int, max_images: int | None = None, images: pa.Table | None = None
) -> Regions:
    """Pack the scored images of a split, or a sample of them by `seed`, in the order of their ids.

    `images` narrows them to its own. DataError when there is none.
    """
    sample = None
    if max_images is not None or images is not None:
        known = scored_images(path, split) if images is None else images
        sample = known["image_id"].to_numpy()
    if sample is not None and max_images is not None:
        random = np.random.default_rng([seed, len(sample)])
        sample = sample[random.choice(len(sample), min(max_images, len(sample)), replace=False)]
    blocks = [*read_blocks(path, split, sample)]
    if not blocks:
        raise DataError(f"no scored image of split {split!r}: check train.split and label.splits")
    packed = pack_regions(blocks)
    info = with_sample_prior(packed.info, [(len(packed.images), packed.scores_GS)])
    return replace(packed, info=info)


def halve_regions(counts_N: npt.NDArray[np.int64], seed: int) -> npt.NDArray[np.int8]:
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


def image_logits(
    config: HtsConfig,
    features_MD: FloatArray,
    feature_row_N: npt.NDArray[np.int64],
    classifier_CD: FloatArray,
) -> FloatArray:
    """Return a classifier's logits (N, C) of all images; rows without features are 0."""
    logits_MC = head_logits(features_MD, classifier_CD, config.student.logit_scale)
    return np.where((feature_row_N >= 0)[:, None], logits_MC[feature_row_N], np.float32(0))


def zero_shot_classifier(config: HtsConfig, class_table: ClassTable) -> FloatArray:
    """Return the classifier (C, D) that the student starts with."""
    classifier = build_student(config.student, class_table).classifier
    return np.asarray(classifier.detach().cpu().numpy(), dtype=np.float32)


def reference(regions: Regions) -> FloatArray:
    """Read the teacher's evidence (N, C) in fixed ways, from all regions and from halves of them.

    It is a mean over `reference_readings`, which depend on the stored scores and on no setting, so
    that every setting is measured by the same evidence and none by its own. Raises DataError when
    the teacher expects no positive of any class.
    """
    readings = reference_readings(regions)
    view_G = halve_regions(np.diff(regions.offsets_N1), seed=0)
    consensus = _consensus(regions, readings, None)
    views = []
    for view in (0, 1):
        half = _consensus(regions, readings, view_G == view)
        half.probabilities_NC[~half.seen_N] = np.nan
        views.append(half.probabilities_NC)
    return make_reference(consensus.probabilities_NC, np.stack(views))


# The grid of readings: both ends of how regions become one probability, with and without a part of
# the prior taken off, and two levels of `none of these`, which are quantiles of the regions' best
# scores. Finer grids, and others with the softmax's temperature, ranked settings of a validation
# world no better.
_AGGREGATIONS: tuple[Aggregation, ...] = ("max", "mean")
_ALPHAS = (0.0, 0.5)
_NULL_QUANTILES = (0.3, 0.7)
REFERENCE_GRID = (_AGGREGATIONS, _ALPHAS, _NULL_QUANTILES)


def reference_readings(regions: Regions) -> list[FilterConfig]:
    """Return the filter's settings with which the reference reads stored regions."""
    info = regions.info
    alphas: tuple[float, ...] = _ALPHAS[:1]
    levels: list[float | None] = [None]
    prior: Literal["teacher", "sample"] = "teacher"
    if info.get("score_kind", LOG_LIKELIHOOD) in COMPETING:
        best_G = regions.scores_GS[:, : len(info["class_ids"])].max(axis=1)
        if np.isfinite(best_G).any():
            levels = np.quantile(best_G[np.isfinite(best_G)], _NULL_QUANTILES).tolist()
        prior = "sample" if info.get("prior_log_likelihoods") is None else "teacher"
        if prior == "teacher" or info.get("sample_prior") is not None:
            alphas = _ALPHAS
    values = product(_AGGREGATIONS, alphas, levels)
    return [
        FilterConfig(aggregation=how, prior=prior, prior_alpha=alpha, null_score=level)
        for how, alpha, level in values
    ]


def _consensus(
    regions: Regions, readings: Sequence[FilterConfig], chosen_G: BoolArray | None
) -> Evidence:
    """Mean probability over the readings, of all stored kinds of regions and margins."""
    total_NC: FloatArray | np.float32 = np.float32(0)
    found = None
    for reading in readings:
        found = aggregate_regions(regions, reading, chosen_G)
        total_NC = total_NC + found.probabilities_NC
    assert found is not None
    return replace(found, probabilities_NC=np.asarray(total_NC / np.float32(len(readings))))


def labeled_among(image_ids: npt.NDArray[Any], validation: pa.Table | None) -> BoolArray:
    """Return which of N images are in a table of labeled ones."""
    labeled = [] if validation is None else validation["image_id"].to_pylist()
    return np.isin(image_ids, np.asarray(labeled, dtype=image_ids.dtype))


def _feature_rows(
    ids: Sequence[str], stored: Features
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return each image's place among the rows that are needed, -1 without one, and those rows."""
    row_of = {image_id: row for row, image_id in enumerate(stored.image_ids)}
    row_N = np.array([row_of.get(image_id, -1) for image_id in ids], dtype=np.int64)
    wanted = np.unique(row_N[row_N >= 0])
    return np.where(row_N >= 0, np.searchsorted(wanted, row_N), -1), wanted


def _validation(
    rows: pa.Table | None, stored: Features, class_table: ClassTable, path: str
) -> Validation | None:
    if rows is None:
        return None
    annotated = rows.filter(rows["positive_ids"].is_valid())
    place_V, wanted = _feature_rows(annotated["image_id"].to_pylist(), stored)
    known = place_V >= 0
    labels_VC = label_matrix(annotated, class_table)[known]
    if not (labels_VC == POSITIVE).any():
        raise DataError(
            f"none of {len(rows)} validation images has features in {path} and a positive class:"
            " compute the features of their split too"
        )
    return Validation(stored.features_ND[wanted][place_V[known]], labels_VC)
