"""The ablation experiment for one template type: rank latents, ablate the first ones, ask again, compare with controls."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

from saekit import Result, RunContext
from saekit_attribution.ablate.answers import drawn_answers
from saekit_attribution.ablate.control_latents import matched_controls
from saekit_attribution.ablate.figures import curve_figure
from saekit_attribution.ablate.greedy_selection import PromptPair, greedy_selection
from saekit_attribution.ablate.judge import Judge
from saekit_attribution.ablate.measures import (
    KEPT,
    NEUTRAL,
    RATE,
    BehaviourMeasurement,
    NothingToMeasure,
    Rates,
)
from saekit_attribution.ablate.questions import Questions, QuestionSets
from saekit_attribution.ablate.side_effects import organism_text, side_effects, source_text
from saekit_attribution.effects.attribute import attribute
from saekit_attribution.effects.methods import Attribution
from saekit_attribution.effects.ranking import Ranking, agreement, by_weight, ranked

if TYPE_CHECKING:
    from saekit_attribution.ablate.analyzer import Ablate

SHOWN = 5  # answers before and after


@dataclass(frozen=True)
class Chosen:
    """A set of latents on the curve, with its rates."""

    ranking: str
    latents: list[int]
    rates: Rates


class AblationExperiment:
    """The experiment for one template type; what it finds is added to `result`."""

    def __init__(
        self, context: RunContext, judge: Judge | None, settings: Ablate, questions: QuestionSets, result: Result, organism: bool
    ) -> None:
        self.context, self.settings, self.questions, self.result, self.organism = context, settings, questions, result, organism
        self.subject, self.sae = context.source.subject, context.sae
        self._judge = judge
        self._kind = questions.template_type

    def measure(self) -> None:
        """Add scalars named after the template type (latents, enough, and before, after, random, ce_rise, kl) and rows of
        the tables; a note if there is nothing to measure."""
        try:
            self.behaviour = BehaviourMeasurement(self.context, self._judge, self.settings, self.questions)
        except NothingToMeasure as reason:
            self.result.notes.append(f"{self._kind}: nothing was ablated: {reason}.")
            return
        before = self.behaviour.rates(self.questions.test, [])
        if before.rate <= RATE:
            self.result.notes.append(
                f"{self._kind}: nothing was ablated: only {before.rate:.0%} of the answers follow the preference."
            )
            return
        rankings = self._rankings()
        self._agreement(rankings)
        chosen = self._curve(rankings)
        after = self.behaviour.rates(self.questions.test, chosen.latents)
        controls = self._controls(chosen)
        scalars: dict[str, float | int | None] = {
            "latents": len(chosen.latents),
            "enough": int(after.enough),
            **{f"{name}_before": value for name, value in asdict(before).items() if name != "neutral"},
            **{f"{name}_after": value for name, value in asdict(after).items()},
            "random_mean": sum(c.rate for c in controls) / len(controls),
            "random_worst": min(c.rate for c in controls),
            **self._damage(chosen.latents),
        }
        word = "_".join(self._kind.lower().split()) or "flagged"
        self.result.scalars |= {f"{word}_{name}": value for name, value in scalars.items()}
        self._latents(chosen, rankings)
        self._examples(chosen)
        rows = [row for row in self.result.tables["curve"] if row["template_type"] == self._kind]
        self.result.figures[f"{word}_curve"] = curve_figure(self._kind, rows, before.rate)
        self._say(chosen, after, controls)

    def _say(self, chosen: Chosen, after: Rates, controls: Sequence[Rates]) -> None:
        found = f"{len(chosen.latents)} latents by {chosen.ranking} leave a rate of {after.rate:.2f} with {after.neutral:.2f}"
        if not after.enough:
            self.result.notes.append(
                f"{self._kind}: no set of at most {max(self.settings.numbers)} latents was enough (rate at most {RATE}, base "
                f"answer at least {NEUTRAL}, prompts without a preference at least {KEPT}). The best: {found} base answers."
            )
        if min(c.rate for c in controls) < 0.9 * after.rate + 0.1:
            self.result.notes.append(
                f"{self._kind}: matched random latents do as much, so the effect is not specific to these latents."
            )

    # --- which latents ------------------------------------------------------------------------------------------

    def _rankings(self) -> dict[str, Ranking | list[int]]:
        """The rankings by name; greedy selection gives only the latents, in their order."""
        settings, samples = self.settings, self.questions.ranking.samples
        size = settings.batch_tokens
        wanted = ["atp" if name == "atp_weighted" else name for name in settings.rankings if name != "greedy"]
        methods = list(dict.fromkeys(wanted))
        attributions: list[dict[str, Attribution]] = []
        if methods:
            outcomes = attribute(
                self.subject,
                self.sae,
                samples,
                methods=methods,
                positions="all",
                steps=settings.steps,
                batch_tokens=size,
            )
            attributions = [outcome for outcome in outcomes if isinstance(outcome, dict)]
        rankings: dict[str, Ranking | list[int]] = {}
        for name in settings.rankings:
            if name == "greedy":
                pairs, n = self._prompt_pairs(self.questions.ranking), max(settings.numbers)
                rankings[name] = greedy_selection(self.subject, self.sae, pairs, n, skip_first=self.behaviour.skip_first)
            elif name == "atp_weighted":
                rankings[name] = ranked([by_weight(by_method["atp"]) for by_method in attributions])
            else:
                rankings[name] = ranked([by_method[name] for by_method in attributions])
        return rankings

    def _prompt_pairs(self, questions: Questions) -> list[PromptPair]:
        """For greedy selection: prompts with answers sampled from the undisturbed model after the base prompts."""
        n, size = self.settings.answer_tokens, self.settings.batch_tokens
        drawn = drawn_answers(self.subject, questions.base_tokens, n, self.context.seed, batch_tokens=size)
        return [PromptPair(*one) for one in zip(questions.tokens, questions.base_tokens, drawn, strict=True)]

    def _agreement(self, rankings: dict[str, Ranking | list[int]]) -> None:
        exact, most = rankings.get("exact"), max(self.settings.numbers)
        if not isinstance(exact, Ranking):
            return
        top = set(exact.top(most))
        for name, ranking in rankings.items():
            first = _first(ranking, most)
            row = {
                "ranking": name,
                "spearman": agreement(ranking, exact) if isinstance(ranking, Ranking) else None,
                "shared_with_first": len(top & set(first)) / max(1, len(first)),
            }
            self._row("agreement_with_exact", row)

    def _curve(self, rankings: dict[str, Ranking | list[int]]) -> Chosen:
        """Measure the rates by ranking and number; return the smallest set that is enough, or else the best one."""
        tried: list[Chosen] = []
        for name, ranking in rankings.items():
            sets = {len(latents): latents for latents in (_first(ranking, n) for n in self.settings.numbers)}
            for n, latents in sorted(sets.items()):
                rates = self.behaviour.rates(self.questions.curve, latents)
                self._row("curve", {"ranking": name, "latents": n, **asdict(rates)})
                tried.append(Chosen(name, latents, rates))
        return min(tried, key=_order)

    # --- controls and side effects ----------------------------------------------------------------------------------

    def _controls(self, chosen: Chosen) -> list[Rates]:
        generator = torch.Generator().manual_seed(self.context.seed)
        seen = self.behaviour.activity([*self.questions.ranking.tokens, *self.questions.ranking.base_tokens])
        found = []
        for draw in range(1, self.settings.draws + 1):
            latents = matched_controls(chosen.latents, seen, generator)
            found.append(self.behaviour.rates(self.questions.test, latents))
            self._row("controls", {"draw": draw, "latents": len(latents), **asdict(found[-1])})
        return found

    def _damage(self, latents: Sequence[int]) -> dict[str, float | None]:
        edit, tokens = self.behaviour.edit(latents), self.settings.damage_tokens
        texts = organism_text(self.subject, tokens) if self.organism else source_text(self.context, tokens)
        if edit is None:
            return {"ce_rise": None, "kl": None}
        found = {kind: side_effects(self.subject, edit, batches) for kind, batches in texts.items() if batches}
        for kind, d in found.items():
            self._row("damage", {"kind": kind, **asdict(d), "ce_rise": d.rise})
        scored = sum(d.tokens for d in found.values())
        if not scored:
            return {"ce_rise": None, "kl": None}
        before, after, kl = (
            sum(getattr(d, name) * d.tokens for d in found.values()) / scored
            for name in ("ce_before", "ce_after", "kl")
        )
        return {"ce_rise": (after - before) / before if before else None, "kl": kl}

    def _latents(self, chosen: Chosen, rankings: dict[str, Ranking | list[int]]) -> None:
        scores = {
            name: dict(zip(r.latents.tolist(), r.scores.tolist(), strict=True))
            for name, r in rankings.items()
            if isinstance(r, Ranking)
        }
        for rank, latent in enumerate(chosen.latents, start=1):
            by_name = {name: known.get(latent, 0.0) for name, known in scores.items()}
            self._row("latents", {"ranking": chosen.ranking, "rank": rank, "latent": latent, **by_name})

    def _examples(self, chosen: Chosen) -> None:
        if self._judge is None:
            return
        prompts = self.questions.test.tokens[:SHOWN]
        both = [self.behaviour.answers(prompts, edit) for edit in (None, self.behaviour.edit(chosen.latents))]
        for prompt, before, after in zip(self.questions.test.prompts[:SHOWN], *both, strict=True):
            self._row("answers", {"prompt": prompt, "before": before, "after": after})

    def _row(self, table: str, row: dict[str, Any]) -> None:
        self.result.tables.setdefault(table, []).append({"template_type": self._kind, **row})


def _first(ranking: Ranking | list[int], n: int) -> list[int]:
    return ranking.top(n) if isinstance(ranking, Ranking) else ranking[:n]


def _order(chosen: Chosen) -> tuple[float, ...]:
    """Sorts the better set first: enough with the fewest latents, else the best rates."""
    if chosen.rates.enough:
        return 0, len(chosen.latents), -chosen.rates.worth
    return 1, -chosen.rates.worth, chosen.rates.margin
