"""Pairs and labelled answers for tiny policies, and the losses as their papers write them."""

from __future__ import annotations

import math

import numpy as np
import torch
from policy_cases import VOCAB_SIZE
from torch.nn.functional import logsigmoid

from rlsys.algo.preferences import build_preference_batch
from rlsys.config import PreferenceConfig
from rlsys.types import Preference, Sample

NUM_ROWS = 6
KL = 0.3


def make_rows(*, is_paired, seed=0):
    """Six prompts of 2 to 9 tokens with answers of 1 to 20; a piece of one is not trained on."""
    rng = np.random.default_rng(seed)

    def answer(number, prompt, length):
        ids = np.concatenate([prompt, rng.integers(2, VOCAB_SIZE, length)]).astype(np.int32)
        mask = np.arange(len(ids)) >= len(prompt)
        if length > 10:
            mask[len(prompt) + 3 : len(prompt) + 6] = False
        return Sample(str(number), ids, mask)

    rows = []
    lengths = ((20, 3), (1, 7), (12, 12), (5, 16), (9, 2), (4, 18))
    for number, (chosen, rejected) in enumerate(lengths):
        prompt = rng.integers(2, VOCAB_SIZE, 2 + number)
        both = answer(number, prompt, chosen), answer(number, prompt, rejected)
        if is_paired:
            rows.append(Preference(str(number), both, (True, False)))
        else:
            label = number % 3 != 0
            rows.append(Preference(str(number), both[:1], (label,)))
    return rows


def config_of(folder, section, **policy):
    return PreferenceConfig.model_validate(
        {
            "output_dir": "unused",
            "max_steps": 8,
            "data": {"dataset": ["unused"], "max_length": 30},
            "model": {"path": str(folder)},
            "preference": section,
            # Sharded optimizers leave each rank with the sum of its part of the gradient only.
            "policy": {
                "global_batch_size": NUM_ROWS,
                "micro_batch_size": NUM_ROWS,
                "use_distributed_optimizer": False,
                **policy,
            },
        }
    )


def make_batch(config, seed=0):
    """The batch of a step, with a reference that is not the policy."""
    section = config.preference
    batch = build_preference_batch(make_rows(is_paired=section.is_paired))
    if section.has_reference:
        rng = torch.Generator().manual_seed(seed)
        tokens = batch.completion_mask.sum(dim=1)
        noise = torch.randn(len(tokens), generator=rng, dtype=torch.float64)
        batch.ref_logps = -6.5 * tokens + 2 * noise
    if section.estimates_kl:
        batch.kl = torch.tensor([KL], dtype=torch.float64)
    return batch


def answers_of(model, batch):
    """Log-prob of each answer by transformers, one after the other, and its number of tokens."""
    logps, lengths = [], []
    rows = zip(batch.input_ids, batch.lengths.tolist(), batch.completion_mask, strict=True)
    for ids, length, mask in rows:
        logits = model(ids[None, :length]).logits[0, :-1]
        own = logits.log_softmax(-1).gather(-1, ids[1:length, None]).squeeze(-1)
        logps.append(own[mask[1:length]].sum())
        lengths.append(int(mask.sum()))
    return logps, lengths


def loss_of_transformers(model, batch, section):
    """The loss of a step, answer by answer."""
    logps, lengths = answers_of(model, batch)
    beta, losses = section.scale, []
    is_chosen = batch.is_chosen.tolist()
    if not section.is_paired:
        for logp, ref, good in zip(logps, batch.ref_logps, is_chosen, strict=True):
            distance = logp - ref - KL
            losses.append(1 - torch.sigmoid(beta * distance if good else -beta * distance))
        return sum(losses) / len(losses)
    chosen_tokens, nll = 0, 0.0
    for i in range(0, len(logps), 2):
        (won, lost), (n_won, n_lost) = logps[i : i + 2], lengths[i : i + 2]
        chosen_tokens, nll = chosen_tokens + n_won, nll - won
        if section.loss_type in ("sigmoid", "ipo"):
            won, lost = won - batch.ref_logps[i], lost - batch.ref_logps[i + 1]
        means = won / n_won, lost / n_lost
        if section.loss_type in ("sigmoid", "cpo"):
            losses.append(-logsigmoid(beta * (won - lost)))
        elif section.loss_type == "ipo":
            losses.append((means[0] - means[1] - 1 / (2 * beta)) ** 2)
        elif section.loss_type == "simpo":
            losses.append(-logsigmoid(beta * (means[0] - means[1]) - section.simpo_gamma))
        else:
            odds = [mean.exp() / (1 - mean.exp()) for mean in means]
            losses.append(-beta * logsigmoid((odds[0] / odds[1]).log()))
    weight = {"orpo": 1.0, "cpo": 1.0, "simpo": 0.0}.get(section.loss_type, section.rpo_alpha)
    return sum(losses) / len(losses) + weight * nll / chosen_tokens


def norm(tensors):
    return math.sqrt(sum(tensor.double().square().sum() for tensor in tensors.values()))


SECTIONS = {
    "DPO": {"loss_type": "sigmoid"},
    "RPO": {"loss_type": "sigmoid", "rpo_alpha": 0.5, "beta": 0.3},
    "IPO": {"loss_type": "ipo"},
    "CPO": {"loss_type": "cpo"},
    "SimPO": {"loss_type": "simpo"},
    "ORPO": {"loss_type": "orpo", "beta": 0.5},
    "KTO": {"loss_type": "kto", "beta": 0.2},
}
