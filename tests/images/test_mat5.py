"""MATLAB v5 files: what scipy reads of good ones, and nothing but errors of bad ones."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
import scipy.io

from hts_ray.images import mat5
from hts_ray.images.mat5 import Mat5Error, read_mat5


def saved(variables, compress=False):
    stream = io.BytesIO()
    scipy.io.savemat(stream, variables, do_compression=compress)
    return stream.getvalue()


def listed() -> bytes:
    cells = np.empty((2, 1), dtype=object)
    cells[:, 0] = ["a.jpg", "bé.jpg"]
    return saved({"list": cells, "x": np.eye(2), "y": 1.0})


def test_only_the_variables_asked_for_come_back():
    """Would catch letters that the way between the processes changes, and missing names."""
    found = read_mat5(listed(), ["list", "x", "none"])
    assert list(found) == ["list", "x"]
    assert [cell.item() for cell in found["list"].ravel()] == ["a.jpg", "bé.jpg"]
    np.testing.assert_array_equal(found["x"], np.eye(2))


def test_a_file_that_kills_scipy_is_an_error():
    """Would catch the end of our own process: this bit gives scipy a segmentation fault."""
    damaged = bytearray(listed())
    damaged[144] ^= 4
    with pytest.raises(Mat5Error, match="process ended with -11"):
        read_mat5(bytes(damaged), ["list"])


def test_a_file_that_takes_for_ever_is_an_error(monkeypatch):
    """Would catch a command that hangs over a damaged file."""
    monkeypatch.setattr(mat5, "_SECONDS", 0.01)
    with pytest.raises(Mat5Error, match=r"more than 0\.01 s"):
        read_mat5(listed(), ["list"])


def test_a_variable_that_is_there_twice_is_an_error():
    """Would catch annotations of which the second half replaces the first."""
    data = saved({"x": 1.0})
    with pytest.raises(Mat5Error, match='Duplicate variable name "x"'):
        read_mat5(data + data[128:], ["x"])


def test_a_bomb_is_not_unpacked(monkeypatch):
    """Would catch a small file that takes all memory."""
    zeros = np.zeros((20, 500_000))
    body = saved({"x": zeros})[128 + 8 :]
    packed = zlib.compress(struct.pack("<II", 14, len(body)) + body, 9)
    bomb = saved({})[:128] + struct.pack("<II", 15, len(packed)) + packed
    assert read_mat5(bomb, ["x"])["x"].shape == zeros.shape
    monkeypatch.setattr(mat5, "MAX_BYTES", 50_000_000)
    with pytest.raises(Mat5Error, match=r"(?i)memory|allocate"):
        read_mat5(bomb, ["x"])
