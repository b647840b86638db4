"""Pretraining of the built-in world's models, with a few steps each."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import open_clip
import pretraining
import pytest
import torch

import hts_ray
from hts_ray.classes import hico_classes
from hts_ray.demo import world as synthetic

TINY = pretraining.PretrainSettings(
    num_scenes=24, crops_per_scene=2, batch_size=8, clip_epochs=1.0, captioner_epochs=0.5, workers=1
)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("models")
    pretraining.pretrain(folder, seed=3, settings=TINY)
    return folder


def test_equal_seeds_give_equal_files(models: Path, tmp_path: Path) -> None:
    """Catches unseeded weights, batches or captions: the shipped models could not be made again."""
    pretraining.pretrain(tmp_path, seed=3, settings=TINY)
    files = sorted(p.relative_to(models) for p in models.rglob("*") if p.is_file())
    assert any(file.name == "model.safetensors" for file in files)
    assert any(file.name == "open_clip_model.safetensors" for file in files)
    for file in files:
        assert (models / file).read_bytes() == (tmp_path / file).read_bytes(), file


def test_no_scene_of_a_demo_split_is_in_the_corpus() -> None:
    """Catches a corpus that shares its seed space with the splits that results are measured on."""
    corpus = {
        synthetic.sample_scene(seed, pretraining.CORPUS_SPLIT, index, 0.0).seed
        for seed in range(2)
        for index in range(100)
    }
    splits = {
        synthetic.sample_scene(seed, split, index).seed
        for split in ("train", "test")
        for seed in range(2)
        for index in range(100)
    }
    assert len(corpus) == 200
    assert not corpus & splits


def test_both_models_load_with_the_real_loaders(models: Path) -> None:
    """Catches checkpoints that only our own code could read."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    captioner = AutoModelForImageTextToText.from_pretrained(
        models / "world_captioner", dtype=torch.float32
    ).eval()
    processor = AutoProcessor.from_pretrained(models / "world_captioner")
    image = synthetic.render_scene(synthetic.sample_scene(3, "train", 0))
    inputs = processor(images=image, return_tensors="pt")
    tokens = captioner.generate(**inputs, max_new_tokens=4)
    assert processor.batch_decode(tokens)[0].startswith("[CLS]")

    name = f"local-dir:{models / 'world_clip'}"
    clip, _, _ = open_clip.create_model_and_transforms(name)
    tokenize = open_clip.get_tokenizer(name)
    size = pretraining.CLIP_IMAGE_SIZE
    with torch.no_grad():
        features = clip.encode_image(torch.zeros(2, 3, size, size))
        texts = clip.encode_text(tokenize(["a person riding a horse", "a dog"]))
    assert features.shape == texts.shape == (2, 128)


def test_the_vocabulary_covers_every_prompt_and_every_caption() -> None:
    """Catches prompts that become [UNK], which all classes would share."""
    tokenizer = pretraining.build_tokenizer()
    rng = np.random.default_rng(0)
    specs = [synthetic.sample_scene(3, "pretraining", i, 0.0) for i in range(300)]
    texts = [pretraining.alt_text(spec, rng, TINY) for spec in specs]
    texts += [pretraining.caption(spec, (0, 0, spec.width, spec.height), rng) for spec in specs]
    texts += [prompt for prompts in hico_classes().prompts for prompt in prompts]
    ids = pretraining.encode_texts(tokenizer, texts, 32)
    assert not (ids == tokenizer.unk_token_id).any()


def test_captions_state_whole_interactions_only() -> None:
    """Catches captions of what a crop cuts off: the teacher would learn to hallucinate."""
    rng = np.random.default_rng(0)
    for index in range(60):
        spec = synthetic.sample_scene(3, "train", index)
        prompts = [hico_classes()[c].prompts[0] for c in spec.class_ids]
        whole = pretraining.caption(spec, (0, 0, spec.width, spec.height), rng)
        assert sum(prompt in whole for prompt in prompts) >= 1
        assert not any(p in pretraining.caption(spec, (0, 0, 1, 1), rng) for p in prompts)


def test_alt_text_names_the_verb_of_few_classes() -> None:
    """Catches a world whose zero-shot student needs no teacher: most verbs must stay unsaid."""
    rng = np.random.default_rng(0)
    frequent = synthetic.class_ids_by_frequency()
    rare = set(frequent[TINY.num_literal_classes :])
    for index in range(300):
        spec = synthetic.sample_scene(3, "pretraining", index, 0.0)
        text = pretraining.alt_text(spec, rng, TINY)
        said = [c for c in spec.class_ids if hico_classes()[c].prompts[0] in text]
        assert not rare.intersection(said)


@pytest.mark.parametrize("name", ["teacher/builtin/world_captioner", "student/builtin/world_clip"])
def test_the_packaged_models_are_small(name: str) -> None:
    """Catches weights stored in full precision, which would double the package."""
    folder = Path(hts_ray.__file__).parent / name
    size = sum(path.stat().st_size for path in folder.iterdir())
    assert 100_000 < size < 6_000_000
