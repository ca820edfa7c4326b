"""`LatentSurvey`: one pass in bounded memory finds what is found by looking at everything at once."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saekit import Activations, DenseCode, LatentSurvey
from saekit.runner.survey import whole_sequences

D_SAE = 5


def stream(lengths: list[int], gaps: bool, seed: int) -> tuple[Activations, torch.Tensor]:
    """Rows of sequences of these lengths, and their code: few values, so that many are equal or zero."""
    draws = torch.Generator().manual_seed(seed)
    n = sum(lengths)
    numbers = torch.randperm(1000, generator=draws)[: len(lengths)]
    position = torch.cat([torch.arange(length) for length in lengths]) * (2 if gaps else 1)
    code = torch.randint(-3, 4, (n, D_SAE), generator=draws).clamp_min(0).float() / 2
    code[:, -1] = 0  # a dead latent
    x = torch.zeros(n, 2)
    return Activations(x, sequence=numbers.repeat_interleave(torch.tensor(lengths)), position=position), code


def survey_of(rows: Activations, code: torch.Tensor, size: int, **options: int) -> LatentSurvey:
    """In batches of `size` rows, which cut sequences."""
    survey, done = LatentSurvey(D_SAE, **options), 0
    for batch in whole_sequences(rows.rows(slice(start, start + size)) for start in range(0, len(rows), size)):
        survey.update(batch, DenseCode(code[done : done + len(batch)]))
        done += len(batch)
    assert done == len(rows)
    return survey


lengths = st.lists(st.integers(1, 7), min_size=1, max_size=12)


@settings(max_examples=60, deadline=None)
@given(lengths, st.booleans(), st.integers(1, 30), st.integers(1, 5), st.integers(0, 3), st.integers(0, 10**6))
def test_top_places_equal_brute_force(lengths, gaps, size, top, window, seed) -> None:
    rows, code = stream(lengths, gaps, seed)
    survey = survey_of(rows, code, size, top=top, window=window)
    torch.testing.assert_close(survey.density, (code > 0).float().mean(0))
    assert torch.equal(survey.maximum, code.amax(0))
    for latent in range(D_SAE):
        best: dict[int, tuple[float, int]] = {}  # of each sequence, its strongest place, the earliest of equal ones
        for row, (sequence, value) in enumerate(zip(rows.sequence.tolist(), code[:, latent].tolist(), strict=True)):
            if value > best.get(sequence, (0.0, -1))[0]:
                best[sequence] = (value, row)
        expected = sorted(best.values(), key=lambda found: (-found[0], found[1]))[:top]
        places = survey.top(latent)
        assert [(place.activation, place.row) for place in places] == expected
        for place in places:
            assert (place.sequence, place.position) == (int(rows.sequence[place.row]), int(rows.position[place.row]))
            same = (rows.sequence == place.sequence) & ((rows.position - place.position).abs() <= window)
            around = {int(rows.position[i]) - place.position: float(code[i, latent]) for i in same.nonzero()[:, 0].tolist()}
            assert place.around == around


@settings(max_examples=30, deadline=None)
@given(lengths, st.integers(1, 30), st.integers(1, 30), st.integers(0, 10**6))
def test_the_sample_does_not_depend_on_the_batches(lengths, size, other, seed) -> None:
    rows, code = stream(lengths, False, seed)
    one, two = (survey_of(rows, code, n, top=1, sample=4) for n in (size, other))
    for latent in range(D_SAE):
        assert one.quantiles(latent, 3) == two.quantiles(latent, 3)
        fired = int((code[:, latent] > 0).sum())
        assert len(one.quantiles(latent, 9)) == min(4, fired)


def test_the_sample_is_drawn_evenly_and_its_quantiles_are_those_of_all() -> None:
    values = torch.rand(20_000, generator=torch.Generator().manual_seed(0)) + 1e-3
    survey = LatentSurvey(1, top=1, sample=400)
    for part in values.split(4096):
        survey.update(Activations(part[:, None]), DenseCode(part[:, None]))
    found = survey.quantiles(0, 4)
    assert [quantile for quantile, _ in found] == pytest.approx([0.875, 0.625, 0.375, 0.125], abs=0.01)
    for quantile, place in found:
        assert float((values <= place.activation).float().mean()) == pytest.approx(quantile, abs=0.1)  # 4 standard errors
    rows = torch.tensor([place.row for _, place in survey.quantiles(0, 400)]).float()
    assert rows.mean() == pytest.approx(10_000, abs=4 * 20_000 / (12 * 400) ** 0.5)


def test_memory_is_what_it_says_and_does_not_grow() -> None:
    survey = LatentSurvey(64, top=8, sample=8, window=12)
    stated = 64 * (20 + 16 * (32 + 4 * 25))
    assert survey.nbytes == stated
    for _ in range(3):
        code = torch.rand(500, 64)
        survey.update(Activations(torch.zeros(500, 2)), DenseCode(code))
        assert survey.nbytes == stated
    assert 16_384 * stated / 64 == pytest.approx(35e6, rel=0.01)  # as its docstring says


def test_score_is_mean_over_root_of_density() -> None:
    code = torch.zeros(100, 3)
    code[:4, 0], code[:64, 1] = 2.0, 2.0
    survey = LatentSurvey(3, top=1)
    survey.update(Activations(torch.zeros(100, 2)), DenseCode(code))
    assert survey.score.tolist() == pytest.approx([2 / 0.2, 2 / 0.8, 0.0])
