"""LightRFT's flags become settings of RLHFModule, or are refused with a remedy."""

from __future__ import annotations

import argparse
import logging
import re
from pathlib import Path

import pytest

from lightrft_lightning import FakeStrategy, RLHFModule, StrategyConfig, get_strategy
from lightrft_lightning.algorithms import lightrft_flags
from lightrft_lightning.config import UNREAD

PAGE = (Path(__file__).parents[2] / "docs" / "from_lightrft.md").read_text()
PARSED = {  # what the parsers fill in
    "micro_rollout_batch_size": 8, "rollout_batch_size": 512, "prompt_max_len": 1024, "generate_max_len": 1024,
    "max_epochs": 1, "eps_clip": 0.2, "value_clip": 0.2, "lambd": 0.95, "gamma": 1, "temperature": 1.0, "top_p": 1.0,
    "loss_agg_mode": "seq-mean-token-mean", "use_gspo": False, "use_cpg_loss": False, "use_fire": False,
    "first_token_temperature": 10.0, "freezing_actor_steps": -1, "kl_target": None, "init_kl_coef": 0.0,
    "lora_rank": 0, "lora_alpha": 16, "target_modules": "all-linear", "lora_dropout": 0, "load_in_4bit": False,
    "high_entropy_token_ratio": 0.0, "plot_every": 10,
    "critic_learning_rate": 9e-6, "aux_loss_coef": 0, "enable_ema": False, "num_episodes": 1,
}  # fmt: skip


def made(estimator="gae", **flags):
    config = StrategyConfig.from_args(argparse.Namespace(advantage_estimator=estimator, **{**PARSED, **flags}))
    return RLHFModule.from_config(config, "anything", "exact_match", tokenizer=object())


def test_the_parsers_defaults_are_lightrfts_way_and_say_nothing(caplog):
    for estimator in ("gae", "group_norm", "reinforce++"):
        module = made(estimator)
        assert (module.aggregation, module.policy_loss, module.kl_coef) == ("sequence_mean", "ppo", 0.0)
        assert module.sampling.max_new_tokens == 1024 and module.lora is None
    assert not [r for r in caplog.records if r.name.startswith("lightrft")]


def test_flags_arrive():
    module = made(
        eps_clip=0.3, gamma=0.9, lambd=0.8, value_clip=0.5, freezing_actor_steps=4, init_kl_coef=0.1, kl_target=2.0,
        use_gspo=True, loss_agg_mode="token-mean", high_entropy_token_ratio=0.2, use_fire=True, temperature=0.5,
        generate_max_len=7, lora_rank=8, load_in_4bit=True, gradient_checkpointing=True, max_epochs=2,
    )  # fmt: skip
    assert (module.policy_loss, module.aggregation) == ("gspo", "token_mean")
    assert module.policy_loss_options == {"clip_low": 0.3, "clip_high": 0.3}
    assert module.advantage_options == {"gamma": 0.9, "lam": 0.8}
    assert (module.critic_settings.value_clip, module.critic_settings.warmup_iterations) == (0.5, 4)
    assert (module.kl_coef, module.kl_in, module.kl_target) == (0.1, "reward", 2.0)
    assert (module.high_entropy_share, module.first_token_temperature) == (0.2, 10.0)
    assert (module.sampling.temperature, module.sampling.max_new_tokens) == (0.5, 7)
    assert module.lora == {"r": 8, "lora_alpha": 16, "target_modules": "all-linear", "lora_dropout": 0}
    assert (module.quantization, module.gradient_checkpointing, module.epochs_per_rollout) == ("nf4", True, 2)
    assert made(use_kl_loss=True, init_kl_coef=0.1).kl_in == "loss"
    assert made(use_cpg_loss=True).policy_loss == "cpgd"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"estimator": "group_norm", "gamma": 0.5}, "compares whole completions"),
        ({"estimator": "group_norm", "lambd": 0.5}, "lambd=0.5: only advantage_estimator='gae'"),
        ({"estimator": "rloo", "freezing_actor_steps": 3}, "only advantage_estimator='gae' has a critic"),
        ({"loss_agg_mode": "token-sum"}, "give aggregation=, or one of seq-mean-token-mean, token-mean"),
        ({"kl_target": 2.0}, "needs init_kl_coef"),
        ({"use_gspo": True, "use_cpg_loss": True}, "set one of them"),
        ({"enable_ema": True}, "strategy.moving_average"),
    ],
)
def test_what_is_not_there_is_refused(flags, message):
    with pytest.raises(ValueError, match=message):
        made(**flags)


def test_what_goes_elsewhere_is_told(caplog):
    made("group_norm", rollout_batch_size=3, init_kl_coef=0.1)
    assert "rollout_batch_size=3 goes to PromptDataModule(batch_size=3)" in caplog.text
    assert "so the penalty is in the loss" in caplog.text


@pytest.mark.parametrize(("name", "value"), [("plot_every", 5), ("use_tensorboard", "logs"), ("local_rank", 3)])
def test_a_field_that_nothing_reads_is_an_error_and_in_a_scripts_arguments_a_line(name, value, caplog):
    with pytest.raises(ValueError, match=f"{name}={value!r}: nothing here reads it; .*leave it out"):
        FakeStrategy(**{name: value})
    with caplog.at_level(logging.WARNING):
        assert getattr(get_strategy(argparse.Namespace(**{name: value})).config, name) == value
    assert f"{name}={value!r}: nothing here reads it" in caplog.text


def test_the_page_names_every_flag():
    named = {*lightrft_flags.REFUSED, *lightrft_flags.ELSEWHERE, *UNREAD, *(PARSED.keys() - {"max_len"})}
    assert named <= set(re.findall(r"`(\w+)`", PAGE))
