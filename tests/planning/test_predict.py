from __future__ import annotations

import functools
import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig

from lightrft_lightning.planning import Machine, Planned, alternatives, predict
from lightrft_lightning.planning.predict import build

LLAMA = LlamaConfig(
    hidden_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=256,
    vocab_size=8000, tie_word_embeddings=True,
)  # fmt: skip
PLANNED = Planned(LLAMA, prompts=2, n=4, prompt_tokens=32, completion_tokens=56, token_budget=256)
PARAMETERS = sum(p.numel() for p in build(PLANNED).parameters())


@functools.cache
def plan_of(**changes):
    return predict(replace(PLANNED, **changes))


def parts(phase, **changes):
    return next(p.parts for p in plan_of(**changes).phases if p.name == phase)


def test_weights_and_moments_are_those_of_the_real_model():
    found = parts("training")
    assert found["weights"] == 4 * PARAMETERS and found["optimizer"] == 8 * PARAMETERS


@pytest.mark.parametrize("strategy", ["lightrft_fsdp", "lightrft_deepspeed_stage_3"])
def test_more_ranks_share_what_is_sharded(strategy):
    two, four = (parts("training", strategy=strategy, gpus=gpus) for gpus in (2, 4))
    assert four["weights"] == two["weights"] / 2
    assert four["optimizer"] < two["optimizer"]


def test_zero_1_and_2_share_the_moments_only():
    found = parts("training", strategy="lightrft_deepspeed_stage_2", gpus=4)
    assert found["weights"] == 4 * PARAMETERS * (1 + 1 / 4) and found["optimizer"] == 8 * PARAMETERS / 4


@pytest.mark.parametrize("strategy", ["lightrft_fsdp", "lightrft_deepspeed_stage_3"])
def test_offloaded_moments_are_not_on_the_gpu(strategy):
    usual, offloaded = (parts("training", strategy=name, gpus=2) for name in (strategy, f"{strategy}_offload"))
    assert offloaded["optimizer"] <= usual["optimizer"] - 8 * PARAMETERS / 2


def test_adapters_leave_the_base_without_moments_and_need_no_reference():
    found = parts("training", lora_rank=4, kl_coef=0.1)
    assert found["optimizer"] < 0.1 * 8 * PARAMETERS and found["other models"] == 0
    assert parts("training", kl_coef=0.1)["other models"] == 4 * PARAMETERS


def test_recomputed_layers_and_small_passes_need_less():
    usual = parts("training")["passes"]
    assert parts("training", gradient_checkpointing=True)["passes"] < usual
    assert parts("training", prompts=1)["passes"] < usual  # without the gradients of a pass before
    assert parts("training", token_budget=512)["passes"] > 1.3 * usual


def test_a_critic_has_weights_moments_and_passes():
    plan = plan_of(critic=True)
    assert [phase.name for phase in plan.phases] == ["rollout", "scoring", "training", "step"]
    assert plan.phases[0].parts["other models"] == pytest.approx(12 * PARAMETERS, rel=0.01)
    assert plan.phases[2].flops == 2 * plan_of().phases[1].flops


def test_an_engine_of_its_own_keeps_its_weights_unless_it_sleeps():
    awake, asleep = (parts("training", engine="vllm", engine_sleeps=sleeps)["engine"] for sleeps in (False, True))
    assert awake > 4 * PARAMETERS and asleep == 0
    assert parts("rollout", engine="remote")["passes"] == 0


@pytest.mark.parametrize("strategy", ["lightrft_fake", "lightrft_fsdp", "lightrft_deepspeed_stage_2"])
def test_moments_of_eight_bits_are_a_quarter(strategy):
    full, small = (parts("training", strategy=strategy, adam_8bit=small)["optimizer"] for small in (False, True))
    assert small == pytest.approx(full * 2.03 / 8, rel=0.01)


def test_what_is_offloaded_is_away_from_a_gpu_during_rollouts():
    settings = {"critic": True, "kl_coef": 0.1, "engine": "vllm", "engine_sleeps": True}
    usual, moments, everything = (
        predict(replace(PLANNED, offload=o, **settings)) for o in ("none", "optimizer", "all")
    )
    for plan in (moments, everything):
        rollout, others = plan.phases[0], plan.phases[1:]
        assert rollout.parts["optimizer"] == 0 and all(phase.parts["optimizer"] > 0 for phase in others)
        assert others[-1].name == "sync" and others[-1].parts["engine"] == rollout.parts["engine"] > 0
        assert plan.summary()
    assert everything.phases[0].parts["weights"] == everything.phases[0].parts["other models"] == 0
    assert moments.phases[0].parts["weights"] == usual.phases[0].parts["weights"]
    assert predict(replace(PLANNED, offload="optimizer", accelerator="cpu")).phases[0].parts["optimizer"] > 0


def test_what_is_said_to_fit_fits():
    plan = predict(replace(PLANNED, prompts=8, token_budget=2048), Machine(memory=90e6))
    assert plan.fits is False and "does NOT fit" in plan.summary()
    found = dict(alternatives(plan))
    assert found and all(other.fits and other.peak < plan.peak for other in found.values())
    assert predict(PLANNED, Machine(memory=1e12)).fits and plan_of().fits is None


def test_times_need_a_machine():
    plan = predict(PLANNED, Machine(flops=1e12, bandwidth=1e11))
    rollout, training, _ = plan.phases
    assert plan.seconds(training) == pytest.approx(training.flops / 0.6e12)
    assert plan.seconds(rollout) == pytest.approx(rollout.flops / 0.6e12 + rollout.read / 1e11)
    assert "s" in plan.summary() and plan_of().seconds(training) is None


REAL = """
import json, os, sys
from dataclasses import replace
from pathlib import Path
import torch
sys.path.insert(0, sys.argv[1])
from test_predict import PLANNED
from lightrft_lightning.models.logprobs import completion_logprobs
from lightrft_lightning.planning.predict import _largest_pass, build

def resident(key):
    return next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith(key)) * 1024

def measure(changes):
    planned = replace(PLANNED, **changes)
    model, (batch, _) = build(planned).train(), _largest_pass(planned)
    for _ in range(3):
        before = resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")
        (-completion_logprobs(model, batch).logprobs.sum()).backward()
        peak = resident("VmHWM") - before
        gradients = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    print(peak + gradients, flush=True)

torch.set_num_threads(1)
for changes in json.loads(sys.argv[2]):
    if os.fork() == 0:
        measure(changes)
        os._exit(0)
    os.wait()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_real_passes_need_what_is_predicted(request):
    usual = {"prompts": 16, "completion_tokens": 112, "token_budget": 512}
    cases = [usual, {**usual, "lora_rank": 4}, {**usual, "token_budget": 1024}]
    env = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0", "OMP_NUM_THREADS": "1", "PATH": ""}
    command = [sys.executable, "-c", REAL, str(request.path.parent), json.dumps(cases)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    for changes, found in zip(cases, done.stdout.split(), strict=True):
        assert float(found) == pytest.approx(parts("training", **changes)["passes"], rel=0.15), changes


def test_a_gpu_is_not_told_about_what_a_cpu_process_holds():
    assert parts("rollout")["process"] == 0
    assert torch.get_default_dtype() == torch.float32  # what runs on fake tensors leaves nothing behind
