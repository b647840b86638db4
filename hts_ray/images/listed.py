"""Images that somebody has listed: a table of paths, or a dataset of the Hugging Face hub."""

from __future__ import annotations

import io
import re
from collections import Counter
from collections.abc import Iterable

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv
import pyarrow.json as pajson

from hts_ray.config import PrepareConfig
from hts_ray.errors import ConfigError, DataError
from hts_ray.images.folder import read_folder
from hts_ray.images.prepared import Found
from hts_ray.images.shards import read_shards, split_of
from hts_ray.store import storage
from hts_ray.store.tables import ANNOTATION_COLUMNS, PREPARED_SCHEMA, read_table

URI_COLUMNS = ("uri", "path", "file_name", "file", "filename", "filepath", "image_path", "url")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_METADATA = ("metadata.parquet", "metadata.csv", "metadata.jsonl")


def read_list(path: str, config: PrepareConfig) -> Found:
    """Find the images that a table lists: Parquet, CSV or JSON lines, a row an image.

    Paths are in the first of URI_COLUMNS that is there; relative ones start at the table's
    folder. `image_id` and `split` may be there too, and class ids by annotation; without an id the
    path is the id. A path that repeats counts once (`repeated_rows`). Raises DataError for a table
    that cannot be read, without paths, or with ids that repeat or are missing.
    """
    table = _read(path)
    column = next((name for name in URI_COLUMNS if name in table.column_names), None)
    if column is None:
        raise DataError(
            f"{path} has no column of paths: name one {URI_COLUMNS[0]!r}"
            f" (found {', '.join(table.column_names)})"
        )
    return _listed(table, column, path, config.split)


def _listed(table: pa.Table, column: str, path: str, split: str) -> Found:
    folder, counts = storage.absolute(path).rpartition("/")[0], Counter[str]()
    texts = _texts(table, column, path)
    whole = pc.or_(pc.starts_with(texts, "/"), pc.match_substring(texts, "://"))
    uris = pc.if_else(whole, texts, pc.binary_join_element_wise(folder.rstrip("/"), texts, "/"))
    ids = _texts(table, "image_id", path) if "image_id" in table.column_names else texts
    columns = {"image_id": ids, "uri": uris, "split": _splits(table, split)}
    columns |= {name: table[name] for name in ANNOTATION_COLUMNS if name in table.column_names}
    if len(ids.unique()) < len(ids):
        kept = _first_rows(ids.to_pylist(), uris.to_pylist(), path)
        counts["repeated_rows"] = len(ids) - len(kept)
        columns = {name: values.take(kept) for name, values in columns.items()}
    rows = len(columns["uri"])
    try:
        arrays = [
            columns[f.name].cast(f.type) if f.name in columns else pa.nulls(rows, f.type)
            for f in PREPARED_SCHEMA
        ]
    except pa.ArrowInvalid as error:
        raise DataError(f"{path} cannot be read as a list of images: {error}") from error
    return Found(pa.table(arrays, schema=PREPARED_SCHEMA), counts)


def _splits(table: pa.Table, default: str) -> pa.ChunkedArray:
    if "split" not in table.column_names:
        return pa.chunked_array([pa.repeat(default, len(table))], pa.string())
    given = pc.fill_null(table["split"].cast(pa.string()), "")
    return pc.if_else(pc.equal(given, ""), default, given)


def _first_rows(ids: list[str], uris: list[str], path: str) -> pa.Array:
    """Return the first row of each id; DataError where another one has another path."""
    first: dict[str, int] = {}
    for row, (image_id, uri) in enumerate(zip(ids, uris, strict=True)):
        before = uris[first.setdefault(image_id, row)]
        if before != uri:
            twice = f"image_id {image_id!r} stands for {before} and {uri}"
            raise DataError(f"{path}: {twice}: give every image an id of its own")
    return pa.array([*first.values()], pa.int64())


def _read(path: str) -> pa.Table:
    """Return a table; numbers that are ids stay text."""
    if path.lower().endswith(".parquet") or storage.kind(path) == "Directory":
        return read_table(path)
    try:
        data = io.BytesIO(storage.read_bytes(path).removeprefix(b"\xef\xbb\xbf"))
        if path.lower().endswith((".jsonl", ".ndjson", ".json")):
            return pajson.read_json(data)
        header = data.readline().decode("utf-8")
        delimiter = "\t" if "\t" in header else ","
        data.seek(0)
        text = {name.strip().strip('"'): pa.string() for name in header.split(delimiter)}
        return pacsv.read_csv(
            data,
            parse_options=pacsv.ParseOptions(delimiter=delimiter, newlines_in_values=True),
            convert_options=pacsv.ConvertOptions(column_types=text),
        )
    except FileNotFoundError as error:
        raise DataError(f"no file {path}: check the path") from error
    except (pa.ArrowInvalid, UnicodeDecodeError, OSError) as error:
        raise DataError(
            f"{path} cannot be read as a table: {error}; give Parquet, CSV or JSON lines"
        ) from error


def _texts(table: pa.Table, name: str, path: str) -> pa.ChunkedArray:
    values = table[name].cast(pa.string())
    empty = pc.fill_null(pc.equal(pc.utf8_trim_whitespace(values), ""), fill_value=True)
    if pc.any(empty).as_py():
        row = pc.index(empty.combine_chunks(), True).as_py()
        raise DataError(f"{path}: {name} is empty in row {row + 1}")
    return values


def read_huggingface(root: str, config: PrepareConfig) -> Found:
    """Find the images of a Hugging Face dataset: a folder of one, or a hub id (`ID@REVISION`).

    Known are Parquet files with an image column, and image folders with or without metadata. A hub
    id is pinned to the commit that its revision is now. Raises DataError for other layouts.
    """
    if storage.kind(root) == "NotFound" and _HUB_ID.fullmatch(root.partition("@")[0]):
        root = _pinned(root)
    names = storage.walk(root)
    metadata = [name for name in names if name.rpartition("/")[2] in _METADATA]
    if metadata:
        return _merge(_image_folder(storage.join(root, name), config) for name in metadata)
    if any(name.lower().endswith(".parquet") for name in names):
        return read_shards("parquet", root, config)
    if any(name.lower().endswith(".arrow") for name in names):
        raise DataError(
            f"{root} was written by Dataset.save_to_disk: write it as Parquet"
            " (dataset.to_parquet(...)), of which images can be read one by one"
        )
    found = read_folder(root, config.split, follow_symlinks=config.follow_symlinks)
    tops = (image_id.as_py().split("/")[0] for image_id in found.listed["image_id"])
    splits = pa.array((split_of(top, config.split) for top in tops), pa.string())
    return Found(_with(found.listed, split=splits), found.counts)


def _with(listed: pa.Table, **columns: pa.Array) -> pa.Table:
    for name, values in columns.items():
        place = listed.column_names.index(name)
        listed = listed.set_column(place, listed.field(place), values)
    return listed


def _image_folder(path: str, config: PrepareConfig) -> Found:
    """Return the images of one metadata file of an image folder."""
    table = _read(path)
    if "file_name" not in table.column_names:
        raise DataError(f"{path} has no column file_name, as an image folder's metadata must")
    return _listed(table, "file_name", path, split_of(path, config.split))


def _merge(parts: Iterable[Found]) -> Found:
    found = list(parts)
    listed = pa.concat_tables([part.listed for part in found])
    ids = listed["image_id"]
    if len(ids.unique()) < len(ids):  # file names repeat in the folders of splits
        splits = listed["split"].cast(pa.large_string())
        listed = _with(listed, image_id=pc.binary_join_element_wise(splits, ids, "/"))
    return Found(listed, sum((part.counts for part in found), Counter()))


def _pinned(root: str) -> str:
    """Return the address of a hub dataset at a commit."""
    from huggingface_hub import HfApi

    name, _, revision = root.partition("@")
    try:
        commit = HfApi().dataset_info(name, revision=revision or None).sha
    except Exception as error:  # its client's versions raise errors of different libraries
        reason = str(error).split("\n", 1)[0]
        raise ConfigError(
            field="--root",
            value=root,
            remedy=f"it is no folder, and the hub gives no such dataset ({reason}): check the id,"
            " or copy the dataset to a folder",
        ) from error
    return f"hf://datasets/{name}@{commit}"
