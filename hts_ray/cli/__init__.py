"""The `hts` command: one subcommand a stage.

Exit codes: 0 done, 1 failed, 2 bad usage or bad configuration.
"""

from hts_ray.cli.app import cli, completion_command, main
from hts_ray.cli.cluster import doctor, submit
from hts_ray.cli.exchange import export_command, import_command, import_labels_command, review
from hts_ray.cli.options import Settings, is_setting
from hts_ray.cli.runs import demo, pipeline_command, report
from hts_ray.cli.stages import (
    evaluate,
    filter_command,
    label,
    predict,
    prepare,
    sweep,
    train,
)

__all__ = [
    "Settings",
    "cli",
    "completion_command",
    "demo",
    "doctor",
    "evaluate",
    "export_command",
    "filter_command",
    "import_command",
    "import_labels_command",
    "is_setting",
    "label",
    "main",
    "pipeline_command",
    "predict",
    "prepare",
    "report",
    "review",
    "submit",
    "sweep",
    "train",
]
