"""The embedded engine against `model.generate`, against a plain forward pass, and against its own promises."""

from __future__ import annotations

import math
import string
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    GPT2Config,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.auto import AutoModelForCausalLM

from lightrft_lightning.engines import transformers as engine_module
from lightrft_lightning.engines.transformers import TransformersRollout, _inverse_cdf, _restrict, _sample
from lightrft_lightning.experience.trajectory import Completion, SamplingParams

CHARACTERS = string.ascii_lowercase + string.digits + " .+="
EOS = len(CHARACTERS)
VOCAB = EOS + 1
PROMPTS = [[5, 9, 2], [7], [1, 2, 3, 4, 5, 6, 7, 8, 9], [30, 31]]
ARCHITECTURES = {
    "llama": LlamaConfig(hidden_size=32, num_attention_heads=4, num_key_value_heads=2, intermediate_size=64),
    "llama-eager": LlamaConfig(
        hidden_size=32, num_attention_heads=4, num_key_value_heads=2, intermediate_size=64, attn_implementation="eager"
    ),
    "gpt2": GPT2Config(n_embd=32, n_head=4),  # absolute positions
    "qwen2": Qwen2Config(hidden_size=32, num_attention_heads=4, num_key_value_heads=2, intermediate_size=64),
    "mistral": MistralConfig(  # a window shorter than the longest prompt
        hidden_size=32, num_attention_heads=4, num_key_value_heads=2, intermediate_size=64, sliding_window=6
    ),
}


def make_model(name: str = "llama", eos: int | list[int] | None = None, scale: float = 4.0) -> PreTrainedModel:
    """A random two-layer model; `scale` sharpens its distribution, so that greedy decoding has no near-ties."""
    config = ARCHITECTURES[name].__class__.from_dict(ARCHITECTURES[name].to_dict())
    config._attn_implementation = ARCHITECTURES[name]._attn_implementation
    config.update({"num_hidden_layers": 2, "vocab_size": VOCAB, "max_position_embeddings": 128})
    config.bos_token_id = config.pad_token_id = None
    config.eos_token_id = eos
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(scale)
    model.generation_config.eos_token_id = eos
    return model.eval()


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    core = Tokenizer(models.WordLevel({c: i for i, c in enumerate(CHARACTERS)} | {"<eos>": EOS}, unk_token="<eos>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(""), behavior="isolated")
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>")


@pytest.fixture
def connect(tokenizer: PreTrainedTokenizerFast) -> Callable[..., TransformersRollout]:
    def make(model: PreTrainedModel, **kwargs: int | None) -> TransformersRollout:
        engine = TransformersRollout(**kwargs)
        engine.connect(model, tokenizer)
        engine.settle()  # here, so that what a test counts is generation alone
        return engine

    return make


@pytest.fixture
def no_eos(tokenizer: PreTrainedTokenizerFast) -> Iterator[None]:
    """Every completion runs to its length limit."""
    tokenizer.eos_token = None
    yield
    tokenizer.eos_token = "<eos>"


class Forwards:
    """Shapes [rows, tokens] of everything that enters the model, and of the logits that leave it."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.inputs: list[tuple[int, int]] = []
        self.logits: list[tuple[int, ...]] = []
        model.register_forward_hook(self.record, with_kwargs=True)

    def record(self, module: object, args: object, kwargs: dict[str, Tensor], output: object) -> None:
        self.inputs.append(tuple(kwargs["input_ids"].shape))
        self.logits.append(tuple(output.logits.shape))


def ids(completions: list[list[Completion]]) -> list[list[tuple[int, ...]]]:
    return [[c.token_ids for c in group] for group in completions]


def reference_logits(model: PreTrainedModel, prompt: list[int], completion: Completion) -> Tensor:
    """[R, V]: the logits that each token of a completion was drawn from, by one forward pass without a cache."""
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *completion.token_ids]]), use_cache=False).logits[0]
    return logits[len(prompt) - 1 : -1]


# ---- tokens and log-probabilities


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_greedy_equals_generate(name, connect, no_eos):
    model = make_model(name)
    found = connect(model).generate(PROMPTS, SamplingParams(max_new_tokens=12, temperature=0))
    for prompt, (completion,) in zip(PROMPTS, found, strict=True):
        alone = torch.tensor([prompt])
        expected = model.generate(
            alone, attention_mask=torch.ones_like(alone), do_sample=False, max_new_tokens=12, pad_token_id=0
        )
        assert completion.token_ids == tuple(expected[0, len(prompt) :].tolist())
        assert completion.finish_reason == "length"


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_equal_a_full_forward_pass(name, temperature, connect):
    model = make_model(name, scale=2.0)
    found = connect(model).generate(PROMPTS, SamplingParams(n=3, max_new_tokens=12, temperature=temperature, seed=1))
    for prompt, group in zip(PROMPTS, found, strict=True):
        for completion in group:
            logprobs = (reference_logits(model, prompt, completion) / temperature).log_softmax(-1)
            expected = logprobs.gather(-1, torch.tensor(completion.token_ids)[:, None]).squeeze(-1)
            torch.testing.assert_close(torch.tensor(completion.logprobs), expected, atol=1e-5, rtol=0)


def test_greedy_reports_the_untempered_logprob(connect):
    model = make_model()
    ((completion,),) = connect(model).generate([PROMPTS[0]], SamplingParams(max_new_tokens=5, temperature=0, top_k=1))
    expected = reference_logits(model, PROMPTS[0], completion).log_softmax(-1).amax(-1)
    torch.testing.assert_close(torch.tensor(completion.logprobs), expected, atol=1e-5, rtol=0)
    assert expected.max() < -1e-3  # a distribution cut to one token would have given 0


@pytest.mark.parametrize(("top_k", "top_p"), [(5, 1.0), (0, 0.6), (8, 0.7), (0, 1e-6), (VOCAB + 10, 1.0)])
def test_top_k_and_top_p_renormalise(top_k, top_p, connect):
    model = make_model(scale=2.0)
    sampling = SamplingParams(n=6, max_new_tokens=10, temperature=1.3, top_k=top_k, top_p=top_p)
    for completion in connect(model).generate([PROMPTS[0]], sampling)[0]:
        logits = reference_logits(model, PROMPTS[0], completion) / 1.3
        for row, token, logprob in zip(logits, completion.token_ids, completion.logprobs, strict=True):
            probs, order = row.softmax(-1).sort(descending=True)
            if top_k:
                probs[top_k:] = 0
                probs = probs / probs.sum()
            keep = probs.cumsum(-1) - probs < top_p
            probs = probs * keep / (probs * keep).sum()
            rank = order.tolist().index(token)
            assert logprob == pytest.approx(math.log(probs[rank]), abs=1e-5)


def test_the_nucleus_of_a_flat_distribution_exceeds_the_candidates(monkeypatch):
    logits = torch.randn(3, 200, generator=torch.Generator().manual_seed(0))
    sampling = SamplingParams(top_p=0.9)
    everything = _restrict(logits, sampling)
    monkeypatch.setattr(engine_module, "_NUCLEUS_CANDIDATES", 4)
    assert torch.equal(_restrict(logits, sampling), everything)
    assert 4 < everything.isfinite().sum(-1).min() < 200


# ---- the draws


def test_frequencies_match_the_softmax():
    logits = torch.randn(1, 20, generator=torch.Generator().manual_seed(0)) * 2
    n, temperature = 50_000, 1.5
    uniforms = torch.rand(n, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    tokens, _ = _sample(logits.expand(n, -1), SamplingParams(temperature=temperature), uniforms)
    expected = (logits[0] / temperature).softmax(-1) * n
    chi_square = ((torch.bincount(tokens, minlength=20) - expected) ** 2 / expected).sum()
    assert chi_square < 43.8  # 19 degrees of freedom: exceeded once in a thousand seeds


def test_engine_frequencies_match_the_softmax(connect, no_eos):
    model = make_model(scale=2.0)
    (group,) = connect(model).generate([[3, 4]], SamplingParams(n=4000, max_new_tokens=1))
    expected = model(torch.tensor([[3, 4]])).logits[0, -1].softmax(-1) * 4000
    counts = torch.bincount(torch.tensor([c.token_ids[0] for c in group]), minlength=VOCAB)
    chi_square = ((counts - expected) ** 2 / expected).sum()
    assert chi_square < 76.1  # 40 degrees of freedom, once in 2,000


def test_a_token_of_probability_zero_is_never_drawn():
    probs = torch.tensor([[0.0, 0.3, 0.0, 0.7, 0.0]])
    for u, token in [(0.0, 1), (math.nextafter(0.3, 0), 1), (0.30001, 3), (math.nextafter(1, 0), 3), (1.0, 3)]:
        # 1.0 is outside of the generators' range: it stands for a sum that was rounded up behind the last token.
        assert _inverse_cdf(probs, torch.tensor([u], dtype=torch.float64)).item() == token


def test_rare_tokens_of_a_large_vocabulary_keep_their_probability():
    """In float32 the cumulative sum reaches 1 long before its end and the last tokens could not be drawn."""
    probs = torch.full((1, 100_000), 1e-8)
    probs[0, 0] = 1 - 1e-3
    uniforms = torch.linspace(0.9991, 0.9999, 100, dtype=torch.float64)
    steps = _inverse_cdf(probs.expand(100, -1), uniforms).diff()
    assert steps.double().mean() == pytest.approx(808, rel=1e-3)
    assert steps.max() - steps.min() <= 1


@pytest.mark.parametrize("max_batch_size", [1, 3, 8, 100])
@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral"])
def test_batching_does_not_change_the_tokens(name, max_batch_size, connect):
    model = make_model(name, scale=2.0)
    sampling = SamplingParams(n=4, max_new_tokens=20, seed=3)
    prompts = [*PROMPTS, PROMPTS[0]]
    together = connect(model).generate(prompts, sampling)
    engine = connect(model, max_batch_size=max_batch_size)
    forwards = Forwards(model)
    cut = engine.generate(prompts, sampling)
    assert ids(cut) == ids(together)
    for a, b in zip([c for g in cut for c in g], [c for g in together for c in g], strict=True):
        assert a.logprobs == pytest.approx(b.logprobs, abs=1e-4) and a.finish_reason == b.finish_reason
    assert max(rows for rows, _ in forwards.inputs) <= max_batch_size
    assert len(set(ids(together)[0]) | set(ids(together)[-1])) > 4  # equal prompts have draws of their own


def test_compaction_does_not_change_the_tokens(connect, monkeypatch):
    model = make_model(scale=2.0)
    sampling = SamplingParams(n=8, max_new_tokens=40)
    usual = connect(model).generate(PROMPTS, sampling)
    monkeypatch.setattr(engine_module, "_COMPACT_AT", 0)
    assert ids(connect(model).generate(PROMPTS, sampling)) == ids(usual)


def test_the_seed_decides(connect):
    engine = connect(make_model(scale=2.0))
    first, again, other = (
        ids(engine.generate(PROMPTS, SamplingParams(n=2, max_new_tokens=8, seed=seed))) for seed in (0, 0, 1)
    )
    assert first == again
    assert all(a != b for a, b in zip(first, other, strict=True))
    longer = ids(engine.generate(PROMPTS, SamplingParams(n=3, max_new_tokens=16, seed=0)))
    assert [[c[:8] for c in group[:2]] for group in longer] == first


def test_global_random_state_is_neither_read_nor_changed(connect):
    import random

    import numpy as np

    engine = connect(make_model(scale=2.0))
    sampling = SamplingParams(n=2, max_new_tokens=8)
    first = ids(engine.generate(PROMPTS, sampling))
    torch.manual_seed(99)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    assert ids(engine.generate(PROMPTS, sampling)) == first
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before[1:]


# ---- how a completion ends


def spell(text: str) -> list[int]:
    return [EOS if c == "$" else CHARACTERS.index(c) for c in text]


def chain_model(text: str, eos: int | list[int] | None = EOS) -> PreTrainedModel:
    """Writes `text` (all characters different, `$` is the end) after a prompt that ends with its first character."""
    config = LlamaConfig(hidden_size=64, num_attention_heads=2, intermediate_size=64, vocab_size=VOCAB)
    config.update({"num_hidden_layers": 1, "eos_token_id": eos})
    model = LlamaForCausalLM(config)
    layer = model.model.layers[0]
    with torch.no_grad():
        # Nothing is added to the residual stream, so the head sees the newest token's embedding, 8 times a unit vector.
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(VOCAB, 64))
        model.lm_head.weight.zero_()
        for token, following in zip(spell(text), spell(text)[1:], strict=False):
            model.lm_head.weight[following, token] = 10.0
    model.generation_config.eos_token_id = eos
    return model


@pytest.mark.parametrize(
    ("limit", "stop", "text", "reason"),
    [
        (20, (), "bcdefg$", "eos"),
        (6, (), "bcdefg", "length"),
        (7, (), "bcdefg$", "eos"),  # sampled at the last allowed position
        (20, ("def",), "bcdef", "stop"),  # spans three tokens
        (5, ("def",), "bcdef", "stop"),  # completed at the last allowed position
        (20, ("x", "cd", "bcd"), "bcd", "stop"),
        (20, ("b",), "b", "stop"),
        (20, ("ab",), "bcdefg$", "eos"),  # `a` is in the prompt, not in the completion
        (20, ("g<eos>",), "bcdefg$", "eos"),  # both at the same token
        (20, ("efx",), "bcdefg$", "eos"),
    ],
)
def test_finish_reasons(limit, stop, text, reason, connect):
    engine = connect(chain_model("abcdefg$"))
    ((completion,),) = engine.generate([spell("a")], SamplingParams(max_new_tokens=limit, stop=stop))
    assert (completion.token_ids, completion.finish_reason) == (tuple(spell(text)), reason)


def test_a_stop_string_may_name_a_special_token(connect, no_eos):
    ((completion,),) = connect(chain_model("abc$def", eos=None)).generate(
        [spell("a")], SamplingParams(max_new_tokens=6, stop=("<eos>",))
    )
    assert (completion.token_ids, completion.finish_reason) == (tuple(spell("bc$")), "stop")


def test_the_stop_check_decodes_a_window_only(connect, tokenizer, monkeypatch):
    lengths = []
    decode = tokenizer.batch_decode

    def spy(batch: list[list[int]], **kwargs: bool) -> list[str]:
        lengths.extend(map(len, batch))
        return decode(batch, **kwargs)

    monkeypatch.setattr(tokenizer, "batch_decode", spy)
    engine = connect(make_model())
    engine.generate([spell("a")], SamplingParams(max_new_tokens=30, stop=("zz=",), temperature=0))
    assert 0 < max(lengths) <= 4
    lengths.clear()
    engine.generate([spell("a")], SamplingParams(max_new_tokens=30))
    assert not lengths


@pytest.mark.parametrize(
    ("stop", "text"),
    [
        (". \n", "the answer is 42. \n\nThe"),
        ("über 42", "The end. über 42"),
        ("🙂", "the 🙂 is"),
        ("é🙂é", "the é🙂é is"),
        (" end. über", "an end. überThe end"),
        ("x", "the end"),
    ],
)
@pytest.mark.parametrize("single_bytes", [True, False])
def test_the_stop_window_finds_what_the_whole_text_holds(stop, text, single_bytes):
    """With byte-level BPE, where a character may need several tokens and a token may hold several characters."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    core = Tokenizer(models.BPE())
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    core.train_from_iterator(["the answer is 42. \n\nThe end. über"] * 3, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core)
    token_ids = tokenizer.encode(text)
    if single_bytes:
        token_ids = [core.token_to_id(c) for piece, _ in core.pre_tokenizer.pre_tokenize_str(text) for c in piece]
    hits = [t for t in range(1, len(token_ids) + 1) if stop in tokenizer.decode(token_ids[:t])]

    decoder = engine_module._Decoder(make_model(), tokenizer, SamplingParams(stop=stop), [])
    row = engine_module._Row(0, (), 0, 0)
    while row.finish_reason is None and len(row.token_ids) < len(token_ids):
        row.token_ids.append(token_ids[len(row.token_ids)])
        decoder.apply_stop_strings([row])
    assert (row.finish_reason == "stop", len(row.token_ids)) == (bool(hits), hits[0] if hits else len(token_ids))
    assert bool(hits) == (stop in text)


def test_any_end_of_sequence_id_ends(connect):
    """The generation config may list several, and the tokenizer's own counts as well."""
    generate = connect(chain_model("abcdefg$", eos=spell("ze"))).generate
    ((completion,),) = generate([spell("a")], SamplingParams(max_new_tokens=20))
    assert (completion.token_ids, completion.finish_reason) == (tuple(spell("bcde")), "eos")
    ((completion,),) = generate([spell("f")], SamplingParams(max_new_tokens=20))
    assert (completion.token_ids, completion.finish_reason) == (tuple(spell("g$")), "eos")


# ---- what it costs


def test_a_prompt_is_prefilled_once_per_group_and_the_head_runs_at_one_position(connect, no_eos):
    model = make_model()
    engine = connect(model)
    forwards = Forwards(model)
    engine.generate([*PROMPTS, PROMPTS[2]], SamplingParams(n=5, max_new_tokens=4))
    # Four different prompts, padded to nine tokens; then three steps: the fourth token is not run through the model.
    assert forwards.inputs == [(4, 9), (25, 1), (25, 1), (25, 1)]
    assert {shape[1] for shape in forwards.logits} == {1}


def test_a_group_larger_than_the_batch_is_still_prefilled_once(connect, no_eos):
    model = make_model()
    engine = connect(model, max_batch_size=2)
    forwards = Forwards(model)
    engine.generate(PROMPTS, SamplingParams(n=5, max_new_tokens=2))
    assert [shape for shape in forwards.inputs if shape[1] > 1 or shape[0] == 1].count((1, 9)) == 1
    assert sum(tokens for _, tokens in forwards.inputs if tokens > 1) == 3 + 9 + 2
    assert max(rows for rows, _ in forwards.inputs) == 2


def test_finished_sequences_leave_the_batch(connect):
    model = chain_model("abcdefgh$")
    engine = connect(model)
    forwards = Forwards(model)
    prompts = [spell(c) for c in "habbbbbb"]
    found = engine.generate(prompts, SamplingParams(n=1, max_new_tokens=20))
    assert [len(group[0].token_ids) for group in found] == [1, 8, 7, 7, 7, 7, 7, 7]
    # Eight prompts, three different ones; `h` is finished at once, the six `b` one step before the `a`.
    assert [rows for rows, _ in forwards.inputs] == [3, 7, 7, 7, 7, 7, 7, 1]


def test_waiting_sequences_take_the_places_of_finished_ones(connect):
    model = chain_model("abcdefgh$")
    engine = connect(model, max_batch_size=2)
    forwards = Forwards(model)
    prompts = [spell(text) for text in ("0a", "1h", "2b", "3h", "4c", "5h")]  # decoded in this order
    found = engine.generate(prompts, SamplingParams(n=1, max_new_tokens=20))
    assert [len(group[0].token_ids) for group in found] == [8, 1, 7, 1, 6, 1]
    decoded = [rows for rows, tokens in forwards.inputs if tokens == 1]
    # A prompt's prefill gives its first token, so 7 + 6 + 5 are left. Two by two it would be 18 steps: an `h` is
    # finished at once and would leave its place empty until its neighbour is finished.
    assert sum(decoded) == 18 and len(decoded) <= 12


def test_columns_of_padding_leave_with_the_rows_that_needed_them(connect):
    model = chain_model("abcdefgh$")
    engine, widths = connect(model), []
    model.register_forward_pre_hook(lambda m, args, kw: widths.append(kw["attention_mask"].shape[1]), with_kwargs=True)
    engine.generate([spell("a"), spell("zzzzzzzzzh")], SamplingParams(n=1, max_new_tokens=20))
    # The long prompt is finished by its first token; what is left is one token, and one more in each step.
    assert widths[:4] == [10, 2, 3, 4]


def test_groups_come_as_soon_as_they_are_finished(connect):
    model = chain_model("abcdefgh$").train()
    engine = connect(model)
    forwards = Forwards(model)
    groups = engine.stream([spell("a"), spell("h"), spell("e")], SamplingParams(n=2, max_new_tokens=20))
    order = []
    for i, group in groups:
        order.append((i, len(group), len(forwards.inputs)))
        # The caller's own work is not done in the generation's modes.
        assert model.training and torch.is_grad_enabled()
    assert order == [(1, 2, 1), (2, 2, 4), (0, 2, 8)]


def test_the_model_runs_with_a_cache_of_live_rows_only(connect, monkeypatch):
    sizes = []
    reorder = DynamicCache.reorder_cache

    def spy(cache: DynamicCache, index: Tensor) -> None:
        reorder(cache, index)
        sizes.append(cache.layers[0].keys.shape[0])

    engine = connect(make_model(scale=2.0))
    monkeypatch.setattr(DynamicCache, "reorder_cache", spy)
    found = engine.generate(PROMPTS, SamplingParams(n=8, max_new_tokens=100))
    assert sizes[0] == 32
    assert sizes == sorted(sizes, reverse=True)
    assert len(sizes) > 3
    assert {c.finish_reason for group in found for c in group} >= {"eos"}


@pytest.mark.parametrize("padded", [True, False])
def test_grouped_attention_equals_sdpa(padded):
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 4, 1, 8), torch.randn(3, 2, 7, 8), torch.randn(3, 2, 7, 8)
    mask = torch.ones(3, 1, 1, 7, dtype=torch.bool) if padded else None
    if padded:
        mask[1, ..., :3] = False
    module = torch.nn.Module()
    module.num_key_value_groups = 2
    sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]
    expected, _ = sdpa(module, query, key, value, mask, scaling=0.3)
    with engine_module._grouped_attention():
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is not sdpa
        found, _ = ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, mask, scaling=0.3)
    torch.testing.assert_close(found, expected)
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is sdpa


def test_an_attention_function_of_the_users_own_survives(connect):
    def own(*args: object, **kwargs: object) -> object:
        return registered(*args, **kwargs)

    registered = ALL_ATTENTION_FUNCTIONS["sdpa"]
    ALL_ATTENTION_FUNCTIONS["sdpa"] = own
    try:
        connect(make_model()).generate(PROMPTS, SamplingParams(max_new_tokens=2))
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is own
    finally:
        del ALL_ATTENTION_FUNCTIONS["sdpa"]


# ---- the model is left as it was found


def test_modes_are_restored_and_dropout_is_off(connect):
    model = make_model("gpt2")
    model.train()
    model.transformer.h[1].eval()
    modes = {name: module.training for name, module in model.named_modules()}
    engine = connect(model)
    first, second = (engine.generate(PROMPTS, SamplingParams(max_new_tokens=6)) for _ in range(2))
    assert first == second  # GPT-2's dropout of 0.1 would have shown
    assert {name: module.training for name, module in model.named_modules()} == modes


def test_modes_are_restored_after_an_exception(connect):
    model = make_model().train()
    with torch.no_grad():
        model.model.norm.weight.fill_(math.nan)
    with pytest.raises(RuntimeError, match=r"logits for prompt \d are not finite after 0 new tokens.*weights"):
        connect(model).generate(PROMPTS, SamplingParams(max_new_tokens=4))
    assert all(module.training for module in model.modules())
    assert "_grouped_attention" not in ALL_ATTENTION_FUNCTIONS["sdpa"].__qualname__


def test_training_continues_after_generation(connect):
    model = make_model().train()
    expected = model(torch.tensor([PROMPTS[0]]), labels=torch.tensor([PROMPTS[0]])).loss.item()
    connect(model).generate(PROMPTS, SamplingParams(max_new_tokens=4))
    loss = model(torch.tensor([PROMPTS[0]]), labels=torch.tensor([PROMPTS[0]])).loss
    loss.backward()
    assert loss.item() == expected
    assert all(p.grad is not None and not p.is_inference() for p in model.parameters())


def test_gradient_checkpointing_does_not_disturb(connect):
    model = make_model(scale=2.0)
    sampling = SamplingParams(n=2, max_new_tokens=6)
    expected = connect(model).generate(PROMPTS, sampling)
    model.gradient_checkpointing_enable()
    model.config.use_cache = False
    model.train()
    engine = connect(model)
    forwards = Forwards(model)
    assert engine.generate(PROMPTS, sampling) == expected
    assert all(tokens == 1 for _, tokens in forwards.inputs[1:])


def test_follows_the_weights(connect):
    model = make_model()
    engine = connect(model)
    before = engine.generate(PROMPTS, SamplingParams(max_new_tokens=6, temperature=0))
    with torch.no_grad():
        model.lm_head.weight.copy_(model.lm_head.weight.roll(1, 0))
    engine.update_weights(model.named_parameters(), 5)
    assert engine.version == 5
    assert ids(engine.generate(PROMPTS, SamplingParams(max_new_tokens=6, temperature=0))) != ids(before)


def test_bfloat16_weights_give_float32_logprobs(connect):
    model = make_model().to(torch.bfloat16)
    ((completion,),) = connect(model).generate([PROMPTS[0]], SamplingParams(max_new_tokens=8))
    with torch.no_grad():
        logits = model(torch.tensor([[*PROMPTS[0], *completion.token_ids]])).logits[0, len(PROMPTS[0]) - 1 : -1]
    expected = logits.float().log_softmax(-1).gather(-1, torch.tensor(completion.token_ids)[:, None]).squeeze(-1)
    assert torch.tensor(completion.logprobs).sub(expected).abs().max() < 0.2
    assert any(torch.tensor(lp).bfloat16().item() != lp for lp in completion.logprobs)


# ---- errors


def test_no_prompts_no_completions(connect):
    assert connect(make_model()).generate([], SamplingParams()) == []


def test_generate_needs_a_model(connect):
    with pytest.raises(RuntimeError, match=r"call connect\(model, tokenizer\) before generate"):
        TransformersRollout().generate(PROMPTS, SamplingParams())
    engine = connect(make_model())
    engine.close()
    engine.close()
    with pytest.raises(RuntimeError, match="connect"):
        engine.generate(PROMPTS, SamplingParams())


def test_an_empty_prompt_is_refused(connect):
    with pytest.raises(ValueError, match="prompt 1 has no tokens"):
        connect(make_model()).generate([[1], []], SamplingParams(max_new_tokens=4))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_prompt_beyond_the_position_embeddings_is_refused(name, connect):
    engine = connect(make_model(name))
    with pytest.raises(ValueError, match=r"prompt 1 has 121 tokens; with max_new_tokens=8 that is 129, .* 128 "):
        engine.generate([[1], [1] * 121], SamplingParams(max_new_tokens=8))
    assert engine.generate([[1] * 120], SamplingParams(max_new_tokens=8, temperature=0))[0][0].token_ids


@pytest.mark.parametrize("size", [0, -2])
def test_max_batch_size_is_checked(size):
    with pytest.raises(ValueError, match=rf"max_batch_size={size}\): must be at least 1"):
        TransformersRollout(max_batch_size=size)


def test_a_yaml_file_can_configure_it():
    import jsonargparse

    parser = jsonargparse.ArgumentParser()
    parser.add_subclass_arguments(TransformersRollout, "engine")
    path = f"{TransformersRollout.__module__}.TransformersRollout"
    config = parser.parse_object({"engine": {"class_path": path, "init_args": {"max_batch_size": 3}}})
    assert parser.instantiate(config).engine.max_batch_size == 3


def test_importing_the_module_does_not_import_transformers():
    """Lightning itself may have (through torchmetrics), so forget that first."""
    code = """
import sys, lightning.pytorch
for name in [name for name in sys.modules if name.split(".")[0] == "transformers"]:
    del sys.modules[name]
import lightrft_lightning.engines.transformers
sys.exit("transformers" in sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=100)
