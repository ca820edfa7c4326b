"""When the ablation of a set of latents is enough, relative to what the model did before it."""

from __future__ import annotations

from dataclasses import dataclass

from saekit_attribution.ablate.shares import Share


@dataclass(frozen=True)
class Rates:
    """What the model answers with some latents ablated, on some questions.

    rate: of the variations' prompts, those whose answer shows the behaviour.
    remaining: the same, of as many as showed it before the edit.
    neutral: of the questions whose base prompt had a base answer before the edit (one of any class but the behaviour's),
        those whose variation now has an answer of that class.
    kept: of the same questions, those whose base prompt still has an answer of that class.
    margin: mean logit(target) - logit(base) at the first differing token of the labelled answers.
    """

    rate: Share
    remaining: Share
    neutral: Share
    kept: Share
    margin: float | None

    def row(self, confidence: float = 0.95) -> dict[str, float | int | None]:
        """The columns of a table: each share with its interval and its number of questions."""
        shares = {"rate": self.rate, "remaining": self.remaining, "neutral": self.neutral, "kept": self.kept}
        columns: dict[str, float | int | None] = {}
        for name, share in shares.items():
            columns |= share.numbers(name, confidence)
        return {**columns, "margin": self.margin}

    @property
    def worth(self) -> float:
        """Larger is better; compares sets of which none is enough."""
        neutral, kept, remaining = (share.value or 0.0 for share in (self.neutral, self.kept, self.remaining))
        return neutral + kept - remaining


@dataclass(frozen=True)
class Limits:
    """What must hold of the whole interval of each share for an ablation to be enough.

    remaining: of the behaviour before the edit at most this share remains.
    neutral: of the base answers before the edit at least this share is given to the variations too.
    kept: of the base answers before the edit at least this share is still given to the base prompts.
    """

    remaining: float
    neutral: float
    kept: float
    confidence: float = 0.95

    def met_by(self, rates: Rates, tries: int = 1) -> bool:
        """Whether the intervals lie within the limits; without questions nothing is met. See `corrected` for `tries`."""
        confidence = self.corrected(tries)
        return (
            rates.remaining.interval(confidence)[1] <= self.remaining
            and rates.neutral.interval(confidence)[0] >= self.neutral
            and rates.kept.interval(confidence)[0] >= self.kept
        )

    def corrected(self, tries: int) -> float:
        """The confidence of each of `tries` intervals at which all hold together with `confidence` (Bonferroni)."""
        return 1 - (1 - self.confidence) / tries

    def reachable_with(self, flagged: int, base: int, tries: int = 1) -> bool:
        """Whether the limits would be met if each of so many questions were answered as it should be."""
        perfect = Rates(Share(0, flagged), Share(0, flagged), Share(base, base), Share(base, base), None)
        return self.met_by(perfect, tries)

    def __str__(self) -> str:
        return (
            f"the whole interval of what remains of it at most {self.remaining:.2f}, of base answers to these prompts at least "
            f"{self.neutral:.2f}, of base prompts that keep theirs at least {self.kept:.2f}, each relative to before the edit"
        )
