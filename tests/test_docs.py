"""Tests that the documentation's commands, code, links and figures are right as they stand."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from documented import (
    PAGES,
    ROOT,
    anchors,
    blocks,
    check_hts,
    check_make,
    check_mention,
    check_script,
    commands,
    inline,
    links,
)

from hts_ray.classes import hico_classes, read_class_csv
from hts_ray.config import CaptionConfig, TeacherConfig, load_config, parse_config
from hts_ray.teacher.models.loading import load_captioner

# Programs that are not ours, and why no test of this module runs them.
ELSEWHERE = {
    "source": "the shell's own",
    "export": "the shell's own",
    "ray": "starts a cluster; tests/cluster does so with Ray's own command line",
    "docker": "no container can be built where the tests run",
    "tensorboard": "a server; tests/student/test_train.py reads the curves by its library",
}
MAKE = {
    "install": "made the environment that runs this test",
    "demo": "takes minutes; tests/demo/test_run.py runs it small",
    "test": "runs this test",
    "test-slow": "a command of .ci/run",
    "test-browser": "a command of .ci/run",
    "test-faults": "a command of .ci/run, as far as it names a kind",
    "lint": "a command of .ci/run",
    "format": "changes files",
    "docs": "a command of .ci/run",
}
SCRIPTS = {
    "cluster/check.py": "tests/cluster_files/test_check.py runs it",
    "benchmarks/": "take minutes to hours, and a machine to themselves",
}
CHECKS: dict[str, Callable[..., None]] = {
    "hts": check_hts,
    "make": check_make,
    "python": check_script,
}


@pytest.mark.parametrize("page", PAGES)
def test_every_command_is_known(page: str) -> None:
    """Catches options, settings, presets, targets and scripts that are gone or misspelt."""
    for command in commands(page):
        if command.program not in ELSEWHERE:
            assert command.program in CHECKS, f"{page}: {command} is checked by nothing"
            CHECKS[command.program](command.arguments)
    for words in inline(page):
        if words[0] == "hts":
            check_mention(words)
        elif words[0] == "make":
            check_make(words[1:])
        elif len(words) > 1:
            check_script(words[1:])


def test_wrong_commands_would_be_noticed() -> None:
    """Catches checks that pass whatever they are given."""
    for check, words in (
        (check_hts, ["lable"]),
        (check_hts, ["label", "--limt", "3"]),
        (check_hts, ["label", "label.regoins.whole=true"]),
        (check_hts, ["train", "--preset", "hico"]),
        (check_hts, ["export", "--output", "x", "--format", "cocoa"]),
        (check_hts, ["prepare", "folder"]),
        (check_hts, ["submit", "--", "label", "label.x=1"]),
        (check_hts, ["filter", "runs/mine"]),
        (check_mention, ["hts", "lable"]),
        (check_mention, ["hts", "label", "--preveiw"]),
        (check_make, ["instal"]),
        (check_make, ["install", "BACKEND=cpu"]),
        (check_script, ["benchmarks/none.py"]),
        (check_script, ["benchmarks/scale.py", "[--actor", "4]"]),
    ):
        with pytest.raises(BaseException):  # noqa: B017, PT011 - click, ours, KeyError, assert
            check(words)


def test_what_is_run_elsewhere_is_said_to_be() -> None:
    """Catches targets and scripts that no test knows of."""
    for command in (command for page in PAGES for command in commands(page)):
        if command.program == "make":
            assert command.arguments[0] in MAKE, command
        elif command.program == "python":
            assert command.arguments[0].startswith(tuple(SCRIPTS)), command


def test_class_lists_and_settings_read_back(tmp_path: Path) -> None:
    """Catches examples of files that the readers refuse."""
    import yaml

    for page in PAGES:
        for source in blocks(page, "csv"):
            (tmp_path / "classes.csv").write_text(source)
            assert len(read_class_csv(tmp_path / "classes.csv")) == len(source.split("\n")) - 2
    for source in blocks("docs/sweep.md", "yaml"):
        assert parse_config(yaml.safe_load(source)).sweep.space


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    """Catches files that moved, and headings that were renamed."""
    for target, _ in links(page):
        if re.match(r"\w+:", target):
            continue
        file, _, heading = target.partition("#")
        path = (ROOT / page).parent / file if file else ROOT / page
        assert path.exists(), f"{page}: {target}"
        if heading:
            other = path.resolve().relative_to(ROOT).as_posix()
            assert heading in anchors(other), f"{page}: {target}"


def test_every_page_is_in_the_index() -> None:
    """Catches pages that nobody finds."""
    listed = {target for target, _ in links("docs/README.md")}
    pages = {Path(page).name for page in PAGES if page.startswith("docs/")}
    assert pages - {"README.md"} <= listed
    assert "docs/README.md" in {target for target, _ in links("README.md")}


def test_every_yes_is_shown_by_a_test() -> None:
    """Catches a claim beside other tools whose test is gone."""
    rows = re.findall(r"^\| [^|]+\| (.+?) \|", (ROOT / "docs/comparison.md").read_text(), re.M)
    ours = [cell for cell in rows if cell.startswith(("[yes]", "[part]", "yes", "part", "no"))]
    assert len(ours) >= 20
    assert all(cell.startswith(("[", "no")) for cell in ours), "a claim without a test"
    shown = [link for link in links("docs/comparison.md") if link[0].startswith("../tests/")]
    assert len(shown) >= len(ours) - 2
    for target, name in shown:
        source = (ROOT / "docs" / target).read_text(encoding="utf-8")
        assert f"\ndef {name}(" in source, f"{target} has no {name}"


def test_benchmarks_are_those_of_the_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches figures that were edited by hand, or left behind by a new measurement."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import render

    page = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    assert page == render.render(), "run `make docs` and commit docs/benchmarks.md"


def test_figures_on_photographs_are_those_measured() -> None:
    """Catches a table that was left behind by a new measurement, or edited by hand."""
    measured = json.loads((ROOT / "benchmarks/results/photos.json").read_text(encoding="utf-8"))
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    section = text.partition("### On real photographs")[2].partition("\n## ")[0]
    known = set[tuple[str, ...]]()
    for found in measured["sets"].values():
        for row in found["rows"]:
            mean, spread, gap = row["mAP"]["mean"], row["mAP"]["sd"], row["gap_closed"]
            deviation = "" if spread is None else f" ± {100 * spread:.1f}"
            closed = f"{gap['mean']:.2f} ({gap['low']:.2f} to {gap['high']:.2f})"
            assert f"| {row['name']} | {100 * mean:.1f}{deviation} | {closed} |" in section
        known |= {
            tuple(f"{100 * pair[name]:+.1f}" for name in ("mean", "low", "high"))
            for pair in found["differences"]
        }
        assert all(f"{count:,}" in section for count in found["sizes"].values())
    told = re.findall(r"([+-][\d.]+) \(([+-][\d.]+) to ([+-][\d.]+)\)", section)
    assert told
    assert set(told) <= known


def results(name: str) -> dict[str, Any]:
    """Return what a benchmark wrote."""
    text = (ROOT / f"benchmarks/results/{name}.json").read_text(encoding="utf-8")
    found: dict[str, Any] = json.loads(text)
    return found


def test_claims_about_losses_and_teachers_are_those_measured() -> None:
    """Catches figures of losses and weak teachers that a new measurement left behind."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    section = text.partition("### Losses, and teachers that are not perfect")[2]
    section = section.partition("\n### ")[0]
    teachers, losses = results("teachers"), results("losses")
    for row in teachers["rows"]:
        if row["student"] != "full":
            continue
        cells = [row["teacher"], f"{100 * row['teacher_mAP']:.1f}"]
        for name, share in (("demo", "gap_closed_of_its_loss"), ("paper", "gap_closed")):
            gap = row["rows"][name][share]
            cells.append(f"{100 * row['rows'][name]['mAP']['mean']:.1f}")
            cells.append(f"{gap['mean']:.2f} ({gap['low']:.2f} to {gap['high']:.2f})")
        assert f"| {' | '.join(cells)} |" in section
        for student in ("supervised", "supervised_chosen"):
            assert f"{100 * row[student]['mean']:.1f}" in section
        assert f"{row['rows']['demo']['gap_closed']['mean']:.2f}" in section
    for part in losses["comparison"]:
        whole = ", student as in the demo" if part["student"] == "full" else ""
        cells = [part["teacher"] + whole]
        for row in part["rows"]:
            less = row["mAP_minus_lse_sign"]
            told = (
                f"{100 * less['mean']:+.1f} ({100 * less['low']:+.1f} to {100 * less['high']:+.1f})"
            )
            own = row["name"] == "lse_sign"
            cells.append(f"{100 * row['mAP']['mean']:.1f}" + ("" if own else f", {told}"))
        assert f"| {' | '.join(cells)} |" in section
    for row in losses["scarce"]["comparison"][0]["rows"]:
        less = row["mAP_minus_lse_sign"]
        told = f"{100 * less['mean']:+.1f} ({100 * less['low']:+.1f} to {100 * less['high']:+.1f})"
        assert (told if less["mean"] else f"{100 * row['mAP']['mean']:.1f} mAP") in section
    page = (ROOT / "docs" / "student.md").read_text(encoding="utf-8")
    page = page.partition("### Weak teachers")[2].partition("\n## ")[0]
    assert all(f"{100 * mean_ap:.1f}" in page for mean_ap in teachers["parts"].values())


def test_the_demo_has_the_settings_that_were_chosen() -> None:
    """Catches a preset that another search, or a hand, left behind the figures told of it."""
    config = load_config(preset="demo")
    for name, value in results("teachers")["choice"].items():
        assert functools.reduce(getattr, name.split("."), config) == value, name


def test_claims_about_rescue_are_those_measured() -> None:
    """Catches what a sweep wins back told otherwise than it was measured."""
    rows = results("rescue")["summary"]
    text = (ROOT / "docs/sweep.md").read_text(encoding="utf-8")
    front = (ROOT / "README.md").read_text(encoding="utf-8")
    for row in rows:
        assert f"{100 * row['back']:.0f} %" in text
        told = row["search"] == "sweep" and row["labels"] != 50
        assert not told or f"{100 * row['back']:.0f} %" in front
    assert (
        f"{-100 * min(row['worst_gain'] for row in rows if row['search'] == 'sweep'):.1f} points"
        in text
    )


def test_claims_about_scale_are_those_measured() -> None:
    """Catches bytes an image and requests that a new measurement left behind."""
    limits = (ROOT / "docs/limits.md").read_text(encoding="utf-8")
    section = limits.partition("**What the driver holds.**")[2].partition("\n- **")[0]
    for stage in ("prepare", "label", "train_rows", "predict_rows"):
        rows = [row for row in results("scale_stages")["rows"] if row["stage"] == stage]
        largest = max(rows, key=lambda row: int(row["images"]))
        assert f"{largest['driver_bytes_an_image']:.0f}" in section, stage
        assert f"{largest['images']:,}" in section, stage
    formats = (ROOT / "docs/formats.md").read_text(encoding="utf-8")
    _, prepared, loose, shards = results("shards")["reading"]
    for row in (prepared, loose, shards):
        assert f" {row['requests_per_image']:.3g} " in formats
    assert f"{shards['images_per_s'] / loose['images_per_s']:.1f} times" in formats


def test_every_setting_is_named_with_its_meaning(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a setting that no page names, and a reference left behind by the code."""
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    import settings_page

    page = (ROOT / "docs" / "settings.md").read_text(encoding="utf-8")
    assert page == settings_page.render(), "run `make docs` and commit docs/settings.md"
    assert not re.findall(r"^.*\|  \|$", page, re.M), "a setting without a meaning"


def test_unknown_results_are_no_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches measurements that are left out of the page in silence, or shown half."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import render

    (tmp_path / "news.json").write_text("{}")
    with pytest.raises(ValueError, match=r"news\.json: declare"):
        render.render(tmp_path)
    (tmp_path / "news.json").rename(tmp_path / "world.json")
    with pytest.raises(ValueError, match=r"world\.json has another form"):
        render.render(tmp_path)
    rows = [{"name": "a|b", "few": None, "share": float("nan")}]
    columns = [
        render.Column("name", "name"),
        render.Column("few", "few", render.number()),
        render.Column("share", "share", render.number()),
        render.Column("gone", "gone", optional=True),
    ]
    assert render.grid(columns, rows).rows == [["a|b", "-", "-", "-"]]
    assert "a&#124;b" in "\n".join(render.grid(columns, rows).lines())


def test_the_written_teacher_teaches(plugins: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches documentation of a protocol that the code has left behind."""
    source = next(block for block in blocks("docs/teacher.md", "python") if "class Clip" in block)
    body = source[source.index("class ClipTeacher") :].strip().splitlines()
    assert len(body) <= 30
    (plugins / "clip_teacher.py").write_text(source)
    folder = ROOT / "hts_ray/student/builtin/world_clip"
    monkeypatch.setenv("CLIP_TEACHER", f"local-dir:{folder}")
    teacher = load_captioner(TeacherConfig(model="import:clip_teacher:ClipTeacher"))
    images = np.random.default_rng(0).integers(0, 256, (2, 40, 50, 3), dtype=np.uint8)
    scores = teacher.score(list(images), ("a person riding a horse", "a dog"))
    assert scores.log_likelihoods.shape == (2, 2)
    assert scores.token_counts.tolist() == [5, 2]
    np.testing.assert_allclose(np.exp(scores.log_likelihoods).sum(1), 1, rtol=1e-5)
    captions = teacher.caption(list(images), CaptionConfig())
    assert all(caption[0].text.startswith("a photo of") for caption in captions)


def test_the_example_of_matching_finds_both() -> None:
    """Catches an example in the documentation that no longer shows what it says."""
    source = next(
        block for block in blocks("docs/teacher.md", "python") if "match_captions" in block
    )
    names: dict[str, object] = {}
    setup, call = source.strip().rsplit("\n\n", 1)
    exec(setup, names)
    (found,) = eval(call, names)
    stated = {hico_classes()[position].name for position, p in found.items() if p >= 0.5}
    assert {"ride bicycle", "kick sports ball"} <= stated, stated
