"""What a teacher is: something that gives log P(sentence | region), and how one is found.

This module needs neither torch nor Ray, so that a driver can name, hash and plan a teacher
without loading it; models live in `hts_ray.teacher.pretrained`.

Shape legend: R regions, P prompts, C classes, H x W pixels.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from hts_ray.assets import asset_path
from hts_ray.config import TeacherConfig
from hts_ray.errors import ConfigError

Pixels = npt.NDArray[np.uint8]
FloatArray = npt.NDArray[np.float32]

BUILTIN = "builtin:"
DUMMY = "builtin:dummy"
FIELD = "label.teacher.model"
# Larger weights are told apart by name and size: hashing them would cost more than it tells.
HASHED_BYTES = 64 << 20
NULL_IMAGE_SIDE = 64
# What a model needs on disk, and what its fingerprint covers.
MODEL_FILES = ("*.json", "*.txt", "*.model", "*.jinja", "*.safetensors")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")

# model_type in config.json: what is supported of it, and how its prompts are scored.
FAMILIES = {
    "blip": "BLIP captioning (trie)",
    "git": "GIT (trie)",
    "vision-encoder-decoder": "VisionEncoderDecoder (trie with BERT, RoBERTa or GPT-2 text)",
    "blip-2": "BLIP-2 with a decoder-only language model such as OPT (batched prompts)",
}


@dataclass(frozen=True, eq=False)
class PromptScores:
    """Scores of P prompts on R regions.

    `log_likelihoods` is (R, P) float32, sums of token log-probabilities in nats, at most 0.
    `token_counts` is (P,) int64, how many tokens were summed, an end token included.
    """

    log_likelihoods: FloatArray
    token_counts: npt.NDArray[np.int64]


@dataclass(frozen=True)
class Caption:
    """A greedy caption and its log-probability in nats, the end token included."""

    text: str
    log_probability: float


class Captioner(Protocol):
    """A teacher. Images are sequences of R uint8 arrays (H, W, 3), RGB, of any sizes."""

    def score(self, images: Sequence[Pixels], prompts: Sequence[str]) -> PromptScores:
        """Return log P(prompt | image) for every pair."""

    def caption(self, images: Sequence[Pixels], max_tokens: int) -> list[Caption]:
        """Return one greedy caption of at most `max_tokens` tokens an image."""


class DummyCaptioner:
    """A teacher that costs nothing: numbers drawn from hashes of the pixels and the prompts.

    For dry runs and load tests of everything around the teacher. The same image and
    prompt always get the same score, in (-40, -5).
    """

    def score(self, images: Sequence[Pixels], prompts: Sequence[str]) -> PromptScores:
        """Return pseudo-random log-likelihoods (R, P); a token is a word."""
        image_keys = np.array([_pixel_hash(image) for image in images], dtype=np.uint64)
        prompt_keys = np.array([zlib.crc32(p.encode()) for p in prompts], dtype=np.uint64)
        mixed = _mix(_mix(image_keys)[:, None] ^ prompt_keys[None, :])
        fraction = (mixed >> np.uint64(11)).astype(np.float64) / float(1 << 53)
        return PromptScores(
            log_likelihoods=(-5.0 - 35.0 * fraction).astype(np.float32),
            token_counts=np.array([len(prompt.split()) for prompt in prompts], dtype=np.int64),
        )

    def caption(self, images: Sequence[Pixels], max_tokens: int) -> list[Caption]:
        """Return the image's hash as its caption."""
        return [
            Caption(f"image {_pixel_hash(image):08x}"[: 4 * max_tokens], 0.0) for image in images
        ]


def _pixel_hash(image: Pixels) -> int:
    return zlib.crc32(image.tobytes())


def _mix(keys: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Scatter 64-bit keys (the finalizer of SplitMix64, Steele et al. 2014)."""
    with np.errstate(over="ignore"):
        keys = keys + np.uint64(0x9E3779B97F4A7C15)
        keys = (keys ^ (keys >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        keys = (keys ^ (keys >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return keys ^ (keys >> np.uint64(31))


@dataclass(frozen=True)
class ClassPrompts:
    """The prompts of C classes in one flat list.

    `texts` holds P prompts, class by class; `counts` (C,) how many each class has, at
    least 1.
    """

    texts: tuple[str, ...]
    counts: tuple[int, ...]

    @classmethod
    def of(cls, prompts: Sequence[Sequence[str]], templates: int) -> ClassPrompts:
        """Take the first `templates` prompts of every class, or all where it has fewer."""
        taken = [tuple(of_class[:templates]) for of_class in prompts]
        if not taken or any(not of_class for of_class in taken):
            raise ValueError("every class needs at least one prompt")
        return cls(
            texts=tuple(text for of_class in taken for text in of_class),
            counts=tuple(len(of_class) for of_class in taken),
        )

    def __len__(self) -> int:
        return len(self.counts)

    def fingerprint(self) -> str:
        """Return a hash of the prompts and of how they are shared out among classes."""
        text = json.dumps([self.texts, self.counts])
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def by_class(self, values: Sequence[Any]) -> list[list[Any]]:
        """Share out P values, one list a class."""
        ends = np.cumsum(self.counts).tolist()
        return [list(values[end - n : end]) for end, n in zip(ends, self.counts, strict=True)]


def class_scores(
    scores: PromptScores, prompts: ClassPrompts, *, length_normalize: bool = False
) -> FloatArray:
    """Average prompt scores (R, P) into class log-likelihoods (R, C).

    The average of a class's templates is log-mean-exp: the log-likelihood of a sentence
    drawn by picking one of the templates at random. One awkward template then costs a
    class at most log(templates), where a mean of log-likelihoods would let it decide.
    With `length_normalize` every prompt's sum is divided by its token count first.
    """
    values = scores.log_likelihoods.astype(np.float64)
    if length_normalize:
        values = values / scores.token_counts[None, :]
    counts = np.asarray(prompts.counts)
    if values.shape[1] != counts.sum():
        raise ValueError(f"{values.shape[1]} scores for {counts.sum()} prompts")
    starts = np.cumsum(counts) - counts
    with np.errstate(invalid="ignore"):  # NaN stays NaN; whoever reads the scores checks them
        sums: npt.NDArray[np.float64] = np.logaddexp.reduceat(values, starts, axis=1)
    averages: FloatArray = (sums - np.log(counts)).astype(np.float32)
    return averages


def score_classes(
    captioner: Captioner,
    images: Sequence[Pixels],
    prompts: ClassPrompts,
    *,
    length_normalize: bool = False,
) -> FloatArray:
    """Return log-likelihoods (R, C) of every class on every image; see `class_scores`."""
    scores = captioner.score(images, prompts.texts)
    return class_scores(scores, prompts, length_normalize=length_normalize)


def plain_images(count: int) -> list[Pixels]:
    """Return `count` images that show nothing: black, grey, white, then uniform noise."""
    shape = (NULL_IMAGE_SIDE, NULL_IMAGE_SIDE, 3)
    plain = [np.full(shape, value, dtype=np.uint8) for value in (0, 128, 255)]
    noise = [
        np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
        for seed in range(max(0, count - len(plain)))
    ]
    return [*plain, *noise][:count]


def prior_log_likelihoods(
    captioner: Captioner,
    prompts: Sequence[str] | ClassPrompts,
    null_images: int = 3,
    *,
    length_normalize: bool = False,
) -> FloatArray:
    """Estimate log P(t), what the language alone makes of a class, as (C,) float32.

    It is the log-mean-exp over plain images (VisualGPTScore, Lin et al. 2023, section 4).
    A plain list of prompts counts as one prompt a class. ValueError without an image.
    """
    if null_images < 1:
        raise ValueError("a prior needs at least one null image")
    if not isinstance(prompts, ClassPrompts):
        prompts = ClassPrompts.of([(prompt,) for prompt in prompts], 1)
    images = plain_images(null_images)
    scores = score_classes(captioner, images, prompts, length_normalize=length_normalize)
    total: npt.NDArray[np.float64] = np.logaddexp.reduce(scores.astype(np.float64), axis=0)
    return (total - math.log(len(images))).astype(np.float32)


def load_captioner(config: TeacherConfig, device: str = "cpu") -> Captioner:
    """Load the teacher that `config.model` names onto a torch device and check it.

    The name is a hub id, a local folder or `builtin:NAME`. Raises ConfigError naming
    label.teacher.model for a missing or incomplete model and for a family that is not
    supported.
    """
    if config.model == DUMMY:
        return DummyCaptioner()
    from hts_ray.teacher.pretrained import load_pretrained

    return load_pretrained(config, model_folder(config), device)


def model_error(config: TeacherConfig, message: str, remedy: str = "") -> ConfigError:
    """Return the ConfigError that names the teacher."""
    return ConfigError(message, field=FIELD, value=config.model, remedy=remedy)


def supported_families() -> str:
    """Return the supported families in words."""
    return "; ".join(FAMILIES.values())


def local_model_folder(config: TeacherConfig) -> Path | None:
    """Return the folder of a local or built-in model, None for a hub id.

    Raises ConfigError when a path or a built-in name leads nowhere.
    """
    if config.model.startswith(BUILTIN):
        try:
            return asset_path(f"{config.model.removeprefix(BUILTIN)}/config.json").parent
        except FileNotFoundError as error:
            raise model_error(config, str(error), f"name a built-in model, e.g. {DUMMY}") from None
    path = Path(config.model).expanduser()
    if path.is_dir():
        return path
    if path.is_absolute() or not _HUB_ID.fullmatch(config.model):
        raise model_error(
            config, "no such folder", "give a folder made by save_pretrained, or a hub id"
        )
    return None


def check_teacher(config: TeacherConfig) -> None:
    """Look at a local or built-in teacher's files without loading it; a hub id passes unread.

    Raises ConfigError as loading would, so that a driver can refuse before any worker starts.
    """
    if config.model != DUMMY and local_model_folder(config) is not None:
        model_folder(config)


def model_folder(config: TeacherConfig) -> Path:
    """Return the folder of a model that has passed a look at its files, downloading a hub id.

    Raises ConfigError when a file is missing, the family is not supported or the hub
    cannot be reached.
    """
    folder = local_model_folder(config) or _download(config)
    if not (folder / "config.json").is_file():
        raise model_error(config, f"{folder} holds no config.json", "use a transformers model")
    if not any(folder.glob("*.safetensors")):
        raise model_error(
            config,
            f"{folder} holds no .safetensors weights",
            "convert them with save_pretrained; pickled weights are not loaded",
        )
    settings = read_model_config(config, folder)
    family = settings.get("model_type")
    if family not in FAMILIES and not config.trust_remote_code:
        raise model_error(
            config, f"family {family!r} is not supported", f"supported: {supported_families()}"
        )
    return folder


def read_model_config(config: TeacherConfig, folder: Path) -> dict[str, Any]:
    """Return a model's config.json; ConfigError when it is not a JSON object."""
    try:
        settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise model_error(config, f"config.json is not readable: {error}") from None
    if not isinstance(settings, dict):
        raise model_error(config, "config.json is not an object")
    return settings


def _download(config: TeacherConfig) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    patterns = [*MODEL_FILES, "*.py"] if config.trust_remote_code else list(MODEL_FILES)
    try:
        return Path(
            snapshot_download(config.model, revision=config.revision, allow_patterns=patterns)
        )
    except (OSError, ValueError, HfHubHTTPError, HFValidationError) as error:
        raise model_error(
            config,
            f"not a local folder, and not to be had from the hub: {error}",
            "check the id and label.teacher.revision, or copy the model to a folder",
        ) from None


def model_fingerprint(config: TeacherConfig) -> str:
    """Return text that changes whenever the teacher may answer otherwise.

    Of a local or built-in model: a hash over its settings, tokenizer and weights (by content
    up to 64 MB a file, by name and size above). Of a hub id: `id@revision`, unread.
    """
    if config.model == DUMMY:
        return f"{DUMMY}@1"
    folder = local_model_folder(config)
    if folder is None:
        return f"{config.model}@{config.revision or 'main'}"
    digest = hashlib.sha256()
    for path in sorted({path for pattern in MODEL_FILES for path in folder.glob(pattern)}):
        size = path.stat().st_size
        digest.update(f"{path.name}:{size};".encode())
        if size < HASHED_BYTES:
            digest.update(path.read_bytes())
    return f"{folder.name}@{digest.hexdigest()[:12]}"
