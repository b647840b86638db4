"""What shells are told when a user presses Tab."""

from __future__ import annotations

import os
import pty
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.shell_completion import ShellComplete, get_completion_class

import hts_ray
from hts_ray.cli import cli
from hts_ray.cli.completion import PROGRAM, SHELLS, VARIABLE
from hts_ray.cli.exchange import LABEL_FORMATS, STUDENT_FORMATS
from hts_ray.config import TrainConfig, preset_names, walk_fields


def completed(*words: str) -> list[str]:
    """Return the values that complete the last word; those of a type as <type>."""
    items = ShellComplete(cli, {}, PROGRAM, VARIABLE).get_completions(list(words[:-1]), words[-1])
    return [item.value if item.type == "plain" else f"<{item.type}>" for item in items]


def test_commands_options_and_choices_are_completed():
    """Catches a command that is not registered, and decorators that hide options."""
    assert completed("la") == ["label"]
    assert "--region-scores" in completed("filter", "--reg")
    assert completed("prepare", "hi") == ["hico"]
    assert completed("train", "--preset", "") == preset_names()
    assert completed("train", "--preset", "hico-vitb3") == ["hico-vitb32"]
    assert completed("label", "--run-dir", "ru") == ["<dir>"]
    assert completed("label", "--config", "") == ["<file>"]
    assert completed("completion", "") == list(SHELLS)


def test_a_folder_comes_before_its_classes():
    """Catches settings offered for a folder, and files offered for the name of a class."""
    assert completed("autolabel", "pho") == ["<dir>"]
    assert completed("autolabel", "photos", "a d") == completed("autolabel", "photos", "") == []
    assert "filter.top_k=" in completed("autolabel", "photos", "a dog", "filter.top_k")


def test_settings_are_completed_part_by_part():
    """Catches a list of all settings at once, and one that ends before the equals sign."""
    assert {"label.", "train.", "seed="} <= set(completed("label", ""))
    assert completed("label", "label.nothing.") == []
    assert completed("train", "train.loss=") == completed("filter", "train.loss=") != []
    assert "train.loss=lse_sign" in completed("train", "train.loss=")
    assert completed("train", "train.augment.flip=t") == ["train.augment.flip=true"]
    assert completed("train", "train.epochs=") == [f"train.epochs={TrainConfig().epochs}"]


def test_no_section_and_no_setting_is_offered_alone():
    """Catches `label.pool. ` and `train.epochs= `: shells end a word that cannot go on."""
    pool = completed("label", "label.po")
    assert completed("label", "label.pool.") == pool
    assert all(name.startswith("label.pool.") for name in pool)
    epochs = [f"train.epochs={value}" for value in ("", TrainConfig().epochs)]
    assert completed("label", "train.ep") == completed("label", "train.epochs") == epochs
    assert completed("label", "train.augment.fl") == [
        "train.augment.flip=true", "train.augment.flip=false"
    ]  # fmt: skip
    for dotted in (setting.name for setting in walk_fields()):
        assert len(completed("label", dotted)) > 1, dotted


def test_predict_completes_images_and_settings():
    """Catches a command for which one of its two kinds of arguments cannot be completed."""
    assert completed("predict", "") == ["<file>"]
    assert completed("predict", "photos/a") == ["<file>"]
    assert completed("predict", "predict.batch_i")[0] == "predict.batch_images="


def test_jobs_complete_their_command_and_its_settings():
    """Catches a submitted command that has to be typed blind."""
    assert completed("submit", "--", "pred") == ["predict"]
    assert completed("submit", "--", "label", "label.pool.max")[0] == "label.pool.max_size="


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
    answer = bash(["hts", "train", "seed", "=", "3", "train.ep"], monkeypatch)
    assert answer[0] == "plain,train.epochs="
    assert bash(["hts", "export", "--format", "=", "label"], monkeypatch) == ["plain,label-studio"]
    answer = bash(["hts", "label", "--run-dir", "'a b'", "label.pool.max"], monkeypatch)
    assert answer[0] == "plain,label.pool.max_size="


@pytest.fixture
def scripts(tmp_path, monkeypatch):
    """Return the script of each shell; `hts` is on the path."""
    program = tmp_path / "hts"
    program.write_text(f"#!{sys.executable}\nfrom hts_ray.cli import main\nmain()\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(Path(hts_ray.__file__).parents[1]))

    def script(shell: str) -> str:
        path = tmp_path / f"script.{shell}"
        with path.open("w") as sink:
            subprocess.run([program, "completion", shell], stdout=sink, check=True, timeout=60)
        return str(path)

    return script


def shell_lines(*command: str) -> list[str]:
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert done.stderr == ""
    return done.stdout.splitlines()


def test_bash_completes(scripts):
    """Catches a script that bash cannot run, or that asks a program of another name."""
    lines = f"""
compopt() {{ echo "compopt $1 $2"; }}
source {scripts("bash")}
complete -p hts
COMP_WORDS=(hts label label.po) COMP_CWORD=2
_hts_completion hts
printf '%s\\n' "${{COMPREPLY[@]}}"
COMP_WORDS=(hts label --run-dir ru) COMP_CWORD=3
_hts_completion hts
"""
    shown = shell_lines("bash", "--norc", "-c", lines)
    assert shown[0] == "complete -o nosort -F _hts_completion hts"
    assert {"label.pool.min_size=", "label.pool.max_size="} <= set(shown)
    assert shown[-1] == "compopt -o dirnames"


@pytest.mark.skipif(shutil.which("fish") is None, reason="fish is not installed")
def test_fish_completes(scripts):
    """Catches a script that fish cannot run, and help that is taken for a value."""
    source = f"source {scripts('fish')}; complete --do-complete"
    assert "label.pool.max_size=" in {
        line.partition("\t")[0]
        for line in shell_lines("fish", "--no-config", "-c", f"{source} 'hts label label.po'")
    }
    [line] = shell_lines("fish", "--no-config", "-c", f"{source} 'hts prep'")
    assert line == "prepare\tList the images of a folder or of shards or of HICO in a manifest."


@pytest.mark.skipif(shutil.which("zsh") is None, reason="zsh is not installed")
def test_zsh_completes(scripts, tmp_path):
    """Catches a script that zsh cannot run, or a space behind a section or an equals sign."""
    out, answered = tmp_path / "line", ""
    setup = (
        f"autoload -Uz compinit && compinit -u -D; source {scripts('zsh')}\n"
        f'show() {{ print -rn -- "$BUFFER" > {out} }}; zle -N show\n'
        f"bindkey '^T' show; : > {out}\n"
    )
    process, terminal = pty.fork()
    if process == 0:
        os.execvp("zsh", ["zsh", "-f", "-i"])
    try:
        os.write(terminal, setup.encode())
        while not out.exists():
            os.read(terminal, 1 << 16)
        for line, then in [
            ("hts prep", "hts prepare "),
            ("hts label label.po", "hts label label.pool."),
            ("hts label train.ep", "hts label train.epochs="),
            ("hts label train.loss=ls", "hts label train.loss=lse_sign "),
        ]:
            os.write(terminal, f"\x15{line}\t".encode())
            deadline = time.monotonic() + 30
            while answered != then and time.monotonic() < deadline:
                os.write(terminal, b"\x14")
                while select.select([terminal], [], [], 0.2)[0]:
                    os.read(terminal, 1 << 16)
                answered = out.read_text()
            assert answered == then
    finally:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)


LIBRARIES = {"torch", "ray", "transformers", "open_clip", "matplotlib", "scipy"}


@pytest.mark.parametrize(
    ("words", "answer", "slow"),
    [
        ("hts eval", "evaluate", {*LIBRARIES, "pandas", "pyarrow", "numpy", "pydantic"}),
        ("hts train train.op", "train.optim.", LIBRARIES),
    ],
)
def test_completing_loads_nothing_slow(words, answer, slow):
    """Catches an import at the top of a module that makes every Tab wait for seconds."""
    current = len(words.split()) - 1
    lines = f"""
import os, sys
os.environ.update(_HTS_COMPLETE="zsh_complete", COMP_WORDS={words!r}, COMP_CWORD="{current}")
from hts_ray.cli import main
sys.argv = ["hts"]
try:
    main()
except SystemExit:
    print(sorted({slow!r} & set(sys.modules)), file=sys.stderr)
"""
    done = subprocess.run(
        [sys.executable, "-c", lines], capture_output=True, text=True, check=True, timeout=120
    )
    assert answer in done.stdout
    assert done.stderr.strip() == "[]"
