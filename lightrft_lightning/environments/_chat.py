"""What a chat template writes between a turn of the assistant and the next one, found by rendering placeholders."""

from __future__ import annotations

from typing import Any

_POLICY, _OBSERVATION = "POLICY-TURN-5b1e", "OBSERVATION-5b1e"


class TurnMarkers:
    """Token ids around an observation.

    Args:
        tokenizer: with a chat template.
        role: of the observation.

    Raises:
        ValueError: the template refuses the role, or does not write each message once as it is.
    """

    def __init__(self, tokenizer: Any, role: str) -> None:
        self._tokenizer = tokenizer
        messages = [
            {"role": "user", "content": "?"},
            {"role": "assistant", "content": _POLICY},
            {"role": role, "content": _OBSERVATION},
        ]
        advice = "set another `role` in the environment (None adds the bare text), or chat_template=False in the data"
        try:
            text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        except Exception as err:  # whatever the template's author raises
            raise ValueError(f"the chat template refuses an observation with role={role!r}: {err}; {advice}") from err
        if text.count(_POLICY) != 1 or text.count(_OBSERVATION) != 1 or text.index(_POLICY) > text.index(_OBSERVATION):
            raise ValueError(f"the chat template does not show a turn and the observation after it once; {advice}")
        between, after = text.split(_POLICY)[1].split(_OBSERVATION)
        self._between, self._after = self._ids(between), self._ids(after)

    def around(self, token_ids: tuple[int, ...], observation: list[int]) -> list[int]:
        """What follows a turn of the policy: the end of its message, if it did not write it itself, and the next."""
        return [*self._between[self._written(token_ids) :], *observation, *self._after]

    def _written(self, token_ids: tuple[int, ...]) -> int:
        """How many tokens of the message's end the policy has written: up to the end token, or none."""
        last = token_ids[-1] if token_ids else None
        if last not in self._between:
            return 0
        end = self._between.index(last)
        is_end = not self._tokenizer.decode(self._between[:end]).strip()  # some templates put a space before it
        return end + 1 if is_end else 0

    def _ids(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])
