"""What can be switched on for the decoder layers of a Hugging Face model: recomputation and compilation."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from lightrft_lightning._errors import import_extra


def checkpoint_activations(model: Any) -> None:
    """Keep the input of each decoder layer for the backward pass, and compute the layer a second time there.

    Only while the model is in training mode, so that generation with a cache is as it was
    (https://docs.pytorch.org/docs/stable/checkpoint.html).

    Raises:
        ValueError: the model's class cannot do that.
    """
    if not model.supports_gradient_checkpointing:
        raise ValueError(f"gradient_checkpointing=True: {type(model).__name__} does not support it; leave it out")
    # Reentrant checkpoints lose the gradient of frozen embeddings (LoRA), and break hooks that gather weights.
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def compile_layers(model: nn.Module) -> None:
    """`torch.compile` each decoder layer in place; at the first pass, once for all of them.

    In place, so that the names of parameters stay. Row lengths are dynamic: there are at most four graphs, for one row
    and several, with gradients and without (https://docs.pytorch.org/tutorials/recipes/regional_compilation.html).

    Raises:
        ValueError: the model has no decoder layers that can be told apart from the rest.
    """
    layers = list(_decoder_layers(model))
    if not layers:
        raise ValueError(f"compile=True: {type(model).__name__} has no layers of Transformers' kind; leave it out")
    for layer in layers:
        if layer._compiled_call_impl is None:
            layer.compile(dynamic=True)


@contextlib.contextmanager
def uncompiled(model: nn.Module) -> Iterator[None]:
    """Compiled layers run as they were inside: a cache that grows would have them compiled again and again."""
    if not any(module._compiled_call_impl for module in model.modules()):
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Dropout and gradient checkpointing off (the latter forbids a cache); every submodule's mode is put back."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def _decoder_layers(model: nn.Module) -> Iterator[nn.Module]:
    kind = import_extra("transformers.modeling_layers", "hf").GradientCheckpointingLayer
    return (module for module in model.modules() if isinstance(module, kind))
