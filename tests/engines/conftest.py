from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from lightrft_lightning import FakeStrategy, SGLangRollout
from lightrft_lightning.engines._process import ServerProcess
from lightrft_lightning.models.tiny import char_tokenizer, tiny_llama

KEY = "a-key-for-the-tests"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of servers: two threads that wait for a busy core are 50 times slower

SGLANG = Path(sys.prefix) / ".sglang"
"""Where the Makefile installs it, for its own processes only."""
SGLANG_ON_CPU = {
    "device": "cpu", "attention_backend": "torch_native", "max_total_tokens": 8192, "context_length": 64,
    "skip_server_warmup": True,  # it sends English, which the characters' tokenizer cannot read
}  # fmt: skip


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


@pytest.fixture(scope="session")
def sglang_environment(tmp_path_factory):
    """A folder that has SGLang for those who look whether it is there, and the variables of processes that run it."""
    if not SGLANG.exists():
        pytest.skip(f"SGLANG IS NOT RUN: `make test` installs it in {SGLANG}, where there is nothing")
    folder = tmp_path_factory.mktemp("sglang")
    (folder / "sglang").symlink_to(SGLANG / "sglang")
    paths = [str(Path(__file__).parent / "real_sglang"), str(SGLANG), os.environ.get("PYTHONPATH", "")]
    own = {"SGLANG_USE_CPU_ENGINE": "1", "TORCHDYNAMO_DISABLE": "1", "OMP_NUM_THREADS": "1"}
    return str(folder), {**own, "PYTHONPATH": os.pathsep.join(filter(None, paths))}


@pytest.fixture(scope="module")
def with_sglang(sglang_environment):
    """The real SGLang is installed, for the tests of a file; returns the variables of processes that run it."""
    folder, variables = sglang_environment
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        for name, value in variables.items():
            patch.setenv(name, value)
        yield variables


@pytest.fixture(scope="module")
def sglang(with_sglang):
    """An engine, whose server all tests of a file share: a start takes half a minute of a core, and so does waiting."""
    engine = SGLangRollout(SGLANG_ON_CPU, sleep_level=1, deadline=60.0)
    actor, tokenizer = tiny_llama(seed=0, width=32, layers=2), char_tokenizer()
    FakeStrategy().setup_inference_engine(engine_type=engine, actor=actor, tokenizer=tokenizer)
    yield engine
    engine.close()
