"""One method on one path: its settings on seen wordings, what is chosen, and what that does on wordings never used before."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from saekit import AgainstControls
from saekit_unlearning.answers import Logits
from saekit_unlearning.curve import area, front
from saekit_unlearning.damage import Damage
from saekit_unlearning.data import FORGET
from saekit_unlearning.edits import Path
from saekit_unlearning.measure import Exam, Outcome
from saekit_unlearning.methods import Control, Method, Prepared, Seen, Trial
from saekit_unlearning.score import (
    Setting,
    Tried,
    chosen_setting,
    held_back_reason,
    held_back_score,
    saebench_score,
    zero_reason,
)


@dataclass(frozen=True)
class Found:
    """What one method did on one path.

    seen: every trial on the wordings that settings are chosen on.
    saebench: SAEBench's score, chosen and reported on those.
    chosen: the number of the trial that our rule chose; None if none that made the model forget kept enough.
    shown: the chosen one, or else the one with the highest (1 - forget) * least_retained on seen wordings, which is only shown.
    unseen: `shown` on the wordings never used before. None if there were no trials.
    alone: the reconstruction without any edit on these, for the path "spliced": what is lost before anything is edited.
    front: the trials of the curve, chosen on seen wordings, as they are on the others.
    area: that of the curve.
    controls: `held_back_score` of `shown` against those of its controls, by what these are in words.
    damage: by kind of held-out text, of `shown`.
    reason: why a score is zero.
    """

    method: str
    path: Path | None
    candidates: int | None
    trials: Sequence[Trial]
    seen: Sequence[Setting]
    saebench: float
    chosen: int | None
    shown: int | None
    unseen: Outcome | None
    alone: Outcome | None
    front: Sequence[tuple[str, Setting]]
    area: float
    controls: Mapping[str, AgainstControls]
    damage: dict[str, Damage]
    reason: str | None

    @property
    def score(self) -> float:
        """Ours."""
        return held_back_score(None if self.chosen is None or self.unseen is None else self.unseen.setting)

    @property
    def nearest_control(self) -> AgainstControls | None:
        """Of several kinds of control the one that comes nearest to the effect, or goes furthest beyond it."""
        drawn = [control for control in self.controls.values() if control.best is not None]
        return max(drawn, key=lambda control: control.best or 0.0, default=None)

    @property
    def seen_score(self) -> float:
        """The same of the chosen setting, on the wordings it was chosen on."""
        return held_back_score(None if self.chosen is None else self.seen[self.chosen])


@dataclass(frozen=True)
class Experiment:
    """Where methods are tried.

    seen, exam, unseen: what methods may look at, the same questions to choose settings on, and those that are only reported.
    bound: on what is retained. draws: of each kind of control. chance: of guessing what is to be forgotten.
    """

    seen: Seen
    exam: Exam
    unseen: Exam
    bound: float
    draws: int
    chance: float
    damage_of: Callable[[Logits], dict[str, Damage]]

    @cached_property
    def splice_alone(self) -> Outcome:
        """The reconstruction without any edit, on wordings never used before."""
        return self.unseen.of(self.seen.splice().logits)

    def results(self, method: Method) -> Iterator[Found]:
        """One for each path that the method tries. "spliced" comes first, since it may say why the other path does nothing."""
        prepared = method.prepare(self.seen)
        there = {trial.path for trial in prepared.trials} or set(prepared.paths)
        paths = sorted(there, key=lambda path: (path != "spliced", path or ""))
        lowest = None
        for path in paths:
            trials = [trial for trial in prepared.trials if trial.path == path]
            found = self._on_path(method.name, path, prepared, trials, lowest)
            if path == "spliced":
                lowest = min((setting.forget for setting in found.seen), default=None)
            yield found

    def _on_path(
        self, name: str, path: Path | None, prepared: Prepared, trials: Sequence[Trial], spliced: float | None
    ) -> Found:
        start, unedited = None, None
        if path == "spliced":
            start = self.exam.scores(self.seen.splice().logits)
            unedited = self.exam.of_scores(start).setting
        outcomes = [self.exam.of(trial.logits, start) for trial in trials]
        settings = [outcome.setting for outcome in outcomes]
        chosen = chosen_setting(settings, self.bound)
        if chosen is not None and settings[chosen].forget == 1:
            chosen = None  # nothing was forgotten
        shown = chosen
        if chosen is None:
            shown = max(range(len(settings)), key=lambda i: held_back_score(settings[i]), default=None)
        on_front = front(settings)
        reported = {i: self.unseen.of(trials[i].logits) for i in {*on_front, *([] if shown is None else [shown])}}
        right, asked = self.exam.before[FORGET]
        tried = Tried(
            prepared.candidates,
            settings,
            max((outcome.changed for outcome in outcomes), default=0.0),
            right / asked,
            self.chance,
            sum(questions for _, questions in settings[0].retain.values()) if settings else 0,
            spliced,
            unedited,
        )
        unseen = None if shown is None else reported[shown]
        why_nothing = None if trials else prepared.reason
        reason = why_nothing or zero_reason(tried, self.bound) or held_back_reason(
            settings, chosen, None if unseen is None else unseen.setting, self.bound
        )
        return Found(
            name,
            path,
            prepared.candidates,
            trials,
            settings,
            saebench_score(settings, self.bound),
            chosen,
            shown,
            unseen,
            self.splice_alone if path == "spliced" else None,
            [(trials[i].label, reported[i].setting) for i in on_front],
            area([reported[i].setting for i in on_front]),
            {} if shown is None or unseen is None else self._controls(trials[shown], held_back_score(unseen.setting)),
            {} if shown is None else self.damage_of(trials[shown].logits),
            reason,
        )

    def _controls(self, trial: Trial, effect: float) -> dict[str, AgainstControls]:
        """The effect of a trial beside those of each of its controls."""
        return {
            control.name: AgainstControls.of(effect, self._scores(control)) for control in trial.controls if self.draws
        }

    def _scores(self, control: Control) -> list[float]:
        generator = torch.Generator().manual_seed(self.seen.seed)
        return [
            held_back_score(self.unseen.of(control.draw(generator)).setting) for _ in range(self.draws)
        ]
