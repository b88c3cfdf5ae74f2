"""What runs inside vLLM's workers: puts new weights in place and tells what the layers now compute with.

vLLM mixes this class into its worker (`worker_extension_cls`), so every method is a target of `collective_rpc`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from lightrft_lightning.engines import _vllm_experts as experts
from lightrft_lightning.engines.shared_memory import take_name_away
from lightrft_lightning.engines.vllm_process import quiet_updates
from lightrft_lightning.engines.weight_sync import Bucket, Held, Part, as_matrix, digest

_PROBES = 512  # columns that are read through a layer at a time


class WeightSyncWorker:
    """Methods that vLLM's worker gains; `self` is that worker, one for each tensor-parallel rank."""

    model_runner: Any
    model_config: Any
    vllm_config: Any
    _loaded: set[str] | None
    """Parameters that the model says it has loaded since the update began; None: it does not say."""
    _names: set[str]
    """Tensors that have come since then."""

    def lightrft_started(self) -> None:
        """All workers of the engine have started, as processes of their own."""
        take_name_away()
        quiet_updates()

    def lightrft_begin_update(self) -> None:
        from vllm.model_executor.model_loader.reload.layerwise import (
            finalize_layerwise_reload,
            initialize_layerwise_reload,
        )

        with self._loading():
            # An update that broke off leaves layers half loaded; without one, this does nothing.
            finalize_layerwise_reload(self.model_runner.get_model(), self.model_config)
            experts.pack_again(self.model_runner.get_model())
            initialize_layerwise_reload(self.model_runner.get_model())
        self._loaded, self._names = set(), set()

    def lightrft_load(self, bucket: Bucket | str) -> None:
        """Load tensors, or those of a safetensors file (on a file system in memory)."""
        tensors = list(load_file(bucket).items()) if isinstance(bucket, str) else bucket
        begun: list[tuple[str, list[int]]] = []  # vLLM's own errors do not say which tensor they are about

        def followed() -> Iterator[tuple[str, Tensor]]:
            for name, tensor in tensors:
                begun.append((name, list(tensor.shape)))
                yield name, tensor

        try:
            with self._loading():
                loaded = self.model_runner.get_model().load_weights(followed())
        except (AssertionError, AttributeError, KeyError, RuntimeError, ValueError) as err:
            name, shape = begun[-1] if begun else ("nothing", [])
            told = str(err).partition(" The available parameters")[0]
            raise ValueError(f"vLLM refuses the weight {name!r} of shape {shape}: {type(err).__name__} {told}") from err
        self._names.update(name for name, _ in begun)
        self._loaded = None if loaded is None or self._loaded is None else self._loaded | set(loaded)

    def lightrft_end_update(self) -> list[str]:
        """Compute with what was loaded; returns the parameters that nothing came for, by the names that they have here.

        Of a fused parameter, those of its parts.
        """
        from vllm.model_executor.model_loader.reload.layerwise import finalize_layerwise_reload

        with self._loading():
            finalize_layerwise_reload(self.model_runner.get_model(), self.model_config)
        self.model_runner.reset_lora_state()
        self.model_runner.reset_encoder_cache()
        self.model_runner.reset_mm_cache()
        return list(_unnamed(self.model_runner.get_model(), sorted(self._names), self._loaded or ()))

    def lightrft_read_back(self, wanted: Mapping[str, tuple[int, int]], names: Sequence[str] | None) -> Held:
        """See `EngineWithCopy._read_back`."""
        model = self.model_runner.get_model()
        held = Held()
        with torch.inference_mode():
            for name, (first, step) in wanted.items():
                parts = _read(model, name, first, step)
                if parts is None:
                    held.unreadable.append(name)
                else:
                    held.parts[name] = parts
        if names is not None:
            held.unnamed = list(_unnamed(model, names, self._loaded or ()))
        return held

    def lightrft_read_adapter(self, number: int, ranks: Mapping[str, int]) -> dict[str, str]:
        """Digests of an adapter's matrices as the layers compute with them; ``B`` has the scaling in it.

        Args:
            number: the adapter's id.
            ranks: for each layer, by the name that it has in a checkpoint, the adapter's rank there.
        """
        manager, model = self.model_runner.lora_manager._adapter_manager, self.model_runner.get_model()
        slot = manager.lora_index_to_id.index(number)
        digests = {}
        for name, rank in ranks.items():
            path, _, shard = _target(model, f"{name}.weight") or ("", "", None)
            layer = manager.modules.get(path)
            if layer is not None:
                i = "qkv".index(shard) if isinstance(shard, str) else shard or 0
                a, b = layer.lora_a_stacked, layer.lora_b_stacked
                a, b = (a, b) if isinstance(a, Tensor) else (a[i], b[i])  # an output head has no slices
                digests[f"{name}.lora_A"] = digest(a[slot, 0, :rank])
                digests[f"{name}.lora_B"] = digest(b[slot, 0, :, :rank])
        return digests

    def _loading(self) -> Any:
        from vllm.config import set_current_vllm_config

        stack = ExitStack()
        stack.enter_context(torch.inference_mode(False))  # also while Lightning evaluates
        stack.enter_context(torch.no_grad())
        stack.enter_context(set_current_vllm_config(self.vllm_config))
        return stack


def _target(model: nn.Module, name: str) -> tuple[str, str, Any] | None:
    """Module's path and parameter that a checkpoint's tensor is loaded into, and which shard of it; None if dropped."""
    mapper = getattr(model, "hf_to_vllm_mapper", None)
    found = (name, None) if mapper is None else mapper._map_name_with_shard(name)
    if found is None:
        return None
    target, shard = found
    path, _, attribute = target.rpartition(".")
    parent, _, last = path.rpartition(".")
    for fused, members in (getattr(model, "packed_modules_mapping", None) or {}).items():
        if shard is None and last in members and len(members) > 1:
            shard = _shard(fused, members.index(last))
            path = f"{parent}.{fused}" if parent else fused
    return path, attribute, shard


def _locate(model: nn.Module, name: str) -> tuple[nn.Module, str, Any] | None:
    """As `_target`, with the module itself; None if there is none."""
    target = _target(model, name)
    if target is None:
        return None
    path, attribute, shard = target
    try:
        module = model.get_submodule(path)
    except AttributeError:
        return None
    module = getattr(module, "base_layer", module)  # wrapped for LoRA
    return (module, attribute, shard) if isinstance(getattr(module, attribute, None), Tensor) else None


def _expert(model: nn.Module, name: str) -> experts.Place | None:
    target = _target(model, name)
    return None if target is None else experts.find(model, f"{target[0]}.{target[1]}")


def _read(model: nn.Module, name: str, first: int, step: int) -> list[Part] | None:
    """The wanted columns of this process's part of a tensor, as its layer computes with them."""
    from vllm.model_executor.layers.linear import RowParallelLinear

    if (expert := _expert(model, name)) is not None:
        return experts.read(expert, first, step)
    place = _locate(model, name)
    if place is None or _is_quantized(place[0]):
        return None
    module, attribute, shard = place
    rows = _rows(module, attribute, shard)
    if rows is None:
        return None
    width = _width(module, attribute)
    begin = module.tp_rank * width if isinstance(module, RowParallelLinear) and attribute == "weight" else 0
    columns = range(first, begin + width, step)
    values = _columns(module, attribute, [column - begin for column in columns if column >= begin])
    return [
        Part((start, start + size), (begin, begin + width), digest(values[local : local + size]))
        for local, size, start in rows
    ]


def _is_quantized(module: nn.Module) -> bool:
    from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
    from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod, VocabParallelEmbedding

    plain = UnquantizedLinearMethod | UnquantizedEmbeddingMethod
    return isinstance(module, LinearBase | VocabParallelEmbedding) and not isinstance(module.quant_method, plain)


def _rows(module: Any, attribute: str, shard: Any) -> list[tuple[int, int, int]] | None:
    """Runs of rows as (first row here, how many, first row in the checkpoint's tensor); None for an unknown layout."""
    from vllm.model_executor.layers.linear import (
        ColumnParallelLinear,
        LinearBase,
        MergedColumnParallelLinear,
        QKVParallelLinear,
    )
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

    if isinstance(module, VocabParallelEmbedding):
        return [(0, module.shard_indices.num_org_elements, module.shard_indices.org_vocab_start_index)]
    if isinstance(module, QKVParallelLinear | MergedColumnParallelLinear):
        return _shards(module, shard)
    if shard is not None:
        return None
    if isinstance(module, ColumnParallelLinear):
        size = module.output_size_per_partition
        return [(0, size, module.tp_rank * size)]
    # A repacked layer's parameter is empty.
    size = module.output_size if isinstance(module, LinearBase) else getattr(module, attribute).shape[0]
    return [(0, size, 0)]


def _shards(module: Any, shard: Any) -> list[tuple[int, int, int]] | None:
    """`_rows` of a layer that holds several of the checkpoint's tensors, or one that is fused there as well."""
    from vllm.model_executor.layers.linear import QKVParallelLinear

    heads = isinstance(module, QKVParallelLinear)
    copies = (1, module.num_kv_head_replicas, module.num_kv_head_replicas) if heads else (1,) * len(module.output_sizes)
    rows = {}
    local = whole = 0
    for key, size, replicas in zip("qkv" if heads else range(len(copies)), module.output_sizes, copies, strict=True):
        here = size // module.tp_size
        start = module.tp_rank // replicas * here
        rows[key] = (local, here, start if shard is not None else whole + start)
        local, whole = local + here, whole + size // replicas
    if shard is None:
        return list(rows.values())
    return [rows[shard]] if shard in rows else None


def _width(module: Any, attribute: str) -> int:
    from vllm.model_executor.layers.linear import LinearBase

    if isinstance(module, LinearBase) and attribute == "weight":  # the parameter may be empty, see `_columns`
        return int(getattr(module, "input_size_per_partition", module.input_size))
    return as_matrix(getattr(module, attribute)).shape[1]


def _columns(module: Any, attribute: str, columns: Sequence[int]) -> Tensor:
    """These columns of a parameter, [rows, columns].

    On a CPU, a layer computes with a repacked copy, and the parameter is empty or, for a tied output head, out of date
    if the copy was not made anew. So the values come out of the layer: an input of zeros and a single one gives exactly
    a column.
    """
    from vllm.model_executor.layers.linear import LinearBase
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    parameter: Tensor = getattr(module, attribute)
    if not (
        attribute == "weight" and isinstance(module, LinearBase | ParallelLMHead) and hasattr(module, "cpu_linear")
    ):
        return as_matrix(parameter)[:, list(columns)]
    width = _width(module, attribute)
    pieces = []
    for start in range(0, len(columns), _PROBES):
        chosen = torch.tensor(columns[start : start + _PROBES])
        probe = nn.functional.one_hot(chosen, width).to(parameter.dtype)
        pieces.append(module.quant_method.apply(module, probe).T)
    return torch.cat(pieces, dim=1) if pieces else parameter.new_empty(parameter.shape[0], 0)


def _unnamed(model: nn.Module, names: Sequence[str], loaded: Collection[str]) -> Iterator[str]:
    """Parameters of the engine of which at least a part stands for none of these tensors.

    Args:
        model: vLLM's.
        names: of all tensors that were sent.
        loaded: parameters that the model itself says it has loaded a tensor into.
    """
    given: dict[tuple[nn.Module, str], set[Any]] = {}
    elsewhere = False  # e.g. all experts in one tensor, which a layer of its own kind takes apart
    for name in names:
        if (expert := _expert(model, name)) is not None:
            given.setdefault(expert[:2], set()).add(expert[2:])
        elif (place := _locate(model, name)) is not None:
            given.setdefault(place[:2], set()).add(place[2])
        else:
            elsewhere = True
    tensors = {getattr(module, attribute) for module, attribute in given}
    for path, module in model.named_modules():
        for attribute, parameter in module.named_parameters(recurse=False):
            shards = given.get((module, attribute))
            if shards is None:
                # A tied parameter is up to date where the layer reads the parameter itself, and no copy.
                complete = (
                    _is_quantized(module)
                    or (parameter in tensors and not hasattr(module, "cpu_linear"))
                    or (elsewhere and f"{path}.{attribute}" in loaded)
                )
            else:
                complete = None in shards or len(shards) >= _parts(module, attribute)
            if not complete:
                yield from _lacking(model, path.removesuffix(".base_layer"), attribute, shards or ())


def _lacking(model: nn.Module, path: str, attribute: str, shards: Collection[Any]) -> Iterator[str]:
    """Names of the parts of a parameter that are not among these shards; its own if it has no parts."""
    parent, _, last = path.rpartition(".")
    members = (getattr(model, "packed_modules_mapping", None) or {}).get(last, ())
    if len(members) < 2:
        yield f"{path}.{attribute}"
    for i, member in enumerate(members if len(members) > 1 else ()):
        if _shard(last, i) not in shards:
            yield f"{parent}.{member}.{attribute}" if parent else f"{member}.{attribute}"


def _shard(fused: str, i: int) -> Any:
    """How vLLM calls the part with this number of a fused parameter."""
    return "qkv"[i] if fused == "qkv_proj" else i


def _parts(module: Any, attribute: str) -> int:
    """Of how many tensors a parameter consists."""
    return len(module.output_sizes) if hasattr(module, "output_sizes") else experts.count(module, attribute)
