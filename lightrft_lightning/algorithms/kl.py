"""KL estimators: how far the policy is from a reference, from the log-probabilities of sampled tokens alone."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from lightrft_lightning._registry import Registry

KLEstimator = Callable[[Tensor], Tensor]

KL_ESTIMATORS: Registry[KLEstimator] = Registry("KL estimator")
"""Name → function of ``log pi - log pi_ref`` per token, for tokens sampled from pi."""

_LARGE = 20.0


@KL_ESTIMATORS.register("k1")
def k1(log_ratio: Tensor) -> Tensor:
    """``log(pi / pi_ref)``: unbiased, high variance, negative for single tokens (http://joschu.net/blog/kl-approx.html)."""
    return log_ratio


@KL_ESTIMATORS.register("k2")
def k2(log_ratio: Tensor) -> Tensor:
    """``k1**2 / 2``: biased, low variance; its gradient is the unbiased one of the KL."""
    return 0.5 * log_ratio.square()


@KL_ESTIMATORS.register("k3")
def k3(log_ratio: Tensor) -> Tensor:
    """``exp(-k1) - 1 + k1``: unbiased, never negative, the estimator of GRPO (arXiv 2402.03300).

    A token that the reference finds e^20 times as likely is continued by the tangent, so that neither the value nor
    the gradient overflows and the gradient keeps its sign.
    """
    x = -log_ratio
    bounded = x.clamp(max=_LARGE)
    # Constants for autograd: above the bound the slope is exp(20) - 1, below it the second term vanishes.
    return bounded.expm1() + bounded.detach().exp() * (x - bounded) - x


def adapted_kl_coef(coef: float, kl: float, target: float, samples: int, horizon: int) -> float:
    """The weight of the KL penalty for the next iteration, which moves the KL towards `target` (arXiv 1909.08593, 2.2).

    Args:
        coef: the weight so far.
        kl: measured, in nats a token.
        target: the same, wanted.
        samples: completions of this iteration.
        horizon: completions in which the weight changes by at most 20 %.
    """
    error = min(max(kl / target - 1, -0.2), 0.2)
    return coef * (1 + error * samples / horizon)


def kl_penalty(name: str, log_probs: Tensor, ref_log_probs: Tensor, *, unbiased_gradient: bool = False) -> Tensor:
    """Estimated KL(pi || pi_ref) at each token.

    Args:
        name: ``k1``, ``k2``, ``k3`` or one registered in `KL_ESTIMATORS`.
        log_probs: of the sampled tokens under the policy, any shape.
        ref_log_probs: the same under the reference.
        unbiased_gradient: the value is that of the estimator, the gradient that of `k2`. As a loss on tokens of the
            policy itself only `k2` has the gradient of the KL on average; that of `k1` is 0, that of `k3` is that of
            KL(pi_ref || pi) (arXiv 2512.21852, 2506.09477).

    Returns:
        In the shape of `log_probs`, in nats, differentiable in `log_probs`.

    Raises:
        ValueError: no such estimator, or the shapes differ.
    """
    if log_probs.shape != ref_log_probs.shape:
        raise ValueError(f"log_probs {tuple(log_probs.shape)} and ref_log_probs {tuple(ref_log_probs.shape)} differ")
    log_ratio = log_probs - ref_log_probs
    value = KL_ESTIMATORS[name](log_ratio)
    if not unbiased_gradient:
        return value
    slope = k2(log_ratio)
    return value.detach() + slope - slope.detach()
