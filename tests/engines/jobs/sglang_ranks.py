"""One SGLang, whose URL is the last argument, for two ranks that shard the model; see strategies/jobs/checks.py."""

from __future__ import annotations

import sys

import checks
import pytest
import safetensors.torch
import torch

from lightrft_lightning import DeepspeedStrategy, FSDPV2Strategy, SamplingParams, SGLangRollout
from lightrft_lightning.engines.weight_sync import WeightMismatchError
from lightrft_lightning.models.tiny import char_tokenizer, tiny_llama

TOKENIZER = char_tokenizer()
PROMPTS = [TOKENIZER(f"{a}+{b}=")["input_ids"] for a in (1, 22) for b in (3, 45, 678)]
SAMPLING = SamplingParams(n=2, max_new_tokens=6, seed=4)
TRAINER = FSDPV2Strategy()
TRAINER.setup_distributed()
RANK = TRAINER.global_rank
ACTOR = tiny_llama(seed=3, layers=2, width=32)
TRAINER.prepare((ACTOR, TRAINER.create_optimizer(ACTOR)))
ENGINE = SGLangRollout(url=sys.argv[2], deadline=60.0)
TRAINER.setup_inference_engine(engine_type=ENGINE, actor=ACTOR, tokenizer=TOKENIZER)
LOST = "model.layers.0.self_attn.o_proj.weight"


def generate(at):
    """Results of all ranks together, in order, when rank 0 has the first `at` prompts."""
    mine = slice(0, at) if RANK == 0 else slice(at, len(PROMPTS))
    found = ENGINE.generate(PROMPTS[mine], SAMPLING, list(range(len(PROMPTS)))[mine])
    return [group for rank in TRAINER.gather_objects(found) for group in rank]


def tokens(groups):
    return [[completion.token_ids for completion in group] for group in groups]


def change_weights():
    with torch.no_grad():
        for parameter in ACTOR.parameters():
            parameter.mul_(1.1)


def agree(model, prompt, completion):
    ids = torch.tensor([[*prompt, *completion.token_ids]])
    logprobs = model(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    expected = logprobs.gather(1, ids[0, len(prompt) :, None])[:, 0].tolist()
    assert completion.logprobs == pytest.approx(expected, abs=1e-5)


def check_unequal_numbers_of_prompts_find_their_way_back():
    everything = tokens(generate(3))
    for at in (0, 1, 6):
        assert tokens(generate(at)) == everything


def check_logprobs_are_the_trainers_after_updates():
    for _ in range(2):
        change_weights()
        TRAINER.update_engine_weights(ACTOR)
    for prompt, (completion, _) in zip(PROMPTS, generate(3), strict=True):
        agree(ACTOR, prompt, completion)


def check_a_lost_tensor_stops_all_ranks_and_the_next_update_mends_it():
    save = safetensors.torch.save_file
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            safetensors.torch, "save_file", lambda ts, *a: save({n: t for n, t in ts.items() if n != LOST}, *a)
        )
        change_weights()
        with pytest.raises(WeightMismatchError, match=LOST):
            TRAINER.update_engine_weights(ACTOR)
    TRAINER.update_engine_weights(ACTOR)
    check_logprobs_are_the_trainers_after_updates()


def check_gather_and_generate():
    mine = PROMPTS[: 1 + RANK]
    results = TRAINER.gather_and_generate(SAMPLING, all_prompt_token_ids=mine)
    assert [len(group) for group in results] == [SAMPLING.n] * len(mine)


def check_zero_3():
    """In the same processes, with an engine of its own on the same server."""
    strategy = DeepspeedStrategy(
        zero_stage=3, deepspeed_config={"zero_optimization": {"stage3_param_persistence_threshold": 0}}
    )
    strategy.setup_distributed()
    actor = tiny_llama(seed=8, layers=2, width=32)
    actor = strategy.prepare((actor, strategy.create_optimizer(actor)))[0]
    engine = SGLangRollout(url=sys.argv[2], deadline=60.0, verify="all")
    strategy.setup_inference_engine(engine_type=engine, actor=actor, tokenizer=TOKENIZER)
    whole = tiny_llama(seed=8, layers=2, width=32)
    for prompt, (completion, _) in zip(PROMPTS, engine.generate(PROMPTS, SAMPLING), strict=True):
        agree(whole, prompt, completion)
    engine.close()


def check_close():
    ENGINE.close()
    TRAINER.barrier()


if __name__ == "__main__":
    checks.run(dict(globals()))
