from __future__ import annotations

import torch

from lightrft_lightning.models.attention import (
    FLEX,
    flex_problem,
    prefers_flex,
    without_flex_attention,
)
from lightrft_lightning.models.loading import load_model

CPU = torch.device("cpu")


def test_uncompiled_it_can_be_trained_where_torch_lets_it(tiny_model, flex_on_cpu):
    assert flex_problem(tiny_model, CPU) is None


def test_what_cannot_train_with_flex_attention_is_said(tiny_model):
    assert "does not support backward on CPU" in flex_problem(tiny_model, CPU)
    tiny_model.config.attention_dropout = 0.1
    assert "attention_dropout=0.1" in flex_problem(tiny_model, CPU)


def test_auto_means_flex_attention_on_cuda_only(tiny_model):
    assert prefers_flex(tiny_model, torch.device("cuda", 0)) and not prefers_flex(tiny_model, CPU)
    loaded = load_model({"name": "tiny-llama", "width": 32}, attn_implementation="auto")
    assert loaded.config._attn_implementation == (FLEX if torch.cuda.is_available() else "sdpa")


def test_generation_does_without(tiny_model):
    tiny_model.set_attn_implementation(FLEX)
    with without_flex_attention(tiny_model):
        assert tiny_model.config._attn_implementation == "sdpa"
    assert tiny_model.config._attn_implementation == FLEX
