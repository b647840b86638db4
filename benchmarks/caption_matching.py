"""Precision, recall and speed of caption matching on the labelled captions of the tests.

    nice -n 10 python benchmarks/caption_matching.py [--rounds 5]

The captions (tests/captions/data/captions.jsonl) were written by one of us in the manner of human
captioners, with the HICO classes each one states; classes that are a matter of opinion are
"allowed" and count neither way. None of the three parts is unseen any more: "dev" was tuned on;
"heldout" was written before any tuning, "final" after most of it, and the mistakes of both were
looked at and their general causes repaired after a first count, which `FIRST_COUNTS` keeps.
Precision and recall are micro-averaged over a kind's captions at probability 0.5; a
kind in which nothing is to be stated has no recall, and its wrong classes are counted instead.
The table goes to stdout, the same numbers with every mistake, hardware, versions and date to
benchmarks/results/caption_matching.json. Speed is CPU time of one process, without the first call.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import statistics
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

from measured import measured_on, write_results

from hts_ray.captions.matching import match_captions
from hts_ray.classes import hico_classes

ROOT = Path(__file__).resolve().parent
CAPTIONS = ROOT.parent / "tests" / "captions" / "data" / "captions.jsonl"
# Micro precision and recall of the first run of each part: what new captions should expect.
FIRST_COUNTS = {
    "dev, before tuning": {"precision": 0.951, "recall": 0.901},
    "heldout, before tuning": {"precision": 0.972, "recall": 0.928},
    "heldout, tuned on dev": {"precision": 0.993, "recall": 0.947},
    "final, first run": {"precision": 0.983, "recall": 0.908},
}
RESULTS = ROOT / "results" / "caption_matching.json"


def scored(rows: list[dict[str, Any]]) -> tuple[dict[str, dict[str, Any]], list[dict[str, Any]]]:
    """Counts and rates by kind ("all" over every kind), and the captions with mistakes."""
    names = {c.class_id: f"{c.verb} {c.object}" for c in hico_classes()}
    counts: dict[str, dict[str, Any]] = defaultdict(
        lambda: {"captions": 0, "right": 0, "wrong": 0, "missed": 0}
    )
    mistakes = []
    for row, match in zip(rows, match_captions([r["caption"] for r in rows]), strict=True):
        said = {names[class_id] for class_id, p in match.items() if p >= 0.5}
        expected = set(row["expected"])
        wrong = sorted(said - expected - set(row["allowed"]))
        missed = sorted(expected - said)
        for kind in (row["kind"], "all"):
            counts[kind]["captions"] += 1
            counts[kind]["right"] += len(said & expected)
            counts[kind]["wrong"] += len(wrong)
            counts[kind]["missed"] += len(missed)
        if wrong or missed:
            mistakes.append({"caption": row["caption"], "wrong": wrong, "missed": missed})
    for found in counts.values():
        said_any, expected_any = found["right"] + found["wrong"], found["right"] + found["missed"]
        found["precision"] = found["right"] / said_any if said_any else None
        found["recall"] = found["right"] / expected_any if expected_any else None
    return dict(counts), mistakes


def captions_per_second(captions: list[str], rounds: int) -> float:
    """Median over rounds, in CPU seconds of this process."""
    match_captions(captions[:10])
    rates = []
    for _ in range(rounds):
        start = time.process_time()
        match_captions(captions)
        rates.append(len(captions) / (time.process_time() - start))
    return statistics.median(rates)


def _shown(rate: float | None) -> str:
    return "    -" if rate is None else f"{rate:5.2f}"


def main() -> None:
    """Score both halves, time them, print the tables and write the JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    rows = [json.loads(line) for line in CAPTIONS.read_text(encoding="utf-8").splitlines()]
    splits = {}
    for split in ("dev", "heldout", "final"):
        counts, mistakes = scored([row for row in rows if row["split"] == split])
        splits[split] = {"kinds": counts, "mistakes": mistakes}
        print(f"{split:20} captions  right  wrong  missed  precision  recall")
        for kind, found in sorted(counts.items(), key=lambda item: (item[0] == "all", item[0])):
            rates = f"{_shown(found['precision'])}   {_shown(found['recall'])}"
            print(
                f"{kind:20} {found['captions']:8} {found['right']:6} {found['wrong']:6}"
                f" {found['missed']:7}      {rates}"
            )
    speed = captions_per_second([row["caption"] for row in rows] * 5, options.rounds)
    print(f"{speed:,.0f} captions a second on one core")
    report = {
        **measured_on(),
        "lemminflect": importlib.metadata.version("lemminflect"),
        "settings": {"rounds": options.rounds, "threshold": 0.5},
        "captions_per_cpu_second": speed,
        "first_counts": FIRST_COUNTS,
        "splits": splits,
    }
    write_results(options.out, report)


if __name__ == "__main__":
    main()
