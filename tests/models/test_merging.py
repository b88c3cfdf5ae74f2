"""Adapters in the weights: what an engine or a folder gets computes what the layers with their adapters compute."""

from __future__ import annotations

import functools

import peft
import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model

from lightrft_lightning import FakeStrategy
from lightrft_lightning.convert import convert
from lightrft_lightning.engines.weight_sync import PolicyWeights
from lightrft_lightning.models.export import on_meta
from lightrft_lightning.models.lora import check_policy
from lightrft_lightning.models.merging import MergeError, check_mergeable, comes_apart, plain_tensors

SIZES = {
    "vocab_size": 24, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 32,
}  # fmt: skip
EXPERTS = {"head_dim": 8, "num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
CONFIGS = {
    "llama": transformers.LlamaConfig(**SIZES),
    "tied": transformers.LlamaConfig(**SIZES, tie_word_embeddings=True),
    "qwen2": transformers.Qwen2Config(**SIZES),
    "moe": transformers.Qwen3MoeConfig(**SIZES, **EXPERTS),
    "gpt2": transformers.GPT2Config(vocab_size=24, n_embd=16, n_layer=2, n_head=2, n_positions=32),
}
QV = ["q_proj", "v_proj", "c_attn"]
MATRICES = ["q_proj", "down_proj"]
lora = functools.partial(LoraConfig, task_type="CAUSAL_LM", r=2)
ADAPTERS = {
    "all linear layers": (lora(target_modules="all-linear"), "llama tied qwen2 moe gpt2"),
    "biases of lora": (lora(target_modules=QV, lora_bias=True), "qwen2 gpt2"),
    "all biases": (lora(target_modules=QV, bias="all"), "qwen2 gpt2"),
    "rslora": (lora(target_modules=QV, use_rslora=True), "llama gpt2"),
    "dora": (lora(target_modules=[*QV, "embed_tokens"], use_dora=True), "llama gpt2"),
    "ranks": (lora(target_modules=QV, rank_pattern={"v_proj": 3}, alpha_pattern={"q_proj": 3}), "qwen2 moe"),
    "pissa": (lora(target_modules=QV, init_lora_weights="pissa"), "tied gpt2"),
    "olora": (lora(target_modules=QV, init_lora_weights="olora"), "qwen2"),
    "some tokens": (lora(target_modules=QV, trainable_token_indices=[5, 6]), "llama tied moe gpt2"),
    "embeddings": (lora(target_modules=[*QV, "embed_tokens", "lm_head"]), "llama moe"),
    "a saved head": (lora(target_modules=QV, modules_to_save=["lm_head", "norm"]), "llama moe"),
    "a head saved with its embeddings": (
        lora(target_modules=QV, modules_to_save=["lm_head"], ensure_weight_tying=True), "tied gpt2",
    ),
    "layers twice": (lora(target_modules=QV, layer_replication=[(0, 2), (1, 2)]), "llama"),
    "one tensor of all experts": (lora(target_modules=QV, target_parameters=["mlp.experts.gate_up_proj"]), "moe"),
    "ia3": (peft.IA3Config(task_type="CAUSAL_LM", target_modules=QV, feedforward_modules=[]), "qwen2 gpt2"),
    "loha": (peft.LoHaConfig(task_type="CAUSAL_LM", r=2, target_modules=MATRICES), "llama"),
    "lokr": (peft.LoKrConfig(task_type="CAUSAL_LM", r=2, target_modules=MATRICES), "llama"),
    "oft": (peft.OFTConfig(task_type="CAUSAL_LM", oft_block_size=4, target_modules=MATRICES), "llama"),
    "vera": (peft.VeraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "c_attn"]), "tied gpt2"),
}  # fmt: skip
TABLE = [(adapter, kind) for adapter, (_, kinds) in ADAPTERS.items() for kind in kinds.split()]


def plain(config):
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def trained(settings, kind, copy=True):
    """A model whose adapters are no longer what they were at the start."""
    if copy:  # PEFT fills in what it finds in the model
        settings = type(settings)(**{k: v for k, v in settings.to_dict().items() if k in settings.__dataclass_fields__})
    model = get_peft_model(plain(type(CONFIGS[kind])(**CONFIGS[kind].to_dict())), settings).eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.2 * torch.randn_like(parameter)
    return model


def opened(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


def logprobs(model):
    with torch.no_grad():
        return model(input_ids=torch.arange(3, 13)[None]).logits.log_softmax(-1)


@pytest.mark.parametrize(("adapter", "kind"), TABLE)
def test_a_copy_and_an_exported_folder_compute_what_was_trained(adapter, kind, tmp_path):
    model = trained(ADAPTERS[adapter][0], kind)
    check_policy(model, "Engine", has_copy=True)
    copied = plain(model.config)
    before = logprobs(copied)
    sent = {name: tensor.clone() for name, tensor in PolicyWeights(FakeStrategy(), model)}
    assert copied.load_state_dict(sent, strict=False).unexpected_keys == []
    torch.testing.assert_close(logprobs(copied), logprobs(model), atol=1e-4, rtol=0)
    assert adapter == "layers twice" or (logprobs(model) - before).abs().max() > 1e-2
    FakeStrategy().save_model(model, None, tmp_path / "exported")
    FakeStrategy().save_ckpt(model, tmp_path / "checkpoint")
    convert(tmp_path / "checkpoint", tmp_path / "converted")
    for folder in ("exported", "converted"):
        torch.testing.assert_close(logprobs(opened(tmp_path / folder)), logprobs(model), atol=1e-4, rtol=0)


@pytest.mark.parametrize("adapter", [name for name in ADAPTERS if name != "layers twice"])
def test_an_adapter_alone_computes_what_was_trained_on_its_base_model(adapter, tmp_path):
    settings, kinds = ADAPTERS[adapter]
    model = trained(settings, kinds.split()[0])
    FakeStrategy().save_model(model, None, tmp_path / "exported", merge_lora=False)
    FakeStrategy().save_ckpt(model, tmp_path / "checkpoint")
    convert(tmp_path / "checkpoint", tmp_path / "converted", lora="keep")
    for folder in ("exported", "converted"):
        base = plain(CONFIGS[kinds.split()[0]])
        read = peft.PeftModel.from_pretrained(base, tmp_path / folder).eval()
        torch.testing.assert_close(logprobs(read), logprobs(model), atol=1e-4, rtol=0)


def test_the_active_adapter_is_written_whatever_its_name_and_however_it_got_there(tmp_path):
    second = trained(lora(target_modules=["down_proj"]), "llama")
    second.add_adapter("second", lora(target_modules=QV))
    second.set_adapter("second")
    own = plain(CONFIGS["llama"])
    own.add_adapter(lora(target_modules=QV), "own")
    by_hand = peft.inject_adapter_in_model(lora(target_modules=QV), plain(CONFIGS["llama"]))
    for name, model in {"second": second, "own": own, "by hand": by_hand}.items():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data += 0.2 * torch.randn_like(parameter)
        FakeStrategy().save_ckpt(model, tmp_path / name)
        convert(tmp_path / name, tmp_path / name / "merged")
        convert(tmp_path / name, tmp_path / name / "kept", lora="keep")
        if name == "by hand":
            with pytest.raises(
                ValueError, match=r"put into LlamaForCausalLM by hand, .* merge them, or make the model"
            ):
                FakeStrategy().save_model(model, None, tmp_path / name / "saved", merge_lora=False)
        else:
            FakeStrategy().save_model(model, None, tmp_path / name / "saved", merge_lora=False)
        for kept in {"kept", "saved"} - ({"saved"} if name == "by hand" else set()):
            read = peft.PeftModel.from_pretrained(plain(CONFIGS["llama"]), tmp_path / name / kept).eval()
            torch.testing.assert_close(logprobs(read), logprobs(model.eval()), atol=1e-4, rtol=0)
        torch.testing.assert_close(logprobs(opened(tmp_path / name / "merged")), logprobs(model), atol=1e-4, rtol=0)
    second.base_model.set_adapter(["default", "second"])
    with pytest.raises(ValueError, match="the adapters default, second are active together"):
        FakeStrategy().save_model(second, None, tmp_path / "both", merge_lora=False)


def test_an_adapter_is_not_written_without_what_was_trained_beside_it(tmp_path):
    strategy, model = FakeStrategy(), trained(lora(target_modules=QV), "llama")
    model.base_model.model.model.norm.requires_grad_(True)
    model, optimizer = strategy.prepare((model, torch.optim.AdamW(model.parameters(), lr=0.1)))
    strategy.backward(model(input_ids=torch.arange(3, 13)[None]).logits.sum(), model, optimizer)
    strategy.optimizer_step(optimizer, model, None)
    message = r"model\.norm\.weight was trained and is no part of the adapter.*--lora merge"
    with pytest.raises(ValueError, match=message):
        strategy.save_model(model, None, tmp_path / "saved", merge_lora=False)
    strategy.save_ckpt(model, tmp_path / "checkpoint")
    with pytest.raises(ValueError, match=message):
        convert(tmp_path / "checkpoint", tmp_path / "kept", lora="keep")
    assert not (tmp_path / "saved").exists() and not (tmp_path / "kept").exists()


def test_several_adapters_at_once_and_one_that_is_off():
    model = trained(lora(target_modules=["q_proj"]), "qwen2")
    model.add_adapter("second", lora(target_modules=["q_proj", "down_proj"], use_dora=False, lora_alpha=5))
    model.base_model.set_adapter(["default", "second"])
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.2 * torch.randn_like(parameter)
    for active in (["default", "second"], ["second"]):
        model.base_model.set_adapter(active)
        copied = plain(CONFIGS["qwen2"])
        copied.load_state_dict(dict(plain_tensors(model, model.named_parameters())))
        torch.testing.assert_close(logprobs(copied), logprobs(model), atol=1e-4, rtol=0)
    copied.load_state_dict(dict(plain_tensors(model, model.named_parameters(), merge=False)))
    assert torch.equal(logprobs(copied), logprobs(plain(CONFIGS["qwen2"])))


def test_weights_of_16_bits_are_merged_in_32_and_rounded_once():
    model = trained(lora(target_modules=["q_proj"]), "llama")
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    delta = layer.get_delta_weight("default").detach()
    wanted = (layer.base_layer.weight.detach().bfloat16().float() + delta).bfloat16()
    layer.base_layer.bfloat16()
    sent = dict(plain_tensors(model, model.named_parameters()))["model.layers.0.self_attn.q_proj.weight"]
    assert sent.dtype == torch.bfloat16 and torch.equal(sent, wanted)


@pytest.mark.parametrize("adapter", ["all linear layers", "biases of lora", "dora", "some tokens"])
@pytest.mark.parametrize("wrong", ["nothing is added", "too much is added"])
def test_a_wrong_merge_is_found_in_every_update(monkeypatch, adapter, wrong):
    settings, kinds = ADAPTERS[adapter]
    model = trained(settings, kinds.split()[0])
    layers = [peft.tuners.lora.Linear, peft.tuners.lora.Embedding, peft.tuners.trainable_tokens.TrainableTokensLayer]
    for layer in layers:
        merge = layer.merge

        def off(self, *args, merge=merge, **kwargs):
            if wrong == "too much is added":
                merge(self, *args, **kwargs)
                self.get_base_layer().weight.data *= 1.01

        monkeypatch.setattr(layer, "merge", off)
    with pytest.raises(MergeError, match=r"its merged weights compute something else than the layer with its adapter"):
        dict(plain_tensors(model, model.named_parameters()))
    with pytest.raises(MergeError, match="compute something else"):  # also before anything was learnt
        check_mergeable(
            get_peft_model(plain(CONFIGS["qwen2"]), lora(target_modules=QV[:2])), on_meta(plain(CONFIGS["qwen2"]))
        )


def test_a_lost_bias_is_found(monkeypatch):
    model = trained(ADAPTERS["biases of lora"][0], "qwen2")
    merge = peft.tuners.lora.Linear.merge

    def without_bias(self, *args, **kwargs):
        bias = self.base_layer.bias.data.clone()
        merge(self, *args, **kwargs)
        self.base_layer.bias.data = bias

    monkeypatch.setattr(peft.tuners.lora.Linear, "merge", without_bias)
    with pytest.raises(MergeError, match=r"layers\.0\.self_attn\.q_proj: its merged weights compute something else"):
        dict(plain_tensors(model, model.named_parameters()))


@pytest.mark.parametrize(
    ("settings", "kind", "message"),
    [
        (lora(target_modules=["o_proj"], lora_bias=True), "qwen2", r"'lora_bias': True.*o_proj: PEFT cannot merge"),
        (peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2), "llama", "prompt_encoder.*of no layer"),
        (lora(target_modules=QV, alora_invocation_tokens=[3]), "llama", "q_proj: PEFT cannot merge its adapter: "),
        (lora(target_modules=QV, layer_replication=[(0, 2), (0, 2)]), "qwen2", "can be built from the model's config"),
    ],
)  # fmt: skip
def test_adapters_that_no_engine_can_hold_are_refused_for_one_with_a_copy(settings, kind, message):
    model = trained(settings, kind)
    with pytest.raises(ValueError, match=f"Engine cannot hold a policy with these adapters.*{message}.*Transformers"):
        check_policy(model, "Engine", has_copy=True)


@pytest.mark.parametrize(
    "settings",
    [{"modules_to_save": ["lm_head"]}, {"target_modules": ["lm_head"]}, {"target_modules": ["embed_tokens"]}],
)
def test_adapters_that_take_tied_weights_apart_are_refused(settings):
    model = trained(lora(**{"target_modules": QV, **settings}), "tied")
    assert comes_apart(model, on_meta(model)) == ("model.embed_tokens.weight", "lm_head.weight")
    with pytest.raises(ValueError, match=r"take model.embed_tokens.weight and lm_head.weight apart.*tie_word_embedd"):
        check_policy(model, "Engine", has_copy=False)


@pytest.mark.parametrize("kind", ["tied", "gpt2"])
@pytest.mark.parametrize("settings", [{"modules_to_save": ["lm_head"]}, {"target_modules": ["embed_tokens", "wte"]}])
def test_tied_weights_that_came_apart_are_exported_as_two(settings, kind, tmp_path):
    model = trained(lora(**{"target_modules": QV, **settings}), kind)
    FakeStrategy().save_model(model, None, tmp_path / "exported")
    FakeStrategy().save_ckpt(model, tmp_path / "checkpoint")
    convert(tmp_path / "checkpoint", tmp_path / "converted")
    for read in (opened(tmp_path / "exported"), opened(tmp_path / "converted")):
        torch.testing.assert_close(logprobs(read), logprobs(model), atol=1e-4, rtol=0)
        assert not read.config.tie_word_embeddings and model.config.tie_word_embeddings


def test_adapters_that_cannot_be_merged_are_saved_alone_or_not_at_all(tmp_path):
    model = trained(lora(target_modules=QV, lora_bias=True), "llama")
    with pytest.raises(MergeError, match="q_proj: PEFT cannot merge its adapter"):
        FakeStrategy().save_model(model, None, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    FakeStrategy().save_model(model, None, tmp_path / "adapter", merge_lora=False)
    read = peft.PeftModel.from_pretrained(plain(CONFIGS["llama"]), tmp_path / "adapter").eval()
    torch.testing.assert_close(logprobs(read), logprobs(model), atol=1e-5, rtol=0)
    changed = get_peft_model(plain(CONFIGS["llama"]), lora(target_modules=QV, init_lora_weights="pissa_niter_4"))
    message = r"'pissa_niter_4' has changed the base weights, so it cannot be saved alone"
    with pytest.raises(ValueError, match=message):
        FakeStrategy().save_model(changed, None, tmp_path / "other", merge_lora=False)
    for name, saved in {"bias": model, "niter": changed}.items():
        FakeStrategy().save_ckpt(saved, tmp_path / name)
    with pytest.raises(MergeError, match="q_proj: PEFT cannot merge its adapter"):
        convert(tmp_path / "bias", tmp_path / "converted")
    with pytest.raises(ValueError, match=message):
        convert(tmp_path / "niter", tmp_path / "converted", lora="keep")
    assert not (tmp_path / "converted").exists()


def test_adapters_that_are_not_trained_are_refused():
    model = trained(lora(target_modules=QV), "llama")
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"q_proj: its adapter is merged, so nothing is trained: call unmerge_adapter"):
        check_policy(model, "Engine", has_copy=False)
    model.unmerge_adapter()
    model.disable_adapter_layers()
    with pytest.raises(ValueError, match=r"q_proj: its adapter is switched off: call enable_adapter_layers"):
        check_policy(model, "Engine", has_copy=False)
