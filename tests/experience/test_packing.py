"""Packing: what the rows look like, and that a model gives the same loss and gradient whatever the layout."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensors import LargestTensor
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, create_mask
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from lightrft_lightning.algorithms import POLICY_LOSSES, BatchTotals, PolicyTokens, advantages, aggregation_weights
from lightrft_lightning.experience.packing import PackedBatch, pack, unpack
from lightrft_lightning.experience.trajectory import Completion, Prompt, Trajectory
from lightrft_lightning.models.logprobs import completion_logprobs

VOCAB = 61


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def trajectory(prompt: Sequence[int], completion: Sequence[int], group: int = 0, mask: tuple = ()) -> Trajectory:
    sampled = Completion(tuple(completion), (-1.0,) * len(completion), "length")
    return Trajectory(Prompt(tuple(prompt), ""), sampled, group, mask=mask)


def random_group(group: int, prompt: int, lengths: Sequence[int], seed: int = 0) -> list[Trajectory]:
    rng = random.Random(f"{seed}-{group}")
    ids = [rng.randrange(VOCAB) for _ in range(prompt)]
    return [trajectory(ids, [rng.randrange(VOCAB) for _ in range(n)], group) for n in lengths]


def ragged() -> list[Trajectory]:
    """Groups of unequal size and length; one completion is empty, one holds tokens that a tool wrote."""
    result = random_group(0, 9, [3, 12, 1, 7, 5]) + random_group(1, 4, [2, 6]) + random_group(2, 6, [4, 0, 3])
    tool = random_group(3, 5, [8, 2])
    tool[0].mask = (True, True, False, False, False, True, True, True)
    return result + tool


# ------------------------------------------------------------------ layout


def test_the_row_of_the_module_docstring() -> None:
    group = [trajectory([1, 2, 3], c, group=7) for c in ([10, 11], [20, 21, 22], [30])]
    (batch,) = pack(group, 100)
    assert batch.input_ids.tolist() == [[1, 2, 3, 10, 11, 20, 21, 22, 30]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 3, 4, 5, 3]]
    assert batch.branch.tolist() == [[-1, -1, -1, 0, 0, 1, 1, 1, 2]]
    assert batch.piece.tolist() == [[0] * 9]
    assert batch.target.tolist() == [10, 11, 20, 21, 22, 30]
    assert batch.column.tolist() == [2, 3, 2, 5, 6, 2]  # the prompt's last token predicts every first token
    assert batch.trajectory.tolist() == [0, 0, 1, 1, 1, 2]
    assert batch.position.tolist() == [0, 1, 0, 1, 2, 0]
    visible = batch.visible()[0, 0]
    assert visible[8].nonzero().flatten().tolist() == [0, 1, 2, 8]
    assert visible[6].nonzero().flatten().tolist() == [0, 1, 2, 5, 6]
    assert visible[1].nonzero().flatten().tolist() == [0, 1]


def test_one_row_a_completion_without_shared_prompts() -> None:
    (batch,) = pack([trajectory([1, 2], [3, 4, 5]), trajectory([1, 2], [6])], 100, share_prompts=False)
    assert batch.input_ids.tolist() == [[1, 2, 3, 4, 5], [1, 2, 6, 0, 0]]
    assert batch.attention_mask(torch.float32, "flash_attention_2").tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]
    assert (batch.row.tolist(), batch.column.tolist()) == ([0, 0, 0, 1], [1, 2, 3, 1])


def test_tool_tokens_are_context_without_loss() -> None:
    (batch,) = pack([trajectory([1], [2, 3, 4], mask=(True, False, True))], 10)
    assert batch.input_ids.tolist() == [[1, 2, 3, 4]]
    assert (batch.target.tolist(), batch.column.tolist(), batch.position.tolist()) == ([2, 4], [0, 2], [0, 2])


def test_small_groups_share_a_row_and_large_ones_are_split() -> None:
    trajectories = random_group(0, 4, [10, 10]) + random_group(1, 3, [5]) + random_group(2, 3, [6, 4])
    (joined,) = pack(trajectories, 1000)
    assert joined.input_ids.shape == (2, 24)  # the rows are as long as the longest group, not as the budget
    assert joined.piece.max() == 1
    split = pack(trajectories, 15)
    assert sum(trajectories[0].prompt.token_ids == tuple(row[:4]) for b in split for row in b.input_ids.tolist()) == 2


def test_row_length_bounds_the_rows_where_a_completion_allows_it() -> None:
    trajectories = random_group(0, 4, [10, 3, 3, 3, 3])
    assert [b.input_ids.shape[1] for b in pack(trajectories, 1000, row_length=11)] == [14]
    assert max(b.input_ids.shape[1] for b in pack(trajectories, 1000)) == 26


def test_padding_is_small_for_skewed_lengths() -> None:
    rng = random.Random(0)
    trajectories = [t for g in range(20) for t in random_group(g, 16, [rng.randint(1, 64) for _ in range(8)])]
    batches = pack(trajectories, 1024)
    real, computed = (sum(b.num_tokens for b in batches), sum(b.input_ids.numel() for b in batches))
    assert computed < 1.15 * real
    assert real == sum(16 + sum(len(t.mask) for t in trajectories if t.group == g) for g in range(20))


@given(
    groups=st.lists(st.tuples(st.integers(1, 6), st.lists(st.integers(0, 9), min_size=1, max_size=6)), max_size=6),
    budget=st.integers(15, 80),
    share=st.booleans(),
    row_length=st.none() | st.integers(1, 60),
)
def test_every_policy_token_is_there_once_within_the_budget(
    groups: list[tuple[int, list[int]]], budget: int, share: bool, row_length: int | None
) -> None:
    trajectories = [t for g, (p, lengths) in enumerate(groups) for t in random_group(g, p, lengths)]
    random.Random(0).shuffle(trajectories)
    batches = pack(trajectories, budget, share_prompts=share, row_length=row_length)
    seen = set()
    for batch in batches:
        assert batch.input_ids.numel() <= budget
        for r, c, target, t, k in zip(
            *(getattr(batch, n).tolist() for n in ("row", "column", "target", "trajectory", "position")), strict=True
        ):
            assert (t, k) not in seen
            seen.add((t, k))
            full = trajectories[t].prompt.token_ids + trajectories[t].completion.token_ids
            at = len(trajectories[t].prompt.token_ids) + k
            assert target == full[at]
            assert batch.position_ids[r, c] == at - 1
            sees = batch.visible()[r, 0, c] if share else torch.arange(batch.row.numel()) < 0
            if share:  # the tokens it sees are exactly those before it in its own sequence
                assert batch.input_ids[r][sees].tolist() == list(full[:at])
    assert seen == {(i, k) for i, t in enumerate(trajectories) for k in range(len(t.mask))}


def test_the_result_depends_on_the_arguments_only() -> None:
    first, second = pack(ragged(), 60), pack(ragged(), 60)
    for a, b in zip(first, second, strict=True):
        assert all(torch.equal(getattr(a, n), getattr(b, n)) for n in ("input_ids", "row", "column", "trajectory"))


def test_nothing_to_learn_from_is_survived() -> None:
    assert pack([], 10) == []
    empty = [trajectory([1, 2], []), trajectory([1, 2], [3, 4], mask=(False, False))]
    assert pack(empty, 10) == []
    assert [v.tolist() for v in unpack([], [], empty)] == [[], [0.0, 0.0]]


def test_values_travel_to_the_rows_and_back() -> None:
    trajectories = ragged()
    values = [torch.arange(len(t.mask)) + 100.0 * (i + 1) for i, t in enumerate(trajectories)]
    batches = pack(trajectories, 40)
    assert len(batches) > 2
    back = unpack(batches, [b.pack_values(values) for b in batches], trajectories, fill=-1.0)
    for t, before, after in zip(trajectories, values, back, strict=True):
        mask = torch.tensor(t.mask, dtype=torch.bool)
        assert torch.equal(after[mask], before[mask])
        assert (after[~mask] == -1).all()


def test_values_may_be_tuples_of_floats() -> None:
    trajectories = ragged()
    (batch,) = pack(trajectories, 1000)
    assert (batch.pack_values([t.completion.logprobs for t in trajectories]) == -1).all()


def test_to_moves_every_tensor() -> None:
    moved = pack(ragged(), 1000)[0].to("meta")
    assert all(getattr(moved, n).is_meta for n in ("input_ids", "position_ids", "piece", "branch", "row", "target"))
    assert moved.shared


# ------------------------------------------------------------------ bad input


def test_a_completion_longer_than_the_budget_is_refused_with_both_numbers() -> None:
    with pytest.raises(ValueError, match=r"trajectory 1 has 13 tokens \(prompt 4 \+ completion 9\).* is 12"):
        pack(random_group(0, 4, [8, 9]), 12)


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(ValueError, match="trajectory 0 has an empty prompt"):
        pack([trajectory([], [1])], 12)


def test_two_prompts_in_a_group_are_refused() -> None:
    with pytest.raises(ValueError, match="trajectory 1 of group 5 has another prompt"):
        pack([trajectory([1], [1], 5), trajectory([2], [1], 5)], 12)


def test_an_attention_without_dense_masks_is_refused_with_the_fix() -> None:
    with pytest.raises(ValueError, match=r"'flash_attention_2' takes no mask for shared prompts.*share_prompts=False"):
        pack(ragged(), 100)[0].attention_mask(torch.bfloat16, "flash_attention_2")


# ------------------------------------------------------------------ the same loss and gradient as the padded batch


def build(architecture: str, attention: str, dtype: torch.dtype = torch.float32) -> Any:
    """A toy model whose weights are large enough that a token seen by mistake changes its predictions."""
    torch.manual_seed(0)
    small: dict[str, Any] = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    small |= {"initializer_range": 0.3, "attn_implementation": attention}
    if architecture == "gpt2":
        small |= {"bos_token_id": 0, "eos_token_id": 0, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        model: Any = GPT2LMHeadModel(GPT2Config(n_positions=64, **small))
    elif architecture == "qwen2":
        model = Qwen2ForCausalLM(Qwen2Config(intermediate_size=64, num_key_value_heads=2, **small))
    else:
        model = LlamaForCausalLM(LlamaConfig(intermediate_size=64, num_key_value_heads=2, **small))
    return model.to(dtype)


def inputs_of(trajectories: Sequence[Trajectory]) -> tuple[list[float], list[Tensor]]:
    """Advantages (one a trajectory) and old log-probabilities that put some ratios outside the clip range."""
    generator = torch.Generator().manual_seed(1)
    rewards = torch.randn(len(trajectories), generator=generator)
    values = advantages("group_norm", rewards, group_ids=[t.group for t in trajectories]).advantages
    shift = [0.5 * torch.randn(len(t.mask), generator=generator) for t in trajectories]
    return values.tolist(), shift


def gradient(model: PreTrainedModel) -> Tensor:
    result = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    model.zero_grad()
    return result


def padded_reference(model: PreTrainedModel, trajectories: Sequence[Trajectory]) -> tuple[float, Tensor]:
    """PPO's token mean written out on one right-padded batch with full logits; uses nothing of the package's."""
    values, shift = inputs_of(trajectories)
    width = max(len(t.prompt.token_ids) + len(t.mask) for t in trajectories)
    rows = [t.prompt.token_ids + t.completion.token_ids for t in trajectories]
    ids = torch.tensor([row + (0,) * (width - len(row)) for row in rows])
    attention = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    logprobs = model(input_ids=ids, attention_mask=attention).logits[:, :-1].log_softmax(-1)
    logprobs = logprobs.gather(-1, ids[:, 1:, None])[..., 0]
    total, tokens = torch.zeros((), dtype=logprobs.dtype), 0
    for i, t in enumerate(trajectories):
        for k, keep in enumerate(t.mask):
            if keep:
                logprob = logprobs[i, len(t.prompt.token_ids) + k - 1]
                ratio = (logprob - (logprob.detach() + shift[i][k])).exp()
                total = total - torch.minimum(ratio * values[i], ratio.clamp(0.8, 1.2) * values[i])
                tokens += 1
    (total / tokens).backward()
    return (total / tokens).item(), gradient(model)


def packed(
    model: PreTrainedModel, trajectories: Sequence[Trajectory], budget: int, share_prompts: bool = True
) -> tuple[float, Tensor, list[PackedBatch]]:
    values, shift = inputs_of(trajectories)
    totals = BatchTotals(sum(sum(t.mask) for t in trajectories), len(trajectories))
    batches = pack(trajectories, budget, share_prompts=share_prompts)
    loss = 0.0
    for batch in batches:
        logprobs = completion_logprobs(model, batch, chunk_size=16).logprobs
        old = logprobs.detach() + batch.pack_values(shift)
        per_token = torch.tensor(values, dtype=logprobs.dtype)[batch.trajectory]
        objective = POLICY_LOSSES["ppo"](PolicyTokens(logprobs, old, per_token, batch.trajectory))
        part = -(aggregation_weights("token_mean", batch.trajectory, totals) * objective.value).sum()
        part.backward()
        loss += part.item()
    return loss, gradient(model), batches


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gpt2"])
def test_shared_prompt_rows_equal_the_padded_batch(architecture: str, attention: str) -> None:
    model, trajectories = build(architecture, attention), ragged()
    loss, grad = padded_reference(model, trajectories)
    assert grad.norm() > 0.1
    for budget in (1000, 80, 22):  # all at once, several groups in a row; several micro-batches; split groups
        got, got_grad, batches = packed(model, trajectories, budget)
        assert got == pytest.approx(loss, abs=1e-6)
        assert (got_grad - grad).norm() / grad.norm() < 1e-5
    assert any(b.piece.max() > 0 for b in pack(trajectories, 1000))
    assert sum(0 in {trajectories[i].group for i in b.trajectory.tolist()} for b in batches) > 1, "group 0 is not split"


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_in_double_precision_the_two_are_the_same(attention: str) -> None:
    # Not a Llama: its norms compute in float32 whatever the model's type.
    model, trajectories = build("gpt2", attention, torch.float64), ragged()
    loss, grad = padded_reference(model, trajectories)
    for budget, share in ((1000, True), (22, True), (1000, False), (43, False)):
        got, got_grad, _ = packed(model, trajectories, budget, share)
        assert got == pytest.approx(loss, abs=1e-13)
        assert (got_grad - grad).norm() / grad.norm() < 1e-12


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_rows_with_much_padding_give_no_nan(attention: str) -> None:
    trajectories = random_group(0, 3, [30, 2]) + random_group(1, 2, [1, 1])
    _, grad, batches = packed(build("llama", attention), trajectories, 1000)
    assert any((b.piece < 0).any() for b in batches)
    assert torch.isfinite(grad).all() and grad.norm() > 0


# ------------------------------------------------------------------ block masks


@given(
    groups=st.lists(
        st.tuples(st.integers(1, 150), st.lists(st.integers(1, 130), min_size=1, max_size=6)), min_size=1, max_size=4
    )
)
@settings(max_examples=20)
def test_the_block_mask_is_that_of_torch_without_its_dense_matrix(groups: list[tuple[int, list[int]]]) -> None:
    trajectories = [t for g, (p, lengths) in enumerate(groups) for t in random_group(g, p, lengths)]
    for batch in pack(trajectories, 2000):
        (rows, length), got = batch.input_ids.shape, batch.attention_mask(torch.float32, "flex_attention")
        dense = create_mask(got.mask_mod, rows, 1, length, length, device="cpu")
        assert torch.equal(dense, batch.visible())
        expected = create_block_mask(got.mask_mod, rows, None, length, length, device="cpu")
        assert got.shape == expected.shape
        assert torch.equal(got.to_dense(), expected.to_dense())
        for counts in ("kv_num_blocks", "full_kv_num_blocks", "q_num_blocks", "full_q_num_blocks"):
            assert torch.equal(getattr(got, counts), getattr(expected, counts)), counts


def test_a_block_mask_takes_no_room_for_pairs_of_tokens() -> None:
    (batch,) = pack(random_group(0, 200, [300] * 8), 4000)
    length = batch.input_ids.shape[1]
    with LargestTensor() as largest:
        batch.attention_mask(torch.float32, "flex_attention")
    assert largest.numel < length**2 / 100


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_with_flex_attention_rows_equal_the_padded_batch(architecture: str, flex_on_cpu: None) -> None:
    trajectories = ragged() + random_group(4, 120, [90, 30])  # over several blocks
    loss, grad = padded_reference(build(architecture, "sdpa"), trajectories)
    for budget in (1000, 250):
        got, got_grad, _ = packed(build(architecture, "flex_attention"), trajectories, budget)
        assert got == pytest.approx(loss, abs=1e-6)
        assert (got_grad - grad).norm() / grad.norm() < 1e-5
