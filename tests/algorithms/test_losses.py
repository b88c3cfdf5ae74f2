"""Policy losses and aggregations, against a transcription of the papers and against TRL."""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lightrft_lightning.algorithms import (
    POLICY_LOSSES,
    BatchTotals,
    PolicyTokens,
    TokenObjective,
    aggregation_weights,
    policy_loss,
    summarize,
)

AGGREGATIONS = ("token_mean", "sequence_mean", "sequence_sum_constant")
LIMIT = 9


def example(seed: int = 0, batch: int = 6, length: int = 7) -> dict[str, Any]:
    """Ragged sequences whose ratios lie on both sides of the clip range."""
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, length + 1, (batch,), generator=g)
    log_probs = -3 * torch.rand(batch, length, generator=g).double()
    return {
        "log_probs": log_probs.requires_grad_(),
        "old_log_probs": log_probs.detach() + 0.5 * torch.randn(batch, length, generator=g).double(),
        "advantages": torch.randn(batch, generator=g).double(),
        "mask": torch.arange(length) < lengths[:, None],
    }


def value_and_gradient(loss: Tensor, log_probs: Tensor) -> tuple[Tensor, Tensor]:
    (gradient,) = torch.autograd.grad(loss, log_probs)
    return loss.detach(), gradient


def transcription(data: dict[str, Any], aggregation: str, low: float, high: float, dual: float | None) -> Tensor:
    """The definitions, one token at a time in float64."""
    total = torch.zeros(()).double()
    for b, keep in enumerate(data["mask"]):
        advantage, terms = data["advantages"][b], []
        for t in keep.nonzero().flatten():
            ratio = torch.exp(data["log_probs"][b, t] - data["old_log_probs"][b, t])
            clipped = ratio if 1 - low <= ratio <= 1 + high else torch.tensor(1 + high if ratio > 1 else 1 - low)
            term = torch.min(ratio * advantage, clipped * advantage)
            if dual is not None and advantage < 0:
                term = torch.max(term, dual * advantage)
            terms.append(term)
        weight: float = {
            "token_mean": 1 / data["mask"].sum(),
            "sequence_mean": 1 / (len(terms) * len(data["mask"])),
            "sequence_sum_constant": 1 / (len(data["mask"]) * LIMIT),
        }[aggregation]
        total = total - weight * torch.stack(terms).sum()
    return total


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize(("low", "high", "dual"), [(0.2, 0.2, None), (0.2, 0.28, None), (0.1, 0.3, 1.5)])
def test_ppo_equals_its_definition(aggregation: str, low: float, high: float, dual: float | None) -> None:
    data = example()
    options: dict[str, Any] = {"clip_low": low, "clip_high": high, "dual_clip": dual}
    got = policy_loss("ppo", **data, aggregation=aggregation, max_length=LIMIT, **options).loss
    expected = transcription(data, aggregation, low, high, dual)
    for a, b in zip(*(value_and_gradient(x, data["log_probs"]) for x in (got, expected)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


def trl_loss(data: dict[str, Any], loss_type: str, epsilon_high: float, delta: float | None) -> Tensor:
    """TRL 1.16's own `GRPOTrainer._compute_loss`, with what it reads of the trainer and nothing else."""
    from trl import GRPOTrainer

    batch, length = data["mask"].shape
    accelerator = SimpleNamespace(
        gather=lambda x: x, reduce=lambda x, reduction: x, num_processes=1, sync_gradients=True
    )
    trainer: Any = SimpleNamespace(
        model=torch.nn.Linear(1, 1),
        args=SimpleNamespace(delta=delta, steps_per_generation=1, use_bias_correction_kl=False),
        accelerator=accelerator,
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        importance_sampling_level="token",
        beta=0.0,
        loss_type=loss_type,
        epsilon_low=0.2,
        epsilon_high=epsilon_high,
        use_vllm=False,
        current_gradient_accumulation_steps=1,
        max_completion_length=LIMIT,
        _entropy_bonus_enabled=False,
        _metrics={"train": defaultdict(list)},
        _get_per_token_logps_and_entropies=lambda *_, **__: (
            data["log_probs"],
            torch.zeros_like(data["log_probs"]),
            None,
        ),
    )
    mask = data["mask"].long()
    inputs = {
        "prompt_ids": torch.zeros(batch, 1).long(),
        "prompt_mask": torch.ones(batch, 1).long(),
        "completion_ids": torch.zeros(batch, length).long(),
        "completion_mask": mask,
        "advantages": data["advantages"],
        "old_per_token_logps": data["old_log_probs"],
        "num_items_in_batch": mask.sum(),
    }
    loss: Tensor = GRPOTrainer._compute_loss(trainer, trainer.model, inputs)
    return loss


@pytest.mark.parametrize("epsilon_high", [0.2, 0.28])
@pytest.mark.parametrize(
    ("aggregation", "loss_type"),
    [
        ("sequence_mean", "grpo"),
        ("token_mean", "bnpo"),
        ("token_mean", "dapo"),
        ("sequence_sum_constant", "dr_grpo"),
    ],
)
def test_ppo_equals_trl(aggregation: str, loss_type: str, epsilon_high: float) -> None:
    data = example(seed=1)
    got = policy_loss("ppo", **data, aggregation=aggregation, max_length=LIMIT, clip_high=epsilon_high)
    value, gradient = value_and_gradient(got.loss, data["log_probs"])
    expected, expected_gradient = value_and_gradient(trl_loss(data, loss_type, epsilon_high, None), data["log_probs"])
    assert value.item() == pytest.approx(expected.item(), abs=1e-6)
    assert (gradient - expected_gradient).norm() < 1e-5 * expected_gradient.norm()


# ------------------------------------------------------------------ one batch, however it is cut


def flatten(data: dict[str, Any]) -> PolicyTokens:
    keep = data["mask"]
    sequence = torch.arange(len(keep))[:, None].expand_as(keep)
    spread = data["advantages"][:, None].expand_as(keep)
    return PolicyTokens(data["log_probs"][keep], data["old_log_probs"][keep], spread[keep], sequence[keep])


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_micro_batches_add_up_to_the_global_batch(aggregation: str) -> None:
    data = example(seed=2, batch=8)
    whole = policy_loss("ppo", **data, aggregation=aggregation, max_length=LIMIT)
    totals = BatchTotals(int(data["mask"].sum()), 8, LIMIT)
    parts = []
    for rows in ([0], [1, 2, 3, 4, 5], [6, 7]):
        tokens = flatten({name: tensor[rows] for name, tensor in data.items()})
        objective = POLICY_LOSSES["ppo"](tokens)
        parts.append(-(aggregation_weights(aggregation, tokens.sequence, totals) * objective.value).sum())
    for a, b in zip(
        *(value_and_gradient(x, data["log_probs"]) for x in (torch.stack(parts).sum(), whole.loss)), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_flat_and_padded_are_the_same(aggregation: str) -> None:
    data = example(seed=3)
    tokens = flatten(data)
    flat = policy_loss(
        "ppo",
        tokens.log_probs,
        tokens.old_log_probs,
        tokens.advantages,
        torch.ones_like(tokens.log_probs),
        aggregation=aggregation,
        sequence=5 * tokens.sequence,  # gaps in the numbering are allowed
        max_length=LIMIT,
    )
    padded = policy_loss("ppo", **data, aggregation=aggregation, max_length=LIMIT)
    assert torch.equal(flat.loss, padded.loss)
    assert {k: v.item() for k, v in flat.metrics.items()} == {k: v.item() for k, v in padded.metrics.items()}


def test_a_flat_tensor_without_sequences_is_one_sequence() -> None:
    data = example(batch=1)
    one = {name: tensor[0] for name, tensor in data.items() if name != "advantages"}
    flat = policy_loss("ppo", advantages=data["advantages"].expand(7), aggregation="sequence_mean", **one)
    assert torch.equal(flat.loss, policy_loss("ppo", **data, aggregation="sequence_mean").loss)


def test_the_weights_sum_to_one() -> None:
    sequence = torch.tensor([0, 0, 0, 2, 4, 4])
    totals = BatchTotals(6, 3)
    assert (aggregation_weights("token_mean", sequence, totals) * torch.ones(6)).sum() == pytest.approx(1)
    weights = aggregation_weights("sequence_mean", sequence, totals)
    torch.testing.assert_close(weights, torch.tensor([1 / 9] * 3 + [1 / 3] + [1 / 6] * 2))


# ------------------------------------------------------------------ properties


@given(st.floats(-5, 5), st.floats(-3, 3).filter(lambda a: abs(a) > 1e-3), st.floats(0, 0.5), st.floats(0, 0.5))
def test_no_gradient_outside_the_clip(log_ratio: float, advantage: float, low: float, high: float) -> None:
    log_probs = torch.tensor([[log_ratio]], dtype=torch.float64, requires_grad=True)
    loss, metrics = policy_loss(
        "ppo",
        log_probs,
        torch.zeros(1, 1).double(),
        torch.tensor([advantage], dtype=torch.float64),
        torch.ones(1, 1),
        clip_low=low,
        clip_high=high,
    )
    _, gradient = value_and_gradient(loss, log_probs)
    ratio = log_probs.detach().exp().item()
    outside = (ratio > 1 + high and advantage > 0) or (ratio < 1 - low and advantage < 0)
    assert metrics["clip_fraction"] == float(outside)
    assert gradient.item() == (0 if outside else pytest.approx(-ratio * advantage, rel=1e-9))


@given(st.sampled_from(AGGREGATIONS), st.sampled_from([float("nan"), float("inf"), 1e30, -7.0]), st.integers(0, 5))
def test_masked_tokens_never_matter(aggregation: str, garbage: float, seed: int) -> None:
    data = example(seed)
    clean = policy_loss("ppo", **data, aggregation=aggregation, max_length=LIMIT)
    dirty = {**data, "advantages": data["advantages"][:, None].expand_as(data["mask"])}
    for name in ("log_probs", "old_log_probs", "advantages"):
        dirty[name] = torch.where(data["mask"], dirty[name].detach(), garbage)
    dirty["log_probs"].requires_grad_()
    result = policy_loss("ppo", **dirty, aggregation=aggregation, max_length=LIMIT)
    assert torch.equal(result.loss, clean.loss)
    assert all(torch.equal(result.metrics[name], value) for name, value in clean.metrics.items())
    _, gradient = value_and_gradient(result.loss, dirty["log_probs"])
    assert torch.equal(gradient[data["mask"]], value_and_gradient(clean.loss, data["log_probs"])[1][data["mask"]])
    assert (gradient[~data["mask"]] == 0).all()


def test_on_policy_it_is_the_policy_gradient() -> None:
    data = example()
    data["old_log_probs"] = data["log_probs"].detach()
    loss, metrics = policy_loss("ppo", **data)
    expected = -(data["log_probs"] * data["advantages"][:, None])[data["mask"]].mean()
    torch.testing.assert_close(
        value_and_gradient(loss, data["log_probs"])[1], value_and_gradient(expected, data["log_probs"])[1]
    )
    assert (metrics["clip_fraction"], metrics["ratio_mean"], metrics["ratio_max"]) == (0, 1, 1)
    assert metrics["approx_kl"] == 0


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_a_fully_masked_batch_is_zero_and_not_nan(aggregation: str) -> None:
    data = {**example(), "mask": torch.zeros(6, 7)}
    loss, metrics = policy_loss("ppo", **data, aggregation=aggregation, max_length=LIMIT)
    value, gradient = value_and_gradient(loss, data["log_probs"])
    assert value == 0 and (gradient == 0).all()
    assert metrics == {}


def test_a_huge_ratio_is_finite() -> None:
    log_probs = torch.tensor([[200.0, -200.0]], requires_grad=True)
    loss = policy_loss("ppo", log_probs, torch.zeros(1, 2), torch.tensor([-1.0]), torch.ones(1, 2)).loss
    value, gradient = value_and_gradient(loss, log_probs)
    assert torch.isfinite(value) and torch.isfinite(gradient).all()
    assert policy_loss("ppo", log_probs, torch.zeros(1, 2), torch.zeros(1), torch.ones(1, 2)).loss == 0


def test_dual_clip_bounds_the_loss_of_bad_samples() -> None:
    log_probs = torch.full((1, 1), 3.0, requires_grad=True)
    arguments = (log_probs, torch.zeros(1, 1), torch.tensor([-2.0]), torch.ones(1, 1))
    assert policy_loss("ppo", *arguments).loss > 6
    loss, metrics = policy_loss("ppo", *arguments, dual_clip=3.0)
    value, gradient = value_and_gradient(loss, log_probs)
    assert (value, gradient.item(), metrics["clip_fraction"]) == (6, 0, 1)


def test_metrics() -> None:
    log_ratio = torch.tensor([[0.0, 0.1, -0.5]])
    metrics = policy_loss("ppo", log_ratio, torch.zeros(1, 3), torch.tensor([-1.0]), torch.ones(1, 3)).metrics
    assert metrics["clip_fraction"] == pytest.approx(1 / 3)
    assert metrics["ratio_mean"] == pytest.approx(log_ratio.exp().mean().item())
    assert metrics["ratio_max"] == pytest.approx(log_ratio.exp().max().item())
    # KL(old || new), estimated on tokens of the old policy
    assert metrics["approx_kl"] == pytest.approx((log_ratio.exp() - 1 - log_ratio).mean().item(), rel=1e-4)
    assert summarize({"mine": torch.tensor([1.0, 3.0])}) == {"mine": 2.0}


# ------------------------------------------------------------------ bad input


def test_unknown_names_and_options_name_the_nearest() -> None:
    data = example()
    with pytest.raises(ValueError, match=r"unknown policy loss 'pppo'. Did you mean 'ppo'"):
        policy_loss("pppo", **data)
    with pytest.raises(ValueError, match=r"unknown aggregation 'tokn_mean'. Did you mean 'token_mean'"):
        policy_loss("ppo", **data, aggregation="tokn_mean")
    with pytest.raises(ValueError, match=r"option of the policy loss 'ppo' 'clip_hi'. Did you mean 'clip_high'"):
        policy_loss("ppo", **data, clip_hi=0.3)


def test_values_out_of_range() -> None:
    data = example()
    with pytest.raises(ValueError, match=r"ppo\(clip_low=-0.1, clip_high=0.2\): must be 0 or more"):
        policy_loss("ppo", **data, clip_low=-0.1)
    with pytest.raises(ValueError, match=r"ppo\(dual_clip=0.5\): must be above 1"):
        policy_loss("ppo", **data, dual_clip=0.5)
    with pytest.raises(ValueError, match="'sequence_sum_constant' divides by the length limit: give max_length="):
        policy_loss("ppo", **data, aggregation="sequence_sum_constant")


def test_shapes_that_differ() -> None:
    data = example()
    with pytest.raises(ValueError, match=r"mask has shape \(6, 3\), log_probs \(6, 7\)"):
        policy_loss("ppo", **{**data, "mask": data["mask"][:, :3]})
    with pytest.raises(ValueError, match=r"advantages has shape \(5, 7\), log_probs \(6, 7\)"):
        policy_loss("ppo", **{**data, "advantages": data["advantages"][:5]})


def test_a_users_own_loss() -> None:
    @POLICY_LOSSES.register("test_plain")
    def plain(tokens: PolicyTokens, *, scale: float = 1.0) -> TokenObjective:
        return TokenObjective(scale * tokens.log_probs * tokens.advantages, {})

    data = example()
    loss = policy_loss("test_plain", **data, scale=2.0).loss
    expected = -2 * (data["log_probs"] * data["advantages"][:, None])[data["mask"]].mean()
    torch.testing.assert_close(loss, expected)
