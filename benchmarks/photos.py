"""HTS on real photographs, end to end, beside every baseline that a sceptic asks for.

    python benchmarks/photos.py pretrain --flickr DIR --models DIR [--seeds 0]
    python benchmarks/photos.py run --set DIR --classes FILE --models DIR --run-dir DIR [--csv FILE]
    python benchmarks/photos.py table [--out FILE]

`pretrain` makes a captioner and a CLIP of Flickr8k's captions (`photo_models.py`); no class list is
looked at. `run` takes any photographs in class folders, or with a CSV of `filename,label`, and a
class file as `classes.source` takes it. Exact duplicates are dropped, then images are drawn by a
seed into train (whose labels only the supervised rows see), validation (on which every setting is
chosen) and test (scored once). The steps are the product's own: prepare, label on Ray Data, filter,
train. The preset's rows are of own-images as it is, but for CLIP's logit scale, five sentences a
class, no background, since every photograph shows a class, and no mirrored images. The other rows'
settings are drawn; every search begins at the preset's, the one with both teachers also at what was
chosen for each alone. Students learn the classifier in CLIP's feature space before its projection,
on features that are computed once; `--check` compares scores with `hts predict`'s. The teachers
themselves are judged on the training images, whose labels they never see. Intervals are of the
difference in mAP over 400 bootstraps of the test images, students averaged.
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
from hts_ray.errors import ConfigError, DataError, UserError
from hts_ray.evaluate import label_matrix, read_predictions
from hts_ray.images.manifest import FILE, IMAGE_COLUMNS, open_manifest
from hts_ray.labels.passes import TeacherPass, chosen_passes, together
from hts_ray.labels.stage import choose_labels, plan_filter
from hts_ray.metrics import hico_average_precision, mean_average_precision
from hts_ray.store import storage
from hts_ray.store.run import StageFolder, settings_hash
from hts_ray.store.tables import MANIFEST_SCHEMA, write_table
from hts_ray.student.checkpoints import WEIGHTS
from hts_ray.student.features import Features, plan_features, read_feature_table
from hts_ray.student.head import HeadData, fit_head, head_logits
from hts_ray.student.model import build_student
from hts_ray.student.predict import centered
from hts_ray.student.targets import training_labels
from hts_ray.student.train import plan_train
from hts_ray.sweep.data import zero_shot_classifier

Choices = dict[str, tuple[Any, ...]]
Drawn = dict[str, Any]

RESULTS = Path(__file__).parent / "results" / "photos.json"
SIZES = (1800, 400, 1000)  # train, validation, test
SPLITS = ("train", "validation", "test")
DRAWS = 30  # settings that are tried on the validation images, a row
CHANGED = 0.35  # of the settings, in a step from the best so far
SEEDS = (0, 1, 2)  # students of a row
BOOTSTRAPS = 400

# What is drawn for a row: how one teacher pass is read, how several become one, which classes of an
# image are positives, and how the classifier is fitted. The first of each is the preset's.
READ: Choices = {
    "prior_alpha": (1.0, 0.0, 0.5, 0.75, 1.25),
    "temperature": (1.0, 0.5, 2.0),
    "region_kinds": (None, ["whole"]),
    "top_k": (3, 1, 2, 5),
}
TOGETHER: Choices = {
    "weight": (1.0, 0.25, 0.5, 2.0),  # of the captioner; CLIP's is 1
    "combine": ("geometric", "mean"),
}
SELECTED: Choices = {
    "positive_threshold": (0.5, 0.3, 0.4, 0.6, 0.7, 0.8, 0.9),
    "negative_threshold": (0.1, 0.01, 0.03, 0.2),
    "per_class_quantile": (0.995, None, 0.98, 0.95, 0.93, 0.9, 0.85),
    "quantile_floor": (0.2, 0.05, 0.1, 0.3),
    "max_positives_per_image": (8, 1, 2),
}
FITTED: Choices = {
    "logit_scale": (None, 10.0, 50.0, 100.0),  # None: CLIP's own
    "loss_temperature": (1.0, 0.0625, 0.25, 0.5, 2.0, 4.0),
    "epochs": (10, 3, 5, 20),
    "soft_labels": (False, True),
    "head_lr": (3e-3, 3e-4, 1e-3, 1e-2, 3e-2),
    "grad_clip": (1.0, None),
}
LOSSES = {
    "HTS with BCE": "bce",
    "HTS with weighted BCE": "weighted_bce",
    "HTS with focal loss": "focal",
    "HTS with ASL": "asl",
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
    unknown: dict[str, str] = {}
    for label, where in labels.values():
        if _plain(label) not in place:
            unknown.setdefault(_plain(label), where)
    if unknown:
        first, where = next(iter(unknown.items()))
        more = f", nor are {len(unknown) - 1} others" if len(unknown) > 1 else ""
        raise DataError(
            f"{where}: {first!r} is not in the class file{more}:"
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
    """Prepare a set, drop what is there twice, and draw its splits; returns the manifest's path.

    It is done once for the same arguments.
    """
    named = [str(Path(root).resolve()), None if table is None else _rows_of(table)]
    key = settings_hash(named, list(sizes), seed, run.class_table.fingerprint())
    folder = storage.join(run.run_dir, f"splits-{key}")
    if storage.exists(storage.join(folder, "counts.json")):
        return storage.join(folder, FILE)
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
    path = storage.join(folder, FILE)
    write_table(path, manifest)
    stats = {name: prepared.stats[name] for name in ("rows_in", "rows_out", "quarantined")}
    counts = {**stats, "labeled": len(class_of), "duplicates": len(class_of) - len(first)}
    storage.write_json(storage.join(folder, "counts.json"), counts)
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
    drawn: Drawn = field(default_factory=dict)
    student: StageFolder | None = None  # the first, of rows that have some


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
    """CLIP as it is: the cosine behind its own projection, with its own scale."""
    config = bench.run.changed({"student": {"feature_space": "projected"}}).config.student
    student = build_student(config, bench.run.class_table)
    tower = student.visual.state_dict()
    map_ED = tower["head.proj.weight"] if "head.proj.weight" in tower else tower["proj"].T
    texts_CE = student.classifier.detach().numpy()

    def logits(split: str) -> NDArray[Any]:
        features_NE = bench.features_of(split) @ map_ED.numpy().T
        return head_logits(features_NE, texts_CE, config.logit_scale)

    found_NC = logits("test")
    return [
        Row("zero-shot CLIP", "logits", [found_NC]),
        Row("zero-shot CLIP, centred", "", [centered(found_NC, logits("train").mean(axis=0))]),
    ]


def predicted(bench: Bench, run: Run, student: StageFolder) -> NDArray[Any]:
    """The scores of the test images by `hts predict`, in their order here."""
    folder = stages.predict(run, student, bench.manifest)
    ids, scores_NC = read_predictions(folder.path, run.class_table)
    row = {image_id: n for n, image_id in enumerate(ids)}
    return scores_NC[[row[image_id] for image_id in bench.ids("test")]]


def label(bench: Bench, model: str, splits: Sequence[str]) -> StageFolder:
    """A teacher's pass over some splits, by `hts label`."""
    changes = {"label": {"teacher": {"model": model}, "splits": list(splits)}}
    return stages.label(bench.run.changed(changes), bench.manifest)


def teacher_table(bench: Bench, name: str, scores: StageFolder) -> list[dict[str, Any]]:
    """How a teacher itself ranks the training images, whose labels it never sees.

    Read of the whole image, as the mean of all regions and as the best of them; by alpha.
    """
    ways: dict[str, dict[str, Any]] = {
        "whole image": {"region_kinds": ["whole"]},
        "mean of the regions": {"aggregation": "mean"},
        "best region": {"aggregation": "max"},
    }
    found = []
    for way, changes in ways.items():
        value = {}
        for alpha in (0.0, 0.5, 1.0):
            own = {"prior": "sample", "prior_alpha": alpha, **changes}
            config = bench.run.changed({"filter": own}).config.filter
            evidence, _ = together([TeacherPass(scores, config)], config, "train")
            row = {image_id: n for n, image_id in enumerate(evidence.image_ids)}
            rows = [row[image_id] for image_id in bench.ids("train")]
            value[f"{alpha:g}"] = bench.ap(evidence.probabilities_NC[rows], "train")
        found.append({"teacher": name, "way": way, "mAP_by_alpha": value})
    return found


def pseudo_row(
    bench: Bench,
    name: str,
    note: str,
    passes: Sequence[StageFolder],
    changes: Mapping[str, Any],
    beside: tuple[StageFolder, Row] | None = None,
    start: Drawn | None = None,
) -> Row:
    """Students of a teacher's pass, by `hts filter` and `hts train` with what validation chose.

    Each of several passes has students of its own; the settings told are the first one's. `beside`
    is CLIP's own pass, which is combined with each, and its row; the search tries `start` too.
    """
    found = [_students_of(bench, scores, changes, beside, start) for scores in passes]
    scores = [scores for row in found for scores in row.scores]
    return replace(found[0], name=name, note=note, scores=scores)


def _students_of(
    bench: Bench,
    scores: StageFolder,
    changes: Mapping[str, Any],
    beside: tuple[StageFolder, Row] | None,
    start: Drawn | None,
) -> Row:
    run = bench.run.changed({"filter": {"prior": "sample", "aggregation": "top_k_mean"}, **changes})
    choices = {**SELECTED, **FITTED, **READ}
    if beside is not None:
        choices |= {**TOGETHER, **{f"clip.{name}": values for name, values in READ.items()}}
        clips = beside[1].drawn
        start = {**(start or {}), **{f"clip.{name}": clips[name] for name in READ}}
        start |= {name: clips[name] for name in (*SELECTED, *FITTED)}

    def config_of(drawn: Drawn) -> dict[str, Any]:
        chosen = {name: drawn[name] for name in SELECTED}
        read = {name: drawn[name] for name in READ}
        if beside is None:
            return {"filter": {**chosen, **read}, **fitted(drawn)}
        clips = {name: drawn[f"clip.{name}"] for name in READ}
        chosen |= {"combine": drawn["combine"]}
        chosen["passes"] = [
            {"scores": scores.key, "weight": drawn["weight"], "settings": read},
            {"scores": beside[0].key, "weight": 1.0, "settings": clips},
        ]
        return {"filter": chosen, **fitted(drawn)}

    def fit(own: Run) -> NDArray[Any]:
        passes = chosen_passes(own.run_dir, own.config.filter, scores)
        evidence, _ = together(passes, own.config.filter, "train")
        class_ids = np.asarray(passes[0].info["class_ids"], dtype=np.int16)
        labels = choose_labels(evidence, own.config.filter, class_ids)
        targets_NC = labels.selection.targets_NC
        if not (targets_NC == 1).any():
            raise DataError("no positive is left")
        weights_NC = None
        if own.config.train.soft_labels:
            probabilities_NC = labels.evidence.probabilities_NC
            weights_NC = np.where(targets_NC == 1, probabilities_NC, np.float32(1))
        found = bench.features.take(list(evidence.image_ids)).features_ND
        return fit_here(bench, own, HeadData(found, targets_NC, label_weights_NC=weights_NC))

    best = choose(bench, run, choices, config_of, fit, start)
    own = best.run
    labels = plan_filter(own, scores).run()
    students = [
        _student(own.changed({"seed": seed}), labels, bench.manifest) for seed in bench.seeds
    ]
    found = [_scores(bench, student, best.center, "test") for student in students]
    counts = {**labels.stats, **_against_truth(bench, labels)}
    return Row("", "", found, told(best), best.value, counts, best.drawn, students[0])


def preset_row(bench: Bench, name: str, passes: Sequence[Sequence[StageFolder]]) -> Row:
    """Students with the preset's settings, of one pass or of two together: nothing is chosen."""
    found, first = [], None
    for scores in passes:
        named = [{"scores": folder.key} for folder in scores]
        run = bench.run.changed({"filter": {"passes": named if len(named) > 1 else None}})
        labels = plan_filter(run, scores[0]).run()
        for seed in bench.seeds:
            student = _student(run.changed({"seed": seed}), labels, bench.manifest)
            found.append(_scores(bench, student, run.config.predict.center, "test"))
            first = first or student
    counts = {**labels.stats, **_against_truth(bench, labels)}
    return Row(name, "nothing chosen", found, counts=counts, student=first)


def supervised_row(bench: Bench, name: str, changes: Mapping[str, Any]) -> Row:
    """The same student on the training images' true labels."""
    train = {**changes.get("train", {}), "labels": "annotations"}
    run = bench.run.changed({**changes, "train": train})
    targets_NC = np.where(bench.labels("train") == 1, 1, -1).astype(np.int8)
    data = HeadData(bench.features_of("train"), targets_NC)
    # A true label has no probability.
    choices = {**FITTED, "soft_labels": (False,)}
    best = choose(bench, run, choices, fitted, lambda own: fit_here(bench, own, data))
    students = [
        _student(best.run.changed({"seed": seed}), None, bench.manifest) for seed in bench.seeds
    ]
    scores = [_scores(bench, student, best.center, "test") for student in students]
    return Row(name, "true labels", scores, told(best), best.value)


def fitted(drawn: Drawn) -> dict[str, Any]:
    """Return the settings of a fit."""
    train = {name: drawn[name] for name in ("loss_temperature", "epochs", "soft_labels")}
    optim = {name: drawn[name] for name in ("head_lr", "grad_clip")}
    train["optim"] = optim
    scale = drawn["logit_scale"]
    return {"train": train, "student": {} if scale is None else {"logit_scale": scale}}


def fit_here(bench: Bench, run: Run, data: HeadData) -> NDArray[Any]:
    """Fit a classifier (C, D) as `hts train` does, without storing a student."""
    scale = run.config.student.logit_scale
    found = fit_head(data, bench.start_CD, logit_scale=scale, config=run.config.train, seed=0)
    return found.classifier_CD


@dataclass(frozen=True)
class Chosen:
    """What did best on validation: the run with it, whether predictions are centred, its mAP."""

    run: Run
    drawn: Drawn
    center: bool
    value: float


def told(best: Chosen) -> dict[str, Any]:
    """What was chosen for a row, to be read in the results."""
    return {**best.drawn, "loss": best.run.config.train.loss, "predict.center": best.center}


def choose(
    bench: Bench,
    run: Run,
    choices: Choices,
    config_of: Callable[[Drawn], dict[str, Any]],
    fit: Callable[[Run], NDArray[Any]],
    start: Drawn | None = None,
) -> Chosen:
    """Return what does best on validation, of as many draws as every row has.

    The preset's settings come first, then `start`. The rest of the first half is drawn freely
    where there is no `start`; all others change about a third of the settings of the best so far.
    """
    best: Chosen | None = None
    preset = {name: values[0] for name, values in choices.items()}
    starts = [preset] if start is None else [preset, preset | start]
    for number in range(bench.draws):
        random = np.random.default_rng([7, number])
        drawn = {name: v[int(random.integers(len(v)))] for name, v in choices.items()}
        near = best.drawn if best is not None else preset
        if number < len(starts):
            drawn = starts[number]
        elif start is not None or number >= bench.draws // 2:
            drawn = {n: drawn[n] if random.random() < CHANGED else near[n] for n in choices}
        try:
            own = run.changed(config_of(drawn))
            classifier_CD = fit(own)
        except (ConfigError, DataError):  # thresholds that contradict each other, or no positive
            continue
        for center in (False, True):
            scale = own.config.student.logit_scale
            scores_NC = logits_of(bench, classifier_CD, scale, center, "validation")
            value = bench.ap(scores_NC, "validation")
            if best is None or value > best.value:
                best = Chosen(own, drawn, center, value)
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


def predict_difference(bench: Bench, student: StageFolder | None) -> float:
    """Return the largest difference of `hts predict`'s test logits from those here."""
    assert student is not None
    run = bench.run.changed({"predict": {"split": "test", "center": False}})
    return float(
        np.abs(predicted(bench, run, student) - _scores(bench, student, False, "test")).max()
    )


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
    ("preset, captioner", "zero-shot CLIP, centred"),
    ("preset, CLIP as the teacher", "zero-shot CLIP, centred"),
    ("preset, both", "zero-shot CLIP, centred"),
    ("preset, both", "preset, CLIP as the teacher"),
    ("HTS", "zero-shot CLIP"),
    ("HTS", "zero-shot CLIP, centred"),
    ("HTS", "student on CLIP's labels"),
    ("HTS with CLIP", "student on CLIP's labels"),
    ("HTS with CLIP", "HTS"),
    ("HTS", "HTS with BCE"),
    ("supervised", "supervised with BCE"),
)


def settings(given: argparse.Namespace) -> HtsConfig:
    """The run's settings: the preset for people's own images, with our models and sentences."""
    for folder in (given.models / "clip", *_captioners(given.models)):
        if not folder.is_dir():
            raise DataError(f"{folder} is missing: `photos.py pretrain` writes it")
    return stages.settings(
        "own-images",
        run_dir=str(given.run_dir),
        classes={"source": str(given.classes)},
        label={
            # Every photograph of such a set shows one of its classes, which have five sentences.
            "teacher": {"background": "none", "dtype": "bfloat16", "prompt_templates": 5},
            "regions": {"grid_scales": [0.7], "grid_steps": [2]},
            "pool": {"max_size": given.workers},
        },
        student={
            "model": f"local-dir:{given.models / 'clip'}", "pretrained": None, "image_size": None,
            "logit_scale": clip_scale(given.models / "clip"),
        },
        train={"augment": {"flip": False}, "features": {"local_images": 100_000}},
    )  # fmt: skip


def clip_scale(folder: Path) -> float:
    """The factor of the cosine that a CLIP was trained with."""
    with safetensors.safe_open(folder / "open_clip_model.safetensors", "np") as weights:
        return float(np.exp(weights.get_tensor("logit_scale")))


def _captioners(models: Path) -> list[Path]:
    return sorted(p.parent for p in models.glob("captioner-*/config.json")) or [
        models / "captioner-0"
    ]


def run(given: argparse.Namespace) -> dict[str, Any]:
    """Do every step for one set and return what is written to the JSON."""
    started = time.monotonic()
    config = settings(given)
    opened = open_run(config)
    manifest = split_set(opened, str(given.set), given.csv, given.sizes, given.seed)
    student = plan_train(opened.changed({"train": {"labels": "none"}}), None).run()
    images = open_manifest(manifest).table.select(list(IMAGE_COLUMNS))
    features = plan_features(config.train.features, opened.run_dir, student.path, images).run()
    bench = Bench(opened, manifest, features.path, given.draws, given.students)
    rows = zero_shot_rows(bench)
    captioners = [str(folder) for folder in _captioners(given.models)]
    passes = [label(bench, folder, ["train"]) for folder in captioners]
    clip = label(bench, "open_clip:student", ["train"])
    rows += [
        preset_row(bench, "preset, captioner", [[scores] for scores in passes]),
        preset_row(bench, "preset, CLIP as the teacher", [[clip]]),
        preset_row(bench, "preset, both", [[scores, clip] for scores in passes]),
    ]
    own = pseudo_row(bench, "student on CLIP's labels", "no captioner", [clip], {})
    hts = pseudo_row(bench, "HTS", "LSE-Sign", passes, {})
    rows += [own, hts]
    for name, loss in LOSSES.items() if given.losses else ():
        rows.append(pseudo_row(bench, name, "another loss", passes, {"train": {"loss": loss}}))
    both = (clip, own)
    rows.append(pseudo_row(bench, "HTS with CLIP", "both teachers", passes, {}, both, hts.drawn))
    rows.append(supervised_row(bench, "supervised with BCE", {"train": {"loss": "bce"}}))
    rows.append(supervised_row(bench, "supervised", {}))
    teachers = {Path(folder).name: s for folder, s in zip(captioners, passes, strict=True)}
    teachers["CLIP"] = clip
    tables = [teacher_table(bench, name, scores) for name, scores in teachers.items()]
    counts = storage.read_json(str(Path(manifest).with_name("counts.json")))
    report = {
        "classes": opened.class_table.names,
        "sizes": dict(zip(SPLITS, given.sizes, strict=True)),
        "seed": given.seed,
        "students": list(given.students),
        "captioners": len(passes),
        "draws": given.draws,
        "counts": counts,
        "teachers": [row for table in tables for row in table],
        "predict_difference": predict_difference(bench, hts.student) if given.check else None,
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


def main(arguments: Sequence[str] | None = None) -> int:
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
    one.add_argument("--losses", action="store_true", help="rows of the other losses too")
    one.add_argument("--check", action="store_true", help="compare with the scores of hts predict")
    one.add_argument("--out", type=Path, default=RESULTS)
    shown = commands.add_parser("table", help="print what was measured")
    shown.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args(arguments)
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
