"""What the model answers, with or without an edit, and what a judge says of the answers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from saekit import OptionError, Subject, UsageError, hook_points, named_function, seeded
from saekit_attribution.ablate.control_latents import batch_of
from saekit_attribution.labelled_data.samples import Sample

Tokens = tuple[int, ...]
Judge = Callable[[str, str, str], str]
"""From a prompt, a response and the template type to the name of a class."""


def organism_judge(prompt: str, response: str, template_type: str) -> str:
    """The lexicon of the organism's planted behaviour: like, dislike, neutral or other."""
    from saekit.organism import classify

    return classify(response)


def load_judge(name: str) -> Judge:
    """The function that "module:function" names. UsageError where there is none."""
    return named_function(name, "judge", "(prompt, response, template_type)")


def judged(judge: Judge, prompts: Sequence[str], responses: Sequence[str], template_type: str) -> list[str]:
    """The class of each response. UsageError where the judge gives something else than a name."""
    classes = [judge(prompt, response, template_type) for prompt, response in zip(prompts, responses, strict=True)]
    for name in classes:
        if not isinstance(name, str):
            raise OptionError("judge", f"it gave {name!r}. Return the name of a class as text.")
    return classes


def share_of(classes: Sequence[str], name: str) -> float:
    """The share of answers in the class; 0 where there are none."""
    return Counter(classes)[name] / len(classes) if classes else 0.0


def commonest(classes: Sequence[str]) -> str:
    """The most frequent class, of equals the first by name. ValueError where there is none."""
    return min(Counter(classes).items(), key=lambda item: (-item[1], item[0]))[0]


@torch.no_grad()
def answers(
    subject: Subject,
    prompts: Sequence[Tokens],
    edit: AbstractContextManager[Any] | None = None,
    *,
    max_new_tokens: int,
    batch_tokens: int = 8192,
) -> list[str]:
    """Greedy answers to prompts, in their order, stripped of white space and special tokens.

    edit: an attachment, not yet entered."""
    with subject.lock, edit or nullcontext():
        made = _generated(subject, prompts, max_new_tokens, batch_tokens, {"do_sample": False})
    return [text.strip() for text in subject.tokenizer.batch_decode(made, skip_special_tokens=True)]


@torch.no_grad()
def drawn_answers(
    subject: Subject, prompts: Sequence[Tokens], n: int, seed: int, *, batch_tokens: int = 8192
) -> list[Tokens]:
    """`n` tokens drawn after each prompt from the model's whole distribution, the same for the same seed."""
    how = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_new_tokens": n}
    with subject.lock, seeded(seed, subject.device):
        return _generated(subject, prompts, n, batch_tokens, how)


def _generated(
    subject: Subject, prompts: Sequence[Tokens], new: int, batch_tokens: int, how: dict[str, Any]
) -> list[Tokens]:
    """The tokens that follow each prompt. Prompts of one length make a batch, so that nothing is padded."""
    model: Any = subject.model
    if hook_points(model) or not callable(getattr(model, "generate", None)):
        raise UsageError(
            f"hook point {subject.site.name!r}: {type(model).__name__} cannot generate with an edit here. "
            "Name the hook point as the plain model has it, for example blocks.2.hook_out."
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
    subject: Subject, samples: Sequence[Sample], edit: AbstractContextManager[Any] | None = None
) -> tuple[float, float, float]:
    """What the model prefers where the answers part, without generating: (mean logit(target) - logit(base), the share of
    samples in which that is above zero, the share in which the base token is the likeliest of all)."""
    lengths: dict[int, list[Sample]] = {}
    for sample in samples:
        lengths.setdefault(len(sample.tokens), []).append(sample)
    margins, likeliest = [], 0
    with subject.lock, edit or nullcontext():
        for some in lengths.values():
            logits = subject.logits(batch_of([s.tokens for s in some], skip_first=False))[:, -1].float()
            pairs = torch.tensor([(s.target, s.base) for s in some], device=logits.device)  # [n, 2]
            both = logits.gather(1, pairs)
            margins += (both[:, 0] - both[:, 1]).tolist()
            likeliest += int((logits.argmax(1) == pairs[:, 1]).sum())
    count = len(margins)
    if not count:
        return 0.0, 0.0, 0.0
    return sum(margins) / count, sum(m > 0 for m in margins) / count, likeliest / count
