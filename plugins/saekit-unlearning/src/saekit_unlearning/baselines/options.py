"""The types of the methods' own options, as a run file may give them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from pydantic import Field

Positive = Annotated[float, Field(gt=0)]
Weight = Annotated[float, Field(ge=0)]
Number = Annotated[int, Field(gt=0)]
Positives = Annotated[Sequence[Positive], Field(min_length=1)]
"""Each is a setting."""
Counts = Annotated[Sequence[Number], Field(min_length=1)]
"""Numbers of steps, after each of which the model is a setting."""
