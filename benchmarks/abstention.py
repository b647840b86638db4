"""Does a teacher say "none of these"? Class lists of 1, 3, 10 and 55, with images that show none.

    python benchmarks/abstention.py [--seeds 0 1 2] [--images 120] [--draws 12] [--passes DIR]

The built-in captioner scores HICO's sentences and all background sentences once on every region of
drawn scenes and of pictures that show no class: noise, one colour, soft colours, scenes without a
figure, and scenes with objects but no person. Class lists are drawn from the world's 55 classes.
Half of a list's images show one of its classes; the others are scenes of other classes and pictures
of every kind. Ways to abstain, each a probability of a class in a region:

- `alone`: the softmax of the classes among themselves;
- `background`: one softmax of the classes and the background sentences;
- `own caption`: log P of the sentence a token, less that of the caption that the model writes;
- `null pictures`: log P, less the highest on twelve pictures of nothing;
- `null run`: log P in standard deviations above the mean of the run's own regions;
- `shipped`: as the filter of the preset own-images has it.

The last is the odds against the background, less what they are on the twelve pictures, times the
softmax of the classes without their prior. The twelve are of the same kinds as the first
three of the pictures, other draws. "P at" is the precision at that recall, with one threshold for
all lists of a size. The other columns are at the threshold with recall 0.9 on the
validation worlds 110 and 111, which chose all settings. "none" is the share of pictures without a
positive. The captioner answers no questions, so yes/no odds have no row. The second table is of the
labels of the preset's filter. Prints two tables; writes benchmarks/results/abstention.json.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from measured import measured_on, write_results
from PIL import Image

from hts_ray.classes import ClassTable, hico_classes
from hts_ray.config import CaptionConfig, FilterConfig, load_config
from hts_ray.demo import world
from hts_ray.demo.figures import world_objects
from hts_ray.images.decode import decode_image
from hts_ray.images.manifest import open_manifest
from hts_ray.images.regions import propose_regions
from hts_ray.images.stage import prepare_manifest
from hts_ray.labels.evidence import Evidence, class_probabilities, with_sample_prior
from hts_ray.labels.select import (
    aggregate,
    background_log_odds,
    odds_probabilities,
    region_probabilities,
    support,
)
from hts_ray.labels.stage import choose_labels
from hts_ray.store import storage
from hts_ray.teacher.background import background_sentences
from hts_ray.teacher.captioner import Captioner
from hts_ray.teacher.models.loading import load_on_device
from hts_ray.teacher.prior import empty_pictures, log_mean_exp

RESULTS = Path(__file__).parent / "results" / "abstention.json"
VALIDATION = (110, 111)
SIZES = (1, 3, 10, 55)
RECALLS = (0.6, 0.8, 0.9)
AT = [f"precision_at_{round(100 * recall)}" for recall in RECALLS]
PICTURES = 24  # of each kind; twice as many with lone objects
KINDS = ("noise", "one colour", "soft colours", "blank", "lone objects")
SHIPPED = "shipped"
Pixels = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Scored:
    """Scores (G, P) of all sentences on the regions of N pictures, and the classes of each.

    `caption_G` is log P a token of the caption that the model writes of a region.
    """

    scores_GP: Floats
    caption_G: Floats
    counts_N: npt.NDArray[np.int64]
    shown: list[set[int]]

    def chosen(self, rows: npt.NDArray[np.int64]) -> Scored:
        """Return some of the pictures."""
        ends_N = np.cumsum(self.counts_N)
        spans = [np.arange(ends_N[i] - self.counts_N[i], ends_N[i]) for i in rows]
        regions = np.concatenate(spans)
        shown = [self.shown[i] for i in rows]
        return Scored(self.scores_GP[regions], self.caption_G[regions], self.counts_N[rows], shown)

    def __add__(self, other: Scored) -> Scored:
        """Return both, one after the other."""
        return Scored(
            np.concatenate([self.scores_GP, other.scores_GP]),
            np.concatenate([self.caption_G, other.caption_G]),
            np.concatenate([self.counts_N, other.counts_N]),
            self.shown + other.shown,
        )


Way = Callable[[Scored], Floats]


class Teacher:
    """The built-in captioner, every sentence that a list may need, and passes that are kept."""

    def __init__(self, passes: Path) -> None:
        hico = hico_classes()
        lone = [background_sentences(hico.subset([i])) for i in world.world_class_ids()]
        texts = [*hico.primary_prompts, *(text for of in lone for text in of)]
        self.texts = list(dict.fromkeys(texts))
        self.place = {text: number for number, text in enumerate(self.texts)}
        self.passes = passes
        self.captioner: Captioner = load_on_device(load_config(preset="demo").label)[0]
        empty = self.captioner.score(empty_pictures(), self.texts)
        self.empty_MP, self.tokens_P = empty.log_likelihoods, empty.token_counts

    def scored(self, name: str, drawn: tuple[list[Pixels], list[set[int]]]) -> Scored:
        """Score pictures on the regions that own-images proposes, or read what was kept."""
        file = self.passes / f"{name}.npz"
        pictures, shown = drawn
        if not file.exists():
            np.savez(file, **self._score(pictures))
        with np.load(file) as kept:
            return Scored(kept["scores"], kept["captions"], kept["counts"], shown)

    def _score(self, pictures: Sequence[Pixels]) -> dict[str, Any]:
        config = load_config(preset="own-images").label.regions
        scores, counts = [], []
        captions: list[float] = []
        for pixels in pictures:
            height, width = pixels.shape[:2]
            boxes = [r.box for r in propose_regions(width, height, config, detections=[], given=[])]
            crops = [pixels[round(y) : round(b), round(x) : round(a)] for x, y, a, b in boxes]
            scores.append(self.captioner.score(crops, self.texts).log_likelihoods)
            said = [best for best, *_ in self.captioner.caption(crops, CaptionConfig())]
            captions += [
                said_of.log_probability / (len(said_of.text.split()) + 1) for said_of in said
            ]
            counts.append(len(crops))
        return {
            "scores": np.concatenate(scores),
            "captions": np.asarray(captions, np.float32),
            "counts": counts,
        }


def scenes(seed: int, images: int) -> tuple[list[Pixels], list[set[int]]]:
    """Return drawn scenes and the class ids that each shows."""
    with TemporaryDirectory() as folder:
        world.write_world(f"{folder}/hico", seed, images, 1)
        prepare = load_config(overrides=["prepare.splits=[train]"]).prepare
        stage = prepare_manifest(prepare, folder, "hico", f"{folder}/hico")
        rows = open_manifest(stage.path).table.to_pylist()
        pixels = [decode_image(storage.read_bytes(row["uri"])).pixels for row in rows]
    return pixels, [set(row["positive_ids"] or ()) for row in rows]


def pictures(seed: int) -> tuple[list[Pixels], list[set[int]]]:
    """Return pictures that show no class, of each of `KINDS` in turn."""
    rng = np.random.default_rng(seed)
    noise = [rng.integers(0, 256, (96, 96, 3), dtype=np.uint8) for _ in range(PICTURES)]
    plain = [np.full((96, 96, 3), rng.integers(0, 256, 3), np.uint8) for _ in range(PICTURES)]
    small = [rng.integers(0, 256, (4, 4, 3), dtype=np.uint8) for _ in range(PICTURES)]
    soft = [np.asarray(Image.fromarray(array).resize((96, 96))) for array in small]
    blank = [lone_objects(seed, i, 0) for i in range(PICTURES)]
    lone = [lone_objects(seed, i, 1 + i % 2) for i in range(2 * PICTURES)]
    found = [*noise, *plain, *soft, *blank, *lone]
    return found, [set()] * len(found)


def lone_objects(seed: int, index: int, count: int) -> Pixels:
    """Draw a scene with so many objects and no person."""
    own = world.derive_seed("lone", seed, index)
    rng = np.random.default_rng(own)
    width, height = world.CANVAS_SIZES[rng.integers(len(world.CANVAS_SIZES))]
    planner = world._Planner(width, height, rng)
    for name in rng.choice(world_objects(), count, replace=False):
        planner.place(-1, str(name), float(rng.uniform(40, 60)), 0.2)
    figures = tuple(sorted(planner.figures, key=lambda figure: figure.y))
    return world.render_scene(world.SceneSpec(width, height, own, figures))


@dataclass(frozen=True)
class Asked:
    """A class list, where its sentences and its background's are, and the images it is asked of."""

    table: ClassTable
    classes: list[int]
    background: list[int]
    images: Scored

    @property
    def true_NC(self) -> npt.NDArray[np.bool_]:
        """Which classes the images show."""
        return np.array([[i in of for i in self.table.ids.tolist()] for of in self.images.shown])


def asked(teacher: Teacher, scenes: Scored, empty: Scored, draws: int, seed: int) -> list[Asked]:
    """Draw class lists of every size, each with images of which half show none of its classes."""
    rng, found = np.random.default_rng(seed), []
    for size in np.repeat(SIZES, [*[draws] * (len(SIZES) - 1), 1]).tolist():
        ids = np.sort(rng.choice(world.world_class_ids(), size, replace=False))
        table = hico_classes().subset(ids)
        showing = np.array([bool(shown & set(ids.tolist())) for shown in scenes.shown])
        has, other = np.flatnonzero(showing), rng.permutation(np.flatnonzero(~showing))
        if not len(has):
            continue
        scenes_of = other[: len(has) // 2]
        pictures_of = rng.permutation(len(empty.shown))[: len(has) - len(scenes_of)]
        images = scenes.chosen(np.concatenate([has, scenes_of])) + empty.chosen(pictures_of)
        places = [teacher.place[text] for text in table.primary_prompts]
        beside = [teacher.place[text] for text in background_sentences(table)]
        found.append(Asked(table, places, beside, images))
    return found


def info_of(teacher: Teacher, of: Asked) -> dict[str, Any]:
    """Return what a teacher pass over the list's images would store, and their own prior."""
    empty_MC = teacher.empty_MP[:, of.classes]
    odds_MC = background_log_odds(empty_MC, teacher.empty_MP[:, of.background])
    info = {
        "class_ids": of.table.ids.tolist(),
        "prior_log_likelihoods": log_mean_exp(empty_MC[:3]).tolist(),
        "null_log_odds": odds_MC.max(axis=0).tolist(),
    }
    return with_sample_prior(info, [(len(of.images.shown), of.images.scores_GP[:, of.classes])])


def ways(teacher: Teacher, of: Asked, config: FilterConfig) -> dict[str, Way]:
    """Return functions of scored regions to probabilities (G, C), by the way to abstain."""
    classes, info = of.classes, info_of(teacher, of)
    nothing_C = teacher.empty_MP[:, classes].max(axis=0)
    own_GC = of.images.scores_GP[:, classes]

    def own_caption(part: Scored) -> Floats:
        a_token_GC = part.scores_GP[:, classes] / teacher.tokens_P[classes]
        return np.asarray(np.exp(np.minimum(a_token_GC - part.caption_G[:, None], 0)))

    def softmax(part: Scored, beside: list[int]) -> Floats:
        return region_probabilities(part.scores_GP[:, [*classes, *beside]])[:, : len(classes)]

    def null_run(part: Scored) -> Floats:
        return odds_probabilities(
            (part.scores_GP[:, classes] - own_GC.mean(axis=0)) / own_GC.std(axis=0)
        )

    return {
        "alone": lambda part: softmax(part, []),
        "background": lambda part: softmax(part, of.background),
        "own caption": own_caption,
        "null pictures": lambda part: odds_probabilities(part.scores_GP[:, classes] - nothing_C),
        "null run": null_run,
        SHIPPED: lambda part: class_probabilities(
            part.scores_GP[:, [*classes, *of.background]], info, config
        ),
    }


def in_images(part: Scored, way: Way, config: FilterConfig) -> Evidence:
    """Aggregate a way's probabilities as the filter does."""
    p_GC = way(part)
    images = np.split(p_GC, np.cumsum(part.counts_N)[:-1])
    names = [f"{i:05d}" for i in range(len(images))]
    return Evidence(
        pa.table({"image_id": names, "uri": names, "split": ["train"] * len(names)}),
        np.stack([aggregate(p_RC, config.aggregation, config.top_k) for p_RC in images]),
        np.stack([support(p_RC, config.support_threshold) for p_RC in images]).astype(np.int16),
        np.ones(len(images), dtype=bool),
    )


def precision_at(p: Floats, true: npt.NDArray[np.bool_]) -> list[float]:
    """Return the best precision at each of `RECALLS` or above."""
    right = np.cumsum(true[np.argsort(-p, kind="stable")])
    precision, recall = right / np.arange(1, len(right) + 1), right / right[-1]
    return [float(precision[np.searchsorted(recall, at - 1e-9) :].max()) for at in RECALLS]


class Tally:
    """What a way says of all lists of one size: probabilities, and of the pictures apart."""

    def __init__(self) -> None:
        self.p: list[Floats] = []
        self.true: list[npt.NDArray[np.bool_]] = []
        self.highest: list[Floats] = []

    def row(self, threshold: float) -> dict[str, float]:
        """Return the columns of a table at a threshold."""
        p, true = np.concatenate(self.p), np.concatenate(self.true)
        positive = p >= threshold
        none = [(highest_N < threshold) for highest_N in self.highest]
        return {
            **dict(zip(AT, precision_at(p, true), strict=True)),
            "precision": float(true[positive].mean()) if positive.any() else float("nan"),
            "recall": float(positive[true].mean()),
            **by_kind(none),
        }


def by_kind(none: list[npt.NDArray[np.bool_]]) -> dict[str, float]:
    """Return the share of pictures without a positive, by kind, over lists."""
    parts = np.split(np.mean(none, axis=0), np.arange(1, len(KINDS)) * PICTURES)
    return {kind: float(part.mean()) for kind, part in zip(KINDS, parts, strict=True)}


def tallies(
    teacher: Teacher, lists: list[Asked], empty: Scored, config: FilterConfig
) -> dict[tuple[int, str], Tally]:
    """Ask every list in every way."""
    found: dict[tuple[int, str], Tally] = {}
    for of in lists:
        for name, way in ways(teacher, of, config).items():
            tally = found.setdefault((len(of.table), name), Tally())
            tally.p.append(in_images(of.images, way, config).probabilities_NC.ravel())
            tally.true.append(of.true_NC.ravel())
            tally.highest.append(in_images(empty, way, config).probabilities_NC.max(axis=1))
    return found


def threshold(validation: dict[tuple[int, str], Tally], way: str) -> float:
    """Return the probability with recall 0.9 on the validation worlds, of lists below 55."""
    chosen = [
        tally for (size, name), tally in validation.items() if name == way and size < SIZES[-1]
    ]
    p = np.concatenate([part for tally in chosen for part in tally.p])
    true = np.concatenate([part for tally in chosen for part in tally.true])
    return float(np.quantile(p[true], 0.1, method="lower"))


def filter_rows(
    teacher: Teacher, lists: list[Asked], empty: Scored, config: FilterConfig, seed: int
) -> list[dict[str, Any]]:
    """Return what the preset's filter makes of a world, by size of the list."""
    rows = []
    for size in SIZES:
        right = positives = truth = 0
        none = []
        for of in [of for of in lists if len(of.table) == size]:
            way, ids = ways(teacher, of, config)[SHIPPED], of.table.ids
            found = choose_labels(in_images(of.images, way, config), config, ids).selection
            positive_NC = found.targets_NC == 1
            right += int((positive_NC & of.true_NC).sum())
            positives += int(positive_NC.sum())
            truth += int(of.true_NC.sum())
            alone = choose_labels(in_images(empty, way, config), config, ids).selection
            none.append(~(alone.targets_NC == 1).any(axis=1))
        rows.append(
            {
                "seed": seed,
                "classes": size,
                "precision": right / max(positives, 1),
                "recall": right / max(truth, 1),
                **by_kind(none),
            }
        )
    return rows


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--images", type=int, default=120)
    parser.add_argument("--draws", type=int, default=12)
    parser.add_argument("--passes", type=Path, help="a folder that keeps the teacher's passes")
    options = parser.parse_args()
    config = load_config(preset="own-images").filter
    with TemporaryDirectory() as folder:
        teacher = Teacher(options.passes or Path(folder))
        lists: dict[int, list[Asked]] = {}
        empty = {}
        for seed in [*VALIDATION, *options.seeds]:
            # The pictures of every world judged are the same: nothing in them is of a world.
            own = seed if seed in VALIDATION else 0
            empty[seed] = teacher.scored(f"pictures-{own}", pictures(own))
            drawn = teacher.scored(f"scenes-{seed}-{options.images}", scenes(seed, options.images))
            lists[seed] = asked(teacher, drawn, empty[seed], options.draws, seed)
            print(f"world {seed}: {len(drawn.shown)} scenes", flush=True)
        validation: dict[tuple[int, str], Tally] = {}
        for seed in VALIDATION:
            add(validation, tallies(teacher, lists[seed], empty[seed], config))
        judged: dict[tuple[int, str], Tally] = {}
        filtered = []
        for seed in options.seeds:
            add(judged, tallies(teacher, lists[seed], empty[seed], config))
            filtered += filter_rows(teacher, lists[seed], empty[seed], config, seed)
    rows = [
        {"classes": size, "way": way, **tally.row(threshold(validation, way))}
        for (size, way), tally in judged.items()
    ]
    for row in [*rows, *filtered]:
        print({k: round(v, 2) if isinstance(v, float) else v for k, v in row.items()})
    settings = {**vars(options), "passes": None, "filter": config.answer_settings()}
    report = {"settings": settings, "ways": rows, "filter": filtered, **measured_on()}
    write_results(RESULTS, report)


def add(all_of: dict[tuple[int, str], Tally], more: dict[tuple[int, str], Tally]) -> None:
    """Take one world's tallies into those of several."""
    for key, tally in more.items():
        into = all_of.setdefault(key, Tally())
        into.p += tally.p
        into.true += tally.true
        into.highest += tally.highest


if __name__ == "__main__":
    main()
