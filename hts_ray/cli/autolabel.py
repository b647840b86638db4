"""`hts autolabel`: from a folder of images and class names to labels, in one command."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Mapping, Sequence

import click

from hts_ray import stages
from hts_ray.cli.completers import complete_folder_or_setting
from hts_ray.cli.options import Settings, option, stage_command
from hts_ray.engine.console import (
    duration,
    print_line,
    print_next,
    print_note,
    print_rows,
    print_stage,
    print_written,
)
from hts_ray.engine.run import Run
from hts_ray.errors import ConfigError, DataError
from hts_ray.images.folder import read_folder
from hts_ray.stages import autolabel
from hts_ray.store.run import StageFolder
from hts_ray.store.tables import read_table

_CLASSES_SHOWN, _BAD_SHOWN, _NAMES_WIDTH = 10, 5, 60


def _home(arguments: Sequence[str]) -> str:
    """Return the run directory of the folder that the first argument names."""
    if not arguments:
        raise ConfigError('no folder is named: hts autolabel photos "a red bicycle" "a shelf"')
    return autolabel.beside(arguments[0])


@click.command("autolabel", epilog='Example: hts autolabel photos "a red bicycle" "a shelf"')
@option("--classes", "file", metavar="FILE", help="Take the classes of a CSV file.")
@option("--teacher", metavar="MODEL", help="The model that looks: a hub id or a path.")
@option("--yes", is_flag=True, help="Go on after the sample without a question.")
@option("--train", is_flag=True, help="Train a student on the labels too, and predict with it.")
@stage_command(
    autolabel.PRESET, paths="PATH [CLASS]...", complete=complete_folder_or_setting, home=_home
)
def command(
    settings: Settings,
    paths: tuple[str, ...],
    file: str | None,
    teacher: str | None,
    yes: bool,
    train: bool,
) -> None:
    """Label a folder of images with the classes that you name.

    A sample is labeled first, and you are asked before the rest is. What is done is kept in
    --run-dir (default: beside PATH), so the same command goes on after a stop, and labels only
    what is new when there are more images.
    """
    folder, *names = paths or ("",)
    run = autolabel.open_folder(folder, settings.config, names, file or "", teacher)
    _print_plan(run, folder)
    if settings.dry_run:
        found = read_folder(folder, follow_symlinks=run.config.prepare.follow_symlinks)
        if not len(found.listed):
            raise DataError(f"no image under {folder}: name the folder that holds the images")
        print_line(f"{len(found.listed):,} images to look at; this is a dry run, nothing was done")
        return
    place = run.config.run_dir
    again = [folder] if place == autolabel.beside(folder) else [folder, "--run-dir", place]
    _print_listed(autolabel.list_images(run, folder))
    agreed = autolabel.is_agreed(run)
    if agreed is False:
        print_note("other classes or settings than before: the teacher looks at all images anew")
    with autolabel.cluster(run):
        if not agreed and not _wanted(run, again, yes):
            return
        labels = autolabel.label_all(run)
    _print_labels(labels)
    if not train:
        print_next("hts", "autolabel", *again, "--train", why="to train a fast model on them")
        return
    student = stages.train(run, labels.stage)
    print_stage("train", student)
    print_stage("predict", stages.predict(run, student))
    print_written("report", stages.write_run_report(place))
    print_next("hts", "predict", "DIR", "--student", place, why="label other images")


def _print_plan(run: Run, folder: str) -> None:
    names = run.class_table.names
    shown = textwrap.shorten(", ".join(names), _NAMES_WIDTH, placeholder=" ...")
    print_line(f"classes: {len(names):,} ({shown})")
    print_line(f"teacher: {run.config.labeling.teacher.model}")
    print_line(f"images:  {folder}")
    print_line(f"output:  {run.config.run_dir}")


def _print_listed(manifest: StageFolder) -> None:
    """Say how many images there are, and which cannot be used."""
    counts = manifest.stats
    print_line(f"{counts['usable']:,} images can be used")
    bad = read_table(manifest.file("quarantine")).to_pylist() if counts["quarantined"] else []
    for row in bad[:_BAD_SHOWN]:
        print_line(f"not used: {row['uri']}: {row['error']}")
    if len(bad) > _BAD_SHOWN:
        print_line(f"and {len(bad) - _BAD_SHOWN:,} more: see {manifest.file('quarantine')}")


def _wanted(run: Run, again: Sequence[str], yes: bool) -> bool:
    """Label a sample, show what it says, and return whether all images are to be labeled."""
    sample = autolabel.label_sample(run)
    print_line(f"a sample of {sample.images:,} images was labeled")
    _print_counts(sample.labels, sample.bare)
    print_written("preview", sample.path)
    rest = sample.total - sample.images
    if sample.seconds is not None and rest > 0:
        print_line(f"the other {rest:,} images take at most about {duration(sample.seconds)}")
    if yes:
        return True
    if not sys.stdin.isatty():
        print_line("stopped here: without a terminal nobody can be asked whether to go on")
    elif click.confirm("Look at the preview in a browser. Label all images like this?"):
        return True
    print_next("hts", "autolabel", *again, "--yes", why="to label all images")
    print_line("or run it again with other words for a class, or another --teacher")
    return False


def _print_labels(labels: autolabel.Labels) -> None:
    counts = labels.stage.stats
    per_class = {int(i): number for i, number in counts["positives_per_class"].items() if number}
    table = labels.run.class_table
    ranked = sorted(per_class.items(), key=lambda found: -found[1])
    print_line(f"{counts['positives']:,} labels of {counts['rows_out']:,} images")
    named = {table[table.index_of(i)].name: number for i, number in ranked}
    _print_counts(named, counts["images_without_positive"])
    print_written("labels", labels.path)
    print_written("report", labels.report)
    print_line("look at the report in a browser: it shows the images with their labels")
    place = labels.run.config.run_dir
    print_next("hts", "report", place, "--review", why="to correct labels on a page")


def _print_counts(labels: Mapping[str, int], bare: int) -> None:
    """Print in how many images each class was found, the most frequent first."""
    shown = dict(list(labels.items())[:_CLASSES_SHOWN])
    if more := len(labels) - len(shown):
        shown[f"{more:,} more classes"] = sum(labels.values()) - sum(shown.values())
    rows = [[name, f"{number:,}"] for name, number in {**shown, "no label": bare}.items()]
    print_rows("how many images show each class", ["class", "images"], rows)
