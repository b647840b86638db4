"""An endpoint that speaks OpenAI's protocol as the engine of a chat model: vLLM, SGLang, a service.

The client library tries again what may pass, after growing pauses or as long as the server asks
for. What still fails is told apart: a wrong key, model or address ends the run, as does a server
that no longer answers anything; the rest is the fault of the image, which is quarantined.
"""

from __future__ import annotations

import asyncio
import base64
import io
import os
from textwrap import shorten
from typing import Any

import numpy as np
from PIL import Image

from hts_ray.config import TeacherConfig
from hts_ray.errors import ConfigError, DataError
from hts_ray.store.aliases import Pixels
from hts_ray.teacher.models.chat import Reply, Request, description, log_odds, question_of

FIELD = "label.teacher.endpoint"
KEY_FIELD = "label.teacher.requests.key_variable"
_TOP = 20  # the most likely tokens that OpenAI and vLLM return
_AT_START = 2  # retries of the first look at an endpoint, while somebody waits
# The request is at fault, and would be again: too large, too long, refused.
_REFUSED = {400, 413, 422}


class ServerError(DataError):
    """The server failed, over this image or altogether."""


class Endpoint:
    """See `hts_ray.teacher.models.chat.Engine`."""

    concurrency = 64

    def __init__(self, config: TeacherConfig, retries: int | None = None) -> None:
        import openai

        self._openai, self._config = openai, config
        asked = config.requests
        self._client = openai.AsyncOpenAI(
            base_url=config.endpoint,
            api_key=os.environ.get(asked.key_variable) or "none",  # many servers want no key
            timeout=asked.timeout,
            max_retries=asked.retries if retries is None else retries,
        )
        self._probe: asyncio.Task[Reply] | None = None

    def picture(self, image: Pixels) -> str:
        """Return an image as a data URL."""
        kind, buffer = self._config.image_format, io.BytesIO()
        options = {"quality": 95} if kind == "jpeg" else {"compress_level": 1}
        Image.fromarray(np.ascontiguousarray(image)).save(buffer, kind, **options)
        return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"

    async def reply(self, picture: str, request: Request) -> Reply:
        """Answer a request; see `Engine`."""
        try:
            return await self._sent(picture, request)
        except ServerError:
            # Is it this image? Requests that fail together wait for one answer.
            if self._probe is None or self._probe.done():
                self._probe = asyncio.ensure_future(self.probe())
            try:
                await asyncio.shield(self._probe)
            except DataError as error:
                remedy = "see to it, then run the command again: finished images stay as they are"
                raise self._error(f"no longer answers: {error}", remedy) from None
            raise

    async def close(self) -> None:
        """Close the connections."""
        await self._client.close()

    async def probe(self) -> Reply:
        """Ask what a run asks, about a plain picture."""
        config = self._config
        picture = self.picture(np.full((64, 64, 3), 128, np.uint8))
        asked = question_of(config, "a person")
        if config.mode == "captions":
            asked = description(config, config.caption)
        return await self._sent(picture, asked)

    async def _sent(self, picture: str, request: Request) -> Reply:
        openai, options = self._openai, dict[str, Any](request.sampling)
        if request.odds:
            options |= {"logprobs": True, "top_logprobs": _TOP}
        if request.count > 1:
            options["n"] = request.count
        content = [
            {"type": "image_url", "image_url": {"url": picture}},
            {"type": "text", "text": request.words},
        ]
        messages: Any = [{"role": "user", "content": content}]
        try:
            answer = await self._client.chat.completions.create(
                model=self._config.model,
                messages=messages,
                max_tokens=request.max_tokens,
                extra_body=dict(self._config.engine_options),
                **options,
            )
        except openai.APIStatusError as error:
            raise await self._explained(error) from None
        except openai.APIConnectionError as error:  # also its timeouts
            reason = error.__cause__ or error
            message = f"{type(reason).__name__}: {reason}".rstrip(": ")
            raise ServerError(f"no answer ({message})") from None
        except (openai.OpenAIError, ValueError) as error:
            raise DataError(f"an answer that cannot be read ({_short(error)})") from None
        return _read(answer, request)

    async def _explained(self, error: Any) -> Exception:
        """Return what a status that is an error means."""
        status, key = error.status_code, self._config.requests.key_variable
        if status in {401, 403}:
            said = "refuses the key in" if os.environ.get(key) else "asks for a key, not given in"
            remedy = f"set that variable on every node, or name another one in {KEY_FIELD}"
            return self._error(f"{said} {key} (HTTP {status})", remedy)
        told = f"HTTP {status}: {_short(error.message)}"
        if status == 404:
            return ConfigError(
                f"{self._config.endpoint} does not know it ({told})",
                field="label.teacher.model",
                value=self._config.model,
                remedy=await self._offers(),
            )
        return DataError(told) if status in _REFUSED else ServerError(told)

    async def _offers(self) -> str:
        """Return the models that the endpoint has, as a remedy."""
        try:
            names = [model.id async for model in self._client.models.list()]
        except (self._openai.OpenAIError, ValueError, AttributeError, TypeError):
            return f"check the address, which often ends with /v1 ({FIELD})"
        return f"it offers {shorten(', '.join(names), 300)}"

    def _error(self, message: str, remedy: str) -> ConfigError:
        return ConfigError(message, field=FIELD, value=self._config.endpoint, remedy=remedy)


def check_endpoint(config: TeacherConfig) -> None:
    """Ask an endpoint what a run would ask it; ConfigError where it does not answer that."""

    async def answer() -> Reply:
        endpoint = Endpoint(config, min(_AT_START, config.requests.retries))
        try:
            return await endpoint.probe()
        finally:
            await endpoint.close()

    try:
        reply = asyncio.run(answer())
        if config.mode == "questions":
            log_odds(reply.first)
    except DataError as error:
        remedy = "see that this model takes pictures"
        if isinstance(error, ServerError):
            remedy = "check the address, which often ends with /v1, and that its server runs"
        elif config.mode == "questions":
            remedy += ", gives log-probabilities and answers label.teacher.question with yes or no"
        raise ConfigError(str(error), field=FIELD, value=config.endpoint, remedy=remedy) from None


def _read(answer: Any, request: Request) -> Reply:
    """Return what an answer says; DataError for one that says nothing."""
    first: list[tuple[str, float]] = []
    try:
        choices, usage = answer.choices, answer.usage
        texts = [choice.message.content or "" for choice in choices]
        ended = choices[0].finish_reason
        if request.odds and choices[0].logprobs is None:
            raise DataError(
                "it gives no log-probabilities (`logprobs`), which mode=questions needs"
            )
        if request.odds:
            candidates = choices[0].logprobs.content[0].top_logprobs
            first = [(candidate.token, candidate.logprob) for candidate in candidates]
    except (AttributeError, TypeError, IndexError) as error:
        raise DataError(f"an answer that cannot be read ({_short(error)})") from None
    if not request.odds and not all(texts):
        raise DataError(f"an empty answer (finish_reason={ended})")
    read, written = (
        getattr(usage, name, 0) or 0 for name in ("prompt_tokens", "completion_tokens")
    )
    return Reply(texts, first, read, written)


def _short(error: object) -> str:
    return shorten(str(error), 300)
