"""The teacher passes that the filter reads: the latest alone, or several that are combined.

Every pass is a region_scores folder. Shapes: C classes.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from hts_ray.config import FilterConfig
from hts_ray.errors import ConfigError, DataError
from hts_ray.labels.combine import combine, only_some
from hts_ray.labels.evidence import (
    Evidence,
    class_probabilities,
    filter_info,
    image_evidence,
    read_info,
    require_abstention,
    wants_sample_prior,
)
from hts_ray.store import storage
from hts_ray.store.run import StageFolder, finished_stages, given_stage
from hts_ray.store.tables import read_table

TABLE = "region_scores"
_FIELD, _ALL = "filter.passes", "all"


@dataclass(frozen=True)
class TeacherPass:
    """A teacher pass as the filter reads it: with which settings, and with which weight.

    `sample_prior` is what the filter found of its regions, where labels were made of it alone.
    """

    folder: StageFolder
    config: FilterConfig
    weight: float = 1.0
    sample_prior: list[float] | None = None

    @cached_property
    def info(self) -> dict[str, Any]:
        """See `read_info`."""
        return read_info(self.folder.path)

    @cached_property
    def images(self) -> int:
        """How many images were scored; 0 where the pass is not finished."""
        return int(self.folder.stats.get("rows_out", 0)) if self.folder.finished else 0

    @property
    def name(self) -> str:
        """The name of its folder."""
        return f"{self.folder.table}-{self.folder.key}"

    def reading(self, split: str | None) -> dict[str, Any]:
        """Return `filter_info`; it reads all scores again where a prior of theirs is not known."""
        if self.sample_prior is not None:
            return {**self.info, "sample_prior": self.sample_prior}
        return filter_info(self.folder.path, self.config, split)

    def record(self) -> dict[str, Any]:
        """Return what made labels of it, as `made_from` reads it back."""
        settings = self.config.answer_settings()
        return {TABLE: self.name, "weight": self.weight, "filter": settings}


def chosen_passes(
    run_dir: str, config: FilterConfig, latest: StageFolder | None
) -> list[TeacherPass]:
    """Return the passes that `filter.passes` names, by their keys; `latest` alone where it is None.

    Raises ConfigError for a name that fits none or several, for fewer than two passes or more than
    fit into memory, for settings under which every region must show a class, and for a prior that
    the teacher did not store; DataError for scores of an unknown kind, and for passes over other
    classes or other images than the first's.
    """
    if config.passes is None:
        assert latest is not None
        chosen = [TeacherPass(latest, config)]
    else:
        stored = finished_stages(run_dir, TABLE)
        named = config.passes
        if [one.scores for one in named] == [_ALL]:
            named = tuple(named[0].model_copy(update={"scores": f.key}) for f in stored)
        models = [str(read_info(folder.path).get("model")) for folder in stored]
        folders = [_find(stored, models, one.scores) for one in named]
        passes = [
            TeacherPass(folder, config.of_pass(one), one.weight)
            for folder, one in zip(folders, named, strict=True)
        ]
        chosen = sorted(passes, key=lambda one: one.folder.key)
        _check_together(chosen)
        _require_memory(chosen)
    for one in chosen:
        require_abstention(one.info, one.config)
        if not wants_sample_prior(one.info, one.config):
            nothing_1C = np.zeros((1, len(one.info["class_ids"])), np.float32)
            class_probabilities(nothing_1C, one.info, one.config)  # refuses what it cannot read
    return chosen


def together(
    passes: Sequence[TeacherPass], config: FilterConfig, split: str | None
) -> tuple[Evidence, dict[str, int]]:
    """Return what the passes say of every image of a split, and the counts of combining them."""
    found = [image_evidence(one.folder.path, one.config, split) for one in passes]
    if len(found) == 1:
        return found[0], {}
    some = int(only_some(found).sum())
    weights = [one.weight for one in passes]
    return combine(found, weights, config.combine), {
        "passes": len(passes),
        "images_in_some_passes": some,
    }


def _require_memory(passes: Sequence[TeacherPass]) -> None:
    """Refuse several passes that need more than four fifths of the machine's memory together."""
    # 4 bytes a probability and 2 a support: of every pass, of one that is sorted, of the result.
    per_image = 6 * (len(passes) + 2) * len(passes[0].info["class_ids"])
    fitting = int(0.8 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / per_image)
    images = max(one.images for one in passes)
    if images > fitting:
        raise ConfigError(
            f"{len(passes)} passes over {images} images take {images * per_image / 2**30:.0f} GiB,"
            " since passes are combined in one process",
            field=_FIELD,
            value=[one.folder.key for one in passes],
            remedy=f"take a machine with more memory, this one is enough for {fitting} images, or"
            " one pass alone, which is filtered in blocks",
        )


def made_from(run_dir: str, made: Mapping[str, Any]) -> list[TeacherPass]:
    """Return the passes that labels were filtered from, by their `table.json`, that still exist."""
    records = made.get("passes") or [made]
    passes = [
        TeacherPass(
            StageFolder(run_dir, TABLE, str(record[TABLE]).removeprefix(f"{TABLE}-")),
            FilterConfig.model_validate(record.get("filter") or {}),
            record.get("weight", 1.0),
            record.get("sample_prior"),
        )
        for record in records
        if record.get(TABLE)
    ]
    return [one for one in passes if one.folder.finished]


def _find(stored: Sequence[StageFolder], models: Sequence[str], name: str) -> StageFolder:
    """Return the pass of a key, a folder or a teacher's model; ConfigError for none or several."""
    key = name.rstrip("/").rpartition("/")[2].removeprefix(f"{TABLE}-")
    pairs = list(zip(stored, models, strict=True))
    fitting = [folder for folder in stored if folder.key == key]
    fitting = fitting or [folder for folder, model in pairs if model == name]
    if not fitting and "/" in name and storage.exists(name):
        return given_stage(name, TABLE)
    if len(fitting) != 1:
        known = ", ".join(f"{folder.key} ({model})" for folder, model in pairs) or "none"
        raise ConfigError(
            "fits several teacher passes" if fitting else "no such teacher pass",
            field=_FIELD,
            value=name,
            remedy=f"give one of the run's keys: {known}",
        )
    return fitting[0]


def _check_together(passes: Sequence[TeacherPass]) -> None:
    """Refuse passes that cannot be combined: too few, or of other classes or images."""
    keys = [one.folder.key for one in passes]
    if twice := [key for key in keys if keys.count(key) > 1]:
        remedy = f"{twice[0]} is named twice: give it a weight instead"
        raise ConfigError(field=_FIELD, value=keys, remedy=remedy)
    if len(keys) < 2:
        remedy = "there is nothing to combine: label again with another teacher, or leave it out"
        raise ConfigError(field=_FIELD, value=keys, remedy=remedy)
    if not any(one.weight for one in passes):
        raise ConfigError(field=_FIELD, value=keys, remedy="give one of them a weight above 0")
    first, *others = passes
    images = _images(first)
    for other in others:
        for name in ("class_ids", "class_fingerprint"):
            if first.info.get(name) != other.info.get(name):
                raise DataError(
                    f"{first.name} and {other.name} were scored with different classes: label"
                    " again with one class list, or name others in filter.passes"
                )
        _check_same_images(first, images, other)


def _images(one: TeacherPass) -> pa.Table:
    return read_table(one.folder.path, ["image_id", "uri"]).combine_chunks()


def _check_same_images(first: TeacherPass, images: pa.Table, other: TeacherPass) -> None:
    """Refuse two passes that share no image, or have other files for one."""
    theirs = _images(other)
    place = pc.index_in(theirs["image_id"], value_set=images["image_id"].combine_chunks())
    shared = place.is_valid()
    at = images["uri"].take(place.filter(shared)).to_numpy(zero_copy_only=False)
    uris = theirs["uri"].filter(shared).to_numpy(zero_copy_only=False)
    differ = np.flatnonzero(at != uris)
    if len(at) and not len(differ):
        return
    what = "share no image"
    if len(differ):
        name = theirs["image_id"].filter(shared)[int(differ[0])].as_py()
        what = f"have different files of image {name!r}"
    raise DataError(
        f"{first.name} and {other.name} {what}: they were made of different manifests, name others"
        " in filter.passes"
    )
