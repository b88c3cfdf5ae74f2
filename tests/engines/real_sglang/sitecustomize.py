"""Lets the real SGLang 0.5.23 serve on a CPU: in processes with this folder on PYTHONPATH and SGLANG_USE_CPU_ENGINE=1.

What SGLang computes, schedules, checks and answers is its own, but for three things that only a GPU can run:
`enable_batch_invariant_mode` does nothing (so log-probabilities vary by 1e-6 with the batch), the hash behind seeded
draws is torch's instead of Triton's, and the memory saver is SGLang's own empty one (asleep, memory is not given back).
And its processes are forks of the first one: spawned, each would import everything again (30 s of a core, not 13).
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
import types

KERNELS = "sgl_kernel"
"""A package of kernels for GPUs and AMX. Much of SGLang imports it, nothing that is used here calls it."""
kept = []  # libraries of operators, which end when nobody holds them


class Absent:
    """Something of `KERNELS`, which may be named, but not called."""

    def __init__(self, name):
        self.__name__ = self.__qualname__ = name

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return Absent(f"{self.__name__}.{name}")

    def __call__(self, *args, **kwargs):
        raise NotImplementedError(f"{self.__name__} needs a GPU")


class AbsentModule(types.ModuleType):
    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return Absent(f"{self.__name__}.{name}")


def declare_operators(torchvision):
    """Of the CUDA build, which does not load its operators without CUDA, and then fails as they are not declared."""
    import torch

    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    kept.append(library)


def allow_torch_attention(choices):
    """Seeds count only in deterministic inference, which is refused with the only attention that runs here."""
    choices.DETERMINISTIC_ATTENTION_BACKEND_CHOICES.append("torch_native")
    choices.RADIX_SUPPORTED_DETERMINISTIC_ATTENTION_BACKEND.append("torch_native")


def leave_out_batch_invariance(ops):
    ops.enable_batch_invariant_mode = lambda *args, **kwargs: None


def leave_out_memory_saver(adapter):
    adapter.TorchMemorySaverAdapter.create = staticmethod(lambda enable: adapter._TorchMemorySaverAdapterNoop())


def add_up_without_kernels(parallel_state):
    """Ranks of a tensor-parallel replica, with torch's own collectives, as SGLang does where it has no kernel."""
    parallel_state.is_shm_available = lambda *args: False


def fork_processes(engine):
    """SGLang asks for ``spawn`` before it starts them."""
    set_start_method = engine.mp.set_start_method
    engine.mp.set_start_method = lambda method, force=False: set_start_method("fork", force)


def hash_in_torch(murmur):
    murmur.murmur_hash32 = murmur_hash32


def murmur_hash32(seed, positions, columns):
    """MurmurHash3 of 16 bytes (a seed of 64 bits, a position, a column), for each row and column."""
    import torch

    seed, positions, columns = (tensor.to(torch.int64) for tensor in (seed, positions, columns))
    state = torch.zeros_like(seed)
    for block in (low(seed), low(seed >> 32), low(positions)):
        state = mixed(state, block)
    state = mixed(state[:, None], low(columns)[None, :]) ^ 16  # the number of bytes
    state = low((state ^ (state >> 16)) * 0x85EBCA6B)
    state = low((state ^ (state >> 13)) * 0xC2B2AE35)
    return (state ^ (state >> 16)).to(torch.uint32)


def mixed(state, block):
    block = low(rotated(low(block * 0xCC9E2D51), 15) * 0x1B873593)
    return low(rotated(state ^ block, 13) * 5 + 0xE6546B64)


def rotated(value, bits):
    return low((value << bits) | (value >> (32 - bits)))


def low(value):
    return value & 0xFFFFFFFF


BEFORE = {"torchvision": declare_operators}
AFTER = {
    "sglang.srt.distributed.parallel_state": add_up_without_kernels,
    "sglang.srt.entrypoints.engine": fork_processes,
    "sglang.srt.utils.torch_memory_saver_adapter": leave_out_memory_saver,
    "sglang.kernels.ops.sampling.murmur_hash": hash_in_torch,
    "sglang.srt.arg_groups.choices": allow_torch_attention,
    "sglang.srt.batch_invariant_ops.batch_invariant_ops": leave_out_batch_invariance,
}
"""What is done before a module runs, or after."""


class Patched(importlib.abc.Loader):
    def __init__(self, loader, name):
        self.loader, self.name = loader, name

    def create_module(self, spec):
        return self.loader.create_module(spec)

    def exec_module(self, module):
        if self.name in BEFORE:
            BEFORE[self.name](module)
        self.loader.exec_module(module)
        if self.name in AFTER:
            AFTER[self.name](module)


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == KERNELS:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        if name not in BEFORE and name not in AFTER:
            return None
        if (spec := importlib.machinery.PathFinder.find_spec(name, path)) is not None:
            spec.loader = Patched(spec.loader, name)
        return spec

    def create_module(self, spec):
        return AbsentModule(spec.name)

    def exec_module(self, module):
        pass


sys.meta_path.insert(0, Finder())
