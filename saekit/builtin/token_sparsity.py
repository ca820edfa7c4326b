"""The metric `token_sparsity`: sparsity and fidelity for each class of tokens."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from saekit.builtin.metrics import ROUNDING, Summed
from saekit.runner.context import RunContext
from saekit.training.loss_input import Step

CLASSES: dict[str, str] = {
    "word_initial": "tokens that begin with a space and hold letters",
    "continuation": "tokens that continue a word, or have no space before them",
    "digits": "tokens of digits",
    "punctuation": "tokens without letters or digits",
    "whitespace": "tokens of whitespace alone",
    "special": "BOS, EOS and the other special tokens",
}
"""The classes, and what belongs to each."""
_NUMBERS = {name: number for number, name in enumerate(CLASSES)}


class TokenSparsity(Summed):
    """L0 and explained variance on each class of tokens: word-initial, continuation, digits, punctuation, whitespace, special.

    The class follows from the token's text alone, so the first word of a text, which has no space before it, counts as
    a continuation. Explained variance is 1 - (squared error) / (squared deviation from the mean of all activations),
    both summed over the class, so that the classes' variances add up to the whole.
    """

    meanings: ClassVar[dict[str, str]] = {
        **{f"l0_{name}": f"latents active on an activation, on average: {what}" for name, what in CLASSES.items()},
        **{
            f"explained_variance_{name}": f"share of the variance that is kept: {what}"
            for name, what in CLASSES.items()
        },
        **{f"share_{name}": f"share of the activations: {what}" for name, what in CLASSES.items()},
    }
    undefined: ClassVar[dict[str, str]] = {
        f"{value}_{name}": f"there are no {what}, or all their activations are the mean"
        for name, what in CLASSES.items()
        for value in ("l0", "explained_variance")
    }
    rows: Tensor
    active: Tensor
    error: Tensor
    square: Tensor
    total: Tensor

    def __init__(self) -> None:
        super().__init__()
        n = len(CLASSES)
        self.sums(rows=n, active=n, error=n, square=n, total=0)
        self._known: dict[int, int] = {}  # class of each token id seen so far

    def prepare(self, context: RunContext) -> None:
        """Take the tokens' texts from the source."""
        self._strings = context.source.token_strings
        self._special = set(getattr(context.source, "special_tokens", ()))

    def update(self, step: Step) -> None:
        """Take in one batch."""
        assert step.tokens is not None  # promised by the need `tokens`
        of_row = self._classes(step.tokens.cpu())  # [batch]
        target, error = step.target.double().cpu(), step.error.double().square().sum(1).cpu()
        belongs = torch.nn.functional.one_hot(of_row, len(CLASSES)).double().T  # [classes, batch]
        self.add(
            rows=belongs.sum(1),
            active=belongs @ step.code.count().double().cpu(),
            error=belongs @ error,
            square=belongs @ target.square().sum(1),
            total=belongs @ target,  # [classes, d_out]
        )

    def compute(self) -> dict[str, float | None]:
        """l0_CLASS, explained_variance_CLASS and share_CLASS; the first two are None for a class that did not occur, and
        all if nothing was measured."""
        if not self.rows.any():
            return dict.fromkeys(self.meanings)
        mean = self.total.sum(0) / self.rows.sum()  # [d_out]
        spread = self.square - 2 * self.total @ mean + self.rows * mean.square().sum()  # [classes]
        found: dict[str, float | None] = {}
        for name, c in _NUMBERS.items():
            n = float(self.rows[c])
            found[f"l0_{name}"] = float(self.active[c]) / n if n else None
            found[f"explained_variance_{name}"] = (
                1.0 - float(self.error[c] / spread[c]) if n and spread[c] > ROUNDING * self.square[c] else None
            )
            found[f"share_{name}"] = n / float(self.rows.sum())
        return found

    def _classes(self, tokens: Tensor) -> Tensor:
        """The class of each token: [n] ids -> [n]."""
        ids, inverse = tokens.unique(return_inverse=True)
        new = [token for token in ids.tolist() if token not in self._known]
        if new:
            for token, text in zip(new, self._strings(torch.tensor(new)), strict=True):
                self._known[token] = _NUMBERS["special" if token in self._special else class_of(text)]
        return torch.tensor([self._known[token] for token in ids.tolist()])[inverse]


def class_of(text: str) -> str:
    """The class of a token by its text.

    >>> [class_of(t) for t in (" the", "ing", "12", " 7", "),", "  ", "\\n", " don't", "_")]
    ['word_initial', 'continuation', 'digits', 'digits', 'punctuation', 'whitespace', 'whitespace', 'word_initial', 'punctuation']
    """
    inside = text.strip()
    if not inside:
        return "whitespace"
    if inside.isdigit():
        return "digits"
    if not any(character.isalnum() or character == "\ufffd" for character in inside):  # the latter: part of a character
        return "punctuation"
    return "word_initial" if text[0].isspace() else "continuation"
