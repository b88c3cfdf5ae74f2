"""vLLM's native code never comes back, with the interpreter lock held."""

from __future__ import annotations

import ctypes

from vllm_engine import PROMPTS, engine_of, random_model

from lightrft_lightning import SamplingParams
from lightrft_lightning.engines import vllm_process

vllm_process.HUNG = 1.0
with engine_of(random_model(), deadline=2) as (engine, _):
    engine._engine.step = lambda: ctypes.PyDLL(None).sleep(1000)
    engine.generate(PROMPTS, SamplingParams(max_new_tokens=4))
