"""Class tables: the packaged 600, the prompts, and CSV files of every kind of badness."""

from __future__ import annotations

import csv
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from hts_ray.classes import (
    OBJECT_PHRASES,
    VERB_PHRASES,
    ClassTable,
    HoiClass,
    hico_classes,
    load_class_table,
    name_prompts,
    noun_phrase,
    pair_prompts,
    read_class_csv,
    verb_phrase,
)
from hts_ray.errors import ConfigError, DataError


def write(tmp_path: Path, content: str | bytes) -> Path:
    path = tmp_path / "classes.csv"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_the_packaged_table_is_hicos():
    """A lost, doubled or shifted row would mislabel every class behind it."""
    table = hico_classes()
    assert table.ids.tolist() == list(range(600))
    assert table.ids.dtype == np.int16
    assert (table[0].verb, table[0].object) == ("board", "airplane")
    assert (table[18].verb, table[18].object) == ("ride", "bicycle")
    assert (table[84].verb, table[84].object) == ("chase", "cat")
    assert (table[599].verb, table[599].object) == ("no_interaction", "zebra")
    assert len({c.verb for c in table}) == 117
    assert len({c.object for c in table}) == 80
    # Chao et al. and the paper's own counts of rare classes
    assert {n: int(mask.sum()) for n, mask in table.few_shot.items()} == {1: 49, 5: 125, 10: 162}
    assert (table.few_shot[5] | ~table.few_shot[1]).all()


def test_every_verb_and_object_is_written_out():
    """A verb that fell through to the inflection rules could read "hiting"."""
    assert {c.verb for c in hico_classes()} == set(VERB_PHRASES)
    assert {c.object for c in hico_classes()} == set(OBJECT_PHRASES)


@pytest.mark.parametrize(
    ("verb", "obj", "sentence"),
    [
        ("ride", "bicycle", "a person riding a bicycle"),
        ("sit_at", "dining_table", "a person sitting at a dining table"),
        ("hold", "umbrella", "a person holding an umbrella"),
        ("hop_on", "bicycle", "a person hopping on a bicycle"),
        ("wear", "skis", "a person wearing skis"),
        ("cut_with", "scissors", "a person cutting with scissors"),
        ("kick", "sports_ball", "a person kicking a sports ball"),
        ("type_on", "keyboard", "a person typing on a keyboard"),
        ("stand_under", "stop_sign", "a person standing under a stop sign"),
        ("drink_with", "cup", "a person drinking with a cup"),
        ("tie", "tie", "a person tying a tie"),
        ("lie_on", "bed", "a person lying on a bed"),
        ("eat", "broccoli", "a person eating broccoli"),
        ("hug", "person", "a person hugging another person"),
        ("no_interaction", "bicycle", "a person and a bicycle"),
        ("no_interaction", "person", "a person and another person"),
        ("operate", "hair_drier", "a person operating a hair dryer"),
        ("hold", "mouse", "a person holding a computer mouse"),
        ("watch", "tv", "a person watching TV"),
        ("wave", "bus", "a person waving at a bus"),
    ],
)
def test_primary_sentences_read_like_english(verb, obj, sentence):
    """Underscores, a missing particle or a wrong article lower the teacher's likelihood."""
    found = next(c for c in hico_classes() if (c.verb, c.object) == (verb, obj))
    assert found.prompts[0] == sentence


def test_all_prompts_are_well_formed_and_distinct():
    """Two classes with one sentence cannot be told apart; "a umbrella" is no English."""
    table = hico_classes()
    prompts = [p for c in table for p in c.prompts]
    assert len(set(prompts)) == len(prompts)
    for c in table:
        assert len(c.prompts) == 6
        assert c.prompts[0].startswith("a person ")
        for prompt in c.prompts:
            assert not re.search(r"[_{}|]|  |^ | $", prompt)
            assert not re.search(
                r"\ba [aeio]|\ban [^aeiouh]|\ba an?\b|\ban? (skis|scissors)", prompt
            )


def test_names_are_unique_and_readable():
    """Reports print names; an underscore or a repeat would confuse their readers."""
    table = hico_classes()
    assert table.names[:2] == ["board airplane", "direct airplane"]
    assert "no interaction with hair drier" in table.names
    assert len(set(table.names)) == 600


def test_lookup_and_subset():
    """An index taken for an id, or masks left uncut, would score the wrong classes."""
    table = hico_classes().subset([153, 18, 599])
    assert table.ids.tolist() == [153, 18, 599]
    assert [table.index_of(i) for i in (153, 18, 599)] == [0, 1, 2]
    assert table.few_shot[10].tolist() == hico_classes().few_shot[10][[153, 18, 599]].tolist()
    with pytest.raises(DataError, match=r"class_id 20 .* nearest is 18 \(ride bicycle\)"):
        table.index_of(20)
    with pytest.raises(DataError, match="class_id 600"):
        hico_classes().subset([600])
    with pytest.raises(DataError, match="twice"):
        hico_classes().subset([1, 1])
    with pytest.raises(DataError, match="at least one class"):
        hico_classes().subset([])


def test_the_table_survives_pickling_and_cannot_be_changed():
    """Ray sends it to workers; a worker that writes into it would change others' classes."""
    table = hico_classes()
    table.ids  # noqa: B018  (cached before pickling)
    again = pickle.loads(pickle.dumps(table))
    assert again == table
    assert again.fingerprint() == table.fingerprint()
    with pytest.raises(ValueError, match="read-only"):
        table.ids[0] = 5
    with pytest.raises(ValueError, match="read-only"):
        table.few_shot[1][0] = True


def test_fingerprint_changes_with_ids_prompts_and_order():
    """A stale fingerprint would reuse the scores of other prompts."""
    one, two = (HoiClass(i, f"n{i}", None, None, (f"p{i}",)) for i in (1, 2))
    other = HoiClass(1, "n1", None, None, ("p1", "more"))
    tables = [(one,), (one, two), (two, one), (other,)]
    assert len({ClassTable(t).fingerprint() for t in tables}) == 4
    renamed = HoiClass(1, "another", None, None, ("p1",))
    assert ClassTable((renamed,)).fingerprint() == ClassTable((one,)).fingerprint()


def test_csv_round_trip(tmp_path):
    """A column lost on the way out would rebuild other prompts on the way in."""
    odd = HoiClass(7, 'a "quoted", name', None, None, ("a | b, c", "x"))
    for table in (hico_classes(), ClassTable((odd,))):
        path = tmp_path / "out.csv"
        table.to_csv(path)
        assert read_class_csv(path) == table


def test_plain_names_and_pairs(tmp_path):
    """Doubled articles ("a a kitchen") and HICO words with spaces instead of underscores."""
    table = read_class_csv(
        write(
            tmp_path,
            "name,verb,object\nred car,,\na kitchen,,\n,hop on,Bicycle\n,juggle,apples\n,dance,\n",
        )
    )
    assert table.ids.tolist() == [0, 1, 2, 3, 4]
    assert table.primary_prompts == [
        "a photo of a red car",
        "a photo of a kitchen",
        "a person hopping on a bicycle",
        "a person juggling apples",
        "a person dancing",
    ]
    assert table.names == ["red car", "a kitchen", "hop on Bicycle", "juggle apples", "dance"]
    assert table[0].verb is None
    assert not table.few_shot


@pytest.mark.parametrize(
    ("header", "row"),
    [
        ("name,prompts", "x,one| two |one"),
        ("name,prompt_2,prompt_1", "x,two,one"),
        ("Name,PROMPT_1,prompt_10,prompt_2", "x,one,,two"),
    ],
)
def test_prompts_of_ones_own(tmp_path, header, row):
    """Columns sorted as text (prompt_10 before prompt_2) or repeats kept."""
    assert read_class_csv(write(tmp_path, f"{header}\n{row}\n"))[0].prompts == ("one", "two")


def test_spreadsheet_files_are_read(tmp_path):
    """BOM, CRLF, quoted cells with commas and line breaks, blank rows, short rows."""
    text = '\ufeffclass_id,name,prompts\r\n9,"x, y","a\r\nb"\r\n,,\r\n\r\n3,z\r\n'
    table = read_class_csv(write(tmp_path, text))
    assert table.ids.tolist() == [9, 3]
    assert table.names == ["x, y", "z"]
    assert table[0].prompts == ("a b",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"\n \n,,\n", "is empty"),
        (b"name\n", "no classes"),
        (b"color,size\nred,1\n", "neither verb and object nor name"),
        (b"name,promts\nx,y\n", r"line 1.*'promts'.*did you mean 'prompts'"),
        (b"clas_id,name\n1,y\n", r"'clas_id'.*did you mean 'class_id'"),
        (b"name,name\nx,y\n", "stands twice"),
        (b"verb;object\nride;bus\n", "use commas"),
        (b"class_id,name\n1,x\n\n1,y\n", r"line 4: class_id 1 is taken by line 2"),
        (b"class_id,name\n-1,x\n", "class_id '-1'"),
        (b"class_id,name\n1.0,x\n", "class_id '1.0'"),
        ("class_id,name\n٣,x\n".encode(), "class_id '٣'"),
        (b"class_id,name\n32768,x\n", "from 0 to 32767"),
        (b"class_id,name\n1,x\n,y\n", "line 3: class_id ''"),
        (b"name\nCar\ncar\n", r"line 3: class 'car' stands in line 2"),
        (b"name,prompts\na,one\nb,one\n", "no teacher could tell"),
        (b"verb,object,prompts\n,,x\n", "line 2: no name, verb or object"),
        (b"verb,object\nno_interaction,\n", "needs an object"),
        (b"name,prompts\nx,one, two\n", r"line 2: 'two' stands beyond"),
        (b'name\nx\n"y\n', "line 3"),
        (b'name\n"x"y\n', "line 2.*quotes"),
        (b"name\nx\nfa\xe7ade\n", r"line 3: byte 0xe7 is not UTF-8"),
        ("name\nx\n".encode("utf-16"), "UTF-16"),
        (b"name\nx\ny\0\n", "line 3: holds a zero byte"),
        (b"name,few_5\nx,yes\n", r"line 2: few_5 'yes'"),
        (b"name\n" + b"x" * 200_000, "line 2"),
    ],
)
def test_bad_files_are_refused_with_file_and_remedy(tmp_path, content, message):
    """A traceback, or worse a class list silently other than the user's."""
    path = write(tmp_path, content)
    with pytest.raises(DataError, match=message) as caught:
        read_class_csv(path)
    assert str(path) in str(caught.value)


def test_sources(tmp_path):
    """A mistyped preset must not be looked for as a file without a hint."""
    assert load_class_table() is hico_classes()
    assert load_class_table("hico", ids=[5]).ids.tolist() == [5]
    assert load_class_table(write(tmp_path, "name\nx\n")).names == ["x"]
    with pytest.raises(ConfigError, match="did you mean 'hico'"):
        load_class_table("hicco")
    with pytest.raises(ConfigError, match="path of a CSV"):
        load_class_table(tmp_path / "none.csv")
    with pytest.raises(DataError, match="cannot be read"):
        read_class_csv(tmp_path)


def test_bad_classes_are_refused():
    """An id beyond int16 would wrap around in every table."""
    with pytest.raises(ConfigError, match="32768"):
        HoiClass(32768, "x", None, None, ("x",))
    with pytest.raises(ConfigError, match="prompt"):
        HoiClass(1, "x", None, None, ())
    with pytest.raises(DataError, match="few_shot"):
        ClassTable((HoiClass(1, "x", None, None, ("x",)),), {1: np.zeros(2, dtype=bool)})


@pytest.mark.parametrize(
    ("noun", "phrase"),
    [
        ("red car", "a red car"),
        ("hour", "an hour"),
        ("unicorn", "a unicorn"),
        ("umbrella", "an umbrella"),
        ("one-way sign", "a one-way sign"),
        ("SUV", "an SUV"),
        ("jeans", "jeans"),
        ("bus", "a bus"),
        ("glass of water", "a glass of water"),
        ("grass", "grass"),
        ("the sea", "the sea"),
        ("two dogs", "two dogs"),
        ("person", "a person"),
        ("hair_drier", "a hair drier"),
    ],
)
def test_articles(noun, phrase):
    """Articles by spelling alone ("an unicorn") or before plurals ("a jeans")."""
    assert noun_phrase(noun) == phrase
    assert name_prompts(noun)[0] == f"a photo of {phrase}"


@pytest.mark.parametrize(
    ("verb", "phrase"),
    [
        ("jog", "jogging"),
        ("skate", "skating"),
        ("dye", "dyeing"),
        ("untie", "untying"),
        ("fix", "fixing"),
        ("visit", "visiting"),
        ("quit", "quitting"),
        ("bring", "bringing"),
        ("vault_over", "vaulting over"),
        ("dancing with", "dancing with"),
        ("ski", "skiing"),
    ],
)
def test_verbs_outside_hico(verb, phrase):
    """Doubling and dropping letters at the wrong place."""
    assert verb_phrase(verb) == phrase
    assert pair_prompts(verb, "dog")[0] == f"a person {phrase} a dog"


def test_braces_in_nouns_are_kept():
    """str.format on a user's text would raise KeyError."""
    assert pair_prompts("hold", "{x} box")[0] == "a person holding a {x} box"


cells = st.text(st.characters(codec="utf-8"), max_size=12)


@settings(
    max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.lists(
        st.sampled_from(
            ["class_id", "name", "verb", "object", "prompts", "prompt_1", "few_1", "x"]
        ),
        max_size=5,
    ),
    st.lists(st.lists(st.one_of(cells, st.sampled_from(["0", "1", "ride", ""])), max_size=6)),
)
@example(["name"], [["\x85"], ["_"]])
def test_any_rows_give_a_table_or_a_user_error(tmp_path, header, rows):
    """Any other exception would reach the user as a traceback."""
    path = tmp_path / "any.csv"
    with path.open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows([header, *rows])
    try:
        table = read_class_csv(path)
    except (DataError, ConfigError):
        return
    assert all(p for c in table for p in c.prompts)
    table.to_csv(tmp_path / "again.csv")
    assert read_class_csv(tmp_path / "again.csv").fingerprint() == table.fingerprint()


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.binary(max_size=200))
def test_any_bytes_give_a_table_or_a_user_error(tmp_path, data):
    """Encodings and control bytes must not end in a traceback."""
    for content in (data, b"name,verb,object\n" + data):
        try:
            read_class_csv(write(tmp_path, content))
        except (DataError, ConfigError):
            continue
