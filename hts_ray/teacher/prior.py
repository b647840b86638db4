"""What language alone makes of a class, estimated on images: log P(prompt), or a bias to yes.

Source: VisualGPTScore (Lin et al. 2023, section 4). Shape legend: M images, C classes.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
from PIL import Image

from hts_ray.engine.decoding import decode_batch, decoded_image
from hts_ray.errors import DataError
from hts_ray.labels.select import background_log_odds
from hts_ray.store import storage
from hts_ray.store.aliases import FloatArray, Pixels
from hts_ray.store.run import settings_hash
from hts_ray.teacher.assignment import Assignment, asked_words
from hts_ray.teacher.captioner import Captioner
from hts_ray.teacher.scorers import ClassScorer, PromptLikelihoods, QuestionOdds

PRIORS = "priors"  # the folder of a run that keeps log P(prompt) from one pass to the next
NULL_IMAGE_SIDE = 64


def prior_scores(captioner: Captioner, assignment: Assignment) -> FloatArray | None:
    """Return log P(prompt) (C,) by the settings, None for prior=none.

    With mode=questions it is the median of each class's log odds over the images.

    Kept in the run's `priors` folder under a hash of the model, the prompts, the images and the
    settings that change it, so that a second pass with other regions finds it. Raises DataError
    when scores are not finite or no image of the sample can be read.
    """
    teacher = assignment.config.teacher
    if teacher.prior == "none":
        return None
    sample = assignment.prior_rows
    key = settings_hash(
        assignment.fingerprint,
        assignment.prompts.fingerprint(),
        [teacher.max_pixels, teacher.image_format, teacher.engine_options],
        [teacher.dtype, teacher.instruction, teacher.length_normalize, teacher.append_eos],
        [teacher.template_reduction, teacher.prior],
        teacher.null_images if sample is None else sample["uri"].to_pylist(),
        *asked_words(teacher),
    )
    path = storage.join(assignment.run_dir, PRIORS, f"{key}.json") if assignment.run_dir else ""
    if path and storage.exists(path):
        return np.asarray(storage.read_json(path), dtype=np.float32)
    images = plain_images(teacher.null_images)
    if sample is not None:
        decoded = decode_batch(sample, assignment.config.images)
        good = np.flatnonzero(decoded["error_kind"].is_null().to_numpy())
        images = [decoded_image(decoded, row).pixels for row in good.tolist()]
        if not images:
            raise DataError("no image of the prior's sample can be read: use prior=plain")
    asked = teacher.mode == "questions"
    score: ClassScorer = PromptLikelihoods(captioner, assignment.prompts, teacher)
    if asked:
        score = QuestionOdds.of(captioner, assignment.prompts, teacher)
    scores_MC = _scored(score, images, teacher.max_batch_regions)
    prior = np.median(scores_MC, axis=0) if asked else log_mean_exp(scores_MC)
    if not np.isfinite(prior).all():
        raise DataError("the teacher's scores of the prior's images are not finite: try float32")
    if path:
        storage.write_json(path, prior.tolist())
    return prior


def null_log_odds(captioner: Captioner, assignment: Assignment) -> list[float] | None:
    """Return the highest log-odds (C,) of each class against the background where nothing shows.

    In nats, over `empty_pictures`; None without a background.
    """
    teacher, classes = assignment.config.teacher, len(assignment.class_table)
    if not assignment.background:
        return None
    score = PromptLikelihoods(captioner, assignment.prompts, teacher)
    scores_MS = _scored(score, empty_pictures(), teacher.max_batch_regions)
    odds_MC = background_log_odds(scores_MS[:, :classes], scores_MS[:, classes:])
    highest: list[float] = odds_MC.max(axis=0).tolist()
    return highest


def _scored(score: ClassScorer, images: list[Pixels], batch: int) -> FloatArray:
    starts = range(0, len(images), batch)
    return np.concatenate([score(images[first : first + batch], ()) for first in starts])


def empty_pictures() -> list[Pixels]:
    """Return pictures of nothing: black, grey, white, six of noise, three of soft colours."""
    shape = (NULL_IMAGE_SIDE, NULL_IMAGE_SIDE)
    soft = [np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8) for seed in range(3)]
    return [
        *plain_images(9),
        *(np.asarray(Image.fromarray(colours).resize(shape)) for colours in soft),
    ]


def plain_images(count: int) -> list[Pixels]:
    """Return `count` images that show nothing: black, grey, white, then uniform noise."""
    shape = (NULL_IMAGE_SIDE, NULL_IMAGE_SIDE, 3)
    plain = [np.full(shape, value, dtype=np.uint8) for value in (0, 128, 255)]
    noise = [
        np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
        for seed in range(max(0, count - len(plain)))
    ]
    return [*plain, *noise][:count]


def log_mean_exp(scores_MC: FloatArray) -> FloatArray:
    """Average M rows of log-likelihoods as probabilities, to (C,); ValueError without a row.

    Over images that say nothing, or over a sample of all, this estimates log P(prompt).
    """
    if not len(scores_MC):
        raise ValueError("a prior needs at least one image")
    total: npt.NDArray[np.float64] = np.logaddexp.reduce(scores_MC.astype(np.float64), axis=0)
    return (total - math.log(len(scores_MC))).astype(np.float32)
