"""The `hts` command itself: what it shows without a subcommand, and how commands end."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence

import click

from hts_ray.cli.completion import SHELLS, script
from hts_ray.engine.console import errors
from hts_ray.errors import UserError

# How `hts --help` groups the commands; one that is missing here comes last.
_GROUPS = {
    "Stages": ("prepare", "label", "filter", "train", "predict", "evaluate", "report"),
    "More of a run": ("demo", "pipeline", "sweep"),
    "People and other tools": ("export", "import-labels", "review", "import-checkpoint"),
    "Machines": ("submit", "doctor", "completion"),
}


class Commands(click.Group):
    """A group that lists its commands in the order in which they are used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names of all commands."""
        known = [name for names in _GROUPS.values() for name in names if name in self.commands]
        return known + sorted(self.commands.keys() - set(known))

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the commands, a heading a group."""
        names = self.list_commands(ctx)
        known = {name for group in _GROUPS.values() for name in group}
        others = {"Other": tuple(name for name in names if name not in known)}
        for title, group in {**_GROUPS, **others}.items():
            shown = [self.commands[name] for name in group if name in self.commands]
            rows = [(command.name or "", command.get_short_help_str(120)) for command in shown]
            if rows:
                with formatter.section(title):
                    formatter.write_dl(rows)


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
    from hts_ray.cli.overview import print_overview

    print_overview(run_dir)


_COMPLETION_HELP = """Print what makes a shell complete hts.

\b
bash: hts completion bash > ~/.local/share/bash-completion/completions/hts
zsh:  hts completion zsh > DIR/_hts, DIR being one of $fpath
fish: hts completion fish > ~/.config/fish/completions/hts.fish
"""


@cli.command("completion", help=_COMPLETION_HELP)
@click.argument("shell", type=click.Choice(SHELLS))
def completion_command(shell: str) -> None:
    """Print what makes a shell complete hts."""
    click.echo(script(shell, cli), nl=False)


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
        errors.print(f"[bold red]error[/bold red]: {_escape(_unexpected(error))}")
        sys.exit(1)


_NO_ROOM = re.compile(r"^.*(?:No space left on device|Disk quota exceeded).*$", re.M)


def _unexpected(error: Exception) -> str:
    """Return what to say of an error that nobody foresaw, also where Ray has wrapped it."""
    told = f"{type(error).__name__}: {error}"
    if full := _NO_ROOM.findall(told):
        return (
            f"a disk is full: {full[-1].strip()}\n"
            "Make room and run the same command again, it goes on where it was."
        )
    return f"{told}\nThis is a fault of hts_ray or of the cluster; HTS_DEBUG=1 shows where."


def _escape(text: str) -> str:
    from rich.markup import escape

    return escape(text)
