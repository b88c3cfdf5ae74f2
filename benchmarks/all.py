"""Every table of the README and the docs, one after the other: `make bench`.

Each prints its table with machine, versions, medians and spread, says what has changed since the run that is in
``benchmarks/results``, and takes that one's place there, with a picture. Hours on two cores; nothing else should run
meanwhile.

    python benchmarks/all.py                          # all
    python benchmarks/all.py --only packing rollout   # some
    python benchmarks/all.py --smoke                  # whether they run: tiny sizes, nothing is kept
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).parent
EXAMPLES = HERE.parent / "examples"
TINY, DEMO, AHEAD = (
    str(EXAMPLES / "tiny_from_scratch.yaml"),
    str(EXAMPLES / "smollm2_arithmetic.yaml"),
    str(EXAMPLES / "tiny_one_step_off.yaml"),
)
SHORT = [
    "--trainer.limit_train_batches", "1", "--trainer.max_epochs", "1", "--trainer.limit_val_batches", "0",
    "--trainer.val_check_interval", "1",
]  # fmt: skip
BENCHMARKS: dict[str, tuple[list[str], list[str]]] = {
    "packing": (["packing.py", "--rounds", "3"], ["--layers", "1", "--rounds", "1", "--vocab", "512"]),
    "layers": (["layers.py"], ["--layers", "2", "--rounds", "1", "--vocab", "512"]),
    "logprob_memory": (
        ["logprob_memory.py", "--tokens", "512", "2048", "4096", "--vocab", "49152", "--threads", "1"],
        ["--tokens", "256"],
    ),
    "against_trl_training": (
        ["against_trl.py", "training"],
        ["--rounds", "1", "--layers", "1", "--prompts", "1", "--completion-tokens", "16", "--prompt-lengths", "16"],
    ),
    "against_trl_memory": (
        ["against_trl.py", "memory"],
        ["--layers", "1", "--vocab", "49152", "--completion-tokens", "16"],
    ),
    "against_trl_iteration": (
        ["against_trl.py", "iteration"],
        ["--rounds", "1", "--prompts", "1", "--n", "2", "--trl-batch", "2", "--completion-tokens", "4", "--no-vllm"],
    ),
    "growth_time": (["growth.py", "time"], ["--tokens", "1024", "--layers", "1", "--rounds", "1"]),
    "growth_memory": (["growth.py", "memory"], ["--groups", "2", "4", "--layers", "1"]),
    "one_step_off": (["one_step_off.py"], ["--iterations", "2", "--layers", "1", "--width", "64", "--prompts", "2"]),
    "bookkeeping": (["bookkeeping.py"], ["--prompts", "2", "--iterations", "1", "--longest", "16"]),
    "rollout": (["rollout.py", "--sglang"], ["--rounds", "1", "--max-new-tokens", "4", "--n", "2", "--no-sglang"]),
    "weight_sync": (["weight_sync.py", "--buckets", "128"], ["--rounds", "1"]),
    "families": (["families.py"], ["--only", "llama"]),
    "strategies": (["strategies.py"], ["--rounds", "2", "--only", "lightrft_fake", "lightrft_fsdp"]),
    "plan": (["plan.py"], ["--only", "plain", "--small"]),
    "parity": (["parity.py"], ["--steps", "2", "--iterations", "1", "--only", "lightrft_fsdp"]),
    "learning_tiny_from_scratch": (["learning.py", TINY], ["--seeds", "1", *SHORT]),
    "learning_tiny_one_step_off": (
        ["learning.py", AHEAD, "--trainer.max_time", "00:00:20:00"],
        ["--seeds", "1", *SHORT, "--trainer.limit_train_batches", "2"],
    ),
    "learning_smollm2_arithmetic": (["learning.py", DEMO], ["--seeds", "1", *SHORT]),
    "learning_tiny_from_scratch_algorithms": (
        ["learning.py", TINY, "--algorithms", "all", "--jobs", "2"],
        ["--algorithms", "gspo", "--seeds", "1", *SHORT],
    ),
}
"""Of each result the command that makes it, and the further arguments of a smoke run, which win."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(BENCHMARKS), default=list(BENCHMARKS), metavar="NAME")
    parser.add_argument("--smoke", action="store_true")
    arguments = parser.parse_args()
    failed = []
    for name in arguments.only:
        (script, *flags), small = BENCHMARKS[name]
        print(f"\n## {name}\n", flush=True)
        start = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            smoke = [*small, "--out", f"{folder}/{name}.json"] if arguments.smoke else []
            code = subprocess.run([sys.executable, str(HERE / script), *flags, *smoke], check=False).returncode
        print(f"\n{name}: {(time.perf_counter() - start) / 60:.1f} minutes, exit code {code}", flush=True)
        failed += [name] if code else []
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
