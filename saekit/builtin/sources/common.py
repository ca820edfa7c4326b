"""What the sources that read text through a language model share: their options, what can be seen early, packing."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field

from saekit.activations.harvest import ModelDtype
from saekit.activations.packing import PackedRows, TokenStore, first_token
from saekit.activations.sites import RESIDUAL
from saekit.activations.subject import Subject, peek_model
from saekit.errors import UsageError

HookPoint = Annotated[
    str, Field(description="Where to read: blocks.2.hook_out, a submodule's path, a TransformerLens name.")
]
RowsAForward = Annotated[int, Field(gt=0, description="Rows of tokens in one forward.")]
Bos = Annotated[
    bool | Literal["auto"], Field(description="Begin each row with BOS; auto: where the tokenizer has one.")
]
DropFirst = Annotated[bool, Field(description="Leave the first position of each row out (an attention sink).")]
DropSpecial = Annotated[bool, Field(description="Leave BOS, EOS and other special tokens out.")]
Dtype = Annotated[ModelDtype, Field(description="What the model computes in; bfloat16 on CUDA only.")]


def peek_site(model: str, hook_point: str, context: int) -> dict[str, Any]:
    """What config.json tells of a model and a hook point. UsageError for a block or a context that it does not have."""
    known = peek_model(model)
    found: dict[str, Any] = {"model": model, "hook_point": hook_point}
    if context > known.get("context", context):
        raise UsageError(f"context = {context}: {model} takes {known['context']} tokens at most. Lower context.")
    residual = RESIDUAL.fullmatch(hook_point)
    if residual and int(residual[1]) >= known.get("layers", int(residual[1]) + 1):
        raise UsageError(
            f"hook_point = {hook_point!r}: {model} has {known['layers']} blocks, 0 to {known['layers'] - 1}."
        )
    if residual and "hidden_size" in known:
        found["d_in"] = found["d_out"] = known["hidden_size"]
    return found


def packed(
    subject: Subject, store: TokenStore, chosen: np.ndarray, context: int, bos: bool | Literal["auto"]
) -> PackedRows:
    """The rows of the documents that are `chosen` ([D] booleans), padded with a token that the model has."""
    tokenizer = subject.tokenizer
    pad = next((t for t in (tokenizer.pad_token_id, tokenizer.eos_token_id) if t is not None), 0)
    return PackedRows(store, np.flatnonzero(chosen), context=context, bos=first_token(tokenizer, bos), pad=pad)
