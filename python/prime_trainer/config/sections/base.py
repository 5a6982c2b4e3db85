"""What all sections have in common."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from ..bounds import Bounded


class Section(Bounded, BaseModel):
    model_config = ConfigDict(extra="forbid", validate_default=True, use_attribute_docstrings=True)
