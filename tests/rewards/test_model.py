"""Reward models: texts, values, and their place in a Trainer."""

from __future__ import annotations

import random
import threading

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from transformers import LlamaConfig, LlamaForSequenceClassification

from lightrft_lightning import FakeStrategy, PromptDataModule, RLHFModule, SamplingParams, TransformersRollout
from lightrft_lightning.experience.trajectory import Completion, Prompt, Trajectory
from lightrft_lightning.models.scalar import load_scalar_model
from lightrft_lightning.models.tiny import char_tokenizer
from lightrft_lightning.rewards import RewardModel, RewardReport, Rewards

CHAT = "{% for m in messages %}{{ m['role'][0] }}={{ m['content'] }} {% endfor %}"
ALPHABET = "0123456789+= saup"


def reward_model(path, seed=0, chat=False, pad=None):
    model = load_scalar_model({"name": "tiny-llama", "layers": 2, "width": 32, "heads": 2, "alphabet": ALPHABET})
    torch.nn.init.normal_(model.score.weight, generator=torch.Generator().manual_seed(seed))
    tokenizer = char_tokenizer(ALPHABET)
    tokenizer.chat_template = CHAT if chat else None
    tokenizer.pad_token = pad or tokenizer.pad_token
    model.config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


@pytest.fixture
def folder(tmp_path):
    return reward_model(tmp_path / "rm")


def sample(text, prompt="1+1=", messages=(), **fields):
    return Trajectory(Prompt((1,), prompt, fields, messages=messages), Completion((7,), (0.0,), "eos"), 0, text=text)


def alone(folder, text):
    """By the definition: the head on the last state of this text and nothing else."""
    model = load_scalar_model(folder).eval()
    ids = torch.tensor([RewardModel(folder).tokenizer(text)["input_ids"]])
    with torch.no_grad():
        return model.score(model.model(ids).last_hidden_state[0, -1]).item()


def test_values_do_not_depend_on_batches_or_order(folder):
    generator = random.Random(0)
    texts = ["".join(generator.choices(ALPHABET, k=generator.randint(0, 30))) for _ in range(40)]
    expected = [alone(folder, "1+1=" + text) for text in texts]
    for budget in (1, 64, 10_000):
        model = RewardModel(folder, token_budget=budget)
        found = [outcome.value for outcome in model.score([sample(text) for text in texts])]
        assert found == pytest.approx(expected, abs=1e-5)
        backwards = model.score([sample(text) for text in reversed(texts)])
        assert [o.value for o in backwards] == found[::-1]
    assert len(set(expected)) > 30


def test_a_text_that_ends_in_the_padding_token(tmp_path):
    """Hugging Face's own forward would read the score one token too early."""
    folder = reward_model(tmp_path / "rm", pad="<eos>")
    texts = ["1<eos>", "12345<eos><eos>", "<eos>"]
    model = RewardModel(folder, template="{completion}")
    assert model.tokenizer("1<eos>")["input_ids"][-1] == model.tokenizer.pad_token_id
    found = [outcome.value for outcome in model.score([sample(text) for text in texts])]
    assert found == pytest.approx([alone(folder, text) for text in texts], abs=1e-5)


def test_a_score_depends_on_no_other_text_no_mode_and_no_output_that_the_config_asks_for():
    factors = {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4, "original_max_position_embeddings": 12}
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    rope = {"rope_type": "longrope", "rope_theta": 1e4, **factors}
    config = LlamaConfig(
        vocab_size=20, num_labels=1, pad_token_id=0, attention_dropout=0.5, **sizes, rope_parameters=rope
    )
    torch.manual_seed(0)
    scored = LlamaForSequenceClassification(config)
    for parameter in scored.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model = RewardModel(scored, tokenizer=char_tokenizer(ALPHABET))
    texts = ["1", "12345", "1234567890", "1234567890123456", "0987654321098765432109876"]
    alone = [model.score([sample(text)])[0].value for text in texts]
    model.load = lambda: scored.train()
    scored.config.return_dict, scored.config.output_hidden_states = False, True
    together = [outcome.value for outcome in model.score([sample(text) for text in texts])]
    assert together == pytest.approx(alone, abs=1e-5) and scored.training and scored.config.output_hidden_states


def test_templates(tmp_path, folder):
    question = ({"role": "system", "content": "0"}, {"role": "user", "content": "1+1="})
    trajectory = sample("2", "ignored", messages=question, gold=5)
    assert RewardModel(folder).render(trajectory) == "ignored2"
    assert RewardModel(folder, template="{gold}={completion}").render(trajectory) == "5=2"
    chat = reward_model(tmp_path / "chat", chat=True)
    assert RewardModel(chat).render(trajectory) == "s=0 u=1+1= a=2 "
    assert RewardModel(chat).render(sample("2")) == "u=1+1= a=2 "
    assert RewardModel(chat, template="{completion}").render(trajectory) == "2"
    assert RewardModel(chat, chat_template=False).render(trajectory) == "ignored2"
    (outcome,) = RewardModel(chat).score([trajectory])
    assert outcome.value == pytest.approx(alone(chat, "s=0 u=1+1= a=2 "), abs=1e-5)


def test_several_models_beside_functions(tmp_path, folder):
    other = reward_model(tmp_path / "other", seed=1)
    rewards = Rewards(
        [RewardModel(folder, name="helpful"), "exact_match", {"name": "reward_model", "model": other, "weight": 2}]
    )
    assert rewards.names == ["helpful", "exact_match", "reward_model"]
    samples = [sample("2", answer="2"), sample("33", answer="2")]
    assert rewards.score(samples) == RewardReport(2)
    for t, right in zip(samples, (1, 0), strict=True):
        first, second = alone(folder, "1+1=" + t.text), alone(other, "1+1=" + t.text)
        assert t.reward_parts == pytest.approx(
            {"helpful": first, "exact_match": right, "reward_model": second}, abs=1e-5
        )
        assert t.reward == pytest.approx(first + right + 2 * second, abs=1e-5)


def test_texts_without_a_score_cost_themselves(folder, caplog):
    samples = [sample("2"), sample("x"), sample("3" * 30), sample("4"), sample("\ud800")]
    report = Rewards(RewardModel(folder, max_length=20)).score(samples)
    assert [t.reward is not None for t in samples] == [True, False, False, True, False] and report.failed == 3
    assert "its text has 34 tokens, max_length is 20" in caplog.text
    with pytest.raises(ValueError, match="needs 'gold'"):
        Rewards(RewardModel(folder, template="{gold}{completion}")).score(samples)
    some = [sample("2"), sample("2", gold=1)]
    assert Rewards(RewardModel(folder, template="{gold}{completion}")).score(some).failed == 1


def test_by_hand_and_frozen(folder):
    model = RewardModel(folder, template="{prompt}{completion}{n}")
    values = model(["1+1=", "2+2="], ["2", "4"], n=[1, 2])
    assert values == pytest.approx([alone(folder, "1+1=21"), alone(folder, "2+2=42")], abs=1e-5)
    assert not any(p.requires_grad for p in model.model.parameters()) and not model.model.training
    with pytest.raises(ValueError, match="no score for text 0: "):
        model(["x"], ["2"], n=[1])


def test_in_a_loop_of_ones_own(folder):
    strategy, model, samples = FakeStrategy(), RewardModel(folder), [sample("2"), sample("33")]
    strategy.setup_distributed()
    strategy.prepare(model.load())
    assert Rewards(model).score(samples, strategy) == RewardReport(2)
    assert [t.reward for t in samples] == pytest.approx([alone(folder, "1+1=" + t.text) for t in samples], abs=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"template": "x", "chat_template": True}, "give one of them"),
        ({"chat_template": True}, "has no chat template"),
        ({"template": "{x"}, "is no format string"),
        ({"max_length": 0}, r"RewardModel\(max_length=0\): must be at least 1"),
        ({"token_buget": 5}, "unknown option of reward 'reward_model' 'token_buget'. Did you mean 'token_budget'"),
        ({"processes": 2}, "leave out `processes`"),
    ],
)
def test_bad_settings(folder, settings, message):
    with pytest.raises(ValueError, match=message):
        Rewards({"name": "reward_model", "model": folder, **settings})


def test_in_background_models_score_in_the_thread_that_finishes(folder, monkeypatch):
    threads = set()
    original = RewardModel._forward
    monkeypatch.setattr(
        RewardModel, "_forward", lambda *args: threads.add(threading.current_thread()) or original(*args)
    )
    begun = threading.Event()

    def early(completion):
        begun.set()
        return 1.0

    with Rewards([RewardModel(folder), early]).in_background() as scoring:
        samples = [sample("1"), sample("2")]
        scoring.add(samples[:1])
        assert begun.wait(10)
        scoring.add(samples[1:])
        assert scoring.finish() == RewardReport(2)
    assert threads == {threading.main_thread()}
    assert [t.reward for t in samples] == pytest.approx([1 + alone(folder, "1+1=" + t.text) for t in samples], abs=1e-5)


def test_in_a_trainer(tmp_path, folder):
    module = RLHFModule(
        {"name": "tiny-llama", "layers": 1, "width": 16, "heads": 2},
        [{"name": "reward_model", "model": folder}, lambda completion: len(completion)],
        sampling=SamplingParams(n=4, max_new_tokens=4), seed=1, kl_coef=0.1,
    )  # fmt: skip
    data = PromptDataModule(train=[{"prompt": f"{a}+1="} for a in range(4)], val=["1+1="], batch_size=2)

    def trainer():
        return pl.Trainer(
            strategy="lightrft_fake", accelerator="cpu", max_epochs=1, logger=False, enable_progress_bar=False,
            enable_model_summary=False, default_root_dir=tmp_path,
            callbacks=[TransformersRollout(), ModelCheckpoint(tmp_path / "c", save_last=True)],
        )  # fmt: skip

    first = trainer()
    first.fit(module, data)
    assert {"train/reward/reward_model", "val/reward/reward_model", "train/reward/<lambda>"} <= {
        *first.callback_metrics
    }
    t = module.last_trajectories[0]
    assert t.reward == pytest.approx(alone(folder, t.prompt.text + t.text) + len(t.text), abs=1e-5)
    assert not any(name.startswith(("reward_models", "reference")) for name in module.state_dict())
    again = RLHFModule(
        {"name": "tiny-llama", "layers": 1, "width": 16, "heads": 2}, {"name": "reward_model", "model": folder},
        sampling=SamplingParams(n=4, max_new_tokens=4), seed=2,
    )  # fmt: skip
    trainer().validate(again, data, ckpt_path=tmp_path / "c" / "last.ckpt")
    assert len(again.reward_models) == 1 and again.reward_models[0] is again.rewards.models[0].model
    alone_again = RLHFModule.load_from_checkpoint(
        tmp_path / "c" / "last.ckpt", rewards={"name": "reward_model", "model": folder}
    )
    assert not alone_again.reward_models
