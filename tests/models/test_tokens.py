"""What ends a text, which ids there are and which ones a tokenizer adds: one answer for all who ask."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Trainer
from tiny_models import config_of, random_model
from transformers import GenerationConfig, Idefics3Config, PreTrainedTokenizerFast

from lightrft_lightning import (
    PromptDataModule,
    RewardModule,
    RLHFModule,
    SamplingParams,
    SFTModule,
    TransformersRollout,
)
from lightrft_lightning.models.tiny import char_tokenizer
from lightrft_lightning.models.tokens import (
    check_ids,
    embedded_ids,
    end_ids,
    placeholder_ids,
    prompt_ids,
    tell_added_ids,
    turn_end,
)

ALPHABET = "abcdefghijklmnopqrstuvwxyz? "
TEMPLATE = (
    "{% for m in messages %}<turn>{{ m['role'] }} {{ m['content'] }}<end> {% endfor %}"
    "{% if add_generation_prompt %}<turn>assistant {% endif %}"
)


def make_tokenizer(template=TEMPLATE, extra=("<turn>", "<end>"), before=(), behind=()):
    """`before` and `behind`: the tokens that it adds to a text by itself."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = char_tokenizer(ALPHABET)
    tokenizer.add_special_tokens({"additional_special_tokens": list(extra)})
    tokenizer.chat_template = template
    if before or behind:
        core, added = tokenizer.backend_tokenizer, [*before, *behind]
        core.post_processor = TemplateProcessing(
            single=[*before, "$A", *behind],
            special_tokens=[(token, core.token_to_id(token)) for token in added],
        )
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=core, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", chat_template=template
        )
    return tokenizer


def fit(module, train, **data):
    callbacks = [TransformersRollout()] if isinstance(module, RLHFModule) else []
    prompts = PromptDataModule(train=train, batch_size=len(train), **data)
    trainer = Trainer(
        strategy="lightrft_fake", accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=callbacks,
    )  # fmt: skip
    trainer.fit(module, prompts)
    return prompts.train_prompts


def model(**settings):
    return random_model(config_of("llama", **settings))


# ---- the end


@pytest.mark.parametrize("listed", [True, False])  # without it in the generation config, the template tells
def test_an_answer_ends_where_the_engine_stops(listed):
    tokenizer, policy = make_tokenizer(), model()
    end = tokenizer.convert_tokens_to_ids("<end>")
    if listed:
        policy.generation_config.eos_token_id = [2, end]
    assert end_ids(policy, tokenizer) == {2, end}
    rows = [{"prompt": "ab", "answer": "cd", "chosen": "x", "rejected": "yz"}]
    taught = [
        tokenizer.convert_ids_to_tokens(list(ids))
        for module in (SFTModule(policy, tokenizer), RewardModule(model(), tokenizer))
        for ids in fit(module, rows)[0].completions
    ]
    assert taught == [["c", "d", "<end>"], ["x", "<end>"], ["y", "z", "<end>"]]
    engine = TransformersRollout()
    engine.connect(policy, tokenizer)
    assert engine.end_ids == {2, end}
    policy.lm_head.bias = torch.nn.Parameter(torch.eye(48)[end] * 1e4)
    ((completion,),) = engine.generate([[3, 4]], SamplingParams(n=1, max_new_tokens=4))
    assert completion.token_ids == (end,) and completion.finish_reason == "eos"


def test_the_ends_of_a_folder_are_those_of_the_model_in_it(tmp_path):
    policy, tokenizer = model(eos_token_id=[2, 7]), char_tokenizer(ALPHABET)
    policy.save_pretrained(tmp_path)
    assert end_ids(str(tmp_path), tokenizer) == end_ids(policy, tokenizer) == {2, 7}
    GenerationConfig(eos_token_id=[9]).save_pretrained(tmp_path)
    assert end_ids(str(tmp_path), tokenizer) == {2, 9}
    file = tmp_path / "generation_config.json"
    file.write_text('{"eos_token_id": "<end>"}')
    with pytest.raises(
        ValueError, match=r"eos_token_id='<end>' of the model's generation config.* must be the id of a"
    ):
        end_ids(str(tmp_path), tokenizer)
    file.write_text('{"eos_token_id": [9')
    with pytest.raises(ValueError, match=r"generation_config.json is no JSON: Expecting"):
        end_ids(str(tmp_path), tokenizer)
    file.unlink()
    assert end_ids(str(tmp_path), tokenizer) == {2, 7}


@pytest.mark.parametrize("source", ["tiny-llama", {"name": "tiny-llama", "layers": 1}])
def test_a_registered_model_has_the_ends_of_its_config(source):
    tokenizer = char_tokenizer(ALPHABET)
    assert end_ids(source, tokenizer) == {2}
    assert embedded_ids(source) == 16


@pytest.mark.parametrize(
    ("template", "end"),
    [
        (TEMPLATE, "<end>"),
        ("{% for m in messages %}{{ m['content'] }} <eos>{% endfor %}", "<eos>"),
        ("{% for m in messages %}<turn>{{ m['content'] }}{% endfor %}", None),  # a text may simply stop
        ("{% for m in messages %}{{ m['content'] }} end {% endfor %}", None),  # words, which an answer may hold
        ("{{ raise_exception('no') }}", None),
        (None, None),
    ],
)
def test_the_end_of_a_turn_is_the_token_behind_the_answer(template, end):
    tokenizer = make_tokenizer(template)
    assert turn_end(tokenizer) == (None if end is None else tokenizer.convert_tokens_to_ids(end))


# ---- ids that there are


def test_a_processor_is_asked_through_the_tokenizer_inside_of_it():
    from transformers import Idefics3ImageProcessorPil, Idefics3Processor

    tokenizer = char_tokenizer(ALPHABET)
    special = ["<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>"]
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    processor = Idefics3Processor(Idefics3ImageProcessorPil(), tokenizer, image_seq_len=4)
    assert end_ids(None, processor) == {tokenizer.eos_token_id}
    assert prompt_ids(processor, ["ab"]) == prompt_ids(tokenizer, ["ab"])
    with pytest.raises(
        ValueError, match=f"token {tokenizer.convert_tokens_to_ids('z')} ..z.., the model has embeddings"
    ):
        check_ids([("prompt 0", tokenizer("z")["input_ids"])], 5, processor)


def test_ids_without_an_embedding_are_refused_before_anything_is_generated():
    tokenizer = make_tokenizer(None, extra=[f"<extra{i}>" for i in range(20)])
    told = r"prompt 1, '<extra19>ab', holds token 50 \('<extra19>'\), the model has embeddings for 48, .*resize_token"
    module = RLHFModule(
        model(), lambda completion: 1.0, tokenizer=tokenizer, sampling=SamplingParams(n=2, max_new_tokens=4)
    )
    with pytest.raises(ValueError, match=f"train: {told}"):
        fit(module, [{"prompt": "ab"}, {"prompt": "<extra19>ab"}])
    assert module.last_trajectories == []
    with pytest.raises(ValueError, match="train: text 1 of prompt 0, 'ab', holds token 50"):
        fit(SFTModule(model(), tokenizer), [{"prompt": "ab", "answer": "<extra19>"}])
    engine = TransformersRollout()
    engine.connect(model(), tokenizer)
    for ids in ([3, 50], [3, -1]):
        with pytest.raises(ValueError, match=f"prompt 1 holds token {ids[1]}.* the model has embeddings for 48"):
            engine.generate([[3], ids], SamplingParams(n=1, max_new_tokens=1))
    fit(SFTModule(model(), tokenizer), [{"prompt": "ab", "answer": "<extra1>"}])  # a larger tokenizer is none


def test_placeholders_of_images_need_no_embedding():
    config = Idefics3Config(image_token_id=99, pad_token_id=70, text_config={"model_type": "llama", "vocab_size": 48})
    assert placeholder_ids(SimpleNamespace(config=config)) == {99}
    engine = TransformersRollout()
    engine.vocabulary_size, engine.placeholders = 48, frozenset({99})
    engine.check_ids([[3, 99]], images=True)
    for ids, images in (([3, 99], False), ([3, 70], True)):
        with pytest.raises(ValueError, match=f"prompt 0 holds token {ids[1]}, the model has embeddings for 48"):
            engine.check_ids([ids], images)


def test_ids_that_only_the_model_has_are_decoded_to_nothing():
    policy, tokenizer = model(), char_tokenizer("ab")
    policy.lm_head.bias = torch.nn.Parameter(torch.eye(48)[40] * 1e4)
    samples = []
    module = RLHFModule(
        policy, lambda completion: samples.append(completion) or 0.0, tokenizer=tokenizer,
        sampling=SamplingParams(n=2, max_new_tokens=3, stop=("b",)),
    )  # fmt: skip
    fit(module, [{"prompt": "ab"}])
    assert samples == ["", ""] and module.last_trajectories[0].completion.token_ids == (40, 40, 40)


# ---- ids that a tokenizer adds


def test_nothing_follows_an_end_that_a_tokenizer_adds(caplog):
    tokenizer = make_tokenizer(None, before=["<bos>"], behind=["<eos>"])
    assert tokenizer("ab")["input_ids"] == [1, 3, 4, 2]
    with caplog.at_level(logging.INFO):
        (prompt,) = fit(SFTModule(model(), tokenizer), [{"prompt": "ab", "answer": "cd"}])
    assert prompt.token_ids == (1, 3, 4) and prompt.completions == ((5, 6, 2),)
    assert "puts <eos> behind every text; prompts are taken without" in caplog.text
    assert "puts <bos> in front of every prompt" in caplog.text


def test_a_start_token_is_there_once(caplog):
    tokenizer = make_tokenizer("<bos>" + TEMPLATE, before=["<bos>"])
    assert prompt_ids(tokenizer, ["<bos>ab", "ab"]) == [[1, 3, 4], [1, 3, 4]]
    (chat,) = fit(SFTModule(model(), tokenizer), [{"prompt": "ab", "answer": "c"}])
    assert chat.token_ids.count(1) == 1
    engine = TransformersRollout()
    engine.connect(model(), tokenizer)
    assert engine.tokenize([chat.text]) == [list(chat.token_ids)]
    with caplog.at_level(logging.INFO):
        tell_added_ids(tokenizer, "<bos>ab")
    assert "in front of every prompt, and so do the prompts themselves: it is there once" in caplog.text


def test_a_tokenizer_that_adds_nothing_is_not_mentioned(caplog):
    with caplog.at_level(logging.INFO):
        tell_added_ids(char_tokenizer(ALPHABET), "ab")
    assert not caplog.records


def test_the_text_that_cannot_be_encoded_is_named():
    with pytest.raises(ValueError, match=r"the tokenizer cannot encode 'What is 7 \+ 12\?': .*UNK"):
        prompt_ids(char_tokenizer(), ["1+1=", "What is 7 + 12?"])
