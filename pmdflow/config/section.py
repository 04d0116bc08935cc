"""What the sections of a configuration share."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

PositiveInt = Annotated[int, Field(gt=0)]
NonNegativeInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]

BYTES_PER_TOKEN = 8
"""Bytes of one generated token in the store: an int32 id and a float32 log-prob."""


class Section(BaseModel):
    """Settings shared by all sections."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)
