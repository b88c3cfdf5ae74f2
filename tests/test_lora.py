"""`RLHFModule(lora=..., quantization=...)`: what is trained, exported, sent to engines and resumed."""

from __future__ import annotations

import shutil
from pathlib import Path

import lightning.pytorch as pl
import peft
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from training import Record, StopAt, assert_same, make_data, make_module, make_trainer, weights_of
from transformers import AutoModelForCausalLM

from lightrft_lightning import PromptDataModule, RLHFModule, SFTModule
from lightrft_lightning.convert import convert
from lightrft_lightning.engines.remote import RemoteRollout
from lightrft_lightning.engines.weight_sync import PolicyWeights
from lightrft_lightning.models.quantized import is_quantized
from lightrft_lightning.models.tiny import char_tokenizer, tiny_llama

QLORA = {"lora": {"r": 4}, "quantization": "nf4"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    tiny_llama(seed=0, width=64, layers=2).save_pretrained(path)
    return str(path)


def logits(model):
    with torch.no_grad():
        return model(input_ids=torch.arange(3, 13)[None]).logits


def fit(path, module, engine=None, max_epochs=1, ckpt_path=None, stop=None):
    record = Record()
    checkpoint = ModelCheckpoint(path, save_last=True, save_top_k=0, every_n_train_steps=1)
    trainer = make_trainer(path, engine=engine, callbacks=[record, checkpoint, StopAt(stop)], max_epochs=max_epochs)
    trainer.fit(module, make_data(), ckpt_path=ckpt_path)
    return trainer, record


@pytest.mark.parametrize("settings", [{"lora": {}}, QLORA])
def test_adapters_alone_are_trained_and_the_exported_model_computes_the_same(tmp_path, folder, settings):
    module = make_module(model=folder, kl_coef=0.1, **settings)
    module.configure_model()
    before = weights_of(module)
    trainer, record = fit(tmp_path, module)
    changed = {name for name, p in weights_of(module).items() if not torch.equal(p, before[name])}
    assert changed == {name for name in before if ".lora_" in name} and len(changed) == 2 * 7 * 2  # matrices, layers
    assert module.reference is None and record.metrics[-1]["train/kl"] > 0
    trainer.strategy.save_model(module.actor, module.tokenizer, tmp_path / "merged")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert not is_quantized(exported) and not hasattr(exported.config, "quantization_config")
    torch.testing.assert_close(logits(exported), logits(module.actor.eval()), atol=1e-4, rtol=1e-4)
    assert (logits(exported) - logits(AutoModelForCausalLM.from_pretrained(folder))).abs().max() > 1e-3
    trainer.save_checkpoint(tmp_path / "kept")
    convert(tmp_path / "kept", tmp_path / "converted")
    converted = AutoModelForCausalLM.from_pretrained(tmp_path / "converted").state_dict()
    assert_same(converted, exported.state_dict())


def test_the_reference_of_a_resumed_run_is_the_policy_as_it_first_started(tmp_path, folder):
    settings = {"model": folder, "lora": {"r": 4, "init_lora_weights": "pissa"}, "kl_coef": 0.2, "lr": 3e-3}
    whole = make_module(**settings)
    _, record = fit(tmp_path / "whole", whole)
    assert record.metrics[0]["train/kl"] == 0 and record.metrics[-1]["train/kl"] > 1e-5
    assert whole.reference is None
    assert set(whole.start) == {name for name, p in whole.actor.named_parameters() if p.requires_grad}
    fit(tmp_path / "parts", make_module(**settings), stop=2)
    resumed = make_module(**settings)
    resumed.seed = 77  # of other matrices
    resumed.configure_model()
    resumed.seed = whole.seed
    _, rest = fit(tmp_path / "parts", resumed, ckpt_path="last")
    assert [m["train/kl"] for m in rest.metrics] == [m["train/kl"] for m in record.metrics[2:]]
    assert_same(weights_of(resumed), weights_of(whole))


STARTS = [
    {"init_lora_weights": "olora"},
    {"bias": "all"},
    {"modules_to_save": ["lm_head"], "use_dora": True},
    {"trainable_token_indices": [3, 4]},
]


@pytest.mark.parametrize("lora", STARTS, ids=lambda lora: next(iter(lora)))
def test_the_reference_is_where_whatever_is_trained_started(tmp_path, lora):
    record, module = Record(), make_module(lora={"r": 4, **lora}, kl_coef=0.2, lr=1e-2)
    make_trainer(tmp_path, callbacks=[record], limit_train_batches=2, limit_val_batches=0).fit(module, make_data())
    assert record.metrics[0]["train/kl"] == 0 and record.metrics[1]["train/kl"] > 1e-6


def adapted(config):
    """With one adapter that was trained before."""
    model = peft.get_peft_model(tiny_llama(seed=0, width=32, layers=2), config)
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.3)
    return model


@pytest.mark.parametrize("kind", ["LoraConfig", "IA3Config", "LoHaConfig", "VeraConfig", "OFTConfig", "LNTuningConfig"])
def test_adapters_of_any_kind_that_were_trained_before_are_where_the_policy_starts(tmp_path, kind):
    more = {"IA3Config": {"feedforward_modules": []}, "LNTuningConfig": {"target_modules": ["input_layernorm"]}}
    model = adapted(getattr(peft, kind)(**{"target_modules": ["q_proj", "o_proj"], **more.get(kind, {})}))
    if kind == "LoraConfig":  # two, of which one is trained
        model.add_adapter("second", peft.LoraConfig(r=2, target_modules=["v_proj"]))
        model.set_adapter("second")
    record, module = Record(), make_module(model=model, kl_coef=0.2, lr=1e-2)
    make_trainer(tmp_path, callbacks=[record], limit_train_batches=2, limit_val_batches=0).fit(module, make_data())
    assert record.metrics[0]["train/kl"] == 0 and record.metrics[1]["train/kl"] > 1e-6


def test_what_is_trained_may_not_change_while_it_is_compared_with_its_start(tmp_path):
    class Thaw(pl.Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            module.actor.get_output_embeddings().weight.requires_grad_(batch_idx > 0)

    trainer = make_trainer(tmp_path, callbacks=[Thaw()], limit_val_batches=0)
    with pytest.raises(RuntimeError, match=r"kl_coef=0.2: .*lm_head.weight is now trained, so the starting policy"):
        trainer.fit(make_module(lora={"r": 2}, kl_coef=0.2), make_data())


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="Linux says there what files are in memory")
def test_weights_in_four_bits_keep_nothing_of_the_file_in_memory(folder, tmp_path):
    own = shutil.copytree(folder, tmp_path / "own")  # models of other tests may keep the other one
    module = make_module(model=str(own), **QLORA)
    module.configure_model()
    assert str(own) not in Path("/proc/self/maps").read_text()


def test_weights_in_four_bits_take_less_memory_and_are_sent_in_full_precision(folder):
    quantized, plain = (make_module(model=folder, **settings) for settings in (QLORA, {"lora": {"r": 4}}))
    sizes = []
    for module in (quantized, plain):
        module.configure_model()
        layers = [p for name, p in module.actor.named_parameters() if "base_layer" in name]
        sizes.append(sum(p.numel() * p.element_size() for p in layers))
    assert sizes[1] == 8 * sizes[0]
    trainer = make_trainer(folder)
    sent = {name: t.clone() for name, t in PolicyWeights(trainer.strategy, quantized.actor)}
    original = dict(AutoModelForCausalLM.from_pretrained(folder).named_parameters())
    assert original.keys() <= sent.keys()
    for name, tensor in original.items():
        assert sent[name].shape == tensor.shape and sent[name].dtype == torch.float32
        # Half of the widest gap between two of NF4's numbers is 0.152 of a block's largest.
        assert (sent[name] - tensor).abs().max() <= 0.16 * tensor.abs().max(), name


def test_an_engine_in_another_process_computes_with_the_numbers_that_the_trainer_has(tmp_path, folder):
    _, record = fit(tmp_path, make_module(model=folder, **QLORA), engine=RemoteRollout(engine="transformers"))
    assert record.metrics[-1]["train/policy_version"] == 3
    assert max(m["train/mismatch_max"] for m in record.metrics) < 1e-3


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, folder):
    whole = make_module(model=folder, **QLORA)
    fit(tmp_path / "whole", whole)
    fit(tmp_path / "parts", make_module(model=folder, **QLORA), stop=2)
    resumed = make_module(model=folder, **QLORA)
    fit(tmp_path / "parts", resumed, ckpt_path=str(tmp_path / "parts" / "last.ckpt"))
    assert resumed.iteration == 4
    assert_same(weights_of(resumed), weights_of(whole))


def test_a_checkpoint_brings_its_own_weights_in_four_bits(tmp_path):
    """Not those of the folder that they came from, which may hold others by then."""
    tiny_llama(seed=0, width=64, layers=2).save_pretrained(tmp_path / "model")
    module = make_module(model=str(tmp_path / "model"), **QLORA)
    trainer, _ = fit(tmp_path, module)
    trainer.save_checkpoint(tmp_path / "kept")
    tiny_llama(seed=1, width=64, layers=2).save_pretrained(tmp_path / "model")
    again = RLHFModule.load_from_checkpoint(
        tmp_path / "kept", rewards="exact_match", tokenizer=char_tokenizer(), model=str(tmp_path / "model")
    )
    assert torch.equal(logits(again.actor.eval()), logits(module.actor.eval()))
    resumed = make_module(model=str(tmp_path / "model"), **QLORA)
    fit(tmp_path / "resumed", resumed, ckpt_path=str(tmp_path / "kept"))
    assert torch.equal(logits(resumed.actor.eval()), logits(module.actor.eval()))


def test_layers_that_are_computed_again_have_the_same_gradients(tmp_path, folder):
    usual, again = (make_module(model=folder, gradient_checkpointing=on, **QLORA) for on in (False, True))
    for module in (usual, again):
        make_trainer(tmp_path, limit_val_batches=0).fit(module, make_data())
    assert_same(weights_of(usual), weights_of(again))


@pytest.mark.parametrize("settings", [{"lora": {"r": 4}}, QLORA])
def test_supervised_training_has_them_too(tmp_path, folder, settings):
    rows = [{"prompt": "1+1=", "answer": "2"}, {"prompt": "1+2=", "answer": "3"}]
    module = SFTModule(folder, char_tokenizer(), lr=1e-2, **settings)
    trainer = pl.Trainer(
        strategy="lightrft_fake", accelerator="cpu", max_epochs=8, default_root_dir=tmp_path, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, log_every_n_steps=1,
    )  # fmt: skip
    trainer.fit(module, PromptDataModule(train=rows, batch_size=2))
    assert trainer.callback_metrics["train/loss"] < 2.0  # log(17) at the start
    assert all(".lora_" in name for name, p in module.model.named_parameters() if p.requires_grad)
    trainer.save_checkpoint(tmp_path / "kept")
    again = SFTModule.load_from_checkpoint(tmp_path / "kept")
    assert again.lora == settings["lora"] and torch.equal(logits(again.model.eval()), logits(module.model.eval()))
    trainer.strategy.save_model(module.model, module.tokenizer, tmp_path / "merged")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(exported), logits(module.model), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"quantization": "nf4"}, r"quantization='nf4': these weights cannot be trained; add lora=\{\}"),
        ({"quantization": "nf5", "lora": {}}, "unknown quantization 'nf5'. Did you mean 'nf4'"),
        ({"lora": {"rank": 4}}, r"lora=\{'rank': 4\}: unknown setting of peft.LoraConfig 'rank'"),
        ({"lora": {"r": 0}}, r"lora=\{'r': 0\}: "),
        ({"lora": {"init_lora_weights": "eva"}}, "'eva' starts from passes over data, which are not made here"),
        ({"lora": {"rank_pattern": {"q_prj": 2}}}, "nothing in the model has the name 'q_prj' of rank_pattern"),
        ({"lora": {"modules_to_save": ["lm_haed"]}}, "nothing in the model has the name 'lm_haed' of modules_to_save"),
        ({"lora": {"lora_alpha": 0}}, r"lora=\{'lora_alpha': 0\}: scaled by 0, .* set lora_alpha above 0"),
        ({"lora": {"arrow_config": {}}}, r"lora=\{'arrow_config': \{\}\}: PEFT cannot apply it, AttributeError"),
    ],
)
def test_settings_that_are_refused(folder, settings, message):
    with pytest.raises(ValueError, match=message):
        make_module(model=folder, **settings).configure_model()


def test_model_objects_and_made_models_are_not_quantized():
    with pytest.raises(ValueError, match="quantization='nf4' with a model object: pass the folder"):
        make_module(**QLORA)
    with pytest.raises(ValueError, match="model='tiny-llama' is made by code"):
        make_module(model="tiny-llama", **QLORA).configure_model()


def test_a_model_with_adapters_takes_no_further_ones():
    module = make_module(lora={"r": 2})
    module.configure_model()
    assert isinstance(module.actor, nn.Module)
    with pytest.raises(ValueError, match=r"lora=\{'r': 2\}: the model has adapters already"):
        make_module(model=module.actor, lora={"r": 2})
