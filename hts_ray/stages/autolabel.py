"""From a folder of images and class names to labels, in one call.

    labels = hts_ray.label("photos", classes=["a red bicycle", "an empty shelf"])
    labels.table().to_pandas()
    labels.show()
    model = labels.train()

`hts autolabel` does the same, and shows a sample first.
"""

from __future__ import annotations

import html
import sys
import webbrowser
from collections import Counter
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pyarrow as pa

from hts_ray import stages
from hts_ray.classes import load_class_table, name_classes, read_class_csv
from hts_ray.classifier import Classifier, load
from hts_ray.config import HtsConfig, load_config, override
from hts_ray.engine.console import print_line
from hts_ray.engine.image_pass import OK
from hts_ray.engine.run import BESIDE, CLASSES_FILE, CONFIG_FILE, Run
from hts_ray.engine.session import command_cluster
from hts_ray.errors import ConfigError, NoLabelsError
from hts_ray.exports.records import LabeledImage
from hts_ray.exports.source import read_labels
from hts_ray.exports.tables import label_rows, label_rows_csv
from hts_ray.labels.passes import TeacherPass
from hts_ray.labels.stage import labels_so_far, plan_filter
from hts_ray.report.preview import write_sample
from hts_ray.store import storage
from hts_ray.store.run import StageFolder, settings_hash
from hts_ray.teacher.models.catalog import check_teacher
from hts_ray.teacher.stage import plan_label

PRESET = "own-images"
SAMPLE = 20  # images that are labeled before a person is asked
LABELS, PREVIEW, REPORT = "labels.csv", "preview.html", "report.html"
_AGREED = "agreed.json"  # in a run: for which classes and settings somebody said yes


@dataclass(frozen=True, eq=False, repr=False)
class Labels:
    """The labels of a folder's images, and what can be done with them.

    `stage` is their `pseudo_labels` folder; its `stats` has the counts.
    """

    run: Run
    stage: StageFolder

    def __repr__(self) -> str:
        counts = self.stage.stats
        found = f"{counts['positives']:,} labels of {counts['rows_out']:,} images"
        return f"<{found} in {self.run.config.run_dir}>"

    @property
    def path(self) -> str:
        """The file `labels.csv`, which has what `table` returns."""
        return storage.join(self.run.config.run_dir, LABELS)

    @property
    def report(self) -> str:
        """The page that shows them."""
        return storage.join(self.run.config.run_dir, REPORT)

    def table(self) -> pa.Table:
        """Return a row a label: path, class, probability, and x0, y0, x1, y1 in pixels.

        The box is the region that spoke for the label. An image without a label has one row,
        whose other columns are null.
        """
        one_box = self.run.changed({"export": {"boxes_per_label": 1, "region_boxes": True}})
        return label_rows(read_labels(one_box, self.stage.path).images(), self.run.class_table)

    def show(self) -> None:
        """Show the report: below the cell of a notebook, else in a browser."""
        if "ipykernel" in sys.modules:
            from IPython.display import HTML, display

            page = html.escape(storage.read_bytes(self.report).decode())
            frame = (
                f'<iframe srcdoc="{page}" style="width: 100%; height: 85vh; border: 0"></iframe>'
            )
            display(HTML(f"<div>{frame}</div>"))
            return
        print_line(f"report: {self.report}")
        if not storage.is_remote(self.report):
            webbrowser.open(Path(self.report).resolve().as_uri())

    def train(self) -> Classifier:
        """Train a student on the labels; returns it as `hts_ray.load` does."""
        return load(stages.train(self.run, self.stage).path)


def label(
    folder: str | Path,
    classes: Sequence[str] | str | Path = (),
    *,
    run_dir: str | Path | None = None,
    teacher: str | None = None,
    **settings: Any,
) -> Labels:
    """Label the images of a folder with classes, given as names or as the path of a CSV file.

    What was done is kept in `run_dir`, beside the folder if not given: a second call goes on where
    the first one ended, and labels only images that are new or changed. `teacher` is a hub id or
    a path. More settings are nested mappings, `filter={"min_support": 2}`. Raises ConfigError for
    arguments that cannot be used, DataError when no image can.
    """
    folder, place = str(folder), str(run_dir or beside(str(folder)))
    remembered = storage.join(place, CONFIG_FILE)
    file = remembered if storage.exists(remembered) else None
    config = load_config(preset=PRESET, run_file=file, extra={**settings, "run_dir": place})
    names = () if isinstance(classes, str | Path) else classes
    run = open_folder(folder, config, names, "" if names else str(classes or ""), teacher)
    list_images(run, folder)
    with cluster(run):
        return label_all(run)


def beside(folder: str) -> str:
    """Return the run directory of a folder of images: `photos-labels` beside `photos`.

    Raises ConfigError where nothing is beside it.
    """
    plain = folder.rstrip("/")
    if plain.rpartition("/")[2] in {"", ".", "..", "~"}:
        plain = storage.absolute(folder).rstrip("/")
    if not (urlsplit(plain).path.strip("/") if storage.is_remote(plain) else plain):
        raise ConfigError(field="PATH", value=folder, remedy="nothing is beside it: give --run-dir")
    return f"{plain}{BESIDE}"


def open_folder(
    folder: str,
    config: HtsConfig,
    names: Sequence[str] = (),
    file: str = "",
    teacher: str | None = None,
) -> Run:
    """Return the run that a folder and classes make; nothing is written.

    Classes are `names`, or those of a CSV `file`, or those of the settings. Raises ConfigError for
    a path that is no folder, and for classes that cannot be used.
    """
    _require_folder(folder)
    if names and file:
        raise ConfigError(field="--classes", value=file, remedy="name classes or give a file")
    kept = storage.join(storage.absolute(config.run_dir), CLASSES_FILE)
    if names:
        before = read_class_csv(kept) if storage.exists(kept) else None
        table = name_classes(names, before)
    elif file or config.classes.source != "hico":
        table = load_class_table(file or config.classes.source, config.classes.ids)
    else:
        raise ConfigError(
            'no class is named: hts autolabel photos "a red bicycle" "an empty shelf"'
        )
    changes: dict[str, Any] = {"classes": {"source": kept, "ids": None}}
    if teacher is not None:
        changes["label"] = {"teacher": {"model": teacher}}
    run = Run(override(config, changes), table)
    check_teacher(run.config.labeling.teacher)
    return run


def _require_folder(folder: str) -> None:
    remedy = "no such folder: check the path"
    if urlsplit(folder).scheme in {"http", "https"}:
        remedy = (
            "a web address cannot be listed: download the images to a folder, or list their"
            " addresses in a file for `hts prepare list`"
        )
    elif (kind := storage.kind(folder)) == "Directory":
        return
    elif kind != "NotFound":
        remedy = "this is a file: give the folder that holds the images"
    raise ConfigError(field="PATH", value=folder, remedy=remedy)


def list_images(run: Run, folder: str) -> StageFolder:
    """Write the manifest of a folder; ConfigError where the run directory cannot be written."""
    try:
        return stages.prepare(run, "folder", folder)
    except (FileNotFoundError, NotADirectoryError, PermissionError) as error:
        place = run.config.run_dir
        remedy = f"nothing can be written there: {error.strerror}; name a folder of your own"
        raise ConfigError(field="--run-dir", value=place, remedy=remedy) from error


def is_agreed(run: Run) -> bool | None:
    """Return whether somebody wants all images labeled with these classes and settings.

    None where nobody was asked yet; False where it was about others.
    """
    agreed = storage.read_object(_agreed_file(run))
    return agreed.get("key") == _agreed_key(run) if agreed else None


def agree(run: Run) -> None:
    """Write down that all images are to be labeled with these classes and settings."""
    storage.write_json(_agreed_file(run), {"key": _agreed_key(run)})


def _agreed_file(run: Run) -> str:
    return storage.join(run.run_dir, _AGREED)


def _agreed_key(run: Run) -> str:
    return settings_hash(run.config.labeling.answer_settings(), run.class_table.fingerprint())


def cluster(run: Run) -> AbstractContextManager[None]:
    """Join or start Ray for what a run needs it for; not at all where the labels are finished."""
    manifest = run.manifest()
    if is_agreed(run) and plan_label(run, manifest).folder.finished:
        return nullcontext()
    return command_cluster(run.config, "label", manifest=manifest)


@dataclass(frozen=True)
class Sample:
    """What a sample of the images shows.

    - `images` were labeled, of `total`; `labels` has how many of them show each class, the most
      frequent first, and `bare` how many show none;
    - `seconds` is what the other images will take at most, None where that is not known;
    - `path` is the page that shows them.
    """

    images: int
    total: int
    labels: dict[str, int]
    bare: int
    seconds: float | None
    path: str


def label_sample(run: Run) -> Sample:
    """Label a seeded sample of the images, and write a page that shows them.

    Raises as `stages.label` does, and ConfigError for settings that the filter would refuse.
    """
    manifest = run.manifest()
    scores = stages.label(run, manifest.path, limit=SAMPLE)
    plan_filter(run, scores)
    labels = labels_so_far(TeacherPass(scores, run.config.filter), run.config.train.split)
    path = storage.join(run.config.run_dir, PREVIEW)
    total = len(manifest.rows(run.config.labeling.splits))
    write_sample(path, run, scores, labels, total)
    positives = labels["positive_ids"].to_pylist()
    counts = Counter(class_id for of_image in positives for class_id in of_image)
    table, rate = run.class_table, scores.stats["rows_per_second"]
    return Sample(
        images=len(labels),
        total=total,
        labels={table[table.index_of(i)].name: number for i, number in counts.most_common()},
        bare=sum(not of_image for of_image in positives),
        seconds=(total - scores.stats["rows_in"]) / rate if rate else None,
        path=path,
    )


def label_all(run: Run) -> Labels:
    """Label and filter all images of a run; writes `labels.csv` and the report.

    Where no image gets a label the file says so of each, and NoLabelsError is raised.
    """
    agree(run)
    scores = stages.label(run)
    try:
        labels = Labels(run, stages.filter_labels(run, scores))
    except NoLabelsError as error:
        path = storage.join(run.config.run_dir, LABELS)
        scored = scores.read(["image_id", "uri", "split", "status"]).to_pylist()
        good = [row for row in scored if row.pop("status") == OK]
        bare = label_rows([LabeledImage(**row, positive_ids=()) for row in good], run.class_table)
        storage.write_bytes(path, label_rows_csv(bare))
        raise NoLabelsError(
            f"no image shows one of the classes, says the teacher, so {path} has no label: look at"
            f" {storage.join(run.config.run_dir, PREVIEW)}, and take other words for the classes or"
            f" another --teacher. The filter says: {error}"
        ) from error
    storage.write_bytes(labels.path, label_rows_csv(labels.table()))
    stages.write_run_report(run.config.run_dir)
    return labels
