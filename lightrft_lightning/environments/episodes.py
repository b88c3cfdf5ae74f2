"""Trajectories of several turns: the engine writes the policy's, an environment answers, until one of them ends it."""

from __future__ import annotations

import asyncio
import copy
import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from lightrft_lightning._find import check_options, find, short_name
from lightrft_lightning._seeds import derive_seed
from lightrft_lightning.engines.base import RolloutEngine
from lightrft_lightning.environments._chat import TurnMarkers
from lightrft_lightning.environments.base import ENVIRONMENTS, Environment, Observation, Turn
from lightrft_lightning.experience.trajectory import (
    Completion,
    Episode,
    FinishReason,
    Prompt,
    SamplingParams,
    Trajectory,
)
from lightrft_lightning.models.tokens import check_ids
from lightrft_lightning.rewards import REWARDS, Rewards
from lightrft_lightning.rewards._calls import run_in_threads
from lightrft_lightning.rewards._spec import parse

WORKERS = 32
"""Calls of environments at a time."""
_LATER_TURNS = 2
"""Keeps their random numbers apart from those of `fire`, which continues completions as well."""


@REWARDS.register("environment")
def environment_reward(completion: str, episode: Episode) -> Any:
    """The sum of the rewards that the environment gave."""
    return RuntimeError(episode.failure) if episode.failure else episode.reward


def with_environment(rewards: Rewards) -> Rewards:
    """The same rewards and that of the environment, with weight 1 unless it is among them with another."""
    if "environment" in rewards.names:
        return rewards
    extended = copy.copy(rewards)
    extended.functions = [*rewards.functions, *parse("environment")]
    return extended


class Episodes:
    """Plays trajectories on after their first turn.

    The policy's tokens stay as they were sampled; what the environment says is tokenised once, by itself, follows them
    with a mask of False, and is never learnt from. `SamplingParams.max_new_tokens` bounds the policy's tokens of all
    turns together. A trajectory that a limit cuts off before the environment says that it is done has the finish reason
    ``length``.

    Args:
        environment: a subclass of `Environment`; a name in `ENVIRONMENTS`; ``"package.module.Class"``;
            ``"path/to/file.py:Class"``; or a mapping ``{"name": any of these, option: value}``.
        max_turns: most turns of the policy.
        deadline: seconds that one call of an environment may take.

    Raises:
        ValueError: unknown name or option, or a number out of range.
        TypeError: something that is no environment.
    """

    def __init__(self, environment: Any, max_turns: int = 8, deadline: float = 30.0) -> None:
        if max_turns < 1:
            raise ValueError(f"max_turns={max_turns} must be at least 1")
        self.make, self.role = _parse(environment)
        self.max_turns, self.deadline = max_turns, deadline
        self._markers: dict[int, TurnMarkers] = {}
        self._embedded: int | None = None
        """How many ids the model has embeddings for."""

    def prepare(self, tokenizer: Any, prompts: Sequence[Prompt]) -> None:
        """Find out what surrounds an observation, if these prompts were rendered with a chat template.

        Raises:
            ValueError: the template cannot show observations.
        """
        if self.role is not None and id(tokenizer) not in self._markers and any(p.messages for p in prompts):
            self._markers = {id(tokenizer): TurnMarkers(tokenizer, self.role)}

    def play(
        self,
        groups: Sequence[Sequence[Trajectory]],
        engine: RolloutEngine,
        tokenizer: Any,
        sampling: SamplingParams,
        max_length: int,
        gather: Callable[[Any], list[Any]],
    ) -> Iterator[Sequence[Trajectory]]:
        """Continue trajectories, in place, until all are finished; all ranks together.

        Every turn is one call of the engine, in which all ranks take part as long as one of them has a trajectory that
        goes on. Its random numbers are fixed by the seed, the trajectory and the turn alone.

        Args:
            groups: trajectories with their first turn.
            engine: what wrote it, and writes the others.
            tokenizer: the policy's.
            sampling: as for the first turn.
            max_length: most tokens of a prompt with its trajectory, observations included.
            gather: gives the values of all ranks.

        Yields:
            Each group as soon as all of it is finished.
        """
        self.prepare(tokenizer, [t.prompt for group in groups for t in group])
        self._embedded = engine.vocabulary_size
        playing = [[_Playing(t, j, sampling, max_length) for j, t in enumerate(group)] for group in groups]
        going = [p for group in playing for p in group]
        waiting = list(zip(groups, playing, strict=True))
        try:
            self._start(going, sampling)
            for number in range(1, self.max_turns + 1):
                self._step([p for p in going if not p.failure], number, tokenizer)
                for p in going:
                    if p.finished:
                        p.conclude(tokenizer)
                going = [p for p in going if not p.finished]
                yield from (group for group, played in waiting if all(p.finished for p in played))
                waiting = [(group, played) for group, played in waiting if not all(p.finished for p in played)]
                everyone = [one for of_rank in gather([(len(p.ids), p.room) for p in going]) for one in of_rank]
                if not everyone:
                    return
                self._continue(going, engine, sampling, number, _limits(everyone, max_length))
        finally:
            self._close([p for group in playing for p in group])

    def _start(self, playing: Sequence[_Playing], sampling: SamplingParams) -> None:
        calls = [partial(p.start, self.make, derive_seed(sampling.seed, p.trajectory.group)) for p in playing]
        for p, outcome in zip(playing, run_in_threads(calls, WORKERS, self.deadline), strict=True):
            if outcome.failure:
                p.fail(f"reset: {outcome.reason}")

    def _step(self, playing: Sequence[_Playing], number: int, tokenizer: Any) -> None:
        """Let the environments answer the latest turn of each."""
        last_turn = number == self.max_turns
        calls = []
        for p in playing:
            assert p.environment is not None
            text = _text(tokenizer, p.turn.token_ids)
            turn = Turn(text, p.turn.token_ids, p.turn.finish_reason, number, last_turn or p.room < 1)
            calls.append(partial(_answer, p.environment, turn))
        for p, outcome in zip(playing, run_in_threads(calls, WORKERS, self.deadline), strict=True):
            if outcome.failure:
                p.fail(f"step of turn {number}: {outcome.reason}")
                continue
            observation: Observation = outcome.value
            p.reward += observation.reward or 0.0
            p.errors += observation.error
            if observation.done:
                p.finish_reason = p.turn.finish_reason
            elif last_turn or p.room < 1:
                p.finish_reason = "length"
            else:
                try:
                    p.observe(self._tokens(observation, p, tokenizer))
                except Exception as err:  # the tokenizer's, for a text that it has no tokens for
                    p.fail(f"step of turn {number}: its observation has no tokens: {type(err).__name__}: {err}")

    def _tokens(self, observation: Observation, playing: _Playing, tokenizer: Any) -> list[int]:
        if observation.token_ids is not None:
            return self._checked(_checked_ids(observation.token_ids, len(tokenizer)), tokenizer)
        ids: list[int] = []
        if observation.text:
            # What a tool returns is no part of the conversation's frame, whatever it looks like.
            encoded = tokenizer(observation.text, add_special_tokens=False, split_special_tokens=True)
            ids = list(encoded["input_ids"])
        markers = self._markers.get(id(tokenizer)) if playing.trajectory.prompt.messages else None
        return self._checked(markers.around(playing.turn.token_ids, ids) if markers else ids, tokenizer)

    def _checked(self, ids: list[int], tokenizer: Any) -> list[int]:
        check_ids([("it", ids)], self._embedded, tokenizer)
        return ids

    def _continue(
        self,
        going: Sequence[_Playing],
        engine: RolloutEngine,
        sampling: SamplingParams,
        number: int,
        limits: Mapping[tuple[int, int], int],
    ) -> None:
        """The next turn of each, in one call of the engine for each of the limits."""
        seed = derive_seed(sampling.seed, _LATER_TURNS, number)
        limit_of = [limits[len(p.ids), p.room] for p in going]  # before any of them grows
        for limit in sorted(set(limits.values()), reverse=True):
            mine = [p for p, own in zip(going, limit_of, strict=True) if own == limit]
            streams = [p.trajectory.group * sampling.n + p.sample for p in mine]
            turns = engine.generate(
                [p.ids for p in mine], replace(sampling, n=1, max_new_tokens=limit, seed=seed), streams
            )
            for p, (completion,) in zip(mine, turns, strict=True):
                p.append(completion)

    def _close(self, playing: Sequence[_Playing]) -> None:
        opened = [p.environment for p in playing if p.environment is not None]
        closing = [e.close for e in opened if type(e).close is not Environment.close]
        run_in_threads(closing, WORKERS, self.deadline)  # what it raises is nobody's loss any more


@dataclass
class _Playing:
    """A trajectory on its way."""

    trajectory: Trajectory
    sample: int
    sampling: SamplingParams
    max_length: int
    environment: Environment | None = None
    reward: float = 0.0
    errors: int = 0
    failure: str = ""
    finish_reason: FinishReason | None = None

    def __post_init__(self) -> None:
        self.turn = self.trajectory.completion
        self.turns = [self.turn]
        self.ids = [*self.trajectory.prompt.token_ids, *self.turn.token_ids]
        self.logprobs, self.mask = list(self.turn.logprobs), list(self.trajectory.mask)

    @property
    def room(self) -> int:
        """Tokens that the policy may still write."""
        return min(self.sampling.max_new_tokens - sum(self.mask), self.max_length - len(self.ids))

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None

    def start(self, make: Callable[[], Environment], seed: int) -> None:
        self.environment = make()
        self.environment.reset(self.trajectory.prompt, seed)

    def fail(self, reason: str) -> None:
        self.failure, self.finish_reason = reason, self.turn.finish_reason

    def observe(self, ids: Sequence[int]) -> None:
        """Read what the environment says, if there is room for it and a token after it."""
        if len(self.ids) + len(ids) >= self.max_length:
            self.finish_reason = "length"
            return
        self.ids += ids
        self.logprobs += [0.0] * len(ids)
        self.mask += [False] * len(ids)

    def append(self, turn: Completion) -> None:
        """The next turn; the engine may have written more than there was room for."""
        room = self.room
        if len(turn.token_ids) > room:
            turn = Completion(turn.token_ids[:room], turn.logprobs[:room], "length")
        self.turn = turn
        self.turns.append(turn)
        self.ids += turn.token_ids
        self.logprobs += turn.logprobs
        self.mask += [True] * len(turn.token_ids)

    def conclude(self, tokenizer: Any) -> None:
        """Write the whole into the trajectory."""
        t = self.trajectory
        ids = tuple(self.ids[len(t.prompt.token_ids) :])
        assert self.finish_reason is not None
        t.completion = Completion(ids, tuple(self.logprobs), self.finish_reason)
        t.mask = tuple(self.mask)
        t.text = _text(tokenizer, ids)
        texts = tuple(_text(tokenizer, turn.token_ids) for turn in self.turns)
        t.episode = Episode(texts, self.reward, self.errors, self.failure)


def _text(tokenizer: Any, token_ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(token_ids), skip_special_tokens=True))


def _limits(everyone: Sequence[tuple[int, int]], max_length: int) -> dict[tuple[int, int], int]:
    """How many new tokens the engine is asked for, by (length, room) of the trajectories of all ranks.

    All get the largest room, in one call, and what is too much is cut off: a prefix of more tokens is what fewer would
    have been. Only those that would leave the model's window are asked for by themselves.
    """
    most = max(room for _, room in everyone)
    return {(length, room): most if length + most <= max_length else room for length, room in everyone}


def _answer(environment: Environment, turn: Turn) -> Observation:
    """Runs where `step` ran: what it returns is somebody else's object."""
    answer = environment.step(turn)
    if inspect.isawaitable(answer):
        answer = asyncio.run(_awaited(answer))
    if not isinstance(answer, Observation):
        raise TypeError(f"step returned a {type(answer).__name__} in place of an Observation")
    if not isinstance(answer.text, str):
        raise TypeError(f"the text of its observation is a {type(answer.text).__name__}")
    reward = 0.0 if answer.reward is None else float(answer.reward)
    if not math.isfinite(reward):
        raise ValueError(f"the reward of its observation is {reward}")
    return replace(answer, reward=reward, done=bool(answer.done), error=bool(answer.error))


async def _awaited(answer: Any) -> Any:
    return await answer


def _checked_ids(token_ids: Sequence[Any], vocabulary: int) -> list[int]:
    ids = [int(i) for i in token_ids]
    if not all(0 <= i < vocabulary for i in ids):
        raise ValueError(f"a token id is outside of the vocabulary of {vocabulary}")
    return ids


def _parse(entry: Any) -> tuple[Callable[[], Environment], str | None]:
    """What makes an environment, and the role of its observations."""
    options: dict[str, Any] = {}
    if isinstance(entry, Mapping):
        options = dict(entry)
        if "name" not in options:
            raise ValueError(f"an environment with options is {{'name': ..., option: ...}}, got {options}")
        entry = options.pop("name")
    cls, name = entry, getattr(entry, "__name__", None)
    if isinstance(entry, str):
        cls, name = find(entry, ENVIRONMENTS, "class"), short_name(entry, ENVIRONMENTS)
    if not (inspect.isclass(cls) and issubclass(cls, Environment)):
        raise TypeError(f"an environment is a subclass of Environment, its name or a mapping, got {entry!r}")
    if inspect.isabstract(cls):
        raise TypeError(f"environment {name!r} has no method `step`")
    check_options("environment", str(name), cls, options)
    make = partial(cls, **options)
    make()  # an option that it refuses is refused before work starts
    return make, cls.role
