"""Batches of images as columns."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from hts_ray.config import ImagesConfig
from hts_ray.engine import decoding
from hts_ray.engine.deaths import Deaths
from hts_ray.engine.decoding import decode_batch, squash, stack_pixels
from hts_ray.errors import DataError
from hts_ray.store import storage


def test_decoding_keeps_bad_rows_with_their_reason(tmp_path):
    """Catches one bad file that ends the batch, and pixels that slip to another row."""
    Image.new("RGB", (60, 20), (255, 0, 0)).save(tmp_path / "red.png")
    (tmp_path / "bad.png").write_bytes(b"no image")
    uris = [str(tmp_path / "bad.png"), str(tmp_path / "red.png"), None, "/nowhere"]
    table = pa.table({"image_id": list("abcd"), "uri": pa.array(uris, pa.string())})
    decoded = decode_batch(table, ImagesConfig())
    assert decoded["error_kind"].to_pylist() == ["not_an_image", None, "missing", "missing"]
    row = decoded.to_pylist()[1]
    assert (row["width"], row["height"]) == (60, 20)
    assert (row["pixel_width"], row["pixel_height"]) == (60, 20)
    pixels = np.frombuffer(row["pixels"], np.uint8).reshape(20, 60, 3)
    assert (pixels == (255, 0, 0)).all()
    square = decode_batch(table.slice(1, 1), ImagesConfig(), square=16)
    assert stack_pixels(square, 16).shape == (1, 16, 16, 3)
    assert decode_batch(table.slice(0, 0), ImagesConfig()).schema == decoded.schema


def test_squash_is_antialiased():
    """Catches point sampling, which turns fine texture into false shapes."""
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 255
    assert abs(squash(stripes, 8).astype(int) - 127).max() < 20
    assert squash(stripes, 64) is stripes


class DeathBefore:
    """A log of attempts in which every batch has killed a worker once."""

    def __init__(self):
        self.ended = []

    def begin(self, ids, alone=False):
        """Tell of a death."""
        return [Deaths(together=1) for _ in ids]

    def end(self, ids):
        """Remember."""
        self.ended += ids


def test_a_batch_that_killed_its_worker_is_decoded_apart(tmp_path):
    """Catches rows that slip, or results that differ, when images are decoded one by one."""
    Image.new("RGB", (60, 20), (255, 0, 0)).save(tmp_path / "red.png")
    (tmp_path / "bad.png").write_bytes(b"no image")
    uris = [str(tmp_path / "bad.png"), str(tmp_path / "red.png")]
    table = pa.table({"image_id": ["a", "b"], "uri": uris})
    log = DeathBefore()
    apart = decode_batch(table, ImagesConfig(), attempts=log)
    assert apart == decode_batch(table, ImagesConfig())
    assert log.ended == ["decode a", "decode b"]


def test_a_storage_that_is_down_ends_the_batch_and_no_image(monkeypatch):
    """Catches an outage of the storage whose images all come out as bad ones."""
    asked = []

    def down(uri, retries, retried):
        asked.append(retries)
        retried()
        raise DataError(f"{uri}: the storage fails or is throttling")

    monkeypatch.setattr(decoding, "read_image_bytes", down)
    table = pa.table({"image_id": ["a"], "uri": ["s3://bucket/x.png"]})
    with pytest.raises(DataError, match="throttling"):
        decode_batch(table, ImagesConfig(), retries=7)
    with pytest.raises(DataError, match="throttling"):
        decode_batch(table, ImagesConfig())
    assert asked == [7, storage.RETRIES]
