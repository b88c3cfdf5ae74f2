"""Rewards by a language model that reads the completion and writes a grade."""

from __future__ import annotations

import re
import threading
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lightrft_lightning.data import template_columns
from lightrft_lightning.experience.trajectory import SamplingParams
from lightrft_lightning.rewards._http import ServerError, Servers
from lightrft_lightning.rewards._spec import REWARDS
from lightrft_lightning.rewards.functions import NUMBER, decimal_number

if TYPE_CHECKING:
    from lightrft_lightning.engines.base import RolloutEngine


@REWARDS.register("judge")
class Judge:
    r"""Lets a model grade each completion, greedily; an answer without a grade is the failure of its sample.

    The model is behind a server that speaks OpenAI's protocol (vLLM, SGLang and others;
    https://platform.openai.com/docs/api-reference/chat), or in an engine of this process.

    Args:
        template: what the judge reads: a format string over ``prompt``, ``completion`` and the columns of the data.
        url: base URL of the server, such as ``http://localhost:8000/v1``, or several with the same model.
        model: the server's name of the model.
        engine: an engine that has its tokenizer, in place of a server; not the one of a rollout that goes on meanwhile.
        chat: the template is the user's message of a conversation; False: it is plain text to be continued. Default:
            true, or with an engine whether its tokenizer has a chat template.
        pattern: regular expression whose only group is the grade, e.g. ``r"(\d+)/10"``; its last match counts. Default:
            the last number of the answer.
        scale: lowest and highest grade, which become 0 and 1; a grade outside is a failure. Default: the grade itself.
        max_new_tokens: length limit of the answer.
        concurrency: requests to servers at a time.
        **connection: timeouts, retries, key and breaker; see `Servers`.

    Raises:
        ValueError: an option that does not exist or cannot be.
        ImportError: httpx is missing.

    Example:
        >>> Judge("Grade this from 1 to 10:\n{completion}", scale=(1, 10), url="http://localhost:8000/v1", model="qwen")
        ... # doctest: +SKIP
    """

    name = "judge"

    def __init__(
        self,
        template: str,
        *,
        url: str | Sequence[str] | None = None,
        model: str | None = None,
        engine: RolloutEngine | None = None,
        chat: bool | None = None,
        pattern: str | None = None,
        scale: Sequence[float] | None = None,
        max_new_tokens: int = 512,
        concurrency: int = 32,
        **connection: Any,
    ) -> None:
        if (url is None) == (engine is None):
            raise ValueError(f"reward 'judge': give either url=... and model=..., or engine=... (url={url!r})")
        if url is not None and model is None:
            raise ValueError(f"reward 'judge': url={url!r} needs model=<the server's name of the model>")
        if engine is not None and (model is not None or connection):
            raise ValueError(f"reward 'judge': {['model', *connection]} belong to url=..., not to engine=...")
        if concurrency < 1:
            raise ValueError(f"reward 'judge': concurrency={concurrency} must be at least 1")
        columns = template_columns(template)
        if "completion" not in columns:
            raise ValueError(f"reward 'judge': template={template!r} must have {{completion}} in it")
        self.columns = tuple(name for name in columns if name not in ("prompt", "completion"))
        self._template, self._pattern, self._scale = template, _pattern(pattern), _scale(scale)
        self._sampling = SamplingParams(temperature=0.0, max_new_tokens=max_new_tokens)
        self._engine, self._model = engine, model
        if engine is None:
            self._chat = chat is None or chat
            path = "/chat/completions" if self._chat else "/completions"
            self._servers = Servers.of("judge", url or "", path, connection)
            self.batch_size, self.workers = 1, concurrency
        else:
            has_template = getattr(engine.tokenizer, "chat_template", None) is not None
            self._chat = has_template if chat is None else chat
            self._one_at_a_time = threading.Lock()

    def __call__(self, prompts: list[str], completions: list[str], **columns: list[Any]) -> list[Any]:
        """The grades of these samples; an exception in place of one that could not be read."""
        rows = [{name: values[i] for name, values in columns.items()} for i in range(len(prompts))]
        texts = [
            self._template.format_map({**row, "prompt": prompt, "completion": completion})
            for row, prompt, completion in zip(rows, prompts, completions, strict=True)
        ]
        answers = [self._ask_server(text) for text in texts] if self._engine is None else self._ask_engine(texts)
        return [self._grade(answer) for answer in answers]

    def _ask_server(self, text: str) -> str:
        body: dict[str, Any] = {"model": self._model, "temperature": 0, "max_tokens": self._sampling.max_new_tokens}
        body |= {"messages": [{"role": "user", "content": text}]} if self._chat else {"prompt": text}
        answer = self._servers.post(body)
        try:
            choice = answer["choices"][0]
            content = choice["message"]["content"] if self._chat else choice["text"]
        except (LookupError, TypeError):
            content = None
        if not isinstance(content, str):
            raise ServerError(f"the answer has no text in its first choice: {str(answer)[:200]!r}")
        if len(content) > (1 << 16) + 64 * self._sampling.max_new_tokens:
            asked = self._sampling.max_new_tokens
            raise ServerError(f"the answer has {len(content)} characters, asked for at most {asked} tokens")
        return content

    def _ask_engine(self, texts: list[str]) -> list[str]:
        engine: Any = self._engine
        prompts = [self._chat_ids(text) for text in texts] if self._chat else engine.tokenize(texts)
        with self._one_at_a_time:
            completions = engine.generate(prompts, self._sampling)
        return [engine.tokenizer.decode(list(c.token_ids), skip_special_tokens=True) for (c,) in completions]

    def _chat_ids(self, text: str) -> list[int]:
        engine: Any = self._engine
        messages = [{"role": "user", "content": text}]
        return list(engine.tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"])

    def _grade(self, answer: str) -> float | ValueError:
        last = deque(self._pattern.finditer(answer), maxlen=1)  # no list: there may be millions
        found = last[0].group(last[0].re.groups) if last else None
        grade = decimal_number(found) if found else None
        if grade is None:
            return ValueError(f"no grade in the judge's answer {answer[-120:]!r}")
        if self._scale is None:
            return float(grade)
        low, high = self._scale
        if not low <= grade <= high:
            return ValueError(f"the grade {grade} is not on the scale from {low:g} to {high:g}")
        return (float(grade) - low) / (high - low)


def _pattern(pattern: str | None) -> re.Pattern[str]:
    if pattern is None:
        return NUMBER
    try:
        compiled = re.compile(pattern)
    except re.error as err:
        raise ValueError(f"reward 'judge': pattern={pattern!r} is no regular expression: {err}") from err
    if compiled.groups != 1:
        raise ValueError(f"reward 'judge': pattern={pattern!r} must have one group, it has {compiled.groups}")
    return compiled


def _scale(scale: Sequence[float] | None) -> tuple[float, float] | None:
    if scale is None:
        return None
    if len(scale) != 2 or not float(scale[0]) < float(scale[1]):
        raise ValueError(f"reward 'judge': scale={scale!r} must be the lowest and the highest grade, e.g. [1, 10]")
    return float(scale[0]), float(scale[1])
