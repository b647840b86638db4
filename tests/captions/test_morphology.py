"""Words one at a time: what a text falls into, and what each word can be."""

from __future__ import annotations

import pytest

from hts_ray.captions.morphology import MAX_TOKENS, analyse, names_agent, noun_key, split_words


@pytest.mark.parametrize(
    ("word", "verb", "form"),
    [
        ("riding", "ride", "ing"),
        ("rode", "ride", "past"),
        ("ridden", "ride", "part"),
        ("threw", "throw", "past"),
        ("fed", "feed", "past"),
        ("lying", "lie", "ing"),
        ("lay", "lie", "past"),
        ("cut", "cut", "any"),
        ("lassoed", "lasso", "past"),
        ("shorn", "shear", "part"),
        ("texting", "text", "ing"),
        ("kitesurfing", "kitesurf", "ing"),
        ("saw", "see", "past"),
    ],
)
def test_verb_forms(word: str, verb: str, form: str) -> None:
    """Catches lost irregular forms, and words that the library's dictionary lacks."""
    found = analyse(word)
    assert (found.verb, found.form) == (verb, form)


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("Hot_Dogs", "hot dog"),
        ("geese", "goose"),
        ("wine glasses", "wine glass"),
        ("knives", "knife"),
        ("scissors", "scissors"),
        ("skis", "ski"),
        ("frisbees", "frisbee"),
        ("calves", "calf"),
    ],
)
def test_noun_keys(text: str, key: str) -> None:
    """Catches plurals that do not meet the lexicon's entries."""
    assert noun_key(text) == key


@pytest.mark.parametrize(
    ("noun", "agent"),
    [("shopper", True), ("sculptor", True), ("rider", True), ("river", False)],
)
def test_agents_are_made_from_verbs(noun: str, agent: bool) -> None:
    """Catches trades that are no people, and things in -er that are."""
    assert names_agent(noun) is agent


def test_text_is_cleaned() -> None:
    """Catches tags and entities read as words, lost contractions, and typographic marks."""
    words = split_words("<b>A man</b> isn\u2019t riding \u2014 he\u2019s&nbsp;walking #dog")
    assert [w.lower() for w in words if w[0].isalnum() or "'" in w] == [
        "a", "man", "is", "n't", "riding", "he", "'s", "walking", "dog",
    ]  # fmt: skip
    assert len(split_words("a " * 50_000)) == MAX_TOKENS
