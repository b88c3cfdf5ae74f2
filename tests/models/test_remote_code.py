"""Code in a model folder is not run, whatever standard input says, and the error names the folder and what to do."""

from __future__ import annotations

import ast
import io
import json
from pathlib import Path

import pytest

import lightrft_lightning
from lightrft_lightning import convert
from lightrft_lightning.critic import Critic, new_critic
from lightrft_lightning.engines._hosted import create_hosted
from lightrft_lightning.models.loading import load_config, load_model, load_tokenizer
from lightrft_lightning.models.scalar import load_scalar_model, with_scalar_head
from lightrft_lightning.models.streaming import parameters_on_meta
from lightrft_lightning.models.tiny import char_tokenizer, tiny_llama
from lightrft_lightning.planning.predict import build
from lightrft_lightning.planning.settings import Planned
from lightrft_lightning.rewards import RewardModel

PACKAGE = Path(lightrft_lightning.__file__).parent
CODE = """
import pathlib
pathlib.Path({ran!r}).touch()
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
class Config(LlamaConfig):
    model_type = "own"
class Model(LlamaForCausalLM):
    config_class = Config
class Tokenizer(PreTrainedTokenizerFast):
    pass
"""
AUTO_MAP = {
    "AutoConfig": "code.Config",
    "AutoModelForCausalLM": "code.Model",
    "AutoModelForSequenceClassification": "code.Model",
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A model whose config, weights and tokenizer all need code of the folder, and an eager ``y`` on standard input."""
    path = tmp_path / "model"
    tiny_llama(width=16, layers=1).save_pretrained(path)
    char_tokenizer().save_pretrained(path)
    (path / "code.py").write_text(CODE.format(ran=str(tmp_path / "ran")))
    change(path / "config.json", model_type="own", auto_map=AUTO_MAP)
    tokenizer = ["code.Tokenizer", "code.Tokenizer"]
    change(path / "tokenizer_config.json", tokenizer_class="Tokenizer", auto_map={"AutoTokenizer": tokenizer})
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 9))
    yield path
    assert not (tmp_path / "ran").exists()


def change(file, **values):
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def on_meta(folder):
    with parameters_on_meta():
        load_model(folder)


WAYS = {
    "model": load_model,
    "model on meta": on_meta,
    "config": load_config,
    "tokenizer": load_tokenizer,
    "reward model's tokenizer": RewardModel,
    "reward model": lambda folder: RewardModel(str(folder), tokenizer=char_tokenizer()).load(),
    "scalar model": load_scalar_model,
    "critic": lambda folder: new_critic(Critic(model=str(folder)), None, None),
    "plan": lambda folder: build(Planned(model=str(folder))),
    "hosted": lambda folder: create_hosted("transformers", {}).start(str(folder)),
    "hosted without weights": lambda folder: create_hosted("transformers", {}).start(str(folder), "dummy"),
    "convert": lambda folder: convert.convert(str(folder), str(folder.parent / "out")),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_folder_that_needs_its_own_code_is_refused(folder, way, capsys):
    with pytest.raises(ValueError, match=r"model.* needs code that it brings along .* pass the objects$") as caught:
        WAYS[way](folder)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)
    assert "y/N" not in capsys.readouterr().out


def test_code_for_a_model_that_transformers_knows_is_left_aside(folder):
    change(folder / "config.json", model_type="llama")
    assert type(load_model(folder)).__module__.startswith("transformers.")


def test_a_head_for_a_model_object_does_not_fetch_code(folder):
    change(folder / "config.json", model_type="llama")
    model = load_model(folder)

    class Own(type(model.config)):
        model_type = "own"

    model.config.__class__ = Own
    with pytest.raises(ValueError, match="needs code that it brings along"):
        with_scalar_head(model)


def test_convert_calls_nothing_but_models_by_the_name_in_a_config(tmp_path):
    tiny_llama(width=16, layers=1).save_pretrained(tmp_path / "model")
    change(tmp_path / "model" / "config.json", architectures=["GenerationConfig"])
    convert.convert(str(tmp_path / "model"), str(tmp_path / "out"))
    assert load_model(tmp_path / "out").num_parameters() == load_model(tmp_path / "model").num_parameters()


def calls_without_the_setting(source):
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        if node.func.attr not in ("from_pretrained", "from_config"):
            continue
        owner = node.func.value
        if isinstance(owner, ast.Name) and owner.id in ("RLHFModule", "StrategyConfig", "cls"):
            continue  # this package's own
        if isinstance(owner, ast.Attribute) and owner.attr in ("PeftConfig", "GenerationConfig"):
            continue  # plain values of a JSON file, and no such setting
        said = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        if said.get("trust_remote_code") != "False":
            yield f"line {node.lineno}: {ast.unparse(node)}"


def test_every_call_that_could_run_a_folders_code_forbids_it():
    roots = (PACKAGE, PACKAGE.parent / "benchmarks", PACKAGE.parent / "examples")
    files = [file for root in roots for file in root.rglob("*.py")]
    found = {str(file): list(calls_without_the_setting(file.read_text())) for file in files}
    assert {file: calls for file, calls in found.items() if calls} == {}
    assert list(calls_without_the_setting("AutoModel.from_pretrained(folder, **settings)"))
