from __future__ import annotations

import random

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import MambaConfig, MambaForCausalLM

from lightrft_lightning.experience.packing import pack
from lightrft_lightning.experience.trajectory import Completion, Prompt, Trajectory
from lightrft_lightning.models.layers import checkpoint_activations, compile_layers, uncompiled
from lightrft_lightning.models.logprobs import completion_logprobs


def batch_of(*groups):
    """One batch of groups, each given as the length of its prompt and those of its completions."""
    rng, trajectories = random.Random(0), []
    for number, (prompt, lengths) in enumerate(groups):
        ids = Prompt(tuple(rng.randrange(3, 16) for _ in range(prompt)), "")
        for n in lengths:
            sampled = Completion(tuple(rng.randrange(3, 16) for _ in range(n)), (-1.0,) * n, "length")
            trajectories.append(Trajectory(ids, sampled, number))
    return pack(trajectories, 1000)[0]


def scored(model, batch):
    """Log-probabilities, the gradient of their sum, and the bytes that wait for the backward pass."""
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    model.zero_grad()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logprobs = completion_logprobs(model, batch).logprobs
    logprobs.sum().backward()
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    size = sum(size for pointer, size in kept.items() if pointer not in weights)
    return logprobs.detach(), torch.cat([p.grad.flatten() for p in model.parameters()]), size


def test_recomputed_layers_give_the_same_gradient_and_keep_less(tiny_model):
    batch = batch_of((5, [9, 20, 4]), (3, [7, 1]))
    logprobs, gradient, plain = scored(tiny_model, batch)
    checkpoint_activations(tiny_model)
    again, same, less = scored(tiny_model, batch)
    assert torch.equal(again, logprobs)
    assert (same - gradient).norm() < 1e-6 * gradient.norm()
    assert less < plain / 4
    assert scored(tiny_model.eval(), batch)[2] == plain  # so that a rollout with a cache is as it was


def test_compiled_layers_give_the_same_once_compiled_for_all_rows(tiny_model):
    batches = [batch_of((5, [9, 20 + k, 4 + 3 * k])) for k in range(4)]
    expected = [scored(tiny_model, batch)[:2] for batch in batches]
    names = list(tiny_model.state_dict())
    compile_layers(tiny_model)
    compile_layers(tiny_model)  # a second `fit`
    counters.clear()
    for batch, (logprobs, gradient) in zip(batches, expected, strict=True):
        got, its_gradient, _ = scored(tiny_model, batch)
        assert (got - logprobs).abs().max() < 1e-5
        assert (its_gradient - gradient).norm() < 1e-5 * gradient.norm()
    assert counters["stats"]["unique_graphs"] == 1  # for both layers and all lengths
    assert list(tiny_model.state_dict()) == names
    with torch.no_grad(), uncompiled(tiny_model):
        completion_logprobs(tiny_model, batches[0])
    assert counters["stats"]["unique_graphs"] == 1


def test_models_without_such_layers_are_refused():
    with pytest.raises(ValueError, match="compile=True: Linear has no layers of Transformers' kind"):
        compile_layers(torch.nn.Linear(2, 2))
    model = MambaForCausalLM(MambaConfig(vocab_size=16, hidden_size=16, num_hidden_layers=1))
    model.supports_gradient_checkpointing = False
    with pytest.raises(ValueError, match="gradient_checkpointing=True: MambaForCausalLM does not support it"):
        checkpoint_activations(model)
