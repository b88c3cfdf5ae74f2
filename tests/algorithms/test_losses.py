"""Policy losses and aggregations: the papers, written out one token at a time in float64, and TRL 1.16's own loss."""

from __future__ import annotations

import math
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
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


def trl_loss(
    data: dict[str, Any],
    loss_type: str,
    epsilon_high: float,
    delta: float | None = None,
    importance_sampling_level: str = "token",
) -> Tensor:
    """TRL 1.16's own `GRPOTrainer._compute_loss`, with what it reads of the trainer and nothing else."""
    from trl import GRPOTrainer

    batch, length = data["mask"].shape
    accelerator = SimpleNamespace(
        gather=lambda x: x, reduce=lambda x, reduction: x, num_processes=1, sync_gradients=True
    )
    trainer: Any = SimpleNamespace(
        model=torch.nn.Linear(1, 1),
        args=SimpleNamespace(
            delta=delta,
            steps_per_generation=1,
            use_bias_correction_kl=False,
            sapo_temperature_pos=1.0,
            sapo_temperature_neg=1.05,
        ),
        accelerator=accelerator,
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        importance_sampling_level=importance_sampling_level,
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


# ------------------------------------------------------------------ the papers, a token at a time in float64


def sgn(x: Tensor) -> float:
    return 1.0 if x > 0 else -1.0


def clip(x: Tensor, low: float, high: float) -> Tensor:
    return x if low <= x <= high else x.new_tensor(low if x < low else high)


def ppo(
    new: Tensor, old: Tensor, a: Tensor, low: float = 0.2, high: float = 0.2, dual: float = math.inf
) -> list[Tensor]:
    """1707.06347, equation 7; the dual clip is 1912.09729, equation 5."""
    ratios = [torch.exp(x - y) for x, y in zip(new, old, strict=True)]
    terms = [torch.min(r * a, clip(r, 1 - low, 1 + high) * a) for r in ratios]
    return [torch.max(term, dual * a) if a < 0 else term for term in terms]


def gspo(new: Tensor, old: Tensor, a: Tensor, low: float = 3e-4, high: float = 4e-4) -> list[Tensor]:
    """2507.18071, equations 5 and 7: one term a sequence, with the likelihood ratio to the power 1 / length."""
    s = (torch.exp(new.sum()) / torch.exp(old.sum())) ** (1 / len(new))
    return [torch.min(s * a, clip(s, 1 - low, 1 + high) * a)] * len(new)


def gmpo(new: Tensor, old: Tensor, a: Tensor, low: float = 0.4, high: float = 0.4) -> list[Tensor]:
    """2507.20673, equation 4: the product of |min(ratio A, clip(ratio) A)| to the power 1 / length, times sgn(A)."""
    product = torch.ones(()).double()
    for x, y in zip(new, old, strict=True):
        ratio = torch.exp(x - y)
        product = product * torch.min(ratio * a, clip(ratio, math.exp(-low), math.exp(high)) * a).abs()
    return [product ** (1 / len(new)) * sgn(a)] * len(new)


def cispo(new: Tensor, old: Tensor, a: Tensor, low: float = 1.0, high: float = 0.28) -> list[Tensor]:
    """2506.13585, equation 4."""
    return [clip(torch.exp(x - y), 1 - low, 1 + high).detach() * a * x for x, y in zip(new, old, strict=True)]


def sapo(new: Tensor, old: Tensor, a: Tensor, pos: float = 1.0, neg: float = 1.05) -> list[Tensor]:
    """2511.20347: sigma(tau (r - 1)) 4 / tau."""
    tau = pos if a > 0 else neg
    return [1 / (1 + torch.exp(-tau * (torch.exp(x - y) - 1))) * 4 / tau * a for x, y in zip(new, old, strict=True)]


def cpgd(new: Tensor, old: Tensor, a: Tensor, low: float = 0.2, high: float = 0.2, c: float = 1e-3) -> list[Tensor]:
    """2505.12504: the clipped log-ratio, less the drift KL(old || new)."""
    terms = []
    for x, y in zip(new, old, strict=True):
        log_ratio = x - y
        clipped = clip(log_ratio, math.log(1 - low), math.log(1 + high))
        drift = torch.exp(log_ratio) - 1 - log_ratio
        terms.append(torch.min(log_ratio * a, clipped * a) - c * drift)
    return terms


def reinforce(new: Tensor, old: Tensor, a: Tensor) -> list[Tensor]:
    return [a * x for x in new]


CASES: list[tuple[Any, dict[str, float], tuple[float, ...]]] = [
    (ppo, {}, ()),
    (ppo, {"clip_low": 0.1, "clip_high": 0.3}, (0.1, 0.3)),
    (ppo, {"clip_low": 0.1, "clip_high": 0.3, "dual_clip": 1.5}, (0.1, 0.3, 1.5)),
    (gspo, {}, ()),
    (gspo, {"clip_low": 0.1, "clip_high": 0.05}, (0.1, 0.05)),
    (gmpo, {}, ()),
    (gmpo, {"clip_low": 0.2, "clip_high": 0.1}, (0.2, 0.1)),
    (cispo, {}, ()),
    (cispo, {"clip_low": 0.2, "clip_high": 0.1}, (0.2, 0.1)),
    (sapo, {}, ()),
    (sapo, {"tau_pos": 2.0, "tau_neg": 0.5}, (2.0, 0.5)),
    (cpgd, {}, ()),
    (cpgd, {"clip_low": 0.1, "clip_high": 0.3, "drift_coef": 0.5}, (0.1, 0.3, 0.5)),
    (reinforce, {}, ()),
]


def literal(objective: Any, data: dict[str, Any], aggregation: str, *options: float) -> Tensor:
    total, count = torch.zeros(()).double(), int(data["mask"].sum())
    for b, keep in enumerate(data["mask"]):
        terms = objective(data["log_probs"][b][keep], data["old_log_probs"][b][keep], data["advantages"][b], *options)
        weight: float = {
            "token_mean": 1 / count,
            "sequence_mean": 1 / (len(terms) * len(data["mask"])),
            "sequence_sum_constant": 1 / (len(data["mask"]) * LIMIT),
        }[aggregation]
        total = total - weight * torch.stack(terms).sum()
    return total


def test_no_loss_is_left_out() -> None:
    assert {objective.__name__ for objective, _, _ in CASES} == {n for n in POLICY_LOSSES if not n.startswith("test_")}


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize(("objective", "options", "values"), CASES)
@pytest.mark.parametrize("seed", range(3))
def test_losses_are_those_of_the_papers(
    objective: Any, options: dict[str, Any], values: tuple[float, ...], aggregation: str, seed: int
) -> None:
    data = example(seed)
    got = policy_loss(objective.__name__, **data, aggregation=aggregation, max_length=LIMIT, **options).loss
    found, gradient = value_and_gradient(got, data["log_probs"])
    expected, expected_gradient = value_and_gradient(literal(objective, data, aggregation, *values), data["log_probs"])
    assert found.item() == pytest.approx(expected.item(), abs=1e-6)
    assert (gradient - expected_gradient).norm() <= 1e-6 * expected_gradient.norm()


@pytest.mark.parametrize(
    ("name", "options", "trl"),
    [
        ("gspo", {"clip_low": 0.2, "clip_high": 0.28}, {"loss_type": "grpo", "importance_sampling_level": "sequence"}),
        ("cispo", {}, {"loss_type": "cispo", "epsilon_high": 1.28}),  # TRL's is the bound itself
        ("sapo", {}, {"loss_type": "sapo"}),
        ("ppo", {"clip_high": 0.28}, {"loss_type": "grpo"}),
        ("ppo", {"clip_high": 0.28}, {"loss_type": "bnpo"}),
        ("ppo", {"clip_high": 0.28}, {"loss_type": "dapo"}),
        ("ppo", {"clip_high": 0.28}, {"loss_type": "dr_grpo"}),
        ("ppo", {}, {"loss_type": "dapo", "epsilon_high": 0.2}),
    ],
)
@pytest.mark.parametrize("seed", range(3))
def test_losses_are_those_of_trl(name: str, options: dict[str, Any], trl: dict[str, Any], seed: int) -> None:
    data = example(seed)
    of_type = {"grpo": "sequence_mean", "sapo": "sequence_mean", "dr_grpo": "sequence_sum_constant"}
    aggregation = of_type.get(trl["loss_type"], "token_mean")
    got = policy_loss(name, **data, aggregation=aggregation, max_length=LIMIT, **options).loss
    found, gradient = value_and_gradient(got, data["log_probs"])
    expected, expected_gradient = value_and_gradient(trl_loss(data, **{"epsilon_high": 0.28, **trl}), data["log_probs"])
    assert found.item() == pytest.approx(expected.item(), abs=1e-6)
    assert (gradient - expected_gradient).norm() < 1e-5 * expected_gradient.norm()


@pytest.mark.parametrize(("objective", "options", "values"), CASES)
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_gradients_are_those_of_finite_differences(
    objective: Any, options: dict[str, Any], values: tuple[float, ...], aggregation: str
) -> None:
    """Where a weight is a constant by definition (CISPO), it is held fixed."""
    name = objective.__name__
    data = example(5, batch=3, length=4)
    weights = policy_loss(name, **data, aggregation=aggregation, max_length=LIMIT, **options).loss

    def value(log_probs: Tensor) -> float:
        if name == "cispo":
            low, high = options.get("clip_low", 1.0), options.get("clip_high", 0.28)
            fixed = (data["log_probs"] - data["old_log_probs"]).exp().clamp(1 - low, 1 + high).detach()
            spread = fixed * data["advantages"][:, None]
            return float(
                policy_loss(
                    "reinforce", log_probs, data["old_log_probs"], spread, data["mask"],
                    aggregation=aggregation, max_length=LIMIT,
                ).loss
            )  # fmt: skip
        moved = {**data, "log_probs": log_probs}
        return float(policy_loss(name, **moved, aggregation=aggregation, max_length=LIMIT, **options).loss)

    _, gradient = value_and_gradient(weights, data["log_probs"])
    step = 1e-6
    for b, t in data["mask"].nonzero().tolist():
        plus, minus = data["log_probs"].detach().clone(), data["log_probs"].detach().clone()
        plus[b, t] += step
        minus[b, t] -= step
        assert gradient[b, t].item() == pytest.approx((value(plus) - value(minus)) / (2 * step), abs=1e-7)


# ------------------------------------------------------------------ properties of all losses

NAMES = sorted({objective.__name__ for objective, _, _ in CASES})


@pytest.mark.parametrize("name", NAMES)
@given(st.sampled_from(AGGREGATIONS), st.sampled_from([float("nan"), float("inf"), 1e30]), st.integers(0, 5))
@settings(max_examples=10)
def test_masked_tokens_never_matter(name: str, aggregation: str, garbage: float, seed: int) -> None:
    data = example(seed)
    clean = policy_loss(name, **data, aggregation=aggregation, max_length=LIMIT)
    dirty = {**data, "advantages": data["advantages"][:, None].expand_as(data["mask"])}
    for part in ("log_probs", "old_log_probs", "advantages"):
        dirty[part] = torch.where(data["mask"], dirty[part].detach(), garbage)
    dirty["log_probs"].requires_grad_()
    result = policy_loss(name, **dirty, aggregation=aggregation, max_length=LIMIT)
    assert torch.equal(result.loss, clean.loss)
    _, gradient = value_and_gradient(result.loss, dirty["log_probs"])
    assert (gradient[~data["mask"]] == 0).all() and gradient.isfinite().all()


@pytest.mark.parametrize("name", NAMES)
@given(st.sampled_from(AGGREGATIONS), st.permutations(range(6)))
@settings(max_examples=10)
def test_the_order_of_the_batch_does_not_matter(name: str, aggregation: str, order: list[int]) -> None:
    data = example(3)
    shuffled = {part: tensor[order] for part, tensor in data.items()}
    losses = [policy_loss(name, **d, aggregation=aggregation, max_length=LIMIT).loss for d in (data, shuffled)]
    assert losses[0].item() == pytest.approx(losses[1].item(), abs=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_on_policy_every_gradient_is_the_policy_gradient(name: str) -> None:
    data = example()
    data["old_log_probs"] = data["log_probs"].detach()
    found = value_and_gradient(policy_loss(name, **data, aggregation="sequence_mean").loss, data["log_probs"])[1]
    plain = policy_loss("reinforce", **data, aggregation="sequence_mean").loss
    torch.testing.assert_close(found, value_and_gradient(plain, data["log_probs"])[1], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_without_advantages_there_is_nothing_to_learn(name: str) -> None:
    data = {**example(), "advantages": torch.zeros(6).double()}
    options = {"drift_coef": 0.0} if name == "cpgd" else {}
    loss, gradient = value_and_gradient(policy_loss(name, **data, **options).loss, data["log_probs"])
    assert loss == 0 and (gradient == 0).all()


@pytest.mark.parametrize("name", ["gspo", "gmpo"])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_far_outside_the_clip_there_is_no_gradient(name: str, sign: float) -> None:
    log_probs = torch.full((1, 4), -1.0).double().requires_grad_()
    old = log_probs.detach() - sign  # a ratio of e, or 1/e
    loss = policy_loss(name, log_probs, old, torch.tensor([sign]).double(), torch.ones(1, 4)).loss
    assert (value_and_gradient(loss, log_probs)[1] == 0).all()
    loss = policy_loss(name, log_probs, old, torch.tensor([-sign]).double(), torch.ones(1, 4)).loss
    assert (value_and_gradient(loss, log_probs)[1] != 0).all()  # the way back is open


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("gspo", {"clip_low": -1.0}, r"gspo\(clip_low=-1.0, clip_high=0.0004\): must be 0 or more"),
        ("gmpo", {"clip_high": -1.0}, r"gmpo\(clip_low=0.4, clip_high=-1.0\): must be 0 or more"),
        ("cispo", {"clip_high": -1.0}, "cispo.*must be 0 or more"),
        ("sapo", {"tau_neg": 0.0}, r"sapo\(tau_neg=0.0\): must be above 0"),
        ("cpgd", {"clip_low": 1.0}, r"cpgd\(clip_low=1.0\): must be below 1"),
        ("cpgd", {"drift_coef": -1.0}, "drift_coef=-1.0.*must be 0 or more"),
    ],
)
def test_values_out_of_range_are_quoted(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        policy_loss(name, **example(), **options)


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


# ------------------------------------------------------------------ properties of ppo


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
