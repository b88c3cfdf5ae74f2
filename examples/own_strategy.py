"""A strategy of one's own, registered by name, in a Trainer and in a hand-written loop.

It trains with SGD in place of AdamW and remembers the gradient norm of every step. Whatever a strategy does (how models
are wrapped, clipped, saved ...) can be changed in this way; `StrategyBase` says which methods there are.
"""

import lightning.pytorch as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightrft_lightning import StrategyBase, get_strategy, register_strategy


class LoggedSGD(StrategyBase):
    """SGD with momentum; `norms` holds the gradient norms before clipping."""

    def __init__(self, *, momentum: float = 0.9, **kwargs):
        super().__init__(**kwargs)
        self.momentum = momentum
        self.norms = []

    def create_optimizer(self, model, *, lr=None, **kwargs):
        lr = self.config.actor_learning_rate if lr is None else lr
        return torch.optim.SGD(model.parameters(), lr=lr, momentum=self.momentum)

    def optimizer_step(self, optimizer, model, *args, **kwargs):
        result = super().optimizer_step(optimizer, model, *args, **kwargs)
        if isinstance(model, nn.Module) and result is not None:  # not Lightning's call form, nor an accumulating call
            self.norms.append(result)
        return result


class Line(pl.LightningModule):
    """Finds the line y = 3x + 1, with manual optimization as in `RLHFModule`."""

    automatic_optimization = False

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(1, 1)

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = (self.layer(x) - y).square().mean()
        self.trainer.strategy.backward(loss, self.layer, self.optimizers())
        self.trainer.strategy.optimizer_step(self.optimizers(), self.layer, None)

    def configure_optimizers(self):
        return self.trainer.strategy.create_optimizer(self.layer, lr=0.05)


def in_a_trainer(data):
    model = Line()
    trainer = pl.Trainer(
        strategy="logged_sgd", accelerator="cpu", max_epochs=20, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(model, DataLoader(data, batch_size=16))
    return model.layer, trainer.strategy


def in_a_loop(data):
    strategy = get_strategy({"strategy": "logged_sgd", "train_batch_size": 16, "micro_train_batch_size": 8})
    strategy.setup_distributed()
    layer = nn.Linear(1, 1)
    layer, optimizer = strategy.prepare((layer, strategy.create_optimizer(layer, lr=0.05)))
    loader = strategy.setup_dataloader(data, batch_size=8)
    for _ in range(20):
        for x, y in loader:
            strategy.backward((layer(x) - y).square().mean(), layer, optimizer)
            strategy.optimizer_step(optimizer, layer, None)
    return layer, strategy


if __name__ == "__main__":
    register_strategy("logged_sgd", LoggedSGD, "SGD that remembers gradient norms", max_norm=5.0)
    pl.seed_everything(0, verbose=False)
    x = torch.linspace(-1, 1, 128)[:, None]
    for run in (in_a_trainer, in_a_loop):
        layer, strategy = run(TensorDataset(x, 3 * x + 1))
        line = f"y = {layer.weight.item():.2f} x + {layer.bias.item():.2f}"
        print(f"{run.__name__}: {line}, {len(strategy.norms)} steps, "
              f"gradient norm {strategy.norms[0]:.2f} -> {strategy.norms[-1]:.2f}")  # fmt: skip
