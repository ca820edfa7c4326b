"""What the sources that read text through a language model share: their options, what can be seen early, packing."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field

from saekit.activations.harvest import ModelDtype
from saekit.activations.huggingface import model_digest, peek_model
from saekit.activations.packing import PackedRows, TokenStore, first_token
from saekit.activations.sites import RESIDUAL
from saekit.activations.subject import Subject
from saekit.errors import OptionError
from saekit.files import sha256_of

HookPoint = Annotated[
    str, Field(description="Where to read: blocks.2.hook_out, a submodule's path, a TransformerLens name.")
]
TargetHookPoint = Annotated[
    str | None, Field(description="For a transcoder: where to read what is rebuilt from the hook point.")
]
RowsAForward = Annotated[int, Field(gt=0, description="Rows of tokens in one forward.")]
Bos = Annotated[
    bool | Literal["auto"], Field(description="Begin each row with BOS; auto: where the tokenizer has one.")
]
DropFirst = Annotated[bool, Field(description="Leave the first position of each row out (an attention sink).")]
DropSpecial = Annotated[bool, Field(description="Leave BOS, EOS and other special tokens out.")]
Dtype = Annotated[ModelDtype, Field(description="What the model computes in; bfloat16 on CUDA only.")]


def peek_site(model: str, hook_point: str, target: str | None, context: int) -> dict[str, Any]:
    """What config.json tells of a model and a hook point (or two). UsageError for a block or a context that it lacks."""
    known = peek_model(model)
    found: dict[str, Any] = {"model": model, "hook_point": hook_point}
    if context > known.get("context", context):
        raise OptionError("context", f"{context}, but {model} takes {known['context']} tokens at most. Lower context.")
    if target is not None:
        found["target_hook_point"] = target
    for option, name, width in (
        ("hook_point", hook_point, "d_in"),
        ("target_hook_point", target or hook_point, "d_out"),
    ):
        residual = RESIDUAL.fullmatch(name)
        if residual and int(residual[1]) >= known.get("layers", int(residual[1]) + 1):
            raise OptionError(
                option, f"{name!r}, but {model} has {known['layers']} blocks, 0 to {known['layers'] - 1}."
            )
        if residual and "hidden_size" in known:
            found[width] = known["hidden_size"]
    return found


def packed(
    subject: Subject, store: TokenStore, chosen: np.ndarray, context: int, bos: bool | Literal["auto"]
) -> PackedRows:
    """The rows of the documents that are `chosen` ([D] booleans), padded with a token that the model has."""
    tokenizer = subject.tokenizer
    first, pad = first_token(tokenizer, bos), padding(tokenizer)
    return PackedRows(store, np.flatnonzero(chosen), context=context, bos=first, pad=pad)


def fingerprint(source: Any, model: str, files: list[Path] | None, options: tuple[str, ...]) -> dict[str, Any] | None:
    """`contracts.Source.fingerprint` of a source: hashes of the model's and the data's files, and some of its options.

    None where the files are not known: for a model that was never downloaded, or (files is None) a data set of the hub."""
    digest = model_digest(model)
    if digest is None or files is None:
        return None
    options = ("hook_point", "target_hook_point", "context", "drop_first", "drop_special", "model_dtype", *options)
    return {
        "model_digest": digest,
        "data_digest": {path.name: sha256_of(path) for path in files},
        **{name: getattr(source, name) for name in options},
    }


def padding(tokenizer: Any) -> int:
    """A token that the model has, to fill rows with; its positions are masked."""
    return next((t for t in (tokenizer.pad_token_id, tokenizer.eos_token_id) if t is not None), 0)
