"""The command line, run in this process; every run is a real one on a tiny model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint

import lightrft_lightning
from lightrft_lightning import SamplingParams
from lightrft_lightning.cli import LightRFTCLI, main

EXAMPLES = Path(__file__).parents[1] / "examples"

CONFIG = """
seed_everything: 7
model:
  model: {name: tiny-llama, layers: 2, width: 32}
  rewards: {name: last_number, unfinished: -0.5}
  sampling: {n: 4, max_new_tokens: 4, stop: ["=", "+"]}
  lr: 1e-3
data:
  train: {task: digits_addition, size: 32, split: train}
  val: {task: digits_addition, size: 4, split: val}
  predict: ["1+1=", "2+2="]
  batch_size: 4
trainer:
  accelerator: cpu
  max_epochs: 1
  limit_train_batches: 2
"""


@pytest.fixture
def config(tmp_path, monkeypatch):
    """The name of a YAML file in the current directory, which is empty otherwise."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lightrft"])  # Lightning warns about other arguments
    monkeypatch.delenv("LIGHTRFT_DEBUG", raising=False)
    Path("config.yaml").write_text(CONFIG)
    return "config.yaml"


def with_callbacks(text: str) -> str:
    Path("with_callbacks.yaml").write_text(f"{CONFIG}  callbacks:\n{text}")
    return "with_callbacks.yaml"


def test_fit_needs_no_more_than_model_rewards_and_data(config, capsys):
    assert main(["fit", "--config", config]) == 0
    output = capsys.readouterr().out
    assert "2/2  reward" in output
    assert "samples of iteration 1" in output
    last = output.splitlines()[-1]
    assert last.startswith("Done: validation reward ") and ", 2 iterations, " in last
    folder = Path("lightning_logs/version_0")
    assert {p.name for p in folder.iterdir()} >= {"config.yaml", "reward.png", "model", "hparams.yaml"}
    assert last.endswith(str(folder / "model"))
    assert yaml.safe_load((folder / "config.yaml").read_text())["seed_everything"] == 7


def test_typed_arguments_come_from_yaml_and_flags(config):
    cli = LightRFTCLI(
        ["validate", "--config", config, "--model.sampling.temperature", "0.5"]
        + ["--model.val_sampling", "{n: 2, max_new_tokens: 3, temperature: 0.0}", "--model.policy_loss_options"]
        + ["{clip_high: 0.28}", "--data.train", '[{"prompt": "1+2=", "answer": "3"}]']
    )
    assert cli.model.sampling == SamplingParams(n=4, max_new_tokens=4, temperature=0.5, stop=("=", "+"))
    assert cli.model.val_sampling == SamplingParams(n=2, max_new_tokens=3, temperature=0.0)
    assert cli.model.policy_loss_options == {"clip_high": 0.28}
    assert cli.model.seed == 7
    assert cli.datamodule.sources["train"] == [{"prompt": "1+2=", "answer": "3"}]


def test_the_default_seed_is_fixed(config):
    text = CONFIG.replace("seed_everything: 7", "")
    Path("seedless.yaml").write_text(text)
    assert LightRFTCLI(["validate", "--config", "seedless.yaml"]).model.seed == 42


def test_print_config_is_a_config(config, capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["fit", "--config", config, "--print_config"])
    first = capsys.readouterr().out
    Path("printed.yaml").write_text(first)
    with pytest.raises(SystemExit, match="0"):
        main(["fit", "--config", "printed.yaml", "--print_config"])
    assert capsys.readouterr().out == first
    assert yaml.safe_load(first)["model"]["sampling"]["max_new_tokens"] == 4


def test_own_callbacks_replace_the_default_ones(config):
    # Seven, as many as there are by default: jsonargparse would mix the settings of lists of equal length.
    names = ["TransformersRollout", *["SampleTable"] * 5, "ModelCheckpoint"]
    path = with_callbacks("".join(f"    - {name}\n" for name in names))
    cli = LightRFTCLI(["validate", "--config", path])
    own = [type(c).__name__ for c in cli.trainer.callbacks]
    assert [n for n in own if n in ("ProgressLine", "ExportModel", "WritePredictions")] == []
    assert [c.every_n for c in cli.trainer.callbacks if type(c).__name__ == "SampleTable"] == [10] * 5
    assert {c.filename for c in cli.trainer.callbacks if isinstance(c, ModelCheckpoint)} == {None}


def test_the_key_of_a_server_is_not_written_down(config, capsys):
    path = with_callbacks(
        "    - class_path: RemoteRollout\n"
        "      init_args: {url: http://127.0.0.1:9, key: a-secret, deadline: 1, retries: 0}\n"
    )
    assert main(["fit", "--config", path]) == 1 and "http://127.0.0.1:9" in capsys.readouterr().err
    saved = (Path("lightning_logs") / "version_0" / "config.yaml").read_text()
    assert "http://127.0.0.1:9" in saved and "a-secret" not in saved


def test_validate_prints_pass_at_k_of_every_set(config, capsys):
    sets = "{easy: {task: digits_addition, size: 3, high: 19}, hard: {task: digits_addition, size: 2}}"
    flags = ["--data.val", sets, "--model.val_sampling", "{n: 4, max_new_tokens: 4}", "--model.pass_threshold", "-0.2"]
    assert main(["validate", "--config", config, *flags]) == 0
    printed = capsys.readouterr().out
    for name in ("val/pass@1", "val/pass@4", "val/easy/pass@2", "val/hard/pass@4", "val/hard/mean@4"):
        assert name in printed


def test_resume_with_ckpt_path_last(config, capsys):
    path = with_callbacks(
        "    - TransformersRollout\n    - Summary\n    - {class_path: ModelCheckpoint, init_args: "
        "{dirpath: checkpoints, save_last: true, save_top_k: 0, enable_version_counter: false}}\n"
    )
    assert main(["fit", "--config", path]) == 0
    assert ", 2 iterations, " in capsys.readouterr().out
    more = ["--trainer.max_epochs", "2", "--ckpt_path"]
    assert main(["fit", "--config", path, *more, "last"]) == 0
    assert ", 4 iterations, " in capsys.readouterr().out
    # A path, too; and the settings are those of the command line, not those that the checkpoint was made with.
    more = ["--trainer.max_epochs", "3", "--ckpt_path", "checkpoints/last.ckpt"]
    cli = LightRFTCLI(["fit", "--config", path, *more, "--model.token_budget", "999"])
    assert ", 6 iterations, " in capsys.readouterr().out
    assert cli.model.token_budget == 999
    assert [p.name for p in Path("checkpoints").iterdir()] == ["last.ckpt"]


def test_the_exported_model_is_a_model(config, capsys):
    assert main(["fit", "--config", config, "--trainer.logger", "false"]) == 0
    cli = LightRFTCLI(["validate", "--config", config, "--model.model", "model"])
    assert isinstance(cli.model.actor, torch.nn.Module)
    assert "val/reward" in capsys.readouterr().out


def test_test_and_predict(config, capsys):
    assert main(["test", "--config", config]) == 0
    assert "test/reward" in capsys.readouterr().out
    assert main(["predict", "--config", config, "--trainer.logger", "false"]) == 0
    rows = [json.loads(line) for line in Path("predictions.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == ["1+1=", "2+2="]


ERRORS = {
    "critic": (
        ["--model.algorithm", "ppo", "--model.critic.warmup_iterations", "-1"],
        "Critic(warmup_iterations=-1): must be 0 or more",
    ),
    "strategy": (
        ["--trainer.strategy", "lightrft_fke"],
        "'lightrft_fke'. Did you mean 'lightrft_fake'?",
    ),
    "algorithm": (["--model.policy_loss", "pppo"], "unknown policy loss 'pppo'. Did you mean 'ppo'?"),
    "group of one": (["--model.sampling.n", "1"], "sampling.n=1 must be at least 2"),
    "range": (["--model.sampling.top_p", "1.5"], "SamplingParams(top_p=1.5): must be above 0 and at most 1"),
    "devices": (["--trainer.devices", "2"], "lightrft_fake runs in one process, got devices=2"),
    "file": (["--data.train", "nowhere.jsonl"], "no such file: 'nowhere.jsonl'"),
    "model": (["--model.model", "tiny-lama"], "Did you mean 'tiny-llama'?"),
    "reward": (["--model.rewards", "last_numbr"], "unknown reward 'last_numbr'. Did you mean 'last_number'?"),
    "batch": (["--data.batch_size", "33"], "batch_size=33 is more than the 32 samples"),
    "checkpoint": (["--ckpt_path", "nowhere.ckpt"], "nowhere.ckpt"),
    "precision": (["--trainer.strategy", "lightrft_fsdp", "--trainer.precision", "64-true"], "precision='64-true'"),
    "engine": (["--trainer.callbacks", "Summary"], "needs exactly one rollout engine among the callbacks, found 0"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_an_error_is_one_line(config, capsys, name):
    flags, message = ERRORS[name]
    assert main(["fit", "--config", config, *flags]) == 1
    captured = capsys.readouterr()
    errors = [line for line in captured.err.splitlines() if line.startswith("lightrft: error: ")]
    assert len(errors) == 1 and message in errors[0]
    assert captured.err.splitlines()[-1] == errors[0]
    assert "Traceback" not in captured.err + captured.out
    assert "reward" not in captured.out  # nothing was generated


def test_debug_shows_the_traceback(config, monkeypatch):
    monkeypatch.setenv("LIGHTRFT_DEBUG", "1")
    with pytest.raises(ValueError, match="unknown policy loss"):
        main(["fit", "--config", config, "--model.policy_loss", "pppo"])


def test_an_error_in_the_users_own_code_keeps_its_traceback(config):
    Path("mine.py").write_text("raise ValueError('my bug')")
    with pytest.raises(ValueError, match="my bug"):
        main(["fit", "--config", config, "--model.rewards", "mine.py:reward"])


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("flag", "unrecognized arguments: --model.lrr"),
        ("key", "lrr"),
        ("value", "learning"),
        ("no file", "nowhere.yaml"),
        ("broken", "Problems parsing config"),
    ],
)
def test_a_wrong_setting_is_an_error_of_the_parser(config, capsys, where, message):
    Path("key.yaml").write_text(CONFIG.replace("  lr:", "  lrr:"))
    Path("value.yaml").write_text(CONFIG.replace("1e-3", "learning"))
    Path("broken.yaml").write_text("model: [unclosed")
    arguments = {
        "flag": ["--config", config, "--model.lrr", "1"],
        "key": ["--config", "key.yaml"],
        "value": ["--config", "value.yaml"],
        "no file": ["--config", "nowhere.yaml"],
        "broken": ["--config", "broken.yaml"],
    }
    with pytest.raises(SystemExit) as raised:
        main(["fit", *arguments[where]])
    assert raised.value.code == 2
    assert message in capsys.readouterr().err.split("error:", 1)[1]


def test_help_and_version(config, capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"lightrft {lightrft_lightning.__version__}\n"
    for arguments, expected in ((["--help"], "validate"), (["fit", "--help"], "--model.sampling.max_new_tokens")):
        with pytest.raises(SystemExit, match="0"):
            main(arguments)
        assert expected in capsys.readouterr().out


def test_without_jsonargparse_the_error_names_the_extra():
    hidden = """
import importlib.metadata as metadata, sys
find = metadata.distribution
def distribution(name):
    if name.startswith("jsonargparse"):
        raise metadata.PackageNotFoundError(name)
    return find(name)
metadata.distribution = distribution
sys.modules["jsonargparse"] = None
from lightrft_lightning.cli import main
sys.exit(main(["fit", "--help"]))
"""
    run = subprocess.run([sys.executable, "-c", hidden], capture_output=True, text=True, timeout=120)
    assert run.returncode == 1
    assert run.stderr.splitlines()[-1] == (
        "lightrft: error: this needs the package 'jsonargparse', which is not installed. "
        'Install it with: pip install "lightrft-lightning[cli]"'
    )


@pytest.mark.parametrize("name", ["smollm2_arithmetic.yaml", "tiny_from_scratch.yaml"])
def test_the_examples_are_valid(config, capsys, name):
    with pytest.raises(SystemExit, match="0"):
        main(["fit", "--config", str(EXAMPLES / name), "--print_config"])
    printed = yaml.safe_load(capsys.readouterr().out)
    checkpoint = printed["trainer"]["callbacks"][-1]
    assert checkpoint["class_path"].endswith("ModelCheckpoint") and checkpoint["init_args"]["filename"] is None


@pytest.mark.parametrize(("name", "example"), [("sft", "sft.yaml"), ("reward", "reward_model.yaml")])
def test_the_supervised_examples_run_and_resume(config, capsys, name, example):
    run = ["--config", str(EXAMPLES / example), "--trainer.limit_train_batches", "2", "--trainer.enable_progress_bar"]
    assert main([name, "fit", *run, "false", "--trainer.max_epochs", "1"]) == 0
    assert main([name, "fit", *run, "false", "--trainer.max_epochs", "2", "--ckpt_path", "last"]) == 0
    folder = Path("runs") / Path(example).stem
    steps = [row.split(",")[1] for row in (folder / "csv/version_1/metrics.csv").read_text().splitlines()[1:]]
    assert steps[0] == "2" and steps[-1] == "3"
    assert json.loads((folder / "model/config.json").read_text())["architectures"] == [
        "LlamaForCausalLM" if name == "sft" else "LlamaForSequenceClassification"
    ]
    assert capsys.readouterr().err.count("error") == 0


def test_supervised_defaults_and_errors(config, capsys):
    Path("pairs.yaml").write_text("model: {model: {name: tiny-llama, layers: 1, width: 32}}\ntrainer: {max_steps: 1}\n")
    rows = '[{"prompt": "1", "chosen": "2", "rejected": "3"}]'
    flags = ["--config", "pairs.yaml", "--trainer.accelerator", "cpu", "--data.batch_size", "1"]
    assert main(["reward", "fit", *flags, "--data.train", rows]) == 0
    assert Path("lightning_logs/version_0/model/model.safetensors").exists()
    capsys.readouterr()
    assert main(["sft", "fit", *flags, "--data.train", rows]) == 1
    assert "unknown column 'answer'" in capsys.readouterr().err.splitlines()[-1]
    assert main(["sft", "fit", *flags, "--data.train", rows, "--model.lr_schedule", "liner"]) == 1
    assert "unknown lr_schedule 'liner'. Did you mean 'linear'?" in capsys.readouterr().err.splitlines()[-1]
    with pytest.raises(SystemExit, match="0"):
        main(["reward", "fit", "--help"])
    output = capsys.readouterr().out
    assert "lightrft reward" in output and "--model.center_coef" in output and "--model.token_budget" in output


def test_the_quick_example_runs_and_resumes(config, capsys):
    short = ["fit", "--config", str(EXAMPLES / "tiny_from_scratch.yaml"), "--trainer.limit_train_batches", "2"]
    text = (EXAMPLES / "tiny_from_scratch.yaml").read_text()
    assert "steps: 400" in text
    Path("short.yaml").write_text(text.replace("steps: 400", "steps: 2"))
    short[2] = "short.yaml"
    assert main([*short, "--trainer.max_epochs", "1"]) == 0
    output = capsys.readouterr().out
    assert ", 2 iterations, " in output and output.endswith("model in runs/tiny_from_scratch/model\n")
    assert main([*short, "--trainer.max_epochs", "2", "--ckpt_path", "last"]) == 0
    assert ", 4 iterations, " in capsys.readouterr().out
    files = {str(p.relative_to("runs/tiny_from_scratch")) for p in Path("runs").rglob("*") if p.is_file()}
    made = {"reward.png", "model/model.safetensors", "csv/version_0/metrics.csv"}
    assert made | {"checkpoints/last.ckpt/manifest.json"} <= files
