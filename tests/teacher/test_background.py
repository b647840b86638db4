"""Which sentences compete with the classes."""

import pytest

from hts_ray.classes import ClassTable, hico_classes, read_class_csv
from hts_ray.teacher.background import background_sentences


def named(tmp_path, *names: str) -> ClassTable:
    path = tmp_path / "classes.csv"
    path.write_text("name\n" + "\n".join(names) + "\n", encoding="utf-8")
    return read_class_csv(path)


def test_sentences_that_say_the_same_as_a_class_do_not_compete(tmp_path):
    """Catches a class whose own meaning takes its probability."""
    background = background_sentences(named(tmp_path, "a person washing a car", "a bicycle"))
    assert not any("bicycle" in sentence for sentence in background)
    assert "a person washing a car" not in background
    assert "a person driving a car" in background


@pytest.mark.parametrize(
    ("name", "gone", "kept"),
    [
        ("a red bicycle", "a bicycle", "a person"),
        ("a person holding a cup", "a man", "a cup"),
        ("an empty shelf", "a shelf", "a person"),
    ],
)
def test_sentences_that_say_less_than_a_class_do_not_compete(tmp_path, name, gone, kept):
    """Catches "a bicycle", likelier than "a red bicycle" wherever there is one."""
    background = background_sentences(named(tmp_path, name))
    assert gone not in background
    assert kept in background


def test_background_is_worded_as_the_classes_are(tmp_path):
    """Catches "a photo of ..." beside bare sentences, which are likelier for their length alone."""
    hoi = hico_classes().subset([18, 139])
    assert not any(sentence.startswith("a photo of") for sentence in background_sentences(hoi))
    bare = background_sentences(named(tmp_path, "a red car"))
    assert not any(sentence.startswith("a photo of") for sentence in bare)
    path = tmp_path / "own.csv"
    path.write_text("name,prompts\na red car,a photo of a red car\n", encoding="utf-8")
    own = background_sentences(read_class_csv(path))
    assert all(sentence.startswith("a photo of") for sentence in own)


def test_the_background_stays_small_beside_a_few_classes(tmp_path):
    """Catches a teacher that spends its time on sentences nobody asked for."""
    background = background_sentences(named(tmp_path, "a red bicycle", "an empty shelf"))
    assert "an umbrella" in background
    assert not any("riding a horse" in sentence for sentence in background)
    assert 100 < len(background) < 250


def test_all_of_hico_leaves_a_background():
    """Catches class lists that use up everything that the background is made of."""
    background = background_sentences(hico_classes())
    assert 50 < len(background) < 200
    assert len(set(background)) == len(background)
