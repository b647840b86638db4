"""`hts teachers`: which teachers there are, and which of them are usable here."""

from __future__ import annotations

import click

from hts_ray.config import OPEN_CLIP, TeacherConfig
from hts_ray.engine.console import print_line, print_rows
from hts_ray.errors import ConfigError
from hts_ray.teacher.models.catalog import FAMILIES, ONLY_CAPTIONERS, missing_extra
from hts_ray.teacher.plugins import installed, modes_of, own_class, package_of


@click.command()
def teachers() -> None:
    """List the teachers that label.teacher.model can name, built in and installed."""
    rows, broken = [], []
    for name, points in sorted(installed().items()):
        try:
            found = own_class(TeacherConfig(model=name))
        except ConfigError as error:
            rows.append([name, "broken", package_of(points[0])])
            broken.append(str(error))
            continue
        needs = getattr(found, "needs", "") or package_of(points[0])
        rows.append([name, ", ".join(modes_of(found)), needs])
    if rows:
        print_rows("installed packages", ["name", "modes", "needs"], rows, text_columns=3)
    for line in broken:
        print_line(line)
    families = [
        [
            told.partition(" (")[0],
            "prompts, captions" + ("" if kind in ONLY_CAPTIONERS else ", questions"),
            missing_extra(kind) or "a hub id or a folder",
        ]
        for kind, told in FAMILIES.items()
    ]
    own = [
        [f"{OPEN_CLIP}NAME/TAG", "prompts", "a name of open_clip"],
        ["builtin:world_captioner", "prompts, captions", "the demo's drawn world"],
        ["builtin:dummy", "prompts, captions, questions", "nothing: random numbers"],
        ["import:MODULE:CLASS", "its own", "hts_ray/teacher/contract.py"],
        *(
            [f"label.teacher.engine={engine}", "captions, questions", missing_extra(engine) or what]
            for engine, what in (("vllm", "a chat model and GPUs"), ("openai", "an endpoint"))
        ),
    ]
    print_rows("built in", ["family or name", "modes", "needs"], [*families, *own], text_columns=3)
