"""The model's answers and next-token preferences, with or without an edit."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch

from saekit import Attachment, Subject, TokenBatch, UsageError, hook_points, seeded
from saekit_attribution.labelled_data.teacher_forcing import Sample

Tokens = tuple[int, ...]


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
    lengths: dict[int, list[int]] = {}
    for number, tokens in enumerate(prompts):
        lengths.setdefault(len(tokens), []).append(number)
    found: dict[int, Tokens] = {}
    for length, numbers in sorted(lengths.items()):
        size = max(1, batch_tokens // (length + new))
        for start in range(0, len(numbers), size):
            some = numbers[start : start + size]
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
            found.update(zip(some, (tuple(row) for row in made[:, length:].tolist()), strict=True))
    return [found[number] for number in range(len(prompts))]


@torch.no_grad()
def preferences(
    subject: Subject, samples: Sequence[Sample], edit: Attachment | None = None
) -> tuple[float, float, float]:
    """The model's preference at the first differing token, without generating: (mean logit(target) - logit(base), the
    share of samples in which that is above zero, the share in which the base token is the likeliest of all)."""
    lengths: dict[int, list[Sample]] = {}
    for sample in samples:
        lengths.setdefault(len(sample.tokens), []).append(sample)
    margins, likeliest = [], 0
    with subject.lock, edit or nullcontext():
        for some in lengths.values():
            logits = subject.logits(TokenBatch.of_rows([s.tokens for s in some], keep_first=True))[:, -1].float()
            pairs = torch.tensor([(s.target, s.base) for s in some], device=logits.device)  # [n, 2]
            both = logits.gather(1, pairs)
            margins += (both[:, 0] - both[:, 1]).tolist()
            likeliest += int((logits.argmax(1) == pairs[:, 1]).sum())
    count = len(margins)
    if not count:
        return 0.0, 0.0, 0.0
    return sum(margins) / count, sum(m > 0 for m in margins) / count, likeliest / count
