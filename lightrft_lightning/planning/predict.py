"""Memory of a rank in each phase of an iteration, and the work of each.

Activations come from `passes`. What strategies and optimizers keep is added up from the numbers of parameters; the
comments say why each term is there.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lightrft_lightning._errors import import_extra
from lightrft_lightning.config import StrategyConfig
from lightrft_lightning.experience.balance import flops
from lightrft_lightning.experience.packing import PackedBatch, pack
from lightrft_lightning.experience.trajectory import Completion, Prompt, Trajectory
from lightrft_lightning.models.loading import load_config
from lightrft_lightning.models.logprobs import completion_logprobs
from lightrft_lightning.models.remote_code import code_refused
from lightrft_lightning.models.scalar import completion_values
from lightrft_lightning.planning.machine import UNKNOWN, Machine, process_bytes
from lightrft_lightning.planning.passes import Passes, Sizes, passes_of, sizes_of
from lightrft_lightning.planning.settings import PRECISIONS, Planned
from lightrft_lightning.strategies.deepspeed import DeepspeedStrategy
from lightrft_lightning.strategies.factory import get_strategy
from lightrft_lightning.strategies.fsdp import FSDPV2Strategy

_SHARE = 0.6
"""Of the matrix product's FLOP/s, what the passes of a training run reach, about."""


@dataclass(frozen=True)
class Phase:
    """One part of an iteration.

    Attributes:
        name: ``rollout``, ``scoring``, ``training``, ``step`` or ``sync`` (an engine that gets weights).
        parts: bytes on one rank while it needs the most, by what they are for.
        flops: that one rank computes.
        read: bytes of weights and cache that it reads for single tokens, which takes longer than computing them.
    """

    name: str
    parts: Mapping[str, float]
    flops: float = 0.0
    read: float = 0.0

    @property
    def total(self) -> float:
        """Bytes."""
        return sum(self.parts.values())


@dataclass(frozen=True)
class Plan:
    """What a run needs; see `predict`.

    Attributes:
        planned: the run.
        phases: of an iteration.
        machine: what it would run on.
    """

    planned: Planned
    phases: Sequence[Phase]
    machine: Machine

    @property
    def peak(self) -> float:
        """Bytes of a rank in the phase that needs the most."""
        return max(phase.total for phase in self.phases)

    @property
    def fits(self) -> bool | None:
        """Whether the memory suffices; None: not known."""
        return None if self.machine.memory is None else self.peak <= self.machine.memory

    def seconds(self, phase: Phase) -> float | None:
        """About how long a phase takes; None: not known."""
        if self.machine.flops is None or self.machine.bandwidth is None:
            return None
        return phase.flops / (_SHARE * self.machine.flops) + phase.read / self.machine.bandwidth

    def summary(self) -> str:
        """A table of the phases, and a sentence on whether it fits."""
        columns = [name for name in self.phases[0].parts if any(phase.parts[name] for phase in self.phases)]
        rows = [["GB of a rank", *columns, "together", "time"]]
        for phase in self.phases:
            seconds = self.seconds(phase)
            time = "" if seconds is None or not phase.flops else f"{seconds:.3g} s"
            rows.append(
                [phase.name, *(f"{phase.parts[c] / 1e9:.2f}" for c in columns), f"{phase.total / 1e9:.2f}", time]
            )
        widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
        lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
        return "\n".join([*lines, "", self._verdict()])

    def _verdict(self) -> str:
        worst = max(self.phases, key=lambda phase: phase.total)
        needed = f"{self.peak / 1e9:.2f} GB in the phase {worst.name!r}"
        if self.machine.memory is None:
            return f"It needs {needed}. Say with --memory_gb what there is."
        there = f"of {self.machine.memory / 1e9:.2f} GB"
        return f"It fits: it needs {needed}, {there}." if self.fits else f"It does NOT fit: it needs {needed}, {there}."


def predict(planned: Planned, machine: Machine = UNKNOWN) -> Plan:
    """Memory and work of each phase of an iteration, on one rank.

    All prompts and completions are taken to be as long as they may be. Not counted are what a GPU's context and
    communication buffers take, and what an allocator keeps without using it.

    Raises:
        FileNotFoundError: no such model.
    """
    batch, count = _largest_pass(planned)
    base = process_bytes(planned) if planned.accelerator == "cpu" else 0.0
    # The fake strategy computes in low precision by autocast, from weights in fp32.
    dtype = PRECISIONS[planned.precision] if planned.strategy != "lightrft_fake" else torch.float32
    policy = on_meta(planned, dtype)
    config: Any = policy.config
    critic = _critic_on_meta(config, dtype) if planned.critic else None
    sizes = sizes_of(policy)
    policy_passes = passes_of(planned, policy, batch, lambda model, b: completion_logprobs(model, b).logprobs)
    trained = [_under_strategy(planned, sizes, policy_passes, count)]
    if critic is not None:
        values = passes_of(planned, critic, batch, completion_values)
        trained.append(_under_strategy(planned, sizes_of(critic), values, count))
    reference = planned.kl_coef > 0 and not planned.lora_rank  # of adapters the starting values are in CPU memory
    frozen = [_under_strategy(planned, sizes, policy_passes, count, frozen=True)] if reference else []

    engine = _Engine.of(planned, config, sizes)
    always = {
        "process": base,
        "weights": trained[0].weights,
        "optimizer": trained[0].optimizer,
        "other models": sum(m.weights + m.optimizer for m in [*trained[1:], *frozen]),
        "engine": 0.0 if planned.engine_sleeps else engine.held,
    }
    whole = trained[0].whole if planned.engine == "transformers" else 0.0
    scored = max(m.gathered + m.scoring for m in [*trained, *frozen])
    learnt = max(m.gathered + m.training for m in trained)

    needs = {
        "rollout": {"engine": engine.held, "passes": whole + engine.needed},
        "scoring": {"passes": scored},
        "training": {"passes": learnt},
        "step": {"passes": max(m.step for m in trained)},
    }
    if planned.offload != "none" and planned.accelerator == "gpu":
        weights = 0.0 if planned.offload == "all" else 1.0
        needs["rollout"] |= {
            "weights": weights * trained[0].weights,
            "optimizer": 0.0,
            "other models": weights * sum(m.weights for m in [*trained[1:], *frozen]),
        }
        if planned.engine in ("vllm", "sglang"):
            needs["sync"] = {"engine": engine.held, "passes": 0.0}
    work = _work(planned, config, sizes, engine)
    phases = [Phase(name, always | parts, *work[name]) for name, parts in needs.items() if name in work]
    return Plan(planned, tuple(phases), machine)


def _work(planned: Planned, config: Any, sizes: Sizes, engine: _Engine) -> dict[str, tuple[float, float]]:
    """FLOPs and bytes read of each phase that there is."""
    text = config.get_text_config()
    length = planned.prompt_tokens + planned.n * planned.completion_tokens
    update = float(planned.prompts * flops([length], sizes.all, text.num_hidden_layers * text.hidden_size))
    sampled = planned.prompts * (planned.prompt_tokens + planned.n * planned.completion_tokens)
    weights = (4 if planned.precision == "32-true" else 2) * sizes.all
    # Each step reads all weights, and a cache that is half full on average.
    read = planned.completion_tokens * (weights + engine.cache / 2)
    elsewhere = planned.engine == "remote"
    work = {"rollout": (0.0, 0.0) if elsewhere else (2.0 * sizes.all * sampled, read)}
    scorings = (planned.steps > 1) + (planned.kl_coef > 0) + planned.critic
    if scorings:
        work["scoring"] = (update / 3 * scorings, 0.0)  # forward alone
    return work | {"training": (update * (1 + planned.critic), 0.0), "step": (0.0, 0.0), "sync": (0.0, 0.0)}


def _critic_on_meta(config: Any, dtype: torch.dtype) -> nn.Module:
    auto = import_extra("transformers", "hf").AutoModelForSequenceClassification
    config = copy.deepcopy(config)
    config.num_labels, config.pad_token_id = 1, 0
    with torch.device("meta"):
        model: nn.Module = auto.from_config(config, dtype=dtype, attn_implementation="sdpa", trust_remote_code=False)
    return model.train()


def alternatives(plan: Plan, most: int = 3) -> Iterator[tuple[str, Plan]]:
    """Changes of one or two settings with which the run would fit, each predicted anew; at most `most`."""
    planned, found = plan.planned, 0
    for changes in _changes(planned):
        other = predict(dataclasses.replace(planned, **changes), plan.machine)
        if other.fits:
            yield ", ".join(f"{name}={value}" for name, value in changes.items()), other
            found += 1
        if found == most:
            return


def _changes(planned: Planned) -> Iterator[dict[str, Any]]:
    """What costs little first."""
    single: list[dict[str, Any]] = []
    if planned.engine in ("vllm", "sglang") and not planned.engine_sleeps:
        single.append({"engine_sleeps": True})
    smaller = max(planned.token_budget // 4, planned.prompt_tokens + planned.completion_tokens)
    if smaller < planned.token_budget:
        single.append({"token_budget": smaller})
    if not planned.gradient_checkpointing:
        single.append({"gradient_checkpointing": True})
    if planned.offload == "none" and planned.accelerator == "gpu":
        single.append({"offload": "optimizer" if planned.engine == "transformers" else "all"})
    if not planned.adam_8bit:
        single.append({"adam_8bit": True})
    more: dict[str, Any] = {"gpus": 2 * planned.gpus}
    if planned.strategy == "lightrft_fake":
        more = {"strategy": "lightrft_fsdp", **more}
    elif not planned.strategy.endswith("_offload") and planned.accelerator == "gpu":
        single.append({"strategy": f"{planned.strategy}_offload"})
    single.append(more)
    if not planned.lora_rank:
        single.append({"lora_rank": 16})
    yield from single
    for k, change in enumerate(single):
        for other in single[k + 1 :]:
            if not change.keys() & other.keys():
                yield change | other


# -------------------------------------------------------------------- the model and the passes


def build(planned: Planned, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The model that is trained, from its config, with random weights."""
    transformers = import_extra("transformers", "hf")
    source = planned.model
    if not isinstance(source, transformers.PretrainedConfig):
        source = load_config(source)
    auto = transformers.AutoModelForCausalLM
    with code_refused(source.name_or_path or planned.model):
        model = auto.from_config(source, dtype=dtype, attn_implementation="sdpa", trust_remote_code=False)
    if planned.lora_rank:
        peft = import_extra("peft", "hf")
        model = peft.get_peft_model(model, peft.LoraConfig(r=planned.lora_rank, target_modules="all-linear"))
    return model


def on_meta(planned: Planned, dtype: torch.dtype) -> nn.Module:
    """The model that is trained, without memory."""
    with torch.device("meta"):
        return build(planned, dtype).train()


def _trajectories(planned: Planned, groups: int) -> list[Trajectory]:
    """Groups of the longest prompts and completions."""
    prompt = Prompt((1,) * planned.prompt_tokens, "")
    length = planned.completion_tokens
    completion = Completion((1,) * length, (0.0,) * length, "length")
    return [Trajectory(prompt, completion, group) for group in range(groups) for _ in range(planned.n)]


def _largest_pass(planned: Planned) -> tuple[PackedBatch, int]:
    """The pass with the most tokens, and how many passes an optimizer step has."""
    groups = max(1, planned.prompts // planned.steps)
    length = planned.prompt_tokens + planned.n * planned.completion_tokens
    few = min(groups, planned.token_budget // length + 1)  # what fills a pass, without packing all
    batches = pack(_trajectories(planned, few), planned.token_budget, share_prompts=planned.share_prompts)
    largest = max(batches, key=lambda b: (b.input_ids.numel(), b.input_ids.shape[1]))
    return largest, math.ceil(groups * len(batches) / few)


# -------------------------------------------------------------------- what is kept


@dataclass(frozen=True)
class _Model:
    """One model under a strategy: bytes on one rank, by when they are there."""

    weights: float
    optimizer: float
    gathered: float
    """During a pass, of weights that are sharded otherwise."""
    whole: float
    """While all weights are gathered, for generation."""
    scoring: float
    training: float
    """Activations and gradients at the worst moment of a pass."""
    step: float
    """Gradients and temporary tensors of the optimizer's step."""


def _under_strategy(planned: Planned, sizes: Sizes, passes: Passes, count: int, frozen: bool = False) -> _Model:
    strategy: Any = get_strategy(planned.strategy)
    moments = _MOMENTS_8BIT if planned.adam_8bit else 8
    if planned.quantization is not None:
        # To compute with them a layer's weights are made whole for a moment.
        whole = 4.0 * sizes.largest_adapted
        passes = Passes(*(value + whole for value in dataclasses.astuple(passes)))
    low = planned.precision != "32-true"
    trained = 0 if frozen else sizes.trained
    # With several passes, those of the passes before stay while one runs.
    several = passes.freed + 4 * trained
    if isinstance(strategy, FSDPV2Strategy):
        offloaded = strategy.config.fsdp_cpu_offload and planned.accelerator == "gpu"
        shard = 0 if offloaded else 1 / planned.gpus
        return _under_fsdp(sizes, passes, shard, trained, moments, count, 2 if low else 4)
    if isinstance(strategy, DeepspeedStrategy):
        return _under_zero(planned, strategy.config, sizes, passes, trained, moments)
    training = passes.first if count == 1 else several
    return _Model(_weights(planned, sizes, 4), moments * trained, 0, 0, passes.scoring, training, 4 * trained)


_MOMENTS_8BIT = 2 * (1 + 4 / 256)
"""Bytes of both moments of a weight: of 256 numbers of eight bits, one scale in fp32."""
_FOUR_BITS = 0.5 + 1 / 64 + 4 / (64 * 256)
"""Bytes of a weight of NF4: blocks of 64 have a scale of eight bits, blocks of 256 of these one in fp32."""


def _weights(planned: Planned, sizes: Sizes, size: int) -> float:
    """Bytes of all weights, if those in full precision have `size`."""
    quantized = sizes.adapted if planned.quantization is not None else 0
    return size * (sizes.all - quantized) + _FOUR_BITS * quantized


def _under_fsdp(
    sizes: Sizes, passes: Passes, shard: float, trained: int, moments: float, count: int, size: int
) -> _Model:
    # The root stays gathered through a pass. Beside a block in use there is the next one, which is being gathered, and
    # the buffer that its ranks' parts arrive in.
    gathered = size * (sizes.root + 3 * sizes.block)
    whole = size * (sizes.all + sizes.block)
    # Gradients are reduced in the last pass only; until then each rank has whole ones of its own.
    training = passes.freed + 4 * trained if count > 1 else passes.root_kept + 4 * trained * shard
    return _Model(
        weights=4 * sizes.all * shard,
        optimizer=moments * trained * shard,
        gathered=gathered,
        whole=whole,
        scoring=passes.scoring,
        training=training,
        step=4 * trained * shard,
    )


_LIVE = 10**9
"""DeepSpeed's ``stage3_max_live_parameters``: fewer than these it does not free after use."""
_BUCKET = 2 * 10**8
"""Elements of `zero_config`'s ``reduce_bucket_size`` for a model that has more."""


def _under_zero(
    planned: Planned, config: StrategyConfig, sizes: Sizes, passes: Passes, trained: int, moments: float
) -> _Model:
    size = 4 if planned.precision == "32-true" else 2
    ranks, offloaded = planned.gpus, config.adam_offload and planned.accelerator == "gpu"
    # In fp32, too, DeepSpeed steps a copy of this rank's part of the weights.
    part = 0 if offloaded else 4 * trained / ranks
    bucket = 4 * min(_BUCKET, sizes.all) if trained else 0
    if config.zero_stage < 3:
        # Stage 1 keeps whole gradients until the step, stage 2 this rank's part. The bucket is allocated for the
        # backward pass; of memory that is not written to before the gradients are, a CPU process has none resident.
        gradients = 4 * trained if config.zero_stage == 1 else part
        waiting = bucket if planned.accelerator == "gpu" else 0
        return _Model(
            weights=_weights(planned, sizes, size) + part,
            optimizer=moments / 4 * part,
            gathered=0,
            whole=0,
            scoring=passes.scoring,
            training=passes.freed + gradients + waiting,
            step=gradients + bucket + part,
        )
    # This rank's part of the gradients and the bucket are allocated once and for all.
    return _Model(
        weights=size * sizes.all / ranks + part,
        optimizer=(moments / 4 + 1) * part + bucket,
        gathered=size * min(sizes.all, _LIVE),
        whole=size * sizes.all,
        scoring=passes.scoring,
        training=passes.freed,
        step=0,
    )


@dataclass(frozen=True)
class _Engine:
    """Bytes of an engine on the same device."""

    held: float
    """Its own weights and what it keeps keys and values in."""
    needed: float
    """Beside them, for the time of a rollout."""
    cache: float
    """Keys and values of all sequences."""

    @classmethod
    def of(cls, planned: Planned, config: Any, sizes: Sizes) -> _Engine:
        text = config.get_text_config()
        heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
        width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        rows, size = planned.prompts * planned.n, 4 if planned.precision == "32-true" else 2
        layer = 2.0 * heads * width * rows * (planned.prompt_tokens + planned.completion_tokens) * size
        cache = layer * text.num_hidden_layers
        if planned.engine == "remote":
            return cls(0.0, 0.0, 0.0)
        if planned.engine != "transformers":
            return cls(size * sizes.all + cache, 0.0, cache)
        # A layer's cache is copied when a token is added. Sampling has logits, log-probabilities and probabilities in
        # fp32 and, in fp64, these and their sums.
        return cls(0.0, cache + layer + 28.0 * rows * text.vocab_size, cache)
