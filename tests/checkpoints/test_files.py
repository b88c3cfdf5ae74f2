"""Folders of others: what is no plain file of theirs is not read, and what holds code is not run."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import tarfile
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

import lightrft_lightning
from lightrft_lightning import FakeStrategy, RLHFModule
from lightrft_lightning.checkpoints import _dcp, folder
from lightrft_lightning.checkpoints.folder import CheckpointError
from lightrft_lightning.convert import convert
from lightrft_lightning.models.loading import load_config, load_model, load_tokenizer
from lightrft_lightning.models.tiny import char_tokenizer, tiny_llama

PACKAGE = Path(lightrft_lightning.__file__).parent


class Touch:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


class Scripted(nn.Module):
    """TorchScript has `torch.save`, so loading an archive can write any file."""

    def __init__(self):
        super().__init__()
        self.x = torch.zeros(1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x

    @torch.jit.export
    def __getstate__(self) -> tuple[torch.Tensor, bool]:
        return (self.x, self.training)

    @torch.jit.export
    def __setstate__(self, state: tuple[torch.Tensor, bool]) -> None:
        self.x = state[0]
        self.training = state[1]
        torch.save("written", "mark")


def script(file):
    torch.jit.script(Scripted()).save(str(file))


def package(file):
    with torch.package.PackageExporter(str(file)) as exporter:
        exporter.save_source_string("own", "open('mark', 'w')\n")
        exporter.save_pickle("data", "data.pkl", {"module": {}})


def old_pickle(file):
    torch.save({"module": Touch(Path("mark"))}, file, _use_new_zipfile_serialization=False)


def nested_pickle(file):
    torch.save({"module": {"weight": torch.zeros(1)}, "x": Touch(Path("mark"))}, file)


def plain_pickle(file):
    file.write_bytes(pickle.dumps(Touch(Path("mark"))))


def tar(file):
    with tarfile.open(file, "w") as archive:
        archive.add(__file__, "pickle")


def pipe(file):
    os.mkfifo(file)


WRITERS = [script, package, old_pickle, nested_pickle, plain_pickle, tar, pipe]


@pytest.mark.filterwarnings("ignore:.*TorchScript|.*jit|.*deprecated")
@pytest.mark.parametrize("write", WRITERS)
def test_no_reader_of_checkpoints_runs_code(tmp_path, monkeypatch, write):
    monkeypatch.chdir(tmp_path)
    theirs = tmp_path / "global_step1"
    theirs.mkdir()
    write(theirs / "mp_rank_00_model_states.pt")
    Path("mark").unlink(missing_ok=True)
    for read in (
        lambda: convert(str(theirs), "out", model_folder=str(theirs)),
        lambda: FakeStrategy().load_ckpt(nn.Linear(1, 1), theirs, load_module_only=True),
        lambda: RLHFModule.load_from_checkpoint(theirs / "mp_rank_00_model_states.pt"),
        lambda: FakeStrategy().load_checkpoint(theirs / "mp_rank_00_model_states.pt"),
    ):
        with pytest.raises((CheckpointError, ValueError, FileNotFoundError, pickle.UnpicklingError)):
            read()
    assert not Path("mark").exists()


def test_what_torch_hands_to_another_reader_is_named(tmp_path):
    (tmp_path / "global_step1").mkdir()
    package(tmp_path / "global_step1" / "mp_rank_00_model_states.pt")
    with pytest.raises(CheckpointError, match=r"_states.pt holds code \(TorchScript or alike\), no plain tensors: \["):
        convert(str(tmp_path), str(tmp_path / "out"))


@pytest.fixture
def own(tmp_path):
    """A checkpoint of this package."""
    FakeStrategy().save_ckpt(nn.Linear(2, 1), tmp_path, "tag")
    return tmp_path / "tag"


def rewrite_metadata(path, change):
    metadata = _dcp.read_metadata(path)
    change(metadata)
    (path / ".metadata").write_bytes(pickle.dumps(metadata))
    with_checksums(path)


def with_checksums(path, *more):
    manifest = folder.manifest_of(path)
    manifest["files"] = folder.describe([path / name for name in manifest["files"] if (path / name).is_file()])
    for name in more:
        manifest["files"][name] = {"bytes": 0, "crc32": 0}
    folder.write_manifest(path, manifest)


def read(path):
    return FakeStrategy().load_ckpt(nn.Linear(2, 1), path.parent, path.name, load_module_only=True)


def test_a_tensor_that_its_list_calls_an_object_is_not_unpickled(own, tmp_path):
    def change(metadata):
        metadata.state_dict_metadata["model.weight"] = BytesStorageMetadata()
        ((index, info),) = [(i, s) for i, s in metadata.storage_data.items() if i.fqn == "model.weight"]
        torch.save(Touch(tmp_path / "mark"), own / info.relative_path)
        info.offset, info.length = 0, (own / info.relative_path).stat().st_size
        del metadata.storage_data[index]
        metadata.storage_data[type(index)("model.weight")] = info

    rewrite_metadata(own, change)
    with pytest.raises(CheckpointError, match=r"\.metadata does not describe 'model.weight' as a tensor"):
        read(own)
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "..", "a/b", ""])
def test_names_in_a_checkpoint_that_lead_out_of_it_are_refused(own, name):
    def change(metadata):
        next(iter(metadata.storage_data.values())).relative_path = name

    rewrite_metadata(own, change)
    with pytest.raises(CheckpointError, match=r"must be the plain name of a file in it"):
        read(own)


def test_a_list_of_files_and_a_pointer_name_nothing_elsewhere(own, tmp_path):
    (tmp_path / "latest").write_text("../elsewhere")
    for call in (
        lambda: FakeStrategy().load_ckpt(nn.Linear(2, 1), tmp_path),
        lambda: convert(str(tmp_path), str(tmp_path / "out")),
    ):
        with pytest.raises(CheckpointError, match=r"latest names '../elsewhere': must be the plain name of a folder"):
            call()
    with_checksums(own, "../../../../dev/zero")
    with pytest.raises(ValueError, match=r"names a file '../../../../dev/zero'"):
        read(own)
    os.mkfifo(own / "pipe")
    with_checksums(own, "pipe")
    with pytest.raises(ValueError, match=r"pipe is no regular file|names a file"):
        read(own)


# ---------------------------------------------------------------- folders of models


@pytest.fixture
def model(tmp_path):
    path = tmp_path / "model"
    tiny_llama(width=16, layers=1).save_pretrained(path)
    char_tokenizer().save_pretrained(path)
    (tmp_path / "secret").write_text("{}")
    return path


@pytest.mark.parametrize(
    "name", ["chat_template.jinja", "generation_config.json", "tokenizer_config.json", "config.json"]
)
def test_a_link_to_a_private_file_is_not_taken_for_a_part_of_the_model(model, tmp_path, name):
    (model / name).unlink(missing_ok=True)
    (model / name).symlink_to(tmp_path / "secret")
    message = rf"{name} is a link to .*secret, outside of its folder: if that belongs to it, copy it there"
    for call in (
        lambda: convert(str(model), str(tmp_path / "out")),
        lambda: convert(str(model), str(tmp_path / "out"), to="ckpt", tokenizer=str(model)),
        lambda: load_tokenizer(model),
        lambda: load_config(model),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    assert not (tmp_path / "out").exists()


def test_a_template_behind_a_linked_folder_is_refused(model, tmp_path):
    (tmp_path / "private").mkdir()
    (model / "additional_chat_templates").symlink_to(tmp_path / "private")
    with pytest.raises(ValueError, match="additional_chat_templates is a link"):
        load_tokenizer(model)


def test_a_pipe_in_a_model_folder_is_not_waited_for(model, tmp_path):
    (model / "tokenizer.json").unlink()
    os.mkfifo(model / "tokenizer.json")
    for call in (load_tokenizer, load_model, lambda path: convert(str(path), str(tmp_path / "out"))):
        with pytest.raises(ValueError, match=r"tokenizer.json is no regular file"):
            call(model)


@pytest.mark.parametrize("where", ["../elsewhere.safetensors", "{tmp}/elsewhere.safetensors", 3, ["a"]])
def test_an_index_names_nothing_outside_of_its_folder(model, tmp_path, where):
    tensors = load_file(model / "model.safetensors")
    save_file(tensors, tmp_path / "elsewhere.safetensors")
    (model / "model.safetensors").unlink()
    where = where.format(tmp=tmp_path) if isinstance(where, str) else where
    index = {"weight_map": dict.fromkeys(tensors, where)}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"names a file .*: must be the plain name of a file in it"):
        convert(str(model), str(tmp_path / "out"))


def test_weights_elsewhere_can_be_trained_but_are_not_converted(model, tmp_path):
    shutil.move(model / "model.safetensors", tmp_path / "weights.safetensors")
    (model / "model.safetensors").symlink_to(tmp_path / "weights.safetensors")
    assert load_model(model).num_parameters()
    with pytest.raises(ValueError, match=r"model.safetensors is a link to .*weights.safetensors, outside"):
        convert(str(model), str(tmp_path / "out"))


def test_the_cache_of_the_hub_works_as_its_links_stay_in_the_repository(model, tmp_path):
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "123", tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for file in model.iterdir():
        shutil.move(file, blobs / f"blob-{file.name}")
        (snapshot / file.name).symlink_to(Path("..", "..", "blobs", f"blob-{file.name}"))
    assert load_tokenizer(snapshot)("1+1")
    assert load_model(convert(str(snapshot), str(tmp_path / "out"))).num_parameters()
    (blobs / "blob-tokenizer.json").unlink()
    (blobs / "blob-tokenizer.json").symlink_to(tmp_path / "secret")
    with pytest.raises(ValueError, match=r"is a link to .*secret, outside"):
        load_tokenizer(snapshot)


# ---------------------------------------------------------------- what is still to be written


def test_torch_load_and_pickle_are_called_in_few_places():
    """Whoever needs another one has to think about who has written the file."""
    loads, pickles = set(), set()
    for file in PACKAGE.rglob("*.py"):
        for owner in re.findall(r"(?<!`)\b(torch|pickle)\.(?:load\(|loads\(|Unpickler\b)", file.read_text()):
            (loads if owner == "torch" else pickles).add(str(file.relative_to(PACKAGE)))
    assert loads == {"checkpoints/files.py", "checkpoints/store.py"}  # store: of bytes that it has just made itself
    between_own_processes = {"rewards/_pool_process.py", "strategies/distributed.py"}
    assert pickles == {"checkpoints/_dcp.py", "checkpoints/foreign.py"} | between_own_processes


def test_one_of_lightnings_files_is_still_read(tmp_path):
    torch.save({"pytorch-lightning_version": pl.__version__, "state_dict": {}}, tmp_path / "a.ckpt")
    assert FakeStrategy().load_checkpoint(tmp_path / "a.ckpt", weights_only=True)["state_dict"] == {}
