"""Classes from CSV files: the packaged HICO ones and a user's own."""

from __future__ import annotations

import csv
import difflib
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import count, zip_longest
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


@dataclass(frozen=True)
class _Row:
    """One class of a file: the line it begins at, and its cells by column."""

    file: str
    line: int
    cells: Mapping[str, str]

    def wrong(self, problem: str) -> DataError:
        return DataError(f"{self.file}, line {self.line}: {problem}")


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
    classes = tuple(map(_class_of, rows, _class_ids(rows)))
    for label, values, remedy in (
        ("class", [c.name for c in classes], "every class needs its own name"),
        ("prompt", [c.prompts[0] for c in classes], "no teacher could tell these classes apart"),
    ):
        twice = first_repeat(values)
        if twice is not None:
            first, second = (rows[place] for place in twice)
            value = values[twice[1]]
            raise second.wrong(f"{label} {value!r} is in line {first.line} too: {remedy}")
    present = [column for column in _FEW_SHOT if column in rows[0].cells]
    return ClassTable(classes, {_FEW_SHOT[column]: _flags(rows, column) for column in present})


def name_classes(names: Sequence[str], before: ClassTable | None = None) -> ClassTable:
    """Return the classes that a person names, whose prompts are made from the names.

    Names of the table `before` keep their ids, so that corrections stay with their class and
    another order is no other table. Raises ConfigError for an empty name, for one that is given
    twice and for two that make the same prompt.
    """
    plain = [" ".join(name.split()) for name in names]
    for place, name in enumerate(plain, start=1):
        if not name:
            raise ConfigError(f"class {place} of {len(names)} is empty: write what it shows")
    if twice := first_repeat(plain):
        raise ConfigError(f"class {plain[twice[1]]!r} is given twice: name it once")
    known = {entry.name.casefold(): entry.class_id for entry in before or ()}
    fresh = count(max(known.values(), default=-1) + 1)
    ids = [known.get(name.casefold()) for name in plain]
    numbered = [(next(fresh) if i is None else i, name) for i, name in zip(ids, plain, strict=True)]
    classes = [_class_of(_Row("", 0, {"name": name}), i) for i, name in sorted(numbered)]
    if twice := first_repeat([entry.prompts[0] for entry in classes]):
        one, other = (classes[place].name for place in twice)
        raise ConfigError(
            f"classes {one!r} and {other!r} are both asked as {classes[twice[0]].prompts[0]!r}:"
            " keep one, or use other words"
        )
    return ClassTable(tuple(classes))


def _decode(data: bytes, name: str) -> str:
    remedy = "save it as UTF-8 ('CSV UTF-8' in a spreadsheet)"
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise DataError(f"{name} is UTF-16: {remedy}")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line, byte = data.count(b"\n", 0, error.start) + 1, data[error.start]
        problem = f"byte 0x{byte:02x} is not UTF-8: {remedy}"
        raise DataError(f"{name}, line {line}: {problem}") from error
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise DataError(f"{name}, line {line}: holds a zero byte: this is not a text file")
    return text


def _read_rows(text: str, name: str) -> list[_Row]:
    """Return every row that is not blank, header excepted."""
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    found: list[tuple[int, list[str]]] = []
    line = 1
    try:
        for raw in reader:
            found.append((line, [" ".join(cell.split()) for cell in raw]))
            line = reader.line_num + 1
    except csv.Error as error:
        raise DataError(
            f"{name}, line {line}: {error}: check the quotes, a quote inside a cell is doubled"
        ) from error
    found = [(line, cells) for line, cells in found if any(cells)]
    if not found:
        raise DataError(
            f"{name} is empty: write `name` in its first line and a class in each other"
        )
    header = [cell.casefold() for cell in found[0][1]]
    _check_header(header, f"{name}, line 1")
    rows = []
    for line, cells in found[1:]:
        row = _Row(name, line, dict(zip_longest(header, cells[: len(header)], fillvalue="")))
        extra = next(filter(None, cells[len(header) :]), None)
        if extra is not None:
            raise row.wrong(
                f"{extra!r} is beyond the last column ({len(header)} in the header): quote cells"
                " that contain a comma"
            )
        rows.append(row)
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
            f" ({', '.join(map(repr, header[:12]))}): write `name` in the first line, above"
            " the names of the classes"
        )


def _class_ids(rows: Sequence[_Row]) -> list[int]:
    if "class_id" not in rows[0].cells:
        return list(range(len(rows)))
    lines: dict[int, int] = {}
    for row in rows:
        value = row.cells["class_id"]
        if not re.fullmatch(r"[0-9]{1,5}", value) or int(value) > MAX_CLASS_ID:
            raise row.wrong(
                f"class_id {value!r} is not a whole number from 0 to {MAX_CLASS_ID}: correct it,"
                " or drop the column to number the rows"
            )
        taken = lines.setdefault(int(value), row.line)
        if taken != row.line:
            raise row.wrong(f"class_id {value} is taken by line {taken}: give every class its own")
    return list(lines)


def _class_of(row: _Row, class_id: int) -> HoiClass:
    name, verb, obj = (row.cells.get(column, "") for column in ("name", "verb", "object"))
    if not (name or verb or obj):
        raise row.wrong("no name, verb or object: fill one in")
    alone = phrase_key(verb) == NO_INTERACTION
    if alone and not obj:
        raise row.wrong(f"verb {verb!r} needs an object: fill it in")
    prompts = _given_prompts(row.cells)
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


def _given_prompts(cells: Mapping[str, str]) -> tuple[str, ...]:
    numbered = []
    for column, cell in cells.items():
        match = _PROMPT_COLUMN.fullmatch(column)
        if match:
            # Only the unnumbered cell is split, so that csv_bytes can keep a "|" in a prompt.
            parts = cell.split("|") if match[1] is None else [cell]
            numbered.append((int(match[1] or 0), parts))
    found = [part.strip() for _, parts in sorted(numbered) for part in parts]
    return tuple(dict.fromkeys(filter(None, found)))


def _flags(rows: Sequence[_Row], column: str) -> npt.NDArray[np.bool_]:
    for row in rows:
        if row.cells[column] not in ("0", "1"):
            raise row.wrong(f"{column} {row.cells[column]!r}: write 0 or 1")
    return np.array([row.cells[column] == "1" for row in rows], dtype=bool)
