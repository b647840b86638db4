"""English words, one at a time: how a text falls into words, and what each word can be.

Lemmas and inflections are LemmInflect's: of the maintained libraries whose data comes inside the
wheel it is the one that gives lemmas for each part of speech ("saw" is a noun, or "see"), needs
only numpy, and knows irregular forms. The closed classes (pronouns, prepositions, auxiliaries and
so on) are listed here.

Knows neither a word's neighbours (`tagging` decides between what a word can be) nor what it means
(`lexicon`). No Ray and no torch.
"""

from __future__ import annotations

import functools
import html
import re
import unicodedata
from dataclasses import dataclass

import lemminflect  # type: ignore[import-untyped]

MAX_TOKENS = 2000  # of one caption; what follows is not read
_MAX_WORD = 40


def word_set(text: str) -> frozenset[str]:
    """Return the words of a text with spaces between them."""
    return frozenset(text.split())


# Closed classes

BE = word_set("be am is are was were been being")
HAVE = word_set("have has had having")
DO = word_set("do does did")
MODALS = word_set("can could will would shall should may might must ca wo")
_NEGATIONS = word_set("not n't never nor neither hardly barely scarcely")
DETERMINERS = word_set(
    "a an the this these those my your his her its our their some any every each no another both"
    " all several many few various multiple numerous which's what such whatever either most"
)
NUMBERS = word_set(
    "one two three four five six seven eight nine ten eleven twelve dozen hundred thousand"
)
PRONOUNS = {
    **dict.fromkeys(
        word_set(
            "i you he she we they him me us himself herself themselves myself yourself ourselves"
            " eachother hers mine yours"
        ),
        "person",
    ),
    **dict.fromkeys(word_set("it itself them something anything everything nothing"), "thing"),
}
NO_ONE = word_set("nobody none nothing noone neither")
PREPOSITIONS = word_set(
    "about above across after against along alongside amid among amongst around at atop away back"
    " before behind below beneath beside besides between beyond by despite down during for from in"
    " inside into near nearby of off on onto out outside over past per through throughout toward"
    " towards under underneath up upon via with within without aboard astride opposite round"
    " like than"
)
_COORDINATORS = word_set("and or but & nor plus yet")
_SUBORDINATORS = word_set(
    "while as when whilst where because if although though since until so then whereas once"
    " whenever till"
)
_RELATIVES = word_set("who which whom whose that")
_ADVERBS = word_set(
    "very just also still now there here together happily outdoors indoors outside too only even"
    " ever almost again already soon often always sometimes quickly slowly carefully quite really"
    " well else anymore today maybe perhaps currently actively seemingly apparently home upside"
    " downtown downfield upfield midfield midair midstream overhead downhill uphill ashore aloft"
    " downstream upstream offshore apart barefoot yesterday tonight tomorrow upstairs downstairs"
    " nearby how why"
)
# Word -> its tag (see `tagging.Token`), "?" where its neighbours decide.
CLOSED: dict[str, str] = {
    **dict.fromkeys(PREPOSITIONS, "P"),
    **dict.fromkeys(_SUBORDINATORS, "U"),
    **dict.fromkeys(_RELATIVES, "W"),
    **dict.fromkeys(DETERMINERS | NUMBERS, "D"),
    **dict.fromkeys(PRONOUNS, "R"),
    **dict.fromkeys(NO_ONE, "R"),
    **dict.fromkeys(BE | DO | MODALS, "X"),
    **dict.fromkeys(_NEGATIONS - {"neither"}, "G"),
    **dict.fromkeys(_COORDINATORS, "C"),
    **dict.fromkeys(_ADVERBS, "A"),
    **dict.fromkeys(HAVE | word_set("get gets getting got gotten"), "?"),
    **dict.fromkeys(
        word_set("to 's that her his one no both all each either few several some many most"), "?"
    ),
}


# What a word can be


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


def noun_key(phrase: str) -> str:
    """Return a noun phrase in the form of the lexicon's keys: "Hot_Dogs" -> "hot dog"."""
    return " ".join(noun_lemma(word) for word in (w.lower() for w in split_words(phrase)))


@functools.lru_cache(maxsize=8192)
def names_agent(noun: str) -> bool:
    """Return whether a noun in -er or -or is made from a verb: "shopper", not "river"."""
    stem = noun[:-2]
    stems = [stem, stem + "e"]
    if len(stem) > 2 and stem[-1] == stem[-2]:
        stems.append(stem[:-1])
    return any("VERB" in lemminflect.getAllLemmas(s) for s in stems if len(s) > 2)


# Words of a text

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
