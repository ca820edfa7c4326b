"""Texts that the model writes without and with a steering vector: generated in pairs from one seed, and scored."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from saekit import GeneratedPair, OptionError, Subject, TokenBatch, named_function, paired_generation
from saekit_steering.effect_curve import mean
from saekit_steering.prompts import Prompt
from saekit_steering.steering_vectors import SteeringVector
from saekit_steering.typical_tokens import TypicalTokens

BATCH = 16
"""Prompts continued at once in greedy generation; sampled texts are generated one by one, each from its own seed."""
Judge = Callable[[str, str, str], dict[str, float]]
"""Maps a prompt, the text without steering and the text with it to named numbers."""


@dataclass(frozen=True)
class Continuation:
    """The text after one prompt. vector: its number. sampling: "greedy" or "sampled". scores: of the text with the vector;
    those of the text without it have names that end in `_before`."""

    prompt: Prompt
    vector: int
    sampling: str
    pair: GeneratedPair
    scores: dict[str, float | None]


def continuations(
    subject: Subject,
    prompts: Sequence[Prompt],
    vector: SteeringVector,
    number: int,
    typical: TypicalTokens,
    judge: Judge | None,
    *,
    max_new_tokens: int,
    temperature: float,
    seed: int,
) -> list[Continuation]:
    """Greedy and sampled continuations of every prompt without and with the vector."""
    found = []
    for sampling in ("greedy", "sampled"):
        with subject.lock:
            pairs = paired_generation(
                subject.model,
                subject.tokenizer,
                [list(prompt.tokens) for prompt in prompts],
                vector.edit(subject),
                max_new_tokens=max_new_tokens,
                do_sample=sampling == "sampled",
                batch_size=BATCH,
                temperature=temperature,
                seed=seed,
            )
        for prompt, pair in zip(prompts, pairs, strict=True):
            scores = _scores(subject, prompt, pair, typical)
            if judge is not None:
                scores |= judged(judge, prompt.text, pair.before, pair.after)
            found.append(Continuation(prompt, number, sampling, pair, scores))
    return found


def _scores(subject: Subject, prompt: Prompt, pair: GeneratedPair, typical: TypicalTokens) -> dict[str, float | None]:
    scores: dict[str, float | None] = {"changed": float(pair.before_tokens != pair.after_tokens)}
    for end, tokens in (("_before", pair.before_tokens), ("", pair.after_tokens)):
        scores["concept_share" + end] = typical.share(tokens)
        scores["distinct_1" + end] = distinct(tokens, 1)
        scores["distinct_2" + end] = distinct(tokens, 2)
        scores["log_perplexity" + end] = log_perplexity(subject, prompt.tokens, tokens)
    return scores


def distinct(tokens: Sequence[int], n: int) -> float | None:
    """The share of distinct n-grams among all (Li et al. 2016): 1 if nothing is repeated; None for too short a text."""
    grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    return len(set(grams)) / len(grams) if grams else None


@torch.no_grad()
def log_perplexity(subject: Subject, prompt: Sequence[int], tokens: Sequence[int]) -> float | None:
    """The mean negative log-likelihood, in nats a token, of `tokens` after `prompt` under the unsteered model."""
    if not tokens:
        return None
    row = TokenBatch.of_rows([(*prompt, *tokens)])
    log_p = subject.logits(row)[0, len(prompt) - 1 : -1].float().log_softmax(-1)
    chosen = torch.tensor(list(tokens), device=log_p.device)
    return -float(log_p.gather(1, chosen[:, None]).double().mean())


def mean_scores(found: Sequence[Continuation], vectors: Sequence[SteeringVector]) -> list[dict[str, Any]]:
    """A row for each kind, strength and sampling: the mean of every score over the texts that have it.

    `perplexity` is the exponential of the texts' negative log-likelihoods a token, averaged over texts."""
    groups: dict[tuple[str, int, str], list[Continuation]] = {}
    for one in found:
        groups.setdefault((one.prompt.kind, one.vector, one.sampling), []).append(one)
    rows = []
    for (kind, vector, sampling), some in groups.items():
        names = dict.fromkeys(name for one in some for name in one.scores)
        means = {n: mean([v for one in some if (v := one.scores.get(n)) is not None]) for n in names}
        row: dict[str, Any] = {
            "kind": kind, "strength": vectors[vector].strength.given, "sampling": sampling, "texts": len(some),
        }  # fmt: skip
        for name, value in means.items():
            if name.startswith("log_perplexity"):
                row[name.removeprefix("log_")] = None if value is None else math.exp(min(value, 700.0))
            else:
                row[name] = value
        rows.append(row)
    return rows


def load_judge(name: str) -> Judge:
    """The function named by "module:function". UsageError if there is none."""
    return named_function(name, "judge", "(prompt, before, after)")


def judged(judge: Judge, prompt: str, before: str, after: str) -> dict[str, float | None]:
    """The judge's numbers, their names prefixed with `judge_`. UsageError if it returns anything else."""
    given = judge(prompt, before, after)
    if not isinstance(given, dict) or not all(
        isinstance(k, str) and isinstance(v, int | float) and math.isfinite(v) for k, v in given.items()
    ):
        raise OptionError("judge", f"it returned {given!r}. Return a dictionary of names and finite numbers.")
    return {f"judge_{name}": float(value) for name, value in given.items()}
