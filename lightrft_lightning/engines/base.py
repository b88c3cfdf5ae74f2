"""The protocol between a trainer and whatever generates: in-process model, vLLM, SGLang or a server."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lightrft_lightning.experience.trajectory import Completion, SamplingParams

if TYPE_CHECKING:
    from lightrft_lightning.strategies.base import StrategyBase


class EngineError(RuntimeError):
    """An engine died, hung, refused a call or gave a wrong answer; the message names the engine and the call."""


class RolloutEngine(ABC):
    """Owns generation and nothing of training.

    The `version` is the number of weight updates the engine has received; every trajectory carries it.
    """

    version: int = 0
    tokenizer: Any = None
    strategy: StrategyBase | None = None
    """What holds the weights, for engines that generate with the model in training."""
    takes_images: bool = False
    """Whether `generate` and `stream` take ``images=``: for each prompt the images that its placeholders stand for."""
    max_temperature: float = math.inf
    """The highest sampling temperature that it takes."""
    has_copy: bool = False
    """Whether the engine has weights of its own, which `update_weights` must bring up to date."""

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of prompts that are given as text, by the engine's own tokenizer."""
        if self.tokenizer is None:
            raise RuntimeError(f"{type(self).__name__} has no tokenizer: give token ids, or a tokenizer")
        return [self.tokenizer(text)["input_ids"] for text in texts]

    @abstractmethod
    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: SamplingParams, streams: Sequence[int] | None = None
    ) -> list[list[Completion]]:
        """Sample `sampling.n` completions for each prompt.

        Args:
            prompts: token ids, one sequence a prompt (ragged).
            sampling: see `SamplingParams`.
            streams: number of the stream of random numbers of each prompt; default: its position. With the prompt's
                position among those of all ranks, the draws do not depend on the number of ranks.

        Returns:
            For each prompt, in order, its `sampling.n` completions.
        """

    def stream(
        self, prompts: Sequence[Sequence[int]], sampling: SamplingParams, streams: Sequence[int] | None = None
    ) -> Iterator[tuple[int, list[Completion]]]:
        """As `generate`, but gives each group as soon as it is finished: the prompt's position and its completions.

        An engine that cannot do this gives all of them at the end.
        """
        yield from enumerate(self.generate(prompts, sampling, streams))

    @abstractmethod
    def update_weights(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Take over the trainer's weights and set `version`.

        Args:
            named_tensors: whole tensors under the names of a Hugging Face checkpoint; a tensor may be overwritten once
                the next one is asked for. All ranks go through it together, also those that do not need it.
            version: the number of updates of this policy.
        """

    # The rest is optional: an engine that shares the trainer's model has nothing of its own to give back.

    def sleep(self, level: int = 1) -> None:  # noqa: B027
        """Give device memory back. Idempotent; an engine with nothing of its own does nothing."""

    def wake_up(self) -> None:  # noqa: B027
        """Undo `sleep`. Idempotent."""

    def close(self) -> None:  # noqa: B027
        """Release everything. Idempotent."""
