"""Time the prompt trie against plain forwards and against batched prompts, 600 HICO prompts.

    python benchmarks/trie_speed.py [--rounds 3] [--naive 4] [--batched 60]

BLIP-base and GIT-base shapes with random weights (the cost does not depend on them), one thread,
float32, process CPU seconds. Per region: `naive` encodes the image for every prompt, as one call of
a transformers model a prompt does; `batched` encodes it once and runs prompts as padded batches
behind its cache; `trie` is what the teacher does. Naive and batched are run on a few prompts and
scaled to 600. All are timed in turn, round by round, and compared by the median of the rounds'
ratios. Tokens are CLIP's byte pairs of the 600 primary prompts, as neither vocabulary is at hand.
The largest difference of the scores is printed too.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from measured import measured_on, write_results
from torch import Tensor

from hts_ray.classes import hico_classes
from hts_ray.teacher.models.architectures import (
    CrossAttentionDecoder,
    GitDecoder,
)
from hts_ray.teacher.scoring.decoders import Decoder

RESULTS = Path(__file__).parent / "results" / "trie_speed.json"
START, END = 101, 102
BATCH = 64


def hico_tokens(append_eos: bool) -> list[list[int]]:
    """Return the tokens of the 600 primary prompts, numbered densely from 1,000."""
    from open_clip import SimpleTokenizer

    tokenizer = SimpleTokenizer()
    encoded = [tokenizer.encode(prompt) for prompt in hico_classes().primary_prompts]
    numbers: dict[int, int] = {}
    dense = [[1000 + numbers.setdefault(token, len(numbers)) for token in p] for p in encoded]
    return [[*sequence, END] if append_eos else sequence for sequence in dense]


def blip_base() -> tuple[Decoder, Decoder, int]:
    """Return BLIP-base by trie and by batches, and its image size."""
    from transformers import BlipConfig, BlipForConditionalGeneration

    model = BlipForConditionalGeneration(BlipConfig(vision_config={"image_size": 384})).eval()

    def features(pixels: Tensor) -> Tensor:
        hidden: Tensor = model.vision_model(pixel_values=pixels).last_hidden_state
        return hidden

    ends: dict[str, Any] = {"start_ids": [START], "end_ids": [END]}
    trie = CrossAttentionDecoder(model, model.text_decoder, features, **ends)
    batched = CrossAttentionDecoder(model, model.text_decoder, features, by_trie=False, **ends)
    return trie, batched, 384


def git_base() -> tuple[Decoder, Decoder, int]:
    """Return GIT-base by trie and by batches, and its image size."""
    from transformers import GitConfig, GitForCausalLM

    model = GitForCausalLM(GitConfig(vision_config={"image_size": 224})).eval()
    decoder = GitDecoder(model, start_ids=[START], end_ids=[END])
    return decoder, GitDecoder(model, start_ids=[START], end_ids=[END], by_trie=False), 224


def cpu_seconds(call: Callable[[], Tensor]) -> tuple[float, Tensor]:
    """Return the process CPU seconds of a call, and its result."""
    started = time.process_time()
    result = call()
    return time.process_time() - started, result


@torch.inference_mode()
def compare(
    build: Callable[[], tuple[Decoder, Decoder, int]],
    sequences: Sequence[list[int]],
    options: argparse.Namespace,
) -> dict[str, Any]:
    """Time the three ways in turn; seconds a region of all prompts."""
    trie, batched, side = build()
    batched.prompt_batch = BATCH
    batched.row_bytes = lambda prefix, longest: 1  # type: ignore[method-assign]  # as many as that
    image = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(0))
    spread = [len(sequences) * i // options.naive for i in range(options.naive)]
    some = [len(sequences) * i // options.batched for i in range(options.batched)]
    trie.log_likelihoods(image, sequences[:8])
    rounds = []
    error = 0.0
    for _ in range(options.rounds):
        trie_s, scores = cpu_seconds(lambda: trie.log_likelihoods(image, sequences))
        naive_s, plain = cpu_seconds(
            lambda: torch.stack([trie.reference(image, sequences[i]) for i in spread], dim=1)
        )
        batched_s, padded = cpu_seconds(
            lambda: batched.log_likelihoods(image, [sequences[i] for i in some])
        )
        encode_s, _ = cpu_seconds(lambda: trie.encode(image).root)
        error = max(
            error,
            float((scores[:, spread] - plain).abs().max()),
            float((scores[:, some] - padded).abs().max()),
        )
        naive_s *= len(sequences) / len(spread)
        # The image is encoded once however many prompts follow.
        batched_s = encode_s + (batched_s - encode_s) * len(sequences) / len(some)
        rounds.append((trie_s, naive_s, batched_s, encode_s))
    trie_s, naive_s, batched_s, encode_s = (statistics.median(c) for c in zip(*rounds, strict=True))
    return {
        "trie_s": trie_s,
        "naive_s": naive_s,
        "batched_s": batched_s,
        "encode_s": encode_s,
        "naive_over_trie": statistics.median(n / t for t, n, _, _ in rounds),
        "batched_over_trie": statistics.median(b / t for t, _, b, _ in rounds),
        "max_difference_nats": error,
    }


def main() -> None:
    """Print and store the comparison."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--naive", type=int, default=4, help="prompts timed naively")
    parser.add_argument("--batched", type=int, default=60, help="prompts timed as a batch")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows = []
    print("model      eos    encode s   trie s  batched s   naive s  batched/trie  naive/trie  |d|")
    for name, build in (("BLIP-base", blip_base), ("GIT-base", git_base)):
        for append_eos in (False, True):
            row = compare(build, hico_tokens(append_eos), options)
            rows.append({"model": name, "append_eos": append_eos, **row})
            print(
                f"{name:10} {append_eos!s:5} {row['encode_s']:9.2f} {row['trie_s']:8.2f}"
                f" {row['batched_s']:10.1f} {row['naive_s']:9.0f}"
                f" {row['batched_over_trie']:12.1f}x {row['naive_over_trie']:9.0f}x"
                f"  {row['max_difference_nats']:.0e}",
                flush=True,
            )
    settings = {key: value for key, value in vars(options).items() if key != "out"}
    report = {**measured_on(), "settings": {**settings, "threads": 1}, "rows": rows}
    write_results(options.out, report)


if __name__ == "__main__":
    main()
