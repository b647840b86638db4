"""Build the reference of the Python API from the docstrings, and fail on every warning.

    python docs/api.py [build/docs]

pdoc imports every module, so a module that cannot be imported is a warning too, and so is a type
that it cannot read. Warnings of other libraries are theirs and are left out.
"""

from __future__ import annotations

import argparse
import pkgutil
import sys
import warnings
from pathlib import Path

import pdoc
import pdoc.render

import hts_ray

HOME = Path(pdoc.__file__).parent
# pdoc 16 looks for the types of a NamedTuple's fields in another module than the tuple's own.
KNOWN = "Error parsing type annotation ForwardRef("


def build(folder: Path) -> list[str]:
    """Write the pages into a folder; returns what pdoc warned of."""
    for name in hts_ray.__all__:  # imported when asked for; pdoc looks at what is there
        setattr(hts_ray, name, getattr(hts_ray, name))
    modules = ["hts_ray"]
    for module in pkgutil.walk_packages(hts_ray.__path__, "hts_ray."):
        package = sys.modules[module.name.rpartition(".")[0]]
        # pdoc goes down by itself, but takes a package's `__all__` for all that there is of it.
        if hasattr(package, "__all__") and not module.name.endswith("__main__"):
            modules.append(module.name)
    pdoc.render.configure(show_source=False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        pdoc.pdoc(*modules, output_directory=folder)
    told = [str(found.message) for found in caught if HOME in Path(found.filename).parents]
    return [message for message in told if not message.startswith(KNOWN)]


def main() -> None:
    """Build, and exit with 1 after warnings."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?", default=Path("build/docs"))
    options = parser.parse_args()
    found = build(options.folder)
    for message in found:
        print(f"warning: {message}", file=sys.stderr)
    if found:
        sys.exit(1)
    pages = sum(1 for _ in options.folder.rglob("*.html"))
    print(f"{pages} pages -> {options.folder}")


if __name__ == "__main__":
    main()
