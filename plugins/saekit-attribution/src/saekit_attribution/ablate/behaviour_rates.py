"""What of a template type's questions is answered how, with some latents ablated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import saekit
from saekit import Attachment, RunContext
from saekit_attribution.ablate.answers import Judge, answers, commonest, judged, preferences, share_of
from saekit_attribution.ablate.control_latents import Activity, activity, batch_of
from saekit_attribution.ablate.questions import Asked, Case
from saekit_attribution.labelled_data.samples import Sample

if TYPE_CHECKING:
    from saekit_attribution.ablate import Ablate

RankingName = Literal["atp", "atp_weighted", "ig", "exact", "greedy"]
RATE, NEUTRAL, KEPT = 0.10, 0.90, 0.95
"""A set of latents is enough where the rate is at most RATE, the base answer is given by at least NEUTRAL, and prompts
without a preference keep theirs in at least KEPT."""


@dataclass(frozen=True)
class Rates:
    """Shares of the questions. rate: the answer follows the preference. neutral: it is the one given without any. kept:
    the prompt without a preference still gets that one. Without a judge, by the two tokens at which the answers part:
    rate, the target's is the likelier; neutral and kept, the base's is the likeliest of all.
    margin: mean logit(target) - logit(base). target_preferred: the share in which it is above zero."""

    rate: float
    neutral: float
    kept: float
    margin: float
    target_preferred: float

    @property
    def enough(self) -> bool:
        return self.rate <= RATE and self.neutral >= NEUTRAL and self.kept >= KEPT

    @property
    def worth(self) -> float:
        return self.neutral + min(self.kept, KEPT) - self.rate


class Nothing(Exception):
    """There is nothing to measure; the message says why."""


class Asking:
    """One template type: its questions, the judge's classes, and the edits. `Nothing` where nothing can be measured."""

    def __init__(self, context: RunContext, judge: Judge | None, settings: Ablate, case: Case) -> None:
        self.settings, self.judge, self.case = settings, judge, case
        self.subject, self.sae = context.source.subject, context.sae
        self.skip_first = self.subject.bos_token_id is not None
        for name, questions in (("rank by", case.ranked), ("draw the curve on", case.curve), ("test on", case.test)):
            if not questions.samples or not questions.tokens:
                long = f" ({questions.too_long} are too long for the model's context)" if questions.too_long else ""
                raise Nothing(f"there are no flagged answers to {name}{long}")
        self._flagged, self._base = ("", "") if judge is None else self._classes(case.curve)
        self._in_base = self.activity(case.ranked.base_tokens)

    def _classes(self, questions: Asked) -> tuple[str, str]:
        """The class that the preference brings about, and that of the answers without one."""
        told, plain = (self._judged(texts, tokens, None) for texts, tokens in _both(questions))
        base = commonest(plain)
        names = sorted(set(told) - {base})
        if not names:
            raise Nothing(f"to the judge every answer is {base!r}, with a preference as without one")
        return max(names, key=lambda name: share_of(told, name) - share_of(plain, name)), base

    def rates(self, questions: Asked, latents: Sequence[int]) -> Rates:
        """What becomes of the answers with the latents ablated; without any, as they are."""
        edit = self.edit(latents)
        margin, preferred, likeliest = preferences(self.subject, questions.samples, edit)
        if self.judge is None:
            at_base = [_at_base(sample) for sample in questions.samples]
            return Rates(preferred, likeliest, preferences(self.subject, at_base, edit)[2], margin, preferred)
        told, plain = (self._judged(texts, tokens, edit) for texts, tokens in _both(questions))
        rates = share_of(told, self._flagged), share_of(told, self._base), share_of(plain, self._base)
        return Rates(*rates, margin, preferred)

    def answers(self, prompts: Sequence[tuple[int, ...]], edit: Attachment | None) -> list[str]:
        """Greedy answers of as many tokens as the options say."""
        new, size = self.settings.max_new_tokens, self.settings.batch_tokens
        return answers(self.subject, prompts, edit, max_new_tokens=new, batch_tokens=size)

    def edit(self, latents: Sequence[int]) -> Attachment | None:
        """The edit of some latents at every position but the one that begins the text; None of none."""
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
            positions=slice(1, None) if self.skip_first else None,
        )

    def activity(self, tokens: Sequence[tuple[int, ...]]) -> Activity:
        """How active the latents are on prompts."""
        rows = ([t for t in tokens if len(t) == n] for n in sorted({len(t) for t in tokens}))
        return activity(self.subject, self.sae, (batch_of(r, skip_first=self.skip_first) for r in rows))

    def _judged(self, texts: Sequence[str], tokens: Sequence[tuple[int, ...]], edit: Attachment | None) -> list[str]:
        assert self.judge is not None
        return judged(self.judge, texts, self.answers(tokens, edit), self.case.template_type)


def _both(questions: Asked) -> tuple[tuple[list[str], list[tuple[int, ...]]], ...]:
    return (questions.prompts, questions.tokens), (questions.base_prompts, questions.base_tokens)


def _at_base(sample: Sample) -> Sample:
    """The same two tokens after the base prompt."""
    aligned = tuple(range(len(sample.base_tokens)))
    return Sample(sample.base_tokens, sample.target, sample.base, sample.base_tokens, aligned, sample.place)
