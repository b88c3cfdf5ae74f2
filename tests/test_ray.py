"""The example with real Ray, which `make ray` installs and runs; `make test` leaves it out, as it takes a minute."""

from __future__ import annotations

import csv
import os
import runpy
import subprocess
import sys
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
import transformers
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightrft_lightning import TransformersRollout
from lightrft_lightning.strategies.distributed import _of_rank

EXAMPLE = Path(__file__).parents[1] / "examples" / "ray_train.py"
RAY = Path(sys.prefix) / ".ray"


@pytest.mark.skipif(not RAY.exists(), reason=f"RAY IS NOT RUN: `make ray` installs it in {RAY}")
def test_two_workers_of_ray_train_what_one_process_does(tmp_path, monkeypatch):
    env = {**os.environ, "PYTHONPATH": str(RAY), "RAY_USAGE_STATS_ENABLED": "0"}
    command = [sys.executable, str(EXAMPLE), "--iterations", "2", "--folder", str(tmp_path)]
    done = subprocess.run(command, env=env, cwd=tmp_path, timeout=240, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    with open(tmp_path / "csv" / "metrics.csv") as file:
        rewards = [float(row["train/reward"]) for row in csv.DictReader(file)]
    monkeypatch.syspath_prepend(str(RAY))
    module, data = runpy.run_path(str(EXAMPLE))["module_and_data"](8)
    trainer = pl.Trainer(
        strategy="lightrft_fake", accelerator="cpu", max_steps=2, callbacks=[TransformersRollout()], logger=False,
        enable_progress_bar=False, enable_checkpointing=False,
    )  # fmt: skip
    trainer.fit(module, data)
    assert rewards[1] == pytest.approx(float(trainer.callback_metrics["train/reward"]), abs=1e-6)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    for name, value in module.actor.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=0, atol=1e-5)


def test_a_worker_takes_the_one_device_that_it_sees(monkeypatch):
    cpu, cuda = torch.device("cpu"), [torch.device("cuda", 0)]
    assert _of_rank(1, [cpu]) == cpu and _of_rank(1, [cpu, cpu]) == cpu
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert _of_rank(3, cuda) == cuda[0]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(MisconfigurationException, match=r"process 2 of its machine, where 2 GPUs are seen"):
        _of_rank(1, cuda)
