"""Tiny CLIPs in open_clip's local-dir format, and a world of coloured images to learn."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

COLORS = {"red": (220, 40, 40), "green": (40, 200, 40), "blue": (40, 40, 220)}
CLASS_IDS = {"red": 7, "green": 3, "blue": 11}  # not their positions
VIT = {"image_size": 32, "patch_size": 8, "width": 32, "layers": 3, "head_width": 16}
RESNET = {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8, "head_width": 16}


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Tiny tensors gain nothing from threads and lose much where other tests run beside."""
    import torch

    torch.set_num_threads(1)


def save_tokenizer(folder: Path) -> int:
    """Save a word tokenizer that ends sentences with id 2; returns its vocabulary's size."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["a", "an", "the", "of", "photo", "picture", "image", "showing", "close-up", "object"]
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[EOS]", *words, *COLORS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A [EOS]", special_tokens=[("[EOS]", 2)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", eos_token="[EOS]"
    )
    fast.save_pretrained(folder)
    return len(vocabulary)


def save_clip(folder: Path, vision: dict[str, Any]) -> Path:
    """Save a randomly initialised CLIP with the given image tower."""
    import open_clip
    import torch
    from safetensors.torch import save_file

    folder.mkdir()
    text = {
        "context_length": 12,
        "vocab_size": save_tokenizer(folder),
        "hf_tokenizer_name": "own",
        "width": 32,
        "heads": 2,
        "layers": 1,
        "pool_type": "eos",
        "eos_id": 2,
    }
    model_cfg = {"embed_dim": 24, "vision_cfg": vision, "text_cfg": text}
    preprocess = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.25, 0.3]}
    (folder / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": model_cfg, "preprocess_cfg": preprocess})
    )
    torch.manual_seed(0)
    clip = open_clip.create_model(f"local-dir:{folder}")
    with torch.no_grad():
        for name, value in clip.state_dict().items():  # BatchNorm that is not the identity
            if name.endswith("running_mean"):
                value.normal_(0.0, 0.1)
            elif name.endswith(("running_var", "bn3.weight")):
                value.uniform_(0.5, 1.5)
    state = {name: value.contiguous() for name, value in clip.state_dict().items()}
    save_file(state, folder / "open_clip_model.safetensors")
    return folder


@pytest.fixture(scope="session")
def vit_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_clip(tmp_path_factory.mktemp("clip") / "vit", VIT)


@pytest.fixture(scope="session")
def resnet_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_clip(tmp_path_factory.mktemp("clip") / "resnet", RESNET)


@pytest.fixture(scope="session")
def color_table(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from hts_ray.classes import read_class_csv

    path = tmp_path_factory.mktemp("classes") / "colors.csv"
    rows = [f"{CLASS_IDS[name]},{name} object" for name in COLORS]
    path.write_text("class_id,name\n" + "\n".join(rows) + "\n")
    return read_class_csv(path)


@pytest.fixture(scope="session")
def color_world(tmp_path_factory: pytest.TempPathFactory) -> pa.Table:
    """48 images of one or two colours, as a labels table with image_id, uri and class ids."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("images")
    random = np.random.default_rng(0)
    names = list(COLORS)
    rows = []
    for i in range(48):
        chosen = list(random.choice(3, size=1 + i % 2, replace=False))
        pixels = random.integers(90, 130, (40, 48, 3)).astype(np.uint8)
        for place, c in enumerate(chosen):
            x = 4 + 22 * place
            pixels[8:32, x : x + 18] = COLORS[names[c]]
        path = folder / f"{i:03d}.png"
        Image.fromarray(pixels).save(path)
        ids = sorted(CLASS_IDS[names[c]] for c in chosen)
        rows.append(
            {"image_id": f"i{i:03d}", "uri": str(path), "positive_ids": ids, "ignored_ids": []}
        )
    schema = pa.schema(
        [
            ("image_id", pa.string()),
            ("uri", pa.string()),
            ("positive_ids", pa.list_(pa.int16())),
            ("ignored_ids", pa.list_(pa.int16())),
        ]
    )
    return pa.Table.from_pylist(rows, schema)


@pytest.fixture(scope="session")
def student_config(vit_path: Path) -> Any:
    from hts_ray.config import StudentConfig

    return StudentConfig(model=f"local-dir:{vit_path}", logit_scale=20.0, prompt_templates=2)


@pytest.fixture(scope="session")
def run_of(student_config, color_table) -> Any:
    """Return what makes a run of settings in a folder, with the colours as classes and seed 5."""
    from hts_ray.config import HtsConfig
    from hts_ray.engine.run import Run

    def make(folder: Any, **sections: Any) -> Run:
        settings = {"run_dir": str(folder), "seed": 5, "student": student_config, **sections}
        return Run(HtsConfig(**settings), color_table)

    return make
