"""The student: an open_clip image tower with a cosine classifier over the classes.

Shapes: N images, S image size, C classes, D features. open_clip is imported inside functions,
because that takes seconds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - torch's own convention

from hts_ray.classes import ClassTable
from hts_ray.config import OptimConfig, StudentConfig
from hts_ray.engine.clip import class_embeddings
from hts_ray.engine.compat import build_image_tower
from hts_ray.engine.decoding import squash
from hts_ray.errors import ConfigError
from hts_ray.store.aliases import FloatArray, Pixels
from hts_ray.student.checks import check_size, no_projection, student_clip, too_many_blocks
from hts_ray.teacher.models.files import HubClip

Trainable = Literal["all", "head", "last"]
ARCHITECTURE = ("model_cfg", "image_size", "image_mean", "image_std")
# Where towers keep their blocks: timm's trunks, a ResNet's four layers, a CLIP ViT.
_BLOCKS = (
    ["blocks"], ["stages"], ["layers"], [f"layer{i}" for i in range(1, 5)], ["transformer"],
)  # fmt: skip


class CosineClassifier(nn.Module):
    """One direction per class; a logit is `logit_scale` times its cosine with the features."""

    logit_scale: Tensor
    log_gain: nn.Parameter | None  # of the logit scale, while it is learnt

    def __init__(self, classifier_CD: Tensor, logit_scale: float) -> None:
        super().__init__()
        self.classifier = nn.Parameter(classifier_CD.detach().clone().float())
        self.register_buffer("logit_scale", torch.tensor(float(logit_scale)))
        self.register_parameter("log_gain", None)

    def logits(self, unit_features_ND: Tensor) -> Tensor:
        """Return logits (N, C) float32 of features of length 1."""
        cosine_NC = unit_features_ND @ F.normalize(self.classifier, dim=-1).T
        scale = self.logit_scale
        if self.log_gain is not None:
            scale = scale * self.log_gain.exp()
        return scale * cosine_NC

    def learn_logit_scale(self) -> None:
        """Let the logit scale learn, by the logarithm of a factor that starts at 1."""
        self.log_gain = nn.Parameter(torch.zeros((), device=self.logit_scale.device))


class Student(CosineClassifier):
    """An image tower with a cosine classifier over its features.

    `image_mean` and `image_std` are RGB in 0..1. `model_cfg` is open_clip's description of the
    architecture, from which the tower is rebuilt without any other file.
    """

    image_mean: Tensor
    image_std: Tensor

    def __init__(
        self,
        visual: nn.Module,
        classifier_CD: Tensor,
        *,
        config: StudentConfig,
        class_table: ClassTable,
        model_cfg: dict[str, Any],
        image_size: int,
        image_mean: Sequence[float],
        image_std: Sequence[float],
    ) -> None:
        super().__init__(classifier_CD, config.logit_scale)
        self.visual = visual
        self.config = config
        self.class_table = class_table
        self.model_cfg = model_cfg
        self.image_size = image_size
        self.class_means: list[float] | None = None  # of the logits over a sample, if one was taken
        self.register_buffer("image_mean", torch.tensor(list(image_mean)), persistent=False)
        self.register_buffer("image_std", torch.tensor(list(image_std)), persistent=False)
        # Towers with a fixed position embedding keep it fixed whatever is trained.
        self._fixed = {name for name, value in self.named_parameters() if not value.requires_grad}

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (N, C) float32 for normalised images (N, 3, S, S)."""
        features_ND = self.visual(images).float()
        # In bf16 a logit near 100 would be known to half a unit only.
        with torch.autocast(features_ND.device.type, enabled=False):
            return self.logits(F.normalize(features_ND, dim=-1))

    def preprocess(self, images: Sequence[Pixels]) -> Tensor:
        """Turn N uint8 images (H, W, 3) of any size into (N, 3, S, S): squashed, normalised."""
        size = self.image_size
        squashed = [squash(np.asarray(image), size) for image in images]
        stacked = np.stack(squashed) if squashed else np.zeros((0, size, size, 3), np.uint8)
        return self.normalise(stacked)

    def normalise(self, pixels: Pixels | Tensor) -> Tensor:
        """Turn uint8 (N, S, S, 3) into what `forward` takes, on the student's device."""
        images = torch.as_tensor(pixels).to(self.image_mean.device)
        return self.standardise(images.permute(0, 3, 1, 2).float() / 255)

    def standardise(self, images: Tensor) -> Tensor:
        """Subtract the mean and divide by the deviation: (N, 3, S, S) in 0..1."""
        mean, std = self.image_mean[:, None, None], self.image_std[:, None, None]
        return ((images - mean) / std).contiguous()

    @torch.inference_mode()
    def compute(self, images: Tensor, part: nn.Module | None = None) -> FloatArray:
        """Return what the student, or a part of it, computes of normalised images.

        On a GPU that is done in the precision it was trained in; CPUs gain nothing from it.
        """
        dtype = torch.bfloat16 if self.config.precision == "bf16" else torch.float16
        half = images.is_cuda and self.config.precision != "no"
        with torch.autocast("cuda", dtype=dtype, enabled=half):
            answer = (part or self)(images)
        result: FloatArray = answer.float().cpu().numpy()
        return result

    def train(self, mode: bool = True) -> Student:
        """Set the training mode; BatchNorm and what is frozen stay in evaluation mode."""
        super().train(mode)
        for module in self.visual.modules():
            parameters = list(module.parameters())
            frozen = bool(parameters) and not any(value.requires_grad for value in parameters)
            # A student's batches are small and full of repeats: their statistics would drift.
            if frozen or isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        return self


def build_student(config: StudentConfig, class_table: ClassTable) -> Student:
    """Make the zero-shot student: open_clip's tower, classes from their prompts' embeddings.

    The classifier is the normalised mean of the normalised embeddings of the first
    `prompt_templates` prompts of each class; the text tower is dropped afterwards. With
    `feature_space="backbone"` it is proj @ text and the features are those before `proj`
    (the paper's student). Raises ConfigError for models and weights that cannot be loaded.
    """
    import open_clip

    source = student_clip(config)
    clip, templates = source.load(), config.prompt_templates
    prompts = [of_class[:templates] for of_class in class_table.prompts]
    texts_CD = class_embeddings(clip, source.tokenizer(), prompts)
    visual, classifier_CD = _in_feature_space(clip.visual, texts_CD, config)
    preprocess = open_clip.get_model_preprocess_cfg(clip)
    size = _fit_tower(visual, config.image_size)
    return Student(
        visual,
        classifier_CD,
        config=config,
        class_table=class_table,
        model_cfg=source.description(),
        image_size=size,
        image_mean=preprocess["mean"],
        image_std=preprocess["std"],
    )


def rebuild_student(
    description: Mapping[str, Any], class_table: ClassTable, state: dict[str, Tensor]
) -> Student:
    """Make a student from its description and weights alone: nothing is downloaded.

    `description` holds the settings `student` and what ARCHITECTURE names. Raises ConfigError,
    KeyError, RuntimeError, TypeError or ValueError when they do not fit each other.
    """
    config = StudentConfig.model_validate(description["student"])
    visual = build_image_tower(description["model_cfg"])
    if config.feature_space == "backbone":
        _cut_projection(visual)
    _fit_tower(visual, description["image_size"])
    given = {name: description[name] for name in ARCHITECTURE}
    student = Student(visual, state["classifier"], config=config, class_table=class_table, **given)
    if len(state["classifier"]) != len(class_table):
        raise ValueError(f"{len(state['classifier'])} classifier rows, {len(class_table)} classes")
    student.load_state_dict(state)
    student.class_means = description.get("class_means")
    return student.eval()


def source_fingerprint(config: StudentConfig) -> str:
    """Return what changes with what the student starts from: a hash of files, or a hub's commit."""
    clip = student_clip(config)
    hub = HubClip.of(clip, None, clip.field)
    return clip.fingerprint() if hub is None else f"{clip.model}@{hub.pinned()}"


def set_trainable(student: Student, mode: Trainable, blocks: int = 1) -> None:
    """Choose what learns: everything, the classifier (`head`), or the `last` blocks with it.

    A block is a transformer block of a ViT, one of a ResNet's four layers, or a block or stage
    of a timm trunk; what follows the last block learns with it. Frozen parts come first, so
    autograd records nothing for them and they cost a forward pass only. ConfigError when the
    tower has fewer blocks.
    """
    student.requires_grad_(mode == "all")
    student.classifier.requires_grad_(True)
    if mode == "last":
        layers = tower_layers(student.visual, "train.trainable")
        if blocks > len(layers) - 2:
            raise too_many_blocks(blocks, len(layers) - 2)
        for value in chain(*layers[: blocks + 1]):
            value.requires_grad_(True)
    for name, value in student.named_parameters():
        if name in student._fixed:
            value.requires_grad_(False)
    student.train(student.training)


def parameter_groups(model: CosineClassifier, optim: OptimConfig) -> list[dict[str, Any]]:
    """Return AdamW's groups: the trunk's matrices, its vectors (never decayed) and the head.

    With `layer_decay` below 1 the trunk has such groups a block, whose rates fall by that factor
    from block to block towards the input; what follows the last block has the full rate. Empty
    groups are left out; frozen parameters are in none. ConfigError when the tower's blocks are
    not known.
    """
    head_lr = optim.lr if optim.head_lr is None else optim.head_lr
    groups: list[tuple[list[nn.Parameter], float, float]] = []
    if isinstance(model, Student):
        layers = [list(model.visual.parameters())]
        if optim.layer_decay < 1:
            layers = tower_layers(model.visual, "train.optim.layer_decay")
        for depth, values in enumerate(layers):
            lr = optim.lr * optim.layer_decay**depth
            learning = [value for value in values if value.requires_grad]
            groups.append(([v for v in learning if v.ndim > 1], lr, optim.weight_decay))
            groups.append(([v for v in learning if v.ndim <= 1], lr, 0.0))
    groups.append(([model.classifier], head_lr, optim.weight_decay))
    if model.log_gain is not None:
        groups.append(([model.log_gain], head_lr, 0.0))
    return [
        {"params": values, "lr": lr, "weight_decay": decay}
        for values, lr, decay in groups
        if values
    ]


def with_learnt_scale(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a trained student's state with what its logit scale learnt put into the scale."""
    state = dict(state)
    gain = state.pop("log_gain", None)
    if gain is not None:
        state["logit_scale"] = state["logit_scale"] * gain.exp()
    return state


def checkpoint_activations(student: Student) -> None:
    """Make the tower compute activations again for the backward pass instead of keeping them.

    ConfigError for towers that cannot.
    """
    visual: Any = student.visual
    try:
        if hasattr(visual, "attnpool"):
            raise NotImplementedError("open_clip's ResNets have no such switch")
        visual.set_grad_checkpointing(True)
    except (AssertionError, NotImplementedError, AttributeError) as error:  # timm's ways to refuse
        raise ConfigError(
            f"the tower of {student.config.model} cannot compute its activations again ({error})",
            field="train.gradient_checkpointing",
            value=True,
            remedy="leave it out, and raise train.accumulation instead",
        ) from error


def _in_feature_space(
    visual: Any, texts_CE: Tensor, config: StudentConfig
) -> tuple[nn.Module, Tensor]:
    """Return the tower that gives the features, and the classes' directions among them."""
    if hasattr(visual, "output_tokens"):
        visual.output_tokens = False  # CoCa's tower returns its tokens too
    if config.feature_space == "projected":
        return visual, texts_CE
    projection_DE = _cut_projection(visual)
    if projection_DE is None:
        raise no_projection(config)
    # The cosine with proj @ text: (f proj) . t = f . (proj t)
    return visual, texts_CE @ projection_DE.detach().float().T


def _cut_projection(visual: Any) -> Tensor | None:
    """Leave the projection out of a tower and return it, (D, E); None where none is linear."""
    projection: Tensor | None = getattr(visual, "proj", None)
    if projection is not None:
        visual.proj = None
        return projection
    last = getattr(getattr(visual, "head", None), "proj", None)  # behind one of timm's trunks
    if isinstance(last, nn.Linear) and last.bias is None:
        visual.head.proj = nn.Identity()
        return last.weight.T
    return None


def _fit_tower(visual: Any, size: int | None) -> int:
    """Make the tower take `size` x `size` images and return that size; None keeps its own."""
    native: Any = visual.image_size
    height, width = native if isinstance(native, tuple | list) else (native, native)
    if size is None and height != width:
        problem = f"the model takes {height}x{width} images"
        raise ConfigError(problem, field="student.image_size", remedy="set the side of a square")
    if size is None or size == height == width:
        return int(height)
    if hasattr(visual, "trunk"):
        if hasattr(visual.trunk, "set_input_size"):
            visual.trunk.set_input_size(img_size=(size, size))
        visual.image_size = (size, size)
        return size
    is_resnet = hasattr(visual, "attnpool")
    step = 32 if is_resnet else int(visual.patch_size[0])
    check_size(size, step)
    side = size // step
    _resize_positions(visual.attnpool if is_resnet else visual, side)
    visual.image_size = size if is_resnet else (size, size)
    if not is_resnet:
        visual.grid_size = (side, side)
    return size


def _resize_positions(owner: nn.Module, side: int) -> None:
    """Interpolate a learned position embedding (1 + g * g, D) bicubically to another square."""
    old = owner.positional_embedding
    assert isinstance(old, nn.Parameter)
    token, grid = old.detach()[:1], old.detach()[1:]
    before = round(len(grid) ** 0.5)
    image = grid.reshape(1, before, before, -1).permute(0, 3, 1, 2)
    image = F.interpolate(
        image, size=(side, side), mode="bicubic", antialias=True, align_corners=False
    )
    grid = image.permute(0, 2, 3, 1).reshape(side * side, -1)
    owner.positional_embedding = nn.Parameter(
        torch.cat([token, grid]), requires_grad=old.requires_grad
    )


def tower_layers(visual: Any, field: str) -> list[list[nn.Parameter]]:
    """Return the tower's parameters by layer, from its output to its input.

    The first layer is what follows the last block, then come the blocks, and the last layer is
    what precedes them. ConfigError, naming the setting `field` that needs them, when the blocks
    are not known.
    """
    trunk = getattr(visual, "trunk", visual)  # a timm tower, or open_clip's own
    children = [name for name, _ in trunk.named_children()]
    for names in _BLOCKS:
        if set(names) <= set(children):
            break
    else:
        remedy = f"the blocks of a {type(trunk).__name__} are not known: leave this setting out"
        raise ConfigError(field=field, remedy=remedy)
    parts = [getattr(trunk, name) for name in names]
    blocks = list(getattr(parts[0], "resblocks", parts[0])) if len(parts) == 1 else parts
    layers = [list(block.parameters()) for block in reversed(blocks)]
    placed = {id(value) for value in chain(*layers)}
    # Parameters that a trunk holds itself are embeddings, but for CLIP's projection.
    first = {name for name, _ in trunk.named_parameters(recurse=False)} - {"proj"}
    first |= set(children[: children.index(names[-1]) + 1])
    before = [v for n, v in trunk.named_parameters() if n.split(".")[0] in first]
    before = [value for value in before if id(value) not in placed]
    placed |= {id(value) for value in before}
    after = [value for value in visual.parameters() if id(value) not in placed]
    return [after, *layers, before]
