"""`RewardModule` and `SFTModule` inside a real Trainer, on a from-scratch model of a few thousand parameters."""

from __future__ import annotations

import math
import random
import re
import string
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from lightrft_lightning import (
    PromptDataModule,
    RewardModule,
    RLHFModule,
    SamplingParams,
    SFTModule,
    TransformersRollout,
)
from lightrft_lightning.callbacks import ExportModel
from lightrft_lightning.convert import convert
from lightrft_lightning.models.scalar import completion_scores, load_scalar_model
from lightrft_lightning.models.tiny import char_tokenizer, tiny_llama
from lightrft_lightning.rewards import RewardModel

GUIDE = Path(__file__).parents[1] / "docs" / "supervised.md"
SMALL = {"name": "tiny-llama", "layers": 2, "width": 32, "heads": 2}
ROWS = [
    {"prompt": f"{a}+{b}=", "answer": str(a + b), "chosen": str(a + b), "rejected": "0" * (1 + a), "better": a / 4}
    for a in range(4)
    for b in range(4)
]


def scalar_model(seed=0):
    """With a head that says something, so that the backbone has a gradient at once."""
    model = load_scalar_model(SMALL | {"seed": seed})
    torch.nn.init.normal_(model.score.weight, std=0.3, generator=torch.Generator().manual_seed(seed))
    return model


def reward_module(model=None, **settings):
    return RewardModule(model or scalar_model(), char_tokenizer(), **{"lr": 1e-3, **settings})


def sft_module(model=None, **settings):
    model = model or tiny_llama(0, width=32, layers=2)
    return SFTModule(model, char_tokenizer(), **{"lr": 1e-3, **settings})


MODULES = [reward_module, sft_module]


def trainer_of(path, **settings):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    defaults = {"max_epochs": 1, "enable_checkpointing": False, "log_every_n_steps": 1}
    return pl.Trainer(
        strategy="lightrft_fake", accelerator="cpu", default_root_dir=path, **{**defaults, **quiet, **settings}
    )


def data_of(**settings):
    return PromptDataModule(**{"train": ROWS, "val": ROWS[:5], "batch_size": 4, "seed": 1, **settings})


def fit(path, module, data=None, ckpt_path=None, **settings):
    trainer = trainer_of(path, **settings)
    trainer.fit(module, data or data_of(), ckpt_path=ckpt_path)
    return trainer


def weights_of(module):
    return torch.cat([p.detach().flatten() for p in module.model.parameters()])


def loss_by_hand(model, rows, margins=False, center_coef=0.0):
    """Mean over the pairs in the precision of `model`, each text by itself in Hugging Face's own forward."""
    total, tokenizer = torch.zeros((), dtype=model.dtype), char_tokenizer()
    for row in rows:
        ids = [tokenizer(row["prompt"] + row[which]).input_ids + [2] for which in ("chosen", "rejected")]
        better, worse = (model(input_ids=torch.tensor([text])).logits[0, 0] for text in ids)
        wanted = row["better"] if margins else 0.0
        total = total + torch.log(1 + torch.exp(-(better - worse - wanted))) + center_coef * (better + worse) ** 2
    return total / len(rows)


class Record(pl.Callback):
    def __init__(self):
        self.metrics = []

    def on_train_batch_end(self, trainer, pl_module, *args):
        self.metrics.append({k: float(v) for k, v in trainer.logged_metrics.items() if k.startswith("train/")})


@pytest.mark.parametrize("settings", [{}, {"margin_column": "better", "center_coef": 0.1}, {"share_prompts": False}])
def test_loss_and_gradient_are_those_of_the_formula(tmp_path, settings):
    module, record = reward_module(**settings), Record()
    reference = scalar_model().double()
    loss = loss_by_hand(reference, ROWS, "margin_column" in settings, settings.get("center_coef", 0.0))
    loss.backward()
    norm = torch.cat([p.grad.flatten() for p in reference.parameters()]).norm().item()
    fit(tmp_path, module, data_of(batch_size=16), limit_val_batches=0, callbacks=[record])
    assert record.metrics[0]["train/loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert record.metrics[0]["train/grad_norm"] == pytest.approx(norm, rel=1e-4)


def test_gradient_agrees_with_finite_differences(tmp_path):
    module = reward_module(scalar_model().double(), margin_column="better", center_coef=0.1)
    data = data_of(completion_columns=["chosen", "rejected"], tokenizer=char_tokenizer())
    data.setup("fit")
    (micro,) = module._micro_batches(data.train_prompts)
    parameter = module.model.model.layers[0].self_attn.q_proj.weight
    loss, _ = module._losses(micro.batch, micro.trajectories)
    loss.backward()
    direction = parameter.grad / parameter.grad.norm()

    def moved(step):
        with torch.no_grad():
            parameter.add_(step * direction)
            value = module._losses(micro.batch, micro.trajectories)[0].item()
            parameter.sub_(step * direction)
        return value

    slope = (moved(1e-3) - moved(-1e-3)) / 2e-3  # the norm layers compute in float32
    assert slope == pytest.approx(parameter.grad.norm().item(), rel=1e-4)


@pytest.mark.parametrize("make", MODULES)
@pytest.mark.parametrize("share_prompts", [True, False])
def test_the_result_does_not_depend_on_the_token_budget(tmp_path, make, share_prompts):
    results = []
    for budget in (8192, 40, 24):
        module = make(token_budget=budget, share_prompts=share_prompts)
        fit(tmp_path, module, limit_val_batches=0)
        results.append(weights_of(module))
    for other in results[1:]:
        assert (other - results[0]).norm() < 1e-5 * results[0].norm()


def test_held_out_metrics_are_those_of_all_pairs(tmp_path):
    module = reward_module()
    (metrics,) = trainer_of(tmp_path).validate(module, data_of(val=ROWS, val_batch_size=3), verbose=False)
    model, tokenizer, differences, scores = scalar_model(), char_tokenizer(), [], []
    for row in ROWS:
        texts = [tokenizer(row["prompt"] + row[which]).input_ids + [2] for which in ("chosen", "rejected")]
        better, worse = (model(input_ids=torch.tensor([ids])).logits.item() for ids in texts)
        differences.append(better - worse)
        scores += [better, worse]
    expected = {
        "val/loss": sum(math.log(1 + math.exp(-d)) for d in differences) / 16,
        "val/accuracy": sum(d > 0 for d in differences) / 16,
        "val/margin": sum(differences) / 16,
        "val/reward": sum(scores) / 32,
    }
    assert metrics == pytest.approx(expected, abs=1e-6)
    assert 0 < metrics["val/accuracy"] < 1


def wrong(answer, rng):
    """Another number with as many digits."""
    while (text := "".join(rng.choice("0123456789") for _ in answer)) == answer:
        pass
    return text


def test_learns_to_tell_right_from_wrong(tmp_path):
    rng = random.Random(0)
    rows = [
        {"prompt": f"{a}+{b}=", "chosen": f"{a + b:02}", "rejected": wrong(f"{a + b:02}", rng)}
        for a in range(10)
        for b in range(10)
        for _ in range(4)
    ]
    rng.shuffle(rows)
    module = RewardModule(tiny_llama(0, width=64, layers=2), char_tokenizer(), lr=3e-3, lr_schedule="linear")
    data = PromptDataModule(train=rows[64:], val=rows[:64], batch_size=48, seed=0)
    trainer = fit(tmp_path, module, data, max_epochs=20)
    assert float(trainer.callback_metrics["val/accuracy"]) >= 0.8
    assert float(trainer.callback_metrics["val/margin"]) > 1


@pytest.mark.parametrize("make", MODULES)
def test_resume_in_the_middle_of_an_epoch_is_bit_for_bit(tmp_path, make):
    def run(path, module, ckpt_path=None):
        record, keep = Record(), ModelCheckpoint(path, every_n_train_steps=3, save_top_k=-1, filename="{step}")
        settings = {"callbacks": [record, keep], "enable_checkpointing": True, "max_epochs": 2}
        fit(path, module, ckpt_path=ckpt_path, **settings)
        return record.metrics

    modules = [make(lr_schedule="cosine", warmup_ratio=0.25) for _ in range(2)]
    for module in modules:
        module.model.config.attention_dropout = 0.2
    straight, resumed = modules
    whole = run(tmp_path / "a", straight)
    torch.manual_seed(7)
    rest = run(tmp_path / "b", resumed, ckpt_path=tmp_path / "a" / "step=3.ckpt")
    assert whole[3:] == rest and len(rest) == 5
    assert torch.equal(weights_of(straight), weights_of(resumed))


@pytest.mark.parametrize("bos", ["<bos>", "<eos>"])
def test_a_new_head_reads_the_end_token_if_another_one_can_pad(tmp_path, caplog, bos):
    tokenizer = char_tokenizer()
    tokenizer.pad_token, tokenizer.bos_token = "<eos>", bos
    module = RewardModule(tiny_llama(0, width=32, layers=2), tokenizer, lr=1e-2)
    trainer = fit(tmp_path, module, callbacks=[ExportModel(str(tmp_path / "reward"))])
    assert tokenizer.pad_token == "<eos>"
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path / "reward")
    reads = AutoTokenizer.from_pretrained(tmp_path / "reward")
    assert reads.pad_token_id == theirs.config.pad_token_id == (1 if bos == "<bos>" else 2)
    assert ("padding token" in caplog.text) == (bos == "<eos>")
    (micro,) = module._micro_batches(trainer.datamodule.val_prompts)
    ours, index = completion_scores(module.model, micro.batch)
    texts = [f"{row['prompt']}{row[which]}<eos>" for row in ROWS[:5] for which in ("chosen", "rejected")]
    padded = theirs(**reads(texts, return_tensors="pt", padding=True)).logits[:, 0]
    torch.testing.assert_close(ours, padded[index], atol=1e-5, rtol=1e-5)
    cut = theirs(**reads([text.removesuffix("<eos>") for text in texts], return_tensors="pt", padding=True)).logits[
        :, 0
    ]
    assert torch.allclose(cut, padded) == (bos == "<eos>")


@pytest.mark.parametrize(
    ("cls", "settings"),
    [
        (RewardModule, {"lr": 2e-3, "center_coef": 0.5, "margin_column": "better"}),
        (SFTModule, {"lr_schedule": "linear", "answer_column": "chosen"}),
    ],
)
def test_a_checkpoint_makes_the_module_again(tmp_path, cls, settings):
    module = cls(SMALL, **settings)
    trainer = fit(tmp_path, module)
    trainer.save_checkpoint(tmp_path / "kept.ckpt")
    again = cls.load_from_checkpoint(tmp_path / "kept.ckpt")
    assert again.hparams == module.hparams and again.hparams.items() >= settings.items()
    assert torch.equal(weights_of(module), weights_of(again))
    convert(tmp_path / "kept.ckpt", tmp_path / "converted")
    auto = AutoModelForSequenceClassification if cls is RewardModule else AutoModelForCausalLM
    converted = auto.from_pretrained(tmp_path / "converted")
    assert torch.equal(torch.cat([p.flatten() for p in converted.parameters()]), weights_of(module))


def test_hugging_face_opens_the_result_and_gives_the_same_scores(tmp_path):
    module = RewardModule(tiny_llama(0, width=32, layers=2), char_tokenizer(), lr=1e-2)
    trainer = fit(tmp_path, module, callbacks=[ExportModel(str(tmp_path / "reward"))])
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path / "reward")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "reward")
    (micro,) = module._micro_batches(trainer.datamodule.val_prompts)
    ours, index = completion_scores(module.model, micro.batch)
    assert ours.std() > 0.01
    for score, i in zip(ours, index.tolist(), strict=True):
        row, which = ROWS[i // 2], ("chosen", "rejected")[i % 2]
        text = f"{row['prompt']}{row[which]}{tokenizer.eos_token}"
        alone = theirs(**tokenizer(text, return_tensors="pt")).logits[0, 0]
        torch.testing.assert_close(score, alone, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(load_scalar_model(tmp_path / "reward").score.weight, module.model.score.weight)


@pytest.mark.parametrize("behind", [None, "<eos> "])
def test_the_reward_reads_a_text_where_the_module_has_trained_it(tmp_path, behind):
    tokenizer = char_tokenizer()
    if behind:
        closed = "{{ m['content'] }}{% if m['role'] == 'assistant' %}" + behind + "{% endif %}"
        tokenizer.chat_template = "{% for m in messages %}" + closed + "{% endfor %}"
    module = RewardModule(scalar_model(), tokenizer, lr=1e-3)
    trainer = fit(tmp_path, module, callbacks=[ExportModel(str(tmp_path / "reward"))])
    (micro,) = module._micro_batches(trainer.datamodule.val_prompts)
    scores, index = completion_scores(module.model, micro.batch)
    texts = [(ROWS[i // 2]["prompt"], ROWS[i // 2][("chosen", "rejected")[i % 2]]) for i in index.tolist()]
    found = RewardModel(str(tmp_path / "reward"))(*zip(*texts, strict=True))
    assert found == pytest.approx(scores.tolist(), abs=1e-5)
    other = RewardModel(str(tmp_path / "reward"), template="{prompt}{completion}")(*zip(*texts, strict=True))
    assert abs(torch.tensor(other) - scores.detach()).max() > 1e-3


def test_bad_settings_and_data(tmp_path):
    for settings, message in (
        ({"center_coef": -1.0}, r"RewardModule\(center_coef=-1.0\): must be 0 or more"),
        ({"lr_schedule": "cosin"}, "unknown lr_schedule 'cosin'. Did you mean 'cosine'"),
        ({"warmup_ratio": 2}, r"RewardModule\(warmup_ratio=2\)"),
        ({"token_budget": 0}, r"RewardModule\(token_budget=0\)"),
    ):
        with pytest.raises(ValueError, match=message):
            reward_module(**settings)
    with pytest.raises(ValueError, match="RewardModule needs `model`"):
        RewardModule()
    for settings, data, message in (
        ({"margin_column": "beter"}, {}, "margin_column='beter'.* is None .*'better'"),
        ({"token_budget": 8}, {}, "takes 11 tokens of a pass, token_budget is 8"),
        ({"token_budget": 15, "share_prompts": False}, {}, "takes 18 tokens of a pass, token_budget is 15"),
        ({}, {"completion_columns": ["chosen"]}, "comes with 1 texts"),
        ({}, {"val": {"a": ROWS, "b": ROWS}}, "has the sets 'a', 'b': RewardModule takes one"),
        ({}, {"train": ROWS[:3] + [{"prompt": "1", "chosen": "1"}]}, "row 3: unknown column 'rejected'"),
    ):
        with pytest.raises(ValueError, match=message):
            fit(tmp_path, reward_module(**settings), data_of(**data))


# ----------------------------------------------------------------------------------------------- supervised fine-tuning


def answers_by_hand(model):
    """For each row the log-probabilities of its answer's tokens and whether each is the most likely one."""
    tokenizer = char_tokenizer()
    for row in ROWS:
        prompt, answer = tokenizer(row["prompt"]).input_ids, [*tokenizer(row["answer"]).input_ids, 2]
        logits = model(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        logprobs = logits.log_softmax(-1)[range(len(answer)), answer]
        yield logprobs, logits.argmax(-1) == torch.tensor(answer)


def test_sft_loss_and_gradient_are_those_of_the_answer_and_its_end(tmp_path):
    module, record = sft_module(), Record()
    reference = tiny_llama(0, width=32, layers=2).double()
    loss = -torch.cat([logprobs for logprobs, _ in answers_by_hand(reference)]).mean()
    loss.backward()
    norm = torch.cat([p.grad.flatten() for p in reference.parameters()]).norm().item()
    fit(tmp_path, module, data_of(batch_size=16), limit_val_batches=0, callbacks=[record])
    assert record.metrics[0]["train/loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert record.metrics[0]["train/grad_norm"] == pytest.approx(norm, rel=1e-4)


def test_sft_metrics_are_those_of_greedy_decoding(tmp_path):
    module = sft_module(lr=5e-3)
    trainer = fit(tmp_path, module, data_of(batch_size=8), max_epochs=5)
    (metrics,) = trainer.validate(module, data_of(val=ROWS, val_batch_size=3), verbose=False)
    found = list(answers_by_hand(module.model.eval()))
    loss = -torch.cat([logprobs for logprobs, _ in found]).mean().item()
    expected = {
        "val/loss": loss,
        "val/perplexity": math.exp(loss),
        "val/accuracy": torch.cat([right for _, right in found]).float().mean().item(),
        "val/exact": sum(bool(right.all()) for _, right in found) / 16,
    }
    assert metrics == pytest.approx(expected, rel=1e-4)
    assert 0 < metrics["val/exact"] < metrics["val/accuracy"] < 1
    decoded = []
    for row in ROWS:
        prompt = char_tokenizer()(row["prompt"], return_tensors="pt")
        ids = module.model.generate(**prompt, do_sample=False, max_new_tokens=4)[0, 4:]
        decoded.append(char_tokenizer().decode(ids, skip_special_tokens=True) == row["answer"])
    assert metrics["val/exact"] == pytest.approx(sum(decoded) / 16)


def test_reinforcement_learning_goes_on_from_the_result(tmp_path):
    module = sft_module(lr=5e-3)
    fit(tmp_path, module, callbacks=[ExportModel(str(tmp_path / "start"))])
    policy = RLHFModule(str(tmp_path / "start"), "exact_match", sampling=SamplingParams(n=2, max_new_tokens=3))
    trainer = trainer_of(tmp_path, callbacks=[TransformersRollout()], limit_train_batches=1)
    data = data_of()
    trainer.fit(policy, data)
    assert policy.iteration == 1
    assert [t.completion.token_ids for t in policy.last_trajectories]
    assert data.train_prompts[0].completions == ()


def test_both_need_this_packages_strategies(tmp_path):
    for make in MODULES:
        trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, max_steps=1)
        with pytest.raises(TypeError, match="trains through a lightrft strategy, got SingleDeviceStrategy"):
            trainer.fit(make(), data_of())


def test_the_guide_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny = repr({"name": "tiny-llama", "layers": 1, "width": 32, "alphabet": string.printable})
    names = {}
    for block in re.findall(r"```python\n(.*?)```", GUIDE.read_text(), re.S):
        exec(compile(block.replace('"smollm2-135m-instruct"', tiny), GUIDE.name, "exec"), names)
    assert (tmp_path / "my-start" / "model.safetensors").exists()
    scores = names["learned"](["What is 2 + 3?", "What is 4 + 4?"], ["5", "80"])
    (micro,) = names["module"]._micro_batches(names["trainer"].datamodule.train_prompts)
    ours, index = completion_scores(names["module"].model, micro.batch)
    assert scores == pytest.approx(ours[index.argsort()][[0, 3]].tolist(), abs=1e-5)


def test_weights_of_64_bits(tmp_path):
    trainer = fit(tmp_path, sft_module(), precision="64-true", limit_train_batches=1)
    assert trainer.callback_metrics["val/loss"] > 0
