"""What every section of a config has in common."""

from __future__ import annotations

from types import NoneType
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

from rlsys.config.field_types import kinds_of, split_list


class Section(BaseModel):
    """Base of every section: unknown keys are errors, docstrings are descriptions."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False
    )

    @field_validator("*", mode="before")
    @classmethod
    def _as_meant(cls, value: Any, info: ValidationInfo) -> Any:
        """Read `none` as null and `a,b` as a list, where the field takes null or a list.

        Raises:
            ValueError: the value is a boolean, and the field does not take one.
        """
        assert info.field_name is not None
        kinds = kinds_of(cls.model_fields[info.field_name])
        if NoneType in kinds and value in ("none", "None"):
            return None
        if list in kinds and str not in kinds and isinstance(value, str):
            return split_list(value)
        if isinstance(value, bool) and bool not in kinds:
            raise ValueError("should not be true or false; quote it if it is a text")
        return value

    def shown(self, name: str) -> str:
        """The value of a field for an error: users look in vain for one that they did not write."""
        default = "" if name in self.model_fields_set else " (the default)"
        return f"{getattr(self, name)}{default}"


NonEmptyText = Annotated[str, Field(min_length=1)]
