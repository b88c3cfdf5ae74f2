"""What vLLM is asked for, and what it answers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from lightrft_lightning._seeds import derive_seed
from lightrft_lightning.engines.base import EngineError
from lightrft_lightning.experience.trajectory import Completion, FinishReason, SamplingParams


def sampling_params(sampling: SamplingParams, stream: int, end_ids: Iterable[int] = ()) -> Any:
    """The `SamplingParams` of vLLM for a prompt.

    Args:
        sampling: what is asked for.
        stream: number of the prompt's stream of random numbers.
        end_ids: ids that end a completion.
    """
    from vllm.sampling_params import RequestOutputKind
    from vllm.sampling_params import SamplingParams as VLLMSamplingParams

    greedy = sampling.temperature == 0
    return VLLMSamplingParams(
        n=1 if greedy else sampling.n,  # greedy completions are all the same
        max_tokens=sampling.max_new_tokens,
        temperature=sampling.temperature,
        top_p=1.0 if greedy else sampling.top_p,
        top_k=0 if greedy else sampling.top_k,
        stop=list(sampling.stop),
        stop_token_ids=sorted(end_ids),
        include_stop_str_in_output=True,
        detokenize=bool(sampling.stop),
        seed=None if greedy else derive_seed(sampling.seed, stream),  # vLLM adds the number of the sample
        logprobs=0,  # of the sampled token only
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def completions(output: Any, sampling: SamplingParams) -> list[Completion]:
    """A finished request's completions.

    Raises:
        EngineError: too few of them, or one without its log-probabilities.
    """
    drawn = sorted(output.outputs, key=lambda sample: sample.index)
    wanted = sampling.n if sampling.temperature else 1
    if len(drawn) != wanted:
        raise EngineError(f"VLLMRollout: asked for {wanted} completions, vLLM returned {len(drawn)}")
    return [_completion(sample) for sample in drawn] * (sampling.n // wanted)


def _completion(sample: Any) -> Completion:
    ids = tuple(sample.token_ids)
    if not ids or sample.logprobs is None or len(sample.logprobs) != len(ids):
        raise EngineError(
            f"VLLMRollout: a completion of {len(ids)} tokens came with "
            f"{len(sample.logprobs or ())} log-probabilities (finish reason {sample.finish_reason!r})"
        )
    logprobs = tuple(float(at[token].logprob) for token, at in zip(ids, sample.logprobs, strict=True))
    if sample.finish_reason not in ("stop", "length"):
        raise EngineError(f"VLLMRollout: a completion ended with {sample.finish_reason!r}")
    reason: FinishReason = "length" if sample.finish_reason == "length" else "eos"
    return Completion(ids, logprobs, "stop" if isinstance(sample.stop_reason, str) else reason)
