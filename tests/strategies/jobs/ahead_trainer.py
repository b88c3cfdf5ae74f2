"""Sampling one batch ahead on several ranks, with one server for all of them, and rewards that fail; see checks.py.

Arguments: folder, strategy.
"""

from __future__ import annotations

import os
import sys
from functools import partial
from pathlib import Path

import checks
import pytest
from algorithms_trainer import assert_independent_of_ranks
from training import Record, even_digits, make_data, make_module, make_trainer

from lightrft_lightning import FSDPV2Strategy, RemoteRollout
from lightrft_lightning.rewards import NoRewardError

SERVER = partial(RemoteRollout, engine="transformers", deadline=60.0)


class Killed(RemoteRollout):
    """Its server dies before the second rollout."""

    asked = 0

    def _ask(self, *arguments):
        self.asked += 1
        if self.asked == 2:
            self._server._process.kill()
            self._server._process.wait(10)
        yield from super()._ask(*arguments)


def check_the_updates_are_those_of_one_process():
    assert_independent_of_ranks(staleness=1, engine=SERVER, iterations=3)


def check_a_server_that_died_is_asked_again_by_all_ranks():
    assert_independent_of_ranks(staleness=1, engine=partial(Killed, engine="transformers", deadline=60.0), iterations=3)


def broken(completion):
    raise TypeError("no such field")


def broken_on_rank_0(completion):
    return broken(completion) if os.environ["RANK"] == "0" else even_digits(completion)


def fit(reward, engine=None, **settings):
    record, strategy = Record(), FSDPV2Strategy()
    trainer = make_trainer(
        Path(sys.argv[1]), strategy=strategy, devices=2, engine=engine, callbacks=[record], limit_train_batches=2,
        limit_val_batches=0,
    )  # fmt: skip
    trainer.fit(make_module(rewards=reward, **settings), make_data(batch_size=2))
    return record.metrics


def check_no_reward_on_any_rank_stops_all_of_them():
    for settings in ({}, {"staleness": 1, "engine": SERVER()}):
        with checks.unwatched(), pytest.raises(NoRewardError, match="16 of 16 samples: broken: TypeError: no such"):
            fit(broken, **settings)


def check_rewards_of_one_rank_alone_are_trained_on():
    for metrics in fit(broken_on_rank_0):
        assert metrics["train/failed_rewards"] == 8 and metrics["train/grad_norm"] > 0


if __name__ == "__main__":
    checks.run(dict(globals()))
