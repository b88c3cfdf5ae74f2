"""``lightrft convert``: checkpoints of any back end as Hugging Face folders, and back.

Tensors are read, converted and written one by one; what is in memory at a time is about one output file. The result is
read again and compared; one that differs does not stay.
"""

from __future__ import annotations

import json
import logging
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

import torch
from torch import Tensor

from lightrft_lightning._errors import import_extra, unknown_name
from lightrft_lightning.checkpoints import folder, foreign, owners, single_file, store
from lightrft_lightning.checkpoints.adapters import Made, alone, merged
from lightrft_lightning.checkpoints.files import plain_file
from lightrft_lightning.checkpoints.flat import FlatTensor, TensorInfo, same_bits
from lightrft_lightning.checkpoints.folder import CheckpointError, Place
from lightrft_lightning.checkpoints.foreign import HuggingFaceFolder, OwnFolder, Source
from lightrft_lightning.models.config_values import check_config_file
from lightrft_lightning.models.loading import MODEL_SOURCES, load_tokenizer
from lightrft_lightning.models.merging import PREFIX
from lightrft_lightning.models.quantized import SCALES, in_numbers, scales
from lightrft_lightning.models.remote_code import code_refused

log = logging.getLogger(__name__)

SHARD_BYTES = 5 * 10**9
"""Most bytes of one safetensors file, unless a single tensor is larger."""


@dataclass(frozen=True)
class Output:
    """A tensor to be written."""

    info: TensorInfo
    make: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        """Its size."""
        return math.prod(self.info.shape) * self.info.dtype.itemsize


def convert(
    src: str,
    dst: str,
    to: Literal["hf", "ckpt", "lightning"] = "hf",
    module: str | None = None,
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    lora: Literal["merge", "keep"] = "merge",
    tag: str | None = None,
    tokenizer: str | None = None,
    model_folder: str | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> Path:
    """Convert a checkpoint; a source of any kind becomes either kind of result.

    Args:
        src: a checkpoint of this package (by `save_ckpt` or by a Trainer), of DeepSpeed or of LightRFT, a folder of
            these, or a Hugging Face folder with safetensors files.
        dst: the folder to write, or the file; it must not exist yet.
        to: ``hf``: safetensors files and config.json, as `from_pretrained` and vLLM open them. ``ckpt``: a checkpoint
            of this package, without optimizer. ``lightning``: the single file of Lightning's own strategies, from a
            Trainer's checkpoint, with all that is in it; `fit(ckpt_path=...)` and `load_from_checkpoint` read it with
            and without this package.
        module: the part to take, e.g. ``actor``; default: the only Hugging Face model in it.
        dtype: of floating-point tensors; default: as they are.
        lora: ``merge`` folds adapters into the weights, ``keep`` writes the adapter alone.
        tag: which checkpoint of a folder; default: what its ``latest`` names.
        tokenizer: folder whose tokenizer files are copied into a Hugging Face result; default: where the model came
            from, if that is still there.
        model_folder: folder with the model's config.json, for sources that do not say what the model is.
        shard_bytes: most bytes of one safetensors file.

    Returns:
        What was written.

    Raises:
        FileNotFoundError: no checkpoint there.
        FileExistsError: `dst` exists.
        ValueError: settings that do not fit the source; the message names what does.
        CheckpointError: the source is damaged, or the result is not what it should be. Nothing is left then.
    """
    target = Path(dst)
    for name, value in (("to", to), ("dtype", dtype), ("lora", lora)):
        if value not in (allowed := _names(name)) and not (name == "dtype" and value is None):
            raise ValueError(unknown_name(name, value, allowed))
    if target.exists():
        raise FileExistsError(f"{target} exists: choose another name, or remove it first")
    if to == "lightning":
        beside = {"module": module, "dtype": dtype, "tokenizer": tokenizer, "model_folder": model_folder}
        _write_lightning(Path(src), target, tag, [name for name, value in beside.items() if value is not None])
        return target
    source = _open(Path(src), tag)
    source, described = _choose(source, module)
    if model_folder is not None:
        described = {**(described or {}), **_described_by(Path(model_folder))}
    copied = _files_beside(tokenizer, source, described or {})
    outputs, described = _outputs(source, described, dtype, lora)
    target.parent.mkdir(parents=True, exist_ok=True)
    if to == "ckpt":
        _write_checkpoint(target, source, outputs, described)
        _compare(OwnFolder(store.open_checkpoint(target, store.Ranks())), outputs, target)
        return target
    temporary = target.with_name(owners.temporary_name(target.name))
    owners.keep(temporary)
    try:
        adapter_only = bool(described and described.get("adapters"))
        _write_hugging_face(temporary, outputs, described, adapter_only, shard_bytes, source.path)
        _write_beside(temporary, copied, source, described or {}, adapter_only)
        if not adapter_only:
            _compare(HuggingFaceFolder(temporary), outputs, target)
            _check_architecture(temporary, described, source.path)
        for path in temporary.iterdir():
            folder.flush(path)
        temporary.rename(target)
        folder.flush(target.parent)
    except BaseException:
        owners.remove_when_free(temporary)
        raise
    finally:
        owners.keep(temporary, False)
        source.close()
    return target


def _names(argument: str) -> tuple[str, ...]:
    """What the annotation of an argument of `convert` allows."""
    hint = get_type_hints(convert)[argument]
    return tuple(name for part in (hint, *get_args(hint)) for name in get_args(part) if isinstance(name, str))


# -------------------------------------------------------------------- the source


def _open(path: Path, tag: str | None) -> Source:
    for parent, name in ((path, tag), *([(path.parent, path.name)] if tag is None else [])):
        try:
            return OwnFolder(store.open_checkpoint(folder.find(parent, name), store.Ranks()))
        except FileNotFoundError as err:
            missing = err
    source = foreign.open_foreign(path, tag)
    if source is None:
        raise FileNotFoundError(f"nothing to convert at {path}{f', tag {tag!r}' if tag else ''}: {missing}")
    return source


def _choose(source: Source, module: str | None) -> tuple[Source, dict[str, Any] | None]:
    """The part `module` of a source, and what is known about it."""
    if isinstance(source, HuggingFaceFolder):
        if module:
            raise ValueError(f"module={module!r}: {source.path} holds one model, leave it out")
        return source, _described_by(source.path)
    if not isinstance(source, OwnFolder):
        return (_Part(source, module) if module else source), None
    described = source.stored.manifest.get("hugging_face", {})
    # Not a reference model, which checkpoints leave out.
    models = {name: d for name, d in described.items() if OwnFolder(source.stored, name).infos}
    if module is None:
        if len(models) > 1:
            raise ValueError(f"{source.path} holds several models: choose one with module={' or '.join(models)}")
        module = next(iter(models), "")
    part = OwnFolder(source.stored, module)
    if not part.infos:
        parts = sorted({name.split(".")[0] for name in source.infos})
        raise ValueError(f"module={module!r}: nothing of that name in {source.path}; there are: {', '.join(parts)}")
    return part, models.get(module)


class _Part(Source):
    """The tensors whose names begin with `module`, without it."""

    def __init__(self, source: Source, module: str) -> None:
        self._source, self._prefix, self.path = source, f"{module}.", source.path
        self.infos = {
            name.removeprefix(self._prefix): info
            for name, info in source.infos.items()
            if name.startswith(self._prefix)
        }
        if not self.infos:
            parts = sorted({name.split(".")[0] for name in source.infos})
            raise ValueError(f"module={module!r}: nothing of that name in {source.path}; there are: {', '.join(parts)}")

    def read(self, name: str) -> Tensor:
        return self._source.read(self._prefix + name)

    def close(self) -> None:
        self._source.close()


def _described_by(path: Path) -> dict[str, Any]:
    file = path / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"{path} holds no config.json")
    config = json.loads(plain_file(path, file.name).read_text())
    return {"class": next(iter(config.get("architectures") or ()), ""), "config": config}


# -------------------------------------------------------------------- what comes out


def _outputs(
    source: Source, described: dict[str, Any] | None, dtype: str | None, lora: str
) -> tuple[dict[str, Output], dict[str, Any] | None]:
    """The tensors to write, and what is known about the model that they make."""
    adapters = (described or {}).get("adapters")
    made = {name: (info, _reader(source, name)) for name, info in source.infos.items()}
    if any(SCALES in name for name in made):
        made = _dequantized(made)
        config = {k: v for k, v in (described or {}).get("config", {}).items() if k != "quantization_config"}
        described = {**(described or {}), "config": config}
    if adapters:
        # Models with adapters by their own `add_adapter` have names without what PEFT puts in front.
        prefix = "" if any(name.startswith(PREFIX) for name in made) else PREFIX
        made = {prefix + name: tensor for name, tensor in made.items()}
        tied = {prefix + alias: prefix + name for alias, name in source.tied.items()}
        if lora == "merge":
            made, described = merged(made, tied, described or {})
        else:
            trained = {prefix + name for name in source.trained} or _unlike_the_base(made, described or {}, source.path)
            made, content = alone(made, tied, described or {}, trained)
            described = {**(described or {}), "adapters": content}
    wanted = None if dtype is None else getattr(torch, dtype)
    return {name: _cast(info, make, wanted) for name, (info, make) in made.items()}, described


def _unlike_the_base(made: Made, described: Mapping[str, Any], where: Path) -> set[str]:
    """What was trained, for a checkpoint without an optimizer: what is not in the folder that the adapter is for."""
    settings = next(iter(described["adapters"].values()))
    base = Path(settings.get("base_model_name_or_path") or described.get("started_from") or "")
    if not (base / "config.json").is_file() or isinstance(settings.get("init_lora_weights"), str):
        log.warning("%s cannot be compared with the model that its adapter is for: nothing else may be trained", where)
        return set()
    source = HuggingFaceFolder(base)
    changed = set()
    for name, (info, read) in made.items():
        plain = name.removeprefix(PREFIX).replace(".base_layer", "")
        if plain in source.infos and not same_bits(source.read(plain).to(info.dtype), read()):
            changed.add(name)
    source.close()
    return changed


def _reader(source: Source, name: str) -> Callable[[], Tensor]:
    return lambda: source.read(name)


def _cast(info: TensorInfo, make: Callable[[], Tensor], dtype: torch.dtype | None) -> Output:
    if dtype is None or not info.dtype.is_floating_point:
        return Output(info, make)
    return Output(TensorInfo(info.shape, dtype), lambda: make().to(dtype))


def _dequantized(made: Made) -> Made:
    """Weights in four bits as numbers, without what is beside them."""
    names = [name.partition(SCALES)[0] for name in made if SCALES in name]
    result = {name: tensor for name, tensor in made.items() if not name.startswith(tuple(f"{n}." for n in names))}
    for name in names:
        state = scales({n.removeprefix(f"{name}."): made[n][1]() for n in made if n.startswith(f"{name}.")})
        result[name] = TensorInfo(tuple(state.shape), state.dtype), partial(_in_numbers, made[name][1], state)
    return result


def _in_numbers(read: Callable[[], Tensor], state: Any) -> Tensor:
    return in_numbers(read(), state)


# -------------------------------------------------------------------- Hugging Face


def _write_hugging_face(
    path: Path,
    outputs: Mapping[str, Output],
    described: Mapping[str, Any] | None,
    adapter_only: bool,
    shard_bytes: int,
    where: Path,
) -> None:
    if described is None or not (described.get("config") or adapter_only):
        raise ValueError(f"{where} does not say what the model is: pass model_folder=<folder with its config.json>")
    save_file = import_extra("safetensors.torch", "hf").save_file
    path.mkdir()
    if adapter_only:
        (path / "adapter_config.json").write_text(json.dumps(described["adapters"], indent=2, sort_keys=True))
        tensors = {name: output.make().contiguous() for name, output in outputs.items()}
        save_file(tensors, path / "adapter_model.safetensors", metadata={"format": "pt"})
        return
    dtypes = {o.info.dtype for o in outputs.values() if o.info.dtype.is_floating_point}
    config = {**described["config"], "architectures": [described["class"]] if described["class"] else None}
    if len(dtypes) == 1:
        config["dtype"] = str(next(iter(dtypes))).removeprefix("torch.")
    (path / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}, indent=2))
    shards = list(_shards(outputs, shard_bytes))
    index: dict[str, str] = {}
    for number, names in enumerate(shards):
        file = "model.safetensors" if len(shards) == 1 else f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        save_file({n: outputs[n].make().contiguous() for n in names}, path / file, metadata={"format": "pt"})
        index |= dict.fromkeys(names, file)
    if len(shards) > 1:
        total = sum(output.nbytes for output in outputs.values())
        content = {"metadata": {"total_size": total}, "weight_map": index}
        (path / "model.safetensors.index.json").write_text(json.dumps(content, indent=2))


def _shards(outputs: Mapping[str, Output], most: int) -> Iterator[list[str]]:
    names: list[str] = []
    size = 0
    for name, output in outputs.items():
        if names and size + output.nbytes > most:
            yield names
            names, size = [], 0
        names.append(name)
        size += output.nbytes
    yield names


_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt", "merges.txt",
    "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
)  # fmt: skip
_GENERATION = "generation_config.json"


def _files_beside(tokenizer: str | None, source: Source, described: Mapping[str, Any]) -> list[Path]:
    """The tokenizer's files and the settings of generation, from where the source or its model is."""
    started = described.get("started_from")
    origins = [Path(tokenizer)] if tokenizer is not None else [source.path, *([Path(started)] if started else [])]
    found = next((files for origin in origins if (files := _tokenizer_files(origin))), [])
    if tokenizer is not None and not found:
        raise FileNotFoundError(f"tokenizer={tokenizer!r}: no tokenizer files there")
    generation = [plain_file(origin, _GENERATION) for origin in origins if (origin / _GENERATION).exists()]
    return found + generation[:1]


def _write_beside(
    path: Path, files: Sequence[Path], source: Source, described: Mapping[str, Any], adapter_only: bool
) -> None:
    for file in files:
        if not (adapter_only and file.name == _GENERATION):
            shutil.copyfile(file, path / file.name)
    if (recorded := described.get("generation_config")) is not None and not adapter_only:
        (path / _GENERATION).write_text(json.dumps(recorded, indent=2, sort_keys=True))
    if any(file.name != _GENERATION for file in files):
        return
    if (started := described.get("started_from")) in MODEL_SOURCES:  # made by code
        load_tokenizer(str(started)).save_pretrained(path)
    else:
        log.warning("no tokenizer is known for %s: pass tokenizer=<a folder with one>", source.path)


def _tokenizer_files(origin: Path) -> list[Path]:
    found = [plain_file(origin, name) for name in _TOKENIZER_FILES if (origin / name).exists()]
    return found if any("token" in file.name or "vocab" in file.name for file in found) else []


def _check_architecture(path: Path, described: Mapping[str, Any] | None, where: Path) -> None:
    """Names and shapes against those of a model built from the config, without memory for it."""
    transformers = import_extra("transformers", "hf")
    named: Any = getattr(transformers, str((described or {}).get("class")), None)
    # The name comes from a file: nothing but a model is called by it.
    is_model = isinstance(named, type) and issubclass(named, transformers.PreTrainedModel)
    check_config_file(path)
    with torch.device("meta"), code_refused(where):
        config = transformers.AutoConfig.from_pretrained(path, trust_remote_code=False)
        config._attn_implementation = None  # a name that config.json gives may be a kernel to be fetched
        auto = transformers.AutoModelForCausalLM
        model = named(config) if is_model else auto.from_config(config, trust_remote_code=False)
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    there = HuggingFaceFolder(path).infos
    first = {id(tensor): name for name, tensor in reversed(model.state_dict(keep_vars=True).items())}
    needed = {first[id(tensor)] for tensor in model.state_dict(keep_vars=True).values()}
    for name in sorted(needed - there.keys()):
        raise CheckpointError(f"the result would be no {type(model).__name__}: it has no {name}")
    for name, info in there.items():
        if wanted.get(name, info.shape) != info.shape:
            raise CheckpointError(
                f"the result would be no {type(model).__name__} of this config: {name} has shape {info.shape}, "
                f"not {wanted[name]}"
            )


# -------------------------------------------------------------------- checkpoints


def _write_lightning(path: Path, target: Path, tag: str | None, beside: Sequence[str]) -> None:
    if beside:
        raise ValueError(f"{beside[0]} has no meaning with to='lightning', which takes the checkpoint as it is")
    source = _open(path, tag)
    if not isinstance(source, OwnFolder):
        raise ValueError(f"to='lightning': {path} is no Trainer's checkpoint of this package")
    single_file.write(source.stored, target)


class _Streamed(FlatTensor):
    """A tensor that is read when it is written."""

    def __init__(self, output: Output) -> None:
        piece = torch.empty(math.prod(output.info.shape), dtype=output.info.dtype, device="meta")
        super().__init__(output.info.shape, output.info.dtype, ((0, piece),) if len(piece) else ())
        object.__setattr__(self, "output", output)

    output: Output

    def split(self, most: int) -> FlatTensor:
        return self  # it is read whole in any case

    @cached_property
    def info(self) -> TensorInfo:  # type: ignore[override]
        return self.output.info

    def __get_tensor_shard__(self, index: Any) -> Tensor:
        return self.output.make().reshape(-1)


def _write_checkpoint(
    path: Path, source: Source, outputs: Mapping[str, Output], described: Mapping[str, Any] | None
) -> None:
    if described and described.get("adapters"):
        raise ValueError("lora='keep' writes an adapter in Hugging Face's form: use to='hf', or lora='merge'")
    models = {"": {**described}} if described else {}
    header = {
        "strategy": "convert",
        "world_size": 1,
        "step": 0,
        "model": (described or {}).get("class", ""),
        "hugging_face": models,
        "tied": {alias: name for alias, name in source.tied.items() if name in outputs and alias not in outputs},
    }
    shared: dict[str, Any] = {"client_state": {}, "step": 0, "scaler": {}, "model": {}}
    tensors: dict[str, FlatTensor] = {f"model.{name}": _Streamed(output) for name, output in outputs.items()}
    content = store.Content(tensors, shared, {}, header)
    store.prepare(content, Place(path.parent, path.name), store.Ranks())(store.Ranks())


def _compare(result: Source, outputs: Mapping[str, Output], where: Path) -> None:
    """Read the result again, tensor by tensor."""
    try:
        if result.infos != {name: output.info for name, output in outputs.items()}:
            raise CheckpointError(f"{where}: names or shapes are not those of the source")
        for name, output in outputs.items():
            if not same_bits(result.read(name), output.make()):
                raise CheckpointError(f"{where}: {name} does not read back as it was written")
    except BaseException:
        owners.remove_when_free(where)
        raise
    finally:
        result.close()


def main(args: Sequence[str]) -> Path:
    """``lightrft convert SRC DST ...``.

    Args:
        args: what follows ``convert``.
    """
    jsonargparse = import_extra("jsonargparse", "cli")
    written = jsonargparse.auto_cli(convert, args=list(args), as_positional=True, prog="lightrft convert")
    print(f"written: {written}")
    return written
