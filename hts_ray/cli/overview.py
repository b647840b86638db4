"""`hts` alone: the stages, where a run stands, and what to run next."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from rich.markup import escape

from hts_ray import stages
from hts_ray.engine.console import console, duration, print_next, print_rows
from hts_ray.engine.run import BESIDE, CONFIG_FILE
from hts_ray.store import storage
from hts_ray.store.run import StageFolder

RUNS = "runs"
REPORT = "report.html"
_RUN_FILES = (CONFIG_FILE, "provenance.json")
_MAX_RUNS = 20
_STAGES = {
    "manifest": ("prepare", "list the images"),
    "region_scores": ("label", "let the teacher score regions"),
    "pseudo_labels": ("filter", "choose positives and negatives"),
    "student": ("train", "fine-tune the student"),
    "predictions": ("predict", "score images with it"),
    "evaluation": ("evaluate", "compare with annotations"),
}


@dataclass(frozen=True)
class Step:
    """One stage of a run; `begun` where it has a folder, finished or not."""

    command: str
    purpose: str
    stage: StageFolder | None
    begun: bool

    def state(self, now: float) -> str:
        """Return where the stage stands, in words."""
        if self.stage is None:
            return "begun, not finished: run it again, it resumes" if self.begun else "not yet"
        stats = self.stage.stats
        parts = [f"{stats.get('rows_out', 0):,} rows"]
        if stats.get("quarantined"):
            parts.append(f"{stats['quarantined']:,} quarantined")
        if stats.get("seconds"):
            parts.append(f"took {duration(float(stats['seconds']))}")
        return ", ".join([*parts, f"{duration(max(now - stats['finished_at'], 0.0))} ago"])


def steps_of(run_dir: str) -> list[Step]:
    """Return the stages of a run, in order."""
    names = storage.list_names(run_dir)
    return [
        Step(*_STAGES[table], stage, any(name.startswith(f"{table}-") for name in names))
        for table, stage in stages.overview(run_dir)
    ]


def find_runs(folder: str = ".") -> list[str]:
    """Return the run directories in a folder, the latest last: itself, or those in its `runs`.

    Runs of the demo lie one level deeper, those of `hts autolabel` beside the images.
    """
    if _is_run(folder):
        return [folder]
    outer = _inside(storage.join(folder, RUNS) if folder != "." else RUNS)
    outer += [path for path in _inside(folder) if path.endswith(BESIDE)]
    inner = [path for outside in outer if not _is_run(outside) for path in _inside(outside)]
    return sorted(filter(_is_run, [*outer, *inner]), key=_last_change)


def _inside(folder: str) -> list[str]:
    names = storage.list_names(folder)
    return names if folder == "." else [storage.join(folder, name) for name in names]


def _is_run(path: str) -> bool:
    # Other programs have a config.yaml too.
    return all(storage.exists(storage.join(path, name)) for name in _RUN_FILES)


def _last_change(run_dir: str) -> float:
    found = (stage for _, stage in stages.overview(run_dir) if stage is not None)
    return max((float(stage.stats["finished_at"]) for stage in found), default=0.0)


def next_words(run_dir: str, steps: Sequence[Step]) -> list[str]:
    """Return the command that a run needs next."""
    manifest = steps[0].stage
    if manifest is None:
        return ["hts", "prepare", "folder", "--root", "DIR", "--run-dir", run_dir]
    needed = [step.command for step in steps if step.stage is None]
    if not manifest.stats.get("annotated"):
        needed = [command for command in needed if command != "evaluate"]
    if needed:
        return ["hts", needed[0], "--run-dir", run_dir]
    return ["hts", "report", run_dir]


def print_overview(run_dir: str | None) -> None:
    """Print the stages and where a run stands: the one given, or the latest that is found here."""
    others: list[str] = []
    if run_dir is None:
        *others, run_dir = find_runs() or [f"{RUNS}/default"]
    steps, now = steps_of(run_dir), time.time()
    rows = [[f"hts {step.command}", step.purpose, step.state(now)] for step in steps]
    print_rows(f"run {run_dir}", ["stage", "to", "state"], rows, text_columns=3)
    report = storage.join(run_dir, REPORT)
    if storage.exists(report):
        console.print(f"report: {escape(report)}")
    print_next(*next_words(run_dir, steps))
    if others:
        shown = [escape(path) for path in reversed(others)][:_MAX_RUNS]
        more = f" and {len(others) - len(shown)} more" if len(others) > len(shown) else ""
        console.print(f"other runs here (--run-dir): {', '.join(shown)}{more}")
    console.print("`hts COMMAND --help` lists a command's options; `hts demo` needs no data.")
