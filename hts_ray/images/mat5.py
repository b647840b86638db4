"""MATLAB v5 files, read by scipy in a process of its own.

scipy's reader trusts the sizes in a file, and a damaged file can end its process with a
segmentation fault. So the bytes go to a child process, which sends back pickled arrays. A child
that dies, or takes too long, is an error like any other.
"""

from __future__ import annotations

import io
import os
import pickle
import subprocess
import sys
import warnings
from collections.abc import Sequence
from typing import Any

MAX_BYTES = 8 << 30  # of memory for the child; HICO's anno.mat needs 0.4 GB
_SECONDS = 600.0


class Mat5Error(ValueError):
    """A file that scipy cannot read."""


def read_mat5(data: bytes, names: Sequence[str]) -> dict[str, Any]:
    """Return the variables of these names as `scipy.io.loadmat` does; a file may lack some.

    Raises Mat5Error with the reason in one line.
    """
    command = [sys.executable, "-m", __name__, str(MAX_BYTES), *names]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    try:
        child = subprocess.run(  # noqa: S603
            command, input=data, capture_output=True, check=False, timeout=_SECONDS, env=environment
        )
    except subprocess.TimeoutExpired:
        raise Mat5Error(f"scipy needs more than {_SECONDS:g} s to read it") from None
    if child.returncode:
        reason = child.stderr.decode(errors="replace").strip().rpartition("\n")[2]
        raise Mat5Error(reason or f"scipy's process ended with {child.returncode}")
    variables: dict[str, Any] = pickle.loads(child.stdout)  # noqa: S301 - written by `_answer`
    return variables


def _answer(limit: int, names: Sequence[str]) -> None:
    """Read a file from standard input and write its variables to standard output."""
    import resource

    import scipy.io
    from scipy.io.matlab import MatReadWarning

    # A small compressed file can ask for any amount of memory.
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    # Among what scipy only warns of: a variable that is there twice.
    warnings.simplefilter("error", MatReadWarning)
    data = sys.stdin.buffer.read()
    try:
        # With a name that no file has, scipy reads to the end and finds what is damaged there.
        found = scipy.io.loadmat(io.BytesIO(data), variable_names=[*names, "\0"])
    except Exception as error:  # whatever a damaged file leads to
        sys.exit(" ".join(f"{type(error).__name__}: {error}".split()))
    kept = {name: found[name] for name in names if name in found}
    sys.stdout.buffer.write(pickle.dumps(kept, protocol=5))


if __name__ == "__main__":
    _answer(int(sys.argv[1]), sys.argv[2:])
