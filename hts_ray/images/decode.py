"""Image bytes to upright RGB pixels; every kind of bad file has a name.

This module raises only `ImageError`, for any bytes: among millions of web images every damage
occurs, and it must cost no more than one row. Pillow's warnings are not shown, but libtiff prints
lines of its own about damaged TIFFs.
"""

from __future__ import annotations

import io
import threading
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, UnidentifiedImageError

from hts_ray.errors import DataError

ErrorKind = Literal[
    "empty",
    "not_an_image",
    "truncated",
    "too_small",
    "too_large",
    "decode_error",
    "unreadable",
    "missing",
    "needs_heic",
]
ERROR_KINDS: tuple[str, ...] = get_args(ErrorKind)

# Pillow reads some fifty formats; one of them (EPS) starts Ghostscript. These are photographs',
# as far as this Pillow was built with them.
Image.init()
with suppress(ImportError):  # the extra `heic`
    import pillow_heif

    pillow_heif.register_heif_opener()
FORMATS = tuple(
    name
    for name in ("JPEG", "PNG", "GIF", "WEBP", "AVIF", "BMP", "TIFF", "PPM", "JPEG2000", "HEIF")
    if name in Image.OPEN
)

HEIC_REMEDY = "install pillow-heif on every node: pip install 'hts-ray[heic]'"
_HEIF_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"}
_SIGNATURES = {
    b"\xff\xd8\xff": "JPEG",
    b"\x89PNG\r\n\x1a\n": "PNG",
    b"GIF87a": "GIF",
    b"GIF89a": "GIF",
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
}
# What ends a whole file, and within how many bytes of its end it is.
_ENDS = {"JPEG": (b"\xff\xd9", 64), "PNG": (b"IEND", 64), "GIF": (b";", 4)}
_PILLOW_LIMIT = 1 << 29  # Pillow refuses twice this; `max_pixels` is the limit that counts
_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class ImageError(DataError):
    """An image that cannot be used; `kind` is one of ERROR_KINDS."""

    def __init__(self, kind: ErrorKind, message: str) -> None:
        super().__init__(kind, message)  # both, so that it survives pickling between processes
        self.kind: ErrorKind = kind
        self.message = message

    def __str__(self) -> str:
        return self.message


@dataclass(frozen=True, eq=False)
class DecodedImage:
    """An upright image: `pixels` uint8 (H, W, 3) in RGB.

    `width` and `height` are those of the upright original; the pixels may be fewer.
    """

    pixels: npt.NDArray[np.uint8]
    width: int
    height: int


def decode_image(
    data: bytes,
    *,
    max_pixels: int = 200_000_000,
    min_side: int = 8,
    max_side: int = 2048,
) -> DecodedImage:
    """Return the upright RGB pixels of an encoded image, the longer side at most `max_side`.

    EXIF orientation is applied; transparency becomes white, as on a web page; 16-bit
    gray is scaled over its whole range; an animation gives its first frame. Raises ImageError:
    `too_small` for a side under `min_side`, `too_large` for more than `max_pixels` in the
    original, and the other kinds for bytes that cannot be decoded in full.
    """
    with _opened(data) as image:
        orientation, width, height = _header(image)
        shape = f"{width}x{height} pixels"
        if min(width, height) < min_side:
            raise ImageError("too_small", f"{shape}: a side is under {min_side} (min_side)")
        if width * height > max_pixels:
            raise ImageError("too_large", f"{shape}: more than {max_pixels} (max_pixels)")
        scale = min(1.0, max_side / max(width, height))
        if scale < 1:
            # A JPEG decoded at 1/2, 1/4 or 1/8 never takes the memory of the whole.
            image.draft(None, (int(image.width * scale) + 1, int(image.height * scale) + 1))
        image.load()
        size = (width, height) if orientation < 5 else (height, width)
        upright = _to_rgb(image, (max(1, round(size[0] * scale)), max(1, round(size[1] * scale))))
        if orientation in _TRANSPOSE:
            upright = upright.transpose(_TRANSPOSE[orientation])
        return DecodedImage(np.array(upright, dtype=np.uint8), width, height)


def probe_image(data: bytes) -> tuple[int, int]:
    """Return (width, height) of the upright image from its header; ImageError as `decode_image`.

    The pixels are not decoded, so a truncated file passes.
    """
    with _opened(data) as image:
        return _header(image)[1:]


@contextmanager
def _opened(data: bytes) -> Iterator[Image.Image]:
    """Open an image; whatever it meets, also in the block, becomes an ImageError."""
    if not data:
        raise ImageError("empty", "the file is empty")
    if "HEIF" not in FORMATS and _signature(data) == "HEIF":
        raise ImageError("needs_heic", f"a HEIC picture: {HEIC_REMEDY}")
    try:
        with _quiet_pillow(), Image.open(io.BytesIO(data), formats=FORMATS) as image:
            yield image
    except ImageError:
        raise
    except Exception as error:
        raise _as_image_error(error, data) from error


def _header(image: Image.Image) -> tuple[int, int, int]:
    """Return (EXIF orientation still to apply, upright width, upright height)."""
    width, height = image.size
    # Pillow turns a TIFF itself, and finds a PNG's orientation behind the pixels only by
    # decoding them.
    if image.format == "TIFF" or (image.format == "PNG" and "exif" not in image.info):
        return 1, width, height
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # damaged EXIF says nothing about the pixels
        orientation = 1
    if not isinstance(orientation, int) or not 1 <= orientation <= 8:
        orientation = 1
    return (orientation, height, width) if orientation >= 5 else (orientation, width, height)


def _to_rgb(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Return a loaded image as RGB at `size` (width, height)."""
    if image.mode in ("I", "F") or image.mode.startswith("I;"):
        image = Image.fromarray(_to_8_bits(np.asarray(image)))
    elif image.has_transparency_data:
        image = image.convert("RGBA")
    elif image.mode not in ("L", "RGB", "CMYK", "YCbCr"):
        image = image.convert("RGB")
    # Shrinking first keeps the copies that a conversion makes small.
    if image.size != size:
        image = image.resize(size, Image.Resampling.BICUBIC, reducing_gap=3.0)
    if image.mode == "RGBA":
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def _to_8_bits(values: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    """Scale deep gray values to 0..255 by the range of their type, not by their own maximum."""
    if values.dtype == np.uint16:
        return (values >> 8).astype(np.uint8)
    numbers = np.nan_to_num(values.astype(np.float32), posinf=0.0, neginf=0.0).clip(0)
    top = float(numbers.max(initial=0.0))
    full = 255.0 if top <= 255 else max(65535.0, top)
    if np.issubdtype(values.dtype, np.floating) and top <= 1:
        full = 1.0
    return (numbers * (255.0 / full)).round().astype(np.uint8)


def _as_image_error(error: Exception, data: bytes) -> ImageError:
    reason, name = str(error) or type(error).__name__, _signature(data)
    if isinstance(error, UnidentifiedImageError):
        if name is None:
            return ImageError("not_an_image", f"not an image: {_excerpt(data)}")
        if _looks_cut(data, name):
            return ImageError("truncated", f"{name} data that end inside the header")
        return ImageError("decode_error", f"{name} data with a damaged header")
    if isinstance(error, Image.DecompressionBombError | MemoryError):
        return ImageError("too_large", f"too large to decode: {reason}")
    if "truncated" in reason.lower() or _looks_cut(data, name):
        return ImageError("truncated", f"the file ends too early: {reason}")
    return ImageError("decode_error", f"cannot be decoded: {reason}")


def _signature(data: bytes) -> str | None:
    if data[:4] == b"RIFF" and data[8:12] in (b"WEBP", b""):
        return "WEBP"
    if data[4:12] in (b"ftypavif", b"ftypavis"):
        return "AVIF"
    if data[4:8] == b"ftyp" and data[8:12] in _HEIF_BRANDS:
        return "HEIF"
    return next((name for magic, name in _SIGNATURES.items() if data.startswith(magic)), None)


def _looks_cut(data: bytes, name: str | None) -> bool:
    """Return whether a file of this format lacks its end."""
    if name in _ENDS:
        mark, within = _ENDS[name]
        return mark not in data[-within:]
    if name == "WEBP":
        return int.from_bytes(data[4:8], "little") + 8 > len(data)
    return False


def _excerpt(data: bytes) -> str:
    start = data[:24]
    if start and all(32 <= byte < 127 or byte in b"\t\r\n" for byte in start):
        return f"it begins with the text {start.decode()!r}"
    return f"it begins with the bytes {start[:8].hex(' ')}"


_quiet_lock, _quiet = threading.Lock(), ExitStack()
_quiet_users = 0


@contextmanager
def _quiet_pillow() -> Iterator[None]:
    """Keep Pillow from warning and from its own size limit while any thread is inside.

    Both are process-wide; they are changed by the first thread in and restored by the last one
    out, because a lock around the whole decode would make threads wait for each other.
    """
    global _quiet_users  # noqa: PLW0603
    with _quiet_lock:
        _quiet_users += 1
        if _quiet_users == 1:
            _quiet.callback(setattr, Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)
            Image.MAX_IMAGE_PIXELS = _PILLOW_LIMIT
            _quiet.enter_context(warnings.catch_warnings())
            warnings.filterwarnings("ignore", module=r"PIL(\.|$)")
    try:
        yield
    finally:
        with _quiet_lock:
            _quiet_users -= 1
            if not _quiet_users:
                _quiet.close()
