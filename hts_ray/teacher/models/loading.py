"""Load the teacher that a setting names.

Needs neither torch nor Ray until a model is loaded.
"""

from __future__ import annotations

from hts_ray.config import LabelConfig, TeacherConfig
from hts_ray.errors import ConfigError
from hts_ray.teacher.captioner import Captioner, DummyCaptioner
from hts_ray.teacher.models.catalog import (
    dummy_seconds,
    is_clip,
    is_dummy,
    is_remote,
    model_folder,
    needs_torch,
)
from hts_ray.teacher.models.chat import ChatTeacher
from hts_ray.teacher.models.endpoint import Endpoint
from hts_ray.teacher.plugins import is_own, own_class


def load_captioner(config: TeacherConfig, device: str = "cpu") -> Captioner:
    """Load the teacher that `config.model` names onto a torch device and check it.

    `device` may be "auto" for a model that is spread over all GPUs, or "meta" for one that needs
    no weights, as it only tokenizes. The name is a hub id, a local folder, `builtin:NAME`,
    `open_clip:NAME/TAG`, that of an installed package, or `import:MODULE:CLASS`. Raises ConfigError
    naming label.teacher.model for a missing or incomplete model, and for a family that is not
    supported.
    """
    if is_remote(config):
        return ChatTeacher(Endpoint(config), config)
    if is_dummy(config):
        return DummyCaptioner(dummy_seconds(config))
    config = _with_dtype(config, device)
    if is_own(config):
        teacher: Captioner = own_class(config)(config, device)
        return teacher
    from hts_ray.teacher.models import clip, pretrained, vllm  # torch loads slowly

    if is_clip(config):
        return clip.load_clip(config, device)
    folder = model_folder(config, weights=device != "meta")
    if config.engine == "vllm" and device != "meta":
        return ChatTeacher(vllm.Vllm(config, folder, device), config)
    return pretrained.load_pretrained(config, folder, device)


def _with_dtype(config: TeacherConfig, device: str) -> TeacherConfig:
    """Return the settings with a precision; the device's best where no plan has chosen one."""
    if config.dtype != "auto":
        return config
    dtype = "float32"
    if device not in {"cpu", "meta"}:
        import torch

        if torch.cuda.is_available():  # device "auto" may mean the CPU
            fast = torch.cuda.is_bf16_supported(including_emulation=False)
            dtype = "bfloat16" if fast else "float16"
    return config.model_copy(update={"dtype": dtype})


def load_on_device(config: LabelConfig, *, or_cpu: bool = False) -> tuple[Captioner, str]:
    """Load the teacher as an actor would, and return the device for its company.

    Raises ConfigError for a teacher that does not load, or a GPU that is not there; with `or_cpu`
    the CPU takes its place.
    """
    gpus = config.pool.gpus
    if not needs_torch(config.teacher) and config.regions.detector is None:
        return load_captioner(config.teacher, "cuda" if gpus else "cpu"), "cpu"
    import torch

    torch.set_num_threads(config.pool.threads)
    if gpus and not torch.cuda.is_available():
        if not or_cpu:
            raise ConfigError(
                "torch sees no GPU on this node",
                field="label.pool.num_gpus",
                value=gpus,
                remedy="set it to 0, or use nodes with GPUs and a CUDA build of torch",
            )
        gpus = 0.0
    device = "cuda" if gpus else "cpu"
    # On several GPUs accelerate spreads the model.
    return load_captioner(config.teacher, "auto" if gpus > 1 else device), device
