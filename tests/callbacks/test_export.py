from __future__ import annotations

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from transformers import AutoModelForCausalLM, AutoTokenizer

from lightrft_lightning.callbacks import ExportModel


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
