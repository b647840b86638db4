"""English words of captions: lemmas, parts of speech, noun phrases, and HICO's synonyms.

Morphology is LemmInflect's: of the maintained libraries whose data comes inside the wheel it is
the one that gives lemmas for each part of speech ("saw" is a noun, or "see"), needs only numpy,
and knows irregular forms. Which part of speech a word has where it stands, and what is a noun
phrase, is decided here by rules for the plain English of captions. The synonyms are in
`assets/caption_lexicon.yaml`. No Ray and no torch.
"""

from __future__ import annotations

import functools
import html
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import lemminflect  # type: ignore[import-untyped]
import yaml

from hts_ray.assets import asset_path

MAX_TOKENS = 2000  # of one caption; what follows is not read
_MAX_WORD = 40
STATED = 0.9  # probability of a class that the caption says in so many words


def _set(text: str) -> frozenset[str]:
    return frozenset(text.split())


_BE = _set("be am is are was were been being")
_HAVE = _set("have has had having")
_DO = _set("do does did")
_MODALS = _set("can could will would shall should may might must ca wo")
_NEGATIONS = _set("not n't never nor neither hardly barely scarcely")
_DETERMINERS = _set(
    "a an the this these those my your his her its our their some any every each no another both"
    " all several many few various multiple numerous which's what such whatever either most"
)
_NUMBERS = _set(
    "one two three four five six seven eight nine ten eleven twelve dozen hundred thousand"
)
_PRONOUNS = {
    **dict.fromkeys(
        _set(
            "i you he she we they him me us himself herself themselves myself yourself ourselves"
            " eachother hers mine yours"
        ),
        "person",
    ),
    **dict.fromkeys(_set("it itself them something anything everything nothing"), "thing"),
}
_NO_ONE = _set("nobody none nothing noone neither")
_PREPOSITIONS = _set(
    "about above across after against along alongside amid among amongst around at atop away back"
    " before behind below beneath beside besides between beyond by despite down during for from in"
    " inside into near nearby of off on onto out outside over past per through throughout toward"
    " towards under underneath up upon via with within without aboard astride opposite round"
    " like than"
)
_COORDINATORS = _set("and or but & nor plus yet")
_SUBORDINATORS = _set(
    "while as when whilst where because if although though since until so then whereas once"
    " whenever till"
)
_RELATIVES = _set("who which whom whose that")
_ADVERBS = _set(
    "very just also still now there here together happily outdoors indoors outside too only even"
    " ever almost again already soon often always sometimes quickly slowly carefully quite really"
    " well else anymore today maybe perhaps currently actively seemingly apparently home upside"
    " downtown downfield upfield midfield midair midstream overhead downhill uphill ashore aloft"
    " downstream upstream offshore apart barefoot yesterday tonight tomorrow upstairs downstairs"
    " nearby how why"
)
# Bare nouns that make the name of an activity with an -ing form.
_ACTIVITIES = frozenset(
    [("dog", "walk"), ("kite", "fly"), ("cake", "cut"), ("bird", "watch"), ("boat", "row"),
     ("train", "ride"), ("ski", "jump"), ("bull", "ride"), ("sheep", "shear"), ("cow", "milk")]
    + [(n, v) for n in ("horse", "bike", "bicycle", "motorcycle", "motorbike", "pony", "cycle",
                        "elephant", "camel", "horseback", "boat", "car", "bus", "dog", "cat")
       for v in ("ride", "race", "train", "groom", "jump")]
)  # fmt: skip
_WATCHING = _set("watch see help let make have hear observe")
_BODY = _set(
    "head nose ear neck back mane belly face trunk fur tail chin cheek leg hoof udder coat hair"
    " mouth forehead stomach side snout muzzle paw shoulder rein leash bridle halter lead tire"
    " wheel engine chain handlebar window windshield door hood lid screen top tooth teeth wool hand"
)
# Verbs of two words; the second one is inflected.
_COMPOUND_VERBS = {
    ("blow", "dry"), ("jump", "start"), ("stir", "fry"), ("bottle", "feed"), ("spoon", "feed"),
    ("spray", "paint"), ("deep", "fry"), ("towel", "dry"), ("pressure", "wash"),
    ("power", "wash"), ("snow", "ski"), ("water", "ski"), ("high", "five"), ("fist", "bump"),
    ("kick", "flip"), ("hand", "wash"), ("text", "message"), ("pat", "dry"),
}  # fmt: skip
_ASPECT_NOUNS = _set(
    "top front back side middle edge end rear bottom center inside corner rest view"
)
_MADE = _set("toy lego stone bronze")
_PERSON_ENDINGS = (
    "man", "men", "woman", "women", "boy", "girl", "person", "people", "folk", "ist", "keeper",
)  # fmt: skip


@dataclass(frozen=True)
class Word:
    """What a word can be: noun and verb lemma (None if it is none), verb form, adjective, adverb.

    `form` is "base", "s", "ing", "past" (finite or participle), "part" (participle only) or
    "any" (base and past alike: "cut").
    """

    noun: str | None
    verb: str | None
    form: str
    adjective: bool
    adverb: bool
    listed: bool


@dataclass(slots=True)
class Token:
    """A word where it stands: its text, tag, lemma and, for a verb, form.

    Tags: D determiner, J adjective, N noun, R pronoun, Q number, V verb, X auxiliary, P
    preposition or particle, C coordinator, U subordinator, W relative, T "to" before a verb,
    G negation, A adverb, I possessive 's, K comma, S end of sentence, O other.
    """

    text: str
    tag: str = ""
    lemma: str = ""
    form: str = ""
    capital: bool = False


@dataclass(frozen=True)
class Reading:
    """What a surface phrase says: the first of `options` whose class exists.

    An option is a class verb, the objects it holds for (all if None) and its probability.
    `implied` is an object that the phrase does not name.
    """

    options: tuple[tuple[str, frozenset[str] | None, float], ...]
    implied: tuple[str, ...] = ()


# Where LemmInflect knows several lemmas and captions mean one, or does not list the word.
_NOUNS = {
    "as": "as", "dice": "dice", "leaves": "leaf", "oxen": "ox", "pants": "pants", "shears":
    "shears",
}  # fmt: skip
_VERBS = {
    "axing": ("axe", "ing"), "kickflip": ("kickflip", "base"), "kickflips": ("kickflip", "s"),
    "lassos": ("lasso", "s"), "peddling": ("pedal", "ing"), "text": ("text", "base"), "texts":
    ("text", "s"),
}  # fmt: skip


@functools.lru_cache(maxsize=65536)
def analyse(word: str) -> Word:
    """Return what a lower-case word can be, from LemmInflect's dictionary or its rules."""
    if len(word) > _MAX_WORD or not word.isascii():
        return Word(word, None, "", adjective=False, adverb=False, listed=False)
    found = lemminflect.getAllLemmas(word)
    listed = bool(found)
    noun = _NOUNS.get(word) or next(iter(found.get("NOUN", ()) or found.get("PROPN", ())), None)
    verb = next(iter(found.get("VERB", ()) or found.get("AUX", ())), None)
    if not found:
        guess = lemminflect.getAllLemmasOOV(word, "VERB").get("VERB", ())
        if word.endswith(("ing", "ed")) and len(word) > 5 and guess:
            verb = guess[0]
        else:
            plural = lemminflect.getAllLemmasOOV(word, "NOUN").get("NOUN", ())
            noun = noun or (plural[0] if plural and word.endswith("s") else word)
    form = _verb_form(word, verb) if verb else ""
    if word in _VERBS:
        verb, form = _VERBS[word]
    # Comparatives of the dictionary: "dog" is no adjective, but "dress" and "bird" are listed so.
    return Word(noun, verb, form, "ADJ" in found, "ADV" in found, listed)


def _verb_form(word: str, lemma: str) -> str:
    if word == lemma:
        past = lemminflect.getInflection(lemma, "VBD", inflect_oov=False)
        return "any" if word in past else "base"
    if word.endswith("ing"):
        return "ing"
    if word.endswith("s") and not word.endswith("ss"):
        return "s"
    finite = lemminflect.getInflection(lemma, "VBD", inflect_oov=False)
    return "part" if finite and word not in finite else "past"


def noun_lemma(word: str) -> str:
    """Return the singular of a lower-case word, or the word."""
    return analyse(word).noun or word


def verb_lemma(word: str) -> str:
    """Return the base form of a lower-case word, or the word."""
    return analyse(word).verb or word


_TAG = re.compile(r"<[^<>]{0,200}>")
_QUOTE, _DASHES = "\u2019", "\u2010\u2011\u2012\u2013\u2014\u2015"
_TOKEN = re.compile(r"[^\W\d_]+(?:'[^\W\d_]+)*|\d+(?:[.,]\d+)*|[.,;:!?\u2026()\[\]|/&\n\"+]|'s\b")
_ENDINGS = (("n't", "n't"), ("'re", "are"), ("'ve", "have"), ("'ll", "will"), ("'m", "am"))
_DASH = re.compile(f"[{_DASHES}]")


def split_words(text: str) -> list[str]:
    """Return the words and marks of a text, HTML and ligatures undone, contractions split.

    Keeps capitals. A hyphen joins its parts by a space; a dash between spaces is a mark.
    """
    text = unicodedata.normalize("NFKC", text[: MAX_TOKENS * 20])
    if "&" in text or "<" in text:
        text = _TAG.sub(" ", html.unescape(text))
    text = _DASH.sub("-", text).replace(_QUOTE, "'").replace("#", " ")
    text = text.replace(" - ", " ; ").replace("--", " ; ").replace("-", " ").replace("_", " ")
    words: list[str] = []
    for match in _TOKEN.finditer(text):
        word = match.group()
        if "'" in word:
            words.extend(part for part in _split_contraction(word) if part)
        else:
            words.append(word)
        if len(words) >= MAX_TOKENS:
            break
    return words


def _split_contraction(word: str) -> list[str]:
    low = word.lower()
    if low in ("can't", "cannot"):
        return ["can", "n't"]
    if low == "won't":
        return ["will", "n't"]
    for ending, said in _ENDINGS:
        if low.endswith(ending):
            return [word[: -len(ending)], said]
    if low.endswith("'s"):
        return [word[:-2], "'s"]
    if low.endswith("'"):
        return [word[:-1], "'s"]
    return [word.replace("'", "")]


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
        self._phrases: dict[str, list[tuple[tuple[str, ...], str, str]]] = source["phrases"]
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
        self._compounds: dict[str, list[tuple[str, ...]]] = {}
        for phrase in (*self.nouns, *source["other_things"]):
            words = tuple(phrase.split(" "))
            if len(words) > 1:
                self._compounds.setdefault(words[0], []).append(words)
        for found in self._compounds.values():
            found.sort(key=len, reverse=True)

    # Tokens

    def tokens(self, text: str) -> list[Token]:
        """Return the tagged tokens of a text."""
        words = split_words(text)
        lowered = [word.lower() for word in words]
        mixed = any(word.islower() for word in words)
        tokens: list[Token] = []
        i = 0
        while i < len(words):
            token, length = self._fixed(lowered, i)
            if token is None:
                token, length = Token(lowered[i]), 1
            token.capital = mixed and words[i][:1].isupper()
            tokens.append(token)
            i += length
        for i, token in enumerate(tokens):
            if not token.tag:
                self._tag(tokens, i)
        return tokens

    def _fixed(self, words: Sequence[str], i: int) -> tuple[Token | None, int]:
        """A phrase or compound that starts at word `i`, and its length."""
        for phrase, tag, said in self._phrases.get(words[i], ()):
            if tuple(words[i : i + len(phrase)]) != phrase:
                continue
            if said != "about to" or self._can_be_base(words, i + len(phrase)):
                form = "base" if tag == "V" else ""
                return Token(" ".join(phrase), tag, said, form), len(phrase)
        if i + 1 < len(words) and (words[i], verb_lemma(words[i + 1])) in _COMPOUND_VERBS:
            second = analyse(words[i + 1])
            verb = f"{words[i]} {second.verb}"
            return Token(f"{words[i]} {words[i + 1]}", "V", verb, second.form), 2
        compounds = self._compounds.get(words[i]) or self._compounds.get(noun_lemma(words[i]))
        if compounds:
            for compound in compounds:
                span = words[i : i + len(compound)]
                # "horses race" is a sentence, "a horse race" is not.
                if span[0] != compound[0] and analyse(span[-1]).verb in self.verbs:
                    continue
                if len(span) == len(compound) and all(
                    said == wanted or noun_lemma(said) == wanted
                    for said, wanted in zip(span, compound, strict=True)
                ):
                    plural = span[-1] != compound[-1]
                    return Token(
                        " ".join(span) if plural else " ".join(compound), "N", " ".join(compound)
                    ), len(compound)
        return None, 1

    @staticmethod
    def _can_be_base(words: Sequence[str], i: int) -> bool:
        return i < len(words) and analyse(words[i]).form in ("base", "any")

    def _tag(self, tokens: list[Token], i: int) -> None:
        """Give token `i` its tag, lemma and form; all before it have theirs."""
        token = tokens[i]
        if token.text == "asleep":
            token.tag, token.lemma, token.form = "V", "sleep", "ing"
            return
        closed = _CLOSED.get(token.text)
        if (
            token.text in ("back", "inside", "outside", "past", "round")
            and i
            and (tokens[i - 1].tag in "DJI")
        ):
            token.tag = "N" if token.text != "round" else "J"
            token.lemma = token.text
            return
        if closed is not None:
            token.tag, token.lemma = closed, token.text
            if closed == "?":
                self._tag_special(tokens, i)
            return
        if not token.text[0].isalnum():
            token.tag, token.lemma = ("K" if token.text == "," else "S"), token.text
            return
        if token.text[0].isdigit():
            token.tag, token.lemma = "Q", token.text
            return
        word = analyse(token.text)
        token.lemma = word.noun or word.verb or token.text
        token.tag = "N"
        if word.verb is not None and self._is_verb(tokens, i, word):
            token.tag, token.lemma, token.form = "V", word.verb, word.form
            if word.form == "any":
                before = tokens[i - 1] if i else Token("", "S")
                finite = before.tag in "TSGK" or before.text in _MODALS | _DO
                token.form = "base" if finite or before.lemma == "about to" else "past"
        elif word.noun is None:
            self._tag_without_noun(tokens, i, word)
        elif word.adjective and self._noun_follows(tokens, i) and token.lemma not in self.people:
            token.tag, token.lemma = "J", token.text

    def _tag_without_noun(self, tokens: list[Token], i: int, word: Word) -> None:
        token = tokens[i]
        if word.adverb and not (word.adjective and self._noun_follows(tokens, i)):
            token.tag, token.lemma = "A", token.text
        elif word.adjective or word.verb:
            token.tag, token.lemma = "J", token.text
            if word.verb and word.form == "ing" and not self._noun_follows(tokens, i):
                token.tag = "N"

    def _tag_special(self, tokens: list[Token], i: int) -> None:
        """Words whose part of speech depends on their neighbours."""
        token = tokens[i]
        before = tokens[i - 1].tag if i else "S"
        after = tokens[i + 1].text if i + 1 < len(tokens) else ""
        word = analyse(after) if after.isalpha() else None
        text = token.text
        if text == "to":
            base = word is not None and word.form in ("base", "any") and after not in _DETERMINERS
            noun_only = word is not None and word.noun is not None and word.verb not in self.verbs
            token.tag = "T" if base and not noun_only else "P"
        elif text == "'s":
            verb_next = word is not None and (
                after in ("not", "a", "an", "the", "being", "about") or word.form == "ing"
            )
            token.tag = "X" if before in "RW" or (before in "NA" and verb_next) else "I"
            token.lemma = "be" if token.tag == "X" else text
        elif text == "that":
            determiner = i + 1 < len(tokens) and self._starts_noun(after)
            token.tag = "D" if before in "VPSKUT" and determiner else "W"
            if before == "V" and not determiner:
                token.tag = "R"
        elif text in ("her", "his"):
            token.tag = "D" if self._starts_noun(after) else "R"
        elif text == "one":
            token.tag = "D" if self._starts_noun(after) else "N"
        elif text == "no":
            token.tag = "D"
        elif text in ("both", "all", "each", "either", "few", "several", "some", "many", "most"):
            token.tag = "D" if self._starts_noun(after) or after in ("the", "of") else "A"
        else:  # forms of "get" and "have"
            self._tag_get_have(token, word, after)
            if text == "got" and i and tokens[i - 1].tag == "X":
                token.lemma = "have"

    def _tag_get_have(self, token: Token, word: Word | None, after: str) -> None:
        past = word is not None and word.form in ("past", "part") and word.noun is None
        lemma = verb_lemma(token.text)
        if past or (token.text in _HAVE and after in ("been", "not", "n't", "just", "never")):
            token.tag, token.lemma = "X", "be" if lemma == "get" else "have"
            token.form = "ing" if token.text.endswith("ing") else "s"
        else:
            token.tag, token.lemma = "V", lemma
            token.form = analyse(token.text).form

    def _starts_noun(self, after: str) -> bool:
        """Whether the next word can go on a noun phrase."""
        if not after or not after[0].isalnum() or after in _CLOSED:
            return after in _NUMBERS or after in ("back", "other")
        word = analyse(after)
        if word.form == "ing" and word.noun is None:
            return False
        return word.noun is not None or word.adjective or word.form in ("past", "part")

    def _noun_follows(self, tokens: list[Token], i: int) -> bool:
        if i + 1 >= len(tokens):
            return False
        after = tokens[i + 1]
        if after.tag:
            return after.tag == "N"
        if after.text in _CLOSED or not after.text[0].isalpha():
            return False
        word = analyse(after.text)
        return (word.noun is not None or word.adjective) and not (
            word.form == "s" and word.verb in self.verbs
        )

    # Verb or not

    def _is_verb(self, tokens: list[Token], i: int, word: Word) -> bool:
        before = tokens[i - 1] if i else Token("", "S")
        if word.form == "ing":
            return self._ing_is_verb(tokens, i, word, before)
        if word.form in ("past", "part"):
            return self._past_is_verb(tokens, i, word, before)
        if before.tag == "A" and i > 1:
            before = tokens[i - 2]
        is_be = before.lemma == "be" or before.text in _BE
        if before.tag in ("T", "G") or (before.tag == "X" and not is_be):
            verb = word.form in ("base", "any") or before.tag != "T"
        elif word.noun is None and not word.adjective:
            verb = True
        elif word.verb in self.verbs and before.text in ("another", "other", "others", "both"):
            after = tokens[i + 1] if i + 1 < len(tokens) else Token("", "S")
            verb = word.noun not in self.nouns and self._may_start_argument(after)
        elif word.verb not in self.verbs or before.tag in ("D", "J", "P", "I", "Q"):
            verb = False
        elif before.tag == "X":
            verb = word.form == "any"
        elif before.tag in ("R", "W"):
            no_subject = before.text in ("him", "them", "me", "us", "it", "whose")
            verb = not no_subject or (word.form == "s" and before.text != "whose")
        else:
            verb = self._ambiguous_is_verb(tokens, i, word, before)
        return verb

    def _ambiguous_is_verb(self, tokens: list[Token], i: int, word: Word, before: Token) -> bool:
        """A form in -s or none that can be a noun: agreement and what follows decide."""
        after = tokens[i + 1] if i + 1 < len(tokens) else Token("", "S")
        determiner = after.text in _DETERMINERS
        if before.tag == "N":
            verb = self._agrees(tokens, i, word, after)
        elif before.tag in ("C", "K", "U"):
            earlier = {t.form for t in tokens[:i] if t.tag == "V"}
            if not earlier:
                verb = before.tag == "K" and determiner
            else:
                alike = word.form in earlier or word.form == "any"
                listed = alike and after.text in ("and", ",") and word.noun not in self.nouns
                verb = listed or (self._may_start_argument(after) and (alike or determiner))
        elif before.tag == "S":
            pronoun = after.text in ("me", "us", "him", "them", "it")
            verb = determiner or (word.form in ("base", "any") and pronoun)
        else:
            # "help push a car"; "the man whose dog is running holds a cup"
            resumes = word.form == "s" and before.form in ("ing", "past", "part")
            place = after.text in _PREPOSITIONS or any(t.tag == "W" for t in tokens[:i])
            place = place and word.noun not in self.nouns
            verb = before.tag == "V" and (
                determiner if word.form != "s" else resumes and (determiner or place)
            )
        return verb

    def _agrees(self, tokens: list[Token], i: int, word: Word, after: Token) -> bool:
        """Whether the form after a noun is that noun's verb."""
        noun = tokens[i - 1]
        argument = self._may_start_argument(after) or self._in_relative(tokens, i)
        argument = argument or after.text in ("", ".", "and", ",")
        if word.form == "s":
            if noun.text != noun.lemma:  # "a boy without shoes kicks the ball"
                return after.text in _DETERMINERS and word.noun not in self.nouns
            return argument or noun.lemma in self.people
        if word.form == "any" and argument:
            return True
        watched = after.text in _DETERMINERS and self._is_watched(tokens, i)
        return watched or (argument and self._plural_subject(tokens, i - 1))

    @staticmethod
    def _in_relative(tokens: list[Token], i: int) -> bool:
        """Whether "that the boy" waits for its verb."""
        for token in reversed(tokens[max(0, i - 6) : i]):
            if token.tag in "VXS":
                return False
            if token.tag == "W":
                return True
        return False

    @staticmethod
    def _is_watched(tokens: list[Token], i: int) -> bool:
        """Whether a verb before takes a bare infinitive: "watch a dog catch a ball"."""
        return any(t.tag == "V" and t.lemma in _WATCHING for t in tokens[max(0, i - 6) : i])

    @staticmethod
    def _may_start_argument(after: Token) -> bool:
        if after.tag:
            return after.tag in "DPNRQAJT"
        if after.text in _CLOSED:
            return _CLOSED[after.text] in "DPRQA?T" and after.text != "'s"
        word = analyse(after.text) if after.text[:1].isalpha() else None
        return word is not None and (word.noun is not None or word.adjective or word.adverb)

    def _plural_subject(self, tokens: list[Token], i: int) -> bool:
        """Whether the noun at `i`, or a coordination that it ends, is plural."""
        noun = tokens[i]
        if noun.lemma in ("people", "police", "cattle") or noun.text != noun.lemma:
            return True
        for j in range(i - 1, max(-1, i - 6), -1):
            tag = tokens[j].tag
            if tag == "C":
                return j > 0 and tokens[j - 1].tag in "NR"
            if tag not in "DJQNI":
                break
        # "a group of people ride": the whole decides as well.
        return noun.lemma in ("couple", "pair", "group", "crowd", "team", "family")

    def _ing_is_verb(self, tokens: list[Token], i: int, word: Word, before: Token) -> bool:
        after = tokens[i + 1] if i + 1 < len(tokens) else Token("", "S")
        if before.tag in ("D", "J", "I", "Q"):
            return False
        if before.tag == "P" and word.noun is not None and before.lemma in ("in", "of", "at"):
            return after.text in _DETERMINERS
        if before.tag == "N" and self._is_compound_gerund(tokens, i, after):
            return False
        if before.tag == "S" and word.noun is not None and word.verb not in self.verbs:
            return False
        return not (
            word.adjective and self._noun_follows(tokens, i) and word.verb not in self.verbs
        )

    def _is_compound_gerund(self, tokens: list[Token], i: int, after: Token) -> bool:
        """Whether "horse riding" is a noun: a bare object before, no object after."""
        noun = tokens[i - 1]
        if noun.lemma in self.people or noun.text != noun.lemma:
            return False
        if (noun.lemma, analyse(tokens[i].text).verb) not in _ACTIVITIES:
            return False
        start = tokens[i - 2].tag if i > 1 else "S"
        if start in ("D", "J", "Q", "I", "N"):
            return self._noun_follows(tokens, i)
        return after.text not in _DETERMINERS

    def _past_is_verb(self, tokens: list[Token], i: int, word: Word, before: Token) -> bool:
        follows = self._noun_follows(tokens, i)
        if before.tag == "A" and i > 1:
            before = tokens[i - 2]
        if before.tag in ("D", "J", "I", "Q"):
            return False
        if word.noun is not None or word.adjective:
            if before.tag in ("P",):
                return False
            if word.verb not in self.verbs:
                return False
        if follows and before.tag in ("P", "V", "S", "K"):
            return False
        if follows and before.tag == "C":
            return any(t.tag == "V" and t.form in ("past", "part") for t in tokens[:i])
        return True

    # Phrases

    def chunks(self, text: str) -> list[Chunk]:
        """Return the noun phrases, verb groups and marks of a text, in order."""
        tokens = self.tokens(text)
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
        self, tokens: Sequence[Token], i: int, words: set[str]
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
        return last != i - 1 or noun.lemma in self.nouns or noun.lemma in self.people

    def _phrase(
        self, span: list[Token], head: Token, words: set[str], possessor: Token | None
    ) -> NounPhrase:
        lemma = head.lemma
        modifiers = tuple(t.lemma for t in span if t is not head and t.tag in "JNQ")
        phrase = NounPhrase(
            lemma,
            self._kind(head, modifiers),
            self._objects(lemma, words, modifiers),
            plural=head.text != lemma or lemma in ("people", "cattle", "couple", "group", "pair"),
            negative=lemma in _NO_ONE or any(t.lemma == "no" for t in span),
            determined=any(t.tag in "D" for t in span) or possessor is not None,
            modifiers=modifiers,
            depiction=lemma in self.depictions,
            adjectival=head.tag == "J" or (len(span) == 1 and analyse(head.text).adjective),
        )
        owner = possessor
        if owner is None and modifiers and modifiers[-1] in self.nouns:
            owner = next(t for t in reversed(span) if t.lemma == modifiers[-1])
        if owner is not None and lemma in _BODY and owner is not head:
            phrase.of = self._phrase([owner], owner, words, None)
        if head.tag == "R":
            phrase.pronoun = lemma
            phrase.kind = _PRONOUNS.get(lemma, "person")
        if any(t.tag == "D" and t.lemma in ("two", "several", "many", "few", "some") for t in span):
            phrase.plural = True
        if phrase.objects and any(m in self.toys for m in modifiers):
            if "stuffed" in modifiers and "bear" in lemma:
                phrase.objects = {"teddy_bear": 1.0}
            phrase.weight = 0.4 if "teddy_bear" not in phrase.objects else 1.0
        # "in orange", "wearing orange": a colour, not a fruit.
        if lemma == "orange" and not phrase.determined and head.text == "orange" and not modifiers:
            phrase.weight = 0.5
        return phrase

    def _kind(self, head: Token, modifiers: tuple[str, ...]) -> str:
        lemma = head.lemma
        last = lemma.rsplit(" ", 1)[-1]
        objects = self.nouns.get(lemma, {}).keys()
        if lemma in self.depictions or not _MADE.isdisjoint(modifiers):
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
            kind = "name" if head.capital and not analyse(head.text).listed else "unknown"
        return kind

    def _ends_like_person(self, noun: str) -> bool:
        if noun in self._not_people:
            return False
        agent = noun.endswith(("er", "or")) and _names_agent(noun)
        return agent or noun.endswith(_PERSON_ENDINGS)

    def _objects(
        self, lemma: str, words: set[str], modifiers: tuple[str, ...] = ()
    ) -> dict[str, float]:
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

    def agent_of(self, phrase: NounPhrase) -> tuple[str, ...]:
        """The objects that a person is named after: skis for "skier", a bike for "bike rider"."""
        found = self.agents.get(phrase.head, ())
        if not found and phrase.of is not None:  # "a group of skiers"
            found = self.agents.get(phrase.of.head, ())
        if not found and phrase.head in self.users and phrase.modifiers:
            found = tuple(self.nouns.get(phrase.modifiers[-1], ()))
        return found

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
        be = [t for t in auxiliaries if t.text in _BE or t.lemma == "be"]
        have = any(t.lemma == "have" or t.text in _HAVE for t in auxiliaries)
        group.form = verb.form
        if verb.form in ("past", "part") and be:
            group.passive = True
            group.progressive = any(t.text in ("being", "getting") for t in be)
            finite = any(t.text not in ("being", "been", "getting") for t in be)
            group.form = "s" if finite or have else "ing"
        elif auxiliaries and (have or be or group.weight == 1.0):
            group.form = "s"

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
        if whole.head in self.photos:
            part.framed = whole.head
            return part
        if whole.head in self.depictions:
            part.weight = 0.4
            part.of = whole
            whole.kind = "thing"
            return whole
        if whole.head in self.partitives or whole.head in _NO_ONE or whole.head in _ASPECT_NOUNS:
            if whole.head in _ASPECT_NOUNS and part.kind == "person":
                return whole
            if whole.objects and whole.head not in ("pair",):
                return whole
            if whole.head not in self.containers:
                whole.objects = dict(part.objects)
                whole.kind = part.kind
            whole.plural = True
            whole.negative = whole.negative or part.negative
        return whole


@functools.lru_cache(maxsize=8192)
def _names_agent(noun: str) -> bool:
    """Whether a noun in -er or -or is made from a verb: "shopper", not "river"."""
    stem = noun[:-2]
    stems = [stem, stem + "e"]
    if len(stem) > 2 and stem[-1] == stem[-2]:
        stems.append(stem[:-1])
    return any("VERB" in lemminflect.getAllLemmas(s) for s in stems if len(s) > 2)


_CLOSED: dict[str, str] = {
    **dict.fromkeys(_PREPOSITIONS, "P"),
    **dict.fromkeys(_SUBORDINATORS, "U"),
    **dict.fromkeys(_RELATIVES, "W"),
    **dict.fromkeys(_DETERMINERS | _NUMBERS, "D"),
    **dict.fromkeys(_PRONOUNS, "R"),
    **dict.fromkeys(_NO_ONE, "R"),
    **dict.fromkeys(_BE | _DO | _MODALS, "X"),
    **dict.fromkeys(_NEGATIONS - {"neither"}, "G"),
    **dict.fromkeys(_COORDINATORS, "C"),
    **dict.fromkeys(_ADVERBS, "A"),
    **dict.fromkeys(_HAVE | _set("get gets getting got gotten"), "?"),
    **dict.fromkeys(
        _set("to 's that her his one no both all each either few several some many most"), "?"
    ),
}


# The packaged file

_WORD_LISTS = (
    "people", "animals", "vehicles", "partitives", "containers", "photos", "depictions",
    "toy_words", "users", "body_parts", "animate_things",
)  # fmt: skip


@functools.lru_cache(maxsize=1)
def _source() -> dict[str, Any]:
    """Read `assets/caption_lexicon.yaml` into the tables of a `Lexicon`."""
    text = asset_path("caption_lexicon.yaml").read_text(encoding="utf-8")
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # a hundred times faster where built
    raw = yaml.load(text, Loader=loader)  # noqa: S506
    things: dict[str, dict[str, float]] = {}
    for name, nouns in raw["objects"].items():
        for entry in nouns.split(","):
            noun, probability = _with_probability(entry.strip(), 1.0)
            if probability > 0:
                things.setdefault(noun_key(noun), {})[name] = probability
            else:
                things.setdefault(noun_key(noun), {})
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


def noun_key(phrase: str) -> str:
    """Return a noun phrase in the form of the lexicon's keys: "Hot_Dogs" -> "hot dog"."""
    return " ".join(noun_lemma(word) for word in (w.lower() for w in split_words(phrase)))


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
