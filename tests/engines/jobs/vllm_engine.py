"""Real vLLM in one process; see strategies/jobs/checks.py."""

from __future__ import annotations

import copy
import sys
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import checks
import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from peft import LoraConfig, get_peft_model
from PIL import Image
from transformers import (
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3Processor,
    LlamaConfig,
    MixtralConfig,
    MixtralForCausalLM,
)
from transformers.models.idefics3.configuration_idefics3 import Idefics3VisionConfig
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

from lightrft_lightning import FakeStrategy, PromptDataModule, RLHFModule, SamplingParams
from lightrft_lightning.callbacks.rollout import DriftError
from lightrft_lightning.engines._vllm_worker import WeightSyncWorker
from lightrft_lightning.engines.base import EngineError
from lightrft_lightning.engines.vllm import VLLMRollout
from lightrft_lightning.engines.weight_sync import PolicyWeights, WeightMismatchError
from lightrft_lightning.environments import Environment, Observation
from lightrft_lightning.models.tiny import char_tokenizer, tiny_llama

FOLDER = Path(sys.argv[1])
TOKENIZER = char_tokenizer()
PROMPTS = [TOKENIZER(f"{a}+{b}=")["input_ids"] for a in range(3, 7) for b in range(5, 13)]
LONG = [[3 + (i * k) % 12 for k in range(1, 51)] for i in range(96)]  # longer than a block of the cache
ARGS = {"enforce_eager": True, "max_model_len": 64, "kv_cache_memory_bytes": 1 << 24}  # 1 GiB takes a second to clear


def random_model(tie=False, layers=2):
    model = tiny_llama(seed=5, layers=layers)
    if tie:
        model.config.tie_word_embeddings = True
        model.tie_weights()
    return model


@contextmanager
def engine_of(model, **settings):
    """An engine that has the model's weights, and the strategy that it belongs to."""
    strategy = FakeStrategy()
    engine = VLLMRollout({**ARGS, **settings.pop("engine_args", {})}, **settings)
    try:
        yield strategy.setup_inference_engine(engine_type=engine, actor=model, tokenizer=TOKENIZER), strategy
    finally:
        engine.close()


def scored(model, prompt, ids, temperature=1.0, keep=None):
    """Log-probabilities of these tokens under the model, renormalised over the tokens that `keep` leaves."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1] / temperature
    if keep is not None:
        logits = keep(logits)
    return logits.log_softmax(-1)[range(len(ids)), list(ids)].tolist()


def close(found, expected, tolerance=1e-4):
    return max(abs(a - b) for a, b in zip(found, expected, strict=True)) < tolerance


def changed(model):
    """The model with other weights everywhere."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return model


# ------------------------------------------------------------------ generation


def check_what_comes_back():
    model = random_model()
    before = torch.get_rng_state()
    with engine_of(model) as (engine, _):
        groups = engine.generate(PROMPTS[:6], SamplingParams(n=4, max_new_tokens=8, temperature=0.7, seed=3))
        again = engine.generate(PROMPTS[4:6], SamplingParams(n=4, max_new_tokens=8, temperature=0.7, seed=3), [4, 5])
        greedy = engine.generate(PROMPTS[:2], SamplingParams(n=2, max_new_tokens=8, temperature=0.0))
    assert torch.equal(before, torch.get_rng_state())
    assert [len(group) for group in groups] == [4] * 6
    assert [[c.token_ids for c in g] for g in again] == [[c.token_ids for c in g] for g in groups[4:]]
    assert len({c.token_ids for group in groups for c in group}) > 12
    for prompt, group in zip(PROMPTS, groups, strict=False):
        for c in group:
            assert close(c.logprobs, scored(model, prompt, c.token_ids, temperature=0.7))
            assert (c.finish_reason == "eos") == (c.token_ids[-1] == TOKENIZER.eos_token_id)
            assert c.finish_reason == "eos" or len(c.token_ids) == 8
    for prompt, group in zip(PROMPTS, greedy, strict=False):
        assert group[0] == group[1] and close(group[0].logprobs, scored(model, prompt, group[0].token_ids))


def check_top_p_and_top_k_report_the_distribution_that_was_sampled_from():
    model = random_model()

    def largest(logits):
        return torch.where(logits >= logits.topk(3).values[:, -1:], logits, -torch.inf)

    def nucleus(logits):
        values, order = logits.softmax(-1).sort(descending=True)
        dropped = values.cumsum(-1) - values >= 0.6
        return logits.scatter(-1, order, logits.gather(-1, order).masked_fill(dropped, -torch.inf))

    with engine_of(model) as (engine, _):
        for settings, keep in (({"top_k": 3}, largest), ({"top_p": 0.6}, nucleus)):
            for prompt, group in zip(
                PROMPTS[:4],
                engine.generate(PROMPTS[:4], SamplingParams(n=4, max_new_tokens=6, **settings)),
                strict=True,
            ):
                for c in group:
                    assert close(c.logprobs, scored(model, prompt, c.token_ids, keep=keep)), settings


def check_stop_strings_stay_and_sampling_follows_the_probabilities():
    model = random_model()
    with engine_of(model) as (engine, _):
        groups = engine.generate(PROMPTS[:4], SamplingParams(n=8, max_new_tokens=20, stop=("3", "7")))
        stopped = [c for group in groups for c in group if c.finish_reason == "stop"]
        assert stopped and all(TOKENIZER.decode(c.token_ids)[-1] in "37" for c in stopped)
        assert engine.end_ids == {TOKENIZER.eos_token_id}
        three = TOKENIZER.convert_tokens_to_ids("3")
        engine.end_ids |= {three}  # as if the generation config or the chat template had another end
        groups = engine.generate(PROMPTS[:4], SamplingParams(n=8, max_new_tokens=20))
        ended = [c for group in groups for c in group if three in c.token_ids]
        assert ended and all(
            c.finish_reason == "eos" and c.token_ids.index(three) == len(c.token_ids) - 1 for c in ended
        )
        drawn = engine.generate(PROMPTS[:1], SamplingParams(n=2000, max_new_tokens=1))[0]
    with torch.no_grad():
        probabilities = model(input_ids=torch.tensor([PROMPTS[0]])).logits[0, -1].softmax(-1)
    counts = Counter(c.token_ids[0] for c in drawn)
    expected = probabilities * 2000
    statistic = sum((counts[i] - e) ** 2 / e for i, e in enumerate(expected.tolist()))
    assert statistic < 45, statistic  # chi-squared with 15 degrees of freedom: one in ten thousand is above


def check_a_prompt_is_computed_once_for_its_completions():
    model = random_model()
    with engine_of(model, engine_args={"max_model_len": 256}) as (engine, _):
        step, computed = engine._engine.engine_core.engine_core.model_executor.execute_model, []

        def counted(scheduled, *args, **kwargs):
            computed.append(scheduled.total_num_scheduled_tokens)
            return step(scheduled, *args, **kwargs)

        with mock.patch.object(engine._engine.engine_core.engine_core.model_executor, "execute_model", counted):
            engine.generate([[3 + i % 12 for i in range(161)]], SamplingParams(n=8, max_new_tokens=3))
    # 161 tokens are five blocks of 32, which are shared, and one token that each completion computes for itself.
    assert sum(computed) <= 160 + 8 + 8 * 2, computed


def check_more_prompts_than_fit_into_a_step_or_the_cache():
    """What vLLM puts off, or begins and has to give up in between, gets the same tokens."""
    drawn = []
    for settings in ({}, {"kv_cache_memory_bytes": 6 << 16, "max_num_seqs": 8}):  # 1024 sequences of a few; 6 blocks
        with engine_of(random_model(), engine_args=settings) as (engine, _):
            groups = engine.generate(LONG[:: 1 if not settings else 16], SamplingParams(n=4, max_new_tokens=14))
        drawn.append([[c.token_ids for c in group] for group in groups])
    assert [len(group) for group in drawn[0]] == [4] * 96


def check_two_engines_and_their_ends():
    a, b = random_model(), changed(random_model())
    with engine_of(b) as (second, of_b):
        with engine_of(a) as (first, _):
            assert greedy_agrees(first, a) and greedy_agrees(second, b)
        of_b.update_engine_weights(changed(b))
        assert greedy_agrees(second, b)


def check_groups_come_as_they_finish():
    model = random_model()
    with torch.no_grad():
        model.lm_head.weight.zero_()  # every token is equally likely
    with engine_of(model) as (engine, _):
        order = [i for i, _ in engine.stream(PROMPTS, SamplingParams(max_new_tokens=50, seed=2))]
    assert sorted(order) == list(range(len(PROMPTS))) and order != sorted(order)


def check_bad_requests_and_deadlines():
    with engine_of(random_model()) as (engine, _):
        for prompts, words in (
            ([[]], "prompt 0 is empty"),
            ([PROMPTS[0], [3] * 60], "prompt 1 has 60 tokens, with max_n"),
        ):
            with pytest.raises(ValueError, match=words):
                engine.generate(prompts, SamplingParams(max_new_tokens=8))
        for prompts, words in (
            ([[3], [-1]], "prompt 1 holds token -1"),
            ([[16]], "prompt 0 holds token 16, the model has embeddings for 16"),
            ([[3.5]], "prompt 0 holds 3.5, which is no token id"),
        ):
            with pytest.raises(ValueError, match=words):
                engine.generate(prompts, SamplingParams(max_new_tokens=8))
        for temperature, words in (
            (0.005, "temperature=0.005: vLLM would draw at 0.01"),
            (2.5, "temperature=2.5: vLLM takes at most 2"),
        ):
            with pytest.raises(ValueError, match=words):
                engine.generate(PROMPTS, SamplingParams(max_new_tokens=8, temperature=temperature))
        engine.deadline = float("inf")
        assert len(engine.generate([np.array(PROMPTS[0])], SamplingParams(max_new_tokens=4))) == 1
        engine.deadline = 1e-4
        with pytest.raises(EngineError, match=r"32 of 32 prompts are not finished after deadline=0.0001 s"):
            engine.generate(PROMPTS, SamplingParams(max_new_tokens=40))
        engine.deadline = 60
        assert len(engine.generate(PROMPTS[:3], SamplingParams(max_new_tokens=4))) == 3  # the others were given up


def tiny_vision_model():
    """An Idefics3 with 32x32 images of four tokens, and its processor."""
    tokenizer = char_tokenizer()
    special = ["<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>"]
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    shape = {"intermediate_size": 128, "num_hidden_layers": 2}
    text = LlamaConfig(hidden_size=128, num_attention_heads=4, vocab_size=len(tokenizer), max_position_embeddings=256,
                       bos_token_id=1, eos_token_id=2, pad_token_id=0, **shape)  # fmt: skip
    vision = Idefics3VisionConfig(hidden_size=64, num_attention_heads=2, image_size=32, patch_size=8, **shape)
    config = Idefics3Config(
        vision_config=vision, text_config=text, image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=2, pad_token_id=0, tie_word_embeddings=False,
    )  # fmt: skip
    size = {"longest_edge": 32}
    images = Idefics3ImageProcessorPil(size=size, max_image_size=size, do_image_splitting=False)
    torch.manual_seed(0)
    return Idefics3ForConditionalGeneration(config), Idefics3Processor(images, tokenizer, image_seq_len=4)


def check_several_images_a_prompt():
    model, processor = tiny_vision_model()
    generator = np.random.default_rng(0)
    a, b = (Image.fromarray(generator.integers(0, 255, (32, 32, 3), dtype=np.uint8)) for _ in range(2))
    images = [[a], [b], [a, b], [b, a], []]
    place = processor.tokenizer.convert_tokens_to_ids("<image>")
    prompts = [[3, *[place] * len(shown), 4, 5] for shown in images]
    strategy = FakeStrategy()
    engine = VLLMRollout({**ARGS, "max_model_len": 128, "limit_mm_per_prompt": {"image": 2}}, verify="all")
    try:
        strategy.setup_inference_engine(engine_type=engine, actor=model, tokenizer=processor)
        strategy.update_engine_weights(changed(model))
        sampling = {"n": 2, "max_new_tokens": 5}
        groups = strategy.gather_and_generate(sampling, all_prompt_token_ids=prompts, all_images=images)
    finally:
        engine.close()
    for prompt, shown, group in zip(prompts, images, groups, strict=True):
        text = processor.tokenizer.decode(prompt)
        inputs = processor(text=text, images=[shown] if shown else None, return_tensors="pt")
        for c in group:
            ids = torch.cat([inputs["input_ids"], torch.tensor([c.token_ids])], dim=1)
            seen = {k: inputs[k] for k in ("pixel_values", "pixel_attention_mask") if k in inputs}
            with torch.no_grad():
                logits = model(input_ids=ids, **seen).logits[0, inputs["input_ids"].shape[1] - 1 : -1]
            assert close(c.logprobs, logits.log_softmax(-1)[range(len(c.token_ids)), list(c.token_ids)].tolist())
    with engine_of(random_model()) as (engine, strategy), pytest.raises(ValueError, match="generates from text only"):
        strategy.gather_and_generate({}, all_prompt_token_ids=[[3]], all_images=[[a]])


# ------------------------------------------------------------------ weights


def greedy_agrees(engine, model):
    groups = engine.generate(PROMPTS, SamplingParams(max_new_tokens=6, temperature=0.0))
    return all(close(g[0].logprobs, scored(model, p, g[0].token_ids)) for p, g in zip(PROMPTS, groups, strict=True))


def check_updates_arrive_in_buckets_of_any_size():
    model = random_model()
    with engine_of(model, verify="all", bucket_mb=1) as (engine, strategy):
        for version in (1, 2, 3):
            engine.bucket_bytes = (1, 100_000, 1 << 30)[version - 1]
            changed(model)
            assert not greedy_agrees(engine, model)
            strategy.update_engine_weights(model)
            assert engine.version == version and greedy_agrees(engine, model)


def check_nothing_that_was_computed_with_older_weights_is_used():
    model = random_model()
    with engine_of(model) as (engine, strategy):
        for _ in range(2):  # whole blocks of these prompts are kept for the next time
            for prompt, group in zip(
                LONG[:4], engine.generate(LONG[:4], SamplingParams(n=2, max_new_tokens=4)), strict=True
            ):
                assert all(close(c.logprobs, scored(model, prompt, c.token_ids)) for c in group)
            strategy.update_engine_weights(changed(model))
        stream = engine.stream(LONG[:4], SamplingParams(max_new_tokens=14))
        next(stream)
        for call in (
            lambda: strategy.update_engine_weights(model),
            lambda: engine.generate(PROMPTS, SamplingParams(max_new_tokens=4)),
        ):
            with pytest.raises(RuntimeError, match=r"a stream\(\) of this engine is not finished: go"):
                call()
        stream.close()
        strategy.update_engine_weights(changed(model))
        assert greedy_agrees(engine, model)


def check_weights_that_vllm_refuses_are_named_and_nothing_is_drawn_from_half_an_update():
    model = random_model()
    engine = VLLMRollout(ARGS)
    try:
        engine.connect(model, TOKENIZER)
        with pytest.raises(RuntimeError, match="it has no weights yet: call update_weights before"):
            engine.generate(PROMPTS, SamplingParams(max_new_tokens=4))
        weights = list(PolicyWeights(FakeStrategy(), model))
        short = [(name, tensor[:-1] if "1.mlp.down_proj" in name else tensor) for name, tensor in weights]
        for sent, words in (
            (short, r"refuses the weight 'model\.layers\.1\.mlp\.down_proj\.weight' of shape \[127, 384\]"),
            (
                [*weights, ("model.other.weight", torch.ones(3))],
                r"refuses the weight 'model\.other\.weight' of shape \[3\]",
            ),
        ):
            with pytest.raises(ValueError, match=words):
                engine.update_weights(sent, 1)
            with pytest.raises(RuntimeError, match="the last update of its weights failed: call update_weights before"):
                engine.generate(PROMPTS, SamplingParams(max_new_tokens=4))
        engine.update_weights(weights, 2)
        assert greedy_agrees(engine, model)
    finally:
        engine.close()


def check_tied_head_arrives_and_its_loss_is_noticed():
    model = random_model(tie=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    for verify in ("sample", "all"):
        with engine_of(model, verify=verify) as (engine, strategy):
            assert greedy_agrees(engine, model)
            strategy.update_engine_weights(changed(model))
            assert greedy_agrees(engine, model)
            changed(model)
            lost = lambda name, tensor: None if name == "lm_head.weight" else tensor  # noqa: E731
            with changed_on_the_way(lost), pytest.raises(WeightMismatchError, match=r"trainer's 'lm_head\.weight'$"):
                strategy.update_engine_weights(model)
            unnamed = [item for item in PolicyWeights(strategy, model) if item[0] != "lm_head.weight"]
            with pytest.raises(
                WeightMismatchError, match=r"the engine has 'lm_head\.weight', which no weight was sent"
            ):
                engine.update_weights(unnamed, 7)


@contextmanager
def changed_on_the_way(change):
    """The engine gets `change(name, tensor)` in place of each tensor; nothing where that is None."""
    load = WeightSyncWorker.lightrft_load

    def other(self, bucket):
        load(self, [(name, new) for name, tensor in bucket if (new := change(name, tensor)) is not None])

    with mock.patch.object(WeightSyncWorker, "lightrft_load", other):
        yield


def check_every_wrong_or_lost_tensor_is_named():
    model = random_model()
    with engine_of(model) as (_, strategy):
        for wrong in [name for name, _ in PolicyWeights(strategy, model)]:
            for instead in (lambda tensor: tensor * 1.001, lambda tensor: None):
                spoiled = lambda name, x, wrong=wrong, by=instead: by(x) if name == wrong else x  # noqa: E731
                with changed_on_the_way(spoiled), pytest.raises(WeightMismatchError) as error:
                    strategy.update_engine_weights(changed(model))
                assert str(error.value).endswith(f"does not hold the trainer's {wrong!r}")


def mixture_of_experts():
    sizes = {"hidden_size": 64, "intermediate_size": 48, "head_dim": 32, "num_attention_heads": 2}
    experts = {"num_key_value_heads": 2, "num_hidden_layers": 2, "num_local_experts": 4}
    config = MixtralConfig(vocab_size=len(TOKENIZER), eos_token_id=TOKENIZER.eos_token_id, **sizes, **experts)
    return MixtralForCausalLM(config).eval()


def check_experts_arrive_in_each_update_and_a_wrong_one_is_named():
    model = mixture_of_experts()
    wrong = "model.layers.1.block_sparse_moe.experts.3.w3.weight"  # of a file; in memory they are one tensor

    def spoiled(name, tensor):
        return tensor * 1.001 if name == wrong else tensor

    with engine_of(model) as (engine, strategy):
        strategy.update_engine_weights(changed(changed(model)))
        for prompt, group in zip(
            PROMPTS[:4], engine.generate(PROMPTS[:4], SamplingParams(n=2, max_new_tokens=8)), strict=True
        ):
            assert all(close(c.logprobs, scored(model, prompt, c.token_ids)) for c in group)
        with changed_on_the_way(spoiled), pytest.raises(WeightMismatchError, match=rf"trainer's '{wrong}'$"):
            strategy.update_engine_weights(model)
        with (
            mock.patch("lightrft_lightning.engines._vllm_experts.pack_again"),
            pytest.raises((WeightMismatchError, ValueError), match=r"'model\.layers\.\d\.block_sparse_moe"),
        ):
            strategy.update_engine_weights(model)


def check_a_single_wrong_value_is_found_in_time():
    """Sampling misses it in some updates, but not in all of a round; comparing everything finds it at once."""
    model = random_model()

    def spoiled(name, tensor):
        if name.endswith("layers.1.mlp.down_proj.weight"):
            tensor[7, 201] += 1
        return tensor

    with engine_of(model) as (engine, strategy), changed_on_the_way(spoiled):
        found = 0
        for version in range(model.config.intermediate_size // 8):
            try:
                engine.update_weights(PolicyWeights(strategy, model), version)
            except WeightMismatchError:
                found += 1
        assert found == 1
        engine.verify = "all"
        with pytest.raises(WeightMismatchError, match=r"layers\.1\.mlp\.down_proj\.weight"):
            engine.update_weights(PolicyWeights(strategy, model), 0)


def lora_model():
    targets = ["q_proj", "v_proj", "down_proj", "gate_proj"]
    model = get_peft_model(random_model(tie=True), LoraConfig(target_modules=targets, r=3, lora_alpha=5))
    return other_adapter(model, 2)


def other_adapter(model, seed):
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3, generator=generator)
    return model


def check_lora_is_sent_merged_or_as_an_adapter():
    for lora in ("merged", "adapter"):
        model = lora_model()
        with engine_of(model, verify="all", lora=lora) as (engine, strategy):
            assert greedy_agrees(engine, model)
            with model.disable_adapter():
                assert not greedy_agrees(engine, model)
            for version in (1, 2):
                strategy.update_engine_weights(other_adapter(model, 10 + version))
                assert engine.version == version and greedy_agrees(engine, model)


def check_adapters_of_all_kinds():
    """Of an output head, of the second of two adapters, of what starts from the weights themselves."""
    kinds = {
        "head": (random_model(), {"target_modules": ["q_proj", "lm_head"], "r": 9, "use_rslora": True}),
        "start": (random_model(), {"target_modules": "all-linear", "r": 4, "init_lora_weights": "pissa"}),
    }
    for kind, (base, settings) in kinds.items():
        model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **settings))
        if kind == "head":
            model.add_adapter("second", LoraConfig(target_modules=["lm_head", "o_proj"], r=5, lora_alpha=7))
            model.set_adapter("second")
        with engine_of(other_adapter(model, 1), verify="all", lora="adapter") as (engine, strategy):
            strategy.update_engine_weights(other_adapter(model, 3))
            assert greedy_agrees(engine, model), kind
            assert engine._engine.list_loras() == {2}
    model = get_peft_model(random_model(), LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], r=600))
    with pytest.raises(ValueError, match=r"LoRA of rank 600: vLLM takes adapters up to rank 512, use lora='merged'"):
        VLLMRollout(ARGS, lora="adapter").connect(model, TOKENIZER)
    model = get_peft_model(mixture_of_experts(), LoraConfig(task_type="CAUSAL_LM", target_modules=["v_proj"]))
    with pytest.raises(ValueError, match="lora='adapter' with a mixture of experts"):
        VLLMRollout(ARGS, lora="adapter").connect(model, TOKENIZER)


def check_an_adapter_update_sends_the_adapter_alone_and_is_verified():
    model = lora_model()
    with engine_of(model, lora="adapter") as (engine, strategy):
        sent = []
        with changed_on_the_way(lambda name, tensor: sent.append(name)):
            strategy.update_engine_weights(other_adapter(model, 5))
        assert not sent and greedy_agrees(engine, model)
        with pytest.raises(TypeError, match=r"lora='adapter' needs PolicyWeights\(strategy, model\), got list"):
            engine.update_weights([("model.norm.weight", torch.ones(128))], 2)
        assert greedy_agrees(engine, model), "nothing was sent"
        add = engine._engine.add_lora
        engine._engine.add_lora = lambda request: add(request) and worker_layers(engine)[3].lora_b_stacked[0].mul_(1.01)
        with pytest.raises(WeightMismatchError, match=r"does not hold the trainer's 'model\.layers.*\.lora_B'$"):
            strategy.update_engine_weights(other_adapter(model, 6))
    with pytest.raises(ValueError, match=r"embed_tokens\.weight is trained, but an adapter holds LoRA matrices only"):
        model.base_model.model.model.embed_tokens.weight.requires_grad_(True)
        VLLMRollout(ARGS, lora="adapter").connect(model, TOKENIZER)


def worker_layers(engine):
    worker = engine._engine.engine_core.engine_core.model_executor.driver_worker.worker
    return list(worker.model_runner.lora_manager._adapter_manager.modules.values())


# ------------------------------------------------------------------ in a Trainer


def trainer_and_module(*callbacks, iterations=3, **settings):
    trainer = pl.Trainer(
        strategy="lightrft_fake", accelerator="cpu", devices=1, max_epochs=1, limit_train_batches=iterations,
        callbacks=[VLLMRollout(ARGS, **settings), *callbacks], logger=False, enable_checkpointing=bool(callbacks),
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    sampling = SamplingParams(n=8, max_new_tokens=4)
    reward = lambda completion: completion.count("7") / 4  # noqa: E731
    module = RLHFModule(tiny_llama(seed=0, layers=2), reward, TOKENIZER, sampling, lr=3e-3, seed=1)
    data = PromptDataModule([{"prompt": f"{a}+2="} for a in range(32)], batch_size=8, tokenizer=TOKENIZER)
    return trainer, module, data


@contextmanager
def sync_switched_off():
    """The first update arrives, the later ones do not."""
    load, arrived = WeightSyncWorker.lightrft_load, []

    def stuck(self, bucket):
        arrived.append([(name, tensor.clone()) for name, tensor in bucket])
        load(self, arrived[0])

    with mock.patch.object(WeightSyncWorker, "lightrft_load", stuck):
        yield


def check_without_sync_verification_and_drift_both_fire():
    with sync_switched_off():
        trainer, module, data = trainer_and_module()
        with pytest.raises(WeightMismatchError, match="after the update to version 1 the engine does not hold"):
            trainer.fit(module, data)
        trainer, module, data = trainer_and_module(verify="off", drift_limit=0.01)
        with pytest.raises(DriftError, match=r"differ by \d+(\.\d+)? nats on average, more than drift_limit=0.01"):
            trainer.fit(module, data)
        assert module.iteration > 1
    trainer, module, data = trainer_and_module(drift_limit=1e-4)
    trainer.fit(module, data)
    assert module.iteration == 3


def check_a_resumed_run_gives_the_same_bits():
    keep = ModelCheckpoint(FOLDER / "ckpt", every_n_train_steps=1, save_top_k=-1, filename="{step}")
    trainer, module, data = trainer_and_module(keep, iterations=4)
    trainer.fit(module, data)
    whole = copy.deepcopy(module.actor.state_dict())
    trainer, module, data = trainer_and_module(ModelCheckpoint(FOLDER / "other"), iterations=4)
    trainer.fit(module, data, ckpt_path=FOLDER / "ckpt" / "step=2.ckpt")
    assert module.iteration == 4 and module.rollout_engine.version == 4
    assert all(torch.equal(whole[name], value) for name, value in module.actor.state_dict().items())


class Counts(Environment):
    role = None

    def step(self, turn):
        return Observation(f"={len(turn.token_ids)}+", reward=turn.text.count("7") / 4, done="9" in turn.text)


def check_turns_with_an_environment():
    """Limits, masks and both log-probabilities are right, and the draws depend on nothing but their seeds."""
    found = []
    for _ in range(2):
        trainer, _, data = trainer_and_module(drift_limit=1e-4, iterations=2)
        sampling = SamplingParams(n=4, max_new_tokens=24, stop=("7", "8", "9"))
        module = RLHFModule(
            tiny_llama(seed=0, layers=2), None, TOKENIZER, sampling, environment=Counts, max_turns=4, max_length=40,
            lr=1e-4, seed=1,
        )  # fmt: skip
        trainer.fit(module, data)
        found.append([t.completion.token_ids for t in module.last_trajectories])
    assert found[0] == found[1]
    assert float(trainer.callback_metrics["train/mismatch_max"]) < 1e-4
    assert len({len(t.episode.turns) for t in module.last_trajectories}) > 2
    for t in module.last_trajectories:
        assert sum(t.mask) <= 24 and len(t.prompt.token_ids) + len(t.mask) <= 40 and len(t.episode.turns) <= 4
        assert all(p == 0 for p, mine in zip(t.completion.logprobs, t.mask, strict=True) if not mine)
        assert (t.completion.finish_reason == "length") != ("9" in t.episode.turns[-1])


def check_wrong_engine_arguments_are_refused_before_anything_loads():
    for given, words in (
        ({"max_modle_len": 64}, "unknown argument of vLLM 'max_modle_len'. Did you mean 'max_model_len'"),
        ({"model": "gpt2"}, "engine_args['model']='gpt2': VLLMRollout sets this itself, leave it out"),
        ({"logprobs_mode": "raw_logits"}, "engine_args['logprobs_mode']='raw_logits': VLLMRollout sets this itself"),
        ({"pipeline_parallel_size": 2}, "engine_args['pipeline_parallel_size']=2: must be 1"),
        ({"speculative_config": {"method": "ngram"}}, "log-probabilities of another distribution than"),
    ):
        with pytest.raises(ValueError) as error:
            VLLMRollout(given)
        assert words in str(error.value)
    with pytest.raises(ValueError, match=r"engine_args\['max_lora_rank'\]=8: VLLMRollout sets this itself"):
        VLLMRollout({"max_lora_rank": 8}, lora="adapter")
    for given, words in (
        ({"load_format": "auto"}, "engine_args['load_format']='auto': the trainer sends the weights, leave it out"),
        ({"enable_chunked_prefill": True}, "vLLM's CPU build cannot draw with a seed then"),
        ({"max_model_len": "-x"}, "vLLM refuses: max_model_len='-x': Input should be a valid integer"),
        (
            {"max_model_len": 10**6, "hf_token": "secret"},
            "'hf_token': '...'}: vLLM refuses: User-specified m",
        ),
        ({"hf_token": ["secret"]}, "vLLM refuses: hf_token"),
        ({"max_num_batched_tokens": "many"}, "'max_num_batched_tokens': 'many'}: vLLM refuses: '<' not supported"),
    ):
        with pytest.raises(ValueError) as error:
            VLLMRollout(given).connect(random_model(), TOKENIZER)
        assert words in str(error.value) and "\n" not in str(error.value)
        assert "secret" not in str(error.value)
    for settings in (
        {"verify": "some"},
        {"bucket_mb": 0},
        {"sleep_level": 3},
        {"deadline": 0},
        {"tensor_parallel_size": 0},
    ):
        (name,) = settings
        with pytest.raises(ValueError, match=rf"VLLMRollout\({name}="):
            VLLMRollout(**settings)


if __name__ == "__main__":
    checks.run(dict(globals()))
