"""What a model keeps of the tokens before the next one, and which way of keeping it is right for a model.

Prompts of different lengths are decoded together with padding on the left, which a mask hides. A model with recurrent
layers reads through the padding, some have their states in an argument of another name, which ``**kwargs`` swallows,
some in themselves. None of this is an error anywhere. So each way is tried on made-up texts and compared with one
forward pass over each whole text, and the first that agrees is taken.
"""

from __future__ import annotations

import copy
import inspect
import logging
import random
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_only
from torch import Tensor, nn
from typing_extensions import override

from lightrft_lightning._errors import import_extra
from lightrft_lightning.models.rope import most_positions

log = logging.getLogger(__name__)

_LENGTHS = (12, 12, 7, 7)
"""Tokens of the made-up texts."""
_DECODED = 4
"""How many of these are decoded one by one."""
_ALLOWED = {torch.float32: 1e-4, torch.float16: 0.02, torch.bfloat16: 0.05}
"""Most that a way may be off, in nats, as the mean over the decoded tokens and what the model expects there."""
_NO_MEMORY = {"logits", "loss", "hidden_states", "attentions", "input_ids", "inputs_embeds", "labels"}


class Memory(ABC):
    """B sequences of T tokens, padding included, and the logits of the next one.

    Attributes:
        logits: ``[B, V]``, float32.
    """

    told: str
    """What it is, in a message."""
    pads = False
    """Whether sequences of different lengths can be in it."""
    logits: Tensor

    def __init__(self, model: Any, prompts: Sequence[Sequence[int]], last_position: int) -> None:
        self.model, self.last_position = model, last_position
        self.accepted = forward_arguments(model)
        self.start(prompts, next(model.parameters()).device)

    @abstractmethod
    def start(self, prompts: Sequence[Sequence[int]], device: torch.device) -> None:
        """Read `prompts`."""

    @abstractmethod
    def add(self, tokens: Tensor) -> None:
        """Read one more token of each sequence, ``[B]``."""

    @abstractmethod
    def select(self, rows: Sequence[int]) -> None:
        """Keep these sequences only, in this order; one may be named several times."""

    @property
    def can_grow(self) -> bool:
        """Whether others can `join` now."""
        return False

    def join(self, other: Any) -> None:
        """Append the sequences of `other`, of the same class, which is of no use afterwards. Both `can_grow`."""
        raise NotImplementedError

    def copy(self) -> Memory:
        """The same sequences; nothing is shared but the model."""
        shared = {id(self.model): self.model, id(self.accepted): self.accepted}
        return copy.deepcopy(self, shared)

    def forward(self, ids: Tensor, positions: Tensor | None = None, **more: Any) -> Any:
        """Run the model on ``[B, L]`` tokens; sets `logits` and returns the whole output."""
        optional = {"position_ids": positions, "logits_to_keep": 1}
        kwargs = {k: v for k, v in optional.items() if k in self.accepted and v is not None}
        output = self.model(input_ids=ids, **more, **kwargs)
        logits = output.logits[:, -1].float()
        self.logits = logits.cpu() if logits.device.type == "mps" else logits  # no float64 there, which a draw needs
        return output


class PaddedCache(Memory):
    """Keys and values of all tokens; sequences of any lengths, with padding on the left."""

    told, pads = "a cache with padding on the left", True

    @override
    def start(self, prompts: Sequence[Sequence[int]], device: torch.device) -> None:
        transformers = import_extra("transformers", "hf")
        if "past_key_values" not in self.accepted or "attention_mask" not in self.accepted:
            raise TypeError("its forward has no argument `past_key_values` or no `attention_mask`")
        longest = max(map(len, prompts))
        # The padding's id does not matter, because the mask hides it; 0 is in every vocabulary.
        ids = torch.tensor([[0] * (longest - len(p)) + list(p) for p in prompts], device=device)
        self.mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device)
        self.cache = transformers.DynamicCache(config=self.model.config)
        self._forward(ids, (self.mask.cumsum(-1) - 1).clamp(min=0))

    @override
    def add(self, tokens: Tensor) -> None:
        self.mask = nn.functional.pad(self.mask, (0, 1), value=1)
        # Rows that are finished run on until they leave the batch, but not to positions that the model does not have.
        positions = (self.mask.sum(-1, keepdim=True) - 1).clamp(max=self.last_position)
        self._forward(tokens[:, None].to(self.mask.device), positions)

    def _forward(self, ids: Tensor, positions: Tensor) -> None:
        self.forward(ids, positions, attention_mask=self.mask, past_key_values=self.cache, use_cache=True)

    @property
    @override
    def can_grow(self) -> bool:
        # Not in a window, which counts the tokens of all of its rows together.
        dynamic_layer = import_extra("transformers.cache_utils", "hf").DynamicLayer
        return all(type(layer) is dynamic_layer for layer in self._layers)

    @property
    def _layers(self) -> list[Any]:
        return self.cache.layers

    @override
    def select(self, rows: Sequence[int]) -> None:
        index = torch.tensor(rows, device=self.mask.device)
        self.cache.reorder_cache(index)  # which every kind of layer has, unlike `batch_select_indices`
        self.mask, self.logits = self.mask[index], self.logits[index]
        if self.can_grow:
            self._pad(self.mask.shape[1] - int(self.mask.sum(-1).max()))

    @override
    def join(self, other: PaddedCache) -> None:
        missing = other.mask.shape[1] - self.mask.shape[1]
        self._pad(-max(missing, 0))
        other._pad(-max(-missing, 0))
        for mine, its in zip(self._layers, other._layers, strict=True):
            mine.keys, mine.values = torch.cat([mine.keys, its.keys]), torch.cat([mine.values, its.values])
            its.keys = its.values = None
        self.mask, self.logits = torch.cat([self.mask, other.mask]), torch.cat([self.logits, other.logits])

    def _pad(self, less: int) -> None:
        """Take `less` columns of padding off, or add them if it is negative."""
        if less == 0:
            return
        self.mask = nn.functional.pad(self.mask, (-less, 0))
        for layer in self._layers:
            layer.keys, layer.values = (nn.functional.pad(v, (0, 0, -less, 0)) for v in (layer.keys, layer.values))


class _Even(Memory):
    """Sequences of one length, without padding."""

    @override
    def start(self, prompts: Sequence[Sequence[int]], device: torch.device) -> None:
        if len(set(map(len, prompts))) > 1:
            raise ValueError("only sequences of the same length")
        self.read(torch.tensor([list(p) for p in prompts], device=device))

    @abstractmethod
    def read(self, ids: Tensor) -> None:
        """Read the next tokens, ``[B, L]``."""

    @override
    def add(self, tokens: Tensor) -> None:
        self.read(tokens[:, None].to(next(self.model.parameters()).device))


class OwnMemory(_Even):
    """Whatever the model's output has that its forward takes: a cache, recurrent states."""

    told = "its own states"
    kept: Mapping[str, Any] | None = None
    tokens = 0

    @override
    def read(self, ids: Tensor) -> None:
        positions = torch.arange(self.tokens, self.tokens + ids.shape[1], device=ids.device).expand_as(ids)
        output = self.forward(ids, positions, use_cache=True, **(self.kept or {}))
        self.tokens += ids.shape[1]
        self.kept = {k: v for k, v in output.items() if k in self.accepted and k not in _NO_MEMORY and v is not None}
        if not self.kept:
            raise TypeError("its output has nothing that its forward takes back")

    @override
    def select(self, rows: Sequence[int]) -> None:
        assert self.kept is not None
        index = torch.tensor(rows, device=self.logits.device)
        self.kept = {name: _rows_of(value, index) for name, value in self.kept.items()}
        self.logits = self.logits[index]


class NoMemory(_Even):
    """All tokens, which the model reads anew for each further one."""

    told = "without a cache"
    ids: Tensor | None = None

    @override
    def read(self, ids: Tensor) -> None:
        self.ids = ids if self.ids is None else torch.cat([self.ids, ids], dim=1)
        self.forward(self.ids, use_cache=False)

    @override
    def select(self, rows: Sequence[int]) -> None:
        assert self.ids is not None
        index = torch.tensor(rows, device=self.ids.device)
        self.ids, self.logits = self.ids[index], self.logits[index]


def _rows_of(value: Any, index: Tensor) -> Any:
    """`value` with these rows of all tensors in it."""
    if isinstance(value, Tensor):
        return value.index_select(0, index.to(value.device)) if value.dim() else value
    if isinstance(value, Mapping):
        return type(value)((k, _rows_of(v, index)) for k, v in value.items())  # type: ignore[call-arg]
    if isinstance(value, list | tuple):
        return type(value)(_rows_of(v, index) for v in value)
    if hasattr(value, "reorder_cache"):
        value.reorder_cache(index)
    elif hasattr(value, "__dict__"):
        value.__dict__.update({k: _rows_of(v, index) for k, v in vars(value).items()})
    return value


def forward_arguments(model: Any) -> Mapping[str, inspect.Parameter]:
    """What the model's forward can be told by name. A PEFT wrapper takes anything, so ask the model inside."""
    return inspect.signature(_inner(model).forward).parameters


def _inner(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


# ---------------------------------------------------------------------------------------------------------- the choice


@torch.no_grad()
def settle_memory(model: Any) -> type[Memory]:
    """The first way of keeping what `model` has read with which it says what one pass over the whole text says.

    Says so in one line if it is not the fastest. To be called in evaluation mode.

    Raises:
        ValueError: there is none.
    """
    name = type(_inner(model)).__name__
    texts = _made_up_texts(model.config.get_text_config(decoder=True))
    problems: list[str] = []
    wanted = [_plain(model, text) for text in texts]
    if any(bool(values.isnan().any()) for values in wanted):
        return PaddedCache  # nothing can be compared; generation says for which prompt it is so
    for way in (PaddedCache, OwnMemory, NoMemory):
        try:
            off = _difference(_decoded(way, model, texts), wanted)
            problem = None if off <= _allowed(model) else f"off by {off:.2g} nats"
        except Exception as err:  # whatever a model raises that cannot be run in this way
            problem = f"{type(err).__name__}: {' '.join(str(err).split())[:100]}"
        if problem is None:
            _tell(name, way, problems)
            return way
        problems.append(f"{way.told}: {problem}")
    raise ValueError(
        f"TransformersRollout cannot generate with {name}: what it computes for a text token by token is not what it "
        f"computes for the whole ({'; '.join(problems)}). Use another model or engine"
    )


def _tell(name: str, way: type[Memory], problems: Sequence[str]) -> None:
    why = "; ".join(problems)
    if way is OwnMemory:
        rank_zero_info(f"TransformersRollout: {name} generates from prompts of equal length at a time ({why})")
    if way is NoMemory:
        rank_zero_only(log.warning)(
            "TransformersRollout: %s reads the whole text again for every token, which is slow (%s)", name, why
        )


def _made_up_texts(config: Any) -> list[list[int]]:
    rng, longest = random.Random(0), most_positions(config) or max(_LENGTHS)
    first = min(10, config.vocab_size // 2)  # the lowest ids are often special: some count positions without padding
    return [[rng.randrange(first, config.vocab_size) for _ in range(min(n, longest))] for n in _LENGTHS]


def _plain(model: Any, text: Sequence[int]) -> Tensor:
    """``[D + 1, V]`` log-probabilities around each of the last D tokens, by one pass over the text alone."""
    ids = torch.tensor([list(text)], device=next(model.parameters()).device)
    logits: Tensor = model(input_ids=ids, use_cache=False).logits[0, -_DECODED - 1 :]
    return logits.float().log_softmax(-1)


def _decoded(way: type[Memory], model: Any, texts: Sequence[Sequence[int]]) -> list[Tensor]:
    """The same for all texts, whose last tokens are read one by one."""
    if way.pads:
        return _decoded_together(way, model, texts)
    pairs = [texts[k : k + 2] for k in range(0, len(texts), 2)]
    return [found for pair in pairs for found in _decoded_together(way, model, pair)]


def _decoded_together(way: type[Memory], model: Any, texts: Sequence[Sequence[int]]) -> list[Tensor]:
    """One text joins the others, if that is possible; half way through the rows are turned round, one is doubled."""
    starts, last = [text[:-_DECODED] for text in texts], max(map(len, texts))
    memory = way(model, starts[:-1] if way.pads else starts, last)
    if memory.can_grow:
        memory.join(way(model, starts[-1:], last))
    elif way.pads:
        memory = way(model, starts, last)
    rows, found = list(range(len(texts))), [memory.logits]
    for step in range(_DECODED):
        memory.add(torch.tensor([texts[row][step - _DECODED] for row in rows]))
        found.append(memory.logits[[rows.index(row) for row in range(len(texts))]])
        if step == 1:
            turned = [*reversed(range(len(rows))), 0]
            memory.select(turned)
            rows = [rows[k] for k in turned]
    return list(torch.stack(found, dim=1).log_softmax(-1))


def _difference(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """Nats between two sets of distributions, weighted by what is expected; the mean over all places."""
    pairs = [(a.to(b.device), b) for a, b in zip(found, wanted, strict=True)]
    # Of tokens that are impossible (minus infinity) by both, there is no difference.
    off = [torch.where(a == b, 0.0, (a - b).abs() * b.exp()).sum(-1) for a, b in pairs]
    return float(torch.cat(off).nan_to_num(torch.inf).mean())


def _allowed(model: Any) -> float:
    """By the precision in which matrix products are computed."""
    dtype, device = model.dtype, next(model.parameters()).device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    if dtype == torch.float32 and device == "cuda" and torch.get_float32_matmul_precision() != "highest":
        dtype = torch.float16  # TF32 has as many bits
    return _ALLOWED.get(dtype, 1e-4)


# --------------------------------------------------------------------------------------------- weights that are changed


def weight_versions(model: nn.Module) -> list[int | None]:
    """Numbers that torch counts up when a tensor is written to."""
    return [None if p.is_inference() else p._version for p in model.parameters()]


@torch.no_grad()
def check_weights_stay(model: Any) -> None:
    """Look whether a model that has just generated and is back in its modes has other weights than it trains with.

    Raises:
        ValueError: it has; a forward pass has put them right.
    """
    device = next(model.parameters()).device
    generated = [float(p.double().abs().sum()) for p in model.parameters()]
    with torch.random.fork_rng():
        model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=device), use_cache=False)
    if generated != [float(p.double().abs().sum()) for p in model.parameters()]:
        raise ValueError(
            f"TransformersRollout: {type(_inner(model)).__name__} changes its weights in place in evaluation mode, so "
            "what is saved or sent after a rollout would not be what was trained: switch that off in its config"
        )
