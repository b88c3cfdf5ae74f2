"""What is written into parameters between the steps of DeepSpeed, as by a hook that clamps or follows another model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

if TYPE_CHECKING:
    from lightrft_lightning.strategies._zero import Place, ZeroModel


class Written:
    """Lets DeepSpeed's fp32 weights, and the parts of stage 3, have what was written into the parameters.

    DeepSpeed would write its own over it. At stage 3 a parameter that is in parts is empty between the steps, so it can
    be written into inside of ``GatheredParameters`` only; a small one is whole, and can be written into, but from an
    evaluation, after which DeepSpeed frees it, to the next pass.

    Args:
        zero: the model. Of one that is not trained only stage 3 has something to lose.
    """

    def __init__(self, zero: ZeroModel) -> None:
        self._zero = zero
        self.paused = False
        """Whether the weights are others for a while, see `StrategyBase.replaced_weights`."""
        trained = [p for group in zero.groups for p in group]
        self._watched = list(zero.model.parameters()) if zero.stage == 3 else trained
        self._counts = {p: self._count(p) for p in self._watched}
        self._since_step: set[nn.Parameter] = set()
        self.handle = zero.model.register_forward_pre_hook(self.look, prepend=True)

    @staticmethod
    def _count(parameter: nn.Parameter) -> tuple[int, int]:
        """How often torch has seen it, and this rank's part of it, written into."""
        part = getattr(parameter, "ds_tensor", None)
        return parameter._version, 0 if part is None else part._version

    def forget(self) -> None:
        """Take what is in the parameters now for what the last step has left there."""
        self._counts = {p: self._count(p) for p in self._watched}

    @torch.no_grad()
    def look(self, *_: Any) -> None:
        """At stage 3, let this rank's parts have what was written, or the next pass would undo it.

        Raises:
            MisconfigurationException: something was written into a parameter that is in parts.
        """
        for parameter in self._watched if not self.paused else ():
            before, now = self._counts[parameter], self._count(parameter)
            if now[0] != before[0]:
                self._since_step.add(parameter)
            shard = self._zero.shard(parameter) if self._zero.stage == 3 else None
            if shard is None:  # or of a small one all elements are with other ranks
                pass
            elif parameter.numel() == parameter.ds_numel:  # type: ignore[attr-defined]
                # Always: what is written through `.data` is not counted, and asking would wait for the device.
                shard.values.copy_(parameter.detach().view(-1)[shard.offset : shard.offset + len(shard.values)])
            elif now[0] != before[0] and now[1] == before[1]:
                raise MisconfigurationException(
                    f"{self._zero.name_of(parameter)} is with all ranks in parts, so what was written into it is lost: "
                    "write inside of deepspeed.zero.GatheredParameters([parameter], modifier_rank=0)"
                )
            self._counts[parameter] = self._count(parameter)

    @torch.no_grad()
    def adopt(self) -> None:
        """Let the fp32 weights have what was written since the last step."""
        self.look()
        for parameter, flat, place in self._zero.places() if not self.paused else ():
            if place is not None and (self._zero.stage == 3 or parameter.numel()):  # none: `offload`
                master = flat.detach().narrow(0, place.start, place.numel)
                part = self._computed_with(parameter, place)
                if part.device != master.device and parameter not in self._since_step:
                    continue  # offloaded: only what torch has counted is worth the way
                part = part.to(master.device)
                master.copy_(torch.where(master.to(part.dtype) == part, master, part.to(master.dtype)))
        self._since_step.clear()

    def _computed_with(self, parameter: nn.Parameter, place: Place) -> Tensor:
        """This rank's part of what forward passes take."""
        if self._zero.stage < 3:
            return parameter.detach().view(-1).narrow(0, place.offset, place.numel)
        shard = self._zero.shard(parameter)
        assert shard is not None
        return shard.values
