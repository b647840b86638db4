"""Commands that exchange students and labels with people and other tools."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click

from hts_ray.cli.options import Settings, argument, option, refuse_options, stage_command
from hts_ray.engine.console import (
    console,
    percent,
    print_line,
    print_mapping,
    print_next,
    print_note,
    print_rows,
    print_written,
)
from hts_ray.engine.run import Run
from hts_ray.errors import ConfigError
from hts_ray.exports.source import read_labels
from hts_ray.exports.writing import FORMATS as LABEL_FORMATS
from hts_ray.exports.writing import check_output, export_labels
from hts_ray.labels.corrections import OVERRIDES
from hts_ray.review import agreement
from hts_ray.review.corrected_files import Sample
from hts_ray.review.corrected_files import read_labels as read_corrected
from hts_ray.review.importing import import_labels, labels_of_page, write_import
from hts_ray.store import storage
from hts_ray.store.outputs import refuse_existing
from hts_ray.store.run import StageFolder, find_stage, given_stage, require_stage

# For `--help` and shells; the module that writes them loads torch, which is slow.
STUDENT_FORMATS = ("safetensors", "open_clip", "onnx", "hts")
_SHOWN = 10  # classes, disagreements or bad entries


def _complete_format(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    known = (*STUDENT_FORMATS, *LABEL_FORMATS)
    return [name for name in known if name.startswith(incomplete)]


@click.command("import-checkpoint")
@argument("file", metavar="FILE")
@option("--output", required=True, metavar="DIR", help="Student folder to write.")
@option("--classes", metavar="FILE", help="Class list (default: HICO's 600, if 600 fit).")
def import_checkpoint_command(file: str, output: str, classes: str | None) -> None:
    """Turn a checkpoint of the paper's own code into a student."""
    from hts_ray.student.official import import_checkpoint  # torch loads slowly

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
    settings: Settings, form: str, output: str, student: str | None, force: bool, **chosen: Any
) -> None:
    """Write labels in the format of another tool, or a student in another form."""
    if form not in LABEL_FORMATS:
        _export_student(settings, form, output, student, {**chosen, "force": force})
        return
    refuse_options({"student": student}, f"leave it out: --format {form} writes labels")
    run = settings.open()
    check_output(form, output, force)
    rows = read_labels(run, **chosen, regions=LABEL_FORMATS[form].boxes)
    if settings.dry_run:
        plan = {"read": rows.origin.name, "images": len(rows), "format": form, "write": output}
        print_mapping("plan", plan)
        return
    done = export_labels(run, rows, form, output, force=force)
    print_written(f"export of {rows.origin.name}", done.path)
    print_mapping("counted", done.tally.figures())
    for note in done.notes:
        print_line(note)
    if LABEL_FORMATS[form].correctable:
        run_dir = run.config.run_dir
        print_next("hts", "import-labels", "FILE", "--run-dir", run_dir, "--output", "corrected")


def _export_student(
    settings: Settings, form: str, output: str, student: str | None, chosen: dict[str, Any]
) -> None:
    """Write a student; say how far the result was compared with it, and how to use it."""
    from hts_ray.student.convert import FORMATS, export_student  # torch loads slowly

    if form not in FORMATS:
        remedy = f"choose {', '.join(FORMATS)} (a student) or {', '.join(LABEL_FORMATS)} (labels)"
        raise ConfigError(field="--format", value=form, remedy=remedy)
    refuse_options(chosen, f"leave it out: --format {form} writes a student")
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
        help="Divide the images: this share to validate, the rest to override.")  # fmt: skip
@option("--force", is_flag=True, help="Replace an earlier import.")
@stage_command()
def import_labels_command(
    settings: Settings,
    file: str,
    output: str,
    manifest: str | None,
    labels: str | None,
    force: bool,
    **chosen: Any,
) -> None:
    """Read labels that people corrected: review page, Label Studio, COCO or CSV."""
    run = settings.open()
    refuse_existing(output, replace=force, marker=OVERRIDES)
    read, seed = read_corrected(file), run.config.seed
    sample = read.sample
    shown = None if sample is None else labels_of_page(run, sample, file)
    images = run.manifest(manifest).table
    imported = import_labels(read, images, run.class_table, seed=seed, **chosen)
    stage, found = shown if shown and labels is None else _labels_stage(run, labels), None
    if stage is not None:
        found = agreement.agreement_of(
            run.class_table, imported.corrections, stage, sample.image_ids if sample else None
        )
    if settings.dry_run:
        print_mapping("plan", {"write": output, **imported.counts})
        return
    extra: dict[str, Any] = {agreement.AGREEMENT: found} if found else {}
    if sample is not None:
        extra[agreement.SAMPLE] = {"image_ids": sample.image_ids, "drawn": sample.drawn}
    write_import(imported, output, extra, force=force)
    print_written("import-labels", output)
    print_mapping("counted", imported.counts)
    if imported.counts["quarantined"]:
        console.print(f"{imported.counts['quarantined']} entries could not be used:")
        for row in imported.quarantine.slice(0, _SHOWN).to_pylist():
            print_line(f"  {row['image_id']}: {row['error']}")
        print_line(f"correct them in {file} and import again with --force;")
        print_line(f"all are listed in {storage.join(output, 'quarantine')}")
    if sample is not None:
        _print_sample(sample, imported.counts)
    if found is not None:
        _print_agreement(found)
    where, split = ["--run-dir", run.config.run_dir], chosen["split"]
    print_next("hts", "filter", *where, f"filter.overrides={output}", why="to train on them")
    if imported.counts["validation_images"]:
        predict = ["hts", "predict", *where, "--manifest", output, f"predict.split={split}"]
        print_next(*predict, why="to validate on them")
        print_next(
            "hts", "evaluate", *where, "--annotations", output, "--split", split, why="and then"
        )
    if chosen["validation_share"] is None:
        console.print(
            "not both at once: they are the same images (--validation-share divides them)"
        )
    print_next("hts", "review", output, *where)


def _print_sample(sample: Sample, counts: Mapping[str, int]) -> None:
    """Say what of a review page is done, and what of it tells how good the labels are."""
    waiting = counts.get("not_reviewed", 0)
    if waiting:
        print_note(f"{waiting} images of the page are open: finish them, save, import with --force")
    counting = len(sample.image_ids)
    if counting < sample.drawn:
        print_note(
            f"{counting} of {sample.drawn} images drawn at random tell precision and recall: those"
            " up to the first that is open"
        )


@click.command("review")
@argument("corrections", metavar="DIR")
@option("--labels", metavar="DIR", help="Pseudo-labels to compare (default: the latest).")
@option("--json", "json_file", metavar="FILE", help="Also write the figures here.")
@stage_command()
def review_command(
    settings: Settings, corrections: str, labels: str | None, json_file: str | None
) -> None:
    """Compare pseudo-labels with corrections that `hts import-labels` wrote to DIR."""
    run = settings.open()
    stage = _labels_stage(run, labels) or require_stage(run.run_dir, "pseudo_labels", "filter")
    if settings.dry_run:
        count = len(agreement.corrections_of(corrections))
        print_mapping("plan", {"read": corrections, "images": count, "compare with": stage.path})
        return
    found = agreement.review(run, corrections, stage)
    if json_file:
        storage.write_json(json_file, found)
    _print_agreement(found)
    print_next("hts", "report", run.config.run_dir)


def _labels_stage(run: Run, given: str | None) -> StageFolder | None:
    if given is not None:
        return given_stage(given, "pseudo_labels")
    return find_stage(run.run_dir, "pseudo_labels")


def _print_agreement(found: dict[str, Any]) -> None:
    """Print an agreement overall, by class and the first disagreements."""
    overall, disagreements = found["overall"], found["disagreements"]
    kappa = overall["kappa"]
    figures = {
        "images in both": f"{found['images']} ({found['images_equal']} without a difference)",
        "precision": _with_interval(overall, "precision"),
        "recall": _with_interval(overall, "recall"),
        "Cohen's kappa": "-" if kappa is None else f"{kappa:.2f}",
        "wrong positives": overall["wrong"],
        "missed": f"{overall['missed']} called negative, {overall['undecided']} undecided",
    }
    if found["left_out_as_chosen"]:
        figures["not counted"] = f"{found['left_out_as_chosen']} images that were chosen, not drawn"
    if found["applied"]:
        figures["note"] = "these labels were made from these corrections: of course they agree"
    elif found["left_out_as_applied"]:
        figures["left out"] = f"{found['left_out_as_applied']} images whose corrections they hold"
    print_mapping(f"agreement of {found['pseudo_labels']} with people", figures)
    worst = sorted(found["per_class"], key=lambda row: -(row["wrong"] + row["missed"]))
    shares, numbers = ("precision", "recall"), ("confirmed", "wrong", "missed")
    rows = [
        [row["name"], *(percent(row[s]) for s in shares), *(str(row[n]) for n in numbers)]
        for row in worst[:_SHOWN]
        if row["wrong"] + row["missed"] + row["undecided"]
    ]
    if rows:
        header = ["class", "precision, %", "recall, %", "right", "wrong", "missed"]
        print_rows("classes with most mistakes", header, rows)
    keys = ("image_id", "name", "machine", "human")
    rows = [[entry[key] for key in keys] for entry in disagreements[:_SHOWN]]
    if rows:
        title = f"disagreements ({len(rows)} of {len(disagreements)})"
        print_rows(title, ["image", "class", "machine", "people"], rows, text_columns=4)


def _with_interval(overall: dict[str, Any], name: str) -> str:
    if overall[name] is None:
        return "-"
    low, high = (percent(side) for side in overall[f"{name}_interval"])
    return f"{percent(overall[name])} % (95 % interval {low} to {high})"
