"""Parts of speech where a word stands."""

from __future__ import annotations

import pytest

from hts_ray.captions.lexicon import Lexicon
from hts_ray.captions.tagging import Tagger


@pytest.fixture(scope="module")
def tagger() -> Tagger:
    return Tagger(Lexicon())


@pytest.mark.parametrize(
    ("text", "tags"),
    [
        ("a boat ride", "D:a N:boat N:ride"),
        ("the boys ride bikes", "D:the N:boy V:ride N:bike"),
        ("she saw her dog", "R:she V:see D:her N:dog"),
        ("her hat fell on her", "D:her N:hat V:fall P:on R:her"),
        ("to the park to ride", "P:to D:the N:park T:to V:ride"),
        ("a man's hat", "D:a N:man I:'s N:hat"),
        ("he's riding", "R:he X:be V:ride"),
        ("a dog asleep", "D:a N:dog V:sleep"),
    ],
)
def test_neighbours_decide(tagger: Tagger, text: str, tags: str) -> None:
    """Catches rules that lose their neighbour: bare verbs, "her", "to", "'s"."""
    assert " ".join(f"{t.tag}:{t.lemma}" for t in tagger.tokens(text)) == tags


def test_set_phrases_are_one_token(tagger: Tagger) -> None:
    """Catches compounds that fall apart, and "about to" before a noun."""
    said = [(t.text, t.tag) for t in tagger.tokens("hot dogs about to blow dry")]
    assert said == [("hot dogs", "N"), ("about to", "X"), ("blow dry", "V")]
    assert [t.tag for t in tagger.tokens("about to the left")][:2] == ["P", "P"]


def test_capitals_count_only_among_small_letters(tagger: Tagger) -> None:
    """Catches a caption in capitals whose every word is taken for a name."""
    assert [t.text for t in tagger.tokens("Zorblax rides") if t.capital] == ["zorblax"]
    assert not any(t.capital for t in tagger.tokens("A MAN RIDES"))
