"""What every stage is given and what it is: a run, and a step of it that is named by a key."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Any

from hts_ray.classes import ClassTable, load_class_table
from hts_ray.config import HtsConfig, override
from hts_ray.images.manifest import Manifest, latest_manifest, open_manifest
from hts_ray.store import storage
from hts_ray.store.provenance import git_commit, hardware, versions
from hts_ray.store.run import StageFolder, settings_hash

CONFIG_FILE, CLASSES_FILE, PROVENANCE = "config.yaml", "classes.csv", "provenance.json"

BESIDE = "-labels"  # how the name ends of a run that lies beside its folder of images


@dataclass(frozen=True)
class Run:
    """A run directory with its settings and classes; it reads each manifest once."""

    config: HtsConfig
    class_table: ClassTable
    _manifests: dict[str, Manifest] = field(default_factory=dict, repr=False, compare=False)

    @property
    def run_dir(self) -> str:
        """Absolute path or URI of the run directory."""
        return storage.absolute(self.config.run_dir)

    def stage(self, table: str, key: str) -> StageFolder:
        """Return the folder of a stage."""
        return StageFolder(self.run_dir, table, key)

    def manifest(self, given: str | None = None) -> Manifest:
        """Return a given manifest, or the run's latest; DataError when it cannot be used."""
        path = latest_manifest(self.run_dir) if given is None else storage.absolute(given)
        if path not in self._manifests:
            self._manifests[path] = open_manifest(path)
        return self._manifests[path]

    def changed(self, values: Mapping[str, Any]) -> Run:
        """Return the run with other settings, given as nested mappings."""
        return Run(override(self.config, values), self.class_table, self._manifests)

    def record(self, devices: Mapping[str, Any] | None = None, **more: Any) -> None:
        """Write `config.yaml`, `classes.csv` and `provenance.json` into the run directory.

        `devices`, by stage, and `more` are added to what earlier commands recorded.
        """
        run_dir = self.config.run_dir
        storage.write_bytes(storage.join(run_dir, CONFIG_FILE), self.config.to_yaml().encode())
        self.class_table.to_csv(storage.join(run_dir, CLASSES_FILE))
        path = storage.join(run_dir, PROVENANCE)
        earlier = storage.read_object(path)
        made_by = {
            "versions": versions(),
            "hardware": hardware(),
            "git_commit": git_commit(),
            "settings_hash": settings_hash(self.config.answer_settings()),
            "class_fingerprint": self.class_table.fingerprint(),
            "num_classes": len(self.class_table),
            "updated": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "devices": {**earlier.get("devices", {}), **(devices or {})},
        }
        storage.write_json(path, {**earlier, **made_by, **more})


def open_run(config: HtsConfig) -> Run:
    """Load the classes of a configuration."""
    return Run(config, load_class_table(config.classes.source, config.classes.ids))


@dataclass(frozen=True)
class Stage:
    """One step of a run, planned but not done.

    A room plans its step once a command: it checks what the step reads, and hashes it together
    with the settings into the key that names `folder`. `inputs` says what is read, by name, for
    people. `work` fills the folder and publishes it; it takes a callback that shows progress,
    or None.
    """

    folder: StageFolder
    inputs: Mapping[str, str]
    work: Callable[[Any], object]

    def run(self, progress: Any = None) -> StageFolder:
        """Do the work unless it is done already, and return the folder."""
        if not self.folder.finished:
            self.work(progress)
        return self.folder
