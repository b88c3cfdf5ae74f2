"""Whether models of many families, tiny and random, are trained on what they compute: agreement or a refusal.

Each goes through a real `fit` in both layouts. Its log-probabilities and their gradient, under two token budgets, and
those that `TransformersRollout` gives its samples are compared with the plainest computation there is: one text at a
time, no padding, the eager kernel, float32. It agrees, or the fit was refused before its first rollout; anything else
ends the program with an error.

    python benchmarks/families.py                               # the record, also in docs/models.md; minutes
    python benchmarks/families.py --only llama "falcon (alibi)"   # some
"""

from __future__ import annotations

import argparse
import copy
import logging
import re
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from _common import markdown_table, report
from lightning.pytorch import Trainer

from lightrft_lightning import PromptDataModule, RLHFModule, SamplingParams, TransformersRollout
from lightrft_lightning.experience.packing import pack, unpack
from lightrft_lightning.experience.trajectory import Completion, Prompt, Trajectory
from lightrft_lightning.models.logprobs import completion_logprobs
from lightrft_lightning.models.tiny import char_tokenizer

sys.path.append(str(Path(__file__).parents[1] / "tests" / "helpers"))
from tiny_models import FAMILIES, VOCABULARY, tiny_model

ALLOWED = 1e-4
"""Nats; of gradients, the share of the tensor's norm."""
SHARED, PADDED = "shared prompts", "one a row"
BUDGETS = (40, 4096)
TOKENIZER = char_tokenizer("abcdefghijklmnopqrstuvwxyz0123456789+= .!,?()")
PROMPTS = ((3, 4, 5), tuple(range(6, 18)), (20, 21, 22, 23, 24))
LENGTHS = ((5, 9, 1), (20, 7, 13), (2, 3, 11))
SAMPLING = SamplingParams(n=3, max_new_tokens=14)
PAGE = Path(__file__).parents[1] / "docs" / "models.md"
MARKS = ("<!-- made by benchmarks/families.py -->", "<!-- end -->")


def texts() -> list[Trajectory]:
    generator = torch.Generator().manual_seed(0)
    result = []
    for group, (prompt, lengths) in enumerate(zip(PROMPTS, LENGTHS, strict=True)):
        for n in lengths:
            ids = torch.randint(3, VOCABULARY, (n,), generator=generator).tolist()
            result.append(Trajectory(Prompt(prompt, ""), Completion(tuple(ids), (0.0,) * n, "length"), group))
    return result


def plain_logprobs(model: Any, prompt: tuple[int, ...], completion: tuple[int, ...]) -> torch.Tensor:
    """``[T]`` by one forward pass over one text, with nothing else."""
    logits = model(input_ids=torch.tensor([prompt + completion]), use_cache=False).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(-1, torch.tensor(completion)[:, None]).squeeze(-1)


def gradients(model: Any) -> dict[str, torch.Tensor]:
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def gradients_off(mine: dict[str, torch.Tensor], plain: dict[str, torch.Tensor]) -> float:
    """The largest difference of a tensor's gradient, as a share of its norm and a thousandth of that of all."""
    whole, zero = torch.stack([g.norm() for g in plain.values()]).norm(), torch.zeros(())
    shares = [
        (mine.get(n, zero) - plain.get(n, zero)).norm() / (plain.get(n, zero).norm() + whole / 1000)
        for n in {*mine, *plain}
    ]
    return float(torch.stack(shares).nan_to_num(torch.inf).max())


def largest(mine: Any, plain: Any) -> float:
    return float(torch.cat([(a - b).abs() for a, b in zip(mine, plain, strict=True)]).nan_to_num(torch.inf).max())


def fitted(model: Any, share_prompts: bool) -> float | str:
    """How far rollout and trainer differ in a short `fit` at the learning rate 0, or why it was refused."""
    module = RLHFModule(
        model, lambda completion: float(sum(map(ord, completion)) % 7), tokenizer=TOKENIZER, sampling=SAMPLING,
        lr=0.0, seed=1, share_prompts=share_prompts,
    )  # fmt: skip
    trainer = Trainer(
        strategy="lightrft_fake", accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[TransformersRollout()],
    )  # fmt: skip
    prompts = [{"prompt": text} for text in ("abc", "hello 1+1=2", "x", "a long prompt, here")]
    try:
        trainer.fit(module, PromptDataModule(train=prompts, batch_size=4))
    except Exception as err:
        told = f"{type(err).__name__}: {' '.join(str(err).split())}"
        return told if not module.last_trajectories else f"FAILED after its first rollout: {told}"
    return float(trainer.callback_metrics["train/mismatch_max"])


class Checked:
    """One family against the plain computation."""

    def __init__(self, name: str) -> None:
        self.model = tiny_model(name)
        self.plain = copy.deepcopy(self.model).eval()
        self.plain.set_attn_implementation("eager")
        self.texts, self.fitted = texts(), self.model
        generator = torch.Generator().manual_seed(1)
        self.weights = [torch.randn(len(t.completion.token_ids), generator=generator) for t in self.texts]
        self.logprobs = [plain_logprobs(self.plain, t.prompt.token_ids, t.completion.token_ids) for t in self.texts]
        sum((w * v).sum() for w, v in zip(self.weights, self.logprobs, strict=True)).backward()
        self.gradients = gradients(self.plain)

    def layout(self, share_prompts: bool) -> tuple[str, str]:
        """What to put into the table, and why it was refused if it was."""
        model = copy.deepcopy(self.model)
        told = fitted(model, share_prompts)
        if isinstance(told, str):
            return ("FAILED" if told.startswith("FAILED") else "refused"), told
        self.fitted = model.eval()  # as in an update, and with the kernel that the fit has settled on
        logprobs, gradient = told, 0.0
        for budget in BUDGETS:
            batches = pack(self.texts, budget, share_prompts=share_prompts)
            scored = [completion_logprobs(model, batch).logprobs for batch in batches]
            logprobs = max(logprobs, largest(unpack(batches, scored, self.texts), self.logprobs))
            for batch, values in zip(batches, scored, strict=True):
                (values * batch.pack_values(self.weights)).sum().backward()
            gradient = max(gradient, gradients_off(gradients(model), self.gradients))
        right = max(logprobs, gradient) <= ALLOWED
        return f"{'' if right else 'OFF '}{logprobs:.0e}, gradient {gradient:.0e}", ""

    def rollout(self) -> str:
        engine = TransformersRollout()
        engine.connect(self.fitted, TOKENIZER)
        samples = zip(engine.generate(PROMPTS, SAMPLING), PROMPTS, strict=True)
        pairs = [(prompt, c) for group, prompt in samples for c in group]
        with torch.no_grad():
            plain = [plain_logprobs(self.plain, prompt, c.token_ids) for prompt, c in pairs]
        off = largest([torch.tensor(c.logprobs) for _, c in pairs], plain)
        return f"{'' if off <= ALLOWED else 'OFF '}{off:.0e}, {engine.reads_with}"


def checked(name: str) -> dict[str, Any]:
    """One row of the table."""
    family = Checked(name)
    shared, why_not_shared = family.layout(True)
    padded, why_not_padded = family.layout(False)
    both = shared == padded == "refused"
    return {
        "family": name,
        "kernel": family.fitted.config._attn_implementation,
        SHARED: shared,
        PADDED: padded,
        "rollout": "refused" if both else family.rollout(),
        "why": " / ".join(dict.fromkeys(filter(None, (why_not_shared, why_not_padded)))),
    }


def write(rows: list[dict[str, Any]], path: Path) -> None:
    """The table between its marks in a page of the docs."""
    first, last = MARKS
    table = markdown_table([{**row, "why": row["why"].replace("|", "/")} for row in rows])
    path.write_text(
        re.sub(f"{first}.*{last}", lambda _: f"{first}\n\n{table}\n\n{last}", path.read_text(), flags=re.DOTALL)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(FAMILIES), default=list(FAMILIES), metavar="FAMILY")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    quiet()
    rows = []
    for name in args.only:
        rows.append(checked(name))
        print(", ".join(map(str, rows[-1].values())), flush=True)
    report("families", rows, {"allowed": ALLOWED, "budgets": BUDGETS, "families": len(rows)}, args.out)
    if len(rows) == len(FAMILIES) and args.out is None:
        write(rows, PAGE)
    wrong = [row["family"] for row in rows if re.search("OFF|FAILED", str(row))]
    if wrong:
        raise SystemExit(f"neither right nor refused: {', '.join(wrong)}")


def quiet() -> None:
    import transformers

    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    for name in ("lightning.pytorch", "lightning.pytorch.utilities.rank_zero", "lightrft_lightning"):
        logging.getLogger(name).setLevel(logging.ERROR)
    torch.set_num_threads(1)


if __name__ == "__main__":
    main()
