"""What every format is written from: an image with its labels, and how the labels came about."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from hts_ray.classes import ClassTable

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class SupportRegion:
    """A region that speaks for a class of its image.

    `box` is xyxy in pixels of the upright original; `probability` is the class's in the region.
    """

    class_id: int
    box: Box
    probability: float
    kind: str


@dataclass(frozen=True)
class LabeledImage:
    """An image and its labels, as class ids.

    `negative_ids` is None where every class that is neither positive nor ignored is negative, as
    in pseudo-labels; of annotations it lists them, and the rest is unknown. `ignored_ids` are the
    classes that nobody decided (pseudo-labels) or that are ambiguous (annotations).
    `probability` and `support` go with `positive_ids`; empty where there are none.
    """

    image_id: str
    uri: str
    split: str
    positive_ids: tuple[int, ...]
    ignored_ids: tuple[int, ...] = ()
    negative_ids: tuple[int, ...] | None = None
    probability: tuple[float, ...] = ()
    support: tuple[int, ...] = ()
    width: int | None = None
    height: int | None = None
    regions: tuple[SupportRegion, ...] = ()

    def negatives(self, class_table: ClassTable) -> tuple[int, ...]:
        """Return the negative class ids, those that follow from the others included."""
        if self.negative_ids is not None:
            return self.negative_ids
        taken = {*self.positive_ids, *self.ignored_ids}
        return tuple(i for i in class_table.positions if i not in taken)


@dataclass(frozen=True)
class ImageFile:
    """An encoded image: its bytes as stored, and the suffix of its format, without the dot."""

    data: bytes
    suffix: str


@dataclass(frozen=True)
class Origin:
    """How labels came about; what is not known is empty.

    `kind` tells machine labels from annotations, `name` is the folder that they lie in,
    `settings` are the filter's, `corrected` the images that people corrected. `details` holds
    what else is recorded: settings hash, versions, commit.
    """

    kind: Literal["pseudo_labels", "annotations"]
    name: str = ""
    teacher: str = ""
    teacher_revision: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    corrected: int = 0
    details: Mapping[str, str] = field(default_factory=dict)


@dataclass
class Tally:
    """What went into an export: images, positives, positives by class id, and what did not.

    `bad_images` counts reasons; `examples` has the first few images of them.
    """

    images: int = 0
    per_class: Counter[int] = field(default_factory=Counter)
    per_split: Counter[str] = field(default_factory=Counter)
    ignored: int = 0
    bad_images: Counter[str] = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)

    @property
    def positives(self) -> int:
        """Number of positive labels."""
        return self.per_class.total()

    def count(self, image: LabeledImage) -> None:
        """Add an image that is exported."""
        self.images += 1
        self.per_class.update(image.positive_ids)
        self.per_split[image.split] += 1
        self.ignored += len(image.ignored_ids)

    def reject(self, image: LabeledImage, kind: str, error: str) -> None:
        """Add an image that is left out."""
        self.bad_images[kind] += 1
        if len(self.examples) < 5:
            self.examples.append(f"{image.image_id}: {error}")


@dataclass(frozen=True)
class Context:
    """What a format needs to know besides the images.

    `tally` counts what has passed so far. Browsers find the images in `image_root` at
    `image_url_prefix`.
    """

    class_table: ClassTable
    origin: Origin
    image_url_prefix: str | None = None
    image_root: str | None = None
    shard_images: int = 5000
    tally: Tally = field(default_factory=Tally)

    def name_of(self, class_id: int) -> str:
        """Return a class's display name."""
        return self.class_table[self.class_table.index_of(class_id)].name

    def names_of(self, class_ids: tuple[int, ...]) -> list[str]:
        """Return display names in the order of the ids."""
        return [self.name_of(class_id) for class_id in class_ids]
