"""The modes that a model computes in; recomputation and compilation of the decoder layers of a Hugging Face model."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.modules.dropout import _DropoutNd

from lightrft_lightning._errors import import_extra

_RANDOM = re.compile("drop|jitter|noise", re.IGNORECASE)
"""In names of attributes that say how random a module is."""


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
    layers = list(decoder_layers(model))
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
def evaluating(*models: nn.Module, recompute: bool = False) -> Iterator[None]:
    """Evaluation mode: no dropout, nothing random, running means as they are; every submodule's mode is put back.

    Args:
        *models: in this mode inside.
        recompute: layers with gradient checkpointing are computed a second time in backward passes here too. Not for
            generation, since it forbids a cache.
    """
    # But for RWKV's, which divides its weights in evaluation mode, for float16: they would be trained and saved so.
    inside = (m for model in models for m in model.modules() if not hasattr(m, "layers_are_rescaled"))
    modes = {module: module.training for module in inside}
    recomputed = [m for m in modes if recompute and getattr(m, "gradient_checkpointing", False)]
    functions: dict[Any, Any] = {m: m._gradient_checkpointing_func for m in recomputed if isinstance(m, _layer_class())}
    for module in modes:  # not by `eval()`, which a module may answer by merging weights, say
        module.training = False
    for layer, checkpoint in functions.items():
        # Transformers recomputes layers in training mode only: they say so outside, and are in evaluation mode inside.
        layer.training = True
        layer._gradient_checkpointing_func = _in_evaluation_mode(layer, checkpoint)
    try:
        yield
    finally:
        for layer, checkpoint in functions.items():
            layer._gradient_checkpointing_func = checkpoint
        for module, training in modes.items():
            module.training = training


def _in_evaluation_mode(layer: nn.Module, checkpoint: Callable[..., Any]) -> Callable[..., Any]:
    """`checkpoint` for a function in which, at each of its computations, `layer` itself is in evaluation mode."""

    def run(function: Callable[..., Any], *args: Any) -> Any:
        def evaluated(*args: Any) -> Any:
            training, layer.training = layer.training, False
            try:
                return function(*args)
            finally:
                layer.training = training

        return checkpoint(evaluated, *args)

    return run


def in_training_mode(model: nn.Module) -> nn.Module:
    """`model`, in training mode if `from_pretrained` has left it in evaluation mode.

    One that is in training mode stays as it is, so that parts which the user has put into evaluation mode stay there.
    """
    # An attribute of the class: a PEFT model, whose own mode says nothing of its base model's, passes those on.
    pretrained = (m for m in model.modules() if hasattr(type(m), "base_model_prefix"))
    return model if next(pretrained, model).training else model.train()


def randomness(model: nn.Module) -> dict[str, float]:
    """What makes a forward pass random in training mode: dropout, dropped layers, noise; the most of each by name."""
    found: dict[str, float] = {}
    for name, module in model.named_modules():
        if isinstance(module, _DropoutNd):
            parts = [part for part in name.split(".") if "drop" in part.lower()]
            strengths = {parts[-1] if parts else name: float(module.p)}
        else:
            strengths = {k: v for k, v in vars(module).items() if isinstance(v, float) and _RANDOM.search(k)}
        for key, strength in strengths.items():
            found[key] = max(strength, found.get(key, 0.0))
    return {name: strength for name, strength in sorted(found.items()) if strength > 0}


def decoder_layers(model: nn.Module) -> Iterator[nn.Module]:
    """The layers of a Hugging Face model, all of which are alike."""
    return (module for module in model.modules() if isinstance(module, _layer_class()))


def _layer_class() -> Any:
    return import_extra("transformers.modeling_layers", "hf").GradientCheckpointingLayer
