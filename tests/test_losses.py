"""LSE-Sign and BCE against plain references, at extremes and under an ignore mask."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F  # noqa: N812

from hts_ray.losses import BCELoss, LSESignLoss, make_loss

LOSSES = [LSESignLoss, BCELoss]
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


def batch(rows: int = 5, classes: int = 7, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(rows, classes, generator=generator)
    targets = torch.randint(-1, 2, (rows, classes), generator=generator)
    return logits, targets


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


@pytest.mark.parametrize("loss_type", LOSSES)
def test_gradient_is_the_numerical_one(loss_type):
    """Catches a detach, an in-place edit or a float32 cast that breaks the chain rule."""
    logits, targets = batch()
    logits = logits.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda s: loss_type(0.7, "none")(s, targets), (logits,))


@pytest.mark.parametrize("loss_type", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("temperature", [1.0, 0.01])
def test_finite_at_extreme_logits(loss_type, dtype, temperature):
    """Catches exp() without the log-sum-exp shift, and arithmetic in half precision."""
    logits = torch.tensor([[1e4, -1e4, 1e4, -1e4], [-1e4] * 4], dtype=dtype, requires_grad=True)
    targets = torch.tensor([[1, 1, -1, -1], [1, 0, 0, -1]])
    loss = loss_type(temperature)(logits, targets)
    loss.backward()
    assert loss.dtype == torch.float32
    assert torch.isfinite(loss)
    assert logits.grad is not None
    assert torch.isfinite(logits.grad).all()


@pytest.mark.parametrize("loss_type", LOSSES)
def test_half_precision_only_rounds_the_logits(loss_type):
    """Catches a sum of 600 terms in bf16, which is off by several per cent."""
    logits, targets = batch(4, 600)
    half = logits.bfloat16()
    got, wanted = loss_type()(half, targets), loss_type()(half.double(), targets)
    torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(loss_type()(half, targets), got, rtol=0, atol=0)


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
    wild = torch.where(targets == 0, torch.inf, logits).requires_grad_()
    loss = loss_type()(wild, targets)
    torch.testing.assert_close(loss, loss_type()(logits, targets))
    loss.backward()
    assert wild.grad is not None
    assert torch.isfinite(wild.grad).all()


@pytest.mark.parametrize("loss_type", LOSSES)
def test_inputs_are_unchanged(loss_type):
    """Catches the authors' `logits[targets == 1] *= -1`."""
    logits, targets = batch()
    logits_before, targets_before = logits.clone(), targets.clone()
    loss_type(0.5)(logits, targets)
    assert torch.equal(logits, logits_before)
    assert torch.equal(targets, targets_before)


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


def test_lse_gradient_is_bounded_by_the_temperature():
    """Catches a sum over classes: the gradient of an image must not grow with C."""
    logits, targets = batch(4, 600)
    logits.requires_grad_()
    LSESignLoss(0.5, "sum")(logits, targets).backward()
    assert logits.grad is not None
    assert (logits.grad.abs().sum(dim=1) <= 1 / 0.5 + 1e-5).all()


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
