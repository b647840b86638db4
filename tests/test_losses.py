"""The losses against plain references, at extremes, under weights and an ignore mask."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F  # noqa: N812

from hts_ray.config import TrainConfig, load_config
from hts_ray.errors import ConfigError
from hts_ray.losses import LOSSES as NAMES
from hts_ray.losses import AsymmetricLoss, BCELoss, FocalLoss, LSESignLoss, make_loss

LOSSES = [LSESignLoss, BCELoss, FocalLoss, AsymmetricLoss]
VARIANTS = {
    "lse_sign": LSESignLoss,
    "bce": BCELoss,
    "weighted_bce": partial(BCELoss, positive_weight=3.0),
    "focal": FocalLoss,
    "focal_root": partial(FocalLoss, gamma=0.5, alpha=None),
    "asl": AsymmetricLoss,
    "asl_root": partial(AsymmetricLoss, gamma_neg=0.5, gamma_pos=0.5, clip=0.2),
    "asl_unclipped": partial(AsymmetricLoss, gamma_neg=0.5, gamma_pos=1.0, clip=0.0),
}
LIMITED = settings(max_examples=40, deadline=None)


def lse_sign_by_hand(logits: list[float], targets: list[int], temperature: float) -> float:
    terms = [math.exp(-y * s / temperature) for s, y in zip(logits, targets, strict=True) if y != 0]
    return math.log1p(math.fsum(terms))


def bce_by_hand(logits: list[float], targets: list[int], temperature: float) -> float:
    terms = [
        math.log1p(math.exp(-y * s / temperature))
        for s, y in zip(logits, targets, strict=True)
        if y != 0
    ]
    return math.fsum(terms) / len(logits)


def focal_by_hand(logit: float, y: int, gamma: float, alpha: float) -> float:
    wrong = 1 / (1 + math.exp(y * logit))
    balance = alpha if y > 0 else 1 - alpha
    return balance * wrong**gamma * math.log1p(math.exp(-y * logit))


def asl_by_hand(logit: float, y: int, gamma_neg: float, gamma_pos: float, clip: float) -> float:
    p, not_p = 1 / (1 + math.exp(-logit)), 1 / (1 + math.exp(logit))
    if y > 0:
        return not_p**gamma_pos * math.log1p(math.exp(-logit))
    return max(p - clip, 0) ** gamma_neg * -math.log(min(not_p + clip, 1))


def batch(rows: int = 5, classes: int = 7, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(rows, classes, generator=generator)
    targets = torch.randint(-1, 2, (rows, classes), generator=generator)
    return logits, targets


def weights_of(logits: torch.Tensor, seed: int = 1) -> torch.Tensor:
    """Return weights in 0..2, a fifth of them 0."""
    draws = torch.rand(logits.shape, generator=torch.Generator().manual_seed(seed))
    return (2.5 * draws - 0.5).clamp(min=0).to(logits.dtype)


@pytest.mark.parametrize(
    ("loss_type", "by_hand"), [(LSESignLoss, lse_sign_by_hand), (BCELoss, bce_by_hand)]
)
@LIMITED
@given(
    entries=st.lists(
        st.tuples(st.floats(-20, 20), st.sampled_from([-1, 0, 1])), min_size=1, max_size=8
    ),
    temperature=st.floats(0.1, 10),
)
def test_formula(loss_type, by_hand, entries, temperature):
    """Catches a wrong sign, a missing 1, a forgotten temperature or a counted ignored class."""
    logits, targets = [s for s, _ in entries], [y for _, y in entries]
    got = loss_type(temperature, "none")(
        torch.tensor([logits], dtype=torch.float64), torch.tensor([targets])
    )
    torch.testing.assert_close(
        got, torch.tensor([by_hand(logits, targets, temperature)], dtype=torch.float64)
    )


@pytest.mark.parametrize(
    ("loss_type", "by_hand"), [(FocalLoss, focal_by_hand), (AsymmetricLoss, asl_by_hand)]
)
@LIMITED
@given(
    entries=st.lists(
        st.tuples(st.floats(-30, 30), st.sampled_from([-1, 0, 1])), min_size=1, max_size=8
    ),
    gammas=st.tuples(st.floats(0, 6), st.floats(0, 6)),
    share=st.floats(0.01, 0.99),
)
def test_formula_of_focused_losses(loss_type, by_hand, entries, gammas, share):
    """Catches swapped gammas, a power of the wrong probability, and a misplaced clip or alpha."""
    parameters = (*(gammas[:1] if loss_type is FocalLoss else gammas), share)
    got = loss_type(2.0, "none", *parameters)(
        torch.tensor([[s for s, _ in entries]], dtype=torch.float64),
        torch.tensor([[y for _, y in entries]]),
    )
    terms = [by_hand(s / 2.0, y, *parameters) for s, y in entries if y]
    wanted = torch.tensor([math.fsum(terms) / len(entries)], dtype=torch.float64)
    torch.testing.assert_close(got, wanted)


def test_focal_is_torchvisions():
    """Catches an alpha that weighs negatives, by code that is not ours."""
    from torchvision.ops import sigmoid_focal_loss

    logits, targets = batch()
    targets[targets == 0] = -1
    wanted = sigmoid_focal_loss(logits, (targets == 1).float(), 0.3, 1.5, "mean")
    torch.testing.assert_close(FocalLoss(gamma=1.5, alpha=0.3)(logits, targets), wanted)


def test_focused_losses_at_zero_are_bce():
    """Catches a focus that cannot be switched off, so that nothing can be compared with it."""
    logits, targets = batch()
    wanted = BCELoss(0.5)(logits, targets)
    torch.testing.assert_close(FocalLoss(0.5, gamma=0, alpha=None)(logits, targets), wanted)
    torch.testing.assert_close(AsymmetricLoss(0.5, "mean", 0, 0, 0)(logits, targets), wanted)


def test_clipped_negatives_cost_nothing():
    """Catches a rounding residue, or a gradient, below the clip; and a clip of positives."""
    logits = torch.tensor([[-3.0, -2.9, -3.0, -1e4]], requires_grad=True)  # sigmoid: 0.047, 0.052
    loss = AsymmetricLoss(gamma_neg=0.0)(logits, torch.tensor([[-1, -1, 1, -1]]))
    loss.backward()
    assert logits.grad is not None
    assert (logits.grad[0] != 0).tolist() == [False, True, True, False]
    assert AsymmetricLoss(gamma_neg=0.0)(logits[:, :1], torch.tensor([[-1]])) == 0


@pytest.mark.parametrize("loss_type", VARIANTS.values(), ids=VARIANTS)
def test_gradient_is_the_numerical_one(loss_type):
    """Catches a detach, an in-place edit or a float32 cast that breaks the chain rule."""
    logits, targets = batch()
    logits = logits.double().requires_grad_()
    weights = weights_of(logits)
    assert torch.autograd.gradcheck(lambda s: loss_type(0.7, "none")(s, targets), (logits,))
    weighted = loss_type(0.7, "none", class_weights=weights[0])
    assert torch.autograd.gradcheck(lambda s: weighted(s, targets, weights), (logits,))


@pytest.mark.parametrize("loss_type", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("temperature", [1.0, 0.01])
@pytest.mark.parametrize("weight", [None, 0.0, 1e-30, 1e30])
def test_finite_at_extreme_logits(loss_type, dtype, temperature, weight):
    """Catches exp() without the log-sum-exp shift, log(0), and arithmetic in half precision."""
    rows = [[1e4, -1e4, 1e4, -1e4], [-1e4] * 4, [89.0, -89.0, 17.0, -104.0], [0.0] * 4]
    logits = torch.tensor(rows, dtype=dtype, requires_grad=True)
    targets = torch.tensor([[1, 1, -1, -1], [1, 0, 0, -1], [1, -1, -1, -1], [1, -1, 0, -1]])
    weights = None
    if weight is not None:
        weights = torch.ones(4, 4)
        # A weight is a factor of most gradients, and float16 ends at 65504.
        weights[:, ::2] = min(weight, 100.0) if dtype == torch.float16 else weight
    loss = loss_type(temperature)(logits, targets, weights)
    loss.backward()
    assert loss.dtype == torch.float32
    assert torch.isfinite(loss)
    assert logits.grad is not None
    assert torch.isfinite(logits.grad).all()


@pytest.mark.parametrize("loss_type", VARIANTS.values(), ids=VARIANTS)
def test_gradient_is_finite_at_every_logit(loss_type):
    """Catches powers of a probability that rounds to 0, and log(1 - p) that rounds to log(0)."""
    logits = torch.linspace(-120, 120, 4801)[None].requires_grad_()
    for sign in (1, -1):
        loss_1 = loss_type(reduction="none")(logits, torch.full_like(logits, sign))
        (grad,) = torch.autograd.grad(loss_1.sum(), logits)
        assert torch.isfinite(loss_1).all()
        assert torch.isfinite(grad).all()
        assert (sign * grad <= 0).all()  # never away from the label


@pytest.mark.parametrize("loss_type", VARIANTS.values(), ids=VARIANTS)
def test_gradient_is_float64s(loss_type):
    """Catches a cancellation that float32 does not survive: 1 - p near 1, log near 1."""
    logits = torch.linspace(-30, 30, 301)[None]
    for sign in (1, -1):
        found = []
        for dtype in (torch.float32, torch.float64):
            s = logits.detach().to(dtype).requires_grad_()
            loss_type(reduction="sum")(s, torch.full_like(s, sign)).backward()
            assert s.grad is not None
            found.append(s.grad.double() * s.shape[1])
        torch.testing.assert_close(*found, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("loss_type", VARIANTS.values(), ids=VARIANTS)
def test_half_precision_only_rounds_the_logits(loss_type):
    """Catches a sum of 600 terms in bf16, which is off by several per cent."""
    logits, targets = batch(4, 600)
    half = logits.bfloat16()
    weights = weights_of(logits).bfloat16()
    loss = loss_type(class_weights=weights[0])
    got, wanted = loss(half, targets, weights), loss(half.double(), targets, weights.double())
    torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(loss(half, targets, weights), got, rtol=0, atol=0)


@pytest.mark.parametrize("loss_type", LOSSES)
def test_everything_ignored_is_zero_with_zero_gradient(loss_type):
    """Catches log(0) and 0 * inf in a row that the filter left without any class."""
    logits, _ = batch(3)
    logits.requires_grad_()
    targets = torch.zeros_like(logits)
    targets[1, 2] = 1
    loss_N = loss_type(reduction="none")(logits, targets)
    loss_N.sum().backward()
    assert loss_N[0] == loss_N[2] == 0 < loss_N[1]
    assert logits.grad is not None
    assert torch.count_nonzero(logits.grad) == 1


@pytest.mark.parametrize("loss_type", LOSSES)
def test_ignored_logits_have_no_influence(loss_type):
    """Catches a mask that multiplies by 0, which turns an infinite ignored logit into NaN."""
    logits, targets = batch()
    weights = weights_of(logits)
    ignored = (targets == 0) | (weights == 0)
    for value in (torch.inf, -torch.inf, torch.nan):
        wild = torch.where(ignored, value, logits).requires_grad_()
        loss = loss_type()(wild, targets, weights)
        torch.testing.assert_close(loss, loss_type()(logits, targets, weights))
        loss.backward()
        assert wild.grad is not None
        assert torch.isfinite(wild.grad).all()
        assert (wild.grad[ignored] == 0).all()


@pytest.mark.parametrize("loss_type", LOSSES)
def test_inputs_are_unchanged(loss_type):
    """Catches the authors' `logits[targets == 1] *= -1`."""
    logits, targets = batch()
    weights = weights_of(logits)
    before = logits.clone(), targets.clone(), weights.clone()
    loss_type(0.5)(logits, targets, weights)
    assert all(torch.equal(*pair) for pair in zip((logits, targets, weights), before, strict=True))


@pytest.mark.parametrize("loss_type", LOSSES)
def test_reductions(loss_type):
    """Catches a mean over kept rows, which would change the step size with the filter."""
    logits, targets = batch()
    targets[0] = 0
    loss_N = loss_type(reduction="none")(logits, targets)
    assert loss_N.shape == (5,)
    torch.testing.assert_close(loss_type(reduction="sum")(logits, targets), loss_N.sum())
    torch.testing.assert_close(loss_type(reduction="mean")(logits, targets), loss_N.sum() / 5)
    torch.testing.assert_close(loss_type()(logits[1:2], targets[1:2]), loss_N[1])
    assert loss_type()(logits[:0], targets[:0]) == 0


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.float32, torch.bfloat16])
def test_target_types_agree(dtype):
    """Catches integer targets cutting the product with the logits to integers."""
    logits, targets = batch()
    assert torch.equal(LSESignLoss()(logits, targets.to(dtype)), LSESignLoss()(logits, targets))


@pytest.mark.parametrize("scale", [None, 1.0, 100.0])
def test_lse_gradient_is_bounded_by_the_temperature(scale):
    """Catches a sum over classes, or weights as factors: the gradient must not grow with them."""
    logits, targets = batch(4, 600)
    logits.requires_grad_()
    weights = None if scale is None else scale * weights_of(logits)
    LSESignLoss(0.5, "sum")(logits, targets, weights).backward()
    assert logits.grad is not None
    assert (logits.grad.abs().sum(dim=1) <= 1 / 0.5 + 1e-5).all()


@pytest.mark.parametrize("loss_type", VARIANTS.values(), ids=VARIANTS)
def test_weights_of_one_change_nothing_and_of_zero_ignore(loss_type):
    """Catches a weight that also enters the mean, or 0 that leaves log(1 + 0) or -inf behind."""
    logits, targets = batch()
    loss = loss_type(0.7, "none")
    ones = torch.ones_like(logits)
    torch.testing.assert_close(loss(logits, targets, ones), loss(logits, targets))
    weights = (weights_of(logits) > 0).int()
    masked = torch.where(weights == 0, 0, targets)
    assert torch.equal(loss(logits, targets, weights), loss(logits, masked))
    assert torch.equal(loss(logits, targets, 0 * ones), torch.zeros(5))


@pytest.mark.parametrize("loss_type", LOSSES)
@LIMITED
@given(counts=st.lists(st.integers(0, 4), min_size=7, max_size=7))
def test_a_weight_counts_the_class_so_many_times(loss_type, counts):
    """Catches weights outside the logarithm of LSE-Sign, and a division by their sum."""
    logits, targets = batch()
    logits = logits.double()
    counted = torch.repeat_interleave(torch.arange(7), torch.tensor(counts))
    # The classes' number divides all but LSE-Sign: ignored ones make it the same.
    padding = torch.zeros(5, 28 - len(counted))
    repeated = loss_type(0.7)(
        torch.cat((logits[:, counted], padding.double()), dim=1),
        torch.cat((targets[:, counted], padding), dim=1),
    )
    weights_C = torch.tensor(counts, dtype=torch.float64)
    loss = loss_type(0.7, class_weights=weights_C)(logits, targets)
    scale = 1 if loss_type is LSESignLoss else 28 / 7
    torch.testing.assert_close(loss, scale * repeated)
    torch.testing.assert_close(loss_type(0.7)(logits, targets, weights_C.expand(5, 7)), loss)


@pytest.mark.parametrize("loss_type", VARIANTS.values(), ids=VARIANTS)
def test_label_and_class_weights_multiply_and_get_no_gradient(loss_type):
    """Catches one kind of weight that hides the other, and weights that learn to be 0."""
    logits, targets = batch()
    weights, weights_C = weights_of(logits), torch.linspace(0.5, 2, 7)
    weights.requires_grad_()
    logits.requires_grad_()
    got = loss_type(class_weights=weights_C)(logits, targets, weights)
    torch.testing.assert_close(got, loss_type()(logits, targets, weights * weights_C))
    got.backward()
    assert weights.grad is None


def test_lse_weights_tilt_the_softmax():
    """Catches the gradients' documented form: w exp(-m) / (1 + sum of w exp(-m))."""
    logits, targets = batch(1)
    targets[targets == 0] = -1
    weights = weights_of(logits) + 0.1
    logits.requires_grad_()
    LSESignLoss(0.5, "sum")(logits, targets, weights).backward()
    terms = (weights * torch.exp(-targets * logits / 0.5)).detach()
    torch.testing.assert_close(logits.grad, -targets / 0.5 * terms / (1 + terms.sum()))


def test_bce_is_torchs_without_ignored():
    """Catches another normalisation than the documented mean over N x C, or a lost weight."""
    logits, targets = batch()
    targets[targets == 0] = 1
    wanted = F.binary_cross_entropy_with_logits(logits, (targets == 1).float())
    torch.testing.assert_close(BCELoss()(logits, targets), wanted)
    weight = torch.linspace(0.5, 3, 7)
    wanted = F.binary_cross_entropy_with_logits(logits, (targets == 1).float(), pos_weight=weight)
    torch.testing.assert_close(BCELoss(positive_weight=weight)(logits, targets), wanted)


@pytest.mark.parametrize("loss_type", LOSSES)
@pytest.mark.parametrize(
    ("targets", "said"),
    [
        (torch.tensor([[2, 0]]), "2"),
        (torch.tensor([[0.5, 0]]), "0.5"),
        (torch.tensor([[math.nan, 0]]), "nan"),
        (torch.tensor([[255, 0]], dtype=torch.uint8), "255"),
        (torch.tensor([[-128, 0]], dtype=torch.int8), "-128"),
        (torch.tensor([[True, False]]), "bool"),
        (torch.tensor([[1, 0, 1]]), "(1, 3)"),
        (torch.tensor([1, 0]), "(2,)"),
        (torch.tensor([[1], [0]]), "(2, 1)"),
    ],
)
def test_wrong_targets_are_refused(loss_type, targets, said):
    """Catches 0/1 masks, class numbers and broadcasting shapes taken for labels."""
    with pytest.raises(ValueError, match=r"target") as error:
        loss_type()(torch.zeros(1, 2), targets)
    assert said in str(error.value)


@pytest.mark.parametrize("loss_type", LOSSES)
@pytest.mark.parametrize("temperature", [0, -1.0, math.nan, math.inf])
def test_wrong_temperature_is_refused(loss_type, temperature):
    """Catches a temperature that divides by zero or flips the sign of every logit."""
    with pytest.raises(ValueError, match="temperature"):
        loss_type(temperature)


def test_other_settings_are_refused():
    """Catches a misspelt setting that silently falls back to a default."""
    with pytest.raises(ValueError, match="mean, sum, none"):
        LSESignLoss(reduction="avg")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="positive_weight"):
        BCELoss(positive_weight=0.0)
    with pytest.raises(ValueError, match="positive_weight has 3"):
        BCELoss(positive_weight=torch.ones(3))(*batch())
    for setting in ({"gamma": -1.0}, {"gamma": math.inf}, {"alpha": 0.0}, {"alpha": 1.0}):
        with pytest.raises(ValueError, match=next(iter(setting))):
            FocalLoss(**setting)
    for setting in ({"gamma_neg": -1.0}, {"gamma_pos": math.nan}, {"clip": 1.0}, {"clip": -0.1}):
        with pytest.raises(ValueError, match=next(iter(setting))):
            AsymmetricLoss(**setting)
    with pytest.raises(TypeError, match="gamma"):
        make_loss("bce", parameters={"gamma": 2.0})
    with pytest.raises(ValueError, match="float"):
        LSESignLoss()(torch.zeros(1, 2, dtype=torch.long), torch.zeros(1, 2))
    with pytest.raises(ValueError, match="lse_sign, bce"):
        make_loss("lse")


def test_make_loss():
    """Catches a name that makes the other loss, or a temperature that is not passed on."""
    assert isinstance(make_loss("bce"), BCELoss)
    loss = make_loss("lse_sign", 0.25)
    assert isinstance(loss, LSESignLoss)
    assert loss.temperature == 0.25
    assert not loss.state_dict()
    assert isinstance(make_loss("focal", parameters={"gamma": 3.0}), FocalLoss)


@pytest.mark.parametrize("loss_type", LOSSES)
def test_wrong_weights_are_refused(loss_type):
    """Catches a negative or NaN weight, which would reward mistakes or spoil the weights."""
    logits, targets = batch()
    for value in (-0.5, math.nan, math.inf):
        weights = torch.ones_like(logits)
        weights[1, 2] = value
        with pytest.raises(ValueError, match=f"label_weights hold {value}"):
            loss_type()(logits, targets, weights)
        with pytest.raises(ValueError, match=f"class_weights hold {value}"):
            loss_type(class_weights=weights[1])
    with pytest.raises(ValueError, match=r"label_weights \(7,\)"):
        loss_type()(logits, targets, torch.ones(7))
    with pytest.raises(ValueError, match=r"class_weights has shape \(5, 7\)"):
        loss_type(class_weights=torch.ones(5, 7))
    with pytest.raises(ValueError, match="class_weights has 3 entries and logits 7"):
        loss_type(class_weights=torch.ones(3))(logits, targets)


@pytest.mark.parametrize("name", list(NAMES))
def test_settings_and_losses_have_the_same_defaults(name):
    """Catches a default that differs between the settings and the library."""
    config = TrainConfig.model_validate({"loss": name})
    logits, targets = batch()
    made = make_loss(name, config.loss_temperature, parameters=config.loss_parameters)
    assert made(logits, targets) == make_loss(name)(logits, targets)


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("weighted_bce", "positive_weight", 3.0),
        ("focal", "focal_gamma", 1.0),
        ("focal", "focal_alpha", None),
        ("asl", "asl_gamma_neg", 2.0),
        ("asl", "asl_gamma_pos", 1.0),
        ("asl", "asl_clip", 0.2),
    ],
)
def test_every_setting_has_effect_or_is_refused(name, field, value):
    """Catches a setting that is lost on its way, or given in vain for another loss."""
    text = "null" if value is None else value
    config = load_config(overrides=[f"train.loss={name}", f"train.{field}={text}"]).train
    logits, targets = batch()
    made = make_loss(name, parameters=config.loss_parameters)
    assert made(logits, targets) != make_loss(name)(logits, targets)
    with pytest.raises(ConfigError, match=f"{field}={value} has no effect.*set loss={name}"):
        load_config(overrides=[f"train.{field}={text}"])
