"""The analyzer `ablate`: rank latents, ablate the first ones, ask again, and measure what the model answers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Literal

from pydantic import Field

from saekit import ComponentError, Result, RunContext, Subject
from saekit_attribution.ablate.enough import Limits
from saekit_attribution.ablate.experiment import AblationExperiment
from saekit_attribution.ablate.judge import Judge, load_judge, organism_judge
from saekit_attribution.ablate.measures import RankingName
from saekit_attribution.ablate.questions import (
    QuestionSets,
    Tokenisation,
    questions_for,
    sharing_prompts,
    split,
    template_types,
)
from saekit_attribution.ablate.shares import FEW
from saekit_attribution.common_options import (
    ORGANISM,
    BatchTokens,
    ChatTemplate,
    Data,
    Joiner,
    KeyNames,
    MaxTokensToCheck,
    Steps,
)
from saekit_attribution.labelled_data.document import LabelledData
from saekit_attribution.labelled_data.organism_answers import organism_data


@dataclass(kw_only=True, eq=False)
class Ablate:
    """Ranks the latents on some questions, ablates the first ones at every position (the SAE's error is kept), and has
    the model answer other questions again: how often it still shows the flagged behaviour, whether it answers as it does
    to the base prompts, and what that costs on unrelated text.

    The controls are random latents that are as often and as strongly active on the same prompts. Each template type is
    measured separately. The smallest sets whose intervals on the curve are within the limits are tested on other questions,
    one after another until one is enough there too.
    """

    data: Data = ORGANISM
    keys: KeyNames = field(default_factory=dict)
    behaviour: Annotated[
        str | None,
        Field(description="What the flagged answers show, for messages; by default `behaviour` in the file's metadata."),
    ] = None
    rankings: Annotated[list[RankingName], Field(min_length=1, description="The scores that latents are ranked by.")] = (
        field(default_factory=lambda: ["atp", "atp_weighted", "ig", "exact", "greedy"])
    )
    numbers: Annotated[
        list[Annotated[int, Field(gt=0)]], Field(min_length=1, description="How many latents are ablated.")
    ] = field(default_factory=lambda: [5, 10, 20, 30, 40])
    rank_samples: Annotated[int, Field(gt=0, description="Questions to rank by; at most half of a file's.")] = 48
    samples: Annotated[
        int, Field(gt=0, description="Questions, for data organism, for the curve, and as many for the test.")
    ] = 50
    at_most_remaining: Annotated[
        float, Field(ge=0, le=1, description="The share of the behaviour that may remain, relative to before.")
    ] = 0.2
    at_least_neutral: Annotated[
        float,
        Field(ge=0, le=1, description="The share of base answers that the flagged prompts must get, relative to before."),
    ] = 0.8
    at_least_kept: Annotated[
        float, Field(ge=0, le=1, description="The share of base answers that base prompts must keep, relative to before.")
    ] = 0.85
    confidence: Annotated[
        float, Field(gt=0, lt=1, description="Of the intervals, which must lie wholly within these three limits.")
    ] = 0.95
    tries: Annotated[int, Field(gt=0, description="How many sets of latents are tested at most.")] = 3
    mode: Annotated[
        Literal["scale", "base_mean"],
        Field(description="Multiply activations by `factor`, or cap them at their mean in base prompts."),
    ] = "scale"
    factor: Annotated[float, Field(description="For mode scale; 0 ablates, a negative factor reverses.")] = 0.0
    keep_error: Annotated[bool, Field(description="Keep what the SAE does not rebuild.")] = True
    judge: Annotated[
        str | None,
        Field(description="module:function or FILE.py:function of (prompt, response, template_type): the answer's class."),
    ] = None
    max_new_tokens: Annotated[int, Field(gt=0, description="Tokens of an answer.")] = 24
    draws: Annotated[int, Field(gt=0, description="Draws of random latents.")] = 3
    steps: Steps = 8
    answer_tokens: Annotated[
        int, Field(gt=0, description="Tokens of the base answer that greedy selection brings back.")
    ] = 8
    damage_tokens: Annotated[int, Field(gt=0, description="Held-out tokens of each kind for KL and CE.")] = 4000
    max_tokens_to_check: MaxTokensToCheck = 20
    joiner: Joiner = None
    chat_template: ChatTemplate = False
    batch_tokens: BatchTokens = 8192

    def __post_init__(self) -> None:
        self.rankings = list(dict.fromkeys(self.rankings))
        self.numbers = sorted(set(self.numbers))
        self.judge_function: Judge | None = organism_judge if self.data == ORGANISM else None
        if self.judge:
            self.judge_function = load_judge(self.judge)
        self.limits = Limits(self.at_most_remaining, self.at_least_neutral, self.at_least_kept, self.confidence)
        self.tokenisation = Tokenisation(self.joiner, self.chat_template, self.max_tokens_to_check, self.max_new_tokens)

    def __call__(self, context: RunContext) -> Result:
        """scalars, for each template type: see `AblationExperiment.measure`. tables: curve, tries, agreement_with_exact,
        latents, controls, damage, answers. figures: a curve for each template type."""
        if context.sae.transcoder:
            raise ComponentError("the SAE is a transcoder, which cannot pass on what it reads. Use an SAE.")
        result = Result()
        ranked, held_out, parts = self._labelled(context)
        kinds = template_types(ranked)
        behaviour = self.behaviour or ranked.behaviour or "the flagged behaviour"
        nothing = None
        if not kinds:
            nothing = "no answer is flagged, so there is nothing to reduce."
        elif not all(parts):
            nothing = (
                f"{len(sharing_prompts(ranked))} different questions leave none to rank by, to choose on or to test on. Give at "
                f"least {3 * FEW}, {FEW} for each."
            )
        if nothing:
            result.notes.append(f"Nothing was ablated: {nothing}")
            context.warn(f"ablate: {result.notes[0]}")
            return result
        for questions in self._question_sets(context.source.subject, kinds, ranked, held_out, parts):
            experiment = AblationExperiment(context, self.judge_function, self, questions, behaviour, result)
            experiment.measure(on_organism=self.data == ORGANISM)
        return result

    def _labelled(self, context: RunContext) -> tuple[LabelledData, LabelledData, tuple[set[int], set[int], set[int]]]:
        """The data to rank by, those to measure on, and which of their results are to rank by, for the curve, and for the
        test."""
        subject = context.source.subject
        if self.data != ORGANISM:
            labelled = LabelledData.load(self.data, self.keys)
            return labelled, labelled, split(labelled, self.rank_samples, context.seed)
        ranked = organism_data(subject, n=self.rank_samples, split="train", seed=context.seed)
        held_out = organism_data(subject, n=2 * self.samples, split="held_out", seed=context.seed + 1)
        curve, test = set(range(self.samples)), set(range(self.samples, 2 * self.samples))
        return ranked, held_out, ({variation.place[0] for variation in ranked.variations}, curve, test)

    def _question_sets(
        self,
        subject: Subject,
        kinds: Sequence[str],
        ranked: LabelledData,
        held_out: LabelledData,
        parts: Sequence[set[int]],
    ) -> Iterator[QuestionSets]:
        for kind in kinds:
            sets = zip((ranked, held_out, held_out), parts, strict=True)
            rank, curve, test = (questions_for(subject, data, part, kind, self.tokenisation) for data, part in sets)
            yield QuestionSets(kind, rank, curve, test)
