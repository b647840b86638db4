"""Write docs/settings.md, the reference of all settings, from their declarations.

python docs/settings_page.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal, get_args, get_origin

from hts_ray.config import HtsConfig, Section, Setting, walk_settings

PAGE = Path(__file__).with_name("settings.md")
HEAD = """\
# All settings

Written by `make docs` from `hts_ray/config/sections.py`. Give a setting as `section.name=value` on
the command line, or in a YAML file with `--config`; `hts train --print-config` prints all of them
with their values. A star marks a setting that says how a stage runs. It does not change the answer,
so a finished stage is not run again when it changes.
"""


def render() -> str:
    """Return the page: a table for every section, and for a kind of section only once."""
    own = [found for found in walk_settings(HtsConfig) if "." not in found.name]
    lines = [HEAD, *_table("", own)]
    shown: dict[type[Section], str] = {}
    for found in walk_settings(HtsConfig):
        if found.section is None:
            continue
        lines += ["", f"## {found.name}", "", found.description, ""]
        if found.section in shown:
            first = shown[found.section]
            lines.append(f"The same settings as [{first}](#{first.replace('.', '')}).")
            continue
        shown[found.section] = found.name
        inner = list(walk_settings(found.section, f"{found.name}.", found.execution))
        lines += _table(found.name, inner)
    return "\n".join(lines) + "\n"


def _table(section: str, settings: list[Setting]) -> list[str]:
    own = [s for s in settings if s.name.rpartition(".")[0] == section and s.section is None]
    head = ["| setting | default | meaning |", "|---|---|---|"] if own else []
    return head + [
        f"| `{s.name}`{'*' if s.execution else ''} | `{json.dumps(s.info.get_default())}` |"
        f" {_meaning(s).replace('|', chr(92) + '|')} |"
        for s in own
    ]


def _meaning(setting: Setting) -> str:
    options = [setting.info.annotation, *get_args(setting.info.annotation)]
    choices = next((get_args(kind) for kind in options if get_origin(kind) is Literal), ())
    named = ", ".join(f"`{choice}`" for choice in choices if len(choices) > 1)
    return setting.description + (f" ({named})" if named else "")


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
