"""What one machine reports of itself, for `hts doctor`. Runs on every node, and needs no Ray."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import re
import resource
import shutil
import socket
import stat
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import hts_ray
from hts_ray.errors import UserError
from hts_ray.store import storage
from hts_ray.store.provenance import command_output

# Packages that answer, pickle or write differently in another version.
SAME_EVERYWHERE = ("hts_ray", "ray", "torch", "transformers", "open_clip_torch", "pyarrow", "numpy")
_PROBE_FOLDER = ".hts-doctor"
_PROBE = b"hts doctor"


def node_facts(probe: str, names: Sequence[str] = ()) -> dict[str, Any]:
    """Return what this machine reports, JSON-able, sizes in bytes.

    `probe` is a file that the driver may have written: this machine writes, reads and removes one
    beside it. `names` are the packages whose versions are asked for.
    """
    folder = _existing_folder(probe)
    temporary = os.environ.get("RAY_TMPDIR") or f"{os.environ.get('TMPDIR', '/tmp')}/ray"  # noqa: S108
    return {
        "host": socket.gethostname(),
        "versions": _versions(names),
        "gpus": _gpus(),
        "torch": _torch_facts(),
        "shm": _space("/dev/shm"),  # noqa: S108
        "temporary": _space(temporary),
        "temporary_path": temporary,
        "files": resource.getrlimit(resource.RLIMIT_NOFILE),
        "run_dir": None if folder is None else _space(folder),
        "storage": probe_storage(probe),
        "sees_driver": _sees(probe),
        "object_store": None,
        "logical_gpus": None,
    }


def _versions(names: Sequence[str]) -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for name in {*names, *SAME_EVERYWHERE}:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    # Of this package the version that runs, which a job may have brought, not the installed one.
    return {**found, "python": platform.python_version(), "hts_ray": hts_ray.__version__}


def _gpus() -> list[dict[str, str]]:
    """Return name, memory and driver of the GPUs that the driver sees, and the newest CUDA."""
    listed = command_output(
        ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    )
    if not listed:
        return []
    newest = re.search(r"CUDA Version:\s*([\d.]+)", command_output(["nvidia-smi"]) or "")
    cuda = newest.group(1) if newest else ""
    rows = [[cell.strip() for cell in line.split(",")] for line in listed.splitlines()]
    names = ("name", "memory", "driver")
    return [{**dict(zip(names, row, strict=True)), "cuda": cuda} for row in rows if len(row) == 3]


def _torch_facts() -> dict[str, Any]:
    try:
        import torch
    except (ImportError, OSError) as error:  # OSError: a CUDA library that does not load
        return {"error": f"{type(error).__name__}: {error}"[:300]}
    available = torch.cuda.is_available()
    devices = torch.cuda.device_count() if available else 0
    return {"cuda_build": torch.version.cuda, "available": available, "devices": devices}


def _space(path: str) -> tuple[int, int] | None:
    """Return (total, free) bytes of the file system that a path is or will be on."""
    place = next((p for p in (Path(path), *Path(path).parents) if p.exists()), None)
    if place is None:
        return None
    usage = shutil.disk_usage(place)
    return usage.total, usage.free


def token_facts() -> dict[str, Any]:
    """Return where this process takes its token from, and whether others may read the file."""
    if os.environ.get("RAY_AUTH_TOKEN"):
        return {"source": "RAY_AUTH_TOKEN", "open": False}
    given = os.environ.get("RAY_AUTH_TOKEN_PATH")
    path = Path(given) if given else Path.home() / ".ray" / "auth_token"
    try:
        mode = path.stat().st_mode
    except OSError:
        return {"source": None, "open": False}
    return {"source": str(path), "open": bool(mode & (stat.S_IRWXG | stat.S_IRWXO))}


def probe_path(run_dir: str) -> str:
    """Return a new file's path below a run directory."""
    return storage.join(storage.absolute(run_dir), _PROBE_FOLDER, uuid.uuid4().hex)


@contextlib.contextmanager
def probe_file(probe: str) -> Iterator[None]:
    """Leave a file for the nodes to find, as far as storage lets this machine."""
    with _no_folders_left(probe):
        with contextlib.suppress(OSError, UserError):
            storage.write_bytes(probe, _PROBE)
        try:
            yield
        finally:
            with contextlib.suppress(OSError, UserError):
                storage.delete_file(probe)


def probe_storage(probe: str) -> dict[str, Any]:
    """Write, read and remove a file; returns the seconds, or the error and the step it came in."""
    path = f"{probe}-{socket.gethostname()}-{os.getpid()}"
    started, step = time.monotonic(), "write"
    with _no_folders_left(path):
        try:
            storage.write_bytes(path, _PROBE)
            step = "read"
            if storage.read_bytes(path) != _PROBE:
                return {"step": step, "error": "other bytes came back"}
            step = "delete"
            storage.delete_file(path)
        except (OSError, UserError) as error:
            reason = str(error).replace(path, "it") or type(error).__name__
            return {"step": step, "error": reason.removeprefix("it: ")}
    return {"seconds": time.monotonic() - started}


def _sees(path: str) -> bool:
    with contextlib.suppress(OSError, UserError):
        return storage.exists(path)
    return False


def _existing_folder(path: str) -> str | None:
    """Return the nearest folder above a local path that exists; None for a remote one."""
    if storage.is_remote(path):
        return None
    return next((str(p) for p in Path(storage.resolve(path)[1]).parents if p.is_dir()), None)


@contextlib.contextmanager
def _no_folders_left(path: str) -> Iterator[None]:
    """Remove the local folders that were made for a file, where they are empty in the end."""
    kept = _existing_folder(path)
    try:
        yield
    finally:
        if kept is not None:
            folder = Path(storage.resolve(path)[1]).parent
            with contextlib.suppress(OSError):  # another node's file is in it
                while folder != Path(kept) and Path(kept) in folder.parents:
                    folder.rmdir()
                    folder = folder.parent
