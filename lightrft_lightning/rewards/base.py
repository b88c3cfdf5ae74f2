"""Scores completions with reward functions; one that fails costs its own sample and nothing else."""

from __future__ import annotations

import asyncio
import logging
import math
import threading
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from functools import partial
from itertools import islice
from typing import Any

from lightrft_lightning._errors import unknown_name
from lightrft_lightning.experience.trajectory import Trajectory
from lightrft_lightning.rewards._calls import Failure, Outcome, run_in_threads, run_on_event_loop
from lightrft_lightning.rewards._spec import RewardFunction, check_finite, parse

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RewardReport:
    """What became of a batch, in numbers of samples.

    Attributes:
        samples: all of them.
        failed: without a reward of their own, for whatever reason.
        timed_out: of these, those that took longer than the deadline.
        non_finite: of these, those whose reward was NaN or infinite.
    """

    samples: int
    failed: int = 0
    timed_out: int = 0
    non_finite: int = 0

    def __add__(self, other: RewardReport) -> RewardReport:
        return RewardReport(*map(sum, zip(astuple(self), astuple(other), strict=True)))


class Rewards:
    """One or several reward functions with weights.

    A reward function is a plain function, called with keywords; it receives those columns of the data that it names:

    - ``def f(prompt, completion, answer) -> float`` is called for each sample,
    - ``def f(prompts, completions, answer) -> list[float]`` with lists,
    - either may be ``async def``: then all samples are awaited concurrently,
    - ``finish_reason`` and ``token_ids`` are there besides the columns, and ``**columns`` receives everything.

    A function runs in a thread of its own, not in the main one, with Python's and torch's thread-local settings (e.g.
    `torch.no_grad`) at their defaults. A batch function that fails or takes too long is called again one sample at a
    time, an async function that blocks the event loop one sample a thread, so that only the sample that is to blame
    is lost. A call that holds the interpreter lock cannot be given up: run such work in a process.

    Args:
        functions: a function; a name in `REWARDS`; ``"package.module.function"``; ``"path/to/file.py:function"``; a
            mapping ``{"name": any of these, "weight": 0.5, option: value}``; a list of these; or a mapping from name
            to weight.
        weights: one a function; default: 1.
        deadline: seconds that one call of a function may take, counted from when it starts.
        on_error: ``drop`` leaves a failed sample without a reward, a number is the reward that it gets.
        workers: calls at a time.

    Raises:
        ValueError: unknown name or option, or a number out of range.
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
        self.deadline = min(deadline, 1e6)  # the longest wait that the platform's locks take is finite
        self.on_error = None if on_error == "drop" else check_finite("on_error", on_error)
        self.workers = workers
        self._checked: set[str] = set()

    @property
    def names(self) -> list[str]:
        """Names of the functions, the keys of `Trajectory.reward_parts`."""
        return [function.name for function, _ in self.functions]

    def score(self, trajectories: Sequence[Trajectory]) -> RewardReport:
        """Set `reward` (the weighted sum) and `reward_parts` (what succeeded) of each trajectory.

        Every sample without a reward of its own is logged once, with its prompt and the reason.

        Raises:
            ValueError: a function needs a column that the data does not have, at the first call.
        """
        if not trajectories:
            return RewardReport(0)
        self._check_columns(trajectories)
        parts = [self._score_with(function, trajectories) for function, _ in self.functions]
        failures = [self._assign(t, [part[i] for part in parts]) for i, t in enumerate(trajectories)]
        return RewardReport(
            samples=len(trajectories),
            failed=sum(f is not None for f in failures),
            timed_out=failures.count("timed_out"),
            non_finite=failures.count("non_finite"),
        )

    @contextmanager
    def in_background(self) -> Iterator[Scoring]:
        """Score trajectories while others are still being generated; what is not scored at the end is given up."""
        scoring = Scoring(self)
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
                columns = {str(name) for t in trajectories for name in t.prompt.fields}
                unknown = unknown_name("column", lacking[0][0], columns)
                raise ValueError(f"the reward {function.name!r} needs {lacking[0][0]!r}, which is no option: {unknown}")
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
        if function.batch and len(arguments) > 1:
            together = self._call(function, [arguments])[0]
            if together.failure is None:
                return together.value
            log.warning("reward %s: %s. Calling it one sample at a time", function.name, together.reason)
        alone = self._call(function, [[given] for given in arguments])
        return [outcome if outcome.failure else outcome.value[0] for outcome in alone]

    def _call(self, function: RewardFunction, batches: Sequence[list[dict[str, Any]]]) -> list[Outcome]:
        """Call `function` with each batch; the value of an outcome is a list with an outcome for each sample."""
        if not function.is_async:
            return run_in_threads([partial(_call, function, b) for b in batches], self.workers, self.deadline)
        calls = [partial(_call_async, function, batch) for batch in batches]
        outcomes = run_on_event_loop(calls, self.deadline)
        # Some call blocked the loop. Which one shows when each has a thread, and a loop, of its own.
        unknown = [i for i, outcome in enumerate(outcomes) if outcome is None]
        again = run_in_threads([partial(_run_alone, calls[i]) for i in unknown], self.workers, self.deadline)
        redone = dict(zip(unknown, again, strict=True))
        return [redone[i] if outcome is None else outcome for i, outcome in enumerate(outcomes)]

    def _assign(self, trajectory: Trajectory, parts: Sequence[Outcome]) -> Failure | None:
        """Fill in the trajectory; returns the kind of failure, if any."""
        named = list(zip(self.names, parts, strict=True))
        trajectory.reward_parts = {name: part.value for name, part in named if part.failure is None}
        trajectory.reward = self.on_error
        failure = next((part.failure for _, part in named if part.failure), None)
        reason = "; ".join(f"{name}: {part.reason}" for name, part in named if part.failure)
        if failure is None:
            total = sum(weight * part.value for (_, weight), part in zip(self.functions, parts, strict=True))
            if math.isfinite(total):
                trajectory.reward = total
                return None
            failure, reason = "non_finite", f"the weighted sum is {total}"
        consequence = "is dropped" if self.on_error is None else f"gets {self.on_error}"
        log.warning("no reward for a completion of %s, it %s: %s", _short(trajectory.prompt.text), consequence, reason)
        return failure


class Scoring:
    """Scores what `add` brings, in a thread, with all that has arrived meanwhile in one call.

    Functions that take whole batches see the same batch as without it: with one of them, scoring waits for `finish`.
    """

    def __init__(self, rewards: Rewards) -> None:
        self._rewards = rewards
        self._waits = any(function.batch for function, _ in rewards.functions)
        self._arrived: list[Trajectory] = []
        self._reports: list[RewardReport] = []
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
        """Wait until all are scored.

        Raises:
            ValueError: as `Rewards.score`.
        """
        with self._news:
            self._over = True
            self._news.notify()
        self._thread.join()
        if self._error is not None:
            raise self._error
        return sum(self._reports, RewardReport(0))

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
                self._reports.append(self._rewards.score(batch))
            except BaseException as err:
                self._error = err
                return


def _call(function: RewardFunction, batch: list[dict[str, Any]]) -> list[Outcome]:
    return _outcomes(function, function.function(**_keywords(function, batch)), len(batch))


async def _call_async(function: RewardFunction, batch: list[dict[str, Any]]) -> list[Outcome]:
    return _outcomes(function, await function.function(**_keywords(function, batch)), len(batch))


def _run_alone(call: Callable[[], Coroutine[Any, Any, list[Outcome]]]) -> list[Outcome]:
    return asyncio.run(call())


def _keywords(function: RewardFunction, batch: list[dict[str, Any]]) -> dict[str, Any]:
    if not function.batch:
        return batch[0]
    names = {name for given in batch for name in given}
    return {name: [given.get(name) for given in batch] for name in names}


def _outcomes(function: RewardFunction, result: Any, size: int) -> list[Outcome]:
    """Check what a function returned. Runs where the function ran: `__float__` and `__iter__` are its code as well.

    Raises:
        TypeError: a batch function returned something that has no order.
        ValueError: it returned more or fewer values than samples.
    """
    if not function.batch:
        return [_number(result)]
    if isinstance(result, (str, bytes, Mapping, Set)):
        raise TypeError(f"returned a {type(result).__name__} in place of a list of numbers")
    values = list(islice(result, size + 1))
    if len(values) != size:
        raise ValueError(f"returned {len(values) if len(values) < size else 'too many'} values for {size} samples")
    return [_number(value) for value in values]


def _number(value: Any) -> Outcome:
    refused = Outcome(failure="failed", reason=f"returned a {type(value).__name__}, which is no number")
    if isinstance(value, (str, bytes, bytearray)):  # float("1") would work
        return refused
    try:
        number = float(value)
    except OverflowError:
        return Outcome(failure="non_finite", reason="returned a number too large for a float")
    except BaseException:  # whatever `__float__` raises
        return refused
    if not math.isfinite(number):
        return Outcome(failure="non_finite", reason=f"returned {number}")
    return Outcome(number)


def _short(text: str) -> str:
    return repr(text if len(text) <= 120 else f"{text[:60]} ... {text[-60:]}")
