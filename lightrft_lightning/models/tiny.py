"""A language model small enough to learn from scratch on one CPU core, for the quick demo and the tests."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from lightrft_lightning._errors import import_extra
from lightrft_lightning._seeds import global_seed

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

ALPHABET = "0123456789+= "
SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>")


def char_tokenizer(alphabet: str = ALPHABET) -> PreTrainedTokenizerFast:
    """A tokenizer with one id a character, after ``<pad>`` (0), ``<bos>`` (1) and ``<eos>`` (2).

    It adds no token by itself, gives text back exactly, and survives `save_pretrained` and `AutoTokenizer`.
    Characters outside `alphabet` make it raise when it is called.

    Raises:
        ValueError: `alphabet` is empty, or a character occurs twice.
    """
    if not alphabet or len(set(alphabet)) != len(alphabet):
        raise ValueError(f"alphabet={alphabet!r}: needs characters, each of them once")
    tokenizers = import_extra("tokenizers", "hf")
    vocabulary = {token: i for i, token in enumerate([*SPECIAL_TOKENS, *alphabet])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary))
    any_character = tokenizers.Regex(r"[\s\S]")  # unlike a dot, also a line break
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split(any_character, "isolated")
    tokenizer.decoder = tokenizers.decoders.Fuse()
    pad, bos, eos = SPECIAL_TOKENS
    fast: type[PreTrainedTokenizerFast] = import_extra("transformers", "hf").PreTrainedTokenizerFast
    return fast(
        tokenizer_object=tokenizer, pad_token=pad, bos_token=bos, eos_token=eos, clean_up_tokenization_spaces=False
    )


def tiny_llama(
    seed: int | None = None,
    *,
    alphabet: str = ALPHABET,
    layers: int = 3,
    width: int = 128,
    heads: int = 4,
    max_length: int = 256,
) -> LlamaForCausalLM:
    """A randomly initialised Llama for `char_tokenizer(alphabet)`, on the CPU; 0.64 million parameters by default.

    Args:
        seed: fixes the weights; default: Lightning's global seed, else 0. The random state is neither read nor changed.
        alphabet: the tokenizer's characters.
        layers: decoder layers.
        width: hidden size; the feed-forward layers are three times as wide.
        heads: attention heads.
        max_length: most positions.

    Raises:
        ValueError: `heads` does not divide `width` into even parts (rotary embeddings pair the dimensions of a head).
    """
    if width % (2 * heads):
        raise ValueError(f"width={width}, heads={heads}: the width of a head must be a whole, even number")
    transformers = import_extra("transformers", "hf")
    config = transformers.LlamaConfig(
        vocab_size=len(SPECIAL_TOKENS) + len(alphabet),
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=max_length,
        # Llama's own 0.02 is meant for large widths; at this one it costs a long plateau before anything is learnt, and
        # leaves weights that the noise of policy gradients disturbs.
        initializer_range=width**-0.5,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=False,
    )
    # On the CPU also inside `with torch.device("cuda")`: one seed means the same weights on every machine.
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(global_seed() if seed is None else seed)
        model: LlamaForCausalLM = transformers.LlamaForCausalLM(config)
    return model
