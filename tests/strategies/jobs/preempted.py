"""Runs that a scheduler ends again and again at random moments, and one that it leaves alone.

Importing takes longer than any of the runs, so one process imports everything and then forks the ranks of all of them.
What each iteration and validation did is appended to one file a chain of runs, so that what is done twice, or not at
all, is seen as well.

Arguments: a folder; how many times each chain is ended; a seed; names of `CHAINS`.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import socket
import sys
import threading
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import lightning.pytorch as pl
import torch
import torch._dynamo
import torch.distributed.checkpoint
import torch.distributed.fsdp
from helpers.training import make_data, make_module, make_trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.environments import SLURMEnvironment

from lightrft_lightning import FakeStrategy, FSDPV2Strategy
from lightrft_lightning.strategies import preemption

FOLDER = Path(sys.argv[1])
torch.set_num_threads(1)


@dataclass
class Chain:
    """Runs of one training, each resumed from where the one before was ended.

    Args:
        ranks: number of processes.
        receiver: rank that gets the signal; None: all.
        settings: of the strategy.
        trainer: of the Trainer.
        checkpoints: of `ModelCheckpoint`; None: there is none.
        slurm: the signal is that of a requeue.
    """

    ranks: int = 1
    receiver: int | None = 0
    settings: dict = field(default_factory=dict)
    trainer: dict = field(default_factory=dict)
    checkpoints: dict | None = field(default_factory=lambda: {"save_last": True, "every_n_train_steps": 3})
    slurm: bool = False


class Log(pl.Callback):
    """Appends what happened to the file of the chain."""

    def __init__(self, path):
        self.path = path

    def say(self, trainer, *what):
        if trainer.is_global_zero:
            with self.path.open("a") as file:
                print(json.dumps(what), file=file)

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        values = {k: round(float(v), 12) for k, v in trainer.callback_metrics.items() if k.startswith("train/")}
        step = trainer.fit_loop.epoch_loop._batches_that_stepped
        prompts = [prompt.text for prompt in batch]
        self.say(trainer, "iteration", module.iteration, trainer.current_epoch, batch_idx, step, prompts, values)

    def on_validation_end(self, trainer, module):
        if not trainer.sanity_checking:
            self.say(trainer, "validation", module.iteration, float(trainer.callback_metrics["val/reward"]))

    def on_train_epoch_end(self, trainer, module):
        self.say(trainer, "epoch", trainer.current_epoch)


class Strike(pl.Callback):
    """The signal comes `after` seconds of training, or in the middle of the hook of that name."""

    def __init__(self, moment, signum):
        self.moment, self.signum = moment, signum

    def strike(self, *args):
        os.kill(os.getpid(), self.signum)

    def setup(self, trainer, module, stage):
        if self.moment[0] == "setup":
            self.strike()
        if self.moment[0] == "setup, computing":
            preemption.SETUP_GRACE = 0.1
            threading.Timer(0.1, self.strike).start()
            torch.linalg.svd(torch.rand(1500, 1500))  # meanwhile the interpreter hears of nothing

    def on_train_start(self, trainer, module):
        name, value = self.moment
        if name == "twice":
            preemption.ONE_ORDER = 0.1
            self.on_train_batch_start = lambda *args: self.strike()
            self.on_before_optimizer_step = lambda *args: (time.sleep(0.2), self.strike(), time.sleep(100))
        elif name == "after":
            timer = threading.Timer(value, self.strike)
            timer.daemon = True
            timer.start()
            self.on_train_end = lambda *args: timer.cancel()  # behind the run a signal ends the process, as it should
        else:
            count = iter(range(10**6))
            setattr(self, name, lambda *args: self.strike() if next(count) == value else None)


HOOKS = ("on_train_batch_start", "on_before_optimizer_step", "on_train_batch_end", "on_validation_batch_start",
         "on_validation_batch_end", "on_validation_end", "on_train_epoch_end", "on_save_checkpoint")  # fmt: skip


def train(chain, folder, moment):
    signum = signal.SIGUSR1 if chain.slurm else signal.SIGTERM
    strategy = FakeStrategy(**chain.settings) if chain.ranks == 1 else FSDPV2Strategy(**chain.settings)
    callbacks = [Log(folder / "log")]
    if chain.checkpoints is not None:
        callbacks.append(ModelCheckpoint(dirpath=folder / "checkpoints", **chain.checkpoints))
    if moment is not None and chain.receiver in (None, int(os.environ["RANK"])):
        callbacks.append(Strike(moment, signum))
    plugins = [SLURMEnvironment(requeue_signal=signal.SIGUSR1)] if chain.slurm else None
    settings = {"max_epochs": 2, "num_sanity_val_steps": 0, "devices": chain.ranks, "plugins": plugins, **chain.trainer}
    module = make_module(steps_per_epoch=2)
    here = None if chain.slurm else "last" if chain.checkpoints is not None else folder / "last.ckpt"
    if chain.checkpoints is None and not chain.slurm and not here.exists():
        here = None
    trainer = make_trainer(folder, strategy=strategy, callbacks=callbacks, **settings)
    trainer.fit(module, make_data(batch_size=4 // chain.ranks, val_batch_size=1), ckpt_path=here)
    digest = hashlib.sha256()
    for _, value in strategy.named_full_tensors(module.actor):
        digest.update(value.detach().numpy().tobytes())
    if trainer.is_global_zero:
        Log(folder / "log").say(trainer, "end", digest.hexdigest())


def start(chain, folder, moment):
    """The ranks of one run, and the exit code of each."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    pids = []
    for rank in range(chain.ranks):
        pid = os.fork()
        if pid == 0:
            as_rank(chain, folder, moment, rank, port)
        pids.append(pid)
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]


def as_rank(chain, folder, moment, rank, port):
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(chain.ranks), NODE_RANK="0",
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
    )  # fmt: skip
    if chain.slurm:
        names = {"PROCID": rank, "LOCALID": rank, "NODEID": 0, "NTASKS": chain.ranks, "JOB_ID": 7, "JOB_NAME": "x"}
        os.environ.update({f"SLURM_{name}": str(value) for name, value in names.items()})
        os.environ.update(SLURM_NTASKS_PER_NODE=str(chain.ranks), PATH=f"{FOLDER}:{os.environ['PATH']}")
    os.dup2(os.open(folder / f"stderr{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    code = 0
    try:
        train(chain, folder, moment)
    except SystemExit as exit:
        code = exit.code
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
        code = 1
    os._exit(code)


def run(name, chain, moments):
    """A chain of runs, ended at these moments."""
    folder = FOLDER / name
    folder.mkdir()
    (folder / "log").touch()
    codes, began = [], time.monotonic()
    for moment in [*moments, None]:
        codes.append((moment, start(chain, folder, moment)))
        if any(code != preemption.EXIT_CODE for code in codes[-1][1]):
            break  # to its end before the signal came, or failed
    log = [json.loads(line) for line in (folder / "log").read_text().splitlines()]
    errors = "".join(file.read_text() for file in folder.glob("stderr*"))
    return {**asdict(chain), "codes": codes, "log": log, "errors": errors, "seconds": time.monotonic() - began}


SECONDS = {}
CHAINS = {
    "plain": Chain(),
    "background, validation within the epoch": Chain(
        settings={"async_checkpoints": True}, trainer={"val_check_interval": 2}
    ),
    "no validation": Chain(trainer={"limit_val_batches": 0}, checkpoints={"every_n_epochs": 1}),
    "no callback": Chain(checkpoints=None),
    "slurm": Chain(slurm=True, checkpoints=None),
    "two, the first": Chain(2),
    "two, the second": Chain(2, receiver=1),
    "two, both": Chain(2, receiver=None, trainer={"val_check_interval": 2}),
    "two, both, slurm": Chain(2, receiver=None, slurm=True),
    "two, the second, slurm": Chain(2, receiver=1, slurm=True),
}


def main():
    signals, rng, names = int(sys.argv[2]), random.Random(int(sys.argv[3])), sys.argv[4:] or CHAINS
    (FOLDER / "scontrol").write_text(f"#!/bin/sh\necho $@ >> {FOLDER}/requeued\n")
    (FOLDER / "scontrol").chmod(0o755)
    undisturbed, report = {}, {}
    for name in names:
        chain = CHAINS[name]
        like = f"undisturbed {chain.ranks} {chain.trainer}"
        if like not in undisturbed:
            undisturbed[like] = run(like, Chain(chain.ranks, trainer=chain.trainer), [])
        seconds = 0.6 * undisturbed[like]["seconds"]
        moments = [
            ("after", rng.uniform(0, seconds / signals))
            if rng.random() < 0.5
            else (rng.choice(HOOKS), rng.randrange(2))
            for _ in range(signals)
        ]
        report[name] = {**run(name, chain, moments), "undisturbed": undisturbed[like]["log"]}
    report["twice"] = run("twice", Chain(2), [("twice", 0)])
    report["setup"] = run("setup", Chain(2), [("setup", 0)])
    report["setup, computing"] = run("setup, computing", Chain(), [("setup, computing", 0)])
    report["requeued"] = (FOLDER / "requeued").read_text() if (FOLDER / "requeued").exists() else ""
    print(json.dumps(report))


main()
