"""Algorithms by name."""

from __future__ import annotations

import inspect
from typing import Any

import pytest

from lightrft_lightning import RLHFModule
from lightrft_lightning.algorithms import (
    ADVANTAGES,
    AGGREGATIONS,
    KL_ESTIMATORS,
    POLICY_LOSSES,
    PRESET_SETTINGS,
    PRESETS,
    check_options,
    resolve,
)
from lightrft_lightning.critic import as_critic


def reward(completion: str) -> float:
    return float(len(completion))


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_every_preset_names_what_exists(name: str) -> None:
    settings = resolve(name, {})
    estimator, loss = ADVANTAGES[settings["advantage_estimator"]], POLICY_LOSSES[settings["policy_loss"]]
    check_options("advantage estimator", name, estimator, settings["advantage_options"])
    check_options("policy loss", name, loss, settings["policy_loss_options"])
    assert settings["aggregation"] in AGGREGATIONS and settings["kl_estimator"] in KL_ESTIMATORS
    module = RLHFModule("any", reward, algorithm=name)
    assert module.critic_settings == as_critic(settings.pop("critic"))
    assert {setting: getattr(module, setting) for setting in settings} == settings


def test_every_estimator_and_loss_has_a_preset() -> None:
    settings = [resolve(name, {}) for name in PRESETS]
    assert {s["policy_loss"] for s in settings} == {n for n in POLICY_LOSSES if not n.startswith("test_")}
    assert {s["advantage_estimator"] for s in settings} == {n for n in ADVANTAGES if not n.startswith("test_")}


def test_without_one_the_defaults_hold() -> None:
    assert resolve(None, {"policy_loss": None}) == PRESET_SETTINGS
    parameters = inspect.signature(RLHFModule).parameters
    assert all(parameters[name].default is None for name in PRESET_SETTINGS)


def test_what_the_user_sets_wins() -> None:
    settings = resolve("dapo", {"aggregation": "sequence_mean", "policy_loss_options": {"clip_high": 0.5}})
    assert settings["aggregation"] == "sequence_mean" and settings["policy_loss_options"] == {"clip_high": 0.5}
    assert resolve("grpo", {"kl_coef": 0.0})["kl_coef"] == 0


def test_options_of_a_loss_that_was_replaced_are_not_kept() -> None:
    assert resolve("dapo", {"policy_loss": "sapo"})["policy_loss_options"] == {}
    assert resolve("reinforce", {"advantage_estimator": "rloo"})["advantage_options"] == {}


def test_an_unknown_name_and_a_preset_that_sets_too_much() -> None:
    with pytest.raises(ValueError, match=r"unknown algorithm 'dappo'. Did you mean 'dapo'"):
        RLHFModule("any", reward, algorithm="dappo")

    settings: dict[str, Any] = {"lr": 1.0}
    PRESETS.register("test_too_much", override=True)(settings)
    try:
        with pytest.raises(ValueError, match="algorithm='test_too_much' sets lr; a preset may set advantage_estimator"):
            resolve("test_too_much", {})
    finally:
        del PRESETS._entries["test_too_much"]
