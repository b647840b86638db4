"""What every format is written from: an image with its labels, and how the labels were made."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote, unquote

from hts_ray.classes import ClassTable
from hts_ray.config import ExportConfig
from hts_ray.errors import ConfigError
from hts_ray.store import storage

Box = tuple[float, float, float, float]
Needs = Literal["labels", "sizes", "files"]


@dataclass(frozen=True)
class SupportRegion:
    """A region that supports a class of its image.

    `box` is xyxy in pixels of the upright original; `probability` is the class's in the region.
    """

    class_id: int
    box: Box
    probability: float
    kind: str


@dataclass(frozen=True)
class ImageFile:
    """An encoded image: its bytes as stored, and the suffix of its format, without the dot."""

    data: bytes
    suffix: str


@dataclass(frozen=True)
class LabeledImage:
    """An image and its labels, as class ids.

    - `negative_ids` is None in pseudo-labels, where every class that is neither positive nor
      ignored is negative. Annotations list their negatives, and the rest is unknown.
    - `ignored_ids` are the classes that are undecided (pseudo-labels) or ambiguous (annotations).
    - `probability` and `support` go with `positive_ids`; empty where there are none.
    - `file` is there for formats that need it.
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
    file: ImageFile | None = None


@dataclass(frozen=True)
class Origin:
    """How labels were made; what is not known is empty.

    - `kind` tells machine labels from annotations, `name` is the folder they were read from;
    - `settings` are the filter's, `corrected` counts the images that people corrected;
    - `details` holds what else is recorded: settings hash, versions, commit.
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
    """What went into an export, and what did not.

    `bad_images` counts the reasons; `examples` has the first few images of them.
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

    @property
    def classes_with_positive(self) -> int:
        """Number of classes that some image has."""
        return sum(1 for count in self.per_class.values() if count)

    def figures(self) -> dict[str, Any]:
        """Return the counts by name, for a table."""
        return {
            "images": self.images,
            "positive labels": self.positives,
            "classes with a positive": self.classes_with_positive,
            "images left out": self.bad_images.total(),
            **{f"left out: {kind}": count for kind, count in self.bad_images.most_common()},
        }

    def reasons(self) -> str:
        """Return why images were left out, the most frequent reason first."""
        return ", ".join(f"{kind} {count}" for kind, count in self.bad_images.most_common())

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

    `root` is the folder that they were prepared from, `tally` counts what has passed so far.
    """

    class_table: ClassTable
    origin: Origin
    config: ExportConfig = field(default_factory=ExportConfig)
    root: str | None = None
    tally: Tally = field(default_factory=Tally)

    @property
    def is_machine(self) -> bool:
        """Whether a machine made the labels; otherwise they are annotations."""
        return self.origin.kind == "pseudo_labels"

    def name_of(self, class_id: int) -> str:
        """Return a class's display name."""
        return self.class_table[self.class_table.index_of(class_id)].name

    def names_of(self, class_ids: tuple[int, ...]) -> list[str]:
        """Return display names in the order of the ids."""
        return [self.name_of(class_id) for class_id in class_ids]

    def url_of(self, uri: str) -> str:
        """Return where a browser finds an image: `image_url_prefix` in place of the root.

        Without a prefix that is the uri itself. Raises ConfigError when the image is not in the
        root, or no root is known.
        """
        prefix, root = self.config.image_url_prefix, self.config.image_root or self.root
        if prefix is None:
            return uri
        if root is None:
            raise ConfigError(
                field="export.image_url_prefix",
                value=prefix,
                remedy="set export.image_root too: the folder that the prefix replaces",
            )
        base = root.rstrip("/") + "/"
        if not uri.startswith(base):
            raise ConfigError(
                field="export.image_root",
                value=root,
                remedy=f"the image {uri} is not in it: name a folder that holds all images",
            )
        path = uri[len(base) :]
        # Remote uris are quoted already, local paths are not.
        return prefix + quote(unquote(path) if storage.is_remote(uri) else path)


@dataclass(frozen=True)
class Format:
    """How labels are written in one format.

    - `write(images, context, target)` writes the file or folder `target`;
    - `suffix` is that of a format of one file; a folder has none;
    - `needs` says what images come with: labels, their sizes, or sizes and files;
    - `boxes` says whether regions have a place in it;
    - `notes` say how to open the result, with `{output}` for its path;
    - `correctable` formats are read again by `hts import-labels`.
    """

    write: Callable[[Iterable[LabeledImage], Context, Path], None]
    suffix: str = ""
    needs: Needs = "labels"
    boxes: bool = False
    notes: tuple[str, ...] = ()
    correctable: bool = False
