"""What a model consists of, and what is refused before it is sent."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

from lightrft_lightning.engines.expected_tensors import expected_tensors
from lightrft_lightning.models.file_names import as_in_files
from lightrft_lightning.models.tiny import tiny_llama


def tied():
    model = tiny_llama(width=32, layers=2)
    model.config.tie_word_embeddings = True
    model.tie_weights()
    return model


def mixture():
    return AutoModelForCausalLM.from_config(
        Qwen3MoeConfig(
            vocab_size=16, hidden_size=32, intermediate_size=32, moe_intermediate_size=16, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=2, head_dim=16, num_experts=4, num_experts_per_tok=2,
        )
    )  # fmt: skip


def test_each_name_of_tied_weights_is_enough():
    expected, tensors = expected_tensors(tied(), in_files=True), tied().state_dict()
    for left_out in ("lm_head.weight", "model.embed_tokens.weight"):
        given = [item for item in tensors.items() if item[0] != left_out]
        assert list(expected.checked(given)) == given
    neither = [item for item in tensors.items() if item[0] not in ("lm_head.weight", "model.embed_tokens.weight")]
    with pytest.raises(ValueError, match=r"1 tensors of .* missing: 'model\.embed_tokens\.weight'"):
        list(expected.checked(neither))


def test_experts_are_as_in_files_or_as_in_the_model():
    model = mixture()
    files = list(as_in_files(model, model.named_parameters()))
    assert [n for n, _ in files] != [n for n, _ in model.named_parameters()]
    assert list(expected_tensors(model, in_files=True).checked(files)) == files
    parameters = list(model.named_parameters())
    assert list(expected_tensors(model, in_files=False).checked(parameters)) == parameters
    with pytest.raises(ValueError, match=r"missing: 'model\.layers\.1\.mlp\.experts\.3\.\w+_proj\.weight'"):
        list(expected_tensors(model, in_files=True).checked(i for i in files if ".1.mlp.experts.3." not in i[0]))


def test_an_adapter_is_none_of_its_tensors():
    model = get_peft_model(tiny_llama(width=32, layers=2), LoraConfig(target_modules=["q_proj"]))
    plain = list(tiny_llama(width=32, layers=2).named_parameters())
    assert list(expected_tensors(model, in_files=True).checked(plain)) == plain


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"model.norm.weight": torch.ones(33)},
            r"has the shape \[33\], in the engine's model it has \[32\]",
        ),
        ({"model.norm.wieght": torch.ones(32)}, "tensor 'model.norm.wieght'.*'model.norm.weight'"),
        ({"model.norm.weight": torch.ones(32, dtype=torch.int)}, "of torch.int32: weights are floating-point numbers"),
    ],
    ids=str,
)
def test_others_are_refused_before_anything_is_sent_of_them(change, message):
    expected, passed = expected_tensors(tiny_llama(width=32, layers=2), in_files=True), []
    with pytest.raises(ValueError, match=message):
        passed += expected.checked((change | dict(tiny_llama(width=32, layers=2).named_parameters()) | change).items())
    assert not passed


def test_a_model_that_cannot_be_built_again_costs_a_line(caplog):
    caplog.set_level("INFO")
    assert expected_tensors(torch.nn.Linear(2, 2), in_files=True) is None
    assert "names and shapes of weights are not checked before they are sent: " in caplog.text
