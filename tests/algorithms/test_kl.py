"""KL estimators."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lightrft_lightning.algorithms import KL_ESTIMATORS, kl_penalty


def test_formulas() -> None:
    log_probs, ref = torch.tensor([-1.0, -2.0, -0.5]).double(), torch.tensor([-1.5, -1.0, -0.5]).double()
    x = log_probs - ref
    torch.testing.assert_close(kl_penalty("k1", log_probs, ref), x)
    torch.testing.assert_close(kl_penalty("k2", log_probs, ref), 0.5 * x**2)
    torch.testing.assert_close(kl_penalty("k3", log_probs, ref), torch.exp(-x) - 1 + x)


@pytest.mark.parametrize("name", ["k1", "k3"])
def test_the_mean_over_samples_is_the_kl(name: str) -> None:
    torch.manual_seed(0)
    policy, ref = torch.randn(2, 6).double().log_softmax(-1)
    exact = (policy.exp() * (policy - ref)).sum()
    tokens = torch.multinomial(policy.exp(), 200_000, replacement=True)
    assert kl_penalty(name, policy[tokens], ref[tokens]).mean() == pytest.approx(exact.item(), rel=0.03)


def test_the_gradient_of_k2_is_that_of_the_kl() -> None:
    """Weighted by the policy's own probabilities, so without sampling noise."""
    torch.manual_seed(0)
    logits = torch.randn(6).double().requires_grad_()
    ref = torch.randn(6).double().log_softmax(-1)
    policy = logits.log_softmax(-1)
    (expected,) = torch.autograd.grad((policy.exp() * (policy - ref)).sum(), logits, retain_graph=True)
    (got,) = torch.autograd.grad((policy.detach().exp() * kl_penalty("k2", policy, ref)).sum(), logits)
    torch.testing.assert_close(got, expected)


def value_and_slope(name: str, x: float) -> tuple[Tensor, Tensor]:
    log_probs = torch.tensor([x], requires_grad=True)
    value = kl_penalty(name, log_probs, torch.zeros(1))
    (slope,) = torch.autograd.grad(value.sum(), log_probs)
    return value.detach(), slope


@given(st.floats(-1e4, 1e4))
def test_k3_stays_finite_and_pulls_towards_the_reference(x: float) -> None:
    value, slope = value_and_slope("k3", x)
    assert torch.isfinite(value) and torch.isfinite(slope)
    assert value >= -1e-7
    assert slope * x >= 0


def test_k3_is_exact_up_to_its_bound_and_monotone_beyond() -> None:
    value, slope = value_and_slope("k3", -19.0)
    x = torch.tensor(19.0).double()
    torch.testing.assert_close(value[0].double(), x.exp() - 1 - x, rtol=1e-6, atol=0)
    torch.testing.assert_close(slope[0].double(), 1 - x.exp(), rtol=1e-6, atol=0)
    values = [value_and_slope("k3", -x)[0].item() for x in (19.9, 20.0, 20.1, 50.0, 500.0)]
    assert values == sorted(values) and len(set(values)) == 5


def test_an_unknown_name_and_different_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"unknown KL estimator 'k4'. Did you mean 'k"):
        kl_penalty("k4", torch.zeros(2), torch.zeros(2))
    with pytest.raises(ValueError, match=r"log_probs \(2,\) and ref_log_probs \(2, 1\) differ"):
        kl_penalty("k1", torch.zeros(2), torch.zeros(2, 1))


def test_the_table() -> None:
    assert list(KL_ESTIMATORS) == ["k1", "k2", "k3"]


@pytest.mark.parametrize("name", ["k1", "k2", "k3"])
def test_by_choice_every_estimator_has_the_gradient_of_the_kl(name: str) -> None:
    torch.manual_seed(0)
    logits = torch.randn(6).double().requires_grad_()
    ref = torch.randn(6).double().log_softmax(-1)
    policy = logits.log_softmax(-1)
    (expected,) = torch.autograd.grad((policy.exp() * (policy - ref)).sum(), logits, retain_graph=True)
    value = kl_penalty(name, policy, ref, unbiased_gradient=True)
    torch.testing.assert_close(value, kl_penalty(name, policy, ref))
    (got,) = torch.autograd.grad((policy.detach().exp() * value).sum(), logits)
    torch.testing.assert_close(got, expected)
