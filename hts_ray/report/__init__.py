"""The report: one self-contained HTML file that shows a run to a reader.

`report_for_run` gathers a `ReportData` from a run directory, `render_report` turns it into HTML.
A module that wants a part of its own on the page returns `Section`s and is listed in
`gather.SECTIONS`; `charts.draw` makes drawings in the page's colours.
"""

from hts_ray.report.charts import Chart, draw
from hts_ray.report.comparison import gap_closed, gap_sentence
from hts_ray.report.data import (
    VERDICTS,
    ClassRow,
    ComparisonRow,
    Confusion,
    Facts,
    FunnelStep,
    GalleryItem,
    GalleryLabel,
    GalleryRegion,
    QuarantineRow,
    ReliabilityBin,
    ReportData,
    Role,
    Section,
    StageRow,
    TrainingCurve,
    Verdict,
)
from hts_ray.report.gallery import (
    MAX_IGNORED_LABELS,
    choose_images,
    gallery_item,
    thumbnail_data_uri,
)
from hts_ray.report.gather import DEFAULT_IMAGES, report_for_run
from hts_ray.report.quality import judge
from hts_ray.report.rendering import render_report, write_report

__all__ = [
    "DEFAULT_IMAGES",
    "MAX_IGNORED_LABELS",
    "VERDICTS",
    "Chart",
    "ClassRow",
    "ComparisonRow",
    "Confusion",
    "Facts",
    "FunnelStep",
    "GalleryItem",
    "GalleryLabel",
    "GalleryRegion",
    "QuarantineRow",
    "ReliabilityBin",
    "ReportData",
    "Role",
    "Section",
    "StageRow",
    "TrainingCurve",
    "Verdict",
    "choose_images",
    "draw",
    "gallery_item",
    "gap_closed",
    "gap_sentence",
    "judge",
    "render_report",
    "report_for_run",
    "thumbnail_data_uri",
    "write_report",
]
