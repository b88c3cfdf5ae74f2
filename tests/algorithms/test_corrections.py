"""Rollout–training mismatch."""

from __future__ import annotations

import math

import pytest
import torch

from lightrft_lightning.algorithms import CORRECTIONS, importance_weights, mismatch_metrics, policy_loss


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


# ------------------------------------------------------------------ weights


TRAINER = torch.tensor([[-1.0, -2.0, -0.5], [-3.0, -1.0, -1.0], [-0.2, -0.3, -9.0]], dtype=torch.float64)
ENGINE = torch.tensor([[-1.5, -1.0, -0.5], [-1.0, -1.1, -1.2], [-0.2, -0.9, 7.0]], dtype=torch.float64)
MASK = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 1, 0]]).bool()


def literal(name: str, **options: float) -> list[list[float]]:
    """One sequence after the other, one token at a time."""
    rows = []
    for new, old, keep in zip(TRAINER.tolist(), ENGINE.tolist(), MASK.tolist(), strict=True):
        ratios = [math.exp(a - b) for a, b, k in zip(new, old, keep, strict=True) if k]
        whole, geometric = math.prod(ratios), math.prod(ratios) ** (1 / len(ratios))
        low, high, cap = options.get("low", 0.5), options.get("high", 2.0), options.get("cap", 2.0)
        of_token = {
            "token_truncated": lambda r, cap=cap: min(r, cap),
            "sequence_truncated": lambda r, whole=whole, cap=cap: min(whole, cap),
            "token_masked": lambda r, low=low, high=high: r if low <= r <= high else 0.0,
            "sequence_masked": lambda r, w=whole, low=low, high=high: w if low <= w <= high else 0.0,
            "geometric_masked": lambda r, g=geometric, low=low, high=high: float(low <= g <= high),
        }[name]
        rows.append([of_token(r) for r in ratios] + [0.0] * (3 - len(ratios)))
    return rows


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("token_truncated", {}),
        ("token_truncated", {"cap": 1.2}),
        ("sequence_truncated", {}),
        ("sequence_truncated", {"cap": 0.5}),
        ("token_masked", {}),
        ("token_masked", {"low": 0.1, "high": 1.5}),
        ("sequence_masked", {}),
        ("sequence_masked", {"low": 0.0, "high": 1.0}),
        ("geometric_masked", {}),
        ("geometric_masked", {"low": 0.9, "high": 1.5}),
    ],
)
def test_weights_are_their_definition(name: str, options: dict[str, float]) -> None:
    expected = torch.tensor(literal(name, **options), dtype=torch.float64)
    weights = importance_weights(name, TRAINER, ENGINE, MASK, **options)
    torch.testing.assert_close(weights, expected, rtol=1e-12, atol=1e-12)
    rows = torch.arange(3)[:, None].expand_as(MASK)
    flat = importance_weights(name, TRAINER[MASK], ENGINE[MASK], sequence=rows[MASK], **options)
    torch.testing.assert_close(flat, expected[MASK], rtol=1e-12, atol=1e-12)


def test_no_correction_is_left_out() -> None:
    names = {"token_truncated", "sequence_truncated", "token_masked", "sequence_masked", "geometric_masked"}
    assert set(CORRECTIONS) == names


@pytest.mark.parametrize("name", sorted(CORRECTIONS))
def test_where_engine_and_trainer_agree_every_token_counts_once(name: str) -> None:
    assert torch.equal(importance_weights(name, TRAINER, TRAINER, MASK), MASK.double())


@pytest.mark.parametrize("name", sorted(CORRECTIONS))
def test_a_huge_ratio_is_finite(name: str) -> None:
    weights = importance_weights(name, torch.tensor([[500.0, -500.0]]), torch.zeros(1, 2))
    assert weights.isfinite().all() and (weights <= 2).all()


def test_weights_have_no_gradient_and_scale_it() -> None:
    log_probs = TRAINER.clone().requires_grad_()
    weights = importance_weights("token_truncated", log_probs, ENGINE, MASK)
    assert not weights.requires_grad
    loss = policy_loss("reinforce", log_probs, TRAINER, torch.ones(3).double(), MASK, weights=weights).loss
    (gradient,) = torch.autograd.grad(loss, log_probs)
    torch.testing.assert_close(gradient, -weights / MASK.sum())


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("tokn_truncated", {}, "unknown correction 'tokn_truncated'. Did you mean 'token_truncated'"),
        ("token_truncated", {"high": 2.0}, "option of the correction 'token_truncated' 'high'"),
        ("token_truncated", {"cap": 0.0}, r"token_truncated\(cap=0.0\): must be above 0"),
        ("token_masked", {"low": 2.0}, r"token_masked\(low=2.0, high=2.0\): must be a range around 1"),
    ],
)
def test_what_is_wrong_is_quoted(name: str, options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        importance_weights(name, TRAINER, ENGINE, MASK, **options)
