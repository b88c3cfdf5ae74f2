"""DeepSpeed ZeRO under Lightning's Trainer, one process a rank (as torchrun starts them); see checks.py."""

from __future__ import annotations

import os

import checks
import fsdp_trainer
import pytest
import torch
from fsdp_trainer import ActorCritic, Loose, Plain, alone, data, nothing_on_rank_1, whole
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import nn

from lightrft_lightning import DeepspeedStrategy, PromptDataModule, RLHFModule, SamplingParams, TransformersRollout
from lightrft_lightning.models.tiny import char_tokenizer, tiny_llama

os.environ["TORCHELASTIC_RUN_ID"] = "test"  # how Lightning recognises torchrun
STAGES = (1, 2, 3)
SHARD_ALL = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}


def trainer(strategy, devices=2, **settings):
    if isinstance(strategy, int):
        strategy = DeepspeedStrategy(zero_stage=strategy, deepspeed_config=SHARD_ALL)
    return fsdp_trainer.trainer(strategy, devices, **settings)


def same(left, right):
    assert left.keys() == right.keys()
    for name in left:
        torch.testing.assert_close(left[name], right[name], rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


class TwoParts(Plain):
    """One optimizer over two children: the engine is that of the whole module."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(1, 1)
        nn.init.eye_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        self.scale = nn.Parameter(torch.ones(1))

    def training_step(self, batch, batch_idx):
        return nn.functional.mse_loss(self.head(self.net(batch[0])) * self.scale, batch[1])


class Manual(Plain):
    """Lightning's own manual optimization with two optimizers, where one loss reaches both."""

    def __init__(self, clip=None):
        super().__init__()
        self.automatic_optimization = False
        self.critic = nn.Linear(1, 1)
        nn.init.eye_(self.critic.weight)
        nn.init.zeros_(self.critic.bias)
        self.clip = clip

    def training_step(self, batch, batch_idx):
        first, second = self.optimizers()
        y = self.net(batch[0])
        first.zero_grad()
        self.manual_backward(nn.functional.mse_loss(self.critic(y), batch[1]))
        if self.clip:
            self.clip_gradients(first, gradient_clip_val=self.clip)
        first.step()
        second.zero_grad()  # the first loss has given the critic gradients
        self.manual_backward(nn.functional.mse_loss(self.critic(y.detach()), batch[1]))
        second.step()

    def configure_optimizers(self):
        return torch.optim.SGD(self.net.parameters(), lr=0.05), torch.optim.SGD(self.critic.parameters(), lr=0.01)


class Scheduled(Plain):
    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)]


def check_plain_modules_with_accumulation_and_clipping():
    for make, settings in (
        (Plain, {}),
        (TwoParts, {"accumulate_grad_batches": 2, "gradient_clip_val": 0.5}),
        (Scheduled, {"accumulate_grad_batches": 3}),
    ):
        expected, reference = alone(make(), **settings)
        for stage in STAGES:
            t, module = trainer(stage, **settings), make()
            t.fit(module, data(), data())
            same(whole(t, module), reference)
            assert t.global_step == expected.global_step
            assert float(t.callback_metrics["val"]) == pytest.approx(float(expected.callback_metrics["val"]), rel=1e-5)


def check_manual_optimization_as_lightning_has_it():
    for clip in (None, 0.05):
        expected, reference = alone(Manual(clip))
        for stage in STAGES:
            t, module = trainer(stage), Manual(clip)
            t.fit(module, data())
            same(whole(t, module), reference)
            assert t.global_step == expected.global_step == 16


class Retained(Plain):
    """Two backward passes through one graph."""

    automatic_optimization = False

    def training_step(self, batch, batch_idx):
        self.optimizers().zero_grad()
        loss = nn.functional.mse_loss(self.net(batch[0]), batch[1])
        self.manual_backward(loss, retain_graph=True)
        self.manual_backward(loss / 2)
        self.optimizers().step()


def check_a_graph_may_be_retained():
    _, reference = alone(Retained())
    for stage in (1, 2):
        t, module = trainer(stage), Retained()
        t.fit(module, data())
        same(whole(t, module), reference)
    with checks.unwatched(), pytest.raises(MisconfigurationException, match="ZeRO-3 frees the weights that a second"):
        trainer(3).fit(Retained(), data())


def check_actor_and_critic_count_steps():
    _, reference = alone(Pair())
    for stage in STAGES:
        t, module = trainer(stage), Pair()
        t.fit(module, data())
        assert t.global_step == 8  # two epochs of four batches, every second one, two optimizers
        assert set(t.strategy.grad_norms) == {"actor", "critic"}
        same(whole(t, module), reference)


class Pair(ActorCritic):
    def __init__(self):
        super().__init__()
        nn.init.ones_(self.critic.weight)
        nn.init.zeros_(self.critic.bias)


class BadBatch(ActorCritic):
    def training_step(self, batch, batch_idx):
        x, y = batch
        super().training_step((x * float("nan") if batch_idx == 1 else x, y), batch_idx)


def check_a_skipped_step_is_not_counted():
    for stage in STAGES:
        t = trainer(stage, max_epochs=1)
        t.fit(BadBatch(), data())
        assert t.global_step == 2 and t.strategy.skipped_steps == {"actor": 1, "critic": 1}


def check_fit_twice_validate_and_test_alone():
    for stage in STAGES:
        module = Plain()
        first = trainer(stage)
        first.fit(module, data(), data())
        before = whole(first, module)
        (metrics,) = trainer(stage).validate(module, data(), verbose=False)
        assert metrics["val"] == pytest.approx(float(first.callback_metrics["val"]), rel=1e-6)
        second = trainer(stage)
        second.fit(module, data(), data())
        assert not any(torch.equal(before[n], v) for n, v in whole(second, module).items())
        fresh = Plain()
        t = trainer(stage, precision="bf16-mixed")
        t.validate(fresh, data(), verbose=False)
        same(whole(t, fresh), dict(Plain().named_parameters()))  # not rounded
        t = trainer(stage)
        t.fit(fresh, data(), data())
        same(whole(t, fresh), before)


class Gentle(Plain):
    """With gradients that do not overflow under float16's first loss scale."""

    def training_step(self, batch, batch_idx):
        return 1e-3 * super().training_step(batch, batch_idx)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=20)


def check_low_precision():
    for stage in STAGES:
        for precision, dtype in (("bf16-mixed", torch.bfloat16), ("16-mixed", torch.float16)):
            t, module, seen = trainer(stage, precision=precision), Gentle(), []
            module.net[0].register_forward_hook(
                lambda m, args, out, seen=seen: seen.append((out.dtype, m.weight.dtype))
            )
            t.fit(module, data())
            assert seen[0] == (dtype, dtype)
            _, reference = alone(Gentle())
            for name, value in whole(t, module).items():
                torch.testing.assert_close(value.float(), reference[name], rtol=0.02, atol=0.005)


def check_refusals():
    with checks.unwatched():
        for stage in (1, 3):
            with pytest.raises(
                MisconfigurationException, match=r"trainable parameters that are in no optimizer: scale\."
            ):
                trainer(stage).fit(NoOptimizer(), data())
            with pytest.raises(MisconfigurationException, match=r"critic.weight is in two optimizers \(0 and 1\)"):
                trainer(stage).fit(Overlap(), data())
            with pytest.raises(ValueError, match=r"^LBFGS computes the loss several times in one step, .*AdamW"):
                trainer(stage).fit(Several(), data())
            with pytest.raises(MisconfigurationException, match=r"optimizers 0 and 1 share the submodule Interleaved"):
                trainer(stage).fit(Interleaved(), data())
        with pytest.raises(MisconfigurationException, match="EMAWeightAveraging averages a copy of whole weights"):
            trainer(3, callbacks=[EMAWeightAveraging()]).fit(Plain(), data())
        with pytest.raises(MisconfigurationException, match=r"precision='bf16-true'.*32-true, bf16-mixed, 16-mixed"):
            trainer("lightrft_deepspeed", precision="bf16-true").fit(Plain(), data())
        with pytest.raises(
            MisconfigurationException, match=r"gradient_clip_algorithm='value' with gradient_clip_val=1"
        ):
            trainer(2, gradient_clip_val=1, gradient_clip_algorithm="value").fit(Plain(), data())
        strategy = DeepspeedStrategy(train_batch_size=6, micro_train_batch_size=2)
        with pytest.raises(ValueError, match=r"train_batch_size=6 is not a multiple of .* × world size=2"):
            trainer(strategy).fit(Plain(), data())


class Several(Plain):
    def configure_optimizers(self):
        return torch.optim.LBFGS(self.parameters())


class NoOptimizer(Loose):
    def configure_optimizers(self):
        return torch.optim.AdamW(self.net.parameters())


class Overlap(ActorCritic):
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1), torch.optim.SGD(self.critic.parameters(), lr=0.1)


class Interleaved(ActorCritic):
    def configure_optimizers(self):
        first, second = self.net.parameters(), self.critic.parameters()
        parameters = [p for pair in zip(first, second, strict=False) for p in pair]
        rest = [p for p in self.parameters() if all(p is not q for q in parameters)]
        return torch.optim.SGD(parameters[:3], lr=0.1), torch.optim.SGD([*parameters[3:], *rest], lr=0.1)


def check_a_rank_without_samples_keeps_the_others_company():
    rows = [{"prompt": f"{a}+1=", "answer": "2"} for a in range(16)]
    for stage in STAGES:
        module = RLHFModule(
            tiny_llama(seed=0, width=32, layers=2), nothing_on_rank_1, tokenizer=char_tokenizer(), lr=1e-3, kl_coef=0.1,
            sampling=SamplingParams(n=4, max_new_tokens=6), token_budget=24, steps_per_epoch=2, seed=1,
        )  # fmt: skip
        t = trainer(stage, max_epochs=1, limit_train_batches=2, limit_val_batches=2, callbacks=[TransformersRollout()])
        t.fit(module, datamodule=PromptDataModule(train=rows, val=rows[:6], batch_size=4, val_batch_size=2))
        assert t.global_step == 4 and float(t.callback_metrics["train/failed_rewards"]) == 16
        values = t.strategy.gather_objects({k: float(v) for k, v in t.callback_metrics.items() if "time/" not in k})
        assert values[0] == values[1]


if __name__ == "__main__":
    checks.run(dict(globals()))
