"""The proof at the start of a fit: training computes what the model says.

What a model computes for a text in a packed row, under a fast kernel and in low precision, is compared with the
plainest computation there is: one text at a time, ``model(input_ids=...)`` and nothing else,
``attn_implementation="eager"``, full precision, no dropout. See docs/proof.md.
"""

from __future__ import annotations

import inspect
import logging
import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from lightrft_lightning.experience.packing import pack
from lightrft_lightning.experience.trajectory import Completion, Prompt, Trajectory
from lightrft_lightning.models.attention import (
    FLEX,
    dense_kernel,
    known_problem,
    plain_kernel,
    prefers_flex,
    use_kernel,
)
from lightrft_lightning.models.layers import evaluating, uncompiled
from lightrft_lightning.models.logprobs import completion_logprobs, pretrained_part
from lightrft_lightning.models.long_texts import named_length, texts_beyond
from lightrft_lightning.models.outputs import plain_outputs
from lightrft_lightning.models.scalar import completion_hidden, has_scalar_head, plain_hidden

if TYPE_CHECKING:
    from lightrft_lightning.strategies.base import StrategyBase

log = logging.getLogger(__name__)

TOLERANCES = {torch.float32: 1e-3, torch.float16: 0.02, torch.bfloat16: 0.1}
"""How far apart two computations of the same numbers may be, by the dtype of the passes: nats of a log-probability, or
the share of a hidden state's length."""

_LONGEST = {"cpu": 256}
"""Most tokens of a text of a proof, by the kind of device; elsewhere 1024."""
_PROMPTS = 8
"""Prompts of the run whose tokens are taken."""
_FEW = 4
"""Tokens of a short completion, and the fewest that a median is taken of."""


def apart(found: Tensor, expected: Tensor, lengths: Sequence[int]) -> float:
    """How far two computations are apart, in a measure that single tokens cannot raise.

    In low precision, and where a mixture of experts decides between two that are equally good, single tokens may be far
    off. So this is the largest of the mean over all tokens, the medians over each text, and the medians over the tokens
    at similar places of their texts, which show what concerns the late ones only.

    Args:
        found: ``[N]`` log-probabilities of all completion tokens, or ``[N, H]`` hidden states.
        expected: the same.
        lengths: of the texts that the N tokens are, in order.
    """
    if found.dim() == 2:
        off = (found - expected).norm(dim=1) / expected.norm(dim=1).clamp(min=1e-30)
    else:
        off = torch.where(found == expected, 0.0, (found - expected).abs())  # both may be minus infinity
    off = off.nan_to_num(math.inf, posinf=math.inf)
    if not len(off):
        return 0.0
    places = torch.cat([torch.arange(1, length + 1) for length in lengths]).log2().long()
    parts = [*off.split(list(lengths)), *(off[places == place] for place in places.unique())]
    return max([float(off.mean()), *(float(part.median()) for part in parts if len(part) >= _FEW)])


def made_up_texts(
    prompts: Sequence[Sequence[int]], vocabulary: int, longest: int, new: int, pad: int | None = None
) -> list[Trajectory]:
    """Texts of the tokens of a run, the same at every call: two prompts with short and long completions.

    Args:
        prompts: token ids of some of the run's prompts.
        vocabulary: size of the model's.
        longest: most tokens of a prompt with its completion.
        new: most tokens of a completion.
        pad: id of the padding token, which is left out: models may hide it.
    """
    rng = random.Random(0)
    pool = _tokens(prompts, vocabulary, pad)
    lengths = [min(len(ids), max(1, longest // 2)) for ids in prompts if len(ids)] or [max(1, longest // 2)]
    texts = []
    for group, length in enumerate((max(lengths), min(lengths))):
        prompt = Prompt(tuple(rng.choices(pool, k=length)), "")
        full = max(1, min(new, longest - length))
        for count in (min(_FEW, full), full, *([max(1, full // 2)] if group == 0 else [])):
            ids = tuple(rng.choices(pool, k=count))
            texts.append(Trajectory(prompt, Completion(ids, (0.0,) * count, "length"), group))
    return texts


def _tokens(prompts: Sequence[Sequence[int]], vocabulary: int, pad: int | None) -> list[int]:
    known = [token for token in chain(*prompts) if token != pad and token < vocabulary]
    others = [token for token in range(vocabulary) if token != pad] or [0]
    return known if len(set(known)) >= 16 else known + random.Random(0).choices(others, k=64)


class Exact(NamedTuple):
    """What is right.

    Attributes:
        values: ``[N]`` log-probabilities of all completion tokens, or ``[N, H]`` hidden states.
        size: of the logits that they come from: in 16 bits large ones have few places behind the point.
    """

    values: Tensor
    size: float


@dataclass
class Proof:
    """What is compared, and by whom.

    Attributes:
        strategy: holds the models; all ranks go through a proof together.
        precision: makes the context of training's passes.
        texts: the same on all ranks, see `made_up_texts`.
        share_prompts: as training packs.
        token_budget: as training packs.
        temperature: in training, of tokens at these places of their completions.
        measure: False goes by what is known of a model alone.
    """

    strategy: StrategyBase
    precision: Callable[[], AbstractContextManager[Any]]
    texts: Sequence[Trajectory]
    share_prompts: bool
    token_budget: int
    temperature: Callable[[Tensor], float | Tensor] = lambda place: 1.0
    measure: bool = True

    def settle(self, model: Any, what: str, named: str | None = None, prefer: str | None = None) -> str:
        """Give `model` a kernel under which it computes the right thing; returns which.

        Args:
            model: a causal language model, or one with a scalar head; prepared by the strategy.
            what: the model is, for messages.
            named: the kernel that the user asked for: this one or an error. None: the first that is right.
            prefer: the kernel to try first.

        Raises:
            RuntimeError: none is right, on any rank. The message says what would be, if anything.
        """
        inner, device = pretrained_part(model), self.strategy.root_device
        own, exact = inner.config._attn_implementation, None
        problems: list[str] = []
        for kernel in [named] if named else candidates(inner, device, self.share_prompts, prefer):
            problem = known_problem(inner, kernel, device)
            if problem is None and self.measure:
                exact = self.exactly(model) if exact is None else exact
                problem = self.mistake(model, exact, kernel)
            if problem is None:
                chose(inner, kernel, problems, what)
                return kernel
            problems.append(f"{kernel!r}: {problem}")
        advice = "set attn_implementation='auto'" if exact is None else self.advice(model, exact, kernel)
        use_kernel(inner, own)
        raise RuntimeError(
            f"attn_implementation={'; '.join(problems)} ({what}). What to do: {advice}. "
            "With check_numerics=False it trains regardless"
        )

    def mistake(
        self, model: Any, exact: Exact, kernel: str, share: bool | None = None, alone: bool = False
    ) -> str | None:
        """What is wrong with what training computes under `kernel`, on any rank; None if nothing is.

        Args:
            model: as in `settle`.
            exact: what is right.
            kernel: to compute with.
            share: prompts; None: as training does.
            alone: one text in a pass.
        """
        error, found = "", None
        try:
            found = self.as_trained(model, kernel, self.share_prompts if share is None else share, alone)
        except torch.OutOfMemoryError:
            raise
        except Exception as err:  # of the compiler, or of a model that does not take such rows
            error = f"it does not run here ({type(err).__name__}: {err})"
        dtype = least_exact(model, self.strategy)
        allowed = max(TOLERANCES[dtype], 2 * torch.finfo(dtype).eps * exact.size)
        most = self.most_apart(found, exact.values)
        # Beyond that it may be the precision alone, which is as training is told to have it.
        if most <= allowed or (dtype != torch.float32 and self.most_apart(found, self.rounded(model)) <= allowed):
            return None
        what, unit = ("log-probabilities", "nats") if exact.values.dim() == 1 else ("hidden states", "of their length")
        return error or f"its {what} are off by {most:.2g} {unit}, allowed are {allowed:g}"

    def advice(self, model: Any, exact: Exact, kernel: str) -> str:
        """What to set in place of `kernel`. Tries it."""
        inner, device = pretrained_part(model), self.strategy.root_device
        others = [other for other in ("sdpa", "eager") if other != kernel and not known_problem(inner, other, device)]
        for other in others:
            if self.mistake(model, exact, other) is None:
                return f"set attn_implementation={other!r}"
        for other in [kernel, *others] if self.share_prompts else ():
            if self.mistake(model, exact, other, share=False) is None:
                return "set share_prompts=False" + (f" and attn_implementation={other!r}" if other != kernel else "")
        if self.mistake(model, exact, plain_kernel(inner), share=False, alone=True) is None:
            return "nothing, as what the model says of a text depends on the other texts of a pass; take shorter ones"
        return "nothing, as the model says something else than by itself also of a text alone"

    def most_apart(self, found: Tensor | None, expected: Tensor) -> float:
        """As `apart`, the most of any rank."""
        here = math.inf if found is None else apart(found, expected, [len(t.completion.token_ids) for t in self.texts])
        return float(self.strategy.all_reduce(here, op="max"))

    @torch.no_grad()
    def as_trained(self, model: Any, kernel: str, share: bool, alone: bool) -> Tensor:
        """``[N]`` or ``[N, H]`` of all completion tokens as training computes them."""
        use_kernel(pretrained_part(model), kernel)
        sets = [[text] for text in self.texts] if alone else [list(self.texts)]
        with untouched(model), self.precision():
            return torch.cat([self._in_rows(model, texts, share) for texts in sets])

    def _in_rows(self, model: Any, texts: list[Trajectory], share: bool) -> Tensor:
        rows: list[list[Tensor]] = [[] for _ in texts]
        for batch in pack(texts, self.token_budget, share_prompts=share):
            batch = batch.to(self.strategy.root_device)
            if has_scalar_head(model):
                scored = completion_hidden(model, batch)
            else:
                scored = completion_logprobs(model, batch, self.temperature(batch.position)).logprobs
            for row, value in zip(batch.trajectory.tolist(), scored.float().cpu(), strict=True):
                rows[row].append(value)
        return torch.stack([value for row in rows for value in row])

    def rounded(self, model: Any) -> Tensor:
        """What the plainest computation gives in the precision of training."""
        return self.exactly(model, self.precision).values

    @torch.no_grad()
    def exactly(self, model: Any, precision: Callable[[], AbstractContextManager[Any]] | None = None) -> Exact:
        """The plainest computation.

        Args:
            model: as in `settle`.
            precision: makes a context to compute in; None: that of the weights.
        """
        inner, device = pretrained_part(model), self.strategy.root_device
        before, values, size = inner.config._attn_implementation, [], 0.0
        short = _LONGEST.get(device.type, 1024)
        context = torch.autocast(device.type, enabled=False) if precision is None else precision()
        try:
            with untouched(model), uncompiled(model), context:
                for text in self.texts:
                    ids = torch.tensor([text.prompt.token_ids + text.completion.token_ids], device=device)
                    # The matrix of a long text's scores would take gigabytes under the plain kernel.
                    use_kernel(inner, plain_kernel(inner) if ids.shape[1] <= short else dense_kernel(inner))
                    value, its_size = self._plainly(model, ids, len(text.prompt.token_ids))
                    values.append(value.cpu())
                    size = max(size, its_size)
        finally:
            use_kernel(inner, before)
        return Exact(torch.cat(values), size)

    def _plainly(self, model: Any, ids: Tensor, prompt: int) -> tuple[Tensor, float]:
        """Of one text, and the size of its logits."""
        if has_scalar_head(model):
            return plain_hidden(model, ids)[prompt - 1 : -1].float(), 0.0
        target = ids[0, prompt:]
        parameters = inspect.signature(pretrained_part(model).forward).parameters
        kept = {"logits_to_keep": len(target) + 1} if "logits_to_keep" in parameters else {}
        with plain_outputs(pretrained_part(model)):
            logits = model(input_ids=ids, use_cache=False, **kept).logits[0, -len(target) - 1 : -1]
        temperature = self.temperature(torch.arange(len(target), device=ids.device))
        temperature = torch.as_tensor(temperature, device=ids.device).expand(len(target))
        values, size = [], 0.0
        for part in torch.arange(len(target), device=ids.device).split(128):  # a vocabulary may be large
            of_part = logits[part].float() / temperature[part, None]
            total = of_part.logsumexp(-1)
            values.append(of_part.gather(-1, target[part, None])[:, 0] - total)
            size = max(size, float(total.abs().max()))
        return torch.cat(values), size


def proof_of_run(
    module: Any,
    model: Any,
    prompts: Sequence[Sequence[int]],
    longest: int,
    new: int,
    temperature: Callable[[Tensor], float | Tensor] = lambda place: 1.0,
) -> Proof:
    """The proof of a run, with texts of the tokens of its first prompts. All ranks together.

    Args:
        module: the `LightningModule`.
        model: the one to prove, as Transformers knows it.
        prompts: token ids of the run's; may be empty.
        longest: tokens of a prompt with its completion, at most.
        new: tokens of a completion, at most.
        temperature: as in `Proof`.
    """
    strategy, config = module.strategy, model.config.get_text_config()
    first: list[Sequence[int]] = strategy.gather_objects([tuple(ids) for ids in prompts[:_PROMPTS]])[0]
    most, short = min(longest, module.token_budget), _LONGEST.get(strategy.root_device.type, 1024)
    pad = getattr(config, "pad_token_id", None)
    texts = made_up_texts(first, config.vocab_size, min(most, short), new, pad)
    if (length := named_length(config, short, most)) is not None:
        texts += texts_beyond(length, most, _tokens(first, config.vocab_size, pad), group=2)
    precision = module.trainer.precision_plugin.train_step_context
    return Proof(
        strategy, precision, texts, module.share_prompts, module.token_budget, temperature, module.check_numerics
    )


def least_exact(model: Any, strategy: StrategyBase) -> torch.dtype:
    """The least exact dtype in which training computes `model`."""
    inner = pretrained_part(model)
    dtypes: list[torch.dtype | None] = [strategy.compute_dtype, inner.dtype]
    if strategy.root_device.type == "cuda":
        if getattr(inner, "is_quantized", False):
            dtypes.append(torch.bfloat16)
        if torch.get_float32_matmul_precision() != "highest":
            dtypes.append(torch.float16)  # TF32 has as many digits
    return least_exact_of(*dtypes)


def least_exact_of(*dtypes: torch.dtype | None) -> torch.dtype:
    """That with the fewest digits; float32 if nothing has fewer."""
    return max((d for d in dtypes if d in TOLERANCES), key=lambda d: TOLERANCES[d], default=torch.float32)


def some_of(trajectories: Sequence[Trajectory], device: torch.device) -> list[Trajectory]:
    """Shortest, longest and others of different lengths, as many as are scored in moments."""
    by_length = sorted(trajectories, key=lambda t: len(t.prompt.token_ids) + len(t.completion.token_ids))
    room = 2 * _LONGEST.get(device.type, 1024)
    found: list[Trajectory] = []
    for i in spread(len(by_length)):
        t = by_length[i]
        tokens = len(t.prompt.token_ids) + len(t.completion.token_ids)
        if found and tokens > room:
            break
        room -= tokens
        found.append(t)
    return found


def spread(count: int) -> list[int]:
    """The numbers below `count`: the last, the first, and then always what is in the middle of a gap."""
    order, seen = [count - 1, 0], {count - 1, 0}
    steps = 2
    while len(seen) < count:
        for k in range(1, steps):
            i = k * count // steps
            if i not in seen:
                order.append(i)
                seen.add(i)
        steps *= 2
    return order[:count] if count > 1 else list(range(count))


def chose(model: Any, kernel: str, problems: Sequence[str], what: str) -> None:
    """Switch `model` to `kernel`, and say why it is not the first choice."""
    use_kernel(model, kernel)
    if problems:
        log.warning("attn_implementation='auto' takes %r, not %s (%s)", kernel, "; not ".join(problems), what)


def candidates(model: Any, device: torch.device, share_prompts: bool, prefer: str | None = None) -> list[str]:
    """The kernels that ``attn_implementation="auto"`` means, the fastest first."""
    own = model.config._attn_implementation
    flex = share_prompts and own == "sdpa" and prefers_flex(model, device)
    return list(dict.fromkeys([*([prefer] if prefer else []), *([FLEX] if flex else []), own, "eager"]))


@contextmanager
def untouched(model: Any) -> Iterator[None]:
    """Inside, `model` is in evaluation mode and draws from random generators of its own."""
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices), evaluating(model):
        yield
