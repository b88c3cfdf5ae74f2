"""LightRFT's flags become settings of RLHFModule, or are refused with a remedy."""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import math
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lightrft_lightning import FakeStrategy, FSDPV2Strategy, RLHFModule, StrategyConfig, get_strategy
from lightrft_lightning._trainer import with_lr_schedule
from lightrft_lightning.algorithms import lightrft_flags
from lightrft_lightning.config import UNREAD

PAGE = (Path(__file__).parents[2] / "docs" / "from_lightrft.md").read_text()
ROWS = re.findall(r"^\| (.+?) \| (.+) \|$", PAGE, re.M)
SCRIPTS = json.loads((Path(__file__).parent / "lightrft_scripts.json").read_text())
"""What the parsers of the five shipped scripts make of their command lines: most, what is other, what is not there."""
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


ARRIVE = {  # flag: its value, where it is seen, what is seen there, and flags beside it
    # of LightRFT's parsers only
    "eps_clip": (0.3, "policy_loss_options", {"clip_low": 0.3, "clip_high": 0.3}),
    "gamma": (0.9, "advantage_options.gamma", 0.9),
    "lambd": (0.8, "advantage_options.lam", 0.8),
    "value_clip": (0.5, "critic_settings.value_clip", 0.5),
    "freezing_actor_steps": (4, "critic_settings.warmup_iterations", 4),
    "init_kl_coef": (0.1, "kl_coef", 0.1),
    "kl_target": (2.0, "kl_target", 2.0, {"init_kl_coef": 0.1}),
    "use_gspo": (True, "policy_loss", "gspo"),
    "use_cpg_loss": (True, "policy_loss", "cpgd"),
    "loss_agg_mode": ("token-mean", "aggregation", "token_mean"),
    "high_entropy_token_ratio": (0.2, "high_entropy_share", 0.2),
    "use_fire": (True, "first_token_temperature", 10.0),
    "first_token_temperature": (30.0, "first_token_temperature", 30.0, {"use_fire": True}),
    "temperature": (0.5, "sampling.temperature", 0.5),
    "top_p": (1.0, "sampling.top_p", 1.0),  # others are refused
    "generate_max_len": (7, "sampling.max_new_tokens", 7),
    "lora_rank": (8, "lora.r", 8),
    "lora_alpha": (32, "lora.lora_alpha", 32, {"lora_rank": 8}),
    "target_modules": (["q_proj"], "lora.target_modules", ["q_proj"], {"lora_rank": 8}),
    "lora_dropout": (0.1, "lora.lora_dropout", 0.1, {"lora_rank": 8}),
    "load_in_4bit": (True, "quantization", "nf4", {"lora_rank": 8}),
    "gradient_checkpointing": (True, "gradient_checkpointing", True),
    "max_epochs": (2, "epochs_per_rollout", 2),
    # fields of StrategyConfig
    "advantage_estimator": ("rloo", "advantage_estimator", "rloo"),
    "kl_estimator": ("k2", "kl_estimator", "k2"),
    "use_kl_loss": (True, "kl_in", "loss", {"init_kl_coef": 0.1}),
    "n_samples_per_prompt": (3, "sampling.n", 3),
    "dynamic_sampling": (True, "dynamic_sampling", True, {"advantage_estimator": "group_norm"}),
    "overlong_buffer": (True, "overlong_buffer", 5, {"overlong_buffer_len": 5}),
    "overlong_buffer_len": (6, "overlong_buffer", 6, {"overlong_buffer": True}),
    "overlong_buffer_penalty_factor": (0.5, "overlong_factor", 0.5),
    "reward_running_norm": (True, "reward_norm", "scale"),
    "reward_running_norm_minus_mean": (True, "reward_norm", "full", {"reward_running_norm": True}),
    "reward_clip": (2.0, "reward_clip", 2.0),
    "advantages_norm": (True, "advantage_norm", True),
    "advantage_clip": (3.0, "advantage_clip", 3.0),
    "actor_learning_rate": (2e-4, "lr", 2e-4),
    "critic_learning_rate": (3e-4, "critic_settings.lr", 3e-4),
    "critic_pretrain": ("folder", "critic_settings.model", "folder"),
    "l2": (0.1, "weight_decay", 0.1),
    "lr_warmup_ratio": (0.2, "warmup_ratio", 0.2),
    "seed": (11, "seed", 11),
}


@pytest.mark.parametrize("name", ARRIVE)
def test_a_flag_arrives(name):
    value, where, seen, *beside = ARRIVE[name]
    flags = {"advantage_estimator": "gae", **dict(*beside), name: value}
    found = made(flags.pop("advantage_estimator"), **flags)
    for part in where.split("."):
        found = found[part] if isinstance(found, dict) else getattr(found, part)
    assert found == seen
    here = next(right for left, right in ROWS if f"`{name}`" in left)
    assert "same names" in here or re.search(rf"[`\"]{where.split('.')[-1]}[`\"=]", here), here


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
        ({"pretrain_data": "texts"}, "pretrain_data='texts': no texts are mixed into the steps"),
        ({"top_p": 0.9}, "the engine would sample from another distribution"),
    ],
)
def test_what_is_not_there_is_refused(flags, message):
    with pytest.raises(ValueError, match=message):
        made(**flags)


def test_what_goes_elsewhere_is_told(caplog):
    made("group_norm", rollout_batch_size=3, init_kl_coef=0.1)
    assert "rollout_batch_size=3: PromptDataModule(batch_size=3)" in caplog.text
    assert "so the penalty is in the loss" in caplog.text
    made(colocate_all_models=True, loss_type="hps")
    assert "flags that nothing here reads: colocate_all_models, loss_type" in caplog.text


@pytest.mark.parametrize(("name", "value"), [("plot_every", 5), ("use_tensorboard", "logs"), ("local_rank", 3)])
def test_a_field_that_nothing_reads_is_an_error_and_in_a_scripts_arguments_a_line(name, value, caplog):
    with pytest.raises(ValueError, match=f"{name}={value!r}: nothing here reads it; .*leave it out"):
        FakeStrategy(**{name: value})
    with caplog.at_level(logging.WARNING):
        assert getattr(get_strategy(argparse.Namespace(**{name: value})).config, name) == value
    assert f"{name}={value!r}: nothing here reads it" in caplog.text


def test_the_page_names_every_flag():
    named = {*lightrft_flags.REFUSED, *lightrft_flags.ELSEWHERE, *UNREAD, *PARSED.keys()}
    assert named <= set(re.findall(r"`(\w+)`", PAGE))


def test_every_flag_of_the_shipped_scripts_has_a_meaning_or_a_line():
    fields = {field.name for field in dataclasses.fields(StrategyConfig)}
    tables = {*lightrft_flags.REFUSED, *lightrft_flags.ELSEWHERE, *lightrft_flags.WITH_WANDB}
    assert SCRIPTS["most"].keys() - fields - tables == {*lightrft_flags.READ} <= ARRIVE.keys()


@pytest.mark.parametrize("name", SCRIPTS["scripts"])
def test_the_shipped_scripts_build_a_strategy_and_a_module(name, caplog):
    """With all that their parsers make of their command lines."""
    kept = SCRIPTS["most"].keys() - SCRIPTS["without"][name]
    flags = {key: SCRIPTS["scripts"][name].get(key, SCRIPTS["most"][key]) for key in kept}
    strategy = get_strategy(argparse.Namespace(**flags))
    caplog.clear()
    module = RLHFModule.from_config(strategy.config, "anything", "exact_match", tokenizer=object())
    assert type(strategy) is FSDPV2Strategy and module.sampling.n == flags["n_samples_per_prompt"]
    assert (module.kl_coef, module.lr, module.lr_schedule) == (
        flags["init_kl_coef"], flags["actor_learning_rate"], "cosine_with_min_lr",
    )  # fmt: skip
    assert f"prompt_data='{flags['prompt_data']}': PromptDataModule(" in caplog.text
    for key, (silent, _) in lightrft_flags.ELSEWHERE.items():
        assert (f"  {key}=" in caplog.text) == (flags.get(key) not in (*silent, None)), key


def test_rates_fall_to_a_tenth_along_a_cosine():
    module = made("gae", l2=0.1)
    for settings in (module, module.critic_settings):
        assert (settings.lr_schedule, settings.warmup_ratio) == ("cosine_with_min_lr", 0.03)
        assert settings.weight_decay == 0.1
    weight = torch.nn.Linear(1, 1)
    loop = SimpleNamespace(strategy=FakeStrategy(), trainer=SimpleNamespace(max_steps=100))
    found = with_lr_schedule(loop, weight, module)
    optimizer, schedule = found["optimizer"], found["lr_scheduler"]["scheduler"]
    rates = []
    for _ in range(101):
        rates.append(optimizer.param_groups[0]["lr"] / module.lr)
        optimizer.step()
        schedule.step()
    assert rates[0] == 0 and rates[3] == 1 and rates[-1] == pytest.approx(0.1)
    assert rates[51] == pytest.approx(0.55 + 0.45 * math.cos(math.pi * 48 / 97))
