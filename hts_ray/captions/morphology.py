"""English words, one at a time: how a text falls into words, and what each word can be.

Lemmas and inflections are LemmInflect's: of the maintained libraries whose data comes inside the
wheel it is the one that gives lemmas for each part of speech ("saw" is a noun, or "see"), needs
only numpy, and knows irregular forms. The closed classes (pronouns, prepositions, auxiliaries and
so on) are lists of words.

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

from hts_ray.captions.words import word_lists, word_set

MAX_TOKENS = 2000  # of one caption; what follows is not read
_MAX_WORD = 40


# Closed classes

BE = word_set("be")
HAVE = word_set("have")
DO = word_set("do")
MODALS = word_set("modals")
NEGATIONS = word_set("negations") | {"no", "without"}
DETERMINERS = word_set("determiners")
NUMBERS = word_set("numbers")
PREPOSITIONS = word_set("prepositions")
NO_ONE = word_set("no_one")
PRONOUNS = {
    **dict.fromkeys(word_set("person_pronouns"), "person"),
    **dict.fromkeys(word_set("thing_pronouns"), "thing"),
}
# Tags (see `tagging.Token`) and the lists of words that have them, "?" where a word's neighbours
# decide. Of a word in several lists the last tag counts.
_TAGS = (
    ("P", "prepositions"),
    ("U", "subordinators"),
    ("W", "relatives"),
    ("D", "determiners numbers"),
    ("R", "person_pronouns thing_pronouns no_one"),
    ("X", "be do modals"),
    ("G", "negations"),
    ("C", "coordinators"),
    ("A", "adverbs"),
    ("?", "have ambiguous"),
)
CLOSED = {word: tag for tag, lists in _TAGS for name in lists.split() for word in word_set(name)}


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


_NOUNS: dict[str, str] = word_lists()["noun_lemmas"]
_VERBS: dict[str, str] = word_lists()["verb_lemmas"]


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
        verb, form = _VERBS[word].split()
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
