"""Faults inside a process: imported by every Python that has this folder on its path.

The file that HTS_FAULT_CLOCK names holds the seconds by which `time.time` is off, for as long as
it is there. An image whose PNG has a text chunk `poison` kills the process that decodes it.
"""

import importlib.abc
import importlib.util
import os
import signal
import sys
import time

_CLOCK = os.environ.get("HTS_FAULT_CLOCK", "")
_true_time = time.time


def _jumping_time():
    try:
        with open(_CLOCK) as file:
            return _true_time() + float(file.read() or 0)
    except OSError:
        return _true_time()


class _PoisonAtImport(importlib.abc.MetaPathFinder):
    """Arms PIL when it is imported, so that processes which decode nothing do not pay for it."""

    def find_spec(self, name, path, target=None):
        if name != "PIL.PngImagePlugin":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        run = spec.loader.exec_module

        def exec_module(module):
            run(module)
            _arm(module.PngImageFile)

        spec.loader.exec_module = exec_module
        return spec


def _arm(image_class):
    load = image_class.load

    def deadly_load(self):
        if "poison" in self.info:
            os.kill(os.getpid(), signal.SIGKILL)
        return load(self)

    image_class.load = deadly_load


if _CLOCK:
    time.time = _jumping_time
sys.meta_path.insert(0, _PoisonAtImport())
