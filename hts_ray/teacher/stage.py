"""The teacher pass over a manifest with Ray Data: resumable, one output row an image.

A row is read, decoded by a CPU task, scored by an actor that holds the teacher, and
written together with a checkpoint of its id. A killed run that is started again continues
behind the last written block. Bad images become quarantined rows; they never stop a run, not
even when they kill the process that looks at them.

Shape legend: R regions, C classes, P prompts.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc

from hts_ray.classes import ClassTable
from hts_ray.config import LabelConfig, TeacherConfig
from hts_ray.engine.compaction import BLOCKS, CHECKPOINT, complete
from hts_ray.engine.deaths import start_log
from hts_ray.engine.decoding import decode_batch
from hts_ray.engine.devices import on_node
from hts_ray.engine.image_pass import (
    committed_files,
    committed_rows,
    finish,
    remove_uncommitted,
)
from hts_ray.engine.mistakes import users_mistakes_unwrapped
from hts_ray.engine.progress import row_progress
from hts_ray.engine.ray_data import data_context, image_dataset, on_nodes
from hts_ray.engine.run import Run, Stage
from hts_ray.engine.telemetry import Meter
from hts_ray.errors import ConfigError
from hts_ray.images.manifest import Manifest
from hts_ray.store import storage
from hts_ray.store.aliases import ImagesDone
from hts_ray.store.run import StageFolder, settings_hash
from hts_ray.store.tables import read_pieces
from hts_ray.teacher.actor import TeacherActor
from hts_ray.teacher.assignment import (
    USAGE,
    Assignment,
    asked_words,
    check_lengths,
    chosen_background,
    pinned,
    region_sources,
)
from hts_ray.teacher.models.catalog import check_teacher, is_remote, model_fingerprint
from hts_ray.teacher.models.chat import cost_of
from hts_ray.teacher.models.endpoint import check_endpoint
from hts_ray.teacher.plugins import is_own, own_fingerprint
from hts_ray.teacher.reuse import TAKEN, take_over

if TYPE_CHECKING:
    import ray.data

logger = logging.getLogger(__name__)


STAGE = "label"
BAD_BOX = "bad_box"
_GIB = 1 << 30
_BLOCKS_PER_ACTOR = 16
_NODE_SECONDS = 120.0  # for a node to say which teacher it has


def plan_label(run: Run, manifest: Manifest) -> Stage:
    """Plan the teacher pass over a manifest: images in, `region_scores` out.

    Annotations are left out of its key: the teacher must not see them. Devices and precision should
    have been chosen, see `hts_ray.stages.placed`; what is still `auto` is a CPU in float32. Raises
    ConfigError for a teacher, boxes or a detector that cannot be used, for prompts that are too
    long for it, and for an endpoint that does not answer.
    """
    if run.config.label.teacher.dtype == "auto":
        run = run.changed({"label": {"teacher": {"dtype": "float32"}}})
    check_teacher(run.config.labeling.teacher)
    label = pinned(run.config.labeling)
    fingerprint = model_fingerprint(label.teacher)
    key = settings_hash(
        label.answer_settings(),
        run.class_table.fingerprint(),
        manifest.fingerprint,
        fingerprint,
        region_sources(label.regions),
        *chosen_background(label, run.class_table),
        *asked_words(label.teacher),
    )
    folder = run.stage("region_scores", key)
    if not folder.finished:
        if is_remote(label.teacher):
            check_endpoint(label.teacher)
        check_lengths(label, run.class_table)

    def work(progress: ImagesDone | None) -> object:
        return label_images(
            label,
            manifest=manifest,
            class_table=run.class_table,
            stage=folder,
            fingerprint=fingerprint,
            progress=progress,
        )

    return Stage(folder, {"manifest": manifest.path, "teacher": fingerprint}, work)


def label_images(
    config: LabelConfig,
    *,
    manifest: Manifest,
    class_table: ClassTable,
    stage: StageFolder,
    fingerprint: str | None = None,
    progress: ImagesDone | None = None,
) -> dict[str, Any]:
    """Score every selected image of a manifest and publish `region_scores`.

    Ray must be initialised. A finished stage returns its stats at once; an unfinished one
    is continued: every image is scored once. `fingerprint` is the model's, if it is known.
    `progress` gets (done, total, quarantined) images about once a second, from another
    thread. Of the manifest only ids, URIs and splits are read.

    Answers that earlier passes of the run have for unchanged images are taken over, see
    `hts_ray.teacher.reuse`.

    Returns stats: rows_in, rows_out (scored), rows_resumed (found finished), rows_taken_over (from
    other passes), quarantined, quarantined_by_kind, bad_boxes, regions, seconds, rows_per_second
    and regions_per_second (of this run); of an engine also requests, tokens_read, tokens_written
    and, with prices, cost (of all runs). Raises DataError when nothing is selected, when the
    output does not hold every image once, and when every image was quarantined (the quarantine
    table is written all the same, and the rest is removed so that the next run tries again);
    ConfigError for a teacher that does not load.
    """
    stage = StageFolder(storage.absolute(stage.run_dir), stage.table, stage.key)
    if stage.finished or complete(stage):
        return stage.stats
    started = time.monotonic()
    rows = manifest.rows(config.splits, config.limit, config.limit_seed)
    config = pinned(config)
    fingerprint = fingerprint or model_fingerprint(config.teacher)
    assignment = Assignment.plan(config, class_table, rows, fingerprint=fingerprint, stage=stage)
    expected = rows["image_id"]
    if is_own(config.teacher):
        _require_everywhere(config.teacher, fingerprint)
    take_over(stage, assignment, manifest, expected)
    resumed = committed_rows(stage)
    before = _region_count(committed_files(stage)) if resumed else 0
    if resumed < len(expected):
        _write_missing(stage, assignment, manifest, expected, progress)
    files = remove_uncommitted(stage)
    regions = _region_count(files)
    seconds = time.monotonic() - started
    notes = _bad_boxes(files)
    more_stats: dict[str, Any] = {
        "rows_resumed": resumed,
        "rows_taken_over": committed_rows(stage, TAKEN),
        "rows_per_second": (len(expected) - resumed) / seconds,
        "regions": regions,
        "regions_per_second": (regions - before) / seconds,
        "bad_boxes": len(notes),
        "gpus": config.pool.max_size * config.pool.gpus,
    } | usage_of(stage, config.teacher)
    stats = finish(stage, expected, name=STAGE, seconds=seconds, more_stats=more_stats, notes=notes)
    if progress is not None:
        progress(stats["rows_in"], stats["rows_in"], stats["quarantined"])
    return stats


def _write_missing(
    stage: StageFolder,
    assignment: Assignment,
    manifest: Manifest,
    expected: pa.Array,
    progress: ImagesDone | None,
) -> None:
    """Score the images that have no committed row yet."""
    config = assignment.config
    with data_context(stage.file(CHECKPOINT)):
        only = None if config.limit is None else expected
        images = image_dataset(manifest.path, config.splits, only)
        rows_per_block = block_rows(config, len(expected))
        dataset = _scored(images, assignment, rows_per_block, Meter.of(stage, STAGE))
    with row_progress(stage, len(expected), progress), users_mistakes_unwrapped():
        dataset.write_parquet(stage.file(BLOCKS))


def _require_everywhere(config: TeacherConfig, fingerprint: str) -> None:
    """Raise ConfigError for a node that lacks the teacher's package, or has another version."""
    import ray
    from ray.exceptions import GetTimeoutError

    nodes = [node for node in ray.nodes() if node["Alive"]]
    pending = [on_node(node["NodeID"], _fingerprint_here).remote(config) for node in nodes]
    for node, reference in zip(nodes, pending, strict=True):
        try:
            there, wrong = ray.get(reference, timeout=_NODE_SECONDS)
        except GetTimeoutError:
            continue  # it is not up, and the teacher itself will be asked later
        if wrong or there != fingerprint:
            raise ConfigError(
                f"node {node['NodeManagerHostname']} {wrong or f'has another version, {there}'}",
                field="label.teacher.model",
                value=config.model,
                remedy=f"install the driver's version, {fingerprint}, on every node",
            )


def _fingerprint_here(config: TeacherConfig) -> tuple[str, str]:
    """Return the teacher's fingerprint on this machine, or what is wrong with it."""
    try:
        return own_fingerprint(config), ""
    except ConfigError as error:
        return "", f"says: {error}"


def usage_of(stage: StageFolder, teacher: TeacherConfig) -> dict[str, float]:
    """Return what all actors of the pass counted, of earlier runs too; {} of most teachers."""
    used = Counter[str]()
    for name in storage.list_names(stage.file(USAGE)):
        used.update(storage.read_object(stage.file(USAGE, name)))
    return {**used, **cost_of(used, teacher.requests)} if used else {}


def _region_count(files: list[str]) -> int:
    pieces = read_pieces(files, ["region_kinds"])
    lengths = (pc.list_value_length(piece["region_kinds"]) for piece in pieces)
    return sum(pc.sum(of_piece).as_py() or 0 for of_piece in lengths)


def _bad_boxes(files: list[str]) -> pa.Table:
    """Return a quarantine row for every box that could not be used, of images that could."""
    some = pc.list_value_length(pc.field("problems")) > 0
    found = read_pieces(files, ["image_id", "uri", "problems"], some)
    rows = [
        {"image_id": row["image_id"], "uri": row["uri"], "error_kind": BAD_BOX, "error": problem}
        for table in found
        for row in table.to_pylist()
        for problem in row["problems"]
    ]
    names = ("image_id", "uri", "error_kind", "error")
    return pa.Table.from_pylist(rows, schema=pa.schema([(name, pa.string()) for name in names]))


def block_rows(config: LabelConfig, images: int) -> int:
    """Return how many images a block of a run over so many images gets, at most `block_rows`.

    Every actor gets some blocks to itself, or a small run would end with most of them idle while
    the last ones finish whole blocks; a block is never smaller than an actor's batch.
    """
    share = -(-images // (_BLOCKS_PER_ACTOR * config.pool.max_size))
    return min(config.block_rows, max(config.batch_images, share))


def _scored(
    images: ray.data.Dataset, assignment: Assignment, rows: int, meter: Meter
) -> ray.data.Dataset:
    """Add decoding on CPU tasks, in blocks of `rows`, and scoring on the actor pool.

    Every step maps rows one for one: Ray's checkpoints count on it.
    """
    import ray
    from ray.data import ActorPoolStrategy

    config = assignment.config
    pool = config.pool
    resources: dict[str, Any] = (
        {"num_gpus": pool.gpus} if pool.gpus else {"num_cpus": pool.num_cpus}
    )
    if pool.memory_gib is not None:
        resources["memory"] = int(pool.memory_gib * _GIB)
    resources |= on_nodes(pool.nodes)
    _warn_of_waiting(config, ray.cluster_resources())
    attempts = start_log(meter)
    return (
        images.repartition(target_num_rows_per_block=rows)
        .map_batches(
            decode_batch,
            fn_kwargs={
                "images": config.images,
                "retries": config.transient_retries,
                "attempts": attempts,
                "meter": meter,
            },
            batch_size=config.batch_images,
            batch_format="pyarrow",
            # Also what keeps Ray from fusing decoding into the actors: resources that differ.
            memory=_decode_memory(config),
            **on_nodes(pool.decode_nodes),
        )
        .map_batches(
            TeacherActor,
            fn_constructor_args=(assignment, attempts, meter),
            batch_size=config.batch_images,
            batch_format="pyarrow",
            compute=ActorPoolStrategy(
                min_size=pool.min_size,
                max_size=pool.max_size,
                max_tasks_in_flight_per_actor=pool.tasks_in_flight,
            ),
            **resources,
        )
    )


def _decode_memory(config: LabelConfig) -> int:
    """Return the bytes that a decoding task reserves: its batch twice, as pixels and as a table."""
    if config.decode_memory_gib is not None:
        return int(config.decode_memory_gib * _GIB)
    largest = 3 * config.images.max_side**2
    return min(max(2 * config.batch_images * largest, _GIB // 16), _GIB)


def _warn_of_waiting(config: LabelConfig, resources: Mapping[str, float]) -> None:
    """Say what a cluster lacks: Ray would wait for it without a word."""
    pool = config.pool
    gpus, cpus = resources.get("GPU", 0.0), resources.get("CPU", 0.0)
    if pool.gpus * pool.min_size > gpus:
        logger.warning(
            "waiting for GPUs: label.pool wants %g x %d, the cluster has %g",
            pool.gpus,
            pool.min_size,
            gpus,
        )
    busy = pool.actor_cpus * pool.min_size
    if busy + 1 > cpus:
        logger.warning(
            "waiting for CPUs: the teacher takes %g and decoding at least 1, the cluster has %g",
            busy,
            cpus,
        )
