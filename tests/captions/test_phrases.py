"""Noun phrases and verb groups of captions, and what the phrases name."""

from __future__ import annotations

import pytest

from hts_ray.captions.lexicon import Lexicon
from hts_ray.captions.phrases import Mark, NounPhrase, PhraseReader, VerbGroup


@pytest.fixture(scope="module")
def reader() -> PhraseReader:
    return PhraseReader(Lexicon())


def told(reader: PhraseReader, text: str) -> list[str]:
    """Chunks as short words: noun phrases plain, verbs in capitals, marks with their kind."""
    shown = []
    for chunk in reader.chunks(text):
        if isinstance(chunk, NounPhrase):
            shown.append(chunk.head + ("!" if chunk.negative else ""))
        elif isinstance(chunk, VerbGroup):
            shown.append(chunk.lemma.upper() + ("!" if chunk.negative else ""))
        else:
            shown.append(f"{chunk.kind}:{chunk.word}")
    return shown


@pytest.mark.parametrize(
    ("text", "chunks"),
    [
        ("a man rides a horse", ["man", "RIDE", "horse"]),
        ("a boat ride", ["ride"]),
        ("a park bench", ["park bench"]),
        ("a riding lawn mower", ["riding lawn mower"]),
        ("two men watch a dog catch a frisbee", ["man", "WATCH", "dog", "CATCH", "frisbee"]),
        ("a parked car", ["car"]),
        ("sliced carrots", ["carrot"]),
        ("a man sliced carrots", ["man", "SLICE", "carrot"]),
        ("the kite that the boy flies", ["kite", "W:that", "boy", "FLY"]),
        ("a black and white dog", ["dog"]),
        ("the dog's leash", ["leash"]),
        ("a slice of cake", ["slice"]),
        ("he isn't riding", ["he", "RIDE!"]),
        ("no one sits", ["nobody!", "SIT"]),
        ("he is about to swing", ["he", "SWING"]),
        ("a woman in a dress holds a cup", ["woman", "P:in", "dress", "HOLD", "cup"]),
        ("fed the ducks bread", ["FEED", "duck", "bread"]),
        ("to the park to ride", ["P:to", "park", "RIDE"]),
    ],
)
def test_chunks(reader: PhraseReader, text: str, chunks: list[str]) -> None:
    """Catches nouns read as verbs and the other way round, and phrases cut in the wrong place."""
    assert told(reader, text) == chunks


def test_compounds_name_one_thing(reader: PhraseReader) -> None:
    """Catches a dog found in "hot dog", a bear in "teddy bear", a bat's glove in "oven mitt"."""
    objects = [
        chunk.objects
        for chunk in reader.chunks("hot dogs, teddy bears, a cell phone, an oven mitt, a bike rack")
        if isinstance(chunk, NounPhrase)
    ]
    assert objects == [{"hot_dog": 1.0}, {"teddy_bear": 1.0}, {"cell_phone": 1.0}, {}, {}]


@pytest.mark.parametrize(
    ("text", "obj"),
    [
        ("a surfer holds his board", "surfboard"),
        ("a skater holds his board", "skateboard"),
        ("a man in the snow holds his board", "snowboard"),
    ],
)
def test_a_board_is_told_by_its_surroundings(reader: PhraseReader, text: str, obj: str) -> None:
    """Catches a contextual noun that takes the first of its objects."""
    board = [c for c in reader.chunks(text) if isinstance(c, NounPhrase)][-1]
    assert max(board.objects, key=lambda o: board.objects[o]) == obj


@pytest.mark.parametrize(
    ("noun", "kind"),
    [
        ("woman", "person"),
        ("skateboarder", "person"),
        ("shopper", "person"),
        ("policemen", "person"),
        ("puppy", "animal"),
        ("monkey", "animal"),
        ("robot", "animal"),
        ("bus", "vehicle"),
        ("computer", "thing"),
        ("river", "unknown"),
        ("statue", "thing"),
    ],
)
def test_kinds_of_subject(reader: PhraseReader, noun: str, kind: str) -> None:
    """Catches animals and machines that count as people, and unlisted trades that do not."""
    phrase = reader.chunks(f"the {noun}")[0]
    assert isinstance(phrase, NounPhrase)
    assert phrase.kind == kind


def test_marks_do_not_join_sentences(reader: PhraseReader) -> None:
    """Catches a sentence end that is lost."""
    marks = [c for c in reader.chunks("A man sits. A dog runs!") if isinstance(c, Mark)]
    assert [(m.kind, m.word) for m in marks] == [("S", "."), ("S", "!")]


def test_own_nouns_name_own_objects() -> None:
    """Catches an own object that is not found in the phrases of a caption."""
    reader = PhraseReader(
        Lexicon({"van": {"van": 1.0}, "cart": {"cart": 1.0}}, {}, {"van", "cart"})
    )
    van, cart = (
        chunk for chunk in reader.chunks("a van, a shopping cart") if isinstance(chunk, NounPhrase)
    )
    assert (van.objects, cart.objects) == ({"van": 1.0}, {"cart": 1.0})


@pytest.mark.parametrize("text", ["a statue of a man", "a poster of a statue of a man"])
def test_depictions_do_not_hold_themselves(reader: PhraseReader, text: str) -> None:
    """Catches a phrase that leads back to itself: comparing two, or walking one, never ends."""
    (phrase,) = reader.chunks(text)
    seen = []
    while isinstance(phrase, NounPhrase):
        assert all(phrase is not earlier for earlier in seen)
        seen.append(phrase)
        phrase = phrase.of  # type: ignore[assignment]
    assert [p.head for p in seen] == text.replace("a ", "").split(" of ")
