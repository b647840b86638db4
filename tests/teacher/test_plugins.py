"""Teachers of installed packages: found, refused in a line, and the same on every node."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import ray

from hts_ray.config import TeacherConfig
from hts_ray.errors import ConfigError
from hts_ray.teacher import contract, plugins
from hts_ray.teacher.models.catalog import check_teacher, model_fingerprint
from hts_ray.teacher.models.loading import load_captioner
from hts_ray.teacher.stage import _require_everywhere

GOOD = """
class ColourTeacher:
    modes = ("prompts",)
    needs = "eyes"

    def __init__(self, config, device):
        self.asked = config.model, device

    def score(self, images, prompts):
        raise NotImplementedError

    def caption(self, images, settings):
        return []
"""


def package(
    folder: Path, source: str = GOOD, *, version: str = "0.1", name: str = "colours"
) -> str:
    """Install a package as pip would, in a folder: a module and what its metadata says."""
    module = f"hts_{name}"
    (folder / f"{module}.py").write_text(source)
    about = folder / f"{module}-{version}.dist-info"
    about.mkdir(parents=True, exist_ok=True)
    (about / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: hts-{name}\nVersion: {version}\n"
    )
    entry = f"[{plugins.GROUP}]\ncolours = {module}:ColourTeacher\n"
    (about / "entry_points.txt").write_text(entry)
    return module


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder that packages are found in."""
    monkeypatch.syspath_prepend(tmp_path)
    for module in ("hts_colours", "hts_others"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    plugins._installed.cache_clear()
    yield tmp_path
    plugins._installed.cache_clear()


def test_the_name_of_a_package_s_teacher_is_enough(place: Path) -> None:
    """Catches an entry point that is not looked at, or whose argument is lost."""
    package(place)
    config = TeacherConfig(model="colours:bright")
    check_teacher(config)
    assert load_captioner(config, "cuda").asked == ("colours:bright", "cuda")  # type: ignore[attr-defined]


def test_version_source_and_own_words_are_part_of_the_fingerprint(place: Path) -> None:
    """Catches old scores that are used again for another version of a package."""
    package(place)
    config = TeacherConfig(model="colours")
    first = model_fingerprint(config)
    assert first.startswith("colours@hts-colours 0.1@")
    (place / "hts_colours-0.1.dist-info").rename(place / "old")
    package(place, version="0.2")
    plugins._installed.cache_clear()
    second = model_fingerprint(config)
    assert second.startswith("colours@hts-colours 0.2@")
    own = "\n    @classmethod\n    def fingerprint(cls, config):\n        return {}\n"
    found = set()
    for weights in ("1", "2"):
        package(place, GOOD + own.format(weights), version="0.2")
        sys.modules.pop("hts_colours")
        found.add(model_fingerprint(config))
    assert len(found | {first, second}) == 4


@pytest.mark.parametrize(
    ("source", "told"),
    [
        (
            "import no_such_module",
            "hts-colours 0.1 does not import: ModuleNotFoundError: No module",
        ),
        ("x = 1 / 0", "hts-colours 0.1 does not import: ZeroDivisionError"),
        ("", "hts-colours 0.1 does not import: AttributeError"),
        ("ColourTeacher = 3", "ColourTeacher of hts-colours 0.1 is no class"),
        (GOOD.replace("def caption", "def describe"), "hts-colours 0.1 has no method caption"),
        (GOOD.replace("config, device):", "config):"), "cannot be made with \\(config, device\\)"),
        (
            GOOD.replace("images, prompts):", "images):"),
            "score that does not take .*images, prompts",
        ),
        (
            GOOD.replace('"prompts",', '"captions",'),
            "serves label.teacher.mode=captions, not prompts",
        ),
    ],
)
def test_a_broken_package_is_one_line_that_names_it(place: Path, source: str, told: str) -> None:
    """Catches a traceback of somebody else's code, or a mistake that the workers find."""
    package(place, source)
    for refuse in (check_teacher, load_captioner, model_fingerprint):
        with pytest.raises(ConfigError, match=told) as caught:
            refuse(TeacherConfig(model="colours"))
        assert caught.value.field == "label.teacher.model"
        assert "\n" not in str(caught.value)


def test_two_packages_of_one_name_are_refused(place: Path) -> None:
    """Catches a teacher that depends on the order in which packages are found."""
    package(place)
    package(place, name="others")
    with pytest.raises(
        ConfigError, match=r"teacher of hts-.* 0.1 and of hts-.* 0.1: uninstall one"
    ):
        check_teacher(TeacherConfig(model="colours"))


def test_a_node_without_the_package_is_found_before_the_pass(
    place: Path, ray_session: None
) -> None:
    """Catches a pass that ends when its first actor is made, after minutes of waiting for it."""
    package(place)
    config = TeacherConfig(model="colours")
    node = ray.nodes()[0]["NodeManagerHostname"]
    with pytest.raises(ConfigError, match=f"node {node} says: .*no package .* offers it.*0.1@"):
        _require_everywhere(config, model_fingerprint(config))


def test_teachers_are_listed_with_what_they_need(place: Path) -> None:
    """Catches a list that a broken package ends, or that is wider than a terminal."""
    package(place)
    package(place, "import no_such_module", name="others")
    entry = place / "hts_others-0.1.dist-info" / "entry_points.txt"
    entry.write_text(entry.read_text().replace("colours =", "others ="))
    code = "import sys; sys.path.insert(0, sys.argv[1]); from hts_ray.cli import main"
    code += "; main(['teachers'])"
    done = subprocess.run(
        [sys.executable, "-c", code, str(place)], capture_output=True, text=True, check=True
    )
    lines = done.stdout.splitlines()
    assert any(line.split() == ["colours", "prompts", "eyes"] for line in lines)
    assert any("others" in line and "broken" in line for line in lines)
    assert any(line.startswith("label.teacher.model = 'others': the package") for line in lines)
    assert any("Qwen3-VL" in line and "questions" in line for line in lines)


def test_the_contract_is_less_than_a_screen() -> None:
    """Catches a contract that nobody reads."""
    assert len(Path(contract.__file__).read_text().splitlines()) <= 66
