"""Which attention kernel computes rows with shared prompts, and whether it computes what their mask means.

``sdpa`` and ``eager`` take a dense mask, one entry for each pair of tokens. ``flex_attention`` takes a `BlockMask`: no
such matrix exists, and blocks of pairs that do not see each other are not computed. The kernels for rows of several
texts (``flash_attention_2`` and the like) cannot say in one call that several completions see one prompt: with them,
pack with ``share_prompts=False``.
"""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from lightrft_lightning.experience.packing import pack
from lightrft_lightning.experience.trajectory import Completion, Prompt, Trajectory
from lightrft_lightning.models.layers import evaluating
from lightrft_lightning.models.logprobs import completion_logprobs, find_causal_lm

FLEX = "flex_attention"
TOLERANCES = {torch.float32: 1e-3, torch.float16: 0.02, torch.bfloat16: 0.1}
"""How far log-probabilities under another kernel may be off, in nats, by the dtype of the passes."""

_CHECKED_TOKENS = 300
_WINDOWS = ("max_position_embeddings", "sliding_window", "attention_chunk_size")


def prefers_flex(model: Any, device: torch.device) -> bool:
    """Whether ``attn_implementation="auto"`` means ``flex_attention``: on CUDA, for classes that have it."""
    return device.type == "cuda" and bool(getattr(model, "_supports_flex_attn", False))


def flex_problem(model: Any, device: torch.device) -> str | None:
    """Why `model` cannot be trained with ``flex_attention`` on `device`; None if it can. Torch 2.13: not on a CPU."""
    from torch.nn.attention.flex_attention import flex_attention

    if dropout := getattr(model.config.get_text_config(), "attention_dropout", 0.0):
        return f"the model's attention_dropout={dropout} is nothing that it can do"
    tensor = torch.zeros(1, 1, 16, 16, device=device, requires_grad=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it is slow unless compiled
            flex_attention(tensor, tensor, tensor)
    except NotImplementedError as err:
        return str(err).rstrip(".")
    return None


def use_kernel(model: Any, implementation: str) -> None:
    """Switch a Hugging Face model, or the one that `model` wraps, to another kernel that its class has."""
    # Not `set_attn_implementation`: it reads the source of the class, which FSDP2 has replaced by one of its own.
    find_causal_lm(model).config._attn_implementation = implementation


@contextmanager
def without_flex_attention(model: Any) -> Iterator[None]:
    """A model with ``flex_attention`` has ``sdpa`` inside: its block masks would be made anew for every token."""
    if getattr(model.config, "_attn_implementation", "") != FLEX:
        yield
        return
    use_kernel(model, "sdpa")
    try:
        yield
    finally:
        use_kernel(model, FLEX)


@torch.no_grad()
def flex_difference(model: Any, device: torch.device) -> float:
    """The most that log-probabilities with ``flex_attention`` differ from those with a dense mask, in nats.

    Of two groups with some hundred made-up tokens. Afterwards the model has ``flex_attention``.

    Args:
        model: a Hugging Face causal language model, or a wrapper that contains one; prepared by a strategy or not.
        device: of the model.

    Raises:
        RuntimeError: a kernel does not run, e.g. as it cannot be compiled here.
    """
    config = find_causal_lm(model).config.get_text_config()
    windows = (getattr(config, name, None) for name in _WINDOWS)
    groups = _made_up_groups(config.vocab_size, min([96, *(w for w in windows if w is not None)]))
    (batch,) = pack(groups, 10 * _CHECKED_TOKENS)
    results = []
    with evaluating(model):
        for implementation in ("sdpa", FLEX):
            use_kernel(model, implementation)
            results.append(completion_logprobs(model, batch.to(device)).logprobs)
    return float((results[0] - results[1]).abs().nan_to_num(math.inf).max())


def _made_up_groups(vocabulary: int, longest: int) -> list[Trajectory]:
    rng, result = random.Random(0), []
    for group, share in enumerate((0.3, 0.6)):
        prompt = max(1, int(share * longest))
        ids = Prompt(tuple(rng.randrange(vocabulary) for _ in range(prompt)), "")
        tokens = 0
        while tokens < _CHECKED_TOKENS // 2:
            n = rng.randint(1, max(1, longest - prompt))
            sampled = Completion(tuple(rng.randrange(vocabulary) for _ in range(n)), (0.0,) * n, "length")
            result.append(Trajectory(ids, sampled, group))
            tokens += n
    return result
