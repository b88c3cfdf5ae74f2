"""Positions that depend on how long a text is: LongRoPE and dynamic NTK.

Transformers looks at the longest row of a pass, and dynamic NTK also at passes before. Here every text gets what a pass
of its own would give it, so a result does not depend on how texts are put together.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from lightrft_lightning.experience.packing import PackedBatch


def length_limit(config: Any) -> tuple[int, str] | None:
    """Up to how many tokens the positions of a model do not depend on the length of the text, and their type.

    None: they never do. A sampled text that is longer has no log-probabilities that training could compute: each of its
    tokens was drawn with the positions of a shorter one.

    Args:
        config: of the text model.
    """
    given = getattr(config, "rope_parameters", None) or {}
    by_layer = [given] if "rope_type" in given else [kind for kind in given.values() if isinstance(kind, dict)]
    limits = [
        (parameters.get("original_max_position_embeddings", config.max_position_embeddings), "longrope")
        if parameters.get("rope_type") == "longrope"
        else (config.max_position_embeddings, str(parameters["rope_type"]))
        for parameters in by_layer
        if parameters.get("rope_type") == "longrope" or "dynamic" in str(parameters.get("rope_type"))
    ]
    return min(limits, default=None)


def most_positions(config: Any) -> int | None:
    """How many tokens a model has positions for; None: any number, or its config does not say (XLNet's says -1)."""
    most: int | None = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    return most if most and most > 0 else None


def length_limits(config: Any) -> dict[str, int | None]:
    """Up to how many tokens a model can be trained on what it samples, by what says so.

    Args:
        config: of the model.
    """
    limits: dict[str, int | None] = {"the model's max_position_embeddings": most_positions(config)}
    if (limit := length_limit(config.get_text_config())) is not None:
        length, kind = limit
        limits[f"where positions of rope_type={kind!r} begin to depend on the length of the whole text"] = length
    return limits


@contextlib.contextmanager
def of_its_own_length(model: Any, batch: PackedBatch) -> Iterator[None]:
    """Inside, the positions of `model` are for each text of `batch` those of its own length.

    Raises:
        ValueError: texts of one prompt in a shared row need different ones.
    """
    limit = length_limit(model.config.get_text_config())
    if limit is None or int(batch.position_ids.max()) < limit[0]:
        yield
        return
    with _by_lengths(model, _lengths(batch, *limit), limit[0]):
        yield


@contextlib.contextmanager
def by_length_of_row(model: Any, lengths: Tensor, width: int) -> Iterator[None]:
    """As `of_its_own_length`, for a batch with one text a row, padded on the right.

    Args:
        model: a Hugging Face model.
        lengths: ``[B]`` of the rows' texts.
        width: of the rows.
    """
    limit = length_limit(model.config.get_text_config())
    if limit is None or width <= limit[0]:
        yield
        return
    known = width if limit[1] == "longrope" else lengths
    lengths_BL = torch.where(lengths > limit[0], known, 0)[:, None].expand(-1, width)
    with _by_lengths(model, lengths_BL, limit[0]):
        yield


@contextlib.contextmanager
def _by_lengths(model: Any, lengths_BL: Tensor, limit: int) -> Iterator[None]:
    with contextlib.ExitStack() as replaced:
        for module in [m for m in model.modules() if hasattr(m, "rope_type")]:
            own = module.forward
            module.forward = _selecting(own, lengths_BL, limit)
            replaced.callback(module.__dict__.pop, "forward")
        yield


def _lengths(batch: PackedBatch, limit: int, kind: str) -> Tensor:
    """``[B, L]`` length of the text of a token, 0 up to `limit`. LongRoPE knows no more than that it is longer."""
    row, column, _ = batch.ends()
    length = batch.position_ids[row, column] + 1
    length = torch.where(length > limit, length.max() if kind == "longrope" else length, 0)
    pieces = int(batch.piece.max()) + 2  # and padding
    piece, of_all = row * pieces + batch.piece[row, column] + 1, batch.piece.new_zeros(len(batch.piece) * pieces)
    most, least = (of_all.scatter_reduce(0, piece, length, how, include_self=False) for how in ("amax", "amin"))
    if not torch.equal(most, least):
        raise ValueError(
            f"the completions of one prompt are shorter and longer than {limit} tokens, where the model's positions "
            f"(rope_type={kind!r}) change for the prompt too; pack with share_prompts=False"
        )
    rows = torch.arange(len(batch.piece), device=row.device)[:, None]
    return most[rows * pieces + batch.piece + 1]


def _selecting(own: Callable[..., Any], lengths_BL: Tensor, limit: int) -> Callable[..., Any]:
    """A rotary embedding's forward that computes each length by itself."""
    short = torch.zeros_like(lengths_BL[:1, :1])

    def forward(x: Tensor, position_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        results = None
        for length in lengths_BL.unique().tolist():
            own(x, short, *args, **kwargs)  # forgets the length before
            found = own(x, position_ids.clamp(max=(length or limit) - 1), *args, **kwargs)
            results = found if results is None else _chosen(lengths_BL == length, found, results)
        own(x, short, *args, **kwargs)
        return results

    return forward


def _chosen(where_BL: Tensor, new: Any, old: Any) -> Any:
    if isinstance(new, Tensor):
        return torch.where(where_BL[..., None], new, old)
    return tuple(_chosen(where_BL, *pair) for pair in zip(new, old, strict=True))
