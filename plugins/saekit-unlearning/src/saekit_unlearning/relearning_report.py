"""What relearning says of every method of `unlearn`: rows, a figure, and a sentence for each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from saekit import Result
from saekit_unlearning.answers import Examination
from saekit_unlearning.baselines.by_name import ORACLE
from saekit_unlearning.data import UnlearningData
from saekit_unlearning.edited import Edited
from saekit_unlearning.experiment import Found
from saekit_unlearning.figures import title
from saekit_unlearning.relearning import STEPS, Relearned, extra_gain, relearn, share_above, verdict

CONTROL = "the oracle (never knew them)"


@dataclass(frozen=True)
class Attack:
    """What became of a method's shown setting.

    as_it_is: relearning with the method's edit in place, if it has one at the site.
    taken_away: what the other half is without that edit, before any step; None if the weights were changed instead, which nobody
        can take away.
    """

    found: Found
    as_it_is: Relearned
    taken_away: float | None

    @property
    def name(self) -> str:
        """The method, its path and its setting, in words."""
        found = self.found
        assert found.shown is not None
        beyond = "" if found.chosen is not None else ", beyond the bound"
        return f"{title(found)} ({found.trials[found.shown].label}{beyond})"


@dataclass(frozen=True)
class Relearning:
    """How methods are relearned: on half of the entities to be forgotten, for so many steps of each batch of texts."""

    data: UnlearningData
    examination: Examination
    steps: int
    seed: int

    def of(self, edited: Edited) -> Relearned:
        """After 0, 1, 2, 5, 10, ... steps."""
        at = (*(step for step in STEPS if step < self.steps), self.steps)
        return relearn(edited, self.data, self.examination, seed=self.seed, at=at)

    def attack(self, found: Found, control: Relearned | None) -> Attack | None:
        """None if the method has no setting, or one whose model nobody can train further."""
        edited = None if found.shown is None else found.trials[found.shown].edited
        if edited is None:
            return None
        if found.method == ORACLE and control is not None:
            return Attack(found, control, None)
        if edited.edit is None:
            return Attack(found, self.of(edited), None)
        without = relearn(edited.without_edit(), self.data, self.examination, seed=self.seed, at=(0,))
        return Attack(found, self.of(edited), without.curve[0])


def add_relearning(result: Result, results: Sequence[Found], how: Relearning, oracle: Edited | None) -> None:
    """Relearn the shown setting of every method, and say what came of it.

    scalars: relearn_gain_*, with intervals. tables: relearning. figures: relearning. notes: a sentence for each method."""
    control = None if oracle is None else how.of(oracle)
    attacks = [attack for found in results if (attack := how.attack(found, control)) is not None]
    result.tables["relearning"] = [_row(attack, control, how.seed) for attack in attacks]
    result.figures["relearning"] = _figure(attacks, control)
    for attack in attacks:
        found = attack.found
        if found.method == ORACLE:
            continue
        name = f"relearn_gain_{found.method}_{found.path or 'model'}"
        gain, interval = extra_gain(attack.as_it_is, None, how.seed)
        result.scalars |= {name: gain, f"{name}_low": interval.low, f"{name}_high": interval.high}
        result.notes.append(verdict(attack.name, attack.as_it_is, control, how.seed))
    _say_what_can_be_taken_away(result, attacks)
    left = [title(found) for found in results if found.shown is not None and found not in [a.found for a in attacks]]
    if left:
        result.notes.append(f"Relearning was not tried on {'; '.join(left)}: the method gives no model to train further.")


def _say_what_can_be_taken_away(result: Result, attacks: Sequence[Attack]) -> None:
    edits = [attack for attack in attacks if attack.taken_away is not None]
    if edits:
        share = max(attack.taken_away for attack in edits if attack.taken_away is not None)
        titles = "; ".join(title(attack.found) for attack in edits)
        result.notes.append(
            f"Edits at the site leave the weights as they were ({titles}): whoever takes the edit away has the facts back at once, "
            f"{share:.2f} of the other half without a step. They hide by construction, and relearning with the edit in place only "
            "says how well."
        )


def _row(attack: Attack, control: Relearned | None, seed: int) -> dict[str, Any]:
    found, again = attack.found, attack.as_it_is
    assert found.shown is not None
    gain, own = extra_gain(again, None, seed)
    row: dict[str, Any] = {
        "method": found.method,
        "path": found.path or "model",
        "setting": found.trials[found.shown].label,
        "within_bound": found.chosen is not None,
        **{f"other_half_{step}": share for step, share in zip(again.steps, again.curve, strict=True)},
        **{f"trained_half_{step}": share for step, share in zip(again.steps, again.trained_curve, strict=True)},
        "other_half_n": again.other.shape[1],
        "back_after": again.back_after,
        "edit_taken_away": attack.taken_away,
        "gain": gain,
        "gain_low": own.low,
        "gain_high": own.high,
    }
    if control is not None and found.method != ORACLE:
        more, beyond = extra_gain(again, control, seed)
        row |= {"beyond_oracle": more, "beyond_oracle_low": beyond.low, "beyond_oracle_high": beyond.high}
        above, over = share_above(again, control, seed)
        row |= {"above_oracle": above, "above_oracle_low": over.low, "above_oracle_high": over.high}
    return row


def _figure(attacks: Sequence[Attack], control: Relearned | None) -> dict[str, Any]:
    """The share of the other half by steps; a cross before the first step is the model with the edit taken away."""
    dashes = {"spliced": "dot", "error_kept": "solid", None: "dash"}
    lines = [
        (title(a.found), a.as_it_is, {"dash": dashes[a.found.path], "width": 1.5})
        for a in attacks
        if a.found.method != ORACLE
    ]
    if control is not None:
        lines.append((CONTROL, control, {"color": "black", "width": 3}))
    taken = [a for a in attacks if a.taken_away is not None]
    data: list[dict[str, Any]] = [
        {
            "type": "scatter",
            "mode": "lines+markers",
            "name": name,
            "line": line,
            "x": list(range(len(again.steps))),
            "y": again.curve,
            "customdata": list(again.steps),
            "hovertemplate": f"{name}<br>%{{customdata}} steps: %{{y:.3f}}<extra></extra>",
        }
        for name, again, line in lines
    ]
    if taken:
        data.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": "edit taken away",
                "marker": {"symbol": "x", "size": 10, "color": "black"},
                "x": [0] * len(taken),
                "y": [a.taken_away for a in taken],
                "text": [title(a.found) for a in taken],
                "hovertemplate": "%{text}<br>edit taken away: %{y:.3f}<extra></extra>",
            }
        )
    ticks = max((again.steps for _, again, _ in lines), key=len, default=())
    return {
        "data": data,
        "layout": {
            "title": {"text": "What comes back of the other half of what was forgotten"},
            "xaxis": {
                "title": {"text": "steps of relearning the first half"},
                "tickvals": list(range(len(ticks))),
                "ticktext": list(map(str, ticks)),
            },
            "yaxis": {"title": {"text": "right, half that is not relearned"}, "range": [-0.02, 1.02]},
        },
    }
