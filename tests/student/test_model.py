"""The student's tower, classifier, freezing and preprocessing."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F  # noqa: N812

from hts_ray.config import OptimConfig, StudentConfig
from hts_ray.errors import ConfigError
from hts_ray.student.checkpoints import load_student, save_student
from hts_ray.student.model import (
    build_student,
    checkpoint_activations,
    parameter_groups,
    set_trainable,
    source_fingerprint,
    with_learnt_scale,
)


@pytest.fixture(scope="module")
def vit(student_config, color_table):
    return build_student(student_config, color_table)


@pytest.fixture
def own_vit(vit):
    """One that a test may change."""
    return copy.deepcopy(vit)


@pytest.fixture
def own_resnet(resnet_path, color_table):
    return build_student(StudentConfig(model=f"local-dir:{resnet_path}"), color_table)


@pytest.fixture(scope="module")
def clip(vit_path):
    import open_clip

    return open_clip.create_model(f"local-dir:{vit_path}").eval()


def texts_by_hand(clip, vit_path, color_table, templates):
    import open_clip

    tokenizer = open_clip.get_tokenizer(f"local-dir:{vit_path}")
    rows = []
    with torch.no_grad():
        for prompts in color_table.prompts:
            each = [
                F.normalize(clip.encode_text(tokenizer([p])), dim=-1) for p in prompts[:templates]
            ]
            rows.append(F.normalize(torch.cat(each).mean(0), dim=-1))
    return torch.stack(rows)


def random_images(count=2, size=32):
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


def test_logits_are_scaled_cosines_with_the_mean_prompt(vit, clip, vit_path, color_table):
    """Catches a classifier of unnormalised, misordered or too few prompts, or a lost scale."""
    images = random_images()
    with torch.no_grad():
        features = F.normalize(clip.encode_image(images), dim=-1)
        expected = 20.0 * features @ texts_by_hand(clip, vit_path, color_table, 2).T
        assert torch.allclose(vit.eval()(images), expected, atol=1e-4)
    assert [name for name, _ in vit.named_children()] == ["visual"]  # the text tower is gone


def test_backbone_space_starts_with_the_same_scores_up_to_the_norm(
    vit, clip, vit_path, color_table, student_config
):
    """Catches proj applied twice or transposed: f . (proj t) must equal (f proj) . t."""
    config = student_config.model_copy(update={"feature_space": "backbone"})
    student = build_student(config, color_table).eval()
    images = random_images()
    with torch.no_grad():
        features = student.visual(images)
        projected = clip.encode_image(images)
        texts = texts_by_hand(clip, vit_path, color_table, 2)
        assert student.classifier.shape == (3, 32)
        assert torch.allclose(features @ student.classifier.T, projected @ texts.T, atol=1e-4)


def test_the_projection_behind_a_timm_trunk_is_left_out_too(color_table, tmp_path):
    """Catches a head that still projects, and a stored student that is rebuilt with one."""
    config = StudentConfig(model="builtin:world_clip", logit_scale=1.0)
    whole = build_student(config, color_table).eval()
    student = build_student(config.model_copy(update={"feature_space": "backbone"}), color_table)
    save_student(student, str(tmp_path))
    student, images = load_student(str(tmp_path)), random_images(size=80)
    with torch.no_grad():
        features, projected = student.visual(images), whole.visual(images)
        assert features.shape[1] == student.classifier.shape[1] != projected.shape[1]
        expected = projected @ whole.classifier.T
        assert torch.allclose(features @ student.classifier.T, expected, atol=1e-4)


def test_another_image_size_interpolates_the_positions(vit, color_table, student_config):
    """Catches a grid that is reshaped instead of interpolated, or a class token mixed into it."""
    config = student_config.model_copy(update={"image_size": 48})
    student = build_student(config, color_table)
    old, new = vit.visual.positional_embedding, student.visual.positional_embedding
    assert student.image_size == 48
    assert new.shape == (1 + 36, 32)
    assert torch.equal(new[0], old[0])
    grid = old[1:].reshape(1, 4, 4, 32).permute(0, 3, 1, 2)
    expected = F.interpolate(grid, size=(6, 6), mode="bicubic", antialias=True)
    assert torch.allclose(new[1:].reshape(6, 6, 32).permute(2, 0, 1), expected[0], atol=1e-6)
    assert student(random_images(size=48)).shape == (2, 3)


def test_resnet_towers_take_other_sizes(resnet_path, color_table):
    """Catches an attention pool whose positions do not follow the image size."""
    config = StudentConfig(model=f"local-dir:{resnet_path}", image_size=96)
    student = build_student(config, color_table)
    assert student(random_images(size=96)).shape == (2, 3)
    with pytest.raises(ConfigError, match="multiple of the patch size 32, such as 64 or 96"):
        build_student(config.model_copy(update={"image_size": 80}), color_table)
    with pytest.raises(ConfigError, match="no projection to leave out"):
        build_student(config.model_copy(update={"feature_space": "backbone"}), color_table)


@pytest.mark.parametrize(
    ("update", "text"),
    [
        ({"model": "ViT-B-31"}, "ViT-B-32"),
        ({"model": "ViT-B-32"}, "openai"),
        ({"model": "ViT-B-32", "pretrained": "opnai"}, "did you mean openai"),
        ({"model": "local-dir:/nowhere"}, "has no open_clip_config.json"),
        ({"model": "builtin:nothing"}, "student.model"),
    ],
)
def test_wrong_models_are_refused_with_the_nearest_name(color_table, update, text):
    """Catches a traceback of open_clip, or a student that starts from random weights."""
    with pytest.raises(ConfigError, match=text):
        build_student(StudentConfig(**update), color_table)


def test_weights_that_are_code_or_of_another_model_are_refused(tmp_path, color_table):
    """Catches torch.load running a pickle, and a key mismatch that is let through."""

    class Attack:
        def __reduce__(self):
            return (exec, ("raise SystemExit('executed')",))

    for name, content in (("attack.pt", Attack()), ("other.pt", {"visual.x": torch.zeros(1)})):
        torch.save(content, tmp_path / name)
        config = StudentConfig(model="RN50", pretrained=str(tmp_path / name))
        with pytest.raises(ConfigError, match="cannot be loaded"):
            build_student(config, color_table)


def test_source_fingerprint_follows_the_weights(tmp_path, vit_path):
    """Catches a stage key that stays the same when the local weights are replaced."""
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(vit_path, copy)
    config = StudentConfig(model=f"local-dir:{copy}")
    before = source_fingerprint(config)
    assert before == source_fingerprint(StudentConfig(model=f"local-dir:{vit_path}"))
    weights = bytearray((copy / "open_clip_model.safetensors").read_bytes())
    weights[-1] ^= 1
    (copy / "open_clip_model.safetensors").write_bytes(weights)
    assert source_fingerprint(config) != before


@pytest.mark.parametrize("tower", ["vit", "resnet"])
@pytest.mark.parametrize("mode", ["all", "last", "head"])
def test_only_what_is_trainable_changes(tower, mode, request, color_table):
    """Catches a frozen block that learns, a tail that does not, or drifting statistics."""
    path = request.getfixturevalue(f"{tower}_path")
    student = build_student(StudentConfig(model=f"local-dir:{path}"), color_table)
    set_trainable(student, mode, 1)
    student.train()
    before = {name: value.clone() for name, value in student.state_dict().items()}
    optimizer = torch.optim.SGD(parameter_groups(student, OptimConfig(lr=1.0)))
    student(random_images(4, student.image_size))[:, 0].sum().backward()
    optimizer.step()
    changed = {n for n, v in student.state_dict().items() if not torch.equal(v, before[n])}
    assert "classifier" in changed
    early = {"vit": "visual.conv1", "resnet": "visual.conv1"}[tower]
    late = {"vit": "visual.transformer.resblocks.2.mlp", "resnet": "visual.attnpool.c_proj"}[tower]
    middle = {"vit": "visual.transformer.resblocks.1.", "resnet": "visual.layer3."}[tower]
    has = {part: any(n.startswith(part) for n in changed) for part in (early, middle, late)}
    assert has == {early: mode == "all", middle: mode == "all", late: mode != "head"}
    assert not any("running" in name or "num_batches" in name for name in changed)


def test_frozen_blocks_record_no_graph(vit_path, color_table):
    """Catches a freeze that still keeps activations of, and runs backward through, the trunk."""
    student = build_student(StudentConfig(model=f"local-dir:{vit_path}"), color_table)
    set_trainable(student, "last", 1)
    seen = []
    blocks = student.visual.transformer.resblocks
    hooks = [b.register_forward_hook(lambda m, i, o: seen.append(o.requires_grad)) for b in blocks]
    student.train()(random_images())
    assert seen == [False, False, True]
    for hook in hooks:
        hook.remove()
    with pytest.raises(ConfigError, match="the tower has 3 blocks"):
        set_trainable(student, "last", 4)


def test_timm_trunks_freeze_by_stage(color_table):
    """Catches trunks whose blocks have other names: their head must learn, their stem must not."""
    from hts_ray.engine.compat import build_image_tower
    from hts_ray.student.model import tower_layers

    trunk = {"timm_model_name": "vit_tiny_patch16_224", "timm_pool": "", "timm_proj": "linear"}
    visual = build_image_tower({"embed_dim": 16, "vision_cfg": trunk})

    layers = tower_layers(visual, "train.trainable")
    assert len(layers) == 14
    assert layers[1][0] is next(visual.trunk.blocks[11].parameters())
    inside = {id(value) for value in layers[0]}
    assert id(visual.head.proj.weight) in inside
    assert id(visual.trunk.norm.weight) in inside
    assert id(visual.trunk.pos_embed) not in inside
    assert id(visual.trunk.patch_embed.proj.weight) not in inside


def test_parameter_groups_have_two_rates_and_no_decay_on_vectors(vit):
    """Catches a head that learns at the trunk's rate, and decay on biases and norms."""
    set_trainable(vit, "all")
    groups = parameter_groups(vit, OptimConfig(lr=1e-5, head_lr=1e-3, weight_decay=0.1))
    assert [g["lr"] for g in groups] == [1e-5, 1e-5, 1e-3]
    assert [g["weight_decay"] for g in groups] == [0.1, 0.0, 0.1]
    assert groups[2]["params"] == [vit.classifier]
    assert sum(len(g["params"]) for g in groups) == len(list(vit.parameters()))


@pytest.mark.parametrize("tower", ["own_vit", "own_resnet"])
def test_layer_decay_slows_blocks_towards_the_input(tower, request):
    """Catches rates that rise towards the input, a block left out, and one in two groups."""
    student = request.getfixturevalue(tower)
    set_trainable(student, "all")
    groups = parameter_groups(student, OptimConfig(lr=1.0, head_lr=7.0, layer_decay=0.5))
    placed = [id(value) for group in groups for value in group["params"]]
    assert len(placed) == len(set(placed)) == sum(v.requires_grad for v in student.parameters())
    rate = {id(value): group["lr"] for group in groups for value in group["params"]}
    visual = student.visual
    blocks = (
        list(visual.transformer.resblocks)
        if tower == "own_vit"
        else [visual.layer1, visual.layer2, visual.layer3, visual.layer4]
    )
    found = [rate[id(next(block.parameters()))] for block in blocks]
    assert found == [0.5 ** (len(blocks) - i) for i in range(len(blocks))]
    assert rate[id(visual.conv1.weight)] == 0.5 ** (len(blocks) + 1)
    assert rate[id(student.classifier)] == 7.0
    assert max(r for r in rate.values() if r != 7.0) == 1.0  # what follows the last block


def test_learnt_logit_scale_starts_at_the_fixed_one_and_is_folded(own_vit):
    """Catches a scale that jumps when it is learnt, and one whose learning is lost when saved."""
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        before = own_vit(images)
        own_vit.learn_logit_scale()
        assert torch.equal(own_vit(images), before)
        own_vit.log_gain.fill_(0.5)
        learnt = own_vit(images)
    assert torch.allclose(learnt, before * math.exp(0.5))
    assert [g["lr"] for g in parameter_groups(own_vit, OptimConfig(lr=1.0, head_lr=2.0))][-1] == 2.0
    state = with_learnt_scale(own_vit.state_dict())
    own_vit.log_gain = None
    own_vit.load_state_dict(state)
    with torch.no_grad():
        assert torch.allclose(own_vit(images), learnt)


def test_activations_are_computed_again_to_the_same_gradient(own_vit, own_resnet):
    """Catches checkpointing that changes the gradient, and a tower that silently ignores it."""
    set_trainable(own_vit, "all")
    own_vit.train()
    images = torch.randn(2, 3, 32, 32)
    calls = []
    block = own_vit.visual.transformer.resblocks[0]
    block.register_forward_pre_hook(lambda *_: calls.append(1))
    gradients = []
    for _ in range(2):
        calls.clear()
        own_vit.zero_grad()
        own_vit(images).square().sum().backward()
        gradients.append(own_vit.visual.conv1.weight.grad.clone())
        count = len(calls)
        checkpoint_activations(own_vit)
    assert count == 2  # the second pass ran the block again
    assert torch.allclose(*gradients, rtol=1e-5)
    with pytest.raises(ConfigError, match=r"gradient_checkpointing.*train.accumulation"):
        checkpoint_activations(own_resnet)


def test_preprocess_squashes_and_normalises(vit):
    """Catches centre crops, swapped channels or axes, and a mean in 0..255."""
    image = np.zeros((20, 60, 3), np.uint8)
    image[:, 30:, 0] = 255  # the right half is red
    images = vit.preprocess([image, np.full((5, 5, 3), 255, np.uint8)])
    assert images.shape == (2, 3, 32, 32)
    red = images[0, 0] * 0.2 + 0.5
    assert red[:, :12].max() < 0.05
    assert red[:, 20:].min() > 0.95
    assert torch.allclose(images[1, 2], torch.full((32, 32), (1 - 0.3) / 0.3), atol=1e-5)
