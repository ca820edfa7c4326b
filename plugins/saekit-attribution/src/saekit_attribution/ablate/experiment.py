"""The ablation experiment for one template type: rank latents, ablate the first ones, ask again, compare with controls."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch

from saekit import AgainstControls, Result, RunContext, matched_latents
from saekit_attribution.ablate.answers import drawn_answers
from saekit_attribution.ablate.enough import Rates
from saekit_attribution.ablate.figures import curve_figure
from saekit_attribution.ablate.greedy_selection import PromptPair, greedy_selection
from saekit_attribution.ablate.judge import Judge
from saekit_attribution.ablate.measures import BehaviourMeasurement, NothingToMeasure
from saekit_attribution.ablate.questions import Questions, QuestionSets
from saekit_attribution.ablate.search import Candidate, Found, search
from saekit_attribution.ablate.side_effects import organism_text, side_effects, source_text
from saekit_attribution.ablate.words import Words
from saekit_attribution.effects.attribute import attribute
from saekit_attribution.effects.methods import Attribution
from saekit_attribution.effects.ranking import Ranking, agreement, by_weight, ranked

if TYPE_CHECKING:
    from saekit_attribution.ablate.analyzer import Ablate

SHOWN = 5  # answers before and after


class AblationExperiment:
    """The experiment for one template type; what it finds is added to `result`. behaviour: what flagged answers show."""

    def __init__(
        self,
        context: RunContext,
        judge: Judge | None,
        settings: Ablate,
        questions: QuestionSets,
        behaviour: str,
        result: Result,
    ) -> None:
        self.context, self.settings, self.questions, self.result = context, settings, questions, result
        self.subject, self.sae = context.source.subject, context.sae
        self._judge = judge
        self._kind, self._behaviour = questions.template_type, behaviour

    def measure(self, *, on_organism: bool) -> None:
        """Add scalars named after the template type, rows of the tables, and notes; warn of what to beware of.

        latents, enough, tries: the set, whether it was enough on the test's questions, and how many sets were tested there.
        rate, remaining, neutral, kept, margin: see `Rates`; NAME_low and NAME_high are the ends of the interval, of the
            corrected confidence after the edit, and NAME_n is the number of questions.
        rate_at_base: the behaviour's share in the answers to base prompts.
        random_mean, random_worst: the rate with matched random latents ablated instead, over the draws.
        ce_rise, kl: see `SideEffects`."""
        try:
            measured = BehaviourMeasurement(self.context, self._judge, self.settings, self.questions)
        except NothingToMeasure as reason:
            self._say(f"{self._kind}: nothing was ablated: {reason}.")
            return
        self.measured, limits = measured, self.settings.limits
        before, at_base = measured.rates(self.questions.test, []), measured.at_base(self.questions.test)
        self._scalars(
            enough=0,
            **before.rate.numbers("rate_before", limits.confidence),
            **at_base.numbers("rate_at_base", limits.confidence),
        )
        words = Words(self._kind, self._behaviour, limits)
        for sentence in words.few(self.questions, measured.rates(self.questions.curve, []), before):
            self._say(sentence)
        if absent := words.absent(before.rate, at_base):
            self._say(absent)
            return
        rankings = self._rankings()
        self._agreement(rankings)
        candidates = self._curve(rankings)
        if not candidates:
            self._say(f"{self._kind}: nothing was ablated: by no ranking has a latent a score above zero.")
            return
        test = functools.partial(measured.rates, self.questions.test)
        found = search(candidates, test, limits, self.settings.tries)
        self._tries(found)
        chosen, after, confidence = found.best.candidate, found.best.test, limits.corrected(found.planned)
        controls = self._controls(chosen)
        shares = {"rate": after.rate, "remaining": after.remaining, "neutral": after.neutral, "kept": after.kept}
        for name, share in shares.items():
            self._scalars(**share.numbers(f"{name}_after", confidence))
        worst = min((c.rate for c in controls), key=lambda share: share.value or 0.0)
        self._scalars(
            latents=len(chosen.latents),
            enough=int(found.best.enough),
            tries=len(found.tries),
            confidence=confidence,
            margin_before=before.margin,
            margin_after=after.margin,
            random_mean=sum(c.rate.value or 0.0 for c in controls) / len(controls),
            **worst.numbers("random_worst", limits.confidence),
            **self._damage(chosen.latents, on_organism),
        )
        self._latents(chosen, rankings)
        self._examples(chosen)
        rows = [row for row in self.result.tables["curve"] if row["template_type"] == self._kind]
        self.result.figures[f"{self._word}_curve"] = curve_figure(self._kind, self._behaviour, rows, before.rate)
        beside = AgainstControls.of(after.rate.value, (c.rate.value for c in controls), higher=False)
        self._say(words.outcome(found, before, max(self.settings.numbers)), beware=not found.best.enough)
        self._say(words.beside_controls(beside), beware=not beside.exceeds)

    def _say(self, sentence: str, *, beware: bool = True) -> None:
        self.result.notes.append(sentence)
        if beware:
            self.context.warn(f"ablate: {sentence}")

    @property
    def _word(self) -> str:
        """The template type as the beginning of a scalar's name."""
        return "_".join(self._kind.lower().split()) or "flagged"

    def _scalars(self, **scalars: float | int | None) -> None:
        self.result.scalars |= {f"{self._word}_{name}": value for name, value in scalars.items()}

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
                rankings[name] = greedy_selection(self.subject, self.sae, pairs, n)
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

    def _curve(self, rankings: dict[str, Ranking | list[int]]) -> list[Candidate]:
        """The sets of latents by ranking and number, with their rates on the questions of the curve."""
        found: list[Candidate] = []
        for name, ranking in rankings.items():
            sets = {len(latents): latents for latents in (_first(ranking, n) for n in self.settings.numbers)}
            for n, latents in sorted(sets.items()):
                if not latents:
                    continue
                rates = self.measured.rates(self.questions.curve, latents)
                self._row("curve", {"ranking": name, "latents": n, **rates.row(self.settings.confidence)})
                found.append(Candidate(name, latents, rates))
        return found

    def _tries(self, found: Found) -> None:
        confidence = self.settings.limits.corrected(found.planned)
        for number, one in enumerate(found.tries, start=1):
            columns = {"try": number, "ranking": one.candidate.ranking, "latents": len(one.candidate.latents)}
            self._row("tries", {**columns, "enough": one.enough, "confidence": confidence, **one.test.row(confidence)})

    # --- controls and side effects ----------------------------------------------------------------------------------

    def _controls(self, chosen: Candidate) -> list[Rates]:
        generator = torch.Generator().manual_seed(self.context.seed)
        seen = self.measured.activity([*self.questions.ranking.tokens, *self.questions.ranking.base_tokens])
        found = []
        for draw in range(1, self.settings.draws + 1):
            latents = matched_latents(chosen.latents, seen.density, seen.mean, generator)
            found.append(self.measured.rates(self.questions.test, latents))
            self._row("controls", {"draw": draw, "latents": len(latents), **found[-1].row(self.settings.confidence)})
        return found

    def _damage(self, latents: Sequence[int], on_organism: bool) -> dict[str, float | None]:
        edit, tokens, size = self.measured.edit(latents), self.settings.damage_tokens, self.settings.batch_tokens
        texts = organism_text(self.context, tokens) if on_organism else source_text(self.context, tokens)
        if edit is None:
            return {"ce_rise": None, "kl": None}
        found = {
            kind: side_effects(self.subject, edit, batches, batch_tokens=size)
            for kind, batches in texts.items()
            if batches
        }
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

    def _latents(self, chosen: Candidate, rankings: dict[str, Ranking | list[int]]) -> None:
        scores = {
            name: dict(zip(r.latents.tolist(), r.scores.tolist(), strict=True))
            for name, r in rankings.items()
            if isinstance(r, Ranking)
        }
        for rank, latent in enumerate(chosen.latents, start=1):
            by_name = {name: known.get(latent, 0.0) for name, known in scores.items()}
            self._row("latents", {"ranking": chosen.ranking, "rank": rank, "latent": latent, **by_name})

    def _examples(self, chosen: Candidate) -> None:
        if self._judge is None:
            return
        prompts = self.questions.test.tokens[:SHOWN]
        both = [self.measured.answers(prompts, edit) for edit in (None, self.measured.edit(chosen.latents))]
        for prompt, before, after in zip(self.questions.test.prompts[:SHOWN], *both, strict=True):
            self._row("answers", {"prompt": prompt, "before": before, "after": after})

    def _row(self, table: str, row: dict[str, Any]) -> None:
        self.result.tables.setdefault(table, []).append({"template_type": self._kind, **row})


def _first(ranking: Ranking | list[int], n: int) -> list[int]:
    return ranking.top(n) if isinstance(ranking, Ranking) else ranking[:n]
