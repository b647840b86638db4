"""The table of commands: all that `hts --help` needs to know about them."""

from click.shell_completion import CompletionItem

# Below its heading: the name of a command, its module in hts_ray.cli, and its short help.
_TABLE = """
Start here
  autolabel autolabel Label a folder of images with the classes that you name.
Stages
  prepare stages List the images of a folder or of shards or of HICO in a manifest.
  label stages Score every class prompt on every region of every image (the teacher).
  filter stages Turn regional scores into positives, ignored and negatives.
  train stages Fine-tune the student (train.labels: pseudo, annotations or none).
  predict stages Label images at PATHs, or score a manifest, with a trained student.
  evaluate stages Compare predictions with annotations by HICO's official protocol.
  report runs Write one self-contained HTML page about a run.
More of a run
  demo runs Run everything on the built-in synthetic world; nothing is downloaded.
  pipeline runs Run label, filter, train, predict and (with annotations) evaluate.
  sweep stages Try many settings of filter and training over one teacher pass, and keep the best.
People and other tools
  export exchange Write labels in the format of another tool, or a student in another form.
  import-labels exchange Read labels that people corrected: review page, Label Studio, COCO or CSV.
  review exchange Compare pseudo-labels with corrections that `hts import-labels` wrote to DIR.
  import-checkpoint exchange Turn a checkpoint of the paper's own code into a student.
Machines
  teachers teachers List the teachers that label.teacher.model can name, built in and installed.
  submit cluster Run a command as a job of a cluster: hts submit -- label --run-dir s3://...
  doctor cluster Check this machine, or all nodes of a cluster, and say what to change.
  completion completion Print the script with which a shell completes hts.
"""
# The names of the commands below each heading, and of each command the module and the short help.
HEADINGS: dict[str, list[str]] = {}
MODULES: dict[str, str] = {}
SHORT_HELP: dict[str, str] = {}
for _line in _TABLE.strip().splitlines():
    if not _line.startswith(" "):
        _names = HEADINGS[_line] = []
        continue
    _name, MODULES[_name], SHORT_HELP[_name] = _line.split(maxsplit=2)
    _names.append(_name)


def complete_command(incomplete: str) -> list[CompletionItem[str]]:
    """Complete the name of a command."""
    return [
        CompletionItem(name, help=text)
        for name, text in SHORT_HELP.items()
        if name.startswith(incomplete)
    ]
