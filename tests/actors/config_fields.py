"""Changes of a model's config.json: each field of its transformers class, by values of its type."""

from __future__ import annotations

import dataclasses
import types
import typing

LEFT_OUT = "left out"
"""In place of a value: config.json lacks the key, and transformers takes its default."""
_BY_TYPE = {
    bool: lambda value: [not value],
    int: lambda value: [(value or 0) + 1, 2 * (value or 4), (value or 3) // 2],
    float: lambda value: [2.0 * (value or 0.0) + 0.5, (value or 0.5) / 4],
    str: lambda value: ["gelu", "gelu_pytorch_tanh", "relu", "silu"],
}
_LAYER_TYPES = ("full_attention", "sliding_attention")
_NOT_VALUES = {"model_type", "architectures", "dtype", "transformers_version"}
"""Keys that say what the file is."""
_OTHERS = {
    "rope_theta": [50.0],
    "rope_scaling": [{"rope_type": "linear", "factor": 4.0}],
    "rope_local_base_freq": [7.0],
    "partial_rotary_factor": [0.5],
    "sliding_window_pattern": [1, 2],
    "num_local_experts": [4],
}
"""Keys of older files, which transformers reads without a field of that name."""
_ROPE = {
    "attention_factor": 1.7,
    "beta_fast": 20.0,
    "beta_slow": 2.0,
    "factor": 3.0,
    "high_freq_factor": 8.0,
    "long_factor": [2.0] * 16,
    "low_freq_factor": 2.0,
    "mscale": 0.7,
    "mscale_all_dim": 0.5,
    "original_max_position_embeddings": 24,
    "partial_rotary_factor": 0.5,
    "rope_theta": 50.0,
    "rope_type": "linear",
    "short_factor": [2.0] * 16,
    "truncate": False,
}


def changed_fields(config_class, values):
    """(key, value, config.json with it) for each change, one at a time."""
    hints = {field.name: field.type for field in dataclasses.fields(config_class)}
    fields = {key: hints.get(key) for key in (values.keys() | hints.keys()) - _NOT_VALUES}
    for key in sorted(key for key in fields if not key.startswith("_")):
        old = values.get(key)
        for new in _candidates(key, old, fields[key]):
            if new != old:
                yield key, new, values | {key: new}
        if key in values:
            yield key, LEFT_OUT, {name: value for name, value in values.items() if name != key}
    for key, news in _OTHERS.items():
        if key not in fields:
            for new in news:
                yield key, new, values | {key: new}


def older_form(values):
    """config.json as before transformers 5: rotary embeddings at its top, layers by counting.

    Windows that are switched off are there, for all layers, and wait for the switch.
    """
    values = dict(values)
    if set(values.get("layer_types") or []) <= set(_LAYER_TYPES):  # which have equal weights
        values.pop("layer_types", None)
    rope = values.pop("rope_parameters")
    if "sliding_attention" in rope:
        local, rope = rope["sliding_attention"]["rope_theta"], rope["full_attention"]
        values |= {"rope_local_base_freq": local} if local != rope["rope_theta"] else {}
    values["rope_theta"] = rope["rope_theta"]
    scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
    values["rope_scaling"] = scaling if scaling["rope_type"] != "default" else None
    if "use_sliding_window" in values:
        values |= {"sliding_window": 5, "max_window_layers": 0}
    return values


def _candidates(key, old, hint):
    kinds = _kinds(hint) or {type(old)}
    if "rope" in key and isinstance(old, dict):
        yield from _rope(old)
        return
    if key == "layer_types":
        yield from _layer_types(old)
        return
    for kind, values_of in _BY_TYPE.items():
        if kind in kinds:
            yield from values_of(old if type(old) is kind else None)
    if list in kinds:
        yield from ([0], [1], [1] * 2, [0, 1], [0] * 4)
    if types.NoneType in kinds:
        yield None


def _kinds(hint):
    """The plain types in a field's type."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return set().union(*map(_kinds, typing.get_args(hint)))
    kind = typing.get_origin(hint) or hint
    return {kind} if isinstance(kind, type) else set()


def _layer_types(old):
    old = old or [_LAYER_TYPES[0]]
    flipped = [_LAYER_TYPES[kind == _LAYER_TYPES[0]] for kind in old]
    yield from (flipped, [*old[:-1], flipped[-1]], [old[0]] * len(old))


def _rope(old):
    nested = {key: value for key, value in old.items() if isinstance(value, dict)}
    for key, entry in nested.items():
        for new in _rope(entry):
            yield old | {key: new}
    if not nested:
        yield from (old | {key: value} for key, value in _ROPE.items())
        yield from ({k: v for k, v in old.items() if k != key} for key in old)
