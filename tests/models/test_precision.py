"""Trained weights are float32, whatever the model came in."""

from __future__ import annotations

import logging

import lightning.pytorch as pl
import peft
import pytest
import torch
from torch import nn
from training import Record, make_data, make_module, make_trainer, weights_of

from lightrft_lightning import DeepspeedStrategy, FakeStrategy, RewardModule, SFTModule
from lightrft_lightning.models import precision
from lightrft_lightning.models.scalar import with_scalar_head
from lightrft_lightning.models.tiny import char_tokenizer, tiny_llama


@pytest.fixture
def said(monkeypatch):
    lines = []
    monkeypatch.setattr(precision, "rank_zero_info", lines.append)
    return lines


def low_model(dtype=torch.bfloat16):
    return tiny_llama(seed=0, width=32, layers=2).to(dtype)


def dtypes(model, trained=(True, False)):
    return {p.dtype for p in model.parameters() if p.requires_grad in trained}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_small_steps_of_a_model_that_came_in_16_bits_are_kept(tmp_path, said, dtype):
    model = low_model(dtype)
    before = {name: p.detach().float() for name, p in model.named_parameters()}
    module, record = make_module(model=model, lr=1e-5, kl_coef=0.1), Record()
    make_trainer(tmp_path, callbacks=[record], limit_train_batches=2, limit_val_batches=0).fit(module, make_data())
    after = weights_of(module)
    same = sum(int((after[name] == value).sum()) for name, value in before.items())
    assert same < 0.1 * sum(value.numel() for value in before.values())
    assert record.metrics[0]["train/kl"] == 0
    assert len(said) == 1 and said[0].startswith(f"LlamaForCausalLM came in {str(dtype)[6:]}, where the steps")
    assert "precision='bf16-mixed'" in said[0]


def test_all_modules_models_and_loops_keep_float32(said):
    ppo = make_module(model=low_model(), algorithm="ppo", critic={"model": with_scalar_head(low_model())})
    own = make_module(model=low_model(), algorithm="ppo", critic={})
    modules = [SFTModule(low_model(), char_tokenizer()), RewardModule(low_model(), char_tokenizer()), ppo, own]
    for module in modules:
        module.configure_model()
        assert dtypes(module) == {torch.float32}
    assert len(said) == 5
    strategy = FakeStrategy(bf16=False)
    model = low_model()
    strategy.create_optimizer(model)
    other = low_model()
    strategy.prepare((other, torch.optim.AdamW(other.parameters())))
    assert dtypes(model) == dtypes(other) == {torch.float32}
    assert dtypes(strategy.prepare(low_model())) == {torch.bfloat16}  # frozen


@pytest.mark.parametrize(("bias", "base"), [("none", torch.bfloat16), ("all", torch.float32)])
def test_frozen_weights_under_adapters_stay_unless_others_are_trained_among_them(tmp_path, said, bias, base):
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], bias=bias)
    model = low_model()
    model.config.attention_bias = True
    model = type(model)(model.config).to(torch.bfloat16)
    module = make_module(model=peft.get_peft_model(model, config).to(torch.bfloat16))
    make_trainer(tmp_path, limit_train_batches=1, limit_val_batches=0).fit(module, make_data())
    assert dtypes(module.actor, (True,)) == {torch.float32} and dtypes(module.actor, (False,)) == {base}
    assert ("adapters are float32" in said[0]) == (bias == "none")


@pytest.mark.parametrize("name", ["bf16-true", "16-true"])
@pytest.mark.parametrize("make", [make_module, lambda: SFTModule(low_model(), char_tokenizer())])
def test_a_trainer_that_turns_trained_weights_into_16_bits_is_refused(tmp_path, name, make):
    message = rf"Trainer\(precision='{name}'\): \w+ would train 16-bit weights.*use precision='b?f?16-mixed'"
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, precision=name).fit(make(), make_data())


class Other(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 1)

    def training_step(self, batch, batch_idx):
        return self.layer(batch).sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_a_module_of_the_users_own_may_and_is_told(tmp_path, caplog):
    trainer = pl.Trainer(
        strategy="lightrft_fake", accelerator="cpu", precision="bf16-true", max_steps=1, default_root_dir=tmp_path,
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    with caplog.at_level(logging.WARNING):
        trainer.fit(Other(), torch.utils.data.DataLoader(torch.zeros(2, 2)))
    assert "weights in torch.bfloat16 are trained, where small steps are rounded away" in caplog.text


def test_masters_of_16_bits_are_refused():
    with pytest.raises(ValueError, match=r"'bf16.bf16_master_weights_and_grads'.=True: trained weights of 16 bits"):
        DeepspeedStrategy(deepspeed_config={"bf16": {"bf16_master_weights_and_grads": True}})


def test_an_average_in_16_bits_is_refused():
    with pytest.raises(ValueError, match=r"ema is in torch.bfloat16, where its changes are rounded away"):
        FakeStrategy().moving_average(nn.Linear(2, 2), nn.Linear(2, 2).to(torch.bfloat16))
