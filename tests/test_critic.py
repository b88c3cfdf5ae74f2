"""PPO with a critic under a real Trainer: GAE from its values, its own optimizer, warm-up, a shared trunk."""

from __future__ import annotations

import copy

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from training import Record, StopAt, assert_same, even_digits, make_data, make_module, make_trainer, weights_of

from lightrft_lightning import FakeStrategy, RLHFModule, SamplingParams, StrategyConfig
from lightrft_lightning.critic import Critic
from lightrft_lightning.models.scalar import load_scalar_model
from lightrft_lightning.models.tiny import char_tokenizer, tiny_llama

LENGTH = SamplingParams(n=1, max_new_tokens=6)
SMALL = {"name": "tiny-llama", "layers": 2, "width": 32, "seed": 0}
SHARED = {"share_trunk": True, "lr": 1e-2}
OWN = {"lr": 1e-3}


def ppo(critic=OWN, **settings):
    return make_module(algorithm="ppo", critic=critic, **settings)


def critic_weights(module):
    return {name: p.detach().clone() for name, p in module.critic.named_parameters()}


def all_weights(module):
    return torch.cat([p.detach().flatten() for p in (*module.actor.parameters(), *module.critic.parameters())])


def trainer_of(path, *callbacks, batches=1, **settings):
    return make_trainer(path, callbacks=list(callbacks), limit_train_batches=batches, limit_val_batches=0, **settings)


class AtEachIteration(pl.Callback):
    """Weights of policy and critic after every iteration."""

    def __init__(self):
        self.policy, self.critic = [], []

    def on_train_batch_end(self, trainer, pl_module, *args):
        self.policy.append(weights_of(pl_module))
        self.critic.append(critic_weights(pl_module))


@pytest.mark.parametrize("critic", [{"lr": 3e-3}, SHARED], ids=["own", "shared"])
def test_the_reward_rises(tmp_path, critic):
    record = Record()
    settings = {"lr": 3e-3, "steps_per_epoch": 2, "epochs_per_rollout": 2}
    module = ppo(critic, **settings)
    trainer_of(tmp_path, record, batches=1.0, max_epochs=8).fit(module, make_data(batch_size=8))
    first, last = record.metrics[0], record.metrics[-1]
    rewards = [m["train/reward"] for m in record.metrics]
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 1.0
    assert last["train/value_loss"] < first["train/value_loss"] / 2
    assert {"train/value_mean", "train/value_clip_fraction", "train/critic_grad_norm"} <= first.keys()


def test_the_values_of_a_policy_that_stays_come_to_explain_its_returns(tmp_path):
    record = Record()
    module = ppo({"lr": 3e-3, "value_clip": None}, lr=0.0, steps_per_epoch=2, epochs_per_rollout=2)
    trainer_of(tmp_path, record, batches=1.0, max_epochs=8).fit(module, make_data(batch_size=8))
    explained = [m["train/explained_variance"] for m in record.metrics]
    assert explained[0] == pytest.approx(0, abs=1e-6)  # a new head says 0
    assert sum(explained[-4:]) / 4 > 0.15, explained


def test_a_shared_trunk_learns_from_both_losses(tmp_path):
    """Gradient norms of policy and head are those of the sum of the losses, computed here."""
    module, record = ppo({**SHARED, "value_coef": 0.7, "value_clip": None}), Record()
    module.configure_model()
    torch.nn.init.normal_(module.critic.weight, generator=torch.Generator().manual_seed(0))
    actor, head = tiny_llama(seed=0, width=32, layers=2), copy.deepcopy(module.critic)
    trainer_of(tmp_path, record, strategy=FakeStrategy(max_norm=0.0)).fit(module, make_data())
    total, tokens = 0.0, 0
    for t in module.last_trajectories:
        ids = torch.tensor([[*t.prompt.token_ids, *t.completion.token_ids]])
        hidden = actor.model(ids).last_hidden_state[0, len(t.prompt.token_ids) - 1 : -1]
        logprobs = actor.lm_head(hidden).log_softmax(-1).gather(1, ids[0, len(t.prompt.token_ids) :, None])[:, 0]
        squares = (head(hidden)[:, 0] - t.returns).square() / 2
        total = total + (0.7 * squares - logprobs * torch.tensor(t.advantages)).sum()
        tokens += len(t.mask)
    (total / tokens).backward()
    norms = [torch.stack([p.grad.norm() for p in model.parameters()]).norm().item() for model in (actor, head)]
    logged = [record.metrics[0][f"train/{name}"] for name in ("grad_norm", "critic_grad_norm")]
    assert logged == pytest.approx(norms, rel=1e-4)


def test_advantages_are_those_of_the_critics_values(tmp_path):
    critic = load_scalar_model(
        {"name": "tiny-llama", "layers": 2, "width": 32, "heads": 2, "alphabet": "0123456789+= "}
    )
    torch.nn.init.normal_(critic.score.weight, generator=torch.Generator().manual_seed(0))
    start = {name: p.clone() for name, p in critic.state_dict().items()}
    settings = {"advantage_estimator": "gae", "advantage_options": {"gamma": 0.9, "lam": 0.8}}
    module = make_module(critic=Critic(model=critic), **settings)
    trainer_of(tmp_path).fit(module, make_data())
    critic.load_state_dict(start)
    for t in module.last_trajectories:
        ids = torch.tensor([[*t.prompt.token_ids, *t.completion.token_ids]])
        hidden = critic.model(ids).last_hidden_state[0, len(t.prompt.token_ids) - 1 : -1]
        values = [*critic.score(hidden)[:, 0].tolist(), 0.0]
        rewards = [0.0] * (len(t.mask) - 1) + [t.reward]
        deltas = [r + 0.9 * values[k + 1] - values[k] for k, r in enumerate(rewards)]
        for k, advantage in enumerate(t.advantages):
            expected = sum(0.72 ** (j - k) * deltas[j] for j in range(k, len(deltas)))
            assert advantage == pytest.approx(expected, abs=1e-5)
            assert float(t.returns[k]) == pytest.approx(expected + values[k], abs=1e-5)


def test_the_first_step_of_the_critic_is_that_of_its_loss(tmp_path):
    """With AdamW's first step every weight moves by the learning rate against the sign of its gradient."""
    module, after = ppo({"lr": 1e-3, "value_clip": None}), AtEachIteration()
    trainer_of(tmp_path, after).fit(module, make_data())
    critic = load_scalar_model(SMALL)
    total, tokens = 0.0, 0
    for t in module.last_trajectories:
        ids = torch.tensor([[*t.prompt.token_ids, *t.completion.token_ids]])
        hidden = critic.model(ids).last_hidden_state[0, len(t.prompt.token_ids) - 1 : -1]
        total = total + (critic.score(hidden)[:, 0] - t.returns).square().sum() / 2
        tokens += len(t.mask)
    (total / tokens).backward()
    # The new head is 0, so that the backbone gets no gradient yet.
    moved = after.critic[0]["score.weight"]
    torch.testing.assert_close(moved, -1e-3 * critic.score.weight.grad.sign(), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("critic", [OWN, SHARED], ids=["own", "shared"])
def test_during_its_warm_up_the_critic_learns_alone(tmp_path, critic):
    module, after, record = ppo({**critic, "warmup_iterations": 2}), AtEachIteration(), Record()
    trainer = trainer_of(tmp_path, after, record, batches=4)
    trainer.fit(module, make_data())
    start = weights_of(make_module())
    assert_same(after.policy[0], start)
    assert_same(after.policy[1], start)
    assert any(not torch.equal(after.policy[2][name], value) for name, value in start.items())
    for before, now in zip(after.critic, after.critic[1:], strict=False):
        assert any(not torch.equal(before[name], value) for name, value in now.items())
    assert trainer.global_step == 2  # the policy's steps
    assert "train/grad_norm" not in record.metrics[0] and "train/critic_grad_norm" in record.metrics[0]


@pytest.mark.parametrize("critic", [OWN, SHARED], ids=["own", "shared"])
@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean", "sequence_sum_constant"])
def test_neither_update_depends_on_how_the_batch_is_cut(tmp_path, critic, aggregation):
    results = []
    for cut in ({}, {"token_budget": 12}, {"share_prompts": False}):
        module = ppo(critic, aggregation=aggregation, steps_per_epoch=2, epochs_per_rollout=2, **cut)
        trainer_of(tmp_path).fit(module, make_data())
        results.append(
            torch.cat([p.detach().flatten() for p in (*module.actor.parameters(), *module.critic.parameters())])
        )
    module = ppo(critic)
    module.configure_model()
    start = torch.cat([p.detach().flatten() for p in (*module.actor.parameters(), *module.critic.parameters())])
    for other in results[1:]:
        assert (other - results[0]).norm() < 1e-3 * (results[0] - start).norm()


def test_optimizers_and_schedules_are_separate_and_resumed_bit_for_bit(tmp_path):
    critic = {"lr": 2e-3, "lr_schedule": "linear", "warmup_iterations": 1, "warmup_ratio": 0.25}
    settings = {"lr_schedule": "cosine", "steps_per_epoch": 2}

    def fit(path, stop=None, **arguments):
        module, record = ppo(critic, **settings), Record()
        save = ModelCheckpoint(path, save_last=True, save_top_k=0, every_n_train_steps=1)
        trainer = make_trainer(path, callbacks=[record, save, StopAt(stop)], max_epochs=1)
        trainer.fit(module, make_data(), **arguments)
        return module, trainer, record

    whole, trainer, record = fit(tmp_path / "a")
    rates = {s.scheduler.optimizer.param_groups[0]["lr"] for s in trainer.lr_scheduler_configs}
    assert rates == {0.0}  # both reach their end, after 6 and 8 steps
    assert [len(o.param_groups) for o in trainer.optimizers] == [2, 2]
    _, _, first = fit(tmp_path / "b", stop=3)
    resumed, _, rest = fit(tmp_path / "b", ckpt_path="last")
    assert first.tokens + rest.tokens == record.tokens
    assert_same(weights_of(whole), weights_of(resumed))
    assert_same(critic_weights(whole), critic_weights(resumed))


def test_a_reward_model_may_start_the_critic(tmp_path):
    reward_model = load_scalar_model(SMALL)
    torch.nn.init.normal_(reward_model.score.weight)
    reward_model.save_pretrained(tmp_path / "reward")
    module = ppo({"model": str(tmp_path / "reward")})
    module.configure_model()
    torch.testing.assert_close(module.critic.score.weight, reward_model.score.weight)
    assert module.hparams["critic"]["model"] == str(tmp_path / "reward")


def test_the_critic_of_a_policy_from_a_folder_starts_there(tmp_path):
    tiny_llama(3, layers=2, width=32).save_pretrained(tmp_path)
    char_tokenizer().save_pretrained(tmp_path)
    module = RLHFModule(str(tmp_path), even_digits, algorithm="ppo", critic={"lr": 0.0}, sampling=LENGTH)
    trainer_of(tmp_path).fit(module, make_data(tokenizer=char_tokenizer()))
    torch.testing.assert_close(
        module.critic.model.embed_tokens.weight, tiny_llama(3, layers=2, width=32).model.embed_tokens.weight
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"advantage_estimator": "gae"}, r"'gae' needs a critic: set critic=\{'lr': 1e-5\}"),
        ({"critic": {}}, "'group_norm', which takes no values"),
        ({"algorithm": "ppo", "critic": {"value_clib": 0.1}}, "'value_clib'. Did you mean 'value_clip'"),
        ({"algorithm": "ppo", "critic": {"value_clip": 0}}, r"Critic\(value_clip=0\): must be above 0, or None"),
        ({"algorithm": "ppo", "critic": {"lr_schedule": "cosin"}}, "Did you mean 'cosine'"),
        ({"algorithm": "ppo", "critic": {"model": "x", "share_trunk": True}}, "a shared trunk has no model of its own"),
        ({"algorithm": "ppo", "reward_norm": "full"}, "normalise more than once"),
        ({"kl_unbiased_gradient": True}, "is about a penalty in the loss"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        make_module(**settings)


def test_lightrfts_fields_of_the_critic():
    config = StrategyConfig(advantage_estimator="gae", critic_pretrain="folder", critic_learning_rate=3e-6)
    critic = RLHFModule.from_config(config, "anything", even_digits, tokenizer=object()).critic_settings
    assert (critic.model, critic.lr) == ("folder", 3e-6)
    with pytest.raises(ValueError, match="critic_pretrain='folder': only advantage_estimator='gae' has a critic"):
        RLHFModule.from_config(StrategyConfig(critic_pretrain="folder"), "anything", even_digits)
