from __future__ import annotations

import json
import logging
import re
import warnings

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningCLI
from torch.utils.data import DataLoader

from lightrft_lightning.data import (
    PromptBatch,
    PromptDataModule,
    ResumableDataLoader,
    ResumableSampler,
    load_rows,
    make_dataloader,
)
from lightrft_lightning.experience.trajectory import Prompt
from lightrft_lightning.models.tiny import char_tokenizer

CHAT_TEMPLATE = (
    "{% for m in messages %}{% if m.role not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('no such role') }}{% endif %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def make_tokenizer(chat_template=None, bos=False):
    """A real character-level tokenizer; `bos` adds a token to plain text, as Llama's does."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocab = {"<unk>": 0, "<bos>": 1} | {chr(c): c - 30 for c in range(32, 127)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<bos>", chat_template=chat_template
    )


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="module")
def chat_tokenizer():
    return make_tokenizer(CHAT_TEMPLATE, bos=True)


def prompts(n):
    return [Prompt((i,), str(i)) for i in range(n)]


def seen(loader):
    return [[p.text for p in batch] for batch in loader]


# -------------------------------------------------------------------------------------------------- sampler and loader


def test_epochs_are_different_permutations():
    sampler = ResumableSampler(range(50), seed=3)
    orders = []
    for epoch in range(3):
        sampler.set_epoch(epoch)
        orders.append(list(sampler))
    assert [sorted(o) for o in orders] == [list(range(50))] * 3
    assert orders[0] != orders[1] != orders[2]
    sampler.set_epoch(0)
    assert list(sampler) == orders[0]
    assert list(ResumableSampler(range(50), seed=4)) not in orders


def test_first_epoch_starts_in_the_middle():
    full = list(ResumableSampler(range(20)))
    sampler = ResumableSampler(range(20), consumed_samples=12)
    assert len(sampler) == 20
    assert list(sampler) == full[12:]
    assert list(sampler) == full


@pytest.mark.parametrize("drop_last", [True, False])
@pytest.mark.parametrize(("size", "before", "after"), [(24, 1, 3), (24, 4, 2), (23, 2, 3), (5, 1, 4), (10, 1, 2)])
def test_position_carries_over_to_another_world_size(size, before, after, drop_last):
    def ranks(world, consumed):
        samplers = [ResumableSampler(range(size), world, r, True, 0, drop_last, consumed) for r in range(world)]
        return [list(s) for s in samplers]

    first = [i for step in zip(*ranks(before, 0), strict=True) for i in step][: before * 3]
    rest = ranks(after, len(first))
    assert len({len(r) for r in rest}) == 1, "ranks with unequal work hang in their collectives"
    flat = {i for r in rest for i in r}
    if drop_last:
        assert not flat & set(first)
        assert len(flat) > size - len(first) - after
    else:
        assert flat | set(first) == set(range(size))


def test_ranks_share_an_epoch():
    loaders = [make_dataloader(prompts(12), 2, num_replicas=3, rank=r, seed=1) for r in range(3)]
    texts = [text for loader in loaders for batch in seen(loader) for text in batch]
    assert sorted(texts, key=int) == [str(i) for i in range(12)]
    assert [len(loader) for loader in loaders] == [2, 2, 2]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("drop_last", [True, False])
def test_state_after_each_batch_continues_exactly(workers, drop_last):
    def loader():
        return make_dataloader(prompts(11), 2, seed=5, drop_last=drop_last, num_workers=workers)

    straight = loader()
    everything = seen(straight) + seen(straight)
    for stop in (1, 2, 4, 5, 6, 7, 8):
        first = loader()
        got = []
        while len(got) < stop:
            for batch in first:
                got.append([p.text for p in batch])
                if len(got) == stop:
                    break
        second = loader()
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        assert second.state_dict() == first.state_dict()
        while len(got) < len(everything):
            got += seen(second)
        assert got[: len(everything)] == everything, f"stopped after {stop}"
    assert len(second) == len(straight) == (5 if drop_last else 6)


def test_position_is_global_over_ranks():
    loader = make_dataloader(prompts(24), 2, num_replicas=3, rank=1)
    next(iter(loader))
    assert loader.state_dict() == {"epoch": 0, "consumed_samples": 6}


def test_position_of_another_epoch_is_not_applied():
    loader = make_dataloader(prompts(8), 2)
    loader.load_state_dict({"epoch": 0, "consumed_samples": 6})
    loader.sampler.set_epoch(1)
    assert len(seen(loader)) == 4


def test_consumed_samples_of_a_hand_written_loop():
    straight = make_dataloader(prompts(11), 2)
    first, second = seen(straight), seen(straight)
    assert first != second
    assert seen(make_dataloader(prompts(11), 2, consumed_samples=4)) == first[2:]
    assert seen(make_dataloader(prompts(11), 2, consumed_samples=10 + 6)) == second[3:]
    loader = make_dataloader(prompts(11), 2, consumed_samples=6)
    loader.sampler.set_epoch(1)
    assert seen(loader) == second[3:]
    loader.sampler.set_epoch(0)
    assert seen(loader) == first


def test_loader_leaves_the_global_random_state_alone():
    before = torch.get_rng_state()
    seen(make_dataloader(prompts(8), 2))
    assert torch.equal(torch.get_rng_state(), before)


def test_unshuffled_and_plain_data_sets():
    assert seen(make_dataloader(prompts(5), 2, shuffle=False, drop_last=False)) == [["0", "1"], ["2", "3"], ["4"]]
    (batch,) = make_dataloader([torch.zeros(3), torch.ones(3)], 2, shuffle=False)
    assert batch.tolist() == [[0, 0, 0], [1, 1, 1]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((prompts(3), 4), "batch_size=4 is more than the 3 samples"),
        (([], 4), "the data set is empty"),
        ((prompts(3), 0), "batch_size=0 must be at least 1"),
    ],
)
def test_loader_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_dataloader(*arguments)
    with pytest.raises(ValueError, match="batch_size=2 on each of 2 ranks is more than the 3 samples"):
        make_dataloader(prompts(3), 2, num_replicas=2)


# ------------------------------------------------------------------------------------------------------------ Lightning


class Recorder(pl.LightningModule):
    """Trains one number and remembers which prompts it saw."""

    def __init__(self, tokenizer=None):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.tokenizer = tokenizer
        self.seen = []
        self.val_seen = []

    def training_step(self, batch, batch_idx):
        assert isinstance(batch, PromptBatch)
        self.seen.append((self.current_epoch, batch_idx, [p.text for p in batch]))
        return self.weight * 1.0

    def validation_step(self, batch, batch_idx):
        self.val_seen += [p.text for p in batch]

    def predict_step(self, batch, batch_idx):
        return [p.text for p in batch]

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def make_trainer(root, **kwargs):
    settings = {
        "accelerator": "cpu", "devices": 1, "logger": False, "enable_progress_bar": False,
        "enable_model_summary": False, "default_root_dir": root,
    }  # fmt: skip
    return pl.Trainer(**(settings | kwargs))


def fit(root, data, ckpt_path=None, checkpoint=None, **kwargs):
    module = Recorder()
    callbacks = [ModelCheckpoint(root, save_last=True, **(checkpoint or {"every_n_train_steps": 1}))]
    make_trainer(root, callbacks=callbacks, **kwargs).fit(module, datamodule=data(), ckpt_path=ckpt_path)
    return module.seen


@pytest.fixture
def data(tokenizer):
    def build(**kwargs):
        return PromptDataModule([str(i) for i in range(13)], batch_size=2, tokenizer=tokenizer, seed=7, **kwargs)

    return build


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("stop", range(1, 14))
def test_resumed_fit_sees_what_an_uninterrupted_one_sees(tmp_path, data, stop):
    straight = fit(tmp_path / "straight", data, max_steps=15)
    assert [(e, i) for e, i, _ in straight] == [(s // 6, s % 6) for s in range(15)]
    first = fit(tmp_path / "parts", data, max_steps=stop)
    second = fit(tmp_path / "parts", data, max_steps=15, ckpt_path="last")
    assert first + second == straight


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("stop", [3, 6, 8])
def test_resume_with_workers(tmp_path, data, stop):
    def with_workers():
        return data(num_workers=1)

    straight = fit(tmp_path / "straight", data, max_steps=9)
    first = fit(tmp_path / "parts", with_workers, max_steps=stop)
    assert first + fit(tmp_path / "parts", with_workers, max_steps=9, ckpt_path="last") == straight


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("val", [False, True])
def test_resume_from_the_end_of_an_epoch(tmp_path, data, val):
    def build():
        return data(val=["x", "y"]) if val else data()

    at_end = {"save_on_train_epoch_end": True}
    straight = fit(tmp_path / "straight", build, max_epochs=3)
    first = fit(tmp_path / "parts", build, max_epochs=1, checkpoint=at_end)
    second = fit(tmp_path / "parts", build, max_epochs=3, checkpoint=at_end, ckpt_path="last")
    assert first + second == straight


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("stop", [2, 6, 9])
def test_resume_bounded_by_epochs(tmp_path, data, stop):
    straight = fit(tmp_path / "straight", data, max_epochs=3)
    first = fit(tmp_path / "parts", data, max_steps=stop)
    assert first + fit(tmp_path / "parts", data, max_epochs=3, ckpt_path="last") == straight


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("stop", [2, 3, 4, 6])
def test_resume_with_limited_epochs(tmp_path, data, stop):
    straight = fit(tmp_path / "straight", data, max_steps=9, limit_train_batches=3)
    first = fit(tmp_path / "parts", data, max_steps=stop, limit_train_batches=3)
    assert first + fit(tmp_path / "parts", data, max_steps=9, limit_train_batches=3, ckpt_path="last") == straight


@pytest.mark.filterwarnings("ignore")
def test_batches_pass_lightning_untouched(tmp_path, tokenizer):
    """In bf16-true Lightning casts every batch, which fails on a list of frozen dataclasses."""
    module = Recorder(tokenizer)
    data = PromptDataModule(train=["a", "b"], val=["c", "d", "e"], predict=["f", "g"], batch_size=2)
    trainer = make_trainer(tmp_path, max_epochs=2, precision="bf16-true", enable_checkpointing=False)
    trainer.fit(module, datamodule=data)
    assert [sorted(texts) for _, _, texts in module.seen] == [["a", "b"]] * 2
    assert trainer.predict(module, datamodule=data) == [["f", "g"]]
    module.val_seen.clear()
    trainer.validate(module, datamodule=data, verbose=False)
    assert module.val_seen == ["c", "d", "e"]


@pytest.mark.filterwarnings("ignore")
def test_overfit_batches(tmp_path, data):
    seen = fit(tmp_path, data, max_epochs=2, overfit_batches=2, checkpoint={"save_on_train_epoch_end": True})
    assert [texts for _, _, texts in seen] == [["0", "1"], ["2", "3"]] * 2


@pytest.mark.filterwarnings("ignore")
def test_each_rank_gets_its_share(tmp_path, tokenizer):
    module = PromptDataModule([str(i) for i in range(8)], batch_size=2, tokenizer=tokenizer)
    module.setup("fit")
    module.trainer = type("T", (), {"distributed_sampler_kwargs": {"num_replicas": 2, "rank": 1}})()
    sampler = module.train_dataloader().sampler
    assert (sampler.num_replicas, sampler.rank) == (2, 1)


@pytest.mark.filterwarnings("ignore")
def test_command_line(tmp_path):
    (tmp_path / "config.yaml").write_text(
        "data:\n  train: {task: digits_addition, size: 4, split: train}\n  val: [one, two]\n"
        "  batch_size: 2\n  chat_template: false\n"
        "trainer: {accelerator: cpu, max_steps: 1, logger: false, enable_checkpointing: false, barebones: true}\n"
    )
    cli = LightningCLI(
        Recorder,
        PromptDataModule,
        args=["--config", str(tmp_path / "config.yaml")],
        run=False,
        save_config_callback=None,
    )
    cli.model.tokenizer = make_tokenizer()
    cli.trainer.fit(cli.model, datamodule=cli.datamodule)
    ((_, _, texts),) = cli.model.seen
    assert all(re.fullmatch(r"\d\d\+\d\d=", text) for text in texts)
    assert [p.text for p in cli.datamodule.val_prompts] == ["one", "two"]


# -------------------------------------------------------------------------------------------------------------- sources

ROWS = [{"prompt": "What is 2 + 3?", "answer": "5"}, {"prompt": "Größe 😀?", "answer": None}]


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_jsonl(tmp_path):
    path = write(
        tmp_path / "a.jsonl", "\ufeff" + "\n\n".join(json.dumps(r, ensure_ascii=False) for r in ROWS) + "\n \n"
    )
    assert load_rows(path) == ROWS
    assert load_rows(path, limit=1) == ROWS[:1]


def test_json(tmp_path):
    assert load_rows(write(tmp_path / "a.json", json.dumps(ROWS))) == ROWS


def test_parquet_and_saved_folder(tmp_path):
    import datasets

    dataset = datasets.Dataset.from_list(ROWS)
    dataset.to_parquet(tmp_path / "a.parquet")
    dataset.save_to_disk(tmp_path / "folder")
    assert load_rows(str(tmp_path / "a.parquet")) == ROWS
    assert load_rows(tmp_path / "a.parquet", limit=1) == ROWS[:1]
    assert load_rows(str(tmp_path / "folder")) == ROWS
    assert load_rows(dataset) == ROWS


def test_folder_with_splits(tmp_path):
    import datasets

    datasets.DatasetDict({"test": datasets.Dataset.from_list(ROWS)}).save_to_disk(tmp_path)
    with pytest.raises(ValueError, match=re.escape(repr(str(tmp_path / "test")))):
        load_rows(str(tmp_path))
    assert load_rows(str(tmp_path / "test")) == ROWS


def test_lists():
    chat = [{"role": "user", "content": "hi"}]
    assert load_rows(["a", {"prompt": "b", "x": 1}, chat], prompt_column="prompt") == [
        {"prompt": "a"},
        {"prompt": "b", "x": 1},
        {"prompt": chat},
    ]


def test_task():
    assert len(load_rows({"task": "addition", "size": 5, "seed": 1})) == 5


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", "", "a.jsonl: no prompts"),
        ("a.jsonl", "\n \n", "a.jsonl: no prompts"),
        ("a.json", "[]", "a.json: no prompts"),
        ("a.jsonl", '{"prompt": "x"}\n\n{"prompt": "y"\n', r"a.jsonl:3: broken JSON .*\{\"prompt\": \"y\""),
        ("a.jsonl", "[" * 100_000, "a.jsonl:1: broken JSON"),
        ("a.jsonl", '{"prompt": "x"}\n17\n', "a.jsonl: row 1 must be a string, a mapping .*, got 17"),
        ("a.json", '{"prompt": "x"}', "must be a list of rows"),
        ("a.txt", "x", r"unknown kind of file '.txt'.*'.jsonl'"),
        ("a.parquet", "x", "a.parquet' is no Parquet file"),
    ],
)
def test_bad_files(tmp_path, name, content, message):
    with pytest.raises(ValueError, match=message):
        load_rows(write(tmp_path / name, content))


def test_line_that_is_no_utf8(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'"ok"\n"\xff\xfe"\n')
    with pytest.raises(ValueError, match=r"a\.jsonl:2: broken JSON"):
        load_rows(tmp_path / "a.jsonl")


def test_missing_file_and_foreign_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match=re.escape(str(tmp_path / "nope.jsonl"))):
        load_rows(str(tmp_path / "nope.jsonl"))
    with pytest.raises(ValueError, match=r"none that datasets\.save_to_disk wrote"):
        load_rows(str(tmp_path))


def test_tables_are_read_by_rows():
    pandas, pyarrow = pytest.importorskip("pandas"), pytest.importorskip("pyarrow")
    rows = [{"prompt": "a", "answer": "b"}, {"prompt": "c", "answer": "d"}]
    for table in (pandas.DataFrame(rows), pyarrow.Table.from_pylist(rows)):
        assert load_rows(table) == rows
    with pytest.raises(ValueError, match="a mapping with 'train', 'test' is no list of rows: take one of its values"):
        load_rows({"train": rows, "test": rows})


@pytest.mark.parametrize("source", [3, b"x", iter([]), None, {"in", "any", "order"}])
def test_sources_of_other_types(source):
    with pytest.raises(TypeError, match="prompts come from a path, a list"):
        load_rows(source)


# ----------------------------------------------------------------------------------------------------------- rendering


def load(source, tokenizer, **kwargs):
    module = PromptDataModule(source, batch_size=1, tokenizer=tokenizer, **kwargs)
    module.setup("fit")
    return module.train_prompts


def test_plain_text(tokenizer):
    (prompt,) = load([{"prompt": "2+3=", "answer": "5", "level": [1]}], tokenizer)
    assert prompt.text == "2+3="
    assert prompt.token_ids == tuple(tokenizer("2+3=")["input_ids"]) and len(prompt.token_ids) == 4
    assert prompt.fields == {"answer": "5", "level": [1]}


def test_template(tokenizer):
    (prompt,) = load([{"a": 2, "b": 3.14159}], tokenizer, template="What is {a} + {b:.1f}?")
    assert prompt.text == "What is 2 + 3.1?"
    assert prompt.fields == {"a": 2, "b": 3.14159}


def test_chat_template_brings_its_own_special_tokens(chat_tokenizer):
    (chat,) = load(["hi"], chat_tokenizer)
    assert chat.text == "<user>hi<assistant>"
    assert chat_tokenizer.bos_token_id not in chat.token_ids
    (plain,) = load(["hi"], chat_tokenizer, chat_template=False)
    assert plain.text == "hi"
    assert plain.token_ids[0] == chat_tokenizer.bos_token_id


def test_system_prompt(chat_tokenizer):
    rows = ["hi", [{"role": "system", "content": "own"}, {"role": "user", "content": "ho"}]]
    first, second = load(rows, chat_tokenizer, system_prompt="be brief")
    assert first.text == "<system>be brief<user>hi<assistant>"
    assert second.text == "<system>own<user>ho<assistant>"
    assert first.messages == ({"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"})
    assert second.messages == tuple(rows[1])


def test_plain_text_has_no_messages(tokenizer):
    (prompt,) = load(["hi"], tokenizer)
    assert prompt.messages == ()


# ------------------------------------------------------------------------------------------------- texts after a prompt


CHAT = [{"role": "user", "content": "hi"}]
ANSWER = {"role": "assistant", "content": "ho"}


def with_end(tokenizer, rest=""):
    """The tokenizer with a template that writes `rest` after the end of an answer."""
    tokenizer.eos_token = "<unk>"
    if tokenizer.chat_template:
        ends = "{% if m.role == 'assistant' %}<unk>" + rest + "{% endif %}{% endfor %}"
        tokenizer.chat_template = CHAT_TEMPLATE.replace("{% endfor %}", ends)
    return tokenizer


def completions(rows, tokenizer, columns=("answer",), **settings):
    """The texts after each prompt, by way of their tokens, which must begin where the prompt's end."""
    prompts = load(rows, tokenizer, completion_columns=list(columns), **settings)
    return [[tokenizer.decode(ids).replace(" ", "") for ids in p.completions] for p in prompts]


def test_texts_follow_the_prompt_and_end():
    tokenizer = with_end(make_tokenizer(bos=True))
    (prompt,) = load([{"prompt": "2+3=", "answer": "5"}], tokenizer, completion_columns=["answer"])
    (ids,) = prompt.completions
    assert prompt.token_ids + ids == (*tokenizer("2+3=5")["input_ids"], tokenizer.eos_token_id)
    assert prompt.fields == {"answer": "5"}
    pairs = [{"prompt": "a", "chosen": "b", "rejected": ""}]
    assert completions(pairs, tokenizer, ["chosen", "rejected"]) == [["b<unk>", "<unk>"]]
    assert load(pairs, tokenizer)[0].completions == ()


def test_prompt_keeps_its_tokens_where_a_tokenizer_would_merge():
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocab = {"<eos>": 0, "a": 1, "b": 2, "ab": 3}
    bpe = Tokenizer(models.BPE(vocab, [("a", "b")]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<eos>")
    first, second = load([{"prompt": "a", "answer": "b"}, {"prompt": "b", "answer": "ab"}], tokenizer,
                         completion_columns=["answer"])  # fmt: skip
    assert (first.token_ids, first.completions) == ((1,), ((2, 0),))
    assert (second.token_ids, second.completions) == ((2,), ((3, 0),))


@pytest.mark.parametrize("rest", ["", "x"])
def test_chat_template_writes_the_answer_as_it_writes_the_prompt(rest):
    """What a template writes after the end token is left out: an engine that stops there never sees it."""
    tokenizer = with_end(make_tokenizer(CHAT_TEMPLATE, bos=True), rest)
    for row in (
        {"prompt": "hi", "answer": "ho"},
        {"prompt": "hi", "answer": [ANSWER]},
        {"prompt": CHAT, "answer": [*CHAT, ANSWER]},
        {"answer": [*CHAT, ANSWER]},
        {"prompt": [*CHAT, ANSWER, *CHAT], "answer": "ho"},
    ):
        (prompt,) = load([row], tokenizer, completion_columns=["answer"])
        assert prompt.text.endswith("<user>hi<assistant>")
        assert prompt.completions == ((*tokenizer("ho", add_special_tokens=False)["input_ids"], 0),)


def test_pairs_that_hold_the_whole_conversation():
    tokenizer = with_end(make_tokenizer(CHAT_TEMPLATE))
    worse = {"role": "assistant", "content": "no"}
    rows = [{"chosen": [*CHAT, ANSWER], "rejected": [*CHAT, worse]}]
    assert completions(rows, tokenizer, ["chosen", "rejected"], system_prompt="s") == [["ho<unk>", "no<unk>"]]
    rows[0]["rejected"] = [{"role": "user", "content": "he"}, worse]
    message = "train: row 0: column 'rejected' begins with another prompt than [{'role': 'user', 'content': 'hi'}]"
    with pytest.raises(ValueError, match=re.escape(message)):
        completions(rows, tokenizer, ["chosen", "rejected"])


def test_long_rows_are_refused_or_dropped(caplog):
    tokenizer = with_end(make_tokenizer())
    rows = [{"prompt": "abc", "answer": "d"}, {"prompt": "abc", "answer": "defg"}]
    with pytest.raises(ValueError, match=re.escape("prompt 1 with its completion has 8 tokens, max_length=7 (1 of 2")):
        completions(rows, tokenizer, max_length=7)
    assert completions(rows, tokenizer, max_length=7, overlong="drop") == [["d<unk>"]]
    assert "dropped 1 of 2 prompts that are longer than max_prompt_length=1024 or max_length=7 tokens" in caplog.text


def test_another_module_makes_the_data_new():
    class Wants(Recorder):
        completion_columns = ("answer",)

    data = PromptDataModule([{"prompt": "a", "answer": "b"}], batch_size=1, tokenizer=with_end(make_tokenizer()))
    found = []
    for module in (Recorder(), Wants(), Recorder()):
        data.trainer = type("T", (), {"lightning_module": module, "distributed_sampler_kwargs": None})()
        data.setup("fit")
        found.append(len(data.train_prompts[0].completions))
    assert found == [0, 1, 0]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "x", "anser": "y"}, "train: row 0: unknown column 'answer'. Did you mean 'anser'"),
        ({"prompt": "x", "answer": 5}, "row 0: column 'answer' must be text or a list of {role, content} that ends"),
        ({"prompt": "x", "answer": CHAT}, "that ends with the assistant, is [{'role': 'user'"),
        ({"prompt": "x", "answer": "\ud800"}, "row 0: column 'answer' is not valid Unicode"),
        ({"answer": "y"}, "row 0: unknown column 'prompt'"),
        ({"answer": [*CHAT, ANSWER]}, "row 0 is a conversation, which needs a tokenizer with a chat template"),
    ],
)
def test_bad_texts_after_a_prompt(row, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        completions([row], with_end(make_tokenizer()))


def test_texts_need_an_end_token_and_a_steady_template(tokenizer):
    with pytest.raises(ValueError, match="the tokenizer has no end token"):
        completions([{"prompt": "x", "answer": "y"}], tokenizer)
    fickle = with_end(make_tokenizer("{{ messages | length }}"))
    fickle.chat_template = "{{ messages | length }}"
    with pytest.raises(
        ValueError, match="with column 'answer' behind it the chat template writes the prompt in another"
    ):
        completions([{"prompt": "x", "answer": "y"}], fickle)


@pytest.mark.parametrize(
    ("rows", "settings", "message"),
    [
        ([{"promt": "x", "answer": 1}], {}, "row 0: unknown column 'prompt'. Did you mean 'promt'? Valid: 'answer'"),
        (["x"], {"template": "{a}"}, "unknown column 'a'"),
        ([{"a": "x"}], {"template": "{a:.2f}"}, "template='{a:.2f}' does not fit"),
        ([{"a": {}}], {"template": "{a[b]}"}, "does not fit"),
        ([{"prompt": None}], {}, "column 'prompt' must be text or a list of {role, content}, is None"),
        ([{"prompt": [1]}], {}, "must be text or a list of {role, content}, is [1]"),
        (["ok", ""], {}, "train: prompt 1 is empty"),
        (["bad \ud800"], {}, "row 0 is not valid Unicode"),
        ([[{"role": "user", "content": "x"}]], {}, "needs a tokenizer with a chat template"),
        (["x"], {"chat_template": True}, "the tokenizer has no chat template"),
        (["x"], {"system_prompt": "s"}, "system_prompt='s' needs a chat template"),
        (["abc", "abcdef", "abcdefg"], {"max_prompt_length": 5},
         "train: prompt 1 has 6 tokens, max_prompt_length=5 (2 of 3 are too long): 'abcdef'"),
        (["abcdef"], {"max_prompt_length": 5, "overlong": "drop"}, "1 of 1 are too long"),
        ([], {}, "no prompts"),
        (None, {}, "no prompts for 'fit': pass train="),
    ],
)  # fmt: skip
def test_bad_rows(tokenizer, rows, settings, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        load(rows, tokenizer, **settings)


def test_chat_template_refuses_a_role(chat_tokenizer):
    with pytest.raises(ValueError, match=r"row 0: the chat template refuses .*no such role"):
        load([[{"role": "tool", "content": "x"}]], chat_tokenizer)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"overlong": "truncate"}, "unknown overlong 'truncate'"),
        ({"batch_size": 0}, "batch_size=0): must be at least 1"),
        ({"limit": 0}, "limit=0"),
        ({"template": "{} + {}"}, "name the columns"),
        ({"template": "{a"}, "no format string"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        PromptDataModule(["x"], **settings)


def test_overlong_prompts_are_dropped_and_counted(tokenizer, caplog):
    with caplog.at_level(logging.WARNING):
        kept = load(["abc", "abcdef", "ab"], tokenizer, max_prompt_length=3, overlong="drop")
    assert [p.text for p in kept] == ["abc", "ab"]
    assert "dropped 1 of 3 prompts" in caplog.text


def test_batch_larger_than_the_data(tokenizer):
    with pytest.raises(ValueError, match="batch_size=8 is more than the 2 samples"):
        PromptDataModule(["a", "b"], batch_size=8, tokenizer=tokenizer).setup("fit")


def test_small_validation_sets_are_fine(tokenizer):
    module = PromptDataModule(["a", "b"], val=["c"], batch_size=2, val_batch_size=8, tokenizer=tokenizer)
    module.setup("fit")
    assert seen(module.val_dataloader()) == seen(module.test_dataloader()) == [["c"]]


@pytest.mark.parametrize("val", [{"a/b": ["1"]}, {"": ["1"]}, {3: ["1"]}])
def test_names_of_validation_sets_are_checked(val):
    with pytest.raises(ValueError, match=re.escape(f"{next(iter(val))!r} must be a name")):
        PromptDataModule(val=val)


@pytest.mark.parametrize("val", [{}, {"taks": "addition", "size": 8}, {"easy": None}])
def test_a_misspelt_task_is_no_set_of_sources(val):
    with pytest.raises(ValueError, match=re.escape(f"PromptDataModule(val={val!r}): neither a task, {{'task'")):
        PromptDataModule(val=val)


def test_what_is_wrong_with_a_named_validation_set_is_raised_with_its_name(tokenizer):
    data = PromptDataModule(val={"easy": ["1"], "hard": [{"question": "2"}]}, tokenizer=tokenizer)
    with pytest.raises(ValueError, match=r"val/hard: row 0: unknown column 'prompt'"):
        data.setup("validate")


def test_without_validation(tokenizer):
    module = PromptDataModule(["a", "b"], batch_size=2, tokenizer=tokenizer)
    module.setup("fit")
    assert module.val_dataloader() == []
    with pytest.raises(ValueError, match="no prompts for 'validate': pass val="):
        module.setup("validate")


def test_no_tokenizer():
    with pytest.raises(ValueError, match="no tokenizer"):
        PromptDataModule(["a"], batch_size=1).setup("fit")


def test_setup_again_tokenises_only_for_another_tokenizer(tokenizer, chat_tokenizer):
    module = PromptDataModule(["a"], batch_size=1, tokenizer=tokenizer)
    module.setup("fit")
    first = module.train_prompts
    module.setup("fit")
    assert module.train_prompts is first
    module.tokenizer = chat_tokenizer
    module.setup("fit")
    assert module.train_prompts[0].text == "<user>a<assistant>"


def test_limit(tokenizer):
    assert len(load(["a"] * 10, tokenizer, limit=3)) == 3


def test_loader_kinds():
    loader = make_dataloader(prompts(4), 2)
    assert isinstance(loader, ResumableDataLoader) and isinstance(loader, DataLoader)
    batch = next(iter(loader))
    assert len(batch) == 2 and batch[0] in list(batch)
    assert "PromptBatch([Prompt(" in repr(batch)


def resumed_with(data, **changes):
    """What is said when a checkpoint of one data module is read by another."""
    before = small_data(train=data)
    after = small_data(**{"train": data, **changes})
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        after.load_state_dict(before.state_dict())
    return " ".join(str(w.message) for w in told)


def small_data(**settings):
    module = PromptDataModule(**{"batch_size": 2, "seed": 1, "tokenizer": char_tokenizer(), **settings})
    module.setup("fit")
    return module


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({}, "^$"),
        ({"train": ["1+1=", "2+2=", "3+3=", "4+4=", "5+5="]}, "^the training prompts are not .*: 5 rows in place of 4"),
        ({"train": ["2+2=", "1+1=", "3+3=", "4+4="]}, "the same rows in another order.*may come again or be left out"),
        ({"train": ["1+1=", "2+2=", "3+3=", "4+5="]}, "4 rows as before, with other token ids"),
        ({"template": "{prompt} "}, "4 rows as before, with other token ids"),
        ({"seed": 2}, r"PromptDataModule\(seed=2 in place of 1\): the rest of this epoch comes in the new order"),
        ({"batch_size": 4}, r"PromptDataModule\(batch_size=4\), and 2 in the checkpoint: the epoch goes on after"),
    ],
)
def test_data_that_changed_since_the_checkpoint_is_told_in_one_line(changes, told):
    said = resumed_with(["1+1=", "2+2=", "3+3=", "4+4="], **changes)
    assert re.search(told, said) and "\n" not in said
