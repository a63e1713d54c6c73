"""What the ranks of tests/unit/algo/test_algo_ranks.py run; light, because each rank imports it."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from rlsys.algo.context_parallel import chunk_positions, gather_tokens
from rlsys.algo.logprobs import chunked_logprobs, chunked_token_values
from rlsys.algo.penalties import History
from rlsys.algo.sampling import Sampling, VocabSlice
from rlsys.algo.update_metrics import MetricSums

TOKENS, HIDDEN, VOCAB, TEMPERATURE = 7, 5, 12, 0.7


def problem() -> dict[str, Tensor]:
    """Hidden states, an output layer, targets, and the gradient that a loss would send back."""
    rng = torch.Generator().manual_seed(0)
    return {
        "hidden": torch.randn(TOKENS, HIDDEN, generator=rng),
        "weight": 3 * torch.randn(VOCAB, HIDDEN, generator=rng),
        "targets": torch.randint(0, VOCAB, (TOKENS,), generator=rng),
        "grad": torch.randn(TOKENS, generator=rng),
    }


def likely_targets(case: dict[str, Tensor]) -> Tensor:
    """Every second target is the likeliest token, the others are the least likely."""
    logits = case["hidden"] @ case["weight"].T
    is_even = torch.arange(TOKENS) % 2 == 0
    return torch.where(is_even, logits.argmax(-1), logits.argmin(-1))


SAMPLINGS = {
    "top_k": Sampling(TEMPERATURE, top_k=4),
    "top_p": Sampling(TEMPERATURE, top_p=0.7),
    "both": Sampling(TEMPERATURE, top_k=5, top_p=0.6, num_token_ids=11),
    "min_p": Sampling(TEMPERATURE, top_p=0.9, min_p=0.2),
    "half": Sampling(TEMPERATURE, num_token_ids=5),  # none of the second rank's
}


PENALIZED = Sampling(
    TEMPERATURE, repetition_penalty=1.4, presence_penalty=0.5, frequency_penalty=0.3
)


def history() -> History:
    """Two sequences, of 3 and 4 tokens; the first begins with a prompt token that comes again."""
    return History(
        token_ids_M=torch.tensor([4, 4, 9, 2, 11, 2, 2]),
        is_sampled_M=torch.tensor([0, 1, 1, 0, 0, 1, 1]).bool(),
        starts_T=torch.tensor([0, 0, 0, 3, 3, 3, 3]),
        positions_T=torch.arange(TOKENS),
    )


def shared_tokens() -> Tensor:
    """[T, 2] values of two sequences, of 4 and of 8 tokens."""
    return torch.arange(24.0).view(12, 2)


def statistics(rank: int) -> dict[str, Tensor]:
    """Statistics of a micro-batch of `rank`."""
    return {
        "loss": torch.tensor(0.5 + rank),
        "num_loss_tokens": torch.tensor(2.0 + rank),
        "kl": torch.tensor(1.0 + 2 * rank),
        "ratio/min": torch.tensor(0.9 - rank),
        "ratio/max": torch.tensor(1.1 - rank),
    }


def run_rank(rank: int, world_size: int, folder: str) -> None:
    """Tensor-parallel log-probs, unchunked and chunked, tokens shared by context parallelism, and
    reduced metrics, saved to `folder`."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=120),
    )
    group = dist.group.WORLD
    case = problem()
    start, end = (VOCAB * r // world_size for r in (rank, rank + 1))
    results: dict[str, Tensor | dict] = {}

    logits = (case["hidden"] @ case["weight"].T)[:, start:end].clone().requires_grad_()
    logprobs, entropy = chunked_logprobs(
        logits,
        torch.eye(end - start),  # the product with it is exact
        case["targets"],
        sampling=Sampling(TEMPERATURE),
        vocab=VocabSlice(start, group),
        chunk_size=1024,
    )
    (logprobs * case["grad"] + entropy).sum().backward()
    results |= {
        "logprobs": logprobs.detach(),
        "entropy": entropy.detach(),
        "logits_grad": logits.grad,
    }

    hidden = case["hidden"].clone().requires_grad_()
    weight = case["weight"][start:end].clone().requires_grad_()
    logprobs, entropy = chunked_logprobs(
        hidden,
        weight,
        case["targets"],
        sampling=Sampling(TEMPERATURE),
        vocab=VocabSlice(start, group),
        chunk_size=3,
    )
    (logprobs * case["grad"] + entropy).sum().backward()
    results |= {
        "chunked_logprobs": logprobs.detach(),
        "chunked_entropy": entropy.detach(),
        "is_likeliest": chunked_token_values(
            case["hidden"],
            case["weight"][start:end],
            likely_targets(case),
            sampling=Sampling(TEMPERATURE),
            vocab=VocabSlice(start, group),
            chunk_size=3,
        ).is_likeliest,
        "hidden_grad": hidden.grad,
        "weight_grad": weight.grad,
    }

    for name, sampling in (SAMPLINGS | {"penalties": PENALIZED}).items():
        hidden = case["hidden"].clone().requires_grad_()
        logprobs, entropy = chunked_logprobs(
            hidden,
            case["weight"][start:end],
            case["targets"],
            sampling=sampling,
            vocab=VocabSlice(start, group),
            chunk_size=3,
            history=history() if sampling.penalizes else None,
        )
        (logprobs * case["grad"] + entropy).sum().backward()
        values = {"logprobs": logprobs, "entropy": entropy, "hidden_grad": hidden.grad}
        results[name] = {key: value.detach() for key, value in values.items()}

    positions = chunk_positions(torch.tensor([0, 4, 12]), world_size)
    for sum_gradients in (False, True):
        own = shared_tokens()[positions[rank]].requires_grad_()
        gathered = gather_tokens(own, positions, group, sum_gradients=sum_gradients)
        # The whole loss on every rank, or a rank's own part of it.
        (gathered.square() * (1 + rank if sum_gradients else 1)).sum().backward()
        results |= {f"gathered_{sum_gradients}": gathered.detach(), f"{sum_gradients}": own.grad}

    sums = MetricSums()
    sums.add(statistics(rank))
    sums.all_reduce(group)
    results["metrics"] = sums.means()
    torch.save(results, Path(folder) / f"rank{rank}.pt")
    dist.destroy_process_group()
