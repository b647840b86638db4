"""What travels to the cluster with a job: code and small settings, never data.

The files of the working directory and this package become one zip. Its bytes depend on nothing but
their contents, so that an unchanged directory is uploaded once. Data belongs on storage that every
node sees.
"""

from __future__ import annotations

import itertools
import os
import stat
import zipfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

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
_ENVIRONMENT = ("pyvenv.cfg", "conda-meta")
_RUN = ("provenance.json", "config.yaml")
_EPOCH = (1980, 1, 1, 0, 0, 0)  # the earliest date that a zip can tell


@dataclass(frozen=True)
class Shipped:
    """A file to ship: where it lies, its path inside the job's directory, its size in bytes."""

    source: Path
    name: str
    size: int


def files_to_ship(root: Path) -> list[Shipped]:
    """Return the files of a working directory and of this package, sorted by name.

    Left out are:

    - what `.gitignore` and `.rayignore` name, also those of the folders above up to the
      repository's root; a later line wins, and `.rayignore` over `.gitignore`, so that
      `!weights/tiny.safetensors` there ships that file;
    - version control, environments, caches and run directories;
    - images, weights, tables, archives and media, by their extensions.

    Raises ConfigError when `root` is no folder or holds one that cannot be read.
    """
    root = root.resolve()
    if not root.is_dir():
        raise ConfigError(field="--working-dir", value=str(root), remedy="give a folder")
    data = sorted({*IMAGES, *_WEIGHTS, *_TABLES, *_ARCHIVES, *_MEDIA})
    rules = [(root, GitIgnoreSpec.from_lines([*_FOLDERS, *(f"*{ending}" for ending in data)]))]
    above = list(itertools.takewhile(lambda p: not (p / ".git").exists(), root.parents))
    if len(above) < len(root.parents):  # inside a repository, whose root is the next one
        for folder in reversed([*above, root.parents[len(above)]]):
            rules += _rules_in(folder)
    package = Path(hts_ray.__file__).resolve().parent
    found = [
        *_files(root, root, rules),
        *(Shipped(path, f"{_PACKAGE}/{path.relative_to(package).as_posix()}", path.stat().st_size)
          for path in package.rglob("*") if path.is_file() and "__pycache__" not in path.parts),
    ]  # fmt: skip
    return sorted(found, key=lambda file: file.name)


def _rules_in(folder: Path) -> Iterator[tuple[Path, GitIgnoreSpec]]:
    for file in (folder / name for name in IGNORE_FILES):
        if file.is_file():
            lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
            yield folder, GitIgnoreSpec.from_lines(lines)


def _files(
    root: Path, folder: Path, rules: Sequence[tuple[Path, GitIgnoreSpec]]
) -> Iterator[Shipped]:
    """Yield the files below a folder that no rule leaves out; the nearest rule decides."""
    rules = [*rules, *_rules_in(folder)]
    try:
        entries = list(os.scandir(folder))
    except PermissionError as error:
        raise ConfigError(
            field="--working-dir",
            value=str(folder),
            remedy=f"cannot be read ({error.strerror}): name it in .rayignore",
        ) from error
    for entry in entries:
        path, is_folder = Path(entry.path), entry.is_dir(follow_symlinks=False)
        if path == root / _PACKAGE or _left_out(path, is_folder, rules):
            continue
        if is_folder and not any((path / name).exists() for name in _ENVIRONMENT):
            if not all((path / name).is_file() for name in _RUN):
                yield from _files(root, path, rules)
        elif entry.is_file():  # also a link to a file; not a pipe, nor a link to nothing
            yield Shipped(path, path.relative_to(root).as_posix(), entry.stat().st_size)


def _left_out(path: Path, is_folder: bool, rules: Sequence[tuple[Path, GitIgnoreSpec]]) -> bool:
    defaults = rules[0][1]
    for folder, spec in reversed(rules):
        # A camera writes .JPG.
        named = path.with_suffix(path.suffix.lower()) if spec is defaults else path
        name = named.relative_to(folder).as_posix() + ("/" if is_folder else "")
        verdict = spec.check_file(name).include
        if verdict is not None:
            return verdict
    return False


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
