"""`import lightrft_lightning` needs torch and lightning only, and is quick. Each check is a fresh interpreter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import lightrft_lightning

ROOT = Path(lightrft_lightning.__file__).parents[1]
NEEDED = ("torch", "lightning", "typing_extensions")
OPTIONAL = ("transformers", "deepspeed", "vllm", "sglang", "datasets")
PUBLIC = (
    "DeepspeedStrategy", "FSDPV2Strategy", "FakeStrategy", "PromptDataModule", "RLHFModule", "RemoteRollout",
    "RolloutCallback", "StrategyBase", "StrategyConfig", "TransformersRollout", "VLLMRollout",
    "get_fake_strategy", "get_strategy", "register_strategy",
)  # fmt: skip


def run(code, *flags, **env):
    done = subprocess.run(
        [sys.executable, *flags, "-c", code], env={**os.environ, **env}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


# --------------------------------------------------------------------------------------- beside everything installed

ADDED = """
import json, sys, time
import lightning.pytorch  # torchmetrics, which it imports, imports transformers where that is installed
before, start = set(sys.modules), time.process_time()
import lightrft_lightning
seconds = time.process_time() - start
print(json.dumps({"seconds": seconds, "added": sorted(set(sys.modules) - before)}))
"""


@pytest.fixture(scope="module")
def runs():
    """What the import adds to `import lightning.pytorch`, in one run after the other; CPU time, on a busy machine."""
    known = []

    def of(number):
        while len(known) <= number:
            known.append(json.loads(run(ADDED)))
        return known[number]

    return of


def test_adds_no_optional_package(runs):
    added = {name.split(".")[0] for name in runs(0)["added"]}
    assert "lightrft_lightning" in added
    assert not added & {*OPTIONAL, "peft", "gguf", "reasoning_gym", "math_verify", "matplotlib", "rich", "jsonargparse"}


def test_takes_at_most_three_tenths_of_a_second_more(runs):
    assert any(runs(number)["seconds"] <= 0.3 for number in range(3))


# ------------------------------------------------------------------------------------------- with nothing else there


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """A folder to import from that holds what NEEDED requires and nothing else, as in a fresh environment."""
    folder = tmp_path_factory.mktemp("site-packages")
    for name in closure(NEEDED):
        files = distribution(name).files or []
        for entry in {file.parts[0] for file in files if file.parts[0] not in ("..", "__pycache__")}:
            if not (folder / entry).exists():
                (folder / entry).symlink_to(Path(distribution(name).locate_file(entry)))
    (folder / "lightrft_lightning").symlink_to(ROOT / "lightrft_lightning")
    return folder


def closure(names):
    """Names of all installed distributions that `names` require, optional extras only where one asks for them."""
    found, waiting = set(), [Requirement(name) for name in names]
    while waiting:
        requirement = waiting.pop()
        key = (requirement.name.lower(), frozenset(requirement.extras))
        if key in found:
            continue
        try:
            required = distribution(requirement.name).requires or []
        except PackageNotFoundError:  # for another platform, or a part of the CUDA build
            continue
        found.add(key)
        for text in required:
            needed = Requirement(text)
            if needed.marker is None or any(needed.marker.evaluate({"extra": e}) for e in ("", *requirement.extras)):
                waiting.append(needed)
    return {name for name, _ in found}


def test_needs_torch_and_lightning_only(bare):
    code = f"""
import importlib.util, json
assert not [name for name in {OPTIONAL} if importlib.util.find_spec(name)]
import lightrft_lightning as package
from lightrft_lightning.models.loading import load_model
missing = [name for name in {{*{PUBLIC}, *package.__all__}} if getattr(package, name, None) is None]
try:
    load_model("tiny-llama")
except ImportError as err:
    print(json.dumps([missing, str(err)]))
"""
    missing, error = json.loads(run(code, "-S", PYTHONPATH=str(bare)))
    assert missing == []
    assert "'transformers', which is not installed" in error
    assert 'pip install "lightrft-lightning[hf]"' in error


def test_strategies_are_registered_by_the_import(bare):
    code = """
import lightrft_lightning
import lightning.pytorch as pl
print(type(pl.Trainer(strategy="lightrft_fake", accelerator="cpu", logger=False).strategy).__name__)
"""
    assert run(code, "-S", PYTHONPATH=str(bare)).strip().splitlines()[-1] == "FakeStrategy"
