"""The image: what a linter and the versions say, and that what it copies installs."""

import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import check
import pytest

DOCKERFILE = (check.FOLDER / "Dockerfile").read_text()
HADOLINT = Path(sys.executable).parent / "hadolint"


def lint(text):
    """Return the rules of hadolint that a Dockerfile breaks."""
    done = subprocess.run(
        [HADOLINT, "--no-fail", "-"], input=text, capture_output=True, text=True, check=True
    )
    return set(re.findall(r"\b(DL\d+|SC\d+)\b", done.stdout))


def test_the_linter_has_no_complaint():
    """Would catch what makes images large, moving or unsafe."""
    assert lint(DOCKERFILE) == set()


@pytest.mark.parametrize(
    ("old", "new", "rule"),
    [
        ("ray:2.60.0-py311", "ray:latest", "DL3007"),
        ("USER 1000", "USER root", "DL3002"),
        ("--no-cache-dir ", "", "DL3042"),
        ("WORKDIR /home", "WORKDIR home", "DL3000"),
    ],
)
def test_the_linter_looks(old, new, rule):
    """Would catch a linter that reads nothing."""
    assert old in DOCKERFILE
    assert rule in lint(DOCKERFILE.replace(old, new))


def test_versions_agree_everywhere():
    """Would catch a Ray, Python or package that was raised in one place only."""
    found = check.versions()
    assert f"FROM rayproject/ray:{found['ray']}-py311" in DOCKERFILE
    major, minor = found["python"].split(".")
    assert f"== ('{found['ray']}', ({major}, {minor}))" in DOCKERFILE
    tag = re.compile(r"hts-ray:([\w.-]+)")
    for path in check.FOLDER.iterdir():
        for named in tag.findall(path.read_text()) if path.is_file() else []:
            assert named == check.image_tag(), path.name
    readme = " ".join((check.FOLDER / "README.md").read_text().split())
    assert f"the same Python ({found['python']}) and Ray ({found['ray']})" in readme
    project = (check.ROOT / "pyproject.toml").read_text()
    lower = re.search(r'"ray\[[^]]+\]>=([\d.]+),<([\d.]+)"', project)
    assert found["ray"].startswith(f"{lower[1]}.")


def copied():
    """Return the sources that the Dockerfile copies."""
    lines = re.findall(r"^COPY --chown=1000:100 (.+)$", DOCKERFILE, re.M)
    return [source for line in lines for source in line.split()[:-1]]


def test_what_is_copied_exists_and_is_sent_to_the_builder():
    """Would catch a source that was renamed, or that the ignore file keeps from the builder."""
    ignore = (check.FOLDER / "Dockerfile.dockerignore").read_text().splitlines()
    allowed = {line[1:] for line in ignore if line.startswith("!")}
    for source in copied():
        assert (check.ROOT / source).exists(), source
        assert source.split("/")[0] in allowed, source


def test_what_is_copied_installs(tmp_path):
    """Would catch a package that builds here only, because of files that the image lacks."""
    for source in copied():
        target = tmp_path / "context" / source
        target.parent.mkdir(parents=True, exist_ok=True)
        if (check.ROOT / source).is_dir():
            shutil.copytree(check.ROOT / source, target, dirs_exist_ok=True)
        else:
            shutil.copy(check.ROOT / source, target)
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation",
         "--wheel-dir", tmp_path, tmp_path / "context"], check=True, timeout=120,
    )  # fmt: skip
    (wheel,) = tmp_path.glob("hts_ray-*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    package = [path for path in (check.ROOT / "hts_ray").rglob("*") if path.is_file()]
    files = {path.relative_to(check.ROOT).as_posix() for path in package if path.suffix != ".pyc"}
    assert "hts_ray/config/presets/hico-vitb32.yaml" in files
    assert not files - names


def test_the_extras_that_it_installs_exist():
    """Would catch an extra that pip only warns about: `ray up` would fail on the head."""
    project = (check.ROOT / "pyproject.toml").read_text()
    (extras,) = re.findall(r'"\.\[(.+)\]"', DOCKERFILE)
    for extra in extras.split(","):
        assert re.search(rf"^{extra} = \[", project, re.M), extra
