"""FSDP2 under Lightning's Trainer, one process a rank (as torchrun starts them); see checks.py."""

from __future__ import annotations

import os
import sys
from contextlib import contextmanager
from pathlib import Path

import checks
import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from lightrft_lightning import FSDPV2Strategy, PromptDataModule, RLHFModule, SamplingParams, TransformersRollout
from lightrft_lightning.callbacks import SupervisedWarmup
from lightrft_lightning.models.tiny import char_tokenizer, tiny_llama

os.environ["TORCHELASTIC_RUN_ID"] = "test"  # how Lightning recognises torchrun
FOLDER = Path(sys.argv[1])


class Plain(pl.LightningModule):
    """Any module of a Lightning user: automatic optimization, no sharding code."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1))
        self.losses = []

    def training_step(self, batch, batch_idx):
        x, y = batch
        return nn.functional.mse_loss(self.net(x), y)

    def validation_step(self, batch, batch_idx):
        self.log("val", nn.functional.mse_loss(self.net(batch[0]), batch[1]), sync_dist=True)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.05)


class ActorCritic(Plain):
    """Two optimizers, manual optimization, through the LightRFT interface."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.critic = nn.Linear(6, 1)

    def training_step(self, batch, batch_idx):
        x, y = batch
        for model, optimizer, name in zip((self.net, self.critic), self.optimizers(), ("actor", "critic"), strict=True):
            loss = nn.functional.mse_loss(model(x), y)
            self.trainer.strategy.backward(loss, model, optimizer, accumulation_steps=2)
            self.trainer.strategy.optimizer_step(optimizer, model, None, name, accumulation_steps=2)

    def configure_optimizers(self):
        make = self.trainer.strategy.create_optimizer
        return make(self.net, lr=0.05), make(self.critic, lr=0.01)


class ShardsByItself(Plain):
    def configure_model(self):
        if not isinstance(self.net[0].weight, DTensor):
            for layer in (self.net[0], self.net[2], self.net):
                fully_shard(layer, mesh=self.device_mesh["data_parallel"])


class Loose(Plain):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))


def data(batch_size=4):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(32, 6, generator=generator)
    dataset = TensorDataset(x, x.sum(1, keepdim=True))
    ranks, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    # Lightning's own sampler would shuffle, with another order for another number of ranks.
    return DataLoader(dataset, batch_size, sampler=DistributedSampler(dataset, ranks, rank, shuffle=False))


def trainer(strategy="lightrft_fsdp", devices=2, **settings):
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    defaults = {"accelerator": "cpu", "max_epochs": 2, "enable_model_summary": False}
    return pl.Trainer(strategy=strategy, devices=devices, **{**defaults, **quiet, **settings})


def whole(t, module):
    return {name: tensor.clone() for name, tensor in t.strategy.named_full_tensors(module)}


@contextmanager
def one_process():
    """No launcher, as far as can be seen inside."""
    ranks = {k: os.environ.pop(k) for k in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "TORCHELASTIC_RUN_ID")}
    try:
        yield
    finally:
        os.environ.update(ranks)


def alone(module, **settings):
    """The same training in one process."""
    with one_process():
        t = trainer("lightrft_fake", 1, **settings)
        t.fit(module, data(8), data(8))
    return t, {name: p.detach() for name, p in module.named_parameters()}


def check_plain_module_with_accumulation_and_clipping():
    settings = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.5}
    for make in (Plain, ShardsByItself):
        t, module = trainer(**settings), make()
        t.fit(module, data(), data())
        values = whole(t, module)
        assert all(isinstance(p, DTensor) for p in module.parameters())
        expected, reference = alone(Plain(), **settings)
        for name, value in values.items():
            torch.testing.assert_close(value, reference[name].detach(), rtol=1e-5, atol=1e-6)
        assert t.global_step == expected.global_step == 4
        assert float(t.callback_metrics["val"]) == pytest.approx(float(expected.callback_metrics["val"]), rel=1e-5)


def check_actor_and_critic_count_steps():
    t, module = trainer(), ActorCritic()
    t.fit(module, data())
    assert t.global_step == 8  # two epochs of four batches, every second one, two optimizers
    assert set(t.strategy.grad_norms) == {"actor", "critic"}


def check_fit_twice_validate_and_test_alone():
    module = Plain()
    first = trainer()
    first.fit(module, data(), data())
    before = whole(first, module)
    (metrics,) = trainer().validate(module, data(), verbose=False)
    assert metrics["val"] == pytest.approx(float(first.callback_metrics["val"]), rel=1e-6)
    second = trainer()
    second.fit(module, data(), data())
    assert not any(torch.equal(before[n], v) for n, v in whole(second, module).items())
    trainer().validate(Plain(), data(), verbose=False)


class Tied(Plain):
    """Two children hold one weight, and not every batch needs both."""

    def __init__(self):
        super().__init__()
        self.decoder = nn.Linear(6, 8, bias=False)
        self.decoder.weight = self.net[0].weight

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss if batch_idx % 2 else loss + self.decoder(batch[0].tanh()).square().mean()


class Nested(Plain):
    """A part of a child is a child too, and called by itself."""

    def __init__(self):
        super().__init__()
        self.first = self.net[0]

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) + self.first(batch[0]).square().mean()


class Aliases(Plain):
    """Parts within parts are children too; one is called by itself, another shares a weight with what is around it."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(6, 6), nn.Sequential(nn.Linear(6, 6), nn.Tanh()))
        self.net = nn.Sequential(self.inner, nn.Linear(6, 6), self.net)
        self.innermost = self.inner[1]
        self.net[1].weight = self.inner[0].weight
        with torch.no_grad():
            for i, parameter in enumerate(self.net.parameters()):
                parameter.copy_(torch.linspace(-0.3, 0.2 + 0.01 * i, parameter.numel()).view_as(parameter))

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) + self.innermost(batch[0]).square().mean()


class Early(Plain):
    """Its optimizer is older than the shards."""

    def __init__(self):
        super().__init__()
        self.optimizer = torch.optim.AdamW(self.parameters(), lr=0.05)

    def configure_optimizers(self):
        return self.optimizer


class Own(Early):
    """And the Trainer never hears of it."""

    automatic_optimization = False

    def configure_optimizers(self):
        return None

    def training_step(self, batch, batch_idx):
        self.optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        self.optimizer.step()


class Clamped(Plain):
    """Changes its weights in place, when a validation and a forward pass of its own have left them gathered."""

    def on_train_epoch_start(self):
        with torch.no_grad():
            self.net(torch.ones(1, 6))
            for parameter in self.parameters():
                parameter.clamp_(-0.1, 0.1)


def check_modules_of_any_habit_train_as_in_one_process():
    for make in (Tied, Nested, Aliases, Early, Own, Clamped):
        t, module = trainer(), make()
        t.fit(module, data(), data())
        _, reference = alone(make())
        for name, value in whole(t, module).items():
            torch.testing.assert_close(value, reference[name], rtol=1e-5, atol=1e-6, msg=f"{make} {name}")


class Stale(Early):
    """Its optimizer has state from the start, which is not sharded."""

    def __init__(self):
        super().__init__()
        self.optimizer = torch.optim.Adagrad(self.parameters())


def check_an_optimizer_with_a_state_of_whole_weights_is_refused():
    with checks.unwatched(), pytest.raises(ValueError, match="Adagrad was made before the weights were sharded"):
        trainer().fit(Stale(), data())


def check_an_average_of_whole_weights_is_refused():
    with checks.unwatched(), pytest.raises(MisconfigurationException, match="EMAWeightAveraging averages a copy of"):
        trainer(callbacks=[EMAWeightAveraging()]).fit(Plain(), data())


class InferenceMode(pl.Callback):
    """What Lightning does around an evaluation with NCCL; with gloo it takes `no_grad`."""

    def on_validation_start(self, *args):
        self.mode = torch.inference_mode()
        self.mode.__enter__()

    def on_validation_end(self, *args):
        self.mode.__exit__(None, None, None)


def check_first_forward_pass_in_inference_mode():
    t, module = trainer(callbacks=[InferenceMode()]), Plain()
    t.validate(module, data(), verbose=False)
    t.fit(module, data(), data())
    assert t.global_step == 8


def check_precision_that_fsdp_cannot_honour_is_refused_by_name_and_by_instance():
    for strategy in ("lightrft_fsdp", FSDPV2Strategy()):
        with checks.unwatched(), pytest.raises((MisconfigurationException, ValueError), match=r"64-true"):
            trainer(strategy, precision="64-true").fit(Plain(), data())


def check_bf16_mixed_is_a_policy_and_not_autocast():
    t, module, seen = trainer(precision="bf16-mixed", max_epochs=1), Plain(), []
    module.net.register_forward_pre_hook(lambda *args: seen.append(torch.is_autocast_enabled("cpu")))
    module.net[0].register_forward_hook(lambda m, args, out: seen.append((out.dtype, m.weight.dtype)))
    t.fit(module, data())
    assert seen[:2] == [False, (torch.bfloat16, torch.bfloat16)]
    assert {p.dtype for p in module.parameters()} == {torch.float32}


def check_batch_sizes_must_divide():
    strategy = FSDPV2Strategy(train_batch_size=6, micro_train_batch_size=2)
    with (
        checks.unwatched(),
        pytest.raises(ValueError, match=r"train_batch_size=6 .* × world size=2"),
    ):
        trainer(strategy).fit(Plain(), data())


def nothing_on_rank_1(completion, answer):
    """Fails for the prompts of one rank, so that it has no sample to learn from."""
    if os.environ["RANK"] == "1":
        raise ValueError("no reward here")
    return float(len(completion))


def check_a_rank_without_samples_keeps_the_others_company():
    rows = [{"prompt": f"{a}+1=", "answer": "2"} for a in range(16)]
    module = RLHFModule(
        tiny_llama(seed=0, width=32, layers=2), nothing_on_rank_1, tokenizer=char_tokenizer(), lr=1e-3, kl_coef=0.1,
        sampling=SamplingParams(n=4, max_new_tokens=6), token_budget=24, steps_per_epoch=2, seed=1,
    )  # fmt: skip
    t = trainer(max_epochs=1, limit_train_batches=2, limit_val_batches=2, callbacks=[TransformersRollout()])
    t.fit(module, datamodule=PromptDataModule(train=rows, val=rows[:6], batch_size=4, val_batch_size=2))
    assert t.global_step == 4 and float(t.callback_metrics["train/failed_rewards"]) == 16
    values = t.strategy.gather_objects({k: float(v) for k, v in t.callback_metrics.items() if "time/" not in k})
    assert values[0] == values[1]


def check_evaluation_counts_each_prompt_once():
    rows = [{"prompt": f"{a}+1=", "answer": str(a)} for a in range(5)]
    found = []
    for ranks, batch_size in ((2, 2), (2, 1), (1, 4)):
        module = RLHFModule(
            tiny_llama(seed=0, width=32, layers=2), lambda completion, answer: len(completion) + float(answer),
            tokenizer=char_tokenizer(), val_sampling=SamplingParams(n=1, max_new_tokens=6, temperature=0), seed=1,
            pass_threshold=8.0,
        )  # fmt: skip
        val = {"all": rows, "some": rows[:3]}
        data = PromptDataModule(val=val, predict=rows, val_batch_size=batch_size)
        if ranks == 2:
            t = trainer(callbacks=[TransformersRollout()])
            metrics, *_ = t.validate(module, data, verbose=False)
            mine = [one["prompt"] for batch in t.predict(module, data) for one in batch]
            everywhere = [prompt for rank in t.strategy.gather_objects(mine) for prompt in rank]
            assert sorted(everywhere) == sorted(row["prompt"] for row in rows)
        else:
            with one_process():
                metrics, *_ = trainer("lightrft_fake", 1, callbacks=[TransformersRollout()]).validate(
                    module, data, verbose=False
                )
        found.append({k: v for k, v in metrics.items() if "time/" not in k})
    assert found[0] == pytest.approx(found[2], rel=1e-6)
    assert found[1] == pytest.approx(found[2], rel=1e-6)
    assert 0 < found[0]["val/all/pass@1"] < 1 and found[0]["val/some/pass@1"] < found[0]["val/all/pass@1"]


def check_supervised_warmup():
    rows = [{"prompt": f"{a}+1=", "answer": str(a + 1)} for a in range(16)]
    module = RLHFModule(
        tiny_llama(seed=0, width=32, layers=2), lambda completion, answer: float(completion == answer), lr=1e-3,
        tokenizer=char_tokenizer(), sampling=SamplingParams(n=4, max_new_tokens=4), seed=1,
    )  # fmt: skip
    callbacks = [TransformersRollout(), SupervisedWarmup(steps=60, lr=1e-2, batch_size=16)]
    t = trainer(max_epochs=1, limit_train_batches=1, callbacks=callbacks)
    t.fit(module, datamodule=PromptDataModule(train=rows, batch_size=4))
    assert float(t.callback_metrics["train/reward"]) > 0.3


if __name__ == "__main__":
    checks.run(dict(globals()))
