"""Shared fixtures: one Ray cluster a session, and tiny captioners in their on-disk format."""

from __future__ import annotations

import atexit
import os
import shutil
import sys
import tempfile

os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # both are read when ray is imported
os.environ.setdefault("RAY_DATA_PARQUET_FOOTER_NUM_ACTORS", "1")
os.environ.setdefault("RAY_DATA_USE_DATASOURCE_V2", "0")  # as hts_ray.runtime sets it
# On a crowded machine Ray's node agent starts slowly, and the node then aborts.
os.environ.setdefault("RAY_agent_register_timeout_ms", "120000")
os.environ.setdefault("RAY_TRAIN_ENABLE_V2_MIGRATION_WARNINGS", "0")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models lose by threads that wait for cores
# Modules that tests write here can be imported by the workers of the shared cluster too.
PLUGINS = tempfile.mkdtemp(prefix="hts-plugins-")
atexit.register(shutil.rmtree, PLUGINS, ignore_errors=True)
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [PLUGINS, os.environ.get("PYTHONPATH")]))
sys.path.insert(0, PLUGINS)

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

TEXTS = [
    f"a person {verb} a {noun}"
    for verb in ("riding", "holding", "washing", "sitting on")
    for noun in ("bicycle", "horse", "hot dog", "dog", "bicycle wheel")
]
SMALL = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
VISION = {**SMALL, "image_size": 32, "patch_size": 8}


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            raise RuntimeError("a test marked gpu was selected on a machine without one")


@pytest.fixture(scope="session")
def plugins() -> Path:
    """Return a folder whose modules tests and their Ray workers can import."""
    return Path(PLUGINS)


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """One local Ray cluster of 4 logical CPUs and 2 logical GPUs."""
    import ray

    for attempt in range(3):
        try:
            ray.init(
                address="local",
                num_cpus=4,
                num_gpus=2,
                include_dashboard=False,
                object_store_memory=200_000_000,
                log_to_driver=False,
            )
            break
        except Exception:  # Ray gives a node 30 s to start, too little on a crowded machine
            ray.shutdown()
            if attempt == 2:
                raise
    yield
    ray.shutdown()


def perturb(model: Any, seed: int = 0) -> None:
    """Move weights away from their near-uniform start: there, wrong scores look right."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn(parameter.shape, generator=generator))


def word_pieces() -> Any:
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
    from transformers import BertTokenizer

    trained = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    trained.normalizer = normalizers.BertNormalizer()
    trained.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = trainers.WordPieceTrainer(vocab_size=200, special_tokens=special, show_progress=False)
    trained.train_from_iterator(TEXTS, trainer)
    return BertTokenizer(vocab=trained.get_vocab())


def byte_pieces(special: list[str]) -> tuple[Any, Any]:
    """Return vocabulary and merges of a byte-level BPE."""
    import json

    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    trained.train_from_iterator(TEXTS, trainer)
    model = json.loads(trained.to_str())["model"]
    return model["vocab"], [tuple(merge) for merge in model["merges"]]


@pytest.fixture(scope="session")
def tiny_blip_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a BLIP of 2 + 2 layers, stored as float16 like the packaged one."""
    import torch
    from transformers import (
        BlipConfig,
        BlipForConditionalGeneration,
        BlipImageProcessor,
        BlipProcessor,
    )

    folder = tmp_path_factory.mktemp("tiny") / "blip"
    tokenizer = word_pieces()
    tokenizer.add_special_tokens({"bos_token": "[DEC]"})
    text = {
        **SMALL,
        "vocab_size": len(tokenizer),
        "encoder_hidden_size": 32,
        "max_position_embeddings": 64,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.sep_token_id,
        "sep_token_id": tokenizer.sep_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    model = BlipForConditionalGeneration(
        BlipConfig(
            vision_config=VISION, text_config=text, image_text_hidden_size=32, projection_dim=32
        )
    )
    perturb(model)
    model.to(torch.float16).save_pretrained(folder)
    image_processor = BlipImageProcessor(size={"height": 32, "width": 32})
    BlipProcessor(image_processor, tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_git_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a GIT of 2 + 2 layers."""
    from transformers import CLIPImageProcessor, GitConfig, GitForCausalLM, GitProcessor

    folder = tmp_path_factory.mktemp("tiny") / "git"
    tokenizer = word_pieces()
    model = GitForCausalLM(
        GitConfig(
            vision_config=VISION,
            vocab_size=len(tokenizer),
            max_position_embeddings=64,
            bos_token_id=tokenizer.cls_token_id,
            eos_token_id=tokenizer.sep_token_id,
            pad_token_id=tokenizer.pad_token_id,
            **SMALL,
        )
    )
    perturb(model)
    model.save_pretrained(folder)
    size = {"height": 32, "width": 32}
    image_processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=size)
    GitProcessor(image_processor, tokenizer).save_pretrained(folder)
    return folder


def save_encoder_decoder(folder: Path, decoder_config: Any, tokenizer: Any) -> Path:
    """Save a ViT with any text decoder as a VisionEncoderDecoder."""
    from transformers import (
        AutoModelForCausalLM,
        TrOCRProcessor,
        VisionEncoderDecoderModel,
        ViTConfig,
        ViTImageProcessor,
        ViTModel,
    )

    decoder_config.is_decoder = decoder_config.add_cross_attention = True
    encoder = ViTModel(ViTConfig(**VISION), add_pooling_layer=False)
    model = VisionEncoderDecoderModel(
        encoder=encoder, decoder=AutoModelForCausalLM.from_config(decoder_config)
    )
    model.config.decoder_start_token_id = tokenizer.cls_token_id
    model.config.eos_token_id = tokenizer.sep_token_id
    model.config.pad_token_id = tokenizer.pad_token_id
    perturb(model)
    model.save_pretrained(folder)
    image_processor = ViTImageProcessor(size={"height": 32, "width": 32})
    TrOCRProcessor(image_processor, tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_vit_bert_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a VisionEncoderDecoder of ViT and BERT."""
    from transformers import BertConfig

    tokenizer = word_pieces()
    config = BertConfig(vocab_size=len(tokenizer), max_position_embeddings=64, **SMALL)
    return save_encoder_decoder(tmp_path_factory.mktemp("tiny") / "vit-bert", config, tokenizer)
