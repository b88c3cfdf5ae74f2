from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from lightrft_lightning.models.loading import MODEL_SOURCES, ModelSource, load_model, load_tokenizer
from lightrft_lightning.models.tiny import ALPHABET, char_tokenizer, tiny_llama


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


# --------------------------------------------------------------------------------------------------------- tokenizer


@given(text=st.text(ALPHABET))
def test_text_survives_the_round_trip(tiny_tokenizer, text):
    ids = tiny_tokenizer(text)["input_ids"]
    assert len(ids) == len(text)
    assert tiny_tokenizer.decode(ids) == text


def test_reloaded_tokenizer_is_the_same(tmp_path):
    tokenizer = char_tokenizer("ab \n<é+")
    tokenizer.save_pretrained(tmp_path)
    reloaded = AutoTokenizer.from_pretrained(tmp_path)
    text = "a  b\n\n <é+ "
    assert reloaded(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert reloaded.decode(reloaded(text)["input_ids"]) == text
    assert (reloaded.pad_token_id, reloaded.bos_token_id, reloaded.eos_token_id) == (0, 1, 2)


def test_special_tokens_are_left_out_of_text(tiny_tokenizer):
    ids = [*tiny_tokenizer("82")["input_ids"], tiny_tokenizer.eos_token_id, tiny_tokenizer.pad_token_id]
    assert tiny_tokenizer.decode(ids, skip_special_tokens=True) == "82"


def test_unknown_character_is_an_error_not_a_lost_token(tiny_tokenizer):
    with pytest.raises(Exception, match="WordLevel"):
        tiny_tokenizer("1x2")


@pytest.mark.parametrize("alphabet", ["", "aba"])
def test_bad_alphabet(alphabet):
    with pytest.raises(ValueError, match=f"alphabet={alphabet!r}"):
        char_tokenizer(alphabet)


# ------------------------------------------------------------------------------------------------------------- model


def test_default_size():
    assert 0.60e6 < sum(p.numel() for p in tiny_llama().parameters()) < 0.68e6


def test_seed_alone_decides_the_weights(monkeypatch):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = tiny_llama(3, width=32)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert torch.equal(weights(first), weights(tiny_llama(3, width=32)))
    assert not torch.equal(weights(first), weights(tiny_llama(4, width=32)))
    monkeypatch.setenv("PL_GLOBAL_SEED", "3")
    assert torch.equal(weights(first), weights(tiny_llama(width=32)))
    with torch.device("meta"):
        assert torch.equal(weights(first), weights(tiny_llama(3, width=32)))


def test_heads_must_fit_the_width():
    with pytest.raises(ValueError, match="width=30, heads=4"):
        tiny_llama(width=30)


def test_saved_model_is_loaded_again(tmp_path, tiny_model, tiny_tokenizer):
    tiny_model.save_pretrained(tmp_path)
    ids = torch.tensor([tiny_tokenizer("12+34=")["input_ids"]])
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(reloaded.eval()(ids).logits, tiny_model.eval()(ids).logits)
    assert reloaded.generation_config.eos_token_id == tiny_tokenizer.eos_token_id


# ------------------------------------------------------------------------------------------------------------ source


def test_source_with_options():
    source = {"name": "tiny-llama", "seed": 1, "layers": 1, "width": 32, "alphabet": "abc"}
    model, tokenizer = load_model(source, dtype=torch.bfloat16, attn_implementation="eager"), load_tokenizer(source)
    assert torch.equal(weights(model), weights(tiny_llama(1, layers=1, width=32, alphabet="abc")).bfloat16())
    assert model.config._attn_implementation == "eager"
    assert len(tokenizer) == model.config.vocab_size == 6


def test_source_by_name(tiny_tokenizer):
    assert torch.equal(weights(load_model("tiny-llama")), weights(tiny_llama()))
    assert load_tokenizer("tiny-llama").get_vocab() == tiny_tokenizer.get_vocab()


def test_unknown_option_of_a_source():
    with pytest.raises(ValueError, match=r"option of model 'tiny-llama' 'layer'. Did you mean 'layers'"):
        load_model({"name": "tiny-llama", "layer": 2})
    with pytest.raises(ValueError, match="Did you mean 'layers'"):
        load_tokenizer({"name": "tiny-llama", "layer": 2})


def test_registered_by_the_user(tmp_path, tiny_model, tiny_tokenizer, monkeypatch):
    monkeypatch.setattr(MODEL_SOURCES, "_entries", dict(MODEL_SOURCES._entries))
    tiny_model.save_pretrained(tmp_path / "step-3")
    tiny_tokenizer.save_pretrained(tmp_path / "step-3")
    MODEL_SOURCES.register("on-disk")(lambda step: tmp_path / f"step-{step}")
    MODEL_SOURCES.register("made")(ModelSource(lambda: tiny_model, lambda: tiny_tokenizer))
    assert torch.equal(weights(load_model({"name": "on-disk", "step": 3})), weights(tiny_model))
    assert load_tokenizer({"name": "on-disk", "step": 3}).get_vocab() == tiny_tokenizer.get_vocab()
    assert load_model("made") is tiny_model
