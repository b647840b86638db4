"""Names of other libraries that their documentation does not promise.

Each is used here and nowhere else, and has a test in tests/engine/test_compat.py that fails when a
new version of its library breaks it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

# Ray Train keeps its list of a training's checkpoints in this file.
TRAIN_SNAPSHOT = "checkpoint_manager_snapshot.json"


def autoscaler_status() -> str | bytes | None:
    """Return the report of the joined cluster's autoscaler (JSON), None where there is none."""
    from ray._private.ray_constants import DEBUG_AUTOSCALING_STATUS
    from ray.experimental.internal_kv import _internal_kv_get

    status: bytes | None = _internal_kv_get(DEBUG_AUTOSCALING_STATUS)
    return status


def served_autoscaler_status(client: Any) -> Any:
    """Return the same report of the cluster behind a JobSubmissionClient, parsed."""
    return client._do_request("GET", "/api/cluster_status").json()["data"]["clusterStatus"]


def local_gpus() -> float:
    """Return how many GPUs Ray would count on this machine, if it started a node here."""
    from ray._private.accelerators import get_accelerator_manager_for_resource

    manager = get_accelerator_manager_for_resource("GPU")
    visible = manager.get_current_process_visible_accelerator_ids()  # CUDA_VISIBLE_DEVICES
    found = manager.get_current_node_num_accelerators()
    return float(found if visible is None else min(found, len(visible)))


def startable_gpus() -> list[tuple[str, float, int]]:
    """Return (accelerator type or "", GPUs of a node, most nodes) of the joined cluster's groups.

    Not every autoscaler tells Ray which nodes it can start: of Ray 2.60's own none does.
    """
    from ray._private.state import state

    known = state.get_cluster_config()
    found = []
    for group in known.node_group_configs if known else ():
        named = (name.partition("accelerator_type:")[2] for name in group.resources)
        if group.max_count and group.resources.get("GPU", 0):
            kind = next(filter(None, named), "")
            found.append((kind, float(group.resources["GPU"]), max(1, group.max_count)))
    return found


def reread_variables() -> None:
    """Let an imported Ray read its environment again: it keeps RAY_AUTH_MODE from its import."""
    from ray._raylet import Config  # type: ignore[attr-defined]

    Config.initialize("")


@contextmanager
def interruptible(trainer: Any) -> Iterator[None]:
    """Let Ctrl-C raise KeyboardInterrupt from a Ray trainer's `fit`, and end the training then.

    Ray Train would take the signal over for good and end the process with exit code 1.
    """
    controllers: list[Any] = []
    trainer._register_sigint_handler = controllers.append
    try:
        yield
    except KeyboardInterrupt:
        import ray

        for controller in controllers:
            ray.kill(controller)
        raise


def committed_writes(names: Iterable[str]) -> set[str]:
    """Return the writes that Ray Data's checkpoint has committed, from its folder's file names.

    The files of write NAME are `NAME-0.parquet`, `NAME-1.parquet` and so on. Its ids are in
    `NAME.pending.parquet` until all are written, then in `NAME.parquet`.
    """
    return {
        name.removesuffix(".parquet")
        for name in names
        if name.endswith(".parquet") and not name.endswith(".pending.parquet")
    }


def written_by(file: str) -> str:
    """Return the write of Ray Data that made a file, see `committed_writes`."""
    return file.rpartition("-")[0]


def forget_accelerator() -> None:
    """Let this process make an Accelerator with other settings than its last one had."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)


def build_image_tower(model_cfg: dict[str, Any]) -> Any:
    """Return the image tower of an open_clip model, with random weights and without its text tower.

    `open_clip.create_model` makes both, and some text towers ask the hub for their configuration.
    """
    import open_clip  # noqa: F401 - the submodule below is not importable by itself
    from open_clip.model import _build_vision_tower

    vision_cfg = {**model_cfg["vision_cfg"], "timm_model_pretrained": False}
    visual = _build_vision_tower(
        model_cfg["embed_dim"], vision_cfg, bool(model_cfg.get("quick_gelu", False))
    )
    if hasattr(visual, "output_tokens"):
        visual.output_tokens = False
    return visual


def rope_deltas(model: Any) -> Tensor:
    """Return by how much Qwen-VL's positions differ from its token numbers, (R, 1).

    The model keeps it from its last forward over images.
    """
    deltas: Tensor = model.model.rope_deltas
    return deltas


def crop_text(cache: Any, tokens: int, across: Iterable[int]) -> None:
    """Remove the last tokens from a transformers cache, but for the layers numbered `across`.

    These hold an image's keys, of which `Cache.crop` would remove as many.
    """
    kept = set(across)
    for number, layer in enumerate(cache.layers):
        if tokens and number not in kept:
            layer.crop(-tokens)


def select_cache(cache: Any, pick: Callable[[Tensor], Tensor]) -> Any:
    """Return a transformers cache with `pick` applied to every tensor that has one row a sequence.

    The cache given stays as it is; what may be written to is copied.
    """
    import torch

    selected = copy.copy(cache)
    if hasattr(cache, "self_attention_cache"):
        selected.self_attention_cache = select_cache(cache.self_attention_cache, pick)
        selected.cross_attention_cache = select_cache(cache.cross_attention_cache, pick)
        selected.is_updated = dict(cache.is_updated)
        return selected
    selected.layers = [copy.copy(layer) for layer in cache.layers]
    for layer in selected.layers:
        for name, value in vars(layer).items():
            if isinstance(value, torch.Tensor) and value.ndim > 1:
                # Keys and values are only ever concatenated; other states may be written to.
                picked = pick(value)
                setattr(layer, name, picked if name in {"keys", "values"} else picked.clone())
            elif isinstance(value, dict):  # of linear attention: a state by number, or None
                states = {
                    key: pick(state).clone() if isinstance(state, torch.Tensor) else state
                    for key, state in value.items()
                }
                setattr(layer, name, states)
    return selected
