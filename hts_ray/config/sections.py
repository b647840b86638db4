"""Every setting of every stage, declared once with its type, default, bounds and meaning.

A field marked `execution()` says how a stage runs, not what it answers. It stays out of the
settings hash that names the stage's output folder.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

import yaml
from pydantic import Field, field_validator, model_validator

from hts_ray.config.fields import Section, execution


class ClassesConfig(Section):
    """Which classes are labeled."""

    source: str = Field("hico", description="`hico`, or the path of a class CSV of your own")
    ids: tuple[int, ...] | None = Field(
        None, description="keep only these class ids, in this order; all when not set"
    )


class PrepareConfig(Section):
    """Where images come from and how they are checked while the manifest is written."""

    splits: tuple[str, ...] = Field(("train", "test"), description="HICO splits to read")
    split: str = Field("train", description="split given to every image of a plain folder")
    follow_symlinks: bool = Field(True, description="follow links to folders (loops are cut)")
    workers: int = execution(16, ge=1, le=256, description="threads that read image headers")


class ImagesConfig(Section):
    """Limits of image decoding; what breaks them is quarantined with the reason."""

    max_pixels: int = Field(200_000_000, ge=1, description="larger images are refused")
    min_side: int = Field(8, ge=1, description="smaller images are refused, pixels")
    max_side: int = Field(2048, ge=16, description="longer sides are downscaled to this, pixels")


class RegionsConfig(Section):
    """Which regions of an image the teacher looks at."""

    whole: bool = Field(True, description="the whole image is a region")
    grid_scales: tuple[float, ...] = Field(
        (0.7, 0.5), description="side of the grid's crops as a share of the image's sides"
    )
    grid_steps: tuple[int, ...] = Field(
        (2, 3), description="crops along each side, one number a scale"
    )
    boxes: str | None = Field(
        None, description="given boxes: HICO-DET json, COCO json or Parquet (path or URI)"
    )
    detector: str | None = Field(
        None, description="object detector of transformers, also a zero-shot one: hub id or path"
    )
    detector_revision: str | None = Field(None, description="pinned revision of the detector")
    detector_threshold: float = Field(0.3, ge=0.0, le=1.0, description="least score of a box")
    detector_labels: tuple[str, ...] | None = Field(
        None, description="what a zero-shot detector looks for; person and the classes' objects"
    )
    person_labels: tuple[str, ...] = Field(
        ("person", "man", "woman", "boy", "girl", "child"),
        description="labels that count as a person; the others are objects",
    )
    unions: bool = Field(True, description="boxes around a person and an object together")
    persons: bool = Field(True, description="boxes around a person, with context")
    margins: tuple[float, ...] = Field(
        (0.2,),
        description="context around person and union boxes, as a share of their sides; each"
        " margin is a region of its own",
    )
    nms_iou: float = Field(
        0.7, gt=0.0, le=1.0, description="boxes of a label that overlap more are one box"
    )
    max_pairs: int = Field(12, ge=1, description="at most so many person-object pairs an image")
    min_side: int = Field(16, ge=1, description="smaller crops are left out, pixels")
    max_regions: int = Field(64, ge=1, description="at most so many regions an image")
    budget: int | None = Field(
        None, ge=1, description="at most so many regions in the whole run, shared out evenly"
    )

    @model_validator(mode="after")
    def _consistent(self) -> RegionsConfig:
        if len(self.grid_scales) != len(self.grid_steps):
            raise ValueError("grid_scales and grid_steps must have one entry a scale each")
        if any(not 0 < scale <= 1 for scale in self.grid_scales):
            raise ValueError("grid_scales must lie in (0, 1]")
        if any(steps < 1 for steps in self.grid_steps):
            raise ValueError("grid_steps must be at least 1")
        if not self.margins or any(not 0 <= margin <= 4 for margin in self.margins):
            raise ValueError("margins needs at least one number, each in [0, 4]")
        if len(set(self.margins)) != len(self.margins):
            raise ValueError("margins must not repeat")
        if not (self.whole or self.grid_scales or self.boxes or self.detector):
            raise ValueError("no region is left: set whole=true or name a grid scale")
        return self


class CaptionConfig(Section):
    """How captions are written."""

    decoding: Literal["greedy", "beam", "sample"] = "greedy"
    count: int = Field(1, ge=1, le=64, description="captions a region (beam and sample)")
    num_beams: int = Field(4, ge=1, le=64, description="beams of beam search")
    temperature: float = Field(1.0, gt=0.0, description="of sampling")
    top_p: float = Field(0.9, gt=0.0, le=1.0, description="nucleus of sampling")
    max_tokens: int = Field(30, ge=1)
    seed: int = Field(0, ge=0, description="of sampling; the image and region are mixed in")
    text_encoder: str | None = Field(
        None,
        description="open_clip MODEL@TAG whose text space finds classes in captions that the"
        " lexicon says nothing about",
    )
    similarity_floor: float = Field(
        0.85, gt=0.0, lt=1.0, description="least cosine of a caption and a prompt that counts"
    )

    @model_validator(mode="after")
    def _consistent(self) -> CaptionConfig:
        if self.decoding == "greedy" and self.count != 1:
            raise ValueError(f"count={self.count} needs decoding=beam or decoding=sample")
        if self.decoding == "beam" and self.count > self.num_beams:
            raise ValueError(f"count={self.count} is more than num_beams={self.num_beams}")
        return self


class TeacherConfig(Section):
    """The captioner that scores class prompts on regions."""

    model: str = Field(
        "builtin:world_captioner",
        description="hub id, local path, builtin:NAME or import:MODULE:CLASS",
    )
    revision: str | None = Field(None, description="pinned revision of a hub model")
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    instruction: str | None = Field(
        None,
        description="what a chat or instruction model is asked, or how the sentence begins; the"
        " family's own words if not set",
    )
    mode: Literal["prompts", "captions"] = Field(
        "prompts",
        description="score the class prompts, or write captions and find the classes in them",
    )
    prompt_templates: int = Field(
        1, ge=1, description="how many templates a class are scored and combined"
    )
    template_reduction: Literal["log_mean_exp", "mean", "max"] = Field(
        "log_mean_exp", description="how a class's templates become one score"
    )
    append_eos: bool = Field(False, description="score the end of the sentence too")
    length_normalize: bool = Field(
        False, description="divide log-likelihoods by their token counts"
    )
    search: Literal["all", "top_k"] = Field(
        "all",
        description="which classes are scored: all, or the best top_k of a region, exactly, by"
        " leaving hopeless branches of the prompt tree",
    )
    top_k: int = Field(30, ge=1, description="classes a region that search=top_k scores")
    search_alpha: float = Field(
        0.0, ge=0.0, le=2.0, description="alpha of the prior when search=top_k ranks the classes"
    )
    prior: Literal["plain", "sample", "none"] = Field(
        "plain", description="images that log P(prompt) is estimated on: plain ones or a sample"
    )
    null_images: int = Field(3, ge=1, description="plain images of the prior")
    prior_sample: int = Field(64, ge=1, description="images of the run that prior=sample takes")
    captions: bool = Field(False, description="also write captions of every region")
    caption: CaptionConfig = Field(default_factory=CaptionConfig)
    trust_remote_code: bool = Field(False, description="run code that comes with the model")
    max_batch_regions: int = execution(64, ge=1, description="regions in one forward")
    prompt_batch: int = execution(64, ge=1, description="prompts in one forward without a trie")
    workspace_mib: int | None = execution(
        None,
        ge=16,
        description="memory of a group of regions; 192 on a CPU, a quarter of what a GPU has free",
    )

    @model_validator(mode="after")
    def _consistent(self) -> TeacherConfig:
        if self.search != "all" and self.length_normalize:
            raise ValueError(
                "length_normalize=true needs search=all: a branch of the prompt tree can be left"
                " early only while sums of log-probabilities can but fall"
            )
        if self.search_alpha and self.prior == "none":
            raise ValueError(f"search_alpha={self.search_alpha} needs a prior: prior=plain")
        if self.search != "all" and self.mode == "captions":
            raise ValueError("mode=captions scores no prompts: use search=all")
        return self


class PoolConfig(Section):
    """An actor pool of Ray Data."""

    min_size: int = Field(1, ge=1)
    max_size: int = Field(1, ge=1)
    num_gpus: float = Field(0.0, ge=0.0, description="GPUs an actor")
    num_cpus: float = Field(1.0, ge=0.0, description="CPUs an actor where it has no GPU")
    memory_gib: float | None = Field(None, gt=0, description="memory an actor reserves")
    threads: int = Field(1, ge=1, description="torch threads an actor")
    tasks_in_flight: int = Field(
        3, ge=1, description="batches an actor has at hand, so that it never waits for the next"
    )

    @property
    def actor_cpus(self) -> float:
        """Logical CPUs that an actor holds: Ray gives one to every actor that asks for a GPU."""
        return 1.0 if self.num_gpus else self.num_cpus

    @model_validator(mode="after")
    def _ordered(self) -> PoolConfig:
        if self.max_size < self.min_size:
            raise ValueError("max_size must be at least min_size")
        return self


class LabelConfig(Section):
    """The teacher pass: manifest in, region_scores out."""

    splits: tuple[str, ...] = Field(("train",), description="splits of the manifest to label")
    images: ImagesConfig = Field(default_factory=ImagesConfig)
    regions: RegionsConfig = Field(default_factory=RegionsConfig)
    teacher: TeacherConfig = Field(default_factory=TeacherConfig)
    limit: int | None = Field(None, ge=1, description="label only a seeded sample of N images")
    limit_seed: int = Field(0, ge=0, description="of the sample that limit draws")
    pool: PoolConfig = execution(PoolConfig())
    batch_images: int = execution(16, ge=1, description="images handed to an actor at a time")
    block_rows: int = execution(
        64, ge=1, description="at most so many images between two commits: what a crash can cost"
    )
    decode_memory_gib: float | None = execution(
        None, gt=0, description="memory a decoding task reserves"
    )
    max_attempts: int = execution(
        2, ge=1, description="workers that an image may take down before it is quarantined"
    )
    transient_retries: int = execution(
        3, ge=0, description="retries of storage errors that may pass, with growing pauses"
    )


class FilterConfig(Section):
    """From regional log-likelihoods to positives, ignored and negatives."""

    region_kinds: tuple[str, ...] | None = Field(
        None, description="stored region kinds that count; all when not set"
    )
    margins: tuple[float, ...] | None = Field(
        None, description="stored context margins that count; all when not set"
    )
    prior_alpha: float = Field(
        0.5, ge=0.0, le=2.0, description="alpha in log P(t|r) - alpha log P(t)"
    )
    temperature: float = Field(1.0, gt=0.0, description="of the softmax over classes")
    null_score: float | None = Field(
        None, description="log-likelihood of `none of these`, an option of the softmax"
    )
    aggregation: Literal["max", "mean", "top_k_mean", "noisy_or"] = "top_k_mean"
    top_k: int = Field(2, ge=1, description="regions averaged by top_k_mean")
    positive_threshold: float = Field(0.5, ge=0.0, le=1.0)
    negative_threshold: float = Field(0.1, ge=0.0, le=1.0)
    per_class_quantile: float | None = Field(
        0.98, gt=0.0, lt=1.0, description="a class's threshold may fall to its own quantile"
    )
    quantile_floor: float = Field(
        0.2, ge=0.0, le=1.0, description="but never below this probability"
    )
    min_support: int = Field(1, ge=1, description="regions that must agree on a positive")
    support_threshold: float = Field(
        0.2, ge=0.0, le=1.0, description="probability at which a region agrees"
    )
    max_positives_per_image: int = Field(8, ge=1)
    overrides: str | None = execution(  # what the file says is part of the key, not where it lies
        None, description="corrections of people (`hts import-labels`) that replace these labels"
    )

    @model_validator(mode="after")
    def _ordered(self) -> FilterConfig:
        if self.negative_threshold > self.positive_threshold:
            raise ValueError(
                "negative_threshold must not be above positive_threshold"
                f" ({self.negative_threshold} > {self.positive_threshold})"
            )
        return self


class StudentConfig(Section):
    """The CLIP image encoder and its cosine classifier."""

    model: str = Field(
        "builtin:world_clip",
        description="open_clip model name, hf-hub:..., local-dir:PATH or builtin:NAME",
    )
    pretrained: str | None = Field(
        None, description="open_clip pretrained tag or a local weights file"
    )
    image_size: int | None = Field(None, ge=16, description="pixels; the model's own if not set")
    feature_space: Literal["projected", "backbone"] = Field(
        "projected", description="where the cosine is taken; `backbone` is proj @ text (paper)"
    )
    prompt_templates: int = Field(5, ge=1, description="templates averaged into a class")
    logit_scale: float = Field(
        100.0, gt=0.0, description="fixed factor of the cosine; exp(4.61) in the paper"
    )
    precision: Literal["no", "bf16", "fp16"] = Field("no", description="of Accelerate")

    @field_validator("precision", mode="before")
    @classmethod
    def _unquoted_no(cls, value: Any) -> Any:
        return "no" if value is False else value  # YAML reads a bare `no` as false


class OptimConfig(Section):
    """AdamW and its schedule."""

    lr: float = Field(1.5e-5, gt=0.0, description="of the trunk")
    head_lr: float | None = Field(None, gt=0.0, description="of the classifier; lr if not set")
    layer_decay: float = Field(
        1.0, gt=0.0, le=1.0, description="factor of the rate from a block to the one before it"
    )
    weight_decay: float = Field(0.0, ge=0.0)
    warmup_steps: int = Field(0, ge=0)
    schedule: Literal["constant", "cosine", "warm_restarts"] = "cosine"
    restart_epochs: int = Field(5, ge=1, description="period of warm_restarts, epochs")
    grad_clip: float | None = Field(1.0, gt=0.0, description="largest gradient norm")


class AugmentConfig(Section):
    """Augmentations of the training images."""

    flip: bool = True
    crop_scale: tuple[float, float] = Field((0.7, 1.0), description="area of the random crop")
    crop_ratio: tuple[float, float] = Field((0.7, 1.3), description="aspect of the random crop")
    color_jitter: float = Field(0.4, ge=0.0, le=1.0, description="brightness and contrast")

    @model_validator(mode="after")
    def _ordered(self) -> AugmentConfig:
        if not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1:
            raise ValueError("crop_scale must be (low, high) with 0 < low <= high <= 1")
        if not 0 < self.crop_ratio[0] <= self.crop_ratio[1]:
            raise ValueError("crop_ratio must be (low, high) with 0 < low <= high")
        return self


# Field of TrainConfig -> parameter, of each loss that has some of its own.
_LOSS_SETTINGS = {
    "weighted_bce": {"positive_weight": "positive_weight"},
    "focal": {"focal_gamma": "gamma", "focal_alpha": "alpha"},
    "asl": {"asl_gamma_neg": "gamma_neg", "asl_gamma_pos": "gamma_pos", "asl_clip": "clip"},
}


class FeaturesConfig(Section):
    """Computing image features once, for `train.trainable=head` and for sweeps."""

    pool: PoolConfig = Field(default_factory=PoolConfig)
    batch_images: int = Field(64, ge=1)
    local_images: int = Field(
        2000,
        ge=0,
        description="so many images or fewer are encoded in the driver's process, without Ray,"
        " where the pool has no GPU",
    )


class TrainConfig(Section):
    """Fine-tuning of the student."""

    labels: Literal["pseudo", "annotations", "none"] = Field(
        "pseudo", description="HTS, the supervised upper bound, or zero-shot"
    )
    split: str = Field("train", description="split of the manifest that is trained on")
    soft_labels: bool = Field(
        False, description="a positive pseudo-label weighs its probability in the loss"
    )
    validation_split: str | None = execution(
        None,
        description="annotated split whose mAP is measured while training; it changes nothing else",
    )
    validate_every: int = execution(1, ge=1, description="epochs between these measurements")
    loss: Literal["lse_sign", "bce", "weighted_bce", "focal", "asl"] = "lse_sign"
    loss_temperature: float = Field(1.0, gt=0.0, description="logits are divided by it")
    positive_weight: float = Field(
        10.0, gt=0.0, description="how many times a positive counts with loss=weighted_bce"
    )
    focal_gamma: float = Field(2.0, ge=0.0, description="how fast right answers fade; loss=focal")
    focal_alpha: float | None = Field(
        0.25,
        gt=0.0,
        lt=1.0,
        description="share of the positives with loss=focal; null: as the negatives",
    )
    asl_gamma_neg: float = Field(4.0, ge=0.0, description="of negatives, with loss=asl")
    asl_gamma_pos: float = Field(0.0, ge=0.0, description="of positives, with loss=asl")
    asl_clip: float = Field(
        0.05, ge=0.0, lt=1.0, description="negatives less probable cost nothing with loss=asl"
    )
    class_balance: float = Field(
        0.0,
        ge=0.0,
        le=1.0,
        description="weigh classes by their number of positives to the power -class_balance",
    )
    epochs: int = Field(10, ge=1)
    batch_size: int = Field(
        128, ge=1, description="images of an optimizer step, over all workers and accumulation"
    )
    accumulation: int = execution(
        1, ge=1, description="forward passes a step, which divide the memory of activations"
    )
    trainable: Literal["all", "head", "last"] = Field(
        "all",
        description="parameters that learn; `last` is the last `trainable_blocks`; `head`, the"
        " classifier, is fitted on features that are computed once: of `augment` only the flip"
        " applies, and the fit itself runs in the driver's process on its CPUs",
    )
    trainable_blocks: int = Field(1, ge=1)
    learn_logit_scale: bool = Field(False, description="student.logit_scale is where it starts")
    ema_decay: float | None = Field(
        None,
        gt=0.0,
        lt=1.0,
        description="the student is the moving average of the weights, such as 0.999",
    )
    min_positives_per_class: int = Field(
        0, ge=0, description="repeat images until each class has so many positives"
    )
    optim: OptimConfig = Field(default_factory=OptimConfig)
    augment: AugmentConfig = Field(default_factory=AugmentConfig)
    num_workers: int = execution(
        1, ge=0, description="Ray Train workers; 0 trains inside the driver process"
    )
    use_gpu: bool = execution(False)
    cpus_per_worker: float = execution(1.0, gt=0.0)
    features: FeaturesConfig = execution(FeaturesConfig(), description="for trainable=head")
    gradient_checkpointing: bool = execution(
        False, description="compute activations twice rather than keep them: less memory"
    )
    compile: bool = execution(False, description="torch.compile the image tower")
    max_failures: int = execution(3, ge=0, description="worker failures that are survived")
    checkpoint_every: int = execution(1, ge=1, description="epochs between checkpoints")
    checkpoint_every_steps: int | None = execution(
        None, ge=1, description="steps between checkpoints within an epoch"
    )
    loggers: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = execution(("tensorboard",))
    log_every: int = execution(10, ge=1, description="steps between logged losses")

    @property
    def loss_parameters(self) -> dict[str, float | None]:
        """The settings that only the chosen loss has, as `losses.make_loss` names them."""
        settings = _LOSS_SETTINGS.get(self.loss, {})
        return {parameter: getattr(self, field) for field, parameter in settings.items()}

    @field_validator("num_workers", mode="before")
    @classmethod
    def _fixed_workers(cls, value: Any) -> Any:
        if isinstance(value, list | tuple):
            raise ValueError(
                "give one number: with a number that changes, the images of a step would depend"
                " on when workers came and went, and no run could be repeated or resumed exactly"
            )
        return value

    @model_validator(mode="after")
    def _loss_has_its_settings(self) -> TrainConfig:
        for loss, settings in _LOSS_SETTINGS.items():
            for name in settings if loss != self.loss else ():
                value = getattr(self, name)
                if value != type(self).model_fields[name].default:
                    raise ValueError(
                        f"{name}={value} has no effect with loss={self.loss}: set loss={loss}"
                    )
        return self


class PredictConfig(Section):
    """Scoring images with a student."""

    split: str | None = Field("test", description="split of the manifest; all when not set")
    images: ImagesConfig = Field(default_factory=ImagesConfig)
    pool: PoolConfig = execution(PoolConfig())
    batch_images: int = execution(64, ge=1)


class ScoreConfig(Section):
    """Scoring a teacher's regions with a student."""

    pool: PoolConfig = execution(PoolConfig())
    batch_images: int = execution(16, ge=1, description="images handed to an actor at a time")
    batch_regions: int = execution(64, ge=1, description="regions in one forward")


class RangeConfig(Section):
    """What one setting may be in a sweep: a range, or choices."""

    low: float | None = None
    high: float | None = None
    log: bool = Field(False, description="drawn evenly in its logarithm")
    choices: tuple[Any, ...] | None = Field(None, description="values, null among them where fit")

    @model_validator(mode="after")
    def _range_or_choices(self) -> RangeConfig:
        if self.choices is not None:
            if not self.choices or self.low is not None or self.high is not None or self.log:
                raise ValueError("give choices: [...] with a value or more, or low and high")
        elif self.low is None or self.high is None or not self.low < self.high:
            raise ValueError("give low and high, with low below high, or choices: [...]")
        elif self.log and self.low <= 0:
            raise ValueError(f"log: true needs low above 0, not {self.low}")
        return self


class SweepConfig(Section):
    """Which settings of the filter and the training are tried, and how the best is chosen."""

    trials: int = Field(100, ge=1, description="settings that are tried, the run's own first")
    search: Literal["random", "optuna"] = Field(
        "random", description="optuna learns from earlier trials; `pip install hts-ray[optuna]`"
    )
    space: dict[str, RangeConfig] | None = Field(
        None,
        description="setting: {low, high, log} or {choices}; if not set, the filter's settings,"
        " the loss's temperature and the classifier's rate",
    )
    objective: str | None = Field(
        None,
        description="what is compared, see docs/sweep.md; if not set, blended_ap, or"
        " mAP_validation with a validation set",
    )
    validation: str | None = Field(
        None, description="labeled images that may be looked at: a manifest or an anno.mat"
    )
    finalists: int = Field(3, ge=0, description="best trials trained in full beside the run's own")
    repeats: int = Field(3, ge=1, description="seeds that a trial is averaged over")
    reduction: float = Field(
        3.0, gt=1.0, description="about one trial in so many goes on to more seeds"
    )
    seed: int = Field(0, ge=0, description="of the settings drawn and of the held-out images")
    concurrency: int | None = execution(
        None, ge=1, description="trials at a time; the cluster's CPUs if not set"
    )

    @field_validator("space", mode="before")
    @classmethod
    def _dotted(cls, value: Any) -> Any:
        """Let `filter: {top_k: {...}}` stand for `filter.top_k: {...}`."""
        return dict(_leaves(value)) if isinstance(value, Mapping) else value


def _leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        nested = isinstance(value, Mapping) and not set(value) & set(RangeConfig.model_fields)
        if nested and value:
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


class ExportConfig(Section):
    """Labels in the formats of other tools."""

    check_images: bool = Field(
        True, description="open every image's header and leave out what is no image"
    )
    region_boxes: bool = Field(True, description="boxes of the regions that support a label")
    boxes_per_label: int = Field(3, ge=1, description="at most so many of them a label")
    image_url_prefix: str | None = Field(
        None, description="where a browser finds the images, in place of image_root"
    )
    image_root: str | None = Field(
        None, description="folder that image_url_prefix stands for; what was prepared if not set"
    )
    shard_images: int = Field(
        5000, ge=1, le=10_000, description="images of a WebDataset shard or a hub folder"
    )
    workers: int = Field(16, ge=1, le=256, description="threads that read images")


class RayConfig(Section):
    """How the driver joins or starts Ray."""

    address: str | None = Field(None, description="`auto`, host:port, or a local cluster")
    num_cpus: int | None = Field(None, ge=1, description="logical CPUs of a local cluster")
    num_gpus: int | None = Field(None, ge=0, description="logical GPUs of a local cluster")
    shared_paths: tuple[str, ...] = Field(
        (), description="folders that every node sees under the same path: NFS, or in the image"
    )
    autoscaling: bool | None = Field(
        None, description="whether nodes come when they are asked for; found out if not set"
    )
    object_store_gib: float | None = Field(
        None,
        ge=0.1,
        description="memory of a local cluster's object store; Ray's choice if not set",
    )
    gpu_hour_price: float | None = execution(
        None,
        gt=0.0,
        description="what a GPU costs in an hour, in your currency; no spending is estimated"
        " if not set",
    )
    log_format: Literal["text", "json"] = execution(
        "text", description="of this package's logs; json: a line each, with run and stage"
    )


class HtsConfig(Section):
    """All stages."""

    run_dir: str = execution("runs/default", description="where every stage writes")
    seed: int = Field(0, ge=0)
    classes: ClassesConfig = Field(default_factory=ClassesConfig)
    prepare: PrepareConfig = Field(default_factory=PrepareConfig)
    label: LabelConfig = Field(default_factory=LabelConfig)
    filter: FilterConfig = Field(default_factory=FilterConfig)
    student: StudentConfig = Field(default_factory=StudentConfig)
    train: TrainConfig = Field(default_factory=TrainConfig)
    predict: PredictConfig = Field(default_factory=PredictConfig)
    score: ScoreConfig = Field(default_factory=ScoreConfig)
    sweep: SweepConfig = Field(default_factory=SweepConfig)
    export: ExportConfig = execution(ExportConfig())
    ray: RayConfig = execution(RayConfig())

    def to_yaml(self) -> str:
        """Return the whole configuration as YAML that `--config` reads back."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)
