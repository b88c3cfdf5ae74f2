"""A loop of a user's own that never closes its engine; tells about Ctrl-C, and then waits to be killed."""

from __future__ import annotations

import signal
import sys
import time

from lightrft_lightning import FakeStrategy, SamplingParams
from lightrft_lightning.engines.remote import RemoteRollout
from lightrft_lightning.models.tiny import char_tokenizer, tiny_llama

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
tokenizer, strategy = char_tokenizer(), FakeStrategy()
engine = RemoteRollout(engine="transformers", deadline=60.0)
strategy.setup_inference_engine(engine_type=engine, actor=tiny_llama(seed=0, width=32, layers=2), tokenizer=tokenizer)
try:
    print(engine._server.pid, engine._exchange, flush=True)  # Ctrl-C may come as soon as this is read
    while True:
        strategy.gather_and_generate(SamplingParams(max_new_tokens=4), all_prompts=["1+1="])
except KeyboardInterrupt:
    strategy.gather_and_generate(SamplingParams(max_new_tokens=4), all_prompts=["1+1="])
    print("interrupted, and the server still answers", flush=True)
time.sleep(60)
sys.exit("nobody killed this")
