"""Which attention kernel computes rows with shared prompts, and whether it computes what their mask means.

``sdpa`` and ``eager`` take a dense mask, one entry for each pair of tokens. ``flex_attention`` takes a `BlockMask`: no
such matrix exists, and blocks of pairs that do not see each other are not computed. The kernels for rows of several
texts (``flash_attention_2`` and the like) cannot say in one call that several completions see one prompt: with them,
pack with ``share_prompts=False``.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from lightrft_lightning.models.logprobs import pretrained_part

FLEX = "flex_attention"


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


def known_problem(model: Any, implementation: str, device: torch.device) -> str | None:
    """What keeps `model` from being trained right with a kernel; None: nothing that is known beforehand."""
    if implementation == FLEX:
        return flex_problem(model, device)
    known = {"sdpa": sdpa_problem, "eager": eager_problem}.get(implementation)
    return None if known is None else known(model)


def sdpa_problem(model: Any) -> str | None:
    """What the model does to attention that ``sdpa`` leaves out without a word; None: nothing that is known."""
    cap = getattr(model.config.get_text_config(), "attn_logit_softcapping", None)
    return None if cap is None else f"it leaves out the model's attn_logit_softcapping={cap}"


def eager_problem(model: Any) -> str | None:
    """What ``eager`` computes otherwise than the model is; None: nothing that is known."""
    config = model.config.get_text_config()
    # Falcon, the only class with such a bias that has two kernels, adds it to the mask and in this one to the scores.
    twice = getattr(config, "alibi", False) and getattr(model, "_supports_sdpa", False)
    return f"it adds the model's alibi={config.alibi} twice" if twice else None


def plain_kernel(model: Any) -> str:
    """The kernel that other ones are compared with."""
    return "eager" if eager_problem(model) is None else "sdpa"


def dense_kernel(model: Any) -> str:
    """The faster kernel of those that take any mask and compute what `model` is."""
    return "sdpa" if getattr(model, "_supports_sdpa", False) and sdpa_problem(model) is None else "eager"


def use_kernel(model: Any, implementation: str) -> None:
    """Switch a Hugging Face model, or the one that `model` wraps, to another kernel that its class has."""
    # Not `set_attn_implementation`: it reads the source of the class, which FSDP2 has replaced by one of its own.
    config = pretrained_part(model).config
    for part in (config, config.get_text_config()):
        part._attn_implementation = implementation


@contextmanager
def without_flex_attention(model: Any) -> Iterator[None]:
    """A model with ``flex_attention`` has a dense kernel inside: block masks would be made anew for every token."""
    if getattr(model.config, "_attn_implementation", "") != FLEX:
        yield
        return
    use_kernel(model, dense_kernel(pretrained_part(model)))
    try:
        yield
    finally:
        use_kernel(model, FLEX)
