"""A calculator that the policy calls by writing ``<calc>2+3</calc>``."""

from __future__ import annotations

import ast
import math
import operator
import re
from typing import Any

from typing_extensions import override

from lightrft_lightning.environments.base import ENVIRONMENTS, Environment, Observation, Turn
from lightrft_lightning.experience.trajectory import Prompt
from lightrft_lightning.rewards.functions import last_number

_BINARY: dict[type, Any] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
_ALLOWED = re.compile(r"[0-9.+\-*/%()\s]{1,200}")
"""So there are no names, the tree is not too deep, and the value is at most as long."""


def evaluate(expression: str) -> int | float:
    """The value of an expression of numbers, ``+ - * / // %`` and parentheses, and of nothing else.

    >>> evaluate("2*(3+4)")
    14

    Raises:
        ValueError: it is none, it has no finite value, or it is longer than 200 characters.
    """
    if not _ALLOWED.fullmatch(expression):
        raise ValueError(f"{expression[:200]!r} is no expression of at most 200 characters")
    try:
        value = _value(ast.parse(expression.strip(), mode="eval").body)
    except (SyntaxError, ArithmeticError, RecursionError, MemoryError) as err:
        raise ValueError(f"{expression!r} has no value: {err}") from err
    if not math.isfinite(value):
        raise ValueError(f"{expression!r} has no finite value")
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _value(node: ast.expr) -> int | float:
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return node.value  # type: ignore[return-value]
    if isinstance(node, ast.BinOp) and type(node.op) in _BINARY:
        return _BINARY[type(node.op)](_value(node.left), _value(node.right))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.UAdd, ast.USub)):
        value = _value(node.operand)
        return -value if isinstance(node.op, ast.USub) else value
    raise ValueError(f"{type(node).__name__} is not allowed")


@ENVIRONMENTS.register("calculator")
class Calculator(Environment):
    """Replies to a call with the value; a turn without one is the answer, and ends the trajectory.

    Name the closing mark as a stop string (``sampling: {stop: ["</calc>"]}``), so that a call ends the turn.

    Args:
        opening: what begins a call.
        closing: what ends it.
        reply: format string over ``value``.
        error: the reply to a call without a value.
        answer: column with the right number: an answer whose last number it is earns 1, another 0; empty: no reward.
    """

    role = None  # the value stands right behind the call, in the same message

    def __init__(
        self,
        opening: str = "<calc>",
        closing: str = "</calc>",
        reply: str = "={value}\n",
        error: str = "=?\n",
        answer: str = "answer",
    ) -> None:
        self.opening, self.closing, self.reply, self.error, self.answer = opening, closing, reply, error, answer
        reply.format(value=0)  # raises for a string that is no such format
        self._expected: Any = None

    @override
    def reset(self, prompt: Prompt, seed: int) -> None:
        if self.answer:
            self._expected = prompt.fields[self.answer]

    @override
    def step(self, turn: Turn) -> Observation:
        start, end = turn.text.rfind(self.opening), turn.text.rfind(self.closing)
        if not 0 <= start < end:
            reward = last_number(turn.text, self._expected, turn.finish_reason) if self.answer else None
            return Observation(reward=reward, done=True)
        try:
            value = evaluate(turn.text[start + len(self.opening) : end])
        except ValueError:
            return Observation(self.error, error=True)
        return Observation(self.reply.format(value=value))
