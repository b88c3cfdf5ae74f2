from __future__ import annotations

import os
import sys

import pytest

from lightrft_lightning.engines._process import ServerProcess
from lightrft_lightning.models.tiny import char_tokenizer, tiny_llama

KEY = "a-key-for-the-tests"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of servers: two threads that wait for a busy core are 50 times slower


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    """The tiny model and its tokenizer on disk."""
    folder = tmp_path_factory.mktemp("model")
    tiny_llama(seed=0, width=32, layers=2).save_pretrained(folder)
    char_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def start_server(model_folder):
    """Starts ``lightrft serve`` with the tiny model, the transformers engine and these arguments more."""
    started = []

    def start(*arguments, key=KEY):
        command = [sys.executable, "-m", "lightrft_lightning.cli", "serve", "--model", str(model_folder)]
        command += ["--engine", "transformers", "--port", "0", "--exit-with-parent", *arguments]
        started.append(ServerProcess(command, key, None))
        return started[-1]

    yield start
    for server in started:
        server.stop()
