"""A name → object table that users extend with a decorator."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from lightrft_lightning._errors import unknown_name

T = TypeVar("T")


class Registry(Generic[T]):
    """Named entries of one kind, e.g. advantage estimators.

    Example:
        >>> losses = Registry("policy loss")
        >>> @losses.register("mine")
        ... def my_loss(): ...
        >>> losses["mine"] is my_loss
        True
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._entries: dict[str, T] = {}

    def register(self, name: str, *, override: bool = False) -> Callable[[T], T]:
        """Decorator that stores the decorated object under `name`.

        Raises:
            ValueError: the name is taken by another object and `override` is not set.
        """

        def decorate(entry: T) -> T:
            if not override and self._entries.get(name, entry) is not entry:
                raise ValueError(f"the {self.kind} {name!r} is already registered; pass override=True to replace it")
            self._entries[name] = entry
            return entry

        return decorate

    def __getitem__(self, name: str) -> T:
        """The entry called `name`.

        Raises:
            ValueError: no such entry; the message names the nearest one.
        """
        if name not in self._entries:
            raise ValueError(unknown_name(self.kind, name, self._entries))
        return self._entries[name]

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._entries))
