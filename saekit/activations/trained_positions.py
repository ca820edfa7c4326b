"""Which positions of a text an SAE was trained on: the one rule that whatever edits, splices, scores or counts goes by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class TrainedPositions:
    """The positions that an SAE was trained on. On the others it says nothing, so they are not edited, no reconstruction takes
    their place, and their latents do not count.

    first: whether that includes the first position of a text. None: not known, as of an SAE of another library; then the
        position of a beginning-of-text token is left out where the model's is known, because SAEs are seldom trained on it.
    left_out: ids of tokens at whose positions it was not trained either.
    bos: the beginning-of-text token of the model in question, if it has one; of the model, so it is not recorded.
    """

    first: bool | None = None
    left_out: tuple[int, ...] = ()
    bos: int | None = None

    @property
    def everywhere(self) -> bool:
        """Whether no position is known to be left out."""
        return not self.left_out and (self.first is True or (self.first is None and self.bos is None))

    def with_bos(self, bos: int | None) -> TrainedPositions:
        """The same for a model whose beginning-of-text token is `bos`; None if it has none."""
        return replace(self, bos=bos)

    def among(self, positions: Tensor, tokens: Tensor | None) -> Tensor:
        """Which positions of texts it was trained on: [n, T] booleans, False at padding.

        positions: [n, T], counted from the first token of each text; negative at padding.
        tokens: [n, T]; None if they are not known, and then only `first` counts."""
        import torch

        found = positions >= (1 if self.first is False else 0)
        if tokens is not None:
            tokens = tokens.to(found.device)
            if self.first is None and self.bos is not None:
                found &= (positions > 0) | (tokens != self.bos)
            if self.left_out:
                found &= ~torch.isin(tokens, torch.tensor(self.left_out, device=found.device))
        return found

    def in_rows(self, tokens: Tensor) -> Tensor:
        """The same for rows that begin with their first token: tokens [n, T] -> [n, T]."""
        import torch

        return self.among(torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens), tokens)

    def to_dict(self) -> dict[str, Any]:
        """As `sae/cfg.json` has it."""
        return {"first": self.first, "left_out": list(self.left_out)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainedPositions:
        """From what `to_dict` gave."""
        return cls(values.get("first"), tuple(values.get("left_out", ())))

    @classmethod
    def of_source(cls, identity: Mapping[str, Any], special_tokens: Sequence[int]) -> TrainedPositions:
        """The positions that a source gives, by `drop_first` and `drop_special` in its identity, and its special tokens."""
        special = tuple(special_tokens) if identity.get("drop_special") else ()
        return cls(not identity.get("drop_first", False), special)
