"""One analysis from beginning to end: units, cluster, typical tokens, all pushes, texts, files."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

from saekit import Result, RunContext, write_json, write_text
from saekit_steering.activation_statistics import Spread, spread
from saekit_steering.cluster import Classes, ClassMoments, Cluster
from saekit_steering.continuations import Continuation, continuations
from saekit_steering.html_page import page
from saekit_steering.prompts import Prompt, batch_of, batches, tokenised
from saekit_steering.scoring import Measure, Measured, held_out_text, logit_lens
from saekit_steering.steering_log import layer_of, record
from saekit_steering.steering_vectors import Push, Strength, latent_pushes, other_pushes, random_pushes, strengths
from saekit_steering.summary import Found, summarised
from saekit_steering.typical_tokens import (
    TokenCounts,
    TypicalTokens,
    concept_column,
    held_out_sequences,
    typical_tokens,
)

if TYPE_CHECKING:
    from saekit_steering.steer import Steer

REACH = (2.0, 4.0)
"""Random directions are also added at so many times the largest strength, to see whether they ever have the effect."""
LENS_TOKENS = 10
"""Logit-lens tokens of a direction, of which the likeliest counts in the output score."""


class Session:
    """context: the finished run. settings: the analyzer with its options."""

    def __init__(self, context: RunContext, settings: Steer) -> None:
        self.context, self.settings = context, settings
        self.subject = context.source.subject
        self.column = concept_column(context, settings.concept)
        self.prompts = tokenised(settings.texts, self.subject, settings.max_new_tokens)
        self.cluster = Cluster(context, settings.latent, settings.neighbours)

    def run(self) -> Result:
        context, settings = self.context, self.settings
        units = spread(context, settings.statistics_tokens)
        size = self._unit(units)
        if size is None:
            return Result(
                notes=[
                    f"Nothing was steered: latent {settings.latent} never fired on {units.rows} held-out activations, so "
                    f"strengths in units of its {settings.unit} mean nothing. Use unit = 'norm' or 'absolute'."
                ]
            )
        typical, by_class = self._estimates()
        pushes = self._pushes(size, units)
        measure = Measure(context, self.cluster, typical)
        measured = measure(pushes, batches(self.prompts, settings.batch_tokens), self._lens(pushes))
        self._on_held_out(measure, pushes, measured)
        written = self._written(pushes, typical)
        result = summarised(
            Found(
                settings=settings,
                kinds=list(dict.fromkeys(prompt.kind for prompt in self.prompts)),
                concept=context.source.concepts[self.column],
                cluster=self.cluster,
                classes=by_class,
                spread=units,
                pushes=pushes,
                measured=measured,
                written=written,
            )
        )
        path = context.directory / "typical_tokens.json"
        write_json(
            path,
            {
                "concept": context.source.concepts[self.column],
                "split": "held_out",
                "sequences": settings.set_sequences,
                "min_count": settings.min_count,
                **typical.to_json(context.source.token_strings),
            },
        )
        result.files.append(path.name)
        for number, push in enumerate(pushes):
            if push.kind == "latent":
                self._write(self._record(units, measured, push, number, written), push, result)
        return result

    def _unit(self, units: Spread) -> float | None:
        """How much of the latent's activation one unit of strength is; None where the latent never fired and the unit is
        of its activation."""
        latent = self.settings.latent
        row_norm = float(self.context.sae.W_dec[latent].detach().norm())
        size = {
            "absolute": 1.0,
            "max": float(units.largest[latent]),
            "rms": float(units.rms[latent]),
            "norm": units.norm / row_norm,
        }[self.settings.unit]
        return size if math.isfinite(size) and size > 0 else None

    def _pushes(self, size: float, units: Spread) -> list[Push]:
        settings, sae = self.settings, self.context.sae
        row_norm = float(sae.W_dec[settings.latent].detach().norm())

        def sweep(values: list[float]) -> list[Strength]:
            return strengths(values, settings.unit, size, row_norm)

        asked = [value for value in settings.strengths if value != 0]
        end = max(asked, key=abs)
        further = sorted({*asked, *(factor * end for factor in REACH)})
        seed, n = self.context.seed, settings.controls
        return [
            *latent_pushes(sae, settings.latent, sweep(asked)),
            *random_pushes(sae, settings.latent, sweep(further), n, seed),
            *other_pushes(sae, settings.latent, units.std > 0, sweep(asked), n, seed),
        ]

    def _lens(self, pushes: list[Push]) -> dict[int, torch.Tensor]:
        """By the number of each push: the tokens that its direction writes; empty where the model has no unembedding."""
        found = {}
        for number, push in enumerate(pushes):
            row = push.sae.W_dec[push.row].detach() * math.copysign(1.0, push.strength.absolute)
            tokens = logit_lens(self.subject, row, LENS_TOKENS)
            if tokens is not None:
                found[number] = tokens
        return found

    def _estimates(self) -> tuple[TypicalTokens, Classes]:
        """The concept's typical tokens, and what the cluster does with it and without, from one pass."""
        settings = self.settings
        vocabulary = self.subject.logits(batch_of([(0, 0)])).shape[-1]
        counts = TokenCounts(self.column, vocabulary)
        moments = ClassMoments(self.context.sae, self.cluster, self.column, self.context.scale)
        for batch in held_out_sequences(self.context, self.column, settings.set_sequences):
            counts.add(batch)
            moments.add(batch)
        return typical_tokens(counts.counts, settings.set_size, settings.min_count), moments.found()

    def _on_held_out(self, measure: Measure, pushes: list[Push], measured: Measured) -> None:
        """Add the steered latent's figures on held-out text; the controls are compared on prompts."""
        own = [number for number, push in enumerate(pushes) if push.kind == "latent"]
        text = held_out_text(self.context, self.settings.held_out_tokens)
        found = measure([pushes[number] for number in own], text, {})
        measured.clean |= found.clean
        for number, scores in zip(own, found.pushed, strict=True):
            measured.pushed[number] |= scores

    def _written(self, pushes: list[Push], typical: TypicalTokens) -> list[Continuation]:
        """Continuations of the first prompts of every kind under every push of the steered latent."""
        settings = self.settings
        chosen: list[Prompt] = []
        for kind in dict.fromkeys(prompt.kind for prompt in self.prompts):
            chosen += [prompt for prompt in self.prompts if prompt.kind == kind][: settings.continued]
        if not chosen:
            return []
        return [
            one
            for number, push in enumerate(pushes)
            if push.kind == "latent"
            for one in continuations(
                self.subject,
                chosen,
                push,
                number,
                typical,
                settings.judge_function,
                max_new_tokens=settings.max_new_tokens,
                temperature=settings.temperature,
                seed=self.context.seed,
            )
        ]

    def _record(
        self, units: Spread, measured: Measured, push: Push, number: int, written: list[Continuation]
    ) -> dict[str, Any]:
        return record(
            self.context, self.cluster, self.settings.neighbours, units, self.prompts, measured, push, number, written
        )

    def _write(self, document: dict[str, Any], push: Push, result: Result) -> None:
        name = f"L{layer_of(self.subject)}_S{push.strength.name}"
        path = self.context.directory / f"{name}.json"
        write_json(path, document)
        result.files.append(path.name)
        if self.settings.pages:
            path = self.context.directory / f"feature_{push.row}_{name}.html"
            write_text(path, page(document))
            result.files.append(path.name)
