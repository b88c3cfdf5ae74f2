"""What travels between `RemoteRollout` and ``lightrft serve``: JSON, of which each side believes nothing unchecked."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, NoReturn, get_args

from lightrft_lightning._errors import unknown_name
from lightrft_lightning.engines.base import EngineError
from lightrft_lightning.engines.weight_sync import Held, Part
from lightrft_lightning.experience.trajectory import Completion, FinishReason, SamplingParams

SESSION_HEADER = "X-LightRFT-Session"
KEY_VARIABLE = "LIGHTRFT_KEY"
ANNOUNCEMENT = "lightrft serve: listening on "
"""What the server prints once it has its port, followed by its URL."""
HOSTED = ("vllm", "transformers")
"""Engines that the server can have; SGLang is a server itself."""
MOST_COMPLETIONS = 1 << 16
"""Per prompt; more is a mistake, and would fill the server's memory before anything is sampled."""


WHOLE = 1 << 31
"""Whole numbers are below it."""
LONGEST = 1e6
"""Seconds of the longest deadline, more than eleven days: a timer takes no longer ones."""


@dataclass(frozen=True)
class Request:
    """What to generate.

    Attributes:
        prompts: token ids, ragged.
        sampling: see `SamplingParams`.
        streams: number of each prompt's stream of random numbers.
        weights: the server's name of the weights that are expected to be in place; None: any.
        deadline: seconds.
    """

    prompts: Sequence[Sequence[int]]
    sampling: SamplingParams
    streams: Sequence[int]
    weights: str | None
    deadline: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def shortened(value: object) -> str:
    """A value as it is quoted in a message: at most 80 characters of it."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."


# -------------------------------------------------------------------- what the server checks


def parse_object(data: bytes) -> dict[str, Any]:
    """The JSON object in a request's body.

    Raises:
        ValueError: it is something else.
    """
    try:
        body = json.loads(data, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as err:
        raise ValueError(f"the request's body is no JSON: {shortened(data)} ({err})") from err
    if not isinstance(body, dict):
        raise ValueError(f"the request's body must be a JSON object, got {shortened(body)}")
    return body


def _refuse_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is no JSON number")


def only(body: Mapping[str, Any], *names: str) -> None:
    """Refuse fields that would have no effect.

    Raises:
        ValueError: there is one; the message names it.
    """
    for name in body:
        if name not in names:
            raise ValueError(unknown_name("field", name[:80], names))


def get(
    body: Mapping[str, Any], name: str, kind: type | tuple[type, ...], ok: Callable[[Any], bool], wanted: str
) -> Any:
    """The value of a required field.

    Args:
        body: the request.
        name: of the field.
        kind: its type.
        ok: function of the value, whether it is in range.
        wanted: what a good value is, for the message.

    Raises:
        ValueError: it is missing or wrong; the message quotes it.
    """
    if name not in body:
        raise ValueError(f"the request has no {name!r}: must be {wanted}")
    value = body[name]
    if not _is(value, kind) or not ok(value):
        raise ValueError(f"{name}={shortened(value)}: must be {wanted}")
    return value


def _is(value: object, kind: type | tuple[type, ...]) -> bool:
    """`isinstance`, but a bool is no number."""
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def _is_list_of(value: object, kind: type, ok: Callable[[Any], object] = lambda item: True) -> bool:
    return isinstance(value, list) and all(_is(item, kind) and ok(item) for item in value)


def parse_request(body: Mapping[str, Any], vocab_size: int) -> Request:
    """A request to generate.

    Raises:
        ValueError: a field is missing or wrong.
    """
    only(body, *(f.name for f in fields(Request)))
    prompts = get(body, "prompts", list, lambda v: _is_list_of(v, list), "lists of token ids")
    for i, prompt in enumerate(prompts):
        if not prompt or not _is_list_of(prompt, int, lambda token: 0 <= token < vocab_size):
            raise ValueError(
                f"prompts[{i}]={shortened(prompt)}: must be token ids from 0 to {vocab_size - 1}, not empty"
            )
    streams = get(body, "streams", list, lambda v: _is_list_of(v, int, _is_word), "whole numbers of 64 bits")
    if len(streams) != len(prompts):
        raise ValueError(f"{len(prompts)} prompts but {len(streams)} streams")
    weights = body.get("weights")
    if not isinstance(weights, str | None) or len(weights or "") > 256:
        raise ValueError(f"weights={shortened(weights)}: must be a string, of 256 characters at most, or null")
    deadline = get(body, "deadline", (int, float), lambda v: 0 < v <= LONGEST, f"seconds, above 0, up to {LONGEST:g}")
    sampling = get(body, "sampling", dict, lambda v: True, "an object")
    return Request(prompts, _sampling(sampling), streams, weights, float(deadline))


def _sampling(body: Mapping[str, Any]) -> SamplingParams:
    kinds: dict[str, tuple[Any, Any, str]] = {
        "n": (int, lambda v: 1 <= v <= MOST_COMPLETIONS, f"a whole number from 1 to {MOST_COMPLETIONS}"),
        "max_new_tokens": (int, lambda v: 1 <= v < WHOLE, "a whole number, at least 1"),
        "temperature": ((int, float), lambda v: v == 0 or 1e-6 <= v <= 1e6, "0 (greedy), or 1e-6 to 1e6"),
        "top_p": ((int, float), lambda v: 0 < v <= 1, "above 0 and at most 1"),
        "top_k": (int, lambda v: 0 <= v < WHOLE, "a whole number, 0 (all tokens) or more"),
        "stop": (list, lambda v: len(v) <= 64 and _is_list_of(v, str, _is_stop), "up to 64 strings of 1 to 1000 bytes"),
        "seed": (int, _is_word, "a whole number of 64 bits"),
    }
    for name in body:
        if name not in kinds:
            raise ValueError(unknown_name("field of sampling", name[:80], [f.name for f in fields(SamplingParams)]))
    return SamplingParams(**{name: get(body, name, *kinds[name]) for name in body})


def _is_word(value: int) -> bool:
    return -(1 << 63) <= value < 1 << 64


def _is_stop(text: str) -> bool:
    return 1 <= len(text.encode(errors="replace")) <= 1000 and not any(0xD800 <= ord(c) < 0xE000 for c in text)


def parse_wanted(body: Mapping[str, Any]) -> tuple[dict[str, tuple[int, int]], list[str] | None]:
    """The arguments of `EngineWithCopy._read_back`.

    Raises:
        ValueError: a field is missing or wrong.
    """
    only(body, "wanted", "names")
    wanted = get(body, "wanted", dict, lambda v: True, "an object of [first column, step]")
    for name, at in wanted.items():
        if not _is_list_of(at, int, lambda v: 0 <= v < WHOLE) or len(at) != 2 or at[1] < 1:
            raise ValueError(f"wanted[{shortened(name)}]={shortened(at)}: must be [first column, step]")
    names = body.get("names")
    if names is not None and not _is_list_of(names, str):
        raise ValueError(f"names={shortened(names)}: must be a list of strings, or null")
    return {name: (first, step) for name, (first, step) in wanted.items()}, names


# -------------------------------------------------------------------- answers


def group_to_json(prompt: int, completions: Sequence[Completion]) -> dict[str, Any]:
    """One prompt's completions. A float survives JSON bit for bit."""
    return {"prompt": prompt, "completions": [[c.token_ids, c.logprobs, c.finish_reason] for c in completions]}


def most_bytes(sampling: SamplingParams) -> int:
    """Of the line of a group: a token is an id and a float, 64 bytes are more than they take."""
    return (1 << 16) + 64 * sampling.n * sampling.max_new_tokens


def group_from_json(line: Mapping[str, Any], sampling: SamplingParams) -> tuple[int, list[Completion]]:
    """Undo `group_to_json`.

    Raises:
        EngineError: the completions are not as they were asked for.
    """
    prompt, completions = line.get("prompt"), line.get("completions")
    if not _is(prompt, int) or not isinstance(completions, list):
        raise EngineError(f"malformed answer: {shortened(line)} is no group of completions")
    assert isinstance(prompt, int)
    if len(completions) != sampling.n:
        raise EngineError(
            f"malformed answer: {len(completions)} completions of prompt {prompt}, asked for {sampling.n}"
        )
    return prompt, [_completion(prompt, item, sampling) for item in completions]


def _completion(prompt: int, item: Any, sampling: SamplingParams) -> Completion:
    what = f"malformed answer for prompt {prompt}:"
    if not isinstance(item, list) or len(item) != 3 or not _is_list_of(item[0], int, lambda token: token >= 0):
        raise EngineError(f"{what} {shortened(item)} is no completion")
    ids, logprobs, reason = item
    if not 1 <= len(ids) <= sampling.max_new_tokens:
        raise EngineError(f"{what} {len(ids)} tokens, asked for 1 to {sampling.max_new_tokens}")
    if not isinstance(logprobs, list) or len(logprobs) != len(ids):
        raise EngineError(f"{what} {len(ids)} tokens with log-probabilities {shortened(logprobs)}")
    if not all(_is(value, (int, float)) and math.isfinite(value) for value in logprobs):
        raise EngineError(f"{what} log-probabilities {shortened(logprobs)} are not all finite numbers")
    if reason not in get_args(FinishReason):
        raise EngineError(f"{what} {unknown_name('finish reason', reason, get_args(FinishReason))}")
    return Completion(tuple(ids), tuple(map(float, logprobs)), reason)


def held_to_json(held: Held) -> dict[str, Any]:
    """What the engine holds."""
    return asdict(held)


def held_from_json(body: Mapping[str, Any]) -> Held:
    """Undo `held_to_json`.

    Raises:
        EngineError: it is something else.
    """
    try:
        parts = {
            str(name): [Part(_pair(p["rows"]), _pair(p["columns"]), str(p["digest"])) for p in found]
            for name, found in body["parts"].items()
        }
        return Held(parts, list(map(str, body["unreadable"])), list(map(str, body["unnamed"])))
    except (KeyError, TypeError, ValueError, AttributeError) as err:
        raise EngineError(f"malformed answer: {shortened(body)} does not tell what the engine holds") from err


def _pair(value: Any) -> tuple[int, int]:
    first, last = value
    return int(first), int(last)
