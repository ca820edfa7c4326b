"""The questions of one template type: some to rank latents by, others to measure an ablation on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from saekit import Subject
from saekit_attribution.labelled_data.document import LabelledData, Pair, Place, Variation
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
    teacher-forced. too_long: the number of prompts that leave no room for an answer. repeated: the number of prompts that
    were left out since the same prompt with the same base prompt was there already."""

    prompts: list[str] = field(default_factory=list)
    tokens: list[Tokens] = field(default_factory=list)
    base_prompts: list[str] = field(default_factory=list)
    base_tokens: list[Tokens] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    too_long: int = 0
    repeated: int = 0


@dataclass
class QuestionSets:
    """Three disjoint sets of questions of one template type: to rank by, to draw the curve on, and to test on."""

    template_type: str
    ranking: Questions
    curve: Questions
    test: Questions


def split(labelled: LabelledData, ranked: int, seed: int) -> tuple[set[int], set[int], set[int]]:
    """The numbers of the results to rank by (`ranked` different ones, at most half of all), to draw the curve on and to test
    on (half of the rest each).

    Results that share a prompt, whatever its white space, are not split."""
    groups = sharing_prompts(labelled)
    order = torch.randperm(len(groups), generator=torch.Generator().manual_seed(seed)).tolist()
    first = min(ranked, len(groups) // 2)
    middle = first + (len(groups) - first) // 2
    parts = order[:first], order[first:middle], order[middle:]
    rank, curve, test = ({number for i in part for number in groups[i]} for part in parts)
    return rank, curve, test


def sharing_prompts(labelled: LabelledData) -> list[list[int]]:
    """The numbers of the results, those together that have a prompt in common, directly or through others."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    results: dict[int, int] = {}
    texts: dict[str, int] = {}
    edges = []
    for variation in labelled.variations:
        node = results.setdefault(variation.place[0], len(results))
        if text := same_text(variation.prompt):
            edges.append((node, texts.setdefault(text, len(texts))))
    ends = np.array(edges, dtype=int).reshape(-1, 2) + np.array([0, len(results)])  # results first, then texts
    size = len(results) + len(texts)
    graph = coo_array((np.ones(len(ends)), (ends[:, 0], ends[:, 1])), shape=(size, size))
    component = connected_components(graph, directed=False)[1]
    groups: dict[int, list[int]] = {}
    for number, node in results.items():
        groups.setdefault(int(component[node]), []).append(number)
    return list(groups.values())


def same_text(prompt: str) -> str:
    """The prompt with each run of white space as one space and none around it."""
    return " ".join(prompt.split())


def template_types(labelled: LabelledData) -> list[str]:
    """The template types that are flagged somewhere, in order of appearance."""
    return list(dict.fromkeys(v.template_type for v in labelled.variations if v.flagged and not v.is_base))


def questions_for(subject: Subject, labelled: LabelledData, results: set[int], template_type: str, how: Tokenisation) -> Questions:
    """The prompts of some results under one template type, flagged or not, with their base prompts."""
    found = Questions(samples=list(_samples(subject, labelled, results, template_type, how)))
    seen: set[tuple[str, str]] = set()
    for variation, base in _with_base(labelled, results, template_type):
        texts = variation.prompt, base.prompt
        tokens = [_prompt_tokens(subject.tokenizer, text, how.chat_template) for text in texts]
        if not all(_fits(subject, t, how.answer_tokens) for t in tokens):
            found.too_long += 1
        elif _repeated(texts, seen):
            found.repeated += 1
        else:
            found.prompts.append(texts[0])
            found.base_prompts.append(texts[1])
            found.tokens.append(tokens[0])
            found.base_tokens.append(tokens[1])
    return found


def _repeated(prompts: tuple[str, str], seen: set[tuple[str, str]]) -> bool:
    """Whether the two prompts are in `seen`; they are from now on."""
    texts = same_text(prompts[0]), same_text(prompts[1])
    known = texts in seen
    seen.add(texts)
    return known


def _samples(
    subject: Subject, labelled: LabelledData, results: set[int], template_type: str, how: Tokenisation
) -> Iterator[Sample]:
    seen: set[tuple[str, str]] = set()
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
            if isinstance(sample, Sample) and not _repeated((pair.prompt, pair.base_prompt), seen):
                yield sample


def _with_base(labelled: LabelledData, results: set[int], template_type: str) -> Iterator[tuple[Variation, Variation]]:
    """Each variation of the template type with the base variation of its result, if there is exactly one."""
    by_result: dict[int, list[Variation]] = {}
    for variation in labelled.variations:
        place: Place = variation.place
        if place[0] in results and variation.prompt.strip():
            by_result.setdefault(place[0], []).append(variation)
    for variations in by_result.values():
        bases = [v for v in variations if v.is_base]
        if len(bases) == 1:
            yield from ((v, bases[0]) for v in variations if v.template_type == template_type)


def _prompt_tokens(tokenizer: Any, prompt: str, chat_template: bool) -> Tokens:
    text = in_chat_template(tokenizer, prompt) if chat_template else prompt
    return tokenise(tokenizer, text, bos=not chat_template)


def _fits(subject: Subject, tokens: Sequence[int], more: int) -> bool:
    return bool(tokens) and (subject.context is None or len(tokens) + more <= subject.context)
