"""Words, parts of speech and phrases of captions, and the packaged lexicon."""

from __future__ import annotations

import pytest

from hts_ray.classes import hico_classes
from hts_ray.teacher.lexicon import (
    MAX_TOKENS,
    STATED,
    Lexicon,
    Mark,
    NounPhrase,
    VerbGroup,
    analyse,
    noun_key,
    split_words,
)


@pytest.fixture(scope="module")
def lexicon() -> Lexicon:
    return Lexicon()


def told(lexicon: Lexicon, text: str) -> list[str]:
    """Chunks as short words: noun phrases plain, verbs in capitals, marks with their kind."""
    shown = []
    for chunk in lexicon.chunks(text):
        if isinstance(chunk, NounPhrase):
            shown.append(chunk.head + ("!" if chunk.negative else ""))
        elif isinstance(chunk, VerbGroup):
            shown.append(chunk.lemma.upper() + ("!" if chunk.negative else ""))
        else:
            shown.append(f"{chunk.kind}:{chunk.word}")
    return shown


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
def test_parts_of_speech_where_the_word_stands(
    lexicon: Lexicon, text: str, chunks: list[str]
) -> None:
    """Catches nouns read as verbs and the other way round, and phrases cut in the wrong place."""
    assert told(lexicon, text) == chunks


def test_compounds_name_one_thing(lexicon: Lexicon) -> None:
    """Catches a dog found in "hot dog", a bear in "teddy bear", a bat's glove in "oven mitt"."""
    objects = [
        chunk.objects
        for chunk in lexicon.chunks(
            "hot dogs, teddy bears, a cell phone, an oven mitt, a bike rack"
        )
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
def test_a_board_is_told_by_its_surroundings(lexicon: Lexicon, text: str, obj: str) -> None:
    """Catches a contextual noun that takes the first of its objects."""
    board = [c for c in lexicon.chunks(text) if isinstance(c, NounPhrase)][-1]
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
def test_kinds_of_subject(lexicon: Lexicon, noun: str, kind: str) -> None:
    """Catches animals and machines that count as people, and unlisted trades that do not."""
    phrase = lexicon.chunks(f"the {noun}")[0]
    assert isinstance(phrase, NounPhrase)
    assert phrase.kind == kind


def test_text_is_cleaned() -> None:
    """Catches tags and entities read as words, lost contractions, and typographic marks."""
    words = split_words("<b>A man</b> isn\u2019t riding \u2014 he\u2019s&nbsp;walking #dog")
    assert [w.lower() for w in words if w[0].isalnum() or "'" in w] == [
        "a", "man", "is", "n't", "riding", "he", "'s", "walking", "dog",
    ]  # fmt: skip
    assert len(split_words("a " * 50_000)) == MAX_TOKENS


def test_marks_do_not_join_sentences(lexicon: Lexicon) -> None:
    """Catches a sentence end that is lost."""
    marks = [c for c in lexicon.chunks("A man sits. A dog runs!") if isinstance(c, Mark)]
    assert [(m.kind, m.word) for m in marks] == [("S", "."), ("S", "!")]


def test_every_word_of_the_file_is_about_a_known_class() -> None:
    """Catches slips in the packaged file: verbs or objects that HICO does not have."""
    lexicon = Lexicon()
    table = hico_classes()
    verbs = {c.verb for c in table}
    objects = {c.object for c in table}
    pairs = {(c.verb, c.object) for c in table}
    for surface, readings in [*lexicon.frames.items(), *lexicon.agent_frames.items()]:
        for reading in readings:
            assert set(reading.implied) <= objects, surface
            for verb, filtered, probability in reading.options:
                assert verb in verbs, surface
                assert 0 <= probability <= 1, surface
                assert filtered is None or filtered <= objects, surface
    for verb, implied in lexicon.entails.items():
        assert verb in verbs
        for target, filtered, probability in implied:
            assert target in verbs, verb
            assert probability < 0.5, "an entailment must not state a class"
            for obj in filtered or ():
                assert (target, obj) in pairs, (verb, target, obj)
    assert {o for found in lexicon.nouns.values() for o in found} | {"person"} == objects


def test_own_nouns_take_precedence() -> None:
    """Catches a user's class "van" that is still taken for HICO's car."""
    lexicon = Lexicon({"van": {"van": 1.0}, "cart": {"cart": 1.0}}, {}, {"van", "cart"})
    van, cart = (
        chunk for chunk in lexicon.chunks("a van, a shopping cart") if isinstance(chunk, NounPhrase)
    )
    assert (van.objects, cart.objects) == ({"van": 1.0}, {"cart": 1.0})
    assert Lexicon().nouns["van"] == {"car": 1.0}
    assert STATED > 0.5
