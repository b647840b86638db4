"""A page that shows, before a teacher pass is paid for, what the teacher sees and says."""

from __future__ import annotations

from hts_ray.images.decode import DecodedImage
from hts_ray.images.thumbnail import thumbnail_data_uri
from hts_ray.report.page import environment
from hts_ray.store import storage
from hts_ray.teacher.estimate import Estimate

_PICTURE_SIDE = 640
_PICTURE_BYTES = 80_000


def write_preview(path: str, estimate: Estimate) -> None:
    """Write one HTML file, which needs no network, with the sampled images and their regions."""

    def picture(image: DecodedImage) -> str:
        return thumbnail_data_uri(image.pixels, _PICTURE_SIDE, _PICTURE_BYTES)

    template = environment().get_template("preview.html.j2")
    storage.write_bytes(path, template.render(estimate=estimate, picture=picture).encode())
