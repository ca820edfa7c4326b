"""What is asked of one template type: samples to rank latents by, and other questions to measure them on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from saekit import Subject
from saekit_attribution.labelled_data.document import BASE, Labelled, Pair, Place, Variation
from saekit_attribution.labelled_data.samples import Sample
from saekit_attribution.labelled_data.teacher_forcing import prepare, templated, tokenised

Tokens = tuple[int, ...]


@dataclass(frozen=True)
class Reading:
    """How texts become tokens; see the options of the same names. room: tokens that an answer takes."""

    joiner: str | None
    chat_template: bool
    max_tokens_to_check: int
    room: int


@dataclass
class Asked:
    """Questions to measure on. prompts, base_prompts: texts, with their tokens in the same order. samples: the flagged
    answers among them, teacher-forced. too_long: how many had no room for an answer."""

    prompts: list[str] = field(default_factory=list)
    tokens: list[Tokens] = field(default_factory=list)
    base_prompts: list[str] = field(default_factory=list)
    base_tokens: list[Tokens] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    too_long: int = 0


@dataclass
class Case:
    """One template type. ranked: to rank by. curve, test: to measure on, disjoint from these and each other."""

    template_type: str
    ranked: Asked
    curve: Asked
    test: Asked


def split(labelled: Labelled, ranked: int, seed: int) -> tuple[set[int], set[int], set[int]]:
    """Numbers of results to rank by (`ranked`, at most half of all), to draw the curve on, and to test on (half each of
    the rest)."""
    numbers = sorted({v.place[0] for v in labelled.variations})
    order = torch.randperm(len(numbers), generator=torch.Generator().manual_seed(seed)).tolist()
    shuffled = [numbers[i] for i in order]
    first = min(ranked, len(numbers) // 2)
    middle = first + (len(numbers) - first) // 2
    return set(shuffled[:first]), set(shuffled[first:middle]), set(shuffled[middle:])


def template_types(labelled: Labelled) -> list[str]:
    """Those that are flagged somewhere, in the order in which they come."""
    return list(dict.fromkeys(v.template_type for v in labelled.variations if v.flagged and v.template_type != BASE))


def asked(subject: Subject, labelled: Labelled, results: set[int], template_type: str, reading: Reading) -> Asked:
    """The prompts of some results under one template type, flagged or not, with their base prompts."""
    found = Asked(samples=list(_samples(subject, labelled, results, template_type, reading)))
    for variation, base in _with_base(labelled, results, template_type):
        texts = [v.prompt for v in (variation, base)]
        tokens = [_prompt_tokens(subject.tokenizer, text, reading.chat_template) for text in texts]
        if not all(_fits(subject, t, reading.room) for t in tokens):
            found.too_long += 1
            continue
        found.prompts.append(texts[0])
        found.base_prompts.append(texts[1])
        found.tokens.append(tokens[0])
        found.base_tokens.append(tokens[1])
    return found


def _samples(
    subject: Subject, labelled: Labelled, results: set[int], template_type: str, reading: Reading
) -> Iterator[Sample]:
    for pair in labelled.pairs():
        if isinstance(pair, Pair) and pair.template_type == template_type and pair.place[0] in results:
            sample = prepare(
                pair,
                subject.tokenizer,
                subject.context,
                reading.max_tokens_to_check,
                joiner=reading.joiner,
                chat_template=reading.chat_template,
            )
            if isinstance(sample, Sample):
                yield sample


def _with_base(labelled: Labelled, results: set[int], template_type: str) -> Iterator[tuple[Variation, Variation]]:
    """Each variation of the template type with the base one of its result, where there is exactly one."""
    by_result: dict[int, list[Variation]] = {}
    for variation in labelled.variations:
        place: Place = variation.place
        if place[0] in results and variation.prompt.strip():
            by_result.setdefault(place[0], []).append(variation)
    for variations in by_result.values():
        bases = [v for v in variations if v.template_type == BASE]
        if len(bases) == 1:
            yield from ((v, bases[0]) for v in variations if v.template_type == template_type)


def _prompt_tokens(tokenizer: Any, prompt: str, chat_template: bool) -> Tokens:
    text = templated(tokenizer, prompt) if chat_template else prompt
    return tokenised(tokenizer, text, bos=not chat_template)


def _fits(subject: Subject, tokens: Sequence[int], more: int) -> bool:
    return bool(tokens) and (subject.context is None or len(tokens) + more <= subject.context)
