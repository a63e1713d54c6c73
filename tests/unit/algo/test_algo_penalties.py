"""Penalties of the policy's log-probs are those that vLLM samples with."""

import pytest
import torch

from rlsys.algo.batching import pack
from rlsys.algo.logprobs import chunked_logprobs
from rlsys.algo.penalties import History
from rlsys.algo.sampling import Sampling
from rlsys.types import TrainBatch

VOCABULARY, TEMPERATURE = 11, 0.7
PENALTIES = {
    "repetition": {"repetition_penalty": 1.3},
    "encouraged repetition": {"repetition_penalty": 0.8},
    "presence": {"presence_penalty": 0.6},
    "frequency": {"frequency_penalty": -0.4},
    "all, with min_p": {
        "repetition_penalty": 1.2,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.3,
        "min_p": 0.05,
    },
}


def batch():
    """Three rows with tokens that come several times, in prompts, completions and both."""
    rng = torch.Generator().manual_seed(3)
    prompts, lengths = torch.tensor([2, 4, 1]), torch.tensor([9, 6, 12])
    positions = torch.arange(12)
    valid = positions < lengths[:, None]
    ids = torch.randint(0, 5, (3, 12), generator=rng).masked_fill(~valid, 0)
    mask = valid & (positions >= prompts[:, None])
    return TrainBatch(ids, lengths, mask, torch.zeros(3, 12), torch.zeros(3, 12)), prompts


def penalized(logits, prompt, completion, sampling):
    """One position's logits by the formula, token by token."""
    logits = logits.clone()
    for token in {*prompt, *completion}:
        factor = sampling.repetition_penalty
        logits[token] = logits[token] / factor if logits[token] > 0 else logits[token] * factor
    for token in set(completion):
        times = completion.count(token)
        logits[token] -= sampling.frequency_penalty * times + sampling.presence_penalty
    return logits


def expected_logprobs(logits_TV, sampling):
    """[tokens of completions] log-probs, by autograd on the formula."""
    rows, prompts = batch()
    found, position = [], 0
    for ids, prompt, length in zip(
        rows.input_ids.tolist(), prompts.tolist(), rows.lengths.tolist(), strict=True
    ):
        for i in range(1, length):
            if i >= prompt:
                z = penalized(logits_TV[position + i - 1], ids[:prompt], ids[prompt:i], sampling)
                z = z / sampling.temperature
                probs = z.softmax(-1)
                kept = probs >= sampling.min_p * probs.max()
                kept[ids[i]] = True
                found.append(z.masked_fill(~kept, -torch.inf).log_softmax(-1)[ids[i]])
        position += length
    return torch.stack(found)


@pytest.mark.parametrize("name", PENALTIES)
@pytest.mark.parametrize("recompute", [True, False])
def test_logprobs_and_gradients_are_those_of_the_formula(name, recompute):
    rows, _ = batch()
    micro_batch = pack(rows, [0, 1, 2], torch.zeros(3, 12), multiple_of=4)
    num_tokens = len(micro_batch.input_ids)
    rng = torch.Generator().manual_seed(1)
    logits = 2 * torch.randn(num_tokens, VOCABULARY, generator=rng, dtype=torch.float64)
    logits.requires_grad_()
    sampling = Sampling(TEMPERATURE, **PENALTIES[name])
    logprobs, _ = chunked_logprobs(
        logits,
        torch.eye(VOCABULARY, dtype=torch.float64),
        micro_batch.targets,
        sampling=sampling,
        chunk_size=5,
        recompute=recompute,
        history=History.of(micro_batch, torch.arange(num_tokens)),
    )
    logprobs = logprobs[micro_batch.loss_mask]
    expected = expected_logprobs(logits, sampling)
    torch.testing.assert_close(logprobs, expected)
    weights = torch.randn(len(expected), generator=rng, dtype=torch.float64)
    (grad,) = torch.autograd.grad((logprobs * weights).sum(), logits)
    (expected_grad,) = torch.autograd.grad((expected * weights).sum(), logits)
    torch.testing.assert_close(grad, expected_grad)
