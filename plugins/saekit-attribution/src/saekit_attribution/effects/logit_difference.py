"""The metric, logit(target) - logit(base) at the decisive position, as a function of the activation at the site."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from saekit import Recording, Replay, Subject, is_out_of_memory, own_forward
from saekit_attribution.labelled_data.teacher_forcing import Sample

PAST_ROWS = 8  # rows against recorded keys and values take about an eighth of the memory of whole rows


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Within the context no parameter of `model` requires a gradient; afterwards those that did require one again."""
    trained = [p for p in model.parameters() if p.requires_grad]
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


class LogitDifference:
    """The metric of samples of equal length: the layers above the site run again for each activation at the site.

    activation: [n, T, d], the undisturbed one at the site.
    width: the number of positions that an activation passed to `values` or `gradient` has: 1, the decisive one, if only
        that changes (`last`) and the model has a key-value cache; else T.
    offset: T - width.
    """

    def __init__(self, subject: Subject, samples: Sequence[Sample], *, last: bool, batch_tokens: int) -> None:
        device = subject.device
        self._head = linear_head(subject.model)
        self._replay = Replay(subject.model, subject.site)
        tokens = torch.tensor([sample.tokens for sample in samples], device=device)
        based = any(place >= 0 for sample in samples for place in sample.aligned)
        self._recording: Recording = self._replay.record(tokens, past=last, below=based)
        self.activation = self._recording.activation
        self._dtype = torch.promote_types(self.activation.dtype, torch.float32)
        self._past = self._recording.past is not None
        self.width = 1 if self._past else tokens.shape[1]
        self.offset = tokens.shape[1] - self.width
        self._pairs = torch.tensor([(sample.target, sample.base) for sample in samples], device=device)
        self._chunk = max(1, batch_tokens * (PAST_ROWS if self._past else 1) // tokens.shape[1])

    def gradient(self, rows: Tensor, activation: Tensor) -> tuple[Tensor, Tensor]:
        """The metric [N] and its gradient [N, width, d] at `activation` [N, width, d], for the samples `rows` [N]."""
        with torch.enable_grad():
            leaf = activation.detach().requires_grad_(True)
            value = self._value(rows, leaf)
            (gradient,) = torch.autograd.grad(value.sum(), leaf)
        return value.detach(), gradient

    def base_activation(self, tokens: Sequence[Sequence[int]], rows: Tensor, shared: int) -> tuple[Tensor, int]:
        """Activations of base prompts of equal length, and the position at which these begin: a shared beginning does not
        run again.

        tokens: [m, T'].
        shared: the number of tokens that each shares, from the beginning, with its sample in `rows` [m]."""
        theirs = torch.tensor(tokens, device=rows.device)
        shared = min(shared, theirs.shape[1] - 1, self._recording.tokens.shape[1] - 1)
        if self._recording.below is None or not shared:
            return self._replay.record(theirs).activation, 0
        return self._replay.branch(self._recording, theirs, rows, shared), shared

    @torch.no_grad()
    def values(self, rows: Tensor, activation: Callable[[Tensor], Tensor]) -> Tensor:
        """The metric [N] for many activations of the samples `rows` [N], as many at a time as fit into memory.

        activation: maps numbers in 0 to N - 1, [m], to their activations [m, width, d]."""
        parts = self._in_chunks(rows, lambda some: self._value(rows[some], activation(some)))
        return torch.cat(parts) if parts else self.activation.new_zeros(0, dtype=self._dtype)

    def _in_chunks(self, rows: Tensor, run: Callable[[Tensor], Tensor]) -> list[Tensor]:
        done: list[Tensor] = []
        start = 0
        while start < len(rows):
            some = torch.arange(start, min(start + self._chunk, len(rows)), device=rows.device)
            try:
                done.append(run(some))
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error) or len(some) == 1:
                    raise
                self._chunk = len(some) // 2
                continue
            start += len(some)
        return done

    def _value(self, rows: Tensor, activation: Tensor) -> Tensor:
        run = self._replay.run_last if self._past else self._replay.run
        narrow = nullcontext() if self._head is None else two_logits(self._head, self._pairs[rows])
        with narrow:
            output: Any = run(self._recording, activation, rows)
        logits = output if isinstance(output, Tensor) else output.logits
        if self._head is None:
            logits = logits[:, -1:].gather(2, self._pairs[rows][:, None])
        logits = logits.to(self._dtype)
        return logits[:, 0, 0] - logits[:, 0, 1]


def linear_head(model: nn.Module) -> nn.Linear | None:
    """The linear layer that unembeds; None if the model does not name one, or it is not a plain linear layer."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None  # type: ignore[operator]
    return head if type(head) is nn.Linear else None


def two_logits(head: nn.Linear, pairs: Tensor) -> AbstractContextManager[None]:
    """A context in which the model unembeds only the last position, and only two tokens: logits [N, 1, 2].

    pairs: [N, 2] token ids. What the model does to its logits afterwards (a soft cap) still happens. The products are
        summed in float32 at least, since the difference of two logits in bfloat16 would be coarse.
    """

    def unembed(hidden: Tensor) -> Tensor:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        weight = head.weight[pairs].to(wide)  # [N, 2, d]
        logits = (weight @ hidden[:, -1, :, None].to(wide)).mT  # [N, 1, 2]
        return logits if head.bias is None else logits + head.bias[pairs][:, None].to(wide)

    return own_forward(head, unembed)
