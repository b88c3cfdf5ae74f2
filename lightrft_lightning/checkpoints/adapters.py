"""Adapters in a checkpoint: merged into its weights, or taken out, one tensor or one layer at a time.

The model is built again without memory, PEFT's adapters around it; what is done with the tensors is PEFT's own.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightrft_lightning._errors import import_extra
from lightrft_lightning.checkpoints.flat import TensorInfo
from lightrft_lightning.models.config_values import check_config
from lightrft_lightning.models.export import check_adapter_alone, check_nothing_beside, tied_names, with_adapters
from lightrft_lightning.models.merging import PREFIX, Unit, units, whole_shape

Made = dict[str, tuple[TensorInfo, Callable[[], Tensor]]]
"""Tensors by name: shape and dtype, and what reads or computes them."""


def merged(made: Made, tied: Mapping[str, str], described: Mapping[str, Any]) -> tuple[Made, dict[str, Any]]:
    """The tensors of the model without PEFT, and what is known about it.

    Args:
        made: those of the model with adapters.
        tied: further names of these.
        described: class, config and adapters.

    Raises:
        ValueError: adapters that cannot be merged, or that are not those of the tensors.
    """
    plain, model, names = _built(described, {*made, *tied})
    read = _Readers(made, tied, model)
    if strange := sorted({*made, *tied} - read.used):
        raise ValueError(f"{strange[0]} is no tensor of a {type(plain).__name__} with the adapter {', '.join(names)}")
    result: Made = {}
    found = units(model)
    inside = tuple(f"{unit.path}." for unit in found)
    for canonical, aliases in read.names.items():
        for alias in aliases:
            if not alias.startswith(inside):
                result[alias.removeprefix(PREFIX)] = read.made[canonical]
    layers = _Layers(read)
    for unit in found:
        for output, local in unit.outputs.items():
            info = read.made[unit.inputs[local]][0]
            result[unit.plain(output)] = info, lambda unit=unit, output=output: layers.output(unit, output)  # type: ignore[misc]
    return _with_ties(result, plain, described)


def alone(
    made: Made, tied: Mapping[str, str], described: Mapping[str, Any], trained: Iterable[str] = ()
) -> tuple[Made, dict[str, Any]]:
    """The tensors of a PEFT folder, and the content of its ``adapter_config.json``.

    Args:
        made: as in `merged`, like
        tied: and
        described: are.
        trained: names of what the checkpoint's optimizer steps.

    Raises:
        ValueError: an adapter that computes something else on the base model that it was made from.
    """
    _, model, (name, *others) = _built(described, {*made, *tied})
    if others:
        raise ValueError(f"{', '.join([name, *others])} are active together: none can be converted alone, merge them")
    config = model.peft_config[name]
    check_adapter_alone({name: config})
    read = _Readers(made, tied, model)
    empty = {alias: torch.empty(0, device="meta") for of in read.names.values() for alias in of}
    empty |= {buffer: torch.empty(0, device="meta") for buffer in {*made, *tied} - empty.keys()}
    sources = {id(tensor): alias for alias, tensor in empty.items()}
    model.base_model_name_or_path = config.base_model_name_or_path = None  # no look at a hub for its size
    kept = import_extra("peft", "hf").get_peft_model_state_dict(model, state_dict=empty, adapter_name=name)
    check_nothing_beside(trained, {key: sources[id(tensor)] for key, tensor in kept.items()})
    config = _config(described["adapters"][name])
    config.inference_mode = True
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        content = json.loads((Path(folder) / "adapter_config.json").read_text())
    return {key: read.of(sources[id(tensor)]) for key, tensor in kept.items()}, content


def _built(described: Mapping[str, Any], names: Iterable[str]) -> tuple[Any, Any, list[str]]:
    """The model without memory, another one with the adapters, and the names of those that it computes with.

    Args:
        described: class, config, adapters and which of them are active.
        names: of all tensors.
    """
    configs = {name: _config(settings) for name, settings in described["adapters"].items()}
    active = described.get("active_adapters") or [*configs]
    if len(configs) > 1 and "active_adapters" not in described:
        raise ValueError(f"the checkpoint does not say which of the adapters {', '.join(configs)} are active")
    names = list(names)
    for name, config in configs.items():
        # PEFT takes the tied ones out of the list and would not find all of them again.
        saved = {n.partition(f".modules_to_save.{name}.")[0] for n in names if f".modules_to_save.{name}." in n}
        if saved:
            config.modules_to_save = sorted(path.removeprefix(PREFIX) for path in saved)
    plain = _plain(described)
    try:
        model = with_adapters(_plain(described), configs)
        if len(configs) > 1:
            model.base_model.set_adapter(active)
    except Exception as err:
        kinds = ", ".join(sorted({config.peft_type.value for config in configs.values()}))
        told = (str(err) or type(err).__name__).splitlines()[0]
        raise ValueError(
            f"PEFT cannot make adapters of kind {kinds} without weights: load the checkpoint into the model and use "
            f"save_model ({told})"
        ) from err
    return plain, model, active


def _config(settings: Mapping[str, Any]) -> Any:
    if settings.get("megatron_config") is not None:  # PEFT would import the module that `megatron_core` names
        raise ValueError("the checkpoint's adapter has a megatron_config: it is for Megatron's layers, take it out")
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "adapter_config.json").write_text(json.dumps(settings))
        config = import_extra("peft", "hf").PeftConfig.from_pretrained(folder)
    config.inference_mode = False
    return config


def _plain(described: Mapping[str, Any]) -> Any:
    transformers = import_extra("transformers", "hf")
    cls = getattr(transformers, described["class"], None)
    if not (isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)):
        raise ValueError(f"transformers has no model {described['class']!r}, so its adapters cannot be converted")
    check_config(described["config"], "the checkpoint's config")
    config = transformers.AutoConfig.for_model(**described["config"])
    with torch.device("meta"):
        return cls(config)


class _Readers:
    """What is in the checkpoint, by the first name of each parameter of the model; buffers are filled at once."""

    def __init__(self, made: Made, tied: Mapping[str, str], model: nn.Module) -> None:
        ids: dict[int, list[str]] = {}
        for name, p in model.named_parameters(remove_duplicate=False):
            ids.setdefault(id(p), []).append(name)
        self.names = {names[0]: names for names in ids.values()}
        self.made: Made = {}
        self._all, self._tied = made, tied
        self.used: set[str] = set()
        for canonical, names in self.names.items():
            there = next((n for n in (*names, *(tied.get(n, "") for n in names)) if n in made), None)
            if there is None:
                raise ValueError(f"the checkpoint holds no {canonical}, which a model with its adapter has")
            self.made[canonical] = made[there]
            self.used |= {there, *names}
        for name, p in model.named_parameters():
            if self.made[name][0].shape != whole_shape(p):
                raise ValueError(f"{name} has shape {self.made[name][0].shape} in the checkpoint, not {whole_shape(p)}")
        self._fill_buffers(made, tied, model)

    def _fill_buffers(self, made: Made, tied: Mapping[str, str], model: nn.Module) -> None:
        inside = tuple(f"{unit.path}." for unit in units(model))
        for name, buffer in model.named_buffers(remove_duplicate=False):
            holder, _, last = name.rpartition(".")
            self.used.add(name)
            if (there := name if name in made else tied.get(name)) in made:
                model.get_submodule(holder)._buffers[last] = made[there][1]()
            elif "trainable_tokens_original" in name:  # only what it would be set back to
                model.get_submodule(holder)._buffers[last] = torch.zeros(buffer.shape, dtype=buffer.dtype)
            elif name.startswith(inside) and buffer.is_meta:
                raise ValueError(f"the checkpoint holds no {name}, without which its adapter cannot be merged")

    def of(self, name: str) -> tuple[TensorInfo, Callable[[], Tensor]]:
        """The tensor of this name, whichever of its names that is."""
        there = next((names[0] for names in self.names.values() if name in names), None)
        return self._all[self._tied.get(name, name)] if there is None else self.made[there]


class _Layers:
    """Merged layers, of which the last one is kept for its next tensor."""

    def __init__(self, read: _Readers) -> None:
        self._read, self._last, self._result = read, "", {}  # type: ignore[var-annotated]

    def output(self, unit: Unit, name: str) -> Tensor:
        if self._last != unit.path:
            self._last, self._result = "", {}  # before the next one takes memory
            inputs = {local: self._read.made[canonical][1]() for local, canonical in unit.inputs.items()}
            self._result, self._last = unit.merged(inputs), unit.path
        return self._result[name]  # type: ignore[no-any-return]


def _with_ties(made: Made, plain: nn.Module, described: Mapping[str, Any]) -> tuple[Made, dict[str, Any]]:
    """Without the further names of tied tensors; if an adapter took them apart, with a config that says so."""
    config = dict(described["config"])
    for first, *others in tied_names(plain):
        for other in others:
            if first in made and other in made and not _equal([made[first], made[other]]):
                config["tie_word_embeddings"] = False
                return made, {**described, "config": config, "adapters": None}
        for other in others:
            made.pop(other, None)
    return made, {**described, "config": config, "adapters": None}


def _equal(two: Iterable[tuple[TensorInfo, Callable[[], Tensor]]]) -> bool:
    (a, read_a), (b, read_b) = two
    return a == b and (read_a is read_b or (math.prod(a.shape) == 0 or torch.equal(read_a(), read_b())))
