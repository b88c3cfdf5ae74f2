"""Reward models: Hugging Face sequence classification with one label, in the training processes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightrft_lightning.data import template_columns
from lightrft_lightning.experience.trajectory import Completion, Prompt, Trajectory
from lightrft_lightning.models.layers import evaluating
from lightrft_lightning.models.loading import Source, load_tokenizer
from lightrft_lightning.models.logprobs import backbone_of, replaced_forward
from lightrft_lightning.models.outputs import plain_outputs
from lightrft_lightning.models.rope import by_length_of_row, most_positions
from lightrft_lightning.models.scalar import AT_END, load_scalar_model, scalar_head
from lightrft_lightning.models.tokens import end_ids
from lightrft_lightning.rewards._calls import Outcome, checked_value, guarded
from lightrft_lightning.rewards._spec import REWARDS

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@REWARDS.register("reward_model")
class RewardModel:
    """Scores a text with a model: the output of its head at the last token.

    The text is rendered anew for the reward model and read by its own tokenizer; the policy's tokens mean nothing to
    it. In a `Trainer` the model is a frozen submodule of the `RLHFModule`, so the strategy shards it, and checkpoints
    leave it out.

    Args:
        model: source of the model, see `load_scalar_model`, or the model itself.
            Where `RewardModule` has trained it, a text without a `template` ends as it did there: at the end token.
        template: format string over ``prompt``, ``completion`` and the columns of the data, e.g.
            ``"{prompt}{completion}</s>"``. The tokenizer adds its special tokens.
        chat_template: render the conversation with the reward model's own chat template in place of `template`: the
            prompt's messages, or the prompt as the user's message, and the completion as the assistant's. Default: if
            there is no `template` and the tokenizer has a chat template.
        tokenizer: default: the one of `model`.
        max_length: a text with more tokens has no score; default: as many as the model has positions.
        token_budget: most tokens (padding included) of one forward pass.
        name: in the logs.

    Raises:
        FileNotFoundError: there is no such model.
        ValueError: settings that exclude each other, or a template that cannot be read.

    Example:
        >>> Rewards([RewardModel("my-reward-model"), "exact_match"], weights=[1.0, 0.5])  # doctest: +SKIP
    """

    def __init__(
        self,
        model: Source | PreTrainedModel,
        *,
        template: str | None = None,
        chat_template: bool | None = None,
        tokenizer: Any = None,
        max_length: int | None = None,
        token_budget: int = 16384,
        name: str = "reward_model",
    ) -> None:
        if template is not None and chat_template:
            raise ValueError(f"template={template!r} and chat_template=True: give one of them")
        for setting, value in (("max_length", max_length), ("token_budget", token_budget)):
            if value is not None and value < 1:
                raise ValueError(f"RewardModel({setting}={value!r}): must be at least 1")
        self.model: PreTrainedModel | None = model if isinstance(model, nn.Module) else None  # type: ignore[assignment]
        self._source: Any = str(model.config.name_or_path) if isinstance(model, nn.Module) else model
        self.tokenizer = load_tokenizer(self._source) if tokenizer is None else tokenizer
        has_template = getattr(self.tokenizer, "chat_template", None) is not None
        if chat_template and not has_template:
            raise ValueError(
                "chat_template=True, but the reward model's tokenizer has no chat template: give template="
            )
        self._chat = template is None and has_template if chat_template is None else chat_template
        self._template = "{prompt}{completion}" if template is None else template
        self._own_end = template is None  # of a text: where the model was trained to read it
        columns = () if self._chat else template_columns(self._template)
        self.columns = tuple(c for c in columns if c not in ("prompt", "completion"))
        self._max_length, self._token_budget, self.name = max_length, token_budget, name

    def load(self) -> PreTrainedModel:
        """The model, frozen and in eval mode; read at the first call."""
        if self.model is None:
            self.model = load_scalar_model(self._source)
        scalar_head(self.model)  # raises if it has none
        return self.model.requires_grad_(False).eval()

    def render(self, trajectory: Trajectory) -> str:
        """The text that is scored."""
        prompt = trajectory.prompt
        if not self._chat:
            columns = {**prompt.fields, "prompt": prompt.text, "completion": trajectory.text}
            return self._template.format_map(columns)
        messages = prompt.messages or ({"role": "user", "content": prompt.text},)
        answer = {"role": "assistant", "content": trajectory.text}
        return str(self.tokenizer.apply_chat_template([*map(dict, messages), answer], tokenize=False))

    def score(self, trajectories: Sequence[Trajectory], strategy: Any = None) -> list[Outcome]:
        """What becomes of each sample; the values are floats.

        All ranks together, because the passes of sharded models wait for one another: a rank with less to do makes
        passes that only keep the others company.

        Args:
            trajectories: of this rank.
            strategy: what holds the model; None: nothing does, it computes where it is.
        """
        model = self.load()
        limit = self._max_length or most_positions(model.config)
        ends = end_ids(model, self.tokenizer) if self._own_end and getattr(model.config, AT_END, False) else frozenset()
        rows = [guarded(partial(self._tokens, t, limit, ends)) for t in trajectories]
        usable = [i for i, row in enumerate(rows) if row.failure is None]
        # Not in the order of arrival, so that the same texts are always in the same batches.
        usable.sort(key=lambda i: (len(rows[i].value), rows[i].value))
        batches = self._batches(usable, [row.value for row in rows])
        passes = len(batches) if strategy is None else int(strategy.all_reduce(len(batches), op="max"))
        device = model.device if strategy is None else strategy.root_device
        idle = [[self.tokenizer.pad_token_id or 0]]
        for k in range(passes):
            batch = batches[k] if k < len(batches) else []
            values = self._forward(model, [rows[i].value for i in batch] or idle, device)
            for i, value in zip(batch, values.tolist(), strict=False):
                rows[i] = checked_value(value)
        return rows

    def __call__(self, prompts: Sequence[str], completions: Sequence[str], **columns: Sequence[Any]) -> list[float]:
        """The scores of these texts.

        Raises:
            ValueError: one of them has no score.
        """
        rows = [{name: values[i] for name, values in columns.items()} for i in range(len(prompts))]
        outcomes = self.score([_as_trajectory(*one) for one in zip(prompts, completions, rows, strict=True)])
        for i, outcome in enumerate(outcomes):
            if outcome.failure:
                raise ValueError(f"no score for text {i}: {outcome.reason}")
        return [outcome.value for outcome in outcomes]

    def _tokens(self, trajectory: Trajectory, limit: int | None, ends: Collection[int]) -> list[int]:
        ids: list[int] = self.tokenizer(self.render(trajectory), add_special_tokens=not self._chat)["input_ids"]
        if not ids:
            raise ValueError("its text is empty")
        if ends:
            ids = self._as_trained(ids, ends)
        if limit is not None and len(ids) > limit:
            raise ValueError(f"its text has {len(ids)} tokens, max_length is {limit}")
        return ids

    def _as_trained(self, ids: list[int], ends: Collection[int]) -> list[int]:
        """The text up to where `RewardModule` reads its score: the end token, unless that pads."""
        last = max((i for i, token in enumerate(ids) if token in ends), default=None)
        if last is not None and not str(self.tokenizer.decode(ids[last + 1 :])).strip():
            ids = ids[: last + 1]  # a chat template goes on, with a line break
        elif not self._chat and self.tokenizer.eos_token_id is not None:
            ids = [*ids, self.tokenizer.eos_token_id]
        pad = self.load().config.get_text_config().pad_token_id
        return ids[:-1] if len(ids) > 1 and ids[-1] == pad else ids

    def _batches(self, order: Sequence[int], rows: Sequence[list[int]]) -> list[list[int]]:
        """Positions of the rows of each forward pass; `order` is by length."""
        batches: list[list[int]] = []
        for i in order:
            if not batches or (len(batches[-1]) + 1) * len(rows[i]) > self._token_budget:
                batches.append([])
            batches[-1].append(i)
        return batches

    @torch.no_grad()
    def _forward(self, model: Any, rows: Sequence[list[int]], device: torch.device) -> Tensor:
        """``[B]`` float32. Not by Hugging Face's own forward: it takes the last token that is no padding by its id, and
        finds another one where a text ends in the padding token.
        """
        ids = [torch.tensor(row) for row in rows]
        pad: Callable[..., Tensor] = partial(nn.utils.rnn.pad_sequence, batch_first=True)
        input_ids, mask = pad(ids).to(device), pad([torch.ones_like(row) for row in ids]).to(device)
        backbone, head, lengths = backbone_of(model), scalar_head(model), mask.sum(1)

        def forward(**inputs: Any) -> Tensor:
            with by_length_of_row(model, lengths, mask.shape[1]):
                hidden = backbone(**inputs).last_hidden_state
            return head(hidden[torch.arange(len(lengths), device=hidden.device), lengths - 1])[:, 0].float()

        with evaluating(model), plain_outputs(model), replaced_forward(model, forward):
            return model(input_ids=input_ids, attention_mask=mask, use_cache=False)


def _as_trajectory(prompt: str, completion: str, fields: Mapping[str, Any]) -> Trajectory:
    return Trajectory(Prompt((), prompt, fields), Completion((), (), "eos"), group=0, text=completion)
