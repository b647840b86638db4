"""What the stored regions say of every image: one aggregation, for the filter and the sweep.

A region_scores folder is read a block of images at a time. The regions of a block are packed into
arrays, and all its images are aggregated together.

Shapes: N images, G regions of all of them, K regions that count, R regions of one image, C classes,
S = C + B sentences: those of the classes, then B of the background.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pads

from hts_ray.config import FilterConfig
from hts_ray.errors import ConfigError, DataError
from hts_ray.images.manifest import IMAGE_COLUMNS
from hts_ray.labels.select import (
    aggregate,
    background_log_odds,
    odds_probabilities,
    region_probabilities,
    support,
)
from hts_ray.store import storage
from hts_ray.store.aliases import BoolArray, FloatArray

# Images of the run by whose number its own prior counts as much as the teacher's.
PRIOR_IMAGES = 16
# What `scores` are: log P(prompt | region), or logits of similarity; log P(a caption of the region
# states the class); log P(yes) - log P(no), asked whether the region shows the class.
LOG_LIKELIHOOD = "log_likelihood"
SIMILARITY = "similarity"
COMPETING = (LOG_LIKELIHOOD, SIMILARITY)
LOG_PROBABILITY = "log_probability"
LOG_ODDS = "log_odds"
_BATCH_ROWS = 256
_BLOCK_BYTES = 4 << 20  # of scores that are turned into probabilities at a time
_NO_ROWS = (".", "_", "checkpoint", "quarantine", "stats.json", "table.json")
# Of some files: images, regions, and the sum (C,) of each class's scores.
Sum = tuple[int, int, FloatArray]


@dataclass(frozen=True, eq=False)
class Regions:
    """The stored regions of N images: image i has the regions offsets_N1[i] to offsets_N1[i + 1].

    `images` is a table of image_id, uri and split. `scores_GS` are float32 as they were stored, the
    classes' and then the background's. `kinds_G` are strings, and `margins_G` the context around
    each region as a share of its sides. `info` is `read_info` of the folder.
    """

    info: dict[str, Any]
    images: pa.Table
    offsets_N1: npt.NDArray[np.int64]
    scores_GS: FloatArray
    kinds_G: npt.NDArray[np.str_]
    margins_G: FloatArray

    @property
    def image_ids(self) -> npt.NDArray[Any]:
        """The ids (N,) of the images."""
        return np.asarray(self.images["image_id"].to_numpy())


@dataclass(frozen=True, eq=False)
class Evidence:
    """What the regions say of N images together.

    `probabilities_NC` float32 in [0, 1]; `support_NC` int16, the regions that agree on a class.
    Where `seen_N` is false no region of the image counts, and its rows are 0.
    """

    images: pa.Table
    probabilities_NC: FloatArray
    support_NC: npt.NDArray[np.int16]
    seen_N: BoolArray

    @property
    def image_ids(self) -> list[str]:
        """The ids of the images."""
        ids: list[str] = self.images["image_id"].to_pylist()
        return ids

    def seen(self) -> Evidence:
        """Return the images with a region that counts; itself if all have one."""
        return self if self.seen_N.all() else self.take(np.flatnonzero(self.seen_N))

    def take(self, rows: npt.NDArray[np.intp]) -> Evidence:
        """Return some of the images, in the order given."""
        return Evidence(
            self.images.take(pa.array(rows)),
            self.probabilities_NC[rows],
            self.support_NC[rows],
            self.seen_N[rows],
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


def region_files(path: str) -> dict[str, int]:
    """Return the Parquet files of a region_scores folder, in order, and their sizes in bytes."""
    found = storage.walk_sizes(path)
    names = [name for name in found if name.endswith(".parquet")]
    own = [n for n in names if not any(p.startswith(_NO_ROWS) for p in n.split("/"))]
    return {storage.join(path, name): found[name] for name in own}


def filter_info(
    path: str, config: FilterConfig, split: str | None, sums: Iterable[Sum] | None = None
) -> dict[str, Any]:
    """Return `read_info`, with `sample_prior` of a split's regions where the filter asks for it.

    `sums` has what `score_sums` finds in every file, in their order; without it they are read here.
    """
    info = read_info(path)
    if not wants_sample_prior(info, config):
        return info
    if sums is None:
        sums = score_sums(path, split, [*region_files(path)])
    return _prior_of(info, sums)


def wants_sample_prior(info: Mapping[str, Any], config: FilterConfig) -> bool:
    """Return whether a filter takes off the prior of the run's own regions."""
    competing = info.get("score_kind", LOG_LIKELIHOOD) in COMPETING
    return config.prior == "sample" and config.prior_alpha > 0 and competing


def score_sums(path: str, split: str | None, files: Iterable[str]) -> list[Sum]:
    """Return of every file its images, regions and the sum (C,) of each class's scores."""
    info, sums = read_info(path), []
    for file in files:
        parts = (
            (len(b.images), b.scores_GS) for b in read_regions(path, split, None, [file], info)
        )
        sums.append(_total(_sums(info, parts), len(info["class_ids"])))
    return sums


def with_sample_prior(
    info: dict[str, Any], parts: Iterable[tuple[int, FloatArray]]
) -> dict[str, Any]:
    """Return `info` and `sample_prior`: what the run's own regions make of each of C classes.

    `parts` are numbers of images and their regions' scores (G, S). The prior is the mean score of
    all N images' regions, drawn towards the teacher's prior (or none) as by `PRIOR_IMAGES` more
    images: w mean + (1 - w) teacher's, w = N / (N + PRIOR_IMAGES). A mean of log-likelihoods, not
    of likelihoods: the few regions that show a rare class hardly move it. None where a score is
    -inf, as `search=top_k` leaves them.
    """
    return _prior_of(info, _sums(info, parts))


def _sums(info: Mapping[str, Any], parts: Iterable[tuple[int, FloatArray]]) -> Iterator[Sum]:
    classes = len(info["class_ids"])
    for images, scores_GS in parts:
        yield images, len(scores_GS), scores_GS[:, :classes].sum(axis=0, dtype=np.float64)


def _total(sums: Iterable[Sum], classes: int) -> Sum:
    images, regions, total_C = 0, 0, np.zeros(classes)
    for more_images, more_regions, sum_C in sums:
        images, regions = images + more_images, regions + more_regions
        total_C += sum_C
    return images, regions, total_C


def _prior_of(info: dict[str, Any], sums: Iterable[Sum]) -> dict[str, Any]:
    images, regions, total_C = _total(sums, len(info["class_ids"]))
    if not regions or not np.isfinite(total_C).all():
        return {**info, "sample_prior": None}
    stored = info.get("prior_log_likelihoods")
    share = images / (images + PRIOR_IMAGES)
    prior_C = share * total_C / regions
    if stored is not None:
        prior_C += (1 - share) * np.asarray(stored)
    return {**info, "sample_prior": prior_C.astype(np.float32).tolist()}


def iter_region_rows(
    path: str, image_ids: Collection[str] | None = None
) -> Iterator[dict[str, Any]]:
    """Yield the rows of a region_scores folder that were scored, `scores` as (R, S) float32.

    `image_ids` are the few images that are wanted; None is all. Scores are nearly all of a run's
    bytes: only files that hold such an image are opened for them.
    """
    few = [] if image_ids is None else [pc.field("image_id").isin(pa.array(image_ids, pa.string()))]
    for batch in _scored_batches(path, None, few, sparse=image_ids is not None):
        rows = batch.drop_columns(["scores"]).to_pylist()
        counts_N = batch.column("region_kinds").value_lengths().to_numpy()
        ends = np.cumsum(counts_N)
        scores_GS = _stored_scores(batch, int(counts_N.sum()))
        for row, start, end in zip(rows, ends - counts_N, ends, strict=True):
            row["scores"] = scores_GS[start:end]
            yield row


def read_regions(
    path: str,
    split: str | None = None,
    image_ids: Collection[str] | None = None,
    files: Sequence[str] | None = None,
    info: dict[str, Any] | None = None,
) -> Iterator[Regions]:
    """Yield the scored images of a region_scores folder, a block at a time, as they are stored.

    `split`, `image_ids` and `files` (of `region_files`) narrow them; None is all. `info` is the
    folder's, where it is known already.
    """
    info, chosen = read_info(path) if info is None else info, []
    if split is not None:
        chosen.append(pc.field("split") == split)
    if image_ids is not None:
        chosen.append(pc.field("image_id").isin(pa.array(image_ids, pa.string())))
    columns = [*IMAGE_COLUMNS, "scores", "background", "region_kinds", "margins"]
    for batch in _scored_batches(path, columns, chosen, files=files):
        kinds = batch.column("region_kinds")
        counts_N = kinds.value_lengths().to_numpy()
        margins_G = np.zeros(counts_N.sum(), np.float32)
        if "margins" in batch.schema.names:
            margins = batch.column("margins")
            has_margins_N = margins.value_lengths().fill_null(0).to_numpy() > 0
            margins_G[np.repeat(has_margins_N, counts_N)] = margins.flatten().to_numpy()
        yield Regions(
            info,
            pa.Table.from_batches([batch.select(IMAGE_COLUMNS)]),
            _offsets(counts_N),
            _stored_scores(batch, len(margins_G)),
            np.asarray(kinds.flatten().to_pylist(), dtype=np.str_),
            margins_G,
        )


def pack_regions(blocks: Sequence[Regions]) -> Regions:
    """Return the images of one block or more as a single one, in the order of their ids."""
    images = pa.concat_tables([block.images for block in blocks]).combine_chunks()
    order_N = np.argsort(images["image_id"].to_numpy(), kind="stable")
    counts_N = np.concatenate([np.diff(block.offsets_N1) for block in blocks])
    offsets_N1 = _offsets(counts_N[order_N])
    moved_N = np.empty(len(order_N), np.int64)  # how far an image's regions are moved
    moved_N[order_N] = offsets_N1[:-1]
    moved_N -= _offsets(counts_N)[:-1]
    place_G = np.arange(offsets_N1[-1]) + np.repeat(moved_N, counts_N)
    return Regions(
        blocks[0].info,
        images.take(pa.array(order_N)),
        offsets_N1,
        _placed([block.scores_GS for block in blocks], place_G),
        _placed([block.kinds_G for block in blocks], place_G),
        _placed([block.margins_G for block in blocks], place_G),
    )


def kept_regions(
    kinds_G: npt.ArrayLike, margins_G: npt.ArrayLike | None, config: FilterConfig
) -> BoolArray:
    """Return which regions (G,) have a kind and a context margin that count.

    Margins are asked of regions that have one to choose, around persons and unions; None is none.
    """
    kinds_G = np.asarray(kinds_G)
    keep_G = np.ones(len(kinds_G), dtype=bool)
    if config.region_kinds is not None:
        keep_G &= np.isin(kinds_G, config.region_kinds)
    if config.margins is not None:
        margins_G = np.zeros(len(kinds_G)) if margins_G is None else margins_G
        with_context_G = np.isin(kinds_G, ("person", "union"))
        distance_G = np.abs(np.subtract.outer(margins_G, config.margins))
        keep_G &= ~with_context_G | (distance_G.min(axis=1, initial=np.inf) < 1e-4)
    return keep_G


def class_probabilities(
    scores_RS: FloatArray, info: dict[str, Any], config: FilterConfig
) -> FloatArray:
    """Return class probabilities (R, C) of regional scores, whichever kind `info` says they are.

    Log-likelihoods of prompts lose alpha times their prior and compete in a softmax. Unless
    `config.background` is false, that is multiplied by the probability that the class stands above
    the background, also above what it reaches beside that on pictures that show nothing; there no
    prior is taken off. So alpha chooses between classes, and cannot make a class of what shows
    none. What captions state is a probability already; prior, prior_alpha, temperature and
    null_score say nothing about it. Answers to questions do not compete either: see
    `odds_probabilities`, which knows the temperature. Raises ConfigError for an alpha without the
    prior that `config.prior` names, DataError for scores of an unknown kind.
    """
    kind = info.get("score_kind", LOG_LIKELIHOOD)
    if kind == LOG_PROBABILITY:
        return np.asarray(np.exp(scores_RS))
    if kind == LOG_ODDS:
        return odds_probabilities(scores_RS, info.get("prior_log_odds"), config.temperature)
    if kind not in COMPETING:
        raise DataError(f"the scores are {kind!r}, which this version cannot read: label again")
    classes = len(info["class_ids"]) if "class_ids" in info else scores_RS.shape[1]
    scores_RC, background_RB = scores_RS[:, :classes], scores_RS[:, classes:]
    prior_C = _prior(info, config) if config.prior_alpha > 0 else None
    probabilities_RC = region_probabilities(
        scores_RC, prior_C, config.prior_alpha, config.temperature, null_score=config.null_score
    )
    if not config.background or not background_RB.shape[1]:
        return probabilities_RC
    odds_RC = background_log_odds(scores_RC, background_RB)
    return probabilities_RC * odds_probabilities(odds_RC, info.get("null_log_odds"))


def _prior(info: dict[str, Any], config: FilterConfig) -> FloatArray:
    """Return the prior (C,) that alpha takes off; ConfigError where there is none."""
    sample = config.prior == "sample"
    stored = info.get("sample_prior" if sample else "prior_log_likelihoods")
    if stored is None:
        raise ConfigError(
            field="filter.prior" if sample else "filter.prior_alpha",
            value=config.prior if sample else config.prior_alpha,
            remedy="scores that label.teacher.search=top_k left out have no mean: set"
            " filter.prior=teacher, or label with search=all"
            if sample
            else "the teacher stored no prior: set it to 0, filter.prior=sample, or"
            " label.teacher.prior=plain",
        )
    return np.asarray(stored, dtype=np.float32)


def require_abstention(info: dict[str, Any], config: FilterConfig) -> None:
    """Raise ConfigError where every region must show a class: one class, and nothing beside it."""
    compete = info.get("score_kind", LOG_LIKELIHOOD) in COMPETING
    alone = len(info["class_ids"]) == 1 and compete
    beside = (config.background and info.get("background")) or config.null_score is not None
    if alone and not beside:
        raise ConfigError(
            "with one class and nothing beside it every image is positive",
            field="filter.background",
            value=config.background,
            remedy="label with label.teacher.background=general, or set filter.null_score",
        )


def aggregate_regions(
    regions: Regions, config: FilterConfig, chosen_G: BoolArray | None = None
) -> Evidence:
    """Aggregate every image's counting regions into class probabilities and support.

    `chosen_G` narrows what counts further. Images with equally many counting regions are
    aggregated together: side by side, (R, N * C), they look like one image with more classes.
    """
    keep_G = kept_regions(regions.kinds_G, regions.margins_G, config)
    if chosen_G is not None:
        keep_G &= chosen_G
    images, classes = len(regions.images), len(regions.info["class_ids"])
    probabilities_NC = np.zeros((images, classes), np.float32)
    support_NC = np.zeros((images, classes), np.int16)
    # Summing an empty slice is fine where reduceat is not.
    kept_before_N1 = _offsets(keep_G)[regions.offsets_N1]
    counts_N = np.diff(kept_before_N1)
    for start, end in _spans(regions):
        inside = slice(int(regions.offsets_N1[start]), int(regions.offsets_N1[end]))
        scores_KS = regions.scores_GS[inside][keep_G[inside]]
        if not len(scores_KS):
            continue
        probabilities_KC = class_probabilities(scores_KS, regions.info, config)
        firsts = kept_before_N1[start:end] - kept_before_N1[start]
        for count in np.unique(counts_N[start:end][counts_N[start:end] > 0]):
            rows = np.flatnonzero(counts_N[start:end] == count)
            index_RN = firsts[rows] + np.arange(count)[:, None]
            beside = probabilities_KC[index_RN].reshape(count, -1)
            found = aggregate(beside, config.aggregation, config.top_k)
            agreeing = support(beside, config.support_threshold)
            probabilities_NC[start + rows] = found.reshape(len(rows), classes)
            support_NC[start + rows] = agreeing.reshape(len(rows), classes)
    return Evidence(regions.images, probabilities_NC, support_NC, counts_N > 0)


def image_evidence(path: str, config: FilterConfig, split: str | None = None) -> Evidence:
    """Aggregate the regions of every scored image of a split (all for None), block by block.

    Images of which no region counts are left out. Rows come back sorted by `image_id`, so that
    the result does not depend on how the files were written. Raises DataError when no region is
    left, ConfigError for region kinds that were not stored.
    """
    kinds, found = set[str](), []
    info = filter_info(path, config, split)
    for regions in read_regions(path, split, info=info):
        kinds.update(regions.kinds_G.tolist())
        evidence = aggregate_regions(regions, config)
        if evidence.seen_N.any():
            found.append(evidence.seen())
    if not found:
        refuse_nothing(path, config, split, kinds)
    images = pa.concat_tables([evidence.images for evidence in found]).combine_chunks()
    together = Evidence(
        images,
        np.concatenate([evidence.probabilities_NC for evidence in found]),
        np.concatenate([evidence.support_NC for evidence in found]),
        np.ones(len(images), dtype=bool),
    )
    del found  # or the blocks, the whole and the sorted whole would be in memory together
    return together.take(np.argsort(images["image_id"].to_numpy(), kind="stable"))


def refuse_nothing(
    path: str, config: FilterConfig, split: str | None, kinds: Collection[str]
) -> NoReturn:
    """Raise DataError or ConfigError: no region counts, of those of `kinds` that are stored."""
    if kinds and config.region_kinds and not set(kinds).intersection(config.region_kinds):
        raise ConfigError(
            field="filter.region_kinds",
            value=list(config.region_kinds),
            remedy=f"the teacher stored only {', '.join(sorted(kinds))}",
        )
    if split is not None:
        raise DataError(f"no scored image of split {split!r}: check train.split and label.splits")
    raise DataError(f"{path} holds no scored region: run `hts label` on images that decode")


def _scored_batches(
    path: str,
    columns: Sequence[str] | None = None,
    conditions: Sequence[pc.Expression] = (),
    sparse: bool = False,
    files: Sequence[str] | None = None,
) -> Iterator[pa.RecordBatch]:
    """Yield the rows that were scored and meet the conditions; columns that are missing stay so.

    `sparse` says that most files hold no such row.
    """
    filesystem, inner = storage.resolve(path)
    source = inner if files is None else [storage.resolve(file)[1] for file in files]
    dataset = pads.dataset(
        source, format="parquet", filesystem=filesystem, ignore_prefixes=[*_NO_ROWS]
    )
    names = [name for name in columns or dataset.schema.names if name in dataset.schema.names]
    rows = pc.field("status") == "ok"
    for condition in conditions:
        rows &= condition
    if sparse:
        files = [file for file in dataset.get_fragments() if file.count_rows(filter=rows)]
        dataset = pads.FileSystemDataset(files, dataset.schema, dataset.format, filesystem)
    ahead = {"batch_readahead": 4, "fragment_readahead": 1}  # Arrow's own hold 16 in 4 files
    for batch in dataset.to_batches(columns=names, batch_size=_BATCH_ROWS, filter=rows, **ahead):
        if len(batch):
            yield batch


def _stored_scores(batch: pa.RecordBatch, regions: int) -> FloatArray:
    """Return the scores (G, S) of a batch's regions; folders of before have no background."""
    columns = [name for name in ("scores", "background") if name in batch.schema.names]
    parts = [
        batch.column(name).flatten().to_numpy(zero_copy_only=False).reshape(regions, -1)
        for name in columns
        if len(batch.column(name).flatten())
    ]
    return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)


def _offsets(counts: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    """Return where each of (N,) lengths begins, and at last where all end: (N + 1,)."""
    return np.concatenate([[0], np.cumsum(counts)])


def _placed(parts: Sequence[npt.NDArray[Any]], place_G: npt.NDArray[np.int64]) -> Any:
    """Return the rows of all parts at the given places, without a further copy of them all."""
    dtype = np.result_type(*{part.dtype for part in parts})
    whole = np.empty((len(place_G), *parts[0].shape[1:]), dtype)
    start = 0
    for part in parts:
        whole[place_G[start : start + len(part)]] = part
        start += len(part)
    return whole


def _spans(regions: Regions) -> Iterator[tuple[int, int]]:
    """Yield ranges of images that have about `_BLOCK_BYTES` of scores."""
    images = len(regions.images)
    per_image = max(1, regions.scores_GS.nbytes // max(images, 1))
    step = max(1, _BLOCK_BYTES // per_image)
    for start in range(0, images, step):
        yield start, min(start + step, images)
