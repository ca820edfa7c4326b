"""The analyzer `ablate`: rank latents, ablate the first ones, ask again, and measure what the model answers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from pydantic import Field

from saekit import ComponentError, Result, RunContext
from saekit_attribution.ablate.experiment import AblationExperiment
from saekit_attribution.ablate.judge import Judge, load_judge, organism_judge
from saekit_attribution.ablate.measures import RankingName
from saekit_attribution.ablate.questions import (
    Questions,
    QuestionSets,
    Tokenisation,
    questions_for,
    split,
    template_types,
)
from saekit_attribution.common_options import ORGANISM, BatchTokens, ChatTemplate, Data, Joiner, MaxTokensToCheck, Steps
from saekit_attribution.labelled_data.document import LabelledData
from saekit_attribution.labelled_data.organism_answers import organism_data


@dataclass(kw_only=True, eq=False)
class Ablate:
    """Ranks the latents on some questions, ablates the first ones at every position (the SAE's error is kept), and has
    the model answer other questions again: how often it still follows the stated preference, whether it answers as it
    does without one, and what that costs on unrelated text.

    The controls are random latents that are as often and as strongly active on the same prompts. Each template type is
    measured separately. The number of latents is read off the curve; the rates at that number come from other questions
    than the curve.
    """

    data: Data = ORGANISM
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
    mode: Annotated[
        Literal["scale", "base_mean"],
        Field(description="Multiply activations by `factor`, or cap them at their mean in base prompts."),
    ] = "scale"
    factor: Annotated[float, Field(description="For mode scale; 0 ablates, a negative factor reverses.")] = 0.0
    keep_error: Annotated[bool, Field(description="Keep what the SAE does not rebuild.")] = True
    judge: Annotated[
        str | None,
        Field(description="module:function of (prompt, response, template_type) that names the answer's class."),
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
        self.tokenisation = Tokenisation(self.joiner, self.chat_template, self.max_tokens_to_check, self.max_new_tokens)

    def __call__(self, context: RunContext) -> Result:
        """scalars, for each template type: see `AblationExperiment.measure`. tables: curve, agreement_with_exact, latents,
        controls, damage, answers. figures: a curve for each template type."""
        if context.sae.transcoder:
            raise ComponentError("the SAE is a transcoder, which cannot pass on what it reads. Use an SAE.")
        result = Result()
        sets = self._question_sets(context)
        if not sets:
            result.notes.append("Nothing was ablated: no answer is flagged, so there is nothing to reduce.")
        for questions in sets:
            AblationExperiment(context, self.judge_function, self, questions, result, self.data == ORGANISM).measure()
        for note in result.notes:
            context.warn(f"ablate: {note}")
        return result

    def _question_sets(self, context: RunContext) -> list[QuestionSets]:
        subject = context.source.subject
        if self.data == ORGANISM:
            ranked = organism_data(subject, n=self.rank_samples, split="train", seed=context.seed)
            held_out = organism_data(subject, n=2 * self.samples, split="held_out", seed=context.seed + 1)
            first = _numbers(ranked)
            curve, test = set(range(self.samples)), set(range(self.samples, 2 * self.samples))
        else:
            ranked = held_out = LabelledData.load(self.data)
            first, curve, test = split(ranked, self.rank_samples, context.seed)

        def these(labelled: LabelledData, results: set[int], kind: str) -> Questions:
            return questions_for(subject, labelled, results, kind, self.tokenisation)

        return [
            QuestionSets(kind, these(ranked, first, kind), these(held_out, curve, kind), these(held_out, test, kind))
            for kind in template_types(ranked)
        ]


def _numbers(labelled: LabelledData) -> set[int]:
    return {variation.place[0] for variation in labelled.variations}
