"""One server, whose URL is the last argument, for two ranks that shard the model; see strategies/jobs/checks.py."""

from __future__ import annotations

import sys
from contextlib import contextmanager

import checks
import pytest
import torch

from lightrft_lightning import DeepspeedStrategy, FSDPV2Strategy, SamplingParams
from lightrft_lightning.engines.base import EngineError
from lightrft_lightning.engines.remote import RemoteRollout
from lightrft_lightning.models.tiny import char_tokenizer, tiny_llama

TOKENIZER = char_tokenizer()
PROMPTS = [TOKENIZER(f"{a}+{b}=")["input_ids"] for a in (1, 22) for b in (3, 45, 678)]
SAMPLING = SamplingParams(n=2, max_new_tokens=6, seed=4)
PIECES = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}


def tied_model():
    """As the server's."""
    model = tiny_llama(seed=8, layers=2)
    model.config.tie_word_embeddings = True
    model.tie_weights()
    return model


@contextmanager
def engine_for(strategy):
    """An engine that has the weights of a model which the ranks share, and the model."""
    strategy.setup_distributed()
    actor = tied_model()
    prepared = strategy.prepare((actor, strategy.create_optimizer(actor)))[0]
    engine = RemoteRollout(sys.argv[2], verify="all", deadline=60.0)
    strategy.setup_inference_engine(engine_type=engine, actor=prepared, tokenizer=TOKENIZER)
    yield engine, prepared
    engine.close()


def generate(engine, at):
    """Results of all ranks together, in order, when rank 0 has the first `at` prompts."""
    strategy, numbers = engine.strategy, list(range(len(PROMPTS)))
    mine = slice(0, at) if strategy.global_rank == 0 else slice(at, len(PROMPTS))
    found = engine.generate(PROMPTS[mine], SAMPLING, numbers[mine])
    return [group for rank in strategy.gather_objects(found) for group in rank]


def agree(model, groups):
    for prompt, group in zip(PROMPTS, groups, strict=True):
        for done in group:
            logits = model(torch.tensor([[*prompt, *done.token_ids]])).logits[0, len(prompt) - 1 : -1]
            expected = logits.log_softmax(-1)[range(len(done.token_ids)), list(done.token_ids)].tolist()
            assert done.logprobs == pytest.approx(expected, abs=1e-4)


def check_shards_of_fsdp_arrive_in_each_update():
    with engine_for(FSDPV2Strategy()) as (engine, actor):
        for _ in range(2):
            agree(actor, generate(engine, 3))
            with torch.no_grad():
                for parameter in actor.parameters():
                    parameter.mul_(1.1)
            engine.strategy.update_engine_weights(actor)
        everything = generate(engine, 3)
        agree(actor, everything)
        for at in (0, 1, 6):
            assert generate(engine, at) == everything


def check_an_error_of_rank_0_is_everyones():
    with engine_for(FSDPV2Strategy()) as (engine, _):
        with pytest.raises(EngineError, match=r"status 400: prompt 0 has 1000 tokens"):
            engine.generate([[5] * 1000] if engine.strategy.global_rank == 0 else [], SAMPLING)
        generate(engine, 3)


def check_shards_of_zero_3_arrive():
    with engine_for(DeepspeedStrategy(zero_stage=3, deepspeed_config=PIECES)) as (engine, _):
        agree(tied_model(), generate(engine, 3))


if __name__ == "__main__":
    checks.run(dict(globals()))
