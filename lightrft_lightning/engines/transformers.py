"""The embedded engine: generates in-process with the training model itself, no server and no second copy.

A group's prompt is prefilled once and its key/value cache is repeated for the group's samples. Sequences that are
finished leave the batch, others take their places, and the cache has no column that only padding is in. Left out on
purpose: paged or preallocated caches (Hugging Face's `DynamicCache` copies itself every step, which was lost in the
noise below 200 tokens of context on a model of SmolLM2-135M's shape, and took 15 to 20 % of a step at 400) and
speculative decoding. Who needs those takes the vLLM or SGLang engine.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from typing_extensions import override

from lightrft_lightning._errors import import_extra
from lightrft_lightning._seeds import derive_seed
from lightrft_lightning.callbacks.rollout import RolloutCallback
from lightrft_lightning.engines.memory import (
    Memory,
    PaddedCache,
    check_weights_stay,
    settle_memory,
    weight_versions,
)
from lightrft_lightning.experience.trajectory import Completion, FinishReason, SamplingParams
from lightrft_lightning.models.attention import without_flex_attention
from lightrft_lightning.models.layers import evaluating, uncompiled
from lightrft_lightning.models.outputs import plain_outputs
from lightrft_lightning.models.rope import length_limit, most_positions
from lightrft_lightning.models.tokens import end_ids

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Dropping rows, and letting others in, copies the cache of those that stay. Waiting until an eighth of the batch is
# finished bounds all copies of one call together by eight times the cache.
_COMPACT_AT = 7 / 8
# Most nuclei are smaller than this; finding the largest 1024 of 49,152 logits is six times faster than sorting them.
_NUCLEUS_CANDIDATES = 1024


class TransformersRollout(RolloutCallback):
    """Generates with the connected Hugging Face model, whose weights it shares.

    Sequence j of a prompt draws its own random numbers, fixed by `sampling.seed`, the prompt's stream and j: the result
    does not depend on `max_batch_size` or on when other sequences finish (up to rounding of the logits, which depends
    on the shape of a matrix product), and torch's global generators are neither read nor advanced.

    The log-probabilities are those of the distribution that a token was drawn from, computed in float32: after
    temperature, then `top_k` (tokens tied with the k-th stay), then `top_p`, renormalised. Greedy decoding
    (temperature 0) reports the log-probability under the plain softmax at temperature 1.

    A completion ends with reason ``eos`` (a token of `models.tokens.end_ids`), ``stop`` (its text contains a stop
    string) or ``length``; of several at the same token, the first of these counts.

    Example:
        >>> trainer = Trainer(callbacks=[TransformersRollout(max_batch_size=64)])  # doctest: +SKIP

    Args:
        max_batch_size: the most sequences decoded at once, to bound the memory of the key/value cache. None: all.

    Raises:
        ValueError: `max_batch_size` is below 1.
    """

    def __init__(self, max_batch_size: int | None = None) -> None:
        if max_batch_size is not None and max_batch_size < 1:
            raise ValueError(f"TransformersRollout(max_batch_size={max_batch_size!r}): must be at least 1, or None")
        self.max_batch_size = max_batch_size
        self._model: PreTrainedModel | None = None
        self._memory: type[Memory] | None = None

    @override
    def connect(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        if model is not self._model:
            self._memory = None
        self._model, self.tokenizer = model, tokenizer
        self.know_tokens(model, tokenizer)

    @property
    def reads_with(self) -> str | None:
        """How the model keeps what it has read (see `engines.memory`), once that is known."""
        return None if self._memory is None else self._memory.told

    def settle(self) -> None:
        """Find out, once for a model, how to generate with it; `generate` does it. With whole weights.

        Raises:
            ValueError: token by token it does not compute what it computes for a whole text, or it changes its weights.
        """
        if self._memory is not None or self._model is None:
            return
        before = weight_versions(self._model)
        with torch.no_grad(), _generating(self._model):
            memory = settle_memory(self._model)
        if weight_versions(self._model) != before:
            check_weights_stay(self._model)
        self._memory = memory

    @override
    def update_weights(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        # The connected model is the one that the optimizer steps, so the new weights are already in place.
        self.version = version

    @override
    def close(self) -> None:
        self._model = self._memory = self.tokenizer = self.strategy = None

    @override
    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: SamplingParams, streams: Sequence[int] | None = None
    ) -> list[list[Completion]]:
        """As in `RolloutEngine`. Sharded weights are gathered for the time of the call, on every rank.

        Raises:
            RuntimeError: `connect` was not called, or the model's logits are not finite.
            ValueError: a prompt is empty, or too long for the model together with `max_new_tokens`; or the model
                computes something else token by token than for a whole text, which is looked at once.
        """
        groups = dict(self._groups(prompts, sampling, streams))
        return [groups[i] for i in range(len(prompts))]

    @override
    def stream(
        self, prompts: Sequence[Sequence[int]], sampling: SamplingParams, streams: Sequence[int] | None = None
    ) -> Iterator[tuple[int, list[Completion]]]:
        """As `generate`, each group once its last sequence is finished."""
        if type(self).generate is not TransformersRollout.generate:
            return super().stream(prompts, sampling, streams)  # of a subclass, which changes that alone
        return self._groups(prompts, sampling, streams)

    def _groups(
        self, prompts: Sequence[Sequence[int]], sampling: SamplingParams, streams: Sequence[int] | None
    ) -> Iterator[tuple[int, list[Completion]]]:
        if self._model is None or self.tokenizer is None:
            raise RuntimeError("TransformersRollout has no model yet: call connect(model, tokenizer) before generate()")
        _check_prompts(prompts, sampling.max_new_tokens, self._model.config)
        self.check_ids(prompts)
        # Neighbours of similar length need little padding, and equal prompts land in the same prefill.
        order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), tuple(prompts[i])))
        groups = {
            i: [_Row(i, tuple(prompts[i]), i if streams is None else streams[i], j) for j in range(sampling.n)]
            for i in order
        }
        whole = nullcontext() if self.strategy is None else self.strategy.gathered_parameters(self._model)
        with whole:
            self.settle()
            rows = [row for i in order for row in groups[i]]
            decoder = _Decoder(self._model, self.tokenizer, sampling, rows, self._memory or PaddedCache)
            finished = decoder.run(self.max_batch_size or max(1, len(decoder.waiting)))
            while groups:
                # no_grad rather than inference_mode: nothing made here may be refused by autograd when training
                # continues. Left for the groups of a step, as the caller does other things with it.
                with torch.no_grad(), _generating(self._model):
                    done = next(filter(None, (_whole(rows, groups) for rows in finished)))
                for i in done:
                    yield i, [row.completion() for row in groups.pop(i)]


@dataclass
class _Row:
    """One sequence being decoded: sample number `sample` of prompt number `prompt`, which draws from `stream`."""

    prompt: int
    prompt_ids: tuple[int, ...]
    stream: int
    sample: int
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: FinishReason | None = None

    def completion(self) -> Completion:
        assert self.finish_reason is not None
        return Completion(tuple(self.token_ids), tuple(self.logprobs), self.finish_reason)


def _whole(finished: Iterable[_Row], groups: Mapping[int, Sequence[_Row]]) -> list[int]:
    """Those of the `groups` whose last sequences are among the `finished` ones."""
    prompts = dict.fromkeys(row.prompt for row in finished)
    return [i for i in prompts if all(row.finish_reason is not None for row in groups[i])]


class _Decoder:
    """The sequences of one call, each prompt prefilled once, then one token a step for all that are in the batch."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        sampling: SamplingParams,
        rows: Iterable[_Row],
        memory: type[Memory] = PaddedCache,
    ) -> None:
        self.model, self.tokenizer, self.sampling, self.memory = model, tokenizer, sampling, memory
        self.waiting = deque(rows)
        # Rows that are finished run on until they leave the batch, but not to positions that the model does not have.
        self.last_position = max((len(row.prompt_ids) for row in self.waiting), default=0) + sampling.max_new_tokens - 1
        self.device = next(model.parameters()).device
        self.eos_ids = end_ids(model, tokenizer)
        # A stop string of b bytes that ends in the newest token covers at most b tokens. One more, because some
        # tokenizers strip the space in front of the first token that they decode.
        self.stop_window = max((len(stop.encode()) for stop in sampling.stop), default=0) + 1
        self._cut: tuple[tuple[int, ...], Memory] | None = None
        """A prompt of whose samples some wait, prefilled."""

    def run(self, limit: int) -> Iterator[list[_Row]]:
        """Decode all sequences, at most `limit` at a time; yields those that a step has finished."""
        while self.waiting:
            rows, state = self.admit(limit)
            uniforms = self.draws(rows)
            while rows:
                steps = torch.tensor([min(len(row.token_ids), self.sampling.max_new_tokens - 1) for row in rows])
                drawn = uniforms.gather(1, steps.to(uniforms.device)[:, None]).squeeze(1)
                tokens, logprobs = _sample(state.logits, self.sampling, drawn)
                yield self.append(rows, tokens.tolist(), logprobs.tolist())
                live = [k for k, row in enumerate(rows) if row.finish_reason is None]
                if not live:
                    break
                leave = len(live) <= _COMPACT_AT * len(rows)
                if leave:
                    state.select(live)
                    rows, uniforms, tokens = [rows[k] for k in live], uniforms[live], tokens[live]
                state.add(tokens)
                if leave and self.waiting and state.can_grow:
                    new, joining = self.admit(limit - len(rows))
                    state.join(joining)
                    rows, uniforms = rows + new, torch.cat([uniforms, self.draws(new)])

    def admit(self, count: int) -> tuple[list[_Row], Memory]:
        """The next `count` sequences that wait, or as many of them as can be together, ready for their first token."""
        cut, self._cut = self._cut, None
        if cut is not None and not cut[1].can_grow:
            count = min(count, sum(row.prompt_ids == cut[0] for row in self.waiting))
        if not self.memory.pads:
            length = len(self.waiting[0].prompt_ids)
            count = min(count, sum(len(row.prompt_ids) == length for row in self.waiting))
        rows = [self.waiting.popleft() for _ in range(min(count, len(self.waiting)))]
        unique = list(dict.fromkeys(row.prompt_ids for row in rows))
        if cut is None:
            state = self.prefill(unique)
        else:
            _, state = cut
            if len(unique) > 1:
                state.join(self.prefill(unique[1:]))
        if self.waiting and self.waiting[0].prompt_ids == unique[-1]:
            rest = state.copy()
            rest.select([len(unique) - 1])
            self._cut = unique[-1], rest
        state.select([unique.index(row.prompt_ids) for row in rows])
        return rows, state

    def prefill(self, prompts: Sequence[Sequence[int]]) -> Memory:
        return self.memory(self.model, prompts, self.last_position)

    def draws(self, rows: Sequence[_Row]) -> Tensor:
        """[B, max_new_tokens] uniform numbers in [0, 1), float64; row b depends on the seed and on rows[b] only."""
        s = self.sampling
        streams = [np.random.default_rng(derive_seed(s.seed, row.stream, row.sample)) for row in rows]
        device = "cpu" if self.device.type == "mps" else self.device
        return torch.from_numpy(np.stack([g.random(s.max_new_tokens) for g in streams])).to(device)

    def append(self, rows: Sequence[_Row], tokens: Sequence[int], logprobs: Sequence[float]) -> list[_Row]:
        """Give each live row its new token; returns those that this finishes."""
        live = [row for row in rows if row.finish_reason is None]
        going = []
        for row, token, logprob in zip(rows, tokens, logprobs, strict=True):
            if row.finish_reason is not None:
                continue
            if math.isnan(logprob):
                raise RuntimeError(
                    f"the model's logits for prompt {row.prompt} are not finite after {len(row.token_ids)} new tokens: "
                    "look for NaN or infinity in its weights"
                )
            row.token_ids.append(token)
            row.logprobs.append(logprob)
            if token in self.eos_ids:
                row.finish_reason = "eos"
            else:
                going.append(row)
        self.apply_stop_strings(going)
        for row in going:
            if row.finish_reason is None and len(row.token_ids) == self.sampling.max_new_tokens:
                row.finish_reason = "length"
        return [row for row in live if row.finish_reason is not None]

    def apply_stop_strings(self, rows: Sequence[_Row]) -> None:
        """Finish the rows in which the newest token completed a stop string."""
        if not self.sampling.stop or not rows:
            return
        tails = [row.token_ids[-self.stop_window :] for row in rows]
        # Special tokens stay in the text: a stop string may name one.
        for row, text in zip(rows, self.tokenizer.batch_decode(tails, skip_special_tokens=False), strict=True):
            if any(stop in text for stop in self.sampling.stop):
                row.finish_reason = "stop"


def _sample(logits: Tensor, sampling: SamplingParams, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens [B] and their log-probabilities [B] from float32 logits [B, V] and uniform numbers [B] in [0, 1)."""
    if sampling.temperature == 0:
        tokens, logprobs = logits.argmax(-1), logits.log_softmax(-1)
    else:
        logprobs = _restrict(logits / sampling.temperature, sampling).log_softmax(-1)
        tokens = _inverse_cdf(logprobs.exp(), uniforms)
    return tokens, logprobs.gather(-1, tokens[:, None]).squeeze(-1)


def _restrict(logits: Tensor, sampling: SamplingParams) -> Tensor:
    """Set the logits outside the top-k, then outside the nucleus of what is left, to minus infinity. [B, V]"""
    vocabulary = logits.shape[-1]
    if 0 < sampling.top_k < vocabulary:
        kth = logits.topk(sampling.top_k).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -math.inf)
    if sampling.top_p < 1:
        logits = _nucleus(logits, sampling.top_p)
    return logits


def _nucleus(logits: Tensor, top_p: float) -> Tensor:
    """Keep the smallest set of most probable tokens whose mass reaches `top_p` (Holtzman et al., 1904.09751). [B, V]

    Tokens tied with the least probable member stay.
    """
    probs = logits.softmax(-1)
    for size in (min(_NUCLEUS_CANDIDATES, probs.shape[-1]), probs.shape[-1]):
        largest = probs.topk(size).values
        mass = largest.cumsum(-1, dtype=torch.float64)
        if bool((mass[:, -1] >= top_p).all()):
            break
    inside = mass - largest < top_p
    threshold = largest.masked_fill(~inside, math.inf).amin(-1, keepdim=True)
    return logits.masked_fill(probs < threshold, -math.inf)


def _inverse_cdf(probs: Tensor, uniforms: Tensor) -> Tensor:
    """The token [B] in whose slice of the cumulative probabilities each uniform number lies. [B, V], [B]

    The sum runs in float64: in float32, 49,152 terms would shift the slices by more than the probability of a rare
    token. A token of probability 0 has an empty slice and is never returned.
    """
    # Converting first is several times faster on the CPU than cumsum(dtype=torch.float64).
    cdf = probs.double().cumsum(-1)
    targets = uniforms[:, None] * cdf[:, -1:]
    tokens = torch.searchsorted(cdf, targets, right=True).clamp(max=probs.shape[-1] - 1)
    # A parallel sum (CUDA) may round an empty slice to one unit in the last place, so look at what was picked.
    impossible = probs.gather(-1, tokens) == 0
    if bool(impossible.any()):
        tokens = torch.where(impossible, probs.argmax(-1, keepdim=True), tokens)
    return tokens.squeeze(-1)


def _check_prompts(prompts: Sequence[Sequence[int]], max_new_tokens: int, config: Any) -> None:
    text = config.get_text_config(decoder=True)
    window = most_positions(config) or math.inf
    same, kind = length_limit(text) or (math.inf, "")
    for i, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise ValueError(f"prompt {i} has no tokens: the model needs at least one to start from")
        if len(prompt) + max_new_tokens > window:
            raise ValueError(
                f"prompt {i} has {len(prompt)} tokens; with max_new_tokens={max_new_tokens} that is "
                f"{len(prompt) + max_new_tokens}, and the model has positions for {window} "
                "(max_position_embeddings). Shorten the prompt or lower max_new_tokens."
            )
        if len(prompt) + max_new_tokens > same:
            raise ValueError(
                f"prompt {i} has {len(prompt)} tokens; with max_new_tokens={max_new_tokens} that is "
                f"{len(prompt) + max_new_tokens}, and beyond {same} the positions of the model's rope_type={kind!r} "
                "depend on the whole text and on those beside it. Shorten the prompt or lower max_new_tokens."
            )


@contextmanager
def _generating(model: PreTrainedModel) -> Iterator[None]:
    """What `model` is like while it generates."""
    with (
        evaluating(model),
        uncompiled(model),
        without_flex_attention(model),
        plain_outputs(model),
        _grouped_attention(),
    ):
        yield


@contextmanager
def _grouped_attention() -> Iterator[None]:
    """On the CPU, let a decoding step read the cache as it is.

    For a batch with padding, transformers' sdpa repeats every key and value head for all of its query heads, in every
    layer and step; torch's kernel does not need that. With 64 sequences of 400 tokens, 9 query and 3 key/value heads, a
    layer's attention takes 5 ms in place of 67 ms.
    """
    attention_functions = import_extra("transformers.modeling_utils", "hf").ALL_ATTENTION_FUNCTIONS
    sdpa: Callable[..., tuple[Tensor, None]] = attention_functions["sdpa"]

    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, None]:
        grouped = query.shape[1] != key.shape[1] and query.shape[2] == 1 and query.device.type == "cpu"
        if not grouped or kwargs.get("position_bias") is not None:
            return sdpa(module, query, key, value, attention_mask, **kwargs)
        out = nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=attention_mask, scale=kwargs.get("scaling"), enable_gqa=True
        )
        return out.transpose(1, 2).contiguous(), None

    attention_functions["sdpa"] = attention
    try:
        yield
    finally:
        del attention_functions["sdpa"]  # uncovers the registered function ...
        if attention_functions["sdpa"] is not sdpa:  # ... which a user may have covered with one of their own
            attention_functions["sdpa"] = sdpa
