"""Files that ship inside the package."""

from __future__ import annotations

from pathlib import Path

_FOLDER = Path(__file__).resolve().parent


def asset_path(name: str) -> Path:
    """Return the path of a packaged file or folder.

    `name` may contain `/` but must stay inside the package. Raises FileNotFoundError naming
    the files that exist.
    """
    path = (_FOLDER / name).resolve()
    if path.is_relative_to(_FOLDER) and path.exists():
        return path
    found = sorted(
        file.relative_to(_FOLDER).as_posix()
        for file in _FOLDER.rglob("*")
        if file.is_file() and file.suffix not in (".py", ".pyc")
    )
    raise FileNotFoundError(f"no packaged file {name!r}: there are {', '.join(found) or 'none'}")
