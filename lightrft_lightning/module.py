"""`RLHFModule`: reinforcement fine-tuning as a `LightningModule`. One `training_step` is one iteration."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn
from typing_extensions import override

from lightrft_lightning import algorithms
from lightrft_lightning._errors import check_types
from lightrft_lightning._sampling import Ahead, Sampled, sampled_from_state, sampled_state
from lightrft_lightning._seeds import derive_seed, global_seed
from lightrft_lightning._settings import ONE_CALL
from lightrft_lightning._trainer import check_optimizers, check_quantization, check_strategy, with_lr_schedule
from lightrft_lightning._update import Update
from lightrft_lightning.algorithms import lightrft_flags
from lightrft_lightning.callbacks.checkpoint_folders import check_checkpoints
from lightrft_lightning.callbacks.monitors import tell_monitors
from lightrft_lightning.callbacks.rollout import RolloutCallback
from lightrft_lightning.checkpoints.settings import KEY as SETTINGS
from lightrft_lightning.checkpoints.settings import given, let_given_win
from lightrft_lightning.checkpoints.trainer_state import load_module
from lightrft_lightning.critic import Critic, as_critic, new_critic
from lightrft_lightning.engines.fire import stream_with_hot_start
from lightrft_lightning.environments.episodes import Episodes, with_environment
from lightrft_lightning.experience.refill import Refill, informative_groups
from lightrft_lightning.experience.trajectory import Completion, Prompt, SamplingParams, Trajectory, check_batch
from lightrft_lightning.metrics import (
    SampleResult,
    pass_metrics,
    reward_metrics,
    sample_result,
)
from lightrft_lightning.models.layers import checkpoint_activations, compile_layers, in_training_mode
from lightrft_lightning.models.loading import load_model, load_tokenizer
from lightrft_lightning.models.logprobs import find_causal_lm
from lightrft_lightning.models.lora import add_lora, check_adapters, has_adapters
from lightrft_lightning.models.objects import check_model_object
from lightrft_lightning.models.outputs import tell_ignored_outputs
from lightrft_lightning.models.precision import train_in_float32
from lightrft_lightning.models.rope import length_limits
from lightrft_lightning.models.tokens import check_data_ids
from lightrft_lightning.rewards import Rewards
from lightrft_lightning.rewards.surroundings import kept_while_scoring
from lightrft_lightning.rewards.watch import RewardWatch

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from lightrft_lightning.config import StrategyConfig

log = logging.getLogger(__name__)

DEFAULT_SAMPLING = SamplingParams(n=8)


class RLHFModule(Update):
    """Samples completions, scores them, turns scores into advantages and updates the policy.

    A batch is a list of `Prompt`; one `training_step` is one iteration: rollout, rewards, advantages, one or several
    optimizer steps. Optimization is manual; clipping (`max_norm`) and the optimizer are the strategy's.

    Args:
        model: Hugging Face folder, GGUF file, hub id, registered name (see `load_model`), or a model object.
        rewards: reward functions, as `Rewards` takes them, or a `Rewards`; may be left out with an environment.
        tokenizer: default: the one of `model`.
        sampling: how training completions are drawn; `sampling.n` is the group size.
        val_sampling: the same for validation, test and prediction; default: greedy, one completion a prompt.
        environment: what answers the policy's turns, as `environments.Episodes` takes it. Its rewards, summed over the
            turns, are the reward function ``environment``, whose weight is 1 if `rewards` does not name it.
        max_turns: most turns of a trajectory in the environment; default: 8.
        max_length: most tokens of a prompt with its trajectory in the environment, observations included; default: what
            `token_budget` and the model allow. `sampling.max_new_tokens` bounds what the policy writes in all turns.
        first_token_temperature: that of the first token of training completions, for more variety (FIRE sampling, arXiv
            2410.21236, which has 30); None: that of the others.
        algorithm: name in `algorithms.PRESETS`, like ``dapo``: sets `algorithms.PRESET_SETTINGS` at once, and says so.
            What is given beside it wins; without it they are those of GRPO with every token weighing the same.
        advantage_estimator: name in `algorithms.ADVANTAGES`.
        advantage_options: keywords of that estimator, e.g. ``{"gamma": 0.99}``.
        policy_loss: name in `algorithms.POLICY_LOSSES`.
        policy_loss_options: keywords of that loss, e.g. ``{"clip_high": 0.28}``.
        correction: name in `algorithms.CORRECTIONS`, for engines whose log-probabilities differ from the trainer's;
            ``none``: samples count as they are. Default: ``none``, with `staleness` ``token_truncated``.
        correction_options: keywords of that correction, e.g. ``{"cap": 2.0}``.
        aggregation: ``token_mean``, ``sequence_mean`` or ``sequence_sum_constant``.
        high_entropy_share: share of the global batch's policy tokens, those with the highest entropy, that are learnt
            from (arXiv 2506.01939 has 0.2); 1: all. Costs a forward pass.
        kl_coef: weight of the KL penalty against the starting policy; at 0 no reference model exists.
        kl_in: ``loss`` adds the penalty to the loss, ``reward`` takes it off the reward of every token, for estimators
            that look at tokens.
        kl_target: nats a token that `kl_coef` is adapted to reach after every iteration; None: it stays.
        kl_horizon: completions in which it changes by at most 20 %.
        kl_estimator: ``k1``, ``k2`` or ``k3`` (http://joschu.net/blog/kl-approx.html).
        kl_unbiased_gradient: in the loss, take the gradient of the KL itself in place of the estimator's.
        dynamic_sampling: replace prompts whose completions all earn the same by others of the training set, until the
            batch is full of groups to learn from (arXiv 2503.14476, section 3.2).
        staleness: 1 samples the next batch while the model trains on the one before, with the weights from before that
            training; `correction` makes up for these. For engines in another process (`RemoteRollout`,
            `SGLangRollout`). The first batch is only sampled, and the last one's samples are left for a run that goes
            on from the checkpoint.
        sampling_attempts: most times that an iteration samples further prompts for this.
        short_batch: what happens if these do not suffice: ``train`` on what there is with a warning, or ``error``.
        overlong_buffer: tokens before the length limit where the penalty for long completions begins; 0: none.
        overlong_factor: that penalty at the limit.
        reward_norm: ``scale`` divides rewards by the standard deviation of all so far, ``full`` subtracts their mean
            first; ``none``: neither.
        reward_clip: clip rewards to ±this before the advantages; 0: off.
        critic: settings of the critic that GAE needs, see `Critic`; ``{}``: its defaults.
        advantage_norm: subtract the mean of the global batch's advantages and divide by their standard deviation.
        advantage_clip: clip advantages to ±this; 0: off.
        lr: learning rate of AdamW.
        weight_decay: decoupled weight decay.
        lr_schedule: after a warm-up ``constant``, ``linear``, ``cosine``, or ``cosine_with_min_lr`` (to a tenth).
        warmup_ratio: share of all optimizer steps in which the rate rises linearly.
        epochs_per_rollout: passes over the samples of one rollout.
        steps_per_epoch: optimizer steps of one pass; groups are dealt out evenly.
        token_budget: most tokens (padding included) of one forward pass.
        share_prompts: lay out a group with its prompt once; False pads one row a completion, which models without a
            mask for that need (recurrent layers, ``flash_attention_2``).
        attn_implementation: of the policy, as in `load_model`. ``auto``: ``flex_attention`` on CUDA, if it gives the
            log-probabilities of a dense mask there, which is looked at once; otherwise ``sdpa``, or what a model object
            has. If ``flex_attention`` is named and does not give them, that is an error.
        lora: train LoRA matrices around the linear layers in place of the weights: settings of `peft.LoraConfig`;
            ``{}``: rank 16 around all but the output head. The reference is then the model with them as they started.
        quantization: ``nf4``: with `lora`, the weights under the matrices in four bits (QLoRA; extra
            `bitsandbytes`), in one process or under ZeRO-1 and 2. Exported and sent to engines they are numbers of full
            precision again.
        offload: what moves to CPU memory while the engine generates, on a GPU: ``none``, ``optimizer`` (its state) or
            ``all`` (also policy, critic and reference, if the engine has weights of its own).
        gradient_checkpointing: keep only the inputs of the decoder layers of policy and critic for the backward pass,
            which computes them a second time: less memory, a third more work.
        compile: `torch.compile` these layers for training and scoring passes; generation stays as it is. The first pass
            takes longer. Not with ZeRO-3.
        check_numerics: prove at the start of a fit that training computes what the model says, and at its first rollout
            that the engine samples from it (docs/proof.md). A few passes; what is wrong is an error.
        pass_threshold: reward from which on a completion passes, for ``val/pass@k``; one whose reward failed does not.
        seed: fixes all sampling; default: Lightning's global seed.
        reward_deadline: seconds that one call of a reward function may take.
        reward_on_error: ``drop`` leaves a sample whose reward failed out of the update; a number is its reward.

    Raises:
        ValueError: an unknown name, or settings that cannot work together; before anything is loaded.
    """

    def __init__(
        self,
        model: Any = None,
        rewards: Any = None,
        tokenizer: Any = None,
        sampling: SamplingParams = DEFAULT_SAMPLING,
        val_sampling: SamplingParams | None = None,
        environment: Any = None,
        max_turns: int | None = None,
        max_length: int | None = None,
        first_token_temperature: float | None = None,
        algorithm: str | None = None,
        advantage_estimator: str | None = None,
        advantage_options: dict[str, Any] | None = None,
        policy_loss: str | None = None,
        policy_loss_options: dict[str, Any] | None = None,
        correction: str | None = None,
        correction_options: dict[str, Any] | None = None,
        aggregation: str | None = None,
        high_entropy_share: float = 1.0,
        kl_coef: float | None = None,
        kl_estimator: str | None = None,
        kl_unbiased_gradient: bool = False,
        kl_in: str | None = None,
        kl_target: float | None = None,
        kl_horizon: int = 10_000,
        dynamic_sampling: bool | None = None,
        staleness: int = 0,
        sampling_attempts: int = 10,
        short_batch: str = "train",
        overlong_buffer: int = 0,
        overlong_factor: float = 1.0,
        reward_norm: str = "none",
        reward_clip: float = 0.0,
        critic: Critic | dict[str, Any] | None = None,
        advantage_norm: bool | None = None,
        advantage_clip: float = 0.0,
        lr: float = 1e-5,
        weight_decay: float = 0.0,
        lr_schedule: str = "constant",
        warmup_ratio: float = 0.0,
        epochs_per_rollout: int = 1,
        steps_per_epoch: int = 1,
        token_budget: int = 8192,
        share_prompts: bool = True,
        attn_implementation: str = "auto",
        lora: dict[str, Any] | None = None,
        quantization: str | None = None,
        offload: str = "none",
        gradient_checkpointing: bool = False,
        compile: bool = False,
        check_numerics: bool = True,
        pass_threshold: float = 1.0,
        seed: int | None = None,
        reward_deadline: float = 30.0,
        reward_on_error: str | float = "drop",
    ) -> None:
        super().__init__()
        if model is None or (rewards is None and environment is None):
            raise ValueError(f"RLHFModule needs `{'model' if model is None else 'rewards'}`")
        check_types("RLHFModule", RLHFModule.__init__, locals())
        sampling = _as_sampling(sampling)
        greedy = SamplingParams(temperature=0.0, max_new_tokens=sampling.max_new_tokens, stop=sampling.stop)
        self.automatic_optimization = False
        self.sampling, self.first_token_temperature = sampling, first_token_temperature
        self.val_sampling = greedy if val_sampling is None else _as_sampling(val_sampling)
        chosen = algorithms.resolve(
            algorithm,
            {
                "advantage_estimator": advantage_estimator,
                "advantage_options": advantage_options,
                "policy_loss": policy_loss,
                "policy_loss_options": policy_loss_options,
                "aggregation": aggregation,
                "kl_coef": kl_coef,
                "kl_estimator": kl_estimator,
                "kl_in": kl_in,
                "advantage_norm": advantage_norm,
                "critic": critic,
                "dynamic_sampling": dynamic_sampling,
            },
        )
        self.algorithm, self._chosen = algorithm, chosen
        self.advantage_estimator: str = chosen["advantage_estimator"]
        self.advantage_options: dict[str, Any] = dict(chosen["advantage_options"])
        self.policy_loss: str = chosen["policy_loss"]
        self.policy_loss_options: dict[str, Any] = dict(chosen["policy_loss_options"])
        self.staleness = staleness
        self.correction = correction or ("token_truncated" if staleness else "none")
        self.correction_options = dict(correction_options or {})
        self.aggregation: str = chosen["aggregation"]
        self.high_entropy_share = high_entropy_share
        self.kl_coef: float = chosen["kl_coef"]
        self.kl_estimator: str = chosen["kl_estimator"]
        self.kl_unbiased_gradient = kl_unbiased_gradient
        self.kl_in: str = chosen["kl_in"]
        self.kl_target, self.kl_horizon = kl_target, kl_horizon
        self.dynamic_sampling: bool = chosen["dynamic_sampling"]
        self.sampling_attempts, self.short_batch = sampling_attempts, short_batch
        self.overlong_buffer, self.overlong_factor = overlong_buffer, overlong_factor
        self.reward_norm, self.reward_clip = reward_norm, reward_clip
        self.advantage_norm: bool = chosen["advantage_norm"]
        self.advantage_clip = advantage_clip
        self.critic_settings = as_critic(chosen["critic"])
        self.reward_moments = algorithms.RunningMoments()
        self.lr, self.weight_decay = lr, weight_decay
        self.lr_schedule, self.warmup_ratio = lr_schedule, warmup_ratio
        self.epochs_per_rollout, self.steps_per_epoch = epochs_per_rollout, steps_per_epoch
        self.token_budget, self.share_prompts = token_budget, share_prompts
        self.attn_implementation = attn_implementation
        self.lora, self.quantization = lora, quantization
        self.offload = offload
        self.gradient_checkpointing = gradient_checkpointing
        self.compile_layers = compile  # `compile` is a method of every module
        self.check_numerics = check_numerics
        self.pass_threshold = pass_threshold
        self.max_turns, self.max_length = max_turns, max_length
        self.seed = global_seed() if seed is None else seed
        self._check_settings()
        self._save_hyperparameters(
            model, rewards, environment, reward_deadline=reward_deadline, reward_on_error=reward_on_error
        )
        if not isinstance(rewards, Rewards):
            rewards = "environment" if rewards is None else rewards
            rewards = Rewards(rewards, deadline=reward_deadline, on_error=reward_on_error)
        elif (reward_deadline, reward_on_error) != (30.0, "drop"):
            raise ValueError("`rewards` is a `Rewards`: set its deadline and on_error there")
        self.episodes: Episodes | None = None
        if environment is not None:
            self.episodes = Episodes(environment, max_turns or 8, rewards.deadline)
            rewards = with_environment(rewards)
            if staleness:
                raise ValueError(f"staleness={staleness} with an environment: {ONE_CALL}")
        elif (max_turns, max_length) != (None, None) or "environment" in rewards.names:
            raise ValueError("max_turns, max_length and the reward 'environment' need RLHFModule(environment=...)")
        self.rewards = rewards
        self._reward_watch = RewardWatch(rewards)
        check_model_object(model)
        self._source: Any = None if isinstance(model, nn.Module) else model
        check_adapters(model, lora, quantization)
        self._tokenizer = tokenizer
        self.actor: PreTrainedModel | None = in_training_mode(model) if isinstance(model, nn.Module) else None  # type: ignore[assignment]
        self.reference: PreTrainedModel | None = None
        self.start: dict[str, Tensor] | None = None
        self.reward_models = nn.ModuleList()
        """Those of `rewards`, frozen; here, so that the strategy shards them."""
        self.critic: nn.Module | None = None
        self.iteration = 0
        self._rollout_is_proven = True
        self.last_trajectories: list[Trajectory] = []
        self._ahead: Ahead | None = None
        """The rollout of the next iteration, as long as it goes on; and what came of it."""
        self._sampled_ahead: Sampled | None = None
        self._evaluated: dict[int, list[list[SampleResult]]] = {}
        """The groups of each validation set so far."""
        self._given: dict[str, Any] | None = None
        self._is_offloaded = False
        self.register_state_dict_post_hook(_drop_frozen)
        self.register_load_state_dict_pre_hook(_add_frozen)

    # ---------------------------------------------------------------- one iteration

    def training_step(self, batch: list[Prompt], batch_idx: int) -> None:
        """Prompts → completions → rewards → advantages → optimizer steps."""
        start = time.perf_counter()
        if self.staleness:
            sampled, self._sampled_ahead = self._sampled_ahead, None
            self._ahead = self._sample_ahead(batch, self.iteration + (sampled is not None))
            if sampled is None:
                self.last_trajectories = []
                return
            learnable = sampled.trajectories
        elif self.dynamic_sampling:
            with self._offloaded(), self.rollout_engine.awake():  # in between it could lose its weights
                sampled = self._sample(batch)
                learnable = self._refilled(sampled, batch)
        else:
            sampled = self._sample(batch)
            learnable = sampled.trajectories
        self.last_trajectories = sampled.trajectories
        self._prove_rollout(sampled)
        usable = self.estimate_advantages(learnable)
        before = time.perf_counter()
        metrics = self.update(usable)
        end = time.perf_counter()
        seconds = {**sampled.seconds, "update": end - before, "iteration": end - start}
        self._log_iteration(sampled, usable, metrics, seconds)
        self.iteration += 1

    def _sample_ahead(self, prompts: Sequence[Prompt], iteration: int) -> Ahead:
        """Begin with the rollout for a later iteration."""
        numbers, sampling = self._group_numbers(len(prompts)), self._iteration_sampling(iteration)
        return Ahead(self.rollout_engine, self.rewards, self.strategy, prompts, sampling, numbers, self._trajectories)

    def finish_sampling(self) -> None:
        """Wait for what is being sampled for the next iteration. All ranks together; before the weights change."""
        if self._ahead is not None:
            ahead, self._ahead = self._ahead, None
            self._sampled_ahead = ahead.finish()
            self._reward_watch.trained(self._sampled_ahead.report, self.iteration, self.strategy)

    def give_up_sampling(self) -> None:
        """Do not wait for what is being sampled for the next iteration, as there is none."""
        if self._ahead is not None:
            self._ahead.give_up()
            self._ahead = None

    def _sample(self, prompts: Sequence[Prompt], first_group: int = 0) -> Sampled:
        """Completions with their rewards, which are computed while others are still being generated."""
        start = time.perf_counter()
        with kept_while_scoring(), self.rewards.in_background(self.strategy) as scoring:
            sampling = self._iteration_sampling(self.iteration)
            trajectories = self.rollout(prompts, sampling, scoring.add, first_group)
            generated = time.perf_counter()
            report = scoring.finish()
        self._reward_watch.trained(report, self.iteration, self.strategy)
        seconds = {"rollout": generated - start, "rewards": time.perf_counter() - generated}
        return Sampled(trajectories, report, seconds, optimizer_steps=self.strategy.optimizer_steps)

    def _refilled(self, sampled: Sampled, batch: Sequence[Prompt]) -> list[Trajectory]:
        """As many groups of unequal rewards as the batch has prompts: others are sampled until there are.

        What is sampled is added to `sampled`. All ranks together; they may end up with unequal numbers of groups.
        """
        gather, ranks, rank = self.strategy.gather_objects, self.trainer.world_size, self.trainer.global_rank
        groups = wanted = len(batch) * ranks
        used = set().union(*gather({p.token_ids for p in batch}))
        source = Refill(self.trainer.train_dataloader.dataset, used, derive_seed(self.seed, self.iteration, 1))  # type: ignore[union-attr]
        for _ in range(self.sampling_attempts):
            found = sorted(g for of_rank in gather(informative_groups(sampled.trajectories)) for g in of_rank)
            prompts = source.take(-(-(wanted - len(found)) // ranks) * ranks)
            prompts = prompts[: len(prompts) // ranks * ranks]  # all ranks generate together
            if not prompts:
                break
            sampled.add(self._sample(prompts[rank::ranks], groups))
            groups += len(prompts)
        found = sorted(g for of_rank in gather(informative_groups(sampled.trajectories)) for g in of_rank)
        sampled.resampled = groups - wanted
        if len(found) < wanted:
            told = (
                f"iteration {self.iteration + 1}: after {groups} prompts only {len(found)} of {wanted} groups have "
                "unequal rewards"
            )
            if self.short_batch == "error":
                raise RuntimeError(
                    f"{told}. Raise sampling_attempts, take other prompts, or train on with short_batch='train'"
                )
            log.warning("%s, the batch is short", told)
        kept = set(found[:wanted])
        return [t for t in sampled.trajectories if t.group in kept]

    def rollout(
        self,
        prompts: Sequence[Prompt],
        sampling: SamplingParams,
        on_group: Callable[[list[Trajectory]], None] | None = None,
        first_group: int = 0,
    ) -> list[Trajectory]:
        """Let the engine draw `sampling.n` completions for each prompt; those of one prompt are a group.

        Groups are numbered over all ranks, in the order in which the data loader deals prompts out.

        Args:
            prompts: of this rank.
            sampling: see `SamplingParams`.
            on_group: called with each group as soon as the engine has finished it.
            first_group: number of the first.
        """
        check_batch(prompts)
        engine, numbers = self.rollout_engine, self._group_numbers(len(prompts), first_group)
        groups: dict[int, list[Trajectory]] = {}
        ids = [p.token_ids for p in prompts]
        hot = self.first_token_temperature if self.trainer.training else None
        if self.episodes is not None:
            self.episodes.prepare(self.tokenizer, prompts)
        with self._offloaded(), engine.awake():
            for i, completions in (
                stream_with_hot_start(engine, ids, sampling, numbers, hot)
                if hot is not None
                else engine.stream(ids, sampling, numbers)
            ):
                groups[i] = [] if prompts[i].filler else self._trajectories(prompts[i], completions, numbers[i])
                if on_group is not None and self.episodes is None:
                    on_group(groups[i])
            if self.episodes is not None:
                first_turns = [groups[i] for i in range(len(prompts))]
                for group in self.episodes.play(
                    first_turns, engine, self.tokenizer, sampling, self._longest(), self.strategy.gather_objects
                ):
                    if on_group is not None:
                        on_group(list(group))
        self.last_trajectories = [t for i in range(len(prompts)) for t in groups[i]]
        return self.last_trajectories

    @contextlib.contextmanager
    def _offloaded(self) -> Iterator[None]:
        """What `offload` names is in CPU memory inside the outermost one."""
        if self.offload == "none" or self._is_offloaded:
            yield
            return
        models = [self.actor, self.reference, None if self._shares_trunk else self.critic]
        moved = [m for m in models if m is not None] if self.offload == "all" else []
        # Lightning evaluates in inference mode, whose tensors could not be trained afterwards.
        with torch.inference_mode(False), torch.no_grad():
            for optimizer in self.trainer.optimizers:
                self.strategy.maybe_offload_optimizer(optimizer)
            for model in moved:
                self.strategy.offload_model(model)
        torch.cuda.empty_cache()  # for an engine that is another process
        self._is_offloaded = True
        try:
            yield
        finally:
            self._is_offloaded = False
            with torch.inference_mode(False), torch.no_grad():
                for model in moved:
                    self.strategy.reload_model(model)
                for optimizer in self.trainer.optimizers:
                    self.strategy.maybe_load_optimizer(optimizer)

    def _group_numbers(self, count: int, first: int = 0) -> list[int]:
        return [first + k * self.trainer.world_size + self.trainer.global_rank for k in range(count)]

    def _longest(self) -> int:
        """Most tokens of a prompt with its completion."""
        limits = (self.max_length, self.token_budget, *length_limits(self.actor.config).values())  # type: ignore[union-attr]
        return min(limit for limit in limits if limit is not None)

    def _trajectories(self, prompt: Prompt, completions: Sequence[Completion], group: int) -> list[Trajectory]:
        return [
            Trajectory(
                prompt=prompt,
                completion=completion,
                group=group,
                policy_version=self.rollout_engine.version,
                text=str(self.tokenizer.decode(list(completion.token_ids), skip_special_tokens=True)),
            )
            for completion in completions
        ]

    # ---------------------------------------------------------------- evaluation

    def validation_step(self, batch: list[Prompt], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Generate with `val_sampling` and score, without touching training; the end of the epoch logs."""
        self._evaluate(batch, batch_idx, dataloader_idx)

    def test_step(self, batch: list[Prompt], batch_idx: int, dataloader_idx: int = 0) -> None:
        """As `validation_step`."""
        self._evaluate(batch, batch_idx, dataloader_idx)

    def predict_step(self, batch: list[Prompt], batch_idx: int) -> list[dict[str, Any]]:
        """Completions as dicts with ``prompt``, ``completion``, ``token_ids`` and ``finish_reason``."""
        return [
            {
                "prompt": t.prompt.text,
                "completion": t.text,
                "token_ids": list(t.completion.token_ids),
                "finish_reason": t.completion.finish_reason,
            }
            for t in self.rollout(batch, self._evaluation_sampling(batch_idx))
        ]

    def _evaluate(self, batch: list[Prompt], batch_idx: int, dataloader_idx: int) -> None:
        trajectories = self.rollout(batch, self._evaluation_sampling(batch_idx, dataloader_idx))
        with kept_while_scoring():
            self._reward_watch.evaluated(self.rewards.score_silently(trajectories, self.strategy))
        groups: dict[int, list[SampleResult]] = {}
        for sample in self._gather_samples(trajectories):
            groups.setdefault(sample.group, []).append(sample)
        self._evaluated.setdefault(dataloader_idx, []).extend(groups.values())

    def _log_evaluation(self, stage: str) -> None:
        """Over all prompts of the evaluation, in which each counts once, and over those of each set that has a name."""
        self._reward_watch.end_evaluation(self.strategy)
        names = getattr(self.trainer.datamodule, "val_names", ())  # type: ignore[attr-defined]
        evaluated, self._evaluated = self._evaluated, {}
        sets = {stage: [group for groups in evaluated.values() for group in groups]}
        sets |= {f"{stage}/{name}": evaluated.get(i, []) for i, name in enumerate(names)}
        for prefix, groups in sets.items():
            metrics = reward_metrics([s for group in groups for s in group]) | pass_metrics(groups, self.pass_threshold)
            # The values are the same on every rank; without sync_dist Lightning would warn that they may not be.
            self.log_dict({f"{prefix}/{name}": value for name, value in metrics.items()}, sync_dist=True)

    @override
    def on_validation_epoch_end(self) -> None:
        self._log_evaluation("val")

    @override
    def on_test_epoch_end(self) -> None:
        self._log_evaluation("test")

    def _start_evaluation(self) -> None:
        self._evaluated = {}  # of an evaluation that was broken off
        self._reward_watch.begin_evaluation()

    on_validation_epoch_start = on_test_epoch_start = _start_evaluation

    def _gather_samples(self, trajectories: Sequence[Trajectory]) -> list[SampleResult]:
        """What the metrics need of the trajectories of all ranks."""
        return [s for rank in self.strategy.gather_objects([sample_result(t) for t in trajectories]) for s in rank]

    # ---------------------------------------------------------------- set-up

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer; without one of its own that of the model's source, loaded at first use."""
        if self._tokenizer is None:
            actor: Any = self.actor
            self._tokenizer = load_tokenizer(self._source or actor.config.name_or_path)
        return self._tokenizer

    @property
    def model_or_source(self) -> Any:
        """What the policy is, or will be loaded from."""
        return self._source if self.actor is None else self.actor

    @property
    def rollout_engine(self) -> RolloutCallback:
        """The Trainer's rollout callback."""
        return next(c for c in self.trainer.callbacks if isinstance(c, RolloutCallback))  # type: ignore[attr-defined]

    @override
    def setup(self, stage: str) -> None:
        check_strategy(self)
        if stage == "fit" and self.algorithm is not None:
            settings = ", ".join(f"{name}={value!r}" for name, value in self._chosen.items())
            rank_zero_info(f"algorithm={self.algorithm!r}: {settings}")
        if self.compile_layers and (problem := self.strategy.compile_problem()) is not None:
            raise ValueError(f"RLHFModule(compile=True): {problem}")
        check_quantization(self.strategy, self.quantization)
        engines = [c for c in self.trainer.callbacks if isinstance(c, RolloutCallback)]  # type: ignore[attr-defined]
        if len(engines) != 1:
            raise ValueError(
                f"RLHFModule needs exactly one rollout engine among the callbacks, found {len(engines)}: "
                "Trainer(callbacks=[TransformersRollout()])"
            )
        (engine,) = engines
        if self.staleness and stage == "fit":
            self._check_engine_generates_elsewhere(engine)
        if self.offload == "all" and not engine.has_copy:
            raise ValueError(
                f"offload='all' with {type(engine).__name__}, which generates with the model in training: use "
                "offload='optimizer', or another engine"
            )
        temperatures = {
            "sampling.temperature": self.sampling.temperature,
            "val_sampling.temperature": self.val_sampling.temperature,
            "first_token_temperature": self.first_token_temperature or 0.0,
        }
        for name, temperature in temperatures.items():
            if temperature > engine.max_temperature:
                limit = f"{type(engine).__name__} takes at most {engine.max_temperature:g}"
                raise ValueError(f"{name}={temperature}: {limit}")

    def _check_engine_generates_elsewhere(self, engine: RolloutCallback) -> None:
        told = f"staleness={self.staleness} with {type(engine).__name__}"
        if not engine.generates_elsewhere:
            raise ValueError(
                f"{told}, which generates in the training process: use an engine in another one, like "
                "RemoteRollout(engine='vllm')"
            )
        if engine.sleep_level:
            raise ValueError(f"{told}(sleep_level={engine.sleep_level}): it never sleeps, leave sleep_level out")

    @override
    def configure_model(self) -> None:
        kernel = None if self.attn_implementation == "auto" else self.attn_implementation
        if self.actor is None:
            # Without a trainer this is `load_from_checkpoint`. Adapters have names that no folder has to stream from.
            alone = self._trainer is None
            with contextlib.nullcontext() if alone else self.strategy.init_model_context(meta_init=self.lora is None):
                self.actor = load_model(
                    self._source, attn_implementation=kernel, quantization=self.quantization
                ).train()
        elif kernel:
            find_causal_lm(self.actor).set_attn_implementation(kernel)
        if self.lora is not None and not has_adapters(self.actor):  # a second fit calls this again
            self.actor = add_lora(self.actor, self.lora, self.seed)
        train_in_float32(self.actor)
        if self.critic_settings is not None and self.critic is None:
            self.critic = new_critic(self.critic_settings, self._source, self.actor)
            train_in_float32(self.critic)
        # Under adapters not the model without them: they may start anywhere, and their base weights change (PiSSA).
        if self.kl_coef and self.reference is None and not has_adapters(self.actor):
            self.reference = copy.deepcopy(self.actor).requires_grad_(False).eval()
        if self._trainer is None:  # `load_from_checkpoint`, before other weights come in
            self._keep_start()
        for model in (self.actor, None if self._shares_trunk else self.critic):
            if self.gradient_checkpointing and model is not None:
                checkpoint_activations(model)
            if self.compile_layers and model is not None:
                compile_layers(model)
        if self._trainer is not None and not self.reward_models:
            self.reward_models.extend(model.load() for model in self.rewards.models)

    @override
    def configure_optimizers(self) -> Any:
        settings, steps = self.critic_settings, self.epochs_per_rollout * self.steps_per_epoch
        alone = 0 if settings is None else settings.warmup_iterations
        trained = [with_lr_schedule(self, self.actor, self, steps, alone)]
        if settings is not None:
            trained.append(with_lr_schedule(self, self.critic, settings, steps))
        return trained

    @override
    def on_fit_start(self) -> None:
        check_optimizers(self.trainer, 1 + (self.critic is not None))
        self._given = given(self)
        check_checkpoints(self.trainer, self.actor)  # type: ignore[arg-type]
        self._keep_start()
        prompts = getattr(self.trainer.datamodule, "train_prompts", None)  # type: ignore[attr-defined]
        longest = max((len(p.token_ids) for p in prompts or ()), default=0) + self.sampling.max_new_tokens
        self._check_lengths(prompts or ())
        self._say_what_is_off()
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        for name in ("train", "val"):
            check_data_ids(name, getattr(data, f"{name}_prompts", None) or (), self.actor, self.tokenizer)
        tell_ignored_outputs(self.actor)  # type: ignore[arg-type]
        tell_monitors(self, bool(getattr(data, "val_prompts", None)) or data is None)
        self.rewards.check_data(prompts or ())
        self._rollout_is_proven = not self.check_numerics
        self._prove_layout(longest)

    def _check_lengths(self, prompts: Sequence[Prompt]) -> None:
        """Refuse prompts that are too long together with what may be sampled for them."""
        of_model = length_limits(self.actor.config)  # type: ignore[union-attr]
        of_training = {"token_budget": self.token_budget, "max_length": self.max_length, **of_model}
        validated = getattr(self.trainer.datamodule, "val_prompts", None) or ()  # type: ignore[attr-defined]
        if isinstance(validated, Mapping):
            validated = [prompt for of_one in validated.values() for prompt in of_one]
        for what, texts, sampling, limits in (
            ("", prompts, self.sampling, of_training),
            ("val_sampling.", validated, self.val_sampling, of_model),
        ):
            longest = max((len(p.token_ids) for p in texts), default=0) + sampling.max_new_tokens
            for name, limit in limits.items():
                if limit is not None and longest > limit and (texts or not what):
                    raise ValueError(
                        f"the longest prompt and {what}max_new_tokens={sampling.max_new_tokens} make {longest} tokens, "
                        f"{name} is {limit}: shorten the prompts (max_prompt_length) or the completions"
                        + (", or raise token_budget" if name == "token_budget" else "")
                    )

    # ---------------------------------------------------------------- checkpoints

    @classmethod
    @override
    def load_from_checkpoint(cls, checkpoint_path: Any, *args: Any, **kwargs: Any) -> RLHFModule:  # type: ignore[override]
        """As Lightning's, also for the folders that this package's strategies write; in one process.

        Of the rewards and environments that the checkpoint names, registered ones are built. Any other name in it is an
        error, unless it is passed here, like ``rewards="file.py:mine"``, or with ``weights_only=False``, which lets the
        checkpoint run any code.

        Raises:
            ValueError: such a name.
        """
        return load_module(cls, checkpoint_path, *args, **kwargs)

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        moments = self.reward_moments.state_dict()
        checkpoint["lightrft"] = {"iteration": self.iteration, "kl_coef": self.kl_coef, "reward_moments": moments}
        checkpoint[SETTINGS] = self._given
        if self.start is not None:
            checkpoint[_START] = self.start
        self.finish_sampling()
        if self._sampled_ahead is not None:
            state = sampled_state(self._sampled_ahead, self.strategy.gather_objects)
            checkpoint["lightrft"]["sampled_ahead"] = state

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        state = checkpoint.get("lightrft")
        if state is None:
            raise ValueError("this checkpoint was not written by RLHFModule: it holds no iteration count")
        self.iteration = state["iteration"]
        let_given_win(self, self._given, checkpoint)
        adapted = checkpoint.get(self.CHECKPOINT_HYPER_PARAMS_KEY, {}).get("kl_target", 0) is not None
        if self.kl_target is not None and adapted and "kl_coef" in state:
            self.kl_coef = state["kl_coef"]
            rank_zero_info(f"kl_coef goes on at {self.kl_coef:.4g}, as kl_target has adapted it")
        if self.kl_coef and _START in checkpoint:
            self.start = {name: checkpoint[_START][name] for name in checkpoint[_START]}
        if "reward_moments" in state:
            self.reward_moments.load_state_dict(state["reward_moments"])
        if self.staleness and "sampled_ahead" in state and self._trainer is not None:
            ranks = self.trainer.world_size
            self._sampled_ahead = sampled_from_state(state["sampled_ahead"], self.trainer.global_rank, ranks)

    # ---------------------------------------------------------------- settings and logs

    @classmethod
    def from_config(cls, config: StrategyConfig, model: Any, rewards: Any = None, **settings: Any) -> RLHFModule:
        """Build from LightRFT's fields and flags (docs/from_lightrft.md); `settings` are further arguments and win.

        With `remote_rm_url` (several are separated by commas) the rewards come from there. As LightRFT does, the loss
        is the mean over completions of their means over tokens, and rates fall to a tenth along a cosine.

        Raises:
            ValueError: a field asks for something that this release does not have, or there are rewards of two kinds.
        """
        if config.remote_rm_url:
            if rewards is not None:
                raise ValueError(f"remote_rm_url={config.remote_rm_url!r} and rewards={rewards!r}: give one of them")
            rewards = {"name": "remote", "url": [url.strip() for url in config.remote_rm_url.split(",")]}
        config.tell_unread()
        if config.pretrain_data is not None:
            raise ValueError(
                f"pretrain_data={config.pretrain_data!r}: no texts are mixed into the steps; SupervisedWarmup trains "
                "on them before. Leave it out"
            )
        if config.advantage_estimator != "gae" and not config.is_of_a_script:  # whose parsers fill these in
            for name in ("critic_pretrain", "critic_learning_rate"):
                if getattr(config, name) != type(config).__dataclass_fields__[name].default:
                    raise ValueError(f"{name}={getattr(config, name)!r}: {lightrft_flags.NO_CRITIC}")
        flags, estimator = config.extra_args, config.advantage_estimator
        more = lightrft_flags.module_settings(flags, estimator, config.use_kl_loss, settings.get("kl_coef"))
        if "algorithm" in settings:  # which says these itself
            more = {k: v for k, v in more.items() if k not in ("aggregation", "policy_loss", "policy_loss_options")}
        given = settings.pop("sampling", None)
        sampling = _as_sampling(lightrft_flags.sampling_settings(flags) if given is None else given)
        values = {
            **more,
            "sampling": dataclasses.replace(sampling, n=config.n_samples_per_prompt),
            "advantage_estimator": config.advantage_estimator,
            "kl_estimator": config.kl_estimator,
            "dynamic_sampling": config.dynamic_sampling or None,
            "overlong_buffer": config.overlong_buffer_len if config.overlong_buffer else 0,
            "overlong_factor": config.overlong_buffer_penalty_factor,
            "reward_norm": _reward_norm(config),
            "reward_clip": config.reward_clip,
            "advantage_norm": config.advantages_norm,
            "advantage_clip": config.advantage_clip,
            "lr": config.actor_learning_rate,
            "weight_decay": config.l2,
            "lr_schedule": "cosine_with_min_lr",
            "warmup_ratio": config.lr_warmup_ratio,
            "seed": config.seed,
        }
        if config.advantage_estimator == "gae":
            learnt = lightrft_flags.critic_settings(flags)
            values["critic"] = Critic(
                model=config.critic_pretrain,
                lr=config.critic_learning_rate,
                weight_decay=config.l2,
                lr_schedule="cosine_with_min_lr",
                warmup_ratio=config.lr_warmup_ratio,
                **learnt,
            )
        return cls(model, rewards, **{**values, **settings})

    def _evaluation_sampling(self, batch_idx: int, dataloader_idx: int = 0) -> SamplingParams:
        """The same draws at every evaluation, so that two of them differ by their weights alone."""
        seed = derive_seed(self.seed, self.val_sampling.seed, batch_idx, dataloader_idx)
        return dataclasses.replace(self.val_sampling, seed=seed)

    def _iteration_sampling(self, iteration: int) -> SamplingParams:
        seed = derive_seed(self.seed, self.sampling.seed, iteration, 0)
        return dataclasses.replace(self.sampling, seed=seed)

    def _log_iteration(
        self,
        sampled: Sampled,
        usable: Sequence[Trajectory],
        update: Mapping[str, float],
        seconds: Mapping[str, float],
    ) -> None:
        samples = self._gather_samples(sampled.trajectories)
        tokens = sum(s.length for s in samples)
        counts = {
            "failed_rewards": sampled.report.failed,
            "inapplicable_rewards": sampled.report.inapplicable,
            "groups_with_signal": len({t.group for t in usable if any(t.advantages)}),
        }
        train = {
            **update,
            **reward_metrics(samples),
            **{name: float(count) for name, count in self.strategy.all_reduce(counts, op="sum").items()},
            "policy_version": float(self.rollout_engine.version),
            "skipped_steps": float(self.strategy.skipped_steps.get("actor", 0)),
        }
        if self.staleness:
            versions = [t.policy_version for t in sampled.trajectories]
            behind = {"sum": sum(self.rollout_engine.version - v for v in versions), "count": len(versions)}
            everywhere = self.strategy.all_reduce(behind, op="sum")
            train["staleness"] = float(everywhere["sum"]) / max(float(everywhere["count"]), 1.0)
        if self.dynamic_sampling:
            train["resampled_groups"] = float(sampled.resampled)
        if self.reward_norm != "none":
            moments = self.reward_moments
            train |= {"reward_running_mean": moments.mean, "reward_running_std": moments.std}
        norms = self.strategy.grad_norms if update else {}
        named = {"actor": "grad_norm", "critic": "critic_grad_norm"}
        train |= {named[model]: norm for model, norm in norms.items()}
        iteration = seconds["iteration"]
        timing = {k: v for k, v in seconds.items() if k != "iteration"} | {"tokens_per_second": tokens / iteration}
        values = {f"train/{k}": v for k, v in train.items()} | {f"time/{k}": v for k, v in timing.items()}
        self.log_dict(values, on_step=True, on_epoch=False, batch_size=len(samples))


def _reward_norm(config: StrategyConfig) -> str:
    if not config.reward_running_norm:
        return "none"
    return "full" if config.reward_running_norm_minus_mean else "scale"


def _as_sampling(value: SamplingParams | Mapping[str, Any]) -> SamplingParams:
    return value if isinstance(value, SamplingParams) else SamplingParams(**value)


_START = "lightrft_start"
"""In a checkpoint: the starting values of what is trained under adapters, for the KL penalty of a run that goes on."""

_FROZEN = ("reference", "reward_models")
"""Parts of the module that come from their sources, so that checkpoints need not hold them."""


def _drop_frozen(module: RLHFModule, state_dict: dict[str, Any], prefix: str, local_metadata: Any) -> None:
    for name in [n for n in state_dict if n.startswith(tuple(f"{prefix}{part}." for part in _FROZEN))]:
        del state_dict[name]


def _add_frozen(module: RLHFModule, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
    for part in _FROZEN:
        frozen = getattr(module, part)
        if frozen is not None:
            state_dict.update({f"{prefix}{part}.{name}": value for name, value in frozen.state_dict().items()})
