"""The model's answers and next-token preferences, with or without an edit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from saekit import Attachment, Subject, TokenBatch, UsageError, hook_points, in_parts_that_fit, seeded
from saekit_attribution.labelled_data.teacher_forcing import Sample

Tokens = tuple[int, ...]


@dataclass(frozen=True)
class Preference:
    """margin: logit(target) - logit(base) at the first differing token. likeliest: the token with the highest logit there."""

    margin: float
    likeliest: int


@torch.no_grad()
def answers(
    subject: Subject,
    prompts: Sequence[Tokens],
    edit: Attachment | None = None,
    *,
    max_new_tokens: int,
    batch_tokens: int = 8192,
) -> list[str]:
    """Greedy answers to prompts, in their order, without surrounding white space and special tokens.

    edit: an attachment that has not been entered."""
    with subject.lock, edit or nullcontext():
        made = _generated(subject, prompts, max_new_tokens, batch_tokens, {"do_sample": False})
    return [text.strip() for text in subject.tokenizer.batch_decode(made, skip_special_tokens=True)]


@torch.no_grad()
def drawn_answers(
    subject: Subject, prompts: Sequence[Tokens], n: int, seed: int, *, batch_tokens: int = 8192
) -> list[Tokens]:
    """`n` tokens sampled after each prompt from the model's whole distribution; the seed decides them."""
    how = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_new_tokens": n}
    with subject.lock, seeded(seed, subject.device):
        return _generated(subject, prompts, n, batch_tokens, how)


def _generated(
    subject: Subject, prompts: Sequence[Tokens], new: int, batch_tokens: int, how: dict[str, Any]
) -> list[Tokens]:
    """The tokens generated after each prompt. Prompts of equal length share a batch, so that nothing is padded."""
    model: Any = subject.model
    if hook_points(model) or not callable(getattr(model, "generate", None)):
        raise UsageError(
            f"hook point {subject.site.name!r}: {type(model).__name__} cannot generate with an edit here. "
            "Use the plain model's name for the hook point, for example blocks.2.hook_out."
        )
    pad = subject.tokenizer.pad_token_id
    if pad is None:
        pad = subject.tokenizer.eos_token_id or 0

    def generated(some: Sequence[int]) -> list[tuple[int, Tokens]]:
        ids = torch.tensor([prompts[i] for i in some], device=subject.device)
        made = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            num_beams=1,
            repetition_penalty=1.0,
            max_new_tokens=new,
            pad_token_id=pad,
            **how,
        )
        return list(zip(some, (tuple(row) for row in made[:, ids.shape[1] :].tolist()), strict=True))

    found: dict[int, Tokens] = {}
    for some in batches_of_equal_length([len(tokens) for tokens in prompts], batch_tokens, more=new):
        for part in in_parts_that_fit(generated, some):
            found.update(part)
    return [found[number] for number in range(len(prompts))]


@torch.no_grad()
def preferences(
    subject: Subject, samples: Sequence[Sample], edit: Attachment | None = None, *, batch_tokens: int = 8192
) -> list[Preference]:
    """The model's preference at the first differing token of each sample, without generating."""

    def compared(some: Sequence[int]) -> list[tuple[int, Preference]]:
        rows = TokenBatch.of_rows([samples[i].tokens for i in some])
        logits = subject.logits(rows)[:, -1].float()  # [n, vocab]
        pairs = torch.tensor([(samples[i].target, samples[i].base) for i in some], device=logits.device)  # [n, 2]
        both = logits.gather(1, pairs)
        margins = (both[:, 0] - both[:, 1]).tolist()
        made = (Preference(*one) for one in zip(margins, logits.argmax(1).tolist(), strict=True))
        return list(zip(some, made, strict=True))

    found: dict[int, Preference] = {}
    with subject.lock, edit or nullcontext():
        for some in batches_of_equal_length([len(sample.tokens) for sample in samples], batch_tokens):
            for part in in_parts_that_fit(compared, some):
                found.update(part)
    return [found[number] for number in range(len(samples))]


def batches_of_equal_length(lengths: Sequence[int], batch_tokens: int, *, more: int = 0) -> Iterator[list[int]]:
    """Numbers of texts of one length, the shortest texts first: at most `batch_tokens` tokens, or a single text, at a time.

    more: tokens that will be added to each text."""
    numbers: dict[int, list[int]] = {}
    for number, length in enumerate(lengths):
        numbers.setdefault(length, []).append(number)
    for length, some in sorted(numbers.items()):
        size = max(1, batch_tokens // max(1, length + more))
        yield from (some[start : start + size] for start in range(0, len(some), size))
