"""The page: structure, safety, readability and size."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from markupsafe import Markup
from PIL import Image
from report_pages import HOSTILE, Page, make_data, make_item

from hts_ray import report
from hts_ray.classes import hico_classes
from hts_ray.report import content

QUARANTINE = ("image_id", "stage", "error_kind", "error")


@pytest.fixture(scope="module")
def full():
    data = make_data()
    return data, Page(report.render_report(data))


def data_of(page, name):
    start = page.text.index(f'id="{name}">') + len(f'id="{name}">')
    return json.loads(page.text[start : page.text.index("</script>", start)])


def test_page_is_well_formed_and_self_contained(full):
    """Catches a template that leaves a tag open, repeats an id, or loads anything from outside."""
    _, page = full
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    for tag, attrs in page.tags:
        for key in ("src", "href", "xlink:href", "srcset", "poster", "data", "action"):
            if key in attrs:
                assert attrs[key].startswith(("data:", "#")), (tag, attrs[key])
        if attrs.get("href", "").startswith("#"):
            assert attrs["href"][1:] in ids
        assert tag not in {"link", "iframe", "object", "embed", "base"}
        assert not [name for name in attrs if name.startswith("on")]
        for reference in ("aria-labelledby", "aria-describedby", "for"):
            if reference in attrs:
                assert attrs[reference] in ids
    text = page.text.replace("http://www.w3.org/2000/svg", "")
    for forbidden in ("@import", "http://", "https://", "fetch("):
        assert forbidden not in text
    assert not re.search(r"url\((?!#)", text)
    viewport = next(a for a in page.attributes("meta") if a.get("name") == "viewport")
    assert "width=device-width" in viewport["content"]


def test_only_the_pages_own_script_may_run(full):
    """Catches a policy that lets an injected script run, or keeps the page's own from it."""
    _, page = full
    policy = next(a for a in page.attributes("meta") if "http-equiv" in a)["content"]
    assert policy.startswith("default-src 'none'")
    script = page.text[page.text.rindex("<script>") + 8 : page.text.rindex("</script>")]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}';" in policy
    assert len([a for a in page.attributes("script") if "type" not in a]) == 1


def test_everything_given_is_on_the_page(full):
    """Catches a loop that drops rows, and numbers printed as fractions or with noise digits."""
    data, page = full
    assert len([a for a in page.attributes("figure") if a.get("class") == "card"]) == 4
    for text in (
        "37.2",
        "50.0",
        "56.2",
        "2.0 s",
        "2 min 20 s",
        "61 min 40 s",
        "14.0 \u00d7 images",
    ):
        assert text in page.words, text
    for row in (*data.comparison, *data.per_class):
        assert row.name in page.words
    for line in (*data.intro, "q2", "truncated (3)", "versions.ray", "epochs: 3"):
        assert line in page.words
    for text in ("some/captioner", "12.3 images/s", "0.0900", "the latest of 2", "\u2264 10"):
        assert text in page.words, text
    assert "mAP on the validation split" in page.words
    assert not re.search(r"\b(nan|None|inf)\b", page.words)


def test_mistakes_are_named_annotated_first(full):
    """Catches a confusion whose two classes are swapped."""
    _, page = full
    row = re.search(r"<tr><th scope=\"row\">ride bicycle</th>(.*?)</tr>", page.text)[1]
    assert "push bicycle" in row
    assert "<td>4</td>" in row
    assert "7 mistakes" in page.words


def test_curves_of_classes_match_the_drawn_methods(full):
    """Catches classes drawn in another method's colour: the script goes by position."""
    data, page = full
    curves = data_of(page, "curve-data")
    assert set(curves) == {str(i) for i in range(30) if i != 3}
    assert [curve[-1] for curve in curves["0"]] == [0, 100, 200]
    marks = [attrs["data-mark"] for _, attrs in page.tags if "data-mark" in attrs]
    assert marks[:3] == ["0", "1", "2"]
    options = [a["value"] for a in page.attributes("option")]
    assert options.count("3") == 1  # class 3 has images but no curve
    assert list(data.precision_recall) == [
        name for name in data.per_class[0].ap if name in page.words
    ]


def test_a_class_without_a_curve_in_one_method():
    """Catches curves that shift to another method where one has no AP."""
    data = replace(make_data(images=0), precision_recall={"a": {1: [1.0] * 11}, "b": {2: [0] * 11}})
    curves = data_of(Page(report.render_report(data)), "curve-data")
    assert curves == {"1": [[1000] * 11, None], "2": [None, [0] * 11]}


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
        facts={HOSTILE: {HOSTILE: HOSTILE}},
        comparison=[report.ComparisonRow(HOSTILE, 0.1, HOSTILE)],
        funnel=[content.FunnelStep(HOSTILE, 3, note=HOSTILE)],
        stages=[content.StageRow(HOSTILE, rate=1, unit=HOSTILE, note=HOSTILE)],
        precision_recall={HOSTILE: {1: [0.5] * 11}},
        confusions=[content.Confusion(HOSTILE, [HOSTILE, "b"], [HOSTILE, "b"], [[1, 1, 0, 0]] * 3)],
        training=[content.TrainingCurve(HOSTILE, [1.0, 2.0], [0.1, 0.2])],
        quarantine=[dict.fromkeys(QUARANTINE, HOSTILE)],
        gallery=[item],
    )
    page = Page(report.render_report(data))
    assert len(page.attributes("script")) == 3
    assert "<script>alert" not in page.text
    assert page.words.count(HOSTILE) > 20
    found = data_of(page, "gallery-data")
    assert found["texts"][found["images"][0][2][0][1]] == f"</script>{HOSTILE}"


@pytest.mark.parametrize(
    ("field", "anchor"),
    [
        ("comparison", "results"),
        ("facts", "facts"),
        ("funnel", "funnel"),
        ("gallery", "gallery"),
        ("per_class", "classes"),
        ("precision_recall", "curves"),
        ("reliability", "reliability"),
        ("confusions", "confusions"),
        ("training", "training"),
        ("stages", "stages"),
        ("quarantine", "quarantine"),
    ],
)
def test_sections_stand_alone_and_empty_ones_are_left_out(full, field, anchor):
    """Catches headings over nothing, and a section that only renders beside another."""
    data, _ = full
    page = Page(report.render_report(report.ReportData("x", **{field: getattr(data, field)})))
    assert [attrs["id"] for attrs in page.attributes("section")] == [anchor]
    assert {"href": f"#{anchor}"} in page.attributes("a")


def test_bare_report_renders():
    """Catches a template that needs a section to be there."""
    page = Page(report.render_report(report.ReportData(title="nothing yet")))
    assert "nothing yet" in page.words
    assert page.attributes("section") == []


def test_sections_of_other_modules_are_put_in():
    """Catches a section without an entry in the table of contents, or escaped HTML."""
    html = Markup('<section id="sweep"><h2>Sweep</h2></section>')
    data = report.ReportData("x", sections=[report.Section("sweep", "The sweep", html)])
    page = Page(report.render_report(data))
    assert [attrs["id"] for attrs in page.attributes("section")] == ["sweep"]
    assert {"href": "#sweep"} in page.attributes("a")


def test_columns_without_numbers_are_left_out():
    """Catches a Few@n column full of dashes where nobody measured it."""
    rows = [report.ComparisonRow("HTS", 0.5), report.ComparisonRow("supervised", 0.6)]
    classes = [content.ClassRow(0, "a", ap={"HTS": 0.2})]
    data = report.ReportData("x", comparison=rows, per_class=classes)
    words = Page(report.render_report(data)).words
    for column in ("Few", "Known object", "Precision", "Support", "Time"):
        assert column not in words


def test_class_links_lead_to_images_that_are_there(full):
    """Catches a link to a class without images, whose gallery would be empty."""
    data, page = full
    shown = {label.class_id for item in data.gallery for label in item.labels}
    links = [attrs["data-show"] for attrs in page.attributes("a") if "data-show" in attrs]
    assert set(links) == {str(row.class_id) for row in data.per_class if row.class_id in shown}
    assert set(links) <= {a["value"] for a in page.attributes("option")}


def test_marks_do_not_rely_on_colour(full):
    """Catches labels that differ in nothing but their colour, to the eye or to a screen reader."""
    _, page = full
    for verdict, (mark, _) in content.VERDICTS.items():
        rule = re.search(rf"\.label\.{verdict}::before {{(.*?)}}", page.text)[1]
        assert mark in rule
        assert f'"{verdict}: "' in rule
    assert len({mark for mark, _ in content.VERDICTS.values()}) == len(content.VERDICTS)
    kinds = {attrs["class"] for attrs in page.attributes("li") if "data-c" in attrs}
    assert kinds == {f"label {verdict}" for verdict in ("right", "wrong", "ignored", "missed")}


def test_gallery_has_one_tab_stop(full):
    """Catches 2,000 stops of the Tab key between the gallery and what follows."""
    _, page = full
    cards = [a for a in page.attributes("figure") if a.get("class") == "card"]
    assert [card["tabindex"] for card in cards] == ["0", "-1", "-1", "-1"]
    assert all(card["aria-label"] for card in cards)
    scrolled = [a for a in page.attributes("div") if "scroll" in a.get("class", "")]
    assert all("aria-label" in a for a in scrolled if "tabindex" in a)


def luminance(color):
    """Relative luminance of `#rrggbb` by WCAG 2.2."""
    parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one, two):
    low, high = sorted([luminance(one), luminance(two)])
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast_is_enough(scheme):
    """Catches a colour that WCAG 2.2 AA calls unreadable, in either scheme."""
    css = (Path(report.__file__).parent / "templates/palette.css").read_text()
    light, dark = re.findall(r":root {(.*?)}", css, flags=re.S)
    named = dict(re.findall(r"--([\w-]+): (#\w{6})", light if scheme == "light" else dark))
    for text, behind in [
        *((ink, page) for ink in ("ink", "soft", "accent", "missed") for page in ("page", "card")),
        *((kind, f"{kind}-soft") for kind in ("right", "wrong", "ignored", "accent")),
        ("page", "accent"),
        ("ink", "accent-soft"),
        ("ink", "right-soft"),
    ]:
        assert contrast(named[text], named[behind]) >= 4.5, (text, behind)
    for line in [f"s{number}" for number in range(6)]:
        assert contrast(named[line], named["page"]) >= 3, line


def test_two_thousand_images_stay_under_thirty_megabytes():
    """Catches a gallery whose markup, beside its images, makes the page too heavy to open."""
    names = {row.class_id: row.name for row in hico_classes()}
    image = "data:image/jpeg;base64," + "A" * (4 * 7_000 // 3)  # what a run's gallery gives each
    some = {i: names[i] for i in range(0, 600, 30)}
    gallery = [make_item(seed, some, regions=17, image=image) for seed in range(25)] * 8
    rows = [content.ClassRow(i, name, 3, 4, 0.5, 0.5, {"HTS": 0.5}) for i, name in names.items()]
    bare = replace(make_data(images=0), per_class=rows)
    without, with_200 = (
        len(report.render_report(replace(bare, gallery=shown)).encode()) for shown in ([], gallery)
    )
    assert without + 10 * (with_200 - without) < 30_000_000


def test_embedded_images_decode(full):
    """Catches a data URI that is cut or escaped on its way into the page."""
    _, page = full
    images = page.attributes("img")
    assert len(images) == 4
    for attrs in images:
        data = base64.b64decode(attrs["src"].partition(",")[2], validate=True)
        Image.open(io.BytesIO(data)).verify()
