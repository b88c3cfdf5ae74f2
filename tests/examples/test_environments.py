"""The examples with environments, as they are, for a few steps."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

import pytest

from lightrft_lightning.cli import main
from lightrft_lightning.environments import Turn
from lightrft_lightning.experience.trajectory import Prompt
from lightrft_lightning.tasks import make_task

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lightrft"])
    Path("examples").symlink_to(EXAMPLES)


def fit(name, *flags):
    """The rows that the example's CSV logger wrote."""
    few = ["--trainer.max_epochs", "1", "--trainer.limit_train_batches", "2", "--data.batch_size", "4"]
    assert main(["fit", "--config", f"examples/{name}.yaml", *few, *flags]) == 0
    with open(f"runs/{name}/csv/version_0/metrics.csv") as file:
        return list(csv.DictReader(file))


def test_the_calculator_is_called(here):
    rows = fit("calculator")
    train = [row for row in rows if row["train/turns"]]
    assert len(train) == 2 and all(float(row["train/turns"]) > 1.5 for row in train)
    assert all(0 < float(row["train/observation_share"]) < 0.5 for row in train)
    assert all(float(row["train/mismatch_max"] or 0) < 1e-4 for row in train)
    assert any(row["val/pass@4"] for row in rows)


def test_answers_may_be_corrected(here):
    alphabet = "".join(map(chr, range(32, 127))) + "\n"
    model = {"name": "tiny-llama", "layers": 2, "width": 32, "max_length": 512, "alphabet": alphabet}
    tiny = ["--model.model", json.dumps(model), "--data.system_prompt", "null", "--data.val_batch_size", "4"]
    rows = fit(
        "retry",
        *tiny,
        "--data.limit",
        "8",
        "--trainer.val_check_interval",
        "2",
        "--model.sampling.stop",
        '["0", "1", "a"]',
    )
    train = [row for row in rows if row["train/turns"]]
    assert len(train) == 2 and all(1 < float(row["train/turns"]) <= 3 for row in train)


def test_a_later_right_answer_earns_less(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    from retry import Retry

    (row,) = make_task({"task": "reasoning_gym.chain_sum", "size": 1})
    for attempt, earned in ((1, 1.0), (2, 0.5), (3, 0.25)):
        environment = Retry(discount=0.5)
        environment.reset(Prompt((1,), row["prompt"], row), 0)
        for number in range(1, attempt):
            told = environment.step(Turn("no idea", (1,), "eos", number, False))
            assert not told.done and told.reward is None and f"has {len(row['answer'])} characters" in told.text
        final = environment.step(Turn(row["answer"], (1,), "eos", attempt, False))
        assert final.done and final.reward == earned
    last = environment.step(Turn("no idea", (1,), "eos", 3, True))
    assert last.done and last.reward < 0.1
