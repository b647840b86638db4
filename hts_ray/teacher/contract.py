"""What a teacher has to offer. This file is the whole contract.

A package that offers one names it in its pyproject.toml and is installed on every node:

    [project.entry-points."hts_ray.teachers"]
    colours = "hts_colours:ColourTeacher"

`label.teacher.model=colours` takes it, or `colours:ANYTHING`, which it finds in `config.model`. A
class that is in no package is `import:MODULE:CLASS`. R regions, P prompts, H x W pixels.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from hts_ray.config import CaptionConfig
from hts_ray.store.aliases import FloatArray, Pixels


@dataclass(frozen=True, eq=False)
class PromptScores:
    """Scores of P prompts on R regions.

    `log_likelihoods` is (R, P) float32, sums of token log-probabilities in nats, at most 0.
    `token_counts` is (P,) int64, how many tokens were summed, an end token included.
    """

    log_likelihoods: FloatArray
    token_counts: npt.NDArray[np.int64]


@dataclass(frozen=True)
class Caption:
    """A caption and its log-probability in nats, the end token included."""

    text: str
    log_probability: float


class Captioner(Protocol):
    """A teacher. Images are sequences of R uint8 arrays (H, W, 3), RGB, of any sizes.

    Every actor calls the class once with the TeacherConfig and "cpu" or "cuda". It may also have
    - `modes`, those of label.teacher.mode that it serves; both and no `questions` if not there;
    - `needs`, what somebody must have for it, a line that `hts teachers` prints;
    - `fingerprint(config)`, a class method: text that changes whenever its answers may. The
      package's version and the source of the class's module count without it;
    - `ask(images, phrases)` for mode=questions, see `hts_ray.teacher.captioner.AskedCaptioner`.
    """

    def score(self, images: Sequence[Pixels], prompts: Sequence[str]) -> PromptScores:
        """Return log P(prompt | image) for every pair."""

    def caption(self, images: Sequence[Pixels], settings: CaptionConfig) -> list[list[Caption]]:
        """Return `settings.count` captions an image, the likeliest first."""
