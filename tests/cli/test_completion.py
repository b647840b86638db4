"""What shells are told when a user presses Tab."""

from __future__ import annotations

import subprocess
import sys

import pytest
from click.shell_completion import ShellComplete, get_completion_class

from hts_ray.cli import cli
from hts_ray.cli.completion import PROGRAM, SHELLS, VARIABLE
from hts_ray.cli.exchange import LABEL_FORMATS, STUDENT_FORMATS
from hts_ray.config import preset_names


def completed(*words: str) -> list[str]:
    """Return the values that complete the last word; those of a type as <type>."""
    items = ShellComplete(cli, {}, PROGRAM, VARIABLE).get_completions(list(words[:-1]), words[-1])
    return [item.value if item.type == "plain" else f"<{item.type}>" for item in items]


def test_commands_options_and_choices_are_completed():
    """Catches a command that is not registered, and decorators that hide options."""
    assert completed("la") == ["label"]
    assert "--region-scores" in completed("filter", "--reg")
    assert completed("prepare", "h") == ["hico"]
    assert completed("train", "--preset", "") == preset_names()
    assert completed("train", "--preset", "hico-vitb3") == ["hico-vitb32"]
    assert completed("label", "--run-dir", "ru") == ["<dir>"]
    assert completed("label", "--config", "") == ["<file>"]
    assert completed("completion", "") == list(SHELLS)


def test_settings_are_completed_part_by_part():
    """Catches a list of all 200 settings at once, and one that ends before the equals sign."""
    assert {"label.", "train.", "seed="} <= set(completed("label", ""))
    assert completed("label", "label.po") == ["label.pool."]
    assert completed("label", "label.pool.max") == ["label.pool.max_size="]
    assert completed("label", "label.nothing.") == []
    assert completed("train", "train.loss=") == completed("filter", "train.loss=") != []
    assert "train.loss=lse_sign" in completed("train", "train.loss=")
    assert completed("train", "train.augment.flip=t") == ["train.augment.flip=true"]
    assert "filter.region_kinds=" in completed("train", "filter.reg")
    assert completed("train", "train.epochs=") == []


def test_predict_completes_images_and_settings():
    """Catches a command for which one of its two kinds of arguments cannot be completed."""
    assert completed("predict", "") == ["<file>"]
    assert completed("predict", "photos/a") == ["<file>"]
    assert completed("predict", "predict.batch_i") == ["predict.batch_images="]


def test_jobs_complete_their_command_and_its_settings():
    """Catches a submitted command that has to be typed blind."""
    assert completed("submit", "--", "pred") == ["predict"]
    assert completed("submit", "--", "label", "label.pool.max") == ["label.pool.max_size="]


def test_the_formats_that_are_completed_are_those_that_are_written():
    """Catches a list that was not kept up; it stands apart because writing loads torch."""
    from hts_ray.exports.writing import FORMATS as LABELS
    from hts_ray.student.convert import FORMATS as STUDENTS

    assert sorted(STUDENT_FORMATS) == sorted(STUDENTS)
    assert sorted(LABEL_FORMATS) == sorted(LABELS)
    assert completed("export", "--format", "label") == ["label-studio"]


def bash(line_words: list[str], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return what bash is answered for words as it takes a line apart."""
    monkeypatch.setenv("COMP_WORDS", "\n".join(line_words))
    monkeypatch.setenv("COMP_CWORD", str(len(line_words) - 1))
    found = get_completion_class("bash")
    assert found is not None
    return found(cli, {}, PROGRAM, VARIABLE).complete().split("\n")


def test_bash_completes_behind_an_equals_sign(monkeypatch):
    """Catches `train.loss=train.loss=lse_sign`: bash replaces only what follows the sign."""
    answer = bash(["hts", "train", "train.loss", "=", "ls"], monkeypatch)
    assert answer == ["plain,lse_sign"]
    assert "plain,true" in bash(["hts", "train", "train.augment.flip", "="], monkeypatch)
    assert bash(["hts", "train", "seed", "=", "3", "train.ep"], monkeypatch) == [
        "plain,train.epochs="
    ]
    assert bash(["hts", "export", "--format", "=", "label"], monkeypatch) == ["plain,label-studio"]
    assert bash(["hts", "label", "--run-dir", "'a b'", "label.pool.max"], monkeypatch) == [
        "plain,label.pool.max_size="
    ]


@pytest.mark.parametrize("shell", SHELLS)
def test_the_script_asks_hts(shell):
    """Catches a script for a program or variable of another name."""
    from hts_ray.cli.completion import script

    text = script(shell, cli)
    assert f"{VARIABLE}={shell}_complete" in text
    assert PROGRAM in text
    # fish itself puts no space behind . and =, but would cut help at a comma.
    assert ("--max 1" if shell == "fish" else "[.=]") in text


def test_bash_can_run_the_script():
    """Catches a syntax error in a script that no test would run."""
    from hts_ray.cli.completion import script

    lines = f"""
compopt() {{ echo "compopt $1 $2"; }}
complete() {{ echo "registered ${{@: -1}}"; }}
hts() {{ :; }}
env() {{ printf 'plain,%s\\n' label.pool. label.pool.max; }}
{script("bash", cli)}
COMP_WORDS=(hts label label.po) COMP_CWORD=2
_hts_completion hts
echo "${{COMPREPLY[@]}}"
"""
    done = subprocess.run(
        ["bash", "-c", lines], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.split("\n")[:3] == [
        "registered hts", "compopt -o nospace", "label.pool. label.pool.max",
    ]  # fmt: skip
    assert done.stderr == ""


def test_completing_loads_nothing_slow():
    """Catches an import at the top of a module that makes every Tab wait for seconds."""
    lines = """
import os, sys
os.environ.update(_HTS_COMPLETE="zsh_complete", COMP_WORDS="hts train train.op", COMP_CWORD="2")
from hts_ray.cli import main
sys.argv = ["hts"]
try:
    main()
except SystemExit:
    print(sorted({"torch", "ray", "transformers", "open_clip", "matplotlib", "scipy", "pandas",
                  "pyarrow", "numpy"} & set(sys.modules)), file=sys.stderr)
"""
    done = subprocess.run(
        [sys.executable, "-c", lines], capture_output=True, text=True, check=True, timeout=120
    )
    assert "train.optim." in done.stdout
    assert done.stderr.strip() == "[]"
