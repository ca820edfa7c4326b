"""The three figures over the variants of a run as PNG files for print: 7 inches wide, 300 dots an inch.

The colours are those of Okabe and Ito (2008), which colour-blind readers can tell apart; hatches and dashes tell the same in black
and white.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saekit_unlearning.edits import PATHS
from saekit_unlearning.variant_table import OURS, SAEBENCH, SCORES, Variant, words

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#000000", "#F0E442")
_DASHES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1, 1)), (0, (5, 1, 1, 1)), (0, (8, 2)), (0, (3, 1, 1, 1, 1, 1)))
_HATCHES = ("", "////")
_STYLE: dict[Any, Any] = {
    "font.size": 8,
    "font.family": "DejaVu Sans",
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "hatch.linewidth": 0.6,
    "legend.frameon": False,
}
_WIDTH, _DPI = 7.0, 300
_LINE = 0.135  # inches a line of small text
_QUIET = "#555555"
_OVER_GRID = {"facecolor": "white", "edgecolor": "none", "pad": 0.6}
_TITLES = {
    SAEBENCH: "SAEBench's score: chosen and reported on the same questions",
    OURS: "Our score: chosen on seen wordings, reported on unseen ones",
}


def draw(variants: Sequence[Variant], directory: Path, steps_of: int) -> list[str]:
    """Write the three figures; returns their names. steps_of: activations in a step."""
    import matplotlib as mpl

    with mpl.rc_context(_STYLE):
        drawn = {
            "unlearning_scores.png": scores(variants),
            "training_losses.png": losses(variants, steps_of),
            "feature_thresholds.png": thresholds(variants),
        }
        for name, figure in drawn.items():
            figure.savefig(directory / name, dpi=_DPI, metadata={"Software": None})
    return list(drawn)


def scores(variants: Sequence[Variant]) -> Figure:
    """Bars over the variants: SAEBench's score above, ours below, each on both paths; why a bar is zero stands under them."""
    from matplotlib.patches import Patch

    reasons = _Reasons()
    for score in SCORES:
        for variant in variants:
            for path in PATHS:
                reasons.letter(variant.scores[score, path].reason)
    names = _names(variants)
    below = (reasons.n_lines + 1.5) * _LINE + 0.16 * max(name.count("\n") + 1 for name in names)
    figure, axes = _panels(2, 1, 3.9 + below, sharex=True, sharey=True)
    for axis, score in zip(axes, SCORES, strict=True):
        for number, path in enumerate(PATHS):
            found = [variant.scores[score, path] for variant in variants]
            x = [i + 0.38 * (number - (len(PATHS) - 1) / 2) for i in range(len(variants))]
            _bars(axis, x, [s.value for s in found], number)
            for at, one in zip(x, found, strict=True):
                value, high = one.value, one.high
                if value is not None and one.low is not None and high is not None:
                    ends = [[max(value - one.low, 0.0)], [max(high - value, 0.0)]]
                    axis.errorbar(at, value, yerr=ends, color="black", linewidth=0.8, capsize=2)
                text = "–" if value is None else f"{value:.2f}"
                top = max(value or 0.0, high or 0.0)
                axis.text(at, top + 0.03, text + reasons.mark(one.reason), ha="center", va="bottom", fontsize=7, bbox=_OVER_GRID)
        axis.set_title(_TITLES[score])
        axis.set_ylabel("score (0 to 1)")
        axis.set_ylim(-0.04, 1.12)
        axis.set_yticks([0, 0.25, 0.5, 0.75, 1])
        axis.grid(axis="x", visible=False)
    interval = any(v.scores[OURS, path].low is not None for v in variants for path in PATHS)
    axes[-1].set_xticks(range(len(variants)), names)
    height = figure.get_size_inches()[1]
    figure.tight_layout(rect=(0, (reasons.n_lines + 1.5) * _LINE / height, 1, 1))
    note = "Higher is better." + (" Whiskers: 95% by resampling facts." if interval else "")
    above = (reasons.n_lines + 0.3) * _LINE / height
    handles = [Patch(facecolor=COLOURS[n], hatch=_HATCHES[n], edgecolor="black", label=words(p)) for n, p in enumerate(PATHS)]
    figure.legend(handles=handles, loc="lower right", ncols=2, bbox_to_anchor=(0.99, above), borderaxespad=0.0)
    figure.text(0.012, 0.012, "\n".join([note, *reasons.lines()]), fontsize=7, va="bottom", color=_QUIET, linespacing=1.25)
    return figure


def losses(variants: Sequence[Variant], steps_of: int) -> Figure:
    """A line a variant: the loss that is trained, and the reconstruction's, which all of them share."""
    from matplotlib.ticker import MaxNLocator

    shared = next((n for n in variants[0].losses if n != "loss" and all(n in v.losses for v in variants)), None)
    panels = {"loss": "All terms, as weighted"} | ({shared: f"The term {shared} alone"} if shared else {})
    rows = math.ceil(len(variants) / 3)
    figure, axes = _panels(1, len(panels), 2.9 + 0.17 * rows)
    for axis, (loss, title) in zip(axes, panels.items(), strict=True):
        drawn = [value for v in variants for _, value in v.losses.get(loss, ()) if math.isfinite(value)]
        for number, variant in enumerate(variants):
            curve = variant.losses.get(loss, ())
            axis.plot(
                [step for step, _ in curve],
                [value for _, value in curve],
                color=COLOURS[number % len(COLOURS)],
                linestyle=_DASHES[number % len(_DASHES)],
                linewidth=1.2,
                alpha=0.7,
                label=variant.name,
            )
        if not drawn:
            axis.text(0.5, 0.5, "nothing was trained", transform=axis.transAxes, ha="center", color=_QUIET)
        elif min(drawn) > 0 and max(drawn) / min(drawn) > 20:
            axis.set_yscale("log")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.set_title(title)
        axis.set_xlabel(f"training step ({steps_of:,} activations each)")
        axis.set_ylabel("loss (no unit)")
    height = figure.get_size_inches()[1]
    figure.tight_layout(rect=(0, (0.1 + 0.17 * rows) / height, 1, 1))
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=3, handlelength=3)
    return figure


def thresholds(variants: Sequence[Variant]) -> Figure:
    """Bars over the variants: the importance that a latent must reach."""
    figure, (axis,) = _panels(1, 1, 2.8)
    x = list(range(len(variants)))
    values = [variant.threshold for variant in variants]
    _bars(axis, x, values, 0, width=0.6)
    highest = max((value for value in values if value), default=0.01)
    for at, variant in zip(x, variants, strict=True):
        if variant.threshold is None:
            none = "no threshold:\nno latent is\nselected by\nimportance"
            axis.text(at, 0.03 * highest, none, ha="center", va="bottom", color=_QUIET, bbox=_OVER_GRID)
            continue
        text = f"{variant.threshold:.3g}"
        if variant.above is not None and variant.living is not None:
            text += f"\n{variant.above:,.0f} of\n{variant.living:,.0f} latents"
        axis.text(at, variant.threshold + 0.03 * highest, text, ha="center", va="bottom", bbox=_OVER_GRID)
    axis.set_ylim(-0.02 * highest, 1.45 * highest)
    axis.set_ylabel("importance (share of the largest)")
    axis.set_title("Threshold of importance at the end of training, and the latents that reach it")
    axis.set_xticks(x, _names(variants))
    axis.set_xlim(-0.6, len(variants) - 0.4)
    axis.grid(axis="x", visible=False)
    figure.tight_layout()
    return figure


def _names(variants: Sequence[Variant]) -> list[str]:
    """The names below the bars, on as many lines as they need."""
    return [textwrap.fill(variant.name, 13, break_on_hyphens=True) for variant in variants]


def _panels(rows: int, columns: int, height: float, **shared: Any) -> tuple[Figure, list[Axes]]:
    """A figure without pyplot, which would keep it and choose a screen."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH, height))
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(rows, columns, squeeze=False, **shared).flat)


def _bars(axis: Axes, x: Sequence[float], values: Sequence[float | None], number: int, *, width: float = 0.36) -> None:
    """Bars; one of height zero is a thick line in its colour, and one without a value is nothing."""
    axis.bar(
        x,
        [value or 0.0 for value in values],
        width,
        color=COLOURS[number],
        edgecolor=["black" if value else COLOURS[number] for value in values],
        linewidth=[0.0 if value is None else 0.9 if value else 2.5 for value in values],
        hatch=_HATCHES[number % len(_HATCHES)],
    )


class _Reasons:
    """Reasons, each with a letter, in the order in which they are first given."""

    def __init__(self) -> None:
        self._letters: dict[str, str] = {}

    def letter(self, reason: str) -> str:
        if not reason:
            return ""
        number = len(self._letters)
        return self._letters.setdefault(reason, chr(97 + number) if number < 26 else f"a{chr(97 + number - 26)}")

    def mark(self, reason: str) -> str:
        """What stands after a bar's number."""
        return f" $^{{\\mathbf{{{self.letter(reason)}}}}}$" if reason else ""

    def lines(self) -> list[str]:
        """The letters with their reasons, as wide as the figure."""
        return [
            line
            for reason, letter in self._letters.items()
            for line in textwrap.wrap(f"{letter}  {reason}", 125, subsequent_indent="    ")
        ]

    @property
    def n_lines(self) -> int:
        return len(self.lines())
