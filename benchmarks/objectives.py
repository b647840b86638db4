"""How well objectives without labels rank a sweep's settings, measured with test annotations.

    python benchmarks/objectives.py [--seeds 0 1 2] [--trials 64] [--fine-tuned 12] [--out FILE]

On each world the demo preset's own setting and settings drawn from the sweep's default space are
tried as `hts sweep` tries them; once more with the filter's settings alone varied. The truth is the
test mAP of the same student, its classifier fitted on all training images. Every objective is
compared with it by rank correlation and by what its choice would have cost; so is mAP on a few
labeled images. The same is done with teachers made worse by noise, because the built-in teacher is
better than most. Some settings are also trained in full: how well trials foretell that, and, on
one world, how well the finalists' comparison does. Prints tables; writes them with hardware,
versions, settings and date to benchmarks/results/objectives.json. Seeds 110, 111 and 114 were used
to choose the default objective.
"""

from __future__ import annotations

import argparse
import pickle
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from measured import measured_on, read_results, write_results
from scipy.stats import kendalltau, spearmanr

from hts_ray import metrics
from hts_ray.config import HtsConfig, load_config, override
from hts_ray.demo.run import IN_PROCESS, ZERO_SHOT, Variant, demo_config, make_world, run_variant
from hts_ray.engine.console import print_rows
from hts_ray.engine.run import Run, open_run
from hts_ray.engine.session import ray_cluster
from hts_ray.evaluate import label_matrix
from hts_ray.images.manifest import open_manifest
from hts_ray.labels.stage import plan_filter
from hts_ray.store.run import StageFolder
from hts_ray.student.features import plan_features, read_feature_table
from hts_ray.student.head import head_logits
from hts_ray.student.predict import score_images
from hts_ray.student.targets import training_labels
from hts_ray.student.train import plan_train
from hts_ray.sweep.data import SweepData, load_sweep_data, reference
from hts_ray.sweep.objectives import DEFAULT_OBJECTIVE, OBJECTIVES, Outcome
from hts_ray.sweep.space import Space, build_space, nested, trial_config
from hts_ray.sweep.trial import fit_classifier, pseudo_label, run_trial
from hts_ray.teacher.stage import plan_label

RESULTS = Path(__file__).parent / "results" / "objectives.json"
LABELED = (50, 200)  # images with annotations, a criterion to compare with
DRAWS = 20  # of the labeled images
TIMED = 8  # trials that compute the default objective alone
SUBSET = 20  # settings of the sweeps that are drawn from those measured
RESAMPLES = 1000
SPACE_SEED = 0

FloatArray = npt.NDArray[np.float64]
Settings = dict[str, Any]


@dataclass(frozen=True)
class Teacher:
    """Noise in nats added to the stored scores: of an image's class, or of each region's."""

    name: str
    shared: float = 0.0
    own: float = 0.0


TEACHERS = (
    Teacher("as it is"),
    Teacher("noise in each region", own=4.0),
    Teacher("noise shared by an image's regions", shared=4.0),
)


SPACES = {"filter and training": "", "filter alone": "filter."}  # prefix of what is varied


@dataclass(frozen=True)
class World:
    """A world's stages, and what its annotations say of the test and training images."""

    run: Run
    manifest: str
    scores: StageFolder
    data: SweepData
    space: Space
    test: Labeled
    train: Labeled


@dataclass(frozen=True)
class Labeled:
    """Features (N, D) and annotations (N, C) of images."""

    features_ND: npt.NDArray[np.float32]
    labels_NC: npt.NDArray[np.int8]

    def mean_ap(self, classifier_CD: npt.NDArray[np.float32], scale: float) -> float:
        """Return HICO's mAP of a classifier on these images."""
        logits_NC = head_logits(self.features_ND, classifier_CD, scale)
        return metrics.mean_average_precision(
            metrics.hico_average_precision(logits_NC, self.labels_NC)
        )

    def sample(self, size: int, seed: int) -> Labeled:
        """Return so many of the images, drawn at random."""
        rows = np.random.default_rng(seed).choice(len(self.labels_NC), size, replace=False)
        return Labeled(self.features_ND[rows], self.labels_NC[rows])


def open_world(config: HtsConfig, seed: int) -> World:
    """Render, label and encode the world of a seed, where that is not done yet."""
    run = open_run(demo_config(config, seed))
    manifest = make_world(run)
    scores = plan_label(run, run.manifest(manifest)).run()
    zero_shot = run_variant(run.changed(IN_PROCESS), manifest, scores, ZERO_SHOT).student
    assert zero_shot is not None
    features = plan_features(
        run.config.train.features,
        run.run_dir,
        zero_shot.path,
        open_manifest(manifest).rows(),
        flipped=True,
    ).run()
    data = load_sweep_data(run.config, run.class_table, scores.path, features.path)
    space = build_space(run.config, scores.path)
    stored = read_feature_table(features.path)
    table = open_manifest(manifest).table

    def labeled(split: str) -> Labeled:
        rows = table.filter(pc.equal(table["split"], split)).sort_by("image_id")
        found = stored.take(rows["image_id"].to_pylist())
        return Labeled(found.features_ND, label_matrix(rows, run.class_table))

    return World(run, manifest, scores, data, space, labeled("test"), labeled("train"))


def with_noise(data: SweepData, teacher: Teacher, seed: int) -> SweepData:
    """Return the data as a worse teacher would have left them."""
    if not (teacher.shared or teacher.own):
        return data
    regions = data.regions
    rng = np.random.default_rng([seed, 7])
    counts_N = np.diff(regions.offsets_N1)
    classes = regions.scores_GS.shape[1]
    shared_NC = teacher.shared * rng.standard_normal((len(counts_N), classes), dtype=np.float32)
    noise_GC = np.repeat(shared_NC, counts_N, axis=0)
    noise_GC += teacher.own * rng.standard_normal(noise_GC.shape, dtype=np.float32)
    noisy = replace(regions, scores_GS=regions.scores_GS + noise_GC)
    reference_NC = reference(noisy)
    return replace(data, regions=noisy, reference_NC=reference_NC)


def measure(
    world: World, data: SweepData, settings: Sequence[Settings], seed: int
) -> dict[str, Any]:
    """Return every criterion's value of every setting, and the truth."""
    values: dict[str, list[Any]] = {name: [] for name in OBJECTIVES}
    draws = {
        f"mAP of {size} labeled": [world.train.sample(size, draw) for draw in range(DRAWS)]
        for size in LABELED
    }
    truth, counts = [], []
    for entry in settings:
        config = trial_config(data.config, entry)
        labels = pseudo_label(data, config)
        counts.append(labels.selection.summary()["positives_per_image"])
        found = run_trial(data, entry, seed) if counts[-1] else {}
        for name in OBJECTIVES:
            values[name].append(found.get(name, -1.0))  # without labels worse than any other
        classifier_CD = fit_classifier(data, config.train, labels, seed)
        scale = config.student.logit_scale
        truth.append(world.test.mean_ap(classifier_CD, scale))
        for name, samples in draws.items():
            found_draws = [sample.mean_ap(classifier_CD, scale) for sample in samples]
            values.setdefault(name, []).append(found_draws)
    return {"truth": truth, "values": values, "positives_per_image": counts}


def stored_bytes(data: SweepData) -> int:
    """Return the memory of the arrays, what the object store has to hold."""
    buffers: list[pickle.PickleBuffer] = []
    pickle.dumps(data, protocol=5, buffer_callback=buffers.append)
    return sum(buffer.raw().nbytes for buffer in buffers)


def time_trials(data: SweepData, settings: Sequence[Settings]) -> dict[str, float]:
    """Return seconds and CPU seconds of a trial."""
    started, cpu = time.perf_counter(), time.process_time()
    for entry in settings[:TIMED]:
        run_trial(data, entry, 0)
    count = len(settings[:TIMED])
    return {
        "seconds": (time.perf_counter() - started) / count,
        "cpu_seconds": (time.process_time() - cpu) / count,
        "megabytes": stored_bytes(data) / 1e6,
    }


def fine_tune(
    world: World, settings: Sequence[Settings], chosen: Sequence[int], halves: bool
) -> dict[str, dict[str, float]]:
    """Train students in full with some of the settings; returns test mAP and more by number.

    With `halves` also what finalists are compared by: students of both halves of the images.
    """
    result = {}
    for i in chosen:
        variant = Variant(f"sweep {i}", "", nested(settings[i]))
        row = run_variant(world.run.changed(IN_PROCESS), world.manifest, world.scores, variant)
        assert row.student is not None
        result[str(i)] = {"mAP": row.metrics["mAP"]}
        if halves:
            outcome = finalist_outcome(world, settings[i], row.student.path)
            for name, compute in OBJECTIVES.items():
                result[str(i)][name] = compute(outcome)
    return result


def finalist_outcome(world: World, settings: Settings, student: str) -> Outcome:
    """Train a student on each half of the images, and score all images with them and `student`."""
    data, ids = world.data, world.data.regions.image_ids
    config = trial_config(world.run.config, settings)
    longer = {"num_workers": 0, "epochs": 2 * config.train.epochs}
    run = Run(override(config, {"train": longer}), world.run.class_table)
    table = open_manifest(world.manifest).table
    images = table.filter(pc.is_in(table["image_id"], pa.array(ids))).sort_by("image_id")
    fold_N = np.random.default_rng(SPACE_SEED).permutation(np.arange(len(ids)) % 2)

    def logits(path: str) -> npt.NDArray[np.float32]:
        found, logits_NC = score_images(path, images, run.config.predict)
        assert found == ids.tolist()
        return logits_NC

    source = plan_filter(run, world.scores).run()
    labels = training_labels(run, source, None)
    assert labels is not None
    halves = []
    for fold in (0, 1):
        half = labels.filter(pc.is_in(labels["image_id"], pa.array(ids[fold_N == fold])))
        halves.append(logits(plan_train(run, half.combine_chunks()).run().path))
    return Outcome(
        data.reference_NC,
        fold_N.astype(np.int8),
        logits_2NC=np.stack(halves),
        whole_NC=logits(student),
    )


def spread_out(truth: Sequence[float], count: int) -> list[int]:
    """Return the run's own setting (0) and others, evenly from the worst to the best."""
    order = np.argsort(truth)
    places = np.linspace(0, len(order) - 1, max(count - 1, 1)).round().astype(int)
    others = [int(order[place]) for place in places if order[place] != 0]
    return [0, *others][:count]


def columns(values: Sequence[Any]) -> FloatArray:
    """Return values (S,) or draws (S, K) as (S, K): one column for each time it is measured."""
    array = np.asarray(values, dtype=np.float64)
    return array[:, None] if array.ndim == 1 else array


def correlations(measured: Sequence[dict[str, Any]], name: str) -> dict[str, Any]:
    """Mean rank correlation with the truth over worlds, and its bootstrap interval (95%)."""
    pairs = [
        (np.asarray(entry["truth"]), column)
        for entry in measured
        for column in columns(entry["values"][name]).T
    ]
    result: dict[str, Any] = {}
    for key, statistic in (("spearman", spearmanr), ("kendall", kendalltau)):
        by_pair = [float(statistic(truth, value).statistic) for truth, value in pairs]
        rng = np.random.default_rng(0)
        size = len(pairs[0][0])
        resampled = []
        for _ in range(RESAMPLES // (1 if len(pairs) <= 3 else 10)):
            rows = rng.integers(size, size=size)
            found = [statistic(truth[rows], value[rows]).statistic for truth, value in pairs]
            resampled.append(np.nanmean(found))
        low, high = np.nanquantile(resampled, (0.025, 0.975))
        result[key] = {
            "mean": statistics.fmean(by_pair),
            "interval": [float(low), float(high)],
            "by_world": by_pair if len(by_pair) <= len(measured) else None,
        }
    return result


def choices(measured: Sequence[dict[str, Any]], name: str) -> dict[str, Any]:
    """What choosing by a criterion costs, in mAP: over all settings, and in small sweeps.

    `gain` is the chosen setting's true mAP above the own setting's, `regret` the best's above the
    chosen one's; `small` draws `SUBSET` settings at random, the own one among them, many times.
    """
    gains, regrets, small_gains, small_regrets = [], [], [], []
    rng = np.random.default_rng(0)
    for entry in measured:
        truth = np.asarray(entry["truth"])
        for column in columns(entry["values"][name]).T:
            best = int(column.argmax())
            gains.append(truth[best] - truth[0])
            regrets.append(truth.max() - truth[best])
            for _ in range(RESAMPLES):
                drawn = 1 + rng.choice(len(truth) - 1, min(SUBSET, len(truth)) - 1, replace=False)
                rows = np.concatenate([[0], drawn])
                pick = rows[column[rows].argmax()]
                small_gains.append(truth[pick] - truth[0])
                small_regrets.append(truth[rows].max() - truth[pick])
    return {
        "gain": float(np.mean(gains)),
        "gain_worst": float(np.min(gains)),
        "regret": float(np.mean(regrets)),
        "below_own": float(np.mean(np.asarray(gains) < 0)),
        "small": {
            "gain": float(np.mean(small_gains)),
            "regret": float(np.mean(small_regrets)),
            "below_own": float(np.mean(np.asarray(small_gains) < 0)),
        },
    }


def with_full_training(measured: Sequence[dict[str, Any]], name: str) -> list[float] | None:
    """Spearman correlation with the fully trained students' test mAP in each world, averaged."""
    found = []
    for entry in measured:
        tuned: Mapping[str, Mapping[str, float]] = entry.get("fine_tuned") or {}
        if not tuned:
            continue
        rows, full = [int(i) for i in tuned], [value["mAP"] for value in tuned.values()]
        values = entry["truth"] if name == "truth" else entry["values"][name]
        by_draw = [float(spearmanr(column[rows], full).statistic) for column in columns(values).T]
        found.append(statistics.fmean(by_draw))
    return found or None


def finalists(measured: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Spearman correlation of the finalists' comparison with the test mAP of full training."""
    compared = (list((entry.get("fine_tuned") or {}).values()) for entry in measured)
    tuned = next((values for values in compared if values and "unseen_ap" in values[0]), [])
    full = [value["mAP"] for value in tuned]
    return {
        name: float(spearmanr([value[name] for value in tuned], full).statistic)
        for name in (tuned[0] if tuned else {})
        if name != "mAP"
    }


def summarize(measured: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return one row a criterion, the best correlation first."""
    rows = [
        {
            "name": name,
            **correlations(measured, name),
            **choices(measured, name),
            "fine_tuned_spearman": with_full_training(measured, name),
        }
        for name in measured[0]["values"]
    ]
    return sorted(rows, key=lambda row: -row["spearman"]["mean"])


def print_summary(title: str, rows: Sequence[dict[str, Any]]) -> None:
    """Print a table of the criteria."""
    header = [
        "", "Spearman", "95%", "Kendall", "full training", "gain", "worst", "regret",
        f"gain of {SUBSET}", "below own",
    ]  # fmt: skip
    cells = []
    for row in rows:
        low, high = row["spearman"]["interval"]
        full = row["fine_tuned_spearman"]
        cells.append(
            [
                row["name"],
                f"{row['spearman']['mean']:.2f}",
                f"{low:.2f} to {high:.2f}",
                f"{row['kendall']['mean']:.2f}",
                "-" if full is None else f"{statistics.fmean(full):.2f}",
                f"{100 * row['gain']:+.1f}",
                f"{100 * row['gain_worst']:+.1f}",
                f"{100 * row['regret']:.1f}",
                f"{100 * row['small']['gain']:+.1f}",
                f"{row['small']['below_own']:.0%}",
            ]
        )
    print_rows(title, header, cells)


def settings_of(space: Space, prefix: str, trials: int) -> list[Settings]:
    """Return the run's own setting and draws of the space's settings that begin with `prefix`."""
    own = space.own()
    drawn = [space.draw(SPACE_SEED, trial) for trial in range(1, trials)]
    return [own] + [
        {name: value if name.startswith(prefix) else own[name] for name, value in entry.items()}
        for entry in drawn
    ]


def try_settings(config: HtsConfig, seed: int, trials: int) -> dict[str, Any]:
    """Measure one world with every teacher and every space."""
    world = open_world(config, seed)
    tried = {name: settings_of(world.space, prefix, trials) for name, prefix in SPACES.items()}
    measured: dict[str, dict[str, dict[str, Any]]] = {}
    for teacher in TEACHERS:
        data = with_noise(world.data, teacher, seed)
        annotated = np.where(world.train.labels_NC == metrics.POSITIVE, 1, -1)
        ap_C = metrics.hico_average_precision(data.reference_NC, annotated)
        print(f"seed {seed}, teacher {teacher.name}: mAP {100 * np.nanmean(ap_C):.1f}", flush=True)
        measured[teacher.name] = {
            name: {"teacher_map": float(np.nanmean(ap_C)), **measure(world, data, settings, seed)}
            for name, settings in tried.items()
        }
    timing = time_trials(world.data, tried[next(iter(SPACES))])
    return {"seed": seed, "tried": tried, "measured": measured, "trial": timing}


def train_in_full(
    config: HtsConfig, found: dict[str, Any], count: int, halves: bool
) -> dict[str, Any]:
    """Add to a world's record what students trained in full reach with some of its settings."""
    first = next(iter(SPACES))
    clean = found["measured"][TEACHERS[0].name][first]
    usable = [i for i, positives in enumerate(clean["positives_per_image"]) if positives > 0]
    places = spread_out([clean["truth"][i] for i in usable], count)
    world = open_world(config, found["seed"])
    chosen = [usable[place] for place in places]
    clean["fine_tuned"] = fine_tune(world, found["tried"][first], chosen, halves)
    return found


def brief(world: Mapping[str, Any]) -> dict[str, Any]:
    """Return a world's record with the mean over draws in place of every draw."""
    measured = {
        teacher: {
            space: {
                **entry,
                "values": {
                    name: columns(values).mean(axis=1).round(5).tolist()
                    for name, values in entry["values"].items()
                },
            }
            for space, entry in spaces.items()
        }
        for teacher, spaces in world["measured"].items()
    }
    return {**world, "measured": measured}


def main() -> None:
    """Run the seeds, print the tables and write the JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--trials", type=int, default=64)
    parser.add_argument("--fine-tuned", type=int, default=12)
    parser.add_argument("--halves", type=int, default=0, help="world whose finalists are compared")
    parser.add_argument("--run-dir", default="runs/objectives")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    config = load_config(preset="demo", extra={"run_dir": options.run_dir})
    started = time.perf_counter()
    with ray_cluster(config.ray):
        worlds = []
        for seed in options.seeds:
            # A run that was cut off goes on with what it had not measured.
            kept = Path(options.run_dir) / f"measured-{seed}-{options.trials}.json"
            if not kept.exists():
                write_results(kept, try_settings(config, seed, options.trials))
            trained = kept.with_name(f"trained-{options.fine_tuned}-{kept.name}")
            if not trained.exists():
                halves, found = seed == options.halves, read_results(kept)
                write_results(trained, train_in_full(config, found, options.fine_tuned, halves))
            worlds.append(read_results(trained))
    tables: dict[str, dict[str, Any]] = {}
    for teacher in TEACHERS:
        for space in SPACES:
            measured = [world["measured"][teacher.name][space] for world in worlds]
            tables.setdefault(teacher.name, {})[space] = summarize(measured)
            own = ", ".join(f"{100 * entry['truth'][0]:.1f}" for entry in measured)
            best = ", ".join(f"{100 * max(entry['truth']):.1f}" for entry in measured)
            title = f"teacher {teacher.name}, {space}: own setting {own}, best {best}"
            print_summary(title, tables[teacher.name][space])
    clean = [world["measured"][TEACHERS[0].name][next(iter(SPACES))] for world in worlds]
    report = {
        **measured_on(),
        "seconds": time.perf_counter() - started,
        "seeds": options.seeds,
        "default_objective": DEFAULT_OBJECTIVE,
        "settings": config.model_dump(mode="json"),
        "teachers": {teacher.name: [teacher.shared, teacher.own] for teacher in TEACHERS},
        "summary": tables,
        "full_training": {
            "spearman_of_trial_truth": with_full_training(clean, "truth"),
            "spearman_of_finalists": finalists(clean),
        },
        "worlds": [brief(world) for world in worlds],
    }
    print(report["full_training"], [world["trial"] for world in worlds])
    write_results(options.out, report)


if __name__ == "__main__":
    main()
