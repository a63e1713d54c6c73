"""Losses of preference training: of whole answers, in pairs or alone.

A pair's loss reads log-probs of two sequences, which one micro-batch holds together. Its mean over
the pairs of the optimizer step is the loss, so how pairs are dealt to micro-batches and ranks
changes nothing. KTO's KL is an estimate over the whole step, and comes with the batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, relu

from rlsys.algo.losses.base import LossInput, token_statistics

if TYPE_CHECKING:
    from rlsys.config import PreferenceAlgorithm, PreferenceSection

MAX_EXPONENT = 80.0
"""TRL's bound of the exponent in an alpha-divergence, whose exp() float32 can hold."""
LEAST_ALPHA_DISTANCE = 1e-6
"""Distance of alpha to 1 below which the alpha-divergence is the reverse KL, its limit."""
LOG_HALF = math.log(0.5)


@dataclass(frozen=True, slots=True)
class _Answers:
    """B answers of a micro-batch."""

    logps_B: Tensor
    """float64, the policy's log-prob of each, with gradient: the sum over its tokens, or the mean
    where the loss reads means."""
    ratios_B: Tensor
    """float64, minus the reference's; the log-prob itself without reference."""
    lengths_B: Tensor
    """float64, tokens that are trained on, at least 1."""
    is_chosen_B: Tensor
    """bool"""
    weights_B: Tensor
    """float64, the share of each in the step's answers; 0 for a row that has no tokens."""
    kl: Tensor
    """float64, KTO's estimate; 0 for other losses."""


@dataclass(frozen=True, slots=True)
class _Pairs:
    """P pairs: [P] each, float64."""

    chosen: Tensor
    rejected: Tensor
    """Log ratios to the reference, or log-probs without one."""
    chosen_scores: Tensor
    rejected_scores: Tensor
    """The same through the derivative of the divergence."""
    chosen_lengths: Tensor
    rejected_lengths: Tensor
    """Tokens."""

    @property
    def margin(self) -> Tensor:
        """Difference of the scores."""
        return self.chosen_scores - self.rejected_scores

    @property
    def mean_margin(self) -> Tensor:
        """Difference of the scores of a token, on average."""
        chosen = self.chosen_scores / self.chosen_lengths
        return chosen - self.rejected_scores / self.rejected_lengths


def preference_loss(
    inputs: LossInput, config: PreferenceAlgorithm
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of a micro-batch, its share of the optimizer step's; and statistics."""
    section = config.preference
    answers = _answers(inputs, section)
    if section.is_paired:
        losses_U, weights_U = _paired_losses(answers, section)
    else:
        losses_U, weights_U = _unpaired_losses(answers, section), answers.weights_B
    loss = (weights_U * losses_U).sum()
    # The advantages of chosen answers are 1 / their tokens in the step: this is the mean.
    nll = -(inputs.advantages * inputs.logprobs.masked_fill(~inputs.mask, 0.0)).sum()
    if section.nll_weight:
        loss = loss + section.nll_weight * nll
    statistics = token_statistics(inputs, loss) | _answer_statistics(answers, section)
    if section.nll_weight:
        statistics["nll_loss"] = nll.detach().double()
    return loss.to(inputs.logprobs.dtype), statistics


def _answers(inputs: LossInput, section: PreferenceSection) -> _Answers:
    """The answers of a micro-batch; the filling at its end is none."""
    is_chosen_B = inputs.is_chosen
    if is_chosen_B is None:  # a micro-batch that repeats a row, and trains nothing
        is_chosen_B = torch.zeros(0, dtype=torch.bool, device=inputs.logprobs.device)
    number, segments = len(is_chosen_B), inputs.segments

    def sums(values_T: Tensor) -> Tensor:
        kept_T = values_T.masked_fill(~inputs.mask, 0).double()
        sums_B = kept_T.new_zeros(segments.num_sequences).index_add(0, segments.ids_T, kept_T)
        return sums_B[:number]

    counts_B = sums(torch.ones_like(inputs.weights))
    lengths_B = counts_B.clamp(min=1)
    logps_B = sums(inputs.logprobs)
    if section.reads_means:
        logps_B = logps_B / lengths_B
    reference_B = torch.zeros_like(lengths_B) if inputs.ref_logps is None else inputs.ref_logps
    return _Answers(
        logps_B=logps_B,
        ratios_B=logps_B - reference_B,
        lengths_B=lengths_B,
        is_chosen_B=is_chosen_B,
        weights_B=sums(inputs.weights) / lengths_B,
        kl=lengths_B.new_zeros(1) if inputs.kl is None else inputs.kl,
    )


def _answer_statistics(answers: _Answers, section: PreferenceSection) -> dict[str, Tensor]:
    """Rewards and log-probs, as sums over answers."""
    is_real_B = answers.weights_B > 0
    rewards_B = section.scale * answers.ratios_B.detach()
    statistics: dict[str, Tensor] = {}
    for name, is_own_B in (("chosen", answers.is_chosen_B), ("rejected", ~answers.is_chosen_B)):
        is_own_B = is_own_B & is_real_B
        statistics[f"num_{name}"] = is_own_B.sum(dtype=torch.float64)
        statistics[f"rewards/{name}"] = rewards_B[is_own_B].sum()
        statistics[f"logps/{name}"] = answers.logps_B.detach()[is_own_B].sum()
    if section.is_paired:
        wins_P = (rewards_B[0::2] > rewards_B[1::2]) & is_real_B[0::2]
        statistics["rewards/accuracies"] = wins_P.sum(dtype=torch.float64)
    if section.loss_type == "orpo":
        log_odds_P = _log_odds(_pairs(answers, section)).detach()[is_real_B[0::2]]
        statistics["log_odds_ratio"] = logsigmoid(log_odds_P).sum()
        statistics["log_odds_chosen"] = log_odds_P.sum()
    return statistics


# --- pairs ---------------------------------------------------------------------------------------


def _paired_losses(answers: _Answers, section: PreferenceSection) -> tuple[Tensor, Tensor]:
    """[P] losses of pairs, and the weight of each: that of its two answers."""
    weights_P = answers.weights_B[0::2] + answers.weights_B[1::2]
    return PAIR_LOSSES[section.loss_type](_pairs(answers, section), section), weights_P


def _pairs(answers: _Answers, section: PreferenceSection) -> _Pairs:
    chosen, rejected = answers.ratios_B[0::2], answers.ratios_B[1::2]
    return _Pairs(
        chosen,
        rejected,
        _scores(chosen, section),
        _scores(rejected, section),
        answers.lengths_B[0::2],
        answers.lengths_B[1::2],
    )


def _scores(ratios: Tensor, section: PreferenceSection) -> Tensor:
    """f'(t) of log ratios log t, up to a constant: f-DPO (arXiv:2309.16240), table 1."""
    kind, distance = section.f_divergence_type, section.f_alpha_divergence_coef - 1.0
    if kind == "forward_kl":
        return 1 - torch.exp(-ratios)
    if kind == "js_divergence":
        return math.log(2) + logsigmoid(ratios)
    if kind == "alpha_divergence" and abs(distance) >= LEAST_ALPHA_DISTANCE:
        return torch.expm1((distance * ratios).clamp(max=MAX_EXPONENT)) / distance
    return ratios


def _sigmoid(pairs: _Pairs, section: PreferenceSection) -> Tensor:
    """DPO (arXiv:2305.18290), equation 7."""
    return -logsigmoid(section.scale * pairs.margin)


def _sigmoid_norm(pairs: _Pairs, section: PreferenceSection) -> Tensor:
    """DPO of the mean log ratio of a token: Tulu 3 (arXiv:2411.15124), section 5."""
    return -logsigmoid(section.scale * pairs.mean_margin)


def _hinge(pairs: _Pairs, section: PreferenceSection) -> Tensor:
    """SLiC-HF's hinge (arXiv:2305.10425), of DPO's margin."""
    return relu(1 - section.scale * pairs.margin)


def _ipo(pairs: _Pairs, section: PreferenceSection) -> Tensor:
    """IPO (arXiv:2310.12036), equation 17, of the mean log ratio of a token, as in TRL."""
    return (pairs.mean_margin - 1 / (2 * section.scale)).square()


def _robust(pairs: _Pairs, section: PreferenceSection) -> Tensor:
    """Robust DPO (arXiv:2403.00409), equation 7: unbiased where labels are flipped."""
    noise, logits = section.label_smoothing, section.scale * pairs.margin
    clean, flipped = (1 - noise) * logsigmoid(logits), noise * logsigmoid(-logits)
    return (flipped - clean) / (1 - 2 * noise)


def _exo_pair(pairs: _Pairs, section: PreferenceSection) -> Tensor:
    """EXO (arXiv:2402.00856), equation 16 for two answers."""
    noise, logits = section.label_smoothing, section.scale * pairs.margin
    won = torch.sigmoid(logits) * (logsigmoid(logits) - math.log1p(-noise))
    return won + torch.sigmoid(-logits) * (logsigmoid(-logits) - math.log(noise))


def _nca_pair(pairs: _Pairs, section: PreferenceSection) -> Tensor:
    """NCA (arXiv:2402.05369), for two answers."""
    chosen, rejected = section.scale * pairs.chosen, section.scale * pairs.rejected
    return -logsigmoid(chosen) - 0.5 * logsigmoid(-chosen) - 0.5 * logsigmoid(-rejected)


def _bco_pair(pairs: _Pairs, section: PreferenceSection) -> Tensor:
    """BCO (arXiv:2404.04656) without its reference point, as in TRL."""
    return -logsigmoid(section.scale * pairs.chosen) - logsigmoid(-section.scale * pairs.rejected)


def _sppo_hard(pairs: _Pairs, section: PreferenceSection) -> Tensor:
    """SPPO (arXiv:2405.00675), equation 4.7 with winning probabilities of 1 and 0."""
    half = 0.5 / section.scale
    return (pairs.chosen - half).square() + (pairs.rejected + half).square()


def _apo_zero(pairs: _Pairs, section: PreferenceSection) -> Tensor:
    """APO-zero (arXiv:2408.06266), equation 7: for answers better than the model's own."""
    chosen, rejected = section.scale * pairs.chosen, section.scale * pairs.rejected
    return torch.sigmoid(-chosen) + torch.sigmoid(rejected)


def _apo_down(pairs: _Pairs, section: PreferenceSection) -> Tensor:
    """APO-down (arXiv:2408.06266), equation 8: for answers worse than the model's own."""
    chosen, rejected = section.scale * pairs.chosen, section.scale * pairs.rejected
    return torch.sigmoid(chosen) + torch.sigmoid(rejected - chosen)


def _cpo(pairs: _Pairs, section: PreferenceSection) -> Tensor:
    """CPO (arXiv:2401.08417), equation 3, with smoothed labels."""
    return _smoothed(section.scale * pairs.margin, section)


def _simpo(pairs: _Pairs, section: PreferenceSection) -> Tensor:
    """SimPO (arXiv:2405.14734), equation 6, of mean log-probs, with smoothed labels."""
    return _smoothed(section.scale * pairs.margin - section.simpo_gamma, section)


def _smoothed(logits: Tensor, section: PreferenceSection) -> Tensor:
    noise = section.label_smoothing
    return -(1 - noise) * logsigmoid(logits) - noise * logsigmoid(-logits)


def _orpo(pairs: _Pairs, section: PreferenceSection) -> Tensor:
    """ORPO's odds ratio (arXiv:2403.07691), equation 7."""
    return -section.scale * logsigmoid(_log_odds(pairs))


def _log_odds(pairs: _Pairs) -> Tensor:
    """Log of the ratio of the odds p / (1 - p) of two answers, from mean log-probs."""
    return pairs.margin - (_log1mexp(pairs.chosen) - _log1mexp(pairs.rejected))


def _log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(x)) of x < 0, to the last digit; a certain answer has finite odds."""
    x = x.clamp(max=-torch.finfo(x.dtype).eps)
    # Both branches are computed: each gets a value at which its gradient is finite.
    is_low = x < LOG_HALF
    low = torch.log1p(-torch.where(is_low, x, LOG_HALF).exp())
    return torch.where(is_low, low, (-torch.expm1(torch.where(is_low, LOG_HALF, x))).log())


PAIR_LOSSES: dict[str, Callable[[_Pairs, PreferenceSection], Tensor]] = {
    "sigmoid": _sigmoid,
    "sigmoid_norm": _sigmoid_norm,
    "hinge": _hinge,
    "ipo": _ipo,
    "robust": _robust,
    "exo_pair": _exo_pair,
    "nca_pair": _nca_pair,
    "bco_pair": _bco_pair,
    "sppo_hard": _sppo_hard,
    "apo_zero": _apo_zero,
    "apo_down": _apo_down,
    "cpo": _cpo,
    "simpo": _simpo,
    "orpo": _orpo,
}
"""preference.loss_type of pairs."""


# --- single answers ------------------------------------------------------------------------------


def _unpaired_losses(answers: _Answers, section: PreferenceSection) -> Tensor:
    """[B] KTO (arXiv:2402.01306), equation 7; APO-zero (arXiv:2408.06266) has no KL."""
    sign_B = torch.where(answers.is_chosen_B, 1.0, -1.0).to(answers.ratios_B)
    weights_B = torch.where(
        answers.is_chosen_B, section.desirable_weight, section.undesirable_weight
    )
    return weights_B * torch.sigmoid(-sign_B * section.scale * (answers.ratios_B - answers.kl))
