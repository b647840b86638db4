"""What a run's finished stage folders tell: settings and models, counts, times, bad images."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hts_ray.config import HtsConfig, PoolConfig
from hts_ray.report.data import Facts, QuarantineRow, StageRow
from hts_ray.report.evaluations import LABEL_SOURCES, number, read_object
from hts_ray.store import storage, tables
from hts_ray.store.run import StageFolder

Stats = Mapping[str, Any]

_VERSIONS = ("hts_ray", "ray", "torch", "transformers", "open_clip_torch", "python")
_HASH = 12  # digits of a hash that are shown


@dataclass(frozen=True)
class StageKind:
    """A stage's table, what its rows are, and how many GPUs a configuration gives it.

    `gpus` returns None where that cannot be told.
    """

    table: str
    gpus: Callable[[HtsConfig], float | None] = lambda config: 0.0
    unit: str = "images"

    @property
    def name(self) -> str:
        """The table's name in words."""
        return self.table.replace("_", " ")


def _pool_gpus(pool: PoolConfig) -> float:
    return pool.max_size * pool.num_gpus


STAGE_KINDS = (
    StageKind("manifest"),
    StageKind("region_scores", lambda config: _pool_gpus(config.label.pool)),
    StageKind("pseudo_labels"),
    StageKind("features", lambda config: _pool_gpus(config.train.features.pool)),
    StageKind(
        "student",
        lambda config: float(max(1, config.train.num_workers)) if config.train.use_gpu else 0.0,
    ),
    StageKind("student_scores", lambda config: _pool_gpus(config.self_training.pool)),
    StageKind("sweep", lambda config: None, "trials"),
    StageKind("predictions", lambda config: _pool_gpus(config.predict.pool)),
)


@dataclass(frozen=True)
class FinishedStages:
    """Every finished folder of a run, by table, the latest last."""

    folders: Mapping[str, Sequence[tuple[StageFolder, Stats]]]

    @classmethod
    def of(cls, run_dir: str) -> FinishedStages:
        """Look through a run directory once."""
        found: dict[str, list[tuple[StageFolder, Stats]]] = {}
        known = {kind.table for kind in STAGE_KINDS}
        for name in storage.list_names(run_dir):
            table, _, key = name.rpartition("-")
            folder = StageFolder(run_dir, table, key)
            if table in known and folder.finished:
                found.setdefault(table, []).append((folder, folder.stats))
        for entries in found.values():
            entries.sort(key=lambda entry: entry[1].get("finished_at", 0.0))
        return cls(found)

    def latest(self, table: str) -> StageFolder | None:
        """Return the folder of a table that was finished last."""
        entries = self.folders.get(table)
        return entries[-1][0] if entries else None

    def latest_stats(self, table: str) -> Stats:
        """Return what that stage counted; empty without one."""
        entries = self.folders.get(table)
        return entries[-1][1] if entries else {}


def stage_rows(stages: FinishedStages, config: HtsConfig) -> list[StageRow]:
    """Return counts, time and throughput of each table's latest folder, in the stages' order.

    GPU-hours are the stage's time with all the GPUs that the run's settings give it: a pool that
    was smaller for a while used fewer.
    """
    rows = []
    for kind in STAGE_KINDS:
        entries = stages.folders.get(kind.table, ())
        if not entries:
            continue
        stats = entries[-1][1]
        counts = (number(stats, key) for key in ("rows_in", "rows_out", "quarantined"))
        rows_in, rows_out, bad = (None if value is None else int(value) for value in counts)
        seconds, gpus = number(stats, "seconds"), kind.gpus(config)
        rows.append(
            StageRow(
                name=kind.name,
                rows_in=rows_in,
                rows_out=rows_out,
                quarantined=bad,
                seconds=seconds,
                rate=number(stats, "rows_per_second"),
                unit=kind.unit,
                gpu_hours=None if seconds is None or gpus is None else seconds * gpus / 3600,
                note=_stage_note(stats, len(entries)),
            )
        )
    return rows


def _stage_note(stats: Stats, folders: int) -> str:
    notes = []
    if folders > 1:
        notes.append(f"the latest of {folders}")
    regions = number(stats, "regions_per_second")
    if regions:
        notes.append(f"{regions:,.0f} regions/s")
    resumed = number(stats, "rows_resumed")
    if resumed:
        notes.append(f"time without {resumed:,.0f} images of an earlier, interrupted run")
    return ", ".join(notes)


def read_quarantine(stages: FinishedStages) -> list[QuarantineRow]:
    """Return the quarantined images of every table's latest folder, an image once a stage."""
    rows: dict[tuple[str, str], QuarantineRow] = {}
    for kind in STAGE_KINDS:
        folder = stages.latest(kind.table)
        path = "" if folder is None else folder.file("quarantine")
        if not path or not storage.list_names(path):
            continue
        found = tables.check_table(tables.read_table(path), tables.QUARANTINE_SCHEMA, path)
        for row in found.to_pylist():
            rows[row["image_id"], row["stage"]] = QuarantineRow(
                row["image_id"], row["stage"], row["error_kind"], row["error"] or ""
            )
    return list(rows.values())


def run_facts(stages: FinishedStages, config: HtsConfig, provenance: Stats) -> list[Facts]:
    """Return what was run: data, teacher, filter, student and software, as far as it has run."""
    parts = [
        _data_facts(stages),
        _teacher_facts(stages, config),
        _filter_facts(stages, config),
        _student_facts(stages),
        _software_facts(provenance),
    ]
    return [part for part in parts if part.entries]


def _facts(title: str, entries: Mapping[str, Any]) -> Facts:
    """Leave out what is not known."""
    return Facts(title, [(key, str(value)) for key, value in entries.items() if value])


def _data_facts(stages: FinishedStages) -> Facts:
    folder, stats = stages.latest("manifest"), stages.latest_stats("manifest")
    if folder is None:
        return Facts("Data", ())
    usable, bad = number(stats, "rows_out"), number(stats, "quarantined")
    images = "" if usable is None else f"{usable:,.0f}" + (f", {bad:,.0f} unusable" if bad else "")
    # A manifest's folder is named by a hash of its rows.
    entries = {"images": images, "data hash": folder.key, "read from": stats.get("root")}
    return _facts("Data", entries)


def _teacher_facts(stages: FinishedStages, config: HtsConfig) -> Facts:
    folder = stages.latest("region_scores")
    if folder is None:
        return Facts("Teacher", ())
    info = read_object(folder.file("table.json"))
    teacher = config.label.teacher
    same = info.get("model") in (None, teacher.model)  # else the settings have moved on since
    entries = {
        "model": info.get("model"),
        "revision": teacher.revision if same else "",
        "fingerprint": info.get("model_fingerprint"),
        "precision": teacher.dtype if same else "",
        "reads": _reading(info, teacher.mode),
        "regions": _regions(info.get("regions") or {}),
        "settings hash": folder.key,
    }
    return _facts("Teacher", entries)


def _reading(info: Stats, mode: str) -> str:
    if mode == "captions":
        return "captions, in which classes are found"
    search = info.get("search") or "all"
    return "the likelihood of every class's sentence" if search == "all" else f"search={search}"


def _regions(settings: Stats) -> str:
    words = ["the whole image"] if settings.get("whole") else []
    grid = zip(settings.get("grid_scales") or (), settings.get("grid_steps") or (), strict=False)
    words += [f"{steps} x {steps} crops of {scale:g} of a side" for scale, steps in grid]
    if settings.get("detector"):
        revision = settings.get("detector_revision")
        words.append(f"detector {settings['detector']}" + (f"@{revision}" if revision else ""))
    if settings.get("boxes"):
        words.append(f"boxes of {settings['boxes']}")
    return ", ".join(words)


def _filter_facts(stages: FinishedStages, config: HtsConfig) -> Facts:
    folder, settings = stages.latest("pseudo_labels"), config.filter
    if folder is None:
        return Facts("Filter", ())
    regions = f" of {settings.top_k} regions" if settings.aggregation == "top_k_mean" else ""
    quantile = settings.per_class_quantile
    entries = {
        "evidence": f"{settings.aggregation}{regions}",
        "positive from": f"{settings.positive_threshold:g}"
        + ("" if quantile is None else f", or a class's own {quantile:g} quantile"),
        "negative below": f"{settings.negative_threshold:g}",
        "agreeing regions": f"at least {settings.min_support}",
        "prior": f"alpha {settings.prior_alpha:g}",
        "settings hash": folder.key,
    }
    return _facts("Filter", entries)


def _student_facts(stages: FinishedStages) -> Facts:
    folder = stages.latest("student")
    if folder is None:
        return Facts("Student", ())
    stored = read_object(folder.file("student.json"))
    student, info = stored.get("student") or {}, stored.get("info") or {}
    train = info.get("train") or {}
    optim = train.get("optim") or {}
    weights = (stored.get("sha256") or {}).get("model.safetensors", "")
    entries = {
        "model": student.get("model"),
        "pretrained": student.get("pretrained"),
        "image size": stored.get("image_size"),
        "labels": LABEL_SOURCES.get(train.get("labels", "")),
        "loss": train.get("loss"),
        "epochs": info.get("epochs"),
        "batch": train.get("batch_size"),
        "learning rate": optim.get("lr"),
        "trained part": train.get("trainable"),
        "seed": str(info["seed"]) if "seed" in info else "",
        "weights' sha256": weights[:_HASH],
        "settings hash": folder.key,
    }
    if not info.get("epochs"):  # the zero-shot student: nothing of the training applies
        keep = ("model", "pretrained", "image size", "labels", "weights' sha256", "settings hash")
        entries = {key: entries[key] for key in keep}
    return _facts("Student", entries)


def _short_commit(commit: str) -> str:
    digits, plus, changes = commit.partition("+")
    return digits[:_HASH] + plus + changes


def _software_facts(provenance: Stats) -> Facts:
    versions = provenance.get("versions") or {}
    hardware = provenance.get("hardware") or {}
    gpus, cores = hardware.get("gpus") or (), hardware.get("cores")
    machine = [f"{cores} cores" if cores else "", str(hardware.get("processor") or "")]
    entries = {
        "versions": ", ".join(f"{name} {versions[name]}" for name in _VERSIONS if name in versions),
        "git commit": _short_commit(str(provenance.get("git_commit") or "")),
        "settings hash": provenance.get("settings_hash"),
        "classes' hash": str(provenance.get("class_fingerprint") or "")[:_HASH],
        "driver": ", ".join(filter(None, [*machine, *map(str, gpus)])),
        "last command": provenance.get("updated"),
    }
    return _facts("Software", entries)
