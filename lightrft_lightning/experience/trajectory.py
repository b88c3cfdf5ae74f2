"""What flows through one iteration: a prompt, the completions an engine sampled for it, and what they earned."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from lightrft_lightning._errors import check_types

FinishReason = Literal["eos", "stop", "length"]


@dataclass(frozen=True)
class Prompt:
    """One row of a prompt data set, tokenised once.

    Attributes:
        token_ids: ids of the rendered prompt (chat template applied), the only form the engine and the trainer see.
        text: the same as text, for rewards, logs and sample tables.
        fields: all other columns of the row (e.g. ``answer``), handed to the reward functions by name.
        filler: repeats another prompt so that all ranks have equally many; its completions do not count.
        messages: the conversation that `text` was rendered from; empty if it was plain text.
        completions: ids of the texts that the row itself gives after the prompt, each with its end token: the answer
            for supervised training, the chosen and the rejected text for a reward model.
    """

    token_ids: tuple[int, ...]
    text: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    filler: bool = False
    messages: tuple[Mapping[str, Any], ...] = ()
    completions: tuple[tuple[int, ...], ...] = ()


@dataclass(frozen=True)
class SamplingParams:
    """How an engine draws completions.

    Attributes:
        n: completions per prompt.
        max_new_tokens: length limit of one completion, the end-of-sequence token included.
        temperature: 0 means greedy.
        top_p: nucleus mass, 1.0 keeps the whole distribution.
        top_k: number of candidates, 0 keeps all.
        stop: strings that end a completion; the tokens that complete the string stay in the completion.
        seed: with the request's own index it fixes every draw. The same seed gives the same tokens, however the
            requests are batched.

    Raises:
        ValueError: a value is out of range.
    """

    n: int = 1
    max_new_tokens: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    stop: tuple[str, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        check_types("SamplingParams", SamplingParams, vars(self))
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop
        if not isinstance(stop, list | tuple) or not all(isinstance(s, str) for s in stop):
            raise TypeError(f"SamplingParams(stop={self.stop!r}): must be a string or a list of strings")
        object.__setattr__(self, "stop", tuple(stop))
        checks = {
            "n": (self.n >= 1, "at least 1"),
            "max_new_tokens": (self.max_new_tokens >= 1, "at least 1"),
            "temperature": (self.temperature >= 0, "0 (greedy) or more"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1"),
            "top_k": (self.top_k >= 0, "0 (all tokens) or more"),
            "stop": (all(self.stop), "non-empty strings"),
        }
        for name, (ok, allowed) in checks.items():
            if not ok:
                raise ValueError(f"SamplingParams({name}={getattr(self, name)!r}): must be {allowed}")


@dataclass(frozen=True)
class Completion:
    """What an engine sampled for one request.

    Attributes:
        token_ids: the sampled ids, including the end-of-sequence token if it was sampled.
        logprobs: log-probability of each id under the distribution it was drawn from, temperature included.
        finish_reason: ``eos``, ``stop`` (a stop string) or ``length``.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: FinishReason

    def __post_init__(self) -> None:
        if len(self.token_ids) != len(self.logprobs):
            raise ValueError(f"{len(self.token_ids)} token ids but {len(self.logprobs)} log-probabilities")


@dataclass(frozen=True)
class Episode:
    """What became of a trajectory in an environment.

    Attributes:
        turns: the texts that the policy wrote, one a turn.
        reward: sum of the rewards of all steps.
        errors: turns that the environment says asked for something that does not exist or went wrong.
        failure: why the environment itself broke down; empty if it did not.
    """

    turns: tuple[str, ...]
    reward: float
    errors: int = 0
    failure: str = ""


@dataclass
class Trajectory:
    """One completion with everything the update needs to know about it. Never padded, never re-tokenised.

    Attributes:
        prompt: where it starts.
        completion: what the engine produced.
        group: trajectories with the same number share a prompt and are compared with each other.
        policy_version: the engine's weights version at sampling time.
        mask: True where the policy produced the token (all of them, unless an environment wrote some; their
            log-probabilities in `completion` are 0).
        text: the completion as text, without special tokens.
        episode: its turns, if there is an environment.
        reward: None if the reward failed and its policy is to drop the sample, or if no reward function applies.
        reward_parts: the value of each reward function that applies and did not fail.
        applicable: False if every reward function has returned None.
        old_logprobs: ``[T]`` the trainer's log-probabilities of the completion before the update, if it needs them.
        reference_logprobs: ``[T]`` the same under the reference policy.
        entropies: ``[T]`` of the trainer's distributions, in nats, before the update, if it needs them.
        values: ``[T]`` of the critic before the update, if there is one.
        returns: ``[T]`` what the critic is fitted to.
        advantages: one value a completion token, filled in by the advantage estimator.
    """

    prompt: Prompt
    completion: Completion
    group: int
    policy_version: int = 0
    mask: tuple[bool, ...] = ()
    text: str = ""
    episode: Episode | None = None
    reward: float | None = None
    reward_parts: dict[str, float] = field(default_factory=dict)
    applicable: bool = True
    old_logprobs: Tensor | None = None
    reference_logprobs: Tensor | None = None
    entropies: Tensor | None = None
    values: Tensor | None = None
    returns: Tensor | None = None
    advantages: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        self.mask = self.mask or (True,) * len(self.completion.token_ids)
        if len(self.mask) != len(self.completion.token_ids):
            raise ValueError(f"mask has {len(self.mask)} entries for {len(self.completion.token_ids)} tokens")


def check_batch(batch: Iterable[Any]) -> None:
    """Look at what a data loader has handed out.

    Raises:
        TypeError: it is no list of `Prompt`.
    """
    for item in batch:
        if not isinstance(item, Prompt):
            raise TypeError(
                f"the data loader hands out {type(item).__name__}, {str(item)[:40]!r}, in place of Prompt: pass "
                "trainer.fit(module, datamodule=PromptDataModule(train=<rows>)), which tokenises them"
            )
