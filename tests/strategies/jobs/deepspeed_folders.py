"""Folders as DeepSpeed itself writes them, and the weights that they hold: ``deepspeed_folders.py FOLDER``."""

from __future__ import annotations

import argparse
import os
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import transformers

from lightrft_lightning.strategies._zero import start_deepspeed

torch.set_num_threads(1)
FOLDER = Path(sys.argv[1])
CASES = {
    "zero1_bf16": (1, {"bf16": {"enabled": True}}, False),
    "zero2": (2, {}, False),
    "zero2_frozen": (2, {}, True),
    "zero3": (3, {"zero_optimization": {"stage3_param_persistence_threshold": 0}}, False),
    "zero3_bf16_frozen": (3, {"bf16": {"enabled": True}}, True),
    "zero0": (0, {}, False),
}


def llama():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=33, hidden_size=18, intermediate_size=25, num_hidden_layers=2, num_attention_heads=3,
        max_position_embeddings=32, tie_word_embeddings=True,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def main():
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    deepspeed = start_deepspeed(torch.device("cpu"), int(os.environ["LOCAL_RANK"]), None)
    llama().save_pretrained(FOLDER / "base")
    for name, (stage, settings, frozen) in CASES.items():
        model = llama()
        if frozen:
            model.model.layers[0].requires_grad_(False)
        trained = [p for p in model.parameters() if p.requires_grad]
        groups = [{"params": [p for p in trained if (p.ndim > 1) == wide]} for wide in (True, False)]
        zero = {"stage": stage, **settings.pop("zero_optimization", {})}
        config = {"train_micro_batch_size_per_gpu": 1, "zero_allow_untested_optimizer": True, "zero_optimization": zero}
        engine, *_ = deepspeed.initialize(
            model=model, optimizer=torch.optim.AdamW(groups, lr=1e-2), config={**config, **settings}
        )
        for step in range(2):
            ids = torch.arange(8)[None] + step + dist.get_rank()
            engine.backward(engine(ids, labels=ids).loss)
            engine.step()
        engine.save_checkpoint(FOLDER / name, tag="global_step2", client_state={"args": argparse.Namespace(x=1)})
        weights = {}
        for key, parameter in model.named_parameters():
            master = None if not stage else deepspeed.utils.safe_get_full_fp32_param(parameter)
            with deepspeed.zero.GatheredParameters([parameter] if stage == 3 else []):
                weights[key] = (parameter.detach() if master is None else master).clone()
        if dist.get_rank() == 0:
            torch.save(weights, FOLDER / f"{name}.pt")
        dist.barrier()


if __name__ == "__main__":
    main()
