"""What stands in a checkpoint builds nothing but what is registered, unless the caller names it himself."""

from __future__ import annotations

import shutil
import zlib

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from training import make_data, make_trainer

from lightrft_lightning import RLHFModule, SamplingParams
from lightrft_lightning.checkpoints import folder
from lightrft_lightning.convert import convert
from lightrft_lightning.rewards import REWARDS
from lightrft_lightning.sft_module import SFTModule

TINY = {"name": "tiny-llama", "layers": 1, "width": 16}
SAMPLING = {"n": 2, "max_new_tokens": 2}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    path = tmp_path_factory.mktemp("written")
    trainer = make_trainer(
        path,
        callbacks=[ModelCheckpoint(dirpath=path, filename="c", every_n_train_steps=1)],
        limit_train_batches=1,
        limit_val_batches=0,
        num_sanity_val_steps=0,
    )
    trainer.fit(RLHFModule(TINY, "exact_match", sampling=SamplingParams(**SAMPLING)), make_data())
    return path / "c.ckpt"


@pytest.fixture
def checkpoint(written, tmp_path):
    return shutil.copytree(written, tmp_path / "c.ckpt")


def forge(path, **changes):
    """Other settings in a checkpoint, with the checksums that belong to them."""
    shared = torch.load(path / "state.pt", weights_only=True)
    hidden = {key: changes.pop(key) for key in ("module_arguments", "hparams_name") if key in changes}
    shared["trainer"] |= hidden
    shared["trainer"]["hyper_parameters"] |= changes
    torch.save(shared, path / "state.pt")
    content, manifest = (path / "state.pt").read_bytes(), folder.manifest_of(path)
    manifest["files"]["state.pt"] = {"bytes": len(content), "crc32": zlib.crc32(content)}
    folder.write_manifest(path, manifest)


def as_file(path, **changes):
    """One of Lightning's own files with these settings."""
    file = path.with_name("single.ckpt")
    settings = {"model": TINY, "rewards": "exact_match", "sampling": SAMPLING, **changes}
    hidden = {key: settings.pop(key) for key in ("module_arguments", "hparams_name") if key in settings}
    torch.save(
        {
            "pytorch-lightning_version": pl.__version__,
            "state_dict": {},
            "hyper_parameters": settings,
            "lightrft": {"iteration": 0},
            **hidden,
        },
        file,
    )
    return file


def programs(tmp_path):
    """What a checkpoint can name, each of which leaves a mark when it is built."""
    mark, file = tmp_path / "mark", tmp_path / "c.ckpt" / "own.py"
    file.write_text(f"open({str(mark)!r}, 'w')\ndef f(completion): return 0.0\n")
    popen = {"name": "subprocess.Popen", "args": ["touch", str(mark)]}
    yield "reward 'subprocess.Popen'", {"rewards": popen}
    yield "reward 'subprocess.Popen'", {"rewards": ["exact_match", popen]}
    yield "reward 'os.getcwd'", {"rewards": {"os.getcwd": 1.0}}
    yield "reward '.*own.py:f'", {"rewards": f"{file}:f"}
    yield "environment 'subprocess.Popen'", {"environment": popen}
    yield "environment '.*own.py:f'", {"environment": f"{file}:f"}
    yield "reward 'subprocess.Popen'", {"module_arguments": {"rewards": popen}, "rewards": "exact_match"}
    yield "key_env 'HOME'", {"rewards": {"name": "remote", "url": "http://localhost:1", "key_env": "HOME"}}
    yield "attn_implementation 'some/kernel'", {"attn_implementation": "some/kernel"}
    yield "megatron_core", {"lora": {"megatron_config": {"a": 1}, "megatron_core": "antigravity"}}


@pytest.mark.parametrize("number", range(10))
def test_a_name_that_is_not_registered_is_refused_and_not_imported(checkpoint, tmp_path, number):
    told, changes = list(programs(tmp_path))[number]
    if "module_arguments" not in changes:
        forge(checkpoint, **changes)
        with pytest.raises((ValueError, TypeError), match=told) as caught:
            RLHFModule.load_from_checkpoint(checkpoint)
        assert "megatron" in told or "yourself, load_from_checkpoint(path, " in str(caught.value)
        convert(str(checkpoint), str(tmp_path / "converted"))
    settings = as_file(checkpoint, **changes)
    if "module_arguments" in changes:
        content = torch.load(settings, weights_only=True)
        del content["hyper_parameters"]["rewards"]
        torch.save(content, settings)
    with pytest.raises((ValueError, TypeError), match=told):
        RLHFModule.load_from_checkpoint(settings)
    assert not (tmp_path / "mark").exists()


def test_settings_hidden_behind_another_name_are_refused_too(checkpoint, tmp_path):
    popen = {"name": "subprocess.Popen", "args": ["touch", str(tmp_path / "mark")]}
    for path in (as_file(checkpoint, **popen, hparams_name="rewards"), checkpoint):
        if path is checkpoint:
            forge(checkpoint, **popen, hparams_name="rewards")
        with pytest.raises(ValueError, match=r"reward 'subprocess.Popen'"):
            RLHFModule.load_from_checkpoint(path, model=TINY, sampling=SAMPLING)
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize("cls", [RLHFModule, SFTModule])
def test_a_class_that_lightning_would_build_by_its_path_is_left_out(checkpoint, cls, tmp_path):
    popen = {"class_path": "subprocess.Popen", "init_args": {"args": ["touch", str(tmp_path / "mark")]}}
    path = "lightning.pytorch.cli.instantiate_module"
    file = as_file(checkpoint, _instantiator=path, critic=popen, advantage_estimator="gae")
    with pytest.raises((ValueError, TypeError), match=r"class_path|unexpected keyword"):
        cls.load_from_checkpoint(file)
    assert not (tmp_path / "mark").exists()


def test_what_the_caller_names_himself_is_built(checkpoint, tmp_path):
    (tmp_path / "mine.py").write_text("def f(completion): return 0.5\n")
    mine = f"{tmp_path / 'mine.py'}:f"
    forge(checkpoint, rewards=mine)
    with pytest.raises(ValueError, match=r"mine.py:f' is named in the checkpoint, .* pass it yourself"):
        RLHFModule.load_from_checkpoint(checkpoint)
    for given in ({"rewards": mine}, {"rewards": [{"name": mine}]}, {"weights_only": False}):
        assert RLHFModule.load_from_checkpoint(checkpoint, **given).rewards.names == ["f"]
    assert RLHFModule.load_from_checkpoint(checkpoint, rewards="exact_match").rewards.names == ["exact_match"]


def test_what_the_user_has_registered_is_built(checkpoint, monkeypatch):
    monkeypatch.setitem(REWARDS._entries, "registered", lambda completion: 1.0)
    forge(checkpoint, rewards="registered")
    assert len(RLHFModule.load_from_checkpoint(checkpoint).rewards.names) == 1


def test_resuming_builds_nothing_of_it(checkpoint, tmp_path):
    forge(checkpoint, rewards={"name": "subprocess.Popen", "args": ["touch", str(tmp_path / "mark")]})
    module = RLHFModule(TINY, "exact_match", sampling=SamplingParams(**SAMPLING))
    trainer = make_trainer(tmp_path, limit_train_batches=1, limit_val_batches=0, num_sanity_val_steps=0)
    trainer.fit(module, make_data(), ckpt_path=str(checkpoint))
    assert module.iteration == 1 and not (tmp_path / "mark").exists()
