"""What the flags of LightRFT's scripts mean for `RLHFModule`.

Source: https://github.com/opendilab/LightRFT, the parsers in ``examples``.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

log = logging.getLogger(__name__)

AGGREGATIONS = {"seq-mean-token-mean": "sequence_mean", "token-mean": "token_mean"}
"""``loss_agg_mode``; LightRFT itself takes the first, whatever is said."""
BY_TOKEN = ("gae", "reinforce", "reinforce_plus_plus")
"""Estimators that take a reward for each token."""
NO_CRITIC = "only advantage_estimator='gae' has a critic, leave it out"
REFUSED = {
    "enable_ema": (False, "average with strategy.moving_average"),
    "aux_loss_coef": (0, "there is no loss that balances experts"),
    "normalize_reward_for_critic": (False, "take reward_norm"),
    "gradient_checkpointing_use_reentrant": (False, "layers are computed again without it"),
}
"""Flags that ask for what is not there: their default, and the remedy."""
_LOADER, _LOGGER = "PromptDataModule", "Trainer(logger=WandbLogger(...))"
_TEXTS = "SupervisedWarmup, which trains on texts before; nothing is mixed into the steps"
_SAVED, _EXPORT = "ModelCheckpoint", "ExportModel, which writes a Hugging Face folder"
_SAMPLES = "SampleTable and RewardCurve"
_REWARD, _IMAGES = "the reward that from_config gets", "nothing here: images are not trained with"
_NOTHING = "nothing: LightRFT does not read it in these trainers"
ELSEWHERE: dict[str, tuple[tuple[Any, ...], str]] = {
    # data
    "rollout_batch_size": ((512,), f"{_LOADER}(batch_size={{0}}); steps_per_epoch says how many steps it makes"),
    "prompt_max_len": ((1024,), f"{_LOADER}(max_prompt_length={{0}})"),
    "prompt_data": ((None,), f"{_LOADER}({{0!r}})"),
    "prompt_split": (("train",), f"the source that {_LOADER} gets"),
    "prompt_data_probs": (("1.0",), f"the source that {_LOADER} gets, whose rows count the same"),
    "input_key": (("prompt",), f"{_LOADER}(prompt_column={{0!r}})"),
    "input_template": ((None,), f"{_LOADER}(template=...), with columns in braces"),
    "apply_chat_template": ((True,), f"{_LOADER}(chat_template={{0}}), whose default is to take one that is there"),
    "system_prompt": ((None,), f"{_LOADER}(system_prompt={{0!r}})"),
    "system_prompt_path": ((None,), f"{_LOADER}(system_prompt=...), a text"),
    "label_key": (("label",), "the reward function, which gets every column by its name"),
    "reference_key": (("reference",), "the reward function, which gets every column by its name"),
    "max_samples": ((1_000_000,), f"{_LOADER}(limit={{0}})"),
    "eval_data": ((None,), f"{_LOADER}(val={{0!r}})"),
    "eval_split": (("test",), f"the source that {_LOADER}(val=...) gets"),
    "max_eval_samples": ((500,), f"the source that {_LOADER}(val=...) gets"),
    "eval_steps": ((-1,), "Trainer(val_check_interval=..., check_val_every_n_epoch=None)"),
    "max_len": ((None,), f"{_LOADER}(max_length={{0}}), of texts to imitate"),
    "pretrain_split": (("train",), _TEXTS),
    "pretrain_data_probs": (("1.0",), _TEXTS),
    "ptx_coef": ((0.05,), _TEXTS),
    "images_key": (("image", "audio_path"), _IMAGES),
    "limit_mm_image_per_prompt": ((-1,), _IMAGES),
    "limit_mm_video_per_prompt": ((-1,), _IMAGES),
    "fps": ((2.0,), _IMAGES),
    "max_pixels": ((282_240,), _IMAGES),
    # models
    "pretrain": ((None,), "the model that from_config gets"),
    "reward_pretrain": ((None,), f"{_REWARD}, e.g. rewards=[<folder>]"),
    "rm_use_engine": ((False,), _REWARD),
    "rm_engine_cudagraph": ((False,), _REWARD),
    "freeze_prefix": ((False,), "a model object, requires_grad_(False) of its vision part; nothing is frozen here"),
    "no_shard_vit": ((False,), _NOTHING),
    "initial_model_shard_size": ((None,), "zpg= of the strategy, which is for all models"),
    "meta_init": ((False,), "strategy.init_model_context(meta_init=True), around where a model is built"),
    "actor_init_on_gpu": ((False,), "nothing: models are read to where the strategy keeps them"),
    "disable_fast_tokenizer": ((False,), "RLHFModule(tokenizer=AutoTokenizer.from_pretrained(..., use_fast=False))"),
    "use_ms": ((False,), "a local folder, whatever hub it comes from"),
    "flash_attn": (
        (False,),
        "RLHFModule(attn_implementation='flash_attention_2', share_prompts=False); see its default",
    ),
    "disable_logprobs_flashattn": ((False,), "nothing: log-probabilities are computed a chunk of tokens at a time"),
    "chunk_size": ((4096,), "nothing: log-probabilities are computed a chunk of tokens at a time"),
    "packing_samples": ((False,), "nothing: groups share their prompt and rows fill RLHFModule(token_budget=...)"),
    "value_head_prefix": (("score",), "Critic(model=<folder>), whose head has the name that its class gives it"),
    "text_only": ((False, True), _IMAGES),
    "normalize_advantages": ((True,), _NOTHING),
    "use_sequence_rewards": ((True,), _NOTHING),
    # the run
    "num_episodes": ((1,), "Trainer(max_epochs={0})"),
    "engine_mem_util": ((0.5,), "VLLMRollout(gpu_memory_utilization={0}), or SGLang's mem_fraction_static"),
    "save_path": (("./ckpt",), f"{_SAVED}({{0!r}}) or {_EXPORT}"),
    "ckpt_path": (("./ckpt/checkpoints_ppo",), f"{_SAVED}({{0!r}})"),
    "ckpt_path_local": ((None,), f"{_SAVED}({{0!r}})"),
    "save_steps": ((-1,), f"{_SAVED}(every_n_train_steps={{0}})"),
    "max_ckpt_num": ((3,), f"{_SAVED}(save_top_k=...)"),
    "max_ckpt_mem": ((100_000_000,), f"{_SAVED}(save_top_k=...)"),
    "disable_ds_ckpt": ((False,), _SAVED),
    "load_checkpoint": ((False,), "trainer.fit(..., ckpt_path=...)"),
    "save_hf_ckpt": ((False,), _EXPORT),
    "save_value_network": ((False,), f"{_SAVED}, which has the critic too"),
    "logging_steps": ((1,), "Trainer(log_every_n_steps={0})"),
    "log_dir": ((None,), "Trainer(default_root_dir={0!r})"),
    "use_wandb": ((None, False, ""), _LOGGER),
    "save_trajectories": ((False,), _SAMPLES),
    "num_trajectories_to_save": ((10,), _SAMPLES),
    "mark_high_entropy_tokens": ((False,), _SAMPLES),
    "trajectory_analysis": ((False,), _SAMPLES),
    "print_replay_buffer_stats": ((False,), "the metrics that are logged"),
}
"""Flags of what is not the module: what needs no word, as the parsers fill it in, and where they go."""
READ = (
    "eps_clip", "gamma", "lambd", "value_clip", "freezing_actor_steps", "init_kl_coef", "kl_target", "use_gspo",
    "use_cpg_loss", "loss_agg_mode", "high_entropy_token_ratio", "use_fire", "first_token_temperature", "temperature",
    "top_p", "generate_max_len", "lora_rank", "lora_alpha", "target_modules", "lora_dropout", "load_in_4bit",
    "gradient_checkpointing", "max_epochs",
)  # fmt: skip
"""Flags that `module_settings`, `sampling_settings` and `critic_settings` take."""
WITH_WANDB = ("wandb_group", "wandb_org", "wandb_project", "wandb_run_name")
"""Flags that mean something with ``use_wandb`` only."""


def module_settings(
    flags: Mapping[str, Any], estimator: str, use_kl_loss: bool, kl_coef: float | None
) -> dict[str, Any]:
    """Arguments of `RLHFModule` for flags that are there; with none of them, LightRFT's way to put a loss together.

    Args:
        flags: of a parser, its defaults among them; those of `StrategyConfig` are not looked at.
        estimator: of advantages.
        use_kl_loss: the penalty is in the loss and not in the reward.
        kl_coef: what the caller gives in place of ``init_kl_coef``.

    Raises:
        ValueError: a flag asks for what is not there; the message has the remedy.
    """
    for name, (default, remedy) in REFUSED.items():
        if flags.get(name, default) not in (default, None):
            raise ValueError(f"{name}={flags[name]!r}: {remedy}")
    _tell_of_others(flags)
    return {
        "aggregation": _aggregation(flags),
        **_loss(flags),
        **_advantages(flags, estimator),
        **_kl(flags, estimator, use_kl_loss, kl_coef),
        **_adapters(flags),
        **_named(flags),
    }


def _tell_of_others(flags: Mapping[str, Any]) -> None:
    """One message, as a script's parser fills in dozens."""
    said = {name: flags[name] for name, (silent, _) in ELSEWHERE.items() if flags.get(name) not in (*silent, None)}
    unknown = sorted(flags.keys() - ELSEWHERE.keys() - REFUSED.keys() - {*READ, *WITH_WANDB})
    if unknown:
        log.warning("flags that nothing here reads: %s", ", ".join(unknown))
    if said:
        lines = [f"  {name}={value!r}: {ELSEWHERE[name][1].format(value)}" for name, value in said.items()]
        log.warning("flags that RLHFModule does not take, and what does:\n%s", "\n".join(lines))


def sampling_settings(flags: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of `SamplingParams`."""
    names = {"temperature": "temperature", "top_p": "top_p", "generate_max_len": "max_new_tokens"}
    return {ours: flags[theirs] for theirs, ours in names.items() if flags.get(theirs) is not None}


def critic_settings(flags: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of `Critic`."""
    found = {} if flags.get("value_clip") is None else {"value_clip": float(flags["value_clip"]) or None}
    return found | ({"warmup_iterations": frozen} if (frozen := _frozen(flags)) else {})


def _frozen(flags: Mapping[str, Any]) -> int:
    return max(0, flags.get("freezing_actor_steps") or 0)


def _aggregation(flags: Mapping[str, Any]) -> str:
    mode = flags.get("loss_agg_mode") or "seq-mean-token-mean"
    if mode == "seq-mean-token-sum":  # the default of one of the parsers
        log.warning("loss_agg_mode=%r: LightRFT does not read it and takes the mean over tokens, as is done here", mode)
        mode = "seq-mean-token-mean"
    if mode not in AGGREGATIONS:
        raise ValueError(f"loss_agg_mode={mode!r}: give aggregation=, or one of {', '.join(AGGREGATIONS)}")
    return AGGREGATIONS[mode]


def _loss(flags: Mapping[str, Any]) -> dict[str, Any]:
    if flags.get("use_gspo") and flags.get("use_cpg_loss"):
        raise ValueError("use_gspo=True with use_cpg_loss=True: there is one loss, set one of them")
    loss = "gspo" if flags.get("use_gspo") else "cpgd" if flags.get("use_cpg_loss") else "ppo"
    clip = flags.get("eps_clip")
    options = {} if clip is None else {"clip_low": float(clip), "clip_high": float(clip)}
    ratio = flags.get("high_entropy_token_ratio") or 0
    return {"policy_loss": loss, "policy_loss_options": options, **({"high_entropy_share": ratio} if ratio else {})}


def _advantages(flags: Mapping[str, Any], estimator: str) -> dict[str, Any]:
    gamma, lam = flags.get("gamma"), flags.get("lambd")
    options: dict[str, float] = {}
    if gamma is not None and estimator in BY_TOKEN:
        options["gamma"] = float(gamma)
    elif gamma not in (None, 1):
        raise ValueError(f"gamma={gamma!r}: advantage_estimator={estimator!r} compares whole completions, leave it out")
    if lam is not None and estimator == "gae":
        options["lam"] = float(lam)
    if _frozen(flags) and estimator != "gae":
        raise ValueError(f"freezing_actor_steps={_frozen(flags)}: {NO_CRITIC}")
    for name, usual in (("lambd", 0.95), ("value_clip", 0.2)):
        if estimator != "gae" and flags.get(name) not in (None, usual):
            raise ValueError(f"{name}={flags[name]!r}: {NO_CRITIC}")
    return {"advantage_options": options} if options else {}


def _kl(flags: Mapping[str, Any], estimator: str, in_loss: bool, given: float | None) -> dict[str, Any]:
    coef = flags.get("init_kl_coef") if given is None else given
    if in_loss and not coef:
        raise ValueError("use_kl_loss=True needs init_kl_coef, or kl_coef=<weight of the penalty>")
    if flags.get("kl_target") and not coef:
        raise ValueError(f"kl_target={flags['kl_target']!r} needs init_kl_coef, the weight that it adapts")
    if coef is None:
        return {}
    if coef and not in_loss and estimator not in BY_TOKEN:
        told = "init_kl_coef=%s: advantage_estimator=%r compares whole completions, so the penalty is in the loss"
        log.warning(told, coef, estimator)
        in_loss = True
    target = flags.get("kl_target")
    return {"kl_coef": coef, "kl_in": "loss" if in_loss else "reward", **({"kl_target": target} if target else {})}


def _adapters(flags: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {"quantization": "nf4"} if flags.get("load_in_4bit") else {}
    if flags.get("lora_rank"):
        same = {
            name: flags[name]
            for name in ("lora_alpha", "target_modules", "lora_dropout")
            if flags.get(name) is not None
        }
        found["lora"] = {"r": flags["lora_rank"], **same}
    return found


def _named(flags: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {"gradient_checkpointing": True} if flags.get("gradient_checkpointing") else {}
    if flags.get("use_fire"):
        found["first_token_temperature"] = float(flags.get("first_token_temperature") or 10.0)
    return found | ({"epochs_per_rollout": epochs} if (epochs := flags.get("max_epochs") or 1) != 1 else {})
