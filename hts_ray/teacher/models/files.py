"""The files of a model in a local folder or a hub's cache: found, checked, hashed and loaded.

For captioners and detectors alike. Needs no torch until weights are loaded.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from hts_ray.engine.clip import HUB, ClipModel
from hts_ray.errors import ConfigError

logger = logging.getLogger(__name__)

# What a model needs on disk, and what its fingerprint covers.
MODEL_FILES = ("*.json", "*.txt", "*.model", "*.jinja", "*.safetensors")
CLIP_FILES = ("open_clip_config.json", "open_clip*.safetensors")
_WEIGHTS = (".safetensors", ".bin")
# Seconds before each new attempt at a hub that failed.
RETRY_WAITS = (1.0, 4.0, 16.0)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


@dataclass(frozen=True)
class NamedModel:
    """A model of the transformers library that a setting names: a local folder or a hub id.

    `field` is the setting and `revision_field` that of the revision, for the errors. `patterns`
    are the files to fetch from the hub.
    """

    name: str
    revision: str | None
    field: str
    revision_field: str
    patterns: tuple[str, ...] = MODEL_FILES

    def error(self, message: str, remedy: str = "") -> ConfigError:
        """Return the ConfigError that names the setting."""
        return ConfigError(message, field=self.field, value=self.name, remedy=remedy)

    def local(self) -> Path | None:
        """Return the folder that the name leads to, None for a hub id; ConfigError for neither."""
        path = Path(self.name).expanduser()
        if path.is_dir():
            return path
        if path.is_absolute() or not _HUB_ID.fullmatch(self.name):
            raise self.error("no such folder", "give a folder made by save_pretrained, or a hub id")
        return None

    def files(self, *, weights: bool = True) -> tuple[Path, dict[str, Any]]:
        """Return the folder and its config.json, downloading a hub id.

        Without `weights` these are not asked for, and a hub id must be `pinned`. Raises ConfigError
        when the hub cannot be reached, settings or weights are missing, or the settings are not
        readable.
        """
        folder = self.local() or (self._download() if weights else self._settings(True))
        path = folder / "config.json"
        if not path.is_file():
            raise self.error(f"{folder} holds no config.json", "use a transformers model")
        if weights and not any(folder.glob("*.safetensors")):
            raise self.error(
                f"{folder} holds no .safetensors weights",
                "convert them with save_pretrained; pickled weights are not loaded",
            )
        try:
            settings = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise self.error(f"config.json is not readable: {error}") from None
        if not isinstance(settings, dict):
            raise self.error("config.json is not an object")
        return folder, settings

    def fingerprint(self) -> str:
        """Return text that changes whenever the model may.

        Of a local model: its folder's name and a hash over settings, tokenizer and weights. Every
        byte counts, since weights that are trained on in place keep names and sizes; a command
        hashes once, which takes less time than loading. Of a hub id: `id@revision`, unread; a
        revision that does not change is had from `pinned`.
        """
        folder = self.local()
        if folder is None:
            return f"{self.name}@{self.revision or 'main'}"
        digest = hashlib.sha256()
        for path in sorted({path for pattern in MODEL_FILES for path in folder.rglob(pattern)}):
            digest.update(f"{path.relative_to(folder)}:{path.stat().st_size};".encode())
            with open(path, "rb") as stream:
                while chunk := stream.read(1 << 22):
                    digest.update(chunk)
        return f"{folder.name}@{digest.hexdigest()[:12]}"

    def load(self, kind: str, folder: Path, optional: Callable[[str], bool], **options: Any) -> Any:
        """Load the weights with an Auto class of transformers, from safetensors only.

        `optional` says which weights the files may lack. Raises ConfigError for others that they
        lack, and for files that do not load; torch.OutOfMemoryError passes.
        """
        import torch
        import transformers
        from transformers.utils import logging as library_logging

        library_logging.disable_progress_bar()
        options = {"local_files_only": True, "trust_remote_code": False, **options}
        try:
            model, loading = getattr(transformers, kind).from_pretrained(
                folder, use_safetensors=True, output_loading_info=True, **options
            )
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # damaged files and settings raise nearly every type
            raise self.error(f"does not load: {type(error).__name__}: {error}") from error
        # The library fills in random numbers.
        missing = sorted(key for key in loading["missing_keys"] if not optional(key))
        if missing:
            raise self.error(
                f"its files lack {len(missing)} weights, e.g. {missing[0]}", "save it again"
            )
        return model.eval().requires_grad_(False)

    def skeleton(self, kind: str, folder: Path, *, trust_remote_code: bool = False) -> Any:
        """Return the model of an Auto class without weights, on torch's meta device."""
        import torch
        import transformers

        trusted = {"trust_remote_code": trust_remote_code}
        try:
            config = transformers.AutoConfig.from_pretrained(
                folder, local_files_only=True, **trusted
            )
            with torch.device("meta"):
                model = getattr(transformers, kind).from_config(config, **trusted)
            if (folder / "generation_config.json").is_file():
                model.generation_config = transformers.GenerationConfig.from_pretrained(folder)
        except Exception as error:  # as in `load`
            raise self.error(f"does not load: {type(error).__name__}: {error}") from error
        return model

    def pinned(self) -> str | None:
        """Return the commit that the name means now, None for a local folder.

        A branch may move: a driver asks the hub once, and every node takes that commit. Settings
        and tokenizer are fetched too, so that the driver can check what it is asked. Where the hub
        does not answer, it is the commit of this machine's cache, which is said.
        """
        if self.local() is not None:
            return None
        if self.revision is not None and _COMMIT.fullmatch(self.revision):
            return self.revision
        from huggingface_hub import HfApi, constants

        ask = partial(HfApi().model_info, self.name, revision=self.revision, expand=["sha"])
        try:
            commit = str(self._from_hub(ask).sha)
            self._from_hub(self._settings)
            return commit
        except ConfigError as failure:
            cause = failure.__cause__
            if not constants.HF_HUB_OFFLINE and not (cause and _is_transient(cause)):
                raise
            try:
                commit = self._settings(local_files_only=True).name
            except (OSError, ValueError):
                raise failure from None
        logger.warning(
            "%s: commit %s of this machine's cache is taken for %s, as the hub was not asked or"
            " does not answer",
            self.name,
            commit,
            self.revision or "main",
        )
        return commit

    def _settings(self, local_files_only: bool = False) -> Path:
        """Return the folder in the hub's cache with everything but the weights."""
        from huggingface_hub import snapshot_download

        small = [pattern for pattern in self.patterns if not pattern.endswith(_WEIGHTS)]
        return Path(
            snapshot_download(
                self.name,
                revision=self.revision,
                allow_patterns=small,
                local_files_only=local_files_only,
            )
        )

    def _download(self) -> Path:
        """Return the model's folder in the hub's cache, fetching what is not there.

        A full commit that lies there complete is taken without a look at the network. The hub's
        client locks every file, so that one actor of a node fetches and the others wait.
        """
        from huggingface_hub import snapshot_download

        fetch = partial(
            snapshot_download, self.name, revision=self.revision, allow_patterns=[*self.patterns]
        )
        if self.revision is not None and _COMMIT.fullmatch(self.revision):
            with contextlib.suppress(OSError, ValueError):
                folder = Path(fetch(local_files_only=True))
                if _is_complete(folder):
                    return folder
        return Path(self._from_hub(partial(fetch, local_files_only=False)))

    def _from_hub(self, ask: Callable[[], Any]) -> Any:
        """Return the hub's answer; failures that may pass are tried again, a line each."""
        for wait in (*RETRY_WAITS, None):
            try:
                with _quiet_hub():
                    return ask()
            except Exception as error:
                if wait is None or not _is_transient(error):
                    raise self.error(
                        f"not a local folder, and not to be had from the hub: {_reason(error)}",
                        f"check the id and {self.revision_field}, copy the model to a folder and"
                        f" give its path, or {_offline_remedy()}",
                    ) from error
                logger.warning("the hub failed, again in %g s: %s", wait, _reason(error))
                time.sleep(wait)
        raise AssertionError("the last attempt returns or raises")


class HubClip(NamedModel):
    """A model of open_clip on the hub, `hf-hub:ID`."""

    @classmethod
    def of(cls, clip: ClipModel, revision: str | None, revision_field: str) -> HubClip | None:
        """Return the files of a model on the hub, None of one that is named otherwise."""
        if not clip.model.startswith(HUB):
            return None
        return cls(clip.model[len(HUB) :], revision, clip.field, revision_field, CLIP_FILES)

    def local(self) -> None:
        """Return None: a folder of that name is not meant."""

    def folder(self) -> Path:
        """Return the folder with the weights, fetching what is not there; old ones are pickled."""
        folder = self._download()
        if any(folder.glob(CLIP_FILES[1])):
            return folder
        return replace(self, patterns=("open_clip_config.json", "open_clip*.bin"))._download()


@contextlib.contextmanager
def _quiet_hub() -> Iterator[None]:
    """Keep the hub's client from telling of its own attempts: ours are told in a line each."""
    from huggingface_hub.utils import logging as hub_logging

    before = hub_logging.get_verbosity()
    hub_logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        hub_logging.set_verbosity(before)


def _reason(error: BaseException) -> str:
    """Say in one line why the hub gave nothing: its client's texts are paragraphs with requests."""
    from huggingface_hub import constants
    from huggingface_hub import errors as hub

    if constants.HF_HUB_OFFLINE and isinstance(error, (hub.LocalEntryNotFoundError, OSError)):
        return "HF_HUB_OFFLINE is set, and the hub's cache does not hold all of it"
    if isinstance(error, hub.LocalEntryNotFoundError) and error.__cause__ is not None:
        return _reason(error.__cause__)
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, hub.GatedRepoError):
        return f"access is gated: accept its terms there and set HF_TOKEN (status {status})"
    if isinstance(error, hub.RepositoryNotFoundError):
        return f"no such model, or a private one: then set HF_TOKEN (status {status})"
    if isinstance(error, hub.RevisionNotFoundError):
        return f"it has no such revision (status {status})"
    text = next(iter(str(error).splitlines()), "")
    return f"status {status}" if status else f"{type(error).__name__}: {text}".removesuffix(": ")


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


def _offline_remedy() -> str:
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return "unset HF_HUB_OFFLINE"
    return "set HF_HUB_OFFLINE=1 where the hub's cache holds it"


def _is_transient(error: BaseException) -> bool:
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
