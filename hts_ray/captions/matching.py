"""Caption mode of the teacher: which classes a caption's text states.

A caption is read as a shallow parse, each step in a module that knows nothing of the next: words
(`morphology`), their parts of speech (`tagging`), noun phrases and verb groups (`phrases`), then
events with subject, objects, prepositions, voice and negation (`clauses`), then classes through
surface phrases such as "take bite of" = eat (`lexicon`, `statements`). Probabilities mean:

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

English only.

This module is the way in. It knows class tables, what their verbs and objects are called in the
lexicon's terms, classes without a verb and prompts; of English itself, nothing but the directions
that a table's own verb may take.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Sequence

from hts_ray.captions.clauses import read_clauses
from hts_ray.captions.lexicon import STATED, Lexicon, Reading
from hts_ray.captions.morphology import NEGATIONS, NO_ONE, noun_key, split_words, verb_lemma
from hts_ray.captions.names import Facts, NamePattern
from hts_ray.captions.phrases import PhraseReader
from hts_ray.captions.statements import StatementReader
from hts_ray.classes import NO_INTERACTION, OBJECT_PHRASES, ClassTable, hico_classes

_ANY_PREPOSITION = 0.7  # "climbing up a ladder" for the own class climb
_DIRECTIONS = ("up", "down", "at", "over", "through", "around", "across", "along", "into", "onto")
_PROMPT = 0.95  # the caption is one of the class's own prompts
_CACHED_TABLES = 8


def match_captions(
    captions: Sequence[str], class_table: ClassTable | None = None
) -> list[dict[int, float]]:
    """Return one `{class_id: probability}` for each of N captions (HICO's 600 by default).

    See the module for what probabilities mean. Classes without a verb are stated by their
    object or name being there, whatever anybody does. Raises TypeError for a single string or
    entries that are no strings.
    """
    if isinstance(captions, (str, bytes)):
        raise TypeError("captions is a single string: give a list of strings")
    texts = list(captions)
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(f"captions[{i}] is {type(text).__name__}: give strings")
    matcher = _matcher(hico_classes() if class_table is None else class_table)
    return [matcher.match(text) for text in texts]


@functools.lru_cache(maxsize=_CACHED_TABLES)
def _matcher(table: ClassTable) -> CaptionMatcher:
    return CaptionMatcher(table)


# Classes


class CaptionMatcher:
    """The classes of one table, compiled for matching."""

    def __init__(self, table: ClassTable) -> None:
        self.table = table
        self._ids, lexicon = _compiled(table)
        self._phrases = PhraseReader(lexicon)
        self._statements = StatementReader(lexicon, self._ids)
        self.named = [
            (
                entry.class_id,
                NamePattern((not entry.verb and entry.object) or entry.name, self._phrases),
            )
            for entry in table
            if entry.verb is None or _denies(entry.verb)
        ]
        lexicon.verbs |= {verb for _, pattern in self.named for verb in pattern.verbs}
        self._prompts = {
            _normal(prompt): entry.class_id for entry in table for prompt in entry.prompts
        }

    def match(self, caption: str) -> dict[int, float]:
        """Return the probabilities of the classes that one caption states or hints at."""
        clauses = read_clauses(self._phrases.chunks(caption))
        scores = self._statements.score(clauses)
        found = scores.by_id()
        for pair in scores.denied:
            if found.get(self._ids[pair], 1.0) < 0.5:
                del found[self._ids[pair]]
        if self.named:
            facts = Facts(clauses)
            found.update((i, STATED) for i, p in self.named if p.stated_by(facts, caption))
        exact = self._prompts.get(_normal(caption))
        if exact is not None:
            found[exact] = max(_PROMPT, found.get(exact, 0.0))
        return found


def _compiled(table: ClassTable) -> tuple[dict[tuple[str, str], int], Lexicon]:
    """A table's (verb, object) -> id, and the lexicon with the words of its own classes added."""
    ids: dict[tuple[str, str], int] = {}
    nouns: dict[str, dict[str, float]] = {}
    frames: dict[str, list[Reading]] = {}
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
            continue
        verb, surface = _verb_keys(entry.verb)
        obj = "" if entry.object is None else _object_key(entry.object, objects)
        ids[verb, obj] = entry.class_id
        if obj and obj not in objects and obj != "person":
            nouns.setdefault(noun_key(entry.object or ""), {})[obj] = 1.0
        if verb != NO_INTERACTION:
            frames.setdefault(surface, [Reading(((verb, None, STATED),))])
            if verb not in targets:
                loose = Reading(((verb, None, _ANY_PREPOSITION),))
                for prep in _DIRECTIONS:
                    frames.setdefault(f"{surface} {prep}", [loose])
    own = {obj for found in nouns.values() for obj in found}
    return ids, Lexicon(nouns, frames, own) if nouns or frames else known


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


def _denies(text: str) -> bool:
    """Whether a verb ("not wearing", which is no verb to look for) or a name holds a denial."""
    words = {word.lower() for word in split_words(text)}
    return text != NO_INTERACTION and not words.isdisjoint(NEGATIONS | NO_ONE)


def negated_names(table: ClassTable) -> list[str]:
    """Return the names that say what is not there or not done ("no helmet").

    Captions can state them; to a model that scores prompts, "no helmet" is close to "helmet".
    """
    if not any(_denies(entry.verb or entry.name) for entry in table):
        return []
    negated = {class_id for class_id, pattern in _matcher(table).named if pattern.negated}
    return [entry.name for entry in table if entry.class_id in negated]


_SPACES = re.compile(r"[\W_]+")


def _normal(text: str) -> str:
    return _SPACES.sub(" ", text).strip().casefold()
