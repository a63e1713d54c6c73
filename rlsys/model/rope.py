"""Rotary embeddings in a config.json that policy and rollout engine compute alike.

transformers is the reference. The policy takes its frequencies
(rlsys/engines/megatron/rope.py), vLLM reads its numbers (rlsys/engines/vllm/rope.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from rlsys.model.families.base import WINDOW_TYPES, ModelFamily


@dataclass(frozen=True, slots=True)
class _Kind:
    """What a rotary embedding of one rope_type has."""

    needs: frozenset[str]
    may: frozenset[str] = frozenset()


_LLAMA_3 = {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}
_YARN = {"beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim", "truncate"}
_KINDS = {
    "default": _Kind(frozenset()),
    "linear": _Kind(frozenset({"factor"})),
    # Up to max_position_embeddings its frequencies are the plain ones, and no row is longer.
    "dynamic": _Kind(frozenset({"factor"})),
    "llama3": _Kind(frozenset(_LLAMA_3)),
    "yarn": _Kind(frozenset({"factor", "original_max_position_embeddings"}), frozenset(_YARN)),
    "longrope": _Kind(
        frozenset({"short_factor", "long_factor"}),
        frozenset({"factor", "attention_factor", "original_max_position_embeddings"}),
    ),
}
_ALWAYS = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
_POSITIVE = ("factor", "attention_factor", "beta_fast", "beta_slow", "rope_theta")


def rope_problems(values: Mapping[str, Any], family: ModelFamily, remedy: str) -> Iterator[str]:
    """Rotary embeddings that rlsys does not know to be equal in transformers, policy and vLLM."""
    scaling, parameters = values.get("rope_scaling"), values.get("rope_parameters")
    if scaling and parameters and scaling != parameters:
        yield "rope_scaling and rope_parameters contradict each other: delete one of them"
        return
    for name in ("rope_scaling", "rope_parameters"):
        rope = values.get(name)
        if not rope:
            continue
        if not isinstance(rope, dict):
            yield f"{name} = {rope!r} should be a mapping with rope_type"
        elif any(key in rope for key in WINDOW_TYPES):
            yield from _nested_problems(name, rope, values, family, remedy)
        elif family.rope_by_layer_type and name == "rope_parameters":
            yield f"{name} should have an entry for each of {', '.join(WINDOW_TYPES)}"
        else:
            yield from _entry_problems(name, rope, values, family, remedy)


def _nested_problems(
    name: str,
    rope: dict[str, Any],
    values: Mapping[str, Any],
    family: ModelFamily,
    remedy: str,
) -> Iterator[str]:
    if not family.rope_by_layer_type or name == "rope_scaling":
        yield (
            f"{name} has entries for {', '.join(sorted(rope))}, and all layers of a "
            f"{family.model_type} have one rotary embedding: write its parameters there"
        )
        return
    for layer_type, entry in rope.items():
        inner = f"{name}.{layer_type}"
        if layer_type not in WINDOW_TYPES or not isinstance(entry, dict):
            yield f"{inner} = {entry!r} is not known to rlsys; {remedy}"
            continue
        if "truncate" in entry:  # transformers reads it one level above
            yield f"{inner}: truncate is not supported there"
            continue
        yield from _entry_problems(inner, entry, {**values, "rope_theta": None}, family, remedy)


def _entry_problems(
    name: str,
    rope: dict[str, Any],
    values: Mapping[str, Any],
    family: ModelFamily,
    remedy: str,
) -> Iterator[str]:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in family.rope_types or kind not in _KINDS:
        yield (
            f"{name}: rope_type {kind!r} is not supported; supported are "
            f"{', '.join(family.rope_types)}. Where the longer context is not needed, set {name} "
            "to null in config.json"
        )
        return
    if rope.get("type", kind) != kind:
        yield f"{name}: rope_type {kind!r} and type {rope['type']!r} contradict each other"
    theta, inner = values.get("rope_theta"), rope.get("rope_theta")
    if None not in (theta, inner) and theta != inner:
        yield f"rope_theta = {theta!r} and that of {name}, {inner!r}, contradict each other"
    missing = sorted(key for key in _KINDS[kind].needs if rope.get(key) is None)
    if missing:
        yield f"{name}: rope_type {kind!r} needs {', '.join(missing)}"
        return
    known = _ALWAYS.union(_KINDS[kind].needs, _KINDS[kind].may, family.rope_keys)
    for key, value in rope.items():
        if key == "partial_rotary_factor" and value is not None:
            yield from partial_problems(f"{name}: {key}", value, family)
        elif key not in known and value is not None:
            yield f"{name}: {key} = {value!r} is not known to rlsys; {remedy}"
        elif key in _POSITIVE and value is not None and not _is_positive(value):
            yield f"{name}: {key} = {value!r} should be a number above 0"
    yield from _length_problems(name, kind, rope, values)


def num_positions(values: Mapping[str, Any]) -> int:
    """Positions that a model has: YaRN makes them more where config.json keeps the old number."""
    positions: int = values["max_position_embeddings"]
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    if rope.get("rope_type", rope.get("type")) != "yarn":
        return positions
    return max(positions, int(rope["factor"] * rope["original_max_position_embeddings"]))


def longrope_switch(values: Mapping[str, Any]) -> int | None:
    """Tokens beyond which transformers takes LongRoPE's other frequencies; None for other kinds.

    It looks at the longest text of each batch.
    """
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    if rope.get("rope_type", rope.get("type")) != "longrope":
        return None
    switch: int = values["original_max_position_embeddings"]  # as `rope_problems` wants it
    return switch


def partial_problems(name: str, value: Any, family: ModelFamily) -> Iterator[str]:
    """A share of the head that is turned, where transformers' model turns another one."""
    if not _is_positive(value) or value > 1:
        yield f"{name} = {value!r} should be a number above 0, at most 1"
    elif value != 1 and not family.partial_rotary:
        yield f"{name} = {value!r} is not supported for {family.model_type}: it may be 1"


def _length_problems(
    name: str, kind: str, rope: dict[str, Any], values: Mapping[str, Any]
) -> Iterator[str]:
    """Lengths for which transformers and vLLM make other frequencies."""
    positions = values.get("max_position_embeddings")
    if kind == "yarn" and type(positions) is int and _is_positive(rope["factor"]):
        original = rope["original_max_position_embeddings"]
        if type(original) is not int or original < 1:
            yield f"{name}: original_max_position_embeddings = {original!r} should be an integer"
        elif positions > original * rope["factor"]:
            yield (
                f"{name}: factor = {rope['factor']!r} times original_max_position_embeddings = "
                f"{original} is where vLLM's table of frequencies ends, and "
                f"max_position_embeddings = {positions} is more: set it to "
                f"{int(original * rope['factor'])}"
            )
    if kind == "longrope":
        outer = values.get("original_max_position_embeddings")
        inner = rope.get("original_max_position_embeddings", outer)
        if outer is None or inner != outer:
            yield (
                f"{name}: longrope needs original_max_position_embeddings beside {name}, where "
                f"transformers reads it; found {outer!r} there and {inner!r} in {name}"
            )


def _is_positive(value: Any) -> bool:
    return type(value) in (int, float) and value > 0
