"""Results that users name: written beside their final place and moved there in one step.

Nothing is overwritten unless the caller says so, and a folder is replaced only where it is an
earlier result of the same kind.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hts_ray.errors import ConfigError
from hts_ray.store import storage


def refuse_existing(output: str, *, replace: bool = False, marker: str = "") -> None:
    """Raise ConfigError when something is at `output` that must not be overwritten.

    With `replace`, a file may be overwritten, and a folder that holds the file `marker`.
    """
    kind = storage.kind(output)
    if kind == "NotFound":
        return
    if not replace:
        remedy = "remove it or choose another place" + (", or give --force" if marker else "")
        raise ConfigError(
            "something is there already", field="--output", value=output, remedy=remedy
        )
    if kind != "Directory":
        return
    if not marker or not storage.exists(storage.join(output, marker)):
        raise ConfigError(
            "this folder is no earlier result of this kind",
            field="--output",
            value=output,
            remedy="--force does not touch it: choose another place",
        )


@contextmanager
def new_output(
    output: str, *, replace: bool = False, marker: str = "", last: str = ""
) -> Iterator[Path]:
    """Give a local path to write a file or folder at, which becomes `output` after the block.

    Locally that is one rename. To remote storage it is copied, a folder's file `last` at the end.
    A block that fails leaves nothing. Raises ConfigError as `refuse_existing` does, and when
    nothing can be written there.
    """
    refuse_existing(output, replace=replace, marker=marker)
    target = None if storage.is_remote(output) else Path(storage.resolve(output)[1])
    try:
        if target is not None:
            target.parent.mkdir(parents=True, exist_ok=True)
        temporary = tempfile.TemporaryDirectory(
            prefix=".hts-", dir=None if target is None else target.parent
        )
    except OSError as error:
        raise ConfigError(field="--output", value=output, remedy=str(error)) from error
    with temporary as folder:
        made = Path(folder) / output.rstrip("/").rsplit("/", 1)[-1]
        yield made
        # It may have appeared meanwhile, and a rename would replace it.
        refuse_existing(output, replace=replace, marker=marker)
        if target is None:
            _upload(made, output, last)
            return
        before = Path(folder) / "replaced"  # goes with the temporary folder
        if target.exists():
            target.rename(before)
        try:
            made.rename(target)
        except OSError:
            if before.exists():
                before.rename(target)
            raise


def _upload(made: Path, output: str, last: str) -> None:
    storage.remove_tree(output)
    if made.is_file():
        storage.copy_in(made, output)
        return
    files = [path for path in made.rglob("*") if path.is_file()]
    for path in sorted(files, key=lambda path: (path.name == last, path)):
        storage.copy_in(path, storage.join(output, path.relative_to(made).as_posix()))
