"""Damages files in ways that can be repeated, and reads them under a time limit.

Every case is made from a number, which a failure prints with what was done to the file:
`HTS_FUZZ_FIRST=123 HTS_FUZZ_ROUNDS=20` starts elsewhere and goes further than the usual run.
"""

from __future__ import annotations

import json
import math
import os
import random
import signal
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hts_ray.errors import UserError

FIRST = int(os.environ.get("HTS_FUZZ_FIRST", "0"))
ROUNDS = int(os.environ.get("HTS_FUZZ_ROUNDS", "1"))
SECONDS = 20.0  # for one case, on a machine that has other things to do
MAGIC = (
    b"\xff\xd8\xff\xe0",
    b"\x89PNG\r\n\x1a\n",
    b"GIF89a",
    b"RIFF\xff\xff\xff\x7fWEBPVP8 ",
    b"II*\0",
    b"PAR1",
    b"PK\x03\x04",
    b"\x80\x04\x95",
    b"\x1f\x8b\x08",
    b"MATLAB 5.0 MAT-file",
    b"\xff\xfe",
    b"%PDF-1.7",
    b"",
)
TEXTS = (
    "nan", "NaN", ".inf", "-1e999", "9" * 5000, "null", "true", "[]", "{}", "''", "\u202e",
    "\ud83d", "\x00", "e\u0301", "\u00e9", "\U0001f6b2", "a" * 70_000, "2020-13-45", "0x",
    "!!python/name:os.system", "&a [*a]", "1_000", "--", "\r", "\u2028", "[" * 3000, "../../a",
)  # fmt: skip
VALUES = (
    None, True, False, 0, -1, 1 << 40, 10**400, 0.5, math.nan, math.inf, -math.inf, "", "nan",
    "\ud800", "\0", "\u202eabc", [], [[]], [None], {}, {"a": 1}, "a" * 10_000,
)  # fmt: skip


class _HangError(BaseException):
    """Not an Exception, so that no handler of the package takes it for a damaged file."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise in the main thread after so many seconds; an earlier alarm is put back."""

    def stop(*_: object) -> None:
        raise _HangError

    handler = signal.signal(signal.SIGALRM, stop)
    before = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, *before)
        signal.signal(signal.SIGALRM, handler)


def damaged(data: bytes, rng: random.Random) -> tuple[str, bytes]:
    """Return a file with something done to its bytes, and what that was."""
    place = rng.randrange(len(data))
    length = rng.choice((1, 2, 4, 16, 256, len(data) // 4 + 1))
    kind = rng.choice(
        ("flip", "flip", "truncate", "duplicate", "header", "inflate", "zero", "insert", "drop",
         "twice", "swap")
    )  # fmt: skip
    changed = bytearray(data)
    if kind == "flip":
        for _ in range(rng.choice((1, 1, 3, 30))):
            changed[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif kind == "truncate":
        del changed[place:]
    elif kind == "duplicate":
        changed[place:place] = data[place : place + length]
    elif kind == "header":
        magic = rng.choice(MAGIC)
        changed[: len(magic) or length] = magic
    elif kind == "inflate":
        size = rng.choice((0x7FFFFFFF, 0xFFFFFFFF, 0x80000000, 1 << 24, 0xFFFF))
        place = rng.choice((place, place % 256))
        changed[place : place + 4] = struct.pack(rng.choice("<>") + "I", size)
    elif kind == "zero":
        changed[place : place + length] = bytes(min(length, len(data) - place))
    elif kind == "insert":
        changed[place:place] = rng.randbytes(length)
    elif kind == "drop":
        del changed[place : place + length]
    elif kind == "twice":
        changed += data
    else:
        half = data[place:] + data[:place]
        changed[:] = half
    return f"{kind} at {place}", bytes(changed)


def corrupted(value: Any, rng: random.Random) -> Any:
    """Return JSON-like data with one part of it exchanged, removed or doubled."""
    value = json.loads(json.dumps(value))
    holder, key = None, None
    inner = value
    while isinstance(inner, dict | list) and inner and (holder is None or rng.random() < 0.85):
        key = rng.choice(list(inner) if isinstance(inner, dict) else range(len(inner)))
        holder, inner = inner, inner[key]
    if holder is None:
        return rng.choice(VALUES)
    action = rng.choice(("set", "set", "set", "drop", "wrap", "double"))
    if action == "set":
        holder[key] = rng.choice(VALUES)
    elif action == "drop":
        del holder[key]
    elif action == "wrap":
        holder[key] = [inner]
    elif isinstance(holder, list):
        holder.append(inner)
    else:
        holder[f"{key}_"] = inner
    return value


def dumped(value: Any) -> bytes:
    return json.dumps(value).encode("utf-8", "surrogatepass")


Make = Callable[[random.Random], tuple[str, bytes]]
Check = Callable[[Path, str], None]


def fuzz(target: str, cases: int, folder: Path, name: str, make: Make, check: Check) -> int:
    """Run the cases of a target; returns how many were read after all.

    `make` gives what was done and the file's bytes, `check` reads the file and asserts that what
    it got is well formed. A refusal must be a UserError with a message.
    """
    failures = []
    accepted = 0
    for number in range(FIRST, FIRST + cases * ROUNDS):
        what, data = make(random.Random(f"{target} {number}"))
        path = folder / name
        path.write_bytes(data)
        try:
            with time_limit(SECONDS):
                check(path, what)
            accepted += 1
        except UserError as refusal:
            if not str(refusal).strip() or "Traceback" in str(refusal):
                failures.append(f"{number} ({what}): refused without a reason: {refusal!r}")
        except _HangError:
            failures.append(f"{number} ({what}): not done after {SECONDS:g} s")
        except Exception as error:
            (folder / f"failed-{number}").write_bytes(data)
            failures.append(f"{number} ({what}): {type(error).__name__}: {str(error)[:300]}")
    shown = "\n".join(failures[:12])
    assert not failures, f"{target}: {len(failures)} of {cases * ROUNDS} cases:\n{shown}"
    return accepted


# Four classes, one of them with a letter that is not in ASCII.
CSV = (
    "class_id,verb,object,prompts,few_1\n"
    '3,ride,bicycle,"riding a bike|on a bike",0\n'
    "4,hold,cup,,1\n"
    '9,"hop_on",horse,"a person, hopping",0\n'
    "12,wash,\u00e9lan,,0\n"
)


class Trap:
    """Pickles to a call that makes a folder."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.target),)
