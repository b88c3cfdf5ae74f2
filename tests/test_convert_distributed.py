"""DeepSpeed's own folders, written by two real processes at every stage, read without DeepSpeed."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

from lightrft_lightning import CheckpointError, FakeStrategy
from lightrft_lightning.convert import convert

JOB = Path(__file__).parent / "strategies" / "jobs" / "deepspeed_folders.py"
CASES = ("zero1_bf16", "zero2", "zero2_frozen", "zero3", "zero3_bf16_frozen", "zero0")


@pytest.fixture(scope="module")
def folders(run_ranks, tmp_path_factory):
    folder = tmp_path_factory.mktemp("deepspeed")
    run_ranks(JOB, folder, timeout=150)
    return folder


def expected(folders, case):
    return torch.load(folders / f"{case}.pt", weights_only=True)


@pytest.mark.parametrize("case", CASES)
def test_convert(folders, tmp_path, case):
    convert(str(folders / case), str(tmp_path / "hf"), model_folder=str(folders / "base"), dtype="float32")
    weights = dict(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").named_parameters())
    reference = expected(folders, case)
    assert weights.keys() == reference.keys()
    for name, value in reference.items():
        assert torch.equal(weights[name], value.float()), name  # fp32 masters, where there are any
    assert not torch.equal(weights["model.norm.weight"], torch.ones(18))


@pytest.mark.parametrize("case", CASES)
def test_load_ckpt(folders, case):
    model = transformers.AutoModelForCausalLM.from_pretrained(folders / "base")
    nn.init.zeros_(model.model.norm.weight)
    with pytest.raises(CheckpointError, match=r"was not written by this package: .*load_module_only=True"):
        FakeStrategy().load_ckpt(model, folders / case)
    path, client = FakeStrategy().load_ckpt(model, folders / case, load_module_only=True)
    assert path == str(folders / case / "global_step2") and client == {}
    for name, value in expected(folders, case).items():
        assert torch.equal(model.get_parameter(name), value.float()), name


@pytest.mark.parametrize("case", ["zero2", "zero3"])
def test_damage(folders, tmp_path, case):
    def damaged(name, damage):
        shutil.copytree(folders / case, tmp_path / name)
        damage(tmp_path / name / "global_step2")
        return str(tmp_path / name)

    def cut(folder):
        file = sorted(folder.glob("*_optim_states.pt"))[0]
        file.write_bytes(file.read_bytes()[:2000])

    base = {"model_folder": str(folders / "base")}
    with pytest.raises(CheckpointError, match="is incomplete: files of 1 ranks, written by 2"):
        convert(damaged("gone", lambda f: sorted(f.glob("*_optim_states.pt"))[1].unlink()), str(tmp_path / "x"), **base)
    with pytest.raises(CheckpointError, match=r"_optim_states\.pt is incomplete, damaged or not safe to read"):
        convert(damaged("cut", cut), str(tmp_path / "x"), **base)
    assert not (tmp_path / "x").exists()


def test_deepspeed_is_not_needed_and_no_code_is_run(folders, tmp_path):
    """Unpickling with classes left out: DeepSpeed is not imported, and what a file asks to call is not called."""
    marker = tmp_path / "ran"

    class Attack:
        def __reduce__(self):
            return open, (str(marker), "w")

    shutil.copytree(folders / "zero2", tmp_path / "bad")
    file = next((tmp_path / "bad").glob("*/mp_rank_00_model_states.pt"))
    content = torch.load(file, weights_only=False)
    torch.save({**content, "x": Attack()}, file)
    arguments = (str(tmp_path / "bad"), str(tmp_path / "hf"), str(folders / "base"))
    code = (
        "import sys; from lightrft_lightning.convert import convert; "
        f"convert({arguments[0]!r}, {arguments[1]!r}, model_folder={arguments[2]!r}); "
        "assert 'deepspeed' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert not marker.exists() and (tmp_path / "hf" / "model.safetensors").is_file()
