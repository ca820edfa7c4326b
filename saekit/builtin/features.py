"""The analyzer `features`: how often each latent fires, and where some of them fire most."""

from __future__ import annotations

from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from saekit.errors import OptionError
from saekit.result import Result
from saekit.runner.context import RunContext
from saekit.runner.examples import top_examples


class Features:
    """Density, mean and maximum of every latent, and the top activating examples of some, on held-out data.

    By default the latents shown are spread evenly over the living ones in order of density, so that frequent and rare ones are
    both seen. Each row of tokens gives at most one example, its strongest place.
    """

    def __init__(
        self,
        *,
        latents: Annotated[list[int] | None, Field(description="The latents to show; by default a spread of them.")] = None,
        n_latents: Annotated[int, Field(gt=0, description="How many latents to show if none are chosen.")] = 24,
        examples: Annotated[int, Field(gt=0, description="Top activating examples for each latent.")] = 8,
        window: Annotated[int, Field(ge=0, description="Tokens shown on each side.")] = 12,
        tokens: Annotated[int | None, Field(gt=0, description="Held-out activations; evaluation.tokens by default.")] = None,
    ) -> None:
        self.latents, self.n_latents, self.examples = latents, n_latents, examples
        self.window, self.tokens = window, tokens

    def __call__(self, context: RunContext) -> Result:
        """scalars: latents, dead, median density. tables: latents, examples. figures: density (a histogram)."""
        d_sae = context.sae.d_sae
        if self.latents and not all(0 <= j < d_sae for j in self.latents):
            raise OptionError("latents", f"{self.latents} are not all in 0 to {d_sae - 1}.")
        density, mean, largest, rows = self._statistics(context)
        shown = self._chosen(density)
        living = density[density > 0]
        examples = top_examples(context, shown, n=self.examples, window=self.window, tokens=self.tokens)
        table = [
            {
                "latent": j,
                "density": float(density[j]),
                "mean_activation": float(mean[j]),
                "max_activation": float(largest[j]),
            }
            for j in shown
        ]
        return Result(
            scalars={
                "latents": d_sae,
                "dead": int((density == 0).sum()),
                "density_median": float(living.median()) if len(living) else None,
                "activations": rows,
            },
            tables={"latents": table, "examples": examples},
            figures={"density": _histogram(living)} if len(living) else {},
            notes=[] if len(living) else [f"No latent fired on {rows} held-out activations, so there is nothing to show."],
        )

    def _statistics(self, context: RunContext) -> tuple[Tensor, Tensor, Tensor, int]:
        """(density, mean where active, maximum) of each latent, [d_sae] each, and the number of activations."""
        d_sae = context.sae.d_sae
        count, total = torch.zeros(d_sae, dtype=torch.float64), torch.zeros(d_sae, dtype=torch.float64)
        largest, rows = torch.zeros(d_sae), 0
        for step in context.held_out(self.tokens):
            _, latents, values = (t.cpu() for t in step.code.nonzero())
            count += torch.bincount(latents, minlength=d_sae)
            total.index_add_(0, latents, values.double())
            largest.scatter_reduce_(0, latents, values.float(), "amax")
            rows += len(step.code)
        return count / rows, total / count.clamp_min(1), largest, rows

    def _chosen(self, density: Tensor) -> list[int]:
        if self.latents is not None:
            return self.latents
        living = density.nonzero().squeeze(1)
        ordered = living[density[living].argsort(descending=True, stable=True)]
        if len(ordered) <= self.n_latents:
            return ordered.tolist()
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
