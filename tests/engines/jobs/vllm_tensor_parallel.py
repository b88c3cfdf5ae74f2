"""One vLLM on two ranks, in a hand-written loop; see strategies/jobs/checks.py."""

from __future__ import annotations

from pathlib import Path

import checks

from lightrft_lightning import FSDPV2Strategy, SamplingParams
from lightrft_lightning.engines.vllm import VLLMRollout
from lightrft_lightning.models.tiny import char_tokenizer, tiny_llama

TOKENIZER = char_tokenizer()
ARGS = {"enforce_eager": True, "max_model_len": 64, "kv_cache_memory_bytes": 1 << 24}
PROMPTS = [TOKENIZER(f"{a}+{b}=")["input_ids"] for a in range(3, 11) for b in range(5, 13)]
GREEDY = SamplingParams(temperature=0.0, max_new_tokens=6)
TRAINER = FSDPV2Strategy()
TRAINER.setup_distributed()
ACTOR = tiny_llama(seed=3, layers=2)
TRAINER.prepare((ACTOR, TRAINER.create_optimizer(ACTOR)))
GREEDY_IDS: dict[int, list] = {}


def engine_on(ranks):
    engine = VLLMRollout(ARGS, tensor_parallel_size=ranks, verify="all")
    return TRAINER.setup_inference_engine(engine_type=engine, actor=ACTOR, tokenizer=TOKENIZER)


def check_greedy_tokens_do_not_depend_on_the_ranks_of_an_engine():
    mine = PROMPTS[TRAINER.global_rank :: 2]
    ids = {}
    for ranks in (1, 2):
        engine = engine_on(ranks)
        try:
            ids[ranks] = TRAINER.gather_and_generate(GREEDY, all_prompt_token_ids=mine)
        finally:
            engine.close()
        TRAINER.barrier()  # the trainer's own process group is still there
    assert [[c.token_ids for c in group] for group in ids[1]] == [[c.token_ids for c in group] for group in ids[2]]


def check_unequal_numbers_of_prompts_find_their_way_back():
    engine = engine_on(2)
    shared = [line for line in Path("/proc/self/maps").read_text().splitlines() if "cpushm" in line]
    assert shared and all(line.endswith("(deleted)") for line in shared), "found by nobody else, and gone with a kill"
    rank = TRAINER.global_rank
    try:
        everything = TRAINER.gather_and_generate(GREEDY, all_prompt_token_ids=PROMPTS[:8])
        for cut in (3, 8, 0):
            mine = slice(0, cut) if rank == 0 else slice(cut, 8)
            result = TRAINER.gather_and_generate(GREEDY, all_prompt_token_ids=PROMPTS[:8][mine])
            assert [[c.token_ids for c in g] for g in result] == [[c.token_ids for c in g] for g in everything[mine]]
        drawn = TRAINER.gather_and_generate({"n": 2, "seed": 5, "max_new_tokens": 4}, PROMPTS[: 2 + rank])
        assert [len(group) for group in drawn] == [2] * (2 + rank)
        TRAINER.update_engine_weights(ACTOR)
        assert engine.version == 1
    finally:
        engine.close()


if __name__ == "__main__":
    checks.run(dict(globals()))
