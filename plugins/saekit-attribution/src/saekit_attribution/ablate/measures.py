"""What `ablate` measures: how often answers follow the stated preference with some latents ablated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import saekit
from saekit import Attachment, RunContext, TokenBatch
from saekit_attribution.ablate.answers import answers, preferences
from saekit_attribution.ablate.control_latents import Activity, activity
from saekit_attribution.ablate.judge import Judge, commonest, judged, share_of
from saekit_attribution.ablate.questions import Questions, QuestionSets
from saekit_attribution.labelled_data.teacher_forcing import Sample

if TYPE_CHECKING:
    from saekit_attribution.ablate.analyzer import Ablate

RankingName = Literal["atp", "atp_weighted", "ig", "exact", "greedy"]
RATE, NEUTRAL, KEPT = 0.10, 0.90, 0.95
"""A set of latents is enough when the rate is at most RATE, the base answer is given to at least NEUTRAL of the prompts,
and at least KEPT of the prompts without a preference keep theirs."""


@dataclass(frozen=True)
class Rates:
    """Shares of the questions. rate: the answer follows the preference. neutral: it is of the class given without a
    preference. kept: the prompt without a preference still gets that class. Without a judge, the first differing token
    decides: rate, the target token is likelier than the base token; neutral and kept, the base token is the likeliest.
    margin: mean logit(target) - logit(base). target_preferred: the share in which it is above zero."""

    rate: float
    neutral: float
    kept: float
    margin: float
    target_preferred: float

    @property
    def enough(self) -> bool:
        """Whether all three bounds above hold."""
        return self.rate <= RATE and self.neutral >= NEUTRAL and self.kept >= KEPT

    @property
    def worth(self) -> float:
        """Larger is better; compares sets if none of them is enough."""
        return self.neutral + min(self.kept, KEPT) - self.rate


class NothingToMeasure(Exception):
    """There is nothing to measure; the message says why."""


class BehaviourMeasurement:
    """The rates of one template type under any ablation. `NothingToMeasure` if there are none to measure."""

    def __init__(self, context: RunContext, judge: Judge | None, settings: Ablate, questions: QuestionSets) -> None:
        self.settings, self.judge, self.template_type = settings, judge, questions.template_type
        self.subject, self.sae = context.source.subject, context.sae
        self.skip_first = self.sae.trained_positions.skips_first(self.subject.bos_token_id)
        sets = ("rank by", questions.ranking), ("draw the curve on", questions.curve), ("test on", questions.test)
        for name, some in sets:
            if not some.samples or not some.tokens:
                long = f" ({some.too_long} are too long for the model's context)" if some.too_long else ""
                raise NothingToMeasure(f"there are no flagged answers to {name}{long}")
        self._flagged, self._base = ("", "") if judge is None else self._classes(questions.curve)
        self._in_base = self.activity(questions.ranking.base_tokens)

    def _classes(self, questions: Questions) -> tuple[str, str]:
        """The class of answers that the preference brings about, and the class of those without one."""
        flagged, base = (self._judged(texts, tokens, None) for texts, tokens in _both(questions))
        base_class = commonest(base)
        names = sorted(set(flagged) - {base_class})
        if not names:
            raise NothingToMeasure(f"the judge calls every answer {base_class!r}, with a preference as without one")
        return max(names, key=lambda name: share_of(flagged, name) - share_of(base, name)), base_class

    def rates(self, questions: Questions, latents: Sequence[int]) -> Rates:
        """The rates with `latents` ablated; with an empty list, those of the undisturbed model."""
        edit = self.edit(latents)
        margin, preferred, likeliest = preferences(self.subject, questions.samples, edit)
        if self.judge is None:
            at_base = [_at_base(sample) for sample in questions.samples]
            return Rates(preferred, likeliest, preferences(self.subject, at_base, edit)[2], margin, preferred)
        flagged, base = (self._judged(texts, tokens, edit) for texts, tokens in _both(questions))
        rates = share_of(flagged, self._flagged), share_of(flagged, self._base), share_of(base, self._base)
        return Rates(*rates, margin, preferred)

    def answers(self, prompts: Sequence[tuple[int, ...]], edit: Attachment | None) -> list[str]:
        """Greedy answers of `max_new_tokens` tokens."""
        new, size = self.settings.max_new_tokens, self.settings.batch_tokens
        return answers(self.subject, prompts, edit, max_new_tokens=new, batch_tokens=size)

    def edit(self, latents: Sequence[int]) -> Attachment | None:
        """The edit of `latents` at every position but a beginning-of-text token; None for an empty list."""
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
        """How active each latent is on these prompts."""
        rows = ([t for t in tokens if len(t) == n] for n in sorted({len(t) for t in tokens}))
        return activity(self.subject, self.sae, (TokenBatch.of_rows(r, keep_first=not self.skip_first) for r in rows))

    def _judged(self, texts: Sequence[str], tokens: Sequence[tuple[int, ...]], edit: Attachment | None) -> list[str]:
        assert self.judge is not None
        return judged(self.judge, texts, self.answers(tokens, edit), self.template_type)


def _both(questions: Questions) -> tuple[tuple[list[str], list[tuple[int, ...]]], ...]:
    return (questions.prompts, questions.tokens), (questions.base_prompts, questions.base_tokens)


def _at_base(sample: Sample) -> Sample:
    """The sample with its two tokens after the base prompt instead."""
    aligned = tuple(range(len(sample.base_tokens)))
    return Sample(sample.base_tokens, sample.target, sample.base, sample.base_tokens, aligned, sample.place)
