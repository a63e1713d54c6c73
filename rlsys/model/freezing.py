"""Which tensors of a model are trained, where policy.freeze_parameters... leaves some out."""

from __future__ import annotations

from difflib import get_close_matches
from typing import TYPE_CHECKING

from rlsys.model.families.base import WeightRow, weight_table
from rlsys.model.folder_check import some
from rlsys.patterns import find

if TYPE_CHECKING:
    from rlsys.config import PolicyConfig
    from rlsys.model.shape import ModelShape


def frozen_tensors(policy: PolicyConfig, shape: ModelShape) -> frozenset[str]:
    """Hugging Face's names of the tensors that are not trained.

    Raises:
        ValueError: a pattern matches nothing, nothing is left to train, or tensors that are one
            parameter of megatron-core are not frozen together.
    """
    if not policy.freezes:
        return frozenset()
    rows = [row for row in weight_table(shape) if not is_buffer(row)]
    names = [name for row in rows for name in row.hf_names]
    frozen = set(_lowest(rows, policy.freeze_parameters_ratio))
    frozen |= _matched(
        "freeze_parameters", policy.freeze_parameters, policy.freeze_parameters_regex, names
    )
    frozen -= _matched(
        "trainable_parameters",
        policy.trainable_parameters,
        policy.trainable_parameters_regex,
        names,
    )
    if not frozen < set(names):
        raise ValueError(
            "policy.freeze_parameters, its regex and its ratio leave nothing to train: freeze "
            "less, or name tensors in policy.trainable_parameters"
        )
    for row in rows:
        own = frozen & set(row.hf_names)
        if own and own != set(row.hf_names):
            raise ValueError(
                f"policy.freeze_parameters: {some(sorted(own))} cannot be frozen alone, because "
                f"megatron-core has {some(row.hf_names)} in one parameter: freeze all or none"
            )
    return frozenset(frozen)


def num_frozen(policy: PolicyConfig, shape: ModelShape) -> int:
    """Parameters that are not trained; raises what `frozen_tensors` raises."""
    frozen = frozen_tensors(policy, shape)
    return sum(row.num_params for row in weight_table(shape) if row.hf_names[0] in frozen)


def trained_text(num_trained: int, num_params: int) -> str:
    """`trainable parameters: 1,024 of 65,536 (1.56%)`; adapters count in the first only."""
    share = num_trained / num_params
    return f"trainable parameters: {num_trained:,} of {num_params:,} ({share:.2%})"


def is_buffer(row: WeightRow) -> bool:
    """Whether a row is of numbers that no gradient trains."""
    return row.names[0].endswith(".expert_bias")


def _lowest(rows: list[WeightRow], share: float) -> list[str]:
    """The first tensors of the model that have at most `share` of all parameters."""
    left = share * sum(row.num_params for row in rows)
    names: list[str] = []
    for row in rows:
        left -= row.num_params
        if left < 0:
            break
        names += row.hf_names
    return names


def _matched(field: str, starts: list[str], pattern: str | None, names: list[str]) -> set[str]:
    """Tensors that the starts in a field, or the regex in the one beside it, match."""
    found: set[str] = set()
    for start in starts:
        own = [name for name in names if name.startswith(start)]
        if not own:
            raise ValueError(
                f"policy.{field}: no tensor of the model starts with {start!r}. "
                f"{_nearest(start, names)}"
            )
        found |= set(own)
    if pattern is not None:
        own = [name for name in names if find("search", pattern, name)]
        if not own:
            raise ValueError(
                f"policy.{field}_regex = {pattern!r} is found in no tensor of the model. "
                f"{_nearest(pattern, names)}"
            )
        found |= set(own)
    return found


def _nearest(text: str, names: list[str]) -> str:
    starts = {".".join(name.split(".")[:depth]) for name in names for depth in range(1, 7)}
    near = get_close_matches(text.rstrip("."), sorted(starts), n=3, cutoff=0.5) or names[:3]
    return f"The nearest names are {', '.join(near)}"
