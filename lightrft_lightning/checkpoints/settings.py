"""Settings of a run that goes on from a checkpoint: those given now win over those that it was trained with."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch.optim.lr_scheduler import LambdaLR

from lightrft_lightning.checkpoints.folder import CheckpointError
from lightrft_lightning.checkpoints.state import _IMPLEMENTATION

if TYPE_CHECKING:
    from lightrft_lightning.strategies.base import StrategyBase

KEY = "lightrft_settings"
"""In a Trainer's checkpoint."""


def given(module: pl.LightningModule) -> dict[str, Any]:
    """What `configure_optimizers` and the strategy were told, as plain values; before a checkpoint is restored."""
    strategy: StrategyBase = module.trainer.strategy  # type: ignore[assignment]
    optimizers = []
    for optimizer in strategy.optimizers:
        groups = [_plain(group) for group in strategy._optimizer_settings(module, optimizer)]
        optimizers.append({"groups": groups, "schedule": _schedule(_scheduler_of(module, optimizer))})
    return {"optimizers": optimizers, "max_norm": strategy.config.max_norm}


def let_given_win(module: pl.LightningModule, now: Mapping[str, Any] | None, checkpoint: dict[str, Any]) -> None:
    """For `on_load_checkpoint`: put what is given now in place of what was given then, where the two differ.

    What a run has made of its settings (the place in a schedule, a rate that a callback has set) stays as it is
    otherwise. One line says what differs, old and new.

    Args:
        module: in a `Trainer`.
        now: from `given`; None outside of a fit.
        checkpoint: changed in place, before anything is restored from it.
    """
    if now is None or module._trainer is None or module.trainer.state.fn != TrainerFn.FITTING:
        return
    saved, schedules = checkpoint.get("optimizer_states", []), iter(checkpoint.get("lr_schedulers", []))
    then = checkpoint.get(KEY) or {"optimizers": [_as_if_given(one) for one in saved]}
    found = dict(_differences(checkpoint.get(module.CHECKPOINT_HYPER_PARAMS_KEY, {}), module.hparams))
    if "max_norm" in then:
        found |= dict(_differences({"max_norm": then["max_norm"]}, {"max_norm": now["max_norm"]}))
    steps = _steps_made(checkpoint)
    states = []
    # With another number of optimizers, restoring is an error.
    for k, optimizer in enumerate(module.trainer.optimizers[: len(saved)]):
        scheduler, was, its = _scheduler_of(module, optimizer), then["optimizers"][k], now["optimizers"][k]
        state = next(schedules, None) if was["schedule"] is not None else None
        if its["groups"] and saved[k]["param_groups"]:
            _check_same_kind(its["groups"][0], saved[k]["param_groups"][0])
        if len(was["groups"]) == len(its["groups"]) == len(saved[k]["param_groups"]):
            prefix = "" if k == 0 else "critic."
            found |= {f"{prefix}{name}": pair for name, pair in _changes(was, its) if f"{prefix}{name}" not in found}
            take_over = _take_over if scheduler is None or isinstance(scheduler, LambdaLR) else _take_over_own
            state = take_over(saved[k]["param_groups"], was, its, scheduler, state, steps[k])
        states += [] if state is None else [state]
    checkpoint["lr_schedulers"] = states
    if found:
        lines = ", ".join(f"{name} {old!r} -> {new!r}" for name, (old, new) in found.items())
        rank_zero_info(f"Settings given now win over the checkpoint's: {lines}")


def _take_over(
    groups: list[dict[str, Any]], was: Any, now: Any, scheduler: LambdaLR | None, state: Any, steps: int
) -> Any:
    """Change an optimizer's saved groups in place; the state of its schedule, None if it has none."""
    rates = [group["lr"] for group in now["groups"]]
    if rates != [group["lr"] for group in was["groups"]] or now["schedule"] != was["schedule"]:
        steps = steps if state is None else state["last_epoch"]
        if not _same_class(was, now):
            state = None
        if scheduler is not None:
            rates_now = [rate * factor(steps) for rate, factor in zip(rates, scheduler.lr_lambdas, strict=True)]
            state = state or {**scheduler.state_dict(), "_step_count": steps + 1}
            state |= {"base_lrs": rates, "last_epoch": steps, "_last_lr": rates_now}
        for k, group in enumerate(groups):
            group.pop("initial_lr", None)
            group |= {"lr": rates[k]} if scheduler is None else {"lr": rates_now[k], "initial_lr": rates[k]}
    for group, before, after in zip(groups, was["groups"], now["groups"], strict=True):
        group |= {k: v for k, v in after.items() if k != "lr" and before.get(k) != v}
    return None if scheduler is None else state


def _take_over_own(
    groups: list[dict[str, Any]], was: Any, now: Any, scheduler: Any, state: Any, steps: int
) -> dict[str, Any]:
    """As `_take_over`, for a schedule that is no function of the step: a user's own."""
    if state is None or not _same_class(was, now):  # there is no telling where it would be by now
        for k, group in enumerate(groups):
            fresh = scheduler.optimizer.param_groups[k]
            group |= {name: fresh[name] for name in ("lr", "initial_lr") if name in fresh}
        state = scheduler.state_dict()
    for k, group in enumerate(groups):
        before, after = (one["groups"][k]["lr"] for one in (was, now))
        if before != after and _same_class(was, now):
            group |= {"lr": group["lr"] * (after / before) if before else after, "initial_lr": after}
    if "base_lrs" in state:
        state |= {"base_lrs": [group["lr"] for group in now["groups"]], "_last_lr": [group["lr"] for group in groups]}
    for group, before, after in zip(groups, was["groups"], now["groups"], strict=True):
        group |= {k: v for k, v in after.items() if k != "lr" and before.get(k) != v}
    then = was["schedule"] or {}
    return state | {k: v for k, v in now["schedule"].items() if k in state and k in then and then[k] != v}


def _class(schedule: Mapping[str, Any] | None) -> str | None:
    """Of a schedule as `_schedule` gives it; None if there is none."""
    return None if schedule is None else schedule.get("class", "LambdaLR")


def _same_class(was: Any, now: Any) -> bool:
    # {}: of a checkpoint that does not say.
    return was["schedule"] == {} or _class(was["schedule"]) == _class(now["schedule"])


def _check_same_kind(now: Mapping[str, Any], saved: Mapping[str, Any]) -> None:
    here, there = set(now) - set(saved) - _IMPLEMENTATION, set(saved) - set(now) - {"params", *_IMPLEMENTATION}
    if here and there:
        raise CheckpointError(
            f"the checkpoint is of another kind of optimizer than configure_optimizers makes now: with {min(there)!r}, "
            f"without {min(here)!r}. Go on with the same kind, or begin a run from its weights (lightrft convert)"
        )


def _changes(was: Any, now: Any) -> Iterator[tuple[str, tuple[Any, Any]]]:
    told: dict[str, Any] = {}
    for k, (before, after) in enumerate(zip(was["groups"], now["groups"], strict=True)):
        for name, pair in _differences(before, after):
            if told.setdefault(name, pair) is pair or told[name] != pair:
                yield (name if told[name] is pair else f"{name} of group {k}"), pair
    old, new = was["schedule"], now["schedule"]
    if _same_class(was, now):
        # Kind and warm-up of Transformers' schedules are settings of the module.
        kept = {"num_training_steps"} if "class" not in (new or {}) else {*new}
        before, after = ({k: v for k, v in (one or {}).items() if k in kept} for one in (old, new))
        yield from _differences(before, after)
    elif "class" in (old or {}) or "class" in (new or {}):
        begins = "" if _class(new) in (None, "LambdaLR") else ", from its beginning"
        yield "schedule", (_class(old), f"{_class(new)}{begins}")


def _differences(was: Any, now: Any, prefix: str = "") -> Iterator[tuple[str, tuple[Any, Any]]]:
    """Names under which two mappings have unequal values, with both; in mappings within them too."""
    for name in was:
        if name not in now or name.startswith("_"):
            continue
        old, new = was[name], now[name]
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            yield from _differences(old, new, f"{prefix}{name}.")
        elif _listed(old) != _listed(new):
            yield prefix + name, (old, new)


def _listed(value: Any) -> Any:
    """Lists and tuples alike: the command line makes lists."""
    return [_listed(v) for v in value] if isinstance(value, list | tuple) else value


def _plain(group: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a group, with the rate that its schedule starts from."""
    kept = {k: v for k, v in group.items() if k not in {"params", *_IMPLEMENTATION}}
    kept["lr"] = group.get("initial_lr", group["lr"])
    return {k: v for k, v in kept.items() if isinstance(v, int | float | str | tuple | list | None)}


def _as_if_given(saved: Mapping[str, Any]) -> dict[str, Any]:
    """Of checkpoints that do not say what was given: a schedule leaves a mark in the groups."""
    groups = saved["param_groups"]
    return {"groups": [_plain(group) for group in groups], "schedule": {} if "initial_lr" in groups[0] else None}


def _scheduler_of(module: pl.LightningModule, optimizer: Any) -> Any:
    schedulers = [config.scheduler for config in module.trainer.lr_scheduler_configs]
    return next((s for s in schedulers if s.optimizer is optimizer), None)


def _schedule(scheduler: Any) -> dict[str, Any] | None:
    """What tells a schedule from another: kind and arguments of Transformers', class and settings of others."""
    factor = scheduler.lr_lambdas[0] if isinstance(scheduler, LambdaLR) else None
    if isinstance(factor, functools.partial):
        return {"schedule": factor.func.__name__.removeprefix("_get_"), **factor.keywords}
    if scheduler is None:
        return None
    found = {k: dict(v) if isinstance(v, Mapping) else v for k, v in scheduler.state_dict().items()}
    own = {k: v for k, v in found.items() if k not in {"base_lrs", "_last_lr"} and _is_plain(v)}
    return {"class": type(scheduler).__name__, **own}


def _is_plain(value: Any) -> bool:
    values = value if isinstance(value, list | tuple) else value.values() if isinstance(value, Mapping) else [value]
    return all(isinstance(v, int | float | str | None) for v in values)


def _steps_made(checkpoint: Mapping[str, Any]) -> tuple[int, int]:
    """Optimizer steps of the policy, which the Trainer counts, and of the critic."""
    policy = checkpoint.get("global_step", 0)
    return policy, checkpoint.get("lightrft_strategy", {}).get("optimizer_steps", policy) - policy
