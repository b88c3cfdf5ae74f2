"""Ten thousand samples whose reward functions misbehave in every way at random: no sample pays for another."""

from __future__ import annotations

import logging
import random
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from lightrft_lightning.experience.trajectory import Completion, Prompt, Trajectory
from lightrft_lightning.rewards import Rewards

SAMPLES = 10_000
DEADLINE = 4.0
"""Of the parts in which a sample hangs; elsewhere there is time, because a busy machine is no failure."""
TEN_MB = "x" * 10_000_000
SHAPES = ("single", "batch", "async", "async batch", "process", "process batch")

# As text, because the worker processes run it as well. `key` is the sample's identity, `act` how it behaves.
FUNCTIONS = """
import asyncio, time
import numpy as np

class Broken:
    def __init__(self, error): self.error = error
    def __float__(self): raise self.error

ACTS = {
    "int": lambda key: key,
    "float": lambda key: key + 0.5,
    "numpy": lambda key: np.float32(key),
    "numpy bool": lambda key: np.bool_(key % 2),
    "long": lambda key: key * 10**290,
    "nan": lambda key: float("nan"),
    "inf": lambda key: float("inf"),
    "-inf": lambda key: np.float64("-inf"),
    "huge": lambda key: 10**400,
    "none": lambda key: None,
    "text": lambda key: str(key),
    "list": lambda key: [key],
    "broken": lambda key: Broken(ValueError(key)),
    "broken exit": lambda key: Broken(SystemExit(key)),
    "raise": lambda key: fail(ValueError(f"sample {key}")),
    "exit": lambda key: fail(SystemExit(key)),
    "interrupt": lambda key: fail(KeyboardInterrupt(key)),
    "generator exit": lambda key: fail(GeneratorExit(key)),
    "large text": lambda key: "x" * 10_000_000,
    "hang": lambda key: time.sleep(60),
    "spin": lambda key: spin(),
}

def fail(error):
    raise error

def spin():
    while True:
        pass

def single(completion, key, act):
    assert completion.startswith(f"{key} ")
    return ACTS[act](key)

def batch(completions, key, act):
    results = [single(c, k, a) for c, k, a in zip(completions, key, act)]
    # One value too many or too few, where a sample of the batch says so: the rest must not shift.
    return results + [0] if len(results) > 1 and key[0] % 3 == 0 else results[1:] if len(results) > 1 else results

async def async_single(completion, key, act):
    await asyncio.sleep(0.001 * (key % 3))
    if act == "hang":
        await asyncio.sleep(60)
    return single(completion, key, act)

async def async_batch(completions, key, act):
    await asyncio.sleep(0)
    if "hang" in act:
        await asyncio.sleep(60)
    return batch(completions, key, act)
"""
GOOD = {
    "int": float, "float": lambda key: key + 0.5, "numpy": float, "numpy bool": lambda key: float(key % 2),
    "long": lambda key: float(key * 10**290), "torch": lambda key: key / 4,
}  # fmt: skip
NON_FINITE = ("nan", "inf", "-inf", "huge")
INAPPLICABLE = ("none",)
FAILING = (
    "text", "list", "broken", "broken exit", "raise", "exit", "interrupt", "generator exit",
)  # fmt: skip
NAMES = {
    "single": "single", "batch": "batch", "async": "async_single", "async batch": "async_batch", "process": "single",
    "process batch": "batch",
}  # fmt: skip


def torch_act(key):
    return torch.tensor(key / 4)


def make(shape, count, generator, hangs):
    """Samples of one shape; each knows its key, its act and so its outcome."""
    rare = {3: "large text"}
    if hangs:  # a few, each takes its deadline
        rare |= {"process": {7: "hang", 11: "spin"}, "process batch": {11: "spin"}}.get(shape, {7: "hang"})
    acts = [*GOOD] * 6 + [*NON_FINITE, *FAILING, *INAPPLICABLE]
    if "process" in shape:  # its worker does not import torch
        acts = [act for act in acts if act != "torch"]
    samples = []
    for i in range(count):
        key = generator.randrange(1, 10**6)
        act = rare.get(i) or generator.choice(acts)
        text = f"{key} {TEN_MB if i == 5 else ''}"
        fields = {"key": key, "act": act}
        samples.append(Trajectory(Prompt((1,), f"prompt {key}", fields), Completion((1,), (0.0,), "eos"), i, text=text))
    return samples


def parts(samples, generator, most):
    """In pieces of random sizes; small batches succeed as a whole now and then."""
    while samples:
        size = generator.randint(1, most)
        yield samples[:size]
        samples = samples[size:]


def expected(sample, on_error):
    act, key = sample.prompt.fields["act"], sample.prompt.fields["key"]
    return GOOD[act](key) if act in GOOD else None if act in INAPPLICABLE else on_error


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("on_error", ["drop", -7.5])
def test_ten_thousand_samples_are_never_mixed_up(tmp_path, on_error, monkeypatch, caplog):
    caplog.set_level(logging.ERROR)  # a line a failure
    file = tmp_path / "functions.py"
    file.write_text(FUNCTIONS)
    generator = random.Random(f"{on_error}")
    counts = {"process": 600, "process batch": 300, "async": 1500, "batch": 800, "async batch": 800}
    counts["single"] = SAMPLES // 2 - sum(counts.values())
    rewards, samples = {}, {}
    for shape in SHAPES:
        entry = {"name": f"{file}:{NAMES[shape]}"} | ({"processes": 2} if "process" in shape else {})
        rewards[shape] = Rewards(entry, deadline=DEADLINE, on_error=on_error, workers=8)
        monkeypatch.setitem(rewards[shape].functions[0][0].function.__globals__["ACTS"], "torch", torch_act)
        samples[shape] = make(shape, counts[shape], generator, hangs=(on_error == "drop") != ("batch" in shape))
        generator.shuffle(samples[shape])
    seeds = {shape: generator.random() for shape in SHAPES}
    with ThreadPoolExecutor(len(SHAPES)) as threads:  # nearly all of the time is that of deadlines
        reports = dict(
            zip(SHAPES, threads.map(lambda s: scored(rewards[s], samples[s], s, seeds[s]), SHAPES), strict=True)
        )
    for shape in SHAPES:
        check(shape, samples[shape], reports[shape], None if on_error == "drop" else on_error)


def scored(rewards, samples, shape, seed):
    reports = []
    for part in parts(samples, random.Random(seed), 12 if "batch" in shape else 200):
        hangs = any(sample.prompt.fields["act"] in ("hang", "spin") for sample in part)
        rewards.deadline = DEADLINE if hangs else 100.0
        reports.append(rewards.score(part))
    return reports


def check(shape, samples, reports, failure):
    for sample in samples:
        assert sample.reward == expected(sample, failure), (shape, sample.prompt)
        assert list(sample.reward_parts.values()) == ([sample.reward] if sample.prompt.fields["act"] in GOOD else [])
    acts = [sample.prompt.fields["act"] for sample in samples]
    assert sum(r.samples for r in reports) == len(samples)
    assert sum(r.failed for r in reports) == sum(act not in (*GOOD, *INAPPLICABLE) for act in acts)
    assert sum(r.inapplicable for r in reports) == sum(act in INAPPLICABLE for act in acts)
    assert sum(r.non_finite for r in reports) == sum(act in NON_FINITE for act in acts)
    assert sum(r.timed_out for r in reports) == sum(act in ("hang", "spin") for act in acts)
