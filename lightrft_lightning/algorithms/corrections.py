"""Rollout–training mismatch: an engine and the trainer give the same tokens different log-probabilities."""

from __future__ import annotations

from torch import Tensor

from lightrft_lightning.algorithms.kl import kl_penalty


def mismatch_metrics(
    trainer_logprobs: Tensor, engine_logprobs: Tensor, mask: Tensor | None = None
) -> dict[str, Tensor]:
    """How far the trainer's policy is from the one that sampled (https://fengyao.notion.site/off-policy-rl).

    Args:
        trainer_logprobs: of the sampled tokens, any shape.
        engine_logprobs: the same tokens as the engine reported them, the same shape.
        mask: the same shape, true at policy tokens; all of them if None.

    Returns:
        Scalars: ``mismatch_mean`` and ``mismatch_max`` of ``|trainer - engine|`` in nats, ``mismatch_kl``
        (KL(engine || trainer), k3) and ``mismatch_outside``, the share of tokens whose ratio is outside [1/2, 2].
        Empty if there is no token.

    Raises:
        ValueError: the shapes differ.
    """
    if trainer_logprobs.shape != engine_logprobs.shape:
        raise ValueError(
            f"trainer_logprobs has shape {tuple(trainer_logprobs.shape)}, "
            f"engine_logprobs {tuple(engine_logprobs.shape)}"
        )
    trainer, engine = trainer_logprobs.detach(), engine_logprobs.detach()
    if mask is not None:
        trainer, engine = trainer[mask.bool()], engine[mask.bool()]
    if not trainer.numel():
        return {}
    delta = trainer - engine
    ratio = delta.exp()
    return {
        "mismatch_mean": delta.abs().mean(),
        "mismatch_max": delta.abs().max(),
        "mismatch_kl": kl_penalty("k3", engine, trainer).mean(),
        "mismatch_outside": ((ratio < 0.5) | (ratio > 2)).to(delta.dtype).mean(),
    }
