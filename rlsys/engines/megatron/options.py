"""megatron-core's configs: rlsys's own options, and those that policy.megatron_kwargs passes on."""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar

import torch

from rlsys.config import PolicyConfig
from rlsys.library_options import DTYPES

Options = TypeVar("Options")


def megatron_config(cls: type[Options], own: dict[str, Any], policy: PolicyConfig) -> Options:
    """A config of megatron-core: `own` options, and those passed through that `cls` has.

    An option that several classes have goes to each of them. `rlsys.config.passed_through` has
    refused what must stay as it is in `own`.
    """
    passed = {}
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        if field.name in policy.megatron_kwargs:
            value = policy.megatron_kwargs[field.name]
            is_dtype = "dtype" in str(field.type) and value in DTYPES
            passed[field.name] = getattr(torch, value) if is_dtype else value
    return cls(**own | passed)
