"""Fine-tuning the student: Ray Data feeds it, Ray Train runs it and starts it again.

The driver writes the zero-shot student, turns labels into a dataset of decoded images and starts
the workers; each worker runs `train_loop`. Every epoch is seeded by its number alone, so a run
that goes on from a checkpoint after a crash equals one that was never interrupted, and on CPUs
two runs with the same labels and seed give the same bytes.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.dataset as pads
import safetensors.torch
import torch

from hts_ray.config import TrainConfig
from hts_ray.engine.compat import interruptible
from hts_ray.engine.mistakes import user_error, users_mistakes_unwrapped
from hts_ray.engine.run import Run, Stage
from hts_ray.engine.telemetry import Meter
from hts_ray.errors import DataError, UserError
from hts_ray.store import storage
from hts_ray.store.aliases import TrainingTold
from hts_ray.store.run import StageFolder, content_hash, rows_hash, settings_hash
from hts_ray.student import resume, targets
from hts_ray.student.augment import stored_size
from hts_ray.student.checkpoints import DESCRIPTION, description_of, load_student, save_student
from hts_ray.student.checks import check_train
from hts_ray.student.feed import (
    Feed,
    Kept,
    choose_kept,
    fed_images,
    mean_file_bytes,
    object_store_bytes,
)
from hts_ray.student.head import fit_on_features
from hts_ray.student.loop import train_loop
from hts_ray.student.measure import measure_pace, seconds_per_step
from hts_ray.student.model import (
    Student,
    build_student,
    checkpoint_activations,
    parameter_groups,
    set_trainable,
    source_fingerprint,
    with_learnt_scale,
)
from hts_ray.student.predict import score_images
from hts_ray.student.progress import training_progress
from hts_ray.student.targets import (
    WORK,
    Task,
    TrainingSet,
    ValidationSet,
    label_columns,
    training_set,
    write_rows,
)

if TYPE_CHECKING:
    import ray.data


def plan_train(
    run: Run,
    labels: pa.Table | pads.Dataset | None,
    validation: pa.Table | None = None,
    center: pa.Table | None = None,
) -> Stage:
    """Plan a training on labels; None stores the zero-shot student.

    `validation`, annotated rows of a manifest, is measured while the training runs. The mean logits
    over the images `center` (image_id, uri, split) are kept with the student.
    """
    config = run.config
    if isinstance(labels, pa.Table):
        labels = pads.dataset(labels)
    key = settings_hash(
        config.train.answer_settings(),
        config.student.answer_settings(),
        source_fingerprint(config.student),
        config.seed,
        run.class_table.fingerprint(),
        None if labels is None else rows_hash(labels, label_columns(config.train)),
        *([] if center is None else [content_hash(center)]),
    )
    folder = run.stage("student", key)

    def work(progress: TrainingTold | None) -> object:
        return train_student(run, labels, folder, validation, progress, center)

    return Stage(folder, {"student": config.student.model, "labels": config.train.labels}, work)


def train_student(
    run: Run,
    labels: pa.Table | pads.Dataset | None,
    stage: StageFolder,
    validation: pa.Table | None = None,
    progress: TrainingTold | None = None,
    center: pa.Table | None = None,
) -> dict[str, Any]:
    """Fine-tune a student on labels and publish it in `stage`; returns the stage's stats.

    `labels` has image_id, uri, positive_ids and ignored_ids (class ids), and probability (one per
    positive) for soft labels; every other class is negative. None publishes the zero-shot
    student. `validation`, annotated rows of a manifest, are scored while the training runs. A
    run that was cut off goes on from its last checkpoint. `progress` gets the records that
    `student.progress` lists, from another thread. Raises DataError when no label or image can be
    used or the loss stops being finite, ConfigError for settings that do not fit together,
    UserError when the workers kept failing.
    """
    started = time.monotonic()
    _check(run)
    data = None
    if labels is not None:
        data = training_set(labels, run.class_table, run.config.train)
    initial = _write_initial(run, stage)
    outcome: dict[str, Any] = {"history": []}
    counts = {"rows_in": 0, "rows_out": 0, "quarantined": 0}
    if data is not None:
        known = None if validation is None else ValidationSet.of(validation, run.class_table)
        task = Task(run, data, known, stage, initial, progress)
        outcome = fit_on_features(task) if task.config.trainable == "head" else _fit(task)
        bad = targets.gather_quarantine(task)
        Meter.of(stage, "train").count(quarantined=bad)
        counts = {
            "rows_in": data.images,
            "rows_out": data.images - bad,
            "quarantined": bad,
            "rows_trained": outcome["history"][-1]["images"],
            **outcome["kept"],
            "classes_with_positives": data.classes_with_positives,
            "dropped_class_ids": data.dropped_ids,
        }
    _save(run, stage, load_student(initial), outcome, center)
    last = outcome["history"][-1] if outcome["history"] else {}
    stage.publish(
        {
            **counts,
            "epochs": len(outcome["history"]),
            "final_loss": last.get("loss"),
            "validation_mAP": last.get("validation_mAP"),
            "seconds": time.monotonic() - started,
            "rows_per_second": last.get("images_per_second", 0.0),
            "gpus": max(1, run.config.train.num_workers) * run.config.train.gpu,
        }
    )
    storage.remove_tree(stage.file(WORK))  # optimizer states are as large as the model, twice
    return stage.stats


def estimate(run: Run, labels: pa.Table | pads.Dataset | None) -> dict[str, Any]:
    """Measure a few training steps on noise in this process and extrapolate; writes nothing.

    Returns images, images_per_epoch (repeats included), epochs, steps, device,
    seconds_per_step, seconds (without start-up) and gpu_hours; but for trainable=head also
    images_kept, images_per_second (of steps, decoding and reading, each alone) and bound_by, the
    slowest of those that every epoch needs; only images for the zero-shot student. Raises what
    training would raise for the same settings and labels.
    """
    if labels is None:
        return {"images": 0, "note": "the zero-shot student is stored without training"}
    _check(run)
    config = run.config.train
    data = training_set(labels, run.class_table, config)
    workers = max(1, config.num_workers)
    share = max(1, config.batch_size // workers)
    steps = config.epochs * max(1, -(-(data.rows // workers) // share))
    passes, gpus = steps, float(workers * config.gpu)
    if config.trainable == "head":  # each image and its mirror image pass through the tower once
        pool = config.features.pool
        passes = -(-data.images * (1 + config.augment.flip) // (share * pool.max_size))
        gpus = pool.gpus * pool.max_size
    device = "cuda" if gpus > 0 and torch.cuda.is_available() else "cpu"
    per_step, stored = seconds_per_step(run, device)
    figures: dict[str, Any] = {
        "images": data.images,
        "images_per_epoch": data.rows,
        "classes_with_positives": data.classes_with_positives,
        "epochs": config.epochs,
        "steps": steps,
        "device": device,
        "seconds_per_step": round(per_step, 4),
    }
    seconds = passes * per_step
    if config.trainable != "head":
        kept, reason = _kept(run, data, [Feed("", (data.rows,), stored, "")])
        rate = share * workers / per_step
        pace = measure_pace(run, data.sample, stored, rate, device)
        bound, slowest = pace.bound(kept)
        seconds = max(seconds, config.epochs * data.rows / slowest)
        figures |= {
            "images_kept": f"{kept}: {reason}",
            "images_per_second": {
                "steps": round(pace.steps, 1),
                "decoding": round(pace.decoding, 1),
                "reading": round(pace.reading, 1),
            },
            "bound_by": bound,
        }
    return figures | {"seconds": seconds, "gpu_hours": seconds * gpus / 3600}


def _check(run: Run) -> None:
    """Raise ConfigError for settings that do not fit; `auto` that nobody chose is a CPU."""
    check_train(run.changed({"train": {"use_gpu": run.config.train.gpu}}).config)


def _write_initial(run: Run, stage: StageFolder) -> str:
    """Write the zero-shot student for the workers to start from, and return its folder.

    Raises ConfigError for settings that its tower cannot serve, before any worker starts.
    """
    initial = stage.file(WORK, "initial")
    if not storage.exists(storage.join(initial, DESCRIPTION)):
        config = run.config.train
        student = build_student(run.config.student, run.class_table)
        set_trainable(student, config.trainable, config.trainable_blocks)
        parameter_groups(student, config.optim)
        if config.gradient_checkpointing:
            checkpoint_activations(student)
        save_student(student, initial)
    return initial


def _fit(task: Task) -> dict[str, Any]:
    """Run the training; returns the history, how images were kept and the weights' bytes."""
    config, data, validation = task.config, task.data, task.validation
    image_size = int(description_of(task.initial)["image_size"])
    size, seed = stored_size(image_size, config.augment), task.run.config.seed
    folder, bad_folder = task.work_file("rows"), task.work_file("bad-train")
    counts = write_rows(data, task.run.class_table, config, seed, folder)
    epoch_file = task.work_file("epoch.json")
    feed = Feed(folder, tuple(counts), size, bad_folder, seed, epoch_file)
    feeds = {"train": feed}
    if validation is not None:
        places = task.work_file("rows-validation"), task.work_file("bad-validation")
        counts = validation.write(places[0])
        feeds["validation"] = Feed(places[0], tuple(counts), image_size, places[1])
    kept, reason = _kept(task.run, data, list(feeds.values()))
    tasks = config.decode_tasks and config.decode_tasks * max(1, config.num_workers)
    datasets = {name: fed_images(one, kept, tasks) for name, one in feeds.items()}
    workers = max(1, config.num_workers)
    good = feed.rows - targets.bad_rows(task)
    if good < workers:
        targets.gather_quarantine(task)
        raise DataError(
            f"{good} of {data.images} images can be read, {workers} workers need one each:"
            f" the reasons are in {task.stage.file('quarantine')}"
        )
    job = _job(task, feed)
    shown = training_progress(job["history"], job["steps"], task.progress)
    with shown, users_mistakes_unwrapped():
        result = _run_trainer(task, job, datasets)
    error = (result.return_value or {}).get("error")
    if error is not None:
        names = targets.named_rows(folder, error["rows"])
        raise DataError(
            f"{error['message']}; images {', '.join(names)}: lower train.optim.lr, raise"
            " train.loss_temperature or set train.optim.grad_clip"
        )
    place = resume.newest_whole(job["local"]) if job["local"] else None
    if job["local"] and place is None:
        raise UserError("training ended without a checkpoint: remove its folder and run it again")
    with result.checkpoint.as_directory() if place is None else nullcontext(place) as folder:
        files = resume.read_files(folder)
    history = json.loads(files[resume.STATE])["history"]
    told = {"images_kept": kept, "images_kept_because": reason}
    return {"history": history, "weights": files[resume.MODEL], "kept": told}


def _kept(run: Run, data: TrainingSet, feeds: list[Feed]) -> tuple[Kept, str]:
    """Return how the images of a training are kept, and why."""
    store = object_store_bytes(run.config.ray)
    pixels, rows = sum(one.pixel_bytes for one in feeds), sum(one.rows for one in feeds)
    return choose_kept(
        run.config.train.images_kept, pixels, lambda: rows * mean_file_bytes(data.sample), store
    )


def _job(task: Task, feed: Feed) -> dict[str, Any]:
    """Return what every worker gets."""
    config, stage, known = task.config, task.stage, task.validation
    local = task.work_file("local") if config.num_workers == 0 else None
    name = f"train-{stage.key}"
    return {
        "config": config.model_dump(mode="json"),
        "initial": task.initial,
        "seed": task.run.config.seed,
        "rows": feed.rows,
        "class_weights": targets.class_weights(task.data.counts_C, config.class_balance),
        "stored_size": feed.size,
        "epoch": feed.epoch_file,
        "validation": None if known is None else known.annotations_NC,
        "history": stage.file("history.json"),
        "steps": task.work_file("steps.json"),
        "meter": asdict(Meter.of(stage, "train")),
        "curves": stage.file("curves"),
        "local": local,  # Ray Train keeps no checkpoints of a training in this process
        "name": name,
        "unlisted": resume.find_unlisted(task.work_file("local" if local else name)),
    }


def _run_trainer(task: Task, job: dict[str, Any], datasets: dict[str, ray.data.Dataset]) -> Any:
    """Run Ray Train and return its result."""
    from ray.data import ExecutionOptions
    from ray.train import CheckpointConfig, DataConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    class Shards(DataConfig):  # type: ignore[misc]
        """Equal shares of the training images, and all validation images, each to one worker."""

        def configure(
            self, datasets: Mapping[str, Any], world_size: int, *given: Any, **named: Any
        ) -> list[dict[str, Any]]:
            equal = {name: one for name, one in datasets.items() if name != "validation"}
            shards: list[dict[str, Any]] = super().configure(equal, world_size, *given, **named)
            if "validation" in datasets:
                parts = datasets["validation"].streaming_split(world_size, equal=False)
                for shard, part in zip(shards, parts, strict=True):
                    shard["validation"] = part
            return shards

    config = task.config
    resources = {"CPU": config.worker_cpus, **({"GPU": 1.0} if config.gpu else {})}
    trainer = TorchTrainer(
        train_loop,
        train_loop_config=job,
        scaling_config=ScalingConfig(
            num_workers=config.num_workers,
            use_gpu=config.gpu,
            resources_per_worker=resources if config.num_workers else None,
            label_selector=dict(config.nodes.labels) or None,
            accelerator_type=config.nodes.accelerator_type,
        ),
        run_config=RunConfig(
            # The same name after a crash is what makes Ray Train go on from its checkpoint.
            name=job["name"],
            storage_path=storage.absolute(task.work_file()),
            failure_config=FailureConfig(max_failures=config.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=resume.KEPT_CHECKPOINTS),
        ),
        datasets=datasets,
        dataset_config=Shards(execution_options=ExecutionOptions(preserve_order=True)),
    )
    return _fit_or_explain(trainer, config)


def _fit_or_explain(trainer: Any, config: TrainConfig) -> Any:
    from ray.exceptions import RayActorError
    from ray.train import ControllerError, WorkerGroupError

    try:
        with interruptible(trainer):
            return trainer.fit()
    except RayActorError as error:
        raise UserError(
            f"the process that runs the training died: {_in_a_line(error)}; the same command goes"
            " on from the last checkpoint"
        ) from error
    except WorkerGroupError as error:
        failures = error.worker_failures
        for failure in failures.values():
            mistake = user_error(failure)
            if mistake is not None:
                raise mistake from error
        rank, failure = min(failures.items())
        raise UserError(
            f"training failed {config.max_failures + 1} times, lastly in worker {rank}:"
            f" {_in_a_line(failure)}; the same command goes on from the last checkpoint"
        ) from error
    except ControllerError as error:
        reason = _in_a_line(error.controller_failure)
        raise UserError(f"training could not be run: {reason}") from error


def _in_a_line(failure: BaseException) -> str:
    """Return a failure's message without the traceback that Ray puts into it."""
    text = str(failure).strip()
    if "Traceback (most recent call last)" in text or '  File "' in text:
        text = text.splitlines()[-1]
    return " ".join(text.split())


def _save(
    run: Run,
    stage: StageFolder,
    student: Student,
    outcome: Mapping[str, Any],
    center: pa.Table | None,
) -> None:
    """Write the student, with trained weights if there are any, its history and its means."""
    history = outcome["history"]
    if "weights" in outcome:
        trained = safetensors.torch.load(outcome["weights"])
        student.load_state_dict(with_learnt_scale(trained))
    settings = run.config.train.answer_settings()
    info = {"train": settings, "seed": run.config.seed, "epochs": len(history)}
    save_student(student, stage.path, info)
    if center is not None:
        plain = run.config.predict.model_copy(update={"center": False})
        _, logits_NC = score_images(stage.path, center, plain)
        student.class_means = logits_NC.mean(axis=0).tolist()
        save_student(student, stage.path, info)
    storage.write_json(stage.file("history.json"), history)
