"""What the README shows is what the package does."""

from __future__ import annotations

import re
import string
from pathlib import Path

import pytest
import yaml
from lightning.pytorch import Trainer

import lightrft_lightning
from lightrft_lightning import (
    PromptDataModule,
    Rewards,
    RLHFModule,
    SamplingParams,
    TransformersRollout,
    get_strategy,
)
from lightrft_lightning.callbacks import __all__ as callbacks
from lightrft_lightning.cli import LightRFTCLI
from lightrft_lightning.models.tiny import char_tokenizer, tiny_llama

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text()
TINY = {"name": "tiny-llama", "layers": 2, "width": 32, "alphabet": string.printable}


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", TEXT, re.S)


def test_the_python_example_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = next(block for block in blocks("python") if "trainer.fit(module, datamodule=PromptDataModule" in block)
    assert len(code.splitlines()) <= 16
    code = code.replace('"smollm2-135m-instruct"', repr(TINY)).replace(
        "limit_train_batches=12", "limit_train_batches=1"
    )
    exec(compile(code, "README.md", "exec"), {})
    assert (tmp_path / "my-model" / "model.safetensors").exists()


def test_the_yaml_example_is_valid(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (config,) = [yaml.safe_load(block) for block in blocks("yaml")]
    config["model"]["model"] = TINY
    Path("config.yaml").write_text(yaml.safe_dump(config))
    cli = LightRFTCLI(["validate", "--config", "config.yaml", "--trainer.accelerator", "cpu"])
    assert cli.model.rewards.names == ["last_number"]


def test_the_rewards_are_accepted():
    code = next(block for block in blocks("python") if "def diverse" in block)
    names: dict[str, object] = {}
    exec(code.split("\n\n")[0], names)
    functions = [names[name] for name in ("right", "diverse", "graded_elsewhere")]
    assert Rewards(functions, weights=[1.0, 0.2, 1.0]).names == ["right", "diverse", "graded_elsewhere"]
    for name in ("last_number", "exact_match", "math_verify", "reasoning_gym"):
        assert f"`{name}`" in TEXT and Rewards(name).names == [name]


def test_the_loop_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = next(block for block in blocks("python") if "setup_distributed" in block)
    tokenizer = char_tokenizer()

    def loss_of(actor, reference, batch):
        return actor(input_ids=batch, labels=batch).loss

    dataset = tokenizer(["1+1=2"] * 64, return_tensors="pt").input_ids
    models = {"actor": tiny_llama(0, layers=2, width=32), "reference": tiny_llama(0, layers=2, width=32)}
    names = {"get_strategy": get_strategy, "loss_of": loss_of, "dataset": dataset, "tokenizer": tokenizer, **models}
    exec(code, names)
    assert names["strategy"].optimizer_steps == 1
    assert (tmp_path / "my-model" / "model.safetensors").exists()


def test_all_that_is_named_exists():
    for path in re.findall(r"\]\((?!http)([^)#]+)\)", TEXT):
        assert (ROOT / path).exists(), path
    # Other tests register strategies of their own in the same process.
    for name in (n for n in lightrft_lightning.available_strategies() if n.startswith("lightrft_")):
        stem = name.removesuffix("_offload").removeprefix("lightrft_deepspeed")
        assert f"`{name}`" in TEXT or f"`{stem}`" in TEXT, name
    named = set(re.findall(r"\| `([A-Z]\w+)\(", TEXT))
    assert named == set(callbacks) - {"RolloutCallback"}


@pytest.mark.parametrize("command", ["demo", "test"])
def test_the_first_commands_are_in_the_makefile(command):
    assert f"make {command} " in blocks("bash")[0]
    assert re.search(rf"^{command}:", (ROOT / "Makefile").read_text(), re.M)


def test_the_metrics_that_are_documented_are_logged(tmp_path):
    module = RLHFModule(
        tiny_llama(0, layers=2, width=32), "last_number", char_tokenizer(), SamplingParams(n=2, max_new_tokens=4),
        kl_coef=0.1, seed=0,
    )  # fmt: skip
    trainer = Trainer(
        strategy="lightrft_fake", accelerator="cpu", callbacks=[TransformersRollout()], max_epochs=1, logger=False,
        limit_train_batches=2, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    task = {"task": "digits_addition", "size": 16}
    trainer.fit(module, datamodule=PromptDataModule(train=task, val=task, batch_size=4))
    lines = (ROOT / "docs" / "architecture.md").read_text().splitlines()
    table = "\n".join(line for line in lines if "with several ranks" not in line)
    named = set(re.findall(r"`((?:train|time|val)/[a-z_/]+)`", table))
    assert len(named) > 15
    assert named <= set(trainer.callback_metrics)
