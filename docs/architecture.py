"""Draws docs/architecture.svg: the rooms of the package, and what flows through them.

The rooms and their order come from the import contract in pyproject.toml, their purpose from the
first sentence of their docstrings. `make docs` runs this; a test compares the file.
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path
from xml.sax.saxutils import escape

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
TARGET = ROOT / "docs" / "architecture.svg"
# What a command reads, the room that does the work, and what comes out.
FLOW = (
    ("prepare", "images", "manifest"),
    ("label", "teacher", "region_scores"),
    ("filter", "labels", "pseudo_labels"),
    ("train", "student", "student"),
    ("predict", "student", "predictions"),
    ("evaluate", "evaluate", "evaluation"),
)
_ROW, _WIDTH, _LEFT, _FLOW_LEFT = 30, 1060, 20, 760
_TEXT = 'font-family="Helvetica, Arial, sans-serif" font-size="13" fill="#222"'
_SMALL = _TEXT.replace('"13"', '"12"')


def layers() -> list[list[str]]:
    """Return the rooms from the top down; those of one layer do not know each other."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    contracts = tomllib.loads(text)["tool"]["importlinter"]["contracts"]
    found = next(contract["layers"] for contract in contracts if contract["id"] == "layers")
    return [[name.strip() for name in layer.split("|")] for layer in found]


def purpose(room: str) -> str:
    """Return the first sentence of a room's docstring."""
    folder = ROOT / "hts_ray" / room
    file = folder / "__init__.py" if folder.is_dir() else folder.with_suffix(".py")
    text = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    return " ".join(text.split("\n\n")[0].split()).split(". ")[0].rstrip(".")


def draw() -> str:
    """Return the drawing as SVG."""
    rooms = [room for layer in layers() for room in layer]
    height = _ROW * (len(rooms) + 2) + 20
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{height}"'
        f' viewBox="0 0 {_WIDTH} {height}" role="img"'
        ' aria-label="The rooms of hts_ray and the tables that flow through them">',
        f'<rect width="{_WIDTH}" height="{height}" fill="#fff"/>',
        f'<text x="{_LEFT}" y="26" {_TEXT} font-weight="bold">Rooms: each imports only rooms'
        " that stand lower</text>",
        f'<text x="{_FLOW_LEFT}" y="26" {_TEXT} font-weight="bold">A run: command, room,'
        " table</text>",
    ]
    for number, room in enumerate(rooms):
        y = 40 + number * _ROW
        parts += [
            f'<rect x="{_LEFT}" y="{y}" width="110" height="{_ROW - 5}" rx="3" fill="#e8eef7"'
            ' stroke="#4a6fa5"/>',
            f'<text x="{_LEFT + 10}" y="{y + 17}" {_TEXT}>{escape(room)}</text>',
            f'<text x="{_LEFT + 122}" y="{y + 17}" {_SMALL}>{escape(_cut(purpose(room)))}</text>',
        ]
    parts += _flow()
    return "\n".join([*parts, "</svg>", ""])


def _flow() -> list[str]:
    parts, step = [], 3 * _ROW
    for number, (command, room, table) in enumerate(FLOW):
        y = 40 + number * step
        parts += [
            f'<text x="{_FLOW_LEFT + 130}" y="{y + 16}" {_SMALL}>hts {command} ({room})</text>',
            f'<path d="M{_FLOW_LEFT + 110} {y} v{step - _ROW - 14}" stroke="#a5744a"'
            ' stroke-width="1.5"/>',
            f'<path d="M{_FLOW_LEFT + 105} {y + step - _ROW - 14} l5 9 l5 -9 z" fill="#a5744a"/>',
            f'<rect x="{_FLOW_LEFT}" y="{y + step - _ROW - 2}" width="220" height="{_ROW - 5}"'
            ' rx="3" fill="#f7efe8" stroke="#a5744a"/>',
            f'<text x="{_FLOW_LEFT + 10}" y="{y + step - _ROW + 15}" {_TEXT}>{table}</text>',
        ]
    return parts


def _cut(text: str, longest: int = 92) -> str:
    return text if len(text) <= longest else text[: longest - 1].rsplit(" ", 1)[0] + " …"


if __name__ == "__main__":
    TARGET.write_text(draw(), encoding="utf-8")
