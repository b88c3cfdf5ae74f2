"""`SFTModule`: supervised fine-tuning on prompts with answers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightrft_lightning._trainer import check_quantization
from lightrft_lightning.experience.packing import PackedBatch
from lightrft_lightning.experience.trajectory import Trajectory
from lightrft_lightning.models.loading import load_model
from lightrft_lightning.models.logprobs import completion_logprobs
from lightrft_lightning.models.lora import check_adapters
from lightrft_lightning.supervised import Sums, SupervisedModule


class SFTModule(SupervisedModule):
    """Teaches a language model the answers of the data set, as a start for `RLHFModule`.

    Next-token loss on the answer and its end token, given the prompt; the mean over the tokens of all ranks. Logged are
    ``loss`` (nats a token), ``perplexity``, ``accuracy`` (share of tokens that are the most likely ones) and ``exact``
    (share of answers that greedy decoding gets right as a whole).

    Args:
        model: Hugging Face folder, GGUF file, hub id, registered name (see `load_model`), or a model object, with
            adapters or without.
        tokenizer: default: the one of `model`.
        answer_column: column with the answer.
        lora: as for `RLHFModule`, like
        quantization: is.
        **settings: see `SupervisedModule`.

    Raises:
        ValueError: as `SupervisedModule`.

    Example:
        >>> module = SFTModule("my-model", lr=1e-5)
        >>> rows = [{"prompt": "2+2=", "answer": "4"}]
        >>> Trainer(strategy="lightrft_fake").fit(module, PromptDataModule(train=rows, batch_size=1))
        >>> module.strategy.save_model(module.model, module.tokenizer, "my-start")
    """

    def __init__(
        self,
        model: Any = None,
        tokenizer: Any = None,
        answer_column: str = "answer",
        lora: dict[str, Any] | None = None,
        quantization: str | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(model, tokenizer, **settings)
        check_adapters(model, lora, quantization)
        self.completion_columns = (answer_column,)
        self.lora, self.quantization = lora, quantization
        self._save_hyperparameters(model, answer_column=answer_column, lora=lora, quantization=quantization)

    @override
    def setup(self, stage: str) -> None:
        super().setup(stage)
        check_quantization(self.strategy, self.quantization)

    @override
    def _load_model(self, source: Any) -> nn.Module:
        return load_model(source, quantization=self.quantization)

    @override
    def _count(self, trajectories: Sequence[Trajectory]) -> int:
        return sum(len(t.completion.token_ids) for t in trajectories)

    @override
    def _losses(self, batch: PackedBatch, trajectories: Sequence[Trajectory]) -> tuple[Tensor, Sums]:
        answers = answer_loss(self.model, batch)
        return answers.loss, {
            "loss": (float(answers.loss.detach()), answers.tokens),
            "accuracy": (answers.right_tokens, answers.tokens),
            "exact": (answers.right_texts, answers.texts),
        }

    @override
    def _means(self, sums: Sums) -> dict[str, float]:
        means = super()._means(sums)
        return {**means, "perplexity": math.exp(min(means["loss"], 700.0))} if means else {}  # more is no float


class AnswerLoss(NamedTuple):
    """What a model says about given answers.

    Attributes:
        loss: sum of the cross-entropy (nats) of all answer tokens.
        tokens: how many these are.
        right_tokens: how many are the most likely ones after those before them.
        texts: number of answers.
        right_texts: answers all of whose tokens are: greedy decoding gets them right.
    """

    loss: Tensor
    tokens: int
    right_tokens: int
    texts: int
    right_texts: int


def answer_loss(model: nn.Module, batch: PackedBatch) -> AnswerLoss:
    """Next-token loss of the completions in `batch`, given their prompts.

    Args:
        model: a Hugging Face causal language model, or a wrapper that contains one.
        batch: from `pack`, on the model's device.
    """
    scored = completion_logprobs(model, batch, greedy=True)
    assert scored.greedy is not None
    texts, text = batch.trajectory.unique_consecutive(return_inverse=True)
    wrong = torch.zeros(len(texts), dtype=torch.long, device=text.device).index_add_(0, text, (~scored.greedy).long())
    return AnswerLoss(-scored.logprobs.sum(), len(text), int(scored.greedy.sum()), len(texts), int((wrong == 0).sum()))
