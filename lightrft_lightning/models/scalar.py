"""Models that give numbers in place of words: critics (one a token) and reward models (one a text).

Both are Hugging Face's sequence classification with a single label: the backbone and a linear ``score`` head without
bias. So a reward model's folder can start a critic, and either is opened by `from_pretrained`.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightrft_lightning._errors import import_extra
from lightrft_lightning.experience.packing import PROMPT, PackedBatch
from lightrft_lightning.models.loading import (
    Source,
    check_found,
    made_or_found,
    not_loaded,
    sizes_explained,
    with_right_kernel,
)
from lightrft_lightning.models.logprobs import backbone_of, check_layout, layout_inputs, replaced_forward
from lightrft_lightning.models.outputs import plain_outputs
from lightrft_lightning.models.remote_code import code_refused
from lightrft_lightning.models.rope import of_its_own_length
from lightrft_lightning.models.streaming import parameters_on_meta

if TYPE_CHECKING:
    from transformers import PreTrainedModel


AT_END = "scored_at_end_token"
"""What the config of a model says that `RewardModule` has trained, as it reads the score of a text at its end token."""


def load_scalar_model(
    source: Source, *, dtype: torch.dtype = torch.float32, attn_implementation: str | None = None
) -> PreTrainedModel:
    """A model with one number as its output.

    Args:
        source: as for `load_model`. The head of a sequence-classification model is kept; a causal language model
            gets a new one, all zeros, so that it says 0 until it has learnt something.
        dtype: of the weights.
        attn_implementation: as in `load_model`, without ``auto``.

    Raises:
        FileNotFoundError: as `load_model`.
        ValueError: a model with several labels, or one that lacks weights besides the head's.
    """
    found = made_or_found(source)
    with parameters_on_meta(False):
        if isinstance(found, str):
            model, new = _from_pretrained(found, dtype, attn_implementation)
        else:
            model, new = with_scalar_head(found.model()), True
            if attn_implementation is not None:
                model.set_attn_implementation(attn_implementation)
    with_right_kernel(model, attn_implementation)
    head = scalar_head(model)
    if new:
        nn.init.zeros_(head.weight)
    text = model.config.get_text_config()
    if text.pad_token_id is None:  # Hugging Face's forward needs one, and finds the last token by it
        ends = text.eos_token_id
        text.pad_token_id = ends[0] if isinstance(ends, list) else ends
    return model.to(dtype)


def _from_pretrained(found: str, dtype: torch.dtype, attn_implementation: str | None) -> tuple[Any, bool]:
    transformers = import_extra("transformers", "hf")
    try:
        with code_refused(found):
            check_found(found)
            config = transformers.AutoConfig.from_pretrained(found, trust_remote_code=False)
        classifies = any("SequenceClassification" in name for name in config.architectures or ())
        if classifies and config.num_labels != 1:
            raise ValueError(
                f"{found} is a classifier with {config.num_labels} labels: a reward or value model has one"
            )
        config.num_labels = 1
        named = {"config": config, "attn_implementation": attn_implementation, "output_loading_info": True}
        auto = transformers.AutoModelForSequenceClassification
        with code_refused(found), sizes_explained(found):
            model, report = auto.from_pretrained(found, dtype=dtype, trust_remote_code=False, **named)
    except OSError as err:
        raise FileNotFoundError(not_loaded(found, err)) from err
    head = {f"{name}.weight" for name, module in model.named_modules() if module is scalar_head(model)}
    missing = sorted(set(report["missing_keys"]) - (set() if classifies else head))
    if missing:
        raise ValueError(f"{found} holds no weights for {len(missing)} parameters of the model, e.g. {missing[0]!r}")
    return model, not classifies


def with_scalar_head(causal_lm: Any) -> Any:
    """A copy of `causal_lm`'s backbone with a new head, all zeros."""
    config = copy.deepcopy(causal_lm.config)
    config.num_labels = 1
    config.architectures = None
    auto = import_extra("transformers", "hf").AutoModelForSequenceClassification
    named = {"dtype": causal_lm.dtype, "attn_implementation": config._attn_implementation}
    with torch.random.fork_rng(devices=[]), code_refused(config.name_or_path or type(causal_lm).__name__):
        model = auto.from_config(config, trust_remote_code=False, **named)
    backbone_of(model).load_state_dict(backbone_of(causal_lm).state_dict())
    nn.init.zeros_(scalar_head(model).weight)
    return model


def scalar_head(model: Any) -> nn.Linear:
    """The linear layer that makes the number.

    Raises:
        TypeError: `model` is no sequence-classification model of the kind that is built on a decoder.
    """
    head = getattr(model, "score", None)
    if not isinstance(head, nn.Linear) or head.out_features != 1:
        raise TypeError(f"{type(model).__name__} has no linear `score` head with one output")
    return head


def completion_values(model: Any, batch: PackedBatch) -> Tensor:
    """``[N]`` float32: the value of the state in which each policy token of `batch` was chosen.

    That is the head's output at the position before the token, so that the value of a completion's first token is a
    function of its prompt alone.

    Args:
        model: from `load_scalar_model`, prepared by a strategy or not.
        batch: from `pack`, on the model's device.

    Raises:
        ValueError: prompts are shared in `batch` and the model cannot take that.
        TypeError: `model` has no scalar head.
    """
    return _numbers_at(model, batch, batch.row, batch.column)


def completion_scores(model: Any, batch: PackedBatch) -> tuple[Tensor, Tensor]:
    """What a reward model says about each of the T texts (prompt and completion) in `batch`.

    It is what ``AutoModelForSequenceClassification`` gives for the text alone, without padding: the head's output at
    the last token that is not the model's padding token. So where the end token pads as well, the text is scored at
    the token before its end.

    Args:
        model: from `load_scalar_model`, prepared by a strategy or not.
        batch: from `pack`, on the model's device.

    Returns:
        The scores ``[T]`` in float32, and the index of each text's trajectory ``[T]`` in the list given to `pack`.

    Raises:
        ValueError: as `completion_values`.
        TypeError: as `completion_values`.
    """
    row, column, trajectory = batch.ends()
    piece, branch = batch.piece[row], batch.branch[row]  # of the whole rows, [T, L]
    own_branch, own_piece = (table[row, column][:, None] for table in (batch.branch, batch.piece))
    is_text = (piece == own_piece) & ((branch == own_branch) | (branch == PROMPT))
    is_text &= batch.input_ids[row] != model.config.get_text_config().pad_token_id
    last = (is_text * torch.arange(1, piece.shape[1] + 1, device=piece.device)).amax(dim=1) - 1
    return _numbers_at(model, batch, row, last), trajectory


def completion_hidden(model: Any, batch: PackedBatch) -> Tensor:
    """``[N, H]`` what the head of `model` would read in place of `completion_values`."""
    return _at(model, batch, batch.row, batch.column, nn.Identity())


def plain_hidden(model: Any, input_ids: Tensor) -> Tensor:
    """``[L, H]`` what it would read of one text ``[1, L]``."""
    backbone = backbone_of(model)
    hidden = replaced_forward(model, lambda **inputs: backbone(**inputs).last_hidden_state[0])
    with hidden, plain_outputs(model):
        return model(input_ids=input_ids, use_cache=False)


def has_scalar_head(model: Any) -> bool:
    """Whether `model` gives a number in place of words."""
    return isinstance(getattr(model, "score", None), nn.Linear)


def _numbers_at(model: Any, batch: PackedBatch, row: Tensor, column: Tensor) -> Tensor:
    """``[N]``, at least float32: the head's output at these positions of the rows."""
    numbers = _at(model, batch, row, column, scalar_head(model))[:, 0]
    return numbers.to(torch.promote_types(numbers.dtype, torch.float32))


def _at(model: Any, batch: PackedBatch, row: Tensor, column: Tensor, head: nn.Module) -> Tensor:
    check_layout(model, batch)
    backbone = backbone_of(model)

    def forward(**inputs: Any) -> Tensor:
        with of_its_own_length(model, batch):
            return head(backbone(**inputs).last_hidden_state[row, column])

    inputs = {"input_ids": batch.input_ids, "use_cache": False, **layout_inputs(model, batch)}
    with replaced_forward(model, forward), plain_outputs(model):
        return model(**inputs)
