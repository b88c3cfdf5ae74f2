import pytest
import torch
from torch import nn

from lightrft_lightning import RLHFModule, SFTModule
from lightrft_lightning.models.tiny import char_tokenizer, tiny_llama


def replaced(model):
    model.forward = torch.compile(model.forward, backend="eager")
    return model


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda model: torch.compile(model, backend="eager"), r"OptimizedModule: .* RLHFModule\(compile=True\)"),
        (replaced, "model=LlamaForCausalLM: its forward was replaced on the object"),
        (
            nn.DataParallel,
            "model=DataParallel: pass a causal language model of Transformers, .* without another wrapper",
        ),
        (lambda model: nn.Linear(2, 2), "model=Linear: pass a causal language model"),
    ],
)
def test_objects_that_compute_something_else_than_their_parts_are_refused(make, message):
    for module in (lambda model: RLHFModule(model, "exact_match", tokenizer=char_tokenizer()), SFTModule):
        with pytest.raises(ValueError, match=message):
            module(make(tiny_llama(width=16, layers=1)))
