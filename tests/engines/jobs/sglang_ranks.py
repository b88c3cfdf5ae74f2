"""One SGLang for two ranks that shard the model; see strategies/jobs/checks.py."""

from __future__ import annotations

import checks
import httpx
import pytest
import torch

from lightrft_lightning import FSDPV2Strategy, SamplingParams, SGLangRollout
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
ENGINE = SGLangRollout(deadline=60.0)
TRAINER.setup_inference_engine(engine_type=ENGINE, actor=ACTOR, tokenizer=TOKENIZER)
LOST = "model.layers.0.self_attn.o_proj.weight"


def generate(at):
    """Results of all ranks together, in order, when rank 0 has the first `at` prompts."""
    mine = slice(0, at) if RANK == 0 else slice(at, len(PROMPTS))
    found = ENGINE.generate(PROMPTS[mine], SAMPLING, list(range(len(PROMPTS)))[mine])
    return [group for rank in TRAINER.gather_objects(found) for group in rank]


def change_weights():
    with torch.no_grad():
        for parameter in ACTOR.parameters():
            parameter.mul_(1.1)


def lose(times):
    if RANK == 0:
        body = {"path": "/update_weights_from_disk", "kind": f"lose {LOST}", "times": times}
        httpx.post(f"{ENGINE._client.url}/fault", json=body, timeout=10)
    TRAINER.barrier()


def check_unequal_numbers_of_prompts_find_their_way_back():
    everything = generate(3)
    for at in (0, 1, 6):
        assert generate(at) == everything


def check_logprobs_are_the_trainers_after_updates():
    for _ in range(2):
        change_weights()
        TRAINER.update_engine_weights(ACTOR)
    for prompt, (completion, _) in zip(PROMPTS, generate(3), strict=True):
        ids = torch.tensor([[*prompt, *completion.token_ids]])
        logprobs = ACTOR(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        expected = logprobs.gather(1, ids[0, len(prompt) :, None])[:, 0].tolist()
        assert completion.logprobs == pytest.approx(expected, abs=1e-5)


def check_a_lost_tensor_stops_all_ranks_and_the_next_update_mends_it():
    lose(1)
    change_weights()
    with pytest.raises(WeightMismatchError, match=LOST):
        TRAINER.update_engine_weights(ACTOR)
    lose(0)
    TRAINER.update_engine_weights(ACTOR)
    check_logprobs_are_the_trainers_after_updates()


def check_close():
    ENGINE.close()
    TRAINER.barrier()


if __name__ == "__main__":
    checks.run(dict(globals()))
