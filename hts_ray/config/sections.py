"""Every setting of every stage, declared once with its type, default, bounds and meaning.

A field marked `execution()` says how a stage runs, not what it answers. It stays out of the
settings hash that names the stage's output folder.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, Literal
from urllib.parse import urlsplit

import yaml
from pydantic import ValidationError, field_validator

from hts_ray.config.fields import AutoBool, AutoNumber, Section, execution, setting


class ClassesConfig(Section):
    """Which classes are labeled."""

    source: str = setting("hico", "`hico`, or the path or URI of your own class CSV")
    ids: tuple[int, ...] | None = setting(None, "only these ids, in this order; all if not set")


_LABEL = r"[a-zA-Z0-9]([a-zA-Z0-9_.-]{0,61}[a-zA-Z0-9])?"
_LABEL_KEY = re.compile(rf"([a-zA-Z0-9][a-zA-Z0-9.-]{{0,251}}/)?{_LABEL}")
_LABEL_WANTED = re.compile(rf"!?({_LABEL}|in\({_LABEL}(, ?{_LABEL})*\))")


class NodesConfig(Section):
    """Which nodes of a cluster some work goes to; any, if nothing is set."""

    labels: dict[str, str] = setting(
        {}, "labels that they have: {tier: large}, {tier: 'in(large, huge)'}, {tier: '!small'}"
    )
    accelerator_type: str | None = setting(None, "type of their GPUs, as Ray names it: A100")
    fallbacks: tuple[dict[str, str], ...] = setting(
        (), "labels to ask for instead, in turn, while no node has those"
    )

    def __hash__(self) -> int:
        return hash(self.model_dump_json())

    @property
    def any(self) -> bool:
        """Whether every node will do."""
        return not (self.labels or self.fallbacks or self.accelerator_type)

    def take(self, labels: Mapping[str, str], accelerator: str) -> bool:
        """Return whether a node with these labels and this type of GPUs will do."""
        kind = self.accelerator_type in {None, accelerator}
        return kind and any(_labeled(labels, wanted) for wanted in (self.labels, *self.fallbacks))

    def _contradictions(self) -> Iterator[tuple[object, str]]:
        yield self.fallbacks and not self.labels, "fallbacks stand in for labels: set labels too"
        for wanted in (self.labels, *self.fallbacks):
            for key, value in wanted.items():
                wrong = not _LABEL_KEY.fullmatch(key) or not _LABEL_WANTED.fullmatch(value)
                yield wrong, f"{key}: {value} is no label: write {{key: value}}, 'in(a, b)' or '!a'"


def _labeled(labels: Mapping[str, str], wanted: Mapping[str, str]) -> bool:
    for key, value in wanted.items():
        inner = value.removeprefix("!")
        values = inner[3:-1].split(",") if inner.startswith("in(") else [inner]
        if (labels.get(key) in {one.strip() for one in values}) == value.startswith("!"):
            return False
    return True


class PrepareConfig(Section):
    """Where images come from and how they are checked while the manifest is written."""

    splits: tuple[str, ...] = setting(("train", "test"), "HICO splits to read")
    split: str = setting("train", "split of images whose source does not name one")
    follow_symlinks: bool = setting(True, "follow links to folders (loops are cut)")
    column: str | None = setting(
        None, "column of a Parquet file that holds the images' bytes; found if not set"
    )
    headers: bool = setting(
        True, "look at every image's header: bad ones are found early, and sizes are known"
    )
    workers: int = execution(16, "threads that read image headers and shards", ge=1, le=256)
    local_images: int = execution(
        10_000,
        "so few are looked at in the driver's process, and more on Ray; a shard counts as 500",
        ge=0,
    )
    nodes: NodesConfig = execution(NodesConfig(), "that look at the images of a large one")


class ImagesConfig(Section):
    """Limits of image decoding; what breaks them is quarantined with the reason."""

    max_pixels: int = setting(200_000_000, "larger images are refused", ge=1)
    min_side: int = setting(8, "smaller images are refused, pixels", ge=1)
    max_side: int = setting(2048, "longer sides are downscaled to this, pixels", ge=16)


class RegionsConfig(Section):
    """Which regions of an image the teacher looks at."""

    whole: bool = setting(True, "the whole image is a region")
    grid_scales: tuple[float, ...] = setting(
        (0.7, 0.5), "side of a crop, as a share of the image's"
    )
    grid_steps: tuple[int, ...] = setting((2, 3), "crops along each side, one number a scale")
    boxes: str | None = setting(None, "HICO-DET json, COCO json or Parquet, path or URI")
    detector: str | None = setting(None, "transformers object detector: hub id or path")
    detector_revision: str | None = setting(None, "pinned revision of the detector")
    detector_threshold: float = setting(0.3, "lowest score of a box", ge=0.0, le=1.0)
    detector_labels: tuple[str, ...] | None = setting(
        None, "what a zero-shot detector looks for; if not set, person and all objects"
    )
    person_labels: tuple[str, ...] = setting(
        ("person", "man", "woman", "boy", "girl", "child"),
        "labels that count as a person; all others are objects",
    )
    unions: bool = setting(True, "boxes around a person and an object together")
    persons: bool = setting(True, "boxes around a person, with context")
    margins: tuple[float, ...] = setting(
        (0.2,),
        "context around person and union boxes, as a share of their sides; each margin is a region",
    )
    nms_iou: float = setting(0.7, "boxes of one label that overlap more are merged", gt=0.0, le=1.0)
    max_pairs: int = setting(12, "most person-object pairs of an image", ge=1)
    min_side: int = setting(16, "smaller crops are left out, pixels", ge=1)
    max_regions: int = setting(64, "most regions of an image", ge=1)
    budget: int | None = setting(None, "most regions of the whole run, shared evenly", ge=1)

    def _contradictions(self) -> Iterator[tuple[object, str]]:
        scales, steps, margins = self.grid_scales, self.grid_steps, self.margins
        in_range = bool(margins) and all(0 <= margin <= 4 for margin in margins)
        some = self.whole or scales or self.boxes or self.detector
        yield (
            len(scales) != len(steps),
            "grid_scales and grid_steps must have one entry a scale each",
        )
        yield not all(0 < scale <= 1 for scale in scales), "grid_scales must lie in (0, 1]"
        yield min(steps, default=1) < 1, "grid_steps must be at least 1"
        yield not in_range, "margins needs at least one number, each in [0, 4]"
        yield len(set(margins)) != len(margins), "margins must not repeat"
        yield not some, "no region is left: set whole=true or name a grid scale"


class CaptionConfig(Section):
    """How captions are written."""

    decoding: Literal["greedy", "beam", "sample"] = setting("greedy", "how tokens are chosen")
    count: int = setting(1, "captions of a region (beam and sample)", ge=1, le=64)
    num_beams: int = setting(4, "beams of beam search", ge=1, le=64)
    temperature: float = setting(1.0, "of sampling", gt=0.0)
    top_p: float = setting(0.9, "nucleus of sampling", gt=0.0, le=1.0)
    max_tokens: int = setting(30, "longest caption, in tokens", ge=1)
    seed: int = setting(0, "of sampling, mixed with the image and region", ge=0)

    def _contradictions(self) -> Iterator[tuple[object, str]]:
        several = self.decoding == "greedy" and self.count != 1
        yield several, f"count={self.count} needs decoding=beam or decoding=sample"
        too_many = self.decoding == "beam" and self.count > self.num_beams
        yield too_many, f"count={self.count} is more than num_beams={self.num_beams}"


class RequestsConfig(Section):
    """How `label.teacher.engine=vllm` or `openai` is asked."""

    max_concurrency: int | None = setting(
        None, "requests in flight of one actor; if not set, 64 to an endpoint, 256 in vLLM", ge=1
    )
    timeout: float = setting(120.0, "seconds that an endpoint has for an answer", gt=0.0)
    retries: int = setting(
        6, "of a request that met 429, a 5xx, silence or a broken connection", ge=0
    )
    key_variable: str = setting(
        "OPENAI_API_KEY",
        "environment variable that holds the endpoint's key, on every node",
        pattern=r"^[A-Za-z_][A-Za-z0-9_]*$",
    )
    price_in: float | None = setting(None, "of a million tokens read, in your currency", ge=0.0)
    price_out: float | None = setting(None, "of a million tokens written", ge=0.0)


OPEN_CLIP = "open_clip:"  # what a teacher's model begins with that is one of open_clip
_CAPTIONER_SETTINGS = (
    "mode", "captions", "instruction", "append_eos", "length_normalize", "template_reduction",
)  # fmt: skip


class TeacherConfig(Section):
    """The captioner that scores class prompts on regions."""

    model: str = setting(
        "builtin:world_captioner",
        "hub id, path, builtin:NAME, open_clip:NAME/TAG or import:MODULE:CLASS",
    )
    revision: str | None = setting(None, "pinned revision of a hub model")
    engine: Literal["transformers", "vllm", "openai"] = setting(
        "transformers",
        "what runs the model: this package, vLLM in the actors, or an OpenAI-compatible endpoint;"
        " the last two for mode=captions and mode=questions",
    )
    endpoint: str | None = setting(
        None, "base URL of engine=openai, such as http://host:8000/v1; `model` is its name there"
    )
    engine_options: dict[str, Any] = setting(
        {}, "arguments of vLLM's engine, or more fields of every request to an endpoint"
    )
    image_format: Literal["jpeg", "png"] = setting(
        "jpeg", "how regions are sent to an endpoint: jpeg of quality 95, or png without loss"
    )
    requests: RequestsConfig = execution(RequestsConfig(), "how the other engines are asked")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = setting(
        "auto",
        "of weights and activations; auto: bfloat16 where every GPU has it, else float16, float32"
        " on CPUs, and what the run's earlier passes had",
    )
    instruction: str | None = setting(
        None, "what a chat model is asked, or how the sentence begins; the family's own if not set"
    )
    mode: Literal["prompts", "captions", "questions"] = setting(
        "prompts",
        "score the class prompts, or write captions and find the classes in them, or ask of each"
        " class whether it is shown, and compare `yes` to `no`",
    )
    question: str = setting(
        "Answer yes or no. Does this image show {}?",
        "of mode=questions; {} is what the class's sentence shows, best near the end",
    )
    object_bound: float | None = setting(
        None,
        "with mode=questions, ask for objects first, and about their classes only where the"
        " object's log odds are at least this",
    )
    pad_to_square: Literal["auto", "always", "never"] = setting(
        "auto", "pad regions to squares; `auto` where the model's processor cuts off their ends"
    )
    max_pixels: int | None = setting(
        None, "larger regions are shrunk to so many pixels before a chat model reads them", ge=1024
    )
    prompt_templates: int = setting(1, "templates of a class that are scored and combined", ge=1)
    template_reduction: Literal["log_mean_exp", "mean", "max"] = setting(
        "mean", "how the templates become one score"
    )
    append_eos: bool = setting(False, "score the end of the sentence too")
    length_normalize: bool = setting(False, "divide log-likelihoods by their token counts")
    search: Literal["all", "top_k"] = setting(
        "all", "score every class, or exactly the best top_k of a region, skipping hopeless prompts"
    )
    top_k: int = setting(30, "classes of a region that search=top_k scores", ge=1)
    search_alpha: float = setting(0.0, "prior_alpha that search=top_k ranks with", ge=0.0, le=2.0)
    background: Literal["general", "none"] = setting(
        "general", "score sentences about other things too, so that a region may show no class"
    )
    prior: Literal["plain", "sample", "none"] = setting(
        "plain", "images that log P(prompt) is estimated on: plain ones, or a sample of the run"
    )
    null_images: int = setting(3, "plain images of prior=plain", ge=1)
    prior_sample: int = setting(64, "images of prior=sample", ge=1)
    captions: bool = setting(False, "also write captions of every region")
    caption: CaptionConfig = CaptionConfig()
    trust_remote_code: bool = setting(False, "run code that comes with the model")
    max_batch_regions: int = execution(64, "regions in one forward", ge=1)
    prompt_batch: int = execution(64, "prompts in one forward without a trie", ge=1)
    workspace_mib: int | None = execution(
        None,
        "memory for a group of regions; if not set, 192 on a CPU, a quarter of a GPU's free memory",
        ge=16,
    )

    def _contradictions(self) -> Iterator[tuple[object, str]]:
        yield from self._engine_contradictions()
        top_k, no_prior = self.search != "all", self.prior == "none"
        yield (
            top_k and self.length_normalize,
            "length_normalize=true needs search=all: a branch of the prompt tree can be left early"
            " only while sums of log-probabilities can but fall",
        )
        alpha = self.search_alpha
        yield alpha and no_prior, f"search_alpha={alpha} needs a prior: prior=plain"
        other = self.mode != "prompts"
        yield top_k and other, f"mode={self.mode} scores no prompts: use search=all"
        yield self.question.count("{}") != 1, f"question={self.question!r} must hold {{}} once"
        objects = self.object_bound is not None and self.mode != "questions"
        yield objects, f"object_bound={self.object_bound} needs mode=questions"
        fields = type(self).model_fields
        for name in _CAPTIONER_SETTINGS if self.model.startswith(OPEN_CLIP) else ():
            value = getattr(self, name)
            told = f"{name}={value} is for captioners, not for model={self.model}: leave it out"
            yield value != fields[name].default, told

    def _engine_contradictions(self) -> Iterator[tuple[object, str]]:
        engine, remote = f"engine={self.engine}", self.engine == "openai"
        address = urlsplit(self.endpoint or "")
        yield remote and self.endpoint is None, "engine=openai needs endpoint, a base URL"
        yield self.endpoint and not remote, f"endpoint={self.endpoint} needs engine=openai"
        web = address.scheme in {"http", "https"} and address.hostname
        yield self.endpoint and not web, f"endpoint={self.endpoint} must begin with http(s)://HOST"
        yield (
            address.username or address.query,
            "endpoint must hold no user, key or query: keys come from the environment",
        )
        if self.engine == "transformers":
            yield self.engine_options, "engine_options needs engine=vllm or engine=openai"
            return
        yield (
            self.mode == "prompts",
            f"{engine} serves mode=captions and mode=questions. For mode=prompts it would read the"
            " image anew with every prompt, about 190 times the tokens of engine=transformers",
        )
        yield self.caption.decoding == "beam", f"{engine} has no caption.decoding=beam: use sample"
        packaged = self.model.startswith((OPEN_CLIP, "builtin:", "import:"))
        named = "the endpoint's name of it" if remote else "a hub id or a folder"
        yield packaged, f"{engine} does not run model={self.model}: give {named}"


class PoolConfig(Section):
    """An actor pool of Ray Data."""

    min_size: int = setting(1, "fewest actors", ge=1)
    max_size: int = setting(1, "most actors", ge=1)
    num_gpus: AutoNumber = setting(
        "auto", "GPUs of an actor; auto: as many as the model needs where the cluster has them"
    )
    num_cpus: float = setting(1.0, "CPUs of an actor without a GPU", ge=0.0)
    memory_gib: float | None = setting(None, "memory that an actor reserves", gt=0)
    threads: int = setting(1, "torch threads of an actor", ge=1)
    tasks_in_flight: int = setting(3, "batches queued at an actor, so that it never waits", ge=1)
    nodes: NodesConfig = NodesConfig()
    decode_nodes: NodesConfig = NodesConfig()

    @property
    def gpus(self) -> float:
        """GPUs of an actor; none as long as `engine.devices` has not chosen for `auto`."""
        return 0.0 if self.num_gpus == "auto" else self.num_gpus

    @property
    def actor_cpus(self) -> float:
        """Logical CPUs that an actor holds: Ray gives one to every actor that asks for a GPU."""
        return 1.0 if self.gpus else self.num_cpus

    def _contradictions(self) -> Iterator[tuple[object, str]]:
        yield self.max_size < self.min_size, "max_size must be at least min_size"


class LabelConfig(Section):
    """The teacher pass: manifest in, region_scores out."""

    splits: tuple[str, ...] = setting(("train",), "splits of the manifest to label")
    images: ImagesConfig = ImagesConfig()
    regions: RegionsConfig = RegionsConfig()
    teacher: TeacherConfig = TeacherConfig()
    limit: int | None = setting(None, "label only a seeded sample of so many images", ge=1)
    limit_seed: int = setting(0, "of that sample", ge=0)
    pool: PoolConfig = execution(PoolConfig(), "the teacher's actors")
    batch_images: int = execution(16, "images given to an actor at a time", ge=1)
    block_rows: int = execution(64, "most images between two commits: what a crash can cost", ge=1)
    decode_memory_gib: float | None = execution(None, "memory that a decoding task reserves", gt=0)
    max_attempts: int = execution(2, "workers an image may kill before it is quarantined", ge=1)
    transient_retries: int = execution(3, "retries of storage errors that may pass", ge=0)


# Settings of the filter that say nothing about how one pass's regions are read.
_OF_ALL_PASSES = {
    "positive_threshold", "negative_threshold", "per_class_quantile", "quantile_floor",
    "min_support", "max_positives_per_image", "overrides", "passes", "combine",
    "local_images", "nodes",
}  # fmt: skip


class PassConfig(Section):
    """One of several teacher passes that the filter combines."""

    scores: str = setting(..., "its folder, its key, or the model that scored")
    weight: float = setting(1.0, "how much it counts beside the others; 0 leaves it out", ge=0.0)
    settings: dict[str, Any] = setting({}, "settings of `filter` that are other ones for it")


class FilterConfig(Section):
    """From regional log-likelihoods to positives, ignored and negatives."""

    region_kinds: tuple[str, ...] | None = setting(None, "region kinds that count; all if not set")
    margins: tuple[float, ...] | None = setting(None, "context margins that count; all if not set")
    prior: Literal["teacher", "sample"] = setting(
        "teacher",
        "log P(t): what `label.teacher.prior` stored, or the mean over the run's own regions",
    )
    prior_alpha: float = setting(0.5, "alpha in log P(t|r) - alpha log P(t)", ge=0.0, le=2.0)
    temperature: float = setting(1.0, "of the softmax over classes", gt=0.0)
    background: bool = setting(
        True, "a class must be likelier than the stored background sentences together"
    )
    null_score: float | None = setting(None, "log-likelihood of an extra option `none of these`")
    aggregation: Literal["max", "mean", "top_k_mean", "noisy_or"] = setting(
        "top_k_mean", "how a class's regions become one probability"
    )
    top_k: int = setting(2, "regions that top_k_mean averages", ge=1)
    positive_threshold: float = setting(0.5, "lowest probability of a positive", ge=0.0, le=1.0)
    negative_threshold: float = setting(
        0.1, "probabilities below are negatives; what lies between is ignored", ge=0.0, le=1.0
    )
    per_class_quantile: float | None = setting(0.98, "lowers a class's threshold", gt=0.0, lt=1.0)
    quantile_floor: float = setting(0.2, "but never below this probability", ge=0.0, le=1.0)
    min_support: int = setting(1, "regions that must agree on a positive", ge=1)
    support_threshold: float = setting(0.2, "probability at which a region agrees", ge=0.0, le=1.0)
    max_positives_per_image: int = setting(
        8, "the most probable are kept, the others ignored", ge=1
    )
    overrides: str | None = execution(None, "corrections by people, from `hts import-labels`")
    passes: tuple[PassConfig, ...] | None = execution(
        None,
        "teacher passes that are combined: `all` of the run, or a list of keys, models or folders,"
        " each alone or as {scores, weight, settings}; if not set, the latest alone",
    )
    combine: Literal["geometric", "mean"] = execution(
        "geometric",
        "how the probabilities of several passes become one: the mean of odds, or of them",
    )
    local_images: int = execution(50_000, "so few are filtered without Ray", ge=0)
    nodes: NodesConfig = execution(NodesConfig(), "that filter more on Ray")

    @field_validator("passes", mode="before")
    @classmethod
    def _named(cls, value: Any) -> Any:
        """Let a name stand for a pass without settings of its own."""
        if isinstance(value, str | int):
            value = [value]
        if not isinstance(value, list | tuple):
            return value
        return [{"scores": str(item)} if isinstance(item, str | int) else item for item in value]

    def of_pass(self, one: PassConfig) -> FilterConfig:
        """Return the settings that a pass's regions are read with; ValueError for wrong ones."""
        values = self.model_dump() | {"passes": None, "overrides": None} | one.settings
        return FilterConfig.model_validate(values)

    def _contradictions(self) -> Iterator[tuple[object, str]]:
        low, high = self.negative_threshold, self.positive_threshold
        message = f"negative_threshold must not be above positive_threshold ({low} > {high})"
        yield low > high, message
        for one in self.passes or ():
            wrong = sorted(set(one.settings) & _OF_ALL_PASSES)
            yield wrong, f"passes: {', '.join(wrong)} is set for all passes together, in filter"
            try:
                self.of_pass(one)
            except ValidationError as error:
                first = error.errors()[0]
                name = ".".join(map(str, first["loc"]))
                told = f"{name} = {first['input']!r}: {first['msg']}"
                yield True, f"passes: settings of {one.scores}: {told}"


class StudentConfig(Section):
    """The CLIP image encoder and its cosine classifier."""

    model: str = setting(
        "builtin:world_clip", "open_clip name, hf-hub:..., local-dir:PATH or builtin:NAME"
    )
    pretrained: str | None = setting(None, "open_clip pretrained tag or a local weights file")
    image_size: int | None = setting(None, "pixels; if not set, the model's own", ge=16)
    feature_space: Literal["projected", "backbone"] = setting(
        "projected", "where the cosine is taken; `backbone` is before proj, as in the paper"
    )
    prompt_templates: int = setting(5, "templates averaged into a class", ge=1)
    logit_scale: float = setting(100.0, "factor of the cosine; exp(4.61) in the paper", gt=0.0)
    precision: Literal["no", "bf16", "fp16"] = setting("no", "mixed precision of Accelerate")

    @field_validator("precision", mode="before")
    @classmethod
    def _unquoted_no(cls, value: Any) -> Any:
        return "no" if value is False else value  # YAML reads a bare `no` as false


class OptimConfig(Section):
    """AdamW and its schedule."""

    lr: float = setting(1.5e-5, "learning rate of the trunk", gt=0.0)
    head_lr: float | None = setting(None, "of the classifier; if not set, lr", gt=0.0)
    layer_decay: float = setting(1.0, "factor of the rate from block to block", gt=0.0, le=1.0)
    weight_decay: float = setting(0.0, "of matrices; vectors have none", ge=0.0)
    warmup_steps: int = setting(0, "steps in which the rate rises from 0", ge=0)
    schedule: Literal["constant", "cosine", "warm_restarts"] = setting(
        "cosine", "of the rate after the warm-up"
    )
    restart_epochs: int = setting(5, "period of warm_restarts, epochs", ge=1)
    grad_clip: float | None = setting(1.0, "largest gradient norm", gt=0.0)


class AugmentConfig(Section):
    """Augmentations of the training images."""

    flip: bool = setting(True, "mirror half of the images")
    crop_scale: tuple[float, float] = setting((0.7, 1.0), "area of the random crop, as a share")
    crop_ratio: tuple[float, float] = setting((0.7, 1.3), "aspect ratio of the random crop")
    color_jitter: float = setting(0.4, "strength for brightness and contrast", ge=0.0, le=1.0)

    def _contradictions(self) -> Iterator[tuple[object, str]]:
        scale, ratio = self.crop_scale, self.crop_ratio
        is_share = 0 < scale[0] <= scale[1] <= 1
        yield not is_share, "crop_scale must be (low, high) with 0 < low <= high <= 1"
        yield not 0 < ratio[0] <= ratio[1], "crop_ratio must be (low, high) with 0 < low <= high"


# Field of TrainConfig -> parameter, of each loss that has some of its own.
_LOSS_SETTINGS = {
    "weighted_bce": {"positive_weight": "positive_weight"},
    "focal": {"focal_gamma": "gamma", "focal_alpha": "alpha"},
    "asl": {"asl_gamma_neg": "gamma_neg", "asl_gamma_pos": "gamma_pos", "asl_clip": "clip"},
}


class FeaturesConfig(Section):
    """Computing image features once, for `train.trainable=head` and for sweeps."""

    pool: PoolConfig = PoolConfig()
    batch_images: int = setting(64, "images given to an actor at a time", ge=1)
    local_images: int = setting(2000, "so few need no Ray where the pool has no GPU", ge=0)
    memory_gib: float = setting(4.0, "train.trainable=head reads more than this from disk", ge=0)


class TrainConfig(Section):
    """Fine-tuning of the student."""

    labels: Literal["pseudo", "annotations", "none"] = setting(
        "pseudo", "HTS, supervised upper bound, or zero-shot"
    )
    split: str = setting("train", "split of the manifest to train on")
    soft_labels: bool = setting(False, "a positive pseudo-label weighs its probability in the loss")
    validation_split: str | None = execution(None, "annotated split whose mAP is only measured")
    validate_every: int = execution(1, "epochs between these measurements", ge=1)
    loss: Literal["lse_sign", "bce", "weighted_bce", "focal", "asl"] = setting(
        "lse_sign", "LSE-sign is the paper's"
    )
    loss_temperature: float = setting(1.0, "logits are divided by it", gt=0.0)
    positive_weight: float = setting(10.0, "weight of a positive, loss=weighted_bce", gt=0.0)
    focal_gamma: float = setting(2.0, "how fast right answers fade, loss=focal", ge=0.0)
    focal_alpha: float | None = setting(
        0.25, "share of positives, loss=focal; null: weigh as the negatives", gt=0.0, lt=1.0
    )
    asl_gamma_neg: float = setting(4.0, "gamma of negatives, loss=asl", ge=0.0)
    asl_gamma_pos: float = setting(0.0, "gamma of positives, loss=asl", ge=0.0)
    asl_clip: float = setting(0.05, "shift of the negatives, loss=asl", ge=0.0, lt=1.0)
    class_balance: float = setting(
        0.0, "classes weigh (positives) ** -class_balance", ge=0.0, le=1.0
    )
    center_images: int = setting(
        0,
        "images of the split whose mean logits are kept with the student, for predict.center",
        ge=0,
    )
    epochs: int = setting(10, "passes over the images", ge=1)
    batch_size: int = setting(128, "images of an optimizer step, over all workers", ge=1)
    accumulation: int = execution(1, "forward passes of a step: less memory for activations", ge=1)
    trainable: Literal["all", "head", "last"] = setting(
        "all",
        "what learns: `last` is the last trainable_blocks; `head` is the classifier, fitted in the"
        " driver's process on stored features, of `augment` with the flip only",
    )
    trainable_blocks: int = setting(1, "blocks of trainable=last", ge=1)
    learn_logit_scale: bool = setting(False, "starting from student.logit_scale")
    ema_decay: float | None = setting(
        None, "of a moving average of the weights: 0.999", gt=0.0, lt=1.0
    )
    min_positives_per_class: int = setting(0, "repeat images until each class has so many", ge=0)
    optim: OptimConfig = OptimConfig()
    augment: AugmentConfig = AugmentConfig()
    num_workers: int = execution(1, "Ray Train workers; 0 trains inside the driver process", ge=0)
    use_gpu: AutoBool = execution("auto", "a GPU for each worker; auto: where there are so many")
    cpus_per_worker: AutoNumber = execution(
        "auto",
        "logical CPUs that a worker holds, and its torch threads; auto: one, and without a GPU its"
        " share of the node's cores as threads",
    )
    nodes: NodesConfig = execution(NodesConfig(), "that the workers run on; without fallbacks")
    images_kept: Literal["auto", "pixels", "bytes", "none"] = execution(
        "auto",
        "what stays in the object store between epochs: decoded images, their files, or nothing;"
        " auto: the first that fits into a third of it",
    )
    decode_tasks: int | None = execution(
        None, "images decoded at the same time for each worker; null: free CPUs", ge=1
    )
    features: FeaturesConfig = execution(FeaturesConfig(), "for trainable=head")
    gradient_checkpointing: bool = execution(False, "less memory: compute activations twice")
    compile: bool = execution(False, "torch.compile the image tower")
    max_failures: int = execution(3, "worker failures to survive", ge=0)
    checkpoint_every: int = execution(1, "epochs between checkpoints", ge=1)
    checkpoint_every_steps: int | None = execution(None, "in steps, within an epoch", ge=1)
    loggers: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = execution(
        ("tensorboard",), "where curves go"
    )
    log_every: int = execution(10, "steps between logged losses", ge=1)

    @property
    def gpu(self) -> bool:
        """Whether a worker has a GPU; not as long as `engine.devices` has not chosen for `auto`."""
        return self.use_gpu is True

    @property
    def weighs_labels(self) -> bool:
        """Whether positives weigh their probability: annotations have none."""
        return self.soft_labels and self.labels == "pseudo"

    @property
    def worker_cpus(self) -> float:
        """Logical CPUs that a worker holds."""
        return 1.0 if self.cpus_per_worker == "auto" else self.cpus_per_worker

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

    def _contradictions(self) -> Iterator[tuple[object, str]]:
        yield self.cpus_per_worker == 0, "cpus_per_worker must be above 0"
        yield self.nodes.fallbacks, "nodes.fallbacks: Ray Train knows none; set nodes.labels alone"
        for loss, settings in _LOSS_SETTINGS.items():
            for name in settings if loss != self.loss else ():
                value = getattr(self, name)
                plain = type(self).model_fields[name].default
                yield (
                    value != plain,
                    f"{name}={value} has no effect with loss={self.loss}: set loss={loss}, or"
                    f" {name}={plain}",
                )


class PredictConfig(Section):
    """Scoring images with a student."""

    split: str | None = setting("test", "split of the manifest; all if not set")
    center: bool = setting(
        False,
        "take off each class's mean logit, and let an image's classes share its probability: scores"
        " are its logarithms; for images that show one class each",
    )
    images: ImagesConfig = ImagesConfig()
    pool: PoolConfig = execution(PoolConfig(), "the student's actors")
    batch_images: int = execution(64, "images given to an actor at a time", ge=1)


class ScoreConfig(Section):
    """Scoring a teacher's regions with a student."""

    pool: PoolConfig = execution(PoolConfig(), "the student's actors")
    batch_images: int = execution(16, "images given to an actor at a time", ge=1)
    batch_regions: int = execution(64, "regions in one forward", ge=1)


class RangeConfig(Section):
    """What one setting may be in a sweep: a range, or choices."""

    low: float | None = setting(None, "smallest number")
    high: float | None = setting(None, "largest number")
    log: bool = setting(False, "draw evenly in the logarithm")
    choices: tuple[Any, ...] | None = setting(None, "values to choose from; may hold null")

    def _contradictions(self) -> Iterator[tuple[object, str]]:
        low, high = self.low, self.high
        if self.choices is not None:
            alone = low is None and high is None and not self.log
            message = "give choices: [...] with a value or more, or low and high"
            yield not (self.choices and alone), message
        else:
            ordered = low is not None and high is not None and low < high
            yield not ordered, "give low and high, with low below high, or choices: [...]"
            yield self.log and (low or 0.0) <= 0, f"log: true needs low above 0, not {low}"


class SweepConfig(Section):
    """Which settings of the filter and the training are tried, and how the best is chosen."""

    trials: int = setting(100, "settings to try, the run's own first", ge=1)
    train: Literal["head", "full"] = setting(
        "head",
        "what a trial trains: the classifier on stored features, or students in full on Ray Train's"
        " workers; any setting of filter, train and student can then be tried",
    )
    search: Literal["random", "optuna"] = setting(
        "random", "optuna learns from earlier trials (`pip install hts-ray[optuna]`)"
    )
    space: dict[str, RangeConfig] | None = setting(
        None,
        "setting: {low, high, log} or {choices}; if not set, settings of the filter, the loss's"
        " temperature and the classifier's rate",
    )
    objective: str | None = setting(
        None,
        "what is compared, see docs/sweep.md; if not set, blended_ap, or mAP_validation with a"
        " validation set",
    )
    validation: str | None = setting(None, "labeled images to compare on: a manifest or anno.mat")
    finalists: int = setting(3, "best trials to train in full, beside the run's own", ge=0)
    repeats: int = setting(3, "seeds that a trial is averaged over, train=head", ge=1)
    reduction: float = setting(3.0, "one trial in so many goes on to more seeds or epochs", gt=1.0)
    max_images: int | None = setting(
        None,
        "images that trials see: a sample, each class as often as can be; all if not set",
        ge=2,
    )
    seed: int = setting(0, "of the drawn settings, the sample and the held-out images", ge=0)
    concurrency: int | None = execution(None, "trials at a time; all CPUs if not set", ge=1)

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

    check_images: bool = setting(True, "open every image's header, leave out unreadable ones")
    region_boxes: bool = setting(True, "boxes of the regions that support a label")
    boxes_per_label: int = setting(3, "most boxes of a label", ge=1)
    image_url_prefix: str | None = setting(None, "what replaces image_root in URLs")
    image_root: str | None = setting(None, "what was prepared, if not set")
    shard_images: int = setting(5000, "images of a WebDataset shard or hub folder", ge=1, le=10_000)
    workers: int = setting(16, "threads that read images", ge=1, le=256)


class RayConfig(Section):
    """How the driver joins or starts Ray."""

    address: str | None = setting(None, "`auto` or host:port; if not set, a local cluster")
    num_cpus: int | None = setting(None, "logical CPUs of a local cluster", ge=1)
    num_gpus: int | None = setting(None, "logical GPUs of a local cluster", ge=0)
    shared_paths: tuple[str, ...] = setting((), "folders all nodes see at the same path: NFS")
    autoscaling: bool | None = setting(None, "whether nodes come on demand; found out if not set")
    object_store_gib: float | None = setting(
        None, "of a local cluster; Ray's choice if not set", ge=0.1
    )
    gpu_hour_price: float | None = execution(
        None, "in your currency; no estimate if not set", gt=0.0
    )
    log_format: Literal["text", "json"] = execution(
        "text", "of logs; json: a line each, with run and stage"
    )


class HtsConfig(Section):
    """All stages."""

    run_dir: str = execution("runs/default", "where every stage writes")
    seed: int = setting(0, "of training, and of what has no seed of its own", ge=0)
    classes: ClassesConfig = ClassesConfig()
    prepare: PrepareConfig = PrepareConfig()
    label: LabelConfig = LabelConfig()
    filter: FilterConfig = FilterConfig()
    student: StudentConfig = StudentConfig()
    train: TrainConfig = TrainConfig()
    predict: PredictConfig = PredictConfig()
    score: ScoreConfig = ScoreConfig()
    sweep: SweepConfig = SweepConfig()
    export: ExportConfig = execution(ExportConfig(), "exports")
    ray: RayConfig = execution(RayConfig(), "the cluster")

    @property
    def labeling(self) -> LabelConfig:
        """The teacher pass; `open_clip:student` is replaced by the model that `student` names."""
        if self.label.teacher.model != f"{OPEN_CLIP}student":
            return self.label
        model, weights = self.student.model, self.student.pretrained
        name = model if ":" in model else model.replace("/", "-")
        named = f"{OPEN_CLIP}{name}" + (f"/{weights}" if weights else "")
        teacher = self.label.teacher.model_copy(update={"model": named})
        return self.label.model_copy(update={"teacher": teacher})

    def to_yaml(self) -> str:
        """Return the whole configuration as YAML that `--config` reads back."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)
