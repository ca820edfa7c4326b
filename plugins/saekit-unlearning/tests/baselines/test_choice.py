"""Which setting of a baseline is reported."""

from __future__ import annotations

import pytest
from saekit_unlearning.baselines.organism import choose
from saekit_unlearning.score import Setting


def tried(*settings: tuple[float, int, float]) -> list[tuple[str, Setting, float]]:
    """From (forget, right of 100 shown, KL)."""
    return [(str(i), Setting(forget, {"shown": (right, 100)}), kl) for i, (forget, right, kl) in enumerate(settings)]


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ([(0.5, 100, 0.01), (0.1, 100, 0.03), (0.3, 99, 0.02)], 2),  # what costs predictions on other text is out
        ([(0.5, 100, 0.01), (0.1, 98, 0.01)], 0),  # and what loses what was shown
        ([(0.5, 90, 0.01), (0.1, 80, 0.01)], 1),  # unless everything does: then the score
        ([(0.9, 100, 0.5), (0.2, 100, 0.7)], 1),  # unless everything costs too much
    ],
)
def test_the_setting_that_forgets_most_within_both_bounds(settings, wanted) -> None:
    assert choose(tried(*settings)) == wanted
