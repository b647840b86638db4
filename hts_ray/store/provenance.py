"""What made a run: versions, code, inputs and hardware."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import hts_ray

_PACKAGES = (
    "ray", "torch", "torchvision", "transformers", "open_clip_torch", "accelerate", "pyarrow",
    "numpy", "pillow",
)  # fmt: skip


def versions() -> dict[str, str]:
    """Return the versions of Python, this package and the libraries that matter."""
    found = {"python": platform.python_version(), "hts_ray": hts_ray.__version__}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "missing"
    return found


def hardware() -> dict[str, Any]:
    """Return processor, cores, memory and GPUs of this machine."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    gpus = command_output(["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"])
    return {
        "processor": _processor(),
        "cores": usable_cores(),
        "memory_gib": round(memory / 2**30, 1),
        "gpus": (gpus or "").splitlines(),
    }


def usable_cores() -> int:
    """Return the number of cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):  # else the system does not say which cores are ours
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def git_commit() -> str | None:
    """Return the source tree's commit, with `+changes` if it is not clean; None outside git."""
    root = Path(hts_ray.__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    describe = ["describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+changes"]
    return command_output(["git", "-C", str(root), *describe])


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def command_output(command: list[str]) -> str | None:
    """Return what a command prints; None when it is not there, fails or hangs."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)  # noqa: S603
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
