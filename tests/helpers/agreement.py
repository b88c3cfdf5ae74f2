"""Whether an engine's completions have the log-probabilities that the trainer's own forward pass gives them."""

from __future__ import annotations

import pytest
import torch

from lightrft_lightning.models.tiny import char_tokenizer

TOKENIZER = char_tokenizer()
PROMPTS = [TOKENIZER(f"{a}+{b}=")["input_ids"] for a in (1, 22) for b in (3, 456)]


def trainers_logprobs(model, prompt, completion, temperature, top_k=0):
    """Of the tokens under the distribution that they were drawn from, by a forward pass."""
    ids = torch.tensor([[*prompt, *completion.token_ids]])
    logits = model(ids).logits[0, len(prompt) - 1 : -1].float() / (temperature or 1.0)
    if top_k:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -torch.inf)
    return logits.log_softmax(-1).gather(1, ids[0, len(prompt) :, None])[:, 0].tolist()


@torch.no_grad()
def check_agreement(model, groups, sampling):
    for prompt, group in zip(PROMPTS, groups, strict=True):
        assert len(group) == sampling.n
        for completion in group:
            expected = trainers_logprobs(model, prompt, completion, sampling.temperature, sampling.top_k)
            assert completion.logprobs == pytest.approx(expected, abs=1e-5)
