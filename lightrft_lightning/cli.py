"""The `lightrft` command: `LightningCLI` for the package's modules and `PromptDataModule`. Needs the extra ``cli``."""

from __future__ import annotations

import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import LightningCLI, Namespace, SaveConfigCallback
from typing_extensions import override

import lightrft_lightning
from lightrft_lightning import convert
from lightrft_lightning._errors import import_extra, unknown_name
from lightrft_lightning.data import PromptDataModule
from lightrft_lightning.module import RLHFModule
from lightrft_lightning.planning.command import main as plan
from lightrft_lightning.reward_module import RewardModule
from lightrft_lightning.sft_module import SFTModule
from lightrft_lightning.strategies.factory import available_strategies
from lightrft_lightning.strategies.streams import keep_printing

DEFAULT_SEED = 42

TRAINER_DEFAULTS: dict[str, Any] = {
    "strategy": "lightrft_fake",
    "devices": 1,
    "enable_model_summary": False,
    "log_every_n_steps": 1,  # an iteration is long, each is worth a row
    "num_sanity_val_steps": -1,  # the whole validation set before training: the "before" of the summary
}

EXPORT = "lightrft_lightning.callbacks.ExportModel"
DEFAULT_CALLBACKS = (
    "lightrft_lightning.TransformersRollout",
    "lightrft_lightning.callbacks.ProgressLine",
    "lightrft_lightning.callbacks.SampleTable",
    "lightrft_lightning.callbacks.RewardCurve",
    EXPORT,
    "lightrft_lightning.callbacks.Summary",
    "lightrft_lightning.callbacks.WritePredictions",
)

MODULES: dict[str, type[pl.LightningModule]] = {"sft": SFTModule, "reward": RewardModule}
"""What is trained in place of `RLHFModule` by ``lightrft <name> fit``."""

DESCRIPTION = (
    "Reinforcement fine-tuning of language models inside PyTorch Lightning. Settings come from YAML files and flags, "
    "what comes later wins: lightrft fit --config examples/tiny_from_scratch.yaml --model.lr 1e-4. "
    "Supervised fine-tuning and reward models: lightrft sft fit --help, lightrft reward fit --help. "
    "Memory and time of a run, before anything is loaded: lightrft plan --help. "
    "Checkpoints as Hugging Face folders, and back: lightrft convert --help. "
    "An engine in a process or on a machine of its own: lightrft serve --help"
)


class SavedWithoutKeys(SaveConfigCallback):
    """What a run is started with goes into ``config.yaml``, which others may read, without the keys of servers."""

    @override
    def __init__(self, parser: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(parser, _without_keys(config), *args, **kwargs)


def _without_keys(value: Any) -> Any:
    """A copy of a configuration; a server whose key it has gets that of `LIGHTRFT_KEY` when it is used again."""
    if isinstance(value, list | tuple):
        return type(value)(map(_without_keys, value))
    if not isinstance(value, dict | Namespace):
        return value
    copy = type(value)()
    for name, held in vars(value).items() if isinstance(value, Namespace) else value.items():
        copy[name] = None if name == "key" and isinstance(held, str) else _without_keys(held)
    return copy


class LightRFTCLI(LightningCLI):
    """`LightningCLI` with this package's module, data and defaults.

    Where neither YAML nor flags give `trainer.callbacks`, the callbacks are `DEFAULT_CALLBACKS`; for the modules in
    `MODULES`, `ExportModel` and Lightning's progress bar.

    Args:
        args: arguments; default: those of the process.
        name: one of `MODULES`; default: `RLHFModule`.
    """

    def __init__(self, args: Sequence[str] | None = None, name: str | None = None) -> None:
        self._default_callbacks = DEFAULT_CALLBACKS if name is None else (EXPORT,)
        super().__init__(
            RLHFModule if name is None else MODULES[name],
            PromptDataModule,
            args=None if args is None else list(args),
            trainer_defaults={**TRAINER_DEFAULTS, "enable_progress_bar": name is not None},  # else ProgressLine
            seed_everything_default=DEFAULT_SEED,
            save_config_callback=SavedWithoutKeys,
            save_config_kwargs={"overwrite": True},  # otherwise a second run into the same folder is an error
            auto_configure_optimizers=False,  # the module's own settings decide
            load_from_checkpoint_support=False,  # the modules save their hyperparameters themselves
            parser_kwargs={
                "prog": "lightrft" if name is None else f"lightrft {name}",
                "description": DESCRIPTION,
                "version": lightrft_lightning.__version__,
            },
        )

    @override
    def before_instantiate_classes(self) -> None:
        trainer = self._get(self.config, "trainer")
        name = trainer.strategy
        if isinstance(name, str) and name.lower() not in available_strategies():
            raise ValueError(unknown_name("strategy", name, available_strategies()))
        if trainer.callbacks is None:
            # Not as a default of the parser: it would mix the default list into a user's list of the same length.
            chosen = {"trainer": {"callbacks": list(self._default_callbacks)}}
            self.config[self.subcommand] = self._parser(self.subcommand).parse_object(
                chosen, self.config[self.subcommand]
            )

    @override
    def _parse_ckpt_path(self) -> None:
        """Lightning would let the hyperparameters of the checkpoint win over the user's file and flags."""


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line.

    An error that this package raises on purpose is one line on standard error, unless the environment variable
    ``LIGHTRFT_DEBUG`` is set to 1; a wrong flag or YAML key is an error of the argument parser (`SystemExit`, code 2).

    Args:
        args: arguments; default: those of the process.

    Returns:
        The exit code: 0, or 1 after an error.
    """
    for noise in ("isinstance.*LeafSpec", "The .* does not have many workers", "Total length of .* is zero"):
        warnings.filterwarnings("ignore", message=f".*{noise}")
    keep_printing()
    try:
        given = sys.argv[1:] if args is None else list(args)
        if given[:1] == ["serve"]:
            _serve(given[1:])
            return 0
        import_extra("jsonargparse", "cli")
        if given[:1] == ["convert"]:
            convert.main(given[1:])
        elif given[:1] == ["plan"]:
            plan(given[1:])
        elif given[:1] and given[0] in MODULES:
            LightRFTCLI(given[1:], given[0])
        else:
            LightRFTCLI(args)
    except Exception as raised:
        err: BaseException = raised
        while _package(err) == "jsonargparse" and err.__cause__ is not None:  # it wraps the errors of dataclasses
            err = err.__cause__
        if os.environ.get("LIGHTRFT_DEBUG") == "1" or not _is_ours(err):
            raise
        print(f"lightrft: error: {err}", file=sys.stderr)
        return 1
    return 0


def _serve(args: Sequence[str]) -> None:
    for module in ("starlette", "uvicorn"):
        import_extra(module, "server")
    from lightrft_lightning.engines import server

    server.main(args)


def _is_ours(err: BaseException) -> bool:
    """Whether the error was raised on purpose, by a check of this package or of Lightning.

    An error from the depths of a computation or from the user's own code is not: there the traceback helps.
    """
    expected = ValueError | TypeError | RuntimeError | ImportError | OSError | MisconfigurationException
    return _package(err) in ("lightrft_lightning", "lightning") and isinstance(err, expected)


def _package(err: BaseException) -> str:
    """Of the code that raised it."""
    *_, (frame, _) = traceback.walk_tb(err.__traceback__)
    return str(frame.f_globals.get("__name__", "")).split(".")[0]


if __name__ == "__main__":
    sys.exit(main())
