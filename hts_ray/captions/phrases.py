"""Noun phrases and verb groups of a caption: which words belong together, and what they name.

A chunk is a noun phrase, a verb with its auxiliaries, or a word that joins phrases. "A slice of
pizza" is one phrase, and so is "a photo of a zebra"; "nobody" and "not" make theirs negative.

Knows nothing of who does what to whom (`clauses`), nor of classes: a noun phrase carries the
objects that its head can name, and no verb.
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass, field

from hts_ray.captions.lexicon import Lexicon
from hts_ray.captions.morphology import BE, HAVE, NO_ONE, PRONOUNS, analyse
from hts_ray.captions.tagging import Tagger, Token
from hts_ray.captions.words import word_set

_PARTS = word_set("parts")
_ASPECT_NOUNS = word_set("aspects")
_UNSURE = word_set("unsure_modals")
_MAY_BE = 0.45  # how far "might be riding" says that it is so


@dataclass
class NounPhrase:
    """Several words for a thing: its head's lemma and what is known of it.

    `kind` is "person", "animal", "vehicle", "thing", "name" or "unknown". `objects` maps the
    objects that the head can name to probabilities. `attached` are the prepositional phrases
    that follow it.
    """

    head: str
    kind: str
    objects: dict[str, float] = field(default_factory=dict)
    plural: bool = False
    negative: bool = False
    determined: bool = False
    pronoun: str = ""
    modifiers: tuple[str, ...] = ()
    weight: float = 1.0
    of: NounPhrase | None = None
    position: int = 0
    depiction: bool = False
    framed: str = ""
    adjectival: bool = False
    attached: list[tuple[str, NounPhrase]] = field(default_factory=list)


@dataclass
class VerbGroup:
    """A verb with its auxiliaries; `lemma` is "be" where there is no other verb."""

    lemma: str
    form: str
    passive: bool = False
    progressive: bool = False
    negative: bool = False
    infinitive: bool = False
    weight: float = 1.0


@dataclass
class Mark:
    """A word that joins phrases: P, C, U, W, K or S of `Token`'s tags."""

    kind: str
    word: str


Chunk = NounPhrase | VerbGroup | Mark


class PhraseReader:
    """Reads phrases by one lexicon."""

    def __init__(self, lexicon: Lexicon) -> None:
        self._lexicon = lexicon
        self._tagger = Tagger(lexicon)

    def chunks(self, text: str) -> list[Chunk]:
        """Return the noun phrases, verb groups and marks of a text, in order."""
        tokens = self._tagger.tokens(text)
        words = {word for token in tokens for word in (token.lemma, *token.text.split())}
        chunks: list[Chunk] = []
        i = 0
        while i < len(tokens):
            tag = tokens[i].tag
            if tag in "DJNRQ":
                phrase, i = self._noun_phrase(tokens, i, words)
                chunks.append(phrase)
            elif tag in "VXGT":
                group, i = self._verb_group(tokens, i)
                chunks.append(group)
            else:
                if tag not in "AIO":
                    chunks.append(Mark(tag, tokens[i].lemma))
                i += 1
        return self._join_of(chunks)

    def _noun_phrase(
        self, tokens: Sequence[Token], i: int, words: Set[str]
    ) -> tuple[NounPhrase, int]:
        """The noun phrase that starts at token `i`, and the token after it."""
        start, last = i, -1
        possessor: Token | None = None
        while i < len(tokens) and not self._ends_before(tokens, start, last, i):
            tag = tokens[i].tag
            if tag in "NR":
                last = i
            elif tag == "I":
                possessor, start, last = tokens[last], i + 1, -1
            i += 1
            if tag == "R":
                break
        span = list(tokens[start:i])
        while span and span[-1].tag in "CKA":
            span.pop()
            i -= 1
        head = tokens[last] if last >= 0 else (span[-1] if span else tokens[i - 1])
        return self._phrase(span, head, words, possessor), max(i, start if span else start + 1)

    def _ends_before(self, tokens: Sequence[Token], start: int, last: int, i: int) -> bool:
        """Whether a noun phrase from `start`, with a noun at `last` if any, stops before `i`."""
        tag = tokens[i].tag
        named = last >= 0
        if tag == "N":
            ends = named and self._ends_here(tokens, last, i)
        elif tag == "D":
            ends = named or (i > start and tokens[i - 1].tag != "D")
        elif tag == "R":
            ends = i > start
        elif tag == "I":
            ends = not named
        elif tag in "CK":
            # "a black and white dog", "a small, brown dog"
            joins = i > start and tokens[i - 1].tag == "J" and i + 1 < len(tokens)
            ends = named or not (joins and self._adjective_goes_on(tokens, i + 1))
        else:
            ends = named or tag not in "JQA"
        return ends

    @staticmethod
    def _adjective_goes_on(tokens: Sequence[Token], i: int) -> bool:
        while i < len(tokens) and tokens[i].tag in "JA":
            i += 1
        return i < len(tokens) and tokens[i].tag == "N" and tokens[i - 1].tag == "J"

    def _ends_here(self, tokens: Sequence[Token], last: int, i: int) -> bool:
        """Whether "ducks bread" are two phrases: a plural that names an object is no modifier."""
        noun = tokens[last]
        if noun.text == noun.lemma and noun.lemma not in ("people", "cattle", "sheep"):
            return False
        return (
            last != i - 1 or noun.lemma in self._lexicon.nouns or noun.lemma in self._lexicon.people
        )

    def _phrase(
        self, span: list[Token], head: Token, words: Set[str], possessor: Token | None
    ) -> NounPhrase:
        lemma = head.lemma
        modifiers = tuple(t.lemma for t in span if t is not head and t.tag in "JNQ")
        phrase = NounPhrase(
            lemma,
            self._kind(head, modifiers),
            self._lexicon.objects_of(lemma, words, modifiers),
            plural=head.text != lemma or lemma in ("people", "cattle", "couple", "group", "pair"),
            negative=lemma in NO_ONE or any(t.lemma == "no" for t in span),
            determined=any(t.tag in "D" for t in span) or possessor is not None,
            modifiers=modifiers,
            depiction=lemma in self._lexicon.depictions,
            adjectival=head.tag == "J" or (len(span) == 1 and analyse(head.text).adjective),
        )
        owner = possessor
        if owner is None and modifiers and modifiers[-1] in self._lexicon.nouns:
            owner = next(t for t in reversed(span) if t.lemma == modifiers[-1])
        if owner is not None and lemma in _PARTS and owner is not head:
            phrase.of = self._phrase([owner], owner, words, None)
        elif lemma in _PARTS and any(t.lemma == "its" for t in span):
            phrase.of = NounPhrase("it", "thing", pronoun="it")
        if head.tag == "R":
            phrase.pronoun = lemma
            phrase.kind = PRONOUNS.get(lemma, "person")
        if any(t.tag == "D" and t.lemma in ("two", "several", "many", "few", "some") for t in span):
            phrase.plural = True
        if phrase.objects and any(m in self._lexicon.toys for m in modifiers):
            if "stuffed" in modifiers and "bear" in lemma:
                phrase.objects = {"teddy_bear": 1.0}
            phrase.weight = 0.4 if "teddy_bear" not in phrase.objects else 1.0
        # "in orange", "wearing orange": a colour, not a fruit.
        if lemma == "orange" and not phrase.determined and head.text == "orange" and not modifiers:
            phrase.weight = 0.5
        return phrase

    def _kind(self, head: Token, modifiers: Sequence[str]) -> str:
        kind = self._lexicon.kind_of(head.lemma, modifiers)
        return kind or ("name" if head.capital and not analyse(head.text).listed else "unknown")

    # Verb groups

    def _verb_group(self, tokens: Sequence[Token], i: int) -> tuple[VerbGroup, int]:
        group = VerbGroup("be", "s")
        auxiliaries: list[Token] = []
        while i < len(tokens):
            token = tokens[i]
            if token.tag == "G":
                group.negative = True
            elif token.tag == "T":
                group.infinitive, group.form = True, "base"
            elif token.tag == "X":
                auxiliaries.append(token)
                if token.lemma == "about to":
                    group.weight, group.form = 0.5, "ing"
            elif token.tag == "V":
                self._finish_group(group, token, auxiliaries)
                return group, i + 1
            elif token.tag != "A":
                break
            i += 1
        if auxiliaries and all(t.text == "being" for t in auxiliaries):
            group.form = "ing"
        if not auxiliaries and group.negative:
            group.lemma = ""  # a lone "not"
        return group, i

    @staticmethod
    def _finish_group(group: VerbGroup, verb: Token, auxiliaries: list[Token]) -> None:
        group.lemma = verb.lemma
        be = [t for t in auxiliaries if t.text in BE or t.lemma == "be"]
        have = any(t.lemma == "have" or t.text in HAVE for t in auxiliaries)
        group.form = verb.form
        if verb.form in ("past", "part") and be:
            group.passive = True
            group.progressive = any(t.text in ("being", "getting") for t in be)
            finite = any(t.text not in ("being", "been", "getting") for t in be)
            group.form = "s" if finite or have else "ing"
        elif auxiliaries and (have or be or group.weight == 1.0):
            group.form = "s"
        if verb.lemma != "see" and any(t.text in _UNSURE for t in auxiliaries):
            group.weight = min(group.weight, _MAY_BE)

    # Phrases of phrases

    def _join_of(self, chunks: list[Chunk]) -> list[Chunk]:
        """Join "a slice of pizza" into one phrase, from the right."""
        joined: list[Chunk] = []
        for chunk in reversed(chunks):
            if (
                isinstance(chunk, NounPhrase)
                and len(joined) > 1
                and isinstance(joined[-1], Mark)
                and joined[-1].word == "of"
                and isinstance(joined[-2], NounPhrase)
                and (not chunk.pronoun or chunk.negative)
            ):
                joined.pop()
                joined.append(self._with_of(chunk, joined.pop()))  # type: ignore[arg-type]
            else:
                joined.append(chunk)
        return joined[::-1]

    def _with_of(self, whole: NounPhrase, part: NounPhrase) -> NounPhrase:
        whole.of = part
        if whole.head in self._lexicon.photos:
            part.framed = whole.head
            return part
        if whole.head in self._lexicon.depictions:
            part.weight = 0.4
            whole.kind = "thing"
            return whole
        if (
            whole.head in self._lexicon.partitives
            or whole.head in NO_ONE
            or whole.head in _ASPECT_NOUNS
        ):
            if whole.head in _ASPECT_NOUNS and part.kind == "person":
                return whole
            if whole.objects and whole.head not in ("pair",):
                return whole
            if whole.head not in self._lexicon.containers:
                whole.objects = dict(part.objects)
                whole.kind = whole.kind if part.pronoun else part.kind  # "one of them"
            whole.plural = True
            whole.negative = whole.negative or part.negative
        return whole
