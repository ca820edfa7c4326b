"""How much held-out data each metric has been given: counted where it is handed out, so that a metric need do nothing."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from saekit.wording import held_out_amounts

if TYPE_CHECKING:
    from torch import Tensor

    from saekit.activations.batch import Activations, SequenceBatch, TokenBatch
    from saekit.protocols import Source

ENOUGH = {"documents": 30, "sequences": 30, "tokens": 1000}
"""With fewer than these, a note says that a mean over them tells little of others. Of the three, what is known to be drawn
independently decides: documents; without them sequences; without those single activations."""


class HeldOutUse:
    """What one metric has been given of the held-out split.

    tokens: activations or kept positions, of the longest pass over them.
    """

    def __init__(self) -> None:
        self.tokens = 0
        self._sequences: set[int] = set()
        self._labelled: dict[tuple[int, int], int] = {}  # sequences of each batch of the second stream

    def __bool__(self) -> bool:
        return self.tokens > 0 or bool(self._labelled)

    def of_activations(self, batches: Iterable[Activations]) -> Iterator[Activations]:
        """The batches, counted as they are taken."""
        taken = 0
        for batch in batches:
            taken = self._saw(taken + len(batch), batch.sequence)
            yield batch

    def of_tokens(self, batches: Iterable[TokenBatch]) -> Iterator[TokenBatch]:
        """The rows of tokens, counted as they are taken."""
        taken = 0
        for batch in batches:
            taken = self._saw(taken + int(batch.keep.sum()), batch.sequence)
            yield batch

    def of_sequences(self, batch: SequenceBatch, n: int, number: int) -> SequenceBatch:
        """Batch `number` of `n` labelled sequences, counted once."""
        if (n, number) not in self._labelled:
            self.tokens += int(batch.mask.sum())
            self._labelled[n, number] = len(batch)
        return batch

    def merge(self, other: HeldOutUse) -> None:
        """Count what `other` was given as given here too."""
        self.tokens = max(self.tokens, other.tokens)
        self._sequences |= other._sequences
        self._labelled |= other._labelled

    def counts(self, source: Source) -> dict[str, int | None]:
        """`tokens`, `sequences` and `documents`; None for what the source does not tell apart."""
        import torch

        documents = None
        if self._sequences and hasattr(source, "documents"):
            held = source.documents(torch.tensor(sorted(self._sequences)))  # [n, 2]
            documents = len({n for first, last in set(map(tuple, held.tolist())) for n in range(first, last + 1)})
        sequences = max(len(self._sequences), sum(self._labelled.values()))
        return {"tokens": self.tokens, "sequences": sequences or None, "documents": documents}

    def _saw(self, taken: int, sequence: Tensor | None) -> int:
        self.tokens = max(self.tokens, taken)
        if sequence is not None:
            self._sequences.update(sequence.unique().tolist())
        return taken


class CountedSource:
    """A source as a metric is given it: the same in everything, and what is held out is counted in `use`."""

    def __init__(self, source: Source, use: HeldOutUse) -> None:
        self.wrapped, self.use = source, use
        for name in ("token_batches", "sequences"):  # optional, so they must be absent where the source has none
            if hasattr(source, name):
                setattr(self, name, getattr(self, f"_{name}"))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.wrapped, name)

    def blocks(self, split: str, **options: Any) -> Iterator[Activations]:
        """The source's blocks."""
        blocks = self.wrapped.blocks(split, **options)
        return self.use.of_activations(blocks) if split == "held_out" else blocks

    def _token_batches(self, split: str, *, rows: int) -> Iterator[TokenBatch]:
        batches = self.wrapped.token_batches(split, rows=rows)
        return self.use.of_tokens(batches) if split == "held_out" else batches

    def _sequences(self, split: str, n: int, seed: int, number: int) -> SequenceBatch:
        batch = self.wrapped.sequences(split, n, seed, number)
        return self.use.of_sequences(batch, n, number) if split == "held_out" else batch


def notes(counts: dict[str, dict[str, int | None]]) -> list[str]:
    """What should be said of the counts of each metric: which were given too little."""
    few = {}
    for name, of in counts.items():
        unit = next((unit for unit in ("documents", "sequences") if of[unit] is not None), "tokens")
        if (of[unit] or 0) < ENOUGH[unit]:
            few[name] = of
    if not few:
        return []
    groups = "; ".join(f"{amount} for {', '.join(names)}" for names, amount in held_out_amounts(few))
    return [f"Measured on little held-out data, so other data may give other values: {groups}. Hold out more, or raise tokens."]
