from __future__ import annotations

import functools
import json
import pickle
import re

import pytest

from lightrft_lightning.experience.trajectory import Completion, Prompt, Trajectory
from lightrft_lightning.rewards import REWARDS, Rewards


def own(completion, bonus=1.0):
    return len(completion) * bonus


def score_one(rewards, text="abc", **fields):
    sample = Trajectory(Prompt((1,), "p", fields), Completion((1, 2), (0.0, 0.0), "length"), group=0, text=text)
    rewards.score([sample])
    return sample.reward


@pytest.mark.parametrize(
    ("functions", "names", "weights"),
    [
        (own, ["own"], [1]),
        ("exact_match", ["exact_match"], [1]),
        (["exact_match", own], ["exact_match", "own"], [1, 1]),
        ({"exact_match": 0.5, "last_number": 2}, ["exact_match", "last_number"], [0.5, 2]),
        ({"name": "last_number", "weight": 3, "unfinished": -0.5}, ["last_number"], [3]),
        ([{"name": own, "bonus": 2.0}, {"name": "exact_match", "weight": 0.1}], ["own", "exact_match"], [1, 0.1]),
        ("lightrft_lightning.rewards.functions.exact_match", ["exact_match"], [1]),
        ([lambda completion: 1, lambda completion: 2], ["<lambda>", "<lambda>_1"], [1, 1]),
        (functools.partial(own, bonus=3), ["own"], [1]),
    ],
)
def test_descriptions(functions, names, weights):
    rewards = Rewards(functions)
    assert rewards.names == names
    assert [weight for _, weight in rewards.functions] == weights


def test_weights_beside_the_functions():
    assert score_one(Rewards([own, "exact_match"], [0.5, 10]), answer="abc") == 11.5


def test_options_reach_the_function_and_win_over_columns():
    assert score_one(Rewards({"name": own, "bonus": 2.0})) == 6
    assert score_one(Rewards({"name": own, "bonus": 2.0}), bonus=100) == 6
    assert score_one(Rewards(functools.partial(own, bonus=3)), bonus=100) == 9
    assert score_one(Rewards({"name": "last_number", "unfinished": -0.5}), answer=1) == -0.5


def test_functions_in_a_file(tmp_path):
    file = tmp_path / "my rewards.py"
    file.write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\n\n"
        "@dataclass\nclass Box:\n    value: int\n\n"
        "def vowels(completion: str) -> float:\n    return Box(sum(c in 'aeiou' for c in completion)).value\n"
    )
    rewards = Rewards({"name": f"{file}:vowels", "weight": 2})
    assert rewards.names == ["vowels"] and score_one(rewards, "banana") == 6
    with pytest.raises(ValueError, match=r"unknown function 'vowel'. Did you mean 'vowels'"):
        Rewards(f"{file}:vowel")
    with pytest.raises(FileNotFoundError, match=r"no such file with rewards: .*nope.py"):
        Rewards(f"{tmp_path}/nope.py:f")


@pytest.mark.parametrize("order", [1, -1])
def test_two_functions_of_one_file_run_it_once(tmp_path, order):
    file = tmp_path / "own.py"
    file.write_text(
        f"open('{tmp_path}/runs', 'a').write('x')\ndef a(completion): return 1\ndef b(completion): return 2"
    )
    entries = [{"name": f"{file}:a", "processes": 1}, f"{file}:b", f"{file}:a", {"name": f"{file}:b", "processes": 1}]
    assert score_one(Rewards(entries[::order])) == 6
    assert (tmp_path / "runs").read_text() == "x" * 3, "here and in each of the two processes"
    file.write_text("def a(completion): return 33")
    assert score_one(Rewards(f"{file}:a")) == 33, "a notebook's user has changed it"
    file.write_text("def a(completion): return 4\n1 / 0")
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            Rewards(f"{file}:a")


def test_registered_functions():
    @REWARDS.register("test_spec_own")
    def function(completion):
        return 7.0

    rewards = Rewards("test_spec_own")
    assert rewards.names == ["test_spec_own"] and score_one(rewards) == 7


@pytest.mark.parametrize(
    ("functions", "weights", "message"),
    [
        ("last_nunber", None, "unknown reward 'last_nunber'. Did you mean 'last_number'"),
        ({"last_nunber": 1.0}, None, "Did you mean 'last_number'"),
        ({"name": "last_number", "unfinishd": 1}, None, "reward 'last_number' 'unfinishd'. Did you mean 'unfin"),
        ("no.such.module.f", None, "reward 'no.such.module.f': No module named 'no'"),
        ("json.dmps", None, "unknown function 'dmps'. Did you mean 'dumps'"),
        ([], None, "no reward function given"),
        ([{"weight": 1}], None, "a reward with options is"),
        ([own], [1, 2], "2 weights for 1 reward functions"),
        ({"exact_match": 1}, [1], "leave out `weights`"),
        ([{"name": own, "weight": 1}], [2], "two weights"),
        ({"exact_match": "high"}, None, "weight of the reward 'exact_match' must be a finite number, is 'high'"),
        ([own], [float("nan")], "must be a finite number, is nan"),
        ({"exact_match": None}, None, "must be a finite number, is None"),
    ],
)  # fmt: skip
def test_bad_descriptions(functions, weights, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Rewards(functions, weights)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda text: 1, "either `completion` .* or `completions` .*, it takes (text)"),
        (lambda completion, completions: 1, "either `completion`"),
        (lambda completion, /: 1, "by position only"),
        (3, "a reward is a function, a name or a mapping, got int: 3"),
        (json, "got module"),
    ],
)
def test_what_is_no_reward_function(function, message):
    with pytest.raises(TypeError, match=re.escape(message).replace(r"\.\*", ".*")):
        Rewards(function)


def test_rewards_can_be_pickled():
    assert score_one(pickle.loads(pickle.dumps(Rewards([own, "exact_match"]))), answer="abc") == 4
