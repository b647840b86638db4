"""The packaged data of the grammar: lists of words, and the file of the lexicon."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import yaml


def read_data(name: str) -> Any:
    """Return what a YAML file of this room holds."""
    text = Path(__file__).with_name(name).read_text(encoding="utf-8")
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # a hundred times faster where built
    return yaml.load(text, Loader=loader)  # noqa: S506


@functools.cache
def word_lists() -> dict[str, Any]:
    """Return all lists of `words.yaml`, by name."""
    lists: dict[str, Any] = read_data("words.yaml")
    return lists


def word_set(name: str) -> frozenset[str]:
    """Return the words of a list that is written with spaces between them."""
    return frozenset(word_lists()[name].split())


def phrase_set(name: str) -> frozenset[str]:
    """Return the phrases of a list that is written with commas between them."""
    return frozenset(phrase.strip() for phrase in word_lists()[name].split(","))
