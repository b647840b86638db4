"""Does a teacher say "none of these"? Class lists of 1, 3, 10 and 55, with images that show none.

    python benchmarks/abstention.py [--seeds 0 1 2] [--images 160] [--draws 12]

The built-in captioner scores HICO's sentences and all background sentences once on every region
of world images; class lists are drawn from the world's 55 classes and take their scores from that.
Of the images of a list half show one of its classes and half show none. Besides, pictures that
show nothing: noise, one colour, and smooth colours. The filter is that of the preset own-images;
`alone` lets the classes compete among themselves, as without a background.
Precision and recall are of image labels at the filter's thresholds, `none` is the share of pictures
left without a positive. Prints a table; writes it with hardware, versions, settings and date to
benchmarks/results/abstention.json. What makes up the background was chosen on 220 images of seed 0,
thresholds and alpha of own-images on seeds 110 and 111; seeds 1 and 2 chose nothing.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
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
from hts_ray.config import FilterConfig, load_config
from hts_ray.demo.world import world_class_ids, write_world
from hts_ray.images.decode import decode_image
from hts_ray.images.manifest import open_manifest
from hts_ray.images.regions import propose_regions
from hts_ray.images.stage import prepare_manifest
from hts_ray.labels.evidence import Regions, aggregate_regions
from hts_ray.labels.stage import choose_labels
from hts_ray.store import storage
from hts_ray.teacher.background import background_sentences
from hts_ray.teacher.captioner import Captioner
from hts_ray.teacher.models.loading import load_on_device
from hts_ray.teacher.prior import log_mean_exp, plain_images

RESULTS = Path(__file__).parent / "results" / "abstention.json"
SIZES = (1, 3, 10, 55)
PICTURES = 24  # of each kind that shows nothing
KINDS = ("noise", "one colour", "smooth colours")
Pixels = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Scored:
    """Scores (G, P) of all sentences on the regions of N pictures, and the classes of each."""

    scores_GP: npt.NDArray[np.float32]
    counts_N: npt.NDArray[np.int64]
    shown: list[set[int]]


def empty_pictures(rng: np.random.Generator) -> list[Pixels]:
    """Return pictures that show nothing, `PICTURES` of each of `KINDS`."""
    noise = [rng.integers(0, 256, (96, 96, 3), dtype=np.uint8) for _ in range(PICTURES)]
    plain = [np.full((96, 96, 3), rng.integers(0, 256, 3), np.uint8) for _ in range(PICTURES)]
    small = [rng.integers(0, 256, (4, 4, 3), dtype=np.uint8) for _ in range(PICTURES)]
    smooth = [np.asarray(Image.fromarray(array).resize((96, 96), 3)) for array in small]
    return [*noise, *plain, *smooth]


def world_pictures(seed: int, images: int) -> tuple[list[Pixels], list[set[int]]]:
    """Return drawn scenes and the class ids that each shows."""
    with TemporaryDirectory() as folder:
        write_world(f"{folder}/hico", seed, images, 1)
        prepare = load_config(overrides=["prepare.splits=[train]"]).prepare
        stage = prepare_manifest(prepare, folder, "hico", f"{folder}/hico")
        rows = open_manifest(stage.path).table.to_pylist()
        pixels = [decode_image(storage.read_bytes(row["uri"])).pixels for row in rows]
    return pixels, [set(row["positive_ids"] or ()) for row in rows]


def scored(
    captioner: Captioner, pictures: Sequence[Pixels], shown: list[set[int]], texts: Sequence[str]
) -> Scored:
    """Score every sentence on the regions that own-images proposes."""
    config = load_config(preset="own-images").label.regions
    parts = []
    for pixels in pictures:
        height, width = pixels.shape[:2]
        boxes = [r.box for r in propose_regions(width, height, config, detections=[], given=[])]
        crops = [pixels[round(y0) : round(y1), round(x0) : round(x1)] for x0, y0, x1, y1 in boxes]
        parts.append(captioner.score(crops, texts).log_likelihoods)
    return Scored(np.concatenate(parts), np.array([len(part) for part in parts]), shown)


def labels_of(
    part: Scored, table: ClassTable, place: dict[str, int], prior_P: Any, config: FilterConfig
) -> npt.NDArray[np.bool_]:
    """Return the positives (N, C) that the filter makes of a class list's scores."""
    background = background_sentences(table) if config.background else ()
    classes = [place[prompt] for prompt in table.primary_prompts]
    others = [place[sentence] for sentence in background]
    images = storage_table(len(part.counts_N))
    regions = Regions(
        {
            "class_ids": table.ids.tolist(),
            "prior_log_likelihoods": prior_P[classes].tolist(),
            "background_prior": prior_P[others].tolist(),
        },
        images,
        np.concatenate([[0], np.cumsum(part.counts_N)]),
        part.scores_GP[:, [*classes, *others]],
        np.full(int(part.counts_N.sum()), "grid"),
        np.zeros(int(part.counts_N.sum()), np.float32),
    )
    found = choose_labels(aggregate_regions(regions, config), config, table.ids)
    return np.asarray(found.selection.targets_NC == 1)


def storage_table(count: int) -> Any:
    """Return image_id, uri and split of so many pictures."""
    names = [f"{i:05d}" for i in range(count)]
    return pa.table({"image_id": names, "uri": names, "split": ["train"] * count})


def chosen(part: Scored, rows: npt.NDArray[np.int64]) -> Scored:
    """Return some of the pictures."""
    ends = np.cumsum(part.counts_N)
    spans = [np.arange(ends[i] - part.counts_N[i], ends[i]) for i in rows]
    return Scored(
        part.scores_GP[np.concatenate(spans)], part.counts_N[rows], [part.shown[i] for i in rows]
    )


def measure(
    world: Scored, empty: Scored, place: dict[str, int], prior_P: Any, draws: int, seed: int
) -> list[dict[str, Any]]:
    """Return a row for every size of class list and every way to compete."""
    base = load_config(preset="own-images").filter
    ways = {"alone": base.model_copy(update={"background": False}), "background": base}
    rng, rows = np.random.default_rng(seed), []
    lists = {
        size: [hico_classes().subset(np.sort(rng.choice(world_class_ids(), size, replace=False)))
               for _ in range(draws if size < 55 else 1)]
        for size in SIZES
    }  # fmt: skip
    for size in SIZES:
        for way, config in ways.items():
            right = positives = truth = 0
            none: list[Any] = []
            for table in lists[size]:
                ids = table.ids.tolist()
                showing = [bool(shown & set(ids)) for shown in world.shown]
                has, without = np.flatnonzero(showing), np.flatnonzero(~np.array(showing))
                half = min(len(has), len(without)) if size < 55 else len(has)
                if not half:
                    continue
                pick = np.sort([*has[:half], *without[:half]]).astype(np.int64)
                part = chosen(world, pick)
                found_NC = labels_of(part, table, place, prior_P, config)
                true_NC = np.array([[i in shown for i in ids] for shown in part.shown])
                right += int((found_NC & true_NC).sum())
                positives += int(found_NC.sum())
                truth += int(true_NC.sum())
                nothing_N = ~labels_of(empty, table, place, prior_P, config).any(axis=1)
                none.append(nothing_N.reshape(len(KINDS), PICTURES).mean(axis=1))
            rows.append(
                {
                    "seed": seed,
                    "classes": size,
                    "competes": way,
                    "precision": right / max(positives, 1),
                    "recall": right / max(truth, 1),
                    **dict(zip(KINDS, np.mean(none, axis=0).tolist(), strict=True)),
                }
            )
            print(rows[-1], flush=True)
    return rows


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--images", type=int, default=160)
    parser.add_argument("--draws", type=int, default=12)
    options = parser.parse_args()
    label = load_config(preset="demo").label
    captioner, _ = load_on_device(label)
    hico = hico_classes()
    lone = [background_sentences(hico.subset([i])) for i in world_class_ids()]
    texts = list(dict.fromkeys([*hico.primary_prompts, *(text for of in lone for text in of)]))
    place = {text: number for number, text in enumerate(texts)}
    prior_P = log_mean_exp(captioner.score(plain_images(3), texts).log_likelihoods)
    empty_list = empty_pictures(np.random.default_rng(0))
    empty = scored(captioner, empty_list, [set() for _ in empty_list], texts)
    rows = []
    for seed in options.seeds:
        pictures, shown = world_pictures(seed, options.images)
        world = scored(captioner, pictures, shown, texts)
        rows += measure(world, empty, place, prior_P, options.draws, seed)
    write_results(RESULTS, {"settings": vars(options), "rows": rows, **measured_on()})


if __name__ == "__main__":
    main()
