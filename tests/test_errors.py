"""Values of the wrong type are refused where they are given, by name."""

from __future__ import annotations

import sys
from functools import partial

import numpy
import pytest
import torch
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder
from training import PROMPTS, even_digits, make_data, make_module, make_trainer

from lightrft_lightning import PromptDataModule, RewardModule, RLHFModule, SamplingParams, SFTModule
from lightrft_lightning._errors import check_types, import_extra
from lightrft_lightning.critic import Critic

RLHF, SFT = partial(RLHFModule, "tiny-llama", even_digits), partial(SFTModule, "tiny-llama")


@pytest.mark.parametrize(
    ("make", "setting", "message"),
    [
        (RLHF, {"lr": "1e-4"}, r"RLHFModule\(lr='1e-4'\): must be a number"),
        (RLHF, {"compile": "no"}, r"RLHFModule\(compile='no'\): must be True or False"),
        (RLHF, {"epochs_per_rollout": 1.5}, r"\(epochs_per_rollout=1\.5\): must be a whole number"),
        (RLHF, {"seed": "x"}, r"\(seed='x'\): must be a whole number or None"),
        (RLHF, {"critic": {"lr": None}, "algorithm": "ppo"}, r"Critic\(lr=None\): must be a number"),
        (RLHF, {"lr": float("inf")}, r"\(lr=inf\): must be 0 or more"),
        (RLHF, {"weight_decay": -1}, r"\(weight_decay=-1\): must be 0 or more"),
        (Critic, {"weight_decay": -1}, r"Critic\(weight_decay=-1\): must be 0 or more"),
        (SFT, {"share_prompts": "yes"}, r"SFTModule\(share_prompts='yes'\): must be True or False"),
        (SFT, {"weight_decay": float("nan")}, r"\(weight_decay=nan\): must be 0 or more"),
        (
            partial(RewardModule, "tiny-llama"),
            {"center_coef": "x"},
            r"RewardModule\(center_coef='x'\): must be a number",
        ),
        (SamplingParams, {"n": "4"}, r"SamplingParams\(n='4'\): must be a whole number"),
        (SamplingParams, {"n": True}, r"SamplingParams\(n=True\): must be a whole number"),
        (SamplingParams, {"stop": 5}, r"SamplingParams\(stop=5\): must be a string or a list of strings"),
        (PromptDataModule, {"batch_size": "2"}, r"PromptDataModule\(batch_size='2'\): must be a whole number"),
    ],
)
def test_settings(make, setting, message):
    with pytest.raises((TypeError, ValueError), match=message):
        make(**setting)


def test_numbers_of_numpy_are_numbers():
    def annotated(a: int, b: float, c: str | None, d: list[int], e: float | str) -> None: ...

    check_types("f", annotated, {"a": numpy.int64(1), "b": numpy.float32(1), "c": None, "d": 1, "e": 1, "more": 2})
    with pytest.raises(TypeError, match=r"f\(b='1'\): must be a number"):
        check_types("f", annotated, {"a": 1, "b": "1"})


def test_a_loader_without_tokens_and_callbacks_that_search_are_refused(tmp_path):
    with pytest.raises(TypeError, match=r"hands out str, 'prompt', in place of Prompt: pass .*PromptDataModule"):
        make_trainer(tmp_path).fit(make_module(), torch.utils.data.DataLoader(PROMPTS, batch_size=2))
    for search in (BatchSizeFinder(), LearningRateFinder()):
        with pytest.raises(ValueError, match=f"{type(search).__name__} works with automatic optimization only"):
            make_trainer(tmp_path, callbacks=[search]).fit(make_module(), make_data())


def test_bitsandbytes_finds_nothing_at_its_import_that_would_load_code_from_a_hub(tmp_path, monkeypatch):
    (tmp_path / "bitsandbytes.py").write_text("try:\n    import kernels\nexcept ImportError:\n    kernels = None\n")
    (tmp_path / "kernels.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("bitsandbytes", "kernels"):
        monkeypatch.setitem(sys.modules, name, None)  # so that what is imported goes at the end
        monkeypatch.delitem(sys.modules, name)
    assert import_extra("bitsandbytes", "bitsandbytes").kernels is None
    assert import_extra("kernels", "hf").__name__ == "kernels", "others find it"
