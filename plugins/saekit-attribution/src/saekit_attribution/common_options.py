"""Options that both analyzers have, typed and described once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, Field

ORGANISM = "organism"


def _existing(data: str) -> str:
    if data != ORGANISM and not Path(data).is_file():
        raise ValueError("there is no such file. Name a file of labelled data in JSON, or use 'organism'")
    return data


Data = Annotated[
    str,
    AfterValidator(_existing),
    Field(description="Labelled JSON, or organism: the organism's own answers to arguments."),
]
MaxTokensToCheck = Annotated[
    int, Field(gt=0, description="Tokens of the answers among which the first different one is sought.")
]
Joiner = Annotated[
    str | None, Field(description="Between prompt and answer; by default a space where there is no white space.")
]
ChatTemplate = Annotated[bool, Field(description="Put the prompt into the model's chat template.")]
Steps = Annotated[int, Field(gt=0, description="Steps of integrated gradients.")]
BatchTokens = Annotated[int, Field(gt=0, description="Tokens that go through the model at a time.")]
