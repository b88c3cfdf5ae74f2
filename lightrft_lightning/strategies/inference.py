"""The part of the strategy interface that looks after the engines next to the training processes."""

from __future__ import annotations

import itertools
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from lightrft_lightning.config import StrategyConfig

if TYPE_CHECKING:
    from lightrft_lightning.engines.base import RolloutEngine
    from lightrft_lightning.experience.trajectory import Completion, SamplingParams


class InferenceEngines:
    """Build engines, generate with them, update and sleep them; a base class of `StrategyBase`."""

    config: StrategyConfig
    global_rank: int
    world_size: int
    inference_engine: RolloutEngine | None = None

    def setup_inference_engine(
        self,
        config: Any = None,
        engine_type: str | RolloutEngine | None = None,
        actor: nn.Module | None = None,
        tokenizer: Any = None,
        args: Any = None,
    ) -> RolloutEngine:
        """Build the engine that generates, and keep it as `inference_engine`.

        Args:
            config: as in `StrategyConfig.from_args`; default: the strategy's own.
            engine_type: ``vllm``, ``sglang``, ``transformers``, or an engine with settings of its own, e.g.
                ``VLLMRollout(engine_args={...})``; default `config.engine_type`.
            actor: the model whose weights the engine generates with.
            tokenizer: its tokenizer; default: the one of the folder that the actor was loaded from.
            args: LightRFT's name of `config`.

        Raises:
            ValueError: an unknown engine, or no actor.
            ImportError: the engine's package is not installed.
        """
        from lightrft_lightning.engines.factory import create_engine

        config = args if config is None else config
        settings = self.config if config is None else StrategyConfig.from_args(config)
        self.inference_engine = create_engine(engine_type or settings.engine_type, settings, actor, tokenizer, self)  # type: ignore[arg-type]
        return self.inference_engine

    def engines_sleep(self, engines: RolloutEngine | Iterable[RolloutEngine], level: int = 1) -> None:
        """Let engines give their device memory back; idempotent.

        Args:
            engines: of this package, or objects with ``release_memory_occupation``, as SGLang's own.
            level: see `RolloutEngine.sleep`.
        """
        for engine in _as_list(engines):
            engine.sleep(level) if hasattr(engine, "sleep") else engine.release_memory_occupation()

    def engines_wake_up(self, engines: RolloutEngine | Iterable[RolloutEngine]) -> None:
        """Undo `engines_sleep`; idempotent."""
        for engine in _as_list(engines):
            engine.wake_up() if hasattr(engine, "wake_up") else engine.resume_memory_occupation()

    def maybe_sleep_inference_engine(self) -> None:
        """`engines_sleep` of the strategy's own engine, if it has one and `enable_engine_sleep` is set."""
        if self.inference_engine is not None and self.config.enable_engine_sleep:
            self.engines_sleep(self.inference_engine)

    def wakeup_inference_engine(self) -> None:
        """`engines_wake_up` of the strategy's own engine, if it has one."""
        if self.inference_engine is not None:
            self.engines_wake_up(self.inference_engine)

    def gather_and_generate(
        self,
        sampling_params: SamplingParams | Mapping[str, Any],
        all_prompt_token_ids: Sequence[Sequence[int]] | None = None,
        all_prompts: Sequence[str] | None = None,
        all_images: Sequence[Any] | None = None,
        sleep_engine: bool = True,
        images_num: Sequence[int] | None = None,
        all_videos: Sequence[Any] | None = None,
        videos_num: Sequence[int] | None = None,
    ) -> list[list[Completion]]:
        """Generate for this rank's prompts with the strategy's engine.

        Args:
            sampling_params: `SamplingParams`, or a mapping with its fields.
            all_prompt_token_ids: prompts as token ids, ragged; or
            all_prompts: prompts as text, tokenised by the engine's tokenizer.
            all_images: for each prompt its images, one for each placeholder in it; refused by engines of text models.
            sleep_engine: let the engine sleep afterwards if `enable_engine_sleep` is set.
            images_num: how many images each prompt has, if `all_images` is one flat list.
            all_videos: refused, unless there are none;
            videos_num: likewise.

        Returns:
            For each prompt, in order, its completions: token ids, log-probabilities and finish reason.
        """
        from lightrft_lightning.experience.trajectory import SamplingParams

        engine = self._engine()
        if any(video for video in all_videos or ()) or any(videos_num or ()):
            raise ValueError("all_videos: engines take text and images")
        all_images = _by_prompt(all_images, images_num)
        if all_images is not None and not engine.takes_images:
            raise ValueError(f"all_images: {type(engine).__name__} generates from text only, with this model")
        if (all_prompt_token_ids is None) == (all_prompts is None):
            raise ValueError("give exactly one of all_prompt_token_ids and all_prompts")
        if all_prompt_token_ids is None:
            assert all_prompts is not None
            all_prompt_token_ids = engine.tokenize(all_prompts)
        if not isinstance(sampling_params, SamplingParams):
            sampling_params = SamplingParams(**sampling_params)
        self.wakeup_inference_engine()
        rank, ranks = self.global_rank, self.world_size
        streams = [i * ranks + rank for i in range(len(all_prompt_token_ids))]
        images: dict[str, Any] = {} if all_images is None else {"images": all_images}
        completions = engine.generate(all_prompt_token_ids, sampling_params, streams, **images)
        if sleep_engine:
            self.maybe_sleep_inference_engine()
        return completions

    def update_engine_weights(self, actor: nn.Module) -> None:
        """Give the engine the actor's current weights and advance its version."""
        from lightrft_lightning.engines.weight_sync import PolicyWeights

        engine = self._engine()
        engine.update_weights(PolicyWeights(self, actor), engine.version + 1)  # type: ignore[arg-type]

    def named_full_tensors(self, model: nn.Module, names: Container[str] | None = None) -> Iterator[tuple[str, Tensor]]:
        """Names and whole values of the parameters, each once; all ranks must go through it together.

        Args:
            model: as it was prepared, or a part of it.
            names: leave out all others, and do not gather them.
        """
        for name, parameter in model.named_parameters():
            if names is None or name in names:
                yield name, parameter.detach()

    def _engine(self) -> RolloutEngine:
        if self.inference_engine is None:
            raise RuntimeError("no inference engine: call setup_inference_engine(...) first")
        return self.inference_engine


def _as_list(engines: Any) -> Iterator[Any]:
    return iter(engines) if isinstance(engines, Iterable) else iter((engines,))


def _by_prompt(images: Sequence[Any] | None, counts: Sequence[int] | None) -> Sequence[Any] | None:
    """The images of each prompt; None if there are none at all."""
    if images is None or all(image is None for image in images):
        return None
    if counts is None or all(of_one is None or isinstance(of_one, list | tuple) for of_one in images):
        return [[] if of_one is None else of_one for of_one in images]
    if sum(counts) != len(images):
        raise ValueError(f"images_num says {sum(counts)} images, all_images has {len(images)}")
    ends = list(itertools.accumulate(counts))
    return [list(images[end - count : end]) for count, end in zip(counts, ends, strict=True)]
