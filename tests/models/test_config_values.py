"""A config.json from somebody else: what it asks for is not fetched, not built, and not taken from elsewhere."""

from __future__ import annotations

import json

import pytest

from lightrft_lightning.checkpoints.adapters import _config
from lightrft_lightning.models.config_values import check_config
from lightrft_lightning.models.loading import load_config, load_model, load_tokenizer
from lightrft_lightning.models.scalar import load_scalar_model
from lightrft_lightning.models.streaming import parameters_on_meta
from lightrft_lightning.models.tiny import char_tokenizer, tiny_llama

KERNEL = "kernels-community/flash-attn"


@pytest.fixture
def folder(tmp_path):
    tiny_llama(width=16, layers=1).save_pretrained(tmp_path)
    char_tokenizer().save_pretrained(tmp_path)
    return tmp_path


def change(folder, **values):
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


@pytest.mark.parametrize("load", [load_model, load_scalar_model, load_config, load_tokenizer])
def test_kernels_and_endless_layers_are_refused_by_whatever_reads_the_folder(folder, load):
    load(folder)
    for name, value, message in (
        ("_attn_implementation", KERNEL, f"_attn_implementation='{KERNEL}' would fetch a kernel"),
        ("attn_implementation", {"text_config": KERNEL}, "would fetch a kernel from the hub and run it: take it out"),
        ("num_hidden_layers", 10**9, "num_hidden_layers=1000000000 is more than the 10000 layers"),
    ):
        before = (folder / "config.json").read_text()
        change(folder, **{name: value})
        with pytest.raises(ValueError, match=rf"config\.json: .*{message}"):
            load(folder)
        (folder / "config.json").write_text(before)


def test_parts_of_a_config_count_and_usual_values_are_fine():
    check_config({"num_hidden_layers": 2000, "attn_implementation": "flash_attention_2", "n_positions": 10**6}, "here")
    for values in ({"text_config": {"n_layer": 10**5}}, {"decoder_layers": 1e300}, {"x": {"y": {"num_layers": 10**5}}}):
        with pytest.raises(ValueError, match=r"here: .* layers that are built"):
            check_config(values, "here")


@pytest.mark.parametrize("name", ["vocab_size", "intermediate_size"])
def test_sizes_that_the_weights_do_not_have_are_refused_before_there_is_memory_for_them(folder, name):
    change(folder, **{name: 10**12})
    with pytest.raises(ValueError, match=r"its weights have other shapes than its config\.json says"):
        load_model(folder)
    with parameters_on_meta(), pytest.raises(ValueError, match=rf"has shape \(.*by config\.json it is .*{10**12}"):
        load_model(folder)


def test_a_folder_with_an_adapter_is_not_the_model_that_the_adapter_names(folder):
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "somebody/else"}))
    with pytest.raises(ValueError, match=r"holds an adapter beside its model \(adapter_config\.json\)"):
        load_model(folder)


def test_an_adapter_of_a_checkpoint_names_no_module_to_import():
    with pytest.raises(ValueError, match="has a megatron_config"):
        _config({"peft_type": "LORA", "megatron_config": {}, "megatron_core": "this"})
