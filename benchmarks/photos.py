"""HTS on real photographs, end to end, beside every baseline that a sceptic asks for.

    python benchmarks/photos.py pretrain --flickr DIR --models DIR [--seeds 0]
    python benchmarks/photos.py run --set DIR --classes FILE --models DIR --run-dir DIR [--csv FILE]
    python benchmarks/photos.py table [FILE ...]

`pretrain` makes a captioner and a CLIP of Flickr8k's captions (`photo_models.py`); no class list is
looked at. `run` takes any photographs in class folders, or with a CSV of `filename,label`, and a
class file as `classes.source` takes it. Exact duplicates are dropped, then images are drawn by a
seed into train (whose labels only the supervised row sees), validation (on which every setting is
chosen) and test (scored once). Every step is the product's own: prepare, label on Ray Data, filter,
sweep, train. Students learn the classifier in CLIP's feature space before its projection, on
features that are computed once; test scores are `hts predict`'s, which one row checks. Intervals
are of the difference in mAP over 1,000 bootstraps of the test images, students averaged.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import logging
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import safetensors.numpy
from measured import measured_on, read_results, write_results
from numpy.typing import NDArray

from hts_ray import stages
from hts_ray.config import HtsConfig
from hts_ray.engine.console import print_rows
from hts_ray.engine.run import Run, open_run
from hts_ray.errors import DataError, UserError
from hts_ray.evaluate import label_matrix, read_predictions
from hts_ray.images.manifest import FILE, IMAGE_COLUMNS, open_manifest
from hts_ray.labels.evidence import aggregate_regions
from hts_ray.labels.stage import plan_filter
from hts_ray.metrics import hico_average_precision, mean_average_precision
from hts_ray.store import storage
from hts_ray.store.run import StageFolder
from hts_ray.store.tables import MANIFEST_SCHEMA, write_table
from hts_ray.student.checkpoints import WEIGHTS, description_of
from hts_ray.student.features import Features, plan_features, read_feature_table
from hts_ray.student.head import HeadData, fit_head, head_logits
from hts_ray.student.predict import centered
from hts_ray.student.targets import training_labels
from hts_ray.student.train import plan_train
from hts_ray.sweep.data import load_sweep_data, read_regions, zero_shot_classifier
from hts_ray.sweep.space import Settings, Space, build_space, nested, trial_config
from hts_ray.sweep.trial import fit_classifier, pseudo_label

RESULTS = Path(__file__).parent / "results" / "photos.json"
SIZES = (1800, 400, 1000)  # train, validation, test
SPLITS = ("train", "validation", "test")
DRAWS = 60  # settings that are tried on the validation images, a row
SEEDS = (0, 1, 2)  # students of a row
BOOTSTRAPS = 1000

# Where every row's settings are drawn from; a row adds its own.
FITTED = {
    "train.optim.head_lr": {"low": 3e-4, "high": 3e-2, "log": True},
    "train.loss_temperature": {"choices": [0.0625, 0.25, 0.5, 1.0, 2.0, 4.0]},
    "train.optim.grad_clip": {"choices": [None, 1.0]},
    "train.epochs": {"choices": [5, 10, 20]},
}
FILTERED = {
    "filter.prior_alpha": {"choices": [0.0, 0.5, 0.75, 1.0, 1.25]},
    "filter.temperature": {"low": 0.3, "high": 4.0, "log": True},
    "filter.region_kinds": {"choices": [None, ["whole"]]},
    "filter.top_k": {"choices": [1, 2, 3, 5]},
    "filter.positive_threshold": {"low": 0.3, "high": 0.98},
    "filter.negative_threshold": {"low": 0.005, "high": 0.3, "log": True},
    "filter.per_class_quantile": {"choices": [None, 0.98, 0.95, 0.92, 0.9]},
    "filter.quantile_floor": {"low": 0.05, "high": 0.5},
    "train.soft_labels": {"choices": [False, True]},
}


def pretrain(flickr: Path, models: Path, seeds: Sequence[int]) -> dict[str, Any]:
    """Train one CLIP, and a captioner a seed; what is finished is not made again."""
    import photo_models as made

    captions = made.read_captions(flickr)
    cache, settings = models / "cache", made.PretrainSettings()
    cache.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    grid_NPD, pooled_ND = made.encode_images(captions.paths, cache)
    told: dict[str, Any] = {"settings": vars(settings), "images": len(captions.paths)}
    clip = models / "clip"
    if not (clip / "open_clip_model.safetensors").is_file():
        texts = cache / "texts.npy"
        if not texts.is_file():
            np.save(texts, made.encode_texts(captions.flat[0]))
        found = made.train_clip(pooled_ND, np.load(texts), captions, seeds[0], settings)
        *parts, told["recall_at_10"] = found
        made.write_clip(clip, *parts)
        logging.info("CLIP: caption to image, R@10 %s", told["recall_at_10"])
    for seed in seeds:
        folder = models / f"captioner-{seed}"
        if not (folder / "model.safetensors").is_file():
            model, told[folder.name] = made.train_captioner(grid_NPD, captions, seed, settings)
            made.write_captioner(folder, model)
    told["seconds"] = time.monotonic() - started
    notes = models / "pretraining.json"
    notes.write_text(json.dumps({**read_results(notes), **told}, indent=2) + "\n", "utf-8")
    return told


# ---- the set ------------------------------------------------------------------------------------


def true_classes(
    image_ids: Sequence[str], table: Path | None, names: Sequence[str]
) -> dict[str, int]:
    """Return the class (position in `names`) of every image that has one.

    By a CSV of `filename,label`, whose file names may bear folders of another machine, or by the
    first folder of an image. Names are compared without case, and with spaces for `_`.
    Raises DataError for classes that are not in the class file.
    """
    place = {_plain(name): i for i, name in enumerate(names)}
    labels: dict[str, tuple[str, str]] = {}  # image: its label, and where that stands
    if table is None:
        for image_id in image_ids:
            labels[image_id] = (image_id.split("/")[0], f"folder {image_id.rpartition('/')[0]}")
    else:
        by_name = {image_id.rsplit("/", 1)[-1]: image_id for image_id in image_ids}
        for line, (name, label) in _rows_of(table):
            found = by_name.get(name.replace("\\", "/").rsplit("/", 1)[-1])
            if found is not None:
                labels[found] = (label, f"{table}, line {line}")
    unknown = {
        _plain(label): where for label, where in labels.values() if _plain(label) not in place
    }
    if unknown:
        first, where = next(iter(unknown.items()))
        raise DataError(
            f"{where}: {first!r} is not in the class file, nor are {len(unknown) - 1} others:"
            f" it has {', '.join(names[:8])}{', ...' if len(names) > 8 else ''}"
        )
    if not labels:
        raise DataError(f"{table}: none of its files is among the {len(image_ids)} usable images")
    return {image_id: place[_plain(label)] for image_id, (label, _) in labels.items()}


def _plain(name: str) -> str:
    return " ".join(name.casefold().replace("_", " ").split())


def _rows_of(table: Path) -> list[tuple[int, tuple[str, str]]]:
    """Return the lines of a CSV of filename and label, with their numbers."""
    try:
        with table.open(newline="", encoding="utf-8-sig") as stream:
            reader = csv.DictReader(stream)
            missing = {"filename", "label"} - set(reader.fieldnames or ())
            if missing:
                raise DataError(f"{table}: column {', '.join(sorted(missing))} is missing")
            rows = [(n, (r["filename"] or "", r["label"] or "")) for n, r in enumerate(reader, 2)]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{table} cannot be read: {error}") from error
    return rows


def split_set(run: Run, root: str, table: Path | None, sizes: Sequence[int], seed: int) -> str:
    """Prepare a set, drop what is there twice, and draw its splits; returns the manifest's path."""
    prepared = stages.prepare(run, "folder", root)
    images = open_manifest(prepared.path).table
    class_of = true_classes(images["image_id"].to_pylist(), table, run.class_table.names)
    first: dict[str, int] = {}
    for row, (image_id, uri) in enumerate(zip(*images.select(["image_id", "uri"]), strict=True)):
        if image_id.as_py() in class_of:
            first.setdefault(hashlib.sha256(storage.read_bytes(uri.as_py())).hexdigest(), row)
    rows = np.array(sorted(first.values()))
    if len(rows) < sum(sizes):
        raise DataError(
            f"{root} has {len(rows)} different usable images with a class,"
            f" {sum(sizes)} are asked for: give smaller --sizes"
        )
    rows = np.random.default_rng(seed).permutation(rows)[: sum(sizes)]
    table_of = images.take(pa.array(rows))
    ids = [[int(run.class_table.ids[class_of[i]])] for i in table_of["image_id"].to_pylist()]
    columns: dict[str, Any] = {name: table_of[name] for name in table_of.column_names}
    columns["split"] = np.repeat(SPLITS, sizes)
    columns["positive_ids"] = pa.array(ids, pa.list_(pa.int16()))
    for name in ("negative_ids", "ambiguous_ids"):
        columns[name] = pa.array([[]] * len(rows), pa.list_(pa.int16()))
    manifest = pa.table([columns[name] for name in MANIFEST_SCHEMA.names], schema=None,
                        names=MANIFEST_SCHEMA.names).cast(MANIFEST_SCHEMA)  # fmt: skip
    path = storage.join(run.run_dir, "splits", FILE)
    write_table(path, manifest)
    counts = {**prepared.stats, "labeled": len(class_of), "duplicates": len(class_of) - len(first)}
    storage.write_json(storage.join(run.run_dir, "splits", "counts.json"), counts)
    return path


# ---- rows ---------------------------------------------------------------------------------------


@dataclass
class Row:
    """One row of the table: test scores (N, C) of every student, and what was chosen for it."""

    name: str
    note: str
    scores: list[NDArray[Any]]
    chosen: dict[str, Any] = field(default_factory=dict)
    validation: float | None = None
    counts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Bench:
    """A prepared set: the run, its manifest, and the features of all images in CLIP's space."""

    run: Run
    manifest: str
    folder: str  # of the features
    draws: int
    seeds: Sequence[int]

    @cached_property
    def features(self) -> Features:
        """The features of all usable images."""
        return read_feature_table(self.folder)

    @cached_property
    def start_CD(self) -> NDArray[Any]:
        """The zero-shot classifier in the features' space."""
        return np.asarray(zero_shot_classifier(self.run.config, self.run.class_table))

    @cached_property
    def table(self) -> pa.Table:
        """The manifest with its splits and true labels."""
        return open_manifest(self.manifest).table

    def rows(self, split: str) -> list[int]:
        """Rows of the manifest: a split's usable images."""
        known = set(self.features.image_ids)
        pairs = zip(
            self.table["image_id"].to_pylist(), self.table["split"].to_pylist(), strict=True
        )
        return [row for row, (i, s) in enumerate(pairs) if s == split and i in known]

    def ids(self, split: str) -> list[str]:
        """The ids of a split's usable images, in the order of all scores and labels here."""
        return list(self.table["image_id"].take(pa.array(self.rows(split))).to_pylist())

    def labels(self, split: str) -> NDArray[np.int8]:
        """Annotations (N, C) as the metrics take them."""
        return label_matrix(self.table.take(pa.array(self.rows(split))), self.run.class_table)

    def features_of(self, split: str) -> NDArray[np.float32]:
        """The features (N, D) of a split."""
        return self.features.take(self.ids(split)).features_ND

    def ap(self, scores_NC: NDArray[Any], split: str) -> float:
        """The mAP of scores on a split."""
        return mean_average_precision(hico_average_precision(scores_NC, self.labels(split)))


def zero_shot_rows(bench: Bench) -> list[Row]:
    """CLIP as it is, in its own projected space, by `hts train`, `hts predict`."""
    own = bench.run.changed({
        "student": {"feature_space": "projected"},
        "train": {"labels": "none", "center_images": 500},
        "predict": {"split": "test"},
    })  # fmt: skip
    student = stages.train(own, manifest=bench.manifest)
    logits_NC = predicted(bench, own, student)
    means_C = np.asarray(description_of(student.path)["class_means"], np.float32)
    return [
        Row("zero-shot CLIP", "logits", [logits_NC]),
        Row("zero-shot CLIP, centred", "predict.center", [centered(logits_NC, means_C)]),
    ]


def predicted(bench: Bench, run: Run, student: StageFolder) -> NDArray[Any]:
    """The scores of the test images by `hts predict`, in their order here."""
    folder = stages.predict(run, student, bench.manifest)
    ids, scores_NC = read_predictions(folder.path, run.class_table)
    row = {image_id: n for n, image_id in enumerate(ids)}
    return scores_NC[[row[image_id] for image_id in bench.ids("test")]]


def label(bench: Bench, model: str, splits: Sequence[str]) -> StageFolder:
    """A teacher's pass over some splits, by `hts label`."""
    teacher = {"label": {"teacher": {"model": model}, "splits": list(splits)}}
    return stages.label(bench.run.changed(teacher), bench.manifest)


def teacher_rows(bench: Bench, scores: StageFolder, judged: StageFolder) -> list[Row]:
    """What the teacher says of the test images itself, from the whole image and from all regions.

    The prior is taken from its pass over the training images; alpha is chosen on validation.
    """
    rows = []
    for name, kinds in (("teacher, whole image", ["whole"]), ("teacher, regions", None)):
        base = {"region_kinds": kinds, "prior": "sample", "background": False}
        tried = {}
        for alpha in (0.0, 0.5, 0.75, 1.0, 1.25):
            config = bench.run.changed({"filter": {**base, "prior_alpha": alpha}}).config
            tried[alpha] = (config, _teacher_scores(bench, config, scores, judged, "validation"))
        by_alpha = {alpha: bench.ap(found, "validation") for alpha, (_, found) in tried.items()}
        best = max(by_alpha, key=lambda alpha: by_alpha[alpha])
        found = _teacher_scores(bench, tried[best][0], scores, judged, "test")
        chosen = {"filter.prior_alpha": best}
        rows.append(
            Row(name, "no student", [found], chosen, by_alpha[best], {"by_alpha": by_alpha})
        )
    return rows


def _teacher_scores(
    bench: Bench, config: HtsConfig, scores: StageFolder, judged: StageFolder, split: str
) -> NDArray[Any]:
    info = read_regions(scores.path, "train", 0).info
    regions = replace(read_regions(judged.path, split, 0), info=info)
    found = aggregate_regions(regions, config.filter)
    row = {image_id: n for n, image_id in enumerate(regions.image_ids.tolist())}
    return found.probabilities_NC[[row[image_id] for image_id in bench.ids(split)]]


def pseudo_row(
    bench: Bench, name: str, note: str, passes: Sequence[StageFolder], changes: Mapping[str, Any]
) -> Row:
    """Choose filter and fit on validation, then filter and train by the product's stages.

    Each pass of a teacher has students of its own; the settings told are the first one's.
    """
    found = [_students_of(bench, scores, changes) for scores in passes]
    first = found[0]
    return replace(first, name=name, note=note, scores=[s for row in found for s in row.scores])


def _students_of(bench: Bench, scores: StageFolder, changes: Mapping[str, Any]) -> Row:
    run = bench.run.changed({"filter": {"prior": "sample"}, **changes})
    swept = run.changed({"sweep": {"space": {**FILTERED, **FITTED}}}).config
    space = build_space(swept, scores.path)
    data = load_sweep_data(run.config, run.class_table, scores.path, bench.folder)

    def fit(settings: Mapping[str, Any], seed: int) -> tuple[NDArray[Any], dict[str, Any]]:
        config = trial_config(run.config, settings)
        labels = pseudo_label(data, config)
        return fit_classifier(data, config.train, labels, seed), labels.selection.summary()

    chosen, center, value = choose(bench, space, fit)
    own = run.changed(nested(chosen))
    labels = plan_filter(own, scores).run()
    students = [
        _student(own.changed({"seed": seed}), labels, bench.manifest) for seed in bench.seeds
    ]
    found = [_scores(bench, student, center, "test") for student in students]
    counts = {**labels.stats, **_against_truth(bench, labels)}
    return Row("", "", found, {**chosen, "predict.center": center}, value, counts)


def supervised_row(bench: Bench, name: str, changes: Mapping[str, Any]) -> Row:
    """The same student on the training images' true labels."""
    run = bench.run.changed({"train": {"labels": "annotations"}, **changes})
    space = build_space(bench.run.changed({**changes, "sweep": {"space": FITTED}}).config, "")
    features, truth_NC = bench.features_of("train"), bench.labels("train")
    targets_NC = np.where(truth_NC == 1, 1, -1).astype(np.int8)

    def fit(settings: Mapping[str, Any], seed: int) -> tuple[NDArray[Any], dict[str, Any]]:
        config = trial_config(space.base, settings)
        found = fit_head(
            HeadData(features, targets_NC), bench.start_CD, logit_scale=config.student.logit_scale,
            config=config.train, seed=seed,
        )  # fmt: skip
        return found.classifier_CD, {}

    chosen, center, value = choose(bench, space, fit)
    own = run.changed(nested(chosen))
    students = [_student(own.changed({"seed": seed}), None, bench.manifest) for seed in bench.seeds]
    scores = [_scores(bench, student, center, "test") for student in students]
    return Row(name, "true labels", scores, {**chosen, "predict.center": center}, value)


Fit = Callable[[Settings, int], tuple[NDArray[Any], dict[str, Any]]]


def choose(bench: Bench, space: Space, fit: Fit) -> tuple[Settings, bool, float]:
    """Return the settings that did best on validation, of those drawn, whether centred, and mAP."""
    best: tuple[Settings, bool, float] | None = None
    scale = space.base.student.logit_scale
    for number in range(bench.draws):
        settings = space.draw(0, number) if number else space.own()
        try:
            classifier_CD, _ = fit(settings, 0)
        except DataError:  # the filter leaves no positive, or the loss is not finite
            continue
        for center in (False, True):
            value = bench.ap(
                logits_of(bench, classifier_CD, scale, center, "validation"), "validation"
            )
            if best is None or value > best[2]:
                best = (settings, center, value)
    if best is None:
        raise DataError("none of the drawn settings leaves a label: look at the teacher's scores")
    return best


def logits_of(
    bench: Bench, classifier_CD: NDArray[Any], scale: float, center: bool, split: str
) -> NDArray[Any]:
    """Return a split's scores (N, C) by a classifier, centred by its means over training images."""
    logits_NC = head_logits(bench.features_of(split), classifier_CD, scale)
    if not center:
        return logits_NC
    means_C = head_logits(bench.features_of("train"), classifier_CD, scale).mean(axis=0)
    return centered(logits_NC, means_C)


def _student(run: Run, labels: StageFolder | None, manifest: str) -> StageFolder:
    return plan_train(run, training_labels(run, labels, manifest)).run()


def _scores(bench: Bench, student: StageFolder, center: bool, split: str) -> NDArray[Any]:
    weights = safetensors.numpy.load(storage.read_bytes(student.file(WEIGHTS)))
    return logits_of(bench, weights["classifier"], float(weights["logit_scale"]), center, split)


def _against_truth(bench: Bench, labels: StageFolder) -> dict[str, float]:
    """Return precision and recall of the training images' pseudo-positives, for the record."""
    table = labels.read(["image_id", "positive_ids"])
    found = dict(zip(table["image_id"].to_pylist(), table["positive_ids"].to_pylist(), strict=True))
    ids = bench.run.class_table.ids
    truth = [set(ids[row == 1].tolist()) for row in bench.labels("train")]
    mine = [set(found.get(i) or ()) for i in bench.ids("train")]
    right = sum(len(a & b) for a, b in zip(mine, truth, strict=True))
    total, wanted = sum(map(len, mine)), sum(map(len, truth))
    return {"precision": right / total if total else 0.0, "recall": right / wanted}


# ---- figures ------------------------------------------------------------------------------------


def summarize(bench: Bench, rows: Sequence[Row]) -> dict[str, Any]:
    """Return every row's mAP, its gap closed, and intervals of differences over test images."""
    labels_NC = bench.labels("test")
    random = np.random.default_rng(0)
    draws = [random.integers(len(labels_NC), size=len(labels_NC)) for _ in range(BOOTSTRAPS)]
    boots = {}
    for row in rows:
        aps = [
            [mean_average_precision(hico_average_precision(s[d], labels_NC[d])) for d in draws]
            for s in row.scores
        ]
        boots[row.name] = np.mean(aps, axis=0)
    value = {row.name: float(np.mean([bench.ap(s, "test") for s in row.scores])) for row in rows}
    first, last = rows[0].name, rows[-1].name
    found = []
    for row in rows:
        values = [bench.ap(scores, "test") for scores in row.scores]
        gap = (value[row.name] - value[first]) / (value[last] - value[first])
        gaps_B = (boots[row.name] - boots[first]) / (boots[last] - boots[first])
        found.append({
            "name": row.name,
            "note": row.note,
            "mAP": {
                "mean": value[row.name],
                "sd": statistics.stdev(values) if len(values) > 1 else None,
                "values": values,
            },
            "validation_mAP": row.validation,
            "gap_closed": _interval(gap, gaps_B),
            "settings": row.chosen,
            "labels": row.counts,
        })  # fmt: skip
    pairs = [(a, b) for a, b in COMPARED if a in value and b in value]
    return {
        "rows": found,
        "differences": [
            {"name": f"{a}, less {b}", **_interval(value[a] - value[b], boots[a] - boots[b])}
            for a, b in pairs
        ],
    }


def _interval(value: float, boots_B: NDArray[Any]) -> dict[str, float]:
    low, high = np.quantile(boots_B, (0.025, 0.975))
    return {"mean": value, "low": float(low), "high": float(high)}


# Pairs of rows whose difference has an interval.
COMPARED = (
    ("HTS", "zero-shot CLIP"),
    ("HTS", "zero-shot CLIP, centred"),
    ("HTS", "student on CLIP's labels"),
    ("HTS with CLIP", "student on CLIP's labels"),
    ("HTS with CLIP", "HTS"),
    ("HTS", "HTS with BCE"),
    ("HTS with CLIP", "HTS with CLIP, BCE"),
    ("supervised", "supervised with BCE"),
)


def settings(given: argparse.Namespace) -> HtsConfig:
    """The run's settings: the preset for people's own images, with our models."""
    for folder in (given.models / "clip", *_captioners(given.models)):
        if not folder.is_dir():
            raise DataError(f"{folder} is missing: `photos.py pretrain` writes it")
    return stages.settings(
        "own-images",
        run_dir=str(given.run_dir),
        classes={"source": str(given.classes)},
        label={
            # Every photograph of such a set shows one of its classes.
            "teacher": {"background": "none", "dtype": "bfloat16"},
            "regions": {"grid_scales": [0.7], "grid_steps": [2]},
            "pool": {"max_size": given.workers},
        },
        student={
            "model": f"local-dir:{given.models / 'clip'}", "pretrained": None, "image_size": None,
        },
        train={
            "trainable": "head",
            "min_positives_per_class": 0,
            "augment": {"flip": False},
            "optim": {"lr": 1e-3, "head_lr": 3e-3, "warmup_steps": 0},
            "features": {"local_images": 100_000},
        },
    )  # fmt: skip


def _captioners(models: Path) -> list[Path]:
    return sorted(models.glob("captioner-*")) or [models / "captioner-0"]


def run(given: argparse.Namespace) -> dict[str, Any]:
    """Do every step for one set and return what is written to the JSON."""
    started = time.monotonic()
    config = settings(given)
    opened = open_run(config)
    stages.start(config)
    manifest = split_set(opened, str(given.set), given.csv, given.sizes, given.seed)
    student = plan_train(opened.changed({"train": {"labels": "none"}}), None).run()
    images = open_manifest(manifest).table.select(list(IMAGE_COLUMNS))
    features = plan_features(config.train.features, opened.run_dir, student.path, images).run()
    bench = Bench(opened, manifest, features.path, given.draws, given.students)
    rows = zero_shot_rows(bench)
    captioners = [str(folder) for folder in _captioners(given.models)]
    passes = [label(bench, folder, ["train"]) for folder in captioners]
    judged = label(bench, captioners[0], ["validation", "test"])
    rows += teacher_rows(bench, passes[0], judged)
    bce = {"train": {"loss": "bce"}}
    rows.append(pseudo_row(bench, "HTS", "LSE-Sign", passes, {}))
    rows.append(pseudo_row(bench, "HTS with BCE", "same labels, another loss", passes, bce))
    rows.append(supervised_row(bench, "supervised with BCE", bce))
    rows.append(supervised_row(bench, "supervised", {}))
    counts = storage.read_json(storage.join(opened.run_dir, "splits", "counts.json"))
    report = {
        "classes": opened.class_table.names,
        "sizes": dict(zip(SPLITS, given.sizes, strict=True)),
        "seed": given.seed,
        "students": list(given.students),
        "captioners": len(passes),
        "draws": given.draws,
        "counts": counts,
        "pretraining": read_results(given.models / "pretraining.json"),
        "seconds": time.monotonic() - started,
        **summarize(bench, rows),
    }
    sets = {**read_results(given.out).get("sets", {}), given.name: report}
    write_results(given.out, {**measured_on(), "sets": sets})
    return report


def show(name: str, report: Mapping[str, Any]) -> None:
    """Print a set's table."""
    cells = []
    for row in report["rows"]:
        spread = row["mAP"]["sd"]
        deviation = "" if spread is None else f" ± {100 * spread:.1f}"
        gap = row["gap_closed"]
        cells.append([
            row["name"],
            f"{100 * row['mAP']['mean']:.1f}{deviation}",
            f"{gap['mean']:.2f} ({gap['low']:.2f} to {gap['high']:.2f})",
        ])  # fmt: skip
    print_rows(f"{name}: test mAP in %, {report['sizes']}", ["", "mAP", "gap closed"], cells)
    for pair in report["differences"]:
        low, high = 100 * pair["low"], 100 * pair["high"]
        print(f"{pair['name']}: {100 * pair['mean']:+.1f} ({low:+.1f} to {high:+.1f})")


def main() -> int:
    """Run one of the three commands."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    made = commands.add_parser("pretrain", help="make the CLIP and the captioners")
    made.add_argument("--flickr", type=Path, required=True, help="folder with Flickr8k's files")
    made.add_argument("--models", type=Path, required=True, help="folder to write models to")
    made.add_argument("--seeds", type=int, nargs="+", default=[0], help="a captioner each")
    one = commands.add_parser("run", help="every row on one set of photographs")
    one.add_argument("--set", type=Path, required=True, help="folder of photographs")
    one.add_argument("--csv", type=Path, help="filename,label; else the folders name the classes")
    one.add_argument("--classes", type=Path, required=True, help="class file")
    one.add_argument("--models", type=Path, required=True, help="what `pretrain` wrote")
    one.add_argument("--run-dir", type=Path, required=True)
    one.add_argument("--name", default="actions", help="of the set, in the results")
    one.add_argument("--sizes", type=int, nargs=3, default=SIZES, metavar=("TRAIN", "VAL", "TEST"))
    one.add_argument("--seed", type=int, default=0, help="of the splits")
    one.add_argument("--students", type=int, nargs="+", default=list(SEEDS), help="seeds")
    one.add_argument("--draws", type=int, default=DRAWS, help="settings tried on validation, a row")
    one.add_argument("--workers", type=int, default=2, help="actors of the teacher pass")
    one.add_argument("--out", type=Path, default=RESULTS)
    shown = commands.add_parser("table", help="print what was measured")
    shown.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        if given.command == "pretrain":
            pretrain(given.flickr, given.models, given.seeds)
        elif given.command == "run":
            show(given.name, run(given))
        else:
            for name, report in read_results(given.out).get("sets", {}).items():
                show(name, report)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
