"""The report: one self-contained HTML file that shows a run to a reader.

`report_for_run` collects a `ReportData` from a run directory and `write_report` renders it. Another
module adds its part of the page as a `Section`; `draw` makes drawings in the page's colours.
"""

from hts_ray.report.charts import draw
from hts_ray.report.collect import DEFAULT_IMAGES, report_for_run
from hts_ray.report.content import ComparisonRow, ReportData, Role, Section
from hts_ray.report.page import render_report, write_report
from hts_ray.report.results import gap_closed
from hts_ray.report.review_page import ReviewPage, write_review_page

__all__ = [
    "DEFAULT_IMAGES",
    "ComparisonRow",
    "ReportData",
    "ReviewPage",
    "Role",
    "Section",
    "draw",
    "gap_closed",
    "render_report",
    "report_for_run",
    "write_report",
    "write_review_page",
]
