"""A sweep that was checked and not run yet: what it tries, on which images, and where it goes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from hts_ray.config import HtsConfig, SweepConfig
from hts_ray.engine.run import Run
from hts_ray.errors import ConfigError, DataError
from hts_ray.images.hico import read_anno_table
from hts_ray.images.manifest import IMAGE_COLUMNS
from hts_ray.labels.stage import plan_filter
from hts_ray.store.run import StageFolder, content_hash, settings_hash
from hts_ray.student.model import source_fingerprint
from hts_ray.sweep.data import REFERENCE_GRID, labeled_among, scored_images, swept_images
from hts_ray.sweep.objectives import choose_objective
from hts_ray.sweep.proposals import make_proposer
from hts_ray.sweep.space import Space, build_space

TABLE = "sweep"


@dataclass(frozen=True)
class Plan:
    """A sweep that was checked and not run yet.

    `images` has image_id, uri and split of the images that trials train on, of so many `scored`;
    `validation` the annotated rows of the labeled images, or is None.
    """

    run: Run
    region_scores: StageFolder
    space: Space
    objective: str
    images: pa.Table
    scored: int
    validation: pa.Table | None
    stage: StageFolder

    @property
    def sample(self) -> str:
        """How many images are looked at, in words."""
        counts = f"{len(self.images)} of {self.scored} images"
        return counts if self.scored == len(self.images) else f"{counts}, classes evened out"

    @property
    def flipped(self) -> bool:
        """Whether some trial trains on mirrored images."""
        own = self.run.config.train.augment.flip
        return own or any(p.name == "train.augment.flip" for p in self.space.parameters)

    def all_images(self) -> pa.Table:
        """Return image_id, uri and split of all images that the sweep looks at, each once."""
        if self.validation is None:
            return self.images
        more = self.validation.select(IMAGE_COLUMNS)
        new = more.filter(pc.invert(pc.is_in(more["image_id"], self.images["image_id"])))
        return pa.concat_tables([self.images, new.cast(self.images.schema)]).combine_chunks()


def plan_sweep(run: Run, region_scores: StageFolder) -> Plan:
    """Check everything that a sweep needs, without Ray, and name its folder.

    Raises ConfigError for wrong settings, values, objectives or labels; DataError when there is
    no image, or no labeled one.
    """
    config, sweep = run.config, run.config.sweep
    if config.train.labels != "pseudo":
        raise ConfigError(
            field="train.labels",
            value=config.train.labels,
            remedy="a sweep tries settings of pseudo-labels: set train.labels=pseudo",
        )
    if config.filter.passes is not None:
        raise ConfigError(
            field="filter.passes",
            value=config.filter.model_dump(mode="json")["passes"],
            remedy="a sweep tries settings over one teacher pass: leave it out, sweep each pass by"
            " itself, and give what was best as the `settings` of that pass",
        )
    if sweep.train == "full":
        _require_full(config)
    space = build_space(config, region_scores.path)
    if sweep.search == "optuna":
        make_proposer(sweep, space)  # refuses early where it is not installed
    validation = None if sweep.validation is None else labeled_images(run, sweep.validation)
    full = sweep.train == "full"
    objective = choose_objective(sweep.objective, validation is not None, full)
    scored = scored_images(region_scores.path, config.train.split)
    images = swept_images(scored, region_scores.path, config, validation)
    if validation is not None:
        _require_unlabeled(images["image_id"].to_numpy(), validation, sweep)
    own = {"space", "validation", "objective"}
    key = settings_hash(
        {name: v for name, v in sweep.answer_settings().items() if name not in own},
        space.fingerprint(),
        objective,
        REFERENCE_GRID,
        None if validation is None else content_hash(validation),
        plan_filter(run, region_scores).folder.key,  # scores, classes, corrections, settings
        config.train.answer_settings(),
        config.student.answer_settings(),
        source_fingerprint(config.student),
        config.seed,
    )
    stage = run.stage(TABLE, key)
    return Plan(run, region_scores, space, objective, images, len(scored), validation, stage)


def labeled_images(run: Run, path: str) -> pa.Table:
    """Return the annotated rows of a manifest, by id; an `anno.mat` takes paths from the run's.

    `path` may be a folder that holds `manifest.parquet`, as `hts import-labels` writes one.
    DataError when there is no such row.
    """
    if path.endswith(".mat"):
        annotated = read_anno_table(path)
        known = run.manifest().table.select(["image_id", "uri"])
        joined = annotated.drop_columns(["uri"]).join(known, "image_id", join_type="inner")
        table = joined.select(annotated.column_names).cast(annotated.schema)
        table = table.filter(table["positive_ids"].is_valid())
    else:
        table = run.manifest(path).annotated()
    if not len(table):
        raise DataError(f"sweep.validation={path}: no annotated image that the run knows")
    return table.sort_by("image_id").combine_chunks()


def _require_full(config: HtsConfig) -> None:
    """Raise ConfigError for settings with which trials cannot train in full."""
    if config.train.num_workers == 0 or config.train.trainable == "head":
        head = config.train.trainable == "head"
        raise ConfigError(
            field="train.trainable" if head else "train.num_workers",
            value="head" if head else 0,
            remedy="trials that train in full need Ray Train's workers: set sweep.train=head, or"
            + (" train more than the head" if head else " a number of workers"),
        )
    if not config.sweep.finalists:
        raise ConfigError(
            field="sweep.finalists",
            value=0,
            remedy="the curves of sweep.train=full only choose whom to compare: set 1 or more",
        )


def _require_unlabeled(
    image_ids: npt.NDArray[Any], validation: pa.Table, config: SweepConfig
) -> None:
    """Raise ConfigError when too few images are left to train on beside the labeled ones."""
    labeled = int(labeled_among(image_ids, validation).sum())
    if 2 * labeled > len(image_ids):
        raise ConfigError(
            f"{labeled} of the {len(image_ids)} images to train on are labeled",
            field="sweep.validation",
            value=config.validation,
            remedy="students are not trained on labeled images: leave half of the images unlabeled,"
            " or search without labels (sweep.validation=null)",
        )
