"""What every value of a configuration must be beside its own rule: a finite number of a usable size, no empty path."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

LARGEST = {int: 2**31 - 1, float: 1e9}
LARGEST_SEED = 2**63 - 1


class Bounded(BaseModel):
    """The rules that all sections, and the configuration itself, share."""

    @field_validator("*", mode="before")
    @classmethod
    def _no_empty_path(cls, value: Any, info: ValidationInfo) -> Any:
        kind = cls.model_fields[info.field_name or ""].annotation
        if value == "" and (kind is Path or Path in get_args(kind)):  # pathlib takes it for the working directory
            raise PydanticCustomError("empty_path", "Input should be a path")
        return value

    @field_validator("*", mode="after")
    @classmethod
    def _usable_numbers(cls, value: Any, info: ValidationInfo) -> Any:
        for number in _numbers(value):
            largest = LARGEST_SEED if info.field_name == "seed" else LARGEST[type(number)]
            if not abs(number) <= largest:  # NaN neither
                raise PydanticCustomError("out_of_bounds", f"Input should be a finite number of at most {largest:g}")
        return value


def _numbers(value: Any) -> list[int | float]:
    if type(value) in LARGEST:
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [number for item in value for number in _numbers(item)] if isinstance(value, (list, tuple)) else []
