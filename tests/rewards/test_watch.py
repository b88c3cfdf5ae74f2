"""A run whose rewards never work stops at its first iteration, and says why."""

from __future__ import annotations

import logging
import os

import pytest
import torch
from training import Record, even_digits, make_data, make_module, make_trainer

from lightrft_lightning.rewards import NoRewardError


def broken(completion, answer):
    raise TypeError(f"unsupported operand for {'int' if answer == '0' else 'str'}")


def fit(tmp_path, rewards, *callbacks, ckpt_path=None, **settings):
    trainer = {"limit_train_batches": 3, "limit_val_batches": 0, **settings.pop("trainer", {})}
    module = make_module(rewards=rewards, **settings)
    made = make_trainer(tmp_path, callbacks=list(callbacks), **trainer)
    made.fit(module, make_data(), ckpt_path=ckpt_path)
    return module, made


@pytest.mark.parametrize(
    "settings", [{}, {"reward_on_error": -1.0}, {"dynamic_sampling": True}, {"rewards": [even_digits, broken]}]
)
def test_no_reward_in_the_first_iteration_stops_the_run(tmp_path, settings, caplog):
    with pytest.raises(NoRewardError) as error:
        fit(tmp_path, **{"rewards": broken, **settings})
    headline, first, *rest = str(error.value).splitlines()
    assert "not one of the 16 completions of the first iteration has a reward" in headline
    assert "of 16 samples: broken: TypeError: unsupported operand for str" in first and "(first prompt: '" in first
    assert len(rest) <= 2 and "mend the reward function" in rest[-1]
    assert "no reward" not in caplog.text, "told once"


def test_none_for_all_samples_is_no_reward_either(tmp_path):
    with pytest.raises(NoRewardError, match="16 of 16 samples: every reward function returned None"):
        fit(tmp_path, lambda completion: None)


def test_a_validation_before_the_first_iteration_stops_it_as_well(tmp_path):
    settings = {"limit_val_batches": 1, "num_sanity_val_steps": 1}
    with pytest.raises(
        NoRewardError, match=r"not one of the 4 completions of this evaluation has a reward.*\n  . of 4"
    ):
        fit(tmp_path, broken, trainer=settings)
    with pytest.raises(NoRewardError, match="of this evaluation"):
        make_trainer(tmp_path).validate(make_module(rewards=broken), make_data(), verbose=False)


def test_later_failures_cost_samples_and_a_line_an_iteration(tmp_path, caplog):
    calls, record = [], Record()

    def later(completion):
        calls.append(completion)
        if len(calls) > 17:
            raise OSError("gone")
        return even_digits(completion)

    with caplog.at_level(logging.WARNING):
        fit(tmp_path, [later, lambda completion: None], record)
    lines = [r.getMessage() for r in caplog.records if "no reward" in r.getMessage()]
    assert [line.split(" samples")[0] for line in lines] == [
        "no reward, dropped: 15 of 16",
        "no reward, dropped: 16 of 16",
    ]
    assert [m["train/failed_rewards"] for m in record.metrics] == [0, 15, 16]
    assert "the reward '<lambda>' is part of nothing: it gave none of the 16 samples" in caplog.text


def test_rewards_that_do_not_apply_are_counted_by_themselves(tmp_path):
    record = Record()
    rewards = [lambda completion, answer: float(len(completion)) if answer < "3" else None]
    module, _ = fit(tmp_path, rewards, record)
    left_out = [t for t in module.last_trajectories if t.prompt.fields["answer"] >= "3"]
    assert left_out and all(t.reward is None and not t.applicable for t in left_out)
    for m in record.metrics:
        assert m["train/failed_rewards"] == 0 and m["train/inapplicable_rewards"] % 4 == 0
    assert record.metrics[-1]["train/inapplicable_rewards"] == len(left_out)


def test_a_column_that_no_row_has_is_found_before_the_rollout(tmp_path, monkeypatch):
    module = make_module(rewards=lambda completion, anwser: 1.0)
    monkeypatch.setattr(module, "rollout", None)
    with pytest.raises(ValueError, match=r"needs 'anwser', which is no option: .*Did you mean 'answer'"):
        make_trainer(tmp_path, limit_val_batches=0).fit(module, make_data())


def test_what_a_reward_changes_for_the_whole_process_is_put_back_and_told(tmp_path, caplog):
    def touches(completion):
        os.chdir(tmp_path)
        torch.set_default_dtype(torch.float64)
        torch.set_float32_matmul_precision("medium")
        return even_digits(completion)

    before, folder = torch.get_float32_matmul_precision(), os.getcwd()
    fit(tmp_path, touches, trainer={"limit_val_batches": 1})
    assert (os.getcwd(), torch.get_default_dtype()) == (folder, torch.float32)
    assert torch.get_float32_matmul_precision() == before
    assert "changed torch's default dtype from torch.float32 to torch.float64" in caplog.text
    assert "changed the working directory" in caplog.text and "run it in a process" in caplog.text
