"""Classes from CSV files: the packaged HICO ones and a user's own."""

from __future__ import annotations

import csv
import difflib
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt

from hts_ray.classes.prompts import (
    NO_INTERACTION,
    name_prompts,
    pair_prompts,
    person_prompts,
    phrase_key,
    spaced,
    verb_phrase,
)
from hts_ray.classes.table import MAX_CLASS_ID, ClassTable, HoiClass, first_repeat
from hts_ray.errors import ConfigError, DataError
from hts_ray.store import storage

_FEW_SHOT = {f"few_{level}": level for level in (1, 5, 10)}
_KNOWN_COLUMNS = {"class_id", "name", "verb", "object", "prompts", "prompt", *_FEW_SHOT}
_PROMPT_COLUMN = re.compile(r"prompts?_?(\d+)?")

Row = Mapping[str, str]  # column name -> cell


@lru_cache(maxsize=1)
def hico_classes() -> ClassTable:
    """Return HICO's 600 verb-object classes in the order of `list_action`, with `few_shot`."""
    return read_class_csv(Path(__file__).with_name("hico_classes.csv"))


def load_class_table(source: str | Path = "hico", ids: Iterable[int] | None = None) -> ClassTable:
    """Return a run's classes, cut down to `ids` if given.

    `source` is "hico" or the path or URI of a CSV file. Raises ConfigError when it is neither,
    DataError when the file cannot be used.
    """
    try:
        table = hico_classes() if str(source) == "hico" else read_class_csv(source)
    except DataError as error:
        if not isinstance(error.__cause__, FileNotFoundError):
            raise
        near = difflib.get_close_matches(str(source).casefold(), ["hico"], cutoff=0.5)
        hint = "did you mean 'hico'?" if near else "write 'hico' or the path of a CSV file"
        raise ConfigError("no such file", field="classes", value=str(source), remedy=hint) from None
    return table if ids is None else table.subset(ids)


def read_class_csv(path: str | Path) -> ClassTable:
    """Read classes from a UTF-8 CSV file with a header line, at a path or URI.

    Its columns:

    - `verb` and `object`, or `name`, or both;
    - `class_id`, else the row's order from 0;
    - prompts in one cell `prompts` with `|` between them, or in columns `prompt_1`, `prompt_2`;
      else they are made from the names;
    - `few_1`, `few_5`, `few_10` as 0 or 1.

    Other columns are ignored unless their name looks like a slip for one of these. Raises
    DataError naming file, line, value and remedy.
    """
    try:
        data = storage.read_bytes(str(path))
    except (OSError, ValueError) as error:
        raise DataError(f"class file {path} cannot be read: {error}") from error
    return parse_class_csv(data, str(path))


def parse_class_csv(data: bytes, name: str) -> ClassTable:
    """Return the classes in a file's bytes as `read_class_csv` does; `name` is that of the file."""
    rows = _read_rows(_decode(data, name), name)
    if len(rows) > MAX_CLASS_ID + 1:
        raise DataError(f"{name} has {len(rows)} classes: at most {MAX_CLASS_ID + 1} are possible")
    classes = [
        _class_of(row, class_id, f"{name}, line {line}")
        for (line, row), class_id in zip(rows, _class_ids(rows, name), strict=True)
    ]
    _refuse_repeats(classes, [line for line, _ in rows], name)
    present = [column for column in _FEW_SHOT if column in rows[0][1]]
    return ClassTable(
        tuple(classes), {_FEW_SHOT[column]: _flags(rows, column, name) for column in present}
    )


def _decode(data: bytes, name: str) -> str:
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise DataError(f"{name} is UTF-16: save it as UTF-8 ('CSV UTF-8' in a spreadsheet)")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{name}, line {line}: byte 0x{data[error.start]:02x} is not UTF-8:"
            " save it as UTF-8 ('CSV UTF-8' in a spreadsheet)"
        ) from error
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise DataError(f"{name}, line {line}: holds a zero byte: this is not a text file")
    return text


def _read_rows(text: str, name: str) -> list[tuple[int, Row]]:
    """Return the line number and the cells of every row that is not blank, header excepted."""
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    found: list[tuple[int, list[str]]] = []
    line = 1
    try:
        for raw in reader:
            cells = [" ".join(cell.split()) for cell in raw]
            if any(cells):
                found.append((line, cells))
            line = reader.line_num + 1
    except csv.Error as error:
        raise DataError(
            f"{name}, line {line}: {error}: check the quotes, a quote inside a cell is doubled"
        ) from error
    if not found:
        raise DataError(f"{name} is empty: it needs a header such as class_id,verb,object")
    header = [cell.casefold() for cell in found[0][1]]
    _check_header(header, f"{name}, line 1")
    rows: list[tuple[int, Row]] = []
    for line, cells in found[1:]:
        extra = [cell for cell in cells[len(header) :] if cell]
        if extra:
            raise DataError(
                f"{name}, line {line}: {extra[0]!r} is beyond the last column"
                f" ({len(header)} in the header): quote cells that contain a comma"
            )
        padded = cells + [""] * (len(header) - len(cells))
        rows.append((line, dict(zip(header, padded, strict=False))))
    if not rows:
        raise DataError(f"{name} has a header but no classes: add one row a class")
    return rows


def _check_header(header: Sequence[str], place: str) -> None:
    if len(header) == 1 and any(mark in header[0] for mark in ";\t"):
        raise DataError(f"{place}: {header[0]!r} is one column: use commas between columns")
    for column in filter(None, header):
        if header.count(column) > 1:
            raise DataError(f"{place}: column {column!r} is there twice: keep one")
        if column in _KNOWN_COLUMNS or _PROMPT_COLUMN.fullmatch(column):
            continue
        near = difflib.get_close_matches(column, _KNOWN_COLUMNS - set(header), 1, cutoff=0.8)
        if near:
            raise DataError(f"{place}: column {column!r}: did you mean {near[0]!r}?")
    if not {"name", "verb", "object"} & set(header):
        raise DataError(
            f"{place}: neither verb and object nor name among the columns"
            f" ({', '.join(map(repr, header[:12]))}): the first line must name them"
        )


def _class_ids(rows: Sequence[tuple[int, Row]], name: str) -> list[int]:
    if "class_id" not in rows[0][1]:
        return list(range(len(rows)))
    ids: dict[int, int] = {}
    for line, row in rows:
        value = row["class_id"]
        if not re.fullmatch(r"[0-9]{1,5}", value) or int(value) > MAX_CLASS_ID:
            raise DataError(
                f"{name}, line {line}: class_id {value!r} is not a whole number from 0 to"
                f" {MAX_CLASS_ID}: correct it, or drop the column to number the rows"
            )
        if int(value) in ids:
            raise DataError(
                f"{name}, line {line}: class_id {value} is taken by line {ids[int(value)]}:"
                " give every class its own"
            )
        ids[int(value)] = line
    return list(ids)


def _class_of(row: Row, class_id: int, place: str) -> HoiClass:
    name, verb, obj = (row.get(column, "") for column in ("name", "verb", "object"))
    if not (name or verb or obj):
        raise DataError(f"{place}: no name, verb or object: fill one in")
    alone = phrase_key(verb) == NO_INTERACTION
    if alone and not obj:
        raise DataError(f"{place}: verb {verb!r} needs an object: fill it in")
    prompts = _given_prompts(row)
    if not prompts:
        if verb and obj:
            prompts = pair_prompts(verb, obj)
        elif verb:
            prompts = person_prompts(verb_phrase(verb))
        else:
            prompts = name_prompts(name or obj)
    if not name:
        name = f"{'no interaction with' if alone else spaced(verb)} {spaced(obj)}".strip()
    return HoiClass(class_id, name, verb or None, obj or None, prompts)


def _given_prompts(row: Row) -> tuple[str, ...]:
    numbered = []
    for column, cell in row.items():
        match = _PROMPT_COLUMN.fullmatch(column)
        if match:
            # Only the unnumbered cell is split, so that csv_bytes can keep a "|" in a prompt.
            cells = cell.split("|") if match[1] is None else [cell]
            numbered.append((int(match[1] or 0), cells))
    found = [cell.strip() for _, cells in sorted(numbered) for cell in cells]
    return tuple(dict.fromkeys(prompt for prompt in found if prompt))


def _refuse_repeats(classes: Sequence[HoiClass], lines: Sequence[int], name: str) -> None:
    for label, values, remedy in (
        ("class", [c.name for c in classes], "every class needs its own name"),
        ("prompt", [c.prompts[0] for c in classes], "no teacher could tell these classes apart"),
    ):
        twice = first_repeat(values)
        if twice is not None:
            first, second = twice
            raise DataError(
                f"{name}, line {lines[second]}: {label} {values[second]!r} is in line"
                f" {lines[first]} too: {remedy}"
            )


def _flags(rows: Sequence[tuple[int, Row]], column: str, name: str) -> npt.NDArray[np.bool_]:
    for line, row in rows:
        if row[column] not in ("0", "1"):
            raise DataError(f"{name}, line {line}: {column} {row[column]!r}: write 0 or 1")
    return np.array([row[column] == "1" for _, row in rows], dtype=bool)
