"""Shell completion: commands, options, paths, presets, formats, and settings with their values.

Click's own, with three changes: a setting that is completed up to its `.` or `=` gets no space
behind it; bash, which takes words apart at `=`, completes what stands after it; fish shows help
that holds a comma.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin

import click
from click.shell_completion import (
    BashComplete,
    CompletionItem,
    FishComplete,
    ZshComplete,
    add_completion_class,
    get_completion_class,
    split_arg_string,
)

if TYPE_CHECKING:
    from hts_ray.config import Section

SHELLS = ("bash", "zsh", "fish")
PROGRAM = "hts"
VARIABLE = "_HTS_COMPLETE"

_BASH = """\
%(complete_func)s() {
    local IFS=$'\\n'
    local response type value
    response=$(env COMP_WORDS="${COMP_WORDS[*]}" COMP_CWORD=$COMP_CWORD \
%(complete_var)s=bash_complete $1)
    for completion in $response; do
        IFS=',' read type value <<< "$completion"
        if [[ $type == 'dir' ]]; then
            COMPREPLY=()
            compopt -o dirnames
        elif [[ $type == 'file' ]]; then
            COMPREPLY=()
            compopt -o default
        elif [[ $type == 'plain' ]]; then
            COMPREPLY+=("$value")
        fi
    done
    if [[ ${COMPREPLY[0]} == *[.=] ]]; then
        compopt -o nospace
    fi
    return 0
}

complete -o nosort -F %(complete_func)s %(prog_name)s
"""
# What click's script does with each completion, in the place of which ours also knows open ones.
_ZSH_PLAIN = """\
        if [[ "$type" == "plain" ]]; then
"""
_ZSH_OPEN = """\
        if [[ "$type" == "plain" && "$key" == *[.=] ]]; then
            open+=("$key")
        elif [[ "$type" == "plain" ]]; then
"""
_ZSH_LIST = "    local -a completions\n"
_ZSH_ADD = """\
    if [ -n "$completions" ]; then
"""


class _Bash(BashComplete):
    source_template = _BASH

    def get_completion_args(self) -> tuple[list[str], str]:
        """Put together again what bash took apart at equals signs."""
        words: list[str] = []
        current = int(os.environ["COMP_CWORD"])
        previous = ""
        for word in os.environ["COMP_WORDS"].split("\n")[: current + 1]:
            if words[1:] and "=" in (word, previous):
                words[-1] += word
            else:
                words.append(word)
            previous = word
        args = [part for word in words[1:-1] for part in split_arg_string(word)]
        incomplete = "".join(split_arg_string(words[-1])) if len(words) > 1 else ""
        self._shown = incomplete.rpartition("=")[0] + "=" if "=" in incomplete else ""
        return args, incomplete

    def format_completion(self, item: CompletionItem[Any]) -> str:
        """Leave out what stands before the equals sign on the line already."""
        return f"{item.type},{str(item.value).removeprefix(self._shown)}"


class _Zsh(ZshComplete):
    source_template = (
        ZshComplete.source_template.replace(_ZSH_PLAIN, _ZSH_OPEN)
        .replace(_ZSH_LIST, _ZSH_LIST + "    local -a open\n")
        .replace(_ZSH_ADD, "    compadd -U -S '' -V unsorted -a open\n\n" + _ZSH_ADD)
    )


class _Fish(FishComplete):
    # A help text may hold commas too.
    source_template = FishComplete.source_template.replace(
        'string split ","', 'string split --max 1 ","'
    )


add_completion_class(_Bash)
add_completion_class(_Zsh)
add_completion_class(_Fish)


class Place(click.types.StringParamType):
    """A path or URI, which nothing is checked of here; completed with files or with folders."""

    name = "path"

    def __init__(self, kind: Literal["file", "dir"]) -> None:
        self.kind = kind

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem[str]]:
        """Let the shell complete paths."""
        return [CompletionItem(incomplete, type=self.kind)]


# Paths by the name that a command's help gives them.
PLACES = {"DIR": Place("dir"), "RUN": Place("dir"), "FILE": Place("file"), "PATH": Place("file")}


def script(shell: str, command: click.Command) -> str:
    """Return what a shell is to run so that it completes `hts`."""
    found = get_completion_class(shell)
    assert found is not None
    return found(command, {}, PROGRAM, VARIABLE).source()


def complete_preset(
    ctx: click.Context, param: click.Parameter, incomplete: str
) -> list[CompletionItem[str]]:
    """Complete the name of a packaged preset."""
    from hts_ray.config import preset_names

    return [CompletionItem(name) for name in preset_names() if name.startswith(incomplete)]


def complete_setting(
    ctx: click.Context, param: click.Parameter, incomplete: str
) -> list[CompletionItem[str]]:
    """Complete `section.name=value`, one part after the other."""
    name, equals, value = incomplete.partition("=")
    if equals:
        return [
            CompletionItem(f"{name}={choice}")
            for choice in _choices(name)
            if choice.startswith(value)
        ]
    section, _, start = name.rpartition(".")
    return [
        CompletionItem(f"{section}.{part}" if section else part, help=text)
        for part, text in _parts(section)
        if part.startswith(start)
    ]


def complete_path_or_setting(
    ctx: click.Context, param: click.Parameter, incomplete: str
) -> list[CompletionItem[str]]:
    """Complete a setting where one is begun, else a file: for commands that take both."""
    settings = complete_setting(ctx, param, incomplete) if incomplete else []
    return settings or [CompletionItem(incomplete, type="file")]


def complete_job(
    ctx: click.Context, param: click.Parameter, incomplete: str
) -> list[CompletionItem[str]]:
    """Complete the command that a job runs, then its settings."""
    if ctx.params.get("arguments"):
        return complete_setting(ctx, param, incomplete)
    group = ctx.find_root().command
    assert isinstance(group, click.Group)
    return [
        CompletionItem(name, help=group.commands[name].get_short_help_str())
        for name in group.list_commands(ctx)
        if name.startswith(incomplete)
    ]


def _section(dotted: str) -> type[Section] | None:
    """Return the section of that name, the whole configuration for none."""
    from hts_ray.config import HtsConfig, Section

    section: type[Section] = HtsConfig
    for part in dotted.split(".") if dotted else ():
        field = section.model_fields.get(part)
        inner = None if field is None else field.annotation
        if not (isinstance(inner, type) and issubclass(inner, Section)):
            return None
        section = inner
    return section


def _parts(dotted: str) -> Iterator[tuple[str, str]]:
    """Yield what can follow a section's name, sections with a dot behind, and what it means."""
    from hts_ray.config import Section

    section = _section(dotted)
    for name, field in {} if section is None else section.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, Section):
            yield f"{name}.", (inner.__doc__ or "").partition("\n")[0]
        else:
            yield f"{name}=", field.description or ""


def _choices(dotted: str) -> list[str]:
    """Return the values of a setting that has only a few, as they are written."""
    parent, _, name = dotted.rpartition(".")
    section = _section(parent)
    if section is None or name not in section.model_fields:
        return []
    return list(dict.fromkeys(_values(section.model_fields[name].annotation)))


def _values(annotation: Any) -> Iterator[str]:
    if annotation is bool:
        yield from ("true", "false")
    elif annotation is type(None):
        yield "null"
    elif get_origin(annotation) is Literal:
        yield from (str(value) for value in get_args(annotation))
    elif get_origin(annotation) not in (tuple, list, dict):
        for part in get_args(annotation):
            yield from _values(part)
