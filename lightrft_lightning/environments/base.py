"""The interface of environments."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Awaitable
from dataclasses import dataclass
from typing import ClassVar

from lightrft_lightning._registry import Registry
from lightrft_lightning.experience.trajectory import FinishReason, Prompt


@dataclass(frozen=True)
class Turn:
    """What the policy wrote in one turn.

    Attributes:
        text: without special tokens; a stop string that ended it is part of it.
        token_ids: the sampled ids.
        finish_reason: ``eos``, ``stop`` (a stop string) or ``length``.
        number: 1 for the first.
        last: no turn will follow, whatever the environment says: all turns or all tokens are used up.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    number: int
    last: bool


@dataclass(frozen=True)
class Observation:
    """What the environment makes of a turn.

    Attributes:
        text: what the policy reads next; if no turn follows, nobody reads it.
        reward: of this turn; those of all turns are added up. None counts as 0.
        done: the trajectory ends here.
        error: the turn asked for something that does not exist or went wrong; only counted, in ``train/tool_errors``.
        token_ids: in place of `text`, exactly these tokens and nothing around them.
    """

    text: str = ""
    reward: float | None = None
    done: bool = False
    error: bool = False
    token_ids: tuple[int, ...] | None = None


class Environment(ABC):
    """Answers the turns of one trajectory; every trajectory has an instance of its own, so state is kept in `self`.

    `reset`, `step` and `close` run in threads, many trajectories at a time, each call with a deadline. One that raises,
    takes too long or returns something else costs its own trajectory, as a failed reward does.
    """

    role: ClassVar[str | None] = "user"
    """Role of the observations for the tokenizer's chat template, like ``user`` or ``tool``; None, or prompts that were
    not rendered with one: the observation's text follows the policy's as it is."""

    def reset(self, prompt: Prompt, seed: int) -> None:  # noqa: B027
        """Begin. What the policy is to read before its first turn belongs into the prompt.

        Args:
            prompt: with the other columns of its row in ``prompt.fields``.
            seed: for the environment's own randomness; the same for all trajectories of a group, which are compared.
        """

    @abstractmethod
    def step(self, turn: Turn) -> Observation | Awaitable[Observation]:
        """Answer one turn. May be ``async def``."""

    def close(self) -> None:  # noqa: B027
        """Release what `reset` took; called once, also after a failure."""


ENVIRONMENTS: Registry[type[Environment]] = Registry("environment")
"""Environments by name. Extend with ``@ENVIRONMENTS.register("name")``."""
