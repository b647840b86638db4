"""Class names of a user's own, found in texts."""

from __future__ import annotations

import pytest

from hts_ray.captions.matching import match_captions, negated_names
from hts_ray.classes import ClassTable, HoiClass, hico_classes, name_prompts
from hts_ray.classes.read_csv import parse_class_csv


def table(*names: str) -> ClassTable:
    return ClassTable(
        tuple(HoiClass(i, name, None, None, name_prompts(name)) for i, name in enumerate(names))
    )


def states(text: str, name: str) -> bool:
    return match_captions([text], table(name))[0].get(0, 0.0) >= 0.5


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("no hard hat", "A worker without a hard hat."),
        ("no hard hat", "The worker isn't wearing any hard hat."),
        ("no hard hat", "He has no hard hat."),
        ("no hard hat", "None of the men wear hard hats."),
        ("no cars", "There are no cars on the road."),
        ("no people", "A hall where nobody is."),
        ("not wearing a seat belt", "A driver with no seat belt on."),
        ("dog without a leash", "A dog with no leash."),
        ("not smiling", "A woman who isn't smiling."),
    ],
)
def test_a_negated_name_is_stated_by_an_absence(name: str, text: str) -> None:
    """Catches names whose own negation is not read: "no helmet" was found on helmets."""
    assert states(text, name)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("no hard hat", "A worker wearing a hard hat."),
        ("no hard hat", "A hard hat lies on the table."),
        ("no hard hat", "A worker with no white hard hat."),
        ("no cars", "Cars on a road without trees."),
        ("no people", "People in a park."),
        ("no people", "There is no one sitting at the table."),
        ("not wearing a seat belt", "A driver wearing a seat belt."),
        ("dog without a leash", "A dog on a leash."),
        ("a hard hat", "A worker without a hard hat."),
        ("wearing a hard hat", "He is not wearing a hard hat."),
        ("a dog", "There is no dog."),
    ],
)
def test_polarity_is_compared(name: str, text: str) -> None:
    """Catches a name stated by its opposite, or by something else that is absent."""
    assert not states(text, name)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("open laptop", "A laptop sits open on the desk."),
        ("a damaged car", "Cars damaged in a storm."),
        ("a metal gate", "A gate made of metal."),
        ("a brown horse", "A horse with a brown coat."),
        ("flooded street", "The street is flooded."),
        ("an empty box", "A box with nothing in it."),
        ("a crying child", "The child cries."),
        ("person drinking coffee", "A woman drinking a cup of coffee."),
        ("child climbing a tree", "The tree is climbed by a boy."),
        ("person with an umbrella", "A man holding an umbrella."),
        ("a girl in a red dress", "A girl wearing a red dress."),
        ("graffiti on a wall", "A wall with graffiti on it."),
        ("picking up trash", "A man sees trash and picks it up."),
        ("a roof covered with leaves", "Leaves cover the roof."),
        ("smoking a pipe", "An old man smokes a pipe."),
        ("outdoors", "Two dogs play outdoors."),
    ],
)
def test_names_match_by_content_words(name: str, text: str) -> None:
    """Catches inflections, voices, predicates and pronouns that hide a name."""
    assert states(text, name)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("open laptop", "A closed laptop and an open book."),
        ("person drinking coffee", "A cup of coffee."),
        ("child climbing a tree", "A cat climbs a tree."),
        ("cat on a table", "A cat under a table."),
        ("a roof covered with leaves", "Leaves lie beside a roof."),
        ("dog", "A hot dog."),
        ("a pile of leaves", "A pile of trash."),
        ("wearing gloves", "If he were wearing gloves, his hands would be warm."),
    ],
)
def test_a_name_needs_all_of_its_words(name: str, text: str) -> None:
    """Catches words of a name gathered from all over the text."""
    assert not states(text, name)


def test_negated_names_are_listed() -> None:
    """Catches a table whose owner is not told, and HICO's own "no interaction" being told."""
    assert negated_names(table("no helmet", "a helmet", "without gloves")) == [
        "no helmet",
        "without gloves",
    ]
    assert negated_names(hico_classes()) == []


def test_a_negated_verb_of_a_pair_is_read_by_its_name() -> None:
    """Catches a row with verb "not wearing", which no text could state."""
    rows = parse_class_csv(b"name,verb,object\nnot wearing a mask,not wearing,mask\n", "own.csv")
    assert negated_names(rows) == ["not wearing a mask"]
    stated, denied = match_captions(["A man without a mask.", "A man wearing a mask."], rows)
    assert max(stated.values()) >= 0.5
    assert not any(p >= 0.5 for p in denied.values())
