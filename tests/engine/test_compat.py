"""What this package takes from other libraries without their promise, asked of each library itself.

A failure here after an upgrade says which name broke, before a run meets it.
"""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from hts_ray.engine import compat


def test_ray_train_keeps_its_checkpoints_where_we_look():
    """Would catch a list of checkpoints of another name: a cut one would stay for ever."""
    from ray.train.v2._internal import constants

    assert compat.TRAIN_SNAPSHOT == constants.CHECKPOINT_MANAGER_SNAPSHOT_FILENAME


def test_ray_train_leaves_ctrl_c_to_us(monkeypatch):
    """Would catch a training that ends the process by Ctrl-C, or that goes on behind it."""
    from ray.train.torch import TorchTrainer

    assert "_register_sigint_handler(controller)" in inspect.getsource(
        TorchTrainer._initialize_and_run_controller
    )
    killed = []
    monkeypatch.setattr("ray.kill", killed.append)
    trainer = SimpleNamespace()

    def fit():
        trainer._register_sigint_handler("controller")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), compat.interruptible(trainer):
        fit()
    assert killed == ["controller"]


def test_ray_data_commits_writes_as_we_read_them():
    """Would catch other names of checkpoint files, over which good rows would be removed."""
    from ray.data.checkpoint.checkpoint_writer import PENDING_CHECKPOINT_SUFFIX

    names = ["a-1.parquet", f"b{PENDING_CHECKPOINT_SUFFIX}.parquet", "c.parquet", "notes.txt"]
    assert compat.committed_writes(names) == {"a-1", "c"}
    assert compat.written_by("c-0.parquet") == "c"


def test_ray_data_has_the_settings_that_we_change():
    """Would catch a renamed setting: to set one that does not exist changes nothing, silently."""
    from ray.data import DataContext

    context = DataContext()
    for name in ("checkpoint_config", "enable_progress_bars", "execution_no_progress_timeout_s"):
        assert hasattr(context, name), name
    assert hasattr(context.execution_options, "preserve_order")


def test_an_imported_ray_can_read_its_variables_again():
    """Would catch a Ray that keeps what it read when it was imported, RAY_AUTH_MODE first."""
    code = """
import os, ray
from ray._raylet import AuthenticationMode, get_authentication_mode
from hts_ray.engine.compat import reread_variables
os.environ["RAY_AUTH_MODE"] = "token"
reread_variables()
assert get_authentication_mode() == AuthenticationMode.TOKEN
"""
    environment = {**os.environ, "RAY_AUTH_MODE": "disabled"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


def test_the_autoscaler_reports_where_we_ask(monkeypatch):
    """Would catch clusters that add nodes taken for clusters of one size."""
    from ray.autoscaler._private import monitor
    from ray.experimental import internal_kv

    assert "ray_constants.DEBUG_AUTOSCALING_STATUS" in inspect.getsource(monitor)
    monkeypatch.setattr(internal_kv, "_internal_kv_get", lambda key: f"value of {key}".encode())
    assert compat.autoscaler_status() == b"value of __autoscaling_status"


def test_the_dashboard_serves_the_autoscalers_report():
    """Would catch a moved address of the dashboard, or an answer of another form."""
    from ray.dashboard.modules.job.sdk import JobSubmissionClient
    from ray.dashboard.modules.reporter import reporter_head

    assert callable(JobSubmissionClient._do_request)
    assert "/api/cluster_status" in inspect.getsource(reporter_head)
    answer = {"data": {"clusterStatus": {"autoscalingStatus": None}}}
    client = SimpleNamespace(_do_request=lambda *_: SimpleNamespace(json=lambda: answer))
    assert compat.served_autoscaler_status(client) == {"autoscalingStatus": None}


def test_an_accelerator_can_be_made_with_other_settings():
    """Would catch a second training in one process that keeps the precision of the first."""
    code = """
from accelerate import Accelerator
from hts_ray.engine.compat import forget_accelerator
for precision in ("no", "bf16"):
    forget_accelerator()
    print(Accelerator(mixed_precision=precision, cpu=True).mixed_precision)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["no", "bf16"]


@pytest.mark.parametrize("extra", [{}, {"output_tokens": True}])
def test_an_image_tower_is_that_of_the_whole_model(extra):
    """Would catch a tower with other weights or sizes than `open_clip.create_model` gives it."""
    import open_clip

    vision = {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16, "head_width": 32}
    text = {"context_length": 8, "vocab_size": 32, "width": 16, "heads": 2, "layers": 1}
    tower = compat.build_image_tower({"embed_dim": 8, "vision_cfg": {**vision, **extra}})
    whole = open_clip.CLIP(embed_dim=8, vision_cfg=vision, text_cfg=text)
    tower.load_state_dict(whole.visual.state_dict())
    pixels = torch.rand(2, 3, 32, 32)
    assert torch.equal(tower(pixels), whole.encode_image(pixels))


def test_a_transformers_cache_can_be_picked_from():
    """Would catch a cache with its tensors elsewhere: rows of one image would read another's."""
    from transformers import DynamicCache, EncoderDecoderCache

    def cache(rows: int) -> DynamicCache:
        made = DynamicCache()
        values = torch.arange(float(rows)).reshape(rows, 1, 1, 1).expand(rows, 2, 3, 4)
        made.update(values.clone(), values.clone() + 10, 0)
        return made

    both = EncoderDecoderCache(cache(3), cache(3))
    picked = compat.select_cache(both, lambda tensor: tensor[torch.tensor([2, 0])])
    for part, whole in (
        (picked.self_attention_cache, both.self_attention_cache),
        (picked.cross_attention_cache, both.cross_attention_cache),
    ):
        keys, values = part.update(torch.zeros(2, 2, 1, 4), torch.zeros(2, 2, 1, 4), 0)
        assert keys[:, 0, :, 0].tolist() == [[2, 2, 2, 0], [0, 0, 0, 0]]
        assert values[:, 0, :, 0].tolist() == [[12, 12, 12, 0], [10, 10, 10, 0]]
        assert whole.get_seq_length() == 3


def test_qwen_keeps_the_offset_of_its_positions():
    """Would catch prompts placed behind the wrong position of an image's tokens."""
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 64}
    vision = {"depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "patch_size": 8}
    config = Qwen2VLConfig(
        text_config={**sizes, **heads, "rope_parameters": rope},
        vision_config={**vision, "mlp_ratio": 1, "spatial_merge_size": 2},
        image_token_id=60, video_token_id=61, vision_start_token_id=62, vision_end_token_id=63,
    )  # fmt: skip
    model = Qwen2VLForConditionalGeneration(config).eval()
    ids = torch.tensor([[62, 60, 60, 60, 60, 63, 1, 2]])
    pixels = torch.zeros(16, 3 * 2 * 8 * 8)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}
    with torch.no_grad():
        model(
            **inputs,
            image_grid_thw=torch.tensor([[1, 4, 4]]),
            mm_token_type_ids=(ids == 60).int(),
        )
    # An image of 2 x 2 tokens takes two positions, and so the text after it is two nearer.
    assert compat.rope_deltas(model).tolist() == [[-2]]


def test_ray_reads_the_variables_that_we_set():
    """Would catch a renamed variable, with which Ray would start dozens of processes."""
    import ray

    from hts_ray.engine.session import _DEFAULT_ENVIRONMENT

    ours = {name for name in _DEFAULT_ENVIRONMENT if re.fullmatch("RAY_[A-Z0-9_]+", name)}
    ours |= {"RAY_DEDUP_LOGS_SKIP_REGEX", "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "RAY_AUTH_MODE"}
    for path in Path(ray.__file__).parent.rglob("*.py"):
        if ours:
            text = path.read_text(encoding="utf-8", errors="replace")
            ours = {name for name in ours if name.removeprefix("RAY_") not in text}
    assert not ours


def test_ray_counts_gpus_as_we_ask(monkeypatch, ray_session):
    """Would catch a renamed way to ask which GPUs a node here would have, or could be started."""
    assert compat.local_gpus() >= 0
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert compat.local_gpus() == 0
    assert compat.startable_gpus() == []
    from ray._private.state import state
    from ray.core.generated.autoscaler_pb2 import ClusterConfig

    known = ClusterConfig()
    known.node_group_configs.add(name="cpus", max_count=3, resources={"CPU": 8})
    known.node_group_configs.add(
        name="gpus", max_count=2, resources={"GPU": 4, "accelerator_type:L4": 1}
    )
    monkeypatch.setattr(state, "get_cluster_config", lambda: known)
    assert compat.startable_gpus() == [("L4", 4.0, 2)]


def test_layers_of_a_cache_can_be_cropped_one_by_one():
    """Catches an image's keys cut off with the text's, as `Cache.crop` does."""
    import torch
    from transformers import DynamicCache

    cache = DynamicCache()
    for number, length in enumerate((5, 9, 5)):
        cache.update(*torch.zeros(2, 1, 1, length, 4), number)
    compat.crop_text(cache, 2, [1])
    assert [layer.keys.shape[2] for layer in cache.layers] == [3, 9, 3]
    compat.crop_text(cache, 0, [1])
    assert cache.get_seq_length() == 3


def test_states_of_linear_attention_are_picked_and_copied():
    """Catches a recurrent state that is shared by the prompts behind one region."""
    import torch
    from transformers import Qwen3NextConfig, Qwen3NextForCausalLM

    config = Qwen3NextConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, intermediate_size=16, linear_num_key_heads=1,
        linear_num_value_heads=2, linear_key_head_dim=8, linear_value_head_dim=8,
        layer_types=["linear_attention", "full_attention"], num_experts=0, mlp_only_layers=[0, 1],
    )  # fmt: skip
    model = Qwen3NextForCausalLM(config).eval()
    with torch.inference_mode():
        ids = torch.tensor([[3, 4, 5]])
        cache = model(ids, use_cache=True).past_key_values
        picked = compat.select_cache(cache, lambda tensor: tensor.expand(2, *tensor.shape[1:]))
        more = torch.tensor([[6, 7], [8, 9]])
        behind = model(more, past_key_values=picked, use_cache=True).logits
        again = compat.select_cache(cache, lambda tensor: tensor.expand(2, *tensor.shape[1:]))
        assert torch.equal(model(more, past_key_values=again, use_cache=True).logits, behind)
        for row in range(2):
            whole = torch.cat([ids, more[row : row + 1]], 1)
            assert torch.allclose(model(whole).logits[0, 3:], behind[row], atol=1e-4)
