"""From a name or a path that a user writes to the function or class that it stands for.

A name that stands in a checkpoint was written by whoever made it: of these, only what is registered is built.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib
import importlib.util
import inspect
import os
import shutil
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from pathlib import Path
from types import ModuleType
from typing import Any

from lightrft_lightning._errors import unknown_name
from lightrft_lightning._registry import Registry

FILE_MODULES = "lightrft_file_"
"""How the names of modules begin that are files of the user."""

_stamps: dict[str, tuple[int, int]] = {}
"""Of each module from a file when it was written last, and its size."""

_folder: str | None = None
"""Where the modules from files are found under their names."""

_STAND_IN = """import importlib.util, sys
spec = importlib.util.spec_from_file_location(__name__, {path!r})
sys.modules[__name__] = module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
"""

_given: ContextVar[frozenset[str] | None] = ContextVar("given", default=None)
"""Inside of `settings_of_a_checkpoint`: what its caller has named himself."""


@contextlib.contextmanager
def settings_of_a_checkpoint(given: Any, *, trusted: bool = False) -> Iterator[None]:
    """Inside, `check_named` lets nothing pass but what the caller names himself.

    Args:
        given: what he has passed; the strings in it count as named.
        trusted: he has said that the file may run code (``weights_only=False``).
    """
    token = _given.set(None if trusted else frozenset(_strings(given)))
    try:
        yield
    finally:
        _given.reset(token)


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from _strings([*value.keys(), *value.values()])
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _strings(item)


def check_named(kind: str, value: str, argument: str) -> None:
    """Refuse what stands in a checkpoint, and would run code or give away a secret.

    Args:
        kind: what it is, for the message.
        value: the name.
        argument: under which the caller can pass it.

    Raises:
        ValueError: the caller has not named it himself.
    """
    given = _given.get()
    if given is not None and value not in given:
        raise ValueError(
            f"{kind} {value!r} is named in the checkpoint, and only registered names are built from one: pass it "
            f"yourself, load_from_checkpoint(path, {argument}), or weights_only=False if you trust the file"
        )


def find(path: str, registry: Registry[Any], noun: str = "function") -> Any:
    """What is registered as `path`, or stands in ``package.module.name`` or ``path/to/file.py:name``.

    Args:
        path: a name or one of these.
        registry: where names are looked up.
        noun: what it is in Python, for messages.

    Raises:
        ValueError: no such name; the message names the nearest one. Or a checkpoint names it, see `check_named`.
        FileNotFoundError: no such file.
    """
    kind = registry.kind
    if path in registry:
        return registry[path]
    check_named(kind, path, f"{'environment' if kind == 'environment' else f'{kind}s'}=...")
    if ".py:" in path:
        file, name = path.rsplit(":", 1)
        module = _load_file(Path(file), kind)
    elif "." in path:
        module_name, name = path.rsplit(".", 1)
        try:
            module = importlib.import_module(module_name)
        except ModuleNotFoundError as err:
            raise ValueError(f"{kind} {path!r}: {err}. For a file of your own write 'path/to/file.py:{name}'") from err
    else:
        raise ValueError(f"{unknown_name(kind, path, registry)}, 'package.module.{noun}' or 'file.py:{noun}'")
    found = getattr(module, name, None)
    if not callable(found):
        names = [n for n, value in vars(module).items() if callable(value) and not n.startswith("_")]
        raise ValueError(f"{kind} {path!r}: {unknown_name(noun, name, names)}")
    return found


def short_name(path: str, registry: Registry[Any]) -> str:
    """The name itself if it is registered, else the last part of the path."""
    return path if path in registry else path.rsplit(":", 1)[-1].rsplit(".", 1)[-1]


def check_options(kind: str, name: str, cls: Callable[..., Any], options: Mapping[str, Any]) -> None:
    """Check that a class can be built with `options`.

    Raises:
        ValueError: it has no such option, or needs one that is not given.
    """
    parameters = inspect.signature(cls).parameters
    named = {n: p for n, p in parameters.items() if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}
    if len(named) == len(parameters):  # else the class itself says what it does not know
        for option in options:
            if option not in named:
                raise ValueError(unknown_name(f"option of {kind} {name!r}", option, named))
    for option, parameter in named.items():
        if parameter.default is parameter.empty and option not in options:
            raise ValueError(f"{kind} {name!r} needs the option {option!r}: {{'name': {name!r}, {option!r}: ...}}")


def _load_file(path: Path, kind: str) -> ModuleType:
    """The module, which is run once as long as the file stays as it is."""
    if not path.is_file():
        raise FileNotFoundError(f"no such file with {kind}s: {str(path)!r} (looked in {str(Path.cwd())!r})")
    name = f"{FILE_MODULES}{path.stem}_{zlib.crc32(str(path.resolve()).encode()):08x}"
    stamp = (path.stat().st_mtime_ns, path.stat().st_size)
    if name in sys.modules and _stamps.get(name) == stamp:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look their module up there
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    _stamps[name] = stamp
    _let_children_find(name, path.resolve())
    return module


def _let_children_find(name: str, path: Path) -> None:
    """Processes that `multiprocessing` spawns import modules by name, from our `sys.path`."""
    global _folder
    if _folder is None:
        _folder = tempfile.mkdtemp(prefix="lightrft_modules_")
        atexit.register(_remove, _folder, os.getpid())
        sys.path.append(_folder)
    Path(_folder, f"{name}.py").write_text(_STAND_IN.format(path=str(path)))


def _remove(folder: str, owner: int) -> None:
    if os.getpid() == owner:  # no fork
        shutil.rmtree(folder, ignore_errors=True)
