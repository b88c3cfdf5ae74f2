"""vLLM's native code never comes back, with the interpreter lock held: in each phase, in a fork of this process.

What a fork says goes into a file of the folder, and its exit code to the standard output, as JSON.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import sys
from pathlib import Path
from unittest import mock

import torch
import vllm as vllm_itself
from vllm_engine import ARGS, PROMPTS, TOKENIZER, engine_of, random_model

from lightrft_lightning import SamplingParams
from lightrft_lightning.engines import vllm, vllm_process

SAMPLING = SamplingParams(max_new_tokens=4)


def hang(*args, **kwargs):
    ctypes.PyDLL(None).sleep(1000)


def phase_start(engine, strategy):
    with mock.patch.object(vllm_itself.LLMEngine, "from_engine_args", hang):
        vllm.VLLMRollout(ARGS, deadline=1.0).connect(random_model(), TOKENIZER)


def phase_request(engine, strategy):
    engine._engine.add_request = hang
    engine.generate(PROMPTS, SAMPLING)


def phase_generate(engine, strategy):
    engine._engine.step = hang
    engine.generate(PROMPTS, SAMPLING)


def hangs_in(engine, method):
    call = engine._engine.collective_rpc
    engine._engine.collective_rpc = lambda name, args=(): hang() if name == method else call(name, args=args)


def phase_update(engine, strategy):
    hangs_in(engine, "lightrft_load")
    strategy.update_engine_weights(random_model())


def phase_end_of_update(engine, strategy):
    engine._engine.reset_prefix_cache = hang
    strategy.update_engine_weights(random_model())


def phase_verify(engine, strategy):
    hangs_in(engine, "lightrft_read_back")
    strategy.update_engine_weights(random_model())


@contextlib.contextmanager
def as_if_on_a_gpu():
    nothing = mock.patch.object(vllm, "memory_reported", lambda call: contextlib.nullcontext())
    with mock.patch.object(torch.cuda, "is_available", lambda: True), nothing:
        yield


def phase_sleep(engine, strategy):
    engine._engine.sleep = hang
    with as_if_on_a_gpu():
        engine.sleep()


def phase_wake_up(engine, strategy):
    engine._engine.sleep, engine._engine.wake_up = mock.Mock(), hang
    with as_if_on_a_gpu():
        engine.sleep()
        engine.wake_up()


def phase_close(engine, strategy):
    engine._engine.engine_core.shutdown = hang
    engine.close()


def fork(phase, output, engine, strategy):
    """Run it in a fork with its standard error in a file; returns its number."""
    if (child := os.fork()) != 0:
        return child
    try:
        os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT), 2)
        vllm_process.HUNG = vllm.START = engine.deadline = 1.0
        phase(engine, strategy)
    finally:
        os._exit(0)


if __name__ == "__main__":
    phases = {name: phase for name, phase in globals().items() if name.startswith("phase_")}
    with engine_of(random_model()) as (engine, strategy):
        children = {name: fork(phase, Path(sys.argv[1], name), engine, strategy) for name, phase in phases.items()}
        codes = {name: os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for name, child in children.items()}
    print(json.dumps(codes))
