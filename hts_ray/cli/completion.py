"""The scripts with which shells complete `hts`: click's own."""

from __future__ import annotations

import os
from typing import Any

import click
from click.shell_completion import (
    BashComplete,
    CompletionItem,
    FishComplete,
    add_completion_class,
    get_completion_class,
    split_arg_string,
)

SHELLS = ("bash", "zsh", "fish")
PROGRAM = "hts"
VARIABLE = "_HTS_COMPLETE"


class _Bash(BashComplete):
    """Bash splits words at equals signs, and replaces only what follows the last one."""

    def get_completion_args(self) -> tuple[list[str], str]:
        """Join words like `train.loss=bce` again."""
        current = int(os.environ["COMP_CWORD"])
        words: list[str] = []
        previous = ""
        for word in os.environ["COMP_WORDS"].split("\n")[: current + 1]:
            if words[1:] and "=" in (word, previous):
                words[-1] += word
            else:
                words.append(word)
            previous = word
        args = [part for word in words[1:-1] for part in split_arg_string(word)]
        incomplete = "".join(split_arg_string(words[-1])) if len(words) > 1 else ""
        self._typed = incomplete.rpartition("=")[0] + "=" if "=" in incomplete else ""
        return args, incomplete

    def format_completion(self, item: CompletionItem[Any]) -> str:
        """Leave out what the line already holds before the equals sign."""
        return f"{item.type},{str(item.value).removeprefix(self._typed)}"


class _Fish(FishComplete):
    """Click's script for fish ends a help text at its first comma."""

    def format_completion(self, item: CompletionItem[str]) -> str:
        """Write a help text without commas."""
        text = (item.help or "").replace(",", ";")
        return super().format_completion(CompletionItem(item.value, item.type, text))


add_completion_class(_Bash)
add_completion_class(_Fish)

_HELP = """Print the script with which a shell completes hts.

\b
bash: hts completion bash > ~/.local/share/bash-completion/completions/hts
zsh:  hts completion zsh > DIR/_hts, DIR being one of $fpath
fish: hts completion fish > ~/.config/fish/completions/hts.fish
"""


@click.command("completion", help=_HELP)
@click.argument("shell", type=click.Choice(SHELLS))
@click.pass_context
def command(context: click.Context, shell: str) -> None:
    """Print the script of a shell."""
    found = get_completion_class(shell)
    assert found is not None
    click.echo(found(context.find_root().command, {}, PROGRAM, VARIABLE).source(), nl=False)
