"""What the back ends that run in several processes have in common."""

from __future__ import annotations

import os
import pickle
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.utilities.distributed import (
    _get_default_process_group_backend_for_device,
    _init_dist_connection,
)
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.strategies import ParallelStrategy
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from typing_extensions import override

from lightrft_lightning._errors import unknown_name
from lightrft_lightning.models.export import ExportError, hugging_face_part, save_pretrained
from lightrft_lightning.models.quantized import dequantized
from lightrft_lightning.strategies import failures
from lightrft_lightning.strategies.base import StrategyBase
from lightrft_lightning.strategies.failures import watch_ranks
from lightrft_lightning.strategies.launch import (
    DEFAULT_TIMEOUT,
    WatchedLauncher,
    meet,
    set_deadline,
    start_process_group,
)

PRECISIONS = ("32-true", "bf16-mixed", "16-mixed")
"""Of a `Trainer`, that the sharded back ends carry out."""

_OPERATIONS = {"mean": dist.ReduceOp.SUM, "sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}


class DistributedStrategy(StrategyBase, ParallelStrategy):
    """Ranks, devices and collectives of a strategy with a process group; sharding is left to its subclasses.

    Ranks come from the process group once it exists; before, from the cluster environment that the Trainer found.

    Args:
        timeout: how long a collective may take before it is an error.
        **kwargs: see `StrategyBase`.
    """

    # StrategyBase has these for one process and comes first among the base classes.
    reduce_boolean_decision = ParallelStrategy.reduce_boolean_decision
    _timeout: timedelta | None = DEFAULT_TIMEOUT

    _device: torch.device | None = None
    """Set by `setup_distributed`; a Trainer sets `parallel_devices` instead."""

    # ---------------------------------------------------------------- ranks and devices

    @property
    def world_size(self) -> int:  # type: ignore[override]
        """Number of processes."""
        return dist.get_world_size() if dist.is_initialized() else _of(ParallelStrategy.world_size, self)

    @property
    def global_rank(self) -> int:  # type: ignore[override]
        """This process among all."""
        return dist.get_rank() if dist.is_initialized() else _of(ParallelStrategy.global_rank, self)

    @property
    def local_rank(self) -> int:  # type: ignore[override]
        """This process among those of its machine."""
        return self._local_rank if self._device is not None else _of(ParallelStrategy.local_rank, self)

    @property
    @override
    def is_global_zero(self) -> bool:  # type: ignore[override]
        return self.global_rank == 0

    @property
    def parallel_devices(self) -> list[torch.device] | None:  # type: ignore[override]
        """The devices that the Trainer uses on this machine."""
        return self._parallel_devices

    @parallel_devices.setter
    def parallel_devices(self, devices: list[torch.device] | None) -> None:
        self._parallel_devices = devices

    @property
    def num_nodes(self) -> int:  # type: ignore[override]
        """Number of machines."""
        return self._num_nodes

    @num_nodes.setter
    def num_nodes(self, value: int) -> None:
        self._num_nodes = value

    _num_nodes = 1
    _local_rank = 0

    @property
    @override
    def root_device(self) -> torch.device:  # type: ignore[override]
        if self._device is not None:
            return self._device
        return _of_rank(self.local_rank, self._parallel_devices or [torch.device("cpu")])

    @property
    @override
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        return {"num_replicas": self.world_size, "rank": self.global_rank}

    # ---------------------------------------------------------------- start

    @override
    def setup_distributed(self, timeout: timedelta | None = None, num_gpu_per_node: int | None = None) -> None:
        """Join the process group that the launcher describes (torchrun, SLURM, ...), or start one of one process.

        Args:
            timeout: how long a collective may take before it is an error; default: the strategy's own.
            num_gpu_per_node: see `StrategyBase`.

        Raises:
            ValueError: environment variables that contradict each other, or batch sizes that do not divide.
        """
        self._join_process_group(timeout or self._timeout or DEFAULT_TIMEOUT)
        super().setup_distributed()

    def _join_process_group(self, timeout: timedelta) -> None:
        heartbeat = self.config.heartbeat_timeout
        place = start_process_group(timeout, heartbeat=heartbeat)
        self._device, self._local_rank = place.device, place.local_rank
        watch_ranks(timeout, heartbeat)  # the group may have been there already

    def _join_trainers_process_group(self) -> None:
        """What Lightning's own strategies do in `setup_environment`; ranks may be slower to start than `timeout`."""
        assert self.accelerator is not None and self.cluster_environment is not None
        timeout, device = self._timeout or DEFAULT_TIMEOUT, self.root_device
        self.accelerator.setup_device(device)
        reset_seed()
        self.set_world_ranks()  # type: ignore[attr-defined]
        given: str | None = self.process_group_backend  # type: ignore[attr-defined]
        backend = given or _get_default_process_group_backend_for_device(device)
        device_id = device if device.type == "cuda" else None
        store = None if dist.is_initialized() else self._meet()
        _init_dist_connection(
            self.cluster_environment, backend, timeout=failures.START_TIMEOUT, device_id=device_id, store=store
        )
        set_deadline(timeout, store, self.config.heartbeat_timeout)
        self._check_batch_sizes()
        self._outlive_its_surroundings()

    def _meet(self) -> dist.Store:
        environment = self.cluster_environment
        assert environment is not None
        os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = environment.main_address, str(environment.main_port)
        return meet(environment.global_rank(), environment.world_size(), self.config.heartbeat_timeout)

    @override
    def _configure_launcher(self) -> None:
        # With one process there is nothing to launch, so that notebooks work; torchrun and SLURM have launched already.
        environment = self.cluster_environment
        assert environment is not None
        if self.num_processes * self.num_nodes > 1 or environment.creates_processes_externally:
            self._launcher = WatchedLauncher(environment, self.num_processes, self.num_nodes)

    @property
    def num_processes(self) -> int:
        """Processes on this machine."""
        return len(self._parallel_devices or [])

    def _checked_precision(self) -> str:
        """The Trainer's precision. Lightning compares it with a list for strategy objects only, not for names."""
        precision = str(self.precision_plugin.precision)
        if precision not in PRECISIONS:
            raise MisconfigurationException(
                f"Trainer(precision={precision!r}): {self.strategy_name} keeps fp32 weights and computes in "
                f"{', '.join(PRECISIONS)}; choose one of these"
            )
        return precision

    def _refuse_whole_copies(self) -> None:
        """Refuse callbacks that copy the weights before they are sharded, and put them together afterwards."""
        assert self.lightning_module is not None
        for callback in self.lightning_module.trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, WeightAveraging):
                raise MisconfigurationException(
                    f"{type(callback).__name__} averages a copy of whole weights, which {self.strategy_name} shards: "
                    "average two prepared models with strategy.moving_average, or take one process or ZeRO-2"
                )

    # ---------------------------------------------------------------- evaluation in a Trainer

    # With NCCL Lightning evaluates in inference mode, whose tensors cannot become parameters that are trained later.

    @override
    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        with torch.inference_mode(False), torch.no_grad(), self.precision_plugin.val_step_context():
            return self._call_step("validation_step", *args, **kwargs)

    @override
    def test_step(self, *args: Any, **kwargs: Any) -> Any:
        with torch.inference_mode(False), torch.no_grad(), self.precision_plugin.test_step_context():
            return self._call_step("test_step", *args, **kwargs)

    @override
    def predict_step(self, *args: Any, **kwargs: Any) -> Any:
        with torch.inference_mode(False), torch.no_grad(), self.precision_plugin.predict_step_context():
            return self._call_step("predict_step", *args, **kwargs)

    def _call_step(self, name: str, *args: Any, **kwargs: Any) -> Any:
        return getattr(self.lightning_module, name)(*args, **kwargs)

    # ---------------------------------------------------------------- export

    @override
    def save_model(
        self, model: nn.Module, tokenizer: Any, output_dir: str | os.PathLike[str], merge_lora: bool = True
    ) -> None:
        """As in `StrategyBase`, on all ranks together; the first one collects the weights in CPU memory and writes."""
        inner = hugging_face_part(model)
        weights = {}
        for name, tensor in dequantized(inner, self.named_full_tensors(inner)):
            if self.is_rank_0():
                weights[name] = tensor.to("cpu", copy=True)
        problem: Exception | None = None
        if self.is_rank_0():
            try:
                save_pretrained(inner, tokenizer, Path(output_dir), merge_lora=merge_lora, weights=weights)
            except Exception as err:  # the other ranks wait
                problem = err
        if (problem := self.broadcast(problem)) is not None:
            if isinstance(problem, ExportError):
                raise problem
            raise RuntimeError(f"rank 0 could not write {output_dir}: {problem}") from problem

    # ---------------------------------------------------------------- collectives

    @override
    def barrier(self, name: str | None = None) -> None:  # type: ignore[override]
        if dist.is_initialized():
            dist.barrier(device_ids=None if self.root_device.type == "cpu" else [self.root_device.index])

    @override
    def broadcast(self, obj: Any, src: int = 0) -> Any:  # type: ignore[override]
        if not dist.is_initialized():
            return obj
        box = [obj]
        dist.broadcast_object_list(box, src)
        return box[0]

    @override
    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:  # type: ignore[override]
        from lightning.fabric.utilities.distributed import _sync_ddp_if_available

        return _sync_ddp_if_available(tensor, group, reduce_op=reduce_op) if isinstance(tensor, Tensor) else tensor

    @override
    def all_reduce(self, data: Any, op: str = "mean") -> Any:
        """As in `StrategyBase`; numbers come back as numbers, tensors on their own device."""
        if op not in _OPERATIONS:
            raise ValueError(unknown_name("reduction", op, _OPERATIONS))
        if not dist.is_initialized():
            return data
        return tree_map(lambda leaf: self._all_reduce_one(leaf, op), data)

    def _all_reduce_one(self, value: Any, op: str) -> Any:
        if not isinstance(value, Tensor | int | float):
            return value
        tensor = value.detach() if isinstance(value, Tensor) else torch.tensor(value)
        # In 64 bits: a count of tokens must stay exact, a mean of numbers must not depend on the number of ranks.
        wide = tensor.to(self.root_device, torch.float64 if op == "mean" or tensor.is_floating_point() else torch.int64)
        wide = wide.clone() if wide is tensor else wide
        dist.all_reduce(wide, _OPERATIONS[op])
        if op == "mean":
            wide /= self.world_size
        if not isinstance(value, Tensor):
            return wide.item()
        dtype = value.dtype if value.is_floating_point() or op != "mean" else torch.float32
        return wide.to(value.device, dtype)

    @override
    def gather_objects(self, value: Any) -> list[Any]:
        if not dist.is_initialized():
            return [value]
        gathered: list[Any] = [None] * self.world_size
        dist.all_gather_object(gathered, value)
        return gathered

    @override
    def exchange_objects(self, parcels: Sequence[Any]) -> list[Any]:
        if not dist.is_initialized():
            return list(parcels)
        pickled = [torch.frombuffer(bytearray(pickle.dumps(parcel)), dtype=torch.uint8) for parcel in parcels]
        sizes = torch.tensor([len(p) for p in pickled], device=self.root_device)
        incoming = torch.empty_like(sizes)
        dist.all_to_all_single(incoming, sizes)
        received = torch.empty(int(incoming.sum()), dtype=torch.uint8, device=self.root_device)
        sent = torch.cat(pickled).to(self.root_device)
        dist.all_to_all_single(received, sent, incoming.tolist(), sizes.tolist())
        return [pickle.loads(part.numpy().tobytes()) for part in received.cpu().split(incoming.tolist())]

    @override
    def all_gather(self, tensor: Any, group: Any = None, sync_grads: bool = False) -> Any:  # type: ignore[override]
        """Collect from all ranks. Two call forms: Lightning's has a `group` and stacks along a new first dimension.

        Without a group it is LightRFT's: `tensor` may be nested dicts and lists of tensors and numbers, which are
        concatenated along dimension 0 in the order of the ranks.
        """
        if group is not None:
            return ParallelStrategy.all_gather(self, tensor, group=group, sync_grads=sync_grads)
        if not dist.is_initialized():
            return tensor
        return tree_map(self._all_gather_one, tensor)

    def _all_gather_one(self, value: Any) -> Any:
        if not isinstance(value, Tensor | int | float):
            return value
        tensor = torch.as_tensor(value).detach()
        here = (tensor if tensor.ndim else tensor[None]).to(self.root_device).contiguous()
        gathered = [torch.empty_like(here) for _ in range(self.world_size)]
        dist.all_gather(gathered, here)
        return torch.cat(gathered).to(tensor.device)


def _of_rank(local_rank: int, devices: Sequence[torch.device]) -> torch.device:
    """The device of a process, in whose environment (Ray) there may be no other than its own."""
    if local_rank < len(devices):
        return devices[local_rank]
    if devices[0].type == "cpu" or torch.cuda.device_count() == 1:
        return devices[0]
    raise MisconfigurationException(
        f"Trainer(devices={len(devices)}): this is process {local_rank + 1} of its machine, where "
        f"{torch.cuda.device_count()} GPUs are seen: set devices to the number of processes of each machine"
    )


def _of(lightnings: Any, strategy: ParallelStrategy) -> Any:
    """The value of a property of `ParallelStrategy`, which `StrategyBase` hides."""
    return lightnings.fget(strategy)
