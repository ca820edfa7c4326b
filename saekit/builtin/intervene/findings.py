"""What the pass found, as numbers, sentences, one table and one figure."""

from __future__ import annotations

import math
from typing import Any

from saekit.builtin.intervene.choice import Chosen
from saekit.builtin.intervene.means import ClusteredMeans
from saekit.builtin.intervene.measured import ALL, GROUPS, KEPT, SPLICED, WITH, Edited, Measured
from saekit.controls import AgainstControls
from saekit.result import Result

CONTROLS = "matched random latents"
_COLOURS = {KEPT: "#c0392b", SPLICED: "#2980b9"}
_OPACITY = 0.5


def result_of(measured: Measured, *, what: str, rises: dict[int, bool], asked: int) -> Result:
    """what: the edit as it is written. rises: whether it raises each chosen latent where its concept is. asked: how many controls
    were asked for each latent."""
    scalars: dict[str, float | int | None] = {"latents": len(measured.chosen), "sequences": measured.sequences}
    notes, rows, shown = [], [], []
    for mode in dict.fromkeys(edited.mode for edited in measured.edited):
        moved = others = 0
        for number, one in enumerate(measured.chosen):
            own, *controls = [edited for edited in measured.edited if edited.mode == mode and edited.chosen is one]
            rows += _rows(measured, mode, number, own, controls)
            effect, rest = _effects(measured, own, controls, rises[one.latent])
            shown.append((mode, one, own, controls))
            notes.append(_sentence(measured, mode, number, one, what, effect, rest))
            moved += effect.exceeds
            others += rest is not None and rest.exceeds
        word = "kept" if mode == KEPT else "spliced"
        scalars |= {f"{word}_moved": moved, f"{word}_moved_others": others}
    few = [one.latent for one in measured.chosen if len(one.controls) < asked]
    if few:
        notes.append(f"Too few other latents are active to draw {asked} controls for {', '.join(map(str, few))}.")
    if not any(measured.targets(one) for one in measured.chosen):
        notes.append(
            "Which output each concept should move is not known, so the size of the change over all outputs is compared. Name "
            "them in targets, or name outputs like concepts (source.output_names)."
        )
    return Result(
        scalars=scalars,
        tables={"effects": rows},
        figures={"effects": _figure(measured, shown, what)},
        notes=notes,
        headline=[name for name in scalars if name.endswith("moved")],
    )


def _rows(measured: Measured, mode: str, number: int, own: Edited, controls: list[Edited]) -> list[dict[str, Any]]:
    """A row for each output and group of rows: before, after, and the same change by the controls."""
    one, rows = own.chosen, []
    targets = set(measured.targets(one))
    for group, name in enumerate(GROUPS):
        if not own.change.rows(group):
            continue
        before, change = measured.before[mode, number].mean(group), own.change.mean(group)
        intervals = own.change.intervals(group)
        drawn = [control.change.mean(group) for control in controls]
        splice = measured.splice[number].mean(group) if mode == SPLICED else None
        for column, output in enumerate(measured.names):
            low, high = intervals[column] or (None, None)
            finite = [_number(means[column]) for means in drawn]
            rows.append(
                {
                    "mode": mode,
                    "latent": one.latent,
                    "concept": one.concept,
                    "auroc": one.auroc,
                    "rows": name,
                    "output": output,
                    "target": column in targets,
                    "before": before[column],
                    "after": _number(before[column]) + _number(change[column]),
                    "change": change[column],
                    "change_low": low,
                    "change_high": high,
                    "control_mean": math.fsum(finite) / len(finite) if finite else None,
                    "control_low": min(finite, default=None),
                    "control_high": max(finite, default=None),
                    "splice": None if splice is None else splice[column],
                    "n": own.change.rows(group),
                    "sequences": own.change.sequences(group),
                }
            )
    return rows


def _effects(
    measured: Measured, own: Edited, controls: list[Edited], rises: bool
) -> tuple[AgainstControls, AgainstControls | None]:
    """The change of the concept's own outputs beside the controls', and the size of that of the others, on rows with the label;
    without known targets the size of the change of all outputs, and None."""
    targets = measured.targets(own.chosen)
    group = _group(own)
    everything = [one.change.mean(group) for one in (own, *controls)]
    rest = [column for column in range(len(measured.names)) if column not in targets]
    sizes = [_size([means[column] for column in rest]) for means in everything]
    other = AgainstControls.of(sizes[0], sizes[1:])
    if not targets:
        return other, None
    moved = [means[-1] for means in everything]
    return AgainstControls.of(moved[0], moved[1:], higher=rises), other if rest else None


def _sentence(
    measured: Measured, mode: str, number: int, one: Chosen, what: str, effect: AgainstControls, rest: AgainstControls | None
) -> str:
    where = f"{mode}, latent {one.latent}"
    if one.concept is not None:
        where += f" ({one.concept}, AUROC {one.auroc:.2f} on training data)"
    own = measured.targets(one)
    names = ", ".join(measured.names[column] for column in own)
    rows = "rows with the label" if _group_of(measured, mode, number) == GROUPS.index(WITH) else "all rows"
    subject = f"mean change of {names}" if own else "size of the change of all outputs"
    found = f"{where}, {what}, on {rows}: {effect.sentence(subject, CONTROLS)}"
    if rest is not None:
        found += f" {rest.sentence('size of the change of the other outputs', CONTROLS)}"
    if mode == SPLICED:
        group = _group_of(measured, mode, number)
        means = measured.splice[number].mean(group)
        alone = means[-1] if own else _size(means[:-1])
        found += f" The splice alone changes {'the same outputs' if own else 'all of them'} by {_number(alone):.3g}."
    return found


def _group(edited: Edited) -> int:
    """The rows that an effect is told of: those with the label, or all if there are none."""
    labelled = GROUPS.index(WITH)
    return labelled if edited.change.rows(labelled) else GROUPS.index(ALL)


def _group_of(measured: Measured, mode: str, number: int) -> int:
    one = measured.chosen[number]
    return _group(next(edited for edited in measured.edited if edited.mode == mode and edited.chosen is one))


def _size(means: list[float | None]) -> float | None:
    """The root mean square of the changes; None if there are none."""
    known = [mean for mean in means if mean is not None]
    return math.sqrt(math.fsum(mean**2 for mean in known) / len(known)) if known else None


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def _figure(measured: Measured, shown: list[tuple[str, Chosen, Edited, list[Edited]]], what: str) -> dict[str, Any]:
    """For each latent the change of its own outputs with its interval, or the size of that of all, beside each control's."""
    data: list[dict[str, Any]] = []
    for mode in dict.fromkeys(mode for mode, *_ in shown):
        names, values, up, down, of_controls, at_controls = [], [], [], [], [], []
        for _, one, own, controls in (entry for entry in shown if entry[0] == mode):
            group, targets = _group(own), measured.targets(one)
            name = f"{one.latent}" if one.concept is None else f"{one.latent} {one.concept}"
            names.append(name)

            def told(change: ClusteredMeans, group: int = group, targets: list[int] = targets) -> float | None:
                means = change.mean(group)
                return means[-1] if targets else _size(means[:-1])

            value, interval = told(own.change), own.change.intervals(group)[-1] if targets else None
            values.append(value)
            up.append(0.0 if interval is None else interval.high - _number(value))
            down.append(0.0 if interval is None else _number(value) - interval.low)
            of_controls += [told(control.change) for control in controls]
            at_controls += [name] * len(controls)
        common = {"type": "scatter", "mode": "markers", "hovertemplate": "%{x}: %{y:.3g}<extra></extra>"}
        colour = _COLOURS[mode]
        errors = {"type": "data", "symmetric": False, "array": up, "arrayminus": down}
        data.append({**common, "name": f"{mode}: controls", "x": at_controls, "y": of_controls,
                     "marker": {"color": colour, "opacity": _OPACITY, "size": 5, "symbol": "line-ew-open"}})  # fmt: skip
        data.append({**common, "name": mode, "x": names, "y": values, "error_y": errors, "marker": {"color": colour, "size": 9}})
    return {
        "data": data,
        "layout": {
            "title": {"text": f"Change of each concept's outputs by {what}"},
            "xaxis": {"title": {"text": "latent"}, "type": "category"},
            "yaxis": {"title": {"text": "change on rows with the label"}},
        },
    }
