"""Which layers each pipeline stage has: policy.pipeline_layout, in megatron-core's notation.

    Ettt|tt|ttL      three stages: the embedding E with 3 layers, 2 layers, 2 layers with the loss L
    Et*3|(t|)*2L     the same with counts: a letter or a group in parentheses, times a number
    Et|t|t|tL        on 2 ranks two chunks each (virtual pipeline): rank 0 has stages 0 and 2

Commas and spaces are for readers. The notation is that of megatron-core's
`transformer/pipeline_parallel_layer_layout.py`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from rlsys.problems import Problem
from rlsys.text import counted, near_multiples

if TYPE_CHECKING:
    from rlsys.config.schema import PolicyConfig

_TIMES = (r"\(([^()]+)\)\*(\d{1,3})(?!\d)", r"([A-Za-z|])\*(\d{1,3})(?!\d)")
"""A group or a letter times a number of up to three digits, so that no text grows beyond memory."""


def parse_layout(text: str) -> tuple[str, ...]:
    """The stages in order, each a text such as "Ett".

    Raises:
        ValueError: another letter, or E and L are not at the two ends.
    """
    plain = re.sub(r"[,\s]", "", text)
    for pattern in _TIMES:
        plain = re.sub(pattern, lambda found: found[1] * int(found[2]), plain)
    if "m" in plain:
        raise ValueError(
            "m is a layer of multi-token prediction, which rlsys does not train: leave it out"
        )
    if stray := sorted(set(plain) - set("EtL|")):
        raise ValueError(
            f"{', '.join(map(repr, stray))} cannot be read: write E (embedding), t (a layer), L "
            "(loss), | between stages, and *N after a letter or a group in parentheses, as in "
            "Et*3|(tt|)*2tL"
        )
    if not re.fullmatch(r"E[t|]*L", plain):
        raise ValueError(
            "the first stage begins with E, the embedding, the last ends with L, the loss, and "
            "there are t and | between: Et*3|t*3L"
        )
    return tuple(plain.split("|"))


def stage_layers(stages: Sequence[str]) -> list[range]:
    """The layers of each stage, counted from 0."""
    ends = [sum(stage.count("t") for stage in stages[: i + 1]) for i in range(len(stages))]
    return [range(end - stage.count("t"), end) for stage, end in zip(stages, ends, strict=True)]


def rank_layers(policy: PolicyConfig, num_layers: int) -> list[list[int]]:
    """The layers of each pipeline rank, all of its chunks together."""
    pp = policy.pipeline_parallel_size
    if policy.pipeline_layout is None:
        # Where these do not divide, the checks before a run refuse the layout.
        per_stage = -(-num_layers // pp)
        return [list(range(num_layers))[r * per_stage :][:per_stage] for r in range(pp)]
    layers = stage_layers(parse_layout(policy.pipeline_layout))
    return [[layer for chunk in layers[rank::pp] for layer in chunk] for rank in range(pp)]


def even_layout(num_layers: int, stages: int) -> str:
    """A layout whose stages differ by one layer at most; those in the middle have more."""
    small, larger = divmod(num_layers, stages)
    middle = sorted(range(stages), key=lambda i: abs(i - (stages - 1) / 2))
    sizes = [small + (i in middle[:larger]) for i in range(stages)]
    return "E" + "|".join(f"t*{size}" for size in sizes) + "L"


def layout_problems(policy: PolicyConfig) -> Iterator[Problem]:
    """Stages of policy.pipeline_layout that its ranks cannot share."""
    if policy.pipeline_layout is None:
        return
    stages, pp = len(parse_layout(policy.pipeline_layout)), policy.pipeline_parallel_size
    if stages % pp or (pp == 1 and stages > 1):
        uses = "1, the default, has one stage" if pp == 1 else f"use {near_multiples(stages, pp)}"
        yield Problem(
            f"policy.pipeline_layout = {policy.pipeline_layout} has {counted(stages, 'stage')}, "
            f"which policy.pipeline_parallel_size = {pp} ranks cannot share equally: {uses}, or "
            f"set pipeline_parallel_size to {stages}"
        )


def fits_layout(policy: PolicyConfig, num_layers: int) -> bool:
    """Whether `rank_layers` can place the layers: policy.pipeline_layout, if set, has as many."""
    return policy.pipeline_layout is None or num_layers == _count_layers(policy.pipeline_layout)


def _count_layers(layout: str) -> int:
    return sum(stage.count("t") for stage in parse_layout(layout))


def layer_problems(policy: PolicyConfig, num_layers: int) -> Iterator[Problem]:
    """Layers of the model that the pipeline's ranks cannot share."""
    pp = policy.pipeline_parallel_size
    if policy.pipeline_layout is None:
        if num_layers % pp:
            divisors = [str(n) for n in range(1, num_layers + 1) if num_layers % n == 0]
            yield Problem(
                f"policy.pipeline_parallel_size = {pp} does not divide the model's {num_layers} "
                f"layers: use {' or '.join(divisors)}, or say which stage has how many, "
                f"policy.pipeline_layout = {even_layout(num_layers, pp)}"
            )
        return
    own, stages = _count_layers(policy.pipeline_layout), parse_layout(policy.pipeline_layout)
    if own != num_layers:
        yield Problem(
            f"policy.pipeline_layout = {policy.pipeline_layout} has {counted(own, 'layer')} t, and "
            f"the model has {num_layers}: use {even_layout(num_layers, len(stages))}, or another "
            f"one with {num_layers}"
        )
