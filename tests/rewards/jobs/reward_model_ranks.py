"""A reward model under a sharding strategy; run as ``script.py <folder> <strategy> <reward model> <policy>``."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import lightning.pytorch as pl
import torch

from lightrft_lightning import DeepspeedStrategy, PromptDataModule, RLHFModule, SamplingParams, TransformersRollout
from lightrft_lightning.experience.trajectory import Completion, Prompt, Trajectory

torch.set_num_threads(1)
os.environ["TORCHELASTIC_RUN_ID"] = "test"  # how Lightning recognises torchrun
FOLDER, STRATEGY, REWARD_MODEL, POLICY = sys.argv[1:]
RANK = int(os.environ["RANK"])
SHARD_ALL = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}


def length(completion):
    return len(completion)


class Collect(pl.Callback):
    def __init__(self):
        self.found = []

    def on_train_batch_end(self, trainer, module, *args):
        for t in module.last_trajectories:
            self.found.append([t.prompt.text + t.text, t.reward_parts["reward_model"], t.reward - len(t.text)])
        for counts in ((5, 0), (0, 3), (1, 7), (0, 0)):
            samples = [sample(str(i)) for i in range(counts[RANK])]
            report = module.rewards.score(samples, trainer.strategy)
            assert (report.samples, report.failed) == (counts[RANK], 0)
            self.found += [["1+" + t.text, t.reward_parts["reward_model"], t.reward - len(t.text)] for t in samples]


def sample(text):
    return Trajectory(Prompt((1,), "1+"), Completion((7,), (0.0,), "eos"), group=0, text=text)


module = RLHFModule(
    POLICY, [{"name": "reward_model", "model": REWARD_MODEL, "token_budget": 20}, length],
    sampling=SamplingParams(n=2, max_new_tokens=5), lr=1e-2, kl_coef=0.1, seed=1,
)  # fmt: skip
data = PromptDataModule(train=[f"{a}+1=" for a in range(8)], val=[f"{a}+1=" for a in range(3)], batch_size=4, seed=1)
collect = Collect()
strategy = STRATEGY if STRATEGY == "lightrft_fsdp" else DeepspeedStrategy(zero_stage=3, deepspeed_config=SHARD_ALL)
trainer = pl.Trainer(
    strategy=strategy, accelerator="cpu", devices=2, max_epochs=1, logger=False, enable_checkpointing=False,
    enable_progress_bar=False, enable_model_summary=False, callbacks=[TransformersRollout(), collect],
)  # fmt: skip
trainer.fit(module, data)
(model,) = module.reward_models
held = sum(
    p.ds_tensor.numel() if hasattr(p, "ds_tensor") else getattr(p, "_local_tensor", p).numel()
    for p in model.parameters()
)
result = {
    "found": collect.found,
    "held": held,
    "saved": [name for name in trainer.strategy.lightning_module_state_dict() if not name.startswith("actor.")],
    "metrics": {k: float(v) for k, v in trainer.callback_metrics.items() if "/reward" in k and "time/" not in k},
}
Path(FOLDER, f"{RANK}.json").write_text(json.dumps(result))
