"""The `hts` command itself: which commands there are, and how they end."""

from __future__ import annotations

import difflib
import importlib
import os
import re
import sys
from collections.abc import Sequence

import click
from click.shell_completion import CompletionItem
from rich.markup import escape

import hts_ray.cli.completion  # noqa: F401 - registers what answers shells
from hts_ray.cli.commands import HEADINGS, MODULES, SHORT_HELP, complete_command
from hts_ray.engine.console import errors
from hts_ray.errors import UserError


class Commands(click.Group):
    """A group that imports a command's module when the command is needed, and not before."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names of all commands, in the order of their headings."""
        return list(MODULES)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the module of a command and return the command; None for an unknown name."""
        if cmd_name not in MODULES:
            return None
        found = vars(importlib.import_module(f"hts_ray.cli.{MODULES[cmd_name]}")).values()
        commands = [value for value in found if isinstance(value, click.Command)]
        return next(command for command in commands if command.name == cmd_name)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command of some arguments; of an unknown one, name the nearest there is."""
        near = difflib.get_close_matches(args[0], MODULES, n=1)
        if near and args[0] not in MODULES:
            ctx.fail(f"No such command {args[0]!r}; did you mean {near[0]!r}?")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the commands under their headings."""
        for title, names in HEADINGS.items():
            with formatter.section(title):
                formatter.write_dl([(name, SHORT_HELP[name]) for name in names])

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem[str]]:
        """Complete the name of a command, or an option of `hts` itself."""
        return complete_command(incomplete) + click.Command.shell_complete(self, ctx, incomplete)


@click.group(cls=Commands, invoke_without_command=True)
@click.version_option(package_name="hts-ray")
@click.option(
    "--run-dir", metavar="DIR", help="Run to show the state of (default: the latest here)."
)
@click.pass_context
def cli(context: click.Context, run_dir: str | None) -> None:
    """Turn unlabeled images and a class list into a multi-label classifier.

    Without a command: the stages, and where the run in --run-dir stands.
    """
    if context.invoked_subcommand is not None:
        return
    from hts_ray.cli.overview import print_overview  # pyarrow loads slowly

    print_overview(run_dir)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; a user's mistake ends with its message and exit code 1 or 2."""
    try:
        cli.main(args=list(arguments) if arguments is not None else None, standalone_mode=False)
    except click.exceptions.Exit as stop:
        sys.exit(stop.exit_code)
    except (click.Abort, KeyboardInterrupt):
        errors.print("\nstopped: what was done is kept, and the same command goes on from there")
        sys.exit(130)
    except click.ClickException as error:
        error.show()
        sys.exit(2)
    except UserError as error:
        errors.print(f"[bold red]error[/bold red]: {escape(str(error))}")
        sys.exit(error.exit_code)
    except Exception as error:
        if os.environ.get("HTS_DEBUG"):
            raise
        errors.print(f"[bold red]error[/bold red]: {escape(_unexpected(error))}")
        sys.exit(1)


_NO_ROOM = re.compile(r"^.*(?:No space left on device|Disk quota exceeded).*$", re.M)


def _unexpected(error: Exception) -> str:
    """Return what to say about an error that is no UserError, also where Ray has wrapped it."""
    message = f"{type(error).__name__}: {error}"
    if full := _NO_ROOM.findall(message):
        return (
            f"a disk is full: {full[-1].strip()}\n"
            "Make room and run the same command again: it resumes where it stopped."
        )
    return f"{message}\nThis is a fault of hts_ray or of the cluster; HTS_DEBUG=1 shows where."
