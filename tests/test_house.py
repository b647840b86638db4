"""The house itself: what no linter counts."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "hts_ray"
MOST_ENTRIES, MOST_FUNCTION_LINES, MOST_INNER_IMPORTS, MOST_LINES = 24, 60, 25, 38_560


def modules() -> Iterator[tuple[Path, ast.Module, list[str]]]:
    """Yield every module's file, tree and lines."""
    for path in sorted(PACKAGE.rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        yield path.relative_to(ROOT), ast.parse(text), text.splitlines()


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Yield all functions of a module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def test_the_top_level_can_be_taken_in_at_a_glance() -> None:
    """Catches a room that is opened beside the rooms that there are."""
    entries = [path.name for path in PACKAGE.iterdir() if path.name != "__pycache__"]
    assert len(entries) <= MOST_ENTRIES, sorted(entries)


def test_the_package_does_not_grow_unseen() -> None:
    """Catches code that comes without other code going. Raise the figure only with a reason."""
    assert sum(len(lines) for _, _, lines in modules()) <= MOST_LINES


def test_functions_fit_on_a_screen() -> None:
    """Catches a function that nobody can read at once."""
    long = [
        f"{path}:{node.lineno} {node.name}"
        for path, tree, _ in modules()
        for node in functions(tree)
        if (node.end_lineno or 0) - node.lineno + 1 > MOST_FUNCTION_LINES
    ]
    assert not long


def test_imports_inside_functions_are_few_and_say_why() -> None:
    """Catches imports that hide the graph of the rooms."""
    found, unexplained = set(), []
    for path, tree, lines in modules():
        for function in functions(tree):
            for node in ast.walk(function):
                if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("hts_ray"):
                    found.add((path, node.lineno))
                    here = lines[node.lineno - 2 : node.end_lineno]
                    if not any("#" in line for line in here):
                        unexplained.append(f"{path}:{node.lineno}")
    assert len(found) <= MOST_INNER_IMPORTS, sorted(map(str, found))
    assert not unexplained


def test_the_drawing_is_that_of_the_house(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a room that moved and a drawing that did not."""
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    monkeypatch.delitem(sys.modules, "architecture", raising=False)
    import architecture

    drawn = (ROOT / "docs" / "architecture.svg").read_text(encoding="utf-8")
    assert drawn == architecture.draw(), "run `make docs` and commit docs/architecture.svg"
