from __future__ import annotations

import random

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import (
    AutoModelForCausalLM,
    BioGptConfig,
    GPT2Config,
    MambaConfig,
    MambaForCausalLM,
    MixtralConfig,
)

from lightrft_lightning.experience.packing import pack
from lightrft_lightning.experience.trajectory import Completion, Prompt, Trajectory
from lightrft_lightning.models.layers import (
    checkpoint_activations,
    compile_layers,
    evaluating,
    in_training_mode,
    randomness,
    uncompiled,
)
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


SMALL = {"vocab_size": 16, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "pad_token_id": 0}
RANDOM = {
    "gpt2": (GPT2Config(vocab_size=16, n_embd=16, n_layer=2, n_head=2), {"attn_dropout": 0.1, "resid_dropout": 0.1}),
    "biogpt": (BioGptConfig(**SMALL, intermediate_size=16, layerdrop=0.5), {"layerdrop": 0.5, "dropout": 0.1}),
    "mixtral": (
        MixtralConfig(**SMALL, intermediate_size=16, num_key_value_heads=2, router_jitter_noise=0.9),
        {"jitter_noise": 0.9},
    ),
}


@pytest.mark.parametrize("name", RANDOM)
def test_a_gradient_in_evaluation_mode_is_not_random_and_recomputes_layers(name):
    config, expected = RANDOM[name]
    torch.manual_seed(0)
    model, batch = AutoModelForCausalLM.from_config(config).train(), batch_of((5, [9, 20]))
    assert expected.items() <= randomness(model).items()
    model.eval()
    logprobs, gradient, plain = scored(model, batch)
    model.train().get_output_embeddings().eval()
    modes = [m.training for m in model.modules()]
    checkpoint_activations(model)
    with evaluating(model, recompute=True):
        again, same, less = scored(model, batch)
    assert torch.equal(again, logprobs) and (same - gradient).norm() < 1e-6 * gradient.norm()
    assert less < plain / 2
    assert [m.training for m in model.modules()] == modes
    assert not torch.equal(completion_logprobs(model, batch).logprobs, logprobs)


def test_parts_that_the_user_has_put_into_evaluation_mode_stay_there(tiny_model):
    assert all(m.training for m in in_training_mode(tiny_model.eval()).modules())  # as `from_pretrained` leaves it
    tiny_model.model.embed_tokens.eval()
    in_training_mode(tiny_model)
    assert [m for m in tiny_model.modules() if not m.training] == [tiny_model.model.embed_tokens]
