"""The graph of a module that is about to be sharded, for loggers that draw it."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from lightning.fabric.utilities.exceptions import MisconfigurationException

if TYPE_CHECKING:
    import lightning.pytorch as pl

log = logging.getLogger(__name__)


def draw_graphs(trainer: pl.Trainer, module: pl.LightningModule, sharded: bool) -> None:
    """Let loggers draw the graph now: Lightning has them do so on rank 0, which cannot gather the weights by itself.

    Args:
        trainer: about to run the module.
        module: after `configure_model`.
        sharded: by a run before this one.

    Raises:
        MisconfigurationException: the module has no weights yet.
    """
    for logger in trainer.loggers:
        if not getattr(logger, "_log_graph", False):
            continue
        name = f"{type(logger).__name__}(log_graph=True)"
        if not sharded and any(p.is_meta for p in module.parameters()):
            raise MisconfigurationException(
                f"{name} runs a forward pass before the weights are sharded, and {type(module).__name__} has none yet "
                "(meta_init=True): leave log_graph out"
            )
        if not sharded:
            logger.log_graph(module)
        elif not hasattr(logger, "_lightrft_drawn"):
            log.warning("%s: the module is in parts since an earlier run, so its graph is not drawn", name)
        _once_less(logger, module)


def _once_less(logger: Any, module: pl.LightningModule) -> None:
    """Let Lightning's own call, which follows, do nothing."""

    def skip(model: Any, input_array: Any = None) -> None:
        del logger.log_graph
        if model is not module or input_array is not None:
            logger.log_graph(model, input_array)

    logger._lightrft_drawn = True
    logger.log_graph = skip
