"""Hugging Face encoders: models that read a whole text or image at once and do not write, loaded without a head."""

from __future__ import annotations

from typing import Any

from torch import nn

from saekit.activations.huggingface import check_weight_files, explained, local_directory, local_only, quiet
from saekit.errors import OptionError, UsageError


def load_encoder(model: str, hook_point: str, *, trust_remote_code: bool = False) -> tuple[nn.Module, Any, bool]:
    """A model without its head from a local directory or the hub, its tokenizer or image processor, and whether it reads images.

    UsageError for a model that is missing, broken or incomplete. Only a pooler may be missing, unless `hook_point` is in it.
    """
    from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

    directory = local_directory(model)
    if directory is not None:
        check_weight_files(directory)
    source = str(directory) if directory is not None else model
    settings: dict[str, Any] = {"trust_remote_code": trust_remote_code, "local_files_only": local_only(model, directory)}
    with quiet(), explained(source):
        network, loading = AutoModel.from_pretrained(source, output_loading_info=True, **settings)
        images = hasattr(network.config, "image_size") and not hasattr(network.config, "vocab_size")
        processor = (AutoImageProcessor if images else AutoTokenizer).from_pretrained(source, **settings)
    missing = sorted(key for key in loading["missing_keys"] if "pooler" not in key or hook_point.startswith("pooler"))
    if missing:
        raise UsageError(
            f"{model}: the weights lack {len(missing)} tensors of {type(network).__name__}, such as {missing[0]!r}. "
            "Download or save the model again, or name a hook point that does not need them."
        )
    if not images and getattr(processor, "pad_token_id", None) is None:
        raise OptionError("model", f"{model}: its tokenizer has no padding token. Set tokenizer.pad_token and save it again.")
    return network, processor, images


def token_texts(tokenizer: Any, ids: list[int]) -> list[str]:
    """Each token as readable text, with the space before it where a word begins."""
    pieces = tokenizer.convert_ids_to_tokens(ids)
    word_pieces = any(piece.startswith("##") for piece in tokenizer.get_vocab())
    special = set(tokenizer.all_special_ids)
    texts = []
    for token, piece in zip(ids, pieces, strict=True):
        if token in special:
            texts.append(piece)
        elif piece.startswith("\u2581"):  # SentencePiece
            texts.append(" " + piece[1:])
        elif word_pieces:
            texts.append(piece[2:] if piece.startswith("##") else f" {piece}")
        else:
            texts.append(tokenizer.decode([token], clean_up_tokenization_spaces=False))
    return texts
