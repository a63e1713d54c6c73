"""Answers to batches of preference training, and the metrics of held-out ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from rlsys.algo.batching import build_sample_batch
from rlsys.algo.losses import LossInput, compute_loss
from rlsys.algo.segments import Segments
from rlsys.algo.update_metrics import MetricSums
from rlsys.types import Preference, Sample, TrainBatch

if TYPE_CHECKING:
    from torch import Tensor

    from rlsys.config import PreferenceAlgorithm


def build_preference_batch(rows: Sequence[Preference], *, at_least: int = 1) -> TrainBatch:
    """Right-padded rows, one for each answer; those of a pair are neighbours, the chosen one first.

    With fewer `rows` than `at_least`, such as data-parallel ranks, answers without tokens to train
    on follow.
    """
    answers = [answer for row in rows for answer in row.answers]
    together = len(rows[0].answers)
    batch = build_sample_batch(answers, at_least=at_least * together)
    is_chosen = torch.zeros(len(batch.lengths), dtype=torch.bool)
    is_chosen[: len(answers)] = torch.tensor([flag for row in rows for flag in row.is_chosen])
    batch.is_chosen = is_chosen
    chosen_NS = batch.completion_mask & is_chosen[:, None]
    batch.advantages = chosen_NS / chosen_NS.sum().clamp(min=1)
    return batch


def answer_logps(logprobs_NS: Tensor) -> Tensor:
    """[N] float64 log-probs of whole answers, from those of their tokens, which are 0 elsewhere."""
    return logprobs_NS.double().sum(dim=1)


def mismatched(rows: Sequence[Preference], max_length: int) -> list[Sample]:
    """Each prompt of some rows with the answer to another one: KTO (arXiv:2402.01306), 4.1.

    The log ratios of such answers estimate KL(policy || reference). The answer is that of the row
    before, or further before if rows have the same prompt; each is used once. What is longer than
    `max_length` is cut off on the right.
    """
    own = [row.answers[0] for row in rows]
    prompts = [sample.token_ids[: _start(sample)] for sample in own]
    shift = _shift([prompt.tobytes() for prompt in prompts])
    made = []
    for sample, prompt, other in zip(own, prompts, own[-shift:] + own[:-shift], strict=True):
        start = _start(other)
        ids = np.concatenate([prompt, other.token_ids[start:]])
        mask = np.concatenate([np.zeros(len(prompt), np.bool_), other.target_mask[start:]])
        made.append(Sample(sample.sample_id, ids[:max_length], mask[:max_length]))
    return made


def _shift(prompts: Sequence[bytes]) -> int:
    """The fewest rows to go back so that every prompt meets another one; 1 if none are enough."""
    number = len(prompts)
    for shift in range(1, number):
        if all(prompts[n] != prompts[n - shift] for n in range(number)):
            return shift
    return 1


def _start(sample: Sample) -> int:
    """Where the answer begins."""
    return int(sample.target_mask.argmax())


def estimated_kl(ratios: Sequence[Tensor], number: int) -> Tensor:
    """[1] KTO's estimate from log ratios of `number` mismatched answers, in parts; at least 0."""
    return (torch.cat(list(ratios)).sum() / number).clamp(min=0).reshape(1)


@dataclass(frozen=True, slots=True)
class HeldOut:
    """Some held-out answers with what the models say of them."""

    batch: TrainBatch
    logprobs_NS: Tensor
    """The policy's."""


def held_out_metrics(parts: Sequence[HeldOut], algorithm: PreferenceAlgorithm) -> dict[str, float]:
    """Loss, rewards and accuracy of held-out answers, over all parts together."""
    batches = [part.batch for part in parts]
    number = sum(int(batch.completion_mask.any(dim=1).sum()) for batch in batches)
    sums, chosen = MetricSums(), sum(_num_chosen_tokens(batch) for batch in batches)
    for batch, part in zip(batches, parts, strict=True):
        share = _num_chosen_tokens(batch) / max(chosen, 1)
        own = replace(batch, advantages=batch.advantages * share)
        _, statistics = compute_loss(as_loss_input(own, part.logprobs_NS, number), algorithm)
        sums.add(statistics)
    kl = batches[0].kl  # of all parts together
    return sums.means() | ({} if kl is None else {"kl": kl.item()})


def as_loss_input(batch: TrainBatch, logprobs_NS: Tensor, num_answers: int) -> LossInput:
    """A whole batch as one micro-batch of a step with `num_answers`, given the policy's log-probs.

    Every token stands at its own place, and not at the one that predicts it.
    """
    size, width = batch.input_ids.shape
    return LossInput(
        logprobs=logprobs_NS.flatten(),
        old_logprobs=logprobs_NS.detach().flatten(),
        ref_logprobs=None,
        rollout_logprobs=torch.zeros(size * width),
        advantages=batch.advantages.flatten(),
        weights=(batch.completion_mask / num_answers).flatten(),
        mask=batch.completion_mask.flatten(),
        segments=Segments(torch.arange(size).repeat_interleave(width), size),
        is_chosen=batch.is_chosen,
        ref_logps=batch.ref_logps,
        kl=batch.kl,
    )


def _num_chosen_tokens(batch: TrainBatch) -> int:
    assert batch.is_chosen is not None
    return int((batch.completion_mask & batch.is_chosen[:, None]).sum())
