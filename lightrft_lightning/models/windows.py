"""Attention windows: how far back the layers of a model look, and the masks that say so for rows of shared prompts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightrft_lightning.experience.packing import PackedBatch, Window

if TYPE_CHECKING:
    import torch

_SIZES = {"sliding_attention": "sliding_window", "chunked_attention": "attention_chunk_size"}
MASKED_KINDS = {"full_attention", *_SIZES}
"""Kinds of layers (``config.layer_types``) that attend to what a mask says, and to nothing else."""


def layer_windows(config: Any) -> dict[str, Window | None]:
    """The windows of a text model by the kind of its layers; ``""`` stands for all layers where it names no kinds.

    A window that no layer uses, and one of size 0, is none.
    """
    kinds = set(getattr(config, "layer_types", None) or ())
    if not kinds:
        off = getattr(config, "use_sliding_window", None) is False
        size = None if off else getattr(config, "sliding_window", None)
        return {"": Window(size) if size and size > 0 else None}
    return {kind: _window(config, kind) for kind in sorted(kinds)}


def _window(config: Any, kind: str) -> Window | None:
    size = getattr(config, _SIZES.get(kind, ""), None)
    return Window(size, chunked=kind == "chunked_attention") if size and size > 0 else None


def shared_prompt_masks(config: Any, batch: PackedBatch, dtype: torch.dtype, implementation: str) -> Any:
    """What a Hugging Face model takes as ``attention_mask`` for rows of shared prompts.

    Args:
        config: of the text model.
        batch: from `pack`.
        dtype: as in `PackedBatch.attention_mask`, like
        implementation: is.

    Returns:
        A mask, or one for each kind of layer if the layers look back differently far.
    """
    windows, longest = layer_windows(config), None
    if any(windows.values()):
        longest = int(batch.position_ids.max()) + 1
    masks: dict[Window | None, Any] = {}
    by_kind = {}
    for kind, window in windows.items():
        seen = window if window is not None and longest is not None and window.size < longest else None
        if seen not in masks:
            masks[seen] = batch.attention_mask(dtype, implementation, seen)
        by_kind[kind] = masks[seen]
    return next(iter(masks.values())) if len(masks) == 1 else by_kind
