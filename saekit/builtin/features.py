"""The analyzer `features`: how often each latent fires, and what some of them fire on."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from saekit.errors import OptionError
from saekit.result import Result
from saekit.runner.context import RunContext
from saekit.runner.examples import example_rows, in_words
from saekit.runner.survey import LatentSurvey

_SAMPLE = 4  # places drawn for each one that is shown, so that the quantiles are near those of all places


class Features:
    """Density, mean and maximum of every latent, and examples of some, from one pass over held-out data.

    Examples are shown as the source renders them. The strongest ones of a latent are from different sequences; `quantiles` adds
    others that are spread over all of its activations, because the strongest may not be typical.

    By default the latents shown are spread evenly over the living ones in order of density, so that frequent and rare ones are
    both seen. `order = "score"` shows those first whose mean activation, where they fire, over the square root of their density is
    largest: strong and rare. `min_density = 0.01` and `max_density = 0.3` leave out rare cases and what fires on everything.

    Memory: that of a `LatentSurvey`, whatever the number of activations.
    """

    def __init__(
        self,
        *,
        latents: Annotated[list[int] | None, Field(description="The latents to show; by default a spread of them.")] = None,
        n_latents: Annotated[int, Field(gt=0, description="How many latents to show if none are chosen.")] = 24,
        order: Annotated[
            Literal["density", "score"],
            Field(description="density: spread over the densities; score: largest mean activation / sqrt(density) first."),
        ] = "density",
        min_density: Annotated[float, Field(ge=0, le=1, description="Show no latent that fires less often.")] = 0.0,
        max_density: Annotated[float, Field(ge=0, le=1, description="Show no latent that fires more often.")] = 1.0,
        examples: Annotated[int, Field(gt=0, description="Top activating examples for each latent.")] = 8,
        quantiles: Annotated[int, Field(ge=0, description="Further examples, spread over each latent's activations.")] = 4,
        window: Annotated[int, Field(ge=0, description="Tokens shown on each side.")] = 12,
        tokens: Annotated[int | None, Field(gt=0, description="Held-out activations; evaluation.tokens by default.")] = None,
    ) -> None:
        if min_density > max_density:
            raise OptionError("min_density", f"{min_density} is above max_density = {max_density}. Lower it.")
        self.latents, self.n_latents, self.order = latents, n_latents, order
        self.min_density, self.max_density = min_density, max_density
        self.examples, self.quantiles, self.window, self.tokens = examples, quantiles, window, tokens

    def __call__(self, context: RunContext) -> Result:
        """scalars: latents, dead, median density. tables: latents, examples. figures: density (a histogram)."""
        d_sae = context.sae.d_sae
        if self.latents and not all(0 <= j < d_sae for j in self.latents):
            raise OptionError("latents", f"{self.latents} are not all in 0 to {d_sae - 1}.")
        survey = LatentSurvey.of(
            context, tokens=self.tokens, top=self.examples, sample=_SAMPLE * self.quantiles, window=self.window
        )
        density, mean, maximum, score = (t.cpu() for t in (survey.density, survey.mean, survey.maximum, survey.score))
        within = (density > 0) & (density >= self.min_density) & (density <= self.max_density)
        shown = self._chosen(density, score, within)
        living = density[density > 0]
        examples = example_rows(context, survey, shown, quantiles=self.quantiles, tokens=self.tokens)
        strongest = in_words(examples)
        table = [
            {
                "latent": j,
                "density": float(density[j]),
                "mean_activation": float(mean[j]),
                "max_activation": float(maximum[j]),
                "score": float(score[j]),
                "example": strongest.get(j, ""),
            }
            for j in shown
        ]
        return Result(
            scalars={
                "latents": d_sae,
                "dead": int((density == 0).sum()),
                "density_median": float(living.median()) if len(living) else None,
                "within_densities": int(within.sum()),
                "activations": survey.rows,
            },
            tables={"latents": table, "examples": examples},
            figures={"density": _histogram(living)} if len(living) else {},
            notes=self._notes(len(living), len(shown), survey.rows),
        )

    def _notes(self, living: int, shown: int, rows: int) -> list[str]:
        if not living:
            return [f"No latent fired on {rows} held-out activations, so there is nothing to show."]
        if not shown:
            return [
                f"None of the {living} living latents has a density of {self.min_density} to {self.max_density}, so none is shown. "
                "Change min_density or max_density."
            ]
        return []

    def _chosen(self, density: Tensor, score: Tensor, within: Tensor) -> list[int]:
        if self.latents is not None:
            return self.latents
        latents = within.nonzero().squeeze(1)
        by = score if self.order == "score" else density
        ordered = latents[by[latents].argsort(descending=True, stable=True)]
        if self.order == "score" or len(ordered) <= self.n_latents:
            return ordered[: self.n_latents].tolist()
        places = torch.linspace(0, len(ordered) - 1, self.n_latents).round().long()
        return ordered[places].tolist()


def _histogram(density: Tensor) -> dict[str, Any]:
    """Densities of the living latents, on a logarithmic axis, as a plotly figure."""
    logs = density.log10()
    counts, edges = torch.histogram(logs.float(), bins=40, range=(min(-6.0, float(logs.min())), 0.0))
    middles = (edges[:-1] + edges[1:]) / 2
    return {
        "data": [{"type": "bar", "x": middles.tolist(), "y": counts.tolist(), "hovertemplate": "10^%{x:.2f}: %{y}<extra></extra>"}],
        "layout": {
            "title": {"text": "Density of living latents"},
            "xaxis": {"title": {"text": "log10 of the share of activations on which a latent fires"}},
            "yaxis": {"title": {"text": "latents"}},
            "bargap": 0.05,
        },
    }
