"""Low-rank adapters: the section `policy.lora`."""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import (
    Field,
    PositiveFloat,
    PositiveInt,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
)

from rlsys.config.field_types import PathText, check_regex
from rlsys.config.schema.section import NonEmptyText, Section


class LoraConfig(Section):
    """Low-rank adapters (LoRA, arXiv:2106.09685): the base model stays as it is."""

    rank: PositiveInt = 8
    """Rows of A, columns of B: PEFT's r."""
    alpha: PositiveFloat = 32.0
    """The adapter's output is multiplied by alpha / rank: PEFT's lora_alpha."""
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Share of the adapter's inputs that updates leave out; log-probs and evaluations leave out
    nothing."""
    target_modules: list[NonEmptyText] | str = "all-linear"
    """Linear layers with an adapter. all-linear: every one but the output head and routers. A list
    has Hugging Face's names, `[q_proj, v_proj]`, whole or their last parts; a text is a regex of
    whole names."""
    rslora: bool = False
    """Multiply by alpha / sqrt(rank) instead (arXiv:2312.03732)."""
    modules_to_save: list[NonEmptyText] = []
    """Modules that are trained whole beside the adapters, such as embed_tokens, lm_head, norm."""
    init: Literal["kaiming", "gaussian"] = "kaiming"
    """How A starts: PEFT's default (uniform, by Kaiming), or normal with a deviation of 1 / rank.
    B starts as 0."""
    path: PathText | None = None
    """Folder of the adapter to start from, as PEFT writes it: its rank, alpha and targets are taken
    over. null: new adapters."""

    @model_serializer(mode="wrap")
    def _without_the_adapters_own(self, values: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out what the adapter in `path` decides: a saved config would contradict it."""
        fields: dict[str, Any] = values(self)
        if self.path is None:
            return fields
        return {name: value for name, value in fields.items() if name in self.model_fields_set}

    @field_validator("target_modules", mode="before")
    @classmethod
    def _names_without_brackets(cls, value: Any) -> Any:
        """Read `q_proj` and `q_proj,v_proj` as names: as regexes they would match no whole name.

        Raises:
            ValueError: the value is empty, so no layer would have an adapter, or not a regex.
        """
        if value in ("", []):
            raise ValueError("names no layer: write all-linear, a list of names, or a regex")
        if value in ("all-linear", ["all-linear"]):
            return "all-linear"
        is_names = isinstance(value, str) and re.fullmatch(r"\w+( *, *\w+)*", value)
        if is_names:
            return re.findall(r"\w+", value)
        return check_regex(value) if isinstance(value, str) else value

    @field_validator("init", mode="before")
    @classmethod
    def _names_of_peft(cls, value: Any) -> Any:
        """Take PEFT's true for its default.

        Raises:
            ValueError: the value is an initialisation that changes the base model.
        """
        if value is True or value == "true":
            return "kaiming"
        if isinstance(value, str) and value.startswith(("pissa", "olora", "loftq", "corda", "eva")):
            raise ValueError(
                f"{value} is not supported: it changes the base model or reads data first, and the "
                "base of an rlsys run stays as it is. Write kaiming or gaussian"
            )
        return value
