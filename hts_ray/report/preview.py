"""Pages that show, before a teacher pass is paid for, what the teacher sees and says."""

from __future__ import annotations

import textwrap

import pyarrow as pa

from hts_ray.engine.run import Run
from hts_ray.images.decode import DecodedImage
from hts_ray.images.thumbnail import thumbnail_data_uri
from hts_ray.labels.passes import TeacherPass
from hts_ray.report.content import ReportData
from hts_ray.report.gallery import run_gallery
from hts_ray.report.page import environment, write_report
from hts_ray.report.read_run import RunTables
from hts_ray.store import storage
from hts_ray.store.run import StageFolder
from hts_ray.teacher.estimate import Estimate

_PICTURE_SIDE = 640
_PICTURE_BYTES = 80_000


def write_preview(path: str, estimate: Estimate) -> None:
    """Write one HTML file, which needs no network, with the sampled images and their regions."""

    def picture(image: DecodedImage) -> str:
        return thumbnail_data_uri(image.pixels, _PICTURE_SIDE, _PICTURE_BYTES)

    template = environment().get_template("preview.html.j2")
    storage.write_bytes(path, template.render(estimate=estimate, picture=picture).encode())


def write_sample(path: str, run: Run, regions: StageFolder, labels: pa.Table, total: int) -> None:
    """Write one HTML file with the images of a sample, out of `total`, and their pseudo-labels."""
    names = ", ".join(run.class_table.names)
    told = [
        f"{len(labels)} of {total:,} images, drawn at random, with what the teacher finds of:"
        f" {textwrap.shorten(names, 300, placeholder=' ...')}.",
        "Do the labels and their regions fit? A class that is found everywhere or nowhere needs"
        " other words, and pictures that show none should have no label. Thresholds adapt to all"
        " images, so a few labels may still change.",
    ]
    passes = [TeacherPass(regions, run.config.filter)]
    found = RunTables(run.class_table, "", run.config, None, regions, passes, labels, {})
    gallery = run_gallery(found, len(labels))
    write_report(path, ReportData("Preview of a sample", intro=told, gallery=gallery))
