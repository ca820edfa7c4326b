"""The first latents of a ranking tested together: are they necessary, are they sufficient, do they bring the answer about?

A set is chosen on half of the questions and tested on the other half, and the other way round, so that no sample has a part in
choosing what it is tested with. Beside each set stand random latents that are as often and as strongly active.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from saekit import AgainstControls, matched_latents
from saekit_attribution.atp.sample_analysis import AnalysedSample
from saekit_attribution.effects.batching import Failed
from saekit_attribution.effects.control_latents import Activity
from saekit_attribution.effects.latent_sets import SetEffects
from saekit_attribution.effects.ranking import Ranking, ranked
from saekit_attribution.labelled_data.teacher_forcing import Sample

Run = Callable[[list[Sample], list[list[int]]], list[SetEffects | Failed]]
"""`set_effects` of samples and sets, with the options of the analysis."""

MEASURES = {
    "necessity": "without them the logit difference falls",
    "sufficiency": "alone they raise it",
    "put_in": "put into the base run they raise it",
}
RESAMPLES = 1000


@dataclass
class SetTest:
    """One size of set for one template type: the effects of the set and of its controls, one entry for each sample.

    questions: the number of each sample's question.
    effects: by measure, the set's. controls: by measure, those of each draw. wholes: by measure, the whole effect. None
        where a sample has none (see `SetEffects`).
    all_put_in: of all latents.
    """

    template_type: str
    size: int
    questions: list[int] = field(default_factory=list)
    effects: dict[str, list[float | None]] = field(default_factory=lambda: {name: [] for name in MEASURES})
    controls: dict[str, list[list[float | None]]] = field(default_factory=lambda: {name: [] for name in MEASURES})
    wholes: dict[str, list[float | None]] = field(default_factory=lambda: {name: [] for name in MEASURES})
    all_put_in: list[float | None] = field(default_factory=list)

    def add(self, question: int, found: SetEffects, chosen: int, controls: Sequence[int]) -> None:
        """Add a sample's effects. chosen, controls: the numbers of the sets in `found`."""
        self.questions.append(question)
        self.all_put_in.append(found.all_put_in)
        sources = {"necessity": found.removed, "sufficiency": found.kept, "put_in": found.put_in}
        for name, values in sources.items():
            self.wholes[name].append(found.gap if name == "put_in" else found.whole)
            self.effects[name].append(None if values is None else values[chosen])
            self.controls[name].append([None if values is None else values[i] for i in controls])

    def row(self) -> dict[str, Any]:
        """The row of the table `sets`: each measure as a share of the whole effect, its 95% interval over questions, and the
        mean, the largest and the standard deviation of the shares of the controls."""
        row: dict[str, Any] = {
            "template_type": self.template_type,
            "latents": self.size,
            "samples": len(self.questions),
            "questions": len(set(self.questions)),
        }
        for name in MEASURES:
            low, high = self.interval(name)
            beside = AgainstControls.of(self.share(name), self.control_shares(name))
            row |= {
                name: beside.effect,
                f"{name}_low": low,
                f"{name}_high": high,
                f"{name}_random": beside.mean,
                f"{name}_random_most": beside.best,
                f"{name}_random_spread": beside.spread,
            }
        row["put_in_all_latents"] = _share(self.all_put_in, self.wholes["put_in"])
        return row

    def share(self, measure: str) -> float | None:
        """The sum of the effects over samples relative to the sum of the whole effects; None if that is not above zero."""
        return _share(self.effects[measure], self.wholes[measure])

    def control_shares(self, measure: str) -> list[float | None]:
        """The share of each draw of controls."""
        draws = list(zip(*self.controls[measure], strict=True))
        return [_share(draw, self.wholes[measure]) for draw in draws]

    def interval(self, measure: str) -> tuple[float | None, float | None]:
        """The percentile bootstrap's 95% interval of `share`, whole questions resampled; None with fewer than two."""
        pairs: dict[int, list[float]] = {}
        for question, part, whole in zip(self.questions, self.effects[measure], self.wholes[measure], strict=True):
            if part is not None and whole is not None:
                sums = pairs.setdefault(question, [0.0, 0.0])
                sums[0], sums[1] = sums[0] + part, sums[1] + whole
        if len(pairs) < 2 or self.share(measure) is None:
            return None, None
        sums_of = torch.tensor(list(pairs.values()), dtype=torch.float64)  # [questions, 2]
        generator = torch.Generator().manual_seed(0)
        drawn = torch.randint(len(pairs), (RESAMPLES, len(pairs)), generator=generator)
        parts, wholes = sums_of[drawn].sum(1).unbind(1)
        if not bool((wholes > 0).all()):
            return None, None  # a share of next to nothing has no interval
        low, high = (parts / wholes).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
        return low, high

    def sentences(self) -> Iterator[tuple[str, bool]]:
        """For each measure, whether the set exceeds its controls and by how much of their spread, and whether it does."""
        what = f"{self.size} latents chosen for {self.template_type!r}" if self.template_type else f"{self.size} latents"
        for name in MEASURES:
            beside = AgainstControls.of(self.share(name), self.control_shares(name))
            if beside.effect is not None and beside.finite:
                found = f"{what}: {MEASURES[name]} by {beside.effect:.0%} of the whole effect."
                yield f"{found} {beside.sentence('share', 'draws of matched random latents')}", beside.exceeds


def set_tests(
    analysed: Sequence[AnalysedSample], run: Run, sizes: Sequence[int], *, draws: int, d_sae: int, seed: int
) -> tuple[list[SetTest], list[str]]:
    """The tests of each template type and size, and what could not be tested and why.

    sizes: how many latents, first by the mean score of the first method. draws: of controls for each."""
    tests: list[SetTest] = []
    problems: list[str] = []
    kinds: dict[str, list[AnalysedSample]] = {}
    for a in analysed:
        kinds.setdefault(a.sample.template_type, []).append(a)
    generator = torch.Generator().manual_seed(seed)
    for kind, some in kinds.items():
        questions = sorted({a.sample.place[0] for a in some})
        if len(questions) < 2:
            problems.append(f"No set of latents was tested for {kind!r}: that takes two questions, one to choose it by.")
            continue
        order = torch.randperm(len(questions), generator=generator).tolist()
        first = {questions[i] for i in order[::2]}
        halves = [[a for a in some if (a.sample.place[0] in first) is wanted] for wanted in (True, False)]
        of_size = {size: SetTest(kind, size) for size in sizes}
        for choose_by, test_on in (halves, halves[::-1]):
            ranking = ranked([next(iter(a.attributions.values())) for a in choose_by])
            failed, few = _tested(of_size, ranking, test_on, run, draws, d_sae, generator)
            problems += [f"{failed} samples of {kind!r} failed in the test of sets."] if failed else []
            problems += [f"For {kind!r}, {text}" for text in few]
        tests += [test for test in of_size.values() if test.questions]
    return tests, list(dict.fromkeys(problems))


def _tested(
    of_size: dict[int, SetTest],
    ranking: Ranking,
    test_on: Sequence[AnalysedSample],
    run: Run,
    draws: int,
    d_sae: int,
    generator: torch.Generator,
) -> tuple[int, list[str]]:
    """Adds the effects on one half to the tests. How many samples failed, and of what there was too little."""
    activity, few = _activity(ranking, d_sae), []
    sets: list[list[int]] = []
    for size in of_size:
        chosen = ranking.top(size)
        controls = [matched_latents(chosen, activity.density, activity.mean, generator) for _ in range(draws)]
        if len(chosen) < size:
            few.append(f"only {len(chosen)} latents promote the target: {size} were asked for.")
        if controls and len(controls[0]) < len(chosen):
            few.append(f"there are only {len(controls[0])} other latents to draw {len(chosen)} controls from.")
        sets += [chosen, *controls]
    failed = 0
    for a, found in zip(test_on, run([a.sample for a in test_on], sets), strict=True):
        if isinstance(found, Failed):
            failed += 1
            continue
        for position, test in enumerate(of_size.values()):
            start = position * (1 + draws)
            test.add(a.sample.place[0], found, start, range(start + 1, start + 1 + draws))
    return failed, few


def _activity(ranking: Ranking, d_sae: int) -> Activity:
    """How many of the samples each latent is active in, and how strongly."""
    density, mean = torch.zeros(d_sae, dtype=torch.float64), torch.zeros(d_sae, dtype=torch.float64)
    density[ranking.latents] = ranking.share
    mean[ranking.latents] = ranking.activations / ranking.share
    return Activity(density, mean)


def _share(parts: Sequence[float | None], wholes: Sequence[float | None]) -> float | None:
    known = [(part, whole) for part, whole in zip(parts, wholes, strict=True) if part is not None and whole is not None]
    total = sum(whole for _, whole in known)
    return sum(part for part, _ in known) / total if total > 0 else None
