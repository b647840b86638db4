"""An open_clip model by its name, for student and teacher: found, checked, hashed and loaded.

Shapes: C classes, E features that images and texts share. torch and open_clip are imported inside
functions, because that takes seconds.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from hts_ray.errors import ConfigError
from hts_ray.store.packaged import BUILTIN, packaged_model

if TYPE_CHECKING:
    from torch import Tensor

LOCAL, HUB = "local-dir:", "hf-hub:"
_STUDENT_ROOM = Path(__file__).parents[1] / "student"  # which holds the packaged models
_CONFIG_FILE = "open_clip_config.json"
_ARCHITECTURES = "model_configs/*.json"
_TEXT_BATCH = 256
_UNREADABLE = (
    RuntimeError, ValueError, OSError, KeyError, pickle.UnpicklingError, SafetensorError,
)  # fmt: skip


def _architectures() -> dict[str, Path]:
    """Return open_clip's descriptions of its models, by name; its own list needs torch."""
    package = find_spec("open_clip")
    places = package.submodule_search_locations if package else None
    return {path.stem: path for place in places or () for path in Path(place).glob(_ARCHITECTURES)}


@dataclass(frozen=True)
class ClipModel:
    """An open_clip model that settings name.

    `model` is a name of open_clip, `hf-hub:ID`, `local-dir:PATH` or `builtin:NAME`; `pretrained` a
    tag of a named model or a file of weights. `field` and `weights_field` are the settings that
    errors name.
    """

    model: str
    pretrained: str | None = None
    field: str = "student.model"
    weights_field: str = "student.pretrained"

    def resolve(self) -> str:
        """Return open_clip's name of it: a known name, `hf-hub:...` or `local-dir:PATH`.

        Raises ConfigError for a model that is not there.
        """
        name = self.model
        if name.startswith(BUILTIN):
            try:
                name = LOCAL + str(packaged_model(_STUDENT_ROOM, name, _CONFIG_FILE))
            except FileNotFoundError as error:
                raise self._refused(str(error)) from error
        if name.startswith(LOCAL):
            folder = Path(name[len(LOCAL) :]).expanduser()
            if not (folder / _CONFIG_FILE).is_file():
                raise self._refused(f"{folder} has no {_CONFIG_FILE}")
            return f"{LOCAL}{folder.resolve()}"
        if name.startswith(HUB):
            return name
        name, known = name.replace("/", "-"), _architectures()
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
            remedy = f"did you mean {' or '.join(near)}?" if near else "see open_clip.list_models()"
            raise self._refused(remedy, "open_clip has no such model")
        return name

    def read_architecture(self) -> dict[str, Any] | None:
        """Return the architecture as a file here describes it, without torch; None of a hub's.

        Raises ConfigError for a model that is not there, or whose description is not readable.
        """
        name = self.resolve()
        if name.startswith(HUB):
            return None
        local = name.startswith(LOCAL)
        path = Path(name[len(LOCAL) :]) / _CONFIG_FILE if local else _architectures()[name]
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            described: dict[str, Any] = found["model_cfg"] if local else found
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise self._refused(f"its {path.name} cannot be read: {error}") from error
        return described

    def description(self) -> dict[str, Any]:
        """Return open_clip's description of the architecture; ConfigError when it is not to be had.

        OpenAI's weights lose accuracy under the plain GELU, so that the tag decides that too.
        """
        import open_clip

        name = self.resolve()
        try:
            found = open_clip.get_model_config(name)
        except Exception as error:  # a hub client raises many kinds, all of them mean the same
            raise self._refused(f"its {_CONFIG_FILE} cannot be read: {error}") from error
        if not isinstance(found, dict) or not {"embed_dim", "vision_cfg"} <= found.keys():
            raise self._refused(f"its {_CONFIG_FILE} lacks embed_dim or vision_cfg")
        if self.pretrained is not None and not name.startswith((LOCAL, HUB)):
            tag = open_clip.get_pretrained_cfg(name, self.pretrained)
            if tag.get("quick_gelu"):
                found["quick_gelu"] = True
        return found

    def check(self) -> str:
        """Return the name, if there are weights too: a start from random ones would only look bad.

        ConfigError where model or weights are not there.
        """
        name = self.resolve()
        if name.startswith((LOCAL, HUB)):
            if self.pretrained is not None:
                remedy = f"leave it out: {self.model} brings its own weights"
                raise ConfigError(field=self.weights_field, value=self.pretrained, remedy=remedy)
            return name
        import open_clip

        tags = open_clip.list_pretrained_tags_by_model(name)
        if self.pretrained is None or not (
            self.pretrained in tags or Path(self.pretrained).is_file()
        ):
            near = difflib.get_close_matches(str(self.pretrained), tags, n=1, cutoff=0.4)
            hint = f"did you mean {near[0]}? " if near else ""
            raise ConfigError(
                "neither a tag of the model nor a weights file",
                field=self.weights_field,
                value=str(self.pretrained),
                remedy=f"{hint}{name} has {', '.join(tags) or 'no tags: give a weights file'}",
            )
        return name

    def fingerprint(self) -> str:
        """Return a hash of the local files that it is loaded from; of a name, the name's.

        Raises ConfigError when they are not there.
        """
        name = self.resolve()
        digest = hashlib.sha256()
        if name.startswith(LOCAL):
            files = sorted(path for path in Path(name[len(LOCAL) :]).iterdir() if path.is_file())
        else:
            digest.update(f"{name} {self.pretrained}".encode())
            files = [path for path in [Path(self.pretrained or "")] if path.is_file()]
        for path in files:
            digest.update(path.name.encode())
            with open(path, "rb") as stream:
                while chunk := stream.read(1 << 22):
                    digest.update(chunk)
        return digest.hexdigest()[:16]

    def load(self) -> Any:
        """Return the model, in evaluation mode; ConfigError for weights that cannot be loaded."""
        import open_clip

        name = self.check()
        try:
            clip = open_clip.create_model(
                name,
                pretrained=self.pretrained,
                force_quick_gelu=bool(self.description().get("quick_gelu")),
                require_pretrained=True,
                weights_only=True,
            )
        except _UNREADABLE as error:
            source = self.pretrained or self.model
            raise ConfigError(
                f"the weights of {self.model} cannot be loaded from {source}",
                field=self.weights_field if self.pretrained else self.field,
                value=source,
                remedy=" ".join(str(error).split())[:300],
            ) from error
        return clip.eval()

    def tokenizer(self) -> Any:
        """Return what makes token ids (N, L) of texts."""
        import open_clip

        return open_clip.get_tokenizer(self.resolve())

    def _refused(self, remedy: str, problem: str = "") -> ConfigError:
        return ConfigError(problem, field=self.field, value=self.model, remedy=remedy)


def class_embeddings(clip: Any, tokenizer: Any, prompts: Sequence[Sequence[str]]) -> Tensor:
    """Return one unit vector a class, (C, E) float32: the mean direction of its prompts."""
    import torch
    from torch.nn.functional import normalize

    owned = [(c, text) for c, texts in enumerate(prompts) for text in texts]
    pieces = []
    device = next(clip.parameters()).device
    with torch.no_grad():
        for start in range(0, len(owned), _TEXT_BATCH):
            tokens = tokenizer([text for _, text in owned[start : start + _TEXT_BATCH]])
            pieces.append(normalize(clip.encode_text(tokens.to(device)).float(), dim=-1))
    embeddings = torch.cat(pieces)
    owners = torch.tensor([c for c, _ in owned], device=device)
    means = torch.stack([embeddings[owners == c].mean(dim=0) for c in range(len(prompts))])
    return normalize(means, dim=-1)
