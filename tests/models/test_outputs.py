"""Settings of a config that ask for more output: without effect on what is computed, and put back."""

from __future__ import annotations

import pytest
import torch
from tiny_models import config_of, random_model

from lightrft_lightning import SamplingParams, TransformersRollout
from lightrft_lightning.experience.packing import pack
from lightrft_lightning.experience.trajectory import Completion, Prompt, Trajectory
from lightrft_lightning.models.logprobs import completion_logprobs
from lightrft_lightning.models.outputs import plain_outputs, tell_ignored_outputs
from lightrft_lightning.models.scalar import completion_scores, with_scalar_head
from lightrft_lightning.models.tiny import char_tokenizer

ALL = {"output_router_logits": True, "output_hidden_states": True, "return_dict": False, "use_cache": False}
SETTINGS = {
    "mixtral": ALL,
    "qwen3_moe": {"output_router_logits": True},
    "granitemoe": {"output_router_logits": True},
    "dbrx": {"output_router_logits": True},
    "llama": {"return_dict": False, "output_attentions": True, "output_hidden_states": True},
    "mamba": {"return_dict": False, "output_hidden_states": True, "use_cache": False},
}


def computed(model):
    """What a rollout samples and what passes over packed rows say."""
    engine = TransformersRollout()
    engine.connect(model, char_tokenizer("abc"))
    sampled = engine.generate([[3, 4, 5], [6, 7]], SamplingParams(n=2, max_new_tokens=5))
    texts = [Trajectory(Prompt((3, 4), ""), Completion((5, 6, 7), (0.0,) * 3, "eos"), g) for g in range(2)]
    (batch,) = pack(texts, 100, share_prompts=False)
    logprobs = completion_logprobs(model, batch).logprobs
    logprobs.sum().backward()
    return [c for group in sampled for c in group], logprobs.detach()


@pytest.mark.parametrize("name", SETTINGS)
def test_they_change_nothing_and_stay(name):
    config = config_of(name)
    config._attn_implementation = "eager"
    expected, logprobs = computed(random_model(config, "eager"))
    model = random_model(config, "eager")
    for setting, value in SETTINGS[name].items():
        setattr(model.config, setting, value)
    got, same = computed(model)
    assert got == expected and torch.equal(same, logprobs)
    assert {setting: getattr(model.config, setting) for setting in SETTINGS[name]} == SETTINGS[name]


def test_a_reward_model_gives_its_scores_all_the_same():
    model = random_model(config_of("mixtral"))
    scalar = with_scalar_head(model)
    torch.nn.init.ones_(scalar.score.weight)
    (batch,) = pack([Trajectory(Prompt((3, 4), ""), Completion((5,), (0.0,), "eos"), 0)], 100)
    expected, _ = completion_scores(scalar, batch)
    for setting, value in ALL.items():
        setattr(scalar.config, setting, value)
    assert torch.equal(completion_scores(scalar, batch)[0], expected)


def test_they_are_put_back_after_an_error_and_under_any_kernel():
    model = random_model(config_of("llama"))
    model.config._output_attentions = model.config.output_hidden_states = True
    with pytest.raises(KeyError), plain_outputs(model):
        assert not model.config.output_attentions and not model.config.output_hidden_states
        raise KeyError
    assert model.config.output_attentions and model.config.output_hidden_states


def test_a_loss_that_is_not_computed_is_named(caplog):
    model = random_model(config_of("mixtral"))
    tell_ignored_outputs(model)
    assert not caplog.records
    model.config.output_router_logits = True
    tell_ignored_outputs(model)
    assert "output_router_logits=True: the router's auxiliary loss is not part of the loss here" in caplog.text
