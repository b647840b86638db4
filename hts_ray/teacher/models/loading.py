"""How the teacher that a setting names is found, checked, hashed and loaded.

Needs neither torch nor Ray until a model is loaded, so that a driver can name, hash and refuse
a teacher cheaply; models live in `hts_ray.teacher.models.pretrained`.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import json
import logging
import math
import re
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from hts_ray.config import TeacherConfig
from hts_ray.errors import ConfigError
from hts_ray.teacher.builtin import BUILTIN, builtin_folder
from hts_ray.teacher.captioner import Captioner, DummyCaptioner

logger = logging.getLogger(__name__)

IMPORT = "import:"
DUMMY = f"{BUILTIN}dummy"
FIELD = "label.teacher.model"
# Larger weights are told apart by name and size: hashing them would cost more than it tells.
HASHED_BYTES = 64 << 20
# What a model needs on disk, and what its fingerprint covers.
MODEL_FILES = ("*.json", "*.txt", "*.model", "*.jinja", "*.safetensors")
# Seconds before each new attempt at a hub that failed.
RETRY_WAITS = (1.0, 4.0, 16.0)
# Makes the ConfigError that names the setting, from a message and a remedy.
Refuse = Callable[..., ConfigError]
_COMMIT = re.compile(r"[0-9a-f]{40}")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")

# model_type in config.json: what is supported of it, and how its prompts are scored. How each is
# fed is told in `hts_ray.teacher.models.families`. Prefix families with a text model that takes
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
    "kosmos-2": "Kosmos-2 (batched prompts)",
}


def load_captioner(config: TeacherConfig, device: str = "cpu") -> Captioner:
    """Load the teacher that `config.model` names onto a torch device and check it.

    `device` may be "auto" for a model that is laid out over all GPUs. The name is a hub id, a
    local folder, `builtin:NAME` or `import:MODULE:CLASS`. Raises ConfigError naming
    label.teacher.model for a missing or incomplete model and for a family that is not supported.
    """
    if is_dummy(config):
        return DummyCaptioner(_dummy_seconds(config))
    if config.model.startswith(IMPORT):
        return _load_imported(config, device)
    from hts_ray.teacher.models.pretrained import load_pretrained

    return load_pretrained(config, model_folder(config), device)


def is_dummy(config: TeacherConfig) -> bool:
    """Tell the dummy teacher: `builtin:dummy`, or `builtin:dummy:SECONDS` a region."""
    return config.model == DUMMY or config.model.startswith(f"{DUMMY}:")


def needs_torch(config: TeacherConfig) -> bool:
    """Tell whether the teacher is one of the packaged kinds that run on torch."""
    return not is_dummy(config) and not config.model.startswith(IMPORT)


def _dummy_seconds(config: TeacherConfig) -> float:
    text = config.model.removeprefix(DUMMY).removeprefix(":") or "0"
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < math.inf:
        raise model_error(config, f"{text!r} is no number of seconds", f"write {DUMMY}:0.02")
    return seconds


def _imported_class(config: TeacherConfig) -> Any:
    """Return the class that `import:MODULE:CLASS` names; ConfigError when there is none."""
    module_name, _, name = config.model.removeprefix(IMPORT).partition(":")
    try:
        found = getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise model_error(
            config,
            f"does not import: {error}",
            "write import:MODULE:CLASS, with MODULE importable on every node (PYTHONPATH, or"
            " beside the job's entry point)",
        ) from None
    missing = [
        method for method in ("score", "caption") if not callable(getattr(found, method, None))
    ]
    if missing:
        raise model_error(
            config,
            f"{name} has no method {' and no '.join(missing)}",
            "a teacher has the two methods of hts_ray.teacher.captioner.Captioner",
        )
    return found


def _load_imported(config: TeacherConfig, device: str) -> Captioner:
    teacher: Captioner = _imported_class(config)(config, device)
    return teacher


def model_error(config: TeacherConfig, message: str, remedy: str = "") -> ConfigError:
    """Return the ConfigError that names the teacher."""
    return ConfigError(message, field=FIELD, value=config.model, remedy=remedy)


def supported_families() -> str:
    """Say which families are supported, and how to add one."""
    return (
        f"Supported: {'; '.join(FAMILIES.values())}. For another, write a class with the two"
        " methods of a Captioner and name it import:MODULE:CLASS; see the documentation's"
        ' "Choose and write a teacher"'
    )


def local_model_folder(config: TeacherConfig) -> Path | None:
    """Return the folder of a local or built-in model, None for a hub id.

    Raises ConfigError when a path or a built-in name leads nowhere.
    """
    if config.model.startswith(BUILTIN):
        try:
            return builtin_folder(config.model, "config.json")
        except FileNotFoundError as error:
            raise model_error(config, str(error), f"name a built-in model, e.g. {DUMMY}") from None
    return local_folder(config.model, partial(model_error, config))


def local_folder(name: str, refuse: Refuse) -> Path | None:
    """Return the folder that a name leads to, None for a hub id; `refuse` makes the error."""
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.is_absolute() or not _HUB_ID.fullmatch(name):
        raise refuse("no such folder", "give a folder made by save_pretrained, or a hub id")
    return None


def check_teacher(config: TeacherConfig) -> None:
    """Look at a local or built-in teacher's files without loading it; a hub id passes unread.

    Raises ConfigError as loading would, so that a driver can refuse before any worker starts.
    """
    if is_dummy(config):
        _dummy_seconds(config)
    elif config.model.startswith(IMPORT):
        _imported_class(config)
    elif local_model_folder(config) is not None:
        model_folder(config)


def model_folder(config: TeacherConfig) -> Path:
    """Return the folder of a model that has passed a look at its files, downloading a hub id.

    Raises ConfigError when a file is missing, the family is not supported or the hub
    cannot be reached.
    """
    patterns = [*MODEL_FILES, "*.py"] if config.trust_remote_code else list(MODEL_FILES)
    refuse = partial(model_error, config)
    folder = local_model_folder(config) or download(
        config.model, config.revision, patterns, refuse, "label.teacher.revision"
    )
    settings = checked_settings(folder, refuse)
    family = settings.get("model_type")
    if family not in FAMILIES and not config.trust_remote_code:
        raise model_error(config, f"family {family!r} is not supported", supported_families())
    return folder


def checked_settings(folder: Path, refuse: Refuse) -> dict[str, Any]:
    """Return the config.json of a folder that has weights; raise `refuse(...)` where it has not."""
    if not (folder / "config.json").is_file():
        raise refuse(f"{folder} holds no config.json", "use a transformers model")
    if not any(folder.glob("*.safetensors")):
        raise refuse(
            f"{folder} holds no .safetensors weights",
            "convert them with save_pretrained; pickled weights are not loaded",
        )
    try:
        settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise refuse(f"config.json is not readable: {error}") from None
    if not isinstance(settings, dict):
        raise refuse("config.json is not an object")
    return settings


def download(
    name: str, revision: str | None, patterns: list[str], refuse: Refuse, revision_field: str
) -> Path:
    """Return a hub model's folder in the hub's cache, fetching what is not there.

    A full commit that lies there complete is taken without a look at the network. The hub's
    client locks every file, so that one actor of a node fetches and the others wait. Failures
    that may pass are tried again; then `refuse(...)` is raised, naming `revision_field`.
    """
    from huggingface_hub import snapshot_download

    def fetch(*, local: bool = False) -> Path:
        return Path(
            snapshot_download(
                name,
                revision=revision,
                allow_patterns=patterns,
                local_files_only=local,
            )
        )

    if revision is not None and _COMMIT.fullmatch(revision):
        with contextlib.suppress(OSError, ValueError):
            folder = fetch(local=True)
            if _is_complete(folder):
                return folder
    for wait in (*RETRY_WAITS, None):
        try:
            return fetch()
        except Exception as error:
            if wait is None or not _is_transient(error):
                raise refuse(
                    f"not a local folder, and not to be had from the hub: {error}",
                    f"check the id and {revision_field}, or copy the model to a folder",
                ) from error
            logger.warning("the hub failed, trying again in %g s: %s", wait, error)
            time.sleep(wait)
    raise AssertionError("the last attempt returns or raises")


def _is_complete(folder: Path) -> bool:
    """Tell whether a snapshot has its settings, its tokenizer and all of its weights."""
    index = folder / "model.safetensors.index.json"
    if not (folder / "config.json").is_file() or not any(folder.glob("*token*")):
        return False
    if index.is_file():
        try:
            shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (OSError, ValueError, KeyError, AttributeError):
            return False
        return all((folder / shard).is_file() for shard in shards)
    return (folder / "model.safetensors").is_file()


def _is_transient(error: Exception) -> bool:
    """Tell failures of network and server from answers that will not change."""
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    if constants.HF_HUB_OFFLINE:
        return False
    if isinstance(error, LocalEntryNotFoundError):  # how the client tells of an unreachable hub
        if not isinstance(error.__cause__, HfHubHTTPError):
            return True
        error = error.__cause__
    if isinstance(error, HfHubHTTPError):
        status = getattr(error.response, "status_code", None)
        return status is None or status in {408, 425, 429} or status >= 500
    network = ("httpx", "requests", "urllib3")
    return isinstance(error, (ConnectionError, TimeoutError)) or type(error).__module__.startswith(
        network
    )


def model_fingerprint(config: TeacherConfig) -> str:
    """Return text that changes whenever the teacher may answer otherwise.

    Of a local or built-in model: a hash over its settings, tokenizer and weights (by content
    up to 64 MB a file, by name and size above). Of a hub id: `id@revision`, unread. Of a
    class of your own: a hash of its module's source.
    """
    if is_dummy(config):
        return f"{DUMMY}@1"
    if config.model.startswith(IMPORT):
        return _source_fingerprint(config)
    folder = local_model_folder(config)
    if folder is None:
        return f"{config.model}@{config.revision or 'main'}"
    return folder_fingerprint(folder)


def folder_fingerprint(folder: Path) -> str:
    """Return a folder's name and a hash of the model files in it; see `model_fingerprint`."""
    digest = hashlib.sha256()
    for path in sorted({path for pattern in MODEL_FILES for path in folder.rglob(pattern)}):
        size = path.stat().st_size
        digest.update(f"{path.relative_to(folder)}:{size};".encode())
        if size < HASHED_BYTES:
            digest.update(path.read_bytes())
    return f"{folder.name}@{digest.hexdigest()[:12]}"


def _source_fingerprint(config: TeacherConfig) -> str:
    module = sys.modules[_imported_class(config).__module__]
    source = getattr(module, "__file__", None)
    content = Path(source).read_bytes() if source else b""
    return f"{config.model}@{hashlib.sha256(content).hexdigest()[:12]}"
