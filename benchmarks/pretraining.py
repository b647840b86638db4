"""Pretrains the built-in world's two models from scratch: a captioner and a CLIP.

The corpus is rendered from its own seed space, so no scene of a demo split is in it. The captioner
reads plain captions of crops. The CLIP reads alt-text, which names roles ("a jockey") and objects
far more often than verbs: its image features tell verbs apart, yet the class prompts ("a person
riding a horse") stay poorly aligned with them. That is the situation HTS is meant for, and it is
an assumption of this world.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from hts_ray.classes import hico_classes, noun_phrase
from hts_ray.demo.figures import Box, sketch
from hts_ray.demo.world import (
    SceneSpec,
    class_ids_by_frequency,
    derive_seed,
    render_scene,
    sample_scene,
)

logger = logging.getLogger(__name__)

CORPUS_SPLIT = "pretraining"
DEFAULT_SEED = 100
SCENE_SIZE = 96
CLIP_IMAGE_SIZE = 80
CAPTIONER_IMAGE_SIZE = 64
CAPTION_LENGTH = 24
CLIP_CONTEXT_LENGTH = 16
_PAD, _UNK, _CLS, _SEP = "[PAD]", "[UNK]", "[CLS]", "[SEP]"

# What alt-text calls the person (or the moment) of a class. No word of the class's prompt but its
# object's name may stand here.
_ROLES: dict[int, tuple[str, ...]] = {
    18: ("a cyclist", "tour de france", "a commuter on two wheels"),
    139: ("a jockey", "an equestrian", "a cowboy in the saddle"),
    125: ("a dog owner with a leash", "time for walkies", "leash training"),
    89: ("a seated student", "waiting room", "take a seat"),
    493: ("a goalkeeper with the match ball", "team captain portrait"),
    577: ("rain shower", "staying dry in the rain", "singing in the rain"),
    153: ("a biker", "moto racer", "biker on the highway"),
    459: ("a skater", "skate park cruiser"),
    523: ("a surfer", "surf champion", "catching a wave"),
    67: ("a motorist", "a taxi driver", "road trip"),
    245: ("lunch break in the park", "a seated pensioner"),
    495: ("a striker", "penalty shot", "free kick goal"),
    370: ("windy day flight", "kite festival", "up in the sky"),
    115: ("puppy cuddle", "adopted puppy in my arms"),
    516: ("walk to the beach", "surf instructor heading out"),
    129: ("carrot treat for the pony", "stable snack"),
    16: ("flat tyre uphill", "out of breath on the hill"),
    120: ("good boy", "kneeling dog lover"),
    75: ("a pedestrian in the car park", "car salesman"),
    500: ("throw in", "a pitcher", "quarterback pass"),
    143: ("a groom leading the pony", "horse on a halter"),
    244: ("a nap in the park", "a sleeping tramp"),
    456: ("skater portrait", "new deck in hand"),
    74: ("car wash", "soap and foam for the car"),
    457: ("an ollie", "big air trick"),
    23: ("bicycle shop customer", "bicycle rack bystander"),
    371: ("kite maker", "kite shop display"),
    86: ("a mover", "furniture delivery"),
    17: ("a mechanic", "workshop tools"),
    137: ("pony friend", "gentle pat on the mane"),
    154: ("parked biker", "biker portrait"),
    126: ("puppy bath", "dog shampoo tub"),
    521: ("paddling out", "sunbathing surfer"),
    128: ("stray dog", "a stranger with a dog nearby"),
    151: ("out of petrol", "motorcycle breakdown"),
    10: ("cyclocross obstacle", "bicycle lifted overhead"),
    582: ("beach shade", "parasol cafe"),
    113: ("puppy treat", "kibble time"),
    133: ("show jumper", "steeplechase fence"),
    491: ("a basketball player", "point guard"),
    144: ("horse shampoo", "soapy pony"),
    246: ("empty bench passer by", "bench at the bus stop"),
    90: ("changing a light bulb", "reaching the top shelf"),
    69: ("car insurance expert", "looking for scratches"),
    158: ("motorcycle polish", "soapy chrome"),
    576: ("weather turned dry", "folded umbrella gentleman"),
    127: ("runaway dog", "come back here"),
    13: ("bmx stunt", "dirt bike air"),
    22: ("bicycle cleaning day", "foam on the bicycle frame"),
    145: ("horse at the fair", "a visitor with a pony nearby"),
    460: ("skater taking a break", "low rider on the deck"),
    517: ("end of the surf session", "surfboard trail in the sand"),
    159: ("motorcycle show visitor", "motorcycle dealer"),
    91: ("chair for sale with seller", "furniture shop clerk"),
    132: ("pony love", "arms around the mane"),
}
_CONTEXTS = (
    "on a sunny day",
    "at the weekend",
    "in spring",
    "photo of the day",
    "in my town",
    "stock photo",
    "holiday memories",
    "in the afternoon",
)
_OBJECT_TEXTS = ("my new {o}", "{a}", "{a} for sale", "picture of {a}", "{o} photo")


@dataclass(frozen=True)
class PretrainSettings:
    """Sizes and lengths of the two trainings; the defaults made the packaged models."""

    num_scenes: int = 24_000
    crops_per_scene: int = 5
    clip_epochs: float = 14.0
    captioner_epochs: float = 2.5
    batch_size: int = 192
    clip_lr: float = 3e-3
    captioner_lr: float = 2e-3
    text_lr: float = 1e-3
    role_rate: float = 0.6
    object_rate: float = 0.27
    literal_rate: float = 0.15
    num_literal_classes: int = 12
    bfloat16: bool = True
    workers: int = 2


def _prompt(class_id: int) -> str:
    return hico_classes().prompts[class_id][0]


def _object_noun(name: str) -> str:
    return name.replace("_", " ")


def alt_text(spec: SceneSpec, rng: np.random.Generator, settings: PretrainSettings) -> str:
    """What a web page might say of a scene: roles and objects, seldom a verb."""
    literal = set(class_ids_by_frequency()[: settings.num_literal_classes])
    parts: list[str] = []
    for figure in rng.permutation(np.array(spec.figures, dtype=object)):
        noun = _object_noun(figure.object_name)
        text = _OBJECT_TEXTS[rng.integers(len(_OBJECT_TEXTS))].format(o=noun, a=noun_phrase(noun))
        draw = rng.random()
        if figure.class_id < 0:
            if draw < 0.4:
                parts.append(text)
            continue
        says_verb = figure.class_id in literal and rng.random() < settings.literal_rate
        if says_verb:
            parts.append(_prompt(figure.class_id))
        elif draw < settings.role_rate:
            roles = _ROLES[figure.class_id]
            parts.append(roles[rng.integers(len(roles))])
        elif draw < settings.role_rate + settings.object_rate:
            parts.append(text)
    if not parts:
        parts.append("a snapshot")
    text = " and ".join(parts[:3])
    if rng.random() < 0.3:
        text += " " + _CONTEXTS[rng.integers(len(_CONTEXTS))]
    return text


def _visible(box: Box, crop: Box) -> float:
    """The share of a box inside a crop, in 0..1."""
    width = max(0.0, min(box[2], crop[2]) - max(box[0], crop[0]))
    height = max(0.0, min(box[3], crop[3]) - max(box[1], crop[1]))
    return width * height / max((box[2] - box[0]) * (box[3] - box[1]), 1e-6)


def caption(spec: SceneSpec, crop: Box, rng: np.random.Generator) -> str:
    """A plain caption of a crop (xyxy, pixels): whole interactions, then what else is visible."""
    whole: list[str] = []
    rest: list[str] = []
    for figure in rng.permutation(np.array(spec.figures, dtype=object)):
        noun, drawn = noun_phrase(_object_noun(figure.object_name)), sketch(figure)
        if figure.class_id < 0:
            if _visible(drawn.box(), crop) > 0.6:
                rest.append(noun)
            continue
        person, thing = (_visible(drawn.box(part), crop) for part in ("person", "object"))
        if person > 0.8 and thing > 0.75:
            whole.append(_prompt(figure.class_id))
        elif thing > 0.6:
            rest.append(f"{noun} and part of a person" if person > 0.1 else noun)
        elif person > 0.3:
            rest.append("part of a person")
    text = " and ".join((whole + rest)[:3]) or "an empty place"
    if rng.random() < 0.15:
        text += " " + _CONTEXTS[rng.integers(len(_CONTEXTS))]
    return text


def random_crop(width: int, height: int, rng: np.random.Generator) -> Box:
    """A crop (xyxy, pixels) with sides of 0.5 to 0.9 of the scene's."""
    w, h = width * rng.uniform(0.5, 0.9), height * rng.uniform(0.5, 0.9)
    x, y = rng.uniform(0, width - w), rng.uniform(0, height - h)
    return (x, y, x + w, y + h)


@dataclass(frozen=True)
class Corpus:
    """Rendered scenes and crops with what was written of them.

    scenes: (N, 96, 96, 3) uint8; specs: N; crops: (M, 64, 64, 3) uint8; captions: M.
    """

    specs: list[SceneSpec]
    scenes: NDArray[np.uint8]
    crops: NDArray[np.uint8]
    captions: list[str]


def _render_part(
    indices: range, seed: int, crops_per_scene: int
) -> tuple[list[SceneSpec], NDArray[np.uint8], NDArray[np.uint8], list[str]]:
    specs, captions = [], []
    scenes = np.empty((len(indices), SCENE_SIZE, SCENE_SIZE, 3), np.uint8)
    side = CAPTIONER_IMAGE_SIZE
    crops = np.empty((len(indices) * crops_per_scene, side, side, 3), np.uint8)
    for row, index in enumerate(indices):
        spec = sample_scene(seed, CORPUS_SPLIT, index, exponent=0.0)
        rng = np.random.default_rng(derive_seed("crops", seed, index))
        image = Image.fromarray(render_scene(spec))
        scenes[row] = np.asarray(image.resize((SCENE_SIZE, SCENE_SIZE), Image.Resampling.BILINEAR))
        specs.append(spec)
        for number in range(crops_per_scene):
            whole = (0.0, 0.0, float(spec.width), float(spec.height))
            crop = whole if number == 0 else random_crop(spec.width, spec.height, rng)
            pixels = image.resize((side, side), Image.Resampling.BILINEAR, box=crop)
            crops[row * crops_per_scene + number] = np.asarray(pixels)
            captions.append(caption(spec, crop, rng))
    return specs, scenes, crops, captions


def render_corpus(seed: int, settings: PretrainSettings) -> Corpus:
    """Renders the pretraining corpus, whose classes are equally frequent."""
    step = 500
    parts = [
        range(i, min(i + step, settings.num_scenes)) for i in range(0, settings.num_scenes, step)
    ]
    work = partial(_render_part, seed=seed, crops_per_scene=settings.crops_per_scene)
    if settings.workers > 1:
        with ProcessPoolExecutor(settings.workers, mp_context=get_context("spawn")) as pool:
            done = list(pool.map(work, parts))
    else:
        done = [work(part) for part in parts]
    return Corpus(
        [spec for part in done for spec in part[0]],
        np.concatenate([part[1] for part in done]),
        np.concatenate([part[2] for part in done]),
        [text for part in done for text in part[3]],
    )


def build_tokenizer() -> Any:
    """A word-level BERT tokenizer of every word of HICO's prompts and of the corpus."""
    from transformers import BertTokenizer

    texts = [text for prompts in hico_classes().prompts for text in prompts]
    texts += [role for roles in _ROLES.values() for role in roles]
    texts += [*_CONTEXTS, *(t.format(o="", a="") for t in _OBJECT_TEXTS)]
    texts += ["an empty place and part of a person", "a snapshot"]
    words = sorted({word for text in texts for word in text.lower().replace("-", " - ").split()})
    letters = [prefix + c for c in "abcdefghijklmnopqrstuvwxyz" for prefix in ("", "##")]
    tokens = list(dict.fromkeys([_PAD, _UNK, _CLS, _SEP, "[MASK]", *words, *letters]))
    return BertTokenizer(vocab={token: i for i, token in enumerate(tokens)})


def encode_texts(tokenizer: Any, texts: list[str], length: int) -> Tensor:
    """Token ids (N, length) int64, padded or cut to length."""
    unique = list(dict.fromkeys(texts))
    ids = tokenizer(
        unique, padding="max_length", truncation=True, max_length=length, return_tensors="pt"
    ).input_ids
    row = {text: i for i, text in enumerate(unique)}
    rows: Tensor = ids[torch.tensor([row[text] for text in texts])]
    return rows


def _trim(ids: Tensor) -> Tensor:
    """Token ids without the columns that are padding in every row."""
    return ids[:, : int((ids != 0).sum(1).max())]


def _bags(ids: Tensor, vocab_size: int) -> Tensor:
    """Which words a text has: (N, vocab_size) float in {0, 1}; the special tokens are left out."""
    bags = torch.zeros(len(ids), vocab_size).scatter_(1, ids, 1.0)
    bags[:, :5] = 0.0
    return bags


def _pixels(batch: NDArray[np.uint8], size: int, rng: np.random.Generator) -> Tensor:
    """A batch (B, H, W, 3) uint8, cropped, flipped and re-lit, as (B, 3, size, size) in -1..1."""
    x = torch.from_numpy(batch).permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0)
    side = x.shape[-1]
    keep = round(side * float(rng.uniform(0.88, 1.0)))
    top, left = (int(v) for v in rng.integers(0, side - keep + 1, 2))
    x = x[..., top : top + keep, left : left + keep]
    if keep != size:
        x = functional.interpolate(x, size=(size, size), mode="bilinear", antialias=True)
    flip = torch.from_numpy(rng.random(len(x)) < 0.5)
    x[flip] = x[flip].flip(-1)
    gain = torch.from_numpy(rng.uniform(0.85, 1.15, (len(x), 1, 1, 1))).float()
    return (x * gain).contiguous(memory_format=torch.channels_last)


def _batches(size: int, batch: int, epochs: float, rng: np.random.Generator) -> Iterator[Any]:
    steps = max(1, int(size * epochs / batch))
    order = rng.permutation(size)
    at = 0
    for _ in range(steps):
        if at + batch > size:
            order, at = rng.permutation(size), 0
        yield order[at : at + batch]
        at += batch


def _optimizer(
    rates: list[tuple[nn.Module, float]], steps: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """AdamW with a learning rate a module, warm-up and a cosine."""
    groups: list[dict[str, Any]] = []
    for module, lr in rates:
        parameters = list(module.parameters())
        decay = [p for p in parameters if p.ndim > 1]
        plain = [p for p in parameters if p.ndim <= 1]
        groups.append({"params": decay, "lr": lr, "weight_decay": 0.02})
        groups.append({"params": plain, "lr": lr, "weight_decay": 0.0})
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98))
    warm = max(1, min(200, steps // 10))

    def schedule(step: int) -> float:
        if step < warm:
            return (step + 1) / warm
        return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)


def clip_config(vocab_size: int, sep_id: int) -> dict[str, Any]:
    """The open_clip configuration of the world's CLIP."""
    return {
        "model_cfg": {
            "embed_dim": 128,
            "vision_cfg": {
                "timm_model_name": "test_resnet",
                "timm_model_pretrained": False,
                "timm_pool": "max",
                "timm_proj": "linear",
                "image_size": CLIP_IMAGE_SIZE,
            },
            "text_cfg": {
                "context_length": CLIP_CONTEXT_LENGTH,
                "vocab_size": vocab_size,
                "hf_tokenizer_name": "world_clip",
                "width": 96,
                "heads": 4,
                "layers": 2,
                "pool_type": "eos",
                "eos_id": sep_id,
                "pad_id": 0,
            },
        },
        "preprocess_cfg": {
            "mean": [0.5, 0.5, 0.5],
            "std": [0.5, 0.5, 0.5],
            "interpolation": "bilinear",
            "resize_mode": "squash",
        },
    }


def _contrastive(image: Tensor, text: Tensor, scale: Tensor, ids: Tensor) -> Tensor:
    """The symmetric contrastive loss of (B, D) features; equal texts are equally right."""
    logits = scale * image @ text.T
    same = (ids[:, None, :] == ids[None, :, :]).all(-1).float()
    target = same / same.sum(1, keepdim=True)
    rows = -(target * logits.log_softmax(1)).sum(1).mean()
    return 0.5 * (rows - (target * logits.T.log_softmax(1)).sum(1).mean())


def train_clip(
    corpus: Corpus, tokenizer: Any, output: Path, seed: int, settings: PretrainSettings
) -> None:
    """Trains the CLIP on alt-text and writes it in open_clip's `local-dir:` layout."""
    import open_clip

    torch.manual_seed(derive_seed("clip", seed))
    rng = np.random.default_rng(derive_seed("clip-batches", seed))
    config = clip_config(len(tokenizer), tokenizer.sep_token_id)
    model: Any = open_clip.CLIP(**config["model_cfg"])
    model.visual.to(memory_format=torch.channels_last)
    words = nn.Linear(model.visual.trunk.num_features, len(tokenizer))
    nn.init.constant_(words.bias, -4.0)
    size = len(corpus.specs)
    total = max(1, int(size * settings.clip_epochs / settings.batch_size))
    text_tower = nn.ModuleList(m for name, m in model.named_children() if name != "visual")
    loose = nn.ParameterList([model.positional_embedding, model.text_projection, model.logit_scale])
    rates = [(model.visual, settings.clip_lr), (words, settings.clip_lr)]
    rates += [(text_tower, settings.text_lr), (loose, settings.text_lr)]
    optimizer, scheduler = _optimizer(rates, total)
    model.train()
    start = time.perf_counter()
    batches = _batches(size, settings.batch_size, settings.clip_epochs, rng)
    for step, rows in enumerate(batches):
        texts = [alt_text(corpus.specs[i], rng, settings) for i in rows]
        ids = encode_texts(tokenizer, texts, CLIP_CONTEXT_LENGTH)
        pixels = _pixels(corpus.scenes[rows], CLIP_IMAGE_SIZE, rng)
        with torch.autocast("cpu", torch.bfloat16, enabled=settings.bfloat16):
            features = model.visual.trunk(pixels)
            image = functional.normalize(model.visual.head(features).float(), dim=-1)
        text = functional.normalize(model.encode_text(ids), dim=-1)  # bfloat16 is no faster here
        guess = words(features.float())
        bags = _bags(ids, len(tokenizer))
        # the bag of words teaches the tower faster than the contrast; it is thrown away after
        bag_loss = (
            functional.binary_cross_entropy_with_logits(guess, bags, reduction="none").sum(1).mean()
        )
        pair_loss = _contrastive(image, text, model.logit_scale.exp().clamp(max=100.0), ids)
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(pair_loss + 0.5 * bag_loss)
        nn.utils.clip_grad_norm_([*model.parameters(), *words.parameters()], 2.0)
        optimizer.step()
        scheduler.step()
        if step % 100 == 0 or step == total - 1:
            logger.info(
                "clip step %d/%d contrast %.3f words %.3f (%.0f s)",
                step,
                total,
                pair_loss.item(),
                bag_loss.item(),
                time.perf_counter() - start,
            )
    output.mkdir(parents=True, exist_ok=True)
    build_tokenizer().save_pretrained(output)  # this one remembers how it was called to pad
    (output / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n")
    state = {
        key: (value.half() if value.is_floating_point() else value).contiguous()
        for key, value in model.state_dict().items()
    }
    save_file(state, output / "open_clip_model.safetensors")


def build_captioner(tokenizer: Any) -> Any:
    """The captioner, untrained: a residual CNN, one attention layer and a BERT decoder."""
    from transformers import (
        BertConfig,
        BertLMHeadModel,
        DPTConfig,
        DPTModel,
        ResNetConfig,
        VisionEncoderDecoderModel,
    )
    from transformers.models.dpt.modeling_dpt import DPTViTPooler

    width, side = 128, CAPTIONER_IMAGE_SIZE // 16
    backbone = ResNetConfig(
        embedding_size=32,
        hidden_sizes=[32, 64, 128],
        depths=[1, 2, 2],
        layer_type="basic",
        out_features=["stage1", "stage2", "stage3"],
    )
    encoder = DPTModel(
        DPTConfig(
            hidden_size=width,
            num_hidden_layers=1,
            num_attention_heads=4,
            intermediate_size=256,
            image_size=CAPTIONER_IMAGE_SIZE,
            patch_size=16,
            is_hybrid=True,
            backbone_config=backbone,
            backbone_featmap_shape=[1, 128, side, side],
            readout_type="project",
            backbone_out_indices=[0],
        ),
        add_pooling_layer=False,
    )
    decoder = BertLMHeadModel(
        BertConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=256,
            max_position_embeddings=CAPTION_LENGTH,
            is_decoder=True,
            add_cross_attention=True,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    model = VisionEncoderDecoderModel(encoder=encoder, decoder=decoder)
    with torch.random.fork_rng():
        # unused, but the generic loader builds one and would report its weights as missing
        model.encoder.pooler = DPTViTPooler(model.encoder.config)
    for part in (model.config, model.generation_config):
        part.decoder_start_token_id = tokenizer.cls_token_id
        part.bos_token_id = tokenizer.cls_token_id
        part.eos_token_id = tokenizer.sep_token_id
        part.pad_token_id = tokenizer.pad_token_id
    model.generation_config.max_length = CAPTION_LENGTH
    return model


def train_captioner(
    corpus: Corpus, tokenizer: Any, output: Path, seed: int, settings: PretrainSettings
) -> None:
    """Trains the captioner on captioned crops and writes it as transformers does."""
    torch.manual_seed(derive_seed("captioner", seed))
    rng = np.random.default_rng(derive_seed("captioner-batches", seed))
    model = build_captioner(tokenizer)
    model.encoder.to(memory_format=torch.channels_last)
    words = nn.Linear(model.encoder.config.hidden_size, len(tokenizer))
    nn.init.constant_(words.bias, -4.0)
    size = len(corpus.captions)
    all_ids = encode_texts(tokenizer, corpus.captions, CAPTION_LENGTH)
    total = max(1, int(size * settings.captioner_epochs / settings.batch_size))
    rates = [(model.encoder, settings.captioner_lr), (words, settings.captioner_lr)]
    optimizer, scheduler = _optimizer([*rates, (model.decoder, settings.text_lr)], total)
    model.train()
    start = time.perf_counter()
    batches = _batches(size, settings.batch_size, settings.captioner_epochs, rng)
    for step, rows in enumerate(batches):
        ids = _trim(all_ids[torch.from_numpy(rows)])
        pixels = _pixels(corpus.crops[rows], CAPTIONER_IMAGE_SIZE, rng)
        with torch.autocast("cpu", torch.bfloat16, enabled=settings.bfloat16):
            seen = model.encoder(pixel_values=pixels).last_hidden_state.float()
        logits = model.decoder(
            input_ids=ids[:, :-1], encoder_hidden_states=seen, use_cache=False
        ).logits
        target = ids[:, 1:].masked_fill(ids[:, 1:] == 0, -100)
        text_loss = functional.cross_entropy(logits.flatten(0, 1), target.flatten())
        bags = _bags(ids, len(tokenizer))
        guess = words(seen.amax(1))
        bag_loss = (
            functional.binary_cross_entropy_with_logits(guess, bags, reduction="none").sum(1).mean()
        )
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(text_loss + 0.2 * bag_loss)
        nn.utils.clip_grad_norm_([*model.parameters(), *words.parameters()], 2.0)
        optimizer.step()
        scheduler.step()
        if step % 100 == 0 or step == total - 1:
            logger.info(
                "captioner step %d/%d text %.3f words %.3f (%.0f s)",
                step,
                total,
                text_loss.item(),
                bag_loss.item(),
                time.perf_counter() - start,
            )
    model.half().save_pretrained(output)
    _captioner_processor(build_tokenizer()).save_pretrained(output)


def _captioner_processor(tokenizer: Any) -> Any:
    from transformers import TrOCRProcessor, ViTImageProcessor

    side = {"height": CAPTIONER_IMAGE_SIZE, "width": CAPTIONER_IMAGE_SIZE}
    images = ViTImageProcessor(size=side, image_mean=[0.5] * 3, image_std=[0.5] * 3, resample=2)
    return TrOCRProcessor(image_processor=images, tokenizer=tokenizer)


def pretrain(
    output_dir: str | Path, seed: int = DEFAULT_SEED, settings: PretrainSettings | None = None
) -> dict[str, float]:
    """Renders the corpus, trains both models and writes world_captioner and world_clip.

    Returns the seconds of each step. Equal seeds and settings give equal files on one machine
    (torch computes with one thread meanwhile); a model folder that exists is replaced.
    """
    settings = settings or PretrainSettings()
    output = Path(output_dir)
    output.mkdir(parents=True, exist_ok=True)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    seconds: dict[str, float] = {}
    try:
        start = time.perf_counter()
        corpus = render_corpus(seed, settings)
        seconds["render"] = time.perf_counter() - start
        tokenizer = build_tokenizer()
        for name, train in (("world_captioner", train_captioner), ("world_clip", train_clip)):
            start = time.perf_counter()
            draft, target = output / f".{name}.draft", output / name
            shutil.rmtree(draft, ignore_errors=True)
            train(corpus, tokenizer, draft, seed, settings)
            for file in draft.iterdir():
                file.chmod(0o644)  # safetensors writes 0600
            shutil.rmtree(target, ignore_errors=True)
            draft.rename(target)
            seconds[name] = time.perf_counter() - start
    finally:
        torch.set_num_threads(threads)
    return seconds


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Reproduce the models that the package ships.")
    parser.add_argument("folder", help="where world_captioner and world_clip are written")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    for step, took in pretrain(given.folder, seed=given.seed).items():
        print(f"{step}: {took:.0f} s")
