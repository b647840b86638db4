"""A chat model's processor beside the model, and in turn with it.

The processors of Qwen2.5-VL and SmolVLM2, as their checkpoints have them, prepare the regions of a
few images in the default grid (14 each), 64 to a slice, for a model that sleeps as long as a GPU
would compute: two operations a parameter and token, of the picture and of 400 nodes of prompts, at
4e14 a second. In turn prepares a group of 16 regions, sleeps, and so on; beside is what a teacher
does. The two alternate; medians of the rounds. What is possible is the longer of preparing alone
(in turn, without the sleep) and sleeping alone.

    python benchmarks/preparation.py
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import gpu
import numpy as np
import torch
from measured import measured_on, write_results
from PIL import Image

from hts_ray.config import RegionsConfig, TeacherConfig
from hts_ray.engine.console import print_rows
from hts_ray.images.crops import CropBatch
from hts_ray.images.decode import DecodedImage
from hts_ray.store.aliases import FloatArray, Pixels
from hts_ray.teacher.models import inputs
from hts_ray.teacher.models.catalog import INSTRUCTION
from hts_ray.teacher.models.families import Loaded, chat_of, processed
from hts_ray.teacher.models.inputs import RegionInputs
from hts_ray.teacher.scorers import ImageTask, RegionScorer

SIZES = ((640, 480), (1024, 768), (2048, 1536))
PARAMETERS = {"Qwen2.5-VL 3B": 3.1e9, "SmolVLM2 2.2B": 1.8e9}
FLOPS, NODES, GROUP, SLICE = 4e14, 400, 16, 64
SMOL_TEMPLATE = (
    "<|im_start|>{% for message in messages %}{{message['role'] | capitalize}}:"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{line['text']}}"
    "{% else %}<image>{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)


def smolvlm(folder: Path) -> None:
    """Save the processor of a SmolVLM2 of 2.2B, with a tokenizer of bytes."""
    from tokenizers import pre_tokenizers
    from transformers import (
        GPT2Tokenizer,
        SmolVLMImageProcessor,
        SmolVLMProcessor,
        SmolVLMVideoProcessor,
    )

    special = ["<|im_start|>", "<fake_token_around_image>", "<image>", "<global-img>"]
    special += ["<end_of_utterance>"]
    special += [f"<row_{row + 1}_col_{column + 1}>" for row in range(6) for column in range(6)]
    words = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = GPT2Tokenizer(
        vocab={word: number for number, word in enumerate(words)},
        merges=[],
        bos_token="<|im_start|>",
        eos_token="<end_of_utterance>",
        unk_token="<|im_start|>",
        pad_token="<|im_start|>",
    )
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    largest = {"size": {"longest_edge": 1536}, "max_image_size": {"longest_edge": 384}}
    sampling = {"fps": 1, "max_frames": 64, "video_size": {"longest_edge": 384}}
    SmolVLMProcessor(
        SmolVLMImageProcessor(**largest),
        tokenizer,
        SmolVLMVideoProcessor(video_sampling=sampling, **largest),
        image_seq_len=81,
        chat_template=SMOL_TEMPLATE,
    ).save_pretrained(folder)


def qwen(folder: Path) -> None:
    """Save the processor of a Qwen2.5-VL, which takes pictures of up to 12.8 million pixels."""
    gpu.chat(folder, False, [INSTRUCTION])
    file = folder / "processor_config.json"
    settings = json.loads(file.read_text("utf-8"))
    settings["image_processor"]["size"]["longest_edge"] = 12_845_056
    file.write_text(json.dumps(settings), "utf-8")


class Sleeper:
    """A teacher whose model sleeps.

    `prepared` and `slept` count the seconds of each; the processor works beside the sleep, or not.
    """

    def __init__(self, name: str, folder: Path) -> None:
        model = SimpleNamespace(dtype=torch.float32, device=torch.device("cpu"))
        loaded = Loaded(TeacherConfig(model=str(folder)), folder, model)
        self.prepare = processed(loaded, chat_of(loaded)(INSTRUCTION)[0])
        self.parameters = PARAMETERS[name]
        self.beside = True
        self.slept = 0.0

    def scores(self, crops: Sequence[Pixels], _captions: object) -> FloatArray:
        """Prepare a slice's regions by groups, and sleep over each."""
        regions = RegionInputs(crops, self.prepare(crops).process, "cuda")
        made: Iterable[Any] = regions if self.beside else map(regions.process, crops)
        waiting = iter(made)
        while group := list(islice(waiting, GROUP)):
            tokens = sum(one["input_ids"].shape[1] + NODES for one in group)
            seconds = 2 * self.parameters * tokens / FLOPS
            self.slept += seconds
            time.sleep(seconds)
        return np.zeros((len(crops), 1), np.float32)


def measure(name: str, folder: Path, size: tuple[int, int], images: int, rounds: int) -> Any:
    """Return the rates of a processor at one size of images."""
    sleeper = Sleeper(name, folder)
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
    pixels = np.asarray(noise.resize(size, Image.Resampling.BICUBIC))
    tasks = [ImageTask(DecodedImage(pixels, *size)) for _ in range(images)]
    captioner: Any = sleeper
    scorer = RegionScorer(captioner, sleeper.scores, RegionsConfig(), chunk=SLICE)
    taken: dict[str, list[float]] = {"beside": [], "in_turn": [], "prepared": []}
    regions = 0
    for _ in range(rounds):
        for way in ("in_turn", "beside"):
            sleeper.beside, sleeper.slept = way == "beside", 0.0
            started = time.perf_counter()
            results: Any = scorer(tasks)
            taken[way].append(time.perf_counter() - started)
            regions = sum(len(result.regions) for result in results)
        taken["prepared"].append(taken["in_turn"][-1] - sleeper.slept)
    seconds = {way: statistics.median(values) for way, values in taken.items()}
    possible = max(seconds["prepared"], sleeper.slept)
    return {
        "processor": name,
        "image": f"{size[0]} x {size[1]}",
        "regions": regions,
        "prepare_ms": 1000 * seconds["prepared"] / regions,
        "model_ms": 1000 * sleeper.slept / regions,
        "in_turn": regions / seconds["in_turn"],
        "beside": regions / seconds["beside"],
        "beside_over_in_turn": seconds["in_turn"] / seconds["beside"],
        "share_of_possible": possible / seconds["beside"],
        "seconds": taken,
    }


def bytes_sent(images: int = 16, regions: int = 14) -> dict[str, float]:
    """Count what 224 regions of 16 images of 2048 x 1536 send to a device, in slices of 64."""
    pixels = [np.zeros((1536, 2048, 3), np.uint8) for _ in range(images)]
    crops = CropBatch(pixels, [(n % images, (n, n, 800, 800)) for n in range(images * regions)])
    with patch.object(inputs, "to_device", side_effect=lambda tensor, device: tensor) as sent:
        for first in range(0, len(crops), SLICE):
            inputs.on_device(crops[first : first + SLICE], "cpu")
    total, whole = (
        sum(call.args[0].nbytes for call in sent.mock_calls),
        sum(p.nbytes for p in pixels),
    )
    return {"images_mb": whole / 1e6, "sent_mb": total / 1e6, "ratio": total / whole}


def main() -> None:
    """Measure, print a table and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=gpu.RESULTS.with_name("preparation.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folders = {model: Path(name) / str(n) for n, model in enumerate(PARAMETERS)}
        for save, folder in zip((qwen, smolvlm), folders.values(), strict=True):
            save(folder)
        for model, folder in folders.items():
            for size in SIZES:
                rows.append(measure(model, folder, size, options.images, options.rounds))
                print(rows[-1])
    shown = ["processor", "image", "prepare_ms", "model_ms", "in_turn", "beside"]
    shown += ["beside_over_in_turn", "share_of_possible"]
    table = [
        [row[key] if isinstance(row[key], str) else f"{row[key]:.2f}" for key in shown]
        for row in rows
    ]
    print_rows("preparation", shown, table, text_columns=2)
    settings = {"images": options.images, "rounds": options.rounds, "group": GROUP, "slice": SLICE}
    results = {**measured_on(), "settings": settings, "rows": rows, "sent": bytes_sent()}
    write_results(options.output, results)


if __name__ == "__main__":
    main()
