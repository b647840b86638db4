"""The teacher pass over a manifest with Ray Data: resumable, one output row an image.

A row is read, decoded by a CPU task, scored by an actor that holds the teacher, and
written together with a checkpoint of its id. A killed run that is started again continues
behind the last written block. Bad images become quarantined rows; they never stop a run.

Shape legend: R regions, C classes, P prompts.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from hts_ray import storage
from hts_ray.classes import ClassTable
from hts_ray.config import LabelConfig
from hts_ray.data.images import DecodedImage
from hts_ray.errors import ConfigError, DataError
from hts_ray.image_pipeline import (
    CHECKPOINT,
    OK,
    QUARANTINED,
    committed_rows,
    data_context,
    decode_batch,
    finish,
    manifest_ids,
    manifest_rows,
    read_manifest,
    remove_uncommitted,
    row_progress,
    users_mistakes_unwrapped,
)
from hts_ray.tables import REGION_SCORES_SCHEMA, StageFolder, read_table
from hts_ray.teacher.captioner import (
    DUMMY,
    Captioner,
    ClassPrompts,
    check_teacher,
    load_captioner,
    model_fingerprint,
    plain_images,
    prior_log_likelihoods,
)
from hts_ray.teacher.scoring import ImageFailure, RegionScorer, ScoredImage

if TYPE_CHECKING:
    import ray.data

logger = logging.getLogger(__name__)

Progress = Callable[[int, int, int], None]

STAGE = "label"
TABLE_INFO = "table.json"


def label_images(
    config: LabelConfig,
    *,
    manifest_path: str,
    class_table: ClassTable,
    stage: StageFolder,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Score every selected image of a manifest and publish `region_scores`.

    Ray must be initialised. A finished stage returns its stats at once; an unfinished one
    is continued: no finished image is scored again, none is lost, none stands twice.
    `progress` gets (done, total, quarantined) images about once a second, from another
    thread. Of the manifest only ids, URIs and splits are read.

    Returns stats: rows_in, rows_out (scored), rows_resumed (found finished), quarantined,
    quarantined_by_kind, regions, seconds, rows_per_second (of this run). Raises DataError
    when nothing is selected, when the output does not hold every image once, and when every
    image was quarantined (the quarantine table is written all the same, and the rest is
    removed so that the next run tries again); ConfigError for a teacher that does not load.
    """
    if stage.finished:
        return stage.stats
    stage = StageFolder(storage.absolute(stage.run_dir), stage.table, stage.key)
    started = time.monotonic()
    check_teacher(config.teacher)
    expected = manifest_ids(manifest_path, config.splits, config.limit)
    resumed = committed_rows(stage)
    if resumed < len(expected):
        with data_context(stage.file(CHECKPOINT)):
            images = read_manifest(manifest_path, config.splits, config.limit)
            dataset = _scored(images, config, class_table, stage)
        with row_progress(stage, len(expected), progress), users_mistakes_unwrapped():
            dataset.write_parquet(stage.path)
    remove_uncommitted(stage)
    regions = read_table(stage.path, ["region_kinds"])["region_kinds"]
    seconds = time.monotonic() - started
    stats = finish(
        stage,
        expected,
        name=STAGE,
        seconds=seconds,
        more_stats={
            "rows_resumed": resumed,
            "rows_per_second": (len(expected) - resumed) / seconds,
            "regions": pc.sum(pc.list_value_length(regions)).as_py() or 0,
        },
    )
    if progress is not None:
        progress(stats["rows_in"], stats["rows_in"], stats["quarantined"])
    return stats


def class_prompts(config: LabelConfig, class_table: ClassTable) -> ClassPrompts:
    """Return the prompts that the teacher scores, class by class."""
    return ClassPrompts.of(class_table.prompts, config.teacher.prompt_templates)


def read_table_info(stage_path: str) -> dict[str, Any]:
    """Return what was scored, as `table.json` beside the scores tells it.

    Keys: class_ids (C), class_fingerprint, prompts_hash, prompts (C lists), token_counts (C
    lists of ints, per template), prior_log_likelihoods (C floats or null), model,
    model_fingerprint, length_normalize, append_eos, regions (its settings). Raises
    DataError when the file is not there.
    """
    path = storage.join(stage_path, TABLE_INFO)
    try:
        info = storage.read_json(path)
    except FileNotFoundError:
        raise DataError(f"no {path}: run `hts label` first") from None
    assert isinstance(info, dict)
    return info


def table_info(
    captioner: Captioner, config: LabelConfig, prompts: ClassPrompts, classes: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the contents of `table.json`; the prior costs a few forwards."""
    teacher = config.teacher
    prior = None
    if teacher.prior != "none":
        prior = prior_log_likelihoods(
            captioner, prompts, teacher.null_images, length_normalize=teacher.length_normalize
        )
        if not np.isfinite(prior).all():
            raise DataError("the teacher's scores of plain images are not finite: try float32")
    counts = captioner.score(plain_images(1), prompts.texts).token_counts.tolist()
    return {
        **classes,
        "prompts": prompts.by_class(prompts.texts),
        "prompts_hash": prompts.fingerprint(),
        "token_counts": prompts.by_class(counts),
        "prior_log_likelihoods": None if prior is None else prior.tolist(),
        "model": teacher.model,
        "model_fingerprint": model_fingerprint(teacher),
        "length_normalize": teacher.length_normalize,
        "append_eos": teacher.append_eos,
        "regions": config.regions.model_dump(mode="json"),
    }


class TeacherActor:
    """The stateful UDF of Ray Data: loads the teacher once, scores batch after batch."""

    def __init__(
        self,
        config: LabelConfig,
        prompts: ClassPrompts,
        classes: Mapping[str, Any],
        info_path: str,
    ) -> None:
        captioner = _load_on_device(config)
        if not storage.exists(info_path):
            storage.write_json(info_path, table_info(captioner, config, prompts, classes))
        self.scorer = RegionScorer(captioner, prompts, config.teacher, config.regions)

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Return rows of REGION_SCORES_SCHEMA for rows of decoded images, one for one."""
        readable = np.flatnonzero(batch["error_kind"].is_null().to_numpy())
        images = [_decoded_image(batch, row) for row in readable.tolist()]
        results = dict(zip(readable.tolist(), self.scorer(images), strict=True))
        rows = [_output_row(batch, row, results.get(row)) for row in range(batch.num_rows)]
        return pa.Table.from_pylist(rows, schema=REGION_SCORES_SCHEMA)


def _load_on_device(config: LabelConfig) -> Captioner:
    if config.teacher.model == DUMMY:
        return load_captioner(config.teacher)
    import torch

    torch.set_num_threads(config.pool.threads)
    if config.pool.num_gpus > 0 and not torch.cuda.is_available():
        raise ConfigError(
            "torch sees no GPU on this node",
            field="label.pool.num_gpus",
            value=config.pool.num_gpus,
            remedy="set it to 0, or use nodes with GPUs and a CUDA build of torch",
        )
    return load_captioner(config.teacher, "cuda" if config.pool.num_gpus > 0 else "cpu")


def _decoded_image(batch: pa.Table, row: int) -> DecodedImage:
    height, width = batch["pixel_height"][row].as_py(), batch["pixel_width"][row].as_py()
    pixels = np.frombuffer(batch["pixels"][row].as_buffer(), dtype=np.uint8)
    return DecodedImage(
        pixels=pixels.reshape(height, width, 3),
        width=batch["width"][row].as_py(),
        height=batch["height"][row].as_py(),
    )


def _output_row(
    batch: pa.Table, row: int, result: ScoredImage | ImageFailure | None
) -> dict[str, Any]:
    names = ("image_id", "uri", "split", "width", "height", "error_kind", "error")
    output = {name: batch[name][row].as_py() for name in names}
    if result is None:
        return {**output, "status": QUARANTINED}
    if isinstance(result, ImageFailure):
        failed = {"error_kind": result.kind, "error": result.message}
        return {**output, **failed, "status": QUARANTINED}
    return {
        **output,
        "boxes": [region.box for region in result.regions],
        "region_kinds": [region.kind for region in result.regions],
        "captions": result.captions,
        "scores": result.scores.ravel(),
        "status": OK,
    }


def _scored(
    images: ray.data.Dataset, config: LabelConfig, class_table: ClassTable, stage: StageFolder
) -> ray.data.Dataset:
    """Add decoding on CPU tasks and scoring on the actor pool.

    Every step maps rows one for one: Ray's checkpoints count on it.
    """
    import ray
    from ray.data import ActorPoolStrategy

    pool = config.pool
    resources: dict[str, Any] = (
        {"num_gpus": pool.num_gpus} if pool.num_gpus else {"num_cpus": pool.num_cpus}
    )
    if pool.memory_gib is not None:
        resources["memory"] = int(pool.memory_gib * (1 << 30))
    _warn_of_waiting(config, ray.cluster_resources())
    classes = {
        "class_ids": class_table.ids.tolist(),
        "class_fingerprint": class_table.fingerprint(),
    }
    return (
        images.repartition(target_num_rows_per_block=config.block_rows)
        .map_batches(
            decode_batch,
            fn_kwargs={"images": config.images},
            batch_size=config.batch_images,
            batch_format="pyarrow",
        )
        .map_batches(
            TeacherActor,
            fn_constructor_args=(
                config,
                class_prompts(config, class_table),
                classes,
                stage.file(TABLE_INFO),
            ),
            batch_size=config.batch_images,
            batch_format="pyarrow",
            compute=ActorPoolStrategy(min_size=pool.min_size, max_size=pool.max_size),
            **resources,
        )
    )


def _warn_of_waiting(config: LabelConfig, resources: Mapping[str, float]) -> None:
    """Say what a cluster lacks: Ray would wait for it without a word."""
    pool = config.pool
    gpus, cpus = resources.get("GPU", 0.0), resources.get("CPU", 0.0)
    if pool.num_gpus * pool.min_size > gpus:
        logger.warning(
            "waiting for GPUs: label.pool wants %g x %d, the cluster has %g",
            pool.num_gpus,
            pool.min_size,
            gpus,
        )
    busy = 0.0 if pool.num_gpus else pool.num_cpus * pool.min_size
    if busy + 1 > cpus:
        logger.warning(
            "waiting for CPUs: the teacher takes %g and decoding at least 1, the cluster has %g",
            busy,
            cpus,
        )


def estimate(
    config: LabelConfig, manifest_path: str, class_table: ClassTable, sample: int = 4
) -> dict[str, Any]:
    """Measure the teacher on a few images in this process and extrapolate; writes nothing.

    Returns images, sample, sample_quarantined, device, load_seconds, seconds_per_image,
    regions_per_image, seconds (of the run with pool.max_size actors) and gpu_hours. Times
    are None when no sampled image could be read. The first scored image only warms up.
    """
    selection = manifest_rows(manifest_path, config.splits, config.limit)
    started = time.monotonic()
    captioner, device = _load_for_estimate(config)
    scorer = RegionScorer(
        captioner, class_prompts(config, class_table), config.teacher, config.regions
    )
    load_seconds = time.monotonic() - started
    times, regions, failures = _time_images(scorer, config, selection, sample)
    per_image = sum(times) / len(times) if times else math.nan
    seconds = per_image * selection.num_rows / config.pool.max_size
    gpu_hours = seconds * config.pool.max_size * config.pool.num_gpus / 3600
    return {
        "images": selection.num_rows,
        "sample": len(times),
        "sample_quarantined": failures,
        "device": device,
        "load_seconds": load_seconds,
        "seconds_per_image": per_image if times else None,
        "regions_per_image": regions / len(times) if times else None,
        "seconds": load_seconds + seconds if times else None,
        "gpu_hours": gpu_hours if times else None,
    }


def _load_for_estimate(config: LabelConfig) -> tuple[Captioner, str]:
    device = "cpu"
    if config.teacher.model != DUMMY:
        import torch

        torch.set_num_threads(config.pool.threads)
        if config.pool.num_gpus > 0 and torch.cuda.is_available():
            device = "cuda"
    return load_captioner(config.teacher, device), device


def _time_images(
    scorer: RegionScorer, config: LabelConfig, selection: pa.Table, sample: int
) -> tuple[list[float], int, int]:
    """Return seconds of every readable sampled image, their regions, and the failures."""
    count = min(sample, selection.num_rows)
    rows: Sequence[int] = np.linspace(0, selection.num_rows - 1, count).astype(int).tolist()
    times, regions, failures = [], 0, 0
    warm = False
    for row in rows:
        started = time.monotonic()
        decoded = decode_batch(selection.slice(row, 1), config.images)
        if decoded["error_kind"][0].is_valid:
            failures += 1
            continue
        image = _decoded_image(decoded, 0)
        if not warm:
            scorer([image])
            warm, started = True, time.monotonic()
        result = scorer([image])[0]
        if isinstance(result, ImageFailure):
            failures += 1
            continue
        times.append(time.monotonic() - started)
        regions += len(result.regions)
    return times, regions, failures
