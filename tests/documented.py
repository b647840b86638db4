"""What the documentation tells its readers to run, to write and to open."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import click

from hts_ray.cli import cli
from hts_ray.cli.options import split_settings
from hts_ray.config import load_config

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    "README.md",
    "CONTRIBUTING.md",
    "cluster/README.md",
    *sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").glob("*.md")),
]
_FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.M | re.S)
_INDENTED_SCRIPT = re.compile(r"^    (?:nice -n \d+ )?(python \S+\.py.*(?:\n {8,}\S.*)*)$", re.M)
_LINK = re.compile(r"(?<!!)\[[^\]]+\]\(([^)\s]+)(?: \"([^\"]*)\")?\)")
_ASSIGNMENT = re.compile(r"[A-Z_]+=")
_OPTION = re.compile(r"(?<![\w-])--[a-z][\w-]*")


@dataclass(frozen=True)
class Command:
    """A command of a page: its program without a folder, and where its output is sent."""

    page: str
    program: str
    arguments: tuple[str, ...]
    output: str | None = None

    def __str__(self) -> str:
        return " ".join([self.program, *self.arguments])


def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page: str, language: str) -> list[str]:
    """Return the fenced blocks of a language."""
    return [body for _, named, body in _FENCE.findall(text_of(page)) if named == language]


def prose(page: str) -> str:
    """Return a page without its fenced blocks."""
    return _FENCE.sub("", text_of(page))


def commands(page: str) -> list[Command]:
    """Return the commands of a page's shell blocks, and scripts that stand in indented ones."""
    lines = [
        line
        for body in blocks(page, "bash")
        for line in body.replace("\\\n", " ").splitlines()
        if line.strip() and not line.strip().startswith("#")
    ]
    lines += [" ".join(text.split()) for text in _INDENTED_SCRIPT.findall(prose(page))]
    return [command_of(page, line) for line in lines]


def command_of(page: str, line: str) -> Command:
    """Read a line of a shell: variables before it, comments and what it sends where are left."""
    words, output = shlex.split(line, comments=True), None
    while _ASSIGNMENT.match(words[0]):
        words.pop(0)
    if ">" in words:
        place = words.index(">")
        words, output = words[:place], words[place + 1]
    return Command(page, words[0].rsplit("/", 1)[-1], tuple(words[1:]), output)


def inline(page: str) -> Iterator[list[str]]:
    """Yield the words of commands of ours that stand within sentences."""
    for span in re.findall(r"`([^`]+)`", prose(page)):
        words = span.split()
        if words[0].rsplit("/", 1)[-1] in {"hts", "make", "python"}:
            yield [words[0].rsplit("/", 1)[-1], *words[1:]]


def links(page: str) -> list[tuple[str, str]]:
    """Return the targets and titles of a page's links."""
    return _LINK.findall(prose(page))


def anchors(page: str) -> set[str]:
    """Return what a page's headings are called in addresses."""
    titles = re.findall(r"^#+ (.+)$", prose(page), re.M)
    plain = [re.sub(r"[^\w\- ]", "", title.strip().lower()) for title in titles]
    return {title.replace(" ", "-") for title in plain}


def hts_command(name: str) -> click.Command:
    """Return a command of `hts`."""
    command = cli.get_command(click.Context(cli), name)
    assert command is not None, f"hts {name}"
    return command


def check_hts(arguments: Sequence[str]) -> None:
    """Raise for a command, an option, a setting, a preset or a format that is not known."""
    from hts_ray.exports.writing import FORMATS as LABELS
    from hts_ray.student.convert import FORMATS as STUDENTS

    if not arguments or arguments[0].startswith("-"):
        cli.make_context("hts", list(arguments), resilient_parsing=not arguments)
        return
    name, *rest = arguments
    given = hts_command(name).make_context(name, rest).params
    if name == "submit":
        if given["arguments"]:
            check_hts(given["arguments"])
        return
    settings, paths = split_settings(given.get("overrides", ()))
    assert name in {"autolabel", "predict"} or not paths, f"hts {name} takes no {paths}"
    if "preset" in given:
        load_config(preset=given["preset"], overrides=settings)
    if "form" in given:
        assert given["form"] in {*LABELS, *STUDENTS}, given["form"]


def check_mention(words: Sequence[str]) -> None:
    """Raise as `check_hts` does for a part of a command, which may lack what it needs."""
    if len(words) < 2:
        return
    command = hts_command(words[1])
    known = {"--help", *(name for option in command.params for name in option.opts)}
    assert set(_OPTION.findall(" ".join(words))) <= known, words
    load_config(overrides=split_settings(words[2:])[0])
    if "--format" in words:
        check_hts(["export", *words[words.index("--format") :][:2], "--output", "x"])


def check_make(arguments: Sequence[str]) -> None:
    """Raise for a target or a variable that the Makefile does not have."""
    makefile = text_of("Makefile")
    for argument in arguments:
        name, equals, _ = argument.partition("=")
        rule = rf"^{re.escape(name)} \?=" if equals else rf"^{re.escape(name)}:"
        assert re.search(rule, makefile, re.M), f"make {argument}"


def check_script(arguments: Sequence[str]) -> None:
    """Raise for a script that is not there, or an option that it does not have."""
    script = ROOT / arguments[0]
    assert script.is_file(), script
    if script.parent.name == "jobs":
        check_hts([script.stem, *(entry for entry in arguments[1:] if entry != "...")])
        return
    known = set(re.findall(r'"(--[\w-]+)"', script.read_text(encoding="utf-8")))
    assert set(_OPTION.findall(" ".join(arguments[1:]))) <= known, arguments
