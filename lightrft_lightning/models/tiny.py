"""A language model small enough to learn from scratch on one CPU core, for the quick demo and the tests."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from lightrft_lightning._errors import import_extra

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

ALPHABET = "0123456789+= "


def char_tokenizer(alphabet: str = ALPHABET) -> PreTrainedTokenizerFast:
    """A tokenizer with one id a character, after ``<pad>``, ``<bos>`` and ``<eos>``; unknown characters are errors.

    Raises:
        ValueError: a character occurs twice.
    """
    if len(set(alphabet)) != len(alphabet):
        raise ValueError(f"alphabet={alphabet!r}: every character may occur once")
    tokenizers = import_extra("tokenizers", "hf")
    from tokenizers import decoders, models, pre_tokenizers

    special = ["<pad>", "<bos>", "<eos>"]
    vocabulary = {token: i for i, token in enumerate([*special, *alphabet])}
    tokenizer = tokenizers.Tokenizer(models.WordLevel(vocabulary))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return import_extra("transformers", "hf").PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        clean_up_tokenization_spaces=False,
    )


def tiny_llama(
    seed: int = 0, *, alphabet: str = ALPHABET, layers: int = 3, width: int = 128, heads: int = 4, max_length: int = 256
) -> LlamaForCausalLM:
    """A randomly initialised Llama for `char_tokenizer(alphabet)`; 0.6 million parameters by default.

    Args:
        seed: fixes the weights; the global random state is left as it is.
        alphabet: the tokenizer's characters.
        layers: decoder layers.
        width: hidden size; the feed-forward layers are three times as wide.
        heads: attention heads.
        max_length: most positions.
    """
    transformers = import_extra("transformers", "hf")
    config = transformers.LlamaConfig(
        vocab_size=len(alphabet) + 3,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=max_length,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return transformers.LlamaForCausalLM(config)
