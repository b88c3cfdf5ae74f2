"""Trajectories of several turns on a tiny model that generates for real."""

from __future__ import annotations

import asyncio
import logging
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from training import PROMPTS, Record, make_data, make_module, make_trainer, weights_of

from lightrft_lightning import Prompt, Rewards, RLHFModule, SamplingParams, Trajectory, TransformersRollout
from lightrft_lightning.environments import ENVIRONMENTS, Environment, Episodes, Observation
from lightrft_lightning.environments.episodes import _limits
from lightrft_lightning.experience.packing import pack, unpack
from lightrft_lightning.models.logprobs import completion_logprobs
from lightrft_lightning.models.tiny import char_tokenizer, tiny_llama

TOKENIZER = char_tokenizer()
MODEL = tiny_llama(seed=3, width=32, layers=2, max_length=128)
SAMPLING = SamplingParams(n=3, max_new_tokens=30, stop=("1", "2", "3", "4"), seed=5)
ROWS = [Prompt(tuple(TOKENIZER(row["prompt"])["input_ids"]), row["prompt"], row) for row in PROMPTS]


class Counts(Environment):
    """Says how long the turn was; ends when the policy writes a 4."""

    role = None

    def step(self, turn):
        return Observation(f"={len(turn.token_ids)}+", reward=1.0, done="4" in turn.text, error="0" in turn.text)


class Recorded(TransformersRollout):
    """Remembers what it was asked for and what it answered."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def generate(self, prompts, sampling, streams=None):
        result = super().generate(prompts, sampling, streams)
        self.calls.append(([list(p) for p in prompts], sampling, result))
        return result


def play(environment=Counts, prompts=ROWS[:6], numbers=None, sampling=SAMPLING, max_length=100, **settings):
    """The trajectories of these prompts, the first turn included, and the engine."""
    engine = Recorded()
    engine.connect(MODEL, TOKENIZER)
    numbers = range(len(prompts)) if numbers is None else numbers
    drawn = engine.generate([p.token_ids for p in prompts], sampling, numbers)
    groups = [[Trajectory(p, c, g) for c in group] for p, group, g in zip(prompts, drawn, numbers, strict=True)]
    episodes = Episodes(environment, **settings)
    finished = list(episodes.play(groups, engine, TOKENIZER, sampling, max_length, lambda value: [value]))
    assert sorted(map(id, finished)) == sorted(map(id, groups))
    return [t for group in groups for t in group], engine


def told(t):
    return t.prompt.text, t.completion.token_ids, t.mask, t.episode


# ------------------------------------------------------------------ what a trajectory is made of


def test_what_was_sampled_stays_as_it_is_and_what_the_environment_says_is_masked():
    trajectories, engine = play()
    assert len({len(t.episode.turns) for t in trajectories}) > 2
    of_prompt = {}  # whole sequence before a turn -> the turns that followed it
    for prompts, _, results in engine.calls:
        for prompt, group in zip(prompts, results, strict=True):
            of_prompt.setdefault(tuple(prompt), []).extend(group)
    for t in trajectories:
        ids, mask, logprobs = list(t.prompt.token_ids), [], []
        for k, text in enumerate(t.episode.turns):
            room = SAMPLING.max_new_tokens - sum(mask)
            cut = [(c.token_ids[:room], c.logprobs[:room]) for c in of_prompt[tuple(ids)]]
            turn, of_turn = next(c for c in cut if c[0] == t.completion.token_ids[len(mask) : len(mask) + len(c[0])])
            ids += turn
            mask += [True] * len(turn)
            logprobs += of_turn
            assert text == TOKENIZER.decode(turn, skip_special_tokens=True)
            if k + 1 < len(t.episode.turns):
                said = TOKENIZER(f"={len(turn)}+")["input_ids"]
                ids, mask, logprobs = ids + said, mask + [False] * len(said), logprobs + [0.0] * len(said)
        assert t.completion.token_ids == tuple(ids[len(t.prompt.token_ids) :])
        assert (t.mask, t.completion.logprobs) == (tuple(mask), tuple(logprobs))
        assert t.episode.reward == len(t.episode.turns)
        assert t.episode.errors == sum("0" in text for text in t.episode.turns)
        assert (t.completion.finish_reason == "length") != ("4" in t.episode.turns[-1])


def test_logprobs_of_policy_tokens_are_those_of_a_forward_over_the_whole_sequence():
    trajectories, _ = play()
    assert any(False in t.mask for t in trajectories)
    for share_prompts in (True, False):
        batches = pack(trajectories, 512, share_prompts=share_prompts)
        values = [completion_logprobs(MODEL, batch, 1.0).logprobs for batch in batches]
        for t, packed in zip(trajectories, unpack(batches, values, trajectories), strict=True):
            expected, mask = plain_logprobs(t), torch.tensor(t.mask)
            assert torch.allclose(packed[mask], expected[mask], atol=1e-5)
            assert torch.allclose(torch.tensor(t.completion.logprobs)[mask], expected[mask], atol=1e-4)


def test_masked_tokens_have_no_gradient():
    trajectories, _ = play()
    packed = sum(completion_logprobs(MODEL, batch, 1.0).logprobs.sum() for batch in pack(trajectories, 512))
    plain = sum(plain_logprobs(t)[torch.tensor(t.mask)].sum() for t in trajectories)
    whole = sum(plain_logprobs(t).sum() for t in trajectories)
    gradients = [torch.autograd.grad(loss, list(MODEL.parameters())) for loss in (packed, plain, whole)]
    for a, b in zip(*gradients[:2], strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-4)
    assert any(not torch.allclose(a, c, rtol=1e-2, atol=1e-2) for a, c in zip(gradients[0], gradients[2], strict=True))
    (batch,) = pack(trajectories[:1], 512)
    assert [trajectories[0].mask[k] for k in batch.position] == [True] * sum(trajectories[0].mask)


def plain_logprobs(t):
    ids = torch.tensor([[*t.prompt.token_ids, *t.completion.token_ids]])
    logits = MODEL(input_ids=ids).logits[0, len(t.prompt.token_ids) - 1 : -1]
    return logits.log_softmax(-1).gather(-1, ids[0, len(t.prompt.token_ids) :, None]).squeeze(-1)


def test_draws_depend_on_the_seed_and_the_number_of_the_prompt_alone():
    together, _ = play()
    again, _ = play()
    apart = [t for k in (4, 1, 0) for t in play(prompts=[ROWS[k]], numbers=[k])[0]]
    other, _ = play(sampling=SamplingParams(n=3, max_new_tokens=30, stop=SAMPLING.stop, seed=6))
    assert [told(t) for t in together] == [told(t) for t in again]
    assert [told(t) for t in apart] == [told(t) for k in (4, 1, 0) for t in together[3 * k : 3 * k + 3]]
    assert [told(t) for t in together] != [told(t) for t in other]


def test_tokens_may_be_given_in_place_of_text_and_nothing_may_be_said():
    class Says(Environment):
        def step(self, turn):
            return Observation("ignored", token_ids=(5, 2, 5)) if turn.number == 1 else Observation()

    trajectories, _ = play(Says, max_turns=3, prompts=ROWS[:2])
    several = [t for t in trajectories if len(t.episode.turns) > 1]
    assert several
    for t in several:
        assert [i for i, mine in zip(t.completion.token_ids, t.mask, strict=True) if not mine] == [5, 2, 5]


def test_the_trajectories_of_a_group_begin_with_the_same_seed():
    seeds = {}

    class Random(Environment):
        def reset(self, prompt, seed):
            seeds.setdefault(prompt.text, []).append(seed)

        def step(self, turn):
            return Observation(done=True)

    play(Random, ROWS[:4])
    assert all(len(of_group) == 3 and len(set(of_group)) == 1 for of_group in seeds.values())
    assert len({seed for of_group in seeds.values() for seed in of_group}) == 4


def test_all_that_go_on_share_a_call():
    trajectories, engine = play(max_turns=4)
    assert len(engine.calls) == max(len(t.episode.turns) for t in trajectories) == 4
    for k, (prompts, sampling, _) in enumerate(engine.calls):
        assert len(prompts) == (6 if k == 0 else sum(len(t.episode.turns) > k for t in trajectories))
        assert sampling.n == (3 if k == 0 else 1)


# ------------------------------------------------------------------ limits


@settings(max_examples=25)
@given(st.integers(1, 5), st.integers(1, 25), st.integers(30, 60), st.lists(st.integers(0, 12), min_size=1), st.data())
def test_no_limit_is_exceeded(max_turns, max_new_tokens, max_length, lengths, data):
    class Says(Environment):
        role = None

        def step(self, turn):
            return Observation("7" * lengths[turn.number % len(lengths)], 1.0, done="4" in turn.text)

    sampling = SamplingParams(n=2, max_new_tokens=max_new_tokens, stop=SAMPLING.stop, seed=data.draw(st.integers(0, 9)))
    trajectories, _ = play(Says, ROWS[:2], sampling=sampling, max_length=max_length, max_turns=max_turns)
    for t in trajectories:
        assert 1 <= len(t.episode.turns) <= max_turns
        assert 1 <= sum(t.mask) <= max_new_tokens and t.mask[-1]
        assert len(t.prompt.token_ids) + len(t.mask) <= max_length
        assert len(t.mask) == len(t.completion.token_ids) == len(t.completion.logprobs)
        assert (t.completion.finish_reason == "length") == ("4" not in t.episode.turns[-1])


def test_a_shorter_limit_gives_the_beginning_of_the_same_trajectory():
    for long, short in (
        (play()[0], play(max_length=22)[0]),
        (play()[0], play(sampling=SamplingParams(n=3, max_new_tokens=9, stop=SAMPLING.stop, seed=5))[0]),
    ):
        assert any(len(a.mask) > len(b.mask) > 5 for a, b in zip(long, short, strict=True))
        for a, b in zip(long, short, strict=True):
            assert a.completion.token_ids[: len(b.mask)] == b.completion.token_ids


def test_only_those_near_the_end_of_the_window_are_asked_for_by_themselves():
    assert _limits([(10, 30), (20, 5), (80, 20), (95, 3)], 100) == {(10, 30): 30, (20, 5): 30, (80, 20): 20, (95, 3): 3}


def test_the_environment_knows_its_last_turn():
    seen = []

    class Looks(Environment):
        role = None

        def step(self, turn):
            seen.append((turn.number, turn.last))
            return Observation("+")

    play(Looks, ROWS[:1], max_turns=3, sampling=SamplingParams(n=1, max_new_tokens=30, stop=tuple("0123456789+= ")))
    assert seen == [(1, False), (2, False), (3, True)]
    seen.clear()
    play(Looks, ROWS[:1], sampling=SamplingParams(n=1, max_new_tokens=2, seed=3))
    assert seen[-1][1]


# ------------------------------------------------------------------ environments that break


class Breaks(Environment):
    """In one of many ways, for the second sample of each prompt."""

    role = None
    closed = 0
    made = 0

    def __init__(self, how="raise"):
        self.how = how

    def reset(self, prompt, seed):
        Breaks.made += 1
        self.broken = Breaks.made % 3 == 2
        if self.broken and self.how == "reset":
            raise RuntimeError("no sandbox left")

    def step(self, turn):
        if self.broken and turn.number == 2:
            if self.how == "raise":
                raise KeyError("boom")
            if self.how == "exit":
                raise SystemExit
            if self.how == "hang":
                time.sleep(3)
            return {
                "text": "hello", "none": None, "nan": Observation(reward=float("nan")), "word": Observation(reward="x"),
                "number": Observation(3), "foreign": Observation("é"), "id": Observation(token_ids=(99,)),
                "ids": Observation(token_ids="ab"),
            }[self.how]  # fmt: skip
        return Observation("+", reward=1.0)

    def close(self):
        Breaks.closed += 1
        raise RuntimeError("cannot even close")


WAYS = {
    "reset": "RuntimeError: no sandbox left",
    "raise": "step of turn 2: KeyError: 'boom'",
    "exit": "step of turn 2: SystemExit",
    "hang": "step of turn 2: took longer than its deadline of 0.3 s",
    "text": "TypeError: step returned a str in place of an Observation",
    "none": "TypeError: step returned a NoneType",
    "nan": "ValueError: the reward of its observation is nan",
    "word": "ValueError: could not convert string to float: 'x'",
    "number": "TypeError: the text of its observation is a int",
    "foreign": "its observation has no tokens",
    "id": "a token id is outside of the vocabulary of 16",
    "ids": "its observation has no tokens: ValueError",
}


@pytest.mark.parametrize("how", WAYS)
def test_an_environment_that_breaks_costs_its_own_trajectory(how, monkeypatch, caplog):
    monkeypatch.setattr(Breaks, "made", 0)
    monkeypatch.setattr(Breaks, "closed", 0)
    monkeypatch.setattr("lightrft_lightning.environments.episodes.WORKERS", 1)  # in order
    sampling = SamplingParams(n=3, max_new_tokens=30, stop=tuple("0123456789+= "), seed=1)
    trajectories, _ = play({"name": Breaks, "how": how}, ROWS[:2], sampling=sampling, max_turns=4, deadline=0.3)
    broken = [t for k, t in enumerate(trajectories) if k % 3 == 1]
    assert [t for t in trajectories if t.episode.failure] == broken
    assert all(WAYS[how] in t.episode.failure for t in broken)
    assert all(len(t.episode.turns) == (1 if how == "reset" else 2) for t in broken)
    assert all(len(t.episode.turns) == 4 for t in trajectories if t not in broken)
    assert Breaks.closed == 6
    for on_error, expected in (("drop", None), (-2.0, -2.0)):
        with caplog.at_level(logging.WARNING):
            caplog.clear()
            report = Rewards("environment", on_error=on_error).score(trajectories)
        assert report.failed == 2 and [t.reward for t in broken] == [expected] * 2
        assert [t.reward for t in trajectories if t not in broken] == [4.0] * 4
        (told,) = (record.message for record in caplog.records if WAYS[how] in record.message)
        assert "2 of 6 samples" in told


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_slow_environments_run_at_the_same_time(kind):
    class Slow(Environment):
        role = None

        def step(self, turn):
            time.sleep(0.2)
            return Observation(done=True)

    class AsyncSlow(Environment):
        role = None

        async def step(self, turn):
            await asyncio.sleep(0.2)
            return Observation(done=True)

    start = time.monotonic()
    play(Slow if kind == "sync" else AsyncSlow, ROWS[:8])  # 24 trajectories
    assert time.monotonic() - start < 2.5


# ------------------------------------------------------------------ under the Trainer


def multi_turn(**settings):
    defaults = {"environment": Counts, "rewards": None, "sampling": SAMPLING, "max_turns": 4}
    return make_module(**{**defaults, **settings})


def test_training_learns_from_it_and_logs_turns(tmp_path):
    record, module = Record(), multi_turn(lr=1e-2, kl_coef=0.1, epochs_per_rollout=2)
    module.configure_model()
    before = weights_of(module)
    make_trainer(tmp_path, callbacks=[record], limit_val_batches=0).fit(module, make_data())
    assert any(not torch.equal(before[n], p) for n, p in weights_of(module).items())
    first, last = record.metrics[0], module.last_trajectories
    assert first["train/mismatch_max"] < 1e-4
    assert first["train/reward"] == first["train/reward/environment"] == first["train/turns"] > 1
    last_metrics = record.metrics[-1]
    policy, everything = sum(sum(t.mask) for t in last), sum(len(t.mask) for t in last)
    assert last_metrics["train/observation_share"] == pytest.approx(1 - policy / everything)
    assert last_metrics["train/length"] == pytest.approx(policy / len(last))
    assert last_metrics["train/tool_errors"] == pytest.approx(sum(t.episode.errors for t in last) / len(last))


@pytest.mark.parametrize("estimator", ["gae", "reinforce_plus_plus"])
def test_estimators_that_look_at_tokens_skip_the_gaps(tmp_path, estimator):
    critic = {"lr": 1e-3} if estimator == "gae" else None
    module = multi_turn(advantage_estimator=estimator, critic=critic, kl_coef=0.05, kl_in="reward")
    make_trainer(tmp_path, limit_val_batches=0).fit(module, make_data())
    for t in module.last_trajectories:
        assert all(a == 0 for a, keep in zip(t.advantages, t.mask, strict=True) if not keep)
        assert any(t.advantages)


def test_the_same_run_twice_is_the_same(tmp_path):
    tokens = []
    for _ in range(2):
        record = Record()
        make_trainer(tmp_path, callbacks=[record], val_check_interval=1).fit(multi_turn(), make_data())
        tokens.append(record.tokens)
    assert tokens[0] == tokens[1]


def test_the_environments_reward_has_a_weight_among_others(tmp_path):
    def length(completion):
        return float(len(completion))

    for rewards, weight in ((length, 1.0), (Rewards([length, "environment"], weights=[1.0, 0.5]), 0.5)):
        module = multi_turn(rewards=rewards)
        make_trainer(tmp_path, limit_train_batches=1, limit_val_batches=0).fit(module, make_data())
        for t in module.last_trajectories:
            assert t.reward_parts == {"length": len(t.text), "environment": t.episode.reward}
            assert t.reward == pytest.approx(len(t.text) + weight * t.episode.reward)


def test_rewards_may_look_at_the_turns(tmp_path):
    def second_turn(completion, episode):
        return float(len(episode.turns[1])) if len(episode.turns) > 1 else 0.0

    module = multi_turn(rewards=second_turn)
    make_trainer(tmp_path, limit_train_batches=1, limit_val_batches=0).fit(module, make_data())
    assert {t.reward_parts["second_turn"] for t in module.last_trajectories} > {0.0}


def test_validation_and_prediction_play_too(tmp_path):
    module = multi_turn(val_sampling=SAMPLING, pass_threshold=2.0)
    trainer = make_trainer(tmp_path)
    (metrics,) = trainer.validate(module, make_data(), verbose=False)
    assert metrics["val/turns"] == metrics["val/mean@3"] > 1 and 0 < metrics["val/pass@1"] < metrics["val/pass@3"]
    one = trainer.predict(module, make_data(predict=["1+1="]))[0][0]
    assert "=" in one["completion"]


def test_overlong_penalties_count_what_the_policy_wrote(tmp_path):
    module = multi_turn(overlong_buffer=10)
    make_trainer(tmp_path, limit_train_batches=1, limit_val_batches=0).fit(module, make_data())
    for t in module.last_trajectories:
        assert t.reward_parts["overlong"] == pytest.approx(-max(0, sum(t.mask) - 20) / 10)


# ------------------------------------------------------------------ settings


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"environment": "calculatr"}, "unknown environment 'calculatr'. Did you mean 'calculator'"),
        ({"environment": {"name": "calculator", "opening_": "<"}}, "unknown option of environment 'calculator'"),
        ({"environment": {"opening": "<"}}, r"an environment with options is \{'name': ..., option: ...\}"),
        ({"environment": "json.dumps"}, "an environment is a subclass of Environment"),
        ({"environment": "json.Decoder"}, "unknown class 'Decoder'. Did you mean 'JSONDecoder'"),
        ({"environment": "nowhere.py:Game"}, "no such file with environments: 'nowhere.py'"),
        ({"environment": Environment}, "environment 'Environment' has no method `step`"),
        ({"environment": Counts()}, "an environment is a subclass of Environment, its name or a mapping"),
        ({"environment": Counts, "max_turns": 0}, r"max_turns=0\): must be at least 1"),
        ({"environment": Counts, "max_length": 99999}, r"max_length=99999\): must be 1 to token_budget"),
        ({"environment": None}, "RLHFModule needs `rewards`"),
        ({"environment": None, "rewards": "environment", "max_turns": None}, r"need RLHFModule\(environment="),
        ({"environment": None, "rewards": "exact_match", "max_turns": 2}, r"need RLHFModule\(environment="),
    ],
)
def test_settings_are_checked_before_work_starts(changes, message):
    with pytest.raises((ValueError, TypeError, FileNotFoundError), match=message):
        multi_turn(**changes)


def test_prompts_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(ValueError, match="make 34 tokens, max_length is 20"):
        make_trainer(tmp_path).fit(multi_turn(max_length=20), make_data())


def test_a_checkpoint_remembers_an_environment_with_a_name(tmp_path):
    ENVIRONMENTS.register("counts", override=True)(Counts)
    module = RLHFModule(
        {"name": "tiny-llama", "layers": 2, "width": 32}, environment={"name": "counts"}, max_turns=4, sampling=SAMPLING
    )
    trainer = make_trainer(tmp_path, limit_train_batches=1)
    trainer.fit(module, make_data())
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    loaded = RLHFModule.load_from_checkpoint(tmp_path / "last.ckpt", tokenizer=TOKENIZER)
    assert loaded.episodes.max_turns == 4 and isinstance(loaded.episodes.make(), Counts)
