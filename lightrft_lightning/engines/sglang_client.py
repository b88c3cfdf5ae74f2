"""HTTP calls to SGLang's server."""

from __future__ import annotations

import asyncio
import base64
import io
from collections.abc import Generator, Mapping, Sequence
from typing import Any

from lightrft_lightning.engines._client import Client

AT_ONCE = 128
"""Prompts under way; SGLang has its own queue for their completions."""


class SGLangClient(Client):
    """SGLang answers with lists, text or nothing as well."""

    def text(self, method: str, path: str, body: dict[str, Any] | None, deadline: float) -> str:
        """The answer as it is; raises what `call` raises."""
        return self._wait(self._within(deadline, f"{method} {path}", self._text(method, path, body)))

    def groups(
        self, bodies: Mapping[int, Sequence[dict[str, Any]]], deadline: float
    ) -> Generator[tuple[int, Any], None, None]:
        """Answers to the last body of each group, by the group's number, as they arrive; raises what `call` raises."""

        async def ask(put: Any) -> None:
            free = asyncio.Semaphore(AT_ONCE)

            async def group(number: int) -> None:
                async with free:
                    for body in bodies[number]:
                        text = await self._text("POST", "/generate", body)
                    put((number, self._parse_any("POST /generate", text)))

            tasks = [asyncio.ensure_future(group(number)) for number in bodies]
            try:
                await asyncio.gather(*tasks)
            finally:
                for task in tasks:
                    task.cancel()

        return self._items("POST /generate", ask, deadline)


def encoded(image: Any) -> str:
    """A PIL image as SGLang takes it over HTTP."""
    data = io.BytesIO()
    image.save(data, format="PNG")
    return "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()
