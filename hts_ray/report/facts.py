"""What the finished stage folders say of a run: settings and models, counts, times, bad images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hts_ray.config import HtsConfig
from hts_ray.labels.evidence import LOG_ODDS, LOG_PROBABILITY
from hts_ray.report.content import StageRow
from hts_ray.report.results import LABEL_SOURCES, number
from hts_ray.store import storage, tables
from hts_ray.store.run import StageFolder, find_stage, finished_stages

Values = Mapping[str, Any]

_VERSIONS = ("hts_ray", "ray", "torch", "transformers", "open_clip_torch", "python")
_HASH = 12  # digits of a hash that are shown


# In the stages' order.
_TABLES = (
    "manifest", "region_scores", "pseudo_labels", "features", "student", "sweep", "predictions",
)  # fmt: skip
_ON_CPUS = {"manifest", "pseudo_labels"}


def stage_rows(run_dir: str) -> list[StageRow]:
    """Return counts, time and throughput of each table's latest folder, in the stages' order.

    GPU-hours are the stage's time with all the GPUs that it was given: a pool that was smaller for
    a while used fewer.
    """
    rows = []
    for table in _TABLES:
        folders = finished_stages(run_dir, table)
        if not folders:
            continue
        stats = folders[-1].stats
        counts = (number(stats, key) for key in ("rows_in", "rows_out", "quarantined"))
        rows_in, rows_out, bad = (None if value is None else int(value) for value in counts)
        seconds = number(stats, "seconds")
        gpus = 0.0 if table in _ON_CPUS else number(stats, "gpus")
        rows.append(
            StageRow(
                name=table.replace("_", " "),
                rows_in=rows_in,
                rows_out=rows_out,
                quarantined=bad,
                seconds=seconds,
                rate=number(stats, "rows_per_second"),
                unit="trials" if table == "sweep" else "images",
                gpu_hours=None if seconds is None or gpus is None else seconds * gpus / 3600,
                note=_stage_note(stats, len(folders)),
            )
        )
    return rows


def _stage_note(stats: Values, folders: int) -> str:
    regions, resumed = number(stats, "regions_per_second"), number(stats, "rows_resumed")
    notes = [
        f"the latest of {folders}" if folders > 1 else "",
        f"{regions:,.0f} regions/s" if regions else "",
        f"time without {resumed:,.0f} images of an earlier, interrupted run" if resumed else "",
    ]
    return ", ".join(filter(None, notes))


def read_quarantine(run_dir: str) -> list[dict[str, Any]]:
    """Return the quarantined images of every table's latest folder, an image once a stage."""
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for table in _TABLES:
        folder = find_stage(run_dir, table)
        path = "" if folder is None else folder.file("quarantine")
        if not path or not storage.list_names(path):
            continue
        found = tables.check_table(tables.read_table(path), tables.QUARANTINE_SCHEMA, path)
        rows |= {(row["image_id"], row["stage"]): row for row in found.to_pylist()}
    return list(rows.values())


def run_facts(run_dir: str, config: HtsConfig, provenance: Values) -> dict[str, dict[str, str]]:
    """Return what was run (data, teacher, filter, student, software): names and values by title.

    What has not run, and what is unknown, is left out.
    """
    parts: dict[str, Values] = {}
    for title, table, facts in (
        ("Data", "manifest", _data_facts),
        ("Teacher", "region_scores", _teacher_facts),
        ("Filter", "pseudo_labels", _filter_facts),
        ("Student", "student", _student_facts),
    ):
        folder = find_stage(run_dir, table)
        parts[title] = {} if folder is None else facts(folder, config)
    parts["Software"] = _software_facts(provenance)
    known = {
        title: {key: str(value) for key, value in entries.items() if value}
        for title, entries in parts.items()
    }
    return {title: entries for title, entries in known.items() if entries}


def _data_facts(folder: StageFolder, config: HtsConfig) -> Values:
    stats = folder.stats
    usable, bad = number(stats, "rows_out"), number(stats, "quarantined")
    images = "" if usable is None else f"{usable:,.0f}" + (f", {bad:,.0f} unusable" if bad else "")
    # A manifest's folder is named by a hash of its rows.
    return {"images": images, "data hash": folder.key, "read from": stats.get("root")}


def _teacher_facts(folder: StageFolder, config: HtsConfig) -> Values:
    info = storage.read_object(folder.file("table.json"))
    teacher = config.label.teacher
    same = info.get("model") in (None, teacher.model)  # else the settings have changed since
    return {
        "model": info.get("model"),
        "revision": teacher.revision if same else "",
        "fingerprint": info.get("model_fingerprint"),
        "precision": info.get("dtype"),
        "reads": _reading(info),
        "regions": _regions(info.get("regions") or {}),
        "settings hash": folder.key,
    }


def _reading(info: Values) -> str:
    kind = info.get("score_kind")
    if kind == LOG_PROBABILITY:
        return "captions, in which classes are found"
    if kind == LOG_ODDS:
        return f"answers to {str(info.get('question')).replace('{}', '(class)')!r}"
    search = info.get("search") or "all"
    return "the likelihood of every class's sentence" if search == "all" else f"search={search}"


def _regions(settings: Values) -> str:
    words = ["the whole image"] if settings.get("whole") else []
    grid = zip(settings.get("grid_scales") or (), settings.get("grid_steps") or (), strict=False)
    words += [f"{steps} x {steps} crops of {scale:g} of a side" for scale, steps in grid]
    if settings.get("detector"):
        revision = settings.get("detector_revision")
        words.append(f"detector {settings['detector']}" + (f"@{revision}" if revision else ""))
    if settings.get("boxes"):
        words.append(f"boxes of {settings['boxes']}")
    return ", ".join(words)


def _filter_facts(folder: StageFolder, config: HtsConfig) -> Values:
    settings = config.filter
    made = storage.read_object(folder.file("table.json"))
    passes = [f"{one['region_scores']} x {one['weight']:g}" for one in made.get("passes") or ()]
    regions = f" of {settings.top_k} regions" if settings.aggregation == "top_k_mean" else ""
    quantile = settings.per_class_quantile
    own = "" if quantile is None else f", or a class's own {quantile:g} quantile"
    return {
        "evidence": f"{settings.aggregation}{regions}",
        "positive from": f"{settings.positive_threshold:g}{own}",
        "negative below": f"{settings.negative_threshold:g}",
        "agreeing regions": f"at least {settings.min_support}",
        "prior": f"alpha {settings.prior_alpha:g}",
        "prior estimated by": settings.prior,
        "combined": f"{', '.join(passes)}: {made['combine']}" if made.get("combine") else "",
        "settings hash": folder.key,
    }


def _student_facts(folder: StageFolder, config: HtsConfig) -> Values:
    stored = storage.read_object(folder.file("student.json"))
    student, info = stored.get("student") or {}, stored.get("info") or {}
    train = info.get("train") or {}
    facts = {
        "model": student.get("model"),
        "pretrained": student.get("pretrained"),
        "image size": stored.get("image_size"),
        "labels": LABEL_SOURCES.get(train.get("labels", "")),
    }
    if info.get("epochs"):  # nothing of the training applies to the zero-shot student
        facts |= {
            "loss": train.get("loss"),
            "epochs": info.get("epochs"),
            "batch": train.get("batch_size"),
            "learning rate": (train.get("optim") or {}).get("lr"),
            "trained part": train.get("trainable"),
            "seed": str(info["seed"]) if "seed" in info else "",
        }
    weights = (stored.get("sha256") or {}).get("model.safetensors", "")
    return {**facts, "weights' sha256": weights[:_HASH], "settings hash": folder.key}


def _software_facts(provenance: Values) -> Values:
    versions = provenance.get("versions") or {}
    hardware = provenance.get("hardware") or {}
    gpus, cores = hardware.get("gpus") or (), hardware.get("cores")
    machine = [f"{cores} cores" if cores else "", str(hardware.get("processor") or "")]
    digits, plus, changes = str(provenance.get("git_commit") or "").partition("+")
    return {
        "versions": ", ".join(f"{name} {versions[name]}" for name in _VERSIONS if name in versions),
        "git commit": digits[:_HASH] + plus + changes,
        "settings hash": provenance.get("settings_hash"),
        "classes' hash": str(provenance.get("class_fingerprint") or "")[:_HASH],
        "driver": ", ".join(filter(None, [*machine, *map(str, gpus)])),
        "last command": provenance.get("updated"),
    }
