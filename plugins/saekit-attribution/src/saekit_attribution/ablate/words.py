"""What `ablate` says of its findings, in sentences that suit any behaviour."""

from __future__ import annotations

from dataclasses import dataclass

from saekit import AgainstControls
from saekit_attribution.ablate.enough import Limits, Rates
from saekit_attribution.ablate.questions import QuestionSets
from saekit_attribution.ablate.search import Found
from saekit_attribution.ablate.shares import FEW, Share


@dataclass(frozen=True)
class Words:
    """The sentences of one template type. behaviour: what flagged answers show, as a noun."""

    template_type: str
    behaviour: str
    limits: Limits

    def few(self, questions: QuestionSets, curve: Rates, test: Rates) -> list[str]:
        """What to say of questions that are too few or were left out. curve, test: the rates before the edit."""
        found = []
        counts = {
            "questions to choose on": curve.rate.questions,
            "questions to test on": test.rate.questions,
            f"answers to test on that show {self.behaviour} before the edit": test.remaining.questions,
            "base answers to test on": test.kept.questions,
        }
        few = [f"ONLY {n} {what}" for what, n in counts.items() if n < FEW]
        if few:
            found.append(f"{', '.join(few)}: shares of fewer than {FEW} say little.")
        if not self.limits.reachable_with(test.remaining.questions, test.kept.questions):
            found.append(
                f"With so few questions no set can be shown to be enough, even if every answer were as it should be ({self.limits})"
                ". Give more questions, or widen these limits."
            )
        if repeated := questions.curve.repeated + questions.test.repeated:
            found.append(f"{repeated} repeated prompts were left out, so that each question counts once.")
        return [f"{self.template_type}: {sentence}" for sentence in found]

    def absent(self, rate: Share, at_base: Share) -> str | None:
        """What to say if the behaviour is not there before the edit; None if it is.

        rate, at_base: its share in the answers to the variations' and to the base prompts."""
        confidence = self.limits.confidence
        if rate.interval(confidence)[0] > (at_base.value or 0.0):
            return None
        return (
            f"{self.template_type}: nothing was ablated: {self.behaviour} is absent before the edit. It is in "
            f"{rate.text(confidence)} of these answers, an interval that does not exceed the {at_base.text(confidence)} of the "
            "answers to base prompts. There is nothing to reduce, so nothing is called a success."
        )

    def outcome(self, found: Found, before: Rates, most: int) -> str:
        """Whether a set was enough, with the shares behind that. most: latents of the largest set on the curve."""
        best, after, confidence = found.best.candidate, found.best.test, self.limits.corrected(found.planned)
        latents = f"{len(best.latents)} latents by {best.ranking}"
        change = (
            f"{self.behaviour} goes from {before.rate.text(self.limits.confidence)} to {after.rate.text(confidence)}, "
            f"{after.neutral.text(confidence)} of these prompts get the base answer, and {after.kept.text(confidence)} of the base "
            "prompts keep theirs"
        )
        if found.best.enough:
            return f"{self.template_type}: {latents} are enough: {change}. {self._tested(found)}"
        return (
            f"{self.template_type}: no set of at most {most} latents was shown to be enough ({self.limits}). The best of those "
            f"tested, {latents}: {change}. {self._tested(found)}"
        )

    def _tested(self, found: Found) -> str:
        if not found.promising:
            return "No set was promising on the curve; the best one there was tested."
        sets = f"{found.promising} set{'s' if found.promising > 1 else ''} looked enough on the curve"
        tested = f"{sets}, and {len(found.tries)} of at most {found.planned} were tested, the smallest first"
        if found.planned == 1:
            return f"{tested}."
        confidence = self.limits.corrected(found.planned)
        return (
            f"{tested}; the intervals after the edit have a confidence of {confidence:.1%}, so that those of all "
            f"{found.planned} hold together with {self.limits.confidence:.0%}."
        )

    def beside_controls(self, beside: AgainstControls) -> str:
        """Whether the rate falls below that with matched random latents ablated instead, and by how much of their spread."""
        sentence = beside.sentence(f"share of answers with {self.behaviour}", "draws of matched random latents")
        return f"{self.template_type}: {sentence}" + ("" if beside.exceeds else " The effect is not specific to these latents.")
