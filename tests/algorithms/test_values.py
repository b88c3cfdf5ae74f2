"""The critic's loss against a literal float64 transcription, finite differences and its own properties."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lightrft_lightning.algorithms import AGGREGATIONS, BatchTotals, value_loss

LIMIT = 9


def example(seed: int = 0, batch: int = 5, length: int = 7) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    values, noise, returns = torch.randn(3, batch, length, generator=generator).double()
    lengths = torch.randint(1, length + 1, (batch,), generator=generator)
    mask = torch.arange(length) < lengths[:, None]
    mask[:, 1] &= lengths < 4  # a tool's token in between
    return {"values": values, "old_values": values + 0.5 * noise, "returns": returns, "mask": mask}


def literal(data: dict[str, Tensor], clip: float | None, aggregation: str) -> float:
    rows = []
    for v, old, r, m in zip(*(data[k].tolist() for k in ("values", "old_values", "returns", "mask")), strict=True):
        row = []
        for t in range(len(v)):
            if m[t]:
                moved = v[t] if clip is None else old[t] + min(max(v[t] - old[t], -clip), clip)
                row.append(0.5 * max((v[t] - r[t]) ** 2, (moved - r[t]) ** 2))
        rows.append(row)
    if aggregation == "token_mean":
        return sum(map(sum, rows)) / sum(map(len, rows))
    if aggregation == "sequence_mean":
        return sum(sum(row) / len(row) for row in rows) / len(rows)
    return sum(map(sum, rows)) / LIMIT / len(rows)


def loss_of(data: dict[str, Tensor], **settings: object) -> Tensor:
    return value_loss(**data, max_length=LIMIT, **settings).loss  # type: ignore[arg-type]


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("clip", [None, 0.2, 1.0])
@pytest.mark.parametrize("seed", range(3))
def test_it_is_the_formula(aggregation: str, clip: float | None, seed: int) -> None:
    data = example(seed)
    assert loss_of(data, clip=clip, aggregation=aggregation).item() == pytest.approx(
        literal(data, clip, aggregation), rel=1e-6
    )


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("clip", [None, 0.2])
def test_its_gradient_is_that_of_finite_differences(aggregation: str, clip: float | None) -> None:
    data = example(3)
    values = data["values"].requires_grad_()

    def loss(values: Tensor) -> Tensor:
        return loss_of({**data, "values": values}, clip=clip, aggregation=aggregation)

    assert torch.autograd.gradcheck(loss, (values,), eps=1e-7, atol=1e-5)


@given(st.integers(0, 99), st.sampled_from([float("nan"), float("inf"), -1e30]))
def test_masked_tokens_never_matter(seed: int, garbage: float) -> None:
    data = example(seed)
    spoilt = {name: torch.where(data["mask"], v, garbage) for name, v in data.items() if name != "mask"}
    values = spoilt["values"].requires_grad_()
    loss = loss_of({**spoilt, "mask": data["mask"], "values": values})
    assert loss.item() == pytest.approx(loss_of(data).item(), rel=1e-6)
    (gradient,) = torch.autograd.grad(loss, values)
    assert (gradient[~data["mask"]] == 0).all() and gradient.isfinite().all()


@given(st.floats(-3, 3), st.floats(-3, 3), st.floats(-3, 3))
def test_beyond_the_clip_a_value_that_comes_nearer_has_no_gradient(old: float, moved: float, target: float) -> None:
    value = torch.tensor([old + moved], dtype=torch.float64, requires_grad=True)
    one = torch.ones(1)
    result = value_loss(value, torch.tensor([old]).double(), torch.tensor([target]).double(), one, clip=0.2)
    (slope,) = torch.autograd.grad(result.loss, value)
    clipped = old + min(max(moved, -0.2), 0.2)
    if abs(moved) > 0.201 and abs(clipped - target) > abs(old + moved - target) + 1e-6:
        assert slope == 0 and result.metrics["value_clip_fraction"] == 1
    if abs(moved) < 0.199:
        assert slope.item() == pytest.approx(value.item() - target, abs=1e-6)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_micro_batches_add_up_to_the_global_batch(aggregation: str) -> None:
    data = example(1)
    totals = BatchTotals(int(data["mask"].sum()), len(data["mask"]), LIMIT)
    parts = [
        value_loss(**{k: v[rows] for k, v in data.items()}, aggregation=aggregation, totals=totals).loss
        for rows in (slice(0, 1), slice(1, 4), slice(4, 5))
    ]
    assert sum(parts).item() == pytest.approx(loss_of(data, aggregation=aggregation).item(), rel=1e-6)


def test_what_does_not_fit_is_refused() -> None:
    data = example()
    with pytest.raises(ValueError, match=r"value_loss\(clip=-1\)"):
        value_loss(**data, clip=-1)
    with pytest.raises(ValueError, match=r"returns has shape \(5, 6\), values \(5, 7\)"):
        value_loss(**{**data, "returns": data["returns"][:, 1:]})
