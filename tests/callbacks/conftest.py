from __future__ import annotations

import io
import signal
import sys

import lightning.pytorch as pl
import pytest

from lightrft_lightning import PromptDataModule, RLHFModule, SamplingParams, TransformersRollout

PROMPTS = [f"{a}+{b}=" for a in range(4) for b in range(4)]


class Interrupt(pl.Callback):
    """What a user does who presses Ctrl-C, or a bug, after so many iterations."""

    def __init__(self, after: int, error: type[BaseException] = KeyboardInterrupt):
        self.after, self.error = after, error

    def on_train_batch_end(self, trainer, pl_module, *args):
        if pl_module.iteration == self.after:
            raise self.error


@pytest.fixture
def interrupt():
    """`interrupt(after=3)` is a callback that raises KeyboardInterrupt, which makes Lightning ignore signals."""
    handler = signal.getsignal(signal.SIGINT)
    yield Interrupt
    signal.signal(signal.SIGINT, handler)


@pytest.fixture
def fit(tiny_model, tiny_tokenizer, tmp_path):
    """Train for real; by default 4 iterations with a validation before and after."""

    def run(*callbacks, rewards=len_of_completion, module=None, ckpt_path=None, n=2, module_settings=(), **settings):
        module = module or RLHFModule(
            tiny_model, rewards, tiny_tokenizer, SamplingParams(n=n, max_new_tokens=4), seed=0, **dict(module_settings)
        )
        defaults = {"max_epochs": 1, "limit_train_batches": 4, "num_sanity_val_steps": -1, "logger": False}
        defaults |= {"enable_progress_bar": False, "enable_model_summary": False, "log_every_n_steps": 1}
        defaults |= {"enable_checkpointing": any(isinstance(c, pl.callbacks.ModelCheckpoint) for c in callbacks)}
        trainer = pl.Trainer(
            strategy="lightrft_fake", accelerator="cpu", default_root_dir=tmp_path,
            callbacks=[TransformersRollout(), *callbacks], **{**defaults, **settings},
        )  # fmt: skip
        data = PromptDataModule(train=PROMPTS, val=PROMPTS[:4], batch_size=2, val_batch_size=2, seed=0)
        trainer.fit(module, datamodule=data, ckpt_path=ckpt_path)
        return trainer, module

    return run


def len_of_completion(completion: str) -> float:
    return len(completion) / 4


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self):
        return True


@pytest.fixture
def terminal(monkeypatch):
    """`terminal(80)` makes standard output a terminal that wide and returns what is written to it."""

    def make(width):
        for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("TERM", "xterm-256color")
        monkeypatch.setenv("COLUMNS", str(width))
        monkeypatch.setattr(sys, "stdout", Terminal())
        return sys.stdout

    return make
