"""Rewards from an HTTP server, by the protocol of OpenRLHF's and LightRFT's ``remote_rm_url``.

Source: https://github.com/OpenRLHF/OpenRLHF, ``openrlhf/utils/remote_rm_utils.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightrft_lightning.rewards._http import ServerError, Servers
from lightrft_lightning.rewards._spec import REWARDS


@REWARDS.register("remote")
class RemoteReward:
    """Asks a server for the rewards: ``{"query": [...], "prompts": [...], "labels": [...]}`` → ``{"rewards": [...]}``.

    A query is a prompt with its completion behind it. What else the answer holds (``scores``, ``extra_logs``) is not
    looked at. An answer with another number of rewards is the failure of the samples that were asked for.

    Args:
        url: of the server, with its route; or several that all do the same.
        label_column: column that is sent as ``labels``; default: ``answer`` where there is one, else null.
        batch_size: samples of one request.
        concurrency: requests at a time.
        **connection: timeouts, retries, key and breaker; see `Servers`.

    Raises:
        ValueError: an option that does not exist or is out of range.
        ImportError: httpx is missing.

    Example:
        >>> RemoteReward(["http://rm-1:5000/get_reward", "http://rm-2:5000/get_reward"], timeout=10)  # doctest: +SKIP
    """

    def __init__(
        self,
        url: str | Sequence[str],
        *,
        label_column: str | None = None,
        batch_size: int = 64,
        concurrency: int = 8,
        **connection: Any,
    ) -> None:
        if batch_size < 1 or concurrency < 1:
            raise ValueError(f"reward 'remote': batch_size={batch_size}, concurrency={concurrency} must be at least 1")
        self.batch_size, self.workers = batch_size, concurrency
        self.columns = () if label_column is None else (label_column,)
        self._label_column = label_column or "answer"
        self._servers = Servers.of("remote", url, "", connection)

    def __call__(self, prompts: list[str], completions: list[str], **columns: list[Any]) -> list[Any]:
        """The rewards of these samples.

        Raises:
            ServerError: there is no answer, or it is not of the form above.
        """
        labels = columns.get(self._label_column, [None] * len(prompts))
        queries = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
        answer = self._servers.post({"query": queries, "prompts": prompts, "labels": labels})
        rewards = answer.get("rewards") if isinstance(answer, dict) else None
        if not isinstance(rewards, list):
            raise ServerError(f"the answer has no list 'rewards': {str(answer)[:200]!r}")
        if len(rewards) != len(queries):
            raise ServerError(f"the answer has {len(rewards)} rewards for {len(queries)} queries")
        return rewards
