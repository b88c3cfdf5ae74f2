"""What scripts written for LightRFT call besides the interface: names and wrappers for what `StrategyBase` has.

Source: https://github.com/opendilab/LightRFT, ``lightrft/strategy``.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim import Optimizer

from lightrft_lightning._errors import import_extra
from lightrft_lightning.checkpoints import files, store
from lightrft_lightning.checkpoints.trainer_state import as_stored
from lightrft_lightning.config import StrategyConfig

if TYPE_CHECKING:
    from lightrft_lightning.experience.trajectory import Completion, SamplingParams

log = logging.getLogger(__name__)

SETTINGS = (
    *("seed", "max_norm", "micro_train_batch_size", "train_batch_size", "bf16", "zpg", "adam_offload"),
    *("grad_accum_dtype", "overlap_comm", "engine_type"),
)
"""Fields of the configuration that LightRFT's strategies have as attributes too."""

Triple = tuple[nn.Module | None, Optimizer | None, Any]


def is_engine(model: Any) -> bool:
    """Whether something that generates is an engine and not the model itself."""
    return hasattr(model, "wake_up") or hasattr(model, "resume_memory_occupation")


def cosine_to_a_tenth(optimizer: Optimizer, steps: int, warmup_ratio: float) -> Any:
    """LightRFT's learning-rate schedule: a linear warm-up, then a cosine down to a tenth over the rest of `steps`."""
    return import_extra("transformers", "hf").get_scheduler(
        "cosine_with_min_lr", optimizer, num_warmup_steps=math.ceil(steps * warmup_ratio), num_training_steps=steps,
        scheduler_specific_kwargs={"min_lr_rate": 0.1},
    )  # fmt: skip


class LightRFTCalls:
    """A base class of `StrategyBase`, whose methods it calls and nothing else."""

    config: StrategyConfig

    def __getattr__(self, name: str) -> Any:
        if name in SETTINGS and "config" in vars(self):
            return getattr(self.config, name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    @property
    def accumulated_gradient(self) -> int:
        """`accumulation_steps`."""
        return int(self.accumulation_steps)  # type: ignore[attr-defined]

    @property
    def stage(self) -> int:
        """``config.zero_stage``."""
        return self.config.zero_stage

    def set_seed(self, seed: int) -> None:
        """Seed Python, NumPy and torch."""
        from lightning.pytorch import seed_everything

        seed_everything(seed, verbose=False)

    def unwrap_model(self, model: Any) -> nn.Module:
        """The model inside of an actor, or of a wrapper with a ``.module``; models stay the caller's objects here."""
        if getattr(model, "is_actor", False):
            return self.unwrap_model(model.model)
        inner: nn.Module = getattr(model, "module", model)
        return inner

    def sync_and_clear_cache(self) -> None:
        """Wait for the device and for all ranks, then free the memory that torch keeps for later."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.barrier()  # type: ignore[attr-defined]
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    # ---------------------------------------------------------------- models

    def prepare_model(
        self,
        model: Any,
        is_training: bool = False,
        shard_size: int | str = -1,
        reshard_after_forward: bool = True,
    ) -> Any:
        """`prepare` of one model.

        Args:
            model: anything else than a module is returned as it is.
            is_training: it gets its optimizer from `create_optimizer` afterwards, which prepares it.
            shard_size: no effect but a line in the log: all models are spread over the ranks by ``zpg``.
            reshard_after_forward: likewise; the argument of `FSDPV2Strategy` is for all models.
        """
        if not isinstance(model, nn.Module):
            return model
        if shard_size not in (-1, "auto", self.config.zpg) or not reshard_after_forward:
            log.warning("prepare_model(shard_size=%s): set zpg= of the strategy, which is for all models", shard_size)
        if is_training:
            self._prepare_later(model)  # type: ignore[attr-defined]
            return model
        return self.prepare(model)  # type: ignore[attr-defined]

    def prepare_models_and_optimizers(
        self,
        actor: nn.Module,
        critic: nn.Module | None,
        reward_models: Any,
        initial_model: nn.Module | None,
        args: Any = None,
        max_steps: int = int(1e8),
    ) -> tuple[Triple, Triple, Any, Any]:
        """Optimizers and schedules for actor and critic, by the strategy's configuration, and `prepare` of all.

        Args:
            actor: the policy.
            critic: None where there is none.
            reward_models: one, a list of them, or None.
            initial_model: the reference.
            args: not looked at; the strategy has its configuration.
            max_steps: optimizer steps of the schedules: cosine down to a tenth, behind a warm-up of
                ``lr_warmup_ratio``.

        Returns:
            ``(actor, optimizer, scheduler)``, the same for the critic (three None if there is none), the reward models
            and the reference.
        """
        rates = (self.config.actor_learning_rate, self.config.critic_learning_rate)
        trained = [self._with_optimizer(m, lr, max_steps) for m, lr in zip((actor, critic), rates, strict=True)]
        several = list(reward_models) if isinstance(reward_models, list | tuple) else [reward_models]
        # In one call, as some may share parameters.
        first, second, *frozen, last = self.prepare(*trained, *several, initial_model, is_rlhf=True)  # type: ignore[attr-defined]
        return first, second, frozen if isinstance(reward_models, list | tuple) else frozen[0], last

    def prepare_reward_model(self, reward_model: nn.Module, args: Any = None, max_steps: int = int(1e8)) -> Triple:
        """The same for a reward model that is trained, at ``actor_learning_rate``."""
        triple = self._with_optimizer(reward_model, self.config.actor_learning_rate, max_steps)
        return self.prepare(triple, is_rlhf=True)  # type: ignore[attr-defined, no-any-return]

    def _with_optimizer(self, model: nn.Module | None, lr: float, max_steps: int) -> Triple:
        if model is None:
            return None, None, None
        optimizer: Optimizer = self.create_optimizer(model, lr=lr)  # type: ignore[attr-defined]
        scheduler = cosine_to_a_tenth(optimizer, max_steps, self.config.lr_warmup_ratio)
        return model, optimizer, scheduler

    def load_model(
        self,
        model: nn.Module,
        path: str | Path,
        map_location: Any = "cpu",
        strict: bool = False,
        key_replace_fn: Callable[[Mapping[str, Any]], Mapping[str, Any]] | None = None,
    ) -> None:
        """Read weights into a model, whatever back end has prepared it. All ranks together.

        Args:
            model: the model.
            path: a file of `torch.save` with a state dict, or a folder that `load_ckpt` reads.
            map_location: no effect: a file is read into CPU memory, and goes from there to where the model is.
            strict: every tensor of the model must be there and no other.
            key_replace_fn: changes the names in a file.

        Raises:
            CheckpointError: it is damaged, holds code, or does not fit.
        """
        path, inner = Path(path), self.unwrap_model(model)
        if path.is_dir():
            self.load_ckpt(inner, path.parent, path.name, load_module_strict=strict, load_module_only=True)  # type: ignore[attr-defined]
            return

        def read() -> Mapping[str, Any]:
            found: Mapping[str, Any] = files.load(path)
            return found if key_replace_fn is None else key_replace_fn(found)

        ranks = self._join_ranks()  # type: ignore[attr-defined]
        weights = as_stored(ranks.together(lambda: store.readable(path, read)))
        sources = ranks.together(lambda: self._match(inner, weights, path, strict))  # type: ignore[attr-defined]
        ranks.together(lambda: store.readable(path, lambda: self._load_model(inner, weights, sources)))  # type: ignore[attr-defined]

    # ---------------------------------------------------------------- engines

    def engine_generate_local(
        self,
        sampling_params: SamplingParams | Mapping[str, Any],
        prompt_token_ids: Sequence[Sequence[int]] | None = None,
        multi_modal_inputs: Sequence[Mapping[str, Any]] | None = None,
    ) -> list[list[Completion]]:
        """`gather_and_generate` after which the engine stays awake.

        Args:
            sampling_params: see there.
            prompt_token_ids: prompts as token ids; or
            multi_modal_inputs: for each prompt ``{"prompt": text, "multi_modal_data": {"image": [...]}}``.
        """
        if multi_modal_inputs is None:
            return self.gather_and_generate(sampling_params, prompt_token_ids, sleep_engine=False)  # type: ignore[attr-defined, no-any-return]
        if prompt_token_ids is not None:
            raise ValueError("give exactly one of prompt_token_ids and multi_modal_inputs")
        shown = [one.get("multi_modal_data", {}) for one in multi_modal_inputs]
        if others := sorted({kind for data in shown for kind in data} - {"image"}):
            raise ValueError(f"multi_modal_inputs: {others[0]!r}: only images are taken")
        images = [data.get("image", []) for data in shown] if any(shown) else None
        prompts = [one["prompt"] for one in multi_modal_inputs]
        return self.gather_and_generate(  # type: ignore[attr-defined, no-any-return]
            sampling_params, all_prompts=prompts, all_images=images, sleep_engine=False
        )
