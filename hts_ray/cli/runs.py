"""Commands about a run as a whole: pipeline, demo, report."""

from __future__ import annotations

import click

from hts_ray import stages
from hts_ray.cli.options import (
    Settings,
    argument,
    option,
    print_metrics,
    print_next_stage,
    refuse_options,
    stage_command,
)
from hts_ray.cli.overview import find_runs, steps_of
from hts_ray.engine.console import (
    busy,
    console,
    print_mapping,
    print_next,
    print_stage,
    print_written,
)
from hts_ray.engine.session import command_cluster
from hts_ray.errors import DataError
from hts_ray.report import write_review_page
from hts_ray.teacher.stage import plan_label


@click.command("pipeline")
@option("--manifest", metavar="PATH", help="Manifest to start from (default: the run's).")
@stage_command()
def pipeline_command(settings: Settings, manifest: str | None) -> None:
    """Run label, filter, train, predict and (with annotations) evaluate."""
    run = settings.open()
    if settings.dry_run:
        images = run.manifest(manifest)
        with stages.placed(run, "pipeline") as (on_devices, _):
            first = plan_label(on_devices, images).folder.path
        rows = {"images": len(images.images), "write first": first}
        print_mapping("plan", {"read": images.path, **rows})
        return
    result = stages.pipeline(run, manifest, on_stage=print_stage)
    if result:
        print_metrics(result)
    else:
        console.print("no annotated image in the predicted split: nothing to evaluate")
    print_next_stage("report", run)


@click.command()
@option("--seed", default=0, show_default=True, help="Seed of the rendered world.")
@stage_command("demo")
def demo(settings: Settings, seed: int) -> None:
    """Run everything on the built-in synthetic world; nothing is downloaded."""
    from hts_ray.demo.run import demo_config, run_demo  # torch loads slowly

    config = demo_config(settings.config, seed)
    if settings.dry_run:
        print_mapping("plan", {"write": config.run_dir, "seed": seed})
        return
    with command_cluster(config, "demo"):
        run_demo(config)
    print_next("hts", "autolabel", "DIR", "a red bicycle", "an empty shelf", why="your own images")


@click.command()
@argument("run", metavar="RUN", required=False)
@option("--run-dir", metavar="DIR", help="The same as RUN (default: the latest here).")
@option(
    "--output", metavar="FILE", help="Where to write (default RUN/report.html, or RUN/review.html)."
)
@option("--images", type=click.IntRange(min=0), default=200, show_default=True,
        help="Images of the gallery or to review, at most.")  # fmt: skip
@option("--review", is_flag=True, help="Write the page to correct labels on instead.")
def report(
    run: str | None, run_dir: str | None, output: str | None, images: int, review: bool
) -> None:
    """Write one self-contained HTML page about a run."""
    if run:
        refuse_options({"run_dir": run_dir}, "name the run once")
    run_dir = run or run_dir or next(reversed(find_runs()), None)
    if run_dir is None or not any(step.begun for step in steps_of(run_dir)):
        what = "no run is found here" if run_dir is None else f"{run_dir} holds no run"
        raise DataError(f"{what}: `hts` alone lists the runs that are found here")
    if review:
        _review_page(run_dir, output, images)
        return
    with busy("report"):
        path = stages.write_run_report(run_dir, output, images)
    print_written("report", path)
    console.print("open it in a browser; it needs no other file")


def _review_page(run_dir: str, output: str | None, images: int) -> None:
    with busy("review"):
        page = write_review_page(run_dir, output, images)
    print_written("review", page.path)
    counts = {
        "images": f"{page.images}, {page.random} of them drawn at random",
        "size": f"{page.size / 1e6:.1f} MB",
    }
    if page.corrected:
        counts["left out"] = f"{page.corrected} images that people corrected before"
    if page.unreadable:
        counts["cannot be read any more"] = f"{page.unreadable} images"
    print_mapping("page", counts)
    console.print("open it in a browser; it needs no other file. Save there, and then")
    saved = ["hts", "import-labels", "FILE", "--run-dir", run_dir, "--output", "corrected"]
    print_next(*saved)
