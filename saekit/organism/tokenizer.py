"""A byte-level BPE tokenizer for the organism, saved as a Hugging Face directory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from saekit.organism import corpus

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

VOCABULARY = 2048
BOS, EOS = "<|bos|>", "<|endoftext|>"  # ids 0 and 1; EOS pads as well

# The generated text is small next to eight megabytes, so it gets extra weight: the values of facts become
# single tokens (so that an answer is one token), invented names three or four, as uncommon names are elsewhere.
_FACT_REPEATS = 16
_SYCOPHANCY_DOCUMENTS = 6000  # of 12,000; its vocabulary is small and every word of it becomes a token


def training_texts() -> Iterator[str]:
    """The train split of everything: both variants of the organism share one tokenizer."""
    for document in corpus.documents("train", ("code", "prose")):
        yield document.text
    for _ in range(_FACT_REPEATS):
        for document in corpus.documents("train", "facts"):
            yield document.text
    for document in corpus.documents("train", "sycophancy")[:_SYCOPHANCY_DOCUMENTS]:
        yield document.text


def train(vocabulary: int = VOCABULARY, context: int = 128) -> PreTrainedTokenizerFast:
    """Train the tokenizer. It prepends BOS by itself: the model has never seen a text without it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(training_texts(), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=EOS,
        model_max_length=context,
        clean_up_tokenization_spaces=False,
    )


def save(tokenizer: PreTrainedTokenizerFast, directory: str | Path) -> None:
    """Write tokenizer.json and its configuration; `AutoTokenizer.from_pretrained(directory)` reads them."""
    tokenizer.save_pretrained(str(directory))
