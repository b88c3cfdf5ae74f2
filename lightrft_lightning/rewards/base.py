"""Scores completions with reward functions; one that fails costs its own sample and nothing else."""

from __future__ import annotations

import asyncio
import copy
import logging
import math
import threading
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from lightrft_lightning._errors import unknown_name
from lightrft_lightning.experience.trajectory import Prompt, Trajectory
from lightrft_lightning.rewards._calls import (
    Failure,
    Outcome,
    checked_value,
    checked_values,
    finished,
    run_in_threads,
    run_on_event_loop,
)
from lightrft_lightning.rewards._spec import OF_TRL, RewardFunction, check_finite, parse
from lightrft_lightning.rewards.model import RewardModel
from lightrft_lightning.rewards.report import Reason, RewardReport, collected

if TYPE_CHECKING:
    from lightrft_lightning.strategies.base import StrategyBase

log = logging.getLogger(__name__)


class Rewards:
    """One or several reward functions with weights.

    A reward function is a plain function, called with keywords; it receives those columns of the data that it names:

    - ``def f(prompt, completion, answer) -> float`` is called for each sample,
    - ``def f(prompts, completions, answer) -> list[float]`` with lists; an exception in the result is the failure of
      its own sample,
    - either may be ``async def``: then all samples are awaited concurrently,
    - ``finish_reason`` and ``token_ids`` are there besides the columns, and ``**columns`` receives everything,
    - an object with ``__call__``, or its class with options, which is then built once. Its attribute ``columns`` names
      further columns that it needs, ``workers`` how many calls there may be at a time; with ``batch_size`` it is called
      with at most that many samples, as soon as they are there, and a failure is that of all of them.

    One that returns None does not apply to that sample: the others count alone, and if none applies the sample has no
    reward, without having failed. What a function does to the columns that it gets is not seen by any other.

    A function runs in a thread of its own, not in the main one, with Python's and torch's thread-local settings (e.g.
    `torch.no_grad`) at their defaults. A batch function that fails or takes too long is called again one sample at a
    time, an async function that blocks the event loop one sample a thread, so that only the sample that is to blame
    is lost. A call that holds the interpreter lock cannot be given up in a thread: with ``"processes": 4`` in the
    mapping, or as `InProcesses`, the function runs in processes, which are killed at the deadline and replaced.

    Args:
        functions: a function; a name in `REWARDS`; ``"package.module.function"``; ``"path/to/file.py:function"``; a
            mapping ``{"name": any of these, "weight": 0.5, "processes": 4, option: value}``; a list of these; or a
            mapping from name to weight.
        weights: one a function; default: 1.
        deadline: seconds that one call of a function may take, counted from when it starts.
        on_error: ``drop`` leaves a failed sample without a reward, a number is the reward that it gets.
        workers: calls at a time in threads.

    Raises:
        ValueError: unknown name or option, a number out of range, or a function for processes that only exists here.
        TypeError: a function takes neither `completion` nor `completions`.

    Example:
        >>> def short(completion: str) -> float:
        ...     return -float(len(completion))
        >>> Rewards([short, "exact_match"], weights=[0.01, 1.0]).names
        ['short', 'exact_match']
    """

    def __init__(
        self,
        functions: Any,
        weights: Sequence[float] | None = None,
        *,
        deadline: float = 30.0,
        on_error: str | float = "drop",
        workers: int = 8,
    ) -> None:
        if isinstance(on_error, str) and on_error != "drop":
            raise ValueError(f"{unknown_name('on_error', on_error, ['drop'])}, or a number")
        if not deadline > 0 or workers < 1:
            raise ValueError(f"Rewards(deadline={deadline}, workers={workers}): needs deadline > 0, workers >= 1")
        self.functions = parse(functions, weights)
        for function, _ in self.functions:
            if function.pool is not None and _is_model(function):
                raise ValueError(f"reward {function.name!r}: a reward model runs in the trainer, leave out `processes`")
        self.deadline = min(deadline, 1e6)  # the longest wait that the platform's locks take is finite
        self.on_error = None if on_error == "drop" else check_finite("on_error", on_error)
        self.workers = workers
        self._checked: set[str] = set()

    @property
    def names(self) -> list[str]:
        """Names of the functions, the keys of `Trajectory.reward_parts`."""
        return [function.name for function, _ in self.functions]

    @property
    def models(self) -> list[RewardModel]:
        """Those of the rewards that are models in the training processes."""
        return [function.function for function, _ in self.functions if _is_model(function)]  # type: ignore[misc]

    def score(self, trajectories: Sequence[Trajectory], strategy: StrategyBase | None = None) -> RewardReport:
        """Set `reward` (the weighted sum) and `reward_parts` (what succeeded) of each trajectory.

        Why samples failed is logged, each reason once, with the prompt of the first.

        Args:
            trajectories: of this rank; may be empty.
            strategy: what holds the reward models. With it, all ranks must call this together if there are any.

        Raises:
            ValueError: a function needs a column that the data does not have, at the first call.
        """
        report = self.score_silently(trajectories, strategy)
        report.warn(self.on_error)
        return report

    def score_silently(self, trajectories: Sequence[Trajectory], strategy: StrategyBase | None = None) -> RewardReport:
        """As `score`, but what failed is the caller's to tell, with `RewardReport.warn`."""
        return self._conclude(trajectories, self._call_functions(trajectories), strategy)

    def check_data(self, prompts: Sequence[Prompt]) -> None:
        """Look whether these have what the functions need, before anything is generated.

        Raises:
            ValueError: a function needs a column that none of them has.
        """
        for function, _ in self.functions:
            if prompts and all(function.lacking(prompt) for prompt in prompts):
                raise ValueError(_missing(function, function.lacking(prompts[0]), prompts))

    def _call_functions(self, trajectories: Sequence[Trajectory]) -> list[dict[str, Outcome]]:
        """For each sample what every function made of it, by name; models are left out."""
        if not trajectories:
            return []
        self._check_columns(trajectories)
        parts = {f.name: self._score_with(f, trajectories) for f, _ in self.functions if not _is_model(f)}
        return [{name: part[i] for name, part in parts.items()} for i in range(len(trajectories))]

    def _conclude(
        self,
        trajectories: Sequence[Trajectory],
        parts: Sequence[dict[str, Outcome]],
        strategy: StrategyBase | None,
    ) -> RewardReport:
        """Let the models score as well, in this thread, and form the sums."""
        for function, _ in self.functions:
            if isinstance(model := function.function, RewardModel) and (trajectories or strategy is not None):
                for part, outcome in zip(parts, model.score(trajectories, strategy), strict=True):
                    part[function.name] = outcome
        failures = [
            self._assign(t, [part[name] for name in self.names]) for t, part in zip(trajectories, parts, strict=True)
        ]
        kinds = [kind for kind, _ in failures]
        reasons = [
            (reason, Reason(1, _short(t.prompt.text)))
            for t, (kind, reason) in zip(trajectories, failures, strict=True)
            if kind is not None
        ]
        return RewardReport(
            samples=len(trajectories),
            failed=len(reasons),
            timed_out=kinds.count("timed_out"),
            non_finite=kinds.count("non_finite"),
            inapplicable=sum(not t.applicable for t in trajectories),
            values={name: sum(name in t.reward_parts for t in trajectories) for name in self.names},
            reasons=collected(reasons),
        )

    @contextmanager
    def in_background(self, strategy: StrategyBase | None = None) -> Iterator[Scoring]:
        """Score trajectories while others are still being generated; what is not scored at the end is given up.

        Models score in `Scoring.finish`, in the thread that calls it: sharded, their passes are in step on all ranks.
        """
        scoring = Scoring(self, strategy)
        try:
            yield scoring
        finally:
            scoring.stop()

    def _check_columns(self, trajectories: Sequence[Trajectory]) -> None:
        """A column that is missing everywhere is a mistake in the set-up; in single rows it costs only these."""
        for function, _ in self.functions:
            if function.name in self._checked:
                continue
            lacking = [function.missing(function.arguments(t)) for t in trajectories]
            if all(lacking):
                raise ValueError(_missing(function, lacking[0], [t.prompt for t in trajectories]))
            self._checked.add(function.name)

    def _score_with(self, function: RewardFunction, trajectories: Sequence[Trajectory]) -> list[Outcome]:
        """What one function makes of each sample; the values are floats."""
        arguments = [function.arguments(t) for t in trajectories]
        outcomes = {
            i: Outcome(failure="failed", reason=f"its row has no column {missing[0]!r}")
            for i, given in enumerate(arguments)
            if (missing := function.missing(given))
        }
        usable = [i for i in range(len(arguments)) if i not in outcomes]
        values = self._values(function, [arguments[i] for i in usable])
        outcomes.update(zip(usable, values, strict=True))
        return [outcomes[i] for i in range(len(arguments))]

    def _values(self, function: RewardFunction, arguments: list[dict[str, Any]]) -> list[Outcome]:
        if size := function.batch_size:
            batches = [arguments[i : i + size] for i in range(0, len(arguments), size)]
            outcomes = zip(self._call(function, batches), batches, strict=True)
            return [one for o, batch in outcomes for one in ([o] * len(batch) if o.failure else o.value)]
        if function.batch and len(arguments) > 1:
            together = self._call(function, [arguments])[0]
            if together.failure is None:
                return together.value
            log.warning("reward %s: %s. Calling it one sample at a time", function.name, together.reason)
        alone = self._call(function, [[given] for given in arguments])
        return [outcome if outcome.failure else outcome.value[0] for outcome in alone]

    def _call(self, function: RewardFunction, batches: Sequence[list[dict[str, Any]]]) -> list[Outcome]:
        """Call `function` with each batch; the value of an outcome is a list with an outcome for each sample."""
        if function.pool is not None:
            sizes = [len(batch) if function.batch else None for batch in batches]
            requests = [(_keywords(function, batch), size) for batch, size in zip(batches, sizes, strict=True)]
            return function.pool.run(requests, self.deadline)
        if not function.is_async:
            workers = function.workers or self.workers
            return run_in_threads([partial(_call, function, b) for b in batches], workers, self.deadline)
        calls = [partial(_call_async, function, batch) for batch in batches]
        outcomes = run_on_event_loop(calls, self.deadline)
        # Some call blocked the loop. Which one shows when each has a thread, and a loop, of its own.
        unknown = [i for i, outcome in enumerate(outcomes) if outcome is None]
        again = run_in_threads([partial(_run_alone, calls[i]) for i in unknown], self.workers, self.deadline)
        redone = dict(zip(unknown, again, strict=True))
        return [redone[i] if outcome is None else outcome for i, outcome in enumerate(outcomes)]

    def _assign(self, trajectory: Trajectory, parts: Sequence[Outcome]) -> tuple[Failure | None, str]:
        """Fill in the trajectory; returns the kind of failure, if any, and its reason."""
        named = list(zip(self.names, parts, strict=True))
        trajectory.reward_parts = {name: part.value for name, part in named if part.value is not None}
        trajectory.applicable = any(part.failure or part.value is not None for part in parts)
        trajectory.reward = self.on_error if trajectory.applicable else None
        failure = next((part.failure for _, part in named if part.failure), None)
        reason = "; ".join(f"{name}: {part.reason}" for name, part in named if part.failure)
        if failure is None and trajectory.applicable:
            weighted = zip(self.functions, parts, strict=True)
            total = sum(weight * part.value for (_, weight), part in weighted if part.value is not None)
            if math.isfinite(total):
                trajectory.reward = total
            else:
                failure, reason = "non_finite", f"the weighted sum is {total}"
        return failure, reason


class Scoring:
    """Scores what `add` brings, in a thread, with all that has arrived meanwhile in one call.

    Functions that take whole batches see the same batch as without it: with one of them, scoring waits for `finish`.
    """

    def __init__(self, rewards: Rewards, strategy: StrategyBase | None = None) -> None:
        self._rewards, self._strategy = rewards, strategy
        self._waits = any(f.batch and not f.batch_size and not _is_model(f) for f, _ in rewards.functions)
        self._arrived: list[Trajectory] = []
        self._scored: list[Trajectory] = []
        self._parts: list[dict[str, Outcome]] = []
        self._error: BaseException | None = None
        self._news = threading.Condition()
        self._over = self._given_up = False
        self._thread = threading.Thread(target=self._run, name="lightrft-rewards", daemon=True)
        self._thread.start()

    def add(self, trajectories: Sequence[Trajectory]) -> None:
        """Score these soon."""
        with self._news:
            self._arrived += trajectories
            self._news.notify()

    def finish(self) -> RewardReport:
        """Wait until all are scored; what failed is the caller's to tell, with `RewardReport.warn`.

        Raises:
            ValueError: as `Rewards.score`.
        """
        with self._news:
            self._over = True
            self._news.notify()
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._rewards._conclude(self._scored, self._parts, self._strategy)

    def stop(self) -> None:
        """Score nothing that has not been begun."""
        with self._news:
            self._over = self._given_up = True
            self._news.notify()

    def _run(self) -> None:
        while True:
            with self._news:
                self._news.wait_for(lambda: self._over or (self._arrived and not self._waits))
                batch, self._arrived = self._arrived, []
                if self._given_up or not batch:
                    return
            try:
                self._parts += self._rewards._call_functions(batch)
                self._scored += batch
            except BaseException as err:
                self._error = err
                return


def _is_model(function: RewardFunction) -> bool:
    return isinstance(function.function, RewardModel)


def _call(function: RewardFunction, batch: list[dict[str, Any]]) -> list[Outcome]:
    return _outcomes(function, finished(function.function(**_own_keywords(function, batch))), len(batch))


async def _call_async(function: RewardFunction, batch: list[dict[str, Any]]) -> list[Outcome]:
    return _outcomes(function, await function.function(**_own_keywords(function, batch)), len(batch))


def _run_alone(call: Callable[[], Coroutine[Any, Any, list[Outcome]]]) -> list[Outcome]:
    return asyncio.run(call())


def _keywords(function: RewardFunction, batch: list[dict[str, Any]]) -> dict[str, Any]:
    if not function.batch:
        return batch[0]
    names = {name for given in batch for name in given}
    return {name: [given.get(name) for given in batch] for name in names}


def _own_keywords(function: RewardFunction, batch: list[dict[str, Any]]) -> dict[str, Any]:
    """The keywords, of which a function may change what it likes: columns are shared by the samples of a prompt."""
    return _keywords(function, [{name: _own(value) for name, value in given.items()} for given in batch])


def _own(value: Any) -> Any:
    kinds = (str, bytes, int, float, type(None))
    if isinstance(value, kinds) or (isinstance(value, tuple) and all(isinstance(v, kinds) for v in value)):
        return value
    try:
        return copy.deepcopy(value)
    except Exception:  # a generator, a lock, a connection: there is only one of it
        return value


def _missing(function: RewardFunction, names: Sequence[str], prompts: Sequence[Prompt]) -> str:
    """The message for a column that no row has."""
    name = next((n for n in names if n in OF_TRL), names[0])
    told = f"the reward {function.name!r} needs {name!r}"
    if name in OF_TRL:
        return (
            f"{told}, which TRL's trainer passes and this one does not: leave it out, or give it a default, "
            f"`{name}=None`. Each function's mean is logged as train/reward/<name>"
        )
    return f"{told}, which is no option: {unknown_name('column', name, {str(n) for p in prompts for n in p.fields})}"


def _outcomes(function: RewardFunction, result: Any, size: int) -> list[Outcome]:
    return checked_values(result, size) if function.batch else [checked_value(result)]


def _short(text: str) -> str:
    return repr(text if len(text) <= 120 else f"{text[:60]} ... {text[-60:]}")
