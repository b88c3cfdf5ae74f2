"""Strategy names: the table, their registration with Lightning, and `get_strategy`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from lightning.pytorch.strategies import StrategyRegistry

from lightrft_lightning._errors import unknown_name
from lightrft_lightning.config import StrategyConfig
from lightrft_lightning.strategies.base import StrategyBase
from lightrft_lightning.strategies.deepspeed import DeepspeedStrategy
from lightrft_lightning.strategies.fake import FakeStrategy
from lightrft_lightning.strategies.fsdp import FSDPV2Strategy

_NAMES: dict[str, tuple[type[StrategyBase], dict[str, Any]]] = {}


def register_strategy(
    name: str, cls: type[StrategyBase], description: str = "", *, override: bool = False, **fields: Any
) -> None:
    """Make `name` known to `get_strategy` and to ``Trainer(strategy=name)``. Registering the same again is harmless.

    Args:
        name: the name, lower case.
        cls: a subclass of `StrategyBase`.
        description: one line for Lightning's list of strategies.
        override: replace what has this name.
        **fields: settings that the name implies.

    Raises:
        TypeError: `cls` is no subclass of `StrategyBase`.
        ValueError: the name is taken, or is not lower case (Lightning lowers names before it looks them up).
    """
    if not (isinstance(cls, type) and issubclass(cls, StrategyBase)):
        raise TypeError(f"register_strategy({name!r}, {cls!r}): must be a subclass of StrategyBase")
    if name != name.lower() or not name:
        raise ValueError(f"strategy name {name!r}: must be lower case, as Lightning looks names up that way")
    taken = _NAMES.get(name, (cls, fields)) != (cls, fields) or (name not in _NAMES and name in StrategyRegistry)
    if taken and not override:
        raise ValueError(f"the strategy name {name!r} is taken; pass override=True to replace it")
    _NAMES[name] = (cls, fields)
    StrategyRegistry.register(name, cls, description=description or (cls.__doc__ or ""), override=True, **fields)


def get_strategy(config_or_args: Any = None, **fields: Any) -> StrategyBase:
    """The strategy that a configuration, a set of legacy arguments or a name asks for.

    Args:
        config_or_args: a registered name; or a `StrategyConfig`, `argparse.Namespace`, mapping or object. There
            ``strategy="<name>"`` or ``fake=True`` decides first, then ``fsdp=True`` gives FSDP2, and otherwise
            DeepSpeed takes `zero_stage`.
        **fields: single fields of `StrategyConfig`; they win.

    Raises:
        ValueError: an unknown name, a value out of range or two that contradict each other.

    Example:
        >>> get_strategy("lightrft_fake", max_norm=0.5)
        >>> get_strategy(StrategyConfig(fsdp=True))
    """
    if isinstance(config_or_args, str):
        cls, implied = _lookup(config_or_args)
        _check_implied(config_or_args, implied, fields)
        return cls(**{**implied, **fields})
    config = StrategyConfig.from_args({} if config_or_args is None else config_or_args)
    if fields:
        config = config.replace(**fields)
    name = config.get_extra_arg("strategy")
    if config.get_extra_arg("fake", False):
        name = FakeStrategy.strategy_name
    if isinstance(name, str):
        cls, implied = _lookup(name)
        # argparse fills in every default, so a default cannot contradict the name.
        changed = {f: getattr(config, f) for f in implied if getattr(config, f) != getattr(StrategyConfig, f)}
        _check_implied(name, implied, changed)
        return cls(config=config, **implied)
    return (FSDPV2Strategy if config.fsdp else DeepspeedStrategy)(config=config)


def get_fake_strategy(args: Any = None, **fields: Any) -> FakeStrategy:
    """`FakeStrategy` with the settings of `args` (as in `StrategyConfig.from_args`) and `fields`."""
    return FakeStrategy(args=args, **fields)


def available_strategies() -> Iterator[str]:
    """The registered names."""
    return iter(sorted(_NAMES))


def _lookup(name: str) -> tuple[type[StrategyBase], dict[str, Any]]:
    if name.lower() not in _NAMES:
        raise ValueError(unknown_name("strategy", name, _NAMES))
    return _NAMES[name.lower()]


def _check_implied(name: str, implied: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    for field, value in implied.items():
        if given.get(field, value) != value:
            raise ValueError(f"strategy {name!r} means {field}={value!r}, got {field}={given[field]!r}: leave one out")


def register_builtin_strategies() -> None:
    """Register the names of this package. Idempotent."""
    register_strategy("lightrft_fake", FakeStrategy, "one process, no process group")
    register_strategy("lightrft_fsdp", FSDPV2Strategy, "FSDP2", fsdp=True)
    register_strategy("lightrft_fsdp_offload", FSDPV2Strategy, "FSDP2, CPU offload", fsdp=True, fsdp_cpu_offload=True)
    # Without a number the stage is the configuration's, 2 by default.
    stages: dict[str, dict[str, Any]] = {"": {}} | {f"_stage_{n}": {"zero_stage": n} for n in (1, 2, 3)}
    for suffix, stage in stages.items():
        name, text = f"lightrft_deepspeed{suffix}", f"DeepSpeed ZeRO-{stage.get('zero_stage', 2)}"
        register_strategy(name, DeepspeedStrategy, text, **stage)
        register_strategy(f"{name}_offload", DeepspeedStrategy, f"{text}, CPU offload", adam_offload=True, **stage)
