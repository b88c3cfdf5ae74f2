"""From what a user writes (a function, a name, a path, a mapping) to a reward function that is ready to be called."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lightrft_lightning._errors import unknown_name
from lightrft_lightning._find import check_options, find, short_name
from lightrft_lightning._registry import Registry
from lightrft_lightning.experience.trajectory import Prompt, Trajectory
from lightrft_lightning.rewards._pool import ProcessPool

REWARDS: Registry[Callable[..., Any]] = Registry("reward")
"""Reward functions by name, and classes of which the options make one. Extend with ``@REWARDS.register("name")``."""

SINGLE = ("prompt", "completion")
BATCH = ("prompts", "completions")
PROVIDED = (*SINGLE, *BATCH, "finish_reason", "token_ids", "completion_ids", "episode")
OF_TRL = ("trainer_state", "log_extra", "log_metric", "environments")
"""What TRL's GRPOTrainer passes to reward functions besides, and nothing here stands for."""


@dataclass(frozen=True)
class InProcesses:
    """A reward that is called in processes of its own, as the mapping ``{"name": ..., "processes": 4}`` says it.

    A call that holds the interpreter lock for ever, or crashes, then costs its own sample and the process, which is
    replaced.

    Args:
        function: what `Rewards` takes as one entry; it must be importable by its name, so no lambda.
        processes: how many calls at a time.
    """

    function: Any
    processes: int = 4


@dataclass(frozen=True)
class RewardFunction:
    """A reward function with what its signature says about it.

    Attributes:
        name: unique among the functions that are used together.
        function: called with keywords only.
        batch: takes lists and returns a list.
        is_async: returns an awaitable.
        required: columns that it cannot do without.
        optional: columns that it takes if the data has them; None: all.
        named: what stands in its signature.
        pool: the processes that it runs in, if it does.
        batch_size: most samples of one call, for batch functions that may see any part of the batch; a failed call is
            then not repeated sample by sample.
        workers: calls at a time, if not as many as usual.
    """

    name: str
    function: Callable[..., Any]
    batch: bool
    is_async: bool
    required: frozenset[str]
    optional: frozenset[str] | None
    named: frozenset[str] = frozenset()
    pool: ProcessPool | None = None
    batch_size: int | None = None
    workers: int | None = None

    @classmethod
    def inspect(cls, name: str, function: Callable[..., Any], processes: int | None = None) -> RewardFunction:
        """Read the signature.

        Raises:
            TypeError: it has neither a parameter `completion` nor `completions`, or one that cannot be given by name.
            ValueError: it shall run in processes, and cannot be sent to one.
        """
        parameters = inspect.signature(function).parameters
        fixed = set(function.keywords) if isinstance(function, functools.partial) else set()
        names = [n for n in parameters if n not in fixed]
        if ("completion" in names) == ("completions" in names):
            raise TypeError(
                f"the reward {name!r} must take either `completion` (called for each sample) or `completions` "
                f"(called with lists), it takes ({', '.join(parameters)})"
            )
        batch = "completions" in names
        required: set[str] = set(getattr(function, "columns", ()))
        optional: set[str] = set()
        everything = False
        for n in names:
            parameter = parameters[n]
            if parameter.kind is parameter.VAR_KEYWORD:
                everything = True
            elif parameter.kind is parameter.POSITIONAL_ONLY:
                raise TypeError(f"the reward {name!r} takes {n!r} by position only; rewards are called with keywords")
            elif parameter.kind is not parameter.VAR_POSITIONAL:
                (required if parameter.default is parameter.empty else optional).add(n)
        return cls(
            name=name,
            function=function,
            batch=batch,
            is_async=_is_async(function),
            required=frozenset(required),
            optional=None if everything else frozenset(optional),
            named=frozenset(names),
            pool=None if processes is None else ProcessPool(name, function, processes),
            batch_size=getattr(function, "batch_size", None) if batch else None,
            workers=getattr(function, "workers", None),
        )

    def arguments(self, trajectory: Trajectory) -> dict[str, Any]:
        """The keywords for one sample, as far as the data has them."""
        completion = trajectory.completion
        prompt_name, completion_name = BATCH if self.batch else SINGLE
        available = {
            **trajectory.prompt.fields,
            prompt_name: trajectory.prompt.text,
            completion_name: trajectory.text,
            "finish_reason": completion.finish_reason,
            "token_ids": completion.token_ids,
        }
        known = set(available) if self.optional is None else set()
        available["completion_ids"] = list(completion.token_ids)  # as TRL calls it
        if trajectory.episode is not None:
            available["episode"] = trajectory.episode
        wanted = self.required | (self.optional or set()) | self.named | known
        return {name: value for name, value in available.items() if name in wanted}

    def lacking(self, prompt: Prompt) -> list[str]:
        """Columns that it needs and the prompt's row lacks."""
        return sorted(self.required - prompt.fields.keys() - set(PROVIDED))

    def missing(self, arguments: Mapping[str, Any]) -> list[str]:
        """Columns that it needs and `arguments` lack."""
        return sorted(self.required - arguments.keys())


def parse(functions: Any, weights: Sequence[float] | None = None) -> list[tuple[RewardFunction, float]]:
    """The reward functions and weights that a user's description stands for; see `Rewards`.

    Raises:
        ValueError: unknown name or option, a file or function that does not exist, weights that do not fit.
        TypeError: something that is no reward function.
    """
    if isinstance(functions, Mapping) and "name" not in functions:
        if weights is not None:
            raise ValueError("rewards given as {name: weight} have their weights: leave out `weights`")
        functions, weights = list(functions), list(functions.values())
    entries = list(functions) if isinstance(functions, (list, tuple)) else [functions]
    if not entries:
        raise ValueError("no reward function given")
    parsed = [_parse_entry(entry) for entry in entries]
    if weights is not None and len(weights) != len(parsed):
        raise ValueError(f"{len(weights)} weights for {len(parsed)} reward functions")
    result: list[tuple[RewardFunction, float]] = []
    for i, entry in enumerate(parsed):
        name = entry.name
        if weights is not None and entry.weight is not None:
            raise ValueError(f"the reward {name!r} has two weights, its own and one in `weights`")
        if name in {f.name for f, _ in result}:
            name = f"{name}_{i}"
        value = weights[i] if weights is not None else 1.0 if entry.weight is None else entry.weight
        made = _made(name, entry.function, {}) if inspect.isclass(entry.function) else entry.function
        function = RewardFunction.inspect(name, made, entry.processes)
        result.append((function, check_finite(f"weight of the reward {name!r}", value)))
    return result


def _is_async(function: Callable[..., Any]) -> bool:
    target = function.func if isinstance(function, functools.partial) else function
    return inspect.iscoroutinefunction(target) or inspect.iscoroutinefunction(type(target).__call__)


def check_finite(what: str, value: Any) -> float:
    """`value` as a float.

    Raises:
        ValueError: it is not a finite number.
    """
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not abs(value) < float("inf"):
        raise ValueError(f"{what} must be a finite number, is {value!r}")
    return float(value)


@dataclass(frozen=True)
class _Entry:
    name: str
    function: Callable[..., Any]
    weight: float | None = None
    processes: int | None = None


def _parse_entry(entry: Any) -> _Entry:
    if isinstance(entry, Mapping):
        options = dict(entry)
        if "name" not in options:
            raise ValueError(f"a reward with options is {{'name': ..., 'weight': ..., option: ...}}, got {options}")
        inner = _parse_entry(options.pop("name"))
        weight, processes = options.pop("weight", inner.weight), options.pop("processes", inner.processes)
        return _Entry(inner.name, _with_options(inner.name, inner.function, options), weight, processes)
    if isinstance(entry, InProcesses):
        return replace(_parse_entry(entry.function), processes=entry.processes)
    if isinstance(entry, str):
        return _Entry(short_name(entry, REWARDS), find(entry, REWARDS))
    if callable(entry):
        unbound = entry.func if isinstance(entry, functools.partial) else entry
        name = getattr(unbound, "__name__", None) or getattr(unbound, "name", None) or type(unbound).__name__
        return _Entry(name, entry)
    raise TypeError(f"a reward is a function, a name or a mapping, got {type(entry).__name__}: {entry!r}")


def _with_options(name: str, function: Callable[..., Any], options: Mapping[str, Any]) -> Callable[..., Any]:
    if inspect.isclass(function):
        return _made(name, function, options)
    parameters = inspect.signature(function).parameters
    known = [n for n, p in parameters.items() if n not in PROVIDED and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    for option in options:
        if option not in known:
            raise ValueError(unknown_name(f"option of reward {name!r}", option, known))
    return functools.partial(function, **options) if options else function


def _made(name: str, cls: Callable[..., Any], options: Mapping[str, Any]) -> Any:
    """An instance of a class whose instances are reward functions."""
    check_options("reward", name, cls, options)
    return cls(**options)
