"""What the hand-written loops train."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightrft_lightning import FakeStrategy
from lightrft_lightning.models.tiny import tiny_llama

IDS = torch.arange(3, 13)[None]


def llama(seed=0):
    return tiny_llama(seed=seed, width=32, layers=2)


def trained(s, model=None, lr=1e-2, **settings):
    model = llama() if model is None else model
    return s.prepare((model, s.create_optimizer(model, lr=lr, **settings)))


def loss_of(model, ids=IDS):
    logits = model(input_ids=ids).logits.float()
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def same(left, right, tolerance=1e-6, **more):
    torch.testing.assert_close(left, right, rtol=tolerance, atol=tolerance, **more)


def makes_its_optimizer_after_prepare(s):
    """In the order of LightRFT's page; the first step is that of one process."""
    one, plain = FakeStrategy(), llama()
    single = one.create_optimizer(plain)
    one.backward(loss_of(plain), plain, single)
    expected = one.optimizer_step(single, plain, None)
    actor = s.prepare(llama(), is_rlhf=True)
    with pytest.raises(ValueError, match=r"LlamaForCausalLM is frozen, because prepare\(model\) came without its"):
        s.backward(loss_of(actor), actor, None)
    optimizer = s.create_optimizer(actor)
    s.backward(loss_of(actor), actor, optimizer)
    assert s.optimizer_step(optimizer, actor, None) == pytest.approx(expected, rel=1e-5)
