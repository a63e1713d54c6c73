"""Statistics of evaluations: pass@k, votes, standard errors, and differences beyond noise."""

from __future__ import annotations

import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

MAX_EXPONENT = 700.0
"""Losses from here on have a perplexity that no float holds."""
LEAST_PROMPTS = 2
"""Fewest prompts whose scatter says something about the error of their mean."""


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Probability that one of k samples is correct, estimated without bias from n >= k samples.

    1 - C(n - c, k) / C(n, k): the share of the subsets of k samples that hold a correct one (Chen
    et al. 2021, arXiv:2107.03374, equation 1).
    """
    assert 0 <= num_correct <= num_samples, (num_correct, num_samples)
    assert 1 <= k <= num_samples, (k, num_samples)
    return 1.0 - math.comb(num_samples - num_correct, k) / math.comb(num_samples, k)


def prediction_metrics(batches: Iterable[tuple[Tensor, Tensor, Tensor]]) -> dict[str, float]:
    """Loss, perplexity and accuracy of held-out rows, over all tokens that are trained on.

    Args:
        batches: log-probs [N, S] in nats, 1 where no token is likelier [N, S], and the mask [N, S]
            of the tokens that count.
    """
    total, right, number = 0.0, 0, 0
    for logprobs_NS, is_likeliest_NS, mask_NS in batches:
        total += logprobs_NS[mask_NS].double().sum().item()
        right += int(is_likeliest_NS[mask_NS].sum())
        number += int(mask_NS.sum())
    loss = -total / number
    perplexity = math.exp(loss) if loss < MAX_EXPONENT else math.inf
    return {
        "loss": loss,
        "perplexity": perplexity,
        "mean_token_accuracy": right / number,
        "num_loss_tokens": float(number),
    }


def majority_vote(answers: Sequence[str | None], correct: Sequence[float]) -> float | None:
    """How correct the most frequent answer of a prompt is, 0 to 1 (self-consistency, Wang et al.
    2022, arXiv:2203.11171).

    Args:
        answers: [n] of the samples; None does not vote.
        correct: [n] 1 for a correct sample, else 0.

    Returns:
        The share of correct samples among those with that answer, which is 0 or 1 unless equal
        texts were judged differently; the mean over answers with equally many votes. None if
        nobody votes.
    """
    votes = Counter(answer for answer in answers if answer is not None)
    if not votes:
        return None
    most = max(votes.values())
    by_answer: defaultdict[str | None, list[float]] = defaultdict(list)
    for answer, value in zip(answers, correct, strict=True):
        by_answer[answer].append(value)
    first = [answer for answer, count in votes.items() if count == most]
    return statistics.fmean(statistics.fmean(by_answer[answer]) for answer in first)


# --- means and their errors ----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over the samples of many prompts."""

    mean: float
    """NaN without values."""
    stderr: float
    """Standard error of the mean; NaN with fewer than two prompts."""
    num_prompts: int
    """Prompts with a value."""

    def __str__(self) -> str:
        error = "" if math.isnan(self.stderr) else f" ± {self.stderr:.3f}"
        return "-" if math.isnan(self.mean) else f"{self.mean:.3f}{error}"


def estimate(values_of_prompts: Sequence[Sequence[float]]) -> Estimate:
    """The mean over all samples, and its standard error clustered by prompt.

    Samples of one prompt resemble each other, so only prompts count as independent draws (Miller
    2024, arXiv:2411.00640, section 2.2): with deviations d_pi of the samples i of prompt p from the
    mean, stderr^2 = P / (P - 1) * sum_p (sum_i d_pi)^2 / N^2 for N samples of P prompts. With
    equally many samples a prompt it is the standard deviation of the P means over sqrt(P). NaN
    values are left out.
    """
    known = [[v for v in values if not math.isnan(v)] for values in values_of_prompts]
    known = [values for values in known if values]
    samples = [value for values in known for value in values]
    if not samples:
        return Estimate(math.nan, math.nan, 0)
    mean, prompts = statistics.fmean(samples), len(known)
    if prompts < LEAST_PROMPTS:
        return Estimate(mean, math.nan, prompts)
    clusters = sum(math.fsum(v - mean for v in values) ** 2 for values in known)
    variance = prompts / (prompts - 1) * clusters / len(samples) ** 2
    return Estimate(mean, math.sqrt(variance), prompts)


# --- two evaluations of the same prompts ---------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Difference:
    """b - a on the same prompts, by a paired t-test."""

    mean: float
    """Mean over prompts of (mean of b's samples) - (mean of a's samples)."""
    stderr: float
    p_value: float
    """Two-sided: probability of a mean at least this far from 0, if the differences of the prompts
    were normal draws around 0. NaN with fewer than two prompts."""
    margin: float
    """Half of the confidence interval: mean ± margin."""
    num_prompts: int


def paired_difference(
    a: Sequence[float], b: Sequence[float], *, confidence: float = 0.95
) -> Difference:
    """Compare two values for each prompt: t = mean / stderr with P - 1 degrees of freedom.

    Pairing takes out how hard each prompt is, which both have in common. Prompts where one value is
    NaN are left out.
    """
    pairs = zip(a, b, strict=True)
    deltas = [y - x for x, y in pairs if not (math.isnan(x) or math.isnan(y))]
    count = len(deltas)
    if count < LEAST_PROMPTS:
        mean = deltas[0] if deltas else math.nan
        return Difference(mean, math.nan, math.nan, math.nan, count)
    mean = statistics.fmean(deltas)
    stderr = statistics.stdev(deltas) / math.sqrt(count)
    if stderr == 0.0:  # all prompts differ by the same
        return Difference(mean, 0.0, 1.0 if mean == 0.0 else 0.0, 0.0, count)
    p_value = student_t_tails(mean / stderr, count - 1)
    return Difference(mean, stderr, p_value, _t_quantile(confidence, count - 1) * stderr, count)


def student_t_tails(t: float, degrees: int) -> float:
    """P(|T| >= |t|) for Student's t distribution: I_x(degrees / 2, 1 / 2), x = degrees /
    (degrees + t^2)."""
    return _incomplete_beta(degrees / 2, 0.5, degrees / (degrees + t * t))


@cache
def _t_quantile(confidence: float, degrees: int) -> float:
    """The t with P(|T| <= t) = confidence, by bisection."""
    low, high = 0.0, 1.0
    while student_t_tails(high, degrees) > 1 - confidence:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        if student_t_tails(middle, degrees) > 1 - confidence:
            low = middle
        else:
            high = middle
    return high


def _incomplete_beta(a: float, b: float, x: float) -> float:
    """Regularized incomplete beta function I_x(a, b), by its continued fraction (Abramowitz and
    Stegun 26.5.8), which converges fast for x < (a + 1) / (a + b + 2)."""
    if x <= 0.0 or x >= 1.0:
        return min(max(x, 0.0), 1.0)
    if x > (a + 1) / (a + b + 2):
        return 1.0 - _incomplete_beta(b, a, 1.0 - x)
    log_front = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b)
    log_front += a * math.log(x) + b * math.log1p(-x)
    # From the innermost term outwards; the terms shrink far before this many.
    fraction = 1.0
    for i in range(1000, 0, -1):
        m = i // 2
        if i % 2:
            term = -(a + m) * (a + b + m) / ((a + 2 * m) * (a + 2 * m + 1))
        else:
            term = m * (b - m) / ((a + 2 * m - 1) * (a + 2 * m))
        fraction = 1.0 + term * x / fraction
    return math.exp(log_front) / (a * fraction)
