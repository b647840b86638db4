"""English sentences that stand for a class: "a person riding a bicycle", "a red car"."""

from __future__ import annotations

import csv
import re
from collections.abc import Sequence
from pathlib import Path

import lemminflect  # type: ignore[import-untyped]

NO_INTERACTION = "no_interaction"
Phrases = dict[tuple[str, str], tuple[str, ...]]

# In each template {} is the noun or the phrase. Prompt i of every class follows template i. The
# first is what a captioner would say, and few begin with "a photo of".
_NAME_TEMPLATES = (
    "{}",
    "a photo of {}",
    "a picture of {}",
    "a photo showing {}",
    "a close-up photo of {}",
)
_PICTURE = re.compile(r"^an? (close-up )?(photo|picture|image) (of|showing) ")
_NO_INTERACTION_TEMPLATES = (
    "a person and {}",
    "a photo of a person and {}",
    "someone near {}",
    "a man and {}",
    "a woman and {}",
    "a person next to {}",
)
_PERSON_TEMPLATES = (
    "a person {}",
    "a photo of a person {}",
    "someone {}",
    "a man {}",
    "a woman {}",
)


def _read_phrases(path: Path) -> Phrases:
    """Read the packaged phrases: (verb, object) -> one or two of them.

    A row without an object gives a verb's -ing phrase; one without a verb gives an object's noun
    with its determiner, then another noun for it. A row with both is a pair whose plain verb
    reads badly or means something else; "{o}" in it is the object with its determiner. Raises
    ValueError naming the line of a row that is incomplete or repeats another.
    """
    phrases: Phrases = {}
    with path.open(encoding="utf-8", newline="") as stream:
        for line, row in enumerate(csv.DictReader(stream, strict=True), 2):
            key = (row["verb"], row["object"])
            if not any(key) or not row["phrase"] or key in phrases:
                raise ValueError(f"{path}, line {line}: {key} has no phrase or is there twice")
            phrases[key] = tuple(filter(None, (row["phrase"], row["other"])))
    return phrases


_PHRASES = _read_phrases(Path(__file__).with_name("phrases.csv"))
# Verb -> the phrase between "a person" and the object, for HICO's 117 verbs.
VERB_PHRASES: dict[str, str] = {v: said[0] for (v, o), said in _PHRASES.items() if not o}
_PAIR_PHRASES = {pair: said for pair, said in _PHRASES.items() if all(pair)}
# Object -> the noun with its determiner, then other ways to say it, for HICO's 80 objects.
OBJECT_PHRASES: dict[str, tuple[str, ...]] = {o: said for (v, o), said in _PHRASES.items() if not v}


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_DETERMINERS = _words(
    "a an the some another this that these those my your his her its our their no any each every"
    " all both half several many one two three four five six seven eight nine ten"
)
_PLURALS = _words("skis taxis people men women children mice geese teeth feet cattle police")
_SINGULAR_IN_S = _words("lens gas bus canvas atlas christmas tennis chaos cosmos texas")
_MASS_NOUNS = _words(
    "water grass snow ice sand food furniture luggage bread rice milk coffee tea wine beer cheese"
    " meat broccoli clothing equipment graffiti fog rain smoke mud traffic garbage trash"
)
_PARTICLES = _words(
    "about across after against around at away behind by down for from in into of off on onto out"
    " over through to toward under up upon with"
)
_BEFORE_OBJECTS = _words("a an the his her their its my your")
_RELATIVES = _words("who which that is are")
# Words in -ing that name things, the nouns that such words make things of ("washing machine"), and
# verbs that say how a thing is ("a sleeping cat").
_THINGS_ING = _words(
    "awning bedding being building ceiling clothing crossing drawing dressing duckling dumpling"
    " earring evening filling flooring frosting gosling greeting icing landing lightning lighting"
    " meeting morning opening packaging painting parking plumbing pudding railing sapling"
    " scaffolding sibling siding stocking topping wedding wiring"
)
_MADE_BY_ING = _words(
    "area bag bench board boat boot boots bowl cabinet cap card cart chair club coat court"
    " dress fountain gear glove gloves ground gum hall light lot machine mat meter mitt needle"
    " pan pin place pole pool rack road rod room screen shoe shoes signal site station stick"
    " suit table track trail tray water wheel yarn"
)
_STATES_ING = _words(
    "barking bleeding blooming boiling burning climbing crying dancing dying falling flashing"
    " floating flowering flying glowing growing hanging jumping laughing leaking lying melting"
    " missing moving resting rising rolling rotting running shining sitting sleeping smiling"
    " smoking speeding standing steaming swimming trailing walking working"
)
# How a word sounds decides between "a" and "an"; its letters show that only mostly.
_SOUNDS_LIKE_VOWEL = re.compile(r"hour|hono|honest|heir|unin|unim|unid")
_ING = re.compile(r"\w*[aeiouy]\w*ing", re.IGNORECASE)
_SOUNDS_LIKE_CONSONANT = re.compile(r"uni|us[aeu]|uti|ubi|eu|ewe|(one|once)\b")


def pair_prompts(verb: str, obj: str) -> tuple[str, ...]:
    """Return the six prompts of a verb-object pair, the primary sentence first.

    The last one says it differently, with another noun or phrase, where one is known. HICO's
    objects have HICO's meaning ("mouse" is the computer's); spaces and underscores are the same.
    """
    nouns = object_phrases(obj)
    if phrase_key(verb) == NO_INTERACTION:
        return _fill(_NO_INTERACTION_TEMPLATES, nouns[0])
    plain = (verb_phrase(verb) + " {o}",)
    phrases = _PAIR_PHRASES.get((phrase_key(verb), phrase_key(obj)), plain)
    # Not format: a user's noun may hold braces.
    said = [phrase.replace("{o}", nouns[0]) for phrase in phrases]
    if len(said) == 1 and len(nouns) > 1 and "{o}" in phrases[0]:
        said.append(phrases[0].replace("{o}", nouns[1]))
    return person_prompts(*said)


def object_phrases(obj: str) -> tuple[str, ...]:
    """Return an object's noun with its determiner, and another noun where one is known."""
    return OBJECT_PHRASES.get(phrase_key(obj)) or (noun_phrase(obj),)


def person_prompts(main: str, other: str | None = None) -> tuple[str, ...]:
    """Return the six prompts of what a person does: an -ing phrase, and another one for it."""
    last = f"a person {other}" if other else f"a picture of a person {main}"
    return (*_fill(_PERSON_TEMPLATES, main), last)


def name_prompts(name: str) -> tuple[str, ...]:
    """Return the five prompts of a named class, "a red car" first."""
    return _fill(_NAME_TEMPLATES, shown_phrase(name))


def shown_phrase(name: str) -> str:
    """Return what a picture of a named class shows: "washing a car" -> "a person washing a car".

    What begins with a verb is done by a person; what begins with a participle or a preposition is
    said of something. All else is a noun. As in `noun_phrase` the rules are a heuristic.
    """
    words = spaced(name).split(" ")
    negated = len(words) > 1 and words[0].casefold() == "not"
    front, said = words[:negated], words[negated:]
    first, second = said[0].casefold(), said[1].casefold() if len(said) > 1 else ""
    action = " ".join(said) if first in {"with", "without"} and second else _action(said)
    if action is not None:
        return " ".join(["a person", *front, action])
    of_something = first.endswith("ed") and second in _PARTICLES | {"by"}
    if negated or of_something or (first in _PARTICLES and second):
        return " ".join(["something", *front, *said])
    return noun_phrase(name)


def _action(words: list[str]) -> str | None:
    """Return the -ing phrase of a name that begins with a verb, None for another name."""
    first, second = words[0].casefold(), words[1].casefold() if len(words) > 1 else ""
    if _ING.fullmatch(first) and first not in _THINGS_ING:
        parts = not {word.casefold() for word in words} & (_DETERMINERS | _PARTICLES)
        is_thing = parts and words[-1].casefold() in _MADE_BY_ING
        how_it_is = parts and first in _STATES_ING and second
        return None if is_thing or how_it_is else " ".join(words)
    # Before an article stands a verb: "ride a horse", "pushes a cart".
    verb = lemminflect.getAllLemmas(first).get("VERB") if second in _BEFORE_OBJECTS else None
    return verb_phrase(" ".join([verb[0], *words[1:]])) if verb else None


def what_is_shown(prompts: Sequence[str]) -> tuple[str, ...]:
    """Return prompts without "a photo of" and the like, each once: what a question can ask for."""
    return tuple(dict.fromkeys(_PICTURE.sub("", prompt) or prompt for prompt in prompts))


def _fill(templates: tuple[str, ...], text: str) -> tuple[str, ...]:
    return tuple(template.replace("{}", text) for template in templates)


def verb_phrase(verb: str) -> str:
    """Return the -ing phrase of a verb: "hop_on" -> "hopping on".

    HICO's verbs are listed, because English doubles and drops letters with many exceptions.
    Others are inflected by rule, the first word being the verb; an -ing form is kept.
    """
    known = VERB_PHRASES.get(phrase_key(verb))
    if known is not None:
        return known
    head, _, rest = spaced(verb).partition(" ")
    return f"{_ing(head)} {rest}".strip()


def noun_phrase(noun: str) -> str:
    """Return a noun with the determiner it needs: "red car" -> "a red car".

    An existing determiner is kept; plurals and mass nouns get none. The rules are a heuristic:
    write the prompts out where they fail.
    """
    text = spaced(noun)
    words = text.split(" ")
    if words[0].casefold() in _DETERMINERS or words[0][:1].isdigit():
        return text
    # In "a bowl of oranges" or "man with glasses" the head is the word before the preposition.
    # It is the word before what that does, too: "people crossing the street".
    ends = _PARTICLES | _RELATIVES
    cut = next(
        (i for i, word in enumerate(words) if i and (word in ends or _does(words[i:]))), len(words)
    )
    if _takes_no_article(words[cut - 1].casefold()):
        return text
    return f"{_article(words[0])} {text}"


def _does(words: list[str]) -> bool:
    """Return whether words behind a noun begin with what it does: "riding a horse"."""
    named = words[0] in _THINGS_ING and words[1:2] and words[1] not in _DETERMINERS
    return len(words) > 1 and bool(_ING.fullmatch(words[0])) and not named


def spaced(text: str) -> str:
    """Return the text with single spaces in place of underscores and runs of spaces."""
    return " ".join(text.replace("_", " ").split()) or text


def phrase_key(text: str) -> str:
    """Return a verb or noun as the packaged phrases write it: lower case, with underscores."""
    return "_".join(text.replace("_", " ").split()).casefold()


def _takes_no_article(head: str) -> bool:
    if head in _PLURALS or head in _MASS_NOUNS:
        return True
    plural = head.endswith("s") and not head.endswith(("ss", "us", "is"))
    return plural and len(head) > 2 and head not in _SINGULAR_IN_S


def _article(word: str) -> str:
    lower = word.casefold()
    if word.isupper() and len(word) <= 3:  # spoken letter by letter: "an MRI", "a UFO"
        return "an" if word[0] in "AEFHILMNORSX" else "a"
    if _SOUNDS_LIKE_VOWEL.match(lower):
        return "an"
    if _SOUNDS_LIKE_CONSONANT.match(lower):
        return "a"
    return "an" if lower[:1] in set("aeiou") else "a"


def _ing(word: str) -> str:
    if word.endswith("ing") and len(word) > 5:
        return word
    return next(iter(lemminflect.getInflection(word, "VBG")), f"{word}ing")
