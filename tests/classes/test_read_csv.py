"""Classes from CSV files: the packaged 600, and files of every kind of badness."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from hts_ray.classes import (
    ClassTable,
    HoiClass,
    hico_classes,
    load_class_table,
    name_classes,
    parse_class_csv,
    read_class_csv,
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


def test_csv_round_trip(tmp_path):
    """A column lost on the way out would rebuild other prompts on the way in."""
    odd = HoiClass(7, 'a "quoted", name', None, None, ("a | b, c", "x"))
    for table in (hico_classes(), ClassTable((odd,))):
        path = tmp_path / "out.csv"
        table.to_csv(path)
        assert read_class_csv(path) == table
        assert path.read_bytes() == table.csv_bytes()


def test_class_files_may_be_remote():
    """A class list that only local paths can hold would have to be copied to every driver."""
    table = hico_classes().subset([5, 7])
    table.to_csv("memory://classes/c.csv")
    assert load_class_table("memory://classes/c.csv") == table
    with pytest.raises(ConfigError, match="no such file"):
        load_class_table("memory://classes/none.csv")


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
        "a red car",
        "a kitchen",
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
        (b"name,name\nx,y\n", "is there twice"),
        (b"verb;object\nride;bus\n", "use commas"),
        (b"class_id,name\n1,x\n\n1,y\n", r"line 4: class_id 1 is taken by line 2"),
        (b"class_id,name\n-1,x\n", "class_id '-1'"),
        (b"class_id,name\n1.0,x\n", "class_id '1.0'"),
        ("class_id,name\n٣,x\n".encode(), "class_id '٣'"),
        (b"class_id,name\n32768,x\n", "from 0 to 32767"),
        (b"class_id,name\n1,x\n,y\n", "line 3: class_id ''"),
        (b"name\nCar\ncar\n", r"line 3: class 'car' is in line 2"),
        (b"name,prompts\na,one\nb,one\n", "no teacher could tell"),
        (b"verb,object,prompts\n,,x\n", "line 2: no name, verb or object"),
        (b"verb,object\nno_interaction,\n", "needs an object"),
        (b"name,prompts\nx,one, two\n", r"line 2: 'two' is beyond"),
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


def test_named_classes_keep_their_ids():
    """Catches corrections that move to another class when the names come in another order."""
    before = name_classes(["a dog", "a cat", "a cow"])
    after = name_classes(["a bird", "A COW", "a dog"], before)
    assert [(entry.class_id, entry.name) for entry in after] == [
        (0, "a dog"),
        (2, "A COW"),
        (3, "a bird"),
    ]
    assert before.names == ["a dog", "a cat", "a cow"]
    assert before.primary_prompts[0] == parse_class_csv(b"name\na dog\n", "x").primary_prompts[0]
    for names, words in ((["a", ""], "class 2 of 2 is empty"), (["a", "A"], "'A' is given twice")):
        with pytest.raises(ConfigError, match=words):
            name_classes(names)
