"""`StrategyConfig`: every setting of the strategy module, typed and checked when it is built."""

from __future__ import annotations

import dataclasses
import logging
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_type_hints

import torch

from lightrft_lightning._errors import unknown_name

log = logging.getLogger(__name__)

EngineType = Literal["vllm", "sglang", "transformers"]
KLEstimator = Literal["k1", "k2", "k3"]

# Estimators of the algorithm table (docs/algorithms.md); the registry adds users' own. Whether one is implemented is
# decided where it is used, so that a configuration can be written on a machine that only prepares jobs.
_ADVANTAGE_NAMES = (
    "group_norm",
    "dr_grpo",
    "rloo",
    "reinforce",
    "reinforce_plus_plus",
    "reinforce_baseline",
    "gae",
    "cpgd",
)
UNREAD = {
    "pretrain_data": "SupervisedWarmup trains on texts before",
    "mixed_mm_data": "images may stand in some prompts and not in others, without it",
    "micro_rollout_batch_size": "engines see for themselves how much they compute at a time",
    "plot_every": "RewardCurve(every_n=...) plots",
    "use_tensorboard": "Trainer(logger=TensorBoardLogger(...)) logs",
    "local_rank": "the launcher says it, in LOCAL_RANK",
}
"""Fields that nothing here reads, and what has their place. A script's own loop may read them."""
PARSER_DEFAULTS = {"micro_rollout_batch_size": 8, "plot_every": 10}
"""Of LightRFT's scripts, where they are not those of `StrategyConfig`."""
_OTHER_NAMES = {"reinforce++": "reinforce_plus_plus"}
"""Of estimators, in LightRFT's scripts."""


@dataclass(frozen=True)
class StrategyConfig:
    """Settings of a strategy and of the reinforcement learning around it.

    Immutable: derive a changed one with `replace`. The names and defaults are LightRFT's.

    Example:
        >>> config = StrategyConfig(max_norm=0.5, micro_train_batch_size=4, train_batch_size=8)
        >>> print(config.summary())
        StrategyConfig, 3 of 48 fields differ from the defaults:
          max_norm = 0.5 (default 1.0)
          micro_train_batch_size = 4 (default 1)
          train_batch_size = 8 (default 128)

    Raises:
        TypeError: an unknown field (the message names the nearest one) or a value of the wrong type.
        ValueError: a value out of range, or two fields that contradict each other.
    """

    # Training
    seed: int = 42
    """Seed of Python, NumPy and torch, set by `setup_distributed`."""
    max_norm: float = 1.0
    """Global gradient norm to clip to; 0 or less means no clipping."""
    micro_train_batch_size: int = 1
    """Samples of one backward pass on one rank."""
    train_batch_size: int = 128
    """Samples of one optimizer step over all ranks."""
    bf16: bool = True
    """Compute in bfloat16 (fp32 weights). Left at its default it applies to accelerators only, since CPUs emulate it;
    set explicitly it applies everywhere. Inside a `Trainer`, `Trainer(precision=...)` decides."""
    fp16: bool = False
    """Compute in float16 (fp32 weights) with a dynamic loss scale, in place of `bf16`. Likewise."""
    actor_learning_rate: float = 1e-5
    critic_learning_rate: float = 1e-5
    adam_betas: tuple[float, float] = (0.9, 0.95)
    l2: float = 0.0
    """Decoupled weight decay of AdamW; never applied to biases and norms."""
    lr_warmup_ratio: float = 0.03
    """Share of all optimizer steps in which the learning rate rises linearly."""
    use_mp_opt: bool = False

    # Back ends
    zero_stage: int = 2
    fsdp: bool = False
    fsdp_cpu_offload: bool = False
    adam_offload: bool = False
    adam_8bit: bool = False
    """`create_optimizer` makes an AdamW whose moments take 2 bytes a weight in place of 8 (bitsandbytes)."""
    zpg: int = 1
    """Ranks of one parameter-sharding group (hybrid sharding); 1 shards over all ranks."""
    grad_accum_dtype: str | None = None
    overlap_comm: bool = False
    local_rank: int = -1
    sp_size: int = 1
    heartbeat_timeout: float = 60.0
    """Seconds after which a machine or network that does not answer, or a rank that is stopped, ends the job."""

    # Checkpoints
    async_checkpoints: bool = False
    """Under a `Trainer`, copy what is saved to CPU memory and write it beside training (`save_ckpt(wait=False)`)."""

    # Engine
    engine_type: EngineType = "vllm"
    engine_tp_size: int = 1
    enable_engine_sleep: bool = False

    # Models and data
    critic_pretrain: str | None = None
    remote_rm_url: str | None = None
    pretrain_data: str | None = None
    mixed_mm_data: bool = False
    fused_linear_logprob: bool = False
    """Log-probabilities without the logits of all tokens at a time; they are computed so here in any case."""

    # Algorithm
    advantage_estimator: str = "group_norm"
    use_kl_loss: bool = False
    kl_estimator: KLEstimator = "k3"
    micro_rollout_batch_size: int = 2
    n_samples_per_prompt: int = 8
    reward_running_norm: bool = False
    reward_running_norm_minus_mean: bool = False
    advantages_norm: bool = False
    advantage_clip: float = 0.0
    """Advantages are clipped to ±this; 0 means no clipping."""
    reward_clip: float = 0.0
    """Rewards are clipped to ±this; 0 means no clipping."""
    overlong_buffer: bool = False
    overlong_buffer_len: int = 1024
    overlong_buffer_penalty_factor: float = 1.0
    dynamic_sampling: bool = False

    # Logs
    plot_every: int = -1
    use_tensorboard: str | None = None

    def __new__(cls, *args: Any, **kwargs: Any) -> StrategyConfig:
        names = [f.name for f in dataclasses.fields(cls)]
        for name in kwargs:
            if name not in names:
                raise TypeError(unknown_name("StrategyConfig field", name, names))
        self = object.__new__(cls)
        # Some defaults depend on whether the user said anything (batch sizes, bf16 on a CPU): remember what was said.
        object.__setattr__(self, "_explicit", frozenset(names[: len(args)]) | frozenset(kwargs))
        object.__setattr__(self, "_extra", {})
        object.__setattr__(self, "args", self)
        return self

    def __post_init__(self) -> None:
        self._check_types()
        estimator = _OTHER_NAMES.get(self.advantage_estimator, self.advantage_estimator)
        object.__setattr__(self, "advantage_estimator", estimator)
        self._check_ranges()

    def _check_types(self) -> None:
        for name, hint in get_type_hints(type(self)).items():
            value = _convert(getattr(self, name), hint)
            if value is _INVALID:
                plain = "a finite number" if hint is float else getattr(hint, "__name__", "")
                expected = str(hint).replace("typing.", "") if get_args(hint) else plain
                raise TypeError(f"StrategyConfig({name}={getattr(self, name)!r}): expected {expected}")
            object.__setattr__(self, name, value)

    def _check_ranges(self) -> None:
        from lightrft_lightning.algorithms import ADVANTAGES

        at_least_one = (
            "micro_train_batch_size", "train_batch_size", "zpg", "sp_size", "engine_tp_size",
            "micro_rollout_batch_size", "n_samples_per_prompt", "overlong_buffer_len",
        )  # fmt: skip
        not_negative = (
            "seed", "actor_learning_rate", "critic_learning_rate", "l2", "advantage_clip", "reward_clip",
            "overlong_buffer_penalty_factor",
        )  # fmt: skip
        for name in at_least_one:
            self._require(name, getattr(self, name) >= 1, "at least 1")
        for name in not_negative:
            self._require(name, getattr(self, name) >= 0, "0 or more")
        self._require("heartbeat_timeout", self.heartbeat_timeout >= 5, "at least 5 seconds")
        self._require("zero_stage", self.zero_stage in (1, 2, 3), "1, 2 or 3")
        self._require("adam_betas", all(0 <= b < 1 for b in self.adam_betas), "two numbers in [0, 1)")
        self._require("lr_warmup_ratio", 0 <= self.lr_warmup_ratio <= 1, "between 0 and 1")
        self._require(
            "grad_accum_dtype", self.grad_accum_dtype in (None, "fp32", "bf16", "fp16"), "fp32, bf16, fp16 or None"
        )
        for name, hint in (("engine_type", EngineType), ("kl_estimator", KLEstimator)):
            if getattr(self, name) not in get_args(hint):
                raise ValueError(unknown_name(name, getattr(self, name), get_args(hint)))
        if self.advantage_estimator not in _ADVANTAGE_NAMES and self.advantage_estimator not in ADVANTAGES:
            names = {*_ADVANTAGE_NAMES, *ADVANTAGES}
            raise ValueError(unknown_name("advantage_estimator", self.advantage_estimator, names))
        self._check_combinations()

    def _check_combinations(self) -> None:
        if self.fsdp and self.zero_stage != 2:
            raise ValueError(
                f"fsdp=True with zero_stage={self.zero_stage}: FSDP2 has no ZeRO stages. "
                "Leave zero_stage out, or set fsdp=False to use DeepSpeed"
            )
        if self.fp16 and self.bf16 and self.is_set("bf16"):
            raise ValueError("fp16=True with bf16=True: leave one out")
        for name, value in (("sp_size", self.sp_size > 1), ("use_mp_opt", self.use_mp_opt)):
            if value:
                raise ValueError(f"{name}={getattr(self, name)!r}: no back end of this package has it; leave it out")
        if self.fsdp_cpu_offload and not self.fsdp:
            raise ValueError("fsdp_cpu_offload=True needs fsdp=True (DeepSpeed's offload is adam_offload=True)")
        if self.adam_8bit and self.adam_offload:
            raise ValueError(
                "adam_8bit=True with adam_offload=True: the moments are either small or elsewhere, set one"
            )
        if self.reward_running_norm_minus_mean and not self.reward_running_norm:
            raise ValueError("reward_running_norm_minus_mean=True needs reward_running_norm=True")
        if self.advantages_norm and self.advantage_estimator in ("group_norm", "cpgd", "reinforce_plus_plus"):
            raise ValueError(
                f"advantages_norm=True with advantage_estimator={self.advantage_estimator!r} normalises twice: "
                "leave advantages_norm out"
            )

    def _require(self, name: str, ok: bool, allowed: str) -> None:
        if not ok:
            raise ValueError(f"StrategyConfig({name}={getattr(self, name)!r}): must be {allowed}")

    @classmethod
    def from_args(cls, args: Any) -> StrategyConfig:
        """Read an `argparse.Namespace`, any object with attributes, a mapping or another `StrategyConfig`.

        Parameters that are no fields are kept for `get_extra_arg`; `args` stays reachable as ``config.args``.
        None stands for "not given" where the field does not allow None, as argparse leaves it.

        Raises:
            TypeError: `args` is none of these.
        """
        if isinstance(args, StrategyConfig):
            return args
        if isinstance(args, str | bytes | int | float | list | tuple | set):
            raise TypeError(f"StrategyConfig.from_args({args!r}): expected a Namespace, a mapping or an object")
        hints = get_type_hints(cls)
        values: dict[str, Any] = {}
        for name, hint in hints.items():
            found = args.get(name, _INVALID) if isinstance(args, Mapping) else getattr(args, name, _INVALID)
            if found is not _INVALID and not (found is None and _convert(None, hint) is _INVALID):
                values[name] = found
        if values.get("fsdp") and values.get("zero_stage", 2) != 2 and not isinstance(args, Mapping):
            # Parsers of LightRFT's scripts fill both in.
            log.warning("zero_stage=%s has no meaning with fsdp=True: FSDP2 has no stages", values.pop("zero_stage"))
        config = cls(**values)
        given = args if isinstance(args, Mapping) else getattr(args, "__dict__", {})
        extra = {k: v for k, v in given.items() if k not in hints and not str(k).startswith("__")}  # of classes
        object.__setattr__(config, "_extra", extra)
        object.__setattr__(config, "args", args)
        return config

    def get_extra_arg(self, name: str, default: Any = None) -> Any:
        """A parameter of the original arguments that is no field of this class."""
        if name in self._extra:  # type: ignore[attr-defined]
            return self._extra[name]  # type: ignore[attr-defined]
        original = self.args  # type: ignore[attr-defined]
        return default if isinstance(original, StrategyConfig | Mapping) else getattr(original, name, default)

    @property
    def extra_args(self) -> dict[str, Any]:
        """The parameters of the original arguments that are no fields of this class."""
        return dict(self._extra)  # type: ignore[attr-defined]

    def print_config_summary(self) -> None:
        """Print `summary`, in the first process only."""
        if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
            print(self.summary(), flush=True)

    def tell_unread(self) -> None:
        """Refuse fields that nothing reads; of a script's own arguments, which it may read itself, say so in a line.

        Raises:
            ValueError: such a field; the message has the remedy.
        """
        for name, instead in UNREAD.items():
            value = getattr(self, name)
            usual = type(self).__dataclass_fields__[name].default, PARSER_DEFAULTS.get(name)
            if value in usual or (name == "local_rank" and str(value) == os.environ.get("LOCAL_RANK")):
                continue
            told = f"{name}={value!r}: nothing here reads it; {instead}"
            if not self.is_of_a_script:
                raise ValueError(f"{told}; leave it out")
            log.warning(told)

    @property
    def is_of_a_script(self) -> bool:
        """Whether it comes from a parser, which fills everything in, and not from single settings."""
        return not isinstance(self.args, StrategyConfig | Mapping)  # type: ignore[attr-defined]

    def is_set(self, *names: str) -> bool:
        """Whether the user gave at least one of these fields, be it with its default value."""
        return bool(self._explicit & set(names))  # type: ignore[attr-defined]

    def replace(self, **changes: Any) -> StrategyConfig:
        """A checked copy with some fields changed; what was explicit stays so, extras are kept."""
        explicit = {name: getattr(self, name) for name in self._explicit}  # type: ignore[attr-defined]
        config = type(self)(**{**explicit, **changes})
        object.__setattr__(config, "_extra", self._extra)  # type: ignore[attr-defined]
        original = self.args  # type: ignore[attr-defined]
        object.__setattr__(config, "args", config if original is self else original)
        return config

    def compute_dtype(self, device: torch.device) -> torch.dtype:
        """The dtype that a hand-written loop computes in on `device`; see the fields `bf16` and `fp16`."""
        if self.fp16:
            return torch.float16
        wants_bf16 = self.bf16 and (device.type != "cpu" or self.is_set("bf16"))
        return torch.bfloat16 if wants_bf16 else torch.float32

    def summary(self) -> str:
        """What differs from the defaults, one line a field, then the extra parameters."""
        fields = dataclasses.fields(self)
        changed = [f for f in fields if getattr(self, f.name) != f.default]
        lines = [f"StrategyConfig, {len(changed)} of {len(fields)} fields differ from the defaults:"]
        lines += [f"  {f.name} = {getattr(self, f.name)!r} (default {f.default!r})" for f in changed]
        lines += [f"  {name} = {value!r} (extra)" for name, value in sorted(self._extra.items())]  # type: ignore[attr-defined]
        return "\n".join(lines)


class _Invalid:
    """Marks a value that is absent or of the wrong type (None is a valid value of some fields)."""


_INVALID = _Invalid()


def _convert(value: Any, hint: Any) -> Any:
    """`value` as the annotated type if that is safe, else `_INVALID`."""
    if hint is bool or hint is str:
        return value if isinstance(value, hint) else _INVALID
    if hint is int:
        return value if isinstance(value, int) and not isinstance(value, bool) else _INVALID
    if hint is float:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return float(value) if number and math.isfinite(value) else _INVALID
    if hint == tuple[float, float]:
        items = [_convert(v, float) for v in value] if isinstance(value, list | tuple) else []
        return tuple(items) if len(items) == 2 and _INVALID not in items else _INVALID
    if value is None:
        return None if type(None) in get_args(hint) else _INVALID
    return value if isinstance(value, str) else _INVALID
