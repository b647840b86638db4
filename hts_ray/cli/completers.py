"""What completes a word of a command line: paths, presets, commands, and settings with values.

A shell puts a space behind a word that has only one completion. So a word that ends in `.` or `=`
is never offered alone: a section is offered with its settings, a setting with a value.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal, get_args, get_origin

import click
from click.shell_completion import CompletionItem

from hts_ray.cli.commands import complete_command
from hts_ray.config import find_setting, preset_names, walk_fields

Completer = Callable[[click.Context, click.Parameter, str], list[CompletionItem[str]]]


class Place(click.types.StringParamType):
    """A path or URI, completed with files or with folders; whether it exists is checked later."""

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


def complete_preset(
    ctx: click.Context, param: click.Parameter, incomplete: str
) -> list[CompletionItem[str]]:
    """Complete the name of a packaged preset."""
    return _matching(preset_names(), incomplete)


def complete_setting(
    ctx: click.Context, param: click.Parameter, incomplete: str
) -> list[CompletionItem[str]]:
    """Complete `section.name=value`, one part after the other."""
    name, equals, _ = incomplete.partition("=")
    settings = {s.name: s.description for s in walk_fields() if s.name.startswith(name)}
    if equals:
        values = _values(name) if name in settings else ()
        return _matching((f"{name}={value}" for value in values), incomplete)
    if len(settings) == 1:
        [(dotted, text)] = settings.items()
        values = _values(dotted)
        shown = values if len(values) > 1 else ["", *values]
        return [CompletionItem(f"{dotted}={value}", help=text) for value in shown]
    common = os.path.commonprefix(list(settings))  # noqa: RUF071 - of names, not of paths
    section = common[: common.rfind(".") + 1]
    parts: dict[str, str | None] = {}
    for dotted, text in settings.items():
        part, inner, _ = dotted.removeprefix(section).partition(".")
        parts[f"{section}{part}{inner or '='}"] = None if inner else text
    return [CompletionItem(part, help=text) for part, text in parts.items()]


def complete_path_or_setting(
    ctx: click.Context, param: click.Parameter, incomplete: str
) -> list[CompletionItem[str]]:
    """Complete a setting where one is begun, else a file: for commands that take both."""
    settings = complete_setting(ctx, param, incomplete) if incomplete else []
    return settings or [CompletionItem(incomplete, type="file")]


def complete_folder_or_setting(
    ctx: click.Context, param: click.Parameter, incomplete: str
) -> list[CompletionItem[str]]:
    """Complete a folder, then settings: what else follows the folder are names of classes."""
    if not ctx.params.get("overrides"):
        return [CompletionItem(incomplete, type="dir")]
    return complete_setting(ctx, param, incomplete) if "." in incomplete else []


def complete_job(
    ctx: click.Context, param: click.Parameter, incomplete: str
) -> list[CompletionItem[str]]:
    """Complete the command that a job runs, then its settings."""
    if ctx.params.get("arguments"):
        return complete_setting(ctx, param, incomplete)
    return complete_command(incomplete)


def _matching(values: Iterable[str], incomplete: str) -> list[CompletionItem[str]]:
    return [CompletionItem(value) for value in values if value.startswith(incomplete)]


def _values(dotted: str) -> list[str]:
    """Return the values of a setting that has only a few, else its default, as they are written."""
    setting = find_setting(dotted)
    assert setting is not None
    few = list(dict.fromkeys(_choices(setting.info.annotation)))
    default = setting.info.get_default()
    if isinstance(default, list | tuple | dict):
        return [*few, "{" if isinstance(default, dict) else "["]
    shown = default if isinstance(default, str) else json.dumps(default)
    return few if shown in few or not shown else [*few, shown]


def _choices(annotation: Any) -> Iterator[str]:
    if annotation is bool:
        yield from ("true", "false")
    elif annotation is type(None):
        yield "null"
    elif get_origin(annotation) is Literal:
        yield from (str(value) for value in get_args(annotation))
    elif get_origin(annotation) not in (tuple, list, dict):
        for part in get_args(annotation):
            yield from _choices(part)
