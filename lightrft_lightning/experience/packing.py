"""Lay trajectories out as rows of token ids under a token budget. The only place of the package that pads.

All completions of a group share their prompt, so one row holds it once (group 7 with three completions)::

    input_ids     p0 p1 p2 | a0 a1 | b0 b1 b2 | c0
    position_ids   0  1  2 |  3  4 |  3  4  5 |  3
    branch        -1 -1 -1 |  0  0 |  1  1  1 |  2

Every completion sees the prompt and itself, causally, so the log-probabilities and the gradient are those of the padded
batch, for ``P + sum(R_i)`` tokens in place of ``G * (P + max(R_i))``. Attention pays for a row's length squared under
a dense mask, so rows are no longer than the longest group needs; ``flex_attention`` leaves out what no token sees.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from itertools import accumulate
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from lightrft_lightning.experience.trajectory import Trajectory

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

PROMPT = -1
"""`PackedBatch.branch` of a prompt's tokens."""
_PADDING, _BEYOND = -1, -2
"""`PackedBatch.piece` of padding, and of what fills the last block of a block mask."""
_BLOCK = 128
"""Tokens of a block on either side, as in all of torch's own block masks."""


class Window(NamedTuple):
    """How far back a layer looks.

    Attributes:
        size: of the window, in tokens.
        chunked: a token sees those of its own chunk of `size` positions, in place of the `size` latest ones.
    """

    size: int
    chunked: bool = False


@dataclass(frozen=True)
class PackedBatch:
    """One micro-batch: rows of tokens, and where the policy's tokens are in them.

    The flat arrays have one entry for each of the N policy tokens (completion tokens whose ``mask`` is True). Tokens
    that a tool or environment wrote are context in the rows but have no entry.

    Attributes:
        input_ids: ``[B, L]`` token ids, 0 where a row is padded.
        position_ids: ``[B, L]`` position of each token within its own prompt + completion.
        piece: ``[B, L]`` which prompt of the row a token belongs to, -1 for padding.
        branch: ``[B, L]`` which completion of the piece a token belongs to, -1 for prompts and padding.
        row: ``[N]`` row of the position that predicts the token.
        column: ``[N]`` column of that position: the token before, which for a completion's first token is the last
            token of the prompt that the whole group shares.
        target: ``[N]`` id of the token.
        trajectory: ``[N]`` index of its trajectory in the list given to `pack`.
        position: ``[N]`` its index in the completion.
        shared: whether completions share a prompt within a row.
    """

    input_ids: Tensor
    position_ids: Tensor
    piece: Tensor
    branch: Tensor
    row: Tensor
    column: Tensor
    target: Tensor
    trajectory: Tensor
    position: Tensor
    shared: bool

    def to(self, device: torch.device | str) -> PackedBatch:
        """The same batch with its tensors on `device`."""
        return replace(self, **{f.name: getattr(self, f.name).to(device) for f in fields(self) if f.name != "shared"})

    @property
    def num_policy_tokens(self) -> int:
        """N, the tokens that get a loss."""
        return self.target.numel()

    @property
    def num_tokens(self) -> int:
        """Tokens in the rows without padding; ``input_ids.numel()`` counts the padding too."""
        return int((self.piece != _PADDING).sum())

    def attention_mask(
        self, dtype: torch.dtype, implementation: str, window: Window | None = None
    ) -> Tensor | BlockMask:
        """What a Hugging Face model takes as ``attention_mask``, built on the batch's device at every call.

        Args:
            dtype: the model's, for the additive mask.
            implementation: the model's ``config._attn_implementation``.
            window: of the layers that the mask is for, with shared prompts; None: they see everything before. Rows of
                one completion each get theirs from the model itself.

        Returns:
            One completion a row: the usual ``[B, L]`` mask. Shared prompts: ``[B, 1, L, L]``, additive, or bool for
            ``sdpa`` elsewhere than on a CPU; or a `BlockMask` for ``flex_attention``, which has an entry for 128 × 128
            of these.

        Raises:
            ValueError: prompts are shared and `implementation` takes none of these masks. The kernels for rows of
                several texts (``flash_attention_2`` and the like) know where each begins and ends, so they cannot say
                in one call that several completions see one prompt.
        """
        if not self.shared:
            return (self.piece != _PADDING).long()
        if implementation == "flex_attention":
            return _block_mask(self.piece, self.branch, self.position_ids, window)
        if implementation not in ("sdpa", "eager"):
            raise ValueError(
                f"attn_implementation={implementation!r} takes no mask for shared prompts. Load the model with "
                "attn_implementation='sdpa', or pack with share_prompts=False"
            )
        visible = self.visible(window)
        if implementation == "sdpa":
            if visible.device.type != "cpu":
                return visible  # a kernel there may take no other dtype than the queries', which autocast decides
            # Of a bool mask every layer would make an additive one, and keep it for the backward pass.
            dtype = torch.promote_types(dtype, torch.float32)
        return torch.zeros_like(visible, dtype=dtype).masked_fill_(~visible, torch.finfo(dtype).min)

    def visible(self, window: Window | None = None) -> Tensor:
        """``[B, 1, L, L]`` bool, whether the token in the row sees that in the column, within `window`.

        Padding attends to padding, so that no row of the softmax is empty (NaN).
        """
        same_piece = self.piece[:, :, None] == self.piece[:, None, :]
        seen = (self.branch[:, None, :] == PROMPT) | (self.branch[:, :, None] == self.branch[:, None, :])
        seen = (same_piece & seen).tril_()
        if window is not None:
            seen &= _near(self.position_ids[:, :, None], self.position_ids[:, None, :], window)
        return seen[:, None]

    def ends(self) -> tuple[Tensor, Tensor, Tensor]:
        """Row and column of the last token of each trajectory in the batch, and which one it is; each ``[T]``."""
        following = torch.nn.functional.pad(self.branch[:, 1:], (0, 1), value=PROMPT)
        row, column = ((self.branch != PROMPT) & (self.branch != following)).nonzero(as_tuple=True)
        # The flat arrays go through rows, pieces and branches in the same order.
        return row, column, self.trajectory.unique_consecutive()

    def pack_values(self, values: Sequence[Tensor | Sequence[float]]) -> Tensor:
        """Per-token values of all trajectories → those of this batch's policy tokens.

        Args:
            values: for every trajectory given to `pack`, one value a completion token.

        Returns:
            ``[N]``, on the batch's device.
        """
        device = self.target.device
        members, index = self.trajectory.unique(return_inverse=True)
        mine = [torch.as_tensor(values[i], device=device) for i in members.tolist()]
        return torch.cat(mine)[_starts([len(v) for v in mine], device)[index] + self.position]


def pack(
    trajectories: Sequence[Trajectory],
    token_budget: int,
    *,
    share_prompts: bool = True,
    row_length: int | None = None,
) -> list[PackedBatch]:
    """Cut trajectories into micro-batches of at most `token_budget` tokens, padding included.

    A trajectory without policy tokens (an empty completion, or one that a tool wrote entirely) takes no room; it only
    contributes nothing. A group that is too long for a row is split over rows, each with the prompt. Small groups are
    joined in one row, and rows of similar length make up a micro-batch. The result depends on the arguments only.

    Args:
        trajectories: in any order; those with the same ``group`` share a prompt.
        token_budget: the most that ``rows * length`` of a micro-batch may be.
        share_prompts: False puts each completion in a row of its own, right-padded: the layout for models that take
            no dense mask, and the reference that shared rows are tested against.
        row_length: rows are at most this long where a completion allows it; longer groups are split. By default
            a row is as long as the longest group, up to `token_budget`.

    Raises:
        ValueError: a prompt with its completion exceeds `token_budget`, a prompt is empty, or trajectories of a group
            have different prompts.
    """
    _check(trajectories, token_budget)
    groups: dict[int, list[int]] = {}
    for index, trajectory in enumerate(trajectories):
        if any(trajectory.mask):
            groups.setdefault(trajectory.group, []).append(index)
    if not groups:
        return []
    if share_prompts:
        limit = min(token_budget, row_length or token_budget)
        pieces = [piece for members in groups.values() for piece in _split(trajectories, members, limit)]
        lengths = [_piece_length(trajectories, piece) for piece in pieces]
        rows = [[pieces[i] for i in bin_] for bin_ in _first_fit_decreasing(lengths, max(lengths))]
    else:
        rows = [[[index]] for members in groups.values() for index in members]
    return [_build(trajectories, batch, share_prompts) for batch in _micro_batches(trajectories, rows, token_budget)]


def unpack(
    batches: Sequence[PackedBatch], values: Sequence[Tensor], trajectories: Sequence[Trajectory], fill: float = 0.0
) -> list[Tensor]:
    """Per-token values of all micro-batches → one tensor for each trajectory, the inverse of `pack_values`.

    Args:
        batches: what `pack` returned for `trajectories`.
        values: for each batch ``[N]``.
        trajectories: in the order given to `pack`.
        fill: value of the tokens that the policy did not produce.

    Returns:
        For every trajectory one value a completion token.
    """
    lengths = [len(t.completion.token_ids) for t in trajectories]
    like = values[0] if values else torch.empty(0)
    flat = like.new_full((sum(lengths),), fill)
    starts = _starts(lengths, flat.device)
    for batch, value in zip(batches, values, strict=True):
        flat[starts[batch.trajectory] + batch.position] = value
    return list(flat.split(lengths))


# A piece is a list of trajectory indices that follow one prompt; a row is a list of pieces.


def _check(trajectories: Sequence[Trajectory], token_budget: int) -> None:
    prompts: dict[int, tuple[int, ...]] = {}
    for index, t in enumerate(trajectories):
        prompt, completion = len(t.prompt.token_ids), len(t.completion.token_ids)
        if not prompt:
            raise ValueError(f"trajectory {index} has an empty prompt: nothing predicts its first token")
        if prompt + completion > token_budget:
            raise ValueError(
                f"trajectory {index} has {prompt + completion} tokens (prompt {prompt} + completion {completion}), "
                f"the token budget of a micro-batch is {token_budget}. Raise the budget or lower the length limits"
            )
        if prompts.setdefault(t.group, t.prompt.token_ids) != t.prompt.token_ids:
            raise ValueError(f"trajectory {index} of group {t.group} has another prompt than the rest of the group")


def _piece_length(trajectories: Sequence[Trajectory], piece: Sequence[int]) -> int:
    prompt = len(trajectories[piece[0]].prompt.token_ids)
    return prompt + sum(len(trajectories[i].completion.token_ids) for i in piece)


def _split(trajectories: Sequence[Trajectory], members: list[int], limit: int) -> list[list[int]]:
    if _piece_length(trajectories, members) <= limit:
        return [members]
    room = limit - len(trajectories[members[0]].prompt.token_ids)
    sizes = [len(trajectories[i].completion.token_ids) for i in members]
    return [sorted(members[i] for i in bin_) for bin_ in _first_fit_decreasing(sizes, room)]


def _first_fit_decreasing(sizes: Sequence[int], capacity: int) -> list[list[int]]:
    """Indices of `sizes` in bins of at most `capacity`; what is larger than that gets a bin of its own."""
    bins: list[list[int]] = []
    free: list[int] = []
    for index in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        found = next((b for b, room in enumerate(free) if sizes[index] <= room), None)
        if found is None:
            bins.append([])
            free.append(capacity)
            found = len(bins) - 1
        bins[found].append(index)
        free[found] -= sizes[index]
    return bins


def _micro_batches(
    trajectories: Sequence[Trajectory], rows: list[list[list[int]]], token_budget: int
) -> Iterator[list[list[list[int]]]]:
    """Longest rows first, so that neighbours have similar lengths and little is padded."""
    lengths = [sum(_piece_length(trajectories, piece) for piece in row) for row in rows]
    order = sorted(range(len(rows)), key=lambda i: (-lengths[i], i))
    while order:
        count = token_budget // lengths[order[0]]
        yield [rows[i] for i in order[:count]]
        order = order[count:]


def _build(trajectories: Sequence[Trajectory], rows: list[list[list[int]]], shared: bool) -> PackedBatch:
    ids: list[list[int]] = []
    positions: list[list[int]] = []
    pieces: list[list[int]] = []
    branches: list[list[int]] = []
    tokens: list[tuple[int, int, int, int, int]] = []  # row, column, target, trajectory, position in the completion
    for r, row in enumerate(rows):
        for table in (ids, positions, pieces, branches):
            table.append([])
        for p, piece in enumerate(row):
            prompt = trajectories[piece[0]].prompt.token_ids
            prompt_end = len(ids[r]) + len(prompt) - 1
            ids[r] += prompt
            positions[r] += range(len(prompt))
            branches[r] += [PROMPT] * len(prompt)
            for b, index in enumerate(piece):
                completion, start = trajectories[index].completion.token_ids, len(ids[r])
                for k, keep in enumerate(trajectories[index].mask):
                    if keep:
                        tokens.append((r, start + k - 1 if k else prompt_end, completion[k], index, k))
                ids[r] += completion
                positions[r] += range(len(prompt), len(prompt) + len(completion))
                branches[r] += [b] * len(completion)
            pieces[r] += [p] * (len(ids[r]) - len(pieces[r]))
    row_, column, target, trajectory, position = torch.tensor(tokens).unbind(1)
    return PackedBatch(
        input_ids=_pad(ids, 0),
        position_ids=_pad(positions, 0),
        piece=_pad(pieces, _PADDING),
        branch=_pad(branches, PROMPT),
        row=row_,
        column=column,
        target=target,
        trajectory=trajectory,
        position=position,
        shared=shared,
    )


def _near(query: Tensor, key: Tensor, window: Window) -> Tensor:
    """Whether the positions `query` are in reach of those of the keys before them."""
    return query // window.size == key // window.size if window.chunked else query - key < window.size


def _block_mask(piece: Tensor, branch: Tensor, position: Tensor, window: Window | None) -> BlockMask:
    """The mask of rows ``[B, L]`` by blocks; what is computed on the way has no L × L entries.

    Torch's own `create_block_mask` makes the dense mask first, unless it is compiled.
    """
    from torch.nn.attention.flex_attention import BlockMask

    rows, length = piece.shape
    blocks = -(-length // _BLOCK)
    beyond = blocks * _BLOCK - length
    piece_BL = torch.nn.functional.pad(piece, (0, beyond), value=_BEYOND)
    branch_BL = torch.nn.functional.pad(branch, (0, beyond), value=PROMPT)
    position_BL = torch.nn.functional.pad(position, (0, beyond))

    def visible(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        same_branch = (branch_BL[b, k] == PROMPT) | (branch_BL[b, q] == branch_BL[b, k])
        seen = (k <= q) & (piece_BL[b, q] == piece_BL[b, k]) & same_branch
        return seen if window is None else seen & _near(position_BL[b, q], position_BL[b, k], window)

    # All tokens of a segment (a prompt, a completion, padding) see the same segments, so look at pairs of these.
    kinds = int(branch.max()) - PROMPT + 1
    segment_BL = (piece_BL - _BEYOND) * kinds + branch_BL - PROMPT
    segments = torch.arange(int(segment_BL.max()) + 1, device=piece.device)
    piece_S, branch_S = segments // kinds, segments % kinds + PROMPT
    sees_SS = (piece_S[:, None] == piece_S) & ((branch_S == PROMPT) | (branch_S[:, None] == branch_S))
    present_BKS = torch.zeros(rows, blocks, len(segments), device=piece.device)
    present_BKS.scatter_(2, segment_BL.view(rows, blocks, _BLOCK), 1.0)
    some_BKK, not_all_BKK = (present_BKS @ pairs.float() @ present_BKS.mT > 0 for pairs in (sees_SS, ~sees_SS))
    if window is not None:  # which pairs of a block are near is left to `visible`
        not_all_BKK = torch.ones_like(not_all_BKK)
    every_KK = torch.ones(blocks, blocks, dtype=torch.bool, device=piece.device)
    earlier_KK, same_KK = every_KK.tril(-1), every_KK.tril() & every_KK.triu()
    return BlockMask.from_kv_blocks(
        *_counted(some_BKK & not_all_BKK & earlier_KK | same_KK),
        *_counted(~not_all_BKK & earlier_KK),
        BLOCK_SIZE=_BLOCK,
        mask_mod=visible,
        seq_lengths=(length, length),
    )


def _counted(chosen_BKK: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks of keys each block of queries has, and which, these first: the form that `BlockMask` takes."""
    order = torch.argsort(chosen_BKK.int(), dim=-1, descending=True, stable=True)
    return chosen_BKK.sum(-1, dtype=torch.int32)[:, None], order.int()[:, None]


def _pad(rows: list[list[int]], value: int) -> Tensor:
    length = max(map(len, rows))
    return torch.tensor([row + [value] * (length - len(row)) for row in rows])


def _starts(lengths: Sequence[int], device: torch.device) -> Tensor:
    """Where each of several sequences begins in their concatenation."""
    return torch.tensor(list(accumulate(lengths, initial=0))[:-1], dtype=torch.long, device=device)
