"""`StrategyConfig`: the table of fields, what is refused, and every kind of arguments it is read from."""

from __future__ import annotations

import argparse
import copy
import dataclasses
import math
import pickle
from types import SimpleNamespace

import pytest
import torch

from lightrft_lightning import StrategyConfig

# LightRFT's names and defaults, written out: a changed default is a changed promise.
FIELDS = {
    "seed": 42,
    "max_norm": 1.0,
    "micro_train_batch_size": 1,
    "train_batch_size": 128,
    "bf16": True,
    "fp16": False,
    "zero_stage": 2,
    "fsdp": False,
    "fsdp_cpu_offload": False,
    "adam_offload": False,
    "adam_8bit": False,
    "zpg": 1,
    "grad_accum_dtype": None,
    "overlap_comm": False,
    "engine_type": "vllm",
    "engine_tp_size": 1,
    "enable_engine_sleep": False,
    "local_rank": -1,
    "sp_size": 1,
    "heartbeat_timeout": 60.0,
    "async_checkpoints": False,
    "actor_learning_rate": 1e-5,
    "critic_learning_rate": 1e-5,
    "adam_betas": (0.9, 0.95),
    "l2": 0.0,
    "lr_warmup_ratio": 0.03,
    "critic_pretrain": None,
    "remote_rm_url": None,
    "pretrain_data": None,
    "fused_linear_logprob": False,
    "reward_running_norm": False,
    "reward_running_norm_minus_mean": False,
    "advantages_norm": False,
    "advantage_clip": 0.0,
    "reward_clip": 0.0,
    "micro_rollout_batch_size": 2,
    "n_samples_per_prompt": 8,
    "overlong_buffer": False,
    "overlong_buffer_len": 1024,
    "overlong_buffer_penalty_factor": 1.0,
    "dynamic_sampling": False,
    "advantage_estimator": "group_norm",
    "use_kl_loss": False,
    "kl_estimator": "k3",
    "mixed_mm_data": False,
    "use_mp_opt": False,
    "plot_every": -1,
    "use_tensorboard": None,
}


# -------------------------------------------------------------------- fields, types, ranges


def test_fields_and_defaults():
    config = dataclasses.asdict(StrategyConfig())
    assert config == FIELDS
    assert {name: type(value) for name, value in config.items()} == {name: type(v) for name, v in FIELDS.items()}


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("seed", "42", "seed='42'): expected int"),
        ("seed", 1.5, "seed=1.5): expected int"),
        ("max_norm", "1", "max_norm='1'): expected a finite number"),
        ("max_norm", math.nan, "max_norm=nan): expected a finite number"),
        ("max_norm", True, "max_norm=True): expected a finite number"),
        ("micro_train_batch_size", True, "micro_train_batch_size=True): expected int"),
        ("bf16", "true", "bf16='true'): expected bool"),
        ("bf16", 1, "bf16=1): expected bool"),
        ("fsdp", None, "fsdp=None): expected bool"),
        ("adam_betas", 0.9, "adam_betas=0.9): expected tuple[float, float]"),
        ("adam_betas", (0.9,), "adam_betas=(0.9,)): expected tuple[float, float]"),
        ("adam_betas", ("a", "b"), "adam_betas=('a', 'b')): expected tuple[float, float]"),
        ("critic_pretrain", 3, "critic_pretrain=3): expected str | None"),
        ("engine_type", 3, "engine_type=3): expected Literal['vllm', 'sglang', 'transformers']"),
        ("advantage_estimator", None, "advantage_estimator=None): expected str"),
    ],
)
def test_wrong_type_is_refused_and_quoted(field, value, message):
    with pytest.raises(TypeError) as error:
        StrategyConfig(**{field: value})
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("zero_stage", 4, "1, 2 or 3"),
        ("zero_stage", 0, "1, 2 or 3"),
        ("seed", -1, "0 or more"),
        ("micro_train_batch_size", 0, "at least 1"),
        ("train_batch_size", -8, "at least 1"),
        ("zpg", 0, "at least 1"),
        ("sp_size", 0, "at least 1"),
        ("engine_tp_size", 0, "at least 1"),
        ("micro_rollout_batch_size", 0, "at least 1"),
        ("n_samples_per_prompt", 0, "at least 1"),
        ("overlong_buffer_len", 0, "at least 1"),
        ("overlong_buffer_penalty_factor", -1.0, "0 or more"),
        ("actor_learning_rate", -1e-5, "0 or more"),
        ("critic_learning_rate", -1e-5, "0 or more"),
        ("l2", -0.1, "0 or more"),
        ("advantage_clip", -1.0, "0 or more"),
        ("reward_clip", -1.0, "0 or more"),
        ("adam_betas", (0.9, 1.0), "two numbers in [0, 1)"),
        ("lr_warmup_ratio", 1.5, "between 0 and 1"),
        ("grad_accum_dtype", "fp8", "fp32, bf16, fp16 or None"),
    ],
)
def test_out_of_range_is_refused_and_quoted(field, value, allowed):
    with pytest.raises(ValueError) as error:
        StrategyConfig(**{field: value})
    assert str(error.value) == f"StrategyConfig({field}={value!r}): must be {allowed}"


@pytest.mark.parametrize("field, value", [("max_norm", 0), ("max_norm", -1), ("plot_every", -1), ("local_rank", 7)])
def test_values_with_a_meaning_of_their_own_are_allowed(field, value):
    assert getattr(StrategyConfig(**{field: value}), field) == value


def test_numbers_are_converted_where_that_is_safe():
    config = StrategyConfig(max_norm=1, adam_betas=[0, 0.5])
    assert (config.max_norm, config.adam_betas) == (1.0, (0.0, 0.5))
    assert isinstance(config.max_norm, float) and isinstance(config.adam_betas, tuple)


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"engine_type": "vlm"}, ["engine_type", "'vlm'", "Did you mean 'vllm'?"]),
        ({"kl_estimator": "k4"}, ["kl_estimator", "'k4'", "'k1', 'k2', 'k3'"]),
        ({"advantage_estimator": "grup_norm"}, ["advantage_estimator", "'grup_norm'", "Did you mean 'group_norm'?"]),
        ({"fsdp": True, "zero_stage": 3}, ["fsdp=True", "zero_stage=3", "Leave zero_stage out"]),
        ({"fsdp_cpu_offload": True}, ["fsdp_cpu_offload=True", "needs fsdp=True", "adam_offload"]),
        ({"reward_running_norm_minus_mean": True}, ["reward_running_norm_minus_mean=True", "reward_running_norm=True"]),
        ({"advantages_norm": True}, ["advantages_norm=True", "'group_norm'", "normalises twice"]),
    ],
)
def test_wrong_names_and_combinations(kwargs, words):
    with pytest.raises(ValueError) as error:
        StrategyConfig(**kwargs)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_an_estimator_of_the_users_own_is_known():
    from lightrft_lightning.algorithms import ADVANTAGES

    ADVANTAGES.register("test_config_mine")(lambda inputs: None)
    assert StrategyConfig(advantage_estimator="test_config_mine").advantage_estimator == "test_config_mine"


def test_unknown_field_names_the_nearest_one():
    with pytest.raises(TypeError, match=r"unknown StrategyConfig field 'max_nrom'.* mean 'max_norm'"):
        StrategyConfig(max_nrom=1.0)


def test_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        StrategyConfig().seed = 1  # type: ignore[misc]


# -------------------------------------------------------------------- from_args


class Slots:
    __slots__ = ("max_norm", "mine")

    def __init__(self):
        self.max_norm, self.mine = 0.5, "extra"


class ClassAttributes:
    max_norm = 0.5
    mine = "extra"


class WithProperty:
    mine = "extra"

    @property
    def max_norm(self):
        return 0.5


SOURCES = {
    "Namespace": argparse.Namespace(max_norm=0.5, mine="extra"),
    "SimpleNamespace": SimpleNamespace(max_norm=0.5, mine="extra"),
    "dict": {"max_norm": 0.5, "mine": "extra"},
    "class attributes": ClassAttributes(),
    "the class itself": ClassAttributes,
    "slots": Slots(),
    "property": WithProperty(),
}


@pytest.mark.parametrize("args", SOURCES.values(), ids=SOURCES.keys())
def test_from_args(args):
    config = StrategyConfig.from_args(args)
    assert dataclasses.asdict(config) == {**FIELDS, "max_norm": 0.5}
    assert config.get_extra_arg("mine") == "extra"
    assert config.get_extra_arg("absent") is None
    assert config.get_extra_arg("absent", 7) == 7
    assert config.args is args
    assert config.is_set("max_norm") and not config.is_set("seed")


def test_from_args_of_a_config_is_that_config():
    config = StrategyConfig(max_norm=0.5)
    assert StrategyConfig.from_args(config) is config


def test_none_from_argparse_means_not_given():
    parser = argparse.ArgumentParser()
    parser.add_argument("--max_norm", type=float)
    parser.add_argument("--critic_pretrain")
    parser.add_argument("--adam_betas", type=float, nargs=2)
    config = StrategyConfig.from_args(parser.parse_args(["--adam_betas", "0.8", "0.9"]))
    assert (config.max_norm, config.critic_pretrain, config.adam_betas) == (1.0, None, (0.8, 0.9))
    assert not config.is_set("max_norm")


def test_from_args_checks_values():
    with pytest.raises(ValueError, match="zero_stage=4"):
        StrategyConfig.from_args({"zero_stage": 4})


@pytest.mark.parametrize("args", ["lightrft_fake", 3, ["max_norm"], ("max_norm", 1)])
def test_from_args_refuses_what_has_no_fields(args):
    with pytest.raises(TypeError) as error:
        StrategyConfig.from_args(args)
    assert repr(args) in str(error.value)


def test_methods_are_no_extra_arguments():
    assert StrategyConfig().get_extra_arg("replace", "absent") == "absent"
    assert StrategyConfig.from_args({}).get_extra_arg("keys", "absent") == "absent"


# -------------------------------------------------------------------- replace, copies, summary, dtype


def test_is_set_tells_given_defaults_from_ungiven_ones():
    config = StrategyConfig(7, bf16=True)
    assert config.is_set("seed") and config.is_set("bf16")  # positional, and equal to its default
    assert not config.is_set("max_norm") and config.is_set("max_norm", "bf16")


def test_replace_is_checked_and_keeps_extras_and_what_was_explicit():
    original = StrategyConfig.from_args({"bf16": True, "mine": 1})
    changed = original.replace(max_norm=0.5)
    assert (changed.max_norm, original.max_norm) == (0.5, 1.0)
    assert changed.is_set("bf16") and changed.is_set("max_norm") and not changed.is_set("seed")
    assert changed.get_extra_arg("mine") == 1 and changed.args is original.args
    with pytest.raises(ValueError, match="zero_stage=5"):
        original.replace(zero_stage=5)
    with pytest.raises(TypeError, match="Did you mean 'max_norm'"):
        original.replace(max_nom=1)


@pytest.mark.parametrize("make", [copy.copy, copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))])
def test_copies(make):
    config = StrategyConfig.from_args(SimpleNamespace(max_norm=0.5, mine=[1])).replace(seed=3)
    twin = make(config)
    assert twin == config and twin is not config
    assert twin.is_set("max_norm", "seed") and not twin.is_set("bf16")
    assert twin.get_extra_arg("mine") == [1]


@pytest.mark.parametrize("make", [copy.copy, copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))])
def test_copies_of_a_config_without_args(make):
    twin = make(StrategyConfig(max_norm=0.5))
    assert twin.get_extra_arg("summary", "absent") == "absent"
    assert twin.replace(seed=1).get_extra_arg("summary", "absent") == "absent"


def test_summary_lists_what_differs():
    assert StrategyConfig().summary() == "StrategyConfig, 0 of 48 fields differ from the defaults:"
    config = StrategyConfig.from_args({"max_norm": 0.5, "seed": 42, "mine": "x"})
    assert config.summary().splitlines() == [
        "StrategyConfig, 1 of 48 fields differ from the defaults:",
        "  max_norm = 0.5 (default 1.0)",
        "  mine = 'x' (extra)",
    ]
    assert "__module__" not in StrategyConfig.from_args(ClassAttributes).summary()


def test_bf16_applies_to_a_cpu_only_when_asked_for():
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert StrategyConfig().compute_dtype(cpu) == torch.float32
    assert StrategyConfig(bf16=True).compute_dtype(cpu) == torch.bfloat16
    assert StrategyConfig().compute_dtype(gpu) == torch.bfloat16
    assert StrategyConfig(bf16=False).compute_dtype(gpu) == torch.float32


@pytest.mark.parametrize("field", [{"sp_size": 2}, {"use_mp_opt": True}])
def test_what_no_back_end_has_is_refused(field):
    with pytest.raises(ValueError, match=f"{next(iter(field))}=.*no back end of this package has it"):
        StrategyConfig(**field)
