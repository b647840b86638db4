"""The models that ship inside the package, for the built-in world."""

from __future__ import annotations

from pathlib import Path

BUILTIN = "builtin:"


def packaged_model(room: Path, name: str, config_file: str) -> Path:
    """Return the folder of the model `builtin:NAME` in a room's folder `builtin`.

    A model is a folder that has `config_file`. Raises FileNotFoundError naming those there are.
    """
    known = sorted(path.parent for path in room.glob(f"builtin/*/{config_file}"))
    for folder in known:
        if folder.name == name.removeprefix(BUILTIN):
            return folder
    names = ", ".join(BUILTIN + folder.name for folder in known)
    raise FileNotFoundError(f"no packaged model {name!r}: there are {names}")
