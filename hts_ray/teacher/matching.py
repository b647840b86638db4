"""Caption mode of the teacher: which classes a caption's text states.

A caption is read as a shallow parse: noun phrases and verb groups (`lexicon`), then events with
subject, objects, prepositions, voice and negation, then classes through surface phrases such as
"take bite of" = eat. Probabilities mean:

- 0.5 and above: stated. 0.9 is the verb or a synonym said of a person, less where the wording
  leaves something open ("a man on a horse" for ride, a subject that is left out, "about to hit").
- below 0.5: hinted. This holds for every class that another one merely entails (riding a horse
  for straddle, swinging a bat for hold), because a pseudo-label should be what was said, and for
  wordings that fit several classes ("a man with an umbrella" for hold and carry), purposes not
  yet reached ("wants to ride", "waits to board") and pictures of pictures ("a statue of a man").
- absent: not said, or denied ("nobody is riding the horse", "stops riding", "instead of riding").

A class with a verb needs a person as its subject: a dog on a skateboard states nothing. A caption
that says where a person stands beside an object and nothing more, or denies contact, states
`no_interaction`. "About to" and "trying to" keep half: stated only for acts that a still picture
shows by their preparation (swing, hit, throw, kick, catch, serve, jump, board, blow).

English only. What the lexicon finds nothing for can be given to an `encoder`.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from hts_ray.classes import NO_INTERACTION, OBJECT_PHRASES, ClassTable, HoiClass, hico_classes
from hts_ray.teacher.lexicon import (
    STATED,
    Chunk,
    Lexicon,
    Mark,
    NounPhrase,
    Reading,
    VerbGroup,
    noun_key,
    split_words,
    verb_lemma,
)

ENTAILED_BELOW = 0.49  # no entailment, however certain, makes a class stated
_SECOND = 0.45  # a further reading of a phrase that states another class
_ANY_PREPOSITION = 0.7  # "climbing up a ladder" for the own class climb
_DIRECTIONS = ("up", "down", "at", "over", "through", "around", "across", "along", "into", "onto")
_PROMPT = 0.95  # the caption is one of the class's own prompts
_ENCODED_AT_MOST = 0.6
_ENCODED_CLASSES = 3
_CACHED_TABLES = 8


class TextEncoder(Protocol):
    """Gives N texts as N unit vectors, (N, D) floats; CLIP's text tower is one."""

    def __call__(self, texts: Sequence[str], /) -> npt.NDArray[np.floating[Any]]:
        """Return (N, D)."""
        ...


def match_captions(
    captions: Sequence[str],
    class_table: ClassTable | None = None,
    *,
    encoder: TextEncoder | None = None,
    similarity_floor: float = 0.85,
) -> list[dict[int, float]]:
    """Return one `{class_id: probability}` for each of N captions (HICO's 600 by default).

    See the module for what probabilities mean. Classes without a verb are stated by their
    object or name being there, whoever does what. With an `encoder`, a caption with a person in
    it for which nothing is stated gets, for its three nearest classes, a probability that grows
    linearly from 0 at cosine `similarity_floor` between the caption and the class's primary
    prompt to 0.6 at cosine 1; classes that the caption denies get none. Raises TypeError for a
    single string or entries that are no strings, ValueError for a floor outside [-1, 1) or
    vectors of the wrong shape.
    """
    if isinstance(captions, (str, bytes)):
        raise TypeError("captions is a single string: give a list of strings")
    texts = list(captions)
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(f"captions[{i}] is {type(text).__name__}: give strings")
    if not -1 <= similarity_floor < 1:
        raise ValueError(f"similarity_floor = {similarity_floor!r}: give a cosine in [-1, 1)")
    table = hico_classes() if class_table is None else class_table
    matcher = _matcher(table)
    found = [matcher.match(text) for text in texts]
    if encoder is not None:
        _add_similar(found, texts, table, encoder, similarity_floor)
    return [match.probabilities for match in found]


@dataclass
class Match:
    """What was found in one caption: probabilities by class id, denied ids, any person in it."""

    probabilities: dict[int, float]
    denied: set[int]
    has_person: bool


@functools.lru_cache(maxsize=_CACHED_TABLES)
def _matcher(table: ClassTable) -> CaptionMatcher:
    return CaptionMatcher(table)


def _add_similar(
    found: list[Match],
    texts: Sequence[str],
    table: ClassTable,
    encoder: TextEncoder,
    floor: float,
) -> None:
    rows = [
        i
        for i, match in enumerate(found)
        if match.has_person and not any(p >= 0.5 for p in match.probabilities.values())
    ]
    if not rows:
        return
    captions_ND = _encoded(encoder, [texts[i] for i in rows])
    prompts_CD = _encoded(encoder, table.primary_prompts)
    if captions_ND.shape[1] != prompts_CD.shape[1]:
        raise ValueError(
            f"encoder gave {captions_ND.shape[1]} and {prompts_CD.shape[1]} dimensions:"
            " give texts of the same space"
        )
    cosine_NC = captions_ND @ prompts_CD.T
    for row, cosine_C in zip(rows, cosine_NC, strict=True):
        match = found[row]
        for c in np.argsort(-cosine_C, kind="stable")[:_ENCODED_CLASSES]:
            class_id = table[int(c)].class_id
            trust = min(1.0, (float(cosine_C[c]) - floor) / (1 - floor)) * _ENCODED_AT_MOST
            if trust > match.probabilities.get(class_id, 0.0) and class_id not in match.denied:
                match.probabilities[class_id] = trust


def _encoded(encoder: TextEncoder, texts: Sequence[str]) -> npt.NDArray[np.float64]:
    vectors = np.asarray(encoder(texts), dtype=np.float64)
    if vectors.ndim != 2 or len(vectors) != len(texts):
        raise ValueError(f"encoder gave shape {vectors.shape} for {len(texts)} texts: give (N, D)")
    return vectors


# Events


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


def _set(text: str) -> frozenset[str]:
    return frozenset(text.split())


# What animals do as well; any other verb after "a man with a dog" is the man's.
_ANIMAL_VERBS = _set(
    "catch chase run eat lie lay sit stand jump watch play lick sleep walk look drink graze carry"
    " pull rest chew bite swim fly perch stare peek wear be follow roll bark trot gallop wait"
    " leap hop nap wander feed nibble sniff beg move herd fetch wade splash lean dress tie"
)
_DONE_TOGETHER = _set("walk run jog stroll")  # "a man with a dog walking"
_VEHICLE_VERBS = _set(
    "carry pull tow push drive sail move park wait fly land turn stop pass face travel go come"
    " transport haul cross drag run approach leave arrive be contain fill sit load take off head"
)
_WATCHING = _set("watch see look observe photograph film help let make have show hear view")
_HUMAN_VERBS = _set(
    "ride drive park row read type text talk throw kick wash bathe clean scrub pet kiss hug feed"
    " groom milk shear train teach walk repair fix sign paint cook cut slice peel buy brush drink"
    " sip toast stir pack zip inspect"
    " check install assemble swing serve dribble fly board toss pedal steer straddle pour bake"
)
_SHOWING = _set("show depict feature display contain portray picture represent illustrate")
_OBJECT_CONTROL = _set("teach help train tell ask encourage allow get instruct show let make coach")
# A verb that governs another one: how much of the other it asserts; 0 denies it.
_GOVERNS = {
    "stop": 0.0, "quit": 0.0, "avoid": 0.0, "refuse": 0.0, "fail": 0.0, "forget": 0.0,
    "decline": 0.0, "miss": 0.0, "finish": 0.3, "want": 0.35, "wait": 0.35, "hope": 0.3,
    "pretend": 0.3, "need": 0.35, "wish": 0.3, "plan": 0.35, "decide": 0.5, "consider": 0.3,
    "like": 0.7, "learn": 0.8, "offer": 0.5, "try": 0.5, "attempt": 0.5, "prepare": 0.5,
    "line": 0.4, "queue": 0.4, "ask": 0.4, "tell": 0.4, "encourage": 0.4, "teach": 0.6,
    "help": 0.8, "get": 0.5, "threaten": 0.4, "reach": 0.5, "allow": 0.5, "ready": 0.5,
}  # fmt: skip
_LEADS = {
    "without": 0.0, "instead of": 0.0, "before": 0.6, "after": 0.6, "for": 0.4, "from": 0.3,
    "despite": 0.6, "like": 0.3, "than": 0.0, "about": 0.3, "against": 0.2,
}  # fmt: skip
# A still picture shows these by their preparation.
_SHOWN_BY_PREPARING = _set(
    "swing hit throw kick catch serve jump board block spike toss strike blow"
)
_INTRANSITIVE = _set("walk run sit stand jump stop turn smile lie wait talk play pose look work")
_LOCATIVE_BY = _set("walk run sit stand pass go stop wait kneel pose drive live lie fly rest park")
_NEAR = _set("near by beside besides behind past alongside opposite nearby between") | {
    "in front of",
    "away from",
    "next to",
}
_STATIVE = _set(
    "be stand pose walk wait sit kneel crouch smile pass run stroll squat remain stay gather talk"
    " chat hang linger jog go laugh look huddle line loiter converse"
)
_CONTACT = _set("touch interact contact use handle approach engage")
_LIMBS = _set("hand arm finger head foot leg face elbow palm nose")
_NO_CONTACT = _set("contact interaction touching")
_LEAVES_ALONE = _set("ignore avoid pass overlook bypass")


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
        after = self._next(i)
        if mark.kind == "S":
            if mark.word in (".", "!", "?", "…", ";", ":", "\n", "|"):
                self._reset()
        elif mark.kind == "K":
            self.comma, self.preps = True, []
        elif mark.kind == "C":
            self.joint, self.preps = mark.word, []
        elif mark.kind == "U":
            self._clear()
            self.lead = mark.word
            self.outer = []
        elif mark.kind == "W":
            self.relative, self.comma = mark.word, False
        elif mark.kind == "P":
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
            self._join(phrase)
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
                    self.group[1][0].attached.append((self.group[1][1], phrase))
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
        if event.lemma == "be" and not event.adjuncts and not event.objects:
            # "There is a man riding": the predicate is what the next verb is about.
            person = any(s.kind in ("person", "name") for s in event.subjects)
            if phrase.adjectival:
                for subject in event.subjects if not event.negative else ():
                    subject.modifiers = (*subject.modifiers, phrase.head)
                return
            if not person or phrase.kind == "person":
                negative = event.negative
                self._clause([phrase])
                phrase.negative = phrase.negative or negative
                return
        if event.objects and self.last is not None and self._starts_clause(phrase, i):
            gap, outer = self.last, self.subject
            self._clause([phrase])
            self.gap, self.outer = gap, outer
            return
        if event.adjuncts and self._starts_clause(phrase, i):
            self._clause([phrase])
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

    def _join(self, phrase: NounPhrase) -> None:
        if self.group is None:
            return
        kind, target = self.group
        if kind == "object":
            target.objects.append(phrase)
        elif kind == "adjunct":
            target[0].adjuncts.append((target[1], phrase))
        elif kind == "agent":
            target.agents.append(phrase)
        elif kind == "attached":
            target[0].attached.append((target[1], phrase))

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
        event.gap, self.gap = self.gap, None
        event.adjuncts, self.leading = [*self.leading, *event.adjuncts], []
        self.events.append(event)
        self.event = event
        self.group = None
        self._clear()

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
        """Whether this goes on a list: "washing, drying and petting"."""
        return self.comma and i > 1 and isinstance(self.chunks[i - 2], VerbGroup)

    def _relative_subject(self, event: Event) -> None:
        antecedent = self.last
        if self.relative in ("who", "whom") and (antecedent is None or antecedent.kind != "person"):
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
        elif event.form in ("s", "base") and current.lemma not in _WATCHING:
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
            return event.lemma in _ANIMAL_VERBS or current.lemma in _WATCHING
        if phrase.kind == "vehicle":
            return event.lemma in _VEHICLE_VERBS and current.lemma in _WATCHING | {"stand", "be"}
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


def _is_mark(chunk: Chunk, kind: str) -> bool:
    return isinstance(chunk, Mark) and chunk.kind == kind


# Classes


class CaptionMatcher:
    """The classes of one table, compiled for matching."""

    def __init__(self, table: ClassTable) -> None:
        self.table = table
        self._ids: dict[tuple[str, str], int] = {}
        self._alone: list[tuple[int, _NamePattern]] = []
        nouns: dict[str, dict[str, float]] = {}
        frames: dict[str, list[Reading]] = {}
        plain: list[HoiClass] = []
        known = Lexicon()
        objects = {obj for found in known.nouns.values() for obj in found}
        targets = {
            option[0]
            for readings in known.frames.values()
            for reading in readings
            for option in reading.options
        }
        for entry in table:
            if entry.verb is None:
                plain.append(entry)
                continue
            verb, surface = _verb_keys(entry.verb)
            obj = "" if entry.object is None else _object_key(entry.object, objects)
            self._ids[verb, obj] = entry.class_id
            if obj and obj not in objects and obj != "person":
                nouns.setdefault(noun_key(entry.object or ""), {})[obj] = 1.0
            if verb != NO_INTERACTION:
                frames.setdefault(surface, [Reading(((verb, None, STATED),))])
                if verb not in targets:
                    loose = Reading(((verb, None, _ANY_PREPOSITION),))
                    for prep in _DIRECTIONS:
                        frames.setdefault(f"{surface} {prep}", [loose])
        own = {obj for found in nouns.values() for obj in found}
        self.lexicon = Lexicon(nouns, frames, own) if nouns or frames else known
        self._verbs_alone = {verb for verb, obj in self._ids if not obj}
        for entry in plain:
            said = entry.object or entry.name
            self._alone.append((entry.class_id, _NamePattern(said, self.lexicon)))
        self._prompts = {
            _normal(prompt): entry.class_id for entry in table for prompt in entry.prompts
        }
        self._lone_objects = [obj for verb, obj in self._ids if verb == NO_INTERACTION]

    def match(self, caption: str) -> Match:
        """Find the classes of one caption."""
        chunks = self.lexicon.chunks(caption)
        reader = _Reader(chunks)
        scores = _Scores(self._ids)
        for event in reader.events:
            self._score_event(event, reader, scores)
        self._score_attachments(reader, scores)
        self._score_activities(reader, scores)
        self._score_agents(reader, scores)
        self._entail(scores)
        self._score_no_interaction(reader, scores)
        found = scores.by_id()
        denied = {self._ids[pair] for pair in scores.denied} - {
            class_id for class_id, p in found.items() if p >= 0.5
        }
        for class_id in denied:
            found.pop(class_id, None)
        for class_id, pattern in self._alone:
            trust = pattern.match(chunks, reader)
            if trust:
                found[class_id] = trust
        exact = self._prompts.get(_normal(caption))
        if exact is not None:
            found[exact] = max(_PROMPT, found.get(exact, 0.0))
        person = any(p.kind in ("person", "name") and not p.negative for p in reader.phrases)
        return Match(found, denied, person or not reader.phrases)

    # Events

    def _score_event(self, event: Event, reader: _Reader, scores: _Scores) -> None:
        if event.passive:
            self._score_passive(event, reader, scores)
            return
        trust = event.weight * _agency(event.subjects, event.implicit, event.lemma)
        if trust == 0:
            return
        say = _Say(scores, trust, event.negative)
        said = False
        for phrase in event.objects:
            said |= self._score_object(event, phrase, reader, say)
        for prep, phrase in event.adjuncts:
            said |= self._score_adjunct(event, prep, phrase, reader, say)
        for subject in event.subjects:
            for prep, phrase in subject.attached:
                key = f"{event.lemma} {prep}"
                if prep == "with" and not phrase.negative and subject.kind == "person":
                    self._say_frame(key, phrase, reader, say.scaled(0.8))
        said |= self._score_implied(event, say)
        if not event.objects and not said:
            self._score_list_object(event, reader, say)
            self._score_each_other(event, say)
        for verb in self._verbs_alone & {event.lemma}:
            say((verb, ""), STATED)

    def _score_passive(self, event: Event, reader: _Reader, scores: _Scores) -> None:
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
            self._score_object(active, phrase, reader, say)
        for prep, phrase in active.adjuncts:
            self._score_adjunct(active, prep, phrase, reader, say)

    def _score_object(self, event: Event, phrase: NounPhrase, reader: _Reader, say: _Say) -> bool:
        if phrase.negative:
            say = say.denial()
        base = " ".join((event.lemma, *event.particles))
        if phrase.framed:  # "a photo of a zebra" is no zebra to hold
            return self._say_frame(f"{base} {phrase.framed} of", phrase, reader, say)
        said = False
        for prep, other in event.adjuncts:
            for head in (
                other.head,
                f"{event.particles[0]} {other.head}" if event.particles else "",
            ):
                said |= self._say_frame(f"{event.lemma} _ {prep} {head}", phrase, reader, say)
                if not said:
                    said = self._say_frame(f"{event.lemma} {prep} {head}", phrase, reader, say)
        if not said and phrase.of is not None:
            said = self._say_frame(f"{base} {phrase.head} of", phrase.of, reader, say)
        last = f"{event.lemma} {event.particles[-1]}" if event.particles else ""
        for key in dict.fromkeys((base, last, event.lemma)):
            if not said and key:
                said = self._say_frame(key, phrase, reader, say)
        if not said and phrase.of is not None:
            said = self._say_frame(base, phrase.of, reader, say.scaled(0.65))
        return said

    def _score_adjunct(
        self, event: Event, prep: str, phrase: NounPhrase, reader: _Reader, say: _Say
    ) -> bool:
        if phrase.negative:
            say = say.denial()
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
            if self._say_frame(key, phrase, reader, say):
                return True
        if phrase.of is not None:
            for key in dict.fromkeys(keys):
                for nested in (f"{key} {phrase.head} of", key):
                    factor = 1.0 if nested != key else 0.65
                    if self._say_frame(nested, phrase.of, reader, say.scaled(factor)):
                        return True
        if event.lemma not in _WATCHING:
            factor = 0.9 if not event.objects else 0.6
            self._say_frame(f"be {short}", phrase, reader, say.scaled(factor))
        return False

    def _score_implied(self, event: Event, say: _Say) -> bool:
        """Phrases whose object is not named: "brushing her teeth", "texting"."""
        base = " ".join((event.lemma, *event.particles))
        heads = [o.head for o in event.objects]
        heads += [f"{o.modifiers[-1]} {o.head}" for o in event.objects if o.modifiers]
        keys = [f"{verb} {head}" for verb in (base, event.lemma) for head in heads]
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
            for reading in self.lexicon.frames.get(key, ()):
                for obj in reading.implied:
                    said |= self._say_reading(reading, obj, 1.0, say)
        return said

    def _score_list_object(self, event: Event, reader: _Reader, say: _Say) -> None:
        """Keywords: in "person, horse, riding" the subject list holds the object."""
        if len(event.subjects) > 1:
            for phrase in event.subjects:
                if phrase.kind != "person":
                    self._say_frame(event.lemma, phrase, reader, say.scaled(0.65))

    def _score_each_other(self, event: Event, say: _Say) -> None:
        people = [s for s in event.subjects if s.kind == "person"]
        several = len(people) > 1 or any(s.plural for s in people)
        if several and event.lemma in ("kiss", "hug", "embrace", "cuddle", "snuggle"):
            for reading in self.lexicon.frames.get(event.lemma, ()):
                self._say_reading(reading, "person", 1.0, say)

    # Phrases

    def _score_attachments(self, reader: _Reader, scores: _Scores) -> None:
        """Say what "a man on a horse" says, for every person with prepositional phrases."""
        for phrase in reader.phrases:
            trust = _agency([phrase], implicit=False)
            if phrase.negative:
                continue
            for prep, place in phrase.attached:
                # "a phone in a woman's hand"
                if place.of is not None and place.of.kind == "person" and not place.of.negative:
                    say = _Say(scores, 0.8, negative=False)
                    self._say_frame(f"be with _ {prep} {place.head}", phrase, reader, say)
            if trust == 0:
                continue
            say = _Say(scores, trust, negative=False)
            for n, (prep, other) in enumerate(phrase.attached):
                by_part = n > 0 and phrase.attached[n - 1][1].head in _LIMBS
                here = say.denial() if other.negative else say
                tight = False
                for prep2, place in phrase.attached:
                    key = f"be {prep} _ {prep2} {place.head}"
                    tight |= self._say_frame(key, other, reader, here)
                    self._say_frame(f"be {prep} {other.head} {prep2}", place, reader, here)
                # "with his hand on a sheep": the hand is on it, not the man.
                tight = tight or by_part or self._say_frame(f"be {prep}", other, reader, here)
                if not tight and other.of is not None:
                    whole = 1.0 if other.head == "back" else 0.65
                    self._say_frame(f"be {prep}", other.of, reader, here.scaled(whole))

    def _score_activities(self, reader: _Reader, scores: _Scores) -> None:
        """Say what "enjoys horse riding" says; the name of an activity alone is a hint."""
        done = {
            id(phrase)
            for event in reader.events
            if _agency(event.subjects, event.implicit) >= 0.8 and not event.negative
            for phrase in (*event.objects, *(p for _, p in event.adjuncts))
        }
        for phrase in reader.phrases:
            verb = verb_lemma(phrase.head) if phrase.head.endswith("ing") else ""
            if not verb or not phrase.modifiers or phrase.negative:
                continue
            trust = 0.65 if id(phrase) in done else 0.35
            for obj in self.lexicon.nouns.get(phrase.modifiers[-1], {}):
                for said in self._verbs(self.lexicon.frames.get(verb, ()), obj):
                    scores.add((said, obj), STATED * trust)

    def _score_agents(self, reader: _Reader, scores: _Scores) -> None:
        """A skier who comes down a slope rides skis; any skier hints at it."""
        for event in reader.events:
            for subject in event.subjects:
                objects = self._used_by(subject, reader)
                if objects and not event.passive:
                    say = _Say(scores, event.weight * subject.weight, event.negative)
                    self._agent_event(event, objects, say)
        for phrase in reader.phrases:
            for obj in self._used_by(phrase, reader):
                verb = "swing" if obj == "baseball_bat" else "ride"
                if not phrase.negative:
                    scores.add((verb, obj), 0.35)

    def _used_by(self, phrase: NounPhrase, reader: _Reader) -> Sequence[str]:
        """What an agent noun's person uses: of several things the one that is named."""
        objects = self.lexicon.agent_of(phrase)
        if len(objects) > 1:
            named = {obj for other in reader.phrases for obj in other.objects}
            return [obj for obj in objects if obj in named] or objects
        return objects

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
            for reading in self.lexicon.agent_frames.get(key, ()):
                for obj in objects:
                    self._say_reading(reading, obj, 1.0, say)

    # Frames

    def _say_frame(self, key: str, phrase: NounPhrase, reader: _Reader, say: _Say) -> bool:
        readings = self.lexicon.frames.get(key)
        if not readings:
            return False
        said = False
        for candidates in self._referents(phrase, reader):
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
    def _referents(phrase: NounPhrase, reader: _Reader) -> Iterator[Mapping[str, float]]:
        """The objects that a phrase can mean, the likeliest first."""
        if phrase.pronoun in ("it", "them", "they", "itself") or phrase.head in ("one", "ones"):
            for earlier in reversed(reader.phrases[max(0, phrase.position - 12) : phrase.position]):
                if earlier.objects and not earlier.negative and not earlier.pronoun:
                    yield {obj: p * earlier.weight for obj, p in earlier.objects.items()}
            if phrase.pronoun not in ("it", "itself"):
                yield {"person": 0.6}
            return
        found = {obj: p * phrase.weight for obj, p in phrase.objects.items()}
        mass = phrase.head == "batter" and not phrase.determined and not phrase.plural
        if phrase.kind == "person" and not mass:
            found.setdefault("person", phrase.weight)
        yield found

    # Consequences

    def _entail(self, scores: _Scores) -> None:
        for (verb, obj), probability in list(scores.said.items()):
            if probability < 0.5:
                continue
            for implied, objects, trust in self.lexicon.entails.get(verb, ()):
                if (objects is None or obj in objects) and trust > 0:
                    scores.add((implied, obj), min(ENTAILED_BELOW, trust * probability / STATED))

    def _score_no_interaction(self, reader: _Reader, scores: _Scores) -> None:
        if not self._lone_objects:
            return
        people = [p for p in reader.phrases if p.kind in ("person", "name") and not p.negative]
        if not people:
            return
        busy = {obj for (_, obj), p in scores.said.items() if p >= 0.5}
        for phrase, trust in self._left_alone(reader):
            for obj, p in phrase.objects.items():
                if obj not in busy and p >= 0.5 and (NO_INTERACTION, obj) in self._ids:
                    scores.add((NO_INTERACTION, obj), trust * p * phrase.weight)
        # Two people side by side are rarely called "no interaction".
        apart = not any(p.attached or p.of for p in reader.phrases)
        if apart and not reader.events and len(reader.phrases) == 2 and len(people) == 1:
            for phrase in reader.phrases:
                for obj in () if phrase.negative else phrase.objects:
                    if obj not in busy:
                        scores.add((NO_INTERACTION, obj), 0.4)

    @classmethod
    def _left_alone(cls, reader: _Reader) -> Iterator[tuple[NounPhrase, float]]:
        """Objects that the caption says a person is near, or leaves alone."""
        for phrase in reader.phrases:
            person = phrase.kind in ("person", "name")
            for prep, other in phrase.attached if not phrase.negative else ():
                if prep in _NEAR and person:
                    yield other, 0.6
                elif prep in _NEAR and other.kind == "person" and not other.negative:
                    yield phrase, 0.55
        if any(p.negative and p.head in _NO_CONTACT for p in reader.phrases):
            yield from ((phrase, 0.7) for phrase in reader.phrases if not phrase.negative)
        for event in reader.events:
            if event.negative and event.lemma in _CONTACT:
                touched = [p for o in event.objects for p in cls._antecedents(o, reader)]
                yield from ((phrase, 0.7) for phrase in touched or reader.phrases)
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
    def _antecedents(phrase: NounPhrase, reader: _Reader) -> list[NounPhrase]:
        """The phrase, or the last thing before it if it is a pronoun."""
        if phrase.pronoun not in ("it", "them"):
            return [phrase]
        earlier = reader.phrases[max(0, phrase.position - 12) : phrase.position]
        return [p for p in reversed(earlier) if p.objects and not p.pronoun][:1]


@dataclass
class _Scores:
    """Probabilities by (verb, object) of the table's classes, and the denied pairs."""

    ids: Mapping[tuple[str, str], int]
    said: dict[tuple[str, str], float] = field(default_factory=dict)
    denied: set[tuple[str, str]] = field(default_factory=set)

    def add(self, pair: tuple[str, str], probability: float) -> None:
        if pair in self.ids and probability > self.said.get(pair, 0.0):
            self.said[pair] = probability

    def by_id(self) -> dict[int, float]:
        return {self.ids[pair]: round(p, 4) for pair, p in self.said.items()}


@dataclass(frozen=True)
class _Say:
    """Enters pairs for one event: scaled by `trust`, or as denied."""

    scores: _Scores
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


def _verb_keys(verb: str) -> tuple[str, str]:
    """The class verb and its surface: "Hopping on" -> ("hop_on", "hop on")."""
    words = [word.lower() for word in split_words(verb) if word[0].isalnum()]
    if verb == NO_INTERACTION or not words:
        return verb, verb
    words[0] = verb_lemma(words[0])
    return "_".join(words), " ".join(words)


def _object_key(obj: str, known: Iterable[str]) -> str:
    """The object's key; another word for one of HICO's objects is that object: "bike"."""
    key = obj.strip().lower().replace(" ", "_")
    if key not in known:
        noun = noun_key(obj)
        for name, phrases in OBJECT_PHRASES.items():
            if any(noun == noun_key(phrase.split(" ", 1)[-1]) for phrase in phrases):
                return name
    return key


_SPACES = re.compile(r"[\W_]+")


def _normal(text: str) -> str:
    return _SPACES.sub(" ", text).strip().casefold()


class _NamePattern:
    """A class known by a phrase: its words in order, with others only where they change nothing."""

    def __init__(self, name: str, lexicon: Lexicon) -> None:
        chunks = lexicon.chunks(name)
        self.keys = _name_keys(chunks)
        relations = list(_relations(_Reader(lexicon.chunks(name))))
        self.relation = relations[0] if len(relations) == 1 else None

    def match(self, chunks: Sequence[Chunk], reader: _Reader) -> float:
        """Probability that the phrase is said."""
        said = _name_keys(chunks)
        if not self.keys or not said:
            return 0.0
        if any(self._matches_at(said, start) for start in range(len(said))):
            return STATED
        if self.relation is not None:
            for relation in _relations(reader):
                if all(w.fits(s) for w, s in zip(self.relation, relation, strict=True)):
                    return STATED
        return 0.0

    def _matches_at(self, said: list[_Key], start: int) -> bool:
        i = start
        for n, wanted in enumerate(self.keys):
            while n and i < len(said) and said[i].optional and not wanted.fits(said[i]):
                i += 1
            if i >= len(said) or not wanted.fits(said[i]) or said[i].negative:
                return False
            i += 1
        return True


@dataclass(frozen=True)
class _Key:
    """A noun phrase, verb or preposition of a name or caption."""

    kind: str
    word: str
    modifiers: frozenset[str] = frozenset()
    objects: frozenset[str] = frozenset()
    negative: bool = False
    optional: bool = False

    def fits(self, said: _Key) -> bool:
        """Whether what is said is this, or a narrower case of it."""
        if self.kind != said.kind:
            return False
        same = self.word == said.word or bool(self.objects & said.objects)
        if self.kind == "person" and self.word in ("person", "people", "someone"):
            same = True
        return same and self.modifiers <= said.modifiers


def _relations(reader: _Reader) -> Iterator[tuple[_Key, _Key, _Key]]:
    """Subject, verb (with preposition) and object of every event that is not denied."""
    for event in reader.events:
        if event.negative or event.lemma == "be":
            continue
        subjects, objects = event.subjects, [("", o) for o in event.objects]
        if event.passive:
            subjects, objects = event.agents, [("", o) for o in event.subjects]
        for prep, obj in (*objects, *event.adjuncts):
            for subject in subjects:
                if not (subject.negative or obj.negative):
                    verb = _Key("verb", f"{event.lemma} {prep}".strip())
                    yield _noun_key(subject), verb, _noun_key(obj)


def _noun_key(phrase: NounPhrase, denied: bool = False) -> _Key:
    return _Key(
        "person" if phrase.kind == "person" else "noun",
        phrase.head,
        frozenset(phrase.modifiers),
        frozenset(phrase.objects),
        phrase.negative or denied,
    )


def _name_keys(chunks: Sequence[Chunk]) -> list[_Key]:
    keys: list[_Key] = []
    denied = False
    for chunk in chunks:
        if isinstance(chunk, NounPhrase):
            phrase: NounPhrase | None = chunk
            while phrase is not None:
                keys.append(_noun_key(phrase, denied))
                phrase = phrase.of
            denied = False
        elif isinstance(chunk, VerbGroup):
            denied = chunk.negative
            if chunk.lemma:
                optional = chunk.lemma == "be"
                keys.append(_Key("verb", chunk.lemma, negative=chunk.negative, optional=optional))
        elif chunk.word in ("without", "instead of"):
            denied = True
        elif chunk.kind == "P":
            keys.append(_Key("prep", chunk.word, optional=chunk.word in ("down", "along", "up")))
        elif chunk.kind in ("S", "U"):
            denied = False
            keys.append(_Key("mark", chunk.word))
    return [key for key in keys if key.kind != "mark" or len(keys) > 1]
