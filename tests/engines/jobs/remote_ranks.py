"""One server for two ranks that shard the model; see strategies/jobs/checks.py."""

from __future__ import annotations

import os
import signal

import checks
import pytest
import torch

from lightrft_lightning import DeepspeedStrategy, FSDPV2Strategy, SamplingParams, TransformersRollout
from lightrft_lightning.engines.base import EngineError
from lightrft_lightning.engines.remote import RemoteRollout
from lightrft_lightning.engines.weight_sync import PolicyWeights
from lightrft_lightning.models.tiny import char_tokenizer, tiny_llama

TOKENIZER = char_tokenizer()
PROMPTS = [TOKENIZER(f"{a}+{b}=")["input_ids"] for a in (1, 22) for b in (3, 45, 678)]
SAMPLING = SamplingParams(n=2, max_new_tokens=6, seed=4)
TRAINER = FSDPV2Strategy()
TRAINER.setup_distributed()
RANK = TRAINER.global_rank
ACTOR = tiny_llama(seed=3, layers=2, width=32)
TRAINER.prepare((ACTOR, TRAINER.create_optimizer(ACTOR)))
ENGINE = RemoteRollout(engine="transformers", verify="all", deadline=60.0)
TRAINER.setup_inference_engine(engine_type=ENGINE, actor=ACTOR, tokenizer=TOKENIZER)


def cut(at):
    """This rank's part when rank 0 has the first `at` prompts."""
    return slice(0, at) if RANK == 0 else slice(at, len(PROMPTS))


def generate(at):
    """Results of all ranks together, in order."""
    numbers = list(range(len(PROMPTS)))
    mine = ENGINE.generate(PROMPTS[cut(at)], SAMPLING, numbers[cut(at)])
    assert len(mine) == len(PROMPTS[cut(at)])
    return [[c.token_ids for c in group] for rank in TRAINER.gather_objects(mine) for group in rank]


def check_only_rank_0_has_a_server():
    assert (ENGINE._server is not None) == (RANK == 0)


def check_unequal_numbers_of_prompts_find_their_way_back():
    everything = generate(3)
    assert len({ids for group in everything for ids in group}) > 6
    for at in (0, 1, 6):
        assert generate(at) == everything
    assert ENGINE.generate([], SAMPLING) == []


def check_updates_arrive_from_shards():
    before = generate(3)
    with torch.no_grad():
        for parameter in ACTOR.parameters():
            parameter.mul_(1.5)
    TRAINER.update_engine_weights(ACTOR)
    assert ENGINE.version == 1 and generate(3) != before


def check_an_error_of_rank_0_is_everyones():
    with pytest.raises(EngineError, match=r"status 400: prompt 0 has 1000 tokens"):
        ENGINE.generate([[5] * 1000] if RANK == 0 else [], SAMPLING)
    with pytest.raises(ValueError, match="prompt 0 holds token 99"):
        ENGINE.generate([[99]] if RANK == 0 else [], SAMPLING)


def check_shards_of_zero_3_arrive():
    config = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
    strategy = DeepspeedStrategy(zero_stage=3, deepspeed_config=config)
    strategy.setup_distributed()
    actor = tiny_llama(seed=8, layers=2, width=32)
    actor = strategy.prepare((actor, strategy.create_optimizer(actor)))[0]
    ENGINE.update_weights(PolicyWeights(strategy, actor), 2)
    whole = TransformersRollout()
    whole.connect(tiny_llama(seed=8, layers=2, width=32), TOKENIZER)
    for found, expected in zip(ENGINE.generate(PROMPTS, SAMPLING), whole.generate(PROMPTS, SAMPLING), strict=True):
        for a, b in zip(found, expected, strict=True):
            assert a.token_ids == b.token_ids and a.logprobs == pytest.approx(b.logprobs, abs=1e-5)
    TRAINER.update_engine_weights(ACTOR)


def check_a_server_that_hangs_is_replaced_and_gets_the_current_weights():
    before, server = generate(3), ENGINE._server
    ENGINE.deadline = 2.0
    if server is not None:
        os.kill(server.pid, signal.SIGSTOP)
    assert generate(3) == before
    assert server is None or (ENGINE._server.pid != server.pid and not server.alive())


def check_close():
    ENGINE.close()
    TRAINER.barrier()


if __name__ == "__main__":
    checks.run(dict(globals()))
