from __future__ import annotations

import shutil

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from transformers import AutoModelForCausalLM, AutoTokenizer

from lightrft_lightning import RLHFModule, SamplingParams
from lightrft_lightning.callbacks import ExportModel, RewardCurve
from lightrft_lightning.models.export import ExportError


def test_from_pretrained_opens_it_with_the_trained_weights(fit, tmp_path, tiny_tokenizer):
    export = ExportModel()
    _, module = fit(export)
    assert export.exported == tmp_path / "model"
    loaded = AutoModelForCausalLM.from_pretrained(export.exported)
    ids = torch.tensor([[3, 4, 5]])
    assert torch.equal(loaded(ids).logits, module.actor.eval()(ids).logits)
    assert AutoTokenizer.from_pretrained(export.exported)("1+2=").input_ids == tiny_tokenizer("1+2=").input_ids


def test_after_ctrl_c(fit, interrupt):
    export = ExportModel()
    with pytest.raises(SystemExit):
        fit(export, interrupt(after=2))
    assert export.exported is not None and (export.exported / "model.safetensors").exists()


@pytest.mark.parametrize("settings", [{"fast_dev_run": True}, {"max_epochs": 0}])
def test_not_without_training(fit, tmp_path, settings):
    export = ExportModel()
    fit(export, **settings)
    assert export.exported is None
    assert list(tmp_path.iterdir()) == []


def test_not_after_an_error(fit, interrupt, tmp_path):
    export = ExportModel()
    with pytest.raises(ZeroDivisionError):
        fit(export, interrupt(after=2, error=ZeroDivisionError))
    assert export.exported is None
    assert list(tmp_path.iterdir()) == []


def test_not_after_ctrl_c_before_the_first_iteration(fit, tmp_path, interrupt):
    class Impatient(interrupt):
        def on_train_start(self, trainer, pl_module):
            raise KeyboardInterrupt

    export = ExportModel()
    with pytest.raises(SystemExit):
        fit(export, Impatient(after=0))
    assert export.exported is None


def test_goes_into_the_folder_of_the_logger_or_the_one_given(fit, tmp_path):
    export, given = ExportModel(), ExportModel(str(tmp_path / "mine"))
    fit(export, given, logger=CSVLogger(tmp_path, name="log"))
    assert export.exported == tmp_path / "log" / "version_0" / "model"
    assert given.exported == tmp_path / "mine"
    assert (given.exported / "model.safetensors").exists()


# What would be found out at the end of a run, when it starts; nothing was trained then.


def refused(fit, module, match, *callbacks, **settings):
    before = module.iteration
    with pytest.raises(ValueError, match=match):
        fit(*callbacks, module=module, **settings)
    assert module.iteration == before == 0


@pytest.fixture
def module(tiny_model, tiny_tokenizer):
    return RLHFModule(tiny_model, length, tiny_tokenizer, SamplingParams(n=2, max_new_tokens=4), seed=0)


def length(completion):
    return float(len(completion))


def test_a_generation_config_that_cannot_be_written(fit, module, monkeypatch):
    monkeypatch.setattr(module.actor.generation_config, "temperature", 0.5)
    match = (
        r"ExportModel, which would write .*model at the end.*generation_config.json cannot be written.*do_sample=True"
    )
    refused(fit, module, match, ExportModel())


def test_a_config_that_is_no_json(fit, module, monkeypatch):
    monkeypatch.setattr(module.actor.config, "mine", object(), raising=False)
    refused(fit, module, "config.json cannot be written: .*Set the attribute of model.config", ExportModel())


def test_a_tokenizer_that_cannot_be_saved(fit, module, monkeypatch):
    def save(*args, **kwargs):
        raise OSError("no vocabulary")

    monkeypatch.setattr(module.tokenizer, "save_pretrained", save)
    refused(fit, module, "the tokenizer cannot be written: no vocabulary. Pass another", ExportModel())


def test_adapters_that_cannot_be_merged(fit, tiny_model, tiny_tokenizer):
    module = RLHFModule(
        tiny_model, length, tiny_tokenizer, SamplingParams(n=2, max_new_tokens=4), lora={"lora_bias": True}
    )
    refused(fit, module, "ExportModel.*q_proj: PEFT cannot merge its adapter: .*has no bias", ExportModel())


def test_folders_that_take_no_files(fit, module, tmp_path):
    (tmp_path / "file").write_text("")
    inside = str(tmp_path / "file" / "inside")
    for callback in (ExportModel(inside), RewardCurve(dirpath=inside)):
        refused(fit, module, "nothing can be written into .*inside: .*file is no folder", callback)
    match = r"ModelCheckpoint\(dirpath='.*inside'\): nothing can be written .*Choose another folder before training"
    refused(fit, module, match, ModelCheckpoint(inside))
    refused(fit, module, r"filename='a.what'\): 'what' is none of .*png", RewardCurve("a.what"))
    for name in ("x" * 300, "a\0b"):
        refused(fit, module, "ExportModel, .*: nothing can be written into", ExportModel(str(tmp_path / name)))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_too_little_room(fit, module, monkeypatch, tmp_path, caplog):
    free = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free._replace(free=1000))
    refused(fit, module, r"the weights take 0\.0 GiB, and 0\.0 GiB are free: make room", ExportModel())
    fit(ModelCheckpoint(tmp_path / "checkpoints", save_last=True), max_epochs=0)
    assert any("up to 3 checkpoints of about" in r.getMessage() for r in caplog.records)


def test_a_disk_that_is_full_at_the_end_keeps_nobody_else_from_writing(fit, module, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    class Late(ModelCheckpoint):
        def on_train_end(self, trainer, pl_module):
            (tmp_path / "late").touch()

    monkeypatch.setattr(type(module.actor), "save_pretrained", full)
    export = ExportModel()
    with pytest.raises(
        ExportError, match=r"could not be written into .*model: .*No space left.*so have this run's check"
    ):
        fit(export, Late(tmp_path / "checkpoints"), module=module)
    assert (tmp_path / "late").exists() and export.exported is None and module.iteration > 0


def test_weights_that_the_config_knows_nothing_of_being_one(fit, module, monkeypatch):
    layers = module.actor.model.layers
    monkeypatch.setattr(layers[1].mlp.up_proj, "weight", layers[0].mlp.up_proj.weight)
    refused(
        fit, module, r"layers.0.mlp.up_proj.weight and model.layers.1.mlp.up_proj.weight are one tensor", ExportModel()
    )


def test_weights_are_written_whatever_fails_beside_them(fit, tmp_path, monkeypatch, tiny_tokenizer):
    class Breaks(ExportModel):
        """Two things that were fine at the start are not at the end."""

        def on_train_end(self, trainer, pl_module):
            pl_module.actor.generation_config.temperature = 0.5
            pl_module.tokenizer.save_pretrained = None
            super().on_train_end(trainer, pl_module)

    kept = ModelCheckpoint(tmp_path / "checkpoints", save_last=True)
    export = Breaks()
    try:
        with pytest.raises(ExportError, match=r"the weights are in .*: generation_config\.json: .*; the tokenizer: "):
            fit(export, kept)
    finally:
        del tiny_tokenizer.save_pretrained
    opened = AutoModelForCausalLM.from_pretrained(export.exported)
    assert opened.config.hidden_size and (tmp_path / "checkpoints" / "last.ckpt").exists()
