"""`RewardModule`: a reward model from pairs of a better and a worse text."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid
from typing_extensions import override

from lightrft_lightning._errors import check_types
from lightrft_lightning.experience.packing import PackedBatch, pack
from lightrft_lightning.experience.trajectory import Prompt, Trajectory
from lightrft_lightning.models.logprobs import pretrained_part
from lightrft_lightning.models.scalar import AT_END, completion_scores, load_scalar_model, scalar_head, with_scalar_head
from lightrft_lightning.supervised import MicroBatch, Sums, SupervisedModule, trajectories_of

log = logging.getLogger(__name__)


class RewardModule(SupervisedModule):
    """Learns which of two texts is preferred (Bradley-Terry): ``-log sigmoid(chosen - rejected - margin)``.

    The score of a text is the head's output at its last token, which is the end token (see `completion_scores`). Where
    the tokenizer pads with the end token, a new model gets another padding token. The loss is the mean over the
    pairs of all ranks. Logged are ``loss``, ``accuracy`` (share of pairs whose chosen text scores higher), ``margin``
    (mean of chosen - rejected) and ``reward`` (mean score of all texts).

    Args:
        model: Hugging Face folder, hub id or registered name (see `load_scalar_model`), or a model object: a causal
            language model gets a new head, all zeros; a classifier with one label goes on as it is.
        tokenizer: default: the one of `model`.
        center_coef: weight of ``(chosen + rejected)²``, which keeps the scores around 0 (arXiv 2312.09244).
        margin_column: column with the number by which the chosen text should win; default: 0 for all.
        **settings: see `SupervisedModule`.

    Raises:
        ValueError: as `SupervisedModule`, or `center_coef` is negative.

    Example:
        >>> rows = [{"prompt": "2+2=", "chosen": "4", "rejected": "5"}]
        >>> module = RewardModule("my-model", lr=1e-5)
        >>> Trainer(strategy="lightrft_fake").fit(module, PromptDataModule(train=rows, batch_size=1))
        >>> module.strategy.save_model(module.model, module.tokenizer, "my-reward-model")
    """

    completion_columns = ("chosen", "rejected")

    def __init__(
        self,
        model: Any = None,
        tokenizer: Any = None,
        center_coef: float = 0.0,
        margin_column: str | None = None,
        **settings: Any,
    ) -> None:
        check_types("RewardModule", RewardModule.__init__, {"center_coef": center_coef, "margin_column": margin_column})
        super().__init__(model, tokenizer, **settings)
        self.center_coef, self.margin_column = center_coef, margin_column
        self._check("center_coef", center_coef >= 0, "0 or more")
        self._save_hyperparameters(model, center_coef=center_coef, margin_column=margin_column)
        if self.model is not None and not hasattr(self.model, "score"):
            self.model = self._with_own_padding(with_scalar_head(self.model)).train()

    @override
    def _load_model(self, source: Any) -> nn.Module:
        model = load_scalar_model(source)
        return model if scalar_head(model).weight.any() else self._with_own_padding(model)

    @override
    def configure_model(self) -> None:
        super().configure_model()
        setattr(pretrained_part(self.model).config, AT_END, True)

    def _with_own_padding(self, model: Any) -> Any:
        """Let model and tokenizer pad with another token than the end, so that a new head reads the end of a text.

        Hugging Face reads the last token that is not the padding token.
        """
        tokenizer, config = self.tokenizer, model.config.get_text_config()
        end, names = tokenizer.eos_token_id, ("pad_token_id", "unk_token_id", "bos_token_id")
        pad = next((i for i in (getattr(tokenizer, name) for name in names) if i not in (None, end)), None)
        if pad is None:
            log.warning("the end token is also the padding token: texts are scored at the token before their end")
        elif pad != tokenizer.pad_token_id:
            self._tokenizer = copy.deepcopy(tokenizer)
            self._tokenizer.pad_token = tokenizer.convert_ids_to_tokens(pad)
        config.pad_token_id = end if pad is None else pad
        return model

    @override
    def _count(self, trajectories: Sequence[Trajectory]) -> int:
        return len(trajectories) // 2

    @override
    def _losses(self, batch: PackedBatch, trajectories: Sequence[Trajectory]) -> tuple[Tensor, Sums]:
        scores, index = completion_scores(self.model, batch)
        index, order = index.sort()
        chosen, rejected = scores[order].view(-1, 2).unbind(1)
        pairs = [trajectories[i].prompt for i in index[::2].tolist()]
        margins = torch.tensor([self._margin_of(prompt) for prompt in pairs], device=scores.device)
        difference, both = chosen - rejected, chosen + rejected
        loss = (self.center_coef * both.square() - logsigmoid(difference - margins)).sum()
        count = len(pairs)
        return loss, {
            "loss": (float(loss.detach()), count),
            "accuracy": (int((difference > 0).sum()), count),
            "margin": (float(difference.detach().sum()), count),
            "reward": (float(both.detach().sum()), 2 * count),
        }

    # ---------------------------------------------------------------- both texts of a pair are in one pass

    @override
    def _tokens_needed(self, prompt: Prompt) -> int:
        length, (chosen, rejected) = len(prompt.token_ids), map(len, prompt.completions)
        return length + chosen + rejected if self.share_prompts else 2 * (length + max(chosen, rejected))

    @override
    def _micro_batches(self, prompts: Sequence[Prompt]) -> list[MicroBatch]:
        if self.share_prompts:
            return super()._micro_batches(prompts)
        longest_first, made = sorted(prompts, key=self._tokens_needed, reverse=True), []
        while longest_first:
            count = self.token_budget // self._tokens_needed(longest_first[0])
            trajectories = trajectories_of(longest_first[:count])
            (batch,) = pack(trajectories, self.token_budget, share_prompts=False)
            made.append(MicroBatch(batch, trajectories))
            longest_first = longest_first[count:]
        return made

    # ---------------------------------------------------------------- data

    def _margin_of(self, prompt: Prompt) -> float:
        return 0.0 if self.margin_column is None else prompt.fields[self.margin_column]

    @override
    def _checked(self, prompts: Iterable[Prompt]) -> list[Prompt]:
        checked, column = super()._checked(prompts), self.margin_column
        for prompt in checked:
            margin = 0.0 if column is None else prompt.fields.get(column)
            if not isinstance(margin, int | float):
                raise ValueError(
                    f"margin_column={column!r}: must hold a number in each row, is {margin!r} in that of "
                    f"{prompt.text[:40]!r}, whose columns are {', '.join(map(repr, prompt.fields))}"
                )
        return checked
