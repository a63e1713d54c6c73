"""Which tokens can be sampled: top_k, top_p and the tokens that the tokenizer knows.

The rollout engine samples from the softmax over these tokens alone, so the policy's distribution is
over them too. Otherwise every token's log-prob would be off by the log of the mass that was cut.

Completions are sampled from `softmax(logits / temperature)` in this order, as vLLM does it: ids
beyond the tokenizer go, then all but the `top_k` likeliest, then the least likely ones as long as
the others keep a mass of `top_p`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_BISECTIONS = 32
_RANGE_NATS = 64.0
"""Tokens that are less likely than the likeliest by more than this have no mass in float32."""


@dataclass(frozen=True, slots=True)
class SamplingSupport:
    """The settings of sampling, besides its temperature, that leave tokens out."""

    top_k: int = 0
    """Likeliest tokens that are kept, 0 is all of them."""
    top_p: float = 1.0
    """Mass of the likeliest tokens that are kept, 1 is all of it."""
    num_token_ids: int | None = None
    """Ids from here on decode to nothing: they fill up the vocabulary. None: there are none."""

    @property
    def truncates(self) -> bool:
        """Whether what is kept depends on the logits."""
        return self.top_k > 0 or self.top_p < 1.0


EVERY_TOKEN = SamplingSupport()


def leave_out_(
    logits_TV: Tensor,
    targets_T: Tensor,
    support: SamplingSupport,
    *,
    temperature: float,
    vocab_start: int = 0,
    group: dist.ProcessGroup | None = None,
    floor_T: Tensor | None = None,
) -> Tensor | None:
    """Set the logits of tokens that cannot be sampled to -inf, in place.

    A target is kept in any case: it was sampled, and where engine and trainer round differently it
    may be the first token that only one of them leaves out.

    Args:
        logits_TV: [T, V], this rank's slice of the vocabulary.
        targets_T: [T] ids of the whole vocabulary.
        support: what is kept.
        temperature: of sampling.
        vocab_start: token id of the first column.
        group: the tensor-parallel group; None when the vocabulary is whole.
        floor_T: what an earlier call for the same logits has returned.

    Returns:
        [T] the smallest logit that is kept by top_k and top_p; None without them.
    """
    if support == EVERY_TOKEN:
        return None
    columns_T = targets_T - vocab_start
    is_local_T = (columns_T >= 0) & (columns_T < logits_TV.shape[1])
    columns_T1 = columns_T.masked_fill(~is_local_T, 0)[:, None]
    sampled_T1 = logits_TV.gather(-1, columns_T1)
    if support.num_token_ids is not None:
        logits_TV[:, max(0, support.num_token_ids - vocab_start) :] = -torch.inf
    if support.truncates:
        if floor_T is None:
            floor_T = _floor(logits_TV, support, temperature, group)
        logits_TV.masked_fill_(logits_TV < floor_T[:, None], -torch.inf)
    kept_T1 = logits_TV.gather(-1, columns_T1)
    logits_TV.scatter_(-1, columns_T1, torch.where(is_local_T[:, None], sampled_T1, kept_T1))
    return floor_T


def _floor(
    logits_TV: Tensor,
    support: SamplingSupport,
    temperature: float,
    group: dist.ProcessGroup | None,
) -> Tensor:
    wide = torch.promote_types(logits_TV.dtype, torch.float32)
    floor_T = torch.full(logits_TV.shape[:1], -torch.inf, dtype=wide, device=logits_TV.device)
    if support.top_k:
        floor_T = _kth_largest(logits_TV, support.top_k, group).to(wide)
    if support.top_p < 1.0:
        floor_T = _nucleus_floor(logits_TV, support.top_p, floor_T, temperature, group)
    return floor_T


def _kth_largest(logits_TV: Tensor, k: int, group: dist.ProcessGroup | None) -> Tensor:
    largest_TK = logits_TV.topk(min(k, logits_TV.shape[1])).values
    if group is not None:
        parts = [torch.empty_like(largest_TK) for _ in range(group.size())]
        dist.all_gather(parts, largest_TK.contiguous(), group=group)
        merged = torch.cat(parts, dim=1)
        largest_TK = merged.topk(min(k, merged.shape[1])).values
    return largest_TK[:, -1]


def _nucleus_floor(
    logits_TV: Tensor,
    top_p: float,
    floor_T: Tensor,
    temperature: float,
    group: dist.ProcessGroup | None,
) -> Tensor:
    """By bisection, which needs no sorted copy of the logits and works over ranks.

    A token is kept if the tokens above it have less than `top_p` of the mass. So the floor is the
    largest number above which there is at least that much.
    """
    max_T = logits_TV.amax(dim=-1).to(floor_T.dtype)
    if group is not None:
        dist.all_reduce(max_T, op=dist.ReduceOp.MAX, group=group)

    def mass_above(bound_T: Tensor) -> Tensor:
        mass_T = fused(_mass_above, logits_TV, max_T, bound_T, temperature)
        if group is not None:
            dist.all_reduce(mass_T, op=dist.ReduceOp.SUM, group=group)
        return mass_T

    # `floor_T` itself is kept, so the bound is the number right below it.
    low_T = torch.maximum(max_T - _RANGE_NATS * temperature, _below(floor_T))
    high_T = max_T.clone()
    wanted_T = top_p * mass_above(low_T)
    for _ in range(_BISECTIONS):
        middle_T = (low_T + high_T) / 2
        is_enough_T = mass_above(middle_T) >= wanted_T
        low_T = torch.where(is_enough_T, middle_T, low_T)
        high_T = torch.where(is_enough_T, high_T, middle_T)
    return torch.nextafter(low_T, torch.full_like(low_T, torch.inf))


def _below(values_T: Tensor) -> Tensor:
    return torch.nextafter(values_T, torch.full_like(values_T, -torch.inf))


def _mass_above(logits_TV: Tensor, max_T: Tensor, bound_T: Tensor, temperature: float) -> Tensor:
    """[T] sum of exp(z - max) over logits above the bound."""
    wide_TV = logits_TV.to(max_T.dtype)
    mass_TV = ((wide_TV - max_T[:, None]) / temperature).exp()
    return torch.where(wide_TV > bound_T[:, None], mass_TV, 0.0).sum(dim=-1)


_compiled = functools.cache(torch.compile)


def fused(function: Callable[..., Any], logits_TV: Tensor, *args: Any) -> Any:
    """Run a chain of element-wise ops and sums over [T, V].

    Off the CPU as one kernel: op by op, each would read and write the whole tensor in float32,
    which took two fifths of an update of a 1.5B model. The vocabulary is a constant of the kernel:
    only then does the compiler know that rows are aligned, and reads more than a number at a time.
    On CPU compiling takes longer than it saves.
    """
    if logits_TV.device.type != "cpu":
        function = _compiled(function)
    return function(logits_TV, *args)
