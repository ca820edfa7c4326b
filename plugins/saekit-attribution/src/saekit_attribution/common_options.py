"""The types and descriptions of the options that both analyzers have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, Field

from saekit_attribution.labelled_data.document import KeyName

ORGANISM = "organism"


def _existing(data: str) -> str:
    if data != ORGANISM and not Path(data).is_file():
        raise ValueError("there is no such file. Name a JSON file of labelled data, or use 'organism'")
    return data


Data = Annotated[
    str,
    AfterValidator(_existing),
    Field(description="A file of labelled JSON, or organism: the organism's answers to arguments."),
]
KeyNames = Annotated[
    dict[KeyName, str],
    Field(description="What the keys of the labelled file are called, and under `base` the template type of base variations."),
]
MaxTokensToCheck = Annotated[
    int, Field(gt=0, description="How many tokens of the answers are searched for the first difference.")
]
Joiner = Annotated[
    str | None, Field(description="Text between prompt and answer; by default a space if there is no white space.")
]
ChatTemplate = Annotated[bool, Field(description="Put the prompt into the model's chat template.")]
Steps = Annotated[int, Field(gt=0, description="Steps of integrated gradients.")]
BatchTokens = Annotated[int, Field(gt=0, description="Tokens that go through the model at a time.")]
