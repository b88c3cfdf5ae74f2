from __future__ import annotations

import re

import pytest

from lightrft_lightning.tasks import TASKS, addition, make_task, reasoning_gym


def sums(rows):
    return [tuple(map(int, re.findall(r"\d+", row["prompt"]))) for row in rows]


def test_addition_rows():
    rows = make_task({"task": "addition", "size": 50, "low": 3, "high": 9, "seed": 4})
    assert len(rows) == 50
    for row, (a, b) in zip(rows, sums(rows), strict=True):
        assert row == {"prompt": f"What is {a} + {b}? Reply with only the number.", "answer": str(a + b)}
        assert 3 <= a <= 9 and 3 <= b <= 9


def test_addition_depends_on_the_seed_alone():
    assert addition(30, seed=1) == addition(30, seed=1) != addition(30, seed=2)


@pytest.mark.parametrize("high", [9, 10**12])
def test_problems_are_unique_while_possible(high):
    pairs = sums(addition(40, low=2, high=high))
    assert len(set(pairs)) == 40


def test_more_rows_than_problems_repeat_evenly():
    pairs = sums(addition(10, low=1, high=2))
    assert len(pairs) == 10
    assert {pairs.count(p) for p in set(pairs)} == {2, 3}
    assert len(set(pairs)) == 4


@pytest.mark.parametrize("high", [30, 10**6])
def test_splits_are_disjoint_even_swapped(high):
    train = sums(addition(700, high=high, split="train", seed=1))
    val = sums(addition(150, high=high, split="val", seed=2))
    assert not {tuple(sorted(p)) for p in train} & {tuple(sorted(p)) for p in val}


def test_splits_together_are_everything():
    def every(split):
        return set(sums(addition(2000, split=split)))

    assert every("train") | every("val") == every("all")
    assert 0.1 < len(every("val")) / len(every("all")) < 0.3


def test_pairs_have_a_right_and_a_wrong_answer():
    settings = {"size": 200, "low": 3, "high": 9, "answer_template": "{sum:02}", "reverse": True}
    rows = addition(**settings, pairs=True)
    assert [{k: row[k] for k in ("prompt", "answer")} for row in rows] == addition(**settings)
    assert all(row["chosen"] == row["answer"] != row["rejected"] for row in rows)
    assert {int(row["rejected"][::-1]) for row in rows} == set(range(6, 19))
    assert rows == addition(**settings, pairs=True)


def test_digits_addition():
    (row,) = make_task({"task": "digits_addition", "size": 1})
    a, b = re.fullmatch(r"(\d\d)\+(\d\d)=", row["prompt"]).groups()
    assert row["answer"] == str(int(a) + int(b))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"task": "adition"}, "unknown task 'adition'. Did you mean 'addition'"),
        ({"task": "addition", "sise": 3}, "'sise'. Did you mean 'size'"),
        ({"task": "addition", "split": "vall"}, "unknown split 'vall'. Did you mean 'val'"),
        ({"task": "addition", "low": 5, "high": 4}, "low <= high"),
        ({"task": "addition", "low": 5, "high": 5, "split": "val"}, "no pair of numbers"),
        ({"task": "addition", "size": 0}, "size >= 1"),
        ({"task": "addition", "low": 5, "high": 5, "pairs": True}, "no other sum to be the wrong answer"),
        ({"size": 3}, "a task is {'task': name"),
        ({"task": "reasoning_gym.chain_sam"}, "Did you mean 'chain_sum'"),
        ({"task": "reasoning_gym.chain_sum", "min_trems": 2}, "Did you mean 'min_terms'"),
        ({"task": "reasoning_gym.chain_sum", "min_terms": -2}, "min_terms must be positive"),
    ],
)
def test_bad_specs(spec, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make_task(spec)


def test_own_task():
    @TASKS.register("test_tasks_echo")
    def echo(**options):
        return [{"prompt": str(options), "answer": ""}]

    assert make_task({"task": "test_tasks_echo", "x": 1}) == [{"prompt": "{'x': 1}", "answer": ""}]


def test_reasoning_gym_rows():
    rows = reasoning_gym("chain_sum", size=3, seed=7, min_terms=2, max_terms=2)
    assert [row["prompt"] for row in rows] == [row["entry"]["question"] for row in rows]
    assert rows[0]["entry"]["metadata"]["source_dataset"] == "chain_sum"
    assert rows[0]["entry"]["config"] == {"min_terms": 2, "max_terms": 2}
    assert rows == make_task({"task": "reasoning_gym.chain_sum", "size": 3, "seed": 7, "min_terms": 2, "max_terms": 2})


def test_neighbouring_seeds_of_reasoning_gym_share_no_rows():
    def prompts(seed):
        return {row["prompt"] for row in reasoning_gym("chain_sum", size=40, seed=seed, min_digits=4)}

    assert not prompts(1) & prompts(2)


def test_answers_of_a_fixed_width_from_the_last_digit():
    rows = make_task({"task": "digits_addition", "size": 50, "answer_template": "{sum:03}", "reverse": True})
    for row in rows:
        a, b = row["prompt"].rstrip("=").split("+")
        assert int(row["answer"][::-1]) == int(a) + int(b)
        assert len(row["answer"]) == 3
