"""Small random encoders in local directories, as Hugging Face saves them."""

from __future__ import annotations

from pathlib import Path

import torch

WORDS = ["red", "blue", "old", "new", "ship", "##s", "house", "sails", "stands", "the"]
SPECIAL = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
SIZE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}


def text_model(directory: Path, kind: str) -> str:
    """Save a small random encoder, "bert" or "roberta", with a tokenizer that knows `WORDS`. Gives the directory."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast, RobertaConfig, RobertaForMaskedLM

    vocabulary = {token: i for i, token in enumerate([*SPECIAL.values(), *WORDS])}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", vocabulary["[CLS]"]), ("[SEP]", vocabulary["[SEP]"])]
    )
    torch.manual_seed(0)
    options = {**SIZE, "vocab_size": len(vocabulary), "max_position_embeddings": 14, "initializer_range": 0.5}
    if kind == "bert":
        network = BertModel(BertConfig(**options))
    else:  # as it was saved with its head, and padding has a position
        network = RobertaForMaskedLM(RobertaConfig(**options, pad_token_id=0))
    network.save_pretrained(directory)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **SPECIAL).save_pretrained(directory)
    return str(directory)
