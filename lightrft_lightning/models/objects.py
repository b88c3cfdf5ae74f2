"""Model objects that a user passes: what training takes apart has to be what the object computes."""

from __future__ import annotations

from typing import Any

from torch import nn

from lightrft_lightning.models.logprobs import pretrained_part


def check_model_object(model: Any) -> None:
    """Refuse objects whose passes are not those of a Transformers model, as training runs its parts.

    Args:
        model: of the user's; anything but a module is a source, and not looked at.

    Raises:
        ValueError: the message says what to pass.
    """
    if not isinstance(model, nn.Module):
        return
    name = type(model).__name__
    if hasattr(model, "_orig_mod"):
        raise ValueError(
            f"model={name}: torch.compile has wrapped the whole model, and training runs parts of it: pass the model "
            "itself, RLHFModule(compile=True) compiles its layers"
        )
    if not hasattr(model, "config"):
        raise ValueError(
            f"model={name}: pass a causal language model of Transformers, or PEFT's around one, without another wrapper"
        )
    inner = pretrained_part(model)
    if "forward" in vars(inner) and not hasattr(inner, "_hf_hook"):  # those of accelerate call the model's own
        raise ValueError(
            f"model={name}: its forward was replaced on the object (by torch.compile, or a library of kernels), and "
            "training runs parts of the model, so that would be passed over: pass the model as its class is"
        )
