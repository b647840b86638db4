"""What English words say of HICO's classes: the packaged lexicon, and its reading.

`lexicon.yaml` holds the nouns that name objects, people, animals and vehicles, the
surface phrases of verbs ("take bite of" = eat) and what verbs entail. All keys are lemmas.

Knows words and set phrases alone: neither the text around them, beyond the set of its words, nor
the probability that a caption as a whole states a class. No Ray and no torch.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

from hts_ray.captions.morphology import names_agent, noun_key
from hts_ray.captions.words import read_data, word_lists, word_set

STATED = 0.9  # probability of a class that the caption says in so many words
_MATERIALS = word_set("materials")
_PERSON_ENDINGS = tuple(word_lists()["person_endings"].split())


@dataclass(frozen=True)
class Reading:
    """What a surface phrase says: the first of `options` whose class exists.

    An option is a class verb, the objects it holds for (all if None) and its probability.
    `implied` is an object that the phrase does not name.
    """

    options: tuple[tuple[str, frozenset[str] | None, float], ...]
    implied: tuple[str, ...] = ()


class Lexicon:
    """The words of HICO's classes, with those of one class table added.

    `nouns` (noun -> object -> probability) and `frames` (surface -> readings) are added to the
    packaged ones; an object of `own` takes its noun away from all others.
    """

    def __init__(
        self,
        nouns: Mapping[str, Mapping[str, float]] | None = None,
        frames: Mapping[str, Sequence[Reading]] | None = None,
        own: Iterable[str] = (),
    ) -> None:
        source = _source()
        self.people = source["people"]
        self.animals = source["animals"]
        self.vehicles = source["vehicles"]
        self.contextual: dict[str, dict[str, frozenset[str]]] = source["contextual"]
        self.partitives = source["partitives"]
        self.containers = source["containers"]
        self.photos = source["photos"]
        self.depictions = source["depictions"]
        self._not_people = source["not_people"]
        self.fixed_phrases: dict[str, list[tuple[tuple[str, ...], str, str]]] = source["phrases"]
        self.toys = source["toy_words"]
        self.agents: dict[str, tuple[str, ...]] = source["agents"]
        self.users = source["users"]
        self.agent_frames: dict[str, tuple[Reading, ...]] = source["agent_frames"]
        self.entails: dict[str, tuple[tuple[str, frozenset[str] | None, float], ...]]
        self.entails = source["entails"]
        self.nouns: dict[str, dict[str, float]] = {
            noun: dict(objects) for noun, objects in source["objects"].items()
        }
        own = set(own)
        self._own = {noun for noun, objects in (nouns or {}).items() if own & set(objects)}
        for noun, objects in (nouns or {}).items():
            if own & set(objects):
                self.nouns[noun] = dict(objects)
            else:
                self.nouns.setdefault(noun, {}).update(objects)
        self.frames: dict[str, tuple[Reading, ...]] = dict(source["frames"])
        for surface, readings in (frames or {}).items():
            self.frames[surface] = (*self.frames.get(surface, ()), *readings)
        self.verbs = source["plain_verbs"] | {surface.split(" ", 1)[0] for surface in self.frames}
        self.compounds: dict[str, list[tuple[str, ...]]] = {}
        for phrase in (*self.nouns, *source["other_things"]):
            words = tuple(phrase.split(" "))
            if len(words) > 1:
                self.compounds.setdefault(words[0], []).append(words)
        for found in self.compounds.values():
            found.sort(key=len, reverse=True)

    def kind_of(self, lemma: str, modifiers: Sequence[str] = ()) -> str:
        """Return "person", "animal", "vehicle" or "thing", or "" for an unknown noun."""
        last = lemma.rsplit(" ", 1)[-1]
        objects = self.nouns.get(lemma, {}).keys()
        if lemma in self.depictions or not _MATERIALS.isdisjoint(modifiers):
            kind = "thing"
        elif lemma in self.people or lemma in self.agents:
            kind = "person"
        elif lemma in self.animals or objects & self.animals:
            kind = "animal"
        elif lemma in self.vehicles or objects & self.vehicles:
            kind = "vehicle"
        elif lemma in self.nouns:
            kind = "thing"
        elif last in self.people or self._ends_like_person(last):
            kind = "person"
        else:
            kind = ""
        return kind

    def _ends_like_person(self, noun: str) -> bool:
        if noun in self._not_people:
            return False
        agent = noun.endswith(("er", "or")) and names_agent(noun)
        return agent or noun.endswith(_PERSON_ENDINGS)

    def objects_of(
        self, lemma: str, words: Set[str], modifiers: Sequence[str] = ()
    ) -> dict[str, float]:
        """Return the objects that a noun can name, with probabilities.

        Of a word with several meanings ("board"), `words`, those of its text, decide.
        """
        found = self.nouns.get(lemma)
        if found is not None:
            return dict(found)
        last = lemma.rsplit(" ", 1)[-1]
        if last in self._own:  # a shopping cart is a cart
            return dict(self.nouns[last])
        cues = self.contextual.get(lemma)
        if cues is not None:
            counts = {obj: len((words | set(modifiers)) & cue) for obj, cue in cues.items()}
            best = max(counts.values())
            if best:
                return {obj: 0.9 for obj, count in counts.items() if count == best}
            return dict.fromkeys(counts, 0.4)
        if " " not in lemma and lemma in self.partitives and modifiers:
            return dict(self.nouns.get(modifiers[-1], {}))  # "a pizza slice"
        return {}


# The packaged file

_WORD_LISTS = (
    "people", "animals", "vehicles", "partitives", "containers", "photos", "depictions",
    "toy_words", "users", "body_parts", "animate_things",
)  # fmt: skip


@functools.lru_cache(maxsize=1)
def _source() -> dict[str, Any]:
    """Read `lexicon.yaml` into the tables of a `Lexicon`."""
    raw = read_data("lexicon.yaml")
    things: dict[str, dict[str, float]] = {}
    for name, nouns in raw["objects"].items():
        for entry in nouns.split(","):
            noun, probability = _with_probability(entry.strip(), 1.0)
            objects = things.setdefault(noun_key(noun), {})
            if probability > 0:
                objects[name] = probability
    sets = {key: frozenset(noun_key(word) for word in raw[key].split()) for key in _WORD_LISTS}
    return {
        **sets,
        "people": sets["people"] | sets["body_parts"],
        "animals": sets["animals"] | sets["animate_things"],
        "objects": things,
        "phrases": _phrases(raw["phrases"]),
        "plain_verbs": frozenset(raw["plain_verbs"].split()),
        "not_people": frozenset(raw["not_people"].split()),
        "contextual": {
            noun: {obj: frozenset(cues.split()) for obj, cues in options.items()}
            for noun, options in raw["contextual"].items()
        },
        "other_things": [noun_key(entry.strip()) for entry in raw["other_things"].split(",")],
        "agents": {noun: tuple(objects.split()) for noun, objects in raw["agents"].items()},
        "frames": _frames(raw["frames"]),
        "agent_frames": _frames(raw["agent_frames"]),
        "entails": {
            verb: tuple(_option(f"{target}@{p}") for target, p in implied.items())
            for verb, implied in raw["entails"].items()
        },
    }


def _phrases(
    table: Mapping[str, Mapping[str, str]],
) -> dict[str, list[tuple[tuple[str, ...], str, str]]]:
    """First word -> (words, tag, what they are read as), the longest phrase first."""
    found: dict[str, list[tuple[tuple[str, ...], str, str]]] = {}
    for tag, rows in table.items():
        for said, phrases in rows.items():
            for phrase in phrases.split(","):
                words = tuple(phrase.split())
                found.setdefault(words[0], []).append((words, tag, said))
    for rows_of_word in found.values():
        rows_of_word.sort(key=lambda row: -len(row[0]))
    return found


def _with_probability(entry: str, default: float) -> tuple[str, float]:
    name, _, probability = entry.partition("@")
    return name.strip(), float(probability) if probability else default


def _option(text: str) -> tuple[str, frozenset[str] | None, float]:
    name, probability = _with_probability(text, STATED)
    verb, _, objects = name.partition("(")
    return verb.strip(), frozenset(objects.rstrip(") ").split()) if objects else None, probability


def _frames(lines: Iterable[str]) -> dict[str, tuple[Reading, ...]]:
    """Parse "surface, surface@p -> object = verb(object)@p > verb" lines."""
    frames: dict[str, list[Reading]] = {}
    for line in lines:
        left, _, right = line.rpartition(" = ")
        left, _, implied = left.partition("->")
        right, _, trust_all = right.partition(" @")
        factor = float(trust_all) / STATED if trust_all else 1.0
        options = [_option(option) for option in right.split(">")]
        for entry in left.split(","):
            surface, trust = _with_probability(entry.strip(), STATED)
            scaled = tuple((v, o, p * factor * trust / STATED) for v, o, p in options)
            reading = Reading(scaled, tuple(implied.split()))
            frames.setdefault(surface, []).append(reading)
    return {surface: tuple(readings) for surface, readings in frames.items()}
