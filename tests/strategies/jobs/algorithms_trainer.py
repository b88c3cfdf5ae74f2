"""Every algorithm under a Trainer on several ranks: the updates are those of one process; see checks.py.

Arguments: folder, strategy.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import sys
from contextlib import contextmanager
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2] / "helpers"))

import checks
import peft
import pytest
import torch
from torch.nn.attention import flex_attention
from training import make_data, make_module, make_trainer

from lightrft_lightning.algorithms import AGGREGATIONS, PRESETS
from lightrft_lightning.environments import Environment, Observation
from lightrft_lightning.models.tiny import tiny_llama

os.environ["TORCHELASTIC_RUN_ID"] = "test"  # how Lightning recognises torchrun
FOLDER, STRATEGY = Path(sys.argv[1]), sys.argv[2]
RANKS = int(os.environ["WORLD_SIZE"])
MODEL = str(FOLDER / f"model of rank {os.environ['RANK']}")
tiny_llama(seed=0, width=64, layers=2).save_pretrained(MODEL)  # with a process group, only rank 0 would write
OWN, SHARED = {"lr": 2e-3, "warmup_iterations": 1}, {"lr": 2e-3, "share_trunk": True}


@contextmanager
def one_process():
    """No launcher, as far as can be seen inside."""
    ranks = {k: os.environ.pop(k) for k in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "TORCHELASTIC_RUN_ID")}
    try:
        yield
    finally:
        os.environ.update(ranks)


def train(strategy, ranks, batch_size=4, engine=lambda: None, iterations=2, **settings):
    """Tokens of all ranks by prompt, weights of policy and critic, before and after the iterations, and metrics."""
    module = make_module(**{"sampling": {"n": 3, "max_new_tokens": 6}, "steps_per_epoch": 2, **settings})
    module.configure_model()
    names = {name for name, p in module.named_parameters() if p.requires_grad}
    before = torch.cat([p.detach().flatten() for p in module.parameters() if p.requires_grad])
    trainer = make_trainer(
        FOLDER, engine=engine(), strategy=strategy, devices=ranks, limit_train_batches=iterations, limit_val_batches=0
    )
    trainer.fit(module, make_data(batch_size=batch_size // ranks, shuffle=False))
    # Whoever trained on them: these are the rank's own, with their texts.
    assert all(t.group % ranks == trainer.global_rank and t.prompt.text for t in module.last_trajectories)
    tokens = {t.group: t.completion.token_ids for t in module.last_trajectories}
    tokens = {group: ids for rank in trainer.strategy.gather_objects(tokens) for group, ids in rank.items()}
    trained = [(m, part) for m, part in ((module.actor, "actor."), (module.critic, "critic.")) if m is not None]
    after = [
        value.flatten().clone()
        for model, part in trained
        for name, value in trainer.strategy.named_full_tensors(model)
        if part + name in names
    ]
    return tokens, before, torch.cat(after), trainer.logged_metrics


def train_alone(**settings):
    """What `train` says of one process; the first one to ask computes it for all ranks and strategies."""
    told = json.dumps(settings, sort_keys=True, default=lambda value: getattr(value, "__qualname__", repr(value)))
    kept = FOLDER.parent / f"alone_{hashlib.sha256(told.replace(MODEL, 'model').encode()).hexdigest()}.pt"
    with open(kept.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not kept.exists():
            with one_process():
                torch.save(train("lightrft_fake", 1, **settings)[:3], kept)
    return torch.load(kept)


def assert_independent_of_ranks(**settings):
    expected, before, alone = train_alone(**{**settings, "compile": False})
    tokens, _, together, metrics = train(STRATEGY, RANKS, **{"token_budget": 24, **settings})
    assert tokens == expected, settings
    moved = (alone - before).norm()
    assert (together - alone).norm() < 2e-3 * moved, (settings, (together - alone).norm() / moved)
    return tokens, metrics


class GoesOnWithOddNumbers(Environment):
    """One turn for the prompts of rank 0, several for those of rank 1."""

    role = None
    turns = 0

    def reset(self, prompt, seed):
        self.ends = prompt.text[2] in "02"  # the second summand

    def step(self, turn):
        GoesOnWithOddNumbers.turns = max(GoesOnWithOddNumbers.turns, turn.number)
        return Observation("=1+", reward=float(len(turn.token_ids)), done=self.ends)


def check_ranks_with_unequal_numbers_of_turns():
    settings = {"environment": GoesOnWithOddNumbers, "max_turns": 4, "max_length": 24, "rewards": None}
    settings["sampling"] = {"n": 3, "max_new_tokens": 10, "stop": ["1", "2", "3", "4", "5"]}
    train(STRATEGY, RANKS, token_budget=24, **settings)
    assert GoesOnWithOddNumbers.turns == (4 if os.environ["RANK"] == "1" else 1)
    assert_independent_of_ranks(**settings)


def check_a_rank_with_short_completions_takes_work_over():
    settings = {"environment": GoesOnWithOddNumbers, "max_turns": 4, "max_length": 24, "rewards": None}
    settings["sampling"] = {"n": 3, "max_new_tokens": 10, "stop": ["1", "2", "3", "4", "5"]}
    tokens, metrics = assert_independent_of_ranks(**settings, batch_size=8, steps_per_epoch=1, token_budget=64)
    of_rank = [sum(len(ids) for group, ids in tokens.items() if group % RANKS == rank) for rank in range(RANKS)]
    assert of_rank[1] > 2 * of_rank[0]
    assert metrics["train/balance"] < 1.1, metrics["train/balance"]


def check_recomputed_and_compiled_layers():
    assert_independent_of_ranks(algorithm="ppo", critic=OWN, gradient_checkpointing=True)
    # What is compiled here are the layers with the hooks of the back end; only FSDP2's reach into the backward pass.
    backend = "aot_eager" if STRATEGY == "lightrft_fsdp" else "eager"
    with torch.compiler.set_stance("default", force_backend=backend):
        if STRATEGY.endswith("stage_3"):
            with pytest.raises(ValueError, match=r"compile=True\): ZeRO-3 gathers"):
                train(STRATEGY, RANKS, compile=True)
        else:
            assert_independent_of_ranks(gradient_checkpointing=True, compile=True)


def check_lora_by_settings():
    assert_independent_of_ranks(model=MODEL, lora={"r": 4}, kl_coef=0.1)


def check_the_reference_of_adapters_is_where_they_start():
    # PiSSA changes the weights below them, and trained biases are no part of them.
    settings = {"lora": {"r": 4, "init_lora_weights": "pissa", "bias": "all"}, "kl_coef": 0.5, "lr": 3e-3}
    _, metrics = assert_independent_of_ranks(**settings, iterations=3)
    assert metrics["train/kl"] > 1e-4
    *_, metrics = train(STRATEGY, RANKS, **{**settings, "lr": 0.0}, iterations=1)
    assert abs(metrics["train/kl"]) < 1e-6, metrics


def check_models_that_came_in_16_bits_keep_small_steps():
    low = tiny_llama(seed=0, width=64, layers=2).to(torch.bfloat16)
    _, before, after, _ = train(STRATEGY, RANKS, model=low, lr=1e-5, iterations=1)
    assert (after != before).double().mean() > 0.9
    low = tiny_llama(seed=0, width=64, layers=2).to(torch.bfloat16)
    torch.manual_seed(0)
    adapted = peft.get_peft_model(low, peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
    *_, metrics = train(STRATEGY, RANKS, model=adapted, kl_coef=0.1, steps_per_epoch=1, iterations=1)
    assert abs(metrics["train/kl"]) < 1e-6, metrics


def check_settings_given_to_a_resumed_run():
    """They hold from its first step, with the moments that the checkpoint has."""
    kept = FOLDER / f"{STRATEGY}.ckpt"

    def run(strategy, ranks, epochs, ckpt_path=None, **settings):
        module = make_module(**settings)
        limits = {"limit_train_batches": 1, "limit_val_batches": 0, "max_epochs": epochs}
        trainer = make_trainer(FOLDER, strategy=strategy, devices=ranks, **limits)
        trainer.fit(module, make_data(batch_size=4 // ranks, shuffle=False), ckpt_path=ckpt_path)
        if ckpt_path is None:
            trainer.save_checkpoint(kept)
        rates = {(group["lr"], group["weight_decay"]) for group in trainer.optimizers[0].param_groups}
        return rates, torch.cat([v.flatten() for _, v in trainer.strategy.named_full_tensors(module.actor)])

    _, before = run(STRATEGY, RANKS, 1, lr_schedule="cosine")  # at its end, where the rate is 0
    now = {"ckpt_path": str(kept), "lr": 2e-3, "weight_decay": 0.1}
    rates, together = run(STRATEGY, RANKS, 2, **now)
    assert rates == {(2e-3, 0.1), (2e-3, 0.0)}, rates
    with one_process():
        _, alone = run("lightrft_fake", 1, 2, **now)
    assert (together - alone).norm() < 2e-3 * (alone - before).norm() != 0


def check_weights_in_four_bits():
    settings = {"model": MODEL, "lora": {"r": 4}, "quantization": "nf4", "kl_coef": 0.1}
    if STRATEGY.endswith(("fsdp", "stage_3")):
        with checks.unwatched(), pytest.raises(ValueError, match=r"quantization='nf4': \S+ shards the weights"):
            train(STRATEGY, RANKS, **settings)
    else:
        assert_independent_of_ranks(**settings)


def check_flex_attention():
    # Torch refuses its gradients on the CPU, although it has the uncompiled arithmetic.
    validate, flex_attention._validate_device = flex_attention._validate_device, lambda *tensors: None
    try:
        with torch.compiler.set_stance("force_eager"):
            assert_independent_of_ranks(attn_implementation="flex_attention", gradient_checkpointing=True)
    finally:
        flex_attention._validate_device = validate


def check_ppo_with_a_critic_of_its_own():
    assert_independent_of_ranks(algorithm="ppo", critic=OWN, epochs_per_rollout=2)


def check_ppo_with_a_shared_trunk():
    assert_independent_of_ranks(algorithm="ppo", critic=SHARED, epochs_per_rollout=2)


def check_every_aggregation():
    for aggregation in AGGREGATIONS:
        assert_independent_of_ranks(aggregation=aggregation, kl_coef=0.1)


def check_every_preset():
    without_critic = [name for name in PRESETS if name != "ppo"]
    for algorithm in without_critic if STRATEGY == "lightrft_fsdp" else ("gspo", "reinforce_plus_plus"):
        assert_independent_of_ranks(algorithm=algorithm)


def check_every_step_of_shaping():
    assert_independent_of_ranks(
        advantage_estimator="rloo", high_entropy_share=0.5, reward_norm="full", overlong_buffer=3, reward_clip=1.5,
        correction="sequence_truncated", kl_coef=0.1, kl_target=0.01, kl_unbiased_gradient=True,
    )  # fmt: skip
    assert_independent_of_ranks(advantage_estimator="reinforce", advantage_norm=True, kl_coef=0.1, kl_in="reward")


def sometimes(completion: str, prompt: str) -> float:
    """Equal within most groups, so that the ranks find unequal numbers of others."""
    return float("2" in completion) if prompt[0] in "13" else 1.0


def check_replaced_prompts_and_a_hot_first_token():
    assert_independent_of_ranks(dynamic_sampling=True, rewards=sometimes, first_token_temperature=5.0)


if __name__ == "__main__":
    checks.run(dict(globals()))
