"""Prompts for training: where they come from, how they are rendered and tokenised, and in which order they are seen."""

from __future__ import annotations

import json
import logging
import string
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import replace
from itertools import islice
from os import PathLike
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch.utils.data import DataLoader, Dataset, default_collate
from torch.utils.data.distributed import DistributedSampler
from typing_extensions import override

from lightrft_lightning._errors import check_types, import_extra, unknown_name
from lightrft_lightning._seeds import derive_seed, global_seed
from lightrft_lightning.experience.fingerprint import difference, fingerprint
from lightrft_lightning.experience.trajectory import Prompt
from lightrft_lightning.models.tokens import encoded, end_ids, prompt_ids, tell_added_ids

log = logging.getLogger(__name__)

Row = dict[str, Any]
SUFFIXES = (".jsonl", ".json", ".parquet")


# -------------------------------------------------------------------------------------------------- order and position


class ResumableSampler(DistributedSampler):
    """A distributed sampler whose first epoch can start in the middle.

    The order of an epoch is a permutation that depends on `seed` and the epoch alone, not on the number of ranks, and
    the position is a number of samples over all ranks. So a run can continue at another world size: what is left of
    the epoch is dealt out anew. It is a `DistributedSampler` because Lightning replaces any other kind.

    Args:
        dataset: anything with a length.
        num_replicas: number of ranks that share the data.
        rank: this rank.
        shuffle: a new order every epoch (call `set_epoch`); False keeps the order of the data set.
        seed: fixes the orders.
        drop_last: leave out the samples that do not fill all ranks; False repeats some instead.
        consumed_samples: samples of the first epoch, over all ranks, to leave out. Later epochs start at 0.
    """

    def __init__(
        self,
        dataset: Any,
        num_replicas: int = 1,
        rank: int = 0,
        shuffle: bool = True,
        seed: int = 0,
        drop_last: bool = False,
        consumed_samples: int = 0,
    ) -> None:
        super().__init__(dataset, num_replicas, rank, shuffle, seed, drop_last)
        self.consumed_samples = consumed_samples

    @override
    def __iter__(self) -> Iterator[int]:
        start, self.consumed_samples = self.consumed_samples, 0
        order = self._order()
        rest = order[start:]
        if self.drop_last:
            rest = rest[: len(rest) // self.num_replicas * self.num_replicas]
        else:
            missing = -len(rest) % self.num_replicas
            rest += (order * (missing // max(len(order), 1) + 1))[:missing]
        return iter(rest[self.rank :: self.num_replicas])

    def _order(self) -> list[int]:
        size = len(self.dataset)  # type: ignore[arg-type]
        if not self.shuffle:
            return list(range(size))
        # Not seed + epoch as in the parent class: the next seed would see the same orders, one epoch earlier.
        generator = torch.Generator().manual_seed(derive_seed(self.seed, self.epoch))
        return torch.randperm(size, generator=generator).tolist()


class ResumableDataLoader(DataLoader):
    """A `DataLoader` that knows its position; Lightning keeps it in checkpoints through the two state methods.

    Build it with `make_dataloader`. Batches count when they are handed out, not when the sampler names them, so workers
    that run ahead cannot skew the position. `len()` is the number of batches of a full epoch, also in a partial one.
    Where nobody calls `set_epoch`, the epoch advances at the end of a pass.
    """

    # Class attributes in place of an own `__init__`: Lightning rebuilds loaders from the arguments of `__init__`.
    _epoch = 0
    _consumed = 0
    _before = 0
    _resume_epoch: int | None = None

    def state_dict(self) -> dict[str, int]:
        """Epoch, and how many of its samples over all ranks were handed out."""
        if self._consumed and self._consumed >= self.samples_per_epoch:
            return {"epoch": self._epoch + 1, "consumed_samples": 0}
        return {"epoch": self._epoch, "consumed_samples": self._consumed}

    def state_before_batch(self) -> dict[str, int]:
        """The same for before the latest batch, as one that was broken off is to come again."""
        return {"epoch": self._epoch, "consumed_samples": self._before}

    @property
    def batches_done(self) -> int:
        """Batches of the epoch that were handed out, as many as this many samples make now."""
        step = (self.batch_size or 1) * getattr(self.sampler, "num_replicas", 1)
        rest = self.samples_per_epoch - self._consumed
        return len(self) - (rest // step if self.drop_last else -(-rest // step))

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Continue there, if the next pass is one over that epoch. The world size may have changed since."""
        self._resume_epoch = state["epoch"]
        self._start_at(state["epoch"], state["consumed_samples"])

    def skip(self, consumed_samples: int) -> None:
        """Leave out the first `consumed_samples` (over all ranks) of the next pass, whichever epoch it is over."""
        epochs, rest = divmod(consumed_samples, self.samples_per_epoch)
        self._start_at(self._epoch + epochs, rest)

    @property
    def samples_per_epoch(self) -> int:
        """Samples that a full epoch hands out, over all ranks."""
        size, per_rank = self.batch_size or 1, len(self.sampler)  # type: ignore[arg-type]
        return (per_rank // size * size if self.drop_last else per_rank) * getattr(self.sampler, "num_replicas", 1)

    def _start_at(self, epoch: int, consumed: int) -> None:
        self._epoch, self._consumed, self._before = epoch, consumed, consumed
        if isinstance(self.sampler, ResumableSampler):
            self.sampler.set_epoch(epoch)
            self.sampler.consumed_samples = consumed

    @override
    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        # A generator: nothing is read before the first batch is asked for. When Lightning resumes, it calls `iter`
        # before it says which epoch it is.
        sampler = self.sampler
        if not isinstance(sampler, ResumableSampler):  # Lightning's own, for `overfit_batches` and `predict`
            yield from super().__iter__()
            return
        if self._resume_epoch not in (None, sampler.epoch):
            sampler.consumed_samples = 0
        self._resume_epoch = None
        self._epoch, self._consumed, self._before = sampler.epoch, sampler.consumed_samples, sampler.consumed_samples
        step = (self.batch_size or 1) * sampler.num_replicas
        for batch in super().__iter__():
            self._before = self._consumed
            self._consumed = min(self._consumed + step, self.samples_per_epoch)
            yield batch
        if sampler.epoch == self._epoch:
            sampler.set_epoch(self._epoch + 1)


class PromptBatch:
    """The prompts of one batch, in order.

    It can be iterated, indexed and measured like a list, and is deliberately no `collections.abc.Sequence`: Lightning
    walks through sequences to move and cast the tensors in them, and refuses frozen dataclasses such as `Prompt`.
    """

    def __init__(self, prompts: Iterable[Prompt]) -> None:
        self._prompts = tuple(prompts)

    def __len__(self) -> int:
        return len(self._prompts)

    def __iter__(self) -> Iterator[Prompt]:
        return iter(self._prompts)

    def __getitem__(self, index: int) -> Prompt:
        return self._prompts[index]

    def __repr__(self) -> str:
        return f"PromptBatch({list(self._prompts)!r})"


def collate(samples: list[Any]) -> Any:
    """Prompts become a `PromptBatch`, anything else what torch's default makes of it."""
    return PromptBatch(samples) if isinstance(samples[0], Prompt) else default_collate(samples)


def make_dataloader(
    dataset: Dataset[Any] | Sequence[Any],
    batch_size: int,
    *,
    num_replicas: int = 1,
    rank: int = 0,
    shuffle: bool = True,
    seed: int = 42,
    drop_last: bool = True,
    consumed_samples: int = 0,
    num_workers: int = 0,
    collate_fn: Callable[[list[Any]], Any] | None = None,
    **kwargs: Any,
) -> ResumableDataLoader:
    """A loader that gives each rank its share, reshuffles every epoch and can start in the middle.

    Args:
        dataset: map-style data set or a list.
        batch_size: samples of one batch on one rank.
        num_replicas: number of ranks that share the data.
        rank: this rank.
        shuffle: a new order every epoch.
        seed: fixes the orders.
        drop_last: leave out what does not fill a batch on every rank.
        consumed_samples: samples, over all ranks, already seen. From a full epoch on, the loader starts in a later one.
        num_workers: processes that read ahead.
        collate_fn: how samples become a batch; default: `collate`.
        **kwargs: further keywords of `torch.utils.data.DataLoader`.

    Raises:
        ValueError: the data set is empty or too small for one batch on every rank, or a number is out of range.
    """
    size = len(dataset)  # type: ignore[arg-type]
    if batch_size < 1 or consumed_samples < 0:
        raise ValueError(f"batch_size={batch_size} must be at least 1, consumed_samples={consumed_samples} at least 0")
    if size == 0:
        raise ValueError("the data set is empty")
    if drop_last and batch_size * num_replicas > size:
        ranks = f" on each of {num_replicas} ranks" if num_replicas > 1 else ""
        raise ValueError(
            f"batch_size={batch_size}{ranks} is more than the {size} samples of the data set: "
            "make the batch smaller or bring more data"
        )
    sampler = ResumableSampler(dataset, num_replicas, rank, shuffle, seed, drop_last)
    # An own generator: the default would draw a number from torch's global one at every `iter`, and a run that was
    # stopped and resumed calls `iter` more often than one that was not.
    kwargs.setdefault("generator", torch.Generator().manual_seed(seed))
    loader = ResumableDataLoader(
        dataset,  # type: ignore[arg-type]
        batch_size=batch_size,
        sampler=sampler,
        num_workers=num_workers,
        collate_fn=collate_fn or collate,
        drop_last=drop_last,
        **kwargs,
    )
    loader.skip(consumed_samples)
    return loader


# ------------------------------------------------------------------------------------------------------------- sources


def load_rows(source: Any, limit: int | None = None, prompt_column: str = "prompt") -> list[Row]:
    """The rows of a source as dicts.

    Args:
        source: path of a .jsonl, .json (a list) or .parquet file or of a folder written by
            `datasets.Dataset.save_to_disk`; a list of strings, dicts or conversations (lists of ``{role, content}``);
            a `datasets.Dataset`; or ``{"task": name, **options}``, see `tasks.make_task`.
        limit: at most so many rows, from the start.
        prompt_column: the column that strings and conversations are put into.

    Raises:
        FileNotFoundError: no such file.
        ValueError: unknown kind of file, a broken line (with its number), a row that is none, or no rows at all.
        TypeError: `source` is none of these.
    """
    source = _table_rows(source)
    if isinstance(source, (str, PathLike)):
        name, rows = str(source), _read_path(Path(source))
    elif isinstance(source, Mapping):
        from lightrft_lightning.tasks import make_task

        if "task" not in source:
            keys = ", ".join(map(repr, source))
            raise ValueError(f"a mapping with {keys} is no list of rows: take one of its values, or {{'task': name}}")
        name, rows = f"task {source.get('task')!r}", iter(make_task(source))
    elif isinstance(source, Iterable) and not isinstance(source, (bytes, Iterator, Set)):
        name, rows = type(source).__name__, iter(source)
    else:
        raise TypeError(
            f"prompts come from a path, a list, a datasets.Dataset or {{'task': name}}, got {type(source).__name__}"
        )
    result = [_as_row(row, prompt_column, f"{name}: row {i}") for i, row in enumerate(islice(rows, limit))]
    if not result:
        raise ValueError(f"{name}: no prompts")
    return result


def _table_rows(source: Any) -> Any:
    """The rows of a table (pandas, polars, pyarrow), which would give its columns if one went through it."""
    if hasattr(source, "iterrows"):
        return source.to_dict("records")
    rows = getattr(source, "to_dicts", None) or (getattr(source, "to_pylist", None) if _has_columns(source) else None)
    return source if rows is None else rows()


def _has_columns(source: Any) -> bool:
    return hasattr(source, "column_names") and not hasattr(source, "features")  # as datasets.Dataset has


def _as_row(item: Any, prompt_column: str, where: str) -> Row:
    if isinstance(item, Mapping):
        return dict(item)
    if isinstance(item, str) or _is_conversation(item):
        return {prompt_column: item}
    raise ValueError(f"{where} must be a string, a mapping or a list of {{role, content}}, got {_short(item)}")


def _is_conversation(value: Any) -> bool:
    return (
        isinstance(value, (list, tuple))
        and len(value) > 0
        and all(isinstance(m, Mapping) and {"role", "content"} <= m.keys() for m in value)
    )


def _read_path(path: Path) -> Iterator[Any]:
    if not path.exists():
        raise FileNotFoundError(f"no such file: {str(path)!r} (looked in {str(Path.cwd())!r})")
    if path.is_dir():
        return _read_saved_dataset(path)
    if path.suffix == ".jsonl":
        return _read_jsonl(path)
    if path.suffix == ".json":
        return _read_json(path)
    if path.suffix == ".parquet":
        return _read_parquet(path)
    raise ValueError(f"{unknown_name('kind of file', path.suffix, SUFFIXES)} (or a folder), in {str(path)!r}")


def _read_saved_dataset(path: Path) -> Iterator[Any]:
    datasets = import_extra("datasets", "demo")
    try:
        dataset = datasets.load_from_disk(str(path))
    except FileNotFoundError as err:
        raise ValueError(f"{str(path)!r} is a folder, but none that datasets.save_to_disk wrote") from err
    if isinstance(dataset, datasets.DatasetDict):
        splits = ", ".join(repr(str(path / name)) for name in dataset)
        raise ValueError(f"{str(path)!r} holds several splits: take one of {splits}")
    return iter(dataset)


def _read_parquet(path: Path) -> Iterator[Any]:
    # Not through `datasets`: it would first copy the file into its cache folder.
    parquet = import_extra("pyarrow.parquet", "demo")
    try:
        file = parquet.ParquetFile(path)
    except ValueError as err:
        raise ValueError(f"{str(path)!r} is no Parquet file: {err}") from err
    with file:
        for batch in file.iter_batches():
            yield from batch.to_pylist()


def _read_jsonl(path: Path) -> Iterator[Any]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield _parse_json(line, f"{path}:{number}")


def _read_json(path: Path) -> Iterator[Any]:
    rows = _parse_json(path.read_bytes(), str(path))
    if not isinstance(rows, list):
        raise ValueError(f"{path}: must be a list of rows, is {_short(rows)}. One row a line is a .jsonl file")
    return iter(rows)


def _parse_json(text: bytes, where: str) -> Any:
    try:
        return json.loads(text.decode("utf-8-sig"))
    except (ValueError, RecursionError) as err:
        raise ValueError(f"{where}: broken JSON ({err}): {_short(text.decode('utf-8', 'replace').strip())}") from err


def _short(value: Any, width: int = 80) -> str:
    text = repr(value)
    return text if len(text) <= width else f"{text[: width - 3]}..."


# ----------------------------------------------------------------------------------------------- rendering, data module


class PromptDataModule(pl.LightningDataModule):
    """Prompts for `RLHFModule`, and the texts after them for `SFTModule` and `RewardModule`; tokenised once.

    A text after the prompt is a string or messages, the last of which is the assistant's and counts; messages before it
    repeat the prompt, or are the prompt where the row has no column for it. Its tokens follow those of the prompt,
    which stay as they are for generation, and end with the end token.

    Args:
        train: source of the training prompts, see `load_rows`.
        val: source of the prompts of `validate` and `test`; several as ``{name: source}``, each logged by itself too.
        predict: source of the prompts of `predict`.
        batch_size: prompts of one training batch on one rank.
        val_batch_size: the same for the others; default: `batch_size`.
        prompt_column: the column with the prompt: text, or a conversation as a list of ``{role, content}``.
        system_prompt: put before every conversation that has none of its own; needs a chat template.
        template: makes the prompt from columns in place of `prompt_column`, e.g. ``"What is {a} + {b}?"``.
        chat_template: render with the tokenizer's chat template; default: if it has one.
        max_prompt_length: longest prompt in tokens.
        overlong: ``error``, or ``drop`` the rows that are longer and log how many.
        limit: read at most so many rows of each source.
        shuffle: a new order of the training prompts every epoch.
        seed: fixes these orders; default: Lightning's global seed.
        num_workers: processes that read ahead; there is nothing left to do for them unless the data set is huge.
        tokenizer: default: the one of the module that is trained.
        completion_columns: columns with a text that follows the prompt, e.g. ``["chosen", "rejected"]``; default: those
            that the module trains on, none for `RLHFModule`.
        max_length: longest prompt with one of these texts, in tokens; default: no limit.

    Attributes:
        train_prompts: the training prompts after `setup`; likewise `val_prompts` and `predict_prompts`.
        val_names: the names of the sources in `val`; none if there is one source. Then `val_prompts` is a dict.
    """

    def __init__(
        self,
        train: Any = None,
        val: Any = None,
        predict: Any = None,
        batch_size: int = 8,
        val_batch_size: int | None = None,
        prompt_column: str = "prompt",
        system_prompt: str | None = None,
        template: str | None = None,
        chat_template: bool | None = None,
        max_prompt_length: int = 1024,
        overlong: str = "error",
        limit: int | None = None,
        shuffle: bool = True,
        seed: int | None = None,
        num_workers: int = 0,
        tokenizer: Any = None,
        completion_columns: list[str] | None = None,
        max_length: int | None = None,
    ) -> None:
        super().__init__()
        check_types("PromptDataModule", PromptDataModule.__init__, locals())
        self.sources = {"train": train, "val": val, "predict": predict}
        # A mapping with this key is a task, see `load_rows`.
        named = val if isinstance(val, Mapping) and "task" not in val else {}
        self.val_names = tuple(named)
        self.sources |= {f"val/{name}": source for name, source in named.items()}
        self.batch_size = batch_size
        self.val_batch_size = batch_size if val_batch_size is None else val_batch_size
        self.prompt_column = prompt_column
        self.system_prompt = system_prompt
        self.template = template
        self.chat_template = chat_template
        self.max_prompt_length = max_prompt_length
        self.overlong = overlong
        self.limit = limit
        self.shuffle = shuffle
        self.seed = global_seed() if seed is None else seed
        self.num_workers = num_workers
        self.tokenizer = tokenizer
        self.completion_columns = completion_columns
        self.max_length = max_length
        self.train_prompts: list[Prompt] = []
        self.val_prompts: list[Prompt] | dict[str, list[Prompt]] = []
        self.predict_prompts: list[Prompt] = []
        self._tokenized_with: dict[str, Any] = {}
        self._fingerprint: tuple[list[Prompt], dict[str, Any]] | None = None
        self._check_settings()

    def _check_settings(self) -> None:
        if self.overlong not in ("error", "drop"):
            raise ValueError(unknown_name("overlong", self.overlong, ("error", "drop")))
        for name in ("batch_size", "val_batch_size", "max_prompt_length", "max_length", "limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"PromptDataModule({name}={value!r}): must be at least 1")
        if self.template is not None and not all(name.isidentifier() for name in template_columns(self.template)):
            raise ValueError(f"template={self.template!r}: name the columns, e.g. 'What is {{a}} + {{b}}?'")
        for name in self.val_names:
            if not isinstance(name, str) or not name or "/" in name:
                raise ValueError(f"PromptDataModule(val=...): {name!r} must be a name without a slash")
        named = [self.sources[f"val/{name}"] for name in self.val_names]
        if self.sources["val"] == {} or any(source is None or isinstance(source, (int, float)) for source in named):
            raise ValueError(
                f"PromptDataModule(val={_short(self.sources['val'])}): neither a task, {{'task': name, ...}}, nor "
                "{name: source}"
            )

    @override
    def setup(self, stage: str) -> None:
        """Read, render and tokenise what `stage` needs; everything that is wrong with the data is raised here."""
        needed = {"fit": ("train", "val"), "validate": ("val",), "test": ("val",), "predict": ("predict",)}[stage]
        required = needed[0]
        if self.sources[required] is None:
            raise ValueError(f"PromptDataModule has no prompts for {stage!r}: pass {required}=<path or list>")
        tokenizer = self._find_tokenizer()
        for name in needed:
            # Lightning calls `setup` before every fit and validate.
            how = (tokenizer, self._columns_with_completions())
            if self.sources[name] is not None and self._tokenized_with.get(name) != how:
                setattr(self, f"{name}_prompts", self._load_all(name, tokenizer))
                self._tokenized_with[name] = how
        if stage == "fit":
            self.train_dataloader()  # raises if a batch is larger than the data set

    @override
    def state_dict(self) -> dict[str, Any]:
        """What tells a resumed run whether its training prompts are the same."""
        if self._fingerprint is None or self._fingerprint[0] is not self.train_prompts:
            self._fingerprint = (self.train_prompts, fingerprint(self.train_prompts))
        if not self.train_prompts:
            return {}
        return {**self._fingerprint[1], **{name: getattr(self, name) for name in ("batch_size", "shuffle", "seed")}}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Say what has changed since the checkpoint was written."""
        now = self.state_dict()
        if not now or "ordered" not in state_dict:
            return
        if told := difference(state_dict, now):
            rank_zero_warn(
                f"the training prompts are not those of the checkpoint: {told}. Training goes on at the same place of "
                "the epoch, in the order of the new rows: in this epoch some may come again or be left out"
            )
        elif changed := [n for n in ("shuffle", "seed") if state_dict[n] != now[n]]:
            names = ", ".join(f"{n}={now[n]!r} in place of {state_dict[n]!r}" for n in changed)
            rank_zero_warn(
                f"PromptDataModule({names}): the rest of this epoch comes in the new order: some prompts may come "
                "again or be left out"
            )
        elif state_dict["batch_size"] != now["batch_size"]:
            rank_zero_warn(
                f"PromptDataModule(batch_size={now['batch_size']}), and {state_dict['batch_size']} in the checkpoint: "
                "the epoch goes on after the prompts that were seen, in batches of the new size"
            )

    @override
    def train_dataloader(self) -> ResumableDataLoader:
        return self._loader(self.train_prompts, self.batch_size, shuffle=self.shuffle, drop_last=True)

    @override
    def val_dataloader(self) -> Any:
        prompts = self.val_prompts
        if isinstance(prompts, dict):
            return [self._loader(of_one, self.val_batch_size) for of_one in prompts.values()]
        return self._loader(prompts, self.val_batch_size) if prompts else []

    @override
    def test_dataloader(self) -> Any:
        return self.val_dataloader()

    @override
    def predict_dataloader(self) -> ResumableDataLoader:
        return self._loader(self.predict_prompts, self.val_batch_size)

    def _loader(
        self, prompts: list[Prompt], batch_size: int, shuffle: bool = False, drop_last: bool = False
    ) -> ResumableDataLoader:
        # Not world size and rank: under tensor parallelism several ranks see the same data.
        share = (self.trainer.distributed_sampler_kwargs if self.trainer else None) or {}
        if not drop_last:  # the sampler would repeat some, which nobody could tell from the others
            missing = -len(prompts) % share.get("num_replicas", 1)
            prompts = prompts + [replace(prompts[k % len(prompts)], filler=True) for k in range(missing)]
        return make_dataloader(
            prompts,
            batch_size,
            shuffle=shuffle,
            drop_last=drop_last,
            seed=self.seed,
            num_workers=self.num_workers,
            **share,
        )

    def _find_tokenizer(self) -> Any:
        tokenizer = self.tokenizer
        if tokenizer is None and self.trainer is not None:
            tokenizer = getattr(self.trainer.lightning_module, "tokenizer", None)
        if tokenizer is None:
            raise ValueError("no tokenizer: pass PromptDataModule(tokenizer=...) or train a module that has one")
        return tokenizer

    def _load_all(self, name: str, tokenizer: Any) -> list[Prompt] | dict[str, list[Prompt]]:
        if name == "val" and self.val_names:
            return {one: self._load(f"val/{one}", tokenizer) for one in self.val_names}
        return self._load(name, tokenizer)

    def _load(self, name: str, tokenizer: Any) -> list[Prompt]:
        rows = load_rows(self.sources[name], self.limit, self.prompt_column)
        columns = self._columns_with_completions()
        use_template = self._use_chat_template(tokenizer, name)
        wheres = [f"{name}: row {i}" for i in range(len(rows))]
        contents = [self._content(row, columns, where) for row, where in zip(rows, wheres, strict=True)]
        rendered = [self._render(c, tokenizer, use_template, w) for c, w in zip(contents, wheres, strict=True)]
        texts = [text for text, _ in rendered]
        # A rendered chat template brings its own special tokens.
        ids = prompt_ids(tokenizer, texts, special_tokens=not use_template)
        if not use_template:
            tell_added_ids(tokenizer, texts[0])
        hidden = None if self.template is not None else self.prompt_column
        prompts = [
            Prompt(tuple(tokens), text, {k: v for k, v in row.items() if k != hidden}, messages=messages)
            for tokens, (text, messages), row in zip(ids, rendered, rows, strict=True)
        ]
        ends = self._end_ids(tokenizer) if columns else frozenset()
        if columns and not ends:
            raise ValueError(
                f"completion_columns={columns!r}: the tokenizer has no end token (eos_token) to end them with"
            )
        if columns:
            prompts = [
                replace(
                    prompt,
                    completions=self._completions(prompt, content, columns, tokenizer, ends, where),
                )
                for prompt, content, where in zip(prompts, contents, wheres, strict=True)
            ]
        return self._check_lengths(prompts, name)

    def _end_ids(self, tokenizer: Any) -> frozenset[int]:
        """What ends a completion of the module's model."""
        module = self.trainer.lightning_module if self.trainer else None
        return end_ids(getattr(module, "model_or_source", None), tokenizer)

    def _columns_with_completions(self) -> tuple[str, ...]:
        module = self.trainer.lightning_module if self.trainer else None
        given = self.completion_columns
        return tuple(getattr(module, "completion_columns", ()) if given is None else given)

    def _completions(
        self,
        prompt: Prompt,
        content: Any,
        columns: Sequence[str],
        tokenizer: Any,
        ends: frozenset[int],
        where: str,
    ) -> tuple[tuple[int, ...], ...]:
        """Token ids of the texts after `prompt`, which was made from `content`."""
        result, use_template = [], bool(prompt.messages)
        for column in columns:
            answer = _answer(prompt.fields, column, content, where)
            whole = prompt.text + answer
            if use_template:
                whole = self._apply_chat_template(prompt.messages, tokenizer, where, answer)
                if not whole.startswith(prompt.text):
                    raise ValueError(
                        f"{where}: with column {column!r} behind it the chat template writes the prompt in another "
                        f"way: {_short(whole)}, and alone {_short(prompt.text)}. Set chat_template=False"
                    )
            _check_unicode(whole, f"{where}: column {column!r}")
            result.append(completion_ids(tokenizer, prompt, whole, special_tokens=not use_template, ends=ends))
        return tuple(result)

    def _use_chat_template(self, tokenizer: Any, name: str) -> bool:
        available = getattr(tokenizer, "chat_template", None) is not None
        if self.chat_template and not available:
            raise ValueError("chat_template=True, but the tokenizer has no chat template")
        use = available if self.chat_template is None else self.chat_template
        if self.system_prompt is not None and not use:
            why = "chat_template=False" if available else "the tokenizer has none"
            raise ValueError(f"system_prompt={_short(self.system_prompt)} needs a chat template, and {why}")
        return use

    def _render(self, content: Any, tokenizer: Any, use_template: bool, where: str) -> tuple[str, tuple[Row, ...]]:
        """The text of one prompt, ready for the tokenizer, and the conversation that it comes from, if any."""
        if not isinstance(content, str) and not use_template:
            raise ValueError(f"{where} is a conversation, which needs a tokenizer with a chat template")
        messages = self._messages(content) if use_template else ()
        text = self._apply_chat_template(messages, tokenizer, where) if use_template else content
        _check_unicode(text, where)
        return text, messages

    def _content(self, row: Row, completion_columns: Sequence[str], where: str) -> Any:
        if self.template is None and self.prompt_column not in row:
            for column in completion_columns:
                if _is_conversation(row.get(column)) and len(row[column]) > 1:
                    return row[column][:-1]
        columns = [self.prompt_column] if self.template is None else template_columns(self.template)
        for column in columns:
            if column not in row:
                raise ValueError(f"{where}: {unknown_name('column', column, map(str, row))}")
        if self.template is not None:
            try:
                return self.template.format_map(row)
            except (LookupError, ValueError, AttributeError, TypeError) as err:
                raise ValueError(f"{where}: template={self.template!r} does not fit {_short(row)}: {err}") from err
        content = row[self.prompt_column]
        if not isinstance(content, str) and not _is_conversation(content):
            raise ValueError(
                f"{where}: column {self.prompt_column!r} must be text or a list of {{role, content}}, "
                f"is {_short(content)}"
            )
        return content

    def _messages(self, content: Any) -> tuple[Row, ...]:
        messages = [{"role": "user", "content": content}] if isinstance(content, str) else [dict(m) for m in content]
        if self.system_prompt is not None and messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": self.system_prompt})
        return tuple(messages)

    def _apply_chat_template(
        self, messages: Sequence[Mapping[str, Any]], tokenizer: Any, where: str, answer: str | None = None
    ) -> str:
        """The prompt up to where the assistant's turn begins, or with that turn if there is an `answer`."""
        whole = list(messages) if answer is None else [*messages, {"role": "assistant", "content": answer}]
        try:
            return tokenizer.apply_chat_template(whole, add_generation_prompt=answer is None, tokenize=False)
        except Exception as err:  # whatever the template's author raises, e.g. for a role it does not know
            raise ValueError(f"{where}: the chat template refuses {_short(whole)}: {err}") from err

    def _check_lengths(self, prompts: list[Prompt], name: str) -> list[Prompt]:
        for i, prompt in enumerate(prompts):
            if not prompt.token_ids:
                raise ValueError(f"{name}: prompt {i} is empty")
        long = [self._too_long(prompt) for prompt in prompts]
        fitting = [p for p, problem in zip(prompts, long, strict=True) if not problem]
        overlong = len(prompts) - len(fitting)
        if overlong and (self.overlong == "error" or not fitting):
            i = next(i for i, problem in enumerate(long) if problem)
            raise ValueError(
                f"{name}: prompt {i} {long[i]} ({overlong} of {len(prompts)} are too long): {_short(prompts[i].text)}. "
                "Raise the limit, or leave them out with overlong='drop'"
            )
        if overlong:
            limits = f"max_prompt_length={self.max_prompt_length}"
            limits += "" if self.max_length is None else f" or max_length={self.max_length}"
            log.warning(
                "%s: dropped %d of %d prompts that are longer than %s tokens", name, overlong, len(prompts), limits
            )
        return fitting

    def _too_long(self, prompt: Prompt) -> str:
        """What is too long about a prompt, or nothing."""
        length = len(prompt.token_ids)
        if length > self.max_prompt_length:
            return f"has {length} tokens, max_prompt_length={self.max_prompt_length}"
        longest = length + max(map(len, prompt.completions), default=0)
        if self.max_length is not None and longest > self.max_length:
            return f"with its completion has {longest} tokens, max_length={self.max_length}"
        return ""


def _answer(row: Mapping[str, Any], column: str, prompt: Any, where: str) -> str:
    """The text of a column that follows `prompt`, which is text or a conversation."""
    if column not in row:
        raise ValueError(f"{where}: {unknown_name('column', column, map(str, row))}")
    value = row[column]
    if isinstance(value, str):
        return value
    if not _is_conversation(value) or value[-1]["role"] != "assistant" or not isinstance(value[-1]["content"], str):
        raise ValueError(
            f"{where}: column {column!r} must be text or a list of {{role, content}} that ends with the assistant, "
            f"is {_short(value)}"
        )
    before = [(m["role"], m["content"]) for m in value[:-1]]
    messages = [("user", prompt)] if isinstance(prompt, str) else [(m["role"], m["content"]) for m in prompt]
    if before and before != messages:
        raise ValueError(
            f"{where}: column {column!r} begins with another prompt than {_short(prompt)}: {_short(value)}"
        )
    return value[-1]["content"]


def completion_ids(
    tokenizer: Any, prompt: Prompt, whole: str, *, special_tokens: bool = True, ends: Collection[int] | None = None
) -> tuple[int, ...]:
    """The token ids that follow those of `prompt` in `whole`, up to the first that ends a completion.

    If there is none, the tokenizer's end token is added. The ids of the prompt stay as an engine gets them; where a
    tokenizer would merge across the border, the rest is tokenised by itself.

    Args:
        tokenizer: has an end token, unless there are
        ends: what ends a completion, see `models.tokens.end_ids`; default: as far as the tokenizer alone tells.
        prompt: tokenised already.
        whole: its text with what follows.
        special_tokens: whether the tokenizer added its own to the prompt.
    """
    (ids,), length = encoded(tokenizer, [whole], special_tokens), len(prompt.token_ids)
    rest = ids[length:]
    if tuple(ids[:length]) != prompt.token_ids:
        (rest,) = encoded(tokenizer, [whole[len(prompt.text) :]], special_tokens=False)
    ends = end_ids(None, tokenizer) if ends is None else ends
    # Templates write more after a turn's end, e.g. a line break, which an engine that stops there never sees.
    at = next((k for k, i in enumerate(rest) if i in ends), len(rest))
    default = min(ends) if tokenizer.eos_token_id is None else tokenizer.eos_token_id
    return (*rest[:at], rest[at] if at < len(rest) else default)


def _check_unicode(text: str, where: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as err:
        raise ValueError(f"{where} is not valid Unicode ({err.reason} at {err.start}): {_short(text)}") from err


def template_columns(template: str) -> list[str]:
    """Names of the columns in a format string; ``"{a[0]} {b.c}"`` uses ``a`` and ``b``.

    Raises:
        ValueError: it is no format string, or reaches into the insides of an object.
    """
    try:
        names = [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
    except ValueError as err:
        raise ValueError(f"template={template!r} is no format string: {err}") from err
    if inside := [name for name in names if "._" in name]:  # through a method's __globals__ it could read anything
        raise ValueError(f"template={template!r}: {inside[0]!r} is a private attribute, leave it out")
    return [name.replace("[", ".").split(".")[0] for name in names]
