"""A student and a teacher of a few numbers, and what ranks do that share their vocabulary."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from rlsys.algo.distributions import Divergence, TeacherTop, teacher_top
from rlsys.algo.divergence import TeacherHidden, chunked_divergence
from rlsys.algo.sampling import VocabSlice

CASES = [(k, beta) for k in (0, 7) for beta in (0.0, 0.3, 1.0)]
"""(tokens of the teacher, beta)"""
SIZES = {"tokens": 13, "hidden": 8, "teacher": 12, "vocab": 37}


def tensors(dtype=torch.float32, seed=0):
    """Hidden states and output weights of a student and of a teacher of another size."""
    rng = torch.Generator().manual_seed(seed)
    tokens, vocab = SIZES["tokens"], SIZES["vocab"]

    def random(*shape):
        return torch.randn(shape, generator=rng, dtype=torch.float64).to(dtype)

    own = random(tokens, SIZES["hidden"]), random(vocab, SIZES["hidden"])
    teachers = random(tokens, SIZES["teacher"]), random(vocab, SIZES["teacher"])
    targets = torch.randint(0, vocab, (tokens,), generator=rng)
    weights = torch.rand(tokens, generator=rng, dtype=torch.float64).to(dtype)
    return own, teachers, targets, weights


def loss_of_ours(own, teacher, targets, weights, divergence, **options):
    own = [tensor.clone().requires_grad_() for tensor in own]
    found = chunked_divergence(*own, targets, teacher, divergence=divergence, **options)
    loss = (found.divergence * weights).sum()
    loss.backward()
    return loss.detach(), [tensor.grad for tensor in own], found


def in_slices(rank: int, group: dist.ProcessGroup, k: int, beta: float) -> dict:
    """The loss and this rank's part of the gradients, with half of a filled-up vocabulary."""
    (hidden, weight), teachers, targets, weights = tensors(torch.float64)
    half = 19
    vocab = VocabSlice(rank * half, group)
    rows = slice(rank * half, (rank + 1) * half)

    def own_slice(whole):
        filled = torch.cat([whole, torch.full((1, whole.shape[1]), 9.0, dtype=whole.dtype)])
        return filled[rows]

    divergence = Divergence(beta, 0.8, num_token_ids=SIZES["vocab"])
    teacher = TeacherHidden(teachers[0], own_slice(teachers[1]))
    if k:
        teacher = teacher_top(*teacher, k, divergence=divergence, vocab=vocab, chunk_size=5)
    loss, (of_hidden, of_weight), found = loss_of_ours(
        (hidden, own_slice(weight)),
        teacher,
        targets,
        weights,
        divergence,
        vocab=vocab,
        chunk_size=4,
    )
    values = [value.detach() for value in found]
    ids = teacher.ids_TK if isinstance(teacher, TeacherTop) else None
    return {
        "loss": loss,
        "of_hidden": of_hidden,
        "of_weight": of_weight,
        "values": values,
        "ids": ids,
    }


def run_rank(rank: int, world_size: int, folder: str) -> None:
    """Save the results of all cases to `folder`."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=120),
    )
    results = {case: in_slices(rank, dist.group.WORLD, *case) for case in CASES}
    torch.save(results, Path(folder) / f"rank{rank}.pt")
    dist.destroy_process_group()
