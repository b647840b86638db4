"""Fine-tuning the student: Ray Data feeds it, Ray Train runs and restarts it.

The driver writes the zero-shot student, turns labels into a dataset of decoded images and starts
the workers; each worker runs `train_loop`. Every epoch is seeded by its number alone, so a run
that goes on from a checkpoint after a crash equals one that was never interrupted, and on CPUs
two runs with the same labels and seed give the same bytes.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import safetensors.torch
import torch

from hts_ray.classes import ClassTable
from hts_ray.config import StudentConfig, TrainConfig
from hts_ray.engine.image_pass import (
    data_context,
    user_error,
    users_mistakes_unwrapped,
)
from hts_ray.engine.run import Run, Stage
from hts_ray.engine.telemetry import Meter
from hts_ray.errors import ConfigError, DataError, UserError
from hts_ray.store import storage
from hts_ray.store.run import StageFolder, content_hash, settings_hash
from hts_ray.student.augment import stored_size
from hts_ray.student.checkpoints import DESCRIPTION, description_of, load_student, save_student
from hts_ray.student.dataset import decoded_images, gather_quarantine
from hts_ray.student.loggers import check_loggers
from hts_ray.student.loop import train_loop
from hts_ray.student.model import (
    Student,
    build_student,
    checkpoint_activations,
    parameter_groups,
    set_trainable,
    source_fingerprint,
    with_learnt_scale,
)
from hts_ray.student.optimizer import Optimizer, settings_loss
from hts_ray.student.progress import Progress, training_progress
from hts_ray.student.resume import (
    KEPT_CHECKPOINTS,
    MODEL,
    STATE,
    find_unlisted,
    read_files,
    read_local,
)
from hts_ray.student.targets import (
    Task,
    ValidationSet,
    class_weights,
    positive_counts,
    training_set,
    work_folder,
)
from hts_ray.student.train_head import fit_on_features

if TYPE_CHECKING:
    import ray.data


def plan_train(run: Run, labels: pa.Table | None, validation: pa.Table | None = None) -> Stage:
    """Plan a training on labels; None stores the zero-shot student.

    `validation`, annotated rows of a manifest, is measured while the training runs.
    """
    config = run.config
    key = settings_hash(
        config.train.answer_settings(),
        config.student.answer_settings(),
        source_fingerprint(config.student),
        config.seed,
        run.class_table.fingerprint(),
        None if labels is None else content_hash(labels),
    )
    folder = run.stage("student", key)

    def work(progress: Progress | None) -> object:
        return train_student(
            config=config.train,
            student_config=config.student,
            class_table=run.class_table,
            labels=labels,
            stage=folder,
            seed=config.seed,
            validation=validation,
            progress=progress,
        )

    return Stage(folder, {"student": config.student.model, "labels": config.train.labels}, work)


def train_student(
    *,
    config: TrainConfig,
    student_config: StudentConfig,
    class_table: ClassTable,
    labels: pa.Table | None,
    stage: StageFolder,
    seed: int,
    validation: pa.Table | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Fine-tune a student on labels and publish it in `stage`; returns the stage's stats.

    `labels` has image_id, uri, positive_ids and ignored_ids (class ids), and probability (one a
    positive) for soft labels; every other class is negative. None publishes the zero-shot
    student. `validation`, annotated rows of a manifest, are scored while the training runs. A
    run that was cut off goes on from its last checkpoint; a finished stage is returned as it is.
    `progress` gets the records that `student.progress` lists, from another thread. Raises
    DataError when no label or image can be used or the loss stops being finite, ConfigError for
    settings that do not fit together, UserError when the workers kept failing.
    """
    if stage.finished:
        return stage.stats
    started = time.monotonic()
    _check_config(config, student_config)
    data = None if labels is None else training_set(labels, class_table, config, seed)
    initial = _write_initial(student_config, class_table, config, stage)
    if data is None:
        outcome: dict[str, Any] = {"history": [], "rows": 0}
        counts = {"rows_in": 0, "rows_out": 0, "quarantined": 0}
    else:
        fit = fit_on_features if config.trainable == "head" else _fit
        task = Task(
            config=config,
            student_config=student_config,
            num_classes=len(class_table),
            initial=initial,
            data=data,
            validation=None if validation is None else ValidationSet.of(validation, class_table),
            stage=stage,
            seed=seed,
            progress=progress,
        )
        outcome = fit(task)
        bad = gather_quarantine(task)
        Meter.of(stage, "train").count(quarantined=bad)
        counts = {
            "rows_in": data.images,
            "rows_out": data.images - bad,
            "quarantined": bad,
            "rows_trained": outcome["rows"],
            "classes_with_positives": data.classes_with_positives,
            "dropped_class_ids": data.dropped_ids,
        }
    _publish(config, initial, stage, seed, outcome)
    history = outcome["history"]
    seconds = time.monotonic() - started
    stage.publish(
        {
            **counts,
            "epochs": len(history),
            "final_loss": history[-1]["loss"] if history else None,
            "validation_mAP": history[-1].get("validation_mAP") if history else None,
            "seconds": seconds,
            "rows_per_second": history[-1]["images_per_second"] if history else 0.0,
        }
    )
    storage.remove_tree(work_folder(stage))  # optimizer states are as large as the model, twice
    return stage.stats


def estimate(
    config: TrainConfig,
    student_config: StudentConfig,
    class_table: ClassTable,
    labels: pa.Table | None,
    seed: int = 0,
) -> dict[str, Any]:
    """Measure a few training steps on noise in this process and extrapolate; writes nothing.

    Returns images, images_per_epoch (repeats included), epochs, steps, device,
    seconds_per_step, seconds (without start-up and decoding) and gpu_hours; only images for
    the zero-shot student. Raises what training would raise for the same settings and labels.
    """
    if labels is None:
        return {"images": 0, "note": "the zero-shot student is stored without training"}
    _check_config(config, student_config)
    data = training_set(labels, class_table, config, seed)
    workers = max(1, config.num_workers)
    share = max(1, config.batch_size // workers)
    steps = config.epochs * max(1, -(-(len(data.table) // workers) // share))
    passes, gpus = steps, float(workers * config.use_gpu)
    if config.trainable == "head":  # an image and its mirror image pass through the tower once
        pool = config.features.pool
        passes = -(-data.images * (1 + config.augment.flip) // (share * pool.max_size))
        gpus = pool.num_gpus * pool.max_size
    device, per_step = _time_steps(config, student_config, class_table, share, gpus > 0)
    seconds = passes * per_step
    return {
        "images": data.images,
        "images_per_epoch": len(data.table),
        "classes_with_positives": data.classes_with_positives,
        "epochs": config.epochs,
        "steps": steps,
        "device": device,
        "seconds_per_step": round(per_step, 4),
        "seconds": seconds,
        "gpu_hours": seconds * gpus / 3600,
    }


def _time_steps(
    config: TrainConfig,
    student_config: StudentConfig,
    class_table: ClassTable,
    batch: int,
    use_gpu: bool,
) -> tuple[str, float]:
    """Return the device and the seconds of the second of two steps on a worker's batch."""
    device = "cuda" if use_gpu and torch.cuda.is_available() else "cpu"
    student = build_student(student_config, class_table).to(device)
    set_trainable(student, config.trainable, config.trainable_blocks)
    student.train()
    optimizer = Optimizer.of(student, config)
    loss = settings_loss(config, None, "mean").to(device)
    size = student.image_size
    images = torch.randn(batch, 3, size, size, device=device)
    targets = torch.full((batch, len(class_table)), -1, dtype=torch.int8, device=device)
    targets[:, 0] = 1
    seconds = 0.0
    for _ in range(2):
        started = time.monotonic()
        loss(student(images), targets).backward()
        optimizer.step()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds = time.monotonic() - started
    return device, seconds


def _check_config(config: TrainConfig, student: StudentConfig) -> None:
    check_loggers(config.loggers)
    workers = max(1, config.num_workers)
    if config.batch_size % workers:
        raise ConfigError(
            "every worker needs an equal share",
            field="train.batch_size",
            value=config.batch_size,
            remedy=f"use a multiple of train.num_workers = {workers}",
        )
    if student.precision == "fp16" and not config.use_gpu:
        raise ConfigError(
            field="student.precision",
            value="fp16",
            remedy="a CPU trains in no or bf16, or set train.use_gpu=true",
        )


def _run_name(stage: StageFolder) -> str:
    """Return how Ray Train calls a run, and its folder."""
    return f"train-{stage.key}"


def _write_initial(
    student_config: StudentConfig, class_table: ClassTable, config: TrainConfig, stage: StageFolder
) -> str:
    """Write the zero-shot student for the workers to start from; returns its folder."""
    folder = storage.join(work_folder(stage), "initial")
    if not storage.exists(storage.join(folder, DESCRIPTION)):
        student = build_student(student_config, class_table)
        _check_tower(student, config)
        save_student(student, folder)
    return folder


def _check_tower(student: Student, config: TrainConfig) -> None:
    """Raise ConfigError for settings that the tower cannot serve, before any worker starts."""
    set_trainable(student, config.trainable, config.trainable_blocks)
    parameter_groups(student, config.optim)
    if config.gradient_checkpointing:
        checkpoint_activations(student)


def _fit(task: Task) -> dict[str, Any]:
    """Run the training; returns the history, the rows trained on and the weights' bytes."""
    config, stage, data, validation = task.config, task.stage, task.data, task.validation
    image_size = int(description_of(task.initial)["image_size"])
    size = stored_size(image_size, config.augment)
    with data_context(keep_order=True):
        dataset, rows = decoded_images(data.table, size, task.bad_folder("train"))
        datasets = {"train": dataset}
        if validation is not None:
            datasets["validation"], _ = decoded_images(
                validation.table, image_size, task.bad_folder("validation")
            )
    workers = max(1, config.num_workers)
    if rows < workers:
        gather_quarantine(task)
        raise DataError(
            f"{rows} of {data.images} images can be read, {workers} workers need one each:"
            f" the reasons are in {stage.file('quarantine')}"
        )
    job: dict[str, Any] = {
        "config": config.model_dump(mode="json"),
        "precision": task.student_config.precision,
        "initial": task.initial,
        "seed": task.seed,
        "rows": rows,
        "class_weights": class_weights(
            positive_counts(data.table["positive"], task.num_classes), config.class_balance
        ),
        "stored_size": size,
        "validation": None if validation is None else validation.annotations_NC,
        "history": stage.file("history.json"),
        "steps": storage.join(work_folder(stage), "steps.json"),
        "meter": asdict(Meter.of(stage, "train")),
        "curves": stage.file("curves"),
        "local": storage.join(work_folder(stage), "local") if config.num_workers == 0 else None,
        "unlisted": find_unlisted(storage.join(work_folder(stage), _run_name(stage))),
    }
    telling = training_progress(job["history"], job["steps"], task.progress)
    with telling, users_mistakes_unwrapped():
        weights, error = _run_trainer(config, job, datasets, stage)
    if error is not None:
        names = data.table["image_id"].take(pa.array(error["rows"], pa.int64())).to_pylist()
        raise DataError(
            f"{error['message']}; images {', '.join(names)}: lower train.optim.lr, raise"
            " train.loss_temperature or set train.optim.grad_clip"
        )
    return {"history": weights["history"], "rows": rows, "weights": weights["model"]}


def _run_trainer(
    config: TrainConfig,
    job: dict[str, Any],
    datasets: dict[str, ray.data.Dataset],
    stage: StageFolder,
) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Run Ray Train; returns the last checkpoint's history and weights, and the loop's error."""
    from ray.data import ExecutionOptions
    from ray.train import CheckpointConfig, DataConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    resources = {"CPU": config.cpus_per_worker, **({"GPU": 1.0} if config.use_gpu else {})}
    trainer = TorchTrainer(
        train_loop,
        train_loop_config=job,
        scaling_config=ScalingConfig(
            num_workers=config.num_workers,
            use_gpu=config.use_gpu,
            resources_per_worker=resources if config.num_workers else None,
        ),
        run_config=RunConfig(
            # The same name after a crash is what makes Ray Train go on from its checkpoint.
            name=_run_name(stage),
            storage_path=storage.absolute(work_folder(stage)),
            failure_config=FailureConfig(max_failures=config.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=KEPT_CHECKPOINTS),
        ),
        datasets=datasets,
        dataset_config=DataConfig(
            datasets_to_split=["train"], execution_options=ExecutionOptions(preserve_order=True)
        ),
    )
    result = _fit_or_explain(trainer, config)
    error = (result.return_value or {}).get("error")
    if error is not None:
        return {}, error
    if config.num_workers == 0:
        files = read_local(job["local"])
    else:
        with result.checkpoint.as_directory() as folder:
            files = read_files(Path(folder))
    if files is None:
        raise UserError("training ended without a checkpoint: remove its folder and run it again")
    return {"history": json.loads(files[STATE])["history"], "model": files[MODEL]}, None


def _fit_or_explain(trainer: Any, config: TrainConfig) -> Any:
    from ray.exceptions import RayActorError
    from ray.train import ControllerError, WorkerGroupError

    try:
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
        told = _in_a_line(error.controller_failure)
        raise UserError(f"training could not be run: {told}") from error


def _in_a_line(failure: BaseException) -> str:
    """Return what a failure says, without the traceback that Ray puts into its text."""
    text = str(failure).strip()
    if "Traceback (most recent call last)" in text or '  File "' in text:
        text = text.splitlines()[-1]
    return " ".join(text.split())


def _publish(
    config: TrainConfig, initial: str, stage: StageFolder, seed: int, outcome: Mapping[str, Any]
) -> None:
    """Write the trained student and its history into the stage's folder."""
    student = load_student(initial)
    if "weights" in outcome:
        trained = safetensors.torch.load(outcome["weights"])
        student.load_state_dict(with_learnt_scale(trained))
    info = {"train": config.answer_settings(), "seed": seed, "epochs": len(outcome["history"])}
    save_student(student, stage.path, info)
    storage.write_json(stage.file("history.json"), outcome["history"])
