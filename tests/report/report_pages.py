"""Data for reports, and a parser that says what is on their pages."""

from __future__ import annotations

import math
from html.parser import HTMLParser

import numpy as np
from PIL import Image

from hts_ray import report
from hts_ray.images.thumbnail import thumbnail_data_uri
from hts_ray.report import content
from hts_ray.report.gallery import gallery_item

HOSTILE = '<script>alert("x")</script>&\'"'
VOID = {"meta", "link", "br", "img", "input", "hr"}


class Page(HTMLParser):
    """Collects what the tests ask about and fails on tags that are not closed in order."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.text, self.tags, self.stack, self.data = text, [], [], {}
        self.feed(text)
        self.close()
        assert self.stack == [], f"never closed: {self.stack}"

    def handle_starttag(self, tag, attrs):
        """Remember a tag and, unless it is void, wait for its end."""
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag, attrs):
        """Remember a tag that ends itself."""
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        """Fail unless the tag is the one that waits for its end."""
        assert self.stack, f"</{tag}> closes nothing"
        assert self.stack[-1] == tag, f"</{tag}> closes <{self.stack[-1]}>"
        self.stack.pop()

    def handle_data(self, data):
        """Collect text by the tag that it stands in."""
        key = self.stack[-1] if self.stack else ""
        self.data[key] = self.data.get(key, "") + data

    def attributes(self, tag):
        """Return the attributes of every such tag."""
        return [attrs for name, attrs in self.tags if name == tag]

    @property
    def words(self):
        """Return what the page says, outside of scripts and styles."""
        texts = (text for tag, text in self.data.items() if tag not in ("style", "script"))
        return " ".join(" ".join(texts).split())


def photo(seed=0, height=240, width=320):
    """Return something as hard to compress as a photograph: smooth shapes with grain."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 255, (height // 16, width // 16, 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))
    grain = rng.normal(0, 8, (height, width, 3))
    return np.clip(smooth + grain, 0, 255).astype(np.uint8)


def make_item(seed=0, names=None, regions=14, annotated=True, image=None):
    """Return an image of the gallery with one label of each verdict."""
    rng = np.random.default_rng(seed)
    names = names or {i: f"ride thing {i}" for i in range(20)}
    ids = list(names)
    boxes = [(0, 0, 320, 240)]
    for _ in range(regions - 1):
        x, y = rng.uniform(0, 160), rng.uniform(0, 120)
        boxes.append((x, y, x + 160, y + 120))
    scored = {
        "image_id": f"image_{seed:05d}.jpg",
        "width": 320,
        "height": 240,
        "boxes": boxes,
        "region_kinds": ["whole"] + ["grid"] * (regions - 1),
        "captions": [["a person on a thing"]] * regions if seed % 2 else None,
    }
    labeled = {"positive_ids": ids[:2], "probability": [0.91, 0.62], "ignored_ids": ids[2:4]}
    return gallery_item(
        image or thumbnail_data_uri(photo(seed)),
        scored,
        rng.dirichlet(np.full(len(ids), 0.2), regions),
        ids,
        names,
        labeled,
        {"positive_ids": [ids[0], ids[4]], "ambiguous_ids": None} if annotated else None,
    )


def make_data(images=4, classes=30, name="class {}"):
    """Return a report with every section."""
    rng = np.random.default_rng(0)
    methods = ("zero-shot CLIP", "HTS with regions", "supervised")
    rows = [
        content.ClassRow(
            class_id=i,
            name=name.format(i),
            annotated=int(rng.integers(0, 300)),
            pseudo=int(rng.integers(0, 300)),
            precision=float(rng.uniform()) if i % 7 else None,
            recall=float(rng.uniform()),
            ap={
                methods[0]: float(rng.uniform()),
                methods[1]: 0.5,
                methods[2]: [1.0, math.nan][i == 3],
            },
            support=1.5,
            few_shot={0: 1, 1: 10}.get(i),
        )
        for i in range(classes)
    ]
    return report.ReportData(
        title="HTS report",
        intro=["The images are synthetic.", "One seed was run."],
        settings="train:\n  epochs: 3\n",
        provenance={"versions": {"ray": "2.60", "torch": "2.8"}, "git_commit": None},
        facts={"Teacher": {"model": "some/captioner", "data hash": "0f1e"}},
        comparison=[
            report.ComparisonRow("zero-shot CLIP", 0.372, "class prompts only", 0.4, seconds=2),
            report.ComparisonRow("HTS whole image only", 0.45, "", 0.5, 0.1, 0.2, 0.3, 40),
            report.ComparisonRow("HTS", 0.5, "main", 0.6, 0.1, 0.2, 0.3, 140, role="hts"),
            report.ComparisonRow("supervised", 0.562, "", 0.66, None, None, 0.5, 3700),
        ],
        funnel=[
            content.FunnelStep("images", 1000),
            content.FunnelStep("regions", 14_000, of="images"),
            content.FunnelStep("candidate classes", 9_000, of="images"),
            content.FunnelStep("positives kept", 2_100, of="candidate classes"),
            content.FunnelStep("ignored", 6_900, of="candidate classes", note="not in the loss"),
        ],
        stages=[
            content.StageRow("region scores", 1000, 990, 10, 81.2, 12.3, gpu_hours=0.09),
            content.StageRow("sweep", seconds=20, gpu_hours=None, note="the latest of 2"),
        ],
        per_class=rows,
        precision_recall={
            method: {i: np.linspace(1, place / 10, 11).tolist() for i in range(classes) if i != 3}
            for place, method in enumerate(methods)
        },
        reliability=[
            content.ReliabilityBin(0.3, 0.4, 40, 10, 0.35),
            content.ReliabilityBin(0.9, 1.0, 10, 10, 0.97),
        ],
        confusions=[
            content.Confusion(
                "bicycle",
                ["ride", "push"],
                ["ride bicycle", "push bicycle"],
                [[30, 4, 2, 1], [0, 9, 0, 0], [3, 0, 0, 0]],
            )
        ],
        training=[
            content.TrainingCurve("HTS", [3.0, 2.0, math.nan, 1.2], [0.1, math.nan, 0.2, 0.31]),
            content.TrainingCurve("supervised", [2.5, 1.5, 1.0, 0.8]),
        ],
        quarantine=[
            {"image_id": f"q{i}", "stage": "label", "error_kind": "truncated", "error": "cut"}
            for i in range(3)
        ],
        gallery=[make_item(seed) for seed in range(images)],
    )
