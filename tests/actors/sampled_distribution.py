"""Whether completions are sampled from a model: their log-probs, and how likely tokens are."""

import math

import torch
from transformers import AutoModelForCausalLM


@torch.no_grad()
def compare(
    groups, folder, *, temperature, cut=lambda logits: logits, dtype=torch.float32, on="cpu"
):
    """(differences of log-probs [tokens], how far tokens are from as likely as they should be).

    A token's log-prob plus the entropy of its distribution has mean 0 whatever came before it. So
    the sum over all tokens, in units of its standard deviation, is about a standard normal.

    Args:
        cut: logits / temperature [T, V] -> the same with -inf where nothing is sampled.
    """
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(on)
    differences, surplus, variance = [], 0.0, 0.0
    for group in groups:
        for completion in group.completions:
            start = len(group.prompt.token_ids)
            ids = torch.tensor([group.prompt.token_ids + completion.token_ids], device=on)
            logits = model(ids).logits[0, start - 1 : -1].double() / temperature
            logprobs = cut(logits).log_softmax(dim=-1)
            own = logprobs.gather(1, ids[0, start:, None])[:, 0]
            differences.append(own.cpu() - torch.tensor(completion.rollout_logprobs))
            finite = logprobs.masked_fill(logprobs.isinf(), 0.0)
            mean = (logprobs.exp() * finite).sum(dim=-1)
            square = (logprobs.exp() * finite.square()).sum(dim=-1)
            surplus += (own - mean).sum().item()
            variance += (square - mean.square()).sum().item()
    return torch.cat(differences).abs(), surplus / math.sqrt(variance)
