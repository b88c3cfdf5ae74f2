from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from lightrft_lightning import FakeStrategy, SamplingParams
from lightrft_lightning.engines.weight_sync import (
    EngineWithCopy,
    Expected,
    Held,
    Part,
    PolicyWeights,
    WeightMismatchError,
    as_matrix,
    columns_to_compare,
    digest,
    in_buckets,
)


class Copy(EngineWithCopy):
    """Keeps what it is sent in a dictionary; `spoil` changes a tensor on the way, or loses it."""

    def __init__(self, spoil=lambda name, tensor: tensor, **settings):
        super().__init__(**settings)
        self.spoil, self.holds, self.calls = spoil, {}, []
        self.unreadable, self.unnamed = [], []

    def connect(self, model, tokenizer):
        pass

    def generate(self, prompts, sampling, streams=None):
        return [[] for _ in prompts]

    def _begin_update(self):
        self.calls.append("begin")

    def _load(self, bucket):
        self.calls.append([name for name, _ in bucket])
        for name, tensor in bucket:
            if (kept := self.spoil(name, tensor)) is not None:
                self.holds[name] = kept

    def _end_update(self, version):
        self.calls.append(f"end {version}")

    def _read_back(self, wanted, names):
        held = Held(unreadable=self.unreadable, unnamed=self.unnamed if names is not None else [])
        for name, (first, step) in wanted.items():
            if name not in self.unreadable:
                matrix = as_matrix(self.holds.get(name, torch.zeros(1)))
                whole = ((0, matrix.shape[0]), (0, matrix.shape[1]))
                held.parts[name] = [Part(*whole, digest(matrix[:, first::step]))]
        return held


def weights():
    generator = torch.Generator().manual_seed(0)
    shapes = {"a": (6, 40), "b": (5,), "c": (3, 4, 5), "d": (2, 8)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def test_update_sends_buckets_and_sets_the_version():
    engine = Copy(bucket_mb=1)
    engine.bucket_bytes = 300  # a is larger and goes alone, b and c go together
    engine.update_weights(weights().items(), 4)
    assert engine.calls == ["begin", ["a"], ["b", "c"], ["d"], "end 4"] and engine.version == 4
    assert all(torch.equal(engine.holds[name], value) for name, value in weights().items())


def test_tensors_may_be_overwritten_after_they_were_given():
    shared = torch.empty(3)

    def stream():
        for i in range(4):
            yield str(i), shared.fill_(i)

    engine = Copy()
    engine.update_weights(stream(), 1)
    assert {name: value.tolist() for name, value in engine.holds.items()} == {str(i): [i] * 3 for i in range(4)}


def test_buckets_have_the_engines_type_and_at_most_the_size():
    tensors = [
        ("x", torch.ones(10)),
        ("n", torch.ones(3, dtype=torch.int64)),
        ("y", torch.ones(100)),
        ("z", torch.ones(1)),
    ]
    buckets = [list(bucket) for bucket in in_buckets(tensors, 50, torch.bfloat16)]
    assert [[name for name, _ in bucket] for bucket in buckets] == [["x", "n"], ["y"], ["z"]]
    assert [t.dtype for bucket in buckets for _, t in bucket] == [
        torch.bfloat16,
        torch.int64,
        torch.bfloat16,
        torch.bfloat16,
    ]
    assert all(sum(t.nbytes for _, t in b) <= 50 or len(b) == 1 for b in buckets)


@pytest.mark.parametrize("verify", ["sample", "all"])
@pytest.mark.parametrize("wrong", ["a", "b", "c", "d"])
def test_a_lost_tensor_is_named(verify, wrong):
    engine = Copy(verify=verify)
    engine.update_weights(weights().items(), 1)
    engine.spoil = lambda name, tensor: None if name == wrong else tensor
    with pytest.raises(WeightMismatchError, match=f"Copy: after the update to version 2 .* the trainer's '{wrong}'$"):
        engine.update_weights({name: value + 1 for name, value in weights().items()}.items(), 2)


def test_without_verification_nothing_is_asked():
    engine = Copy(lambda name, tensor: None, verify="off")
    engine.update_weights(weights().items(), 1)
    assert engine.version == 1


def test_a_single_wrong_value_is_found_at_once_or_within_a_round():
    def spoil(name, tensor):
        if name == "a":
            tensor[2, 17] += 1e-6
        return tensor

    engine = Copy(spoil)
    found = []
    for version in range(5):  # 40 columns, 8 at a time
        try:
            engine.update_weights(weights().items(), version)
        except WeightMismatchError:
            found.append(version)
    assert found == [2]  # column 17 is in range(2, 40, 5)
    engine.verify = "all"
    with pytest.raises(WeightMismatchError, match="'a'"):
        engine.update_weights(weights().items(), 0)


def test_everything_needs_weights_that_can_be_gone_through_twice():
    with pytest.raises(ValueError, match="goes through the weights twice"):
        Copy(verify="all").update_weights(iter(weights().items()), 1)


def test_what_cannot_be_shown(caplog):
    engine = Copy()
    engine.unreadable = ["c"]
    for version in (1, 2):
        engine.update_weights(weights().items(), version)
    assert [r.getMessage() for r in caplog.records] == ["Copy: no verification of 'c': they cannot be read back"]
    engine.unreadable = list(weights())
    with pytest.raises(
        WeightMismatchError, match=r"cannot show any weight, e\.g\. 'a', 'b', 'c' and 1 more: set verify"
    ):
        engine.update_weights(weights().items(), 3)
    engine.unreadable, engine.unnamed = [], ["lm_head.weight"]
    for verify in ("sample", "all"):
        engine.verify = verify
        with pytest.raises(
            WeightMismatchError, match=r"the engine has 'lm_head\.weight', which no weight was sent for"
        ):
            engine.update_weights(weights().items(), 4)


def test_columns_meet_every_part_and_all_have_their_turn():
    for width in (1, 5, 8, 9, 576, 1536):
        seen = set()
        for version in range(width):
            first, step = columns_to_compare(width, version)
            chosen = list(range(first, width, step))
            seen.update(chosen)
            assert len(chosen) >= min(width, 8)
            assert (
                max(b - a for a, b in zip([first - step, *chosen], [*chosen, width + first], strict=True)) <= 2 * step
            )
        assert seen == set(range(width))


def part(matrix, rows, columns, wanted):
    first, step = wanted
    here = [c for c in range(first, 10**6, step) if columns[0] <= c < columns[1]]
    return Part(rows, columns, digest(matrix[rows[0] : rows[1], here]))


def test_parts_of_several_processes_are_put_together():
    matrix = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))
    expected = Expected(1)
    expected.add([("w", matrix)])
    wanted = expected.wanted["w"]
    by_rows = [part(matrix, (0, 4), (0, 16), wanted), part(matrix, (4, 8), (0, 16), wanted)]
    by_columns = [part(matrix, (0, 8), (0, 8), wanted), part(matrix, (0, 8), (8, 16), wanted)]
    for parts in (by_rows, by_columns, [*by_rows, *by_rows]):
        assert expected.mismatches({"w": parts}) == []
    for parts in (by_rows[:1], by_columns[1:], [], [by_rows[0], part(matrix + 1, (4, 8), (0, 16), wanted)]):
        assert expected.mismatches({"w": parts}) == ["w"]


def test_digest_tells_shapes_types_and_single_bits_apart():
    ones = torch.ones(2, 3)
    others = [torch.ones(3, 2), torch.ones(6), ones.double(), ones.bfloat16(), torch.nextafter(ones, 2 * ones)]
    assert len({digest(t) for t in [ones, *others]}) == 6
    assert digest(torch.tensor([0.0])) == digest(torch.tensor([-0.0]))
    assert digest(torch.ones(3, 2).T) == digest(ones)


# -------------------------------------------------------------------- the policy's weights


def test_tied_tensors_come_under_all_names(tiny_model):
    tiny_model.config.tie_word_embeddings = True
    tiny_model.tie_weights()
    sent = dict(PolicyWeights(FakeStrategy(), tiny_model))
    assert set(sent) == {name for name, _ in tiny_model.named_parameters(remove_duplicate=False)}
    assert sent["lm_head.weight"].data_ptr() == sent["model.embed_tokens.weight"].data_ptr()


def test_a_wrapper_sends_the_model_inside(tiny_model):
    class Actor(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = tiny_model

    weights = PolicyWeights(FakeStrategy(), Actor())
    assert set(dict(weights)) == set(dict(weights)) == {name for name, _ in tiny_model.named_parameters()}


def lora(model, **settings):
    wrapped = get_peft_model(model, LoraConfig(target_modules=["q_proj", "down_proj"], r=4, lora_alpha=9, **settings))
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            nn.init.normal_(parameter, std=0.3)
    return wrapped


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}, {"modules_to_save": ["lm_head"]}])
def test_lora_comes_merged_under_the_base_models_names(tiny_model, settings):
    names = {name for name, _ in tiny_model.named_parameters()}
    wrapped = lora(tiny_model, **settings)
    sent = {name: tensor.clone() for name, tensor in PolicyWeights(FakeStrategy(), wrapped)}
    assert set(sent) == names
    merged = wrapped.merge_and_unload()
    for name, parameter in merged.named_parameters():
        torch.testing.assert_close(sent[name], parameter, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "settings",
    [{"use_dora": True}, {"lora_bias": True}, {"rank_pattern": {"q_proj": 2}}, {"alpha_pattern": {"q_proj": 2}}],
)
def test_what_is_no_plain_lora_is_not_sent_as_an_adapter(tiny_model, settings):
    with pytest.raises(ValueError, match=r"q_proj, LORA .*: only plain LoRA of linear layers .*: use lora='merged'"):
        PolicyWeights(FakeStrategy(), lora(tiny_model, **settings)).adapter()


@pytest.mark.parametrize("settings", [{"modules_to_save": ["lm_head"]}, {"trainable_token_indices": [3]}])
def test_what_is_trained_beside_matrices_is_not_sent_as_an_adapter(tiny_model, settings):
    with pytest.raises(ValueError, match="is trained, but an adapter holds LoRA matrices only: use lora='merged'"):
        PolicyWeights(FakeStrategy(), lora(tiny_model, **settings)).adapter()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"verify": "some"}, "Copy(verify='some'): must be one of 'sample', 'all', 'off'"),
        ({"bucket_mb": 0}, "Copy(bucket_mb=0): must be at least 1"),
        ({"sleep_level": 3}, "Copy(sleep_level=3): must be 0 (stays awake), 1 or 2"),
        ({"deadline": 0}, "Copy(deadline=0): must be above 0"),
        ({"drift_warning": -1}, "Copy(drift_warning=-1): must be 0 or more, or None"),
        ({"drift_limit": -1}, "Copy(drift_limit=-1): must be 0 or more, or None"),
    ],
)
def test_wrong_settings(settings, words):
    with pytest.raises(ValueError) as error:
        Copy(**settings)
    assert words in str(error.value)


def test_a_hand_written_loop_sends_the_weights_at_once(tiny_model, tiny_tokenizer):
    strategy, engine = FakeStrategy(), Copy()
    assert strategy.setup_inference_engine(engine_type=engine, actor=tiny_model, tokenizer=tiny_tokenizer) is engine
    assert set(engine.holds) == {name for name, _ in tiny_model.named_parameters()} and engine.version == 0
    strategy.update_engine_weights(tiny_model)
    assert engine.version == 1
    assert strategy.gather_and_generate(SamplingParams(), all_prompt_token_ids=[[1]]) == [[]]


def test_an_engine_that_does_not_get_its_weights_is_closed(tiny_model, tiny_tokenizer):
    engine = Copy(lambda name, tensor: None)
    closed = []
    engine.close = lambda: closed.append(True)
    strategy = FakeStrategy()
    with pytest.raises(WeightMismatchError):
        strategy.setup_inference_engine(engine_type=engine, actor=tiny_model, tokenizer=tiny_tokenizer)
    assert closed and strategy.inference_engine is None
