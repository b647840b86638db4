"""What travels to the cluster with a job: code and small settings, never data.

The files of the working directory that no ignore file and no rule below leaves out, and this very
package, become one zip whose bytes depend on nothing but their contents, so that an unchanged
directory is uploaded once. Data belongs on storage that every node sees.
"""

from __future__ import annotations

import os
import stat
import zipfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from pathspec import GitIgnoreSpec

import hts_ray
from hts_ray.errors import ConfigError
from hts_ray.images.folder import EXTENSIONS as IMAGES

IGNORE_FILES = (".gitignore", ".rayignore")
MIB = 1 << 20
_PACKAGE = "hts_ray"
_FOLDERS = (
    ".git/", ".venv*/", "venv/", "__pycache__/", ".*_cache/", ".hypothesis/", "*.egg-info/",
    "node_modules/", "/runs/", "/ray_results/",
)  # fmt: skip
_WEIGHTS = (".safetensors", ".pt", ".pth", ".ckpt", ".bin", ".onnx", ".gguf", ".h5", ".pkl")
_TABLES = (".parquet", ".arrow", ".npy", ".npz", ".mat", ".tfrecord", ".lance")
_ARCHIVES = (".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".zst", ".7z", ".whl")
_MEDIA = (".mp4", ".mkv", ".avi", ".mov", ".webm", ".wav", ".mp3", ".flac")
_EPOCH = (1980, 1, 1, 0, 0, 0)  # the earliest date that a zip can tell


@dataclass(frozen=True)
class Shipped:
    """A file to ship: where it lies, its path inside the job's directory, its size in bytes."""

    source: Path
    name: str
    size: int


def files_to_ship(root: Path) -> list[Shipped]:
    """Return the files of a working directory and of this package, sorted by name.

    Left out are what `.gitignore` and `.rayignore` name (those of the folders above up to the
    repository's root count too), version control, environments, caches, run directories, and
    images, weights, tables, archives and media by their extensions. A later line wins, and
    `.rayignore` over `.gitignore`, so that `!weights/tiny.safetensors` there ships that file.
    Raises ConfigError when `root` is no folder.
    """
    root = root.resolve()
    if not root.is_dir():
        raise ConfigError(field="--working-dir", value=str(root), remedy="give a folder")
    rules = [_Rules(root, _default_rules()), *_rules_above(root)]
    found = {file.name: file for file in _walk(root, root, rules)}
    found.update((file.name, file) for file in _package_files())
    return [found[name] for name in sorted(found)]


def check_size(files: Sequence[Shipped], limit_mib: float) -> float:
    """Return the files' size in MiB; ConfigError, naming the largest, when it is over the limit."""
    size = sum(file.size for file in files) / MIB
    if size <= limit_mib:
        return size
    folders: Counter[str] = Counter()
    for file in files:
        folders[file.name.partition("/")[0]] += file.size
    largest = sorted(files, key=lambda file: file.size, reverse=True)[:5]
    listed = ", ".join(f"{file.name} {file.size / MIB:.1f}" for file in largest)
    heaviest = ", ".join(f"{name} {total / MIB:.1f}" for name, total in folders.most_common(3))
    raise ConfigError(
        f"{len(files)} files of {size:.1f} MiB would be uploaded, the limit is {limit_mib:g} MiB."
        f" Most is in {heaviest}; the largest files are {listed}",
        field="--working-dir",
        remedy="name what the job does not need in .rayignore, keep data on shared storage, or"
        " raise --max-upload",
    )


def write_zip(files: Sequence[Shipped], target: Path) -> None:
    """Write a zip whose bytes are the same for the same names, contents and execute bits."""
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in files:
            entry = zipfile.ZipInfo(file.name, _EPOCH)
            entry.compress_type = zipfile.ZIP_DEFLATED
            executable = file.source.stat().st_mode & stat.S_IXUSR
            entry.external_attr = (0o755 if executable else 0o644) << 16
            archive.writestr(entry, file.source.read_bytes())


class _Rules:
    """The lines of one ignore file, which speak of paths below the folder that it lies in."""

    def __init__(self, folder: Path, lines: Sequence[str]) -> None:
        self.folder = folder
        self._spec = GitIgnoreSpec.from_lines(lines)

    def verdict(self, path: Path, is_folder: bool) -> bool | None:
        """Return whether a path is left out, None where no line speaks of it."""
        name = path.relative_to(self.folder).as_posix() + ("/" if is_folder else "")
        return self._spec.check_file(name).include


def _default_rules() -> list[str]:
    data = {*IMAGES, *_WEIGHTS, *_TABLES, *_ARCHIVES, *_MEDIA}
    # Extensions of any case: a camera writes .JPG.
    return [*_FOLDERS, *(f"*{_any_case(extension)}" for extension in sorted(data))]


def _any_case(extension: str) -> str:
    return "".join(f"[{c}{c.upper()}]" if c.isalpha() else c for c in extension)


def _rules_above(root: Path) -> list[_Rules]:
    """Return the ignore files between the repository's root and the working directory."""
    above = []
    for folder in root.parents:
        above.append(folder)
        if (folder / ".git").exists():
            return [rules for parent in reversed(above) for rules in _rules_in(parent)]
    return []


def _rules_in(folder: Path) -> Iterator[_Rules]:
    for name in IGNORE_FILES:
        file = folder / name
        if file.is_file():
            lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
            yield _Rules(folder, lines)


def _walk(root: Path, folder: Path, rules: Sequence[_Rules]) -> Iterator[Shipped]:
    here = [*rules, *_rules_in(folder)]
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except PermissionError as error:
        raise ConfigError(
            field="--working-dir",
            value=str(folder),
            remedy=f"cannot be read ({error.strerror}): name it in .rayignore",
        ) from error
    for entry in entries:
        path, is_folder = Path(entry.path), entry.is_dir(follow_symlinks=False)
        if _left_out(path, is_folder, here) or (folder == root and entry.name == _PACKAGE):
            continue
        if is_folder:
            if not _is_environment(path) and not _is_run(path):
                yield from _walk(root, path, here)
        elif entry.is_file():  # also a link to a file; not a pipe, nor a link to nothing
            name = path.relative_to(root).as_posix()
            yield Shipped(path, name, entry.stat().st_size)


def _left_out(path: Path, is_folder: bool, rules: Sequence[_Rules]) -> bool:
    verdicts = [rule.verdict(path, is_folder) for rule in rules]
    return next((verdict for verdict in reversed(verdicts) if verdict is not None), False)


def _is_environment(folder: Path) -> bool:
    return (folder / "pyvenv.cfg").is_file() or (folder / "conda-meta").is_dir()


def _is_run(folder: Path) -> bool:
    return (folder / "provenance.json").is_file() and (folder / "config.yaml").is_file()


def _package_files() -> Iterator[Shipped]:
    """Yield this package with its models and presets, so that the job runs the code at hand."""
    package = Path(hts_ray.__file__).resolve().parent
    for path in sorted(package.rglob("*")):
        name = PurePosixPath(_PACKAGE, path.relative_to(package).as_posix())
        if path.is_file() and "__pycache__" not in name.parts:
            yield Shipped(path, str(name), path.stat().st_size)
