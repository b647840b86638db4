"""Measure teacher and training on one GPU in at most eight minutes.

    make gpu            # or: python benchmarks/gpu.py [--only chat,training] [--tiny --out FILE]

Every part runs in a process of its own within its share of the time; one that fails is recorded and
the others go on. All but the last do without Ray (they need torch, transformers, accelerate,
open_clip, pydantic, pyarrow, numpy and pillow), and nothing is downloaded: models have real shapes
and random weights. `blip` (large), `git` (large) and `chat` (Qwen2.5-VL's 3B) check the fast
scores against plain forwards in bfloat16 and float16, time 600 HICO prompts by trie, in batches and
one by one (the last two on some prompts, scaled), and compare what a teacher does with regions
of uint8 images to the bare model on prepared ones. `halving` lets memory run out. `training` takes
the workers' own steps of a ViT-B/16 at 672 pixels, from pinned bytes to AdamW, beside bare steps
of the same model on one batch that lies there; `compiled` does so with torch.compile. FLOPs are
counted by torch, and their rate is set against that of a large matrix product. `tests` is
`make test-gpu`. JSON goes to benchmarks/results/gpu.json, without a GPU only where --out says.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measured import measured_on, write_results
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from hts_ray.classes import hico_classes
from hts_ray.config import RegionsConfig, StudentConfig, TeacherConfig, TrainConfig
from hts_ray.engine.compat import build_image_tower
from hts_ray.images.crops import CropBatch
from hts_ray.images.decode import DecodedImage
from hts_ray.images.regions import propose_regions
from hts_ray.losses import make_loss
from hts_ray.student.augment import augment
from hts_ray.student.measure import noise_batch
from hts_ray.student.model import Student, parameter_groups
from hts_ray.student.step import Stepper, take_step
from hts_ray.teacher.captioner import ClassPrompts
from hts_ray.teacher.models.families import Loaded, build_family
from hts_ray.teacher.models.pretrained import TOLERANCE, TransformersCaptioner
from hts_ray.teacher.scorers import ImageTask, PromptLikelihoods, RegionScorer, ScoredImage

RESULTS = Path(__file__).parent / "results" / "gpu.json"
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
QWEN_WORDS = ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
              "<|video_pad|>"]  # fmt: skip
QWEN_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{m['role']}}\n{% for c in m['content'] %}"
    "{% if c['type']=='image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{c['text']}}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True)
class Sizes:
    """How large everything is; the defaults are the real ones, `TINY` is for a CPU."""

    tiny: bool = False
    image: tuple[int, int] = (768, 1024)
    images: int = 4
    prompts: int = 600
    batched: int = 64
    naive: int = 4
    student: int = 672
    batch: int = 64
    steps: int = 6
    matrix: int = 8192
    seconds: float = 3.0  # that one timing takes


TINY = Sizes(True, (48, 64), 2, 12, 6, 2, 64, 4, 2, 128, 0.02)


def device() -> str:
    """Return where the parts run."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def half() -> torch.dtype:
    """Return the best half precision of the device."""
    fast = device() == "cpu" or torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if fast else torch.float16


def finish() -> None:
    """Wait for the GPU."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def in_turn(calls: Mapping[str, Callable[[], object]], seconds: float) -> dict[str, float]:
    """Return the median seconds of calls that run in turn, for so many seconds each.

    Three rounds at least, but where they would take three times as long.
    """
    taken: dict[str, list[float]] = {name: [] for name in calls}
    began, budget, rounds, elapsed = time.monotonic(), seconds * len(calls), 0, 0.0
    while elapsed < (3 * budget if rounds < 3 else budget):
        for name, call in calls.items():
            finish()
            started = time.perf_counter()
            call()
            finish()
            taken[name].append(time.perf_counter() - started)
        rounds, elapsed = rounds + 1, time.monotonic() - began
    return {name: statistics.median(values) for name, values in taken.items()}


# ---- teachers with real shapes and random weights


def tower(tiny: bool, width: int, inner: int, layers: int, heads: int) -> dict[str, int]:
    """Return a transformer's sizes, as most configs name them."""
    if tiny:
        width, inner, layers, heads = 32, 64, 2, 4
    return {
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
    }


def word_pieces(texts: Sequence[str]) -> Any:
    """Return BERT's kind of tokenizer, trained on some texts."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
    from transformers import BertTokenizer

    trained = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    trained.normalizer = normalizers.BertNormalizer()
    trained.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = trainers.WordPieceTrainer(
        vocab_size=4000, special_tokens=special, show_progress=False
    )
    trained.train_from_iterator(texts, trainer)
    tokenizer = BertTokenizer(vocab=trained.get_vocab())
    tokenizer.add_special_tokens({"bos_token": "[DEC]"})
    return tokenizer


def byte_pieces(texts: Sequence[str]) -> Any:
    """Return Qwen's kind of tokenizer, trained on some texts."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import Qwen2Tokenizer

    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=4000,
        special_tokens=["<|endoftext|>", *QWEN_WORDS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    trained.train_from_iterator(texts, trainer)
    model = json.loads(trained.to_str())["model"]
    merges = [tuple(merge) for merge in model["merges"]]
    tokenizer = Qwen2Tokenizer(vocab=model["vocab"], merges=merges, eos_token="<|im_end|>")
    tokenizer.add_special_tokens({"additional_special_tokens": QWEN_WORDS})
    return tokenizer


def blip(folder: Path, tiny: bool, texts: Sequence[str]) -> Any:
    """Save the processor of a BLIP-large; returns its config."""
    from transformers import BlipConfig, BlipImageProcessor, BlipProcessor

    tokenizer, side = word_pieces(texts), 32 if tiny else 384
    images = BlipImageProcessor(size={"height": side, "width": side})
    BlipProcessor(images, tokenizer).save_pretrained(folder)
    vision = tower(tiny, 1024, 4096, 24, 16)
    text = {
        **tower(tiny, 768, 3072, 12, 12),
        "vocab_size": len(tokenizer) if tiny else 30524,
        "encoder_hidden_size": vision["hidden_size"],
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.sep_token_id,
        "sep_token_id": tokenizer.sep_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    return BlipConfig(
        vision_config={**vision, "image_size": side, "patch_size": 8 if tiny else 16},
        text_config=text,
    )


def git(folder: Path, tiny: bool, texts: Sequence[str]) -> Any:
    """Save the processor of a GIT-large; returns its config."""
    from transformers import CLIPImageProcessor, GitConfig, GitProcessor

    tokenizer, side = word_pieces(texts), 32 if tiny else 224
    images = CLIPImageProcessor(
        size={"shortest_edge": side}, crop_size={"height": side, "width": side}
    )
    GitProcessor(images, tokenizer).save_pretrained(folder)
    vision = {"image_size": side, "patch_size": 8 if tiny else 14}
    return GitConfig(
        vision_config={**tower(tiny, 1024, 4096, 24, 16), **vision},
        **tower(tiny, 1024, 4096, 6, 16),
        vocab_size=len(tokenizer) if tiny else 30522,
        bos_token_id=tokenizer.cls_token_id,
        eos_token_id=tokenizer.sep_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def chat(folder: Path, tiny: bool, texts: Sequence[str]) -> Any:
    """Save the processor of a Qwen2.5-VL of 3B; returns its config."""
    from transformers import (
        Qwen2_5_VLConfig,
        Qwen2_5_VLProcessor,
        Qwen2VLImageProcessor,
        Qwen2VLVideoProcessor,
    )

    tokenizer, patch = byte_pieces(texts), 8 if tiny else 14
    area = {"min_pixels": 1024, "max_pixels": 4096} if tiny else {}
    Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(patch_size=patch, merge_size=2, **area),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(patch_size=patch, merge_size=2),
        chat_template=QWEN_TEMPLATE,
    ).save_pretrained(folder)
    ids = tokenizer.convert_tokens_to_ids
    text = tower(tiny, 2048, 11008, 36, 16)
    vision = {
        "depth": 2 if tiny else 32,
        "hidden_size": 32 if tiny else 1280,
        "num_heads": 4 if tiny else 16,
        "intermediate_size": 64 if tiny else 3420,
        "window_size": 32 if tiny else 112,
        "fullatt_block_indexes": [1] if tiny else [7, 15, 23, 31],
        "patch_size": patch,
        "spatial_merge_size": 2,
        "out_hidden_size": text["hidden_size"],
    }
    sections = [1, 1, 2] if tiny else [16, 24, 24]
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": sections}
    return Qwen2_5_VLConfig(
        image_token_id=ids("<|image_pad|>"),
        video_token_id=ids("<|video_pad|>"),
        vision_start_token_id=ids("<|vision_start|>"),
        vision_end_token_id=ids("<|vision_end|>"),
        vision_config=vision,
        text_config={
            **text,
            "vocab_size": len(tokenizer) if tiny else 151936,
            "num_key_value_heads": 2,
            "bos_token_id": 0,
            "eos_token_id": ids("<|im_end|>"),
            "pad_token_id": 0,
            "rope_parameters": rope,
        },
    )


BUILDERS = {"blip": blip, "git": git, "chat": chat}


def make_captioner(
    family: str, sizes: Sizes, texts: Sequence[str], dtype: torch.dtype
) -> TransformersCaptioner:
    """Make a captioner whose scores differ between prompts: weights keep a signal's size."""
    from transformers import AutoModelForImageTextToText

    with tempfile.TemporaryDirectory() as name:
        config = BUILDERS[family](Path(name), sizes.tiny, texts)
        torch.manual_seed(0)
        with torch.device(device()):
            model = AutoModelForImageTextToText.from_config(config, dtype=dtype).eval()
        with torch.no_grad():
            for weight in model.parameters():
                if weight.ndim > 1:
                    weight.normal_(0, (weight.numel() / len(weight)) ** -0.5)
        settings = TeacherConfig.model_validate(
            {"model": name, "dtype": str(dtype).removeprefix("torch.")}
        )
        captioner = TransformersCaptioner(build_family(Loaded(settings, Path(name), model)))
    if device() == "cuda":
        captioner.decoder.workspace = torch.cuda.mem_get_info()[0] // 4
    return captioner


def decoded(sizes: Sizes, count: int) -> list[DecodedImage]:
    """Return images of smooth noise."""
    from PIL import Image

    height, width = sizes.image
    rng = np.random.default_rng(0)
    small = [
        Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)) for _ in range(count)
    ]
    pixels = [np.asarray(one.resize((width, height), Image.Resampling.BICUBIC)) for one in small]
    return [DecodedImage(of_image, width, height) for of_image in pixels]


def crops_of(images: Sequence[DecodedImage]) -> CropBatch:
    """Return the crops of the default grid: 14 an image."""
    regions = [propose_regions(i.width, i.height, RegionsConfig()) for i in images]
    return CropBatch.of(images, regions)


@torch.inference_mode()
def teacher(family: str, sizes: Sizes) -> dict[str, Any]:
    """Check a family's scores in half precisions, and time its ways and what a teacher does."""
    prompts = hico_classes().primary_prompts[: sizes.prompts]
    checks, captioner = {}, None
    for dtype in sorted((torch.float16, torch.bfloat16), key=lambda d: d == half()):
        captioner = None  # before the next one takes memory
        captioner = make_captioner(family, sizes, prompts, dtype)
        nats = captioner.self_check()
        name = str(dtype).removeprefix("torch.")
        checks[name] = {"nats": nats, "tolerance": TOLERANCE[dtype], "ok": nats <= TOLERANCE[dtype]}
    assert captioner is not None
    decoder, sequences = captioner.decoder, captioner.tokenize(prompts)
    crops = crops_of(decoded(sizes, 1 if family == "chat" else sizes.images))
    prepared = captioner.prepare(crops)
    if not isinstance(prepared, Tensor):
        prepared = [{n: v.to(device()) for n, v in region.items()} for region in prepared]
    one = prepared[:1]
    some, few = sequences[: sizes.batched], sequences[: sizes.naive]

    def by_batches() -> Tensor:
        decoder.by_trie = False
        try:
            return decoder.log_likelihoods(one, some)
        finally:
            decoder.by_trie = True

    by_trie = decoder.log_likelihoods(one, some)
    offset = float((by_batches() - by_trie).abs().max())
    seconds = in_turn(
        {
            # Another batch, or the images would be on the device already.
            "teacher": lambda: captioner.score(CropBatch(crops.images, crops.whole), prompts),
            "bare": lambda: decoder.log_likelihoods(prepared, sequences),
            "trie": lambda: decoder.log_likelihoods(one, sequences),
            "batched": by_batches,
            "naive": lambda: [decoder.reference(one, sequence) for sequence in few],
            "encode": lambda: decoder.encode(one),
        },
        sizes.seconds,
    )
    # The image is read once however many prompts follow in batches.
    scale = len(sequences) / len(some)
    batched = seconds["encode"] + max(0.0, seconds["batched"] - seconds["encode"]) * scale
    naive = seconds["naive"] * len(sequences) / len(few)
    return {
        "parameters": sum(weight.numel() for weight in decoder.model.parameters()),
        "self_check": checks,
        "dtype": str(half()).removeprefix("torch."),
        "regions": len(crops),
        "prompts": len(prompts),
        "regions_per_second": len(crops) / seconds["teacher"],
        "bare_regions_per_second": len(crops) / seconds["bare"],
        "share_of_bare": seconds["bare"] / seconds["teacher"],
        "one_region_seconds": {"trie": seconds["trie"], "batched": batched, "naive": naive},
        "batched_over_trie": batched / seconds["trie"],
        "naive_over_trie": naive / seconds["trie"],
        "trie_batched_nats": offset,
        "seconds_by_call": seconds,
    }


def halving(sizes: Sizes) -> dict[str, Any]:
    """Let memory run out under a chunk of regions, and compare with chunks that fit.

    Without a GPU the model says so itself, of more than four regions.
    """
    prompts = hico_classes().primary_prompts[: sizes.batched]
    captioner = make_captioner("blip", sizes, prompts, half())
    captioner.decoder.workspace = 1 << 50  # no groups: all of a chunk in one forward
    tasks = [ImageTask(image) for image in decoded(sizes, sizes.images)]
    likelihoods = PromptLikelihoods(
        captioner, ClassPrompts.of([[prompt] for prompt in prompts], 1), TeacherConfig()
    )
    score = captioner.score

    def scored(chunk: int) -> tuple[RegionScorer, list[ScoredImage]]:
        scorer = RegionScorer(captioner, likelihoods, RegionsConfig(), chunk=chunk)
        results = scorer(tasks)
        assert all(isinstance(result, ScoredImage) for result in results), results
        return scorer, [result for result in results if isinstance(result, ScoredImage)]

    small, expected = scored(2)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        scored(2)
        wanted = 1.3 * torch.cuda.max_memory_reserved()
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(
            min(1.0, wanted / torch.cuda.get_device_properties(0).total_memory)
        )
    else:

        def scarce(images: Sequence[Any], texts: Sequence[str]) -> Any:
            if len(images) > 4:
                raise torch.OutOfMemoryError(f"{len(images)} regions")
            return score(images, texts)

        captioner.score = scarce  # type: ignore[method-assign,assignment]
    large, found = scored(14 * sizes.images)
    pairs = zip(found, expected, strict=True)
    return {
        "simulated": not torch.cuda.is_available(),
        "regions": 14 * sizes.images,
        "chunk_before": 14 * sizes.images,
        "chunk_after": large.chunk,
        "halved": large.chunk < 14 * sizes.images,
        "largest_difference_nats": max(float(np.abs(a.scores - b.scores).max()) for a, b in pairs),
        "chunk_that_fits": small.chunk,
    }


# ---- training


def make_student(sizes: Sizes) -> Student:
    """Return a student of a ViT-B/16 with random weights over HICO's 600 classes."""
    vision = {"image_size": sizes.student, "layers": 12, "width": 768, "patch_size": 16}
    if sizes.tiny:
        vision |= {"layers": 2, "width": 64, "head_width": 32}
    model_cfg = {"embed_dim": 64 if sizes.tiny else 512, "vision_cfg": vision}
    table = hico_classes()
    torch.manual_seed(0)
    return Student(
        build_image_tower(model_cfg),
        torch.randn(len(table), model_cfg["embed_dim"]),  # type: ignore[arg-type]
        config=StudentConfig(precision="bf16" if half() == torch.bfloat16 else "fp16"),
        class_table=table,
        model_cfg=model_cfg,
        image_size=sizes.student,
        image_mean=CLIP_MEAN,
        image_std=CLIP_STD,
    )


class OwnSteps:
    """The workers' steps: bytes to the device, augmentation, step, and the last step's numbers."""

    def __init__(self, sizes: Sizes, batch: int, compiled: bool) -> None:
        cuda = device() == "cuda"
        self.config = TrainConfig(batch_size=batch, compile=compiled, use_gpu=cuda)
        self.stepper = Stepper.of(make_student(sizes), self.config)
        host = noise_batch(self.stepper)
        self.host = {name: value.pin_memory() if cuda else value for name, value in host.items()}
        self.before = take_step(self.stepper, self.moved())

    def moved(self) -> dict[str, Tensor]:
        """Return the batch on the device."""
        return {n: value.to(device(), non_blocking=True) for n, value in self.host.items()}

    def take(self, steps: int) -> None:
        """Take steps, and wait for the last one."""
        for _ in range(steps):
            told = take_step(self.stepper, self.moved())
            self.before.read()
            self.before = told
        assert self.before.read()[1], "the loss is not finite"

    def prepare(self, steps: int) -> None:
        """Do what a step does before the model."""
        batch, student = self.moved(), self.stepper.student
        for _ in range(steps):
            images = augment(
                batch["pixels"], batch["augmentation"], student.image_size, self.config.augment
            )
            student.standardise(images)

    def waits(self, steps: int) -> float | None:
        """Return how often a step makes the host wait, by torch's own warnings; None on a CPU."""
        if device() != "cuda":
            return None
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as told:
                warnings.simplefilter("always")
                self.take(steps)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return sum("synchroniz" in str(warning.message) for warning in told) / steps


class BareSteps:
    """The same model's steps on one batch of images that lies on the device."""

    def __init__(self, sizes: Sizes, batch: int, compiled: bool) -> None:
        self.student = make_student(sizes).to(device()).train()
        if compiled:
            self.student.visual.compile()
        config = TrainConfig()
        self.optimizer = torch.optim.AdamW(parameter_groups(self.student, config.optim), fused=True)
        self.loss = make_loss(config.loss, config.loss_temperature)
        self.loss.checks_values = False
        self.images = torch.randn(batch, 3, sizes.student, sizes.student, device=device())
        classes = len(self.student.class_table)
        self.targets = torch.full((batch, classes), -1, dtype=torch.int8, device=device())
        self.targets[:, :2] = 1
        self.take(1)

    def loss_of(self, images: Tensor) -> Tensor:
        """Return the loss of some images, computed in half precision."""
        with torch.autocast(device(), dtype=half()):
            logits = self.student(images)
        loss: Tensor = self.loss(logits, self.targets[: len(images)])
        return loss

    def take(self, steps: int) -> None:
        """Take steps."""
        for _ in range(steps):
            torch.autograd.backward(self.loss_of(self.images))
            self.optimizer.step()
            self.optimizer.zero_grad()

    def flops(self) -> float:
        """Return the floating-point operations of forward and backward, of one image."""
        with FlopCounterMode(display=False) as counter:
            torch.autograd.backward(self.loss_of(self.images[:1]))
        self.optimizer.zero_grad()
        return float(counter.get_total_flops())


def product_rate(sizes: Sizes) -> float:
    """Return the FLOP/s of a large matrix product in half precision."""
    side = sizes.matrix
    left, right = (torch.randn(side, side, device=device(), dtype=half()) for _ in range(2))
    seconds = in_turn({"product": lambda: [left @ right for _ in range(5)]}, sizes.seconds / 8)
    return 5 * 2 * side**3 / seconds["product"]


def training(sizes: Sizes, *, compiled: bool = False) -> dict[str, Any]:
    """Compare the workers' steps with bare ones; a batch that does not fit is halved."""
    batch = sizes.batch
    while True:
        try:
            own, bare = OwnSteps(sizes, batch, compiled), BareSteps(sizes, batch, compiled)
            break
        except torch.OutOfMemoryError:
            if batch == 1:
                raise
        own = bare = None  # type: ignore[assignment]
        torch.cuda.empty_cache()
        batch //= 2
    steps, peak = sizes.steps, product_rate(sizes)
    seconds = in_turn(
        {
            "own": lambda: own.take(steps),
            "bare": lambda: bare.take(steps),
            "augmentation": lambda: own.prepare(steps),
        },
        sizes.seconds,
    )
    rate, plain = (batch * steps / seconds[name] for name in ("own", "bare"))
    uncompiled = bare if not compiled else BareSteps(sizes, 1, False)
    flops = uncompiled.flops()
    return {
        "image_size": sizes.student,
        "batch": batch,
        "precision": own.stepper.student.config.precision,
        "images_per_second": rate,
        "bare_images_per_second": plain,
        "share_of_bare": rate / plain,
        "augmentation_share": seconds["augmentation"] / seconds["own"],
        "waits_a_step": own.waits(steps),
        "gflop_an_image": flops / 1e9,
        "tflop_per_second": rate * flops / 1e12,
        "matrix_product_tflop_per_second": peak / 1e12,
        "model_flop_utilisation": rate * flops / peak,
        "peak_memory_gib": torch.cuda.max_memory_allocated() / 2**30
        if device() == "cuda"
        else None,
    }


# ---- parts


def gpu_tests(sizes: Sizes) -> dict[str, Any]:
    """Run the tests that need a GPU."""
    marker = ["-m", "gpu", *(["--collect-only"] if sizes.tiny else [])]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *marker]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = done.stdout.strip().splitlines()
    if done.returncode:
        raise RuntimeError("\n".join(lines[-15:]) or done.stderr[-1500:])
    return {"summary": lines[-1]}


# What is measured, and the most seconds that it may take; the last one gets what is left.
PARTS: dict[str, tuple[Callable[[Sizes], dict[str, Any]], float]] = {
    "training": (training, 80),
    "blip": (lambda sizes: teacher("blip", sizes), 70),
    "chat": (lambda sizes: teacher("chat", sizes), 100),
    "git": (lambda sizes: teacher("git", sizes), 60),
    "halving": (halving, 40),
    "tests": (gpu_tests, 50),
    "compiled": (lambda sizes: training(sizes, compiled=True), 120),
}


def run_part(name: str, sizes: Sizes, seconds: float) -> dict[str, Any]:
    """Run a part in a process of its own, or here where all is tiny; never raises.

    Returns `seconds`, and `figures` or `error`.
    """
    started = time.monotonic()
    try:
        if sizes.tiny:
            found: dict[str, Any] = {"figures": PARTS[name][0](sizes)}
        else:
            found = in_a_process([sys.executable, __file__, "--part", name], seconds)
    except Exception as error:
        traceback.print_exc()
        found = {"error": f"{type(error).__name__}: {error}"[-1500:]}
    return {"seconds": round(time.monotonic() - started, 1), **found}


def in_a_process(command: list[str], seconds: float) -> dict[str, Any]:
    """Return the JSON that a command writes behind its last argument, or why there is none."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "part.json"
        try:
            done = subprocess.run([*command, "--out", str(out)], timeout=seconds, check=False)
        except subprocess.TimeoutExpired:
            return {"error": f"not done after {seconds:.0f} s"}
        if not out.exists():
            return {"error": f"its process ended with {done.returncode}"}
        found: dict[str, Any] = json.loads(out.read_text("utf-8"))
        return found


def run_parts(
    names: Sequence[str],
    minutes: float,
    run: Callable[[str, float], dict[str, Any]],
) -> dict[str, dict[str, Any]]:
    """Run parts in turn, each within its own seconds and those that are left of all."""
    end, results = time.monotonic() + 60 * minutes, {}
    for name in names:
        left = end - time.monotonic()
        if left < 5:
            results[name] = {"seconds": 0.0, "error": "no time was left"}
            continue
        print(f"{name}: at most {min(left, PARTS[name][1]):.0f} s", flush=True)
        results[name] = run(name, min(left, PARTS[name][1]))
        print(json.dumps(results[name], indent=2), flush=True)
    return results


def main() -> None:
    """Run the parts, print and store what they found."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", metavar="PART,...", help=f"some of {', '.join(PARTS)}")
    parser.add_argument("--minutes", type=float, default=8.0, help="the whole ends after so many")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, in this process")
    parser.add_argument("--out", type=Path, help="where JSON goes (default: results/gpu.json)")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        figures = PARTS[options.part][0](Sizes())
        options.out.write_text(json.dumps({"figures": figures}), encoding="utf-8")
        return
    if options.out is None and (options.tiny or not torch.cuda.is_available()):
        parser.error("torch sees no GPU, or --tiny was given: say with --out where JSON may go")
    names = options.only.split(",") if options.only else list(PARTS)
    if unknown := sorted(set(names) - set(PARTS)):
        parser.error(f"--only {unknown[0]}: give some of {', '.join(PARTS)}")
    sizes = TINY if options.tiny else Sizes()
    parts = run_parts(names, options.minutes, lambda name, left: run_part(name, sizes, left))
    settings = {"minutes": options.minutes, "tiny": options.tiny, "parts": names}
    write_results(options.out or RESULTS, {**measured_on(), "settings": settings, "parts": parts})
    failed = [name for name, found in parts.items() if "error" in found]
    if failed:
        sys.exit(f"failed: {', '.join(failed)}; the others' figures are written")


if __name__ == "__main__":
    main()
