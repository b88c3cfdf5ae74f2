"""`lightrft convert`: what goes in comes out, from every kind of checkpoint, in little memory."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed.checkpoint as dcp
import transformers
from torch import nn

from lightrft_lightning import CheckpointError, FakeStrategy, RLHFModule
from lightrft_lightning.cli import main
from lightrft_lightning.convert import convert
from lightrft_lightning.models.loading import load_model
from lightrft_lightning.models.tiny import char_tokenizer, tiny_llama

IDS = torch.arange(10)[None]


def llama(tied=True, **settings):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=32, tie_word_embeddings=tied, **settings,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def opened(folder, **settings):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, **settings).eval()
    return model


def same_weights(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(v, b[n]) for n, v in a.items())


@pytest.mark.parametrize("tied", [True, False])
def test_there_and_back(tmp_path, tied):
    model = llama(tied)
    FakeStrategy().save_ckpt(model, tmp_path / "ckpt")
    convert(str(tmp_path / "ckpt"), str(tmp_path / "hf"))
    again = opened(tmp_path / "hf")
    assert same_weights(again, model) and torch.equal(again(IDS).logits, model(IDS).logits)
    assert again.dtype == torch.float32 and json.loads((tmp_path / "hf" / "config.json").read_text())["dtype"]
    convert(str(tmp_path / "hf"), str(tmp_path / "back"), to="ckpt")
    other = llama(tied)
    nn.init.zeros_(other.model.layers[0].mlp.up_proj.weight)
    before = torch.get_rng_state()
    FakeStrategy().load_ckpt(other, tmp_path / "back")
    assert same_weights(other, model)
    assert torch.equal(before, torch.get_rng_state())  # it holds no random state
    convert(str(tmp_path / "back"), str(tmp_path / "hf2"))
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "hf" / file).read_bytes() == (tmp_path / "hf2" / file).read_bytes()
    FakeStrategy().load_ckpt(llama(tied), tmp_path / "hf", load_module_only=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["back", "ckpt", "hf", "hf2"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_dtype(tmp_path, dtype):
    model = llama()
    FakeStrategy().save_ckpt(model, tmp_path / "ckpt", tag="a")
    convert(str(tmp_path / "ckpt" / "a"), str(tmp_path / "hf"), dtype=dtype)
    again = opened(tmp_path / "hf", dtype="auto")
    assert again.dtype == getattr(torch, dtype)
    assert same_weights(again, copy.deepcopy(model).to(again.dtype))


def test_many_files(tmp_path):
    model = llama()
    FakeStrategy().save_ckpt(model, tmp_path / "ckpt")
    convert(str(tmp_path / "ckpt"), str(tmp_path / "hf"), shard_bytes=4000)
    files = sorted(p.name for p in (tmp_path / "hf").glob("*.safetensors"))
    assert len(files) > 3 and files[0].startswith("model-00001-of-000")
    assert all((tmp_path / "hf" / name).stat().st_size < 4000 + 1500 for name in files)
    assert same_weights(opened(tmp_path / "hf"), model)
    convert(str(tmp_path / "hf"), str(tmp_path / "one"))
    assert same_weights(opened(tmp_path / "one"), model) and (tmp_path / "one" / "model.safetensors").is_file()


class ActorCritic(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.actor, self.critic, self.reference = llama(), llama(tied=False), llama()
        self.head = nn.Linear(2, 2)
        self.register_state_dict_post_hook(self.without_reference)

    @staticmethod
    def without_reference(module, state_dict, *args):
        for name in [n for n in state_dict if n.startswith("reference.")]:
            del state_dict[name]


@pytest.fixture
def trainers(tmp_path):
    """A checkpoint of a Trainer, with an actor and a critic."""
    trainer = pl.Trainer(strategy="lightrft_fake", accelerator="cpu", logger=False, default_root_dir=tmp_path)
    trainer.strategy.connect(ActorCritic())
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    return tmp_path / "x.ckpt"


def test_a_part_of_a_trainers_checkpoint(trainers, tmp_path):
    with pytest.raises(ValueError, match="several models: choose one with module=actor or critic"):
        convert(str(trainers), str(tmp_path / "hf"))
    with pytest.raises(ValueError, match=r"module='akt': nothing of that name .*; there are: actor, critic, head"):
        convert(str(trainers), str(tmp_path / "hf"), module="akt")
    for name, module in (("actor", llama()), ("critic", llama(tied=False))):
        convert(str(trainers), str(tmp_path / name), module=name)
        assert same_weights(opened(tmp_path / name), module)


def test_lightrfts_wrappers(tmp_path):
    class Actor(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = llama()

    FakeStrategy().save_ckpt(Actor(), tmp_path / "ckpt")
    convert(str(tmp_path / "ckpt"), str(tmp_path / "hf"))
    assert same_weights(opened(tmp_path / "hf"), llama())


@pytest.mark.parametrize("rslora", [True, False])
def test_lora(tmp_path, rslora):
    import peft

    settings = peft.LoraConfig(
        r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False, lora_alpha=5, use_rslora=rslora
    )
    model = peft.get_peft_model(llama(), settings).eval()
    expected = model(IDS).logits
    FakeStrategy().save_ckpt(model, tmp_path / "ckpt")
    convert(str(tmp_path / "ckpt"), str(tmp_path / "merged"))
    assert torch.allclose(opened(tmp_path / "merged")(IDS).logits, expected, atol=1e-5)
    assert not torch.allclose(llama()(IDS).logits, expected, atol=1e-3)
    convert(str(tmp_path / "ckpt"), str(tmp_path / "adapter"), lora="keep")
    again = peft.PeftModel.from_pretrained(llama(), tmp_path / "adapter").eval()
    assert torch.equal(again(IDS).logits, expected)
    model.base_model.model.model.norm.weight.data += 1
    llama().save_pretrained(tmp_path / "base")
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    FakeStrategy().save_ckpt(model, tmp_path / "beside")
    with pytest.raises(ValueError, match=r"norm.weight was trained and is no part of the adapter"):
        convert(str(tmp_path / "beside"), str(tmp_path / "x"), lora="keep")
    model.base_model.model.model.norm.weight.data -= 1
    with pytest.raises(ValueError, match="use to='hf', or lora='merge'"):
        convert(str(tmp_path / "ckpt"), str(tmp_path / "x"), to="ckpt", lora="keep")
    model.add_adapter("second", settings)
    FakeStrategy().save_ckpt(model, tmp_path / "two")
    convert(str(tmp_path / "two"), str(tmp_path / "first of two"))
    assert torch.allclose(opened(tmp_path / "first of two")(IDS).logits, expected, atol=1e-5)
    model.base_model.set_adapter(["default", "second"])
    FakeStrategy().save_ckpt(model, tmp_path / "both")
    with pytest.raises(ValueError, match="default, second are active together: none can be converted alone"):
        convert(str(tmp_path / "both"), str(tmp_path / "x"), lora="keep")


def test_lightrfts_fsdp_form(tmp_path):
    """DCP of a plain state dict, without `latest`, beside files of its own."""
    model = llama(tied=False)
    dcp.save(model.state_dict(), checkpoint_id=tmp_path / "ckpt" / "global_step5", no_dist=True)
    torch.save({"consumed_samples": 3}, tmp_path / "ckpt" / "global_step5" / "client_state.pt")
    model.save_pretrained(tmp_path / "base")
    with pytest.raises(ValueError, match="does not say what the model is: pass model_folder="):
        convert(str(tmp_path / "ckpt"), str(tmp_path / "hf"))
    for tag in (None, "global_step5"):
        target = tmp_path / f"hf{tag}"
        convert(str(tmp_path / "ckpt"), str(target), tag=tag, model_folder=str(tmp_path / "base"))
        assert same_weights(opened(target), model)
    other = llama(tied=False)
    nn.init.zeros_(other.lm_head.weight)
    with pytest.raises(CheckpointError, match=r"was not written by this package: .* load_module_only=True"):
        FakeStrategy().load_ckpt(other, tmp_path / "ckpt")
    FakeStrategy().load_ckpt(other, tmp_path / "ckpt", load_module_only=True)
    assert same_weights(other, model)


def test_tokenizer(tmp_path):
    char_tokenizer().save_pretrained(tmp_path / "tokenizer")
    model = tiny_llama(seed=0, width=32, layers=1)
    FakeStrategy().save_ckpt(model, tmp_path / "ckpt")
    convert(str(tmp_path / "ckpt"), str(tmp_path / "hf"), tokenizer=str(tmp_path / "tokenizer"))
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")("1+1") == char_tokenizer()("1+1")
    with pytest.raises(FileNotFoundError, match="no tokenizer files there"):
        convert(str(tmp_path / "ckpt"), str(tmp_path / "x"), tokenizer=str(tmp_path))
    assert not (tmp_path / "x").exists()


def test_the_result_has_the_tokenizer_and_the_end_tokens_that_the_model_had(tmp_path, caplog):
    model = tiny_llama(seed=0, width=32, layers=1)
    model.generation_config.eos_token_id = [2, 5]
    model.save_pretrained(tmp_path / "base")
    char_tokenizer().save_pretrained(tmp_path / "base")
    for made, source in (("found", str(tmp_path / "base")), ("made", "tiny-llama")):
        FakeStrategy().save_ckpt(load_model(source), tmp_path / f"{made}-ckpt")
        convert(str(tmp_path / f"{made}-ckpt"), str(tmp_path / made))
        assert transformers.pipeline("text-generation", str(tmp_path / made))("1+1", max_new_tokens=2)
        assert RLHFModule(str(tmp_path / made), "exact_match").tokenizer("1+1") == char_tokenizer()("1+1")
    assert opened(tmp_path / "found").generation_config.eos_token_id == [2, 5] and "no tokenizer" not in caplog.text
    (tmp_path / "base").rename(tmp_path / "elsewhere")
    convert(str(tmp_path / "found-ckpt"), str(tmp_path / "without"))
    assert "no tokenizer is known" in caplog.text
    assert opened(tmp_path / "without").generation_config.eos_token_id == [2, 5]


class Tied(pl.LightningModule):
    def __init__(self, width=4):
        super().__init__()
        self.save_hyperparameters()
        torch.manual_seed(0)
        self.one, self.other, self.frozen = nn.Linear(width, width), nn.Linear(width, width), nn.Linear(2, 2)
        self.other.weight = self.one.weight
        self.frozen.requires_grad_(False)

    def training_step(self, batch):
        return self.other(self.one(batch).tanh()).square().mean()

    def configure_optimizers(self):
        groups = [{"params": [self.one.bias], "lr": 0.1}, {"params": [self.one.weight, self.other.bias]}]
        optimizer = torch.optim.AdamW(groups, lr=0.01)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)]

    def train_dataloader(self):
        return torch.utils.data.DataLoader(torch.arange(32.0).sin().reshape(8, 4), 2)


def fitted(strategy, steps, folder, resumed=None):
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = pl.Trainer(
        strategy=strategy, accelerator="cpu", devices=1, max_steps=steps, default_root_dir=folder, **quiet
    )
    trainer.fit(Tied(), ckpt_path=resumed)
    return trainer


def test_lightnings_single_file_goes_on_with_and_without_this_package(tmp_path):
    fitted("lightrft_fake", 4, tmp_path).save_checkpoint(tmp_path / "ours.ckpt")
    convert(str(tmp_path / "ours.ckpt"), str(tmp_path / "new" / "theirs.ckpt"), to="lightning")
    theirs = tmp_path / "new" / "theirs.ckpt"
    fitted("auto", 4, tmp_path).save_checkpoint(tmp_path / "stock.ckpt")
    # Lightning's own strategies do not go on from the end of an epoch as if nothing had been.
    for strategy, expected in (
        ("auto", fitted("auto", 8, tmp_path, tmp_path / "stock.ckpt")),
        ("lightrft_fake", fitted("auto", 8, tmp_path)),
    ):
        assert same_weights(fitted(strategy, 8, tmp_path, theirs).model, expected.model), strategy
    assert same_weights(Tied.load_from_checkpoint(theirs), Tied.load_from_checkpoint(tmp_path / "ours.ckpt"))
    weights = torch.load(theirs, weights_only=True)["state_dict"]
    assert weights["one.weight"].data_ptr() == weights["other.weight"].data_ptr()  # once in the file
    assert [p.name for p in theirs.parent.iterdir()] == ["theirs.ckpt"]
    with pytest.raises(ValueError, match="dtype has no meaning with to='lightning'"):
        convert(str(tmp_path / "ours.ckpt"), str(tmp_path / "x"), to="lightning", dtype="bfloat16")
    FakeStrategy().save_ckpt(nn.Linear(1, 1), tmp_path / "loop")
    with pytest.raises(CheckpointError, match=r"was written by save_ckpt\(\)"):
        convert(str(tmp_path / "loop"), str(tmp_path / "x"), to="lightning")
    assert not (tmp_path / "x").exists()


# -------------------------------------------------------------------- what is refused


def test_refusals_leave_nothing(tmp_path):
    model = llama()
    FakeStrategy().save_ckpt(model, tmp_path / "ckpt", tag="a")
    (tmp_path / "there").mkdir()
    source = str(tmp_path / "ckpt")
    for name, value, nearest in (
        ("to", "lightnin", "lightning"),
        ("dtype", "bf16", "bfloat16"),
        ("lora", "keeps", "keep"),
    ):
        with pytest.raises(ValueError, match=f"{value}.*{nearest}"):
            convert(source, str(tmp_path / "x"), **{name: value})
    with pytest.raises(FileExistsError, match="there exists: choose another name"):
        convert(source, str(tmp_path / "there"))
    with pytest.raises(FileNotFoundError, match=r"nothing to convert at .*nowhere"):
        convert(str(tmp_path / "nowhere"), str(tmp_path / "x"))
    with pytest.raises(FileNotFoundError, match=r"tag 'b'.*checkpoints there: a"):
        convert(source, str(tmp_path / "x"), tag="b")
    llama(num_key_value_heads=1).save_pretrained(tmp_path / "other")
    with pytest.raises(CheckpointError, match=r"no LlamaForCausalLM of this config: .*k_proj.weight has shape"):
        convert(source, str(tmp_path / "x"), model_folder=str(tmp_path / "other"))
    with pytest.raises(ValueError, match=r"module='actor': .* holds one model, leave it out"):
        convert(str(tmp_path / "other"), str(tmp_path / "x"), module="actor")
    FakeStrategy().save_ckpt(model.model.layers[0], tmp_path / "layer")
    with pytest.raises(CheckpointError, match=r"no LlamaForCausalLM: it has no lm_head|it has no model"):
        convert(str(tmp_path / "layer"), str(tmp_path / "x"), model_folder=str(tmp_path / "other"))
    file = next((tmp_path / "ckpt" / "a").glob("*.distcp"))
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(CheckpointError, match="is damaged"):
        convert(source, str(tmp_path / "x"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ckpt", "layer", "other", "there"]


def test_a_result_that_does_not_read_back_does_not_stay(tmp_path, monkeypatch):
    import safetensors.torch

    FakeStrategy().save_ckpt(llama(), tmp_path / "ckpt")
    original = safetensors.torch.save_file

    def wrong(tensors, *args, **kwargs):
        original({n: t + 1e-6 * ("up_proj" in n) for n, t in tensors.items()}, *args, **kwargs)

    monkeypatch.setattr(safetensors.torch, "save_file", wrong)
    with pytest.raises(CheckpointError, match=r"up_proj.weight does not read back as it was written"):
        convert(str(tmp_path / "ckpt"), str(tmp_path / "hf"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ckpt"]


# -------------------------------------------------------------------- command line, memory


def test_command_line(tmp_path, capsys):
    FakeStrategy().save_ckpt(llama(), tmp_path / "ckpt", tag="a")
    assert main(["convert", str(tmp_path / "ckpt"), str(tmp_path / "hf"), "--tag", "a", "--dtype", "bfloat16"]) == 0
    assert capsys.readouterr().out == f"written: {tmp_path / 'hf'}\n"
    assert opened(tmp_path / "hf", dtype="auto").dtype == torch.bfloat16
    assert main(["convert", str(tmp_path / "hf"), str(tmp_path / "back"), "--to=ckpt"]) == 0
    assert main(["convert", str(tmp_path / "ckpt"), str(tmp_path / "hf")]) == 1
    assert f"lightrft: error: {tmp_path / 'hf'} exists" in capsys.readouterr().err
    for wrong in (["--to", "onnx"], ["--dtype", "int8"], ["--unknown", "1"]):
        with pytest.raises(SystemExit) as error:
            main(["convert", "a", "b", *wrong])
        assert error.value.code == 2
    with pytest.raises(SystemExit) as error:
        main(["convert", "--help"])
    text = capsys.readouterr().out
    assert error.value.code == 0 and "--module" in text and "--lora {merge,keep}" in text


MEMORY = """
import sys, threading, time, torch, transformers, safetensors.torch
from lightrft_lightning.convert import convert
from lightrft_lightning.checkpoints import _dcp
torch.set_num_threads(1)
transformers.AutoModelForCausalLM, transformers.AutoConfig
_dcp.FILE_BYTES = int(sys.argv[5])

def used():  # what is this process's own, without mapped files
    lines = dict(line.split(":", 1) for line in open("/proc/self/status") if ":" in line)
    return int(lines["RssAnon"].split()[0]) * 1024

peak, done = 0, False

def watch():
    global peak
    while not done:
        peak = max(peak, used())
        time.sleep(0.002)

thread = threading.Thread(target=watch)
before = used()
thread.start()
convert(sys.argv[1], sys.argv[2], to=sys.argv[3], shard_bytes=int(sys.argv[4]))
done = True
thread.join()
print(peak - before)
"""


def test_memory_is_about_one_file(tmp_path):
    """A model of 160 MB in files of 16 MB: below 64 MB above the start, imports and Python included."""
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=512, intermediate_size=2048, num_hidden_layers=10, num_attention_heads=4
    )
    model = transformers.LlamaForCausalLM(config)
    total = sum(p.numel() * 4 for p in model.parameters())
    assert total > 160e6
    FakeStrategy().save_ckpt(model, tmp_path / "ckpt")
    del model
    used = {}
    for source, target, to in (("ckpt", "hf", "hf"), ("hf", "back", "ckpt"), ("back", "hf2", "hf")):
        command = [sys.executable, "-c", MEMORY, str(tmp_path / source), str(tmp_path / target), to, "16000000"]
        done = subprocess.run(
            [*command, "16000000"], capture_output=True, text=True, timeout=200,
            env={**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        used[target] = int(done.stdout.split()[-1]) / 1e6
    print(used)
    assert max(used.values()) < 64, used
