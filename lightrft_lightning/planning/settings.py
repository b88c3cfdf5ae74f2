"""What a prediction depends on, from flags or from the YAML file of a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Any

import torch

from lightrft_lightning import algorithms
from lightrft_lightning._errors import import_extra, unknown_name
from lightrft_lightning._settings import OFFLOADS
from lightrft_lightning.experience.trajectory import SamplingParams
from lightrft_lightning.models.lora import LORA
from lightrft_lightning.models.quantized import QUANTIZATIONS
from lightrft_lightning.strategies.factory import available_strategies, get_strategy

ENGINES = ("transformers", "vllm", "sglang", "remote")
PRECISIONS = {"32-true": torch.float32, "bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


@dataclass(frozen=True)
class Planned:
    """A run, as far as its memory and its time depend on it.

    Attributes:
        model: as `load_model` takes it, or a Hugging Face config. Of a folder or a hub id only the config is read.
        strategy: a registered name.
        gpus: ranks; of CPU processes, too.
        accelerator: ``gpu`` or ``cpu``.
        precision: as in ``Trainer(precision=...)``.
        prompts: of one iteration on one rank.
        n: completions of a prompt.
        prompt_tokens: of the longest prompt.
        completion_tokens: of the longest completion.
        token_budget: see `RLHFModule`.
        share_prompts: see `RLHFModule`.
        steps: optimizer steps of an iteration.
        kl_coef: above 0: there is a reference.
        critic: whether there is one, with a trunk of its own.
        lora_rank: of adapters on all linear layers; 0: all weights are trained.
        quantization: see `RLHFModule`; None: full precision.
        adam_8bit: see `StrategyConfig`.
        offload: see `RLHFModule`.
        gradient_checkpointing: see `RLHFModule`.
        engine: ``transformers``; ``vllm`` or ``sglang`` on the same device; ``remote``: on others.
        engine_sleeps: whether such an engine gives its memory back between rollouts (``sleep_level``).

    Raises:
        ValueError: a value is unknown or out of range.
    """

    model: Any
    strategy: str = "lightrft_fake"
    gpus: int = 1
    accelerator: str = "gpu"
    precision: str = "32-true"
    prompts: int = 32
    n: int = 8
    prompt_tokens: int = 256
    completion_tokens: int = 512
    token_budget: int = 8192
    share_prompts: bool = True
    steps: int = 1
    kl_coef: float = 0.0
    critic: bool = False
    lora_rank: int = 0
    quantization: str | None = None
    adam_8bit: bool = False
    offload: str = "none"
    gradient_checkpointing: bool = False
    engine: str = "transformers"
    engine_sleeps: bool = False

    def __post_init__(self) -> None:
        for name in ("gpus", "prompts", "n", "prompt_tokens", "completion_tokens", "token_budget", "steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)!r}: must be at least 1")
        for name, allowed in {
            "strategy": tuple(available_strategies()), "accelerator": ("gpu", "cpu"), "precision": tuple(PRECISIONS),
            "engine": ENGINES, "offload": OFFLOADS,
        }.items():  # fmt: skip
            if getattr(self, name) not in allowed:
                raise ValueError(unknown_name(name, str(getattr(self, name)), allowed))
        if self.strategy == "lightrft_fake" and self.gpus > 1:
            raise ValueError(f"gpus={self.gpus} with strategy='lightrft_fake', which is one process")
        if self.prompt_tokens + self.completion_tokens > self.token_budget:
            raise ValueError(
                f"token_budget={self.token_budget}: a prompt of {self.prompt_tokens} and a completion of "
                f"{self.completion_tokens} tokens do not fit"
            )
        if self.kl_coef < 0 or self.lora_rank < 0:
            raise ValueError(f"kl_coef={self.kl_coef}, lora_rank={self.lora_rank}: must be 0 or more")
        if self.offload == "all" and self.engine == "transformers":
            raise ValueError("offload='all' with engine='transformers', which generates with the model in training")
        made: Any = get_strategy(self.strategy, adam_8bit=self.adam_8bit)
        if self.quantization is not None:
            if self.quantization not in QUANTIZATIONS:
                raise ValueError(unknown_name("quantization", self.quantization, QUANTIZATIONS))
            problem = made.quantization_problem()
            if not self.lora_rank:
                problem = "these weights cannot be trained; say --lora_rank"
            if problem is not None:
                raise ValueError(f"quantization={self.quantization!r}: {problem}")


def of_config(path: Path) -> dict[str, Any]:
    """What the YAML file of a run says about the settings of `Planned`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is none of a run of `RLHFModule`.
    """
    if not path.is_file():
        raise FileNotFoundError(f"--config {path}: no such file")
    given = import_extra("yaml", "cli").safe_load(path.read_text())
    run = given if isinstance(given, Mapping) else {}
    module, trainer, data = ({**(run.get(part) or {})} for part in ("model", "trainer", "data"))
    if "model" not in module or not {"rewards", "environment"} & module.keys():
        raise ValueError(f"--config {path}: holds no run of RLHFModule (model.model with model.rewards or environment)")
    names = ("advantage_estimator", "advantage_options", "policy_loss", "policy_loss_options", "aggregation", "kl_coef",
             "kl_estimator", "kl_in", "advantage_norm", "critic", "dynamic_sampling")  # fmt: skip
    chosen = algorithms.resolve(module.get("algorithm"), {name: module.get(name) for name in names})
    usual, of_data = _defaults_of_a_run()
    sampling = {"n": usual["sampling"].n, "max_new_tokens": usual["sampling"].max_new_tokens}
    if module.get("sampling"):
        sampling = {name: module["sampling"].get(name, getattr(SamplingParams, name)) for name in sampling}
    steps = module.get("steps_per_epoch", 1) * module.get("epochs_per_rollout", 1)
    found = {
        "model": module["model"], **_strategy_of(trainer), "offload": module.get("offload"),
        "accelerator": trainer.get("accelerator"), "gpus": trainer.get("devices"),
        "precision": trainer.get("precision"), "prompts": data.get("batch_size", of_data["batch_size"]),
        "n": sampling["n"], "completion_tokens": sampling["max_new_tokens"],
        "prompt_tokens": data.get("max_prompt_length", of_data["max_prompt_length"]),
        "token_budget": module.get("token_budget", usual["token_budget"]),
        "share_prompts": module.get("share_prompts", usual["share_prompts"]), "steps": steps,
        "kl_coef": chosen["kl_coef"], "critic": chosen["critic"] is not None,
        "lora_rank": None if module.get("lora") is None else module["lora"].get("r", LORA["r"]),
        "quantization": module.get("quantization"),
        "gradient_checkpointing": module.get("gradient_checkpointing"), "engine": _engine_of(trainer),
    }  # fmt: skip
    return {name: value for name, value in found.items() if value is not None and value != "auto"}


def _defaults_of_a_run() -> tuple[dict[str, Any], dict[str, Any]]:
    """What `RLHFModule` and `PromptDataModule` take where nothing is said."""
    from lightrft_lightning.data import PromptDataModule
    from lightrft_lightning.module import RLHFModule

    module, data = (signature(cls.__init__).parameters for cls in (RLHFModule, PromptDataModule))
    return {name: p.default for name, p in module.items()}, {name: p.default for name, p in data.items()}


def _strategy_of(trainer: Mapping[str, Any]) -> dict[str, Any]:
    """The registered name of a strategy, or of what has a class's main settings."""
    given = trainer.get("strategy", "lightrft_fake")
    if not isinstance(given, Mapping):
        return {"strategy": given}
    settings, kind = given.get("init_args") or {}, str(given.get("class_path", "")).split(".")[-1]
    offloaded = "_offload" if settings.get("adam_offload") or settings.get("fsdp_cpu_offload") else ""
    names = {
        "FakeStrategy": "lightrft_fake",
        "FSDPV2Strategy": f"lightrft_fsdp{offloaded}",
        "DeepspeedStrategy": f"lightrft_deepspeed_stage_{settings.get('zero_stage', 2)}{offloaded}",
    }
    return {"strategy": names.get(kind, kind), "adam_8bit": settings.get("adam_8bit")}


def _engine_of(trainer: Mapping[str, Any]) -> str | None:
    engines = {"VLLMRollout": "vllm", "SGLangRollout": "sglang", "RemoteRollout": "remote"}
    for callback in trainer.get("callbacks") or ():
        path = callback if isinstance(callback, str) else callback.get("class_path", "")
        if path.split(".")[-1] in engines:
            return engines[path.split(".")[-1]]
    return None
