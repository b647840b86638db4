"""The teacher of one actor: loaded once, it scores batch after batch.

Shape legend: R regions, C classes, P prompts.
"""

from __future__ import annotations

import logging
import os
import uuid
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from hts_ray.captions.matching import match_captions
from hts_ray.engine.deaths import KILLED_WORKER, Log, survive
from hts_ray.engine.decoding import decoded_image
from hts_ray.engine.image_pass import OK, QUARANTINED
from hts_ray.engine.telemetry import HeldGpus, Meter
from hts_ray.labels.evidence import LOG_LIKELIHOOD, LOG_ODDS, LOG_PROBABILITY, SIMILARITY
from hts_ray.store import storage
from hts_ray.store.tables import REGION_SCORES_SCHEMA
from hts_ray.teacher.assignment import Assignment
from hts_ray.teacher.captioner import ANSWERS, AskedCaptioner, Captioner, TopSearch
from hts_ray.teacher.detector import load_detector
from hts_ray.teacher.models.catalog import is_clip
from hts_ray.teacher.models.loading import load_on_device
from hts_ray.teacher.prior import null_log_odds, plain_images, prior_scores
from hts_ray.teacher.scorers import (
    CaptionVotes,
    ClassScorer,
    ImageFailure,
    ImageTask,
    ObjectsFirst,
    PromptLikelihoods,
    QuestionOdds,
    RegionScorer,
    ScoredImage,
    breaks_device,
)

logger = logging.getLogger(__name__)

# What the scores of each label.teacher.mode are, for `class_probabilities`.
_KINDS = {"prompts": LOG_LIKELIHOOD, "captions": LOG_PROBABILITY, "questions": LOG_ODDS}


def image_task(batch: pa.Table, row: int) -> ImageTask:
    """Return what to score of a row of `decode_batch` that has pixels."""
    return ImageTask(
        decoded_image(batch, row),
        image_id=batch["image_id"][row].as_py(),
        uri=batch["uri"][row].as_py(),
    )


def table_info(captioner: Captioner, assignment: Assignment) -> dict[str, Any]:
    """Return the contents of `table.json`; the prior costs a few forwards, once a run.

    Prompts, token counts and prior are those of the C classes; `background` holds the sentences
    that competed with them, `null_log_odds` what the classes reach beside those on pictures that
    show nothing. `question` and `answers` say what was asked and compared, `prior_log_odds` what
    was answered where there is nothing to see.
    """
    config, prompts = assignment.config, assignment.prompts
    teacher, table = config.teacher, assignment.class_table
    classes, nothing = len(table), plain_images(1)
    prior, odds, counts = None, None, [0] * len(prompts.texts)
    if teacher.mode == "prompts":
        prior = prior_scores(captioner, assignment)
        counts = captioner.score(nothing, prompts.texts).token_counts.tolist()
    elif teacher.mode == "questions":
        assert isinstance(captioner, AskedCaptioner)
        odds = prior_scores(captioner, assignment)
        counts = captioner.ask(nothing, prompts.texts).token_counts.tolist()
    return {
        "class_ids": table.ids.tolist(),
        "class_fingerprint": table.fingerprint(),
        "score_kind": SIMILARITY if is_clip(teacher) else _KINDS[teacher.mode],
        "question": teacher.question if teacher.mode == "questions" else None,
        "answers": ANSWERS if teacher.mode == "questions" else None,
        "prompts": prompts.by_class(prompts.texts)[:classes],
        "prompts_hash": prompts.fingerprint(),
        "token_counts": prompts.by_class(counts)[:classes],
        "prior_log_likelihoods": None if prior is None else prior[:classes].tolist(),
        "prior_log_odds": None if odds is None else odds.tolist(),
        "background": list(assignment.background),
        "null_log_odds": null_log_odds(captioner, assignment),
        "model": teacher.model,
        "engine": teacher.engine,
        "model_fingerprint": assignment.fingerprint,
        "length_normalize": teacher.length_normalize,
        "append_eos": teacher.append_eos,
        "dtype": teacher.dtype,
        "search": teacher.search,
        "regions": config.regions.model_dump(mode="json"),
    }


def region_scorer(captioner: Captioner, assignment: Assignment, device: str) -> RegionScorer:
    """Put the parts that the settings ask for around a loaded teacher."""
    teacher, regions = assignment.config.teacher, assignment.config.regions
    prompts, table = assignment.prompts, assignment.class_table
    scorer: ClassScorer = PromptLikelihoods(captioner, prompts, teacher)
    if teacher.mode == "captions":
        beams = teacher.caption.decoding == "beam"
        scorer = CaptionVotes(
            partial(match_captions, class_table=table), table.positions, weighted=beams
        )
    elif teacher.mode == "questions":
        bound = teacher.object_bound
        objects = None if bound is None else ObjectsFirst.of(table, bound)
        scorer = QuestionOdds.of(captioner, prompts, teacher, objects)
    elif teacher.search == "top_k":
        offsets = None
        if teacher.search_alpha:
            prior = prior_scores(captioner, assignment)
            assert prior is not None
            offsets = (-teacher.search_alpha * prior).astype(np.float32)
        search = TopSearch(teacher.top_k, teacher.template_reduction, offsets)
        scorer = PromptLikelihoods(captioner, prompts, teacher, search)
    detector = None
    if regions.detector is not None:
        names = sorted({entry.object.replace("_", " ") for entry in table if entry.object})
        detector = load_detector(regions, names, device)
    return RegionScorer(
        captioner,
        scorer,
        regions,
        chunk=teacher.max_batch_regions,
        caption=teacher.caption if teacher.captions or teacher.mode == "captions" else None,
        detector=detector,
        given=assignment.given,
        limit=assignment.limit,
    )


class TeacherActor:
    """The stateful step of Ray Data: it loads the teacher once, then scores batch after batch.

    The first actor of a run writes `table.json`.
    """

    def __init__(self, assignment: Assignment, attempts: Log, meter: Meter) -> None:
        self.assignment = assignment
        self.attempts = attempts
        self.meter = meter
        self._held = HeldGpus(self.meter, self.assignment.config.pool.gpus)
        captioner, device = load_on_device(self.assignment.config)
        if not storage.exists(self.assignment.info_path):
            storage.write_json(self.assignment.info_path, table_info(captioner, self.assignment))
        self.scorer = region_scorer(captioner, self.assignment, device)
        self._usage = storage.join(self.assignment.usage_path, f"{uuid.uuid4().hex}.json")

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Return rows of REGION_SCORES_SCHEMA for rows of decoded images, one for one."""
        with self.meter.busy():
            table = self.process(batch)
        regions = pc.sum(pc.list_value_length(table["region_kinds"])).as_py() or 0
        self.meter.count_rows(table, regions=regions)
        self._held.tick()
        if (usage := getattr(self.scorer.captioner, "usage", None)) is not None:
            storage.write_json(self._usage, usage)
        return table

    def process(self, batch: pa.Table) -> pa.Table:
        """Score the readable images; one that kills the process is found and quarantined."""
        readable = np.flatnonzero(batch["error_kind"].is_null().to_numpy()).tolist()
        tasks = [image_task(batch, row) for row in readable]
        found = survive(
            self.attempts,
            [f"teach {task.image_id}" for task in tasks],
            lambda numbers: self._score([tasks[number] for number in numbers]),
            lambda number: ImageFailure(KILLED_WORKER, "the teacher's process died over it"),
            self.assignment.config.max_attempts,
        )
        results = dict(zip(readable, found, strict=True))
        classes = len(self.assignment.class_table)
        rows = [_output_row(batch, row, results.get(row), classes) for row in range(batch.num_rows)]
        return pa.Table.from_pylist(rows, schema=REGION_SCORES_SCHEMA)

    def _score(self, tasks: list[ImageTask]) -> list[ScoredImage | ImageFailure]:
        try:
            return self.scorer(tasks)
        except Exception as error:
            if breaks_device(error):
                # Nothing that this process says from here on is true. Ray starts another.
                logger.exception("the device is unusable")
                os._exit(1)
            raise


def _output_row(
    batch: pa.Table, row: int, result: ScoredImage | ImageFailure | None, classes: int
) -> dict[str, Any]:
    names = ("image_id", "uri", "split", "width", "height", "error_kind", "error")
    output = {name: batch[name][row].as_py() for name in names}
    if result is None:
        return {**output, "status": QUARANTINED}
    if isinstance(result, ImageFailure):
        failed = {"error_kind": result.kind, "error": result.message}
        return {**output, **failed, "status": QUARANTINED}
    return {
        **output,
        "boxes": [region.box for region in result.regions],
        "region_kinds": [region.kind for region in result.regions],
        "margins": [region.margin for region in result.regions],
        "captions": result.captions,
        "scores": result.scores[:, :classes].ravel(),
        "background": result.scores[:, classes:].ravel(),
        "problems": result.problems,
        "status": OK,
    }
