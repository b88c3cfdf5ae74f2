"""A rollout engine as a Lightning callback: one line in `Trainer(callbacks=[...])`."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from typing_extensions import override

from lightrft_lightning.engines.base import RolloutEngine

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class RolloutCallback(Callback, RolloutEngine):
    """Base class of the engines: generates for `RLHFModule` and follows its weights.

    The callback connects the engine once the model is on its device, hands it the new weights after every training
    iteration, keeps its version in checkpoints and closes it at the end, also after an exception.
    """

    @abstractmethod
    def connect(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        """Make the engine generate with `model`'s weights. Idempotent."""

    def _connect(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        from lightrft_lightning.module import RLHFModule

        if not isinstance(pl_module, RLHFModule):
            raise TypeError(
                f"{type(self).__name__} generates for an RLHFModule, got {type(pl_module).__name__}. "
                "In a loop of your own, call `strategy.setup_inference_engine(...)` instead."
            )
        assert pl_module.actor is not None
        self.strategy = pl_module.strategy
        self.connect(pl_module.actor, pl_module.tokenizer)

    on_fit_start = on_validation_start = on_test_start = on_predict_start = _connect

    @override
    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        weights = pl_module.strategy.named_full_tensors(pl_module.actor)  # type: ignore[operator, union-attr]
        self.update_weights(weights, self.version + 1)

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
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self.close()
