"""Classes that are known by a name alone, in a user's own words: whether a text states them.

A name and a text are read into the same facts: things with their properties ("a red bicycle" is
also a bicycle that "is red"), relations ("a person pushing a cart" is also a cart that "is pushed
by a man"), and what is absent ("no helmet" is also "a man without a helmet"). A text states a name
if it holds all facts of the name: the same words or narrower ones, in any inflection, and of the
same polarity.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from hts_ray.captions.clauses import Clauses, Event, read_clauses
from hts_ray.captions.morphology import analyse, split_words
from hts_ray.captions.phrases import NounPhrase, PhraseReader
from hts_ray.captions.words import word_lists, word_set

_ANY_PERSON = word_set("any_person")
_HAVING = word_set("having")
_SEEN = word_set("seen")
_COVERING = word_set("covering")
_SURFACES = word_set("surfaces")
_PORTIONS = word_set("portions")
_KINDS = {word: frozenset(kinds.split()) for word, kinds in word_lists()["kinds"].items()}
_MADE_OF: dict[str, str] = word_lists()["made_of"]
_LOOSE_PREPOSITIONS = ("down", "along", "up")  # "walks along the street" for "walks the street"
_REAL = 0.5  # of weights: what is less real is only supposed, or a picture


@dataclass(frozen=True)
class _Relation:
    """Who (None: someone) does what to whom or where; no verb for "a man on a horse"."""

    subject: NounPhrase | None
    verb: str
    prep: str
    object: NounPhrase | None
    negative: bool


class Facts:
    """What a text says, or a name asks for, each fact once.

    `things` are there, `relations` hold between them, and of the pairs (holder, thing) in `absent`
    the thing is not there, or its holder has none.
    """

    def __init__(self, clauses: Clauses, *, name: bool = False) -> None:
        self._clauses, self._name = clauses, name
        self._properties: dict[int, set[str]] = defaultdict(set)
        self.relations: list[_Relation] = []
        self.absent: list[tuple[NounPhrase | None, NounPhrase]] = []
        acting = {id(s) for e in clauses.events if not _is_there(e) for s in e.subjects}
        for phrase in _all_phrases(clauses):
            self._read_phrase(phrase)
            if phrase.negative and id(phrase) not in acting and phrase.weight >= _REAL:
                self.absent.append((self._holder(phrase), phrase))
        for event in clauses.events:
            if event.weight >= _REAL:
                state = event.passive and not (event.agents or event.adjuncts)
                if state or not name:
                    self._read_state(event)
                if not (state and name):
                    self._read_event(event)
        missing = {id(phrase) for _, phrase in self.absent}
        self.things = [p for p in _all_phrases(clauses) if id(p) not in missing]
        if name:
            self._ask_once()

    def _read_phrase(self, phrase: NounPhrase) -> None:
        found = self._properties[id(phrase)]
        for word in phrase.modifiers:
            doing = analyse(word)
            if doing.form == "ing":  # "a crying child" is one that cries
                self._relate(phrase, doing.verb or "", "", None)
            else:
                found.add(_property(word))
        for prep, other in phrase.attached:
            if other.head == "nothing":  # "with nothing on it"
                found.add("empty")
            elif other.head in _SURFACES and not self._name:  # "with black fur"
                found.update(map(_property, other.modifiers))
            self._relate(phrase, "", prep, other)
        for (_, other), (prep, place) in pairwise(phrase.attached):
            if place.pronoun:  # "a wall with posters on it"
                self._relate(other, "", prep, phrase)

    def _read_state(self, event: Event) -> None:
        """Properties that a verb gives: "has been broken", "is made of wood", "left open"."""
        for phrase in event.subjects if not event.negative else ():
            found = self._properties[id(phrase)]
            if event.passive or not event.objects:
                found.add(event.lemma)
            found.update(_property(o.head) for o in event.objects if o.adjectival)
            if event.lemma == "make":
                found.update(_property(o.head) for prep, o in event.adjuncts if prep == "of")

    def _read_event(self, event: Event) -> None:
        """Relations of a verb with its objects and places, or what it says to be absent."""
        subjects: Sequence[NounPhrase | None] = event.subjects
        objects: Sequence[NounPhrase | None] = subjects if event.passive else event.objects
        actors: Sequence[NounPhrase | None] = event.agents if event.passive else subjects
        adjuncts = event.adjuncts
        if event.passive and event.lemma in _COVERING and adjuncts:
            actors, adjuncts = [phrase for _, phrase in adjuncts], []
        negative = event.negative or any(p is not None and p.negative for p in actors)
        if negative and event.lemma in _HAVING:
            holder = next(iter(actors), None)
            self.absent.extend((holder, p) for p in objects if p is not None and not p.negative)
            return
        verb = "" if event.lemma == "be" else event.lemma
        # "Picks it up": a name asks for "up" as well.
        preps = event.particles if self._name and event.particles else ("", *event.particles)
        for actor in actors or [None]:
            for found in objects or [None]:
                for prep in preps:
                    self._relate(actor, verb, prep, found, negative)
        for actor in subjects or [None]:
            for prep, place in adjuncts:
                self._relate(actor, verb, prep, place, negative)

    def _relate(
        self,
        subject: NounPhrase | None,
        verb: str,
        prep: str,
        other: NounPhrase | None,
        negative: bool = False,
    ) -> None:
        if other is None or not other.negative:
            subject, other = self._meant(subject), self._meant(other)
            self.relations.append(_Relation(subject, verb, prep, other, negative))

    def _meant(self, phrase: NounPhrase | None) -> NounPhrase | None:
        """The phrase, or what "it" or "them" stands for."""
        if phrase is None or phrase.pronoun not in ("it", "them", "they", "which", "itself"):
            return phrase
        earlier = reversed(self._clauses.phrases[: phrase.position])
        several = phrase.pronoun in ("them", "they")
        fits = (p for p in earlier if not p.pronoun and p.plural == several and not p.negative)
        return next((p for p in fits if several or p.kind != "person"), phrase)

    def _holder(self, phrase: NounPhrase) -> NounPhrase | None:
        """Who lacks what is absent: the subject of its verb, or the last one before it."""
        for event in self._clauses.events:
            if any(phrase is o for o in event.objects) and event.lemma != "be":
                return next(iter(event.subjects), None)
        earlier = [p for p in self._clauses.phrases[: phrase.position] if not p.negative]
        alive = [p for p in earlier if p.kind in ("person", "animal")]
        return next(reversed(alive or earlier), None)

    def _ask_once(self) -> None:
        longer = {(id(r.subject), r.verb) for r in self.relations if r.object is not None}
        self.relations = [
            r for r in self.relations
            if r.object is not None or (r.verb and (id(r.subject), r.verb) not in longer)
        ]  # fmt: skip
        pairs = [(r.subject, r.object) for r in self.relations] + self.absent
        used = {id(phrase) for pair in pairs for phrase in pair}
        self.things = [p for p in self._clauses.phrases if id(p) not in used and not p.negative]

    def hold(self, name: Facts) -> bool:
        """Whether these facts of a text hold all that a name asks for."""
        return (
            all(any(self._thing(name, w, s) for s in self.things) for w in name.things)
            and all(any(self._relation(name, w, s) for s in self.relations) for w in name.relations)
            and all(any(self._absence(name, w, s) for s in self.absent) for w in name.absent)
        )

    def _relation(self, name: Facts, wanted: _Relation, said: _Relation) -> bool:
        asked, given = (wanted.verb, wanted.prep), (said.verb, said.prep)
        alike = asked == ("wear", "") and given == ("", "in")
        alike |= asked == ("", "in") and given == ("wear", "")
        alike |= asked == ("", "with") and said.verb in _HAVING and not said.prep
        loose = said.prep in _LOOSE_PREPOSITIONS and not wanted.prep
        alike |= wanted.verb in ("", said.verb) and (wanted.prep == said.prep or loose)
        return (
            wanted.negative == said.negative
            and alike
            and self._person(name, wanted.subject, said.subject)
            and (wanted.object is None or self._thing(name, wanted.object, said.object))
        )

    def _person(self, name: Facts, wanted: NounPhrase | None, said: NounPhrase | None) -> bool:
        if wanted is None:
            return said is None or said.kind in ("person", "name", "unknown")
        return wanted.head in _ANY_PERSON if said is None else self._thing(name, wanted, said)

    def _absence(
        self,
        name: Facts,
        wanted: tuple[NounPhrase | None, NounPhrase],
        said: tuple[NounPhrase | None, NounPhrase],
    ) -> bool:
        (who, what), (holder, thing) = wanted, said
        narrower = self._properties[id(thing)] - name._properties[id(what)]
        if any(analyse(word).adjective for word in narrower):  # "no red helmet"
            return False
        same = _same_head(what, thing) and (what.head in _ANY_PERSON) <= (thing.head in _ANY_PERSON)
        return same and (who is None or self._person(name, who, holder))

    def _thing(self, name: Facts, wanted: NounPhrase, said: NounPhrase | None) -> bool:
        """Whether a phrase of the text is a name's phrase, or a narrower case of it."""
        if said is None or said.negative or said.weight < _REAL:
            return False
        if not _same_head(wanted, said):  # "a cup of coffee" for coffee
            return said.head in _PORTIONS and self._thing(name, wanted, said.of)
        whole = wanted.of is None or self._thing(name, wanted.of, said.of)
        return whole and name._properties[id(wanted)] <= self._properties[id(said)]


def _is_there(event: Event) -> bool:
    """Whether a verb says no more of its subject than that it is there, or on someone."""
    return event.lemma in _SEEN or (event.passive and event.lemma in _HAVING)


def _same_head(wanted: NounPhrase, said: NounPhrase) -> bool:
    if wanted.head in _ANY_PERSON:
        return said.kind == "person"
    if wanted.objects and said.objects:
        return not wanted.objects.keys().isdisjoint(said.objects)
    last = said.head.rsplit(" ", 1)[-1]
    return wanted.head in (said.head, last) or last in _KINDS.get(wanted.head, ())


def _property(word: str) -> str:
    """A word for a property as names and texts share it: "wooden" is wood, "cracked" is crack."""
    found = analyse(word)
    if found.verb is not None and found.form in ("past", "part"):
        return found.verb
    return _MADE_OF.get(word, word)


def _all_phrases(clauses: Clauses) -> Iterator[NounPhrase]:
    for phrase in clauses.phrases:
        part: NounPhrase | None = phrase
        while part is not None:
            yield part
            part = part.of


class NamePattern:
    """A class that is known by its name alone."""

    def __init__(self, name: str, phrases: PhraseReader) -> None:
        self._words = _spaced(name)
        self._facts = facts = Facts(read_clauses(phrases.chunks(name)), name=True)
        self._read = bool(facts.things or facts.relations or facts.absent)
        self.verbs = {r.verb for r in facts.relations if r.verb}
        self.negated = bool(facts.absent) or any(r.negative for r in facts.relations)

    def stated_by(self, said: Facts, text: str) -> bool:
        """Return whether a text, or its facts, states the name; "outdoors" by its words alone."""
        return said.hold(self._facts) if self._read else self._words in _spaced(text)


def _spaced(text: str) -> str:
    return f" {' '.join(split_words(text)).lower()} "
