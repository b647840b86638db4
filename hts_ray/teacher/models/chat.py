"""Chat models that run in an engine of their own: what they are asked, and what answers mean.

An engine takes requests one by one and works on many side by side, so images are not batched: each
is scored in a thread of its own, and a request that fails costs its image alone.

Shape legend: R regions, P phrases.
"""

from __future__ import annotations

import asyncio
import math
import threading
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from hts_ray.config import CaptionConfig, RequestsConfig, TeacherConfig
from hts_ray.errors import DataError
from hts_ray.images.crops import shrunk
from hts_ray.store.aliases import Pixels
from hts_ray.teacher.captioner import ANSWERS, Answers, Caption, PromptScores
from hts_ray.teacher.models.catalog import INSTRUCTION

_GREEDY: Mapping[str, float] = {"temperature": 0.0}


@dataclass(frozen=True)
class Request:
    """What is asked about a picture.

    `words` stand behind it; `count` answers of at most `max_tokens` are written by `sampling`,
    the arguments of that name that vLLM and OpenAI share. With `odds` the likeliest first tokens
    of the answer come back.
    """

    words: str
    max_tokens: int
    odds: bool = False
    count: int = 1
    sampling: Mapping[str, float] = field(default_factory=lambda: _GREEDY)


@dataclass(frozen=True)
class Reply:
    """Answers, and the tokens that they cost.

    `first` are texts that the first answer may begin with, and their log-probabilities in nats.
    """

    texts: Sequence[str]
    first: Sequence[tuple[str, float]]
    tokens_read: int
    tokens_written: int


class Engine(Protocol):
    """Where a chat model runs.

    `concurrency` is how many requests it is given at a time where the settings do not say.
    """

    concurrency: int

    def picture(self, image: Pixels) -> Any:
        """Return an image (H, W, 3) as `reply` takes it, made once for all its questions."""

    async def reply(self, picture: Any, request: Request) -> Reply:
        """Answer a request.

        Raises DataError for what may be the image's fault, ConfigError for what is not.
        """


def question_of(config: TeacherConfig, phrase: str) -> Request:
    """Return the question whether a phrase is shown."""
    return Request(config.question.replace("{}", phrase), 1, odds=True)


def description(config: TeacherConfig, settings: CaptionConfig, seed: int = 0) -> Request:
    """Return the request for captions; `seed` is the region's, of sampling."""
    sampling = _GREEDY
    if settings.decoding == "sample":
        drawn = {"temperature": settings.temperature, "top_p": settings.top_p}
        sampling = {**drawn, "seed": (settings.seed + seed) % 2**31}
    words = config.instruction or INSTRUCTION
    return Request(words, settings.max_tokens, count=settings.count, sampling=sampling)


def log_odds(first: Sequence[tuple[str, float]]) -> float:
    """Return log P(yes) - log P(no) of the likeliest first tokens, over the spellings of each.

    Where they hold one of the two only, the other is taken for as likely as the least of them: it
    is no likelier. DataError where they hold neither.
    """
    yes, no = (
        [value for text, value in first if text in ANSWERS[word] and value > -math.inf]
        for word in ("yes", "no")
    )
    if not yes and not no:
        likeliest = max(first, key=lambda entry: entry[1], default=("", 0.0))[0]
        raise DataError(f"the answer begins with {likeliest!r}, neither with yes nor with no")
    least = [min(value for _, value in first)]
    return float(np.logaddexp.reduce(yes or least) - np.logaddexp.reduce(no or least))


def cost_of(usage: Mapping[str, float], config: RequestsConfig) -> dict[str, float]:
    """Return the cost of `ChatTeacher.usage`; nothing without a price."""
    if config.price_in is None and config.price_out is None:
        return {}
    read, written = usage["tokens_read"], usage["tokens_written"]
    return {"cost": (read * (config.price_in or 0) + written * (config.price_out or 0)) / 1e6}


class ChatTeacher:
    """A chat model in an engine as a teacher; see `AskedCaptioner`.

    `usage` counts requests and tokens. All requests together have `requests.max_concurrency` in
    flight, those of one region after those of another, so that an engine may keep what it has read
    of the picture.
    """

    # Images may be given one by one from several threads, see `RegionScorer`.
    side_by_side = True

    def __init__(self, engine: Engine, config: TeacherConfig) -> None:
        self.engine = engine
        self.config = config
        self.usage = {"requests": 0, "tokens_read": 0, "tokens_written": 0}
        self._loop = asyncio.new_event_loop()
        self._slots = asyncio.Semaphore(config.requests.max_concurrency or engine.concurrency)
        threading.Thread(target=self._loop.run_forever, daemon=True).start()

    def score(self, images: Sequence[Pixels], prompts: Sequence[str]) -> PromptScores:
        """Refuse: settings with mode=prompts are refused for every engine but transformers."""
        raise DataError(f"label.teacher.engine={self.config.engine} scores no prompts")

    def caption(self, images: Sequence[Pixels], settings: CaptionConfig) -> list[list[Caption]]:
        """Return `settings.count` captions an image, without their log-probabilities (NaN)."""
        asked = [
            [description(self.config, settings, zlib.crc32(image.tobytes()))] for image in images
        ]
        return [
            [Caption(text.strip(), math.nan) for text in reply.texts]
            for (reply,) in self._replies(images, asked)
        ]

    def ask(self, images: Sequence[Pixels], phrases: Sequence[str]) -> Answers:
        """Return log P(yes) - log P(no) (R, P); token counts are those that a request read."""
        asked = [question_of(self.config, phrase) for phrase in phrases]
        replies = self._replies(images, [asked for _ in images])
        odds = [[log_odds(reply.first) for reply in of_region] for of_region in replies]
        counts = [reply.tokens_read for reply in replies[0]]
        return Answers(np.array(odds, np.float32), np.array(counts, np.int64))

    def _replies(
        self, images: Sequence[Pixels], asked: Sequence[Sequence[Request]]
    ) -> list[list[Reply]]:
        """Answer the requests about every image, side by side; the first failure is raised."""
        return asyncio.run_coroutine_threadsafe(self._gathered(images, asked), self._loop).result()

    async def _gathered(
        self, images: Sequence[Pixels], asked: Sequence[Sequence[Request]]
    ) -> list[list[Reply]]:
        tasks: list[list[asyncio.Task[Reply]]] = []
        failed: list[asyncio.Task[Reply]] = []

        def done(task: asyncio.Task[Reply]) -> None:
            self._slots.release()
            if not task.cancelled() and task.exception() is not None:
                failed.append(task)

        try:
            for image, requests in zip(images, asked, strict=True):
                picture = await asyncio.to_thread(self._picture, image)
                tasks.append([])
                for request in requests:
                    await self._slots.acquire()  # so that no more tasks exist than can run
                    tasks[-1].append(asyncio.create_task(self._one(picture, request)))
                    tasks[-1][-1].add_done_callback(done)
                    if failed:
                        await failed[0]
            return [await asyncio.gather(*of_region) for of_region in tasks]
        finally:
            for task in [task for of_region in tasks for task in of_region]:
                task.cancel()

    def _picture(self, image: Pixels) -> Any:
        return self.engine.picture(shrunk(image, self.config.max_pixels))

    async def _one(self, picture: Any, request: Request) -> Reply:
        reply = await self.engine.reply(picture, request)
        self.usage["requests"] += 1
        self.usage["tokens_read"] += reply.tokens_read
        self.usage["tokens_written"] += reply.tokens_written
        return reply
