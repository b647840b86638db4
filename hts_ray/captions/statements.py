"""What clauses state: probabilities of (verb, object) pairs of one class table.

Each event, attachment ("a man on a horse"), activity ("horse riding") and agent ("a skier") is
looked up in the lexicon's surface phrases, scaled by how far its subject is a person and by how
far it happens. Then follow entailments, and `no_interaction` for what is left alone.

Knows a table by its pairs alone: no ids but to write them out, no prompts, no classes without a
verb. For the meaning of the probabilities see `matching`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile

from hts_ray.captions.clauses import WATCHING, Clauses, Event
from hts_ray.captions.lexicon import STATED, Lexicon, Reading
from hts_ray.captions.morphology import verb_lemma
from hts_ray.captions.phrases import NounPhrase
from hts_ray.captions.words import phrase_set, word_set
from hts_ray.classes import NO_INTERACTION

ENTAILED_BELOW = 0.49  # no entailment, however certain, makes a class stated
_SECOND = 0.45  # a further reading of a phrase that states another class
_HUMAN_VERBS = word_set("human_verbs")
_NEAR = phrase_set("near")
_STATIVE = word_set("stative")
_CONTACT = word_set("contact")
_LIMBS = word_set("limbs")
_NO_CONTACT = word_set("no_contact")
_HUGGED = word_set("each_other")
_LEAVES_ALONE = word_set("leaves_alone")


@dataclass
class Scores:
    """Probabilities by (verb, object) of the table's classes, and the denied pairs."""

    ids: Mapping[tuple[str, str], int]
    said: dict[tuple[str, str], float] = field(default_factory=dict)
    denied: set[tuple[str, str]] = field(default_factory=set)

    def add(self, pair: tuple[str, str], probability: float) -> None:
        """Enter a probability unless a higher one is known or the table lacks the pair."""
        if pair in self.ids and probability > self.said.get(pair, 0.0):
            self.said[pair] = probability

    def by_id(self) -> dict[int, float]:
        """Return what is said, by class id."""
        return {self.ids[pair]: round(p, 4) for pair, p in self.said.items()}


@dataclass(frozen=True)
class _Say:
    """Enters pairs for one event: scaled by `trust`, or as denied."""

    scores: Scores
    trust: float
    negative: bool

    def __call__(self, pair: tuple[str, str], probability: float) -> None:
        if self.negative:
            self.scores.denied.add(pair)
        else:
            self.scores.add(pair, min(1.0, probability * self.trust))

    def scaled(self, factor: float) -> _Say:
        return _Say(self.scores, self.trust * factor, self.negative)

    def denial(self) -> _Say:
        return _Say(self.scores, self.trust, negative=True)


class StatementReader:
    """Scores clauses for the pairs of `ids`, a class table's (verb, object) -> id."""

    def __init__(self, lexicon: Lexicon, ids: Mapping[tuple[str, str], int]) -> None:
        self._lexicon = lexicon
        self._ids = ids
        self._verbs_alone = {verb for verb, obj in ids if not obj}
        self._has_lone_objects = any(verb == NO_INTERACTION for verb, _ in ids)

    def score(self, clauses: Clauses) -> Scores:
        """Return what the clauses of one caption state, hint at and deny."""
        scores = Scores(self._ids)
        for event in clauses.events:
            self._score_event(event, clauses, scores)
        self._score_attachments(clauses, scores)
        self._score_activities(clauses, scores)
        self._score_agents(clauses, scores)
        self._entail(scores)
        self._score_no_interaction(clauses, scores)
        return scores

    # Events

    def _score_event(self, event: Event, clauses: Clauses, scores: Scores) -> None:
        if event.passive:
            self._score_passive(event, clauses, scores)
            return
        trust = event.weight * _agency(event.subjects, event.implicit, event.lemma)
        if trust == 0:
            return
        say = _Say(scores, trust, event.negative)
        said = False
        for phrase in event.objects:
            said |= self._score_object(event, phrase, clauses, say)
        for prep, phrase in event.adjuncts:
            said |= self._score_adjunct(event, prep, phrase, clauses, say)
        for subject in event.subjects:
            for prep, phrase in subject.attached:
                key = f"{event.lemma} {prep}"
                if prep == "with" and not phrase.negative and subject.kind == "person":
                    self._say_frame(key, phrase, clauses, say.scaled(0.8))
        said |= self._score_implied(event, say)
        if not event.objects:
            self._score_each_other(event, say, said)
            if not said:
                self._score_list_object(event, clauses, say)
        for verb in self._verbs_alone & {event.lemma}:
            say((verb, ""), STATED)

    def _score_passive(self, event: Event, clauses: Clauses, scores: Scores) -> None:
        """The subject is the object; without an agent, someone unseen did it, maybe earlier."""
        if event.agents:
            trust = _agency(event.agents, implicit=False, verb=event.lemma)
        else:
            trust = 0.67 if event.progressive else 0.3
        negative = event.negative or (bool(event.agents) and all(a.negative for a in event.agents))
        say = _Say(scores, trust * event.weight, negative)
        active = Event(
            event.lemma, event.form, event.agents, particles=event.particles,
            objects=event.subjects, adjuncts=event.adjuncts,
        )  # fmt: skip
        for phrase in active.objects:
            self._score_object(active, phrase, clauses, say)
        for prep, phrase in active.adjuncts:
            self._score_adjunct(active, prep, phrase, clauses, say)

    def _score_object(self, event: Event, phrase: NounPhrase, clauses: Clauses, say: _Say) -> bool:
        if phrase.negative:
            say = say.denial()
        base = " ".join((event.lemma, *event.particles))
        if phrase.framed:  # "a photo of a zebra" is no zebra to hold
            return self._say_frame(f"{base} {phrase.framed} of", phrase, clauses, say)
        said = False
        for prep, other in event.adjuncts:
            for head in (
                other.head,
                f"{event.particles[0]} {other.head}" if event.particles else "",
            ):
                said |= self._say_frame(f"{event.lemma} _ {prep} {head}", phrase, clauses, say)
                if not said:
                    said = self._say_frame(f"{event.lemma} {prep} {head}", phrase, clauses, say)
        if not said and phrase.of is not None:
            said = self._say_frame(f"{base} {phrase.head} of", phrase.of, clauses, say)
        last = f"{event.lemma} {event.particles[-1]}" if event.particles else ""
        for key in dict.fromkeys((base, last, event.lemma)):
            if not said and key:
                said = self._say_frame(key, phrase, clauses, say)
        if not said and phrase.of is not None:
            said = self._say_frame(base, phrase.of, clauses, say.scaled(0.65))
        return said

    def _score_adjunct(
        self, event: Event, prep: str, phrase: NounPhrase, clauses: Clauses, say: _Say
    ) -> bool:
        if phrase.negative:
            say = say.denial()
        for where, place in event.adjuncts if prep == "with" else ():
            # "dries her hair with a dryer in her hand"
            self._say_frame(f"be with _ {where} {place.head}", phrase, clauses, say)
        short = prep.rsplit(" ", 1)[-1] if prep not in ("in front of", "out of") else prep
        particles = " ".join(event.particles)
        heads = [" ".join((*o.modifiers[-1:], o.head)) for o in event.objects if o.modifiers]
        heads += [head for o in event.objects for head in (o.head, o.head.rsplit(" ", 1)[-1])]
        keys = [f"{event.lemma} {particles} {h} {short}".replace("  ", " ") for h in heads]
        keys += [f"{event.lemma} {h} {prep}" for h in heads]
        # "cut carrots with a knife": the verb's own preposition counts whatever its object is.
        keys += [f"{event.lemma} {particles} {prep}".replace("  ", " ")]
        keys += [f"{event.lemma} {prep}", f"{event.lemma} {short}"]
        for key in dict.fromkeys(keys):
            if self._say_frame(key, phrase, clauses, say):
                return True
        if phrase.of is not None:
            for key in dict.fromkeys(keys):
                for nested in (f"{key} {phrase.head} of", key):
                    factor = 1.0 if nested != key else 0.65
                    if self._say_frame(nested, phrase.of, clauses, say.scaled(factor)):
                        return True
        if event.lemma not in WATCHING:
            factor = 0.9 if not event.objects else 0.6
            self._say_frame(f"be {short}", phrase, clauses, say.scaled(factor))
        return False

    def _score_implied(self, event: Event, say: _Say) -> bool:
        """Phrases whose object is not named: "brushing her teeth", "texting"."""
        base = " ".join((event.lemma, *event.particles))
        heads = [o.head for o in event.objects]
        heads += [f"{o.modifiers[-1]} {o.head}" for o in event.objects if o.modifiers]
        keys = [f"{verb} {head}" for verb in (base, event.lemma) for head in heads]
        if not any(o.objects for o in event.objects):  # "swinging her racket at the ball"
            keys += [f"{event.lemma} {prep} {p.head}" for prep, p in event.adjuncts]
        keys += [
            f"{event.lemma} {o.head} {prep} {p.head}"
            for o in event.objects
            for prep, p in event.adjuncts
        ]
        if all(phrase.kind == "person" for phrase in event.objects):  # "texting a friend"
            keys += [base, event.lemma]
        said = False
        for key in dict.fromkeys(keys):
            for reading in self._lexicon.frames.get(key, ()):
                for obj in reading.implied:
                    said |= self._say_reading(reading, obj, 1.0, say)
        return said

    def _score_list_object(self, event: Event, clauses: Clauses, say: _Say) -> None:
        """Keywords: in "person, horse, riding" the subject list holds the object."""
        if len(event.subjects) > 1:
            for phrase in event.subjects:
                if phrase.kind != "person":
                    self._say_frame(event.lemma, phrase, clauses, say.scaled(0.65))

    def _score_each_other(self, event: Event, say: _Say, said: bool) -> None:
        people = [s for s in event.subjects if s.kind == "person"]
        several = len(people) > 1 or any(s.plural for s in people)
        if several and event.lemma in (_HUGGED if said else _HUGGED | {"cuddle", "snuggle"}):
            for reading in self._lexicon.frames.get(event.lemma, ()):
                self._say_reading(reading, "person", 1.0, say)

    # Phrases

    def _score_attachments(self, clauses: Clauses, scores: Scores) -> None:
        """Say what "a man on a horse" says, for every person with prepositional phrases."""
        for phrase in clauses.phrases:
            trust = _agency([phrase], implicit=False)
            if phrase.negative:
                continue
            for prep, place in phrase.attached:
                # "a phone in a woman's hand"
                if place.of is not None and place.of.kind == "person" and not place.of.negative:
                    say = _Say(scores, 0.8, negative=False)
                    self._say_frame(f"be with _ {prep} {place.head}", phrase, clauses, say)
            if trust == 0:
                continue
            say = _Say(scores, trust, negative=False)
            for n, (prep, other) in enumerate(phrase.attached):
                by_part = n > 0 and phrase.attached[n - 1][1].head in _LIMBS
                here = say.denial() if other.negative else say
                tight = False
                own = takewhile(lambda place: place[0] != "with", phrase.attached[n + 1 :])
                for prep2, place in own if prep == "with" else phrase.attached:
                    key = f"be {prep} _ {prep2} {place.head}"
                    tight |= self._say_frame(key, other, clauses, here)
                    self._say_frame(f"be {prep} {other.head} {prep2}", place, clauses, here)
                # "with his hand on a sheep": the hand is on it, not the man.
                tight = tight or by_part or self._say_frame(f"be {prep}", other, clauses, here)
                if not tight and other.of is not None:
                    whole = 1.0 if other.head == "back" else 0.65
                    self._say_frame(f"be {prep}", other.of, clauses, here.scaled(whole))

    def _score_activities(self, clauses: Clauses, scores: Scores) -> None:
        """Say what "enjoys horse riding" says; the name of an activity alone is a hint."""
        done = {
            id(phrase)
            for event in clauses.events
            if _agency(event.subjects, event.implicit) >= 0.8 and not event.negative
            for phrase in (*event.objects, *(p for _, p in event.adjuncts))
        }
        for phrase in clauses.phrases:
            verb = verb_lemma(phrase.head) if phrase.head.endswith("ing") else ""
            if not verb or not phrase.modifiers or phrase.negative:
                continue
            trust = 0.65 if id(phrase) in done else 0.35
            for obj in self._lexicon.nouns.get(phrase.modifiers[-1], {}):
                for said in self._verbs(self._lexicon.frames.get(verb, ()), obj):
                    scores.add((said, obj), STATED * trust)

    def _score_agents(self, clauses: Clauses, scores: Scores) -> None:
        """A skier who comes down a slope rides skis; any skier hints at it."""
        for event in clauses.events:
            for subject in event.subjects:
                objects = self._used_by(subject, clauses)
                if objects and not event.passive:
                    say = _Say(scores, event.weight * subject.weight, event.negative)
                    self._agent_event(event, objects, say)
        for phrase in clauses.phrases:
            for obj in self._used_by(phrase, clauses):
                verb = "swing" if obj == "baseball_bat" else "ride"
                if not phrase.negative:
                    scores.add((verb, obj), 0.35)

    def _used_by(self, phrase: NounPhrase, clauses: Clauses) -> Sequence[str]:
        """What an agent noun's person uses: of several things the one that is named."""
        objects = self._agent_of(phrase)
        if len(objects) > 1:
            named = {obj for other in clauses.phrases for obj in other.objects}
            return [obj for obj in objects if obj in named] or objects
        return objects

    def _agent_of(self, phrase: NounPhrase) -> tuple[str, ...]:
        """The objects that a person is named after: skis for "skier", a bike for "bike rider"."""
        found = self._lexicon.agents.get(phrase.head, ())
        if not found and phrase.of is not None:  # "a group of skiers"
            found = self._lexicon.agents.get(phrase.of.head, ())
        if not found and phrase.head in self._lexicon.users and phrase.modifiers:
            found = tuple(self._lexicon.nouns.get(phrase.modifiers[-1], ()))
        return found

    def _agent_event(self, event: Event, objects: Sequence[str], say: _Say) -> None:
        base = " ".join((event.lemma, *event.particles))
        keys = [base, event.lemma]
        keys += [f"{event.lemma} {o.head}" for o in event.objects]
        keys += [f"{event.lemma} {prep}" for prep, _ in event.adjuncts]
        keys += [f"{event.lemma} {prep} {p.head}" for prep, p in event.adjuncts]
        keys += [
            f"{event.lemma} {o.head} {prep} {p.head}"
            for o in event.objects
            for prep, p in event.adjuncts
        ]
        for key in dict.fromkeys(keys):
            for reading in self._lexicon.agent_frames.get(key, ()):
                for obj in objects:
                    self._say_reading(reading, obj, 1.0, say)

    # Frames

    def _say_frame(self, key: str, phrase: NounPhrase, clauses: Clauses, say: _Say) -> bool:
        readings = self._lexicon.frames.get(key)
        if not readings:
            return False
        said = False
        for candidates in self._referents(phrase, clauses):
            for obj, trust in candidates.items():
                found = self._verbs(readings, obj)
                if "herd" in found and "walk" in found:
                    found.pop("walk" if phrase.plural else "herd")
                best = max(found.values(), default=0.0)
                for verb, probability in found.items():
                    # One phrase states one class; what else it could mean is a hint.
                    kept = probability if probability == best else min(probability, _SECOND)
                    say((verb, obj), kept * trust)
                    said = True
            if said:
                break
        return said

    def _verbs(self, readings: Iterable[Reading], obj: str) -> dict[str, float]:
        """The class verbs, with probabilities, that readings give for an object of the table."""
        found: dict[str, float] = {}
        for reading in readings:
            if reading.implied:
                continue
            for verb, objects, probability in reading.options:
                if (objects is None or obj in objects) and (verb, obj) in self._ids:
                    if probability > found.get(verb, 0.0):
                        found[verb] = probability
                    break
        return found

    def _say_reading(self, reading: Reading, obj: str, trust: float, say: _Say) -> bool:
        for verb, objects, probability in reading.options:
            if (objects is None or obj in objects) and (verb, obj) in self._ids:
                if probability * trust > 0:
                    say((verb, obj), probability * trust)
                return True
        return False

    @staticmethod
    def _referents(phrase: NounPhrase, clauses: Clauses) -> Iterator[Mapping[str, float]]:
        """The objects that a phrase can mean, the likeliest first."""
        if phrase.pronoun in ("it", "them", "they", "itself") or phrase.head in ("one", "ones"):
            for earlier in reversed(
                clauses.phrases[max(0, phrase.position - 12) : phrase.position]
            ):
                whole = earlier.objects or (earlier.of.objects if earlier.of is not None else {})
                if whole and not earlier.negative and not earlier.pronoun:
                    yield {obj: p * earlier.weight for obj, p in whole.items()}
            if phrase.pronoun not in ("it", "itself"):
                yield {"person": 0.6}
            return
        found = {obj: p * phrase.weight for obj, p in phrase.objects.items()}
        mass = phrase.head == "batter" and not phrase.determined and not phrase.plural
        if phrase.kind == "person" and not mass:
            found.setdefault("person", phrase.weight)
        yield found

    # Consequences

    def _entail(self, scores: Scores) -> None:
        for (verb, obj), probability in list(scores.said.items()):
            if probability < 0.5:
                continue
            for implied, objects, trust in self._lexicon.entails.get(verb, ()):
                if (objects is None or obj in objects) and trust > 0:
                    scores.add((implied, obj), min(ENTAILED_BELOW, trust * probability / STATED))

    def _score_no_interaction(self, clauses: Clauses, scores: Scores) -> None:
        if not self._has_lone_objects:
            return
        people = [p for p in clauses.phrases if p.kind in ("person", "name") and not p.negative]
        if not people:
            return
        busy = {obj for (_, obj), p in scores.said.items() if p >= 0.5}
        for phrase, trust in self._left_alone(clauses):
            for obj, p in phrase.objects.items():
                if obj not in busy and p >= 0.5 and (NO_INTERACTION, obj) in self._ids:
                    scores.add((NO_INTERACTION, obj), trust * p * phrase.weight)
        # Two people side by side are rarely called "no interaction".
        apart = not any(p.attached or p.of for p in clauses.phrases)
        if apart and not clauses.events and len(clauses.phrases) == 2 and len(people) == 1:
            for phrase in clauses.phrases:
                for obj in () if phrase.negative else phrase.objects:
                    if obj not in busy:
                        scores.add((NO_INTERACTION, obj), 0.4)

    @classmethod
    def _left_alone(cls, clauses: Clauses) -> Iterator[tuple[NounPhrase, float]]:
        """Objects that the caption says a person is near, or leaves alone."""
        for phrase in clauses.phrases:
            person = phrase.kind in ("person", "name")
            for prep, other in phrase.attached if not phrase.negative else ():
                if prep in _NEAR and person:
                    yield other, 0.6
                elif prep in _NEAR and other.kind == "person" and not other.negative:
                    yield phrase, 0.55
        if any(p.negative and p.head in _NO_CONTACT for p in clauses.phrases):
            yield from ((phrase, 0.7) for phrase in clauses.phrases if not phrase.negative)
        for event in clauses.events:
            if event.negative and event.lemma in _CONTACT:
                touched = [p for o in event.objects for p in cls._antecedents(o, clauses)]
                yield from ((phrase, 0.7) for phrase in touched or clauses.phrases)
            elif not event.negative and not event.passive and not event.implicit:
                yield from cls._passed_by(event)

    @staticmethod
    def _passed_by(event: Event) -> Iterator[tuple[NounPhrase, float]]:
        if _agency(event.subjects, event.implicit) < 0.8:
            return
        if event.lemma in _LEAVES_ALONE:
            yield from ((phrase, 0.7) for phrase in event.objects)
        if event.lemma in _STATIVE and not event.objects:
            for prep, phrase in event.adjuncts:
                if prep in _NEAR or prep.rsplit(" ", 1)[-1] in _NEAR:
                    yield phrase, 0.6

    @staticmethod
    def _antecedents(phrase: NounPhrase, clauses: Clauses) -> list[NounPhrase]:
        """The phrase, or the last thing before it if it is a pronoun."""
        if phrase.pronoun not in ("it", "them"):
            return [phrase]
        earlier = clauses.phrases[max(0, phrase.position - 12) : phrase.position]
        return [p for p in reversed(earlier) if p.objects and not p.pronoun][:1]


def _agency(subjects: Sequence[NounPhrase], implicit: bool, verb: str = "") -> float:
    """How far the subject is a person: 1 for "a man", 0 for "a dog".

    An unknown noun may be a person or a shelf, which holds but does not read.
    """
    if implicit:
        return 0.85
    best = 0.0
    unknown = 0.65 if verb in _HUMAN_VERBS else 0.5
    for subject in subjects:
        kind = {"person": 1.0, "name": 0.9, "unknown": unknown}.get(subject.kind, 0.0)
        best = max(best, kind * subject.weight)
    return best
