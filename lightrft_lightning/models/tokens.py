"""Which ids end a text, which ones a model has, and which ones a tokenizer adds by itself."""

from __future__ import annotations

import logging
import operator
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_only

from lightrft_lightning._errors import import_extra

log = logging.getLogger(__name__)

_ANSWER = "the answer"


def text_tokenizer(tokenizer: Any) -> Any:
    """The tokenizer, or that inside of a processor for several kinds of input."""
    return getattr(tokenizer, "tokenizer", tokenizer)


# ------------------------------------------------------------------------------------------------------------- the end


def end_ids(model: Any, tokenizer: Any) -> frozenset[int]:
    """The ids that end a completion, and an answer to learn from.

    These are the end-of-sequence tokens of the generation config (instruction-tuned models often list several) or else
    the config, that of the tokenizer, and the one with which the chat template closes a turn of the assistant.

    Args:
        model: a Hugging Face model, what `load_model` takes, or None.
        tokenizer: of the model, or its processor.

    Raises:
        ValueError: a config names what is no id.
    """
    ids: set[int] = set()
    tokenizer = text_tokenizer(tokenizer)
    for value in (*_of_configs(model), tokenizer.eos_token_id, turn_end(tokenizer)):
        if value is None:
            continue
        listed = list(value) if isinstance(value, list | tuple) else [value]
        if not all(isinstance(i, int) for i in listed):
            raise ValueError(
                f"eos_token_id={value!r} of the model's generation config, or config: must be the id of a token or a "
                "list of these"
            )
        ids.update(listed)
    return frozenset(ids)


def _of_configs(model: Any) -> list[Any]:
    """What the generation config says, or the config if there is none."""
    if model is None:
        return []
    if hasattr(model, "config"):
        config = getattr(model, "generation_config", None) or model.config.get_text_config()
        return [getattr(config, "eos_token_id", None)]
    from lightrft_lightning.models.loading import load_config, made_or_found

    if isinstance(found := made_or_found(model), str):
        try:
            return [import_extra("transformers", "hf").GenerationConfig.from_pretrained(found).eos_token_id]
        except OSError:
            log.debug("%s has no generation_config.json: the ends of its config count", found)
    return [load_config(model).get_text_config().eos_token_id]


def turn_end(tokenizer: Any) -> int | None:
    """The added token that the chat template writes right behind the assistant's words; None if there is none."""
    template = getattr(tokenizer, "chat_template", None)
    return _turn_end(_ByIdentity(tokenizer), str(template)) if template else None


class _ByIdentity:
    """A tokenizer as a key: its own hash is that of its vocabulary, or none."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def __hash__(self) -> int:
        return id(self.tokenizer)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _ByIdentity) and other.tokenizer is self.tokenizer


@lru_cache(maxsize=8)
def _turn_end(key: _ByIdentity, template: str) -> int | None:
    tokenizer = key.tokenizer
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _ANSWER}]
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        behind = text[text.rindex(_ANSWER) + len(_ANSWER) :].lstrip()
        ids = tokenizer(behind, add_special_tokens=False)["input_ids"]
    except Exception as err:  # of a template for other messages, whose author raises whatever it is
        log.debug("no end of a turn is known: the chat template refuses %s: %s", messages, err)
        return None
    # Some tokenizers make a token of nothing, or of a space, in front of the first.
    first = next((i for i in ids if tokenizer.decode([i]).strip()), None)
    return first if first in getattr(tokenizer, "added_tokens_decoder", {}) else None


# --------------------------------------------------------------------------------------------------- ids that there are


def embedded_ids(model: Any) -> int | None:
    """How many ids `model` has embeddings for, or what `load_model` takes by its config; None if that is not known."""
    if not hasattr(model, "config"):
        from lightrft_lightning.models.loading import load_config

        return getattr(load_config(model).get_text_config(decoder=True), "vocab_size", None)
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    table = inner.get_input_embeddings() if hasattr(inner, "get_input_embeddings") else None
    # Not the shape of the weight, which may be sharded.
    size = getattr(table, "num_embeddings", None)
    return size if size is not None else getattr(inner.config.get_text_config(decoder=True), "vocab_size", None)


OF_TEXT = ("bos", "eos", "pad", "sep", "cls", "mask", "unk", "decoder_start", "forced_bos", "forced_eos")
"""Ids in a config that stand for themselves."""


def placeholder_ids(model: Any) -> frozenset[int]:
    """Ids that stand for images and the like in the prompts of `model`, or of its folder: some have no embedding."""
    if not hasattr(model, "config"):
        from lightrft_lightning.models.loading import load_config

        return frozenset(_placeholders(load_config(model).to_dict()))
    return frozenset(_placeholders(model.config.to_dict()))


def _placeholders(config: Mapping[str, Any]) -> Iterator[int]:
    for name, value in config.items():
        kind, _, what = str(name).rpartition("_token_")
        if isinstance(value, Mapping) and str(name).endswith("_config"):
            yield from _placeholders(value)
        elif what in ("id", "index") and kind not in OF_TEXT and isinstance(value, int):
            yield value


def check_ids(
    texts: Iterable[tuple[str, Sequence[int]]], size: int | None, tokenizer: Any, besides: Container[int] = ()
) -> None:
    """Look for token ids that a model with `size` embeddings does not have.

    Args:
        texts: what each is, for the message, and its ids.
        size: as `embedded_ids` says.
        tokenizer: to name the token, and to compare with; None: neither.
        besides: ids that need no embedding.

    Raises:
        ValueError: there is one. With a tokenizer that knows more tokens than the model this is so from the first text
            on in which one of these occurs.
    """
    if size is None:
        return
    tokenizer = text_tokenizer(tokenizer)
    for where, ids in texts:
        try:
            wrong = next((i for i in map(operator.index, ids) if not 0 <= i < size and i not in besides), None)
        except TypeError:
            other = next(i for i in ids if not hasattr(i, "__index__"))
            raise ValueError(f"{where} holds {other!r}, which is no token id: give whole numbers") from None
        if wrong is None:
            continue
        known = tokenizer is not None and 0 <= wrong < len(tokenizer)
        token = f" ({tokenizer.convert_ids_to_tokens(int(wrong))!r})" if known else ""
        more = f", the tokenizer has {len(tokenizer)} tokens" if tokenizer is not None else ""
        raise ValueError(
            f"{where} holds token {wrong}{token}, the model has embeddings for {size}{more}: take the model's own "
            "tokenizer, or enlarge the model first (model.resize_token_embeddings(len(tokenizer))) and save it"
        )


def check_data_ids(name: str, prompts: Any, model: Any, tokenizer: Any) -> None:
    """As `check_ids`, for the prompts of a data set and the texts that come with them.

    Args:
        name: of the data set.
        prompts: a list of `Prompt`, or several by name.
        model: see `embedded_ids`.
        tokenizer: of the data.
    """
    if isinstance(prompts, Mapping):
        for one, of_one in prompts.items():
            check_data_ids(f"{name}/{one}", of_one, model, tokenizer)
        return
    texts = (
        (f"{name}: {'prompt' if k == 0 else f'text {k} of prompt'} {i}, {prompt.text[:40]!r},", ids)
        for i, prompt in enumerate(prompts)
        for k, ids in enumerate((prompt.token_ids, *prompt.completions))
    )
    check_ids(texts, embedded_ids(model), tokenizer)


# ------------------------------------------------------------------------------------------ ids that a tokenizer adds


def prompt_ids(tokenizer: Any, texts: Sequence[str], *, special_tokens: bool = True) -> list[list[int]]:
    """The ids of texts that are to be continued.

    A start token that the text brings along and the tokenizer adds as well is there once; what the tokenizer adds
    behind a text is left out, since nothing could follow it.

    Args:
        tokenizer: any, or a processor.
        texts: rendered.
        special_tokens: whether the tokenizer adds its own; not to what a chat template has written.
    """
    tokenizer = text_tokenizer(tokenizer)
    rows = encoded(tokenizer, texts, special_tokens)
    if not special_tokens:
        return rows
    return [_continued(tokenizer, text, row) for text, row in zip(texts, rows, strict=True)]


def encoded(tokenizer: Any, texts: Sequence[str], special_tokens: bool) -> list[list[int]]:
    """The ids of texts.

    Raises:
        ValueError: one that the tokenizer has no tokens for; the message has its beginning.
    """
    if not texts:
        return []
    try:
        return [list(row) for row in tokenizer(list(texts), add_special_tokens=special_tokens)["input_ids"]]
    except Exception as err:  # the tokenizers library raises nothing more special
        if len(texts) == 1:
            raise ValueError(f"the tokenizer cannot encode {texts[0][:60]!r}: {err}") from err
        for text in texts:
            encoded(tokenizer, [text], special_tokens)
        raise


def _continued(tokenizer: Any, text: str, row: list[int]) -> list[int]:
    before, behind = added_ids(tokenizer, text, row)
    row = row[: len(row) - len(behind)]
    twice = bool(before) and row[: 2 * len(before)] == before * 2
    return row[len(before) :] if twice else row


def added_ids(tokenizer: Any, text: str, row: Sequence[int] | None = None) -> tuple[list[int], list[int]]:
    """What the tokenizer adds by itself in front of a text and behind it.

    Args:
        tokenizer: any.
        text: not empty.
        row: its ids with what is added, if they are known.
    """
    whole = list(tokenizer(text)["input_ids"] if row is None else row)
    bare = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    places = range(len(whole) - len(bare) + 1)
    # From behind: a text that begins with a start token looks the same one place earlier.
    at = next((k for k in reversed(places) if whole[k : k + len(bare)] == bare), None)
    return ([], []) if at is None or not bare else (whole[:at], whole[at + len(bare) :])


def tell_added_ids(tokenizer: Any, text: str) -> None:
    """One line about what the tokenizer adds to prompts like `text` by itself, if it does."""
    before, behind = added_ids(tokenizer, text)
    if behind:
        tokens = " ".join(map(str, tokenizer.convert_ids_to_tokens(behind)))
        rank_zero_only(log.warning)(
            "the tokenizer puts %s behind every text; prompts are taken without, as nothing could follow it", tokens
        )
    if before:
        tokens = " ".join(map(str, tokenizer.convert_ids_to_tokens(before)))
        twice = list(tokenizer(text)["input_ids"])[: 2 * len(before)] == before * 2
        also = ", and so do the prompts themselves: it is there once" if twice else ""
        rank_zero_info(f"the tokenizer puts {tokens} in front of every prompt{also}")
