"""`Sample`: a flagged answer beside the neutral one, teacher-forced up to the token at which they part."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Sample:
    """One flagged variation of a question, and the base variation it is compared with.

    tokens: the variation's prompt and what both responses begin with; the last position, the decisive one, predicts the
    first token in which they differ. target, base: that token in the flagged response and in the base response.
    base_tokens: the base prompt with the same beginning of the response; its last position predicts the same place.
    aligned: for each position of `tokens`, the position of `base_tokens` that says the same, or -1 where the text
    stands only in this prompt. place: (number of the result, number of the variation) in the labelled file.
    template_type: as the file has it. token_position: which token of the response is the differing one, from 1.
    """

    tokens: tuple[int, ...]
    target: int
    base: int
    base_tokens: tuple[int, ...]
    aligned: tuple[int, ...]
    place: tuple[int, int] = (0, 0)
    template_type: str = ""
    token_position: int = 1
