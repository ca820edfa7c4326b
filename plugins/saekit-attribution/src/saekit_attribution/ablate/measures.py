"""What `ablate` measures: what the model answers with some latents ablated, against what it answered before."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import saekit
from saekit import Attachment, RunContext, TokenBatch
from saekit_attribution.ablate.answers import Preference, answers, batches_of_equal_length, preferences
from saekit_attribution.ablate.enough import Rates
from saekit_attribution.ablate.judge import NO_CLASS, Judge, commonest, judged, share_of
from saekit_attribution.ablate.questions import Questions, QuestionSets
from saekit_attribution.ablate.shares import Share
from saekit_attribution.effects.control_latents import Activity, activity
from saekit_attribution.labelled_data.teacher_forcing import Sample

if TYPE_CHECKING:
    from saekit_attribution.ablate.analyzer import Ablate

RankingName = Literal["atp", "atp_weighted", "ig", "exact", "greedy"]
TARGET = "target"
"""The class of answers, without a judge, in which the target token is likelier than the base token."""


@dataclass(frozen=True)
class Classes:
    """The class of the answer to each flagged prompt and to its base prompt, and the mean margin of the labelled answers."""

    flagged: list[str]
    base: list[str]
    margin: float


class NothingToMeasure(Exception):
    """There is nothing to measure; the message says why."""


class BehaviourMeasurement:
    """The rates of one template type under any ablation. `NothingToMeasure` if there are none to measure.

    With a judge the behaviour is the class of answers that the variations bring about. Without one it is that the target
    token is likelier than the base token where the labelled answers first differ; the class of any other answer is the token
    that is the likeliest there."""

    def __init__(self, context: RunContext, judge: Judge | None, settings: Ablate, questions: QuestionSets) -> None:
        self.settings, self.judge, self.template_type = settings, judge, questions.template_type
        self.subject, self.sae = context.source.subject, context.sae
        self._trained = self.sae.trained_positions.with_bos(self.subject.bos_token_id)
        sets = ("rank by", questions.ranking), ("draw the curve on", questions.curve), ("test on", questions.test)
        for name, some in sets:
            if not some.samples or not some.tokens:
                long = f" ({some.too_long} are too long for the model's context)" if some.too_long else ""
                raise NothingToMeasure(f"there are no flagged answers to {name}{long}")
        self._undisturbed: dict[int, Classes] = {}
        self._behaviour = TARGET if judge is None else self._risen(self.undisturbed(questions.curve))
        self._in_base = self.activity(questions.ranking.base_tokens)

    def _risen(self, found: Classes) -> str:
        """The class of answers that flagged prompts bring about: whose share is the most above that of the base prompts."""
        base = commonest(found.base)
        if set(found.flagged) == {base}:
            raise NothingToMeasure(f"the judge calls every answer {base!r}, to flagged prompts as to base prompts")
        names = sorted(set(found.flagged) - {NO_CLASS})
        rise = {name: share_of(found.flagged, name) - share_of(found.base, name) for name in names}
        if not rise or max(rise.values()) <= 0:
            raise NothingToMeasure("no class of answers is more frequent after flagged prompts than after base prompts")
        return max(names, key=rise.__getitem__)

    def undisturbed(self, questions: Questions) -> Classes:
        """The classes without an edit, found once for each set of questions."""
        if id(questions) not in self._undisturbed:
            self._undisturbed[id(questions)] = self._classes(questions, None)
        return self._undisturbed[id(questions)]

    def rates(self, questions: Questions, latents: Sequence[int]) -> Rates:
        """The rates with `latents` ablated; with an empty list, those of the undisturbed model."""
        before = self.undisturbed(questions)
        now = self._classes(questions, self.edit(latents)) if latents else before
        shown, shown_before = (found.flagged.count(self._behaviour) for found in (now, before))
        known = [i for i, name in enumerate(before.base) if name not in (NO_CLASS, self._behaviour)]
        neutral, kept = (sum(found[i] == before.base[i] for i in known) for found in (now.flagged, now.base))
        return Rates(
            rate=Share(shown, len(now.flagged)),
            remaining=Share(min(shown, shown_before), shown_before),
            neutral=Share(neutral, len(known)),
            kept=Share(kept, len(known)),
            margin=now.margin,
        )

    def at_base(self, questions: Questions) -> Share:
        """How many answers to the base prompts show the behaviour without an edit."""
        base = self.undisturbed(questions).base
        return Share(base.count(self._behaviour), len(base))

    def _classes(self, questions: Questions, edit: Attachment | None) -> Classes:
        size, samples = self.settings.batch_tokens, questions.samples
        found = preferences(self.subject, samples, edit, batch_tokens=size)
        margin = sum(one.margin for one in found) / len(found)
        if self.judge is not None:
            both = (questions.prompts, questions.tokens), (questions.base_prompts, questions.base_tokens)
            flagged, base = (self._judged(texts, tokens, edit) for texts, tokens in both)
            return Classes(flagged, base, margin)
        at_base = preferences(self.subject, [_at_base(sample) for sample in samples], edit, batch_tokens=size)
        return Classes([_by_tokens(one) for one in found], [_by_tokens(one) for one in at_base], margin)

    def answers(self, prompts: Sequence[tuple[int, ...]], edit: Attachment | None) -> list[str]:
        """Greedy answers of `max_new_tokens` tokens."""
        new, size = self.settings.max_new_tokens, self.settings.batch_tokens
        return answers(self.subject, prompts, edit, max_new_tokens=new, batch_tokens=size)

    def edit(self, latents: Sequence[int]) -> Attachment | None:
        """The edit of `latents` at every position that the SAE was trained on; None for an empty list."""
        if not latents:
            return None
        settings = self.settings
        if settings.mode == "base_mean":
            edits = {j: saekit.clamp(high=float(self._in_base.mean[j])) for j in latents}
        else:
            edits = {j: saekit.scale(settings.factor) for j in latents}
        return saekit.attach(
            self.subject.model,
            self.sae,
            self.subject.site,
            edits=edits,
            keep_error=settings.keep_error,
            positions=self._trained,
        )

    def activity(self, tokens: Sequence[tuple[int, ...]]) -> Activity:
        """How active each latent is on these prompts."""
        rows = batches_of_equal_length([len(row) for row in tokens], self.settings.batch_tokens)
        batches = (TokenBatch.of_rows([tokens[i] for i in some], self._trained) for some in rows)
        return activity(self.subject, self.sae, batches)

    def _judged(self, texts: Sequence[str], tokens: Sequence[tuple[int, ...]], edit: Attachment | None) -> list[str]:
        assert self.judge is not None
        return judged(self.judge, texts, self.answers(tokens, edit), self.template_type)


def _by_tokens(found: Preference) -> str:
    return TARGET if found.margin > 0 else str(found.likeliest)


def _at_base(sample: Sample) -> Sample:
    """The sample with its two tokens after the base prompt instead."""
    aligned = tuple(range(len(sample.base_tokens)))
    return Sample(sample.base_tokens, sample.target, sample.base, sample.base_tokens, aligned, sample.place)
