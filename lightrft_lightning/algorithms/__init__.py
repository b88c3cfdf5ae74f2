"""Algorithms as pure functions on typed inputs, in tables that users extend with ``@TABLE.register("name")``."""

from lightrft_lightning.algorithms._options import check_options
from lightrft_lightning.algorithms.advantages import (
    ADVANTAGES,
    AdvantageInputs,
    Advantages,
    advantages,
    compares_groups,
    needs_critic,
    normalises,
)
from lightrft_lightning.algorithms.corrections import CORRECTIONS, importance_weights, mismatch_metrics
from lightrft_lightning.algorithms.kl import KL_ESTIMATORS, adapted_kl_coef, kl_penalty
from lightrft_lightning.algorithms.losses import (
    AGGREGATIONS,
    POLICY_LOSSES,
    BatchTotals,
    PolicyLoss,
    PolicyTokens,
    TokenObjective,
    aggregation_weights,
    policy_loss,
    summarize,
    value_loss,
)
from lightrft_lightning.algorithms.presets import PRESET_SETTINGS, PRESETS, resolve
from lightrft_lightning.algorithms.shaping import RunningMoments, entropy_threshold, overlong_penalty, whitened

__all__ = [
    "ADVANTAGES",
    "AGGREGATIONS",
    "CORRECTIONS",
    "KL_ESTIMATORS",
    "POLICY_LOSSES",
    "PRESETS",
    "PRESET_SETTINGS",
    "AdvantageInputs",
    "Advantages",
    "BatchTotals",
    "PolicyLoss",
    "PolicyTokens",
    "RunningMoments",
    "TokenObjective",
    "adapted_kl_coef",
    "advantages",
    "aggregation_weights",
    "check_options",
    "compares_groups",
    "entropy_threshold",
    "importance_weights",
    "kl_penalty",
    "mismatch_metrics",
    "needs_critic",
    "normalises",
    "overlong_penalty",
    "policy_loss",
    "resolve",
    "summarize",
    "value_loss",
    "whitened",
]
