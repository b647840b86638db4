"""Do questions rank classes better than likelihoods? One model taught both, on the built-in world.

    python benchmarks/questions.py train FOLDER [--seed 0]
    python benchmarks/questions.py measure FOLDER [--images 100]
    python benchmarks/questions.py cost [--rounds 2]

`train` teaches the decoder of a copy of the built-in captioner to answer "does this image show a
person riding a bicycle?", in the same steps that go on teaching it captions: both modes come from
the same weights and the same budget. Its image encoder stays as captions made it. Every crop is
captioned once and asked three questions: one that is true where there is one, a class of an object
that is there with another verb (any other where there is none), and an object alone. What is half
visible is not asked about. So the copy hardly ever learned to say no to a class whose object is
absent: judge its questions with the object first. It was taught for 79 CPU seconds, where the
captioner it was copied from had read captions for far longer, so this says little about large
models that learned to answer. No checkpoint is committed; a seed makes one.

`measure` scores the world's 55 classes on the regions (the demo's) of images of worlds that were
not trained on, by prompts and by questions, aggregates them as the filter does, and ranks the
images of every class. What each way can choose (alpha, offset, aggregation, the weight of questions
where both are averaged as log-probabilities) is chosen by mAP on world 110; worlds 0 to 2 judge.
`untaught` is the built-in captioner as it is packaged. `object first` asks for objects, and for a
class only where its object's log odds pass a bound, chosen on world 110 too. `empty` is the share
of pictures that show nothing (those of abstention.py) that keep no positive at probability 0.5 of
1, 3 and 10 classes.

`cost` has the shape of SmolVLM-256M with a third of its layers and random weights: CPU seconds a
region of HICO's 600 classes by mode=prompts and by mode=questions, in turn, and of asking for 80
objects first and then for the classes of 1 to 5 of them. Tokens are CLIP's byte pairs; five more
stand for "?" and what the chat template writes behind it.

Shapes: N images, R regions, C classes, O objects, P phrases.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from abstention import empty_pictures
from measured import measured_on, read_results, write_results
from numpy.typing import NDArray
from PIL import Image
from pretraining import (
    CAPTION_LENGTH,
    CAPTIONER_IMAGE_SIZE,
    _batches,
    _captioner_processor,
    _optimizer,
    _pixels,
    _trim,
    _visible,
    caption,
    encode_texts,
    random_crop,
)
from torch.nn import functional
from trie_speed import cpu_seconds, hico_tokens

from hts_ray.classes import hico_classes
from hts_ray.classes.prompts import OBJECT_PHRASES
from hts_ray.config import TeacherConfig, load_config
from hts_ray.demo.figures import Box, sketch, world_objects
from hts_ray.demo.world import (
    TEST_EXPONENT,
    SceneSpec,
    derive_seed,
    render_scene,
    sample_scene,
    world_class_ids,
)
from hts_ray.images.regions import propose_regions
from hts_ray.labels.select import aggregate, odds_probabilities, region_probabilities
from hts_ray.metrics import hico_average_precision
from hts_ray.store.aliases import Pixels
from hts_ray.teacher.captioner import Captioner
from hts_ray.teacher.models.architectures import PrefixDecoder
from hts_ray.teacher.models.catalog import model_folder
from hts_ray.teacher.models.families import Loaded, behind, build_family
from hts_ray.teacher.models.loading import load_captioner
from hts_ray.teacher.models.pretrained import TransformersCaptioner
from hts_ray.teacher.models.questions import AnswerTokens, SplitQuestions
from hts_ray.teacher.prior import log_mean_exp, plain_images

RESULTS = Path(__file__).parent / "results" / "questions.json"
QUESTION = "does this image show {} ?"
WORDS = ("yes", "no", "does", "this", "image", "?")
BUILTIN = "builtin:world_captioner"
TUNED, JUDGED = (110,), (0, 1, 2)
ALPHAS = (0.0, 0.25, 0.5, 1.0)
WAYS = ("max", "2", "3", "mean")
WEIGHTS = (0.25, 0.5, 0.75)
BOUNDS = tuple(np.arange(-8.0, 4.5, 0.5).tolist())
IDS = world_class_ids()
OBJECTS = world_objects()
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Budget:
    """How long the copy is taught; both modes share it."""

    scenes: int = 600
    crops: int = 5
    steps: int = 600
    batch: int = 32
    rate: float = 1.5e-3


@dataclass(frozen=True)
class Facts:
    """What a crop shows for certain, and what half of it is cut off or missing."""

    shown: frozenset[int]
    doubtful: frozenset[int]
    objects: frozenset[str]
    doubtful_objects: frozenset[str]


def facts_of(spec: SceneSpec, crop: Box) -> Facts:
    """Return what is true of a crop (xyxy, pixels); the bounds are those of its caption."""
    shown, doubtful, objects, unsure = set(), set(), set(), set()
    for figure in spec.figures:
        drawn = sketch(figure)
        whole = figure.class_id < 0
        thing = _visible(drawn.box(*(() if whole else ("object",))), crop)
        if thing > 0.6:
            objects.add(figure.object_name)
        elif thing > 0.3:
            unsure.add(figure.object_name)
        if whole:
            continue
        person = _visible(drawn.box("person"), crop)
        if person > 0.8 and thing > 0.75:
            shown.add(figure.class_id)
        elif person > 0.5 and thing > 0.4:
            doubtful.add(figure.class_id)
    return Facts(frozenset(shown), frozenset(doubtful), frozenset(objects), frozenset(unsure))


def render(seed: int, budget: Budget) -> tuple[NDArray[np.uint8], list[str], list[Facts]]:
    """Return crops (M, 64, 64, 3), their captions and what is true of them."""
    side = CAPTIONER_IMAGE_SIZE
    crops = np.empty((budget.scenes * budget.crops, side, side, 3), np.uint8)
    captions, facts = [], []
    for index in range(budget.scenes):
        spec = sample_scene(seed, "questions", index, exponent=0.0)
        rng = np.random.default_rng(derive_seed("question-crops", seed, index))
        image = Image.fromarray(render_scene(spec))
        for number in range(budget.crops):
            whole = (0.0, 0.0, float(spec.width), float(spec.height))
            crop = whole if number == 0 else random_crop(spec.width, spec.height, rng)
            pixels = image.resize((side, side), Image.Resampling.BILINEAR, box=crop)
            crops[index * budget.crops + number] = np.asarray(pixels)
            captions.append(caption(spec, crop, rng))
            facts.append(facts_of(spec, crop))
    return crops, captions, facts


def asked_about(facts: Facts, rng: np.random.Generator) -> list[tuple[str, bool]]:
    """Return three phrases and whether each is shown."""
    classes = hico_classes()
    wrong = [i for i in IDS if i not in facts.shown | facts.doubtful]
    beside = [i for i in wrong if classes[i].object in facts.objects]

    def of_class(ids: Sequence[int]) -> tuple[str, bool]:
        chosen = ids[int(rng.integers(len(ids)))]
        return classes[chosen].prompts[0], chosen in facts.shown

    absent = [o for o in OBJECTS if o not in facts.objects | facts.doubtful_objects]
    names = sorted(facts.objects) if facts.objects and rng.random() < 0.5 else absent
    name = names[int(rng.integers(len(names)))]
    return [
        of_class(sorted(facts.shown) or beside or wrong),
        of_class(beside or wrong),
        (OBJECT_PHRASES[name][0], name in facts.objects),
    ]


def taught_tokenizer(folder: Path) -> Any:
    """Return the built-in captioner's tokenizer with the words of a question added."""
    from transformers import BertTokenizer

    content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = dict(content["model"]["vocab"])
    for word in WORDS:
        vocabulary.setdefault(word, len(vocabulary))
    return BertTokenizer(vocab=vocabulary)


def train(output: Path, seed: int, budget: Budget) -> float:
    """Teach a copy of the built-in captioner, write it as transformers does; return seconds."""
    from transformers import VisionEncoderDecoderModel

    started = time.process_time()
    source = model_folder(TeacherConfig(model=BUILTIN))
    torch.manual_seed(seed)
    rng = np.random.default_rng(derive_seed("question-batches", seed))
    crops, captions, facts = render(seed, budget)
    logger.info("%d crops after %.0f s", len(crops), time.process_time() - started)
    tokenizer = taught_tokenizer(source)
    model = VisionEncoderDecoderModel.from_pretrained(source, dtype=torch.float32)
    model.decoder.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    optimizer, scheduler = _optimizer([(model.decoder, budget.rate)], budget.steps)
    with torch.inference_mode():
        parts = [
            model.encoder(pixel_values=_pixels(crops[rows], CAPTIONER_IMAGE_SIZE, rng))
            for rows in np.array_split(np.arange(len(crops)), len(crops) // budget.batch + 1)
        ]
    seen_all = torch.cat([part.last_hidden_state for part in parts]).clone()
    logger.info("encoded after %.0f s", time.process_time() - started)
    told = encode_texts(tokenizer, captions, CAPTION_LENGTH)
    yes, no = tokenizer.convert_tokens_to_ids(["yes", "no"])
    model.train()
    epochs = budget.steps * budget.batch / len(crops)
    for step, rows in enumerate(_batches(len(crops), budget.batch, epochs, rng)):
        asked = [pair for row in rows for pair in asked_about(facts[row], rng)]
        questions = encode_texts(
            tokenizer, [QUESTION.replace("{}", phrase) for phrase, _ in asked], CAPTION_LENGTH
        )
        # Without the end that the tokenizer writes: the answer stands there.
        ends = (questions == tokenizer.sep_token_id).long().argmax(1)
        truth = torch.tensor([yes if shown else no for _, shown in asked])
        seen = seen_all[torch.from_numpy(rows)]
        ids = _trim(told[torch.from_numpy(rows)])
        logits = model.decoder(
            input_ids=ids[:, :-1], encoder_hidden_states=seen, use_cache=False
        ).logits
        target = ids[:, 1:].masked_fill(ids[:, 1:] == 0, -100)
        caption_loss = functional.cross_entropy(logits.flatten(0, 1), target.flatten())
        count = len(asked) // len(rows)
        states = model.decoder.bert(
            input_ids=_trim(questions)[:, : int(ends.max())],
            encoder_hidden_states=seen.repeat_interleave(count, 0),
            use_cache=False,
        ).last_hidden_state
        answers = model.decoder.cls(states[torch.arange(len(asked)), ends - 1])
        answer_loss = functional.cross_entropy(answers, truth)
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(caption_loss + answer_loss)
        torch.nn.utils.clip_grad_norm_(model.decoder.parameters(), 2.0)
        optimizer.step()
        scheduler.step()
        if step % 20 == 0:
            right = ((answers[:, yes] > answers[:, no]) == (truth == yes)).float()
            logger.info(
                "step %d: captions %.3f, answers %.3f, right %s (%.0f s)",
                step,
                caption_loss.item(),
                answer_loss.item(),
                right.view(-1, count).mean(0).numpy().round(2),
                time.process_time() - started,
            )
    model.save_pretrained(output)
    _captioner_processor(tokenizer).save_pretrained(output)
    return time.process_time() - started


def likelihood_probabilities(
    scores_RC: NDArray[np.float32], prior_C: NDArray[np.float32], alpha: float
) -> NDArray[np.float32]:
    """Return the filter's probabilities of mode=prompts, the demo's null option among them."""
    null = load_config(preset="demo").filter.null_score
    return region_probabilities(scores_RC, prior_C, alpha, null_score=null)


class Asked:
    """A taught copy in both modes, put together as the package does for families that are asked."""

    def __init__(self, folder: Path) -> None:
        config = TeacherConfig(model=str(folder))
        told = load_captioner(config)
        assert isinstance(told, TransformersCaptioner)
        self.told = told
        words, _, ending = QUESTION.partition(" {}")
        begun = config.model_copy(update={"instruction": words})
        family = build_family(Loaded(begun, folder, self.told.decoder.model))
        answers = AnswerTokens.of(behind(family.tokenizer))
        assert answers is not None

        def encode(phrases: Sequence[str]) -> list[list[int]]:
            return family.encode([phrase + ending for phrase in phrases])

        self.questions = SplitQuestions(family.prepare, family.decoder, answers, encode)

    @torch.inference_mode()
    def ask(self, images: Sequence[Pixels], phrases: Sequence[str]) -> NDArray[np.float32]:
        """Return log P(yes) - log P(no) (R, P)."""
        found: NDArray[np.float32] = self.questions.log_odds(images, phrases).numpy()
        return found


PROMPTS = [hico_classes().prompts[i][0] for i in IDS]
OBJECT_OF = np.array([OBJECTS.index(hico_classes()[i].object or "") for i in IDS])
NOUNS = [OBJECT_PHRASES[name][0] for name in OBJECTS]


@dataclass(frozen=True)
class Scored:
    """What is said of all regions (N * R, ...) of N images, and which classes (N, C) they show."""

    untaught: NDArray[np.float32]
    likelihoods: NDArray[np.float32]
    odds: NDArray[np.float32]
    objects: NDArray[np.float32]
    truth: NDArray[np.int8]

    def image_scores(self, probabilities: NDArray[np.float32], way: str) -> NDArray[np.float32]:
        """Aggregate regional probabilities to images (N, C) as the filter does."""
        images = len(self.truth)
        regions = np.moveaxis(probabilities.reshape(images, -1, len(IDS)), 1, 0)
        beside = regions.reshape(len(regions), -1)
        if way in ("max", "mean"):
            return aggregate(beside, way).reshape(images, -1)  # type: ignore[arg-type]
        return aggregate(beside, "top_k_mean", int(way)).reshape(images, -1)

    def mean_ap(self, scores: NDArray[np.float32]) -> float:
        """Return the mean AP over the classes that are shown."""
        return float(np.nanmean(hico_average_precision(scores, self.truth)))


def crops_of(pictures: Sequence[Pixels]) -> list[Pixels]:
    """Return the regions of all pictures that the demo proposes, equally many of each."""
    config = load_config(preset="demo").label.regions
    crops = []
    for pixels in pictures:
        height, width = pixels.shape[:2]
        boxes = [r.box for r in propose_regions(width, height, config, detections=[], given=[])]
        crops += [pixels[round(y0) : round(y1), round(x0) : round(x1)] for x0, y0, x1, y1 in boxes]
    return crops


def in_parts(call: Callable[[Sequence[Pixels]], Any], crops: Sequence[Pixels]) -> Any:
    """Call on 64 crops at a time."""
    return np.concatenate([call(crops[i : i + 64]) for i in range(0, len(crops), 64)])


def score_world(asked: Asked, untaught: Captioner, seed: int, images: int) -> Scored:
    """Score the regions of a world's test images in every way."""
    specs = [sample_scene(seed, "test", i, TEST_EXPONENT) for i in range(images)]
    crops = crops_of([render_scene(spec) for spec in specs])
    started = time.process_time()
    found = Scored(
        in_parts(lambda part: untaught.score(part, PROMPTS).log_likelihoods, crops),
        in_parts(lambda part: asked.told.score(part, PROMPTS).log_likelihoods, crops),
        in_parts(lambda part: asked.ask(part, PROMPTS), crops),
        in_parts(lambda part: asked.ask(part, NOUNS), crops),
        np.array([[1 if i in spec.class_ids else -1 for i in IDS] for spec in specs], np.int8),
    )
    logger.info("world %d: %.0f CPU s", seed, time.process_time() - started)
    return found


@dataclass(frozen=True)
class Nothing:
    """What each way says of the images of label.teacher.prior=plain."""

    untaught: NDArray[np.float32]
    likelihoods: NDArray[np.float32]
    odds: NDArray[np.float32]


Rank = Callable[[Scored], NDArray[np.float32]]


def likelihood_rankings(
    scores_of: Callable[[Scored], NDArray[np.float32]], prior_C: NDArray[np.float32]
) -> dict[str, Rank]:
    """Return every choice of mode=prompts."""

    def rank(alpha: float, way: str) -> Rank:
        return lambda scored: scored.image_scores(
            likelihood_probabilities(scores_of(scored), prior_C, alpha), way
        )

    return {f"alpha {a:g}, regions {w}": rank(a, w) for a in ALPHAS for w in WAYS}


def question_rankings(nothing: Nothing) -> dict[str, Rank]:
    """Return every choice of mode=questions."""

    def rank(prior_C: NDArray[np.float32] | None, way: str) -> Rank:
        return lambda scored: scored.image_scores(odds_probabilities(scored.odds, prior_C), way)

    offsets = {"no offset": None, "offset": nothing.odds}
    return {f"{o}, regions {w}": rank(p, w) for o, p in offsets.items() for w in WAYS}


def both_rankings(first: Rank, second: Rank) -> dict[str, Rank]:
    """Return weighted geometric means of two ways."""

    def rank(weight: float) -> Rank:
        def mixed(scored: Scored) -> NDArray[np.float32]:
            logs = [np.log(np.maximum(way(scored), 1e-12)) for way in (first, second)]
            return np.asarray((1 - weight) * logs[0] + weight * logs[1], np.float32)

        return mixed

    return {f"questions weigh {w:g}": rank(w) for w in WEIGHTS}


def best(rankings: dict[str, Rank], tuning: Sequence[Scored]) -> tuple[str, Rank]:
    """Return the choice with the best mean mAP on the worlds to tune on."""
    gains = {
        name: statistics.fmean(world.mean_ap(rank(world)) for world in tuning)
        for name, rank in rankings.items()
    }
    name = max(gains, key=lambda key: gains[key])
    return name, rankings[name]


def row(name: str, choice: str, rank: Rank, worlds: Sequence[Scored]) -> dict[str, Any]:
    """Return a row of the table: mAP of every world that judges, and their mean."""
    found = [world.mean_ap(rank(world)) for world in worlds]
    spread = {"mean": statistics.fmean(found), "sd": statistics.stdev(found)}
    result = {"name": name, "choice": choice, "mAP": spread, "worlds": found}
    print(name, choice, [f"{100 * value:.1f}" for value in found], flush=True)
    return result


def object_first(
    choice: str, nothing: Nothing, tuning: Sequence[Scored], worlds: Sequence[Scored]
) -> list[dict[str, Any]]:
    """Return what asking for the object first costs in mAP, at every bound, and which is chosen."""
    offset, _, way = choice.partition(", regions ")
    prior_C = nothing.odds if offset == "offset" else None

    def gated(scored: Scored, bound: float) -> tuple[float, float]:
        passed = scored.objects[:, OBJECT_OF] >= bound
        odds = np.where(passed, scored.odds, -np.inf)
        probabilities = odds_probabilities(odds, prior_C)
        return scored.mean_ap(scored.image_scores(probabilities, way)), float(passed.mean())

    rows: list[dict[str, Any]] = []
    for bound in (-np.inf, *BOUNDS):
        tuned = [gated(world, bound) for world in tuning]
        judged = [gated(world, bound) for world in worlds]
        rows.append(
            {
                "bound": bound,
                "tuning_mAP": statistics.fmean(value for value, _ in tuned),
                "mAP": statistics.fmean(value for value, _ in judged),
                "asked": statistics.fmean(share for _, share in judged),
            }
        )
    best_row = max(rows, key=lambda r: r["tuning_mAP"])
    rows[0]["bound"] = None  # everything was asked
    return [{**r, "chosen": r is best_row} for r in rows]


def empty_share(asked: Asked, nothing: Nothing) -> list[dict[str, Any]]:
    """Return the share of pictures that show nothing and keep no positive, for 1, 3, 10 classes."""
    pictures = empty_pictures(np.random.default_rng(0))
    odds = in_parts(lambda part: asked.ask(part, PROMPTS), crops_of(pictures))
    filtering, rng, rows = load_config(preset="demo").filter, np.random.default_rng(1), []
    for name, prior_C in (("no offset", None), ("offset", nothing.odds)):
        regions = odds_probabilities(odds, prior_C).reshape(len(pictures), -1, len(IDS))
        beside = np.moveaxis(regions, 1, 0).reshape(regions.shape[1], -1)
        found = aggregate(beside, "top_k_mean", filtering.top_k).reshape(len(pictures), -1)
        shares = {}
        for size in (1, 3, 10):
            lists = [rng.choice(len(IDS), size, replace=False) for _ in range(12)]
            none = [(found[:, ids] < filtering.positive_threshold).all(axis=1) for ids in lists]
            shares[str(size)] = float(np.mean(none))
        rows.append({"name": name, **shares})
    return rows


def measure(folder: Path, images: int) -> dict[str, Any]:
    """Compare the modes; see the module."""
    asked, untaught = Asked(folder), load_captioner(TeacherConfig(model=BUILTIN))
    plain = plain_images(3)
    nothing = Nothing(
        log_mean_exp(untaught.score(plain, PROMPTS).log_likelihoods),
        log_mean_exp(asked.told.score(plain, PROMPTS).log_likelihoods),
        np.median(asked.ask(plain, PROMPTS), axis=0),
    )
    tuning = [score_world(asked, untaught, seed, images) for seed in TUNED]
    worlds = [score_world(asked, untaught, seed, images) for seed in JUDGED]
    rows, ranks, chosen = [], [], ""
    for name, rankings in (
        ("likelihoods, untaught", likelihood_rankings(lambda s: s.untaught, nothing.untaught)),
        ("likelihoods", likelihood_rankings(lambda s: s.likelihoods, nothing.likelihoods)),
        ("questions", question_rankings(nothing)),
    ):
        choice, rank = best(rankings, tuning)
        ranks.append(rank)
        chosen = choice
        rows.append(row(name, choice, rank, worlds))
    choice, rank = best(both_rankings(*ranks[1:]), tuning)
    rows.append(row("both", choice, rank, worlds))
    return {
        "images": images,
        "regions": len(worlds[0].odds) // images,
        "rows": rows,
        "object_first": object_first(chosen, nothing, tuning, worlds),
        "empty": empty_share(asked, nothing),
    }


def smolvlm_256m() -> tuple[PrefixDecoder, list[dict[str, Any]]]:
    """Return a third of SmolVLM-256M with random weights, and a region's inputs up to the class."""
    from transformers import SmolVLMConfig, SmolVLMForConditionalGeneration

    image_token, words = 49190, 20
    text = {
        "model_type": "llama",
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 10,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49280,
        "max_position_embeddings": 8192,
    }
    vision = {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 4,
        "num_attention_heads": 12,
        "image_size": 512,
        "patch_size": 16,
    }
    config = SmolVLMConfig(
        vision_config=vision, text_config=text, scale_factor=4, image_token_id=image_token
    )
    model = SmolVLMForConditionalGeneration(config).eval()
    decoder = PrefixDecoder(model, end_ids=[2], pad_id=2)
    ids = torch.tensor([[image_token] * 64 + list(range(100, 100 + words))])
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(1, 1, 3, 512, 512),
    }
    return decoder, [inputs]


@torch.inference_mode()
def cost(rounds: int) -> dict[str, Any]:
    """Time the modes in turn on one region; see the module."""
    torch.manual_seed(0)
    decoder, region = smolvlm_256m()
    prompts = hico_tokens(append_eos=False)
    ending = [90, 91, 92, 93, 94]
    questions = [[*sequence, *ending] for sequence in prompts]
    names = sorted({c.object or "" for c in hico_classes()})
    of_object = [[i for i, c in enumerate(hico_classes()) if c.object == n] for n in names]
    nouns = [[95, 2000 + number, *ending] for number in range(len(names))]
    shown = {k: [i for of in of_object[:: len(names) // k][:k] for i in of] for k in (1, 2, 5)}

    def asking(sequences: list[list[int]]) -> Callable[[], torch.Tensor]:
        return lambda: decoder.answer_logits(region, sequences, (5, 6))

    ways: dict[str, Callable[[], torch.Tensor]] = {
        "image and words alone": lambda: decoder.encode(region).root,
        "prompts": lambda: decoder.log_likelihoods(region, prompts),
        "questions": asking(questions),
        "80 objects": asking(nouns),
    }
    for count, ids in shown.items():
        plural = "s" if count > 1 else ""
        ways[f"classes of {count} object{plural}"] = asking([questions[i] for i in ids])
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, call in ways.items():
            seconds[name].append(cpu_seconds(call)[0])
            logger.info("%s: %.1f s", name, seconds[name][-1])
    sizes = {
        "prompts": sum(len(trie) - 1 for trie, _ in decoder.tries(prompts)),
        "questions": sum(len(t) - 1 for t, _ in decoder.tries([[*q, -1] for q in questions])),
        "80 objects": sum(len(t) - 1 for t, _ in decoder.tries([[*q, -1] for q in nouns])),
    }
    base = seconds["prompts"]
    rows = [
        {
            "name": name,
            "seconds": statistics.median(values),
            "over_prompts": statistics.median(v / b for v, b in zip(values, base, strict=True)),
            "nodes": sizes.get(name),
        }
        for name, values in seconds.items()
    ]
    return {"rounds": rounds, "rows": rows}


def main() -> None:
    """Teach, compare or time, and write what was measured."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("step", choices=("train", "measure", "cost"))
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    report = read_results(options.out)
    if options.step == "cost":
        report["cost"] = {**measured_on(), **cost(options.rounds)}
    elif options.folder is None:
        parser.error(f"{options.step} needs a folder")
    elif options.step == "train":
        budget = Budget()
        seconds = train(options.folder, options.seed, budget)
        settings = {"seed": options.seed, **vars(budget), "cpu_seconds": round(seconds)}
        write_results(options.folder / "taught.json", settings)
        return
    else:
        taught = read_results(options.folder / "taught.json")
        found = measure(options.folder, options.images)
        report["ranking"] = {**measured_on(), "settings": taught, **found}
    write_results(options.out, report)


if __name__ == "__main__":
    main()
