"""The passes of an update under a real Trainer: which network they compute, and with which weights."""

from __future__ import annotations

import pytest
import torch
from training import Record, make_data, make_module, make_trainer
from transformers import GPT2Config, GPT2LMHeadModel

from lightrft_lightning import SamplingParams, _update
from lightrft_lightning.experience.packing import pack
from lightrft_lightning.models.scalar import completion_values, with_scalar_head


def gpt2():
    """With dropout of 0.1 in three places, as is the default of this kind."""
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=17, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2))


class Modes(Record):
    """Also the modes between iterations."""

    def on_train_batch_end(self, trainer, pl_module, *args):
        super().on_train_batch_end(trainer, pl_module, *args)
        self.modes = [m.training for m in pl_module.actor.modules()]


def one_iteration(path, module, record):
    make_trainer(path, callbacks=[record], limit_train_batches=1, limit_val_batches=0).fit(module, make_data())
    return record.metrics[0]


@pytest.mark.parametrize(
    "settings",
    [
        {"epochs_per_rollout": 2, "gradient_checkpointing": True},
        {"lora": {"r": 2, "target_modules": ["c_attn"], "lora_dropout": 0.5}},
    ],
    ids=["several-steps", "lora"],
)
def test_no_pass_of_an_update_has_dropout(tmp_path, settings, monkeypatch):
    said = []
    monkeypatch.setattr(_update, "rank_zero_info", said.append)
    record, module = Modes(), make_module(model=gpt2(), lr=0.0, kl_coef=0.1, **settings)
    module.actor.get_input_embeddings().eval()  # a part that stays as the user has it
    metrics = one_iteration(tmp_path, module, record)
    assert metrics["train/kl"] == pytest.approx(0, abs=1e-6)
    assert metrics["train/ratio_max"] == pytest.approx(1, abs=1e-5)
    assert metrics["train/mismatch_max"] < 1e-4
    assert record.modes.count(False) == 1
    assert len(said) == 1 and "attn_dropout=0.1" in said[0] and "off in reinforcement learning" in said[0]
    assert ("lora_dropout=0.5" in said[0]) == ("lora" in settings)


def test_advantages_come_from_the_values_of_the_critic_without_dropout(tmp_path):
    critic = with_scalar_head(gpt2())
    torch.nn.init.normal_(critic.score.weight)
    sampling = SamplingParams(n=1, max_new_tokens=6)
    module = make_module(model=gpt2(), algorithm="ppo", critic={"model": critic, "lr": 0.0}, sampling=sampling)
    one_iteration(tmp_path, module, Record())
    values = torch.cat([t.values for t in module.last_trajectories])
    with torch.no_grad():
        expected = completion_values(critic.eval(), pack(module.last_trajectories, 8192)[0])
    torch.testing.assert_close(values, expected, atol=1e-4, rtol=1e-4)
