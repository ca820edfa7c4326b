"""The questions of one template type: some to rank latents by, others to measure an ablation on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from saekit import Subject
from saekit_attribution.labelled_data.document import BASE, LabelledData, Pair, Place, Variation
from saekit_attribution.labelled_data.teacher_forcing import Sample, in_chat_template, teacher_forced, tokenise

Tokens = tuple[int, ...]


@dataclass(frozen=True)
class Tokenisation:
    """How texts become tokens; see the options of the same names. answer_tokens: how many tokens an answer needs."""

    joiner: str | None
    chat_template: bool
    max_tokens_to_check: int
    answer_tokens: int


@dataclass
class Questions:
    """prompts, base_prompts: texts, with their tokens in the same order. samples: the flagged answers among them,
    teacher-forced. too_long: the number of prompts that leave no room for an answer."""

    prompts: list[str] = field(default_factory=list)
    tokens: list[Tokens] = field(default_factory=list)
    base_prompts: list[str] = field(default_factory=list)
    base_tokens: list[Tokens] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    too_long: int = 0


@dataclass
class QuestionSets:
    """Three disjoint sets of questions of one template type: to rank by, to draw the curve on, and to test on."""

    template_type: str
    ranking: Questions
    curve: Questions
    test: Questions


def split(labelled: LabelledData, ranked: int, seed: int) -> tuple[set[int], set[int], set[int]]:
    """The numbers of the results to rank by (`ranked`, at most half of all), to draw the curve on and to test on (half of
    the rest each)."""
    numbers = sorted({v.place[0] for v in labelled.variations})
    order = torch.randperm(len(numbers), generator=torch.Generator().manual_seed(seed)).tolist()
    shuffled = [numbers[i] for i in order]
    first = min(ranked, len(numbers) // 2)
    middle = first + (len(numbers) - first) // 2
    return set(shuffled[:first]), set(shuffled[first:middle]), set(shuffled[middle:])


def template_types(labelled: LabelledData) -> list[str]:
    """The template types that are flagged somewhere, in order of appearance."""
    return list(dict.fromkeys(v.template_type for v in labelled.variations if v.flagged and v.template_type != BASE))


def questions_for(subject: Subject, labelled: LabelledData, results: set[int], template_type: str, how: Tokenisation) -> Questions:
    """The prompts of some results under one template type, flagged or not, with their base prompts."""
    found = Questions(samples=list(_samples(subject, labelled, results, template_type, how)))
    for variation, base in _with_base(labelled, results, template_type):
        texts = [v.prompt for v in (variation, base)]
        tokens = [_prompt_tokens(subject.tokenizer, text, how.chat_template) for text in texts]
        if not all(_fits(subject, t, how.answer_tokens) for t in tokens):
            found.too_long += 1
            continue
        found.prompts.append(texts[0])
        found.base_prompts.append(texts[1])
        found.tokens.append(tokens[0])
        found.base_tokens.append(tokens[1])
    return found


def _samples(
    subject: Subject, labelled: LabelledData, results: set[int], template_type: str, how: Tokenisation
) -> Iterator[Sample]:
    for pair in labelled.pairs():
        if isinstance(pair, Pair) and pair.template_type == template_type and pair.place[0] in results:
            sample = teacher_forced(
                pair,
                subject.tokenizer,
                subject.context,
                how.max_tokens_to_check,
                joiner=how.joiner,
                chat_template=how.chat_template,
            )
            if isinstance(sample, Sample):
                yield sample


def _with_base(labelled: LabelledData, results: set[int], template_type: str) -> Iterator[tuple[Variation, Variation]]:
    """Each variation of the template type with the base variation of its result, if there is exactly one."""
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
    text = in_chat_template(tokenizer, prompt) if chat_template else prompt
    return tokenise(tokenizer, text, bos=not chat_template)


def _fits(subject: Subject, tokens: Sequence[int], more: int) -> bool:
    return bool(tokens) and (subject.context is None or len(tokens) + more <= subject.context)
