"""The packaged models of the built-in world: a captioner and a CLIP."""

from __future__ import annotations

from pathlib import Path

BUILTIN = "builtin:"
_FOLDER = Path(__file__).parent


def builtin_folder(name: str, config_file: str) -> Path:
    """Return the folder of the packaged model `builtin:NAME` that has `config_file`.

    Raises FileNotFoundError naming the models that there are.
    """
    known = sorted(path.parent for path in _FOLDER.glob(f"*/{config_file}"))
    for folder in known:
        if folder.name == name.removeprefix(BUILTIN):
            return folder
    names = ", ".join(BUILTIN + folder.name for folder in known)
    raise FileNotFoundError(f"no packaged model {name!r}: there are {names}")
