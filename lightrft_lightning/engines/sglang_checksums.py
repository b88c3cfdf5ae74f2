"""What SGLang's checksums prove: it shows no values, and puts some tensors of a checkpoint together."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

FUSED = {
    **dict.fromkeys((".q_proj.", ".k_proj.", ".v_proj."), ".qkv_proj."),
    **dict.fromkeys((".gate_proj.", ".up_proj."), ".gate_up_proj."),
}
"""Layers that SGLang puts together."""

Sums = dict[tuple[int, int, str], str]
"""The checksum of each tensor, by replica, process and the name that SGLang has for it."""


def parse_sums(ranks: Iterable[Mapping[str, Any]]) -> Sums:
    """The checksums in an answer of ``/weights_checker``, whose replicas come in any order.

    Raises:
        AttributeError, IndexError, KeyError, TypeError, ValueError: the answer is malformed.
    """
    found: Sums = {}
    for rank in ranks:
        place = rank["parallelism_info"][0]  # a further one for each draft model, on the same GPU
        at = int(place["dp_rank"]), int(place["rank"])
        found |= {(*at, str(name)): str(value) for name, value in rank["checksums"].items()}
    if not found:
        raise ValueError("no checksums")
    return found


def bits(tensor: Tensor) -> str:
    """Fingerprint of every bit; unlike `weight_sync.digest`, -0 is not 0, as for SGLang."""
    plain = tensor.cpu().contiguous().flatten().view(torch.uint8).numpy()
    return hashlib.blake2b(plain.tobytes(), digest_size=16).hexdigest()


PADDING = 64
"""Rows by which SGLang may lengthen each process's part of the vocabulary."""

Digests = tuple[str, ...]
"""Of a tensor and its parts, see `fingerprints`."""


def fingerprints(tensor: Tensor, ranks: int, vocabulary: int | None) -> Digests:
    """Of the parts that processes may hold; all of them change if the tensor changes in every process for sure.

    Args:
        tensor: split by SGLang along one of its first two dimensions, or not at all.
        ranks: processes of a replica.
        vocabulary: rows of a tensor whose parts are padded, so that nobody knows where they begin and end.
    """
    if ranks == 1:
        return (bits(tensor),)
    parts = [part for dim in range(min(tensor.dim(), 2)) for part in tensor.tensor_split(ranks, dim)]
    if tensor.dim() and len(tensor) == vocabulary:
        rows = len(tensor) // ranks
        parts += [tensor[k * (rows + PADDING) : (k + 1) * rows] for k in range(ranks)]  # surely in the k-th
    return tuple(map(bits, parts or [tensor]))


def held_as(name: str) -> str:
    """SGLang's name of what holds a tensor of a checkpoint."""
    for member, fused in FUSED.items():
        name = name.replace(member, fused)
    return name


def skipped(wanted: Collection[str], names: Iterable[str]) -> list[str]:
    """Parts of names that leave as little as they can beside the wanted ones: layer by layer, not one by one."""
    kept = {_layer(name) for name in wanted}
    parts = {_layer(name) or name for name in names if name not in wanted} - kept
    return sorted(part for part in parts if not any(part in name for name in wanted))


def _layer(name: str) -> str:
    found = re.match(r".*?\.\d+\.", name)
    return found[0] if found else ""


class Changes:
    """Follows an update: each checksum must change if, and only if, what was sent for it did.

    Two parts of a fused tensor are never sent at the same time, or one that is lost would hide behind the other.

    Args:
        digests: of the tensors of the update before.
        sums: after it.
    """

    def __init__(self, digests: Mapping[str, Digests], sums: Sums) -> None:
        self._digests, self._sums = digests, dict(sums)
        self._places: dict[str, list[tuple[int, int, str]]] = {}
        for place in sums:
            self._places.setdefault(place[2], []).append(place)
        self.names = self._places.keys()
        self._fused = {name for name in digests if held_as(name) != name and held_as(name) in self.names}
        self._changed: set[str] = set()
        self._everywhere: set[str] = set()  # changed in each process, whatever part it holds
        self.wrong: set[str] = set()
        """Names, as SGLang has them, of what does not hold what was sent."""

    def waves(self, tensors: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
        """The tensors, in parts to be sent one after the other."""
        waves: list[dict[str, Tensor]] = [{}]
        for name, tensor in tensors.items():
            at = 0
            while name in self._fused and any(held_as(other) == held_as(name) for other in waves[at]):
                at += 1
                waves += [{}] if at == len(waves) else []
            waves[at][name] = tensor
        return (wave for wave in waves if wave)

    def fused(self, wave: Iterable[str]) -> set[str]:
        """What holds the parts in it, the checksums of which are to be looked at now."""
        return {held_as(name) for name in wave if name in self._fused}

    def sent(self, digests: Mapping[str, Digests], fused: Sums) -> None:
        """Note what was sent, and the checksums of what `fused` named."""
        changed, everywhere = set(), set()
        for name, value in digests.items():
            before = self._digests.get(name)
            if value != before:
                changed.add(held_as(name))
            if before is None or all(now != then for now, then in zip(value, before, strict=True)):
                everywhere.add(held_as(name))
        held = {held_as(name) for name in digests if name in self._fused}
        self._compare(held, changed, everywhere, fused)
        self._sums |= {place: value for place, value in fused.items() if place[2] in held}
        self._changed |= changed - held
        self._everywhere |= everywhere - held

    def finish(self, digests: Mapping[str, Digests], sums: Sums) -> None:
        """Look at the checksums of everything in the end."""
        held = {held_as(name) for name in digests}
        self._compare(held & self.names, self._changed, self._everywhere, sums)

    def _compare(
        self, held: Collection[str], changed: Collection[str], everywhere: Collection[str], sums: Sums
    ) -> None:
        for name in held:
            moved: dict[int, list[bool]] = {}
            for place in self._places[name]:
                moved.setdefault(place[0], []).append(sums.get(place) != self._sums[place])
            # A process may hold a part of a tensor in which nothing has changed.
            must = all if name in everywhere else any
            if {must(of_replica) for of_replica in moved.values()} != {name in changed}:
                self.wrong.add(name)
