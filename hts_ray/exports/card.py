"""The dataset card of an export: what it holds, how the labels were made, and what is not known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from hts_ray.exports.records import Context, Origin, Tally

CARD = "README.md"
_SIZES = ((10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"), (10**6, "100K<n<1M"))
_SETTINGS = (
    "aggregation", "top_k", "prior_alpha", "temperature", "positive_threshold",
    "negative_threshold", "per_class_quantile", "quantile_floor", "min_support",
    "support_threshold", "max_positives_per_image", "region_kinds", "margins",
)  # fmt: skip


def dataset_card(context: Context, use: str, configs: Sequence[Mapping[str, Any]] = ()) -> str:
    """Return the card (Markdown under a YAML header) of what `context.tally` has counted.

    `use` is a section on how to open it, `configs` what the hub's loader has to know.
    """
    parts = [
        _header(context.origin, context.tally, configs),
        _summary(context),
        use.strip() + "\n",
        _making(context.origin),
        _columns(context.origin),
        _classes(context),
        _LIMITS if context.origin.kind == "pseudo_labels" else _LIMITS_OF_ANNOTATIONS,
        _LICENCES,
    ]
    return "\n".join(parts)


def _header(origin: Origin, tally: Tally, configs: Sequence[Mapping[str, Any]]) -> str:
    machine = origin.kind == "pseudo_labels"
    creators = (["machine-generated"] if machine else []) + (
        ["expert-generated"] if machine and origin.corrected else []
    )
    header: dict[str, Any] = {
        "annotations_creators": creators or ["found"],
        "task_categories": ["image-classification"],
        "task_ids": ["multi-label-image-classification"],
        "size_categories": [size_category(tally.images)],
        "tags": ["hts_ray", *(["pseudo-labels"] if machine else [])],
    }
    if configs:
        header["configs"] = [dict(config) for config in configs]
    text = yaml.safe_dump(header, sort_keys=False, allow_unicode=True)
    return f"---\n# license: fill in (see Licences below)\n{text}---\n"


def size_category(images: int) -> str:
    """Return the hub's name of a dataset's order of magnitude."""
    return next((name for limit, name in _SIZES if images < limit), "n>1M")


def _summary(context: Context) -> str:
    tally = context.tally
    seen = sum(1 for count in tally.per_class.values() if count)
    kind = "pseudo-labels" if context.origin.kind == "pseudo_labels" else "annotations"
    rows = [
        ("images", tally.images),
        *((f"split {name}", count) for name, count in sorted(tally.per_split.items())),
        ("positive labels", tally.positives),
        ("positive labels an image", f"{tally.positives / max(tally.images, 1):.2f}"),
        ("undecided labels an image", f"{tally.ignored / max(tally.images, 1):.2f}"),
        ("classes", len(context.class_table)),
        ("classes with a positive", seen),
    ]
    if tally.bad_images:
        left_out = ", ".join(f"{kind} {count}" for kind, count in tally.bad_images.most_common())
        rows.append(("images left out", left_out))
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    return f"# Images with multi-label {kind}\n\n| | |\n|---|---|\n{table}\n"


def _making(origin: Origin) -> str:
    lines = ["## How the labels were made", ""]
    if origin.kind == "annotations":
        lines += [f"They are the annotations of `{origin.name}`; this tool did not make them.", ""]
    else:
        teacher = f"`{origin.teacher}`" if origin.teacher else "a generative captioner"
        lines += [
            f"By a machine: {teacher} scored every class on regions of every image, and the scores"
            " were aggregated and filtered (HTS, `hts_ray`). No human label was used to make them.",
            "",
        ]
        if origin.corrected:
            lines += [f"People then corrected the labels of {origin.corrected} images.", ""]
        lines += _mapping(
            {
                "teacher": origin.teacher or "not recorded",
                "teacher revision": origin.teacher_revision or "not recorded",
                **{name: origin.settings[name] for name in _SETTINGS if name in origin.settings},
            }
        )
    return "\n".join([*lines, *_mapping(origin.details)])


def _mapping(values: Mapping[str, Any]) -> list[str]:
    if not values:
        return []
    rows = [f"| {name} | {_cell(value)} |" for name, value in values.items()]
    return ["| | |", "|---|---|", *rows, ""]


def _cell(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    return str(value).replace("|", "\\|")


def _columns(origin: Origin) -> str:
    rows = [
        "| `image_id` | the image's name in the run |",
        "| `labels`, `class_ids` | the positive classes, by name and by id |",
        "| `ignored` | classes that are undecided: leave them out of a loss and of a metric |",
    ]
    if origin.kind == "pseudo_labels":
        rows += [
            "| `probability` | of each positive, by the teacher's aggregated evidence |",
            "| `support` | how many regions agree on each positive |",
            "| every other class | negative, by the same evidence |",
        ]
    else:
        rows += [
            "| `negatives` | classes that are known to be absent |",
            "| every other class | unknown |",
        ]
    return "\n".join(["## Columns", "", "| | |", "|---|---|", *rows, ""])


def _classes(context: Context) -> str:
    counts = [(context.tally.per_class[c.class_id], c) for c in context.class_table]
    counts.sort(key=lambda entry: (-entry[0], entry[1].class_id))
    rows = [f"| {c.class_id} | {_cell(c.name)} | {count} |" for count, c in counts]
    head = ["| id | class | positives |", "|---|---|---|"]
    return "\n".join(["## Classes", "", *head, *rows, ""])


_LIMITS = """## Limits

- These labels are guesses of a model. They are wrong in places, and they carry the biases of the
  captioner and of what it was trained on. Do not take them for ground truth in an evaluation.
- A probability ranks labels of this dataset; it is not calibrated.
- Rare classes have few labels, and those are the least certain.
"""

_LIMITS_OF_ANNOTATIONS = """## Limits

Only what is listed is known. Whether another class is in an image, these annotations do not say.
"""

_LICENCES = """## Licences

This card grants nothing. The images belong to their owners, the teacher and the annotations have
terms of their own: check them all, then fill in `license` above before you pass this dataset on.
"""
