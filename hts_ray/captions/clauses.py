"""Clauses of a caption: who does what to whom, where, and whether it happens at all.

Chunks are read from left to right into events: a verb with its subjects, objects, prepositional
phrases, voice and negation. An event's `weight` is lowered by the verbs that govern it ("wants to
ride") and by how the clause is joined on ("before riding"); those that deny it ("stops riding",
"instead of riding") make it negative. Pronouns stay as they are.

Knows verbs by their lemmas and nouns by their kinds: no lexicon, no objects, no classes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from hts_ray.captions.phrases import Chunk, Mark, NounPhrase, VerbGroup
from hts_ray.captions.words import phrase_set, word_lists, word_set

_ANIMAL_VERBS = word_set("animal_verbs")
_DONE_TOGETHER = word_set("done_together")
_VEHICLE_VERBS = word_set("vehicle_verbs")
WATCHING = word_set("watching")
_SHOWING = word_set("showing")
_OBJECT_CONTROL = word_set("object_control")
_SHOWN_BY_PREPARING = word_set("shown_by_preparing")
_INTRANSITIVE = word_set("intransitive")
_LOCATIVE_BY = word_set("locative_by")
_BODY_PLACES = word_set("body_places")
_SUPPOSING = phrase_set("supposing")
_DOUBTED = word_set("doubted")
_HINTING = word_set("hinting")
_SUPPOSED = 0.3  # how far what is only supposed is said: "as if riding a horse"
# How much of a verb is asserted by a verb that governs it, or by a word that leads to it.
_GOVERNS: dict[str, float] = word_lists()["governs"]
_LEADS: dict[str, float] = word_lists()["leads"]


@dataclass(eq=False)
class Event:
    """One verb with its arguments; `weight` is how far the caption says that it happens.

    `adjuncts` are (prepositions, noun phrase); `particles` have no noun phrase of their own.
    """

    lemma: str
    form: str
    subjects: list[NounPhrase]
    weight: float = 1.0
    negative: bool = False
    passive: bool = False
    progressive: bool = False
    implicit: bool = False
    objects: list[NounPhrase] = field(default_factory=list)
    adjuncts: list[tuple[str, NounPhrase]] = field(default_factory=list)
    particles: list[str] = field(default_factory=list)
    agents: list[NounPhrase] = field(default_factory=list)
    gap: NounPhrase | None = None
    shared: Event | None = None


@dataclass(frozen=True)
class Clauses:
    """The events of one caption and all its noun phrases, both in order."""

    events: Sequence[Event]
    phrases: Sequence[NounPhrase]


def read_clauses(chunks: Sequence[Chunk]) -> Clauses:
    """Return the clauses that chunks make.

    Numbers the noun phrases among the chunks and attaches them to each other: read chunks once.
    """
    reader = _Reader(chunks)
    return Clauses(reader.events, reader.phrases)


class _Reader:
    """Turns the chunks of a caption into events, from left to right."""

    def __init__(self, chunks: Sequence[Chunk]) -> None:
        self.chunks = chunks
        self.events: list[Event] = []
        self.phrases: list[NounPhrase] = []
        self._reset()
        for i, chunk in enumerate(chunks):
            if isinstance(chunk, NounPhrase):
                self._noun(chunk, i)
            elif isinstance(chunk, VerbGroup):
                self._verb(chunk, i)
            else:
                self._mark(chunk, i)
        self._finish()

    def _reset(self) -> None:
        self.subject: list[NounPhrase] = []
        self.outer: list[NounPhrase] = []
        self.event: Event | None = None
        self.last: NounPhrase | None = None
        self.gap: NounPhrase | None = None
        self.supposed = ""  # the word that makes the rest of the sentence, or clause, unreal
        self.denied = False
        self.leading: list[tuple[str, NounPhrase]] = []
        self.group: tuple[str, Any] | None = None
        self._clear()

    def _clear(self) -> None:
        """Forget what only the next phrase needed."""
        self.preps: list[str] = []
        self.joint = ""
        self.comma = False
        self.relative = ""
        self.negate = False
        self.lead = ""

    def _next(self, i: int) -> Chunk | None:
        return self.chunks[i + 1] if i + 1 < len(self.chunks) else None

    # Marks

    def _mark(self, mark: Mark, i: int) -> None:
        if mark.kind == "S":
            if mark.word in (".", "!", "?", "…", ";", ":", "\n", "|"):
                self._reset()
        elif mark.kind == "K":
            self.comma, self.preps = True, []
            self.supposed = self.supposed.replace("as if", "")
        elif mark.kind == "C":
            self.joint, self.preps = mark.word, []
        elif mark.kind == "U":
            self._clear()
            self.lead = mark.word
            self.outer = []
            self.supposed = mark.word if mark.word in _SUPPOSING else self.supposed
        elif mark.kind == "W":
            self.relative, self.comma = mark.word, False
            doubted = self.last is not None and self.last.negative and self.last.head in _DOUBTED
            self.denied = self.denied or doubted  # "no indication that"
        elif mark.kind == "P":
            self._preposition(mark, self._next(i))

    def _preposition(self, mark: Mark, after: Chunk | None) -> None:
        if isinstance(after, VerbGroup) and after.lemma and not after.infinitive:
            if self.preps:
                self._particles(self.preps)
            self.preps, self.lead = [], mark.word
            if mark.word not in _LEADS and self.event is not None:
                self._particles([mark.word])
        elif isinstance(after, NounPhrase) or (isinstance(after, Mark) and after.kind == "P"):
            self.preps.append(mark.word)
        else:
            self._particles([*self.preps, mark.word])
            self.preps = []

    def _particles(self, words: Iterable[str]) -> None:
        if self.event is not None:
            self.event.particles.extend(words)

    # Noun phrases

    def _noun(self, phrase: NounPhrase, i: int) -> None:
        phrase.position = len(self.phrases)
        self.phrases.append(phrase)
        if phrase.of is not None:
            phrase.of.position = phrase.position
        if self.supposed or self.denied:
            phrase.weight *= _SUPPOSED
        if self.negate:
            phrase.negative = True
        after_mark = (self.joint, self.comma, self.relative, self.lead)
        preps = self.preps
        self._clear()
        joint, comma, relative, lead = after_mark
        if preps:
            self._prepositional(phrase, preps)
        elif relative:
            self._relative_object(phrase, relative)
        elif self.event is None:
            self._before_verb(phrase, i, joint, comma)
        elif lead and lead not in _LEADS:
            self._clause([phrase])
        elif (joint or comma) and not self._starts_clause(phrase, i):
            self._join(phrase, i)
        elif joint or comma:
            self._clause([phrase])
        else:
            self._after_verb(phrase, i)
        self.last = phrase

    def _clause(self, subject: list[NounPhrase]) -> None:
        self.subject, self.event, self.gap = subject, None, None
        self.group = ("subject", None)

    def _before_verb(self, phrase: NounPhrase, i: int, joint: str, comma: bool) -> None:
        if not self.subject or (comma and phrase.negative):
            self._clause([phrase])
        elif joint or comma:
            if self.group is not None and self.group[0] == "attached":
                if self._starts_clause(phrase, i) and phrase.kind in ("person", "animal"):
                    self.subject.append(phrase)
                    self.group = ("subject", None)
                else:
                    self._join(phrase, i)
            else:
                self.subject.append(phrase)
                self.group = ("subject", None)
        elif self._starts_clause(phrase, i) and self.last is not None:
            gap, outer = self.last, self.subject
            self._clause([phrase])
            self.gap, self.outer = gap, outer
        else:
            self._clause([phrase])

    def _after_verb(self, phrase: NounPhrase, i: int) -> None:
        event = self.event
        if event is None:
            return
        if event.implicit and event.adjuncts and event.form in ("s", "past") and not event.objects:
            # "On the bench sits an old woman".
            event.subjects, event.implicit = [phrase], False
            self.subject = [phrase]
            return
        person = any(s.kind in ("person", "name") for s in event.subjects)
        shown = event.lemma in _SHOWING and not (person or event.passive or event.objects)
        named = event.lemma == "be" and not (event.adjuncts or event.objects)
        if named and phrase.adjectival:
            for subject in event.subjects if not event.negative else ():
                subject.modifiers = (*subject.modifiers, phrase.head)
            return
        if shown or (named and (not person or phrase.kind == "person")):
            # "There is a man riding", "the image shows a man, riding": the next verb is about him.
            event.objects.extend([phrase] if shown else [])
            phrase.negative = phrase.negative or event.negative
            self._clause([phrase])
            return
        gapped = bool(event.objects) and self.last is not None
        if (gapped or event.adjuncts) and self._starts_clause(phrase, i):
            gapped = gapped or bool(phrase.pronoun)  # "lies on the bed that" or "the bed he made"
            gap, outer = (self.last, self.subject) if gapped else (None, self.outer)
            self._clause([phrase])
            self.gap, self.outer = gap, outer
            return
        event.objects.append(phrase)
        self.group = ("object", event)

    def _prepositional(self, phrase: NounPhrase, preps: list[str]) -> None:
        prep = preps[-1]
        event = self.event
        if prep in ("without", "instead of", "than"):
            phrase.negative = True
            self.group = None
            return
        if event is None:
            if self.subject:
                owner = self.last if self.group and self.group[0] == "subject" else None
                owner = owner or self.subject[-1]
                owner.attached.append((prep, phrase))
                self.group = ("attached", (owner, prep))
            else:
                self.leading.append((prep, phrase))
            return
        if event.passive and prep == "by" and not event.agents and phrase.kind != "thing":
            event.particles.extend(preps[:-1])
            event.agents.append(phrase)
            self.group = ("agent", event)
            return
        if self.last is not None and self.last.kind == "person" and self.last in event.objects:
            self.last.attached.append((prep, phrase))
        event.adjuncts.append((" ".join(preps), phrase))
        self.group = ("adjunct", (event, " ".join(preps)))

    def _relative_object(self, phrase: NounPhrase, relative: str) -> None:
        antecedent = self.last
        outer = self.subject
        self._clause([phrase])
        self.outer = outer
        if relative != "whose":
            self.gap = antecedent

    def _join(self, phrase: NounPhrase, i: int) -> None:
        if self.group is None:
            return
        kind, target = self.group
        if kind == "adjunct" and target[0].objects and self._has_own_place(target[0].adjuncts, i):
            # "a cup in one hand and a bag in the other"
            event = target[0]
            kind, target = "object", replace(event, objects=[], adjuncts=[], gap=None, shared=None)
            self.events.append(target)
            self.event, self.group = target, ("object", target)
        elif kind == "attached" and self._has_own_place(target[0].attached, i):
            target = (target[0], target[0].attached[0][0])
        if kind == "object":
            target.objects.append(phrase)
        elif kind == "adjunct":
            target[0].adjuncts.append((target[1], phrase))
        elif kind == "agent":
            target.agents.append(phrase)
        elif kind == "attached":
            target[0].attached.append((target[1], phrase))

    def _has_own_place(self, places: Sequence[tuple[str, NounPhrase]], i: int) -> bool:
        """Whether the phrase at `i` is in another hand than the one before: no place itself."""
        own = self.chunks[i + 1 : i + 3]
        again = len(own) > 1 and _is_mark(own[0], "P") and isinstance(own[1], NounPhrase)
        return again and places[-1][1].head in _BODY_PLACES

    def _starts_clause(self, phrase: NounPhrase, i: int) -> bool:
        """Whether a verb follows for which this phrase would be the subject."""
        j = i + 1
        while (
            j + 1 < len(self.chunks)
            and j < i + 6
            and _is_mark(self.chunks[j], "P")
            and isinstance(self.chunks[j + 1], NounPhrase)
        ):
            j += 2
        if j < len(self.chunks) and _is_mark(self.chunks[j], "W"):
            j += 1
        if j >= len(self.chunks):
            return False
        verb = self.chunks[j]
        if not isinstance(verb, VerbGroup) or not verb.lemma or verb.infinitive:
            return False
        return phrase.kind in ("person", "animal", "name") or (
            verb.form in ("s", "base") or phrase.kind == "vehicle"
        )

    # Verbs

    def _verb(self, group: VerbGroup, i: int) -> None:
        if not group.lemma:
            self.negate = True
            return
        before = self.chunks[i - 1] if i else None
        event = Event(group.lemma, group.form, [], group.weight, group.negative)
        if self.negate:
            event.negative = True
        event.progressive = group.progressive
        if self.preps:
            self._particles(self.preps)
        self._find_subject(event, group, before, i)
        if group.weight < 1 and event.lemma in _SHOWN_BY_PREPARING:
            event.weight *= 1.2
        event.negative = event.negative or (
            bool(event.subjects) and all(s.negative for s in event.subjects)
        )
        event.passive = self._is_passive(group, event, i)
        self._suppose(event, before, i)
        event.gap, self.gap = self.gap, None
        event.adjuncts, self.leading = [*self.leading, *event.adjuncts], []
        self.events.append(event)
        self.event = event
        self.group = None
        self._clear()

    def _suppose(self, event: Event, before: Chunk | None, i: int) -> None:
        """Weaken what is only supposed, and start what this verb makes so: "suggests that"."""
        first = before is None or _is_mark(before, "S")
        if first and (event.lemma, event.form) == ("have", "past"):
            self.supposed = "if"  # "Had anyone sat there"
        event.weight *= _SUPPOSED if self.supposed else 1.0
        event.negative = event.negative or self.denied
        after = self._next(i)
        clause = isinstance(after, NounPhrase) and self._starts_clause(after, i + 1)
        if event.lemma in _HINTING and (clause or _is_mark(after, "W")):
            self.denied = event.negative
            self.supposed = self.supposed or event.lemma
        elif event.negative and isinstance(after, Mark) and after.word == "like":
            self.denied = True  # "does not look like he is riding"

    def _find_subject(self, event: Event, group: VerbGroup, before: Chunk | None, i: int) -> None:
        current = self.event
        if self.relative:
            self._relative_subject(event)
        elif current is not None and (self.joint or self._verb_list(i)):
            self._coordinated(event, current)
        elif group.infinitive and current is not None:
            self._governed(event, current)
        elif self.lead in _LEADS:
            event.subjects = current.subjects if current is not None else self.subject
            trust = _LEADS[self.lead]
            event.negative = event.negative or trust == 0
            event.weight *= trust or 1.0
        elif isinstance(before, VerbGroup) and current is not None:
            if event.form in ("s", "past") and self.outer:
                event.subjects, self.outer = self.outer, []
            else:
                self._governed(event, current)
        elif self.comma or self.lead or not isinstance(before, NounPhrase):
            event.subjects = self.subject if self.subject else []
        else:
            self._nearest_subject(event, i)
        event.implicit = not event.subjects

    def _verb_list(self, i: int) -> bool:
        """Whether this verb continues a list: "washing, drying and petting"."""
        return self.comma and i > 1 and isinstance(self.chunks[i - 2], VerbGroup)

    def _relative_subject(self, event: Event) -> None:
        antecedent = self.last
        people = ("person", "animal") if event.lemma in _ANIMAL_VERBS else ("person",)
        if self.relative in ("who", "whom") and (
            antecedent is None or antecedent.kind not in people
        ):
            antecedent = next(
                (p for p in reversed(self.phrases[-12:]) if p.kind == "person"), antecedent
            )
        self.outer = self.subject
        event.subjects = [antecedent] if antecedent is not None else []

    def _coordinated(self, event: Event, current: Event) -> None:
        alike = next((e for e in reversed(self.events[-6:]) if e.form == event.form), current)
        event.subjects = alike.subjects
        event.weight *= min(1.0, alike.weight) if alike is current else 1.0
        if current.negative and self.joint in ("or", "nor"):
            event.negative = True
        bare = not current.objects and not current.adjuncts and current.gap is None
        if bare and current.lemma not in _INTRANSITIVE and not current.passive:
            current.shared = event
            event.negative = event.negative or current.negative  # "never text and drive"
        elif event.lemma and current.gap is not None:
            event.gap = current.gap

    def _governed(self, event: Event, current: Event) -> None:
        """A verb under another one: "starts riding", "stops to pet", "teaches a boy to ride"."""
        event.subjects = current.subjects
        trust = _GOVERNS.get(current.lemma, 1.0)
        if current.lemma == "stop" and event.form == "base":
            trust = 1.0
        if current.lemma in ("use",) and event.form == "base":
            event.adjuncts.extend(("with", phrase) for phrase in current.objects)
            trust = 0.95
        if trust == 0.5 and event.lemma in _SHOWN_BY_PREPARING:
            trust = 0.6
        if current.lemma in _OBJECT_CONTROL and current.objects:
            event.subjects = list(current.objects)
        event.negative = (
            event.negative or trust == 0 or (current.negative and event.form in ("ing", "base"))
        )
        event.weight *= trust or 1.0
        if current.weight < 1:
            event.weight *= current.weight

    def _nearest_subject(self, event: Event, i: int) -> None:
        last, current = self.last, self.event
        if last is None or current is None:
            event.subjects = self.subject
            if last is not None and self._takes_over(last, event):
                event.subjects = [last]
        elif event.form in ("s", "base") and current.lemma not in WATCHING:
            event.subjects = self.outer or self.subject
            self.outer = []
        else:
            reduced = event.form in ("past", "part") and not isinstance(self._next(i), NounPhrase)
            near = reduced or self._can_act(last, event, current)
            event.subjects = [last] if near else current.subjects or self.subject

    def _takes_over(self, last: NounPhrase, event: Event) -> bool:
        """Whether in "a bike with a man riding it" the last noun, not the first, acts."""
        if last in self.subject or event.form not in ("ing", "past", "part"):
            return False
        if last.kind == "person":
            return last.negative or all(s.kind not in ("person", "name") for s in self.subject)
        animal = last.kind == "animal" and event.form == "ing"
        return animal and event.lemma in _ANIMAL_VERBS - _DONE_TOGETHER

    @staticmethod
    def _can_act(phrase: NounPhrase, event: Event, current: Event) -> bool:
        if phrase.kind in ("person", "name"):
            return True
        if phrase.kind == "animal":
            return event.lemma in _ANIMAL_VERBS or current.lemma in WATCHING
        if phrase.kind == "vehicle":
            return event.lemma in _VEHICLE_VERBS and current.lemma in WATCHING | {"stand", "be"}
        return False

    def _is_passive(self, group: VerbGroup, event: Event, i: int) -> bool:
        if group.form not in ("past", "part") and not group.passive:
            return False
        person = any(s.kind in ("person", "name") for s in event.subjects)
        agent = self._agent_follows(i)
        if group.passive:
            return not person or agent or not event.subjects or group.progressive
        after = self._next(i)
        if isinstance(after, NounPhrase) or self.joint:
            return False
        if person:
            return agent and event.lemma not in _LOCATIVE_BY
        return bool(event.subjects)

    def _agent_follows(self, i: int) -> bool:
        for j in range(i + 1, min(i + 8, len(self.chunks) - 1)):
            chunk = self.chunks[j]
            if isinstance(chunk, VerbGroup) or _is_mark(chunk, "S") or _is_mark(chunk, "U"):
                return False
            if _is_mark(chunk, "P") and isinstance(chunk, Mark) and chunk.word == "by":
                agent = self.chunks[j + 1]
                return isinstance(agent, NounPhrase) and agent.kind in (
                    "person", "animal", "name", "unknown",
                )  # fmt: skip
        return False

    def _finish(self) -> None:
        for event in self.events:
            if event.lemma in _SHOWING and any(s.depiction for s in event.subjects):
                for phrase in event.objects:
                    phrase.weight *= 0.4
        for earlier, event in zip(self.events, self.events[1:], strict=False):
            if event.lemma == "use" and event.form == "ing" and event.subjects is earlier.subjects:
                earlier.adjuncts.extend(("with", phrase) for phrase in event.objects)
        for event in self.events:
            if event.gap is not None and not event.objects and event.gap not in event.subjects:
                event.objects.append(event.gap)
        for event in reversed(self.events):
            other = event.shared
            if other is not None and not event.objects:
                event.objects = list(other.objects) or [p for _, p in other.adjuncts[:1]]


def _is_mark(chunk: Chunk | None, kind: str) -> bool:
    return isinstance(chunk, Mark) and chunk.kind == kind
