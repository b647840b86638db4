"""Every command that the cluster files and their README give is one that the tools understand."""

import re
import shlex
from pathlib import Path

import check
import click
import pytest
import yaml
from ray.scripts import scripts as ray_scripts

from hts_ray import cli
from hts_ray.config import HtsConfig, parse_config
from hts_ray.demo.world import write_world

RUN = re.compile(r"(s3|gs)://BUCKET/runs/hico|/shared/runs/hico")
JOB = re.compile(r"(?:python jobs/(\w+)\.py|hts (\w+)) (.+)")
TEXTS = {path.name: path.read_text() for path in check.FOLDER.glob("*.yaml")}
TEXTS["README.md"] = (check.FOLDER / "README.md").read_text()
FILES = sorted(TEXTS)


def shell_lines(name):
    """Return the commands in a file's header comment, or in the README's shell blocks."""
    if name.endswith(".md"):
        blocks = re.findall(r"^ *```bash\n(.*?)^ *```$", TEXTS[name], re.M | re.S)
        text = "".join(blocks)
    else:
        text = "".join(re.findall(r"^#(   .*\n)", TEXTS[name], re.M))
    return [line.split(" #")[0].strip() for line in text.replace("\\\n", "").splitlines()]


def entrypoints(name):
    """Return what a file's RayJobs run."""
    if name.endswith(".md"):
        return []
    documents = check.load(TEXTS[name])
    return [d["spec"]["entrypoint"] for d in documents if d.get("kind") == "RayJob"]


def jobs(name):
    """Return (stage, arguments) of every job command in a file."""
    found = [JOB.search(text) for text in [*shell_lines(name), *entrypoints(name)]]
    return [
        (match[1] or match[2], shlex.split(match[3].replace("...", "hico --root /data")))
        for match in found
        if match
    ]


def ray_commands(name):
    """Return every command of Ray's in a file, without the shell around it."""
    lines = shell_lines(name)
    if not name.endswith(".md") and "cluster_name" in TEXTS[name]:
        config = yaml.safe_load(TEXTS[name])
        lines += config["head_start_ray_commands"] + config["worker_start_ray_commands"]
    found = (re.search(r"(?:^|; | )(ray [^;&>|)]+)", line) for line in lines)
    return [match[1].strip() for match in found if match]


def print_config(stage, arguments, capsys):
    """Return the settings that the command line makes of a job's arguments."""
    capsys.readouterr()
    cli.main([stage, *arguments, "--print-config"])
    return parse_config(yaml.safe_load(capsys.readouterr().out))


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Return a run directory that has a manifest, as all files expect it."""
    folder = tmp_path_factory.mktemp("cluster")
    write_world(folder / "world", 7, 4, 2)
    run = folder / "run"
    cli.main(["prepare", "hico", "--root", str(folder / "world"), "--preset", "demo",
              "--run-dir", str(run)])  # fmt: skip
    return run


@pytest.mark.parametrize("name", [name for name in FILES if jobs(name)])
def test_every_job_is_understood(name, prepared, capsys):
    """Would catch a renamed setting or option that only a paid cluster would refuse."""
    for stage, arguments in jobs(name):
        replaced = [RUN.sub(str(prepared), argument) for argument in arguments]
        assert replaced != arguments, "a job that names no run directory of the documented form"
        config = print_config(stage, replaced, capsys)
        assert isinstance(config, HtsConfig)
        assert config.run_dir == str(prepared)


def test_the_files_that_run_jobs_are_all_read():
    """Would catch a file whose commands the tests above no longer find."""
    with_jobs = {name for name in FILES if jobs(name)}
    assert with_jobs == {"README.md", "aws.yaml", "gcp.yaml", "kuberay-interactive.yaml",
                         "kuberay-pipeline.yaml", "kuberay-train.yaml", "local.yaml"}  # fmt: skip
    assert len(jobs("kuberay-pipeline.yaml")) == 2  # prepare, and the entry point


@pytest.mark.parametrize("name", ["kuberay-pipeline.yaml", "aws.yaml", "gcp.yaml", "local.yaml"])
def test_the_pipelines_can_start(name, prepared, capsys):
    """Would catch a job that passes the parser and fails on a prepared run directory."""
    (arguments,) = [arguments for stage, arguments in jobs(name) if stage == "pipeline"]
    cli.main(["pipeline", *(RUN.sub(str(prepared), item) for item in arguments), "--dry-run"])
    assert "write first" in capsys.readouterr().out


def test_an_unknown_setting_would_be_noticed(prepared, capsys):
    """Would catch a check of commands that accepts anything."""
    with pytest.raises(SystemExit) as stop:
        print_config("pipeline", ["--run-dir", str(prepared), "label.pool.maximum=8"], capsys)
    assert stop.value.code == 2


@pytest.mark.parametrize(("name", "gpus"), [
    ("kuberay-pipeline.yaml", 8), ("aws.yaml", 8), ("gcp.yaml", 8), ("local.yaml", 2),
])  # fmt: skip
def test_a_pipeline_uses_all_gpus_of_its_file(name, gpus, prepared, capsys):
    """Would catch GPUs that are paid for and have nothing to do, or workers that wait for ever."""
    first = check.load(TEXTS[name])[0]
    types = first.get("available_node_types", {})
    nodes = types.get("gpu", {}).get("max_workers", first.get("max_workers"))
    if nodes is None:
        nodes = first["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["maxReplicas"]
    assert nodes == gpus
    (arguments,) = [arguments for stage, arguments in jobs(name) if stage == "pipeline"]
    replaced = [RUN.sub(str(prepared), argument) for argument in arguments]
    config = print_config("pipeline", replaced, capsys)
    assert config.label.pool.max_size == config.predict.pool.max_size == gpus
    assert config.train.num_workers == gpus


@pytest.mark.parametrize("name", [name for name in FILES if ray_commands(name)])
def test_every_command_of_ray_is_understood(name):
    """Would catch an option of Ray that this version does not have."""
    for line in ray_commands(name):
        words = shlex.split(line)[1:]
        command, context = ray_scripts.cli, click.Context(ray_scripts.cli, info_name="ray")
        while isinstance(command, click.Group):
            found, command, words = command.resolve_command(context, words)
            context = click.Context(command, info_name=found, parent=context)
        assert command is not None, line
        command.make_context(command.name, words, parent=context.parent)


def test_every_launcher_file_starts_its_nodes():
    """Would catch start commands that the test above does not see."""
    for name in ("aws.yaml", "gcp.yaml", "local.yaml"):
        starts = [line for line in ray_commands(name) if line.startswith("ray start")]
        assert ["--head" in line for line in starts] == [True, False], name


def test_an_unknown_option_of_ray_would_be_noticed():
    """Would catch a parser that swallows options."""
    with pytest.raises(click.NoSuchOption):
        ray_scripts.start.make_context("start", ["--head", "--dashboards-host=127.0.0.1"])


def test_the_readme_names_every_file():
    """Would catch a file that nobody is told of."""
    rest = {"README.md", "check.py", "Dockerfile.dockerignore"}
    readme = TEXTS["README.md"].replace("`-train.yaml`", "`kuberay-train.yaml`")
    told = readme + "".join(TEXTS.values())
    for path in Path(check.FOLDER).iterdir():
        if path.is_file() and path.name not in rest:
            assert path.name in told, path.name
