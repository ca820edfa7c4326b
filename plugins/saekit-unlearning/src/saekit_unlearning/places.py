"""Where in a text's tokens its entity is named, and from where its answer is predicted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from saekit import UsageError
from saekit_unlearning.data import Text
from saekit_unlearning.passages import Passages, Site


@dataclass(frozen=True)
class Placed:
    """A text as tokens, up to the last one from which its answer is predicted, or whole.

    name: the position of the last token of the name.
    answer: the positions that predict the answer's tokens.
    """

    text: Text
    tokens: list[int]
    name: int
    answer: list[int]


def placed(tokenizer: Any, text: Text, *, whole: bool = False) -> Placed:
    """The text as tokens; what follows the last prediction of the answer is left out unless `whole`.

    UsageError if the tokenizer cannot say where its tokens are, or if nothing comes before the answer."""
    try:
        encoded = tokenizer(text.text, return_offsets_mapping=True, verbose=False)
    except (NotImplementedError, TypeError):
        raise UsageError(
            "the model's tokenizer cannot say which characters its tokens stand for. Load a fast one (of the library tokenizers)."
        ) from None
    spans = [tuple(span) for span in encoded["offset_mapping"]]
    name, answer = _tokens_of(spans, text.name), _tokens_of(spans, text.answer)
    if not name or not answer or answer[0] == 0:
        raise UsageError(f"the name or the answer of {text.text!r} has no token of its own that another one predicts.")
    tokens = list(encoded["input_ids"])
    return Placed(text, tokens if whole else tokens[: answer[-1]], name[-1], [position - 1 for position in answer])


def _tokens_of(spans: Sequence[tuple[int, int]], wanted: tuple[int, int]) -> list[int]:
    start, end = wanted
    return [i for i, (first, after) in enumerate(spans) if after > first and first < end and after > start]


@dataclass(frozen=True)
class Batch:
    """Some texts at the site.

    names: [n], the position of the last token of each text's name.
    predicting: [n, T], True where a token of the answer is predicted.
    """

    texts: list[Text]
    passages: Passages
    names: Tensor
    predicting: Tensor

    @property
    def at_names(self) -> Tensor:
        """Which of `passages.x` are at the end of a name: [m] bool."""
        here = torch.zeros_like(self.passages.keep)
        here[torch.arange(len(self.names), device=here.device), self.names] = True
        return here[self.passages.keep]


def batches(site: Site, texts: Sequence[Placed], size: int) -> list[Batch]:
    """The texts in the order given, `size` at a time, each recorded once. UsageError if a name ends where the SAE was not
    trained, or if a text is longer than the model's context."""
    found, context = [], site.subject.context
    for start in range(0, len(texts), size):
        chosen = texts[start : start + size]
        longest = max(len(one.tokens) for one in chosen)
        if context is not None and longest > context:
            raise UsageError(f"a text has {longest} tokens, but the model takes {context}. Shorten it.")
        (passages,) = site.passages([one.tokens for one in chosen], batch_tokens=longest * len(chosen))
        chosen = [chosen[row] for row in passages.rows.tolist()]
        device = passages.tokens.device
        names = torch.tensor([one.name for one in chosen], device=device)
        predicting = torch.zeros_like(passages.keep)
        for row, one in enumerate(chosen):
            predicting[row, one.answer] = True
        kept = passages.keep[torch.arange(len(chosen), device=device), names]
        if not bool(kept.all()):
            missed = chosen[int((~kept).nonzero()[0])].text
            raise UsageError(f"the name in {missed.text!r} ends at a position on which the SAE was not trained.")
        found.append(Batch([one.text for one in chosen], passages, names, predicting))
    return found
