"""The reward functions that come with the package."""

from __future__ import annotations

import functools
import importlib.util
import json
import queue
import re
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Mapping, Sequence
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any

from lightrft_lightning._errors import import_extra
from lightrft_lightning.rewards._spec import REWARDS

# A minus counts as a sign unless something that it could be subtracted from stands before it.
NUMBER = re.compile(r"(?:(?<![\w)])[-\u2212])?(?:[0-9]+(?:,[0-9]{3})*(?:\.[0-9]+)?|\.[0-9]+)")
MATH_TAIL = 4096


@REWARDS.register("last_number")
def last_number(completion: str, answer: Any, finish_reason: str, unfinished: float | None = None) -> float:
    """1 if the last number in the text equals `answer`, else 0.

    Args:
        completion: the text; thousands separators are understood (``1,234.5``).
        answer: column with a number or its text.
        finish_reason: why the text ends.
        unfinished: reward of a completion that was cut off at the length limit, right or wrong; default: no rule.

    Raises:
        ValueError: `answer` is no number.
    """
    if unfinished is not None and finish_reason == "length":
        return unfinished
    expected = decimal_number(str(answer))
    if expected is None:
        raise ValueError(f"answer {str(answer)[:80]!r} is no number")
    last = deque(NUMBER.finditer(completion), maxlen=1)  # no list: there may be millions
    return float(bool(last) and decimal_number(last[0].group()) == expected)


def decimal_number(text: str) -> Decimal | None:
    """The finite number that `text` is, with or without thousands separators; None: it is none."""
    try:
        number = Decimal(text.strip().replace(",", "").replace("\u2212", "-"))
    except InvalidOperation:
        return None
    return number if number.is_finite() else None


@REWARDS.register("exact_match")
def exact_match(completion: str, answer: Any) -> float:
    """1 if text and `answer` are the same apart from surrounding white space, else 0."""
    return float(completion.strip() == str(answer).strip())


@REWARDS.register("overlong")
def overlong(completion: str, token_ids: Sequence[int], limit: int, buffer: int, factor: float = 1.0) -> float:
    """DAPO's soft penalty for length (https://arxiv.org/abs/2503.14476, section 3.4).

    Args:
        completion: not looked at; it says that the function is called for each sample.
        token_ids: the completion.
        limit: length in tokens at which the penalty is full.
        buffer: tokens before `limit` over which it grows.
        factor: the full penalty.

    Returns:
        0 up to ``limit - buffer`` tokens, then falling linearly to ``-factor`` at `limit`.

    Raises:
        ValueError: `buffer` is not between 1 and `limit`.
    """
    if not 1 <= buffer <= limit:
        raise ValueError(f"buffer={buffer} must be at least 1 and at most limit={limit}")
    share = (len(token_ids) - (limit - buffer)) / buffer
    return -factor * min(max(share, 0.0), 1.0)


@REWARDS.register("reasoning_gym")
def reasoning_gym(completion: str, entry: Mapping[str, Any]) -> float:
    """The score, 0 to 1, that reasoning-gym's own verifier gives; see `tasks.reasoning_gym`.

    The answer is what stands in the last ``<answer>...</answer>``, or the whole text if there is no such pair.

    Args:
        completion: the text.
        entry: column with what reasoning-gym generated.
    """
    end = completion.rfind("</answer>")
    start = completion.rfind("<answer>", 0, max(end, 0))
    answer = completion[start + len("<answer>") : end] if start >= 0 else completion
    options = json.dumps(dict(entry.get("config", {})), sort_keys=True)
    verifier = _reasoning_gym_verifier(entry["metadata"]["source_dataset"], options)
    return float(verifier.score_answer(answer.strip(), entry))


@functools.lru_cache(maxsize=64)
def _reasoning_gym_verifier(name: str, options: str) -> Any:
    return import_extra("reasoning_gym", "demo").create_dataset(name, **json.loads(options))


@REWARDS.register("math_verify")
def math_verify(completion: str, answer: Any, timeout: float = 5.0) -> float:
    r"""1 if the completion's final answer is mathematically equal to `answer`, by math-verify, else 0.

    Understands LaTeX (also ``\boxed{}``) and plain expressions. Only the last 4096 characters of the text are read.

    Args:
        completion: the text.
        answer: column with the right answer, LaTeX without dollar signs.
        timeout: seconds after which a completion counts as wrong. Like math-verify's own limit, but it also ends what
            sympy computes in one go, such as ``9^{9^{9^9}}``.
    """
    if importlib.util.find_spec("math_verify") is None:
        import_extra("math_verify", "demo")  # raises, and says what to install
    process = _borrow_math_process()
    assert process.stdin is not None and process.stdout is not None
    try:
        process.stdin.write(json.dumps([str(answer), completion[-MATH_TAIL:], timeout]) + "\n")
        process.stdin.flush()
        verdict = process.stdout.readline()
    except BrokenPipeError:
        verdict = ""
    if verdict:
        _idle_math_processes.put(process)
        return float(json.loads(verdict))
    process.kill()  # if it only closed its output
    process.communicate()
    if process.returncode != -signal.SIGALRM:
        raise RuntimeError(f"the helper process of math_verify ended with code {process.returncode}")
    return 0.0


_idle_math_processes: queue.SimpleQueue[subprocess.Popen[str]] = queue.SimpleQueue()


def _borrow_math_process() -> subprocess.Popen[str]:
    """One that is idle, else a new one. Each ends by itself when this process does, for its input ends then."""
    try:
        return _idle_math_processes.get_nowait()
    except queue.Empty:
        script = str(Path(__file__).with_name("_math_process.py"))
        pipe = subprocess.PIPE
        return subprocess.Popen([sys.executable, script], stdin=pipe, stdout=pipe, text=True, encoding="ascii")
