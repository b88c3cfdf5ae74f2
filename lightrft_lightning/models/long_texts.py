"""Texts of a proof that reach beyond the lengths a config names: a window, a chunk, an original length.

What changes only there cannot be seen in short texts.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lightrft_lightning.experience.trajectory import Completion, Prompt, Trajectory

_LENGTHS = re.compile("window|chunk|position|topk|top_k|context|local|block|extent|floor|ctx")
"""In names of settings that may be numbers of tokens."""
_MOST = 64
"""Tokens beyond such a length that are looked at."""
_FEW = 4


def named_length(config: Any, short: int, longest: int) -> int | None:
    """The largest number of tokens in a config that texts of a run go beyond and short ones do not, if there is one.

    Args:
        config: of the text model.
        short: most tokens of a short text.
        longest: most tokens of a text of the run.
    """
    found = [value for value in _numbers(config.to_dict()) if short <= value <= longest - _FEW]
    return max(found, default=None)


def _numbers(settings: Mapping[str, Any]) -> Iterator[int]:
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from _numbers(value)
        elif _LENGTHS.search(str(name)):
            values = value if isinstance(value, list | tuple) else [value]
            yield from (v for v in values if isinstance(v, int) and not isinstance(v, bool))


def texts_beyond(length: int, longest: int, tokens: Sequence[int], group: int) -> list[Trajectory]:
    """Two completions of one prompt; those of their tokens that are compared together at the end are beyond `length`.

    Args:
        length: from `named_length`.
        longest: most tokens of a text.
        tokens: to make them of.
        group: number of the prompt.
    """
    rng = random.Random(1)
    beyond = 1 << min(_MOST, longest - length).bit_length() - 1
    new = 2 * beyond - 1  # places beyond ... new of a completion have one median, see `proof.apart`
    prompt = Prompt(tuple(rng.choices(tokens, k=length + beyond - new)), "")
    completions = [tuple(rng.choices(tokens, k=new)) for _ in range(2)]
    return [Trajectory(prompt, Completion(ids, (0.0,) * new, "length"), group) for ids in completions]
