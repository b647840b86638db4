"""The teacher pass over a manifest with Ray Data: resumable, one output row an image.

A row is read, decoded by a CPU task, scored by an actor that holds the teacher, and
written together with a checkpoint of its id. A killed run that is started again continues
behind the last written block. Bad images become quarantined rows; they never stop a run.

Shape legend: R regions, C classes, P prompts.
"""

from __future__ import annotations

import logging
import math
import re
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from hts_ray import storage
from hts_ray.classes import ClassTable
from hts_ray.config import ImagesConfig, LabelConfig
from hts_ray.data.images import DecodedImage, ImageError, decode_image, read_image_bytes
from hts_ray.errors import ConfigError, DataError, UserError
from hts_ray.tables import (
    QUARANTINE_SCHEMA,
    REGION_SCORES_SCHEMA,
    StageFolder,
    read_table,
    write_table,
)
from hts_ray.teacher.captioner import (
    DUMMY,
    Captioner,
    ClassPrompts,
    load_captioner,
    model_fingerprint,
    plain_images,
    prior_log_likelihoods,
)
from hts_ray.teacher.scoring import ImageFailure, RegionScorer, ScoredImage

logger = logging.getLogger(__name__)

Progress = Callable[[int, int, int], None]

STAGE = "label"
OK = "ok"
QUARANTINED = "quarantined"
TABLE_INFO = "table.json"
CHECKPOINT = "checkpoint"
# Both names start with a prefix that `read_table` passes over.
SELECTION = ("checkpoint-selection", "part-0.parquet")
QUARANTINE = ("quarantine", "part-0.parquet")
POLL_SECONDS = 1.0
# Waiting for GPUs of an autoscaling cluster counts as no progress; Ray's own limit is 30 min.
NO_PROGRESS_SECONDS = 6 * 3600

_MISTAKE = re.compile(
    r"hts_ray\.errors\.(?P<kind>ConfigError|DataError): (?P<message>(?:(?!hts_ray\.errors\.).)*)\Z",
    re.DOTALL,
)

# What the decoding tasks hand to the actors. Pixels are plain bytes: no extension types.
_DECODED = pa.schema(
    [
        pa.field("image_id", pa.string(), nullable=False),
        pa.field("uri", pa.string()),
        pa.field("split", pa.string()),
        pa.field("width", pa.int32()),
        pa.field("height", pa.int32()),
        pa.field("pixel_width", pa.int32()),
        pa.field("pixel_height", pa.int32()),
        pa.field("pixels", pa.large_binary()),
        pa.field("error_kind", pa.string()),
        pa.field("error", pa.string()),
    ]
)


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
    selection = select_images(config, manifest_path)
    committed = _Committed(stage)
    committed.update()
    resumed = committed.rows
    if resumed < selection.num_rows:
        write_table(stage.file(*SELECTION), selection)
        prompts = class_prompts(config, class_table)
        with _Reporter(committed, selection.num_rows, progress):
            _run(config, prompts, class_table, stage)
    stats = _finish(stage, selection)
    seconds = time.monotonic() - started
    stats |= {
        "rows_resumed": resumed,
        "seconds": seconds,
        "rows_per_second": (selection.num_rows - resumed) / seconds,
    }
    if progress is not None:
        progress(stats["rows_in"], stats["rows_in"], stats["quarantined"])
    stage.publish(stats)
    return stage.stats


def select_images(config: LabelConfig, manifest: str | pa.Table) -> pa.Table:
    """Return image_id, uri and split of the images to label, in the manifest's order.

    `manifest` is a path or the table itself. Raises DataError when no row is of
    `config.splits`.
    """
    columns = ["image_id", "uri", "split"]
    table = read_table(manifest, columns) if isinstance(manifest, str) else manifest
    table = table.select(columns).replace_schema_metadata(None)
    chosen = table.filter(pc.is_in(table["split"], pa.array(config.splits, pa.string())))
    if chosen.num_rows == 0:
        there = ", ".join(sorted(str(name) for name in pc.unique(table["split"]).to_pylist()))
        raise DataError(
            f"no image to label: the manifest has no row with split in {list(config.splits)}"
            f" (it has {there or 'no row at all'}); set label.splits"
        )
    return chosen.slice(0, config.limit)


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
    if teacher.null_images:
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


def decode_batch(batch: pa.Table, images: ImagesConfig) -> pa.Table:
    """Read and decode a batch of manifest rows; what fails carries error_kind and error."""
    rows = [_decode_row(row, images) for row in batch.to_pylist()]
    return pa.Table.from_pylist(rows, schema=_DECODED)


def _decode_row(row: dict[str, Any], images: ImagesConfig) -> dict[str, Any]:
    row = {name: row[name] for name in ("image_id", "uri", "split")}
    try:
        image = _load(row["uri"], images)
    except ImageError as error:
        return {**row, "error_kind": error.kind, "error": error.message}
    except Exception as error:  # one image must not cost a block, whatever a decoder throws
        return {**row, "error_kind": "decode_error", "error": f"{type(error).__name__}: {error}"}
    height, width = image.pixels.shape[:2]
    return {
        **row,
        "width": image.width,
        "height": image.height,
        "pixel_width": width,
        "pixel_height": height,
        "pixels": image.pixels.tobytes(),
    }


def _load(uri: str, images: ImagesConfig) -> DecodedImage:
    return decode_image(
        read_image_bytes(uri),
        max_pixels=images.max_pixels,
        min_side=images.min_side,
        max_side=images.max_side,
    )


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


def _run(
    config: LabelConfig, prompts: ClassPrompts, class_table: ClassTable, stage: StageFolder
) -> None:
    """Execute the pipeline; a user's mistake that surfaces in a worker is raised as itself."""
    import ray
    from ray.data import ActorPoolStrategy, DataContext
    from ray.data.checkpoint import CheckpointConfig

    pool = config.pool
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of copying the context
        context = DataContext.get_current().copy()
    context.checkpoint_config = CheckpointConfig(
        id_column="image_id",
        checkpoint_path=stage.file(CHECKPOINT),
        # Without its checkpoint a finished folder would be appended to once more.
        delete_checkpoint_on_success=False,
    )
    context.enable_progress_bars = False
    context.execution_no_progress_timeout_s = NO_PROGRESS_SECONDS
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
    try:
        with DataContext.current(context):
            # Every stage maps rows one for one: Ray's checkpoints count on it. Where an actor
            # takes one CPU and no GPU, Ray fuses decoding into it, which saves copying pixels;
            # otherwise decoding runs in tasks of its own, beside the GPUs.
            dataset = (
                ray.data.read_parquet(stage.file(*SELECTION))
                .repartition(target_num_rows_per_block=config.block_rows)
                .map_batches(
                    decode_batch,
                    fn_kwargs={"images": config.images},
                    batch_size=config.batch_images,
                    batch_format="pyarrow",
                )
                .map_batches(
                    TeacherActor,
                    fn_constructor_args=(config, prompts, classes, stage.file(TABLE_INFO)),
                    batch_size=config.batch_images,
                    batch_format="pyarrow",
                    compute=ActorPoolStrategy(min_size=pool.min_size, max_size=pool.max_size),
                    **resources,
                )
            )
            dataset.write_parquet(stage.path)  # appends; overwriting would empty a resumed run
    except Exception as error:
        mistake = _user_error(error)
        if mistake is None:
            raise
        raise mistake from None


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


def _user_error(error: BaseException) -> UserError | None:
    """Find the user's mistake at the end of the text that Ray makes of a worker's exception.

    By text, because an actor that dies while it starts leaves nothing else behind.
    """
    found = _MISTAKE.search(str(error).strip())
    if found is None:
        return None
    kind: type[UserError] = ConfigError if found["kind"] == "ConfigError" else DataError
    return kind(found["message"].strip())


class _Committed:
    """Counts the rows of a stage folder whose write was committed, new files only."""

    def __init__(self, stage: StageFolder) -> None:
        self.stage = stage
        self.rows = 0
        self.quarantined = 0
        self._seen: set[str] = set()

    def update(self) -> None:
        """Look at the files that were committed since the last call."""
        for name in committed_names(self.stage) - self._seen:
            for path in data_files(self.stage, name):
                status = _read_column(path, "status")
                self.rows += len(status)
                self.quarantined += pc.sum(pc.equal(status, QUARANTINED)).as_py() or 0
            self._seen.add(name)


def _read_column(path: str, name: str) -> pa.ChunkedArray:
    filesystem, inner = storage.resolve(path)
    with filesystem.open_input_file(inner) as file:
        return pq.ParquetFile(file).read(columns=[name])[name]


def committed_names(stage: StageFolder) -> set[str]:
    """Return the names, without suffix, under which Ray's checkpoint has committed writes."""
    return {
        name.removesuffix(".parquet")
        for name in storage.list_names(stage.file(CHECKPOINT))
        if name.endswith(".parquet") and not name.endswith(".pending.parquet")
    }


def data_files(stage: StageFolder, name: str | None = None) -> list[str]:
    """Return the stage's data files: those of one committed write, or all."""
    return [
        stage.file(file)
        for file in storage.list_names(stage.path)
        if file.endswith(".parquet") and name in {None, _write_of(file)}
    ]


def _write_of(file: str) -> str:
    """Return the write that made a data file: NAME of `NAME-0.parquet`."""
    return file.rpartition("-")[0]


class _Reporter:
    """A thread that calls `progress` while the pipeline runs."""

    def __init__(self, committed: _Committed, total: int, progress: Progress | None) -> None:
        self.committed = committed
        self.total = total
        self.progress = progress
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._poll, name="label-progress", daemon=True)

    def __enter__(self) -> _Reporter:
        if self.progress is not None:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()

    def _poll(self) -> None:
        assert self.progress is not None
        while not self._stop.wait(POLL_SECONDS):
            try:
                self.committed.update()
                self.progress(self.committed.rows, self.total, self.committed.quarantined)
            except Exception:  # a storage that hiccups must not end the run it watches
                logger.debug("progress could not be read", exc_info=True)


def _finish(stage: StageFolder, selection: pa.Table) -> dict[str, Any]:
    """Check that every image stands in the output once, write the quarantine table, count."""
    _remove_uncommitted(stage)
    columns = ["image_id", "uri", "region_kinds", "status", "error_kind", "error"]
    output = read_table(stage.path, columns)
    _check_ids(output["image_id"], selection["image_id"], stage.path)
    bad = output.filter(pc.equal(output["status"], QUARANTINED))
    kinds = Counter(bad["error_kind"].to_pylist())
    stages = pa.array([STAGE] * bad.num_rows, pa.string())
    quarantine = bad.select(["image_id", "uri", "error_kind", "error"]).append_column(
        "stage", stages
    )
    names = QUARANTINE_SCHEMA.names
    write_table(
        stage.file(*QUARANTINE), quarantine.select(names).cast(QUARANTINE_SCHEMA.remove_metadata())
    )
    if bad.num_rows == output.num_rows:
        path = stage.file(*QUARANTINE)
        _forget(stage)
        counts = ", ".join(f"{kind} {count}" for kind, count in kinds.most_common())
        first = f"{bad['uri'][0]}: {bad['error'][0]}"
        raise DataError(
            f"all {bad.num_rows} images were quarantined ({counts}), e.g. {first}; see {path}"
        )
    return {
        "rows_in": selection.num_rows,
        "rows_out": output.num_rows - bad.num_rows,
        "quarantined": bad.num_rows,
        "quarantined_by_kind": dict(kinds),
        "regions": pc.sum(pc.list_value_length(output["region_kinds"])).as_py() or 0,
    }


def _check_ids(output: pa.ChunkedArray, expected: pa.ChunkedArray, path: str) -> None:
    remedy = f"remove {path} and run again"
    distinct = output.unique()
    if len(distinct) != len(output):
        raise DataError(
            f"{path}: {len(output) - len(distinct)} images stand twice, as when two runs write"
            f" at a time; {remedy}"
        )
    missing = expected.filter(pc.invert(pc.is_in(expected, distinct)))
    if len(missing) or len(output) != len(expected):
        raise DataError(
            f"{path}: {len(output)} rows for {len(expected)} images, {len(missing)} are missing"
            f" (e.g. {missing[0].as_py() if len(missing) else None!r}); {remedy}"
        )


def _remove_uncommitted(stage: StageFolder) -> None:
    """Remove data whose write was not committed: a worker may outlive a killed driver."""
    committed = committed_names(stage)
    for path in data_files(stage):
        if _write_of(path.rpartition("/")[2]) not in committed:
            _remove_file(path)


def _forget(stage: StageFolder) -> None:
    """Remove the rows and their checkpoints, so that a rerun starts anew."""
    storage.remove_tree(stage.file(CHECKPOINT))
    for path in data_files(stage):
        _remove_file(path)


def _remove_file(path: str) -> None:
    filesystem, inner = storage.resolve(path)
    filesystem.delete_file(inner)


def estimate(
    config: LabelConfig, manifest: str | pa.Table, class_table: ClassTable, sample: int = 4
) -> dict[str, Any]:
    """Measure the teacher on a few images in this process and extrapolate; writes nothing.

    Returns images, sample, sample_quarantined, device, load_seconds, seconds_per_image,
    regions_per_image, seconds (of the run with pool.max_size actors) and gpu_hours. Times
    are None when no sampled image could be read. The first scored image only warms up.
    """
    selection = select_images(config, manifest)
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
        try:
            started = time.monotonic()
            image = _load(selection["uri"][row].as_py(), config.images)
            if not warm:
                scorer([image])
                warm, started = True, time.monotonic()
            result = scorer([image])[0]
        except ImageError:
            failures += 1
            continue
        if isinstance(result, ImageFailure):
            failures += 1
            continue
        times.append(time.monotonic() - started)
        regions += len(result.regions)
    return times, regions, failures
