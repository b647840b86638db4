"""The dataset card of an export: what it holds, how the labels were made, and what is not known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from hts_ray.exports.records import Context

CARD = "README.md"
_SIZES = ((10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"), (10**6, "100K<n<1M"))
_SETTINGS = (
    "aggregation", "top_k", "prior_alpha", "temperature", "positive_threshold",
    "negative_threshold", "per_class_quantile", "quantile_floor", "min_support",
    "support_threshold", "max_positives_per_image", "region_kinds", "margins",
)  # fmt: skip


def dataset_card(
    context: Context, use: str, configs: Sequence[Mapping[str, Any]] = (), **values: str
) -> str:
    """Return the card (Markdown under a YAML header) of what `context.tally` has counted.

    `use` names the template that says how to open it, which `values` fill; `configs` is what the
    hub's loader has to know.
    """
    environment = Environment(  # noqa: S701 - Markdown, not HTML
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["cell"] = _cell
    origin, settings = context.origin, {}
    if context.is_machine:
        settings = {
            "teacher": origin.teacher or "not recorded",
            "teacher revision": origin.teacher_revision or "not recorded",
            **{name: origin.settings[name] for name in _SETTINGS if name in origin.settings},
        }
    counts = [(context.tally.per_class[c.class_id], c) for c in context.class_table]
    return environment.get_template("card.md.j2").render(
        header=_header(context, configs),
        machine=context.is_machine,
        origin=origin,
        summary=_summary(context),
        settings=settings,
        classes=sorted(counts, key=lambda entry: (-entry[0], entry[1].class_id)),
        use=use,
        **values,
    )


def _header(context: Context, configs: Sequence[Mapping[str, Any]]) -> str:
    creators = ["machine-generated"] if context.is_machine else ["found"]
    if context.is_machine and context.origin.corrected:
        creators.append("expert-generated")
    header: dict[str, Any] = {
        "annotations_creators": creators,
        "task_categories": ["image-classification"],
        "task_ids": ["multi-label-image-classification"],
        "size_categories": [size_category(context.tally.images)],
        "tags": ["hts_ray", *(["pseudo-labels"] if context.is_machine else [])],
    }
    if configs:
        header["configs"] = [dict(config) for config in configs]
    return yaml.safe_dump(header, sort_keys=False, allow_unicode=True)


def size_category(images: int) -> str:
    """Return the hub's name of a dataset's order of magnitude."""
    return next((name for limit, name in _SIZES if images < limit), "n>1M")


def _summary(context: Context) -> dict[str, Any]:
    tally = context.tally
    rows = {
        "images": tally.images,
        **{f"split {name}": count for name, count in sorted(tally.per_split.items())},
        "positive labels": tally.positives,
        "positive labels an image": f"{tally.positives / max(tally.images, 1):.2f}",
        "undecided labels an image": f"{tally.ignored / max(tally.images, 1):.2f}",
        "classes": len(context.class_table),
        "classes with a positive": tally.classes_with_positive,
    }
    return rows | ({"images left out": tally.reasons()} if tally.bad_images else {})


def _cell(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    return str(value).replace("|", "\\|")
