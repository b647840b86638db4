"""The packaged lexicon, and what it says of single words."""

from __future__ import annotations

from hts_ray.captions.lexicon import STATED, Lexicon
from hts_ray.classes import hico_classes


def test_every_word_of_the_file_is_about_a_known_class() -> None:
    """Catches slips in the packaged file: verbs or objects that HICO does not have."""
    lexicon = Lexicon()
    table = hico_classes()
    verbs = {c.verb for c in table}
    objects = {c.object for c in table}
    pairs = {(c.verb, c.object) for c in table}
    for surface, readings in [*lexicon.frames.items(), *lexicon.agent_frames.items()]:
        for reading in readings:
            assert set(reading.implied) <= objects, surface
            for verb, filtered, probability in reading.options:
                assert verb in verbs, surface
                assert 0 <= probability <= 1, surface
                assert filtered is None or filtered <= objects, surface
    for verb, implied in lexicon.entails.items():
        assert verb in verbs
        for target, filtered, probability in implied:
            assert target in verbs, verb
            assert probability < 0.5, "an entailment must not state a class"
            for obj in filtered or ():
                assert (target, obj) in pairs, (verb, target, obj)
    assert {o for found in lexicon.nouns.values() for o in found} | {"person"} == objects


def test_own_nouns_take_precedence() -> None:
    """Catches a user's class "van" that is still taken for HICO's car, in any other lexicon too."""
    lexicon = Lexicon({"van": {"van": 1.0}, "cart": {"cart": 1.0}}, {}, {"van", "cart"})
    assert lexicon.objects_of("van", set()) == {"van": 1.0}
    assert lexicon.objects_of("shopping cart", set()) == {"cart": 1.0}
    assert Lexicon().nouns["van"] == {"car": 1.0}


def test_words_of_the_text_decide_between_meanings() -> None:
    """Catches cues that are not heard, and a meaning that is certain without any."""
    lexicon = Lexicon()
    assert lexicon.objects_of("board", {"surfer"}) == {"surfboard": STATED}
    unsure = lexicon.objects_of("board", set())
    assert len(unsure) > 1
    assert max(unsure.values()) < 0.5


def test_nouns_that_tell_nothing_have_no_kind() -> None:
    """Catches an unlisted noun that counts as a person, or a toy that counts as an animal."""
    lexicon = Lexicon()
    assert lexicon.kind_of("river") == ""
    assert lexicon.kind_of("policeman") == "person"
    assert lexicon.kind_of("dog") == "animal"
    assert lexicon.kind_of("dog", ("toy",)) == "thing"
