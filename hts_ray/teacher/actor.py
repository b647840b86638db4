"""What a teacher is asked to do in a run, and the teacher that is put together for it.

The driver plans a `Teaching` without loading a model; an actor, or a dry run, loads one and gets
a `RegionScorer`. Knows no Ray. Shape legend: C classes, P prompts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from hts_ray.classes import ClassTable
from hts_ray.config import CaptionConfig, LabelConfig, RegionsConfig
from hts_ray.engine.image_pass import decode_batch
from hts_ray.errors import ConfigError, DataError
from hts_ray.images.decode import DecodedImage
from hts_ray.store import storage
from hts_ray.store.run import StageFolder, settings_hash
from hts_ray.teacher.captioner import (
    Captioner,
    ClassPrompts,
    FloatArray,
    log_mean_exp,
    plain_images,
    score_classes,
)
from hts_ray.teacher.models.loading import (
    check_teacher,
    load_captioner,
    model_fingerprint,
    needs_torch,
)
from hts_ray.teacher.scorers import (
    CaptionMatcher,
    GivenBoxesLike,
    ImageTask,
    RegionScorer,
    by_position,
)
from hts_ray.teacher.scoring.selection import object_gate

PRIORS = "priors"  # the folder of a run that keeps log P(prompt) from one pass to the next
TABLE_INFO = "table.json"
# What `scores` are: log P(prompt | region), or log P(a caption of the region states the class).
LOG_LIKELIHOOD = "log_likelihood"
LOG_PROBABILITY = "log_probability"


@dataclass(frozen=True)
class Teaching:
    """All that a teacher actor needs to know; made by the driver, without loading a model.

    `prior_rows` are the manifest rows whose images the prior is estimated on, `limit` the
    regions that an image may have by the run's budget.
    """

    config: LabelConfig
    class_table: ClassTable
    run_dir: str = ""
    info_path: str = ""
    given: GivenBoxesLike | None = None
    prior_rows: pa.Table | None = None
    limit: int | None = None
    prompts: ClassPrompts = field(init=False)

    def __post_init__(self) -> None:
        prompts = class_prompts(self.config, self.class_table)
        object.__setattr__(self, "prompts", prompts)

    @classmethod
    def plan(
        cls,
        config: LabelConfig,
        class_table: ClassTable,
        rows: pa.Table,
        stage: StageFolder | None = None,
    ) -> Teaching:
        """Read what the settings name besides the images; ConfigError or DataError if unusable.

        `rows` are the manifest's rows to label. Without a `stage` nothing will be written.
        """
        check_teacher(config.teacher)
        check_regions(config.regions)
        sample = None
        if config.teacher.prior == "sample" and config.teacher.mode == "prompts":
            rng = np.random.default_rng(config.limit_seed)
            size = min(config.teacher.prior_sample, len(rows))
            sample = rows.take(np.sort(rng.choice(len(rows), size, replace=False)))
        budget = config.regions.budget
        return cls(
            config,
            class_table,
            run_dir=stage.run_dir if stage else "",
            info_path=stage.file(TABLE_INFO) if stage else "",
            given=_given_boxes(config.regions, rows),
            prior_rows=sample,
            limit=None if budget is None else max(1, budget // max(1, len(rows))),
        )


def class_prompts(config: LabelConfig, class_table: ClassTable) -> ClassPrompts:
    """Return the prompts that the teacher scores, class by class."""
    return ClassPrompts.of(class_table.prompts, config.teacher.prompt_templates)


def load_on_device(config: LabelConfig) -> tuple[Captioner, str]:
    """Load the teacher as an actor of the pool would, and return the device for its company.

    Raises ConfigError for a teacher that does not load, or a GPU that is not there.
    """
    pool = config.pool
    if not needs_torch(config.teacher) and config.regions.detector is None:
        return load_captioner(config.teacher, "cuda" if pool.num_gpus else "cpu"), "cpu"
    import torch

    torch.set_num_threads(pool.threads)
    if pool.num_gpus > 0 and not torch.cuda.is_available():
        raise ConfigError(
            "torch sees no GPU on this node",
            field="label.pool.num_gpus",
            value=pool.num_gpus,
            remedy="set it to 0, or use nodes with GPUs and a CUDA build of torch",
        )
    device = "cuda" if pool.num_gpus > 0 else "cpu"
    # On several GPUs accelerate lays the model out.
    return load_captioner(config.teacher, "auto" if pool.num_gpus > 1 else device), device


def image_task(batch: pa.Table, row: int) -> ImageTask:
    """Return what to score of a row of `decode_batch` that has pixels."""
    return ImageTask(
        decoded_image(batch, row),
        image_id=batch["image_id"][row].as_py(),
        uri=batch["uri"][row].as_py(),
    )


def decoded_image(batch: pa.Table, row: int) -> DecodedImage:
    """Return the pixels of a row of `decode_batch`, a view."""
    height, width = batch["pixel_height"][row].as_py(), batch["pixel_width"][row].as_py()
    pixels = np.frombuffer(batch["pixels"][row].as_buffer(), dtype=np.uint8)
    return DecodedImage(
        pixels=pixels.reshape(height, width, 3),
        width=batch["width"][row].as_py(),
        height=batch["height"][row].as_py(),
    )


def table_info(captioner: Captioner, teaching: Teaching) -> dict[str, Any]:
    """Return the contents of `table.json`; the prior costs a few forwards, once a run."""
    config, prompts = teaching.config, teaching.prompts
    teacher, table = config.teacher, teaching.class_table
    captions = teacher.mode == "captions"
    prior = None if captions else prior_log_likelihoods(captioner, teaching)
    counts = (
        [0] * len(prompts.texts)
        if captions
        else captioner.score(plain_images(1), prompts.texts).token_counts.tolist()
    )
    return {
        "class_ids": table.ids.tolist(),
        "class_fingerprint": table.fingerprint(),
        "score_kind": LOG_PROBABILITY if captions else LOG_LIKELIHOOD,
        "prompts": prompts.by_class(prompts.texts),
        "prompts_hash": prompts.fingerprint(),
        "token_counts": prompts.by_class(counts),
        "prior_log_likelihoods": None if prior is None else prior.tolist(),
        "model": teacher.model,
        "model_fingerprint": model_fingerprint(teacher),
        "length_normalize": teacher.length_normalize,
        "append_eos": teacher.append_eos,
        "search": teacher.search,
        "regions": config.regions.model_dump(mode="json"),
    }


def prior_log_likelihoods(captioner: Captioner, teaching: Teaching) -> FloatArray | None:
    """Return log P(prompt) (C,) by the settings, None for prior=none.

    Kept in the run's `priors` folder under a hash of the model, the prompts, the images and the
    settings that change it, so that a second pass with other regions finds it. Raises DataError
    when scores are not finite or no image of the sample can be read.
    """
    teacher = teaching.config.teacher
    if teacher.prior == "none":
        return None
    sample = teaching.prior_rows
    key = settings_hash(
        model_fingerprint(teacher),
        teaching.prompts.fingerprint(),
        [teacher.dtype, teacher.instruction, teacher.length_normalize, teacher.append_eos],
        [teacher.template_reduction, teacher.prior],
        teacher.null_images if sample is None else sample["uri"].to_pylist(),
    )
    path = storage.join(teaching.run_dir, PRIORS, f"{key}.json") if teaching.run_dir else ""
    if path and storage.exists(path):
        return np.asarray(storage.read_json(path), dtype=np.float32)
    images = plain_images(teacher.null_images)
    if sample is not None:
        decoded = decode_batch(sample, teaching.config.images)
        good = np.flatnonzero(decoded["error_kind"].is_null().to_numpy())
        images = [decoded_image(decoded, row).pixels for row in good.tolist()]
        if not images:
            raise DataError("no image of the prior's sample can be read: use prior=plain")
    batch = teacher.max_batch_regions
    scores = [
        score_classes(
            captioner,
            images[first : first + batch],
            teaching.prompts,
            length_normalize=teacher.length_normalize,
            reduction=teacher.template_reduction,
        )
        for first in range(0, len(images), batch)
    ]
    prior = log_mean_exp(np.concatenate(scores))
    if not np.isfinite(prior).all():
        raise DataError("the teacher's scores of the prior's images are not finite: try float32")
    if path:
        storage.write_json(path, prior.tolist())
    return prior


def region_scorer(captioner: Captioner, teaching: Teaching, device: str) -> RegionScorer:
    """Put the parts that the settings ask for around a loaded teacher."""
    config, table = teaching.config, teaching.class_table
    teacher, objects = config.teacher, [of_class.object for of_class in teaching.class_table]
    detector = matcher = gate = offsets = None
    if config.regions.detector is not None:
        from hts_ray.teacher.detector import load_detector

        names = sorted({name.replace("_", " ") for name in objects if name})
        detector = load_detector(config.regions, names, device)
    if teacher.mode == "captions":
        matcher = _matcher(teacher.caption, table, device)
    if teacher.search == "objects":
        gate = object_gate(objects, teacher.top_objects)
    if teacher.search == "top_k" and teacher.search_alpha:
        prior = prior_log_likelihoods(captioner, teaching)
        assert prior is not None
        offsets = (-teacher.search_alpha * prior).astype(np.float32)
    return RegionScorer(
        captioner,
        teaching.prompts,
        teacher,
        config.regions,
        detector=detector,
        given=teaching.given,
        matcher=matcher,
        gate=gate,
        offsets_C=offsets,
        limit=teaching.limit,
    )


def _matcher(settings: CaptionConfig, table: ClassTable, device: str) -> CaptionMatcher:
    """Return what finds the classes of a table, by position, in captions."""
    from hts_ray.captions.matching import match_captions

    encoder = None
    if settings.text_encoder is not None:
        from hts_ray.teacher.text_encoder import ClipTextEncoder

        encoder = ClipTextEncoder(settings.text_encoder, device)

    def match(captions: Sequence[str]) -> list[dict[int, float]]:
        return match_captions(
            captions, table, encoder=encoder, similarity_floor=settings.similarity_floor
        )

    return by_position(match, table.positions)


def check_regions(config: RegionsConfig) -> None:
    """Look at a local detector's files without loading it; ConfigError as loading would raise."""
    if config.detector is not None:
        from hts_ray.teacher.detector import check_detector

        check_detector(config)


def region_sources(config: RegionsConfig) -> list[str]:
    """Return hashes of the files that regions come from besides the settings."""
    sources = []
    if config.boxes is not None:
        sources.append(hashlib.sha256(_box_file(config.boxes)).hexdigest()[:12])
    if config.detector is not None:
        from hts_ray.teacher.detector import detector_fingerprint

        sources.append(detector_fingerprint(config))
    return sources


def _box_file(uri: str) -> bytes:
    try:
        return storage.read_bytes(uri)
    except OSError as error:
        raise ConfigError(
            f"cannot be read: {error}",
            field="label.regions.boxes",
            value=uri,
            remedy="give the path or URI of a HICO-DET json, COCO json or Parquet file",
        ) from None


def _given_boxes(config: RegionsConfig, rows: pa.Table) -> GivenBoxesLike | None:
    """Read the boxes that come with the images; DataError where they fit no image."""
    if config.boxes is None:
        return None
    from hts_ray.images.boxes import read_given_boxes

    _box_file(config.boxes)
    given = read_given_boxes(config.boxes, config.person_labels)
    ids, uris = rows["image_id"].to_pylist(), rows["uri"].to_pylist()
    if not given.count_found(ids, uris):
        raise DataError(
            f"{config.boxes} has boxes of {len(given)} images, and none is in the manifest: its"
            f" images are called {ids[0]!r} and the like"
        )
    return given
