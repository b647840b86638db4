"""The demo's student, trained in about a second: what of it stays frozen is computed once.

The demo trains the last block of the tower, what follows it and the classifier, on images that are
mirrored and nothing else. So the input of that block, for each image and for its mirror image, is
all that a training reads of an image. It is stored once a world; a fit takes the same optimizer,
loss, schedule and steps as `hts train` from there, without Ray. Only the order of the images is
drawn otherwise, by numpy from seed and epoch. A tenth of that again costs the stand-in, which
leaves the last block frozen too and trains what follows it.

Shapes: N images, B images of a batch, C classes.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.compute as pc
import torch
from torch import Tensor, nn

from hts_ray.classes import ClassTable
from hts_ray.config import FilterConfig, HtsConfig, TrainConfig, load_config
from hts_ray.demo.run import demo_config, make_world
from hts_ray.engine.run import Run, open_run
from hts_ray.errors import DataError
from hts_ray.evaluate import Annotations, evaluate_scores, read_annotations
from hts_ray.images.decode import decode_image
from hts_ray.images.manifest import open_manifest
from hts_ray.labels.evidence import Regions, aggregate_regions
from hts_ray.labels.stage import choose_labels
from hts_ray.metrics import POSITIVE
from hts_ray.store import storage
from hts_ray.student.model import Student, build_student, set_trainable
from hts_ray.student.optimizer import Optimizer, settings_loss
from hts_ray.sweep.data import SweepData, read_regions, reference
from hts_ray.teacher.stage import plan_label


class Cache:
    """Measurements by key, each made once and kept as a line of a file."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = path.read_text().splitlines() if path.exists() else []
        # A run that is killed may leave half a line behind.
        entries = [json.loads(line) for line in lines if line.endswith("}")]
        self._path = path
        self.known: dict[str, dict[str, Any]] = {entry.pop("key"): entry for entry in entries}

    def once(self, key: Sequence[Any], measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return what was measured under a key, now or in an earlier run."""
        text = json.dumps(key)
        if text not in self.known:
            self.known[text] = measure()
            with self._path.open("a") as file:
                file.write(json.dumps({"key": text, **self.known[text]}) + "\n")
        return self.known[text]


METRICS = ("mAP", "few@1", "few@5", "few@10")
# Fewer and surer labels, and the paper's loss: the demo's settings before they were chosen for weak
# teachers too. Losses are compared on these labels, which were chosen with LSE-Sign.
SURE_LABELS: dict[str, Any] = {
    "null_score": -2.0,
    "top_k": 3,
    "positive_threshold": 0.5,
    "negative_threshold": 0.05,
    "per_class_quantile": 0.995,
    "quantile_floor": 0.3,
}
PAPER: dict[str, Any] = {
    "filter": SURE_LABELS,
    "train": {
        "loss": "lse_sign",
        "loss_temperature": 1.0,
        "soft_labels": False,
        "asl_gamma_neg": 4.0,
        "optim": {"lr": 1e-3, "head_lr": 1e-2, "grad_clip": 1.0},
    },
}
_BATCH = 256
# The trunk's layers before its last block, whose output is stored.
_FROZEN = ("conv1", "bn1", "act1", "maxpool", "layer1", "layer2", "layer3")


@dataclass(frozen=True)
class Teacher:
    """Noise in nats on the stored scores: of an image's class, or of each of its regions' too."""

    name: str
    shared: float = 0.0
    own: float = 0.0

    def spoil(self, regions: Regions, seed: int) -> Regions:
        """Return the regions as a worse teacher would have scored them."""
        if not (self.shared or self.own):
            return regions
        random = np.random.default_rng([seed, 7])
        counts_N = np.diff(regions.offsets_N1)
        shape = len(counts_N), regions.scores_GS.shape[1]
        noise_NS = self.shared * random.standard_normal(shape, dtype=np.float32)
        noise_GS = np.repeat(noise_NS, counts_N, axis=0)
        noise_GS += self.own * random.standard_normal(noise_GS.shape, dtype=np.float32)
        return replace(regions, scores_GS=regions.scores_GS + noise_GS)


AS_IT_IS = Teacher("as it is")
WEAKER = Teacher("own noise of 4 nats", own=4.0)
WEAK = Teacher("shared noise of 3 nats", shared=3.0)
TEACHERS = (AS_IT_IS, WEAKER, WEAK)


@dataclass(frozen=True, eq=False)
class Labels:
    """Targets (N, C) in {1, 0, -1} of the training images, and weights where labels are soft."""

    targets_NC: npt.NDArray[np.int8]
    weights_NC: npt.NDArray[np.float32] | None = None


@dataclass(frozen=True, eq=False)
class World:
    """A drawn world: the teacher's regions and the frozen part's output, by split, in id order.

    `sides` are the inputs (N, 2, ...) of the trained part: an image's and its mirror's; `student`
    is that part of the zero-shot student.
    """

    config: HtsConfig
    class_table: ClassTable
    seed: int
    student: Student
    regions: Mapping[str, Regions]
    sides: Mapping[str, Tensor]
    truth: Mapping[str, Annotations]

    def stand_in(self) -> World:
        """Return the world for a student whose last block is frozen too."""
        trunk: Any = self.student.visual.trunk
        with torch.inference_mode():
            sides = {
                split: torch.stack(
                    [
                        torch.cat([trunk(p) for p in torch.split(inputs[:, side], _BATCH)])
                        for side in (0, 1)
                    ],
                    dim=1,
                )
                for split, inputs in self.sides.items()
            }
        student = copy.deepcopy(self.student)
        student.visual.trunk = nn.Identity()
        # Tensors of inference mode cannot be trained on.
        return replace(self, student=student, sides={k: v.clone() for k, v in sides.items()})

    def labels(self, teacher: Teacher, config: FilterConfig, *, soft: bool = False) -> Labels:
        """Return what the filter makes of a teacher's scores of the training images."""
        regions = teacher.spoil(self.regions["train"], self.seed)
        evidence = aggregate_regions(regions, config)
        class_ids = np.asarray(regions.info["class_ids"], dtype=np.int16)
        targets_NC = choose_labels(evidence, config, class_ids).selection.targets_NC
        weights_NC = None
        if soft:
            positive_NC = targets_NC == 1
            weights_NC = np.where(positive_NC, evidence.probabilities_NC, np.float32(1))
        return Labels(targets_NC, weights_NC)

    def annotations(self) -> Labels:
        """Return the training images' annotations as targets, as `train.labels=annotations`."""
        labels_NC = self.truth["train"].labels()
        return Labels(
            np.select([labels_NC == POSITIVE, labels_NC == 0], [1, 0], -1).astype(np.int8)
        )

    def teacher_metrics(self, teacher: Teacher, config: FilterConfig) -> dict[str, Any]:
        """Return the metrics of the teacher's probabilities of the test images."""
        regions = teacher.spoil(self.regions["test"], self.seed + 1)
        evidence = aggregate_regions(regions, config)
        return self._metrics(evidence.image_ids, evidence.probabilities_NC)

    def zero_shot(self) -> dict[str, Any]:
        """Return the test metrics of the student that no image has taught."""
        return self.judge(self.student)

    def judge(self, student: Student) -> dict[str, Any]:
        """Return a student's test metrics."""
        ids = self.truth["test"].image_ids.to_pylist()
        return self._metrics(ids, self.logits(student, "test"))

    def logits(self, student: Student, split: str) -> npt.NDArray[np.float32]:
        """Return a student's logits (N, C) of a split's images."""
        with torch.inference_mode():
            parts = [student(part) for part in torch.split(self.sides[split][:, 0], _BATCH)]
        return np.asarray(torch.cat(parts).numpy())

    def _metrics(self, ids: list[str], scores_NC: npt.NDArray[np.float32]) -> dict[str, Any]:
        found = evaluate_scores(ids, scores_NC, self.truth["test"]).to_dict()
        return {name: found.get(name) for name in METRICS}

    def fit(
        self,
        labels: Labels,
        config: TrainConfig,
        seed: int,
        rows_N: npt.NDArray[np.intp] | None = None,
    ) -> tuple[Student, list[float]]:
        """Train on all training images, or on some; returns the student and the gradients' norms.

        DataError when the loss stops being finite.
        """
        student = copy.deepcopy(self.student)
        student.train()
        optimizer = Optimizer.of(student, config)
        loss_of = settings_loss(config, None, "sum")
        targets_NC = torch.from_numpy(labels.targets_NC)
        weights_NC = None if labels.weights_NC is None else torch.from_numpy(labels.weights_NC)
        rows_N = np.arange(len(targets_NC)) if rows_N is None else rows_N
        steps = -(-len(rows_N) // config.batch_size)
        norms = []
        for step in range(config.epochs * steps):
            epoch, place = divmod(step, steps)
            if not place:
                random = np.random.default_rng([seed, epoch])
                order = torch.from_numpy(random.permutation(rows_N))
                side = torch.from_numpy(random.integers(2, size=len(order)))
                side *= config.augment.flip
            chosen = slice(place * config.batch_size, (place + 1) * config.batch_size)
            rows_B = order[chosen]
            optimizer.set_rates(step, steps)
            logits_BC = student(self.sides["train"][rows_B, side[chosen]])
            weights_BC = None if weights_NC is None else weights_NC[rows_B]
            loss = loss_of(logits_BC, targets_NC[rows_B], weights_BC) / len(rows_B)
            if not torch.isfinite(loss):
                raise DataError("the loss is not finite")
            loss.backward()
            norm = optimizer.step()
            norms.append(float("nan") if norm is None else float(norm))
        return student.eval(), norms


def open_world(seed: int, run_dir: str) -> World:
    """Render, label and encode the world of a seed, where that is not done; needs Ray only then."""
    config = load_config(preset="demo", extra={"run_dir": run_dir})
    run = open_run(demo_config(config, seed))
    manifest = make_world(run)
    scores = plan_label(run, run.manifest(manifest)).run()
    table = open_manifest(manifest).table
    student = build_student(run.config.student, run.class_table).eval()
    sides, regions, truth = {}, {}, {}
    for split in ("train", "test"):
        rows = table.filter(pc.equal(table["split"], split)).sort_by("image_id")
        ids = rows["image_id"].to_pylist()
        regions[split] = read_regions(scores.path, split, seed)
        assert regions[split].image_ids.tolist() == ids
        found = read_annotations(run.manifest(manifest), run.class_table, split)
        truth[split] = replace(found, table=rows)
        sides[split] = _sides(run, student, split, rows["uri"].to_pylist())
    set_trainable(student, run.config.train.trainable, run.config.train.trainable_blocks)
    for name in _FROZEN:
        setattr(student.visual.trunk, name, nn.Identity())
    return World(run.config, run.class_table, seed, student, regions, sides, truth)


def _sides(run: Run, student: Student, split: str, uris: list[str]) -> Tensor:
    """Return the output (N, 2, ...) of the frozen part for images and their mirror images."""
    path = Path(run.run_dir) / f"sides-{split}.npy"
    if not path.exists():
        outputs: list[Tensor] = []
        trunk: Any = student.visual.trunk
        hook = trunk.layer3.register_forward_hook(
            lambda module, inputs, output: outputs.append(output)
        )
        for start in range(0, len(uris), _BATCH):
            pixels = [
                decode_image(storage.read_bytes(u)).pixels for u in uris[start : start + _BATCH]
            ]
            images = student.preprocess(pixels)
            with torch.inference_mode():
                student(torch.cat([images, images.flip(-1)]))
        hook.remove()
        both = [torch.stack(output.chunk(2), dim=1) for output in outputs]
        np.save(path, torch.cat(both).numpy())
    return torch.from_numpy(np.load(path))


def sweep_data(world: World, teacher: Teacher, config: HtsConfig) -> SweepData:
    """Return what trials of a sweep read of a world, without a labeled image."""
    regions = teacher.spoil(world.regions["train"], world.seed)
    with torch.inference_mode():
        image_NF, mirror_NF = (
            torch.cat(
                [
                    world.student.visual(part)
                    for part in torch.split(world.sides["train"][:, side], _BATCH)
                ]
            )
            for side in (0, 1)
        )
    seen_N = np.ones(len(regions.images), dtype=bool)
    return SweepData(
        config=config,
        regions=regions,
        feature_row_N=np.arange(len(seen_N)),
        features_MD=image_NF.numpy(),
        flipped_MD=mirror_NF.numpy(),
        classifier_CD=world.student.classifier.detach().numpy(),
        reference_NC=reference(regions),
        labeled_N=~seen_N,
        validation=None,
        overrides=None,
    )
