"""Faults inside a process: imported by every Python that has this folder on its path.

The file that HTS_FAULT_CLOCK names holds the seconds by which `time.time` is off, for as long as
it is there. An image whose PNG has a text chunk `poison` kills the process that decodes it. Ray's
workers take a while for a step of a training and a trial of a sweep, so that faults find them.
GPUs are logical ones: the workers of a training compute on the CPU and talk by gloo.
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


class _AtImport(importlib.abc.MetaPathFinder):
    """Changes modules when they are imported: processes that do without them do not pay."""

    def __init__(self, changes):
        self.changes = changes

    def find_spec(self, name, path, target=None):
        change = self.changes.pop(name, None)
        if change is None:
            return None
        spec = importlib.util.find_spec(name)
        run = spec.loader.exec_module

        def exec_module(module):
            run(module)
            change(module)

        spec.loader.exec_module = exec_module
        return spec


def _poison(module):
    load = module.PngImageFile.load

    def deadly_load(self):
        if "poison" in self.info:
            os.kill(os.getpid(), signal.SIGKILL)
        return load(self)

    module.PngImageFile.load = deadly_load


def _slowly(name, seconds):
    def change(module):
        work = getattr(module, name)

        def slow_work(*arguments, **named):
            if sys.argv[0].endswith("default_worker.py"):
                time.sleep(seconds)
            return work(*arguments, **named)

        setattr(module, name, slow_work)

    return change


def _by_gloo(module):
    start = module._TorchBackend.on_start

    def on_start(self, worker_group, config):
        config.backend = "gloo"
        return start(self, worker_group, config)

    module._TorchBackend.on_start = on_start


def _on_the_cpu(module):
    start = module.Accelerator.__init__

    def start_on_cpu(self, *arguments, **named):
        os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"  # Ray Train says cuda:0
        start(self, *arguments, **{**named, "cpu": True})

    module.Accelerator.__init__ = start_on_cpu


if _CLOCK:
    time.time = _jumping_time
sys.meta_path.insert(
    0,
    _AtImport(
        {
            "PIL.PngImagePlugin": _poison,
            "accelerate.accelerator": _on_the_cpu,
            "ray.train.torch.config": _by_gloo,
            "hts_ray.student.loop": _slowly("take_step", 0.3),
            "hts_ray.sweep.trial": _slowly("run_trial", 1.5),
        }
    ),
)
