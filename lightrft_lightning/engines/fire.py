"""FIRE sampling: the first token at a high temperature, the rest as usual (arXiv 2410.21236)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from lightrft_lightning._seeds import derive_seed
from lightrft_lightning.engines.base import RolloutEngine
from lightrft_lightning.experience.trajectory import Completion, SamplingParams


def stream_with_hot_start(
    engine: RolloutEngine,
    prompts: Sequence[Sequence[int]],
    sampling: SamplingParams,
    streams: Sequence[int],
    temperature: float,
) -> Iterator[tuple[int, list[Completion]]]:
    """As `RolloutEngine.stream`, in two calls of the engine, which an engine with a prefix cache hardly notices.

    Args:
        engine: any.
        prompts: as for `stream`.
        sampling: of all tokens but the first; no stop strings, one of which might begin with the first token.
        streams: as for `stream`.
        temperature: of the first token; its log-probability is that under this temperature.
    """
    n = sampling.n
    groups = engine.generate(prompts, replace(sampling, temperature=temperature, max_new_tokens=1), streams)
    running = [
        (i, k)
        for i, group in enumerate(groups)
        for k, first in enumerate(group)
        if first.finish_reason == "length" and sampling.max_new_tokens > 1
    ]
    rest = replace(sampling, n=1, max_new_tokens=sampling.max_new_tokens - 1 or 1, seed=derive_seed(sampling.seed, 1))
    left = [sum(i == j for j, _ in running) for i in range(len(prompts))]
    yield from ((i, group) for i, group in enumerate(groups) if not left[i])
    continued = [[*prompts[i], *groups[i][k].token_ids] for i, k in running]
    for at, (completion,) in engine.stream(continued, rest, [streams[i] * n + k for i, k in running]):
        i, k = running[at]
        first = groups[i][k]
        groups[i][k] = Completion(
            first.token_ids + completion.token_ids, first.logprobs + completion.logprobs, completion.finish_reason
        )
        left[i] -= 1
        if not left[i]:
            yield i, groups[i]
