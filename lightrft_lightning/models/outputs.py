"""What a model's config asks it to give back besides what is needed."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch import nn

log = logging.getLogger(__name__)

_ALSO = ("output_attentions", "output_hidden_states", "output_router_logits")


@contextmanager
def plain_outputs(model: nn.Module) -> Iterator[None]:
    """Inside, `model` gives back named fields, and no attention weights, hidden states or router's logits.

    A config may ask for them at every call (``output_router_logits``, ``return_dict=False``). Their memory would be
    lost, and the loss that a mixture of experts adds for its router takes masks of another form.
    """
    before = [(config, name, getattr(config, name)) for config, name in _asked_for(model)]
    for config, name, value in before:
        setattr(config, name, not value)
    try:
        yield
    finally:
        for config, name, value in before:
            setattr(config, name, value)


def tell_ignored_outputs(model: nn.Module) -> None:
    """One line, if the config asks for a loss that is not computed here."""
    if any(name == "output_router_logits" for _, name in _asked_for(model)):
        rank_zero_only(log.warning)(
            "the model's config has output_router_logits=True: the router's auxiliary loss is not part of the loss here"
        )


def _asked_for(model: Any) -> Iterator[tuple[Any, str]]:
    """Configs of `model` and the names of their settings that are not as they are needed."""
    parts = (model, getattr(model, "base_model", model))
    names = {*_ALSO, *(f"output_{key}" for part in parts for key in getattr(part, "_can_record_outputs", None) or ())}
    # Switching attention weights on again is refused by the setter of the public name under most kernels.
    own = sorted({"_output_attentions" if name == "output_attentions" else name for name in names})
    for config in {id(c): c for c in (model.config, model.config.get_text_config())}.values():
        yield from ((config, name) for name in own if getattr(config, name, False) is True)
        if config.return_dict is False:
            yield config, "return_dict"
