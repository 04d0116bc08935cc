"""Losses against scalar loops in float64, gradients against central differences, padded against packed."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from pmdflow.learner.objective import (
    ctpo_loss,
    grpo_loss,
    gspo_loss,
    importance_weights,
    pmd_loss,
    pmd_squared,
    sequence_log_ratio,
    sequence_weights,
    token_pmd_loss,
    veto,
    weighted_sft_loss,
)
from tests.support.numeric import assert_close

torch.set_num_threads(1)
LENGTHS = [5, 1, 0, 7, 4]
TAU = 0.3
ROUNDINGS = 64
"""Of a loss: sums over at most 7 tokens, then 5 sequences, each of some operations."""
SIZE = 10.0
"""Of ratios and advantages of random normal numbers."""


class Case:
    """Five sequences: a mixed one, one of a single token, an empty one, one only trained at its end, one untrained."""

    def __init__(self, *, spread: float = 0.3, dtype: torch.dtype = torch.float64) -> None:
        random = torch.Generator().manual_seed(5)
        width = max(LENGTHS)
        self.shape = (len(LENGTHS), width)
        self.gen = torch.arange(width) < torch.tensor(LENGTHS)[:, None]
        self.gen[0, 2] = False  # an observed token
        self.mask = self.gen.clone()
        self.mask[3, :4] = False
        self.mask[4] = False
        self.lp = (-1 + spread * torch.randn(self.shape, generator=random, dtype=torch.float64)).to(dtype)
        self.ref = (-1 + spread * torch.randn(self.shape, generator=random, dtype=torch.float64)).to(dtype)
        self.adv = torch.randn(len(LENGTHS), generator=random, dtype=torch.float64).to(dtype)
        self.weights = torch.rand(len(LENGTHS), generator=random, dtype=torch.float64).to(dtype)
        self.cu = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0).tolist()])

    def pack(self, tensor: torch.Tensor) -> torch.Tensor:
        return torch.cat([row[:length] for row, length in zip(tensor, LENGTHS, strict=True)])


def losses(case: Case):
    """name -> f(lp, ref, gen, mask, cu): the function, everything else fixed."""
    adv, weights = case.adv, case.weights

    def pmd(aggregation, norm_length=None, scoped=True):
        return lambda lp, ref, gen, mask, cu: pmd_loss(
            lp,
            ref,
            adv,
            mask,
            tau=TAU,
            aggregation=aggregation,
            weights=weights,
            cu_seqlens=cu,
            generated_mask=gen if scoped else None,
            norm_length=norm_length,
        )

    return {
        "pmd": pmd("seq-mean-token-mean"),
        "pmd-trained-scope": pmd("seq-mean-token-mean", scoped=False),
        "pmd-sum": pmd("seq-mean-token-sum"),
        "pmd-norm": pmd("seq-mean-token-sum-norm", norm_length=64),
        "token": lambda lp, ref, gen, mask, cu: token_pmd_loss(
            lp, ref, adv, mask, alpha=-0.2, beta=0.25, tau=TAU, cu_seqlens=cu
        ),
        "ctpo": lambda lp, ref, gen, mask, cu: ctpo_loss(lp, ref, adv, mask, eps_low=0.2, eps_high=0.28, cu_seqlens=cu),
        "sft": lambda lp, ref, gen, mask, cu: weighted_sft_loss(lp, mask, weights, cu_seqlens=cu),
        "grpo": lambda lp, ref, gen, mask, cu: grpo_loss(lp, ref, adv, mask, eps_high=0.28, cu_seqlens=cu),
        "gspo": lambda lp, ref, gen, mask, cu: gspo_loss(
            lp, ref, adv, mask, eps_low=0.05, eps_high=0.05, cu_seqlens=cu
        ),
    }


NAMES = list(losses(Case()))


def expected(name: str, case: Case) -> float:
    """The definition, token by token, in plain Python."""
    rows, token_terms = [], []
    for i in range(len(LENGTHS)):
        trained = [t for t in range(case.shape[1]) if case.mask[i, t]]
        if not trained:
            continue
        adv, weight = float(case.adv[i]), float(case.weights[i])
        ratio = {t: float(case.lp[i, t] - case.ref[i, t]) for t in range(case.shape[1])}
        scope = trained if name == "pmd-trained-scope" else [t for t in range(case.shape[1]) if case.gen[i, t]]
        if name.startswith("pmd"):
            u = sum(ratio[t] for t in scope)
            divisor = {"pmd-sum": 1, "pmd-norm": 64}.get(name, len(scope))
            rows.append(weight * TAU / 2 * (adv / TAU - u) ** 2 / divisor)
        elif name == "token":
            token_terms += [
                -(min(max(math.exp(ratio[t]), math.exp(-0.2)), math.exp(0.25)) * adv - TAU * ratio[t] ** 2)
                for t in trained
            ]
        elif name == "sft":
            rows.append(-weight * sum(float(case.lp[i, t]) for t in trained) / len(trained))
        elif name == "gspo":
            s = math.exp(sum(ratio[t] for t in trained) / len(trained))
            rows.append(-min(s * adv, min(max(s, 0.95), 1.05) * adv))
        else:
            total, values = 0.0, []
            for count, t in enumerate(trained, 1):
                total = total + ratio[t] if name == "ctpo" else ratio[t]
                root = math.sqrt(count)
                low, high = (math.exp(-0.2 * root), math.exp(0.28 * root)) if name == "ctpo" else (0.8, 1.28)
                rho = math.exp(total)
                values.append(min(rho * adv, min(max(rho, low), high) * adv))
            rows.append(-sum(values) / len(values))
    return sum(token_terms) / len(token_terms) if token_terms else sum(rows) / len(rows)


@pytest.mark.parametrize("name", NAMES)
def test_value_is_the_definition(name):
    case = Case()
    value = losses(case)[name](case.lp, case.ref, case.gen, case.mask, None)
    assert_close(value, expected(name, case), roundings=ROUNDINGS, size=SIZE, dtype="float64")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_packed_equals_padded_in_value_and_gradient(name, dtype):
    case = Case(dtype=getattr(torch, dtype))
    function = losses(case)[name]
    padded = case.lp.clone().requires_grad_()
    value = function(padded, case.ref, case.gen, case.mask, None)
    value.backward()
    packed = case.pack(case.lp).clone().requires_grad_()
    other = function(packed, case.pack(case.ref), case.pack(case.gen), case.pack(case.mask), case.cu)
    other.backward()
    assert_close(other.detach(), value.detach(), roundings=ROUNDINGS, size=SIZE, dtype=dtype)
    assert_close(packed.grad, case.pack(padded.grad), roundings=ROUNDINGS, size=SIZE, dtype=dtype)


@pytest.mark.parametrize("name", NAMES)
def test_gradient_against_central_differences(name):
    case = Case()
    function = losses(case)[name]
    lp = case.lp.clone().requires_grad_()
    function(lp, case.ref, case.gen, case.mask, None).backward()
    assert (lp.grad[~case.mask] == 0).all()
    for i, t in case.mask.nonzero().tolist():
        step = torch.zeros_like(case.lp)
        step[i, t] = 1e-6
        args = (case.ref, case.gen, case.mask, None)
        slope = (function(case.lp + step, *args) - function(case.lp - step, *args)) / 2e-6
        assert float(lp.grad[i, t]) == pytest.approx(float(slope), rel=1e-5, abs=1e-8)


def test_pmd_gradient_is_the_one_of_the_paper():
    """-w_i (A_i - tau u_i) / (B L_i) at each trained token, u and L over all that was generated."""
    case = Case()
    lp = case.lp.clone().requires_grad_()
    losses(case)["pmd"](lp, case.ref, case.gen, case.mask, None).backward()
    active = case.mask.any(1)
    u = torch.where(case.gen, case.lp - case.ref, 0.0).sum(1)
    per_token = -case.weights * (case.adv - TAU * u) / (active.sum() * case.gen.sum(1).clamp(min=1))
    torch.testing.assert_close(lp.grad, torch.where(case.mask, per_token[:, None], 0.0))
    torch.testing.assert_close(sequence_log_ratio(case.lp, case.ref, case.gen), u)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_masked_is_never_read(name):
    case = Case()
    function = losses(case)[name]
    clean = case.lp.clone().requires_grad_()
    value = function(clean, case.ref, case.gen, case.mask, None)
    value.backward()
    outside = ~case.gen | ~case.mask.any(1)[:, None]
    for bad in (-math.inf, math.nan):
        lp = torch.where(outside, bad, case.lp).requires_grad_()
        ref = torch.where(outside, bad, case.ref)
        dirty = function(lp, ref, case.gen, case.mask, None)
        dirty.backward()
        assert dirty.item() == value.item()
        torch.testing.assert_close(lp.grad, clean.grad, rtol=0, atol=0)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("packed", [False, True])
def test_nothing_trained_is_zero_with_zero_gradient(name, packed):
    case = Case()
    nothing = torch.zeros_like(case.mask)
    tensors = [torch.full_like(case.lp, -math.inf), case.ref, case.gen, nothing]
    if packed:
        tensors = [case.pack(tensor) for tensor in tensors]
    lp = tensors[0].requires_grad_()
    value = losses(case)[name](lp, *tensors[1:], case.cu if packed else None)
    value.backward()
    assert value.item() == 0.0
    assert (lp.grad == 0).all()


def test_extreme_values_stay_finite():
    lp = torch.tensor([[-2000.0, -0.1, -300.0]], requires_grad=True)
    ref = torch.tensor([[-0.1, -2000.0, -0.1]])
    mask = torch.ones(1, 3, dtype=torch.bool)
    for adv in (torch.tensor([1e4]), torch.tensor([-1e4])):
        for value in (
            pmd_loss(lp, ref, adv, mask, tau=1e-4),
            token_pmd_loss(lp, ref, adv, mask, alpha=-1.0, beta=1.0, tau=1e-4),
            ctpo_loss(lp, ref, adv, mask, eps_low=0.2, eps_high=0.2),
            grpo_loss(lp, ref, adv, mask),
            gspo_loss(lp, ref, adv, mask),
        ):
            (gradient,) = torch.autograd.grad(value, lp)
            assert torch.isfinite(value)
            assert torch.isfinite(gradient).all()


def test_half_precision_log_probs_are_summed_in_float32_and_advantages_may_be_numpy():
    torch.manual_seed(0)
    lp, ref = (-torch.rand(1, 4096)).bfloat16(), (-torch.rand(1, 4096)).bfloat16()
    mask = torch.ones(1, 4096, dtype=torch.bool)
    value = pmd_loss(lp, ref, np.array([1.0]), mask, tau=0.1)
    exact = pmd_loss(lp.double(), ref.double(), [1.0], mask, tau=0.1)
    log_ratios = lp.double() - ref.double()
    moves = float((1.0 - 0.1 * log_ratios.sum()).abs()) / 4096  # |A - tau u| / L, the derivative by u
    assert_close(value, exact, roundings=12, size=float(log_ratios.abs().sum()) * moves)  # 12: sums go in pairs


@pytest.mark.parametrize("name", NAMES)
def test_autograd_gradcheck(name):
    case = Case()
    function = losses(case)[name]
    lp = case.lp.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: function(x, case.ref, case.mask, case.mask, None), (lp,), atol=1e-7)


def test_token_pmd_has_no_policy_gradient_outside_the_band():
    lp = torch.tensor([[0.5, -0.5, 0.05]], dtype=torch.float64, requires_grad=True)
    ref, mask = torch.zeros(1, 3, dtype=torch.float64), torch.ones(1, 3, dtype=torch.bool)
    for adv in (2.0, -2.0):
        value = token_pmd_loss(lp, ref, torch.tensor([adv]), mask, alpha=-0.1, beta=0.1, tau=0.0)
        (gradient,) = torch.autograd.grad(value, lp)
        assert gradient[0, :2].tolist() == [0.0, 0.0]
        assert float(gradient[0, 2]) == pytest.approx(-adv * math.exp(0.05) / 3)


def test_weights_do_not_change_the_denominator():
    case = Case()
    args = (case.lp, case.ref, case.adv, case.mask)
    whole = pmd_loss(*args, tau=TAU, weights=torch.ones(5))
    assert float(whole) == float(pmd_loss(*args, tau=TAU))
    halved = pmd_loss(*args, tau=TAU, weights=torch.full((5,), 0.5))
    assert float(halved) == pytest.approx(float(whole) / 2)


def test_pmd_squared():
    value = pmd_squared(torch.tensor([1.0, -0.5]), torch.tensor([0.5, 2.0]), tau=0.1)
    assert float(value) == pytest.approx(((1 - 0.05) ** 2 + (-0.5 - 0.2) ** 2) / 2)


def test_norm_length_defaults_to_the_padded_width_and_packed_needs_it():
    case = Case()
    args = (case.lp, case.ref, case.adv, case.mask)
    total = pmd_loss(*args, tau=TAU, aggregation="seq-mean-token-sum")
    norm = pmd_loss(*args, tau=TAU, aggregation="seq-mean-token-sum-norm")
    assert float(norm) == pytest.approx(float(total) / case.shape[1])
    packed = [case.pack(tensor) for tensor in (case.lp, case.ref, case.mask)]
    with pytest.raises(ValueError, match="norm_length"):
        pmd_loss(
            packed[0],
            packed[1],
            case.adv,
            packed[2],
            tau=TAU,
            aggregation="seq-mean-token-sum-norm",
            cu_seqlens=case.cu,
        )


@pytest.mark.parametrize("packed", [False, True])
def test_importance_weights(packed):
    case = Case(spread=1.0)
    lp = case.lp.clone().requires_grad_()
    args = [lp, case.ref, case.mask]
    cu = case.cu if packed else None
    if packed:
        args = [case.pack(tensor) for tensor in args]
    lay = case.pack if packed else (lambda tensor: tensor)
    log_ratio = torch.where(case.mask, case.lp - case.ref, 0.0)

    token = importance_weights(*args, cu_seqlens=cu)
    torch.testing.assert_close(token, lay(torch.where(case.mask, log_ratio.exp().clamp(max=2.0), 0.0)))
    assert not token.requires_grad
    row = log_ratio.sum(1).exp().clamp(max=1.5)
    sequence = importance_weights(*args, level="sequence", cap=1.5, cu_seqlens=cu)
    torch.testing.assert_close(sequence, lay(torch.where(case.mask, row[:, None], 0.0)))
    normal = importance_weights(*args, normalize=True, cu_seqlens=cu)
    assert float(normal[args[2]].mean()) == pytest.approx(1.0)
    normal = importance_weights(*args, level="sequence", normalize=True, cu_seqlens=cu)
    means = sequence_weights(normal, args[2], cu_seqlens=cu)
    assert float(means[case.mask.any(1)].mean()) == pytest.approx(1.0)


def test_importance_weights_and_veto_are_bounded():
    old = torch.tensor([[-0.5, -math.inf], [-30.0, -1.0], [-0.1, -0.1]])
    behavior = torch.tensor([[-0.5, 0.0], [-0.1, -1.0], [-500.0, -0.1]])
    mask = torch.tensor([[1, 0], [1, 1], [1, 1]])
    weights = importance_weights(old, behavior, mask)
    assert weights[0].tolist() == [1.0, 0.0]
    assert float(weights[1, 0]) == pytest.approx(math.exp(-20))
    assert float(weights[2, 0]) == 2.0
    assert veto(old, behavior, mask).tolist() == [False, True, False]


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda x, a, m: pmd_loss(x, x, a, m, tau=0.0), "tau"),
        (lambda x, a, m: pmd_loss(x, x, a, m, tau=1.0, aggregation="mean"), "aggregation"),
        (lambda x, a, m: pmd_loss(x[0], x[0], a, m[0], tau=1.0), "cu_seqlens"),
        (lambda x, a, m: pmd_loss(x, x, a[:1], m, tau=1.0), "each of 2 sequences"),
        (lambda x, a, m: token_pmd_loss(x, x, a, m, alpha=0.1, beta=0.2, tau=1.0), "alpha"),
        (lambda x, a, m: ctpo_loss(x, x, a, m, eps_low=0.0, eps_high=0.2), "eps_low"),
        (lambda x, a, m: importance_weights(x, x, m, cap=0.0), "cap"),
        (lambda x, a, m: importance_weights(x, x, m, level="row"), "level"),
    ],
)
def test_wrong_arguments_are_named(call, match):
    with pytest.raises(ValueError, match=match):
        call(torch.zeros(2, 3), torch.zeros(2), torch.ones(2, 3))
