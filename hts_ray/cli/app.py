"""The `hts` command itself: what it shows without a subcommand, and how commands end."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

import click

from hts_ray import pipeline
from hts_ray.console import errors, print_rows
from hts_ray.errors import UserError


@click.group(invoke_without_command=True)
@click.version_option(package_name="hts-ray")
@click.option("--run-dir", default="runs/default", metavar="DIR", help="Run to show the state of.")
@click.pass_context
def cli(context: click.Context, run_dir: str) -> None:
    """Turn unlabeled images and a class list into a multi-label classifier.

    Without a subcommand: the stages, and where the run in --run-dir stands.
    """
    if context.invoked_subcommand is not None:
        return
    rows = []
    for table, stage in pipeline.stage_overview(run_dir):
        command = _COMMAND_OF[table]
        state = f"{stage.stats.get('rows_out', 0)} rows in {stage.path}" if stage else "not yet"
        rows.append([f"hts {command}", table, state])
    print_rows(f"run {run_dir}", ["stage", "table", "state"], rows, text_columns=3)
    click.echo("`hts COMMAND --help` tells a command's options; `hts demo` needs no data.")


_COMMAND_OF = {
    "manifest": "prepare",
    "region_scores": "label",
    "pseudo_labels": "filter",
    "student": "train",
    "predictions": "predict",
    "evaluation": "evaluate",
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; a user's mistake ends with its message and exit code 1 or 2."""
    try:
        cli.main(args=list(arguments) if arguments is not None else None, standalone_mode=False)
    except click.exceptions.Exit as stop:
        sys.exit(stop.exit_code)
    except click.Abort:
        errors.print("stopped")
        sys.exit(130)
    except click.ClickException as error:
        error.show()
        sys.exit(2)
    except UserError as error:
        errors.print(f"[bold red]error[/bold red]: {_escape(str(error))}")
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        errors.print("stopped")
        sys.exit(130)
    except Exception as error:
        if os.environ.get("HTS_DEBUG"):
            raise
        errors.print(
            f"[bold red]error[/bold red]: {_escape(f'{type(error).__name__}: {error}')}\n"
            "This is a fault of hts_ray or of the cluster; HTS_DEBUG=1 shows where."
        )
        sys.exit(1)


def _escape(text: str) -> str:
    from rich.markup import escape

    return escape(text)
