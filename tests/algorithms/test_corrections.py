"""Rollout–training mismatch."""

from __future__ import annotations

import math

import pytest
import torch

from lightrft_lightning.algorithms import mismatch_metrics


def test_definitions() -> None:
    trainer = torch.tensor([-1.0, -2.0, -3.0, math.nan], requires_grad=True)
    engine = torch.tensor([-1.0, -2.5, -2.0, -1.0])
    result = mismatch_metrics(trainer, engine, mask=torch.tensor([1, 1, 1, 0]))
    assert result["mismatch_mean"] == pytest.approx(0.5)
    assert result["mismatch_max"] == pytest.approx(1.0)
    k3 = [math.exp(d) - 1 - d for d in (0.0, 0.5, -1.0)]
    assert result["mismatch_kl"] == pytest.approx(sum(k3) / 3, rel=1e-6)
    assert result["mismatch_outside"] == pytest.approx(1 / 3)  # e^0.5 < 2, e^-1 < 1/2
    assert not any(value.requires_grad for value in result.values())


def test_the_kl_is_that_from_the_engine_to_the_trainer() -> None:
    torch.manual_seed(0)
    engine, trainer = torch.randn(2, 5).double().log_softmax(-1)
    tokens = torch.multinomial(engine.exp(), 200_000, replacement=True)
    got = mismatch_metrics(trainer[tokens], engine[tokens])["mismatch_kl"]
    assert got.item() == pytest.approx((engine.exp() * (engine - trainer)).sum().item(), rel=0.03)


def test_equal_policies_and_no_tokens() -> None:
    same = torch.tensor([-1.0, -2.0])
    assert all(value == 0 for value in mismatch_metrics(same, same).values())
    assert mismatch_metrics(same, same, mask=torch.zeros(2)) == {}


def test_shapes() -> None:
    with pytest.raises(ValueError, match=r"trainer_logprobs has shape \(2,\), engine_logprobs \(3,\)"):
        mismatch_metrics(torch.zeros(2), torch.zeros(3))
