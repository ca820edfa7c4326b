"""`Share`: how many of how many questions, with the interval that the number of questions allows."""

from __future__ import annotations

from dataclasses import dataclass

from saekit import wilson_interval

FEW = 20
"""With fewer questions than this a share says little, and is told so."""


@dataclass(frozen=True)
class Share:
    """`count` of `questions` independent ones."""

    count: int
    questions: int

    @property
    def value(self) -> float | None:
        """None if there are no questions."""
        return self.count / self.questions if self.questions else None

    def interval(self, confidence: float = 0.95) -> tuple[float, float]:
        """The two-sided interval of Wilson (1927); (0, 1) if there are no questions."""
        return wilson_interval(self.count, self.questions, confidence)

    def numbers(self, name: str, confidence: float = 0.95) -> dict[str, float | int | None]:
        """NAME, NAME_low, NAME_high and NAME_n (questions), for a row of a table or for scalars; None if there are no
        questions."""
        low, high = self.interval(confidence) if self.questions else (None, None)
        return {name: self.value, f"{name}_low": low, f"{name}_high": high, f"{name}_n": self.questions}

    def text(self, confidence: float = 0.95) -> str:
        """For a sentence: "0.14 (0.07 to 0.26, of 50)", with a loud word if the questions are few."""
        if not self.questions:
            return "unknown (of 0)"
        low, high = self.interval(confidence)
        few = f" ONLY {self.questions}" if self.questions < FEW else f" {self.questions}"
        return f"{self.value:.2f} ({low:.2f} to {high:.2f}, of{few})"
