"""The report: structure, safety and size of the page, and what it reads from a run."""

from __future__ import annotations

import base64
import io
import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from hts_ray import report, storage, tables
from hts_ray.classes import hico_classes
from hts_ray.config import parse_config

HOSTILE = '<script>alert("x")</script>&\'"'
VOID = {"meta", "link", "br", "img", "input", "hr"}


class _Page(HTMLParser):
    """Collects what the tests ask about and fails on tags that are not closed in order."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.text, self.tags, self.stack, self.data = text, [], [], {}
        self.feed(text)
        self.close()
        assert self.stack == [], f"never closed: {self.stack}"

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.stack, f"</{tag}> closes nothing"
        assert self.stack[-1] == tag, f"</{tag}> closes <{self.stack[-1]}>"
        self.stack.pop()

    def handle_data(self, data):
        key = self.stack[-1] if self.stack else ""
        self.data[key] = self.data.get(key, "") + data

    def attributes(self, tag):
        return [attrs for name, attrs in self.tags if name == tag]

    @property
    def words(self):
        return " ".join(text for tag, text in self.data.items() if tag not in ("style", "script"))


def photo(seed=0, height=240, width=320):
    """Something as hard to compress as a photograph: smooth shapes with grain."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 255, (height // 16, width // 16, 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))
    grain = rng.normal(0, 8, (height, width, 3))
    return np.clip(smooth + grain, 0, 255).astype(np.uint8)


def make_item(seed=0, names=None, regions=14, annotated=True, size=(320, 240)):
    rng = np.random.default_rng(seed)
    names = names or {i: f"ride thing {i}" for i in range(20)}
    ids = list(names)
    width, height = size
    boxes = [(0, 0, width, height)]
    for _ in range(regions - 1):
        x, y = rng.uniform(0, width * 0.5), rng.uniform(0, height * 0.5)
        boxes.append((x, y, x + width * 0.5, y + height * 0.5))
    p_RC = rng.dirichlet(np.full(len(ids), 0.2), regions)
    return report.gallery_item(
        image_id=f"image_{seed:05d}.jpg",
        image=report.thumbnail_data_uri(photo(seed, height, width)),
        width=width,
        height=height,
        names=names,
        class_ids=ids,
        boxes=boxes,
        probabilities=p_RC,
        positive_ids=[ids[0], ids[1]],
        positive_probabilities=[0.91, 0.62],
        ignored_ids=[ids[2], ids[3]],
        annotation_ids=[ids[0], ids[4]] if annotated else None,
        kinds=["whole"] + ["grid"] * (regions - 1),
        captions=["a person on a thing"] * regions if seed % 2 else (),
    )


def make_data(images=4, classes=30, name="class {}"):
    rng = np.random.default_rng(0)
    rows = [
        report.ClassRow(
            class_id=i,
            name=name.format(i),
            annotated=int(rng.integers(0, 300)),
            pseudo=int(rng.integers(0, 300)),
            precision=float(rng.uniform()) if i % 7 else None,
            recall=float(rng.uniform()),
            ap={
                "zero-shot CLIP": float(rng.uniform(0, 0.5)),
                "HTS with regions": float(rng.uniform(0.2, 0.8)),
                "supervised": float(rng.uniform(0.3, 1.0)) if i != 3 else math.nan,
            },
        )
        for i in range(classes)
    ]
    return report.ReportData(
        title="HTS report",
        intro=["The images are synthetic.", "One seed was run."],
        settings="train:\n  epochs: 3\n",
        provenance={"versions": {"ray": "2.60", "torch": "2.8"}, "git_commit": None},
        comparison=[
            report.ComparisonRow("zero-shot CLIP", 0.372, "class prompts only", 0.4, seconds=2),
            report.ComparisonRow("HTS whole image only", 0.45, "", 0.5, 0.1, 0.2, 0.3, 40),
            report.ComparisonRow("HTS", 0.5, "main", 0.6, 0.1, 0.2, 0.3, 140, role="hts"),
            report.ComparisonRow("supervised", 0.562, "", 0.66, None, None, 0.5, 3700),
        ],
        funnel=[
            report.FunnelStep("images", 1000),
            report.FunnelStep("regions", 14_000, of="images"),
            report.FunnelStep("candidate classes", 9_000, of="images"),
            report.FunnelStep("positives kept", 2_100, of="candidate classes"),
            report.FunnelStep("ignored", 6_900, of="candidate classes", note="not in the loss"),
        ],
        stages=[report.StageRow("region scores", 1000, 990, 10, 81.2)],
        per_class=rows,
        history={"HTS": [3.0, 2.0, math.nan, 1.2], "supervised": [2.5, 1.5, 1.0, 0.8]},
        quarantine=[report.QuarantineRow(f"q{i}", "label", "truncated", "cut") for i in range(3)],
        gallery=[make_item(seed) for seed in range(images)],
    )


def test_page_is_well_formed_and_self_contained():
    """Catches a template that leaves a tag open, repeats an id, or loads anything from outside."""
    page = _Page(report.render_report(make_data()))
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    for tag, attrs in page.tags:
        for key in ("src", "href", "xlink:href", "srcset", "poster", "data", "action"):
            if key in attrs:
                assert attrs[key].startswith(("data:", "#")), (tag, attrs[key])
        if attrs.get("href", "").startswith("#"):
            assert attrs["href"][1:] in ids
        assert tag not in {"link", "iframe", "object", "embed", "base"}
        for reference in ("aria-labelledby", "aria-describedby", "for"):
            if reference in attrs:
                assert attrs[reference] in ids
    for forbidden in ("@import", "url(", "http://", "https://", "fetch("):
        assert forbidden not in page.text.replace("http-equiv", "")
    policy = next(a for a in page.attributes("meta") if "http-equiv" in a)
    assert policy["content"].startswith("default-src 'none'")
    viewport = next(a for a in page.attributes("meta") if a.get("name") == "viewport")
    assert "width=device-width" in viewport["content"]


def test_everything_given_is_on_the_page():
    """Catches a loop that drops rows, and numbers printed as fractions or with noise digits."""
    data = make_data(images=3, classes=50)
    page = _Page(report.render_report(data))
    assert len([a for a in page.attributes("tr") if "data-class" in a]) == 50
    assert len([a for a in page.attributes("figure") if a.get("class") == "card"]) == 3
    assert len(page.attributes("rect")) == 3 * 14
    for text in ("37.2", "50.0", "56.2", "2.0 s", "2 min 20 s", "1 h 2 min", "14.0 \u00d7 images"):
        assert text in page.words, text
    for row in (*data.comparison, *data.per_class):
        assert row.name in page.words
    for line in (*data.intro, "q2", "truncated (3)", "versions.ray", "epochs: 3"):
        assert line in page.words
    assert not re.search(r"\b(nan|None|inf)\b", page.words)


def test_hostile_names_stay_text():
    """Catches a `|safe`, or JSON that a class or file name can break out of."""
    names = {i: f"{HOSTILE}{i}" for i in range(20)}
    item = make_item(1, names)
    region = replace(item.regions[0], caption=f"</script>{HOSTILE}", kind=HOSTILE)
    item = replace(item, image_id=HOSTILE, regions=(region, *item.regions[1:]))
    data = replace(
        make_data(name=HOSTILE + "{}"),
        title=HOSTILE,
        intro=[HOSTILE],
        settings=HOSTILE,
        provenance={HOSTILE: HOSTILE},
        comparison=[report.ComparisonRow(HOSTILE, 0.1, HOSTILE)],
        funnel=[report.FunnelStep(HOSTILE, 3, note=HOSTILE)],
        stages=[report.StageRow(HOSTILE)],
        history={HOSTILE: [1.0, 2.0]},
        quarantine=[report.QuarantineRow(HOSTILE, HOSTILE, HOSTILE, HOSTILE)],
        gallery=[item],
    )
    text = report.render_report(data)
    page = _Page(text)
    assert len(page.attributes("script")) == 2
    assert "<script>alert" not in text
    assert HOSTILE in page.words
    start = text.index('id="gallery-data">') + len('id="gallery-data">')
    payload = json.loads(text[start : text.index("</script>", start)])
    assert payload["images"][0][0][1] == f"</script>{HOSTILE}"
    assert any(name.startswith(HOSTILE) for name in payload["names"])


@pytest.mark.parametrize(
    ("field", "anchor"),
    [
        ("comparison", "results"),
        ("funnel", "funnel"),
        ("gallery", "gallery"),
        ("per_class", "classes"),
        ("history", "training"),
        ("quarantine", "quarantine"),
    ],
)
def test_empty_sections_are_left_out(field, anchor):
    """Catches headings over nothing, and menu entries that lead nowhere."""
    full = make_data(images=1, classes=3)
    assert f'id="{anchor}"' in report.render_report(full)
    without = report.render_report(replace(full, **{field: {} if field == "history" else []}))
    _Page(without)
    assert f'id="{anchor}"' not in without
    assert f'href="#{anchor}"' not in without


def test_bare_report_renders():
    """Catches a template that needs a section to be there."""
    page = _Page(report.render_report(report.ReportData(title="nothing yet")))
    assert "nothing yet" in page.words
    assert page.attributes("section") == []


def test_columns_without_numbers_are_left_out():
    """Catches a Few@n column full of dashes where nobody measured it."""
    rows = [report.ComparisonRow("HTS", 0.5), report.ComparisonRow("supervised", 0.6)]
    classes = [report.ClassRow(0, "a", ap={"HTS": 0.2})]
    data = report.ReportData("x", comparison=rows, per_class=classes)
    words = _Page(report.render_report(data)).words
    assert "Few@" not in words
    assert "Known object" not in words
    assert "Precision" not in words


def test_gap_is_measured_between_the_right_rows():
    """Catches a sentence about an ablation row, or a division by a gap that is not there."""
    rows = make_data().comparison
    assert report.gap_closed(0.2, 0.4, 0.6) == pytest.approx(0.5)
    assert report.gap_closed(0.6, 0.4, 0.6) is None
    assert report.gap_closed(None, 0.4, 0.6) is None
    assert report.gap_closed(0.2, math.nan, 0.6) is None
    sentence = report.gap_sentence(rows)
    assert sentence.startswith("HTS reaches 50.0 % mAP, 12.8 points above zero-shot CLIP: 67 %")
    worse = [rows[0], replace(rows[2], mean_ap=0.3), rows[3]]
    assert "7.2 points below" in report.gap_sentence(worse)
    assert "none of the gap" in report.gap_sentence(worse)
    assert report.gap_sentence(rows[1:]) == ""
    no_top = report.gap_sentence([rows[0], rows[2]])
    assert no_top == "HTS reaches 50.0 % mAP, 12.8 points above zero-shot CLIP."


@pytest.mark.parametrize("shape", [(240, 320, 3), (10, 3000, 3), (50, 40), (1, 1, 3)])
def test_thumbnail_is_a_small_jpeg(shape):
    """Catches a data URI that is not the promised JPEG, or an image that is scaled up."""
    noise = np.random.default_rng(0).integers(0, 255, shape, dtype=np.uint8)
    uri = report.thumbnail_data_uri(noise, max_side=200, max_bytes=5_000)
    head, _, body = uri.partition(",")
    assert head == "data:image/jpeg;base64"
    data = base64.b64decode(body, validate=True)
    assert len(data) <= 5_000
    with Image.open(io.BytesIO(data)) as image:
        assert image.format == "JPEG"
        assert max(image.size) <= min(200, max(shape[:2]))


def test_thumbnail_refuses_other_arrays():
    """Catches float pixels in [0, 1] that would be shown as black."""
    with pytest.raises(ValueError, match="uint8"):
        report.thumbnail_data_uri(np.zeros((4, 4, 3), np.float32))


def test_two_hundred_images_stay_under_three_megabytes():
    """Catches a gallery that makes the page too heavy to open, and images that do not decode."""
    gallery = [make_item(seed) for seed in range(25)] * 8
    names = {row.class_id: row.name for row in hico_classes()}
    rows = [report.ClassRow(i, name, 3, 4, 0.5, 0.5, {"HTS": 0.5}) for i, name in names.items()]
    text = report.render_report(replace(make_data(images=0), gallery=gallery, per_class=rows))
    assert len(text.encode()) < 3_000_000
    for attrs in _Page(text).attributes("img"):
        data = base64.b64decode(attrs["src"].partition(",")[2], validate=True)
        Image.open(io.BytesIO(data)).verify()


def test_verdicts_follow_the_annotations():
    """Catches swapped right and wrong, and verdicts where nothing is annotated."""
    verdicts = dict(report.judge([1, 2, 3], [4, 5], [1, 4, 6], [3, 9]))
    assert verdicts == {
        1: "right",
        2: "wrong",
        3: "unjudged",
        6: "missed",
        4: "ignored",
        5: "ignored",
    }
    assert dict(report.judge([1, 2], [4])) == {1: "unjudged", 2: "unjudged", 4: "ignored"}
    assert dict(report.judge([1], annotation_ids=[])) == {1: "wrong"}


def test_gallery_item_points_at_the_best_region():
    """Catches class ids used as columns, which differ as soon as a run keeps a part of HICO."""
    p_RC = np.array([[0.1, 0.2, 0.7], [0.6, 0.3, 0.1]])
    item = report.gallery_item(
        image_id="a",
        image="data:image/jpeg;base64,",
        width=10,
        height=20,
        names={500: "x", 7: "y", 30: "z"},
        class_ids=[500, 7, 30],
        boxes=[[0, 0, 10, 20], [1, 2, 5, 6]],
        probabilities=p_RC,
        positive_ids=[500],
        ignored_ids=[30],
        annotation_ids=[7],
        kinds=["whole", "grid"],
    )
    found = {label.class_id: (label.verdict, label.region) for label in item.labels}
    assert found == {500: ("wrong", 1), 7: ("missed", 1), 30: ("ignored", 0)}
    assert item.labels[0].probability == pytest.approx(0.6)
    assert item.regions[0].best[0] == ("z", pytest.approx(0.7))
    assert item.regions[1].kind == "grid"


def test_marks_do_not_rely_on_colour():
    """Catches labels that differ in nothing but their colour."""
    page = _Page(report.render_report(make_data(images=1)))
    for verdict in ("right", "wrong", "ignored", "missed"):
        mark = report.VERDICTS[verdict][0]
        assert f"{verdict}: " in page.words
        assert mark in page.words
    assert len({mark for mark, _ in report.VERDICTS.values()}) == len(report.VERDICTS)
    cards = [a for a in page.attributes("figure") if a.get("class") == "card"]
    assert all(a["tabindex"] == "0" and a["aria-label"] for a in cards)


def test_many_ignored_classes_are_counted_not_listed():
    """Catches 500 grey labels under one image, or an annotated one lost among them."""
    names = {i: f"c{i}" for i in range(100)}
    item = report.gallery_item(
        image_id="a",
        image="data:,",
        width=9,
        height=9,
        names=names,
        class_ids=list(names),
        boxes=[[0, 0, 9, 9]],
        probabilities=np.linspace(0, 1, 100)[None],
        positive_ids=[],
        ignored_ids=list(names),
        annotation_ids=[0],
    )
    assert len(item.labels) == report.MAX_IGNORED_LABELS
    assert item.more_ignored == 100 - report.MAX_IGNORED_LABELS
    assert item.labels[0].class_id == 0


def test_chosen_images_cover_classes_and_verdicts():
    """Catches a gallery of the first images, all of one class and all right."""
    judged = {f"same{i}": [(0, "right")] for i in range(500)}
    judged |= {f"other{i}": [(i, "right")] for i in range(1, 6)}
    judged |= {"bad": [(0, "wrong")], "left": [(3, "ignored")], "gone": [(0, "missed")]}
    judged |= {"empty": []}
    chosen = report.choose_images(judged, 10)
    assert len(chosen) == len(set(chosen)) == 10
    assert {"bad", "left", "gone", *(f"other{i}" for i in range(1, 6))} <= set(chosen)
    assert "empty" not in chosen
    assert chosen == report.choose_images(judged, 10)


def test_constant_and_single_point_losses_draw():
    """Catches a division by zero in the chart's scale."""
    for losses in ([1.0], [2.0, 2.0], [0.0, 0.0], [math.nan, 5.0], [1e-9, 1e9]):
        page = _Page(report.render_report(report.ReportData("x", history={"HTS": losses})))
        assert page.attributes("polyline")
    assert "polyline points" not in report.render_report(
        report.ReportData("x", history={"HTS": [math.nan]})
    )


@pytest.fixture
def run_dir(tmp_path):
    """Write a small finished run with one quarantined image and two evaluations."""
    run = str(tmp_path / "run 1")
    classes = hico_classes().subset([5, 9, 400])
    ids = [int(i) for i in classes.ids]
    tmp_path.joinpath("run 1").mkdir()
    classes.to_csv(f"{run}/classes.csv")
    config = parse_config({"run_dir": run, "filter": {"prior_alpha": 0.0}})
    storage.write_bytes(f"{run}/config.yaml", config.to_yaml().encode())
    storage.write_json(f"{run}/provenance.json", {"versions": {"ray": "2.60"}})
    manifest, scores, labels = [], [], []
    for i in range(6):
        path = tmp_path / f"im <{i}>.png"
        Image.fromarray(photo(i, 60, 80)).save(path)
        common = {"image_id": f"im{i}", "uri": str(path), "split": "train"}
        truth = {"positive_ids": [5], "negative_ids": [9], "ambiguous_ids": []} if i < 4 else {}
        manifest.append({**common, "width": 80, "height": 60, **truth})
        ok = {"status": "ok", "boxes": [[0, 0, 80, 60], [0, 0, 40, 30]]}
        ok |= {"region_kinds": ["whole", "grid"], "captions": [["a man"], []]}
        ok |= {"scores": [0.0, -9.0, -9.0, -9.0, 0.0, -9.0]}
        bad = {"status": "quarantined", "error_kind": "truncated", "error": "cut"}
        scores.append({**common, "width": 80, "height": 60, **(ok if i != 5 else bad)})
        kept = {"positive_ids": [5, 9] if i < 2 else [9], "ignored_ids": [400]}
        kept |= {"probability": [0.9] * (2 if i < 2 else 1), "support": [1] * (2 if i < 2 else 1)}
        labels.append({**common, **kept, "dropped": [("ignored_band", 1)]})
    quarantine = [{"image_id": "im5", "stage": "label", "error_kind": "truncated", "error": "cut"}]
    for name, rows, schema in (
        ("manifest", manifest, tables.MANIFEST_SCHEMA),
        ("region_scores", scores, tables.REGION_SCORES_SCHEMA),
        ("pseudo_labels", labels[:5], tables.PSEUDO_LABELS_SCHEMA),
    ):
        stage = tables.StageFolder(run, name, "abc")
        tables.write_table(stage.file("part-0.parquet"), pa.Table.from_pylist(rows, schema))
        if name == "region_scores":
            table = pa.Table.from_pylist(quarantine, tables.QUARANTINE_SCHEMA)
            tables.write_table(stage.file("quarantine", "part-0.parquet"), table)
            sidecar = {"class_ids": ids, "prior_log_likelihoods": None}
            storage.write_json(stage.file("table.json"), sidecar)
        stage.publish({"rows_in": 6, "rows_out": len(rows), "quarantined": 0, "seconds": 1.5})
    for key, name, value in (("a", "zero-shot", 0.2), ("b", "HTS", 0.5)):
        metrics = {"mAP": value, "mAP_known_object": None, "few@1": 0.1, "name": name}
        metrics |= {"ap": [value, None, 0.1], "class_ids": ids}
        metrics["predictions"] = f"/where/it/was/predictions-{key}"
        storage.write_json(
            f"{run}/predictions-{key}/table.json", {"student": f"/old/student-{key}"}
        )
        storage.write_json(f"{run}/evaluation-{key}/metrics.json", metrics)
        student = tables.StageFolder(run, "student", key)
        history = [{"epoch": 1, "loss": 2.0}, {"epoch": 2, "loss": 1.0}] if key == "b" else []
        storage.write_json(student.file("history.json"), history)
        student.publish({"seconds": 3})
    return run


def test_report_for_run_reads_every_stage(run_dir):
    """Catches wrong joins between tables, and class ids taken for positions."""
    data = report.report_for_run(run_dir)
    assert [row.name for row in data.comparison] == ["zero-shot", "HTS"]
    rows = {row.class_id: row for row in data.per_class}
    assert list(rows) == [5, 9, 400]
    assert (rows[5].annotated, rows[5].pseudo, rows[5].precision, rows[5].recall) == (4, 2, 1, 0.5)
    assert (rows[9].annotated, rows[9].pseudo, rows[9].precision) == (0, 5, 0.0)
    assert rows[9].ap == {"zero-shot": None, "HTS": None}
    assert rows[400].ap["HTS"] == pytest.approx(0.1)
    counts = {step.name: step.count for step in data.funnel}
    assert data.history == {"HTS": [2.0, 1.0]}
    assert counts["images"] == 6
    assert counts["regions"] == 10
    assert counts["candidate classes"] == 7 + 5
    assert counts["positives kept"] == 7
    assert [row.image_id for row in data.quarantine] == ["im5"]
    assert {item.image_id for item in data.gallery} == {f"im{i}" for i in range(5)}
    shown = next(item for item in data.gallery if item.image_id == "im3")
    verdicts = {label.class_id: label.verdict for label in shown.labels}
    assert verdicts == {9: "wrong", 5: "missed", 400: "ignored"}
    assert shown.regions[1].best[0][1] == pytest.approx(1.0, abs=1e-3)
    assert shown.regions[0].caption == "a man"
    path = f"{run_dir}/report.html"
    report.write_report(path, data)
    _Page(storage.read_bytes(path).decode())


def test_report_for_unfinished_runs(run_dir, tmp_path):
    """Catches a report that needs every stage, or dies because an image was moved away."""
    empty = report.report_for_run(str(tmp_path / "no run"))
    assert empty.gallery == []
    _Page(report.render_report(empty))
    for path in tmp_path.glob("im*.png"):
        path.unlink()
    for table in ("manifest-abc", "evaluation-a", "evaluation-b"):
        storage.remove_tree(f"{run_dir}/{table}")
    data = report.report_for_run(run_dir)
    assert data.gallery == []
    assert data.per_class[0].precision is None
    assert data.per_class[0].annotated is None
    _Page(report.render_report(data))


def test_gallery_of_a_run_is_bounded(run_dir):
    """Catches a page that embeds every image of the run."""
    assert len(report.report_for_run(run_dir, max_images=2).gallery) == 2
    assert report.report_for_run(run_dir, max_images=0).gallery == []
