"""Prompts: English that a captioner would say."""

from __future__ import annotations

import re

import pytest

from hts_ray.classes import (
    OBJECT_PHRASES,
    VERB_PHRASES,
    hico_classes,
    name_prompts,
    noun_phrase,
    pair_prompts,
    verb_phrase,
)
from hts_ray.classes.prompts import _read_phrases


def test_every_verb_and_object_is_written_out():
    """A verb that fell through to the inflection rules could read "hiting"."""
    assert {c.verb for c in hico_classes()} == set(VERB_PHRASES)
    assert {c.object for c in hico_classes()} == set(OBJECT_PHRASES)


def test_the_packaged_prompts_stay_what_they_are():
    """A changed phrase would throw away every score that teachers have stored."""
    assert hico_classes().fingerprint().startswith("83f3c654b49bf00d20a40e5dcca6a940")


@pytest.mark.parametrize("row", [",,x,", "hit,,,", "hit,,hitting,\nhit,,striking,"])
def test_bad_rows_among_the_packaged_phrases_are_refused(tmp_path, row):
    """A row without a phrase, or the second of two, would silently change prompts."""
    path = tmp_path / "phrases.csv"
    path.write_text(f"verb,object,phrase,other\n{row}\n")
    with pytest.raises(ValueError, match=r"phrases\.csv, line"):
        _read_phrases(path)


@pytest.mark.parametrize(
    ("verb", "obj", "sentence"),
    [
        ("ride", "bicycle", "a person riding a bicycle"),
        ("sit_at", "dining_table", "a person sitting at a dining table"),
        ("hold", "umbrella", "a person holding an umbrella"),
        ("hop_on", "bicycle", "a person hopping on a bicycle"),
        ("wear", "skis", "a person wearing skis"),
        ("cut_with", "scissors", "a person cutting with scissors"),
        ("kick", "sports_ball", "a person kicking a sports ball"),
        ("type_on", "keyboard", "a person typing on a keyboard"),
        ("stand_under", "stop_sign", "a person standing under a stop sign"),
        ("drink_with", "cup", "a person drinking with a cup"),
        ("tie", "tie", "a person tying a tie"),
        ("lie_on", "bed", "a person lying on a bed"),
        ("eat", "broccoli", "a person eating broccoli"),
        ("hug", "person", "a person hugging another person"),
        ("no_interaction", "bicycle", "a person and a bicycle"),
        ("no_interaction", "person", "a person and another person"),
        ("operate", "hair_drier", "a person operating a hair dryer"),
        ("hold", "mouse", "a person holding a computer mouse"),
        ("watch", "tv", "a person watching TV"),
        ("wave", "bus", "a person waving at a bus"),
    ],
)
def test_primary_sentences_read_like_english(verb, obj, sentence):
    """Underscores, a missing particle or a wrong article lower the teacher's likelihood."""
    found = next(c for c in hico_classes() if (c.verb, c.object) == (verb, obj))
    assert found.prompts[0] == sentence


def test_all_prompts_are_well_formed_and_distinct():
    """Two classes with one sentence cannot be told apart; "a umbrella" is no English."""
    table = hico_classes()
    prompts = [p for c in table for p in c.prompts]
    assert len(set(prompts)) == len(prompts)
    for c in table:
        assert len(c.prompts) == 6
        assert c.prompts[0].startswith("a person ")
        for prompt in c.prompts:
            assert not re.search(r"[_{}|]|  |^ | $", prompt)
            assert not re.search(
                r"\ba [aeio]|\ban [^aeiouh]|\ba an?\b|\ban? (skis|scissors)", prompt
            )


@pytest.mark.parametrize(
    ("noun", "phrase"),
    [
        ("red car", "a red car"),
        ("hour", "an hour"),
        ("unicorn", "a unicorn"),
        ("umbrella", "an umbrella"),
        ("one-way sign", "a one-way sign"),
        ("SUV", "an SUV"),
        ("jeans", "jeans"),
        ("bus", "a bus"),
        ("glass of water", "a glass of water"),
        ("grass", "grass"),
        ("the sea", "the sea"),
        ("two dogs", "two dogs"),
        ("person", "a person"),
        ("hair_drier", "a hair drier"),
    ],
)
def test_articles(noun, phrase):
    """Articles by spelling alone ("an unicorn") or before plurals ("a jeans")."""
    assert noun_phrase(noun) == phrase
    assert name_prompts(noun)[:2] == (phrase, f"a photo of {phrase}")


@pytest.mark.parametrize(
    ("verb", "phrase"),
    [
        ("jog", "jogging"),
        ("Admit", "Admitting"),
        ("begin", "beginning"),
        ("picnic", "picnicking"),
        ("skate", "skating"),
        ("dye", "dyeing"),
        ("untie", "untying"),
        ("fix", "fixing"),
        ("visit", "visiting"),
        ("quit", "quitting"),
        ("bring", "bringing"),
        ("vault_over", "vaulting over"),
        ("dancing with", "dancing with"),
        ("ski", "skiing"),
    ],
)
def test_verbs_outside_hico(verb, phrase):
    """Doubling and dropping letters at the wrong place."""
    assert verb_phrase(verb) == phrase
    assert pair_prompts(verb, "dog")[0] == f"a person {phrase} a dog"


def test_braces_in_nouns_are_kept():
    """str.format on a user's text would raise KeyError."""
    assert pair_prompts("hold", "{x} box")[0] == "a person holding a {x} box"


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        line.split(" = ")
        for line in """
        washing a car = a person washing a car
        holding an umbrella = a person holding an umbrella
        riding bicycle = a person riding bicycle
        playing guitar = a person playing guitar
        brushing teeth = a person brushing teeth
        swimming = a person swimming
        looking through a microscope = a person looking through a microscope
        writing on a board = a person writing on a board
        sleeping on a bench = a person sleeping on a bench
        crossing the street = a person crossing the street
        painting a wall = a person painting a wall
        not wearing a seat belt = a person not wearing a seat belt
        without a helmet = a person without a helmet
        with glasses = a person with glasses
        ride a horse = a person riding a horse
        cut the cake = a person cutting the cake
        pushes a shopping cart = a person pushing a shopping cart
        half a pizza = half a pizza
        all the dogs = all the dogs
        carries a bag = a person carrying a bag
        person washing a car = a person washing a car
        people crossing the street = people crossing the street
        man riding horses = a man riding horses
        forklift carrying a pallet = a forklift carrying a pallet
        a man on a bench = a man on a bench
        no helmet = no helmet
        no people = no people
        not damaged = something not damaged
        covered with snow = something covered with snow
        in the water = something in the water
        washing machine = a washing machine
        swimming pool = a swimming pool
        dining_table = a dining table
        shopping cart = a shopping cart
        parking lot = a parking lot
        running shoes = running shoes
        boxing gloves = boxing gloves
        sleeping cat = a sleeping cat
        burning building = a burning building
        building = a building
        brick building = a brick building
        wedding = a wedding
        string = a string
        king = a king
        empty shelves = empty shelves
        empty shelf = an empty shelf
        dense fog = dense fog
        the Eiffel Tower = the Eiffel Tower
        3 dogs = 3 dogs
        red car = a red car
        bowl of oranges = a bowl of oranges
        """.strip().splitlines()
        for line in [line.strip()]
    ],
)
def test_names_of_one_s_own_make_sentences(name: str, shown: str) -> None:
    """Catches "a photo of a washing a car", and things taken for what a person does."""
    prompts = name_prompts(name)
    assert prompts[0] == shown
    assert all(prompt.endswith(shown) for prompt in prompts)
