"""Clauses to (verb, object) pairs."""

from __future__ import annotations

import pytest

from hts_ray.captions.clauses import read_clauses
from hts_ray.captions.lexicon import Lexicon
from hts_ray.captions.phrases import PhraseReader
from hts_ray.captions.statements import ENTAILED_BELOW, Scores, StatementReader
from hts_ray.classes import hico_classes


class Scorer:
    """Scores texts for the pairs of HICO, or for those given."""

    def __init__(self) -> None:
        self.phrases = PhraseReader(Lexicon())
        self.hico = {(str(c.verb), str(c.object)): c.class_id for c in hico_classes()}

    def __call__(self, text: str, *pairs: tuple[str, str]) -> Scores:
        """Return the scores of one text."""
        ids = {pair: i for i, pair in enumerate(pairs)} if pairs else self.hico
        return StatementReader(Lexicon(), ids).score(read_clauses(self.phrases.chunks(text)))


@pytest.fixture(scope="module")
def score() -> Scorer:
    return Scorer()


def test_only_pairs_of_the_table_are_said(score: Scorer) -> None:
    """Catches classes that the table lacks, and ids in another order than the table's."""
    found = score("a man riding a horse and holding a cup", ("hold", "dog"), ("hold", "cup"))
    assert set(found.said) == {("hold", "cup")}
    assert found.by_id() == {1: found.said["hold", "cup"]}


def test_the_first_option_of_the_table_is_taken(score: Scorer) -> None:
    """Catches an option that is skipped where the table has its class, or taken beside another."""
    control, repair = ("control", "tv"), ("repair", "tv")
    assert set(score("a man tuning a tv", control, repair).said) == {control}
    assert set(score("a man tuning a tv", repair).said) == {repair}


def test_denied_pairs_are_kept_apart(score: Scorer) -> None:
    """Catches a denial that is forgotten, so that another reading may state it after all."""
    found = score("a man not riding the horse")
    assert ("ride", "horse") in found.denied
    assert ("ride", "horse") not in found.said


def test_people_do_more_than_what_may_be_people(score: Scorer) -> None:
    """Catches subjects that all count alike: a man, someone unseen, a thing unknown, a dog."""
    trust = [
        score(f"{who} reading a book").said.get(("read", "book"), 0.0)
        for who in ("a man", "", "a zorblax", "a dog")
    ]
    assert trust == sorted(trust, reverse=True)
    assert len(set(trust)) == 4
    assert trust[-1] == 0


def test_entailments_are_hints_for_stated_pairs_alone(score: Scorer) -> None:
    """Catches an entailment that states a class, or that follows from a hint."""
    stated = score("a man riding a horse").said
    assert 0 < stated["straddle", "horse"] <= ENTAILED_BELOW
    assert ("straddle", "horse") not in score("a man wants to ride a horse").said


def test_agents_use_what_is_named(score: Scorer) -> None:
    """Catches a skier without skis, and one who rides them in every caption."""
    assert score("a skier going down a slope").said["ride", "skis"] >= 0.5
    assert 0 < score("a photo of a skier").said["ride", "skis"] < 0.5


def test_no_interaction_needs_a_class_for_it(score: Scorer) -> None:
    """Catches lone objects in tables that do not have them."""
    text = "a man standing near a car"
    assert score(text).said["no_interaction", "car"] >= 0.5
    assert score(text, ("drive", "car")).said == {}
