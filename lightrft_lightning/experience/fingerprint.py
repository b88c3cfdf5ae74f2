"""What tells whether training prompts are those that a checkpoint was written with."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Mapping, Sequence
from typing import Any

from lightrft_lightning.experience.trajectory import Prompt


def fingerprint(prompts: Sequence[Prompt]) -> dict[str, Any]:
    """Hashes of the token ids of all rows: in their order, and whatever it is."""
    ordered, mixed = hashlib.blake2b(digest_size=16), 0
    for prompt in prompts:
        row = hashlib.blake2b(digest_size=8)
        for ids in (prompt.token_ids, *prompt.completions):
            row.update(array("q", (len(ids), *ids)).tobytes())
        ordered.update(row.digest())
        mixed = (mixed + int.from_bytes(row.digest(), "little")) % 2**64
    return {"rows": len(prompts), "ordered": ordered.hexdigest(), "mixed": f"{mixed:016x}"}


def difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """How two fingerprints differ, in words; nothing, if they do not."""
    if before["ordered"] == now["ordered"]:
        return ""
    if before["mixed"] == now["mixed"]:
        return "the same rows in another order"
    if before["rows"] != now["rows"]:
        return f"{now['rows']} rows in place of {before['rows']}"
    return f"{now['rows']} rows as before, with other token ids (another file, template or tokenizer)"
