"""What `RLHFModule` does with trajectories that have their rewards: advantages, and optimizer steps."""

from __future__ import annotations

import contextlib
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn

from lightrft_lightning import algorithms
from lightrft_lightning._sampling import Sampled
from lightrft_lightning._seeds import derive_seed
from lightrft_lightning._settings import Settings
from lightrft_lightning.algorithms.advantages import global_moments
from lightrft_lightning.critic import critic_values
from lightrft_lightning.experience.balance import (
    by_group,
    deal,
    exchanged,
    flops,
    for_sending,
    rank_loads,
    row_lengths,
)
from lightrft_lightning.experience.packing import PackedBatch, pack, unpack
from lightrft_lightning.experience.trajectory import Trajectory
from lightrft_lightning.metrics import combine_passes, mean_over_steps
from lightrft_lightning.models.attention import use_kernel
from lightrft_lightning.models.layers import evaluating, randomness
from lightrft_lightning.models.logprobs import (
    completion_logprobs,
    find_causal_lm,
    pretrained_part,
    shared_prompt_problem,
)
from lightrft_lightning.models.proof import least_exact, proof_of_run, some_of, untouched

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)

_NOTHING_TO_LEARN = ", so there is nothing to learn from and no update"


class Update(Settings):
    """Learns from the trajectories of one iteration. All ranks go through it together."""

    actor: PreTrainedModel | None
    """The policy."""
    reference: PreTrainedModel | None
    """The starting policy, if there is a KL penalty and no adapter."""
    start: dict[str, Tensor] | None
    """With adapters: what is trained as it was at the start, in CPU memory."""
    critic: nn.Module | None
    """A `load_scalar_model`, or a linear head if the critic shares the policy's trunk."""
    reward_moments: algorithms.RunningMoments
    iteration: int
    """How many are done."""
    rollout_engine: Any
    """The Trainer's rollout callback."""
    _rollout_is_proven: bool
    last_trajectories: list[Trajectory]
    """What the latest rollout produced, for callbacks that show it."""

    def _evaluating(self) -> contextlib.AbstractContextManager[None]:
        """All passes of an update: with dropout the ratios would compare two networks, neither that which sampled."""
        return evaluating(*(m for m in (self.actor, self.reference, self.critic) if m is not None), recompute=True)

    def estimate_advantages(self, trajectories: Sequence[Trajectory]) -> list[Trajectory]:
        """Fill in the advantages; returns the trajectories that can be learnt from, in order. All ranks together.

        Left out are samples whose reward failed, and, by estimators that compare the samples of a prompt, groups that
        have fewer than two samples then.
        """
        usable = [t for t in trajectories if t.reward is not None]
        if self._compares_groups:
            members = Counter(t.group for t in usable)
            usable = [t for t in usable if members[t.group] >= 2]
        sum_over_ranks = partial(self.strategy.all_reduce, op="sum")
        rewards = self._shaped_rewards(usable, sum_over_ranks)
        token_rewards = None
        with self._evaluating():
            if self.kl_coef and self.kl_in == "reward":
                self._score(usable)
                token_rewards = _padded([-self.kl_coef * self._kl_of(t) for t in usable])
            if self.critic_settings is not None:
                self._fill(usable, ("values",), lambda batch: (self._values(batch),))
        mask = _padded([torch.tensor(t.mask) for t in usable])
        result = algorithms.advantages(
            self.advantage_estimator,
            rewards,
            group_ids=torch.tensor([t.group for t in usable], dtype=torch.long),
            mask=mask,
            values=_padded([t.values for t in usable if t.values is not None]) if self.critic_settings else None,
            token_rewards=token_rewards,
            sum_over_ranks=sum_over_ranks,
            **self.advantage_options,
        )
        values = result.advantages
        if self.advantage_norm:
            values = algorithms.whitened(values, mask.bool(), sum_over_ranks)
        if self.advantage_clip > 0:
            values = values.clamp(-self.advantage_clip, self.advantage_clip)
        for i, (t, row) in enumerate(zip(usable, values.tolist(), strict=True)):
            t.advantages = tuple(row[: len(t.mask)])
            t.returns = None if result.returns is None else result.returns[i, : len(t.mask)].float()
        return usable

    def _shaped_rewards(self, trajectories: Sequence[Trajectory], sum_over_ranks: Callable[[Tensor], Tensor]) -> Tensor:
        """``[B]`` rewards as the advantages are computed from; `Trajectory.reward` stays as it is."""
        rewards = torch.tensor([t.reward for t in trajectories], dtype=torch.float64)
        if self.overlong_buffer:
            lengths = torch.tensor([sum(t.mask) for t in trajectories])
            limit = self.sampling.max_new_tokens
            penalties = algorithms.overlong_penalty(lengths, limit, self.overlong_buffer, self.overlong_factor)
            for t, penalty in zip(trajectories, penalties.tolist(), strict=True):
                t.reward_parts["overlong"] = penalty
            rewards = rewards + penalties
        if self.reward_norm != "none":
            self.reward_moments.update(rewards, sum_over_ranks)
            rewards = self.reward_moments.normalised(rewards, minus_mean=self.reward_norm == "full")
        return rewards.clamp(-self.reward_clip, self.reward_clip) if self.reward_clip > 0 else rewards

    def update(self, trajectories: list[Trajectory]) -> dict[str, float]:
        """The optimizer steps of one iteration; returns the mean of each metric over them.

        Every rank makes the same number of passes, whatever its share of the samples, because the passes of sharded
        models wait for one another.
        """
        self._warn_if_nothing_to_learn(trajectories)
        with self._evaluating():
            if self.kl_in == "loss" or not self.kl_coef:
                self._score(trajectories)
            metrics = mean_over_steps(
                [self._train_on(minibatch) | busy for minibatch, busy in self._minibatches(trajectories)]
            )
        if self.critic_settings is not None:
            metrics["explained_variance"] = self._explained_variance(trajectories)
        if self.kl_target is not None and "kl" in metrics:
            samples = int(self.strategy.all_reduce(len(trajectories), op="sum"))
            metrics["kl_coef"] = self.kl_coef
            self.kl_coef = algorithms.adapted_kl_coef(
                self.kl_coef, metrics["kl"], self.kl_target, samples, self.kl_horizon
            )
        return metrics

    def _score(self, trajectories: list[Trajectory]) -> None:
        """Fill in the log-probabilities before the update and under the reference, where they are needed."""
        # With a single step the first pass itself gives the former: the weights are still the same.
        several_steps, selects = self.epochs_per_rollout * self.steps_per_epoch > 1, self.high_entropy_share < 1
        if several_steps or selects or (self.kl_coef and self.kl_in == "reward"):
            self._fill(
                trajectories, ("old_logprobs", "entropies")[: 1 + selects], partial(self._logprobs, self.actor, selects)
            )
        if self.kl_coef:
            with self._reference_policy() as policy:
                self._fill(trajectories, ("reference_logprobs",), partial(self._logprobs, policy, False))

    def _logprobs(self, policy: Any, entropy: bool, batch: PackedBatch) -> tuple[Tensor, ...]:
        """``[N]`` log-probabilities of a batch under `policy`, and by choice the entropies."""
        scored = completion_logprobs(policy, batch, self._temperature(batch), entropy=entropy)
        return (scored.logprobs,) if scored.entropy is None else (scored.logprobs, scored.entropy)

    def _kl_of(self, t: Trajectory) -> Tensor:
        """``[T]`` the estimated KL at each token, before the update."""
        assert t.old_logprobs is not None and t.reference_logprobs is not None
        return algorithms.kl_penalty(self.kl_estimator, t.old_logprobs, t.reference_logprobs)

    def _train_on(self, minibatch: list[Trajectory]) -> dict[str, float]:
        """One optimizer step of the policy and one of the critic over this rank's `minibatch`."""
        totals = self._totals(minibatch)
        metrics: dict[str, float] = {}
        settings = self.critic_settings
        alone = settings is not None and self.iteration < settings.warmup_iterations
        if settings is not None and (alone or not settings.share_trunk):
            metrics |= self._critic_step(minibatch, totals)
        return metrics if alone else metrics | self._optimizer_step(minibatch, totals)

    def _optimizer_step(self, minibatch: list[Trajectory], totals: algorithms.BatchTotals) -> dict[str, float]:
        """One optimizer step of the policy, in as many passes as the token budget asks for."""
        threshold = self._entropy_threshold(minibatch)
        names = ("actor", "critic") if self._shares_trunk else ("actor",)
        # A sample whose advantage is 0 has no gradient unless another term gives it one. It still counts in the mean.
        in_loss = self.kl_coef and self.kl_in == "loss"
        used = [t for t in minibatch if in_loss or self._shares_trunk or any(t.advantages)]
        batches = self._pack(used)
        needed = self._most(len(batches))
        passes = []
        for batch in batches:
            scored = completion_logprobs(self.actor, batch, self._temperature(batch), hidden=self._shares_trunk)  # type: ignore[arg-type]
            logprobs = scored.logprobs
            old = [t.old_logprobs for t in used if t.old_logprobs is not None]
            at_sampling = batch.pack_values(old) if old else logprobs.detach()
            sampled = batch.pack_values([t.completion.logprobs for t in used])
            weights = self._correct(at_sampling, sampled, batch.trajectory)
            if threshold is not None:
                selected = batch.pack_values([t.entropies for t in used if t.entropies is not None]) >= threshold
                weights = selected.to(logprobs.dtype) * (1.0 if weights is None else weights)
            loss, metrics = algorithms.policy_loss(
                self.policy_loss,
                logprobs,
                at_sampling,
                batch.pack_values([t.advantages for t in used]),
                torch.ones_like(logprobs),
                aggregation=self.aggregation,
                sequence=batch.trajectory,
                totals=totals,
                weights=weights,
                **self.policy_loss_options,
            )
            reference = [t.reference_logprobs for t in used if t.reference_logprobs is not None]
            if reference:
                kl = algorithms.kl_penalty(
                    self.kl_estimator,
                    logprobs,
                    batch.pack_values(reference),
                    unbiased_gradient=self.kl_unbiased_gradient,
                )
                shares = algorithms.aggregation_weights(self.aggregation, batch.trajectory, totals)
                if in_loss:
                    loss = loss + self.kl_coef * (kl * shares).sum()
                metrics["kl"] = (kl.detach() * shares).sum()
            if self._shares_trunk:
                fit = self._value_loss(critic_values(self.critic, batch, scored.hidden), batch, used, totals)
                loss = loss + self.critic_settings.value_coef * fit.loss  # type: ignore[union-attr]
                metrics |= {"value_loss": fit.loss.detach(), **fit.metrics}
            metrics |= algorithms.mismatch_metrics(at_sampling, sampled)
            if weights is not None:
                metrics |= {"weight_mean": weights.mean(), "weight_zero": (weights == 0).double().mean()}
            self._step(loss, needed, *names)
            values = {"loss": float(loss.detach()), **{k: float(v) for k, v in metrics.items()}}
            passes.append((logprobs.numel(), values))
        for _ in range(needed - len(batches)):
            batch = self._idle_batch()
            idle = completion_logprobs(self.actor, batch, self._temperature(batch), hidden=self._shares_trunk)  # type: ignore[arg-type]
            loss = 0 * idle.logprobs.sum()
            if self._shares_trunk:
                loss = loss + 0 * critic_values(self.critic, batch, idle.hidden).sum()
            self._step(loss, needed, *names)
        return self._combined(passes)

    def _critic_step(self, minibatch: list[Trajectory], totals: algorithms.BatchTotals) -> dict[str, float]:
        """One optimizer step of the critic alone; a trunk that it shares stays as it is."""
        batches, passes = self._pack(minibatch), []
        needed = self._most(len(batches))
        for batch in batches:
            fit = self._value_loss(self._values(batch), batch, minibatch, totals)
            self._step(fit.loss, needed, "critic")
            values = {"value_loss": fit.loss.detach(), **fit.metrics}
            passes.append((batch.num_policy_tokens, {k: float(v) for k, v in values.items()}))
        for _ in range(needed - len(batches)):
            self._step(0 * self._values(self._idle_batch()).sum(), needed, "critic")
        return self._combined(passes)

    def _value_loss(
        self, values: Tensor, batch: PackedBatch, trajectories: Sequence[Trajectory], totals: algorithms.BatchTotals
    ) -> algorithms.PolicyLoss:
        assert self.critic_settings is not None
        return algorithms.value_loss(
            values,
            batch.pack_values([t.values for t in trajectories if t.values is not None]),
            batch.pack_values([t.returns for t in trajectories if t.returns is not None]),
            torch.ones_like(values),
            clip=self.critic_settings.value_clip,
            aggregation=self.aggregation,
            sequence=batch.trajectory,
            totals=totals,
        )

    def _temperature(self, batch: PackedBatch) -> float | Tensor:
        """What the policy tokens of `batch` were drawn at."""
        return self._temperature_at(batch.position)

    def _temperature_at(self, place: Tensor) -> float | Tensor:
        """What tokens at these places of their completions are drawn at."""
        if self.first_token_temperature is None:
            return self.sampling.temperature
        return torch.where(place == 0, self.first_token_temperature, self.sampling.temperature)

    def _values(self, batch: PackedBatch) -> Tensor:
        """``[N]`` what the critic says; no gradient goes into a trunk that it shares."""
        hidden = None
        if self._shares_trunk:
            with torch.no_grad():
                hidden = completion_logprobs(self.actor, batch, self._temperature(batch), hidden=True).hidden  # type: ignore[arg-type]
        return critic_values(self.critic, batch, hidden)

    def _explained_variance(self, trajectories: Sequence[Trajectory]) -> float:
        """Share of the returns' variance over the tokens of all ranks that the values before the update explain."""
        rows = [(t.returns, t.returns - t.values, torch.tensor(t.mask)) for t in trajectories if t.returns is not None]  # type: ignore[operator]
        total, rest = (
            global_moments(
                torch.cat([torch.zeros(0), *(row[k] for row in rows)]),
                torch.cat([torch.zeros(0, dtype=torch.bool), *(row[2] for row in rows)]),
                partial(self.strategy.all_reduce, op="sum"),
            )[1]
            for k in (0, 1)
        )
        return 1 - float(rest / total) ** 2 if total else float("nan")

    def _combined(self, passes: Sequence[tuple[int, Mapping[str, float]]]) -> dict[str, float]:
        return combine_passes([p for rank in self.strategy.gather_objects(passes) for p in rank])

    def _entropy_threshold(self, minibatch: Sequence[Trajectory]) -> float | None:
        """Entropy from which on tokens of this optimizer step are learnt from; None: all of them."""
        if self.high_entropy_share == 1:
            return None
        mine = [t.entropies[torch.tensor(t.mask)].cpu() for t in minibatch if t.entropies is not None]
        everywhere = self.strategy.gather_objects(torch.cat(mine) if mine else torch.zeros(0))
        return algorithms.entropy_threshold(torch.cat(everywhere), self.high_entropy_share)

    def _correct(self, trainer_logprobs: Tensor, engine_logprobs: Tensor, sequence: Tensor) -> Tensor | None:
        if self.correction == "none":
            return None
        return algorithms.importance_weights(
            self.correction, trainer_logprobs, engine_logprobs, sequence=sequence, **self.correction_options
        )

    def _step(self, loss: Tensor, passes: int, *names: str) -> None:
        """Back-propagate through the models `names`; the strategy steps them at the last of `passes`.

        `loss` is a share of the sum over all passes and ranks, not a mean.
        """
        strategy = self.strategy
        (model, optimizer), *further = ((getattr(self, name), self._optimizer_of(name)) for name in names)
        share = loss * passes * strategy.world_size
        strategy.backward(share, model, optimizer, accumulation_steps=passes, further=further)
        for name in names:
            optimizer = self._optimizer_of(name)
            scheduler = self._scheduler_of(optimizer)
            strategy.optimizer_step(optimizer, getattr(self, name), scheduler, name, accumulation_steps=passes)

    def _optimizer_of(self, name: str) -> Any:
        # Lightning's wrapper counts the Trainer's steps, which are the policy's.
        return self.strategy._lightning_optimizers[0] if name == "actor" else self.trainer.optimizers[1]

    def _scheduler_of(self, optimizer: Any) -> Any:
        raw = getattr(optimizer, "optimizer", optimizer)
        schedulers = [config.scheduler for config in self.trainer.lr_scheduler_configs]
        return next((s for s in schedulers if s.optimizer is raw), None)

    # ---------------------------------------------------------------- proofs

    def _say_what_is_off(self) -> None:
        found: dict[str, float] = {}
        for model in (self.actor, self.critic):
            found |= {} if model is None else randomness(model)
        if found:
            names = ", ".join(f"{name}={strength:g}" for name, strength in found.items())
            rank_zero_info(
                f"{names}: off in reinforcement learning, whose ratios and KL compare one network with itself "
                "(on in SFTModule)"
            )

    def _prove_layout(self, longest: int) -> None:
        """Give the models a kernel under which they compute the right thing; see `models.proof`.

        All ranks together, once the strategy has prepared the models.

        Args:
            longest: tokens of a prompt with its completion, at most.

        Raises:
            ValueError: a model cannot take shared prompts.
            RuntimeError: what training would compute is wrong.
        """
        actor: Any = find_causal_lm(self.actor)  # type: ignore[arg-type]
        critic = None if self._shares_trunk else self.critic
        for model in (actor, critic) if self.share_prompts else ():
            problem = None if model is None else shared_prompt_problem(model, self.token_budget)
            if problem is not None:
                raise ValueError(f"{problem}; set share_prompts=False")
        prompts = [p.token_ids for p in getattr(self.trainer.datamodule, "train_prompts", None) or ()]  # type: ignore[attr-defined]
        proof = proof_of_run(self, actor, prompts, longest, self.sampling.max_new_tokens, self._temperature_at)
        named = None if self.attn_implementation == "auto" else self.attn_implementation
        kernel = proof.settle(self.actor, "the policy", named)
        for model, what in ((self.reference, "the reference model"), (critic, "the critic")):
            same = model is not None and pretrained_part(model).config.model_type == actor.config.model_type
            if same and what == "the reference model":
                use_kernel(model, kernel)  # a copy of the policy
            elif model is not None:
                proof.settle(model, what, prefer=kernel if same else None)
        for model in self.reward_models:  # type: ignore[union-attr]
            its_own = proof_of_run(self, model, (), longest, self.sampling.max_new_tokens)  # and its own tokens
            replace(its_own, share_prompts=False).settle(model, "the reward model")

    def _prove_rollout(self, sampled: Sampled) -> None:
        """Compare the first rollout's log-probabilities with the trainer's, of some of its samples. All ranks together.

        Raises:
            DriftError: they are too far apart, on any rank.
        """
        # What was sampled before an optimizer step differs as it should; then a later rollout is compared, if any.
        if self._rollout_is_proven or sampled.optimizer_steps != self.strategy.optimizer_steps:
            return
        self._rollout_is_proven = True
        some = [replace(t) for t in some_of(sampled.trajectories, self.device)]
        with untouched(self.actor):
            self._fill(some, ("old_logprobs",), partial(self._logprobs, self.actor, False))
        self.rollout_engine.check_first_samples(some, least_exact(self.actor, self.strategy))

    # ---------------------------------------------------------------- parts of the update

    def _warn_if_nothing_to_learn(self, trajectories: Sequence[Trajectory]) -> None:
        usable, signal = self._most(len(trajectories)), self._most(sum(any(t.advantages) for t in trajectories))
        if not usable:
            log.warning("iteration %d: no group has two scored completions%s", self.iteration + 1, _NOTHING_TO_LEARN)
        elif not signal:
            log.warning("iteration %d: all rewards of each group are equal%s", self.iteration + 1, _NOTHING_TO_LEARN)

    def _most(self, count: int) -> int:
        """The largest `count` of any rank."""
        return int(self.strategy.all_reduce(count, op="max"))

    def _pack(self, trajectories: Sequence[Trajectory]) -> list[PackedBatch]:
        return [b.to(self.device) for b in pack(trajectories, self.token_budget, share_prompts=self.share_prompts)]

    def _idle_batch(self) -> PackedBatch:
        """Something small for a pass that only keeps other ranks company."""
        shortest = min(self.last_trajectories, key=lambda t: len(t.prompt.token_ids) + len(t.completion.token_ids))
        return self._pack([shortest])[0]

    def _totals(self, minibatch: Sequence[Trajectory]) -> algorithms.BatchTotals:
        """Sizes of the whole optimizer step over all ranks, which its loss is divided by."""
        tokens = self.strategy.all_reduce(sum(sum(t.mask) for t in minibatch), op="sum")
        sequences = self.strategy.all_reduce(len(minibatch), op="sum")
        return algorithms.BatchTotals(int(tokens), int(sequences), self.sampling.max_new_tokens)

    def _minibatches(self, trajectories: Sequence[Trajectory]) -> Iterator[tuple[list[Trajectory], dict[str, float]]]:
        """What this rank learns from in each optimizer step, and the metric ``balance``.

        A step has whole groups, of all ranks, in a new order every epoch; they are dealt out so that all ranks have
        about the same work, whoever sampled them.
        """
        groups = by_group(trajectories)
        costs, holders = self._costs({g: [t for t in group if self._needs_pass(t)] for g, group in groups.items()})
        everywhere, ranks = sorted(costs), self.strategy.world_size
        steps = min(self.steps_per_epoch, len(everywhere))
        for epoch in range(self.epochs_per_rollout):
            generator = torch.Generator().manual_seed(derive_seed(self.seed, self.iteration, epoch))
            order = torch.randperm(len(everywhere), generator=generator).tolist()
            for step in range(steps):
                chosen = {everywhere[k]: costs[everywhere[k]] for k in order[step::steps]}
                receivers = deal(chosen, holders, ranks)
                loads = rank_loads(chosen, receivers, ranks)
                busy = {"balance": max(loads) * ranks / sum(loads)} if ranks > 1 and any(loads) else {}
                here = {group: groups[group] for group in chosen if group in groups}
                yield [t for group in self._sent(here, receivers).values() for t in group], busy

    def _costs(self, groups: Mapping[int, Sequence[Trajectory]]) -> tuple[dict[int, int], dict[int, int]]:
        """Predicted work and rank of every group of all ranks."""
        actor: Any = self.actor
        config = actor.config.get_text_config()
        # ZeRO-3 leaves a parameter empty where it is not in use.
        parameters = sum(getattr(p, "ds_numel", p.numel()) for p in actor.parameters())
        width = config.num_hidden_layers * config.hidden_size
        costs = {g: flops(row_lengths(group, self.share_prompts), parameters, width) for g, group in groups.items()}
        ranks = self.strategy.gather_objects(costs)
        everywhere = {group: cost for of_rank in ranks for group, cost in of_rank.items()}
        return everywhere, {group: rank for rank, of_rank in enumerate(ranks) for group in of_rank}

    def _sent(
        self, groups: Mapping[int, list[Trajectory]], receivers: Mapping[int, int]
    ) -> Mapping[int, list[Trajectory]]:
        """The groups that this rank has once each is where it is to be; what stays is not copied."""
        if self.strategy.world_size == 1:
            return groups
        here = self.strategy.global_rank
        copies = {g: group if receivers[g] == here else [for_sending(t) for t in group] for g, group in groups.items()}
        return exchanged(copies, receivers, self.strategy)

    def _needs_pass(self, t: Trajectory) -> bool:
        """Whether an optimizer step computes `t`; it counts in the mean in any case."""
        return bool(self.critic_settings is not None or (self.kl_coef and self.kl_in == "loss") or any(t.advantages))

    @torch.no_grad()
    def _fill(
        self,
        trajectories: Sequence[Trajectory],
        names: Sequence[str],
        score: Callable[[PackedBatch], tuple[Tensor, ...]],
    ) -> None:
        """Fill these attributes in with what `score` gives for the policy tokens. All ranks share the work."""
        groups, ranks, here = by_group(trajectories), self.strategy.world_size, self.strategy.global_rank
        costs, holders = self._costs(groups)
        sent = self._sent(groups, deal(costs, holders, ranks))
        members = [t for group in sent.values() for t in group]
        batches = self._pack(members)
        company = [self._idle_batch() for _ in range(self._most(len(batches)) - len(batches))]
        scored = [score(batch) for batch in [*batches, *company]][: len(batches)]
        columns = [unpack(batches, [values[k] for values in scored], members) for k in range(len(names))]
        rows = iter(zip(*columns, strict=True))
        found = {
            # Rows are views of all values of the rollout, which pickle would send along.
            group: [tuple(v.to("cpu", copy=holders[group] != here) for v in next(rows)) for _ in its]
            for group, its in sent.items()
        }
        if ranks > 1:
            found = exchanged(found, holders, self.strategy)
        for group, its in groups.items():
            for t, row in zip(its, found[group], strict=True):
                for name, values in zip(names, row, strict=True):
                    setattr(t, name, values)

    def _keep_start(self) -> None:
        """Under adapters, what is trained as it is now. All ranks together: a back end may have made them equal."""
        actor: Any = self.actor
        if not self.kl_coef or self.reference is not None or self.start is not None:
            return
        trained = {name for name, p in actor.named_parameters() if p.requires_grad}
        whole = actor.named_parameters() if self._trainer is None else self.strategy.named_full_tensors(actor, trained)
        self.start = {name: value.detach().to("cpu", copy=True) for name, value in whole if name in trained}

    @contextlib.contextmanager
    def _reference_policy(self) -> Iterator[Any]:
        if self.reference is not None:
            yield self.reference
            return
        actor, values = self.actor, self.start
        assert actor is not None and values is not None
        trained = {name for name, p in actor.named_parameters() if p.requires_grad}
        if changed := sorted(trained ^ values.keys()):
            now = "now" if changed[0] in trained else "no longer"
            raise RuntimeError(
                f"kl_coef={self.kl_coef}: {changed[0]} is {now} trained, so the starting policy is not known: "
                "leave what is trained as it was at the start of the fit"
            )
        with self.strategy.replaced_weights(actor, values):
            yield actor


def _padded(rows: Sequence[Tensor]) -> Tensor:
    """``[B, T]`` rows of any length, with zeros behind."""
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True) if rows else torch.zeros(0, 1)
