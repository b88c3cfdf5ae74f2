from __future__ import annotations

import pytest
import torch

from lightrft_lightning.models.tiny import char_tokenizer, tiny_llama

torch.set_num_threads(1)  # toy models gain nothing from more, and lose much on a busy machine


@pytest.fixture(scope="session")
def tiny_tokenizer():
    """One id a character; shared by all tests, which must not change it."""
    return char_tokenizer()


@pytest.fixture
def tiny_model():
    """A random two-layer Llama for `tiny_tokenizer`; a fresh one for each test, so that it may be trained."""
    return tiny_llama(seed=0, width=32, layers=2)
