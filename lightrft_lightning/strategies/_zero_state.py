"""What of ZeRO's models and optimizers goes into a checkpoint: the ranges that this rank keeps, as views."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.weak import WeakIdKeyDictionary
from typing_extensions import override

from lightrft_lightning.checkpoints.flat import FlatTensor, TensorInfo
from lightrft_lightning.checkpoints.state import _IMPLEMENTATION, aliases
from lightrft_lightning.strategies._zero import Piece, Place, ZeroModel
from lightrft_lightning.strategies.distributed import DistributedStrategy

Names = Mapping[int, str]
"""The name of each parameter in the checkpoint, by its id."""


class ZeroCheckpoints(DistributedStrategy):
    """The hooks of `Checkpoints` for models with DeepSpeed engines."""

    _zero: WeakKeyDictionary[nn.Module, ZeroModel]
    _averages: WeakIdKeyDictionary
    """fp32 averages of this rank's parts of parameters of 16 bits, of `moving_average`."""

    def _zero_of(self, optimizer: Optimizer) -> ZeroModel:
        raw = getattr(optimizer, "optimizer", optimizer)
        for zero in self._zero.values():
            if zero.optimizer is raw:
                return zero
        raise ValueError(f"{type(raw).__name__} was not passed to prepare(): prepare the model together with it")

    def _engines_in(self, model: nn.Module) -> list[ZeroModel]:
        """The engines that have parameters of `model`."""
        ids = {id(p) for p in model.parameters()}
        return [z for z in self._zero.values() if any(id(p) in ids for p in z.model.parameters())]

    @override
    def _model_tensors(self, model: nn.Module) -> dict[str, FlatTensor]:
        sharded = {k: v for zero in self._engines_in(model) for k, v in model_tensors(zero).items()}
        own = model.state_dict(keep_vars=True)
        tensors = {n: sharded.get(id(own[n]), tensor) for n, tensor in super()._model_tensors(model).items()}
        for name in [n for n in tensors if own[n] in self._averages]:
            average, pieces = self._averages[own[name]], tensors[name].pieces
            pieces = tuple((offset, average[: len(values)]) for offset, values in pieces)
            tensors[name] = FlatTensor(tensors[name].shape, average.dtype, pieces)
        return tensors

    @override
    def _model_loaded(self, model: nn.Module) -> None:
        for parameter in model.parameters():
            if parameter in self._averages:
                self._part(parameter).copy_(self._averages[parameter])
        for zero in self._engines_in(model):
            model_loaded(zero)

    @override
    def _weights_in_use(self, model: nn.Module, names: Collection[str]) -> dict[str, FlatTensor]:
        found: dict[str, FlatTensor] = {}
        for zero in self._engines_in(model):
            free_gathered(zero)
            shards = {id(p): zero.shard(p) for _, p in zero.sharded()}
            for name, p in model.named_parameters():
                if name in names and id(p) in shards:
                    piece = shards[id(p)]
                    found[name] = FlatTensor(_shape(p), p.dtype, () if piece is None else (tuple(piece),))  # type: ignore[arg-type]
        return super()._weights_in_use(model, set(names) - found.keys()) | found

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        module = self.lightning_module
        assert module is not None
        tensors = self._model_tensors(module)
        tied = aliases(module)
        return {name: tensors.get(tied.get(name, name), value) for name, value in module.state_dict().items()}

    @override
    def _optimizer_tensors(
        self, model: nn.Module, optimizer: Optimizer, saved: Mapping[str, TensorInfo] | None = None
    ) -> dict[str, FlatTensor]:
        return optimizer_tensors(self._zero_of(optimizer), _names(model), saved)

    @override
    def _optimizer_scalars(self, model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
        return optimizer_scalars(self._zero_of(optimizer), _names(model))

    @override
    def _set_optimizer_scalars(self, model: nn.Module, optimizer: Optimizer, scalars: Mapping[str, Any]) -> None:
        set_optimizer_scalars(self._zero_of(optimizer), _names(model), scalars)

    @override
    def _optimizer_settings(self, model: nn.Module, optimizer: Optimizer) -> list[dict[str, Any]]:
        return optimizer_settings(self._zero_of(optimizer), _names(model))

    @override
    def _set_optimizer_settings(self, model: nn.Module, optimizer: Optimizer, groups: list[dict[str, Any]]) -> None:
        set_optimizer_settings(self._zero_of(optimizer), _names(model), groups)

    @override
    def _optimizer_loaded(self, model: nn.Module, optimizer: Optimizer) -> None:
        optimizer_loaded(self._zero_of(optimizer))

    def _part(self, parameter: nn.Parameter) -> Tensor:
        """What this rank holds of a parameter, as one row."""
        return parameter.ds_tensor.view(-1) if hasattr(parameter, "ds_tensor") else parameter.detach().view(-1)


def _names(model: nn.Module) -> Names:
    return {id(p): name for name, p in model.named_parameters()}


def model_tensors(zero: ZeroModel) -> dict[int, FlatTensor]:
    """By the id of the parameter: its fp32 values where it is trained, else its own if it is sharded."""
    zero.written.adopt()
    masters: dict[int, Piece | None] = {}
    dtypes: dict[int, torch.dtype] = {}
    for parameter, flat, place in zero.places():
        masters[id(parameter)] = None if place is None else _piece(flat, place)
        dtypes[id(parameter)] = flat.dtype
    found = {}
    for _, parameter in zero.model.named_parameters():
        if id(parameter) in masters:
            piece, dtype = masters[id(parameter)], dtypes[id(parameter)]
        elif hasattr(parameter, "ds_id"):
            piece, dtype = zero.shard(parameter), parameter.dtype
        else:
            continue
        found[id(parameter)] = FlatTensor(_shape(parameter), dtype, () if piece is None else (tuple(piece),))  # type: ignore[arg-type]
    return found


def model_loaded(zero: ZeroModel) -> None:
    """Let the weights that the model computes with follow those of `model_tensors`. All ranks together."""
    free_gathered(zero)  # it is out of date
    if zero.optimizer is not None and zero.stage < 3:
        zero.zero.update_lp_params()
    elif zero.optimizer is not None:
        parts = zero.zero.fp16_partitioned_groups_flat, zero.zero.fp32_partitioned_groups_flat
        for low, full in zip(*parts, strict=True):
            low.data.copy_(full.data)
    zero.gather_small()


def free_gathered(zero: ZeroModel) -> None:
    """Leave nothing of sharded parameters but this rank's part. All ranks together."""
    for _, parameter in zero.sharded():
        if parameter.ds_status.name == "AVAILABLE":
            parameter.partition()
        parameter.ds_secondary_tensor = None


def optimizer_tensors(zero: ZeroModel, names: Names, saved: Mapping[str, TensorInfo] | None) -> dict[str, FlatTensor]:
    """The optimizer's state under ``<parameter name>.<key>``.

    Args:
        zero: the model.
        names: of its parameters.
        saved: what is about to be loaded: the state is laid out for exactly this first.
    """
    assert zero.optimizer is not None
    if saved is not None:
        _lay_out(zero, names, saved)
    found = {}
    for parameter, flat, place in zero.places():
        for key, value in zero.optimizer.state.get(flat, {}).items():
            path = f"{names[id(parameter)]}.{key}"
            if isinstance(value, int | float) and key == "step":
                value = torch.tensor(float(value))  # as torch's own optimizers have it
            if not isinstance(value, Tensor):
                continue
            if key == "step" or value.shape != flat.shape:  # one for all parameters of the flat tensor
                found[path] = FlatTensor(tuple(value.shape), value.dtype, ((0, value.detach().view(-1)),))
            else:
                here = () if place is None else (tuple(_piece(value, place)),)
                found[path] = FlatTensor(_shape(parameter), value.dtype, here)  # type: ignore[arg-type]
    return found


def _lay_out(zero: ZeroModel, names: Names, saved: Mapping[str, TensorInfo]) -> None:
    optimizer = zero.optimizer
    assert optimizer is not None
    wanted: dict[str, dict[str, TensorInfo]] = {}
    for path, info in saved.items():
        name, _, key = path.rpartition(".")
        wanted.setdefault(name, {})[key] = info
    before = {flat: optimizer.state.pop(flat, {}) for _, flat, _ in zero.places()}
    group = optimizer.param_groups[0]
    for parameter, flat, _ in zero.places():
        for key, info in wanted.get(names[id(parameter)], {}).items():
            if key in optimizer.state[flat]:
                continue
            if isinstance(before[flat].get(key), Tensor):
                value = before[flat][key]
            elif key != "step" and info.shape == _shape(parameter):
                value = torch.zeros_like(flat.detach())
            else:
                on_device = group.get("fused") or group.get("capturable")
                value = torch.zeros(info.shape, dtype=info.dtype, device=flat.device if on_device else "cpu")
            optimizer.state[flat][key] = value


def optimizer_loaded(zero: ZeroModel) -> None:
    """After the tensors were read in place."""
    assert zero.optimizer is not None
    if zero.stage < 3:
        zero.zero._hp_optimizer_states_linked = False  # it has views of the former tensors
    if type(zero.optimizer).__name__ == "DeepSpeedCPUAdam":
        for values in zero.optimizer.state.values():
            values["step"] = int(values["step"])


def optimizer_scalars(zero: ZeroModel, names: Names) -> dict[str, Any]:
    """The part of the optimizer's state that is no tensor."""
    assert zero.optimizer is not None
    return {
        f"{names[id(parameter)]}.{key}": value
        for parameter, flat, _ in zero.places()
        for key, value in zero.optimizer.state.get(flat, {}).items()
        if not isinstance(value, Tensor) and key != "step"
    }


def set_optimizer_scalars(zero: ZeroModel, names: Names, scalars: Mapping[str, Any]) -> None:
    """Undo `optimizer_scalars`; tensors must be in place."""
    assert zero.optimizer is not None
    flats = {names[id(parameter)]: flat for parameter, flat, _ in zero.places()}
    for path, value in scalars.items():
        name, _, key = path.rpartition(".")
        if name in flats:
            zero.optimizer.state[flats[name]][key] = value


def optimizer_settings(zero: ZeroModel, names: Names) -> list[dict[str, Any]]:
    """The parameter groups, with the names of their parameters."""
    assert zero.optimizer is not None
    return [
        {**{k: v for k, v in group.items() if k != "params"}, "params": [names[id(p)] for p in parameters]}
        for group, parameters in zip(zero.optimizer.param_groups, zero.groups, strict=True)
    ]


def set_optimizer_settings(zero: ZeroModel, names: Names, groups: list[dict[str, Any]]) -> None:
    """Undo `optimizer_settings`. How the optimizer computes (fused, ...) stays as it is here."""
    assert zero.optimizer is not None
    of_parameter = {name: group for group in groups for name in group["params"]}
    kept = {"params", *_IMPLEMENTATION} - {"initial_lr"}
    for group, parameters in zip(zero.optimizer.param_groups, zero.groups, strict=True):
        saved = of_parameter[names[id(parameters[0])]]
        group.update({key: value for key, value in saved.items() if key not in kept})


def _piece(flat: Tensor, place: Place) -> Piece:
    return Piece(place.offset, flat.detach().narrow(0, place.start, place.numel))


def _shape(parameter: Any) -> tuple[int, ...]:
    return tuple(getattr(parameter, "ds_shape", parameter.shape))
