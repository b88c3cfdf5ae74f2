"""Prompts with verifiable answers that need no download."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import random
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from lightrft_lightning._errors import import_extra, unknown_name
from lightrft_lightning._registry import Registry

Row = dict[str, Any]
Task = Callable[..., list[Row]]

TASKS: Registry[Task] = Registry("task")
"""Functions that return rows with at least ``prompt`` and ``answer``. Extend with ``@TASKS.register("name")``."""

REASONING_GYM = "reasoning_gym."
SPLITS = ("all", "train", "val")


def make_task(spec: Mapping[str, Any]) -> list[Row]:
    """The rows of ``{"task": name, **options}``, where the name is in `TASKS` or ``reasoning_gym.<data set>``.

    Raises:
        ValueError: unknown task or option; the message names the nearest one.
    """
    options = dict(spec)
    name = options.pop("task", None)
    if not isinstance(name, str):
        raise ValueError(f"a task is {{'task': name, ...}}, got {dict(spec)!r}")
    if name.startswith(REASONING_GYM):
        return reasoning_gym(name.removeprefix(REASONING_GYM), **options)
    if name not in TASKS:
        raise ValueError(f"{unknown_name('task', name, TASKS)}, or '{REASONING_GYM}<data set>'")
    task = TASKS[name]
    parameters = inspect.signature(task).parameters
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    for option in options:
        if option not in parameters and not takes_any:
            raise ValueError(unknown_name(f"option of task {name!r}", option, parameters))
    return task(**options)


@TASKS.register("addition")
def addition(
    size: int = 512,
    low: int = 2,
    high: int = 30,
    seed: int = 0,
    split: str = "all",
    template: str = "What is {a} + {b}? Reply with only the number.",
    answer_template: str = "{sum}",
    reverse: bool = False,
    pairs: bool = False,
    trace_template: str | None = None,
) -> list[Row]:
    """Sums of two integers from `low` to `high`, both included. No problem comes twice until all have come.

    Args:
        size: number of rows.
        low: smallest summand.
        high: largest summand.
        seed: fixes the choice.
        split: ``train`` and ``val`` share no problem, also with other sizes and seeds: a pair belongs to ``val`` if a
            checksum of it, the same for a + b and b + a, is a multiple of 5. ``all`` takes both.
        template: format string over ``a`` and ``b``.
        answer_template: format string over ``sum``, e.g. ``{sum:03}`` for a fixed width.
        reverse: write the answer from its last character to its first. A model that starts from nothing learns
            addition much faster with the least significant digit first, as carries then come from what it has written.
        pairs: give a wrong answer too, any other sum that numbers in this range have, for reward models.
        trace_template: format string over ``a``, ``b`` and ``sum`` of a solution step by step, for a supervised start.

    Returns:
        Rows with ``prompt`` and ``answer``, both text; of pairs also with ``chosen``, which is the answer, and
        ``rejected``; with a `trace_template` also with ``trace``.

    Raises:
        ValueError: an unknown split, no problem fits, or pairs of sums that are all the same.
    """
    if split not in SPLITS:
        raise ValueError(unknown_name("split", split, SPLITS))
    if size < 1 or low > high:
        raise ValueError(f"addition(size={size}, low={low}, high={high}): needs size >= 1 and low <= high")
    if pairs and low == high:
        raise ValueError(f"addition(low={low}, high={high}, pairs=True): there is no other sum to be the wrong answer")
    rng = random.Random(seed + 1)  # another one, so that the problems are the same with and without pairs
    step = -1 if reverse else 1
    rows = []
    for a, b in _pairs(size, low, high, split, random.Random(seed)):
        row = {"prompt": template.format(a=a, b=b), "answer": answer_template.format(sum=a + b)[::step]}
        if pairs:
            wrong = rng.randrange(2 * low, 2 * high)
            wrong += wrong >= a + b
            row |= {"chosen": row["answer"], "rejected": answer_template.format(sum=wrong)[::step]}
        if trace_template is not None:
            row["trace"] = trace_template.format(a=a, b=b, sum=a + b)
        rows.append(row)
    return rows


def _pairs(size: int, low: int, high: int, split: str, rng: random.Random) -> Iterator[tuple[int, int]]:
    numbers = range(low, high + 1)
    if max(size * 20, 100_000) < len(numbers) ** 2:
        # Few of many: draw without listing them all. Either split holds several times more than that.
        seen: set[tuple[int, int]] = set()
        while len(seen) < size:
            pair = (rng.choice(numbers), rng.choice(numbers))
            if pair not in seen and _belongs(pair, split):
                seen.add(pair)
                yield pair
        return
    pairs = [(a, b) for a in numbers for b in numbers if _belongs((a, b), split)]
    if not pairs:
        raise ValueError(f"addition(low={low}, high={high}, split={split!r}): no pair of numbers is in this split")
    while size > 0:
        rng.shuffle(pairs)
        yield from pairs[:size]
        size -= len(pairs)


def _belongs(pair: tuple[int, int], split: str) -> bool:
    if split == "all":
        return True
    is_val = zlib.crc32(f"{min(pair)}+{max(pair)}".encode()) % 5 == 0
    return is_val == (split == "val")


digits_addition: Task = functools.partial(addition, low=10, high=99, template="{a}+{b}=")
"""`addition` for character-level models: ``37+45=`` and ``82``."""
TASKS.register("digits_addition")(digits_addition)


def reasoning_gym(dataset: str, size: int = 512, seed: int = 0, **options: Any) -> list[Row]:
    """Rows of a `reasoning-gym` data set (https://github.com/open-thought/reasoning-gym); reward: ``reasoning_gym``.

    Args:
        dataset: its name, e.g. ``chain_sum``.
        size: number of rows.
        seed: other seeds give other rows. It is multiplied before it reaches reasoning-gym, which makes row i from
            seed + i: as they stand, seeds 1 and 2 would share all rows but one.
        **options: fields of the data set's configuration.

    Returns:
        Rows with ``prompt``, ``answer`` (None where many answers are right) and ``entry``, which the verifier needs:
        what reasoning-gym made, with `options` under ``config``. It is best kept in memory: after JSON, where tuples
        become lists, the verifiers of arc_agi and rearc reject right answers.

    Raises:
        ValueError: unknown data set or option.
    """
    gym = import_extra("reasoning_gym", "demo")
    datasets = gym.factory.DATASETS
    if dataset not in datasets:
        raise ValueError(unknown_name("reasoning_gym data set", dataset, datasets))
    known = {field.name for field in dataclasses.fields(datasets[dataset][1])}
    for option in options:
        if option not in known:
            raise ValueError(unknown_name(f"option of reasoning_gym.{dataset}", option, known))
    try:
        entries = list(gym.create_dataset(dataset, size=size, seed=seed * 1_000_003, **options))
    except AssertionError as err:  # how reasoning-gym rejects a value
        raise ValueError(f"reasoning_gym.{dataset} with {options}: {err}") from err
    return [
        {"prompt": entry["question"], "answer": entry["answer"], "entry": {**entry, "config": options}}
        for entry in entries
    ]
