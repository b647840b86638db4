"""What a round of self-training gains or loses on the built-in world.

    python benchmarks/self_training.py {choice,result} [--seeds ...] [--repeats 2]
                                       [--run-dir runs/self_training] [--out FILE]

`choice` tries mixtures and weights on validation worlds (111, 114), `result` the packaged settings
on other worlds (0, 1, 2). Every figure is a difference to the same training without
self-training, on the same world and training seed. Labels are compared with the annotations here
and nowhere else.
Prints a table; writes the same with hardware, versions, settings and date into its part of
benchmarks/results/self_training.json.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from hts_ray import metrics, pipeline
from hts_ray.config import HtsConfig, SelfTrainingConfig, load_config, override
from hts_ray.demo.run import FEW, demo_config, make_world
from hts_ray.engine.console import print_rows
from hts_ray.engine.session import ray_cluster
from hts_ray.evaluate import evaluate_scores, label_matrix, read_annotations
from hts_ray.store.provenance import measured_on, read_results, write_results
from hts_ray.store.run import StageFolder
from hts_ray.store.tables import read_table
from hts_ray.student.predict import score_images

RESULTS = Path(__file__).parent / "results" / "self_training.json"
KEYS = ("mAP", "mAP_known_object", f"few@{FEW}", "label_precision", "label_recall")
# Where the teacher is good there is little to gain, so it is also asked without its regions.
TEACHERS: dict[str, dict[str, Any]] = {
    "regions": {},
    "whole image": {"filter": {"region_kinds": ["whole"], "top_k": 1, "null_score": None}},
}
# The best of a wider grid in the labels' precision and recall on the validation worlds.
GRID: list[dict[str, Any]] = [
    {"mixture": "arithmetic", "temperature": 1.0, "student_weight": 0.2},
    {"mixture": "arithmetic", "temperature": 1.0, "student_weight": 0.35},
    {"mixture": "arithmetic", "temperature": 1.0, "student_weight": 0.5},
    {"mixture": "geometric", "temperature": 1.0, "student_weight": 0.35},
    {"mixture": "geometric", "temperature": 1.0, "student_weight": 0.5},
    {"mixture": "geometric", "temperature": 2.0, "student_weight": 0.5},
]
PACKAGED: list[dict[str, Any]] = [{"rounds": 1}, {"rounds": 2}]


def changed(run: pipeline.Run, values: Mapping[str, Any]) -> pipeline.Run:
    """Return the run with settings changed."""
    return replace(run, config=override(run.config, values))


def measure(
    run: pipeline.Run, manifest: str, labels: StageFolder, student: StageFolder
) -> dict[str, float]:
    """Return the student's test metrics and the precision and recall of its pseudo-labels."""
    table = pipeline.read_manifest(manifest)
    images = table.filter(pc.equal(table["split"], "test"))
    ids, scores_NC = score_images(student.path, images, run.config.predict)
    truth = read_annotations(manifest, run.class_table)
    found = evaluate_scores(ids, scores_NC, truth, run.class_table).to_dict()
    result = {key: float(found[key]) for key in KEYS if key in found}
    stored = {row["image_id"]: row["positive_ids"] for row in read_table(labels.path).to_pylist()}
    train = table.filter(pc.is_in(table["image_id"], pa.array(list(stored))))
    true_NC = label_matrix(train, run.class_table) == metrics.POSITIVE
    ids_C = run.class_table.ids
    found_NC = np.array([np.isin(ids_C, stored[i]) for i in train["image_id"].to_pylist()])
    hits = float((found_NC & true_NC).sum())
    result["label_precision"] = hits / float(found_NC.sum())
    result["label_recall"] = hits / float(true_NC.sum())
    return result


class World:
    """One labeled world, and what was measured on it, by teacher, training seed and setting."""

    def __init__(self, config: HtsConfig, seed: int) -> None:
        run = pipeline.open_run(demo_config(config, seed))
        self.manifest = make_world(run)
        self.scores = pipeline.label(run, self.manifest)
        self.run = changed(run, {"train": {"num_workers": 0}})
        self.seed = seed

    def base(self, teacher: str, repeat: int) -> tuple[pipeline.Run, StageFolder, dict[str, float]]:
        """Filter and train without self-training, with a training seed of its own."""
        seed = 1000 * repeat + self.seed
        run = changed(self.run, {**TEACHERS[teacher], "seed": seed})
        labels = pipeline.filter_labels(run, self.scores)
        student = pipeline.train(run, pipeline.training_labels(run, labels, self.manifest))
        return run, student, measure(run, self.manifest, labels, student)

    def gains(
        self, teacher: str, repeats: int, settings: Sequence[Mapping[str, Any]]
    ) -> list[dict[str, Any]]:
        """Return a record for every setting and training seed: metrics, and those without it."""
        records = []
        for repeat in range(repeats):
            run, student, before = self.base(teacher, repeat)
            for setting in settings:
                own = changed(run, {"self_training": {"rounds": 1, **setting}})
                labels, trained = pipeline.self_train(own, self.scores, student)
                after = measure(own, self.manifest, labels, trained)
                records.append(
                    {
                        "teacher": teacher,
                        "world": self.seed,
                        "repeat": repeat,
                        "setting": dict(setting),
                        "before": before,
                        "after": after,
                    }
                )
                print(name_of(setting), teacher, self.seed, repeat, shown(before, after))
        return records


def name_of(setting: Mapping[str, Any]) -> str:
    """Name a setting in a table."""
    own = {**SelfTrainingConfig().model_dump(), **setting}
    return (
        f"{own['mixture']} w={own['student_weight']:g} T={own['temperature']:g}"
        f" rounds={own.get('rounds') or 1}"
    )


def shown(before: Mapping[str, float], after: Mapping[str, float]) -> str:
    """Show the main figures of one record."""
    return ", ".join(f"{key} {100 * before[key]:.1f} -> {100 * after[key]:.1f}" for key in KEYS)


def summarize(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Mean, standard deviation and standard error of the gains, by teacher and setting."""
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for record in records:
        groups.setdefault((record["teacher"], name_of(record["setting"])), []).append(record)
    summary = []
    for (teacher, name), group in groups.items():
        entry: dict[str, Any] = {"teacher": teacher, "setting": name, "runs": len(group)}
        for key in KEYS:
            values = [record["after"][key] - record["before"][key] for record in group]
            deviation = statistics.stdev(values) if len(values) > 1 else None
            entry[key] = {
                "before": statistics.fmean(record["before"][key] for record in group),
                "after": statistics.fmean(record["after"][key] for record in group),
                "gain": statistics.fmean(values),
                "sd": deviation,
                "standard_error": None if deviation is None else deviation / len(values) ** 0.5,
            }
        summary.append(entry)
    return summary


def print_summary(title: str, summary: Sequence[Mapping[str, Any]]) -> None:
    """Print the gains in points, with their standard errors."""
    rows = []
    for entry in summary:
        cells = []
        for key in KEYS:
            error = entry[key]["standard_error"]
            spread = "" if error is None else f" ± {100 * error:.1f}"
            cells.append(f"{100 * entry[key]['gain']:+.1f}{spread}")
        before = f"{100 * entry['mAP']['before']:.1f}"
        rows.append([f"{entry['teacher']}: {entry['setting']}", before, *cells])
    print_rows(title, ["", "mAP before", *KEYS], rows)


def main() -> None:
    """Measure one part, print its table and write it into the JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("part", choices=("choice", "result"))
    parser.add_argument("--seeds", type=int, nargs="+")
    parser.add_argument("--repeats", type=int, default=2, help="training seeds a world")
    parser.add_argument("--run-dir", default="runs/self_training")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    seeds = options.seeds or ([111, 114] if options.part == "choice" else [0, 1, 2])
    settings = GRID if options.part == "choice" else PACKAGED
    config = load_config(preset="demo", extra={"run_dir": options.run_dir})
    with ray_cluster(config.ray):
        records = [
            record
            for world in (World(config, seed) for seed in seeds)
            for teacher in TEACHERS
            for record in world.gains(teacher, options.repeats, settings)
        ]
    summary = summarize(records)
    print_summary(f"gain in points, mean ± standard error over worlds {seeds}", summary)
    report = read_results(options.out)
    report[options.part] = {
        **measured_on(),
        "seeds": seeds,
        "repeats": options.repeats,
        "settings": config.model_dump(mode="json"),
        "summary": summary,
        "runs": records,
    }
    write_results(options.out, report)


if __name__ == "__main__":
    main()
