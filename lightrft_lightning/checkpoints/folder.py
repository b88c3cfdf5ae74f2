"""A folder of checkpoints on disk: names, the manifest, `latest`, rotation. No process but this one is involved.

Layout of one checkpoint::

    <tag>/manifest.json         versions, strategy, world size, step, data position, shapes, size and CRC-32 of every
                                other file
    <tag>/state.pt              what is not a tensor: schedulers, hyperparameters, the caller's own state
    <tag>/rank_<n>.pt           what each rank has of its own: its random state
    <tag>/.metadata, *.distcp   model and optimizer tensors (torch.distributed.checkpoint)
    latest                      the newest complete tag
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightrft_lightning.checkpoints import owners
from lightrft_lightning.checkpoints.files import plain_file

MANIFEST = "manifest.json"
FORMAT = "lightrft_lightning/2"
_ASIDE = ".lightrft-old"


class CheckpointError(RuntimeError):
    """A checkpoint that is incomplete, damaged or of another model, or that could not be written."""


def reason(err: BaseException) -> str:
    """One line."""
    return " ".join([type(err).__name__, *str(err).splitlines()[:1]])


@dataclass(frozen=True)
class Place:
    """Where a checkpoint goes, and what happens to its neighbours.

    Args:
        folder: of the checkpoints.
        tag: name of this one.
        latest: let the file ``latest`` name it.
        max_num: keep at most so many checkpoints of this package in `folder`; None: do not remove any.
        max_bytes: and let the folder be at most so large.
    """

    folder: Path
    tag: str
    latest: bool = False
    max_num: int | None = None
    max_bytes: float = float("inf")

    @property
    def path(self) -> Path:
        """The checkpoint itself."""
        return self.folder / self.tag

    def temporary(self) -> Path:
        """Where it is written before it is complete."""
        return self.folder / owners.temporary_name(self.tag)

    def check(self) -> None:
        """Refuse a tag that is no plain name, and to replace what this package did not write.

        Raises:
            ValueError: one of these.
        """
        tag = self.tag
        unfinished = tag.startswith(".") and tag.endswith((owners.TEMPORARY, _ASIDE))
        if not tag.strip() or tag != Path(tag).name or tag != tag.strip() or tag in ("..", "latest") or unfinished:
            raise ValueError(f"tag={tag!r}: must be a plain folder name")
        put_back(self.folder)
        # A file called .ckpt is what Lightning's own strategies write in this place.
        path = self.path
        replaceable = is_checkpoint(path) or (path.is_file() and path.suffix == ".ckpt")
        # Asked twice: another process may just be renaming.
        if not replaceable and path.exists() and not is_checkpoint(path):
            raise ValueError(f"{path} exists and is not a checkpoint of this package: choose another tag or folder")

    def number(self) -> int:
        """The next number in the order of the checkpoints that rotation looks at; clocks may go backwards."""
        if self.max_num is None or not self.folder.is_dir():
            return 0
        return 1 + max((_read_manifest(p).get("number", 0) for p in self.folder.iterdir()), default=0)

    def complete(self, temporary: Path) -> None:
        """Give the flushed folder `temporary` its name; then the oldest checkpoints may go."""
        with owners.alone_in(self.folder):
            old = _replace(temporary, self.path)
            unneeded = [] if old is None else [old]
            if self.latest:
                pointer = self.folder / owners.temporary_name("latest")
                with owners.in_use(pointer):
                    pointer.write_text(self.tag)
                    flush(pointer)
                    pointer.replace(self.folder / "latest")
            flush(self.folder)
            if self.max_num is not None:
                unneeded += _rotate(self.folder, keep=self.path, max_num=self.max_num, max_bytes=self.max_bytes)
            unneeded += _leftovers(self.folder)
        for path in unneeded:
            owners.remove_when_free(path)


def flush(path: Path) -> None:
    """Have the operating system write a file, or a folder's list of files, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def crc32(path: Path) -> int:
    """Checksum of a file."""
    value = 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            value = zlib.crc32(block, value)
    return value


def describe(paths: list[Path]) -> dict[str, dict[str, int]]:
    """Size and checksum of files, for the manifest."""
    return {path.name: {"bytes": path.stat().st_size, "crc32": crc32(path)} for path in paths}


def _replace(temporary: Path, final: Path) -> Path | None:
    """Give `temporary` its name, in one step where the system can; returns where an older one of that name is now."""
    for attempt in range(5):  # other processes rename too
        try:
            if not os.path.lexists(final):
                temporary.rename(final)
                return None
            if owners.exchange(temporary, final):
                return temporary
            old = _aside(final)
            owners.remove_when_free(old)
            final.rename(old)
            temporary.rename(final)
            return old
        except OSError as err:
            again = err.errno in (errno.ENOENT, errno.ENOTEMPTY, errno.EEXIST) and temporary.exists()
            if attempt == 4 or not again:
                raise
    raise AssertionError("unreachable")


def _aside(final: Path) -> Path:
    """Where `_replace` keeps the older checkpoint until the new one is in place, if it takes two steps."""
    return final.with_name(f".{final.name}{_ASIDE}")


def put_back(folder: Path) -> list[Path]:
    """Undo the first half of `_replace` where a process was killed in the middle; returns what is there again."""
    again = []
    for old in folder.glob(f".*{_ASIDE}"):
        final = folder / old.name[1 : -len(_ASIDE)]
        if not os.path.lexists(final) and _is_ours(old, final):
            old.rename(final)
            again.append(final)
    return again


def _is_ours(old: Path, final: Path) -> bool:
    return is_checkpoint(old) or (old.is_file() and final.suffix == ".ckpt")


def remove_checkpoint(path: Path) -> None:
    """Remove a checkpoint so that at no moment half of it is there under its name."""
    owners.remove_when_free(_hide(path))


def _hide(path: Path) -> Path:
    """Rename a checkpoint that is going to be removed."""
    if path.is_dir() and not path.is_symlink():
        with contextlib.suppress(FileNotFoundError):  # another process was faster
            return path.rename(path.with_name(owners.temporary_name(path.name)))
    return path


def _leftovers(folder: Path) -> list[Path]:
    """What killed processes have left."""
    asides = [(old, folder / old.name[1 : -len(_ASIDE)]) for old in folder.glob(f".*{_ASIDE}")]
    return owners.abandoned(folder) + [old for old, final in asides if os.path.lexists(final) and _is_ours(old, final)]


def _rotate(folder: Path, *, keep: Path, max_num: int, max_bytes: float) -> list[Path]:
    """Hide this package's oldest checkpoints in `folder` until both limits hold; `keep` always stays."""
    # A link to a checkpoint (say, "best") is the user's.
    ours = [p for p in folder.iterdir() if is_checkpoint(p) and not p.is_symlink() and not p.name.startswith(".")]
    removable = sorted((p for p in ours if p != keep), key=_age)
    size, hidden = _bytes(folder), []
    while removable and (len(removable) + 1 > max_num or size > max_bytes):
        size -= _bytes(removable[0])
        hidden.append(_hide(removable.pop(0)))
    return hidden


def _age(path: Path) -> tuple[int, int]:
    manifest = _read_manifest(path)
    return manifest.get("number", 0), manifest.get("saved_at", 0)


def _bytes(folder: Path) -> int:
    total = 0
    for parent, _, names in os.walk(folder):  # passes over what another process is just removing
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                total += os.lstat(os.path.join(parent, name)).st_size
    return total


# -------------------------------------------------------------------- manifest


def write_manifest(folder: Path, content: dict[str, Any]) -> None:
    """Write the manifest with a checksum of its own."""
    (folder / MANIFEST).write_text(json.dumps({**content, "crc32": _own_crc32(content)}, indent=1))


def _own_crc32(content: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((path / MANIFEST).read_text()) if (path / MANIFEST).is_file() else {}  # not a pipe
    except (OSError, ValueError):
        return {}
    return manifest if isinstance(manifest, dict) else {}


def is_checkpoint(path: Path) -> bool:
    """Whether `path` is a folder that this package wrote."""
    return str(_read_manifest(path).get("format", "")).startswith("lightrft_lightning/")


def manifest_of(path: Path, where: Path | None = None) -> dict[str, Any]:
    """The manifest of a checkpoint.

    Args:
        path: the checkpoint.
        where: a way to it that stays when another one takes over its path; default: the path.

    Raises:
        CheckpointError: it is damaged, or of another format.
    """
    manifest = _read_manifest(where or path)
    if manifest.get("format") != FORMAT and is_checkpoint(where or path):
        raise CheckpointError(
            f"{path} has the format {manifest['format']!r}, this release of lightrft_lightning reads {FORMAT!r}"
        )
    stated = manifest.pop("crc32", None)
    if stated != _own_crc32(manifest):
        raise CheckpointError(f"{path} is damaged: {MANIFEST} is not the file that was written")
    return manifest


# -------------------------------------------------------------------- finding


def find(load_dir: Path, tag: str | None) -> Path:
    """The checkpoint called `tag`, by default the one that ``latest`` names.

    Raises:
        FileNotFoundError: there is none; the message lists those there are.
        CheckpointError: there is one whose manifest is missing or damaged.
    """
    if tag is None and is_checkpoint(load_dir):
        return load_dir
    latest = load_dir / "latest"
    name = tag or (named_by(latest).name if latest.is_file() else None)
    path = load_dir / (name or "")
    for candidate in (path, _aside(path)) if name else ():
        if is_checkpoint(candidate):
            return candidate
    if (path / "state.pt").is_file() or (path / MANIFEST).is_file():
        raise CheckpointError(f"{path} is incomplete or damaged: no readable {MANIFEST} of this package")
    inside = load_dir.iterdir() if load_dir.is_dir() else ()
    there = sorted(p.name for p in inside if is_checkpoint(p) and not p.name.startswith("."))
    wanted = f"checkpoint {name!r}" if name else "file 'latest'"
    raise FileNotFoundError(f"no {wanted} in {load_dir}; checkpoints there: {', '.join(there) or '(none)'}")


def named_by(latest: Path) -> Path:
    """The checkpoint that a file ``latest`` names, beside it.

    Raises:
        CheckpointError: it names something elsewhere.
    """
    name = latest.read_text().strip()
    if not name or name == ".." or name != Path(name).name:
        raise CheckpointError(f"{latest} names {name!r}: must be the plain name of a folder beside it")
    return latest.parent / name


def check_files(path: Path, files: dict[str, dict[str, int]], where: Path | None = None) -> None:
    """Compare files with what the manifest says about them.

    Args:
        path: the checkpoint.
        files: of its manifest.
        where: a way to it that stays when another one takes over its path; default: the path.

    Raises:
        CheckpointError: the first that is missing or another one.
        ValueError: see `plain_file`.
    """
    for name, expected in files.items():
        file = plain_file(where or path, name)
        if not file.is_file():
            raise CheckpointError(f"{path} is incomplete: {name} is missing")
        if file.stat().st_size != expected["bytes"] or crc32(file) != expected["crc32"]:
            raise CheckpointError(f"{path} is damaged: {name} is not the file that was written")
