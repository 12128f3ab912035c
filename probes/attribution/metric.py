"""What is attributed: a number for each row of logits, differentiable, high where the model behaves as on clean.

logit difference   mean logit of the right answers − mean logit of the wrong ones, at their first differing token
log-probability    log p(answer), summed over the tokens of the answer (teacher forced)
KL                 −KL(p_noise ‖ p) in nats. From the clean run itself KL has no gradient (it is at its minimum)
any callable       f(logits [B, T, V], pair) -> [B]

Answers of several tokens: the tokens that the model is forced through are appended to both prompts, so each answer
is read where it is decided. A metric reads few positions, and only their logits are computed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from cache.errors import DataError, UsageError
from probes.attribution.pairs import TokenPair


@dataclass(frozen=True, kw_only=True)
class Target:
    """A pair made ready for a metric: its tokens (with what is teacher forced) and where it is read."""

    pair: TokenPair
    positions: tuple[int, ...]
    """Positions whose logits the metric sees, in order."""
    reference: Tensor | None = None
    """Log-probabilities [P, V] of the noise run (KL only)."""

    @property
    def length(self) -> int:
        return len(self.pair.clean)


class Metric(Protocol):
    """`target(pair)` says what to run and read, `__call__(logits [B, P, V], target)` gives [B]."""

    name: str
    needs_noise_logits: bool

    def target(self, pair: TokenPair) -> Target: ...

    def __call__(self, logits: Tensor, target: Target) -> Tensor: ...


def _forced(pair: TokenPair, tokens: tuple[int, ...]) -> TokenPair:
    return replace(pair, clean=pair.clean + tokens, noise=pair.noise + tokens)


def _common_prefix(sequences: tuple[tuple[int, ...], ...]) -> int:
    n = 0
    while all(len(s) > n for s in sequences) and len({s[n] for s in sequences}) == 1:
        n += 1
    return n


class LogitDifference:
    """Mean logit of the right answers minus that of the wrong ones."""

    name, needs_noise_logits = "logit_diff", False

    def target(self, pair: TokenPair) -> Target:
        if not pair.answers or not pair.wrong:
            raise UsageError(
                "a logit difference needs answers and wrong ones: give PromptPair(answers=, wrong=), or another metric"
            )
        shared = _common_prefix(pair.answers + pair.wrong)
        if any(len(a) <= shared for a in pair.answers + pair.wrong):
            raise DataError("one answer is the beginning of another: they cannot be told apart by a logit")
        if {a[shared] for a in pair.answers} & {w[shared] for w in pair.wrong}:
            raise DataError(
                "a right and a wrong answer share their first token while others do not: give one pair for each"
            )
        forced = _forced(pair, pair.answers[0][:shared])
        right = tuple(a[shared:] for a in pair.answers)
        forced = replace(forced, answers=right, wrong=tuple(w[shared:] for w in pair.wrong))
        return Target(pair=forced, positions=(len(forced.clean) - 1,))

    def __call__(self, logits: Tensor, target: Target) -> Tensor:
        right = [a[0] for a in target.pair.answers]
        wrong = [w[0] for w in target.pair.wrong]
        return logits[:, -1, right].mean(-1) - logits[:, -1, wrong].mean(-1)


class LogProb:
    """Log-probability in nats of the answer; of several one-token answers, of any of them."""

    name, needs_noise_logits = "log_prob", False

    def target(self, pair: TokenPair) -> Target:
        if not pair.answers:
            raise UsageError("log_prob needs an answer: give PromptPair(answers=), or another metric")
        longest = max(map(len, pair.answers))
        if len(pair.answers) > 1 and longest > 1:
            raise UsageError("log_prob takes several answers of one token each, or one answer of any length")
        forced = _forced(pair, pair.answers[0][:-1])
        last = len(forced.clean)
        return Target(pair=forced, positions=tuple(range(last - longest, last)))

    def __call__(self, logits: Tensor, target: Target) -> Tensor:
        logp = logits.float().log_softmax(-1)
        if len(target.pair.answers) > 1:
            return logp[:, -1, [a[0] for a in target.pair.answers]].logsumexp(-1)
        answer = target.pair.answers[0]
        return logp[:, torch.arange(len(answer)), list(answer)].sum(-1)


class KL:
    """−KL(p_noise ‖ p) at the last position: rises towards 0 as patching makes the run predict what noise does."""

    name, needs_noise_logits = "kl", True

    def target(self, pair: TokenPair) -> Target:
        return Target(pair=pair, positions=(len(pair.clean) - 1,))

    def __call__(self, logits: Tensor, target: Target) -> Tensor:
        if target.reference is None:
            raise UsageError(
                "KL needs the noise run's log-probabilities: attribute and patching fill them in"
            )
        reference = target.reference[-1].to(logits.device)
        logp = logits[:, -1].float().log_softmax(-1)
        return -(reference.exp() * (reference - logp)).sum(-1)


class UserMetric:
    """A callable f(logits [B, T, V], pair) -> [B] over all positions."""

    needs_noise_logits = False

    def __init__(self, fn: Callable[[Tensor, TokenPair], Tensor]) -> None:
        self.fn, self.name = fn, getattr(fn, "__name__", "callable")

    def target(self, pair: TokenPair) -> Target:
        return Target(pair=pair, positions=tuple(range(len(pair.clean))))

    def __call__(self, logits: Tensor, target: Target) -> Tensor:
        out = self.fn(logits, target.pair)
        if out.shape != logits.shape[:1]:
            raise UsageError(
                f"the metric returned shape {tuple(out.shape)}: return one number a row, [{logits.shape[0]}]"
            )
        return out


METRICS: dict[str, type] = {"logit_diff": LogitDifference, "log_prob": LogProb, "kl": KL}


def as_metric(metric: str | Metric | Callable[[Tensor, TokenPair], Tensor]) -> Metric:
    """A metric by name, an object with `target`, or a plain callable."""
    if isinstance(metric, str):
        if metric not in METRICS:
            raise UsageError(f"no metric {metric!r}: choose {', '.join(METRICS)}, or give a callable")
        return METRICS[metric]()
    return metric if hasattr(metric, "target") else UserMetric(metric)  # type: ignore[return-value,arg-type]
