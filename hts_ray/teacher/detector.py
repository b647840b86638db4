"""Object detectors of the transformers library, which find the persons and objects of an image.

Two kinds are supported: models with a fixed set of labels (DETR, RT-DETR, YOLOS, ...), and
zero-shot models that look for given labels (OWL-ViT, Grounding DINO, OmDet-Turbo). Nothing here
needs torch until a model is loaded, so that a driver can check, name and hash a detector.

Shape legend: B images of a batch, Q boxes of an image, T tokens of the text, H x W pixels.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol

from hts_ray.classes import noun_phrase
from hts_ray.config import RegionsConfig
from hts_ray.errors import ConfigError, DataError
from hts_ray.images.regions import Detection
from hts_ray.store.aliases import Pixels
from hts_ray.teacher.models.files import NamedModel

FIELD = "label.regions.detector"
# Images in one forward: detectors work at 640 to 1333 pixels.
BATCH = 8

# model_type in config.json of transformers' AutoModelForObjectDetection ...
FIXED = (
    "conditional_detr",
    "d_fine",
    "dab-detr",
    "deformable_detr",
    "deimv2",
    "detr",
    "lw_detr",
    "rf_detr",
    "rt_detr",
    "rt_detr_v2",
    "table-transformer",
    "yolos",
)
# ... and of AutoModelForZeroShotObjectDetection.
OWL = ("owlvit", "owlv2")
GROUNDING = ("grounding-dino", "mm-grounding-dino")
OMDET = ("omdet-turbo",)
ZERO_SHOT = (*OWL, *GROUNDING, *OMDET)

_SHOWN_LABELS = 12
# Buffers that older checkpoints lack and that hold no learned number.
_BUFFERS = ("num_batches_tracked", "position_ids")
_NO_LABELS = ("", "n/a")

# Scores, labels and boxes of an image. A Forward finds them for each image of a batch, of the
# images' tensors and sizes (height, width).
Found = list[tuple[float, str, list[float]]]
Forward = Callable[[dict[str, Any], list[tuple[int, int]]], list[Found]]


class Detector(Protocol):
    """Finds objects in a sequence of uint8 arrays (H, W, 3), RGB, of any sizes."""

    def detect(self, images: Sequence[Pixels]) -> list[list[Detection]]:
        """Return the detections of every image, their boxes in pixels of its array."""


class TransformersDetector:
    """A detector of transformers; see `Detector`.

    `forward` runs the model on a batch of images that `image_processor` makes equal in shape.
    """

    def __init__(
        self, image_processor: Any, forward: Forward, person_labels: Iterable[str]
    ) -> None:
        self.image_processor = image_processor
        self.forward = forward
        self.person_labels = frozenset(map(clean_label, person_labels))

    def detect(self, images: Sequence[Pixels]) -> list[list[Detection]]:
        """Return the detections of every image whose score is above the threshold.

        Boxes may reach a little beyond the image, as the models give them. Images that the
        model sees at one shape share a forward; none is padded to the size of another, which
        would change what is found. Raises DataError when a score is not a number.
        """
        import torch

        inputs = [self._prepared(image) for image in images]
        groups: dict[Any, list[int]] = {}
        for index, tensors in enumerate(inputs):
            shapes = tuple((name, tuple(tensor.shape)) for name, tensor in tensors.items())
            groups.setdefault(shapes, []).append(index)
        results: list[list[Detection]] = [[] for _ in images]
        for indices in groups.values():
            for start in range(0, len(indices), BATCH):
                chosen = indices[start : start + BATCH]
                sizes = [(images[i].shape[0], images[i].shape[1]) for i in chosen]
                batch = {
                    name: torch.cat([inputs[i][name] for i in chosen]) for name in inputs[chosen[0]]
                }
                for index, found in zip(chosen, self.forward(batch, sizes), strict=True):
                    results[index] = [
                        Detection((x0, y0, x1, y1), label, score, label in self.person_labels)
                        for score, label, (x0, y0, x1, y1) in found
                        if label not in _NO_LABELS
                    ]
        return results

    def _prepared(self, image: Pixels) -> dict[str, Any]:
        # Alone, an image is not padded to the size of others.
        prepared = self.image_processor(
            images=image, input_data_format="channels_last", return_tensors="pt"
        )
        return {name: prepared[name] for name in ("pixel_values", "pixel_mask") if name in prepared}


def clean_label(text: str) -> str:
    """Return a label in lower case, with single spaces for underscores."""
    return " ".join(text.replace("_", " ").lower().split())


def _named(config: RegionsConfig) -> NamedModel:
    assert config.detector is not None
    field = "label.regions.detector_revision"
    return NamedModel(config.detector, config.detector_revision, FIELD, field)


def pinned_detector(config: RegionsConfig) -> RegionsConfig:
    """Return the settings with a hub detector's revision as the commit that it names now."""
    commit = None if config.detector is None else _named(config).pinned()
    return config if commit is None else config.model_copy(update={"detector_revision": commit})


def check_detector(config: RegionsConfig) -> None:
    """Look at a local detector's files without loading it; a hub id passes unread.

    Raises ConfigError as loading would, so that a driver can refuse before any worker starts.
    """
    if config.detector is not None and _named(config).local() is not None:
        _checked_files(config)


def _checked_files(config: RegionsConfig) -> tuple[Path, dict[str, Any]]:
    """Return the folder and the settings of a detector, downloading a hub id.

    Raises ConfigError as `NamedModel.files`, and when the family is not supported or no label is
    a person's.
    """
    folder, settings = _named(config).files()
    family = settings.get("model_type")
    if family not in (*FIXED, *ZERO_SHOT):
        raise _named(config).error(
            f"family {family!r} is no object detector that is supported",
            f"supported: {', '.join((*FIXED, *ZERO_SHOT))}",
        )
    if family in ZERO_SHOT:
        detector_queries(config, ())
        return folder, settings
    named = settings.get("id2label")
    labels = map(str, named.values()) if isinstance(named, dict) else ()
    known = list(dict.fromkeys(map(clean_label, labels)))
    persons = list(map(clean_label, config.person_labels))
    if not set(known) & set(persons):
        shown = ", ".join(known[:_SHOWN_LABELS]) or "none that are named"
        more = f" and {len(known) - _SHOWN_LABELS} more" if len(known) > _SHOWN_LABELS else ""
        raise _named(config).error(
            f"it finds no persons ({', '.join(persons)}): its labels are {shown}{more}",
            "choose another detector, or name its label in label.regions.person_labels",
        )
    return folder, settings


def detector_queries(config: RegionsConfig, labels: Sequence[str]) -> list[str]:
    """Return what a zero-shot detector looks for, in lower case, without repeats.

    `config.detector_labels`, or a person and `labels`, the objects of the classes. Raises
    ConfigError when no person is among them.
    """
    persons = list(map(clean_label, config.person_labels))
    if config.detector_labels is None:
        first = ["person"] if "person" in persons else persons[:1]
        asked = [*first, *map(clean_label, labels)]
    else:
        asked = list(map(clean_label, config.detector_labels))
    # A dot ends a label where labels are one text.
    queries = list(dict.fromkeys(clean_label(label.replace(".", " ")) for label in asked))
    queries = [query for query in queries if query]
    if not set(queries) & set(persons):
        raise ConfigError(
            f"no person is looked for: label.regions.person_labels are {', '.join(persons)}",
            field="label.regions.detector_labels",
            value=config.detector_labels,
            remedy="add one of them, or leave it unset",
        )
    return queries


def detector_fingerprint(config: RegionsConfig) -> str:
    """Return the fingerprint of the detector, see `NamedModel`; "" without one."""
    return "" if config.detector is None else _named(config).fingerprint()


def load_detector(
    config: RegionsConfig, labels: Sequence[str], device: str = "cpu", dtype: str = "float32"
) -> Detector:
    """Load the detector that `config.detector` names onto a torch device.

    `labels` are the objects that a zero-shot detector looks for when `config.detector_labels`
    does not say. Weights load from safetensors, code of the model's own is never run. Raises
    ConfigError naming label.regions.detector for a missing, incomplete or unsupported model and
    for one that finds no persons.
    """
    import torch
    import transformers

    folder, settings = _checked_files(config)
    family = settings["model_type"]
    fixed = family in FIXED
    # One processor holds the image and the text part of a zero-shot model.
    tool = transformers.AutoImageProcessor if fixed else transformers.AutoProcessor
    kind = "AutoModelForObjectDetection" if fixed else "AutoModelForZeroShotObjectDetection"
    try:
        processor = tool.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        model = _named(config).load(
            kind,
            folder,
            lambda weight: weight.endswith(_BUFFERS),
            dtype=getattr(torch, dtype),
            **_backbone_without_hub(settings),
        )
        model = model.to(device)
    except ConfigError:
        raise
    except Exception as error:  # damaged files and settings raise nearly every type
        reason = f"{type(error).__name__}: {error}"
        raise _named(config).error(f"does not load: {reason}") from error
    build = _grounding_forward if family in GROUNDING else _forward
    queries = [] if fixed else detector_queries(config, labels)
    return TransformersDetector(
        processor if fixed else processor.image_processor,
        build(config, model, processor, queries),
        config.person_labels,
    )


def _backbone_without_hub(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return options of `from_pretrained` for models whose backbone transformers asks the hub for.

    Those that were saved by transformers 4 with `backbone_kwargs` name a timm backbone, and the
    library looks for a repository of that name, even for a local model.
    """
    from transformers import AutoConfig

    names = ("backbone", "backbone_kwargs", "use_timm_backbone", "use_pretrained_backbone")
    backbone, kwargs, from_timm, _ = (settings.get(name) for name in names)
    if not (backbone and kwargs and from_timm) or settings.get("backbone_config") is not None:
        return {}
    changed = {name: value for name, value in settings.items() if name not in names}
    changed["use_timm_backbone"] = False
    changed["backbone_config"] = {
        **kwargs,
        "model_type": "timm_backbone",
        "backbone": backbone,
        "use_pretrained_backbone": False,
    }
    return {"config": AutoConfig.for_model(**changed)}


def _run(model: Any, inputs: Mapping[str, Any], kept: Sequence[str]) -> SimpleNamespace:
    """Return the outputs named `kept`, floats as float32 on the CPU.

    The mask of an image goes to models that take one. Raises DataError for NaN.
    """
    import torch

    accepted = inspect.signature(model.forward).parameters
    moved = {
        name: tensor.to(model.device, model.dtype if tensor.is_floating_point() else None)
        for name, tensor in inputs.items()
        if name in accepted
    }
    with torch.inference_mode():
        outputs = model(**moved)
    results = {}
    for name in kept:
        tensor = outputs[name].cpu()
        if tensor.is_floating_point():
            # Text models mark padding with -inf; NaN would only look like an empty image.
            if tensor.isnan().any():
                raise DataError("the detector's outputs are not numbers: try float32")
            tensor = tensor.float()
        results[name] = tensor
    return SimpleNamespace(**results)


def _found(result: dict[str, Any], labels: Sequence[str]) -> Found:
    scores, boxes = result["scores"].tolist(), result["boxes"].tolist()
    return list(zip(scores, labels, boxes, strict=True))


def _forward(config: RegionsConfig, model: Any, processor: Any, queries: Sequence[str]) -> Forward:
    """Models with labels of their own, and zero-shot ones that read one text a query."""
    import torch

    family = model.config.model_type
    kept: tuple[str, ...] = ("logits", "pred_boxes")
    options: dict[str, Any] = {"threshold": config.detector_threshold}
    if family in OMDET:
        kept = ("decoder_coord_logits", "decoder_class_logits", "classes_structure")
        options["nms_threshold"] = config.nms_iou
    names: dict[int, str] = {}
    text: dict[str, Any] = {}
    if family in FIXED:
        post_process = processor.post_process_object_detection
        names = {int(key): clean_label(str(name)) for key, name in model.config.id2label.items()}
    else:
        post_process = processor.post_process_grounded_object_detection
        text = (_omdet_text if family in OMDET else _owl_text)(processor, queries)

    def forward(inputs: dict[str, Any], sizes: list[tuple[int, int]]) -> list[Found]:
        count = len(sizes)
        repeated = {name: torch.cat([tensor] * count) for name, tensor in text.items()}
        outputs = _run(model, {**inputs, **repeated}, kept)
        asked = {"text_labels": [list(queries)] * count} if queries else {}
        results = post_process(outputs, target_sizes=sizes, **options, **asked)
        return [
            _found(
                result,
                result["text_labels"]
                if queries
                else [names.get(label, "") for label in result["labels"].tolist()],
            )
            for result in results
        ]

    return forward


def _owl_text(processor: Any, queries: Sequence[str]) -> dict[str, Any]:
    """OWL-ViT and OWLv2 compare boxes with one short text a query."""
    prompts = [f"a photo of {noun_phrase(query)}" for query in queries]
    text = processor(text=prompts, truncation=True, return_tensors="pt")
    return {name: text[name] for name in ("input_ids", "attention_mask")}


def _omdet_text(processor: Any, queries: Sequence[str]) -> dict[str, Any]:
    """OmDet-Turbo is given a task and one text a query, and merges overlaps by itself."""
    import torch

    options = dict(processor.text_kwargs, return_tensors="pt")
    task = processor.tokenizer([f"Detect {', '.join(queries)}."], **options)
    names = processor.tokenizer(list(queries), **options)
    return {
        **{f"tasks_{name}": tensor for name, tensor in task.items()},
        **{f"classes_{name}": tensor for name, tensor in names.items()},
        "classes_structure": torch.tensor([len(queries)]),
    }


def _grounding_forward(
    config: RegionsConfig, model: Any, processor: Any, queries: Sequence[str]
) -> Forward:
    """Grounding DINO reads all queries as one text, "a. b.", and scores its tokens.

    Queries that do not fit into the text that the model takes are looked for in further
    forwards.
    """
    chunks = [
        (text, _token_labels(processor.tokenizer, text), chunk)
        for text, chunk in _texts(processor.tokenizer, queries, model.config.max_text_len)
    ]

    def forward(inputs: dict[str, Any], sizes: list[tuple[int, int]]) -> list[Found]:
        results: list[Found] = [[] for _ in sizes]
        for text, labels_T, chunk in chunks:
            tokens = processor.tokenizer(
                [text] * len(sizes), return_token_type_ids=True, return_tensors="pt"
            )
            outputs = _run(model, {**inputs, **tokens}, ("logits", "pred_boxes"))
            processed = processor.post_process_grounded_object_detection(
                outputs,
                input_ids=tokens["input_ids"],
                threshold=config.detector_threshold,
                text_threshold=config.detector_threshold,
                target_sizes=sizes,
            )
            # Its phrases may join parts of two queries; the query of the best token is one.
            best_BQ = (
                outputs.logits[..., : len(labels_T)].masked_fill(labels_T < 0, -1e9).argmax(-1)
            )
            for image, result in enumerate(processed):
                is_found = outputs.logits[image].sigmoid().amax(-1) > config.detector_threshold
                names = [chunk[int(labels_T[token])] for token in best_BQ[image][is_found]]
                results[image] += _found(result, names)
        return results

    return forward


def _texts(tokenizer: Any, queries: Sequence[str], longest: int) -> list[tuple[str, list[str]]]:
    """Share out queries among texts of at most `longest` tokens."""
    texts: list[tuple[str, list[str]]] = []
    chunk: list[str] = []
    for query in queries:
        longer = [*chunk, query]
        if chunk and len(tokenizer(_grounding_text(longer)).input_ids) > longest:
            texts.append((_grounding_text(chunk), chunk))
            longer = [query]
        chunk = longer
    return [*texts, (_grounding_text(chunk), chunk)]


def _grounding_text(queries: Sequence[str]) -> str:
    return ". ".join(queries) + "."


def _token_labels(tokenizer: Any, text: str) -> Any:
    """Return which query each token of the text belongs to, -1 for none, int64 (T,)."""
    import torch

    spans = tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
    # Each query ends with a dot and has none. Special tokens have no span.
    return torch.tensor(
        [text.count(".", 0, a) if a < b and "." not in text[a:b] else -1 for a, b in spans]
    )
