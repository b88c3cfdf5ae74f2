"""Mixtures of experts in vLLM's workers: where an expert's tensor is in the fused weights, and what it is there now."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightrft_lightning.engines.weight_sync import Part, digest


class Place(NamedTuple):
    """Where a checkpoint's tensor goes: a part of a fused weight.

    Attributes:
        module: vLLM's layer with the weights of all experts.
        attribute: ``w13_weight``, ``w2_weight`` or a bias.
        expert: its number among those of this process, -1 if another one has it.
        shard: ``w1``, ``w2`` or ``w3``.
    """

    module: Any
    attribute: str
    expert: int
    shard: str


def find(model: nn.Module, name: str) -> Place | None:
    """The place of a tensor of a single expert, by its name in vLLM; None if there is no such one."""
    path, dot, rest = name.rpartition(".experts.")
    routed = routed_experts(model, f"{path}.experts") if dot else None
    key, _, last = f"experts.{rest}".rpartition(".")
    entry = None if routed is None else _entries(routed).get(f"{key}.")
    if routed is None or entry is None:
        return None
    prefix, expert, shard = entry
    attribute = prefix.removeprefix("experts.") + last
    return Place(routed, attribute, routed._map_global_expert_id_to_local_expert_id(expert), shard)


def routed_experts(model: nn.Module, path: str) -> Any:
    """The layer with the weights of all experts of a block, which vLLM puts below the name that they have in files."""
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

    try:
        inside = model.get_submodule(path)
    except AttributeError:
        return None
    inside = getattr(inside, "routed_experts", inside)
    return inside if isinstance(inside, RoutedExperts) else None


def count(module: Any, attribute: str) -> int:
    """Of how many tensors of single experts a fused weight consists."""
    local = module.local_num_experts
    return int(local) * (2 if attribute.startswith("w13") and module.moe_config.is_act_and_mul else 1)


def _entries(routed: Any) -> dict[str, tuple[str, int, str]]:
    """For the beginning of a name in files: that of the fused weight's, the expert and the shard."""
    if not hasattr(routed, "_lightrft_entries"):
        routed._lightrft_entries = {
            name: (prefix, expert, shard) for prefix, name, expert, shard in reversed(routed.get_expert_mapping())
        }
    found: dict[str, tuple[str, int, str]] = routed._lightrft_entries
    return found


def read(place: Place, first: int, step: int) -> list[Part] | None:
    """The wanted columns of this process's part of an expert's tensor; None if they cannot be told."""
    config = place.module.moe_config
    weights = getattr(place.module, place.attribute)
    if place.attribute not in ("w13_weight", "w2_weight") or (unpack := _unpacking(place.module)) is None:
        return None
    if place.expert < 0:
        return []
    inner, rank = config.intermediate_size_per_partition_unpadded, config.moe_parallel_config.tp_rank
    values = unpack(weights[place.expert])[:, : config.hidden_dim_unpadded if place.shard != "w2" else inner]
    if place.shard == "w2":
        rows, begin = (0, config.hidden_dim_unpadded), rank * inner
    else:
        start = values.shape[0] // 2 if place.shard == "w3" else 0
        values, rows, begin = values[start : start + inner], (rank * inner, (rank + 1) * inner), 0
    values = values[: rows[1] - rows[0]]
    columns = [c - begin for c in range(first, begin + values.shape[1], step) if c >= begin]
    return [Part(rows, (begin, begin + values.shape[1]), digest(values[:, columns]))]


def _unpacking(module: Any) -> Any:
    """A function that gives an expert's weights in rows and columns, from the form that the kernel computes with."""
    from vllm.model_executor.layers.fused_moe.oracle.unquantized import UnquantizedMoeBackend
    from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod

    method = module.quant_method
    if not isinstance(method, UnquantizedFusedMoEMethod) or method.moe_kernel is None:
        return None
    if method.unquantized_backend == UnquantizedMoeBackend.TRITON:
        return lambda weights: weights
    experts: Any = method.moe_kernel.fused_experts
    if method.unquantized_backend != UnquantizedMoeBackend.CPU or experts._use_zentorch:
        return None
    return lambda weights: _in_order(weights, experts.isa)


def _in_order(packed: Tensor, isa: str) -> Tensor:
    plain = torch.empty_like(packed).flatten()
    plain[_packed_order(tuple(packed.shape), packed.dtype, isa)] = packed.flatten()
    return plain.view_as(packed)


@functools.lru_cache(maxsize=8)
def _packed_order(shape: tuple[int, int], dtype: torch.dtype, isa: str) -> Tensor:
    """For each place in packed weights the place of the same number in rows and columns, by packing places."""
    from vllm._custom_ops import cpu_prepack_moe_weight

    places = torch.arange(shape[0] * shape[1])
    order = torch.zeros_like(places)
    for bits in range(0, places.numel().bit_length(), 8):  # each of these numbers is exact in bfloat16 too
        digits = (places >> bits & 255).to(dtype).view(1, *shape)
        order |= cpu_prepack_moe_weight(digits, isa).flatten().long() << bits
    return order


def pack_again(model: nn.Module) -> None:
    """Let each update pack the weights for the kernel; on a CPU vLLM does so for the first ones only.

    Later ones would be copied as they are to where the kernel expects packed ones.
    """
    from vllm.model_executor.layers.fused_moe.oracle.unquantized import UnquantizedMoeBackend
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
    from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod

    for module in model.modules():
        method = module.quant_method if isinstance(module, RoutedExperts) else None
        if isinstance(method, UnquantizedFusedMoEMethod) and method.unquantized_backend == UnquantizedMoeBackend.CPU:
            method.moe_kernel = None
