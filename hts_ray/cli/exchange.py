"""Commands that exchange students and labels with people and other tools."""

from __future__ import annotations

from typing import Any

import click

from hts_ray.cli.options import Settings, argument, option, stage_command
from hts_ray.engine.console import console, print_line, print_mapping, print_next, print_written
from hts_ray.errors import ConfigError

# What `--help` and shells are told without the modules that write them, which are slow to load.
STUDENT_FORMATS = ("safetensors", "open_clip", "onnx", "hts")
LABEL_FORMATS = (
    "coco", "fiftyone", "huggingface", "webdataset", "anno-mat", "csv", "parquet", "label-studio"
)  # fmt: skip


def _complete_format(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    known = (*STUDENT_FORMATS, *LABEL_FORMATS)
    return [name for name in known if name.startswith(incomplete)]


@click.command("import-checkpoint")
@argument("file", metavar="FILE")
@option("--output", required=True, metavar="DIR", help="Student folder to write.")
@option("--classes", metavar="FILE", help="Class list (default: HICO's 600, if 600 fit).")
def import_command(file: str, output: str, classes: str | None) -> None:
    """Turn a checkpoint of the paper's own code into a student."""
    from hts_ray.student.official import import_checkpoint

    print_mapping("read", import_checkpoint(file, output, classes))
    print_written("student", output)
    print_next("hts", "predict", "PATH", "--student", output)


@click.command("export")
@option("--format", "form", required=True, shell_complete=_complete_format,
        help=f"Of a student: {', '.join(STUDENT_FORMATS)}. Of labels:"
        f" {', '.join(LABEL_FORMATS)}.")  # fmt: skip
@option("--output", required=True, metavar="PATH", help="File or folder to write.")
@option("--student", metavar="DIR", help="Run or student folder (default: the run's).")
@option("--labels", metavar="DIR", help="Pseudo-labels to write (default: the latest).")
@option("--manifest", metavar="PATH", help="Write the annotations of this manifest instead.")
@option("--split", metavar="NAME", help="Images of this split only.")
@option("--limit", type=click.IntRange(1), metavar="N", help="A seeded sample only.")
@option("--force", is_flag=True, help="Replace an earlier export of labels.")
@stage_command()
def export_command(
    settings: Settings, form: str, output: str, student: str | None, **chosen: Any
) -> None:
    """Write labels in the format of another tool, or a student in another form."""
    from hts_ray.exports.writing import FORMATS

    if form in FORMATS:
        if student is not None:
            remedy = f"leave it out: --format {form} writes labels"
            raise ConfigError(field="--student", value=student, remedy=remedy)
        from hts_ray.cli.label_commands import export_command as write_labels

        write_labels(settings.open(), form, output, dry_run=settings.dry_run, **chosen)
        return
    _export_student(settings, form, output, student, chosen)


def _export_student(
    settings: Settings, form: str, output: str, student: str | None, chosen: dict[str, Any]
) -> None:
    """Write a student and say what was compared, and how to use it."""
    from hts_ray.exports.writing import FORMATS as LABEL_FORMATS
    from hts_ray.student.convert import FORMATS, export_student

    if form not in FORMATS:
        remedy = f"choose {', '.join(FORMATS)} (a student) or {', '.join(LABEL_FORMATS)} (labels)"
        raise ConfigError(field="--format", value=form, remedy=remedy)
    for name, value in chosen.items():
        if value not in (None, False):
            remedy = f"leave it out: --format {form} writes a student"
            raise ConfigError(field=f"--{name}", value=value, remedy=remedy)
    source = student or settings.config.run_dir
    if settings.dry_run:
        print_mapping("plan", {"student": source, "format": form, "write": output})
        return
    done = export_student(source, form, output)
    print_written("export", output)
    console.print(f"largest difference of {done.compared} when read again: {done.difference:.2g}")
    for note in done.notes:
        print_line(note)


@click.command("import-labels")
@argument("file", metavar="FILE")
@option("--output", required=True, metavar="DIR", help="Folder to write.")
@option("--manifest", metavar="PATH", help="The images meant (default: the run's manifest).")
@option("--labels", metavar="DIR", help="Pseudo-labels to compare with (default: latest).")
@option("--unmarked", type=click.Choice(["negative", "unknown"]), default="negative",
        show_default=True, help="What a class is that the file does not list.")  # fmt: skip
@option("--split", default="validation", show_default=True, help="Split of the manifest.")
@option("--validation-share", type=float, metavar="S",
        help="Part the images: this share to validate, the rest to override.")  # fmt: skip
@option("--force", is_flag=True, help="Replace an earlier import.")
@stage_command()
def import_labels_command(settings: Settings, file: str, output: str, **chosen: Any) -> None:
    """Read labels that people corrected: Label Studio JSON, COCO JSON or CSV."""
    from hts_ray.cli.label_commands import import_command as read_labels

    read_labels(settings.open(), file, output, dry_run=settings.dry_run, **chosen)


@click.command()
@argument("corrections", metavar="DIR")
@option("--labels", metavar="DIR", help="Pseudo-labels to compare (default: the latest).")
@option("--json", "json_file", metavar="FILE", help="Also write the figures here.")
@stage_command()
def review(settings: Settings, corrections: str, **chosen: str | None) -> None:
    """Compare pseudo-labels with corrections that `hts import-labels` wrote to DIR."""
    from hts_ray.cli.label_commands import review_command

    review_command(settings.open(), corrections, dry_run=settings.dry_run, **chosen)
