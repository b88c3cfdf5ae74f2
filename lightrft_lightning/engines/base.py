"""The protocol between a trainer and whatever generates: in-process model, vLLM, SGLang or a server."""

from __future__ import annotations

import math
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lightrft_lightning.experience.trajectory import Completion, SamplingParams
from lightrft_lightning.models.tokens import check_ids, embedded_ids, end_ids, placeholder_ids, prompt_ids

if TYPE_CHECKING:
    from lightrft_lightning.strategies.base import StrategyBase


class EngineError(RuntimeError):
    """An engine died, hung, refused a call or gave a wrong answer; the message names the engine and the call."""


class Generation:
    """Groups that are generated in a thread of their own while the caller does something else.

    Args:
        groups: what to go through: a prompt's position and its completions.
        on_group: called with each of them in that thread.
    """

    def __init__(
        self,
        groups: Iterable[tuple[int, list[Completion]]],
        on_group: Callable[[int, list[Completion]], None] | None = None,
    ) -> None:
        self.done: dict[int, list[Completion]] = {}
        self.error: Exception | None = None
        self._groups, self._on_group = groups, on_group
        self._thread = threading.Thread(target=self._run, name="lightrft-rollout", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            for i, completions in self._groups:
                if self._on_group is not None:
                    self._on_group(i, completions)
                self.done[i] = completions
        except Exception as err:
            self.error = err

    def wait(self) -> None:
        """Wait for the end, also that by an error. The engine's deadline is the limit."""
        self._thread.join()

    def finish(self) -> dict[int, list[Completion]]:
        """All groups, once they are there.

        Raises:
            EngineError: as `RolloutEngine.generate`.
        """
        self.wait()
        if self.error is not None:
            raise self.error
        return self.done


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
    generates_elsewhere: bool = False
    """Whether another process generates, so that this one can train meanwhile (`begin`)."""
    has_copy: bool = False
    """Whether the engine has weights of its own, which `update_weights` must bring up to date."""

    end_ids: frozenset[int] = frozenset()
    """Ids that end a completion."""
    vocabulary_size: int | None = None
    """How many ids the model has embeddings for, if that is known."""
    placeholders: frozenset[int] = frozenset()
    """Ids that stand for images and the like, with an embedding or without."""

    def know_tokens(self, model: Any, tokenizer: Any) -> None:
        """Find out which ids end a completion and which there are, of a model or its folder."""
        self.end_ids, self.vocabulary_size = end_ids(model, tokenizer), embedded_ids(model)
        self.placeholders = placeholder_ids(model)

    def check_ids(self, prompts: Sequence[Sequence[int]], images: bool = False) -> None:
        """Raise ValueError if a prompt has an id that the model cannot read; before anything is generated.

        Args:
            prompts: their token ids.
            images: whether there are some, for which placeholders stand.
        """
        named = ((f"prompt {i}", ids) for i, ids in enumerate(prompts))
        check_ids(named, self.vocabulary_size, self.tokenizer, self.placeholders if images else ())

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of prompts that are given as text, by the engine's own tokenizer."""
        if self.tokenizer is None:
            raise RuntimeError(f"{type(self).__name__} has no tokenizer: give token ids, or a tokenizer")
        return prompt_ids(self.tokenizer, texts)

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

    def begin(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingParams,
        streams: Sequence[int] | None = None,
        on_group: Callable[[int, list[Completion]], None] | None = None,
    ) -> Generation:
        """As `stream`, in the background: to train meanwhile. Nothing else may be asked of the engine until its end.

        All ranks begin it together and finish it together.

        Args:
            prompts: as in `generate`, like
            sampling: and
            streams: are.
            on_group: called once with each prompt's position and its completions, in any thread.

        Raises:
            EngineError: it generates in this process.
        """
        if not self.generates_elsewhere:
            raise EngineError(f"{type(self).__name__} generates in the training process, not beside it")
        return Generation(self.stream(prompts, sampling, streams), on_group)

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
