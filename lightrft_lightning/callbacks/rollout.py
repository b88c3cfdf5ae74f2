"""A rollout engine as a Lightning callback: one line in `Trainer(callbacks=[...])`."""

from __future__ import annotations

import logging
import time
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from typing_extensions import override

from lightrft_lightning.engines.base import EngineError, RolloutEngine
from lightrft_lightning.experience.trajectory import Trajectory
from lightrft_lightning.models.lora import check_policy
from lightrft_lightning.models.proof import TOLERANCES, apart, least_exact_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from lightrft_lightning.module import RLHFModule

log = logging.getLogger(__name__)


class DriftError(EngineError):
    """Engine and trainer give the same tokens too different log-probabilities."""


class RolloutCallback(Callback, RolloutEngine):
    """Base class of the engines: generates for `RLHFModule` and follows its weights.

    The callback connects the engine once the model is on its device, hands it the weights before the first rollout
    and after every training iteration, watches the drift between the engine's and the trainer's log-probabilities,
    keeps the version in checkpoints and closes the engine at the end, also after an exception.
    """

    drift_warning: float | None = 0.1
    """Mean |engine - trainer| in nats a token above which a warning is logged."""
    drift_limit: float | None = None
    """The same above which training stops."""
    sleep_level: int = 0
    """How deep the engine sleeps between rollouts; 0: it stays awake. At 2 it gives up its weights as well, which come
    right before the next rollout."""
    stale: bool = True
    """Whether the engine may hold other weights than the trainer: it gets them before it generates the next time."""

    @abstractmethod
    def connect(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        """Make the engine ready to generate with `model`'s weights. Idempotent."""

    _kept_awake: bool = False

    @contextmanager
    def awake(self) -> Iterator[None]:
        """The engine is awake inside; after the outermost one it sleeps if `sleep_level` says so."""
        if self._kept_awake:
            yield
            return
        self._kept_awake = True
        self.wake_up()
        try:
            yield
        finally:
            self._kept_awake = False
            if self.sleep_level:
                self.sleep(self.sleep_level)
            self.stale = self.stale or self.sleep_level == 2

    def sync(self, module: RLHFModule, version: int) -> None:
        """Bring the engine's weights up to date; all ranks together."""
        from lightrft_lightning.engines.weight_sync import PolicyWeights

        assert module.actor is not None
        self.wake_up()
        # Lightning evaluates in inference mode, whose tensors could not be changed afterwards.
        with torch.inference_mode(False), torch.no_grad():
            self.update_weights(PolicyWeights(module.strategy, module.actor), version)
        self.stale = False
        if self.sleep_level == 1:
            self.sleep(1)

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        from lightrft_lightning.module import RLHFModule

        if not isinstance(pl_module, RLHFModule):
            raise TypeError(
                f"{type(self).__name__} generates for an RLHFModule, got {type(pl_module).__name__}. "
                "In a loop of your own, call `strategy.setup_inference_engine(...)` instead."
            )
        assert pl_module.actor is not None
        check_policy(pl_module.actor, type(self).__name__, self.has_copy)
        self.strategy = pl_module.strategy
        self.connect(pl_module.actor, pl_module.tokenizer)

    def _start_evaluation(self, trainer: pl.Trainer, pl_module: RLHFModule) -> None:
        self.on_fit_start(trainer, pl_module)  # there is none in `trainer.validate` and its like

    on_validation_start = on_test_start = on_predict_start = _start_evaluation  # type: ignore[assignment]

    def _start_batch(self, trainer: pl.Trainer, pl_module: Any, *args: Any) -> None:
        if self.stale:
            self.sync(pl_module, self.version)

    on_validation_batch_start = on_test_batch_start = on_predict_batch_start = _start_batch  # type: ignore[assignment]

    @override
    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if self.stale:
            self._timed_sync(pl_module, self.version)

    @override
    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *args: Any) -> None:
        pl_module.finish_sampling()
        if self.sleep_level == 2:
            self.version, self.stale = self.version + 1, True
        else:
            self._timed_sync(pl_module, self.version + 1)
        self._check_drift(trainer, pl_module)

    def _timed_sync(self, module: RLHFModule, version: int) -> None:
        start = time.perf_counter()
        self.sync(module, version)
        module.log("time/sync", time.perf_counter() - start)

    def _check_drift(self, trainer: pl.Trainer, module: RLHFModule) -> None:
        mean = float(trainer.callback_metrics.get("train/mismatch_mean", 0.0))
        told = (
            f"{type(self).__name__}: the engine's and the trainer's log-probabilities of the same tokens differ by "
            f"{mean:.3g} nats on average"
        )
        if self.drift_limit is not None and not mean <= self.drift_limit:
            old = f", or older weights drew them (staleness={module.staleness})" if module.staleness else ""
            raise DriftError(
                f"{told}, more than drift_limit={self.drift_limit}: weights or precision do not match{old}"
            )
        # Samples of older weights differ as they should: by how much, only a limit of the user's own can say.
        if self.drift_warning is not None and not module.staleness and not mean <= self.drift_warning:
            log.warning("%s, more than drift_warning=%s: weights or precision may not match", told, self.drift_warning)

    def check_first_samples(self, trajectories: Sequence[Trajectory], trainer_dtype: torch.dtype) -> None:
        """Compare the log-probabilities of samples with the trainer's. All ranks together.

        Args:
            trajectories: of this rank, with ``old_logprobs``, by the weights that drew them.
            trainer_dtype: the least exact dtype that the trainer computes in.

        Raises:
            DriftError: they are further apart than these dtypes make them, on any rank.
        """
        assert self.strategy is not None
        masks = [torch.tensor(t.mask) for t in trajectories]
        sampled = [torch.tensor(t.completion.logprobs)[mask] for t, mask in zip(trajectories, masks, strict=True)]
        trained = [t.old_logprobs[mask].float() for t, mask in zip(trajectories, masks, strict=True)]  # type: ignore[index]
        nothing = torch.zeros(0)
        off = apart(torch.cat([nothing, *sampled]), torch.cat([nothing, *trained]), [len(s) for s in sampled])
        off = float(self.strategy.all_reduce(off, op="max"))
        allowed = TOLERANCES[least_exact_of(trainer_dtype, self.computes_in)]
        if not off <= allowed:
            raise DriftError(
                f"{type(self).__name__} samples from another distribution than the one that is trained: the "
                f"log-probabilities of its first samples are off by {off:.2g} nats, allowed are {allowed:g}. Take "
                "another engine for this model; with check_numerics=False it trains regardless"
            )

    @property
    def computes_in(self) -> torch.dtype | None:
        """Its dtype, bfloat16 if a copy of the model does not say; None: the trainer's."""
        return getattr(self, "dtype", None) or (torch.bfloat16 if self.has_copy else None)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"version": self.version}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.version = state_dict["version"]

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self.close()

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: Any, exception: BaseException) -> None:
        self.close()
        if hasattr(pl_module, "give_up_sampling"):  # on_fit_start may just have said that it is no RLHFModule
            pl_module.give_up_sampling()
