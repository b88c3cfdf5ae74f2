"""What a reward function forks in a training process can be ended."""

from __future__ import annotations

import multiprocessing
import signal
import time
from concurrent.futures import ProcessPoolExecutor

import pytest
from training import Record, make_data, make_module, make_trainer

from lightrft_lightning.strategies.forks import reset_signals

FORK = multiprocessing.get_context("fork")


def pool(completions):
    with FORK.Pool(2) as workers:
        return workers.map(len, completions)


def executor(completions):
    with ProcessPoolExecutor(2, mp_context=FORK) as workers:
        return list(workers.map(len, completions))


def terminated(completions):
    child = FORK.Process(target=time.sleep, args=(600,))
    child.start()
    child.terminate()
    child.join(20)
    return [float(child.exitcode == -signal.SIGTERM)] * len(completions)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_pools_inside_reward_functions(tmp_path):
    record = Record()
    module = make_module(rewards=[pool, executor, terminated], reward_deadline=60.0)
    start = time.monotonic()
    trainer = make_trainer(tmp_path, callbacks=[record], limit_train_batches=2, limit_val_batches=0)
    trainer.fit(module, make_data())
    assert [m["train/failed_rewards"] for m in record.metrics] == [0, 0]
    assert [m["train/reward/terminated"] for m in record.metrics] == [1, 1]
    assert time.monotonic() - start < 50 and multiprocessing.active_children() == []


def test_only_handlers_of_the_trainer_are_reset():
    from lightning.pytorch.trainer.connectors.signal_connector import _HandlersCompose, _SignalConnector

    def own(number, frame):
        pass

    composed = _HandlersCompose([_SignalConnector(None)._sigterm_notifier_fn, own])
    alone = _HandlersCompose([_SignalConnector(None)._sigterm_notifier_fn])
    for handler, expected in ((own, own), (composed, own), (alone, signal.SIG_DFL), (signal.SIG_IGN, signal.SIG_IGN)):
        before = signal.signal(signal.SIGUSR2, handler)
        try:
            reset_signals()
            assert signal.getsignal(signal.SIGUSR2) == expected
        finally:
            signal.signal(signal.SIGUSR2, before)
