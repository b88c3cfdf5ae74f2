"""Trained models as Hugging Face folders that `from_pretrained` and vLLM open."""

from __future__ import annotations

import copy
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightrft_lightning._errors import import_extra
from lightrft_lightning.models.merging import PREFIX, MergeError, check_mergeable, has_adapters, plain_tensors
from lightrft_lightning.models.quantized import dequantized, plain_config
from lightrft_lightning.models.streaming import parameters_on_meta


def hugging_face_part(model: nn.Module) -> Any:
    """The Hugging Face or PEFT model that `model` is, or holds as its attribute ``model``.

    Raises:
        TypeError: it is none and holds none.
    """
    inner: Any = model if hasattr(model, "save_pretrained") else getattr(model, "model", None)
    if not hasattr(inner, "save_pretrained"):
        raise TypeError(
            f"save_model() writes Hugging Face models, {type(model).__name__} is none and holds none as `.model`. "
            "Use save_ckpt() for other modules"
        )
    return inner


def save_pretrained(
    model: nn.Module,
    tokenizer: Any,
    output_dir: Path,
    *,
    merge_lora: bool = True,
    weights: Mapping[str, Tensor] | None = None,
) -> None:
    """Write the Hugging Face part of `model` and the tokenizer: weights first, whatever else fails.

    Args:
        model: a Hugging Face or PEFT model, or what holds one.
        tokenizer: None to leave it out.
        output_dir: the folder.
        merge_lora: fold adapters into the weights; False writes the adapter alone.
        weights: whole parameters by name, if the model's own are sharded; numbers, not four bits.

    Raises:
        ExportError: the weights are there, but something beside them could not be written.
        ValueError: adapters that cannot be merged, or that cannot be written alone.
    """
    inner = hugging_face_part(model)
    if weights is None and (has_adapters(inner) and merge_lora):
        weights = {name: t.detach() for name, t in dequantized(inner, inner.named_parameters())}
    if has_adapters(inner) and not merge_lora:
        _check_alone(inner)
    if weights is not None:
        inner = merged_copy(inner, weights) if merge_lora else whole_copy(inner, weights)
    write_folder(inner, tokenizer, output_dir)


class ExportError(RuntimeError):
    """A model's weights were written, but not all that belongs to them."""


def write_folder(inner: Any, tokenizer: Any, folder: Path) -> None:
    """Write a whole model; as `save_pretrained`."""
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} is no folder")  # transformers would log it and write nothing
    missing: dict[str, Exception] = {}
    try:
        if has_adapters(inner):
            _write_adapter(inner, folder)
        else:
            inner.save_pretrained(folder, safe_serialization=True)
    except Exception as err:
        if has_adapters(inner) or isinstance(err, OSError):
            raise
        # Transformers begins with what is beside the weights.
        import_extra("huggingface_hub", "hf").save_torch_model(inner, folder)
        missing = _write_each(beside_weights(inner, None), folder) or {"the model": err}
    missing |= _write_each(beside_weights(None, tokenizer), folder)
    if missing:
        told = "; ".join(f"{name}: {_first_line(err)}" for name, err in missing.items())
        raise ExportError(f"the weights are in {folder}, but not all that belongs to them: {told}")


def beside_weights(inner: Any, tokenizer: Any) -> dict[str, Any]:
    """What a model's folder has beside weights, by the name of the file, each with a `save_pretrained`."""
    parts = {} if inner is None else {"config.json": inner.config}
    if getattr(inner, "generation_config", None) is not None and inner.can_generate():
        parts["generation_config.json"] = inner.generation_config
    return {**parts, **({} if tokenizer is None else {"the tokenizer": tokenizer})}


def _write_each(parts: Mapping[str, Any], folder: Path) -> dict[str, Exception]:
    """Write all of them; returns the errors by name."""
    failed: dict[str, Exception] = {}
    for name, part in parts.items():
        try:
            part.save_pretrained(folder)
        except Exception as err:
            failed[name] = err
    return failed


def rehearse(model: nn.Module, tokenizer: Any, folder: Path) -> int:
    """Try, without weights and in a folder that is removed, what `save_pretrained` will do at the end of a run.

    Returns:
        The bytes that the weights will take.

    Raises:
        ValueError: it would fail; the message says why.
    """
    inner = hugging_face_part(model)
    made = on_meta(inner)
    if has_adapters(inner):
        check_mergeable(inner, made)
    else:
        _check_shared(inner, made)
    made.config.architectures = made.config.architectures or [type(made).__name__]
    check_writable(folder)
    with tempfile.TemporaryDirectory(prefix="lightrft_rehearsal_") as there:
        for name, err in _write_each(beside_weights(made, tokenizer), Path(there)).items():
            raise ValueError(
                f"{name} cannot be written: {_first_line(err)}. {REMEDIES.get(name, '')}".rstrip()
            ) from err
    return sum(p.numel() * p.element_size() for p in made.to(dtype=_dtype(inner)).parameters())


def _check_shared(inner: nn.Module, made: nn.Module) -> None:
    known = [{*group} for group in tied_names(made)]
    for group in tied_names(inner):
        if not any(known_group >= {*group} for known_group in known):
            raise ValueError(
                f"{group[0]} and {group[1]} are one tensor, unlike in a {type(made).__name__} of this config: "
                "make them two, nn.Parameter(weight.detach().clone())"
            )


REMEDIES = {
    "config.json": "Set the attribute of model.config to something that JSON has",
    "generation_config.json": "Mend it in the model's folder, or set model.generation_config (do_sample=True goes "
    "with temperature, top_p and top_k)",
    "the tokenizer": "Pass another tokenizer, or load it again from its folder",
}


def _dtype(inner: Any) -> torch.dtype:
    kinds = [p.dtype for p in inner.parameters() if p.is_floating_point()]
    return max(kinds, key=kinds.count) if kinds else torch.float32


def _first_line(err: BaseException) -> str:
    lines = [line.strip() for line in str(err).strip().splitlines()] or [type(err).__name__]
    return (" ".join(lines[:2]) if lines[0].endswith((":", ": .")) else lines[0]).rstrip(".")


def existing_parent(path: Path) -> Path:
    """The folder itself, or the nearest one above it that is there."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path


def check_writable(folder: Path) -> None:
    """Whether files can be written into a folder that need not be there yet.

    Raises:
        ValueError: they cannot.
    """
    try:
        parent = existing_parent(folder)
        if not parent.is_dir():
            raise NotADirectoryError(f"{parent} is no folder")
        with tempfile.TemporaryDirectory(prefix=".lightrft-", dir=parent) as there:
            if parent != folder.absolute():
                (Path(there) / folder.absolute().relative_to(parent)).mkdir(parents=True)
    except (OSError, ValueError) as err:
        raise ValueError(f"nothing can be written into {folder}: {err}") from err


def check_room(folder: Path, size: int) -> None:
    """Whether a folder's disk has room for so many bytes of weights, which replace those that are in it.

    Raises:
        ValueError: it has not.
    """
    there = sum(file.stat().st_size for file in folder.glob("*.safetensors")) if folder.is_dir() else 0
    free = shutil.disk_usage(existing_parent(folder)).free + there
    if size > free:
        raise ValueError(f"the weights take {size / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are free: make room")


def check_adapter_alone(configs: Mapping[str, Any]) -> None:
    """Refuse adapters that, read onto the base model's folder, would compute something else.

    Raises:
        ValueError: the base weights were changed when the adapter was made, in a way that reading it does not repeat.
    """
    for name, config in configs.items():
        get = config.get if isinstance(config, Mapping) else lambda key, config=config: getattr(config, key, None)
        made = get("init_lora_weights")
        if isinstance(made, str) and made.startswith(("pissa_niter", "corda", "loftq", "lora_ga")):
            raise ValueError(
                f"the adapter {name!r} with init_lora_weights={made!r} has changed the base weights, so it cannot be "
                "saved alone: merge it (merge_lora=True, or lightrft convert --lora merge)"
            )


def _check_alone(inner: Any) -> None:
    """Refuse a model whose one active adapter is not all that was trained."""
    active = active_adapters(inner)
    if len(active) != 1:
        raise ValueError(
            f"the adapters {', '.join(active)} are active together: only one can be saved alone, merge them"
        )
    check_adapter_alone({active[0]: inner.peft_config[active[0]]})
    trained = {name for name, p in inner.named_parameters() if p.requires_grad}
    check_nothing_beside(trained, parts_of_adapter(inner, active[0]))


def active_adapters(inner: Any) -> list[str]:
    """What a PEFT model, or a model of transformers with adapters in it, computes with.

    Raises:
        ValueError: neither knows about its adapters.
    """
    names = getattr(inner, "active_adapters", None)
    try:
        return list(names() if callable(names) else names)  # type: ignore[arg-type]
    except (TypeError, ValueError) as err:
        raise ValueError(
            f"the adapters were put into {type(inner).__name__} by hand, and it cannot save them alone: merge them, or "
            "make the model with peft.get_peft_model or model.add_adapter"
        ) from err


def parts_of_adapter(inner: Any, name: str) -> dict[str, str]:
    """Names of the tensors of an adapter in its file, and in the model."""
    empty = {alias: torch.empty(0, device="meta") for alias in inner.state_dict()}
    found = {id(tensor): alias for alias, tensor in empty.items()}
    kept = import_extra("peft", "hf").get_peft_model_state_dict(
        inner, state_dict=empty, adapter_name=name, save_embedding_layers=False
    )
    return {key: found[id(tensor)] for key, tensor in kept.items() if id(tensor) in found}  # PEFT adds some


def check_nothing_beside(trained: Iterable[str], parts: Mapping[str, str]) -> None:
    """Refuse to write an adapter alone if more than it was trained.

    Args:
        trained: names of parameters.
        parts: as `parts_of_adapter`.

    Raises:
        ValueError: it was.
    """
    if beside := sorted({*trained} - {*parts.values()}):
        raise ValueError(
            f"{beside[0]} was trained and is no part of the adapter, which would be saved without it: merge it "
            "(merge_lora=True, or lightrft convert --lora merge)"
        )


def _write_adapter(inner: Any, folder: Path) -> None:
    """Write the active adapter where `from_pretrained` looks for it, whatever its name is."""
    if not hasattr(inner, "get_base_model"):
        inner.save_pretrained(folder)
        return
    (name,) = active_adapters(inner)
    inner.save_pretrained(folder, selected_adapters=[name])
    if name != "default":
        for file in (folder / name).iterdir():
            file.replace(folder / file.name)
        (folder / name).rmdir()


def merged_copy(inner: Any, weights: Mapping[str, Tensor]) -> nn.Module:
    """The model without PEFT in CPU memory, its adapters in its weights.

    Args:
        inner: a Hugging Face or PEFT model, whatever state its own parameters are in.
        weights: its whole parameters by name.

    Raises:
        ValueError: adapters that cannot be merged.
    """
    made = on_meta(inner)
    tied = {name for group in tied_names(made) for name in group}
    merged: dict[str, Tensor] = {}
    given: set[int] = set()
    for name, tensor in plain_tensors(inner, weights.items()):
        again = tensor.data_ptr() in given and name not in tied  # layers that PEFT has repeated
        merged[name] = tensor.clone().cpu() if again else tensor.cpu()
        given.add(tensor.data_ptr())
    if _tied_apart(made, merged):
        made = on_meta(inner, tied=False)
    buffers = {n.removeprefix(PREFIX): b.detach().cpu() for n, b in inner.named_buffers()}
    known = made.state_dict()
    found = {n: b for n, b in buffers.items() if n in known} | merged
    if strange := sorted(found.keys() - known.keys()):
        raise MergeError(f"{strange[0]} is no weight of a {type(made).__name__}: its adapter cannot be merged")
    made.load_state_dict(found, strict=False, assign=True)
    made.tie_weights()
    if left := [name for name, value in made.state_dict().items() if value.is_meta]:
        raise ValueError(f"no value for {len(left)} tensors of {type(made).__name__}, e.g. {left[0]!r}")
    return made  # type: ignore[no-any-return]


def tied_names(made: nn.Module) -> list[list[str]]:
    """The names of each parameter that has several."""
    names: dict[int, list[str]] = {}
    for name, p in made.named_parameters(remove_duplicate=False):
        names.setdefault(id(p), []).append(name)
    return [group for group in names.values() if len(group) > 1]


def _tied_apart(made: nn.Module, values: Mapping[str, Tensor]) -> bool:
    there = [[values[name] for name in group if name in values] for group in tied_names(made)]
    return any(not torch.equal(group[0], other) for group in there for other in group[1:])


def save_without_weights(model: Any, tokenizer: Any, folder: str) -> None:
    """What an engine needs to build a model but for its weights: configuration, tokenizer, the tokens that end."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    config = plain_config(inner.config)
    config.architectures = config.architectures or [unsharded_class(inner).__name__]  # unset until a model is saved
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if getattr(inner, "generation_config", None) is not None:
        inner.generation_config.save_pretrained(folder)


def on_meta(inner: Any, tied: bool = True) -> Any:
    """A model like `inner` without PEFT and without memory for its parameters.

    Args:
        inner: a Hugging Face or PEFT model.
        tied: False: input and output embeddings are two tensors, whatever its config says.

    Raises:
        ValueError: the class cannot be built from the config that the model has.
    """
    base = inner.get_base_model() if hasattr(inner, "get_base_model") else inner
    config = plain_config(base.config)
    for part in () if tied else (config, config.get_text_config()):
        part.tie_word_embeddings = False
    try:
        with torch.device("meta"):
            made: Any = unsharded_class(base)(config)
    except Exception as err:
        raise ValueError(f"no {type(base).__name__} can be built from the model's config: {err}") from err
    made.generation_config = getattr(base, "generation_config", None)
    return made


def whole_copy(inner: Any, weights: Mapping[str, Tensor]) -> nn.Module:
    """A plain model in CPU memory like the sharded one `inner`.

    Args:
        inner: a Hugging Face or PEFT model, whatever state its own parameters are in.
        weights: its whole parameters by name; the copy takes them over.
    """
    made = on_meta(inner)
    if hasattr(inner, "get_base_model"):
        made = _with_adapters(made, inner)
    elif has_adapters(inner):
        for name, config in inner.peft_config.items():
            made.add_adapter(_without_start(config), name)
        made.set_adapter(active_adapters(inner))
    buffers = {n: b.detach().cpu() for n, b in inner.named_buffers() if n in made.state_dict()}
    made.load_state_dict({**buffers, **weights}, strict=False, assign=True)
    (made.get_base_model() if hasattr(inner, "get_base_model") else made).tie_weights()
    if left := [name for name, value in made.state_dict().items() if value.is_meta]:
        raise ValueError(f"no value for {len(left)} tensors of {type(made).__name__}, e.g. {left[0]!r}")
    return made


def _with_adapters(base: Any, inner: Any) -> Any:
    made = with_adapters(base, inner.peft_config)
    made.set_adapter(inner.active_adapter)
    return made


def with_adapters(base: Any, configs: Mapping[str, Any]) -> Any:
    """A model on the meta device with the adapters of these configs, by name, around its layers."""
    peft = import_extra("peft", "hf")
    empty = {name: _without_start(config) for name, config in configs.items()}
    (first, config), *others = empty.items()
    with parameters_on_meta():
        made = peft.get_peft_model(base, config, adapter_name=first)
        for name, other in others:
            made.add_adapter(name, other)
    made.peft_config.update(configs)
    return made


def _without_start(config: Any) -> Any:
    """A copy for a model without weights, in which none can be started from."""
    config = copy.deepcopy(config)
    for setting in ("init_lora_weights", "init_weights"):
        if isinstance(getattr(config, setting, None), str):
            setattr(config, setting, True)
    return config


def unsharded_class(model: nn.Module) -> type[nn.Module]:
    """The class that `fully_shard` replaced by a subclass."""
    from torch.distributed.fsdp import FSDPModule

    return next(c for c in type(model).__mro__ if issubclass(c, nn.Module) and not issubclass(c, FSDPModule))
