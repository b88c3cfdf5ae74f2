"""From a name or a path that a user writes to the function or class that it stands for."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from lightrft_lightning._errors import unknown_name
from lightrft_lightning._registry import Registry

FILE_MODULES = "lightrft_file_"
"""How the names of modules begin that are files of the user."""


def find(path: str, registry: Registry[Any], noun: str = "function") -> Any:
    """What is registered as `path`, or stands in ``package.module.name`` or ``path/to/file.py:name``.

    Args:
        path: a name or one of these.
        registry: where names are looked up.
        noun: what it is in Python, for messages.

    Raises:
        ValueError: no such name; the message names the nearest one.
        FileNotFoundError: no such file.
    """
    kind = registry.kind
    if path in registry:
        return registry[path]
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
    if not path.is_file():
        raise FileNotFoundError(f"no such file with {kind}s: {str(path)!r} (looked in {str(Path.cwd())!r})")
    name = f"{FILE_MODULES}{path.stem}_{zlib.crc32(str(path.resolve()).encode()):08x}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look their module up there
    spec.loader.exec_module(module)
    return module
