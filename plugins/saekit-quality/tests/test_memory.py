from __future__ import annotations

from saekit_quality.memory import outputs, peak, random_model


def test_a_large_batch_costs_its_outputs_beside_a_small_one() -> None:
    """Encoded 4 responses at a time; at once it costs as many times more as there are more responses."""
    model = random_model(hidden=32, layers=2, tokens=16)
    small, large, whole = peak(model, 4, 4, 16), peak(model, 64, 4, 16), peak(model, 64, 64, 16)
    inputs = 64 * 16 * 8 / 1e6
    assert large < small + 6 * (outputs(model, 64) + inputs)
    assert whole > 3 * large
