"""Files in a folder that somebody else has made: only what is really there is read, and none of it is run."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

ARCHIVED = re.compile(r"data\.pkl|version|byteorder|\.[\w/]+|data/\w+")
"""Names of what `torch.save` puts into a file."""
READ_AS_TEXT = (".json", ".jinja", ".txt", ".model", ".tiktoken")
"""Files of a model folder whose content ends up in a config or a tokenizer, which are written out again."""


class NotPlainError(ValueError):
    """A file that is not what it should be: it is elsewhere, or holds code, or is no file at all."""


def plain_name(folder: Path, name: Any) -> Path:
    """The file `name` in `folder`, which another file of the folder has named.

    Raises:
        NotPlainError: the name leads out of the folder, or it is a device or a pipe.
    """
    if not isinstance(name, str) or name in ("", "..") or Path(name).name != name:
        raise NotPlainError(f"{folder} names a file {name!r}: must be the plain name of a file in it")
    file = folder / name
    if file.exists() and not file.is_file():
        raise NotPlainError(f"{file} is no regular file")
    return file


def plain_file(folder: Path, name: Any) -> Path:
    """As `plain_name`, for files whose content may end up elsewhere: a link could pass off a private file as theirs.

    A link may lead to a file of the same folder or, in the cache of the Hugging Face hub, to the ``blobs`` of the same
    repository.

    Raises:
        NotPlainError: also if it is a link to anywhere else.
    """
    file = plain_name(folder, name)
    for _ in range(5):  # a folder may get another name between the two questions
        real = file.resolve()
        if any(real.is_relative_to(root) for root in _roots(folder.resolve())):
            return file
    raise NotPlainError(f"{file} is a link to {real}, outside of its folder: if that belongs to it, copy it there")


def _roots(folder: Path) -> Iterator[Path]:
    yield folder
    for parent in folder.parents:
        if parent.name == "snapshots":
            yield parent.parent / "blobs"


def check_model_folder(folder: Path) -> None:
    """Refuse a Hugging Face folder in which a config, a tokenizer file or a template is not its own.

    Weights may be links to where they are: nothing but weights can be read from them.

    Raises:
        NotPlainError: see `plain_file`.
    """
    for file in folder.iterdir():
        if file.suffix in READ_AS_TEXT and not file.is_dir():
            plain_file(folder, file.name)
    templates = folder / "additional_chat_templates"
    if templates.is_dir():
        if templates.is_symlink():
            raise NotPlainError(f"{templates} is a link: copy the folder there")
        check_model_folder(templates)


def load(file: Path, *, weights_only: bool = True, **settings: Any) -> Any:
    """`torch.load` of a file with tensors and plain values, into CPU memory.

    Args:
        file: written by `torch.save`.
        weights_only: False runs whatever code it asks for, unless `settings` have a `pickle_module` that does not.
        **settings: see `torch.load`.

    Raises:
        NotPlainError: see `check_archive`.
    """
    check_archive(file)
    return torch.load(file, map_location="cpu", weights_only=weights_only, **settings)


def check_archive(file: Path) -> None:
    """Refuse what `torch.load` would hand to another reader: TorchScript, whose code it runs, packages, exports, tars.

    Raises:
        NotPlainError: the file is no archive as `torch.save` writes it, or no regular file.
    """
    if not file.is_file():
        raise NotPlainError(f"{file} is no regular file")
    with file.open("rb") as opened:
        if opened.read(4) != b"PK\x03\x04":
            raise NotPlainError(f"{file} is damaged, or was not written by torch.save of torch 1.6 or later")
    # By torch's own reader: another one could find other names in a file that is made for it.
    names = torch._C.PyTorchFileReader(str(file)).get_all_records()
    strange = [name for name in names if not ARCHIVED.fullmatch(name)]
    if strange or "data.pkl" not in names:
        raise NotPlainError(f"{file} holds code (TorchScript or alike), no plain tensors: {strange[:3]} is in it")
