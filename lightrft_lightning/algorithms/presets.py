"""Published algorithms by name: which estimator, loss and aggregation they put together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightrft_lightning._registry import Registry

PRESETS: Registry[Mapping[str, Any]] = Registry("algorithm")
"""Name → arguments of `RLHFModule`; whatever is left out has its default."""

PRESET_SETTINGS: dict[str, Any] = {
    "advantage_estimator": "group_norm",
    "advantage_options": {},
    "policy_loss": "ppo",
    "policy_loss_options": {},
    "aggregation": "token_mean",
    "kl_coef": 0.0,
    "kl_estimator": "k3",
    "kl_in": "loss",
    "advantage_norm": False,
    "critic": None,
    "dynamic_sampling": False,
}
"""What a preset may set, and what holds without one."""

_GROUP = {"advantage_estimator": "group_norm"}
_PUBLISHED: dict[str, dict[str, Any]] = {
    # arXiv 2402.03300: mean over the tokens of each completion, and a KL penalty in the loss
    "grpo": {**_GROUP, "policy_loss": "ppo", "aggregation": "sequence_mean", "kl_coef": 0.04},
    # arXiv 2503.14476: clip-higher, every token the same weight, dynamic sampling, no KL penalty
    "dapo": {
        **_GROUP,
        "policy_loss": "ppo",
        "policy_loss_options": {"clip_high": 0.28},
        "aggregation": "token_mean",
        "dynamic_sampling": True,
    },
    # arXiv 2503.20783: neither the length nor the spread of a group is divided by
    "dr_grpo": {"advantage_estimator": "dr_grpo", "policy_loss": "ppo", "aggregation": "sequence_sum_constant"},
    # arXiv 2507.18071
    "gspo": {**_GROUP, "policy_loss": "gspo", "aggregation": "sequence_mean"},
    # arXiv 2507.20673
    "gmpo": {**_GROUP, "policy_loss": "gmpo", "aggregation": "sequence_mean"},
    # arXiv 2506.13585
    "cispo": {**_GROUP, "policy_loss": "cispo", "aggregation": "token_mean"},
    # arXiv 2511.20347
    "sapo": {**_GROUP, "policy_loss": "sapo", "aggregation": "sequence_mean"},
    # arXiv 2505.12504
    "cpgd": {"advantage_estimator": "cpgd", "policy_loss": "cpgd", "aggregation": "token_mean"},
    # arXiv 2402.14740: the gradient of the whole sequence's log-probability
    "rloo": {"advantage_estimator": "rloo", "policy_loss": "reinforce", "aggregation": "sequence_sum_constant"},
    # arXiv 2501.03262: a KL penalty in the reward of every token
    "reinforce_plus_plus": {
        "advantage_estimator": "reinforce_plus_plus",
        "policy_loss": "ppo",
        "kl_coef": 1e-3,
        "kl_estimator": "k1",
        "kl_in": "reward",
    },
    # arXiv 2501.03262, its variant for several completions a prompt, with the KL penalty in the loss
    "reinforce_baseline": {
        "advantage_estimator": "reinforce_baseline",
        "policy_loss": "ppo",
        "kl_coef": 1e-3,
        "kl_estimator": "k2",
    },
    # arXiv 1707.06347 with 1506.02438; the values of lambda and of the clips are those of 2203.02155 and 1909.08593
    "ppo": {
        "advantage_estimator": "gae",
        "advantage_options": {"gamma": 1.0, "lam": 0.95},
        "policy_loss": "ppo",
        "advantage_norm": True,
        "critic": {},
    },
    # Williams, 1992
    "reinforce": {
        "advantage_estimator": "reinforce",
        "advantage_options": {"baseline": True},
        "policy_loss": "reinforce",
    },
}
for _name, _settings in _PUBLISHED.items():
    PRESETS.register(_name)(_settings)


def resolve(algorithm: str | None, given: Mapping[str, Any]) -> dict[str, Any]:
    """All settings of `PRESET_SETTINGS`, as the preset and the user have them.

    Args:
        algorithm: name in `PRESETS`; None: none.
        given: the user's own settings, which win; None: not given.

    Raises:
        ValueError: no such algorithm, or it sets something that no preset may set.
    """
    preset = {} if algorithm is None else dict(PRESETS[algorithm])
    if unknown := sorted(set(preset) - set(PRESET_SETTINGS)):
        allowed = ", ".join(PRESET_SETTINGS)
        raise ValueError(f"algorithm={algorithm!r} sets {', '.join(unknown)}; a preset may set {allowed}")
    own = {name: value for name, value in given.items() if value is not None}
    for kind, options in (("advantage_estimator", "advantage_options"), ("policy_loss", "policy_loss_options")):
        if own.get(kind, preset.get(kind)) != preset.get(kind):
            preset.pop(options, None)  # they are another one's
    return {**PRESET_SETTINGS, **preset, **own}
