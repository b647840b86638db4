"""vLLM inside the actors as the engine of a chat model.

It reads what the package's own scoring reads: the same text of the chat template, the same answer
tokens. What its engine process cannot recover from is raised as vLLM's EngineDeadError, upon which
the actor ends itself, as ray.data.llm does in `vllm_engine_stage.py`.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from hts_ray.config import TeacherConfig
from hts_ray.store.aliases import Pixels
from hts_ray.teacher.models.catalog import model_error
from hts_ray.teacher.models.chat import Reply, Request, question_of
from hts_ray.teacher.models.families import Loaded, answer_tokens, chat_of

_KEPT = 4096  # texts of the template


class Vllm:
    """See `hts_ray.teacher.models.chat.Engine`.

    `device` is as for `load_captioner`: with "auto" every GPU of the process holds a part.
    """

    concurrency = 256

    def __init__(self, config: TeacherConfig, folder: Path, device: str) -> None:
        import vllm

        loaded = Loaded(config, folder, None)
        self._chat, self._tokenizer = chat_of(loaded), loaded.processor.tokenizer
        self._text = functools.lru_cache(_KEPT)(self._written)
        self._answers = None
        if config.mode == "questions":
            begun = self._text(question_of(config, "a person").words, True)
            self._answers = answer_tokens(config, self._tokenizer, begun)
        options = {
            "model": str(folder),
            "dtype": config.dtype,
            "tensor_parallel_size": torch.cuda.device_count() if device == "auto" else 1,
            "trust_remote_code": config.trust_remote_code,
            "limit_mm_per_prompt": {"image": 1},
            "enable_prefix_caching": True,  # the questions about a region share its picture
            "disable_log_stats": True,
            **config.engine_options,
        }
        try:
            arguments = vllm.AsyncEngineArgs(**options)
            self._engine = vllm.AsyncLLMEngine.from_engine_args(arguments)
        except (TypeError, ValueError, RuntimeError, OSError) as error:
            reason = f"vLLM does not load it: {type(error).__name__}: {error}"
            remedy = "see vLLM's log above and label.teacher.engine_options"
            raise model_error(config, reason, remedy) from error
        self._vllm, self._numbers = vllm, itertools.count()

    def picture(self, image: Pixels) -> dict[str, Any]:
        """Return an image as vLLM takes it, with a name by which it knows the picture again."""
        pixels = np.ascontiguousarray(image)
        name = hashlib.sha256(pixels.tobytes() + str(pixels.shape).encode()).hexdigest()
        return {
            "multi_modal_data": {"image": Image.fromarray(pixels)},
            "multi_modal_uuids": {"image": [name]},
        }

    async def reply(self, picture: dict[str, Any], request: Request) -> Reply:
        """Answer a request; see `Engine`."""
        text, start = self._text(request.words, request.odds), self._tokenizer.bos_token
        parameters = self._vllm.SamplingParams(
            n=request.count,
            max_tokens=request.max_tokens,
            logprob_token_ids=list(self._answers.both) if self._answers and request.odds else None,
            output_kind=self._vllm.sampling_params.RequestOutputKind.FINAL_ONLY,
            **request.sampling,
        )
        stream = self._engine.generate(
            {"prompt": text, **picture},
            parameters,
            str(next(self._numbers)),
            # A chat template may have written the start token that the tokenizer would add.
            tokenization_kwargs={"add_special_tokens": not (start and text.startswith(start))},
        )
        (output,) = [output async for output in stream]
        first = []
        if self._answers is not None and request.odds:
            found = output.outputs[0].logprobs[0]
            for word, tokens in (("yes", self._answers.yes), ("no", self._answers.no)):
                first += [(word, found[token].logprob) for token in tokens]
        written = sum(len(one.token_ids) for one in output.outputs)
        read = len(output.prompt_token_ids)
        return Reply([one.text for one in output.outputs], first, read, written)

    def _written(self, words: str, odds: bool) -> str:
        """Return the text in front of an answer."""
        text, glue = self._chat(words)
        # The token of yes or no may hold the space in front of it.
        return f"{text}{glue}".rstrip(" ") if odds else text
