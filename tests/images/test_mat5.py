"""MATLAB v5 files: what scipy reads of good ones, and nothing but errors of bad ones."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
import scipy.io
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from hts_ray.images import mat5
from hts_ray.images.mat5 import Mat5Error, read_mat5

NUMBERS = [np.float64, np.float32, np.int8, np.uint8, np.int16, np.uint16, np.int32, np.uint32]


def saved(variables, compress=False):
    stream = io.BytesIO()
    scipy.io.savemat(stream, variables, do_compression=compress)
    return stream.getvalue()


@given(
    hnp.arrays(st.sampled_from(NUMBERS), hnp.array_shapes(min_dims=2, max_dims=3, max_side=5)),
    st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_numbers_are_those_that_scipy_reads(values, compress):
    """Would catch a wrong byte order, a transposed matrix, or a type of another width."""
    found = read_mat5(saved({"x": values, "y": 1.0}, compress), ["x"])
    assert list(found) == ["x"]
    assert found["x"].dtype == values.dtype
    np.testing.assert_array_equal(found["x"], values)


@given(st.lists(st.text(st.characters(exclude_categories=("Cs", "Cc"))), min_size=1, max_size=4))
@settings(max_examples=40, deadline=None)
def test_texts_survive_in_cells_and_structs(texts):
    """Would catch letters counted as bytes, and cells or fields in another order."""
    cells = np.empty((len(texts), 1), dtype=object)
    cells[:, 0] = texts
    structs = np.array([(t, n) for n, t in enumerate(texts)], [("vname", object), ("n", object)])
    found = read_mat5(saved({"list": cells, "structs": structs}), ["list", "structs"])

    def plain(value):  # MATLAB has no text of length 0 but an empty matrix
        return value if isinstance(value, str) else ""

    assert [plain(value) for value in found["list"].ravel()] == texts
    rows = found["structs"].ravel()
    assert [(plain(row["vname"]), row["n"].item()) for row in rows] == list(
        zip(texts, range(len(texts)), strict=True)
    )


def big_endian() -> bytes:
    def element(kind, data):
        return struct.pack(">II", kind, len(data)) + data + bytes(-len(data) % 8)

    body = element(6, struct.pack(">II", 6, 0)) + element(5, struct.pack(">ii", 1, 2))
    body += element(1, b"x") + element(9, struct.pack(">dd", 1.5, -2.0))
    return bytes(124) + b"\x01\x00MI" + element(14, body)


def test_the_other_byte_order_is_read():
    """Would catch numbers that are swapped where an old workstation wrote them."""
    assert read_mat5(big_endian(), ["x"])["x"].tolist() == [[1.5, -2.0]]


def compressed(body: bytes, claimed: int) -> bytes:
    packed = zlib.compress(struct.pack("<II", 14, claimed) + body, 9)
    return bytes(124) + b"\x00\x01IM" + struct.pack("<II", 15, len(packed)) + packed


def test_a_bomb_is_not_unpacked(monkeypatch):
    """Would catch a small file that takes all memory."""
    zeros = np.zeros((600, 20_000))
    body = saved({"x": zeros})[128 + 8 :]
    assert read_mat5(compressed(body, len(body)), ["x"])["x"].shape == zeros.shape
    with pytest.raises(Mat5Error, match=r"of 1000 bytes has 1\d\d\d"):
        read_mat5(compressed(body, 1000), ["x"])
    assert read_mat5(compressed(body, len(body)), ["y"]) == {}
    monkeypatch.setattr(mat5, "MAX_BYTES", 10_000_000)
    with pytest.raises(Mat5Error, match="more than 10000000"):
        read_mat5(compressed(body, len(body)), ["x"])


def test_what_hico_does_not_hold_is_named():
    """Would catch a sparse matrix taken for another, or one in the way of what is asked for."""
    data = saved({"x": scipy.sparse.eye_array(3), "y": 2.0})
    with pytest.raises(Mat5Error, match="x holds a sparse matrix"):
        read_mat5(data, ["x"])
    assert read_mat5(data, ["y"])["y"].item() == 2.0
