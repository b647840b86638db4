"""Sentences about other things, so that a region may show none of the classes.

A softmax over the classes alone makes one of them win on every region, with one class always at
probability 1. Background sentences compete there and are never labels. Which sentences compete
depends on the classes: one that says the same as a class would take its place.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

from hts_ray.captions.matching import match_captions
from hts_ray.classes import ClassTable, hico_classes
from hts_ray.classes.prompts import OBJECT_PHRASES

_PEOPLE = "people"  # a section of background.txt
_PERSON = frozenset({"person"})
_STATED = 0.5  # the probability from which a sentence states a class, see `match_captions`
_PHOTO = "a photo of "  # how people may begin their own prompts
_EMPTY_WORDS = {
    "a", "an", "the", "of", "in", "on", "under", "at", "to", "with", "and", "photo", "picture",
    "image",
}  # fmt: skip


@cache
def _packaged() -> dict[str, tuple[str, ...]]:
    """Return the sentences of background.txt by the comment above them."""
    sections: dict[str, list[str]] = {}
    text = Path(__file__).with_suffix(".txt").read_text(encoding="utf-8")
    for line in filter(None, text.splitlines()):
        if line.startswith("#"):
            section = sections.setdefault(line.removeprefix("#").strip(), [])
        else:
            section.append(line)
    return {name: tuple(lines) for name, lines in sections.items()}


def background_sentences(table: ClassTable) -> tuple[str, ...]:
    """Return the sentences that compete with a table's classes, each in the classes' wording.

    They are HICO's sentences that share a word with a class, its 80 objects alone, and the
    packaged ones about people, places, things and kinds of picture. Left out are sentences that

    - state a class: "a person washing a car" beside the class "car washing";
    - say a part of one: "a bicycle" beside "a red bicycle". They are true where the class is, and
      being shorter they are likelier. What a person does is another thing than the object alone,
      so "a bicycle" stays beside "a person riding a bicycle";
    - say only that somebody is there, beside classes about a person.

    Beside prompts of one's own that begin with "a photo of", the sentences begin so too: a bare
    sentence would be likelier for its length alone.
    """
    classes = {_content(prompt) for prompts in table.prompts for prompt in prompts}
    about_people = {of_class for of_class in classes if _PERSON & of_class}
    words = frozenset[str]().union(*classes) - _PERSON
    packaged = _packaged()
    sentences = dict.fromkeys(
        [
            *(said for said in hico_classes().primary_prompts if _content(said) & words),
            *(phrases[0] for phrases in OBJECT_PHRASES.values()),
            *(said for name in packaged if not (about_people and name == _PEOPLE)
              for said in packaged[name]),
        ]
    )  # fmt: skip
    kept = [
        sentence
        for sentence, found in zip(sentences, match_captions(list(sentences), table), strict=True)
        if max(found.values(), default=0.0) < _STATED
        and not any(_content(sentence) <= of_class for of_class in classes - about_people)
    ]
    wordings = {prompt.startswith(_PHOTO) for prompt in table.primary_prompts}
    plain = kept if False in wordings else []
    framed = [f"{_PHOTO}{sentence}" for sentence in kept] if True in wordings else []
    return (*plain, *framed)


def _content(sentence: str) -> frozenset[str]:
    return frozenset(re.findall(r"[\w'-]+", sentence.casefold())) - _EMPTY_WORDS
