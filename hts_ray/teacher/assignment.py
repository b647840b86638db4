"""What a teacher is asked in one run: the sentences, the boxes and the images of the prior.

Made by the driver without loading a model, and sent to every actor. Knows no Ray.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from textwrap import shorten

import numpy as np
import pyarrow as pa

from hts_ray.classes import ClassTable
from hts_ray.classes.prompts import what_is_shown
from hts_ray.config import LabelConfig, RegionsConfig, TeacherConfig
from hts_ray.errors import ConfigError, DataError
from hts_ray.images.boxes import GivenBoxes, box_bytes, read_given_boxes
from hts_ray.store.run import StageFolder
from hts_ray.teacher.background import background_sentences
from hts_ray.teacher.captioner import ANSWERS, ClassPrompts, LimitedCaptioner
from hts_ray.teacher.detector import check_detector, detector_fingerprint, pinned_detector
from hts_ray.teacher.models.catalog import (
    check_teacher,
    is_clip,
    model_error,
    needs_torch,
    pinned_teacher,
)
from hts_ray.teacher.models.loading import load_captioner

TABLE_INFO = "table.json"
USAGE = "_usage"  # a folder, which who reads a table passes over for its underscore


@dataclass(frozen=True)
class Assignment:
    """All that a teacher actor needs to know.

    `fingerprint` is the model's, made once by the driver; "" where nothing will be written.
    `prior_rows` are the manifest rows whose images the prior is estimated on, `limit` the
    regions that an image may have by the run's budget. `background` are sentences that compete
    with the classes; `prompts` has the classes' prompts first, then one a background sentence.
    """

    config: LabelConfig
    class_table: ClassTable
    fingerprint: str = ""
    run_dir: str = ""
    info_path: str = ""
    usage_path: str = ""
    given: GivenBoxes | None = None
    prior_rows: pa.Table | None = None
    limit: int | None = None
    background: tuple[str, ...] = field(init=False)
    prompts: ClassPrompts = field(init=False)

    def __post_init__(self) -> None:
        templates = self.config.teacher.prompt_templates
        background = chosen_background(self.config, self.class_table)
        asked = [*self.class_table.prompts, *((sentence,) for sentence in background)]
        if self.config.teacher.mode == "questions":
            asked = [what_is_shown(prompts) for prompts in asked]
        object.__setattr__(self, "background", background)
        object.__setattr__(self, "prompts", ClassPrompts.of(asked, templates))

    @classmethod
    def plan(
        cls,
        config: LabelConfig,
        class_table: ClassTable,
        rows: pa.Table,
        *,
        fingerprint: str = "",
        stage: StageFolder | None = None,
    ) -> Assignment:
        """Read what the settings name besides the images; ConfigError or DataError if unusable.

        `rows` are the manifest's rows to label. Without a `stage` nothing will be written.
        """
        check_teacher(config.teacher)
        check_detector(config.regions)
        config = pinned(config)
        sample = None
        if config.teacher.prior == "sample" and config.teacher.mode != "captions":
            rng = np.random.default_rng(config.limit_seed)
            size = min(config.teacher.prior_sample, len(rows))
            sample = rows.take(np.sort(rng.choice(len(rows), size, replace=False)))
        budget = config.regions.budget
        return cls(
            config,
            class_table,
            fingerprint,
            run_dir=stage.run_dir if stage else "",
            info_path=stage.file(TABLE_INFO) if stage else "",
            usage_path=stage.file(USAGE) if stage else "",
            given=_given_boxes(config.regions, rows),
            prior_rows=sample,
            limit=None if budget is None else max(1, budget // max(1, len(rows))),
        )


def pinned(config: LabelConfig) -> LabelConfig:
    """Return the settings with every hub model at a commit, so that no node sees another one.

    The hub is asked for names that may move, such as `main`. Raises ConfigError as
    `NamedModel.pinned`.
    """
    models = {"teacher": pinned_teacher(config.teacher), "regions": pinned_detector(config.regions)}
    return config.model_copy(update=models)


def chosen_background(config: LabelConfig, class_table: ClassTable) -> tuple[str, ...]:
    """Return the background sentences of a teacher pass; none where classes do not compete."""
    if config.teacher.background == "none" or config.teacher.mode != "prompts":
        return ()
    return background_sentences(class_table)


def asked_words(config: TeacherConfig) -> tuple[object, ...]:
    """Return the question and the answers that are compared; nothing in other modes."""
    return (config.question, ANSWERS) if config.mode == "questions" else ()


def check_lengths(config: LabelConfig, class_table: ClassTable) -> None:
    """Refuse sentences that are too long for a packaged teacher, without loading its weights.

    Looks at the settings and the tokenizer alone; of a model with code of its own at nothing.
    Raises ConfigError naming class, prompt, tokens and limit.
    """
    teacher = config.teacher
    if not needs_torch(teacher) or is_clip(teacher) or teacher.trust_remote_code:
        return
    captioner = load_captioner(teacher, "meta")
    if (
        not isinstance(captioner, LimitedCaptioner)
        or (longest := captioner.longest_prompt()) is None
    ):
        return
    if longest < 1:
        raise model_error(
            teacher,
            f"image and instruction alone are {1 - longest} tokens too long for it",
            "shorten label.teacher.instruction, or take another model",
        )
    if teacher.mode == "captions":  # they end where the positions do
        return
    assignment = Assignment(config, class_table)
    prompts = assignment.prompts
    names = np.repeat([*class_table.names, *assignment.background], prompts.counts).tolist()
    sequences = captioner.fed_tokens(prompts.texts)
    for name, text, tokens in zip(names, prompts.texts, sequences, strict=True):
        if len(tokens) > longest:
            raise ConfigError(
                f"class {name!r}: its prompt {shorten(text, 60)!r} has {len(tokens)} tokens,"
                f" {teacher.model} takes at most {longest} behind image and instruction: shorten"
                " it in the class file"
            )


def region_sources(config: RegionsConfig) -> list[str]:
    """Return hashes of the files that regions come from besides the settings."""
    sources = []
    if config.boxes is not None:
        sources.append(hashlib.sha256(box_bytes(config.boxes)).hexdigest()[:12])
    if config.detector is not None:
        sources.append(detector_fingerprint(config))
    return sources


def _given_boxes(config: RegionsConfig, rows: pa.Table) -> GivenBoxes | None:
    """Read the boxes that come with the images; DataError where they fit no image."""
    if config.boxes is None:
        return None
    given = read_given_boxes(config.boxes, config.person_labels)
    ids, uris = rows["image_id"].to_pylist(), rows["uri"].to_pylist()
    if not given.count_found(ids, uris):
        raise DataError(
            f"{config.boxes} has boxes of {len(given)} images, and none is in the manifest: its"
            f" images are called {ids[0]!r} and the like"
        )
    return given
