"""What the hand-written loops train."""

from __future__ import annotations

import torch
from torch import nn

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
