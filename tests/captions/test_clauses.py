"""Who does what to whom, and whether it happens."""

from __future__ import annotations

import pytest

from hts_ray.captions.clauses import Event, read_clauses
from hts_ray.captions.lexicon import Lexicon
from hts_ray.captions.phrases import PhraseReader


@pytest.fixture(scope="module")
def phrases() -> PhraseReader:
    return PhraseReader(Lexicon())


def told(event: Event) -> str:
    """An event in short: "subject VERB object prep place", denied ones with "!"."""
    words = ["+".join(s.head for s in event.subjects) or "_", event.lemma.upper()]
    words[1] += "!" if event.negative else ""
    words += ["+".join(o.head for o in event.objects)] if event.objects else []
    words += [f"{prep} {place.head}" for prep, place in event.adjuncts]
    words += [f"by {agent.head}" for agent in event.agents]
    return " ".join(words)


@pytest.mark.parametrize(
    ("text", "events"),
    [
        ("a man rides a horse", ["man RIDE horse"]),
        ("riding a bike", ["_ RIDE bike"]),
        ("a bike being ridden by a woman", ["bike RIDE by woman"]),
        ("the bike that the boy rides", ["boy RIDE bike"]),
        ("a woman feeding and petting a horse", ["woman FEED horse", "woman PET horse"]),
        ("a man watching a dog catch a frisbee", ["man WATCH dog", "dog CATCH frisbee"]),
        ("a man with a dog walking", ["man WALK"]),
        ("a boy holding a bat and a glove", ["boy HOLD bat+glove"]),
        ("a father teaching his son to ride a bike", ["father TEACH son", "son RIDE bike"]),
        ("on the bench sits an old woman", ["woman SIT on bench"]),
        ("a man cutting bread with a knife", ["man CUT bread with knife"]),
        ("he uses a knife to cut a pizza", ["he USE knife", "he CUT pizza with knife"]),
        ("A man sits. A dog runs.", ["man SIT", "dog RUN"]),
    ],
)
def test_roles(phrases: PhraseReader, text: str, events: list[str]) -> None:
    """Catches arguments of the wrong verb, and subjects that a relative clause takes over."""
    assert [told(event) for event in read_clauses(phrases.chunks(text)).events] == events


@pytest.mark.parametrize(
    ("text", "events"),
    [
        ("nobody rides the horse", ["nobody RIDE! horse"]),
        ("he isn't riding the bike", ["he RIDE! bike"]),
        ("he stops riding the bike", ["he STOP", "he RIDE! bike"]),
        ("he stops to pet the dog", ["he STOP", "he PET dog"]),
        ("a woman holding a cup without drinking", ["woman HOLD cup", "woman DRINK!"]),
    ],
)
def test_negation(phrases: PhraseReader, text: str, events: list[str]) -> None:
    """Catches a denial that reaches the wrong verb, or none."""
    assert [told(event) for event in read_clauses(phrases.chunks(text)).events] == events


@pytest.mark.parametrize(
    ("text", "weight"),
    [
        ("a man riding a horse", 1.0),
        ("a man wants to ride a horse", 0.35),
        ("a man about to ride a horse", 0.5),
        ("a boy about to swing a bat", 0.6),
    ],
)
def test_weight_of_what_is_not_reached(phrases: PhraseReader, text: str, weight: float) -> None:
    """Catches intentions as certain as acts, and preparations that weigh no more than others."""
    assert read_clauses(phrases.chunks(text)).events[-1].weight == pytest.approx(weight)


def test_voice(phrases: PhraseReader) -> None:
    """Catches a person's past tense read as passive, and a thing's participle read as active."""
    active, passive = (
        read_clauses(phrases.chunks(text)).events[0]
        for text in ("a man rode a horse", "a horse ridden by a man")
    )
    assert not active.passive
    assert passive.passive


def test_phrases_are_numbered_and_attached(phrases: PhraseReader) -> None:
    """Catches pronouns that look for what comes after them, and places that are lost."""
    clauses = read_clauses(phrases.chunks("a man on a horse with a hat"))
    assert [p.position for p in clauses.phrases] == [0, 1, 2]
    assert [(prep, p.head) for prep, p in clauses.phrases[0].attached] == [
        ("on", "horse"),
        ("with", "hat"),
    ]
    assert clauses.events == []
