"""Log-probabilities of completion tokens without the ``[tokens, vocabulary]`` logits that they come from."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

from lightrft_lightning._errors import import_extra
from lightrft_lightning.experience.packing import PackedBatch
from lightrft_lightning.models.outputs import plain_outputs
from lightrft_lightning.models.rope import of_its_own_length
from lightrft_lightning.models.windows import MASKED_KINDS, shared_prompt_masks

if TYPE_CHECKING:
    from transformers import PreTrainedModel


_CHUNK_LOGITS = 1 << 25
"""Most logits of a chunk; with a vocabulary of 150,000 more tokens at once would be no faster, and need gigabytes."""


class LogProbs(NamedTuple):
    """Of the N policy tokens of a `PackedBatch`, in its order, float32.

    Attributes:
        logprobs: ``[N]`` log-probability of each token.
        entropy: ``[N]`` entropy (nats) of the distribution it was drawn from, without gradient; None if not asked for.
        greedy: ``[N]`` bool, whether it is the most likely token; None if not asked for.
        hidden: ``[N, H]`` the backbone's output that the distribution was computed from; None if not asked for.
    """

    logprobs: Tensor
    entropy: Tensor | None
    greedy: Tensor | None
    hidden: Tensor | None


def completion_logprobs(
    model: nn.Module,
    batch: PackedBatch,
    temperature: float | Tensor = 1.0,
    chunk_size: int | None = None,
    entropy: bool = False,
    greedy: bool = False,
    hidden: bool = False,
) -> LogProbs:
    """Log-probabilities of a batch's policy tokens under `model`.

    The backbone runs once over the rows. The output head runs only at the positions that predict policy tokens,
    `chunk_size` of them at a time, and again in the backward pass in place of keeping its logits, so the peak memory of
    this step does not grow with N beyond the hidden states.

    The head is the model's own forward with the backbone's output put in, so biases, tied weights, soft-capping (Gemma
    2) and logit scales (Cohere, Granite) are right by construction. All of it happens inside one call of `model`, so
    the hooks of whatever wraps it (PEFT, DDP, FSDP2, DeepSpeed) run as usual.

    Args:
        model: a Hugging Face causal language model, or a wrapper that contains one.
        batch: from `pack`, on the model's device.
        temperature: the sampling temperature, of all tokens or ``[N]`` of each; logits are divided by it.
        chunk_size: most tokens whose logits exist at the same time; the step's peak is about 2 times their float32
            size, 3 with `entropy` or a temperature. Default: 512, or fewer if their logits would take more than 128 MB.
        entropy: also compute the entropy of each distribution.
        greedy: also say of each token whether it is the most likely one.
        hidden: also return the hidden states, with gradient, for a head of the caller's.

    Raises:
        ValueError: `temperature` or `chunk_size` is not positive, or prompts are shared in `batch` and the model
            cannot take that (see `shared_prompt_problem`), or the adapter is a prompt-learning one.
        TypeError: `model` contains no Hugging Face causal language model.
    """
    # A number is looked at as it is: a tensor would have to be read back from the GPU, or has no values yet.
    if not (temperature > 0 if isinstance(temperature, float | int) else bool((temperature > 0).all())):
        raise ValueError(f"temperature={temperature!r}: must be above 0 (greedy decoding has no log-probabilities)")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size={chunk_size!r}: must be at least 1")
    causal_lm = find_causal_lm(model)
    check_layout(causal_lm, batch)
    if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        raise ValueError("a prompt-learning adapter adds tokens that packed rows do not have; use LoRA or the like")
    backbone, own_forward = backbone_of(causal_lm), causal_lm.forward
    chunk = chunk_size or min(512, max(1, _CHUNK_LOGITS // causal_lm.config.get_text_config().vocab_size))

    def forward(**inputs: Any) -> LogProbs:
        output_head, gradient = causal_lm.get_output_embeddings(), _WeightGradient()
        head_forward = _summing_forward(output_head, gradient)
        with of_its_own_length(causal_lm, batch):
            output = backbone(**{name: value for name, value in inputs.items() if value is not None})

        def head(hidden_NH: Tensor) -> Tensor:
            # The other fields (a mixture of experts' router logits) stay, because the model's forward may read them.
            rest = {**output, "last_hidden_state": hidden_NH[None]}
            with contextlib.ExitStack() as replaced:
                for module in (backbone, *_within(backbone)):
                    replaced.enter_context(replaced_forward(module, lambda *args, **kwargs: type(output)(**rest)))
                replaced.enter_context(replaced_forward(output_head, head_forward))
                replaced.enter_context(plain_outputs(causal_lm))  # also here, as the backward pass runs it again
                return own_forward().logits[0]

        hidden_NH = output.last_hidden_state[batch.row, batch.column]
        chunks = _equally_many(causal_lm, -(-len(hidden_NH) // chunk))
        gradient.calls = chunks
        scored = _chunked(head, hidden_NH, batch.target, temperature, chunks, entropy, greedy)
        return scored._replace(hidden=hidden_NH) if hidden else scored

    inputs = {"input_ids": batch.input_ids, "use_cache": False, **layout_inputs(causal_lm, batch)}
    with replaced_forward(causal_lm, forward), plain_outputs(causal_lm):
        return model(**inputs)


def layout_inputs(model: PreTrainedModel, batch: PackedBatch) -> dict[str, Any]:
    """What tells a Hugging Face model how `batch` is laid out: ``attention_mask``, and ``position_ids`` if need be."""
    implementation = model.config._attn_implementation
    if not batch.shared:  # right-padded rows have the positions that every model assumes by itself
        return {"attention_mask": batch.attention_mask(model.dtype, implementation)}
    masks = shared_prompt_masks(model.config.get_text_config(), batch, model.dtype, implementation)
    return {"attention_mask": masks, "position_ids": batch.position_ids}


def find_causal_lm(model: nn.Module) -> PreTrainedModel:
    """The Hugging Face causal language model that `model` is or wraps.

    Raises:
        TypeError: there is none.
    """
    pretrained = import_extra("transformers", "hf").PreTrainedModel
    found = next((module for module in model.modules() if isinstance(module, pretrained)), None)
    if found is None or backbone_of(found) is found or found.get_output_embeddings() is None:
        raise TypeError(f"{type(model).__name__} is not, and contains no, Hugging Face causal language model")
    return found


def backbone_of(model: Any) -> Any:
    """The part of a Hugging Face model below its head; the model itself if there is none."""
    if model.base_model is not model:
        return model.base_model
    inner = getattr(model, "model", None)  # Llama 4's text model does not say so
    return inner if isinstance(inner, nn.Module) else model


def _within(backbone: nn.Module) -> tuple[nn.Module, ...]:
    """What the model with the head may call in place of its backbone (OPT, BART)."""
    decoder = getattr(backbone, "decoder", None)
    return (decoder,) if isinstance(decoder, nn.Module) else ()


def pretrained_part(model: nn.Module) -> PreTrainedModel:
    """The outermost Hugging Face model that `model` is or wraps.

    Raises:
        TypeError: there is none.
    """
    pretrained = import_extra("transformers", "hf").PreTrainedModel
    for module in model.modules():
        if isinstance(module, pretrained):
            return module
    raise TypeError(f"{type(model).__name__} is not, and contains no, Hugging Face model")


def shared_prompt_problem(model: nn.Module, row: int = 0) -> str | None:
    """Why `model` cannot score completions that share a prompt within a row of so many tokens, or None if it can.

    Ask once, when the model is known, and pack with ``share_prompts=False`` if there is a problem.
    """
    inner = pretrained_part(model)
    config = inner.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ())
    name = type(inner).__name__
    if inner.config._attn_implementation not in ("sdpa", "eager", "flex_attention"):
        return f"attn_implementation={inner.config._attn_implementation!r} takes no mask for that; use 'sdpa'"
    if getattr(inner, "_is_stateful", False) or not kinds <= MASKED_KINDS:
        return f"{name} has recurrent layers, which read a row from left to right and ignore the mask"
    if not _takes_positions(inner):
        return f"{name} takes no position ids, so those of a second completion would be wrong"
    if getattr(config, "alibi", False):
        return f"{name} has alibi=True, a bias by the distance of tokens in the row"
    scale = getattr(config, "floor_scale", 0) if getattr(config, "attn_temperature_tuning", False) else 0
    if 0 < scale < row:
        return f"{name} has attn_temperature_tuning, a factor for tokens beyond place floor_scale={scale} of the row"
    return None


def _takes_positions(model: Any) -> bool:
    return "position_ids" in inspect.signature(backbone_of(model).forward).parameters


def check_layout(model: PreTrainedModel, batch: PackedBatch) -> None:
    """Raise ValueError if `batch` shares prompts and `model` cannot take that."""
    problem = shared_prompt_problem(model, batch.input_ids.shape[1]) if batch.shared else None
    if problem is not None:
        raise ValueError(f"{problem}; pack with share_prompts=False")


def _equally_many(causal_lm: PreTrainedModel, chunks: int) -> int:
    """The largest number of chunks of any rank, if each chunk gathers the head's weights from all of them.

    ZeRO-3 does; a rank with fewer chunks than the others would leave them waiting. The additional ones are empty.
    """
    partitioned = any(hasattr(p, "ds_id") for p in causal_lm.get_output_embeddings().parameters())
    if not partitioned or not dist.is_initialized():
        return max(chunks, 1)
    most = torch.tensor(chunks, device=causal_lm.device)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    return max(int(most), 1)


def _chunked(
    head: Callable[[Tensor], Tensor],
    hidden_NH: Tensor,
    target_N: Tensor,
    temperature: float | Tensor,
    chunks: int,
    entropy: bool,
    greedy: bool,
) -> LogProbs:
    warm = isinstance(temperature, Tensor) or temperature != 1
    temperature_N = torch.as_tensor(temperature, device=target_N.device).expand(target_N.shape)

    def score(
        hidden_CH: Tensor, target_C: Tensor, temperature_C: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        logits_CV = head(hidden_CH)
        # A log-softmax in bfloat16 is off by up to 0.08.
        logits_CV = logits_CV.to(torch.promote_types(logits_CV.dtype, torch.float32))
        return _TokenScores.apply(logits_CV, target_C, temperature_C if warm else None, entropy, greedy)

    results = []
    parts = (values.tensor_split(chunks) for values in (hidden_NH, target_N, temperature_N))
    for part in zip(*parts, strict=True):
        if torch.is_grad_enabled():
            # The head draws no random numbers, so its state need not be kept for the second run.
            results.append(checkpoint(score, *part, use_reentrant=False, preserve_rng_state=False))
        else:
            results.append(score(*part))
    logprobs, entropies, likely = zip(*results, strict=True)
    return LogProbs(
        logprobs=torch.cat(logprobs),
        entropy=torch.cat(entropies) if entropy else None,
        greedy=torch.cat(likely) if greedy else None,
        hidden=None,
    )


def _summing_forward(head: nn.Module, gradient: _WeightGradient) -> Callable[[Tensor], Tensor]:
    """A forward for `head` whose calls share `gradient`, or its own.

    Heads that are not plain linear layers (adapters, quantized weights), and those whose weight is cast or gathered for
    each call, keep their own.
    """
    weight = getattr(head, "weight", None)
    if (
        type(head).forward is not nn.Linear.forward
        or "forward" in head.__dict__
        or not isinstance(weight, Tensor)
        or not weight.requires_grad
        or hasattr(weight, "ds_id")
        or torch.is_autocast_enabled(weight.device.type)
    ):
        return head.forward
    return lambda hidden: _SummingLinear.apply(hidden, head.weight, head.bias, gradient)


class _WeightGradient:
    """The gradient of a weight that several calls use, in one tensor.

    Autograd would make a tensor for each call and one more for the sum; with a vocabulary of 150,000 each of them is
    larger than the logits of a chunk.
    """

    def __init__(self) -> None:
        self.calls = self.added = 0
        self.sum: Tensor | None = None

    def add(self, grad_CV: Tensor, hidden_CH: Tensor) -> Tensor | None:
        """The sum, once all calls have added to it."""
        if self.sum is None:
            self.sum = grad_CV.T @ hidden_CH
        else:
            self.sum.addmm_(grad_CV.T, hidden_CH)
        self.added += 1
        if self.added < self.calls:
            return None
        total, self.sum, self.added = self.sum, None, 0  # a graph may run backward again
        return total


class _TokenScores(torch.autograd.Function):
    """Log-probabilities of tokens; entropies and which are the most likely, without gradient, or None.

    `cross_entropy` makes a third copy of the logits. Here it is the probabilities alone, which become the gradient.
    """

    @staticmethod
    def forward(
        ctx: Any, logits_CV: Tensor, target_C: Tensor, temperature_C: Tensor | None, entropy: bool, greedy: bool
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        scaled_CV = logits_CV if temperature_C is None else logits_CV / temperature_C[:, None]
        probs_CV = scaled_CV.softmax(-1)
        # The largest probability is never close to 0, so its logarithm is as exact as that of the sum.
        logsumexp_C = scaled_CV.amax(-1) - probs_CV.amax(-1).log()
        logprobs_C = scaled_CV.gather(-1, target_C[:, None]).squeeze(-1) - logsumexp_C
        greedy_C = scaled_CV.argmax(-1) == target_C if greedy else None
        entropy_C = torch.special.entr(probs_CV).sum(-1) if entropy else None
        ctx.save_for_backward(probs_CV, target_C, temperature_C)
        ctx.mark_non_differentiable(*(scores for scores in (entropy_C, greedy_C) if scores is not None))
        return logprobs_C, entropy_C, greedy_C

    @staticmethod
    def backward(ctx: Any, grad_C: Tensor, *_: Any) -> tuple[Tensor, None, None, None, None]:  # type: ignore[override]
        probs_CV, target_C, temperature_C = ctx.saved_tensors
        scale_C = grad_C if temperature_C is None else grad_C / temperature_C
        # In place: the checkpoint around makes them again, and without one a second pass is an error of autograd's.
        of_logits_CV = probs_CV.mul_(-scale_C[:, None])
        return of_logits_CV.scatter_add_(-1, target_C[:, None], scale_C[:, None]), None, None, None, None


class _SummingLinear(torch.autograd.Function):
    """``nn.functional.linear`` of ``[..., H]``; with the weight's gradient in `gradient`."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight_VH: Tensor, bias_V: Tensor | None, gradient: _WeightGradient
    ) -> Tensor:
        ctx.save_for_backward(hidden, weight_VH)
        ctx.gradient, ctx.biased = gradient, bias_V is not None
        return linear(hidden, weight_VH, bias_V)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None, None]:  # type: ignore[override]
        hidden, weight_VH = ctx.saved_tensors
        grad_CV = grad.flatten(0, -2)
        of_bias = grad_CV.sum(0) if ctx.biased else None
        return grad @ weight_VH, ctx.gradient.add(grad_CV, hidden.flatten(0, -2)), of_bias, None


@contextlib.contextmanager
def replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """`module` runs `forward` in place of its own; its hooks stay."""
    before = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before
