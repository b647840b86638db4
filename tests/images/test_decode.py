"""Decoding: every format and orientation upright in RGB, every bad file one named error."""

from __future__ import annotations

import io
import pickle
import random
import subprocess
import sys
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import skimage
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from hts_ray.images import decode
from hts_ray.images.decode import ERROR_KINDS, ImageError, decode_image, probe_image

PHOTOS = Path(skimage.__file__).parent / "data"  # these ship inside the wheel
FORMATS = ["JPEG", "PNG", "GIF", "WEBP", "AVIF", "BMP", "TIFF", "PPM", "JPEG2000"]


def encode(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def photo(name: str = "astronaut.png") -> Image.Image:
    return Image.open(PHOTOS / name).convert("RGB")


def kind_of(data: bytes, **limits) -> str:
    with pytest.raises(ImageError) as caught:
        decode_image(data, **limits)
    assert caught.value.kind in ERROR_KINDS
    assert str(caught.value)
    return caught.value.kind


@pytest.mark.parametrize("kind", FORMATS)
def test_formats_keep_colors(kind):
    """A format read with swapped channels."""
    data = encode(Image.new("RGB", (40, 30), (200, 30, 10)), kind)
    decoded = decode_image(data)
    assert decoded.pixels.shape == (30, 40, 3)
    assert decoded.pixels.dtype == np.uint8
    assert (decoded.width, decoded.height) == (40, 30) == probe_image(data)
    assert np.abs(decoded.pixels.astype(int) - [200, 30, 10]).max() <= 4
    decoded.pixels[0] = 0  # writable, as torch wants it


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "AVIF", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied_once(kind, orientation):
    """A photograph on its side, or turned twice (Pillow turns TIFF itself)."""
    upright = photo().resize((96, 64))
    undo = {1: None, 2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}[orientation]
    stored = upright if undo is None else upright.transpose(Image.Transpose(undo))
    exif = Image.Exif()
    exif[274] = orientation
    lossy = {"quality": 95} if kind in ("JPEG", "WEBP", "AVIF") else {}
    data = encode(stored, kind, exif=exif, **lossy)
    decoded = decode_image(data)
    assert (decoded.width, decoded.height) == (96, 64) == probe_image(data)
    error = np.abs(decoded.pixels.astype(float) - np.asarray(upright, dtype=float)).mean()
    assert error < 5  # another orientation of this photograph is 40 and more away


def test_downscaling_keeps_the_upright_original_size():
    """Boxes in pixels of the downscaled image; a side rounded to another aspect."""
    exif = Image.Exif()
    exif[274] = 6
    data = encode(photo().resize((1000, 500)), "JPEG", exif=exif)
    decoded = decode_image(data, max_side=128)
    assert (decoded.width, decoded.height) == (500, 1000)
    assert decoded.pixels.shape == (128, 64, 3)
    assert decode_image(encode(Image.new("RGB", (5000, 8))), max_side=100).pixels.shape[:2] == (
        1,
        100,
    )


def test_draft_decoding_looks_like_the_photograph():
    """JPEG's reduced decoding may be off by a pixel or a color space."""
    big = photo("rocket.jpg").resize((2560, 1708))
    small = decode_image(encode(big, "JPEG", quality=95), max_side=320)
    expected = np.asarray(big.resize((320, 214), Image.Resampling.BICUBIC), dtype=float)
    assert small.pixels.shape == (214, 320, 3)
    assert np.abs(small.pixels - expected).mean() < 3


def test_cmyk():
    """Adobe's CMYK JPEGs are stored inverted: a negative."""
    red = encode(Image.new("RGB", (40, 30), (200, 30, 10)).convert("CMYK"), "JPEG", quality=95)
    assert b"Adobe" in red
    assert np.abs(decode_image(red).pixels.astype(int) - [200, 30, 10]).max() <= 6


def test_sixteen_bit_gray_is_scaled_not_clipped():
    """PIL's own conversion clips at 255: everything white."""
    ramp = np.linspace(0, 65535, 64 * 64).astype(np.uint16).reshape(64, 64)
    pixels = decode_image(encode(Image.fromarray(ramp))).pixels
    assert (pixels[..., 0] == (ramp >> 8)).all()
    for values in (ramp.astype(np.int32), ramp.astype(np.float32) / 65535):
        pixels = decode_image(encode(Image.fromarray(values), "TIFF")).pixels
        assert np.abs(pixels[..., 0].astype(int) - (ramp >> 8)).max() <= 1


def test_transparency_lies_on_white():
    """Alpha dropped shows whatever color hides behind it, often black."""
    clear = Image.new("RGBA", (20, 20), (0, 0, 0, 0))
    clear.paste((255, 0, 0, 255), (0, 0, 10, 20))
    for image, kind in ((clear, "PNG"), (clear, "WEBP"), (clear.convert("LA"), "PNG")):
        assert decode_image(encode(image, kind)).pixels[10, 15].min() >= 250
    palette = Image.new("P", (20, 20), 1)
    palette.putpalette([0, 0, 0, 200, 30, 10])
    assert decode_image(encode(palette)).pixels[0, 0].tolist() == [200, 30, 10]
    for kind in ("PNG", "GIF"):
        assert (
            decode_image(encode(palette, kind, transparency=1)).pixels[0, 0].tolist() == [255] * 3
        )
    half = decode_image(encode(Image.new("RGBA", (20, 20), (0, 0, 0, 128)))).pixels
    assert 120 < half[0, 0, 0] < 135
    assert decode_image(encode(Image.new("1", (20, 20), 1))).pixels.min() == 255


def test_animations_give_their_first_frame():
    """The last frame, or a refusal."""
    frames = [Image.new("RGB", (20, 20), color) for color in ("red", "lime", "blue")]
    for kind in ("GIF", "WEBP", "PNG", "AVIF"):
        data = encode(frames[0], kind, save_all=True, append_images=frames[1:])
        assert decode_image(data).pixels[5, 5].argmax() == 0, kind
    assert decode_image((PHOTOS / "no_time_for_that_tiny.gif").read_bytes()).width > 8


def test_huge_images_are_downscaled_quietly():
    """Pillow's bomb warning at 89 million pixels, its error at 179 million."""
    huge = encode(Image.new("L", (12000, 12000), 77), "JPEG", quality=20)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        decoded = decode_image(huge)
        assert probe_image(huge) == (12000, 12000)
    assert (decoded.width, decoded.pixels.shape) == (12000, (2048, 2048, 3))
    before = Image.MAX_IMAGE_PIXELS
    assert kind_of(huge, max_pixels=12000 * 12000 - 1) == "too_large"
    assert before == Image.MAX_IMAGE_PIXELS
    # a header that claims more than any memory holds
    header = bytearray(encode(Image.new("L", (64, 64), 1), "BMP"))
    header[18:26] = (60000).to_bytes(4, "little") * 2
    assert kind_of(bytes(header)) == "too_large"


def test_bad_files_have_their_kind():
    """Kinds are what a user filters the quarantine by."""
    jpeg = (PHOTOS / "rocket.jpg").read_bytes()
    png = encode(photo().resize((200, 200)))
    assert kind_of(b"") == "empty"
    assert kind_of(b"This is a text file named .jpg\n") == "not_an_image"
    assert kind_of(b"<html><body>404</body></html>") == "not_an_image"
    assert kind_of(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 99 99\n") == "not_an_image"
    assert kind_of(bytes(1000)) == "not_an_image"
    assert kind_of(encode(Image.new("RGB", (1, 1)))) == "too_small"
    assert kind_of(encode(Image.new("RGB", (300, 7)))) == "too_small"
    assert decode_image(encode(Image.new("RGB", (1, 1))), min_side=1).width == 1
    for data in (
        jpeg,
        png,
        encode(photo(), "WEBP"),
        encode(photo(), "GIF"),
        encode(photo(), "TIFF"),
    ):
        assert kind_of(data[: len(data) // 2]) == "truncated"
    assert kind_of(jpeg[:100]) == "truncated"
    assert kind_of(png[:20]) == "truncated"
    # a zeroed middle with its end in place
    hole = bytearray(png)
    hole[len(png) // 3 : len(png) // 2] = bytes(len(png) // 2 - len(png) // 3)
    assert kind_of(bytes(hole)) == "decode_error"


def test_probe_passes_what_only_decoding_can_find():
    """The prepare stage reads headers; it must not read 7 GB to find a cut file."""
    jpeg = (PHOTOS / "rocket.jpg").read_bytes()
    assert probe_image(jpeg[: len(jpeg) // 2]) == (640, 427)
    for data in (b"", b"text", jpeg[:20]):
        with pytest.raises(ImageError):
            probe_image(data)


def test_errors_travel_between_processes():
    """An exception whose __init__ takes two arguments fails to unpickle in the driver."""
    error = pickle.loads(pickle.dumps(ImageError("truncated", "cut")))
    assert (error.kind, str(error)) == ("truncated", "cut")


def test_threads_leave_warnings_and_limits_as_they_were():
    """Process-wide settings restored by the wrong thread stay changed for ever."""
    data = encode(photo().resize((300, 300)))
    before, limit = list(warnings.filters), Image.MAX_IMAGE_PIXELS
    started = threading.Barrier(8)

    def work(_):
        started.wait()
        return [decode_image(data).width for _ in range(10)]

    with ThreadPoolExecutor(8) as pool:
        assert {w for widths in pool.map(work, range(8)) for w in widths} == {300}
    assert warnings.filters == before
    assert limit == Image.MAX_IMAGE_PIXELS


def test_nothing_reaches_stderr():
    """Pillow's warnings (palettes, EXIF), a line an image. libtiff's own, of LZW, do."""
    script = """
import io, random, sys
from PIL import Image
from hts_ray.images.decode import ImageError, decode_image
rng = random.Random(0)
image = Image.effect_noise((64, 64), 80).convert("RGB")
for kind in ("TIFF", "JPEG", "PNG"):
    stream = io.BytesIO(); image.save(stream, kind); good = stream.getvalue()
    for _ in range(150):
        data = bytearray(good)
        for _ in range(rng.randint(1, 8)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        try: decode_image(bytes(data[: rng.choice([None, rng.randrange(1, len(data))])]))
        except ImageError: pass
palette = Image.new("P", (20, 20)); stream = io.BytesIO()
palette.save(stream, "PNG", transparency=bytes([0, 128])); decode_image(stream.getvalue())
"""
    done = subprocess.run(
        [sys.executable, "-W", "always", "-c", script], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


SEEDS = [
    encode(Image.open(PHOTOS / "astronaut.png").convert("RGB").resize((48, 32)), kind)
    for kind in FORMATS
]


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.sampled_from(SEEDS),
    st.integers(0, 2**32),
    st.sampled_from(["flip", "cut", "insert", "head", "splice"]),
)
def test_mutated_images_raise_only_image_errors(good, seed, how):
    """Any other exception would stop a run of millions at one bad file."""
    rng = random.Random(seed)
    data = bytearray(good)
    at = rng.randrange(len(data))
    if how == "flip":
        for _ in range(rng.randint(1, 12)):
            data[rng.randrange(len(data))] = rng.randrange(256)
    elif how == "cut":
        del data[at:]
    elif how == "insert":
        data[at:at] = rng.randbytes(rng.randint(1, 20))
    elif how == "head":
        data[rng.randrange(min(64, len(data)))] ^= 1 << rng.randrange(8)
    else:
        data[at:] = rng.choice(SEEDS)[at:]
    kinds = set()
    for use in (decode_image, probe_image):
        try:
            use(bytes(data))
        except ImageError as error:
            kinds.add(error.kind)
    assert kinds <= set(ERROR_KINDS)


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=300))
def test_garbage_raises_only_image_errors(data):
    """Headers of a handful of bytes reach every parser's corner."""
    for head in (b"", b"\xff\xd8\xff\xe1", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"II*\0", b"BM", b"P6"):
        try:
            decode_image(head + data)
        except ImageError:
            continue


def test_heic_is_read_or_named_with_its_remedy(monkeypatch):
    """Would catch an iPhone's pictures left out without a word, turned, or without a remedy."""
    pillow_heif = pytest.importorskip("pillow_heif")
    pixels = np.zeros((48, 96, 3), np.uint8)
    pixels[:, :48] = (200, 40, 40)
    stream = io.BytesIO()
    pillow_heif.from_pillow(Image.fromarray(pixels)).save(stream, quality=90)
    image = decode.decode_image(stream.getvalue())
    assert (image.width, image.height) == (96, 48)
    assert np.abs(image.pixels.astype(int) - pixels)[:, 8:40].mean() < 12
    turned = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    pillow_heif.from_pillow(Image.fromarray(pixels)).save(turned, exif=exif.tobytes())
    assert decode.decode_image(turned.getvalue()).pixels.shape == (96, 48, 3)
    monkeypatch.setattr(decode, "FORMATS", tuple(f for f in decode.FORMATS if f != "HEIF"))
    with pytest.raises(decode.ImageError, match=r"pip install 'hts-ray\[heic\]'") as caught:
        decode.decode_image(stream.getvalue())
    assert caught.value.kind == "needs_heic"
