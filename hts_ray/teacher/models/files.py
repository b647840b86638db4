"""Where the files of a model are, a local folder or a hub's cache; their check and their hash.

For captioners and detectors alike. `refuse` makes the ConfigError that names the setting, of a
message and a remedy.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hts_ray.errors import ConfigError

logger = logging.getLogger(__name__)

# Larger files are hashed by name and size only: reading them would take too long.
HASHED_BYTES = 64 << 20
# What a model needs on disk, and what its fingerprint covers.
MODEL_FILES = ("*.json", "*.txt", "*.model", "*.jinja", "*.safetensors")
# Seconds before each new attempt at a hub that failed.
RETRY_WAITS = (1.0, 4.0, 16.0)
Refuse = Callable[..., ConfigError]
_COMMIT = re.compile(r"[0-9a-f]{40}")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


def local_folder(name: str, refuse: Refuse) -> Path | None:
    """Return the folder that a name leads to, None for a hub id; `refuse` makes the error."""
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.is_absolute() or not _HUB_ID.fullmatch(name):
        raise refuse("no such folder", "give a folder made by save_pretrained, or a hub id")
    return None


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
    """Return whether a snapshot has its settings, its tokenizer and all of its weights."""
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
    """Return whether an error of the network or the server may pass."""
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    if constants.HF_HUB_OFFLINE:
        return False
    if isinstance(error, LocalEntryNotFoundError):  # raised for an unreachable hub
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


def folder_fingerprint(folder: Path) -> str:
    """Return a folder's name and a hash of the model files in it; see `model_fingerprint`."""
    digest = hashlib.sha256()
    for path in sorted({path for pattern in MODEL_FILES for path in folder.rglob(pattern)}):
        size = path.stat().st_size
        digest.update(f"{path.relative_to(folder)}:{size};".encode())
        if size < HASHED_BYTES:
            digest.update(path.read_bytes())
    return f"{folder.name}@{digest.hexdigest()[:12]}"
