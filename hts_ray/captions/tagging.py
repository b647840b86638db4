"""The words of a caption in their context: tokens with part of speech, lemma and verb form.

What a word can be is `morphology`'s, set phrases and compounds ("hot dog", "wine glass") are the
lexicon's; which of them a word is in its place is decided here, by rules for the plain English of
captions. A noun is the default: what can be a verb has to earn it from its neighbours.

Knows neither phrases nor clauses, and no classes beyond the lexicon's lists of words.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hts_ray.captions.lexicon import Lexicon
from hts_ray.captions.morphology import (
    BE,
    CLOSED,
    DETERMINERS,
    DO,
    HAVE,
    MODALS,
    NUMBERS,
    PREPOSITIONS,
    Word,
    analyse,
    noun_lemma,
    split_words,
    verb_lemma,
)
from hts_ray.captions.words import phrase_set, word_lists, word_set

# Nouns and verbs of "horse riding" and the like.
_ACTIVITIES = {
    (noun, verb)
    for verbs, nouns in word_lists()["activities"].items()
    for verb in verbs.split()
    for noun in nouns.split()
}
_PERCEIVING = word_set("perceiving")
_BEFORE_PREDICATES = word_set("before_predicates")
# Verbs of two words; the second one is inflected.
_COMPOUND_VERBS = {tuple(phrase.split()) for phrase in phrase_set("compound_verbs")}


@dataclass(slots=True)
class Token:
    """A word in its context: its text, tag, lemma and, for a verb, form.

    Tags: D determiner, J adjective, N noun, R pronoun, Q number, V verb, X auxiliary, P
    preposition or particle, C coordinator, U subordinator, W relative, T "to" before a verb,
    G negation, A adverb, I possessive 's, K comma, S end of sentence, O other.
    """

    text: str
    tag: str = ""
    lemma: str = ""
    form: str = ""
    capital: bool = False


class Tagger:
    """Tags words by one lexicon."""

    def __init__(self, lexicon: Lexicon) -> None:
        self._lexicon = lexicon

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
        for phrase, tag, said in self._lexicon.fixed_phrases.get(words[i], ()):
            if tuple(words[i : i + len(phrase)]) != phrase:
                continue
            if said != "about to" or self._can_be_base(words, i + len(phrase)):
                form = "base" if tag == "V" else ""
                return Token(" ".join(phrase), tag, said, form), len(phrase)
        if i + 1 < len(words) and (words[i], verb_lemma(words[i + 1])) in _COMPOUND_VERBS:
            second = analyse(words[i + 1])
            verb = f"{words[i]} {second.verb}"
            return Token(f"{words[i]} {words[i + 1]}", "V", verb, second.form), 2
        compounds = self._lexicon.compounds.get(words[i]) or self._lexicon.compounds.get(
            noun_lemma(words[i])
        )
        if compounds:
            for compound in compounds:
                span = words[i : i + len(compound)]
                # "horses race" is a sentence, "a horse race" is not.
                if span[0] != compound[0] and analyse(span[-1]).verb in self._lexicon.verbs:
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
        closed = CLOSED.get(token.text)
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
                finite = before.tag in "TSGK" or before.text in MODALS | DO
                token.form = "base" if finite or before.lemma == "about to" else "past"
        elif word.noun is None:
            self._tag_without_noun(tokens, i, word)
        elif (
            word.adjective
            and self._noun_follows(tokens, i)
            and token.lemma not in self._lexicon.people
        ):
            token.tag, token.lemma = "J", token.text

    def _tag_without_noun(self, tokens: list[Token], i: int, word: Word) -> None:
        token = tokens[i]
        before = tokens[i - 1] if i else Token("", "S")
        after = tokens[i + 1].text if i + 1 < len(tokens) else "."
        ends = after in PREPOSITIONS or not after[0].isalnum()
        predicate = ends and before.tag in "VX" and before.lemma in _BEFORE_PREDICATES
        if word.adverb and not (word.adjective and (predicate or self._noun_follows(tokens, i))):
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
            base = word is not None and word.form in ("base", "any") and after not in DETERMINERS
            noun_only = (
                word is not None and word.noun is not None and word.verb not in self._lexicon.verbs
            )
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
        if past or (token.text in HAVE and after in ("been", "not", "n't", "just", "never")):
            token.tag, token.lemma = "X", "be" if lemma == "get" else "have"
            token.form = "ing" if token.text.endswith("ing") else "s"
        else:
            token.tag, token.lemma = "V", lemma
            token.form = analyse(token.text).form

    def _starts_noun(self, after: str) -> bool:
        """Whether the next word can continue a noun phrase."""
        if not after or not after[0].isalnum() or after in CLOSED:
            return after in NUMBERS or after in ("back", "other")
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
        if after.text in CLOSED or not after.text[0].isalpha():
            return False
        word = analyse(after.text)
        acts = word.form == "ing" and i + 2 < len(tokens) and tokens[i + 2].text in DETERMINERS
        return (word.noun is not None or word.adjective) and not (
            (word.form == "s" or acts) and word.verb in self._lexicon.verbs
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
        is_be = before.lemma == "be" or before.text in BE
        if before.tag in ("T", "G") or (before.tag == "X" and not is_be):
            verb = word.form in ("base", "any") or before.tag != "T"
        elif word.noun is None and not word.adjective:
            verb = True
        elif word.verb in self._lexicon.verbs and before.text in (
            "another",
            "other",
            "others",
            "both",
        ):
            after = tokens[i + 1] if i + 1 < len(tokens) else Token("", "S")
            known = word.noun in self._lexicon.nouns or word.noun in self._lexicon.people
            verb = not known and self._may_start_argument(after)
        elif word.verb not in self._lexicon.verbs or before.tag in ("D", "J", "P", "I", "Q"):
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
        determiner = after.text in DETERMINERS
        if before.tag == "N":
            verb = self._agrees(tokens, i, word, after)
        elif before.tag in ("C", "K", "U"):
            earlier = {t.form for t in tokens[:i] if t.tag == "V"}
            if not earlier:
                verb = before.tag == "K" and determiner
            else:
                alike = word.form in earlier or word.form == "any"
                listed = (
                    alike and after.text in ("and", ",") and word.noun not in self._lexicon.nouns
                )
                verb = listed or (self._may_start_argument(after) and (alike or determiner))
        elif before.tag == "S":
            pronoun = after.text in ("me", "us", "him", "them", "it")
            verb = determiner or (word.form in ("base", "any") and pronoun)
        else:
            # "help push a car"; "the man whose dog is running holds a cup"
            resumes = word.form == "s" and before.form in ("ing", "past", "part")
            place = after.text in PREPOSITIONS or any(t.tag == "W" for t in tokens[:i])
            place = place and word.noun not in self._lexicon.nouns
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
                return after.text in DETERMINERS and word.noun not in self._lexicon.nouns
            return argument or noun.lemma in self._lexicon.people
        if word.form == "any" and argument:
            return True
        watched = after.text in DETERMINERS and self._is_watched(tokens, i)
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
        return any(t.tag == "V" and t.lemma in _PERCEIVING for t in tokens[max(0, i - 6) : i])

    @staticmethod
    def _may_start_argument(after: Token) -> bool:
        if after.tag:
            return after.tag in "DPNRQAJT"
        if after.text in CLOSED:
            return CLOSED[after.text] in "DPRQA?T" and after.text != "'s"
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
            return after.text in DETERMINERS
        if before.tag == "N" and self._is_compound_gerund(tokens, i, after):
            return False
        if before.tag == "S" and word.noun is not None and word.verb not in self._lexicon.verbs:
            return after.text in DETERMINERS
        return not (
            word.adjective
            and self._noun_follows(tokens, i)
            and word.verb not in self._lexicon.verbs
        )

    def _is_compound_gerund(self, tokens: list[Token], i: int, after: Token) -> bool:
        """Whether "horse riding" is a noun: a bare object before, no object after."""
        noun = tokens[i - 1]
        if noun.lemma in self._lexicon.people or noun.text != noun.lemma:
            return False
        if (noun.lemma, analyse(tokens[i].text).verb) not in _ACTIVITIES:
            return False
        start = tokens[i - 2].tag if i > 1 else "S"
        if start in ("D", "J", "Q", "I", "N"):
            return self._noun_follows(tokens, i)
        return after.text not in DETERMINERS

    def _past_is_verb(self, tokens: list[Token], i: int, word: Word, before: Token) -> bool:
        follows = self._noun_follows(tokens, i)
        if before.tag == "A" and i > 1:
            before = tokens[i - 2]
        if before.tag in ("D", "J", "I", "Q"):
            return False
        if word.noun is not None or word.adjective:
            if before.tag in ("P",):
                return False
            if word.verb not in self._lexicon.verbs:
                return False
        if follows and before.tag in ("P", "V", "S", "K"):
            return False
        if follows and before.tag == "C":
            return any(t.tag == "V" and t.form in ("past", "part") for t in tokens[:i])
        return True
