"""What the name of a teacher means: which model it is, whether it is supported, and its hash.

Needs neither torch nor Ray, so that a driver can name, hash and refuse a teacher cheaply.
"""

from __future__ import annotations

import json
import math
from importlib.util import find_spec
from pathlib import Path

from hts_ray.config import OPEN_CLIP, TeacherConfig
from hts_ray.engine.clip import HUB, LOCAL, ClipModel
from hts_ray.errors import ConfigError
from hts_ray.store.packaged import BUILTIN, packaged_model
from hts_ray.teacher.models.files import MODEL_FILES, HubClip, NamedModel
from hts_ray.teacher.plugins import is_own, own_class, own_fingerprint

DUMMY = f"{BUILTIN}dummy"
_ROOM = Path(__file__).parents[1]
FIELD = "label.teacher.model"

# model_type in config.json: what is supported of it, and how its prompts are scored. For the inputs
# of each see `hts_ray.teacher.models.families`. Prefix families with a text model that takes
# no tree mask (sliding windows, linear attention) score by batched prompts.
FAMILIES = {
    "blip": "BLIP captioning (trie)",
    "git": "GIT (trie)",
    "vision-encoder-decoder": (
        "VisionEncoderDecoder (trie with BERT, RoBERTa or GPT-2 text, else batched prompts)"
    ),
    "blip-2": "BLIP-2 (trie with OPT, batched prompts with T5)",
    "instructblip": "InstructBLIP (trie with Vicuna, batched prompts with T5)",
    "florence2": "Florence-2 (trie)",
    "paligemma": "PaliGemma (trie), PaliGemma 2 (batched prompts)",
    "llava": "LLaVA (trie)",
    "llava_onevision": "LLaVA-OneVision (trie)",
    "smolvlm": "SmolVLM (trie)",
    "idefics3": "Idefics3 (trie)",
    "qwen2_vl": "Qwen2-VL (trie)",
    "qwen2_5_vl": "Qwen2.5-VL (trie)",
    "qwen3_vl": "Qwen3-VL (trie)",
    "qwen3_vl_moe": "Qwen3-VL with experts (trie)",
    "qwen3_5": "Qwen3.5 (batched prompts)",
    "qwen3_5_moe": "Qwen3.5 with experts (batched prompts)",
    "llava_next": "LLaVA-NeXT (trie)",
    "internvl": "InternVL (trie)",
    "mistral3": "Mistral 3 (trie)",
    "gemma3": "Gemma 3 (batched prompts)",
    "mllama": "Llama 3.2 Vision (trie)",
    "kosmos-2": "Kosmos-2 (batched prompts)",
}

# Those that were taught to describe and not to answer, which mode=questions cannot ask.
ONLY_CAPTIONERS = {"blip", "git", "vision-encoder-decoder", "florence2", "kosmos-2"}
# Those that have no chat template.
NO_CHAT = ONLY_CAPTIONERS | {"blip-2", "instructblip", "paligemma"}

# What chat models are asked for a caption.
INSTRUCTION = "Describe the image in one sentence."

# What a family's processor, or an engine, needs besides this package's own requirements: module,
# extra.
EXTRAS = {
    "smolvlm": ("num2words", "hts-ray[smolvlm]"),
    "vllm": ("vllm", "hts-ray[vllm]"),
    "openai": ("openai", "hts-ray[openai]"),
}


def missing_extra(name: str | None) -> str:
    """Return what to install for a family of models or an engine; "" where nothing is missing."""
    module, extra = EXTRAS.get(name or "", ("", ""))
    return f"pip install '{extra}'" if module and not find_spec(module) else ""


def is_dummy(config: TeacherConfig) -> bool:
    """Return whether it is the dummy: `builtin:dummy`, or `builtin:dummy:SECONDS` a region."""
    return config.model == DUMMY or config.model.startswith(f"{DUMMY}:")


def is_remote(config: TeacherConfig) -> bool:
    """Return whether the model runs elsewhere, behind an endpoint."""
    return config.engine == "openai"


def needs_torch(config: TeacherConfig) -> bool:
    """Return whether the teacher is one of the packaged kinds that run on torch."""
    return not (is_remote(config) or is_dummy(config) or is_own(config))


def is_clip(config: TeacherConfig) -> bool:
    """Return whether the teacher is a model of open_clip, `open_clip:...`."""
    return config.model.startswith(OPEN_CLIP)


def clip_model(config: TeacherConfig) -> ClipModel:
    """Return the model that `open_clip:NAME/TAG`, or `open_clip:` and a folder, names.

    What `student.model` takes is taken too.
    """
    name, weights = config.model.removeprefix(OPEN_CLIP), None
    if Path(name).expanduser().is_dir() or name.startswith(("/", ".", "~")):
        name = f"{LOCAL}{name}"
    elif not name.startswith((LOCAL, HUB, BUILTIN)):
        name, _, tag = name.partition("/")  # a tag may be a file: open_clip:RN50//w/rn50.pt
        weights = tag or None
    return ClipModel(name, weights, field=FIELD, weights_field=FIELD)


def hub_clip(config: TeacherConfig) -> HubClip | None:
    """Return the files on the hub of an `open_clip:hf-hub:ID`, None of any other."""
    return HubClip.of(clip_model(config), config.revision, "label.teacher.revision")


def dummy_seconds(config: TeacherConfig) -> float:
    """Return how long the dummy teacher takes for a region."""
    text = config.model.removeprefix(DUMMY).removeprefix(":") or "0"
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < math.inf:
        raise model_error(config, f"{text!r} is no number of seconds", f"write {DUMMY}:0.02")
    return seconds


class TeacherModel(NamedModel):
    """The model that a teacher's settings name: a folder, a hub id or `builtin:NAME`."""

    @classmethod
    def of(cls, config: TeacherConfig) -> TeacherModel:
        """Return the model of these settings."""
        patterns = (*MODEL_FILES, "*.py") if config.trust_remote_code else MODEL_FILES
        return cls(config.model, config.revision, FIELD, "label.teacher.revision", patterns)

    def local(self) -> Path | None:
        """Return the folder that the name leads to, None for a hub id; ConfigError for neither."""
        if not self.name.startswith(BUILTIN):
            return super().local()
        try:
            return packaged_model(_ROOM, self.name, "config.json")
        except FileNotFoundError as error:
            raise self.error(str(error), f"name a built-in model, e.g. {DUMMY}") from None


def model_error(config: TeacherConfig, message: str, remedy: str = "") -> ConfigError:
    """Return the ConfigError that names the teacher."""
    return TeacherModel.of(config).error(message, remedy)


def supported_families() -> str:
    """Say which families are supported, and how to add one."""
    return (
        f"Supported: {'; '.join(FAMILIES.values())}; other chat models of image and text that"
        " transformers knows, if their scores pass. For another, write a class with the two"
        " methods of a Captioner and name it import:MODULE:CLASS, or install a package that offers"
        " it (`hts teachers` lists those that are); see the documentation's \"Choose and write a"
        ' teacher"'
    )


def check_teacher(config: TeacherConfig) -> None:
    """Look at a local or built-in teacher's files without loading it; a hub id passes unread.

    Raises ConfigError as loading would, so that a driver can refuse before any worker starts.
    """
    if extra := missing_extra(config.engine):
        message = f"engine={config.engine} needs another package on every node"
        raise ConfigError(message, field="label.teacher.engine", value=config.engine, remedy=extra)
    if is_remote(config):
        return
    if is_dummy(config):
        dummy_seconds(config)
    elif is_own(config):
        own_class(config)
    elif is_clip(config):
        clip_model(config).check()
    elif TeacherModel.of(config).local() is not None:
        model_folder(config)


def model_folder(config: TeacherConfig, *, weights: bool = True) -> Path:
    """Return the folder of a model that has passed a look at its files, downloading a hub id.

    Without `weights` as `NamedModel.files`. Raises ConfigError when a file is missing, the family
    is not supported or the hub cannot be reached.
    """
    folder, settings = TeacherModel.of(config).files(weights=weights)
    family = settings.get("model_type")
    if not (family in FAMILIES or config.trust_remote_code or _is_native(family)):
        raise model_error(config, f"family {family!r} is not supported", supported_families())
    if extra := missing_extra(family):
        raise model_error(config, f"family {family!r} needs another package", extra)
    if config.mode == "questions" and family in ONLY_CAPTIONERS:
        raise model_error(
            config,
            f"family {family!r} describes images and answers no questions (label.teacher.mode)",
            "set label.teacher.mode=prompts, or name a chat model, InstructBLIP, BLIP-2 or"
            " PaliGemma",
        )
    if config.engine == "vllm" and family in NO_CHAT:
        message = f"family {family!r} is no chat model, which label.teacher.engine=vllm is for"
        raise model_error(config, message, "set label.teacher.engine=transformers")
    return folder


def _is_native(family: str | None) -> bool:
    """Return whether transformers itself has a family of models of image and text."""
    from transformers.models.auto import modeling_auto

    return family in modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES


def pinned_teacher(config: TeacherConfig) -> TeacherConfig:
    """Return the settings with a hub id's revision as the commit that it names now."""
    if not needs_torch(config):
        return config
    model = hub_clip(config) if is_clip(config) else TeacherModel.of(config)
    commit = model and model.pinned()
    return config if commit is None else config.model_copy(update={"revision": commit})


def weights_gib(config: TeacherConfig, dtype: str) -> float | None:
    """Return the size of a local teacher's weights in a precision; None of any other.

    Counted from the headers of its safetensors files, so that nothing is loaded.
    """
    if is_clip(config) or not needs_torch(config):
        return None
    folder, numbers = TeacherModel.of(config).local(), 0
    try:
        for path in folder.glob("*.safetensors") if folder else ():
            with open(path, "rb") as stream:
                header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
            tensors = (entry for name, entry in header.items() if name != "__metadata__")
            numbers += sum(math.prod(tensor["shape"]) for tensor in tensors)
    except (OSError, ValueError, MemoryError, KeyError, TypeError):
        return None  # what is wrong with the file is told when it is loaded
    return numbers * (4 if dtype == "float32" else 2) / 2**30 if numbers else None


def model_fingerprint(config: TeacherConfig) -> str:
    """Return text that changes whenever the teacher may give other scores.

    See `own_fingerprint` for a class that is not packaged here, and `NamedModel` for a model.
    """
    if is_remote(config):
        return f"{config.endpoint}#{config.model}@{config.revision or ''}"
    if is_dummy(config):
        return f"{DUMMY}@1"
    if is_clip(config):
        hub = hub_clip(config)
        made_of = clip_model(config).fingerprint() if hub is None else config.revision or "main"
        return f"{config.model}@{made_of}"
    if is_own(config):
        return own_fingerprint(config)
    # Engines differ in rounding, so what one says is not what another says.
    engine = "" if config.engine == "transformers" else f"{config.engine}:"
    return f"{engine}{TeacherModel.of(config).fingerprint()}"
