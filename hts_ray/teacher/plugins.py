"""Teachers that are classes of somebody else: of an installed package, or of a module.

What such a class has to offer: `hts_ray.teacher.contract`.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import sys
from collections.abc import Iterator
from functools import lru_cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

from hts_ray.config import TeacherConfig
from hts_ray.errors import ConfigError

GROUP = "hts_ray.teachers"
IMPORT = "import:"
_CONTRACT = "see hts_ray/teacher/contract.py for what a teacher offers"
_ARGUMENTS = {"score": "images, prompts", "caption": "images, settings", "ask": "images, phrases"}


def installed() -> dict[str, list[EntryPoint]]:
    """Return the teachers that installed packages offer, by name; more than one is a mistake."""
    return _installed(tuple(sys.path))


@lru_cache(maxsize=4)
def _installed(path: tuple[str, ...]) -> dict[str, list[EntryPoint]]:
    del path  # where packages are looked for
    found: dict[str, list[EntryPoint]] = {}
    for point in entry_points(group=GROUP):
        found.setdefault(point.name, []).append(point)
    return found


def package_of(point: EntryPoint) -> str:
    """Return name and version of the package that an entry point is of."""
    return f"{point.dist.name} {point.dist.version}" if point.dist else "a package without a name"


def is_own(config: TeacherConfig) -> bool:
    """Return whether the teacher is such a class."""
    if config.engine != "transformers":
        return False
    return config.model.startswith(IMPORT) or config.model.partition(":")[0] in installed()


def own_class(config: TeacherConfig) -> Any:
    """Return the class that a teacher's name leads to.

    Raises ConfigError, a line that names the package, for one that does not import or is none.
    """
    if config.model.startswith(IMPORT):
        return _checked(config, *_imported(config))
    points = installed().get(config.model.partition(":")[0])
    if not points:
        raise _error(config, "no package that is installed offers it", "hts teachers lists them")
    if len(points) > 1:
        packages = " and of ".join(map(package_of, points))
        raise _error(config, f"is a teacher of {packages}", "uninstall one of them")
    package = package_of(points[0])
    try:
        found = points[0].load()
    except Exception as error:  # whatever the package's code raises
        reason = f"{type(error).__name__}: {error}"
        remedy = f"install {package.partition(' ')[0]} again, on every node, or tell its authors"
        raise _error(config, f"the package {package} does not import: {reason}", remedy) from None
    return _checked(config, found, f"{points[0].value.partition(':')[2]} of {package}")


def own_fingerprint(config: TeacherConfig) -> str:
    """Return text that changes whenever the class, or what it says of itself, does."""
    found = own_class(config)
    source = getattr(sys.modules.get(found.__module__), "__file__", None)
    digest = hashlib.sha256(Path(source).read_bytes() if source else b"")
    if callable(getattr(found, "fingerprint", None)):
        digest.update(str(found.fingerprint(config)).encode())
    name = config.model
    if not name.startswith(IMPORT):
        name += f"@{package_of(installed()[name.partition(':')[0]][0])}"
    return f"{name}@{digest.hexdigest()[:12]}"


def modes_of(found: Any) -> tuple[str, ...]:
    """Return the modes that a teacher's class serves."""
    asked = ("questions",) if callable(getattr(found, "ask", None)) else ()
    return tuple(getattr(found, "modes", ("prompts", "captions", *asked)))


def _imported(config: TeacherConfig) -> tuple[Any, str]:
    module_name, _, name = config.model.removeprefix(IMPORT).partition(":")
    try:
        return getattr(importlib.import_module(module_name), name), name
    except (ImportError, AttributeError, ValueError) as error:
        raise _error(
            config,
            f"does not import: {error}",
            "write import:MODULE:CLASS, with MODULE importable on every node (PYTHONPATH, or"
            " beside the job's entry point)",
        ) from None


def _checked(config: TeacherConfig, found: Any, name: str) -> Any:
    """Return the class; ConfigError when it is none or does not serve the settings' mode."""
    wrong = next(_misfits(config, found), None)
    if wrong is not None:
        raise _error(config, f"{name} {wrong}", _CONTRACT)
    if config.mode not in (modes := modes_of(found)):
        told = f"{name} serves label.teacher.mode={' and '.join(modes) or 'nothing'}"
        raise _error(config, f"{told}, not {config.mode}", "set label.teacher.mode")
    return found


def _misfits(config: TeacherConfig, found: Any) -> Iterator[str]:
    """Say what keeps a class from being called as a teacher is."""
    if not callable(found):
        yield "is no class"
    methods = ["score", "caption", *(["ask"] if config.mode == "questions" else [])]
    missing = [method for method in methods if not callable(getattr(found, method, None))]
    if missing:
        yield f"has no method {' and no '.join(missing)}"
    if not _takes(found, 2):
        yield "cannot be made with (config, device)"
    for method in methods:
        if not _takes(getattr(found, method, None), 3):
            yield f"has a method {method} that does not take (self, {_ARGUMENTS[method]})"


def _takes(function: Any, arguments: int) -> bool:
    try:
        inspect.signature(function).bind(*range(arguments))
    except TypeError:
        return False
    except ValueError:  # of C code, which does not say
        return True
    return True


def _error(config: TeacherConfig, message: str, remedy: str) -> ConfigError:
    return ConfigError(message, field="label.teacher.model", value=config.model, remedy=remedy)
