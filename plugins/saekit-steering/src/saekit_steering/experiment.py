"""The steering experiment from beginning to end: units, cluster, typical tokens, vectors, texts, files."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

from saekit import Result, RunContext, TokenBatch, write_json, write_text
from saekit_steering.activation_statistics import (
    ActivationStatistics,
    activation_statistics,
    directions_like,
    held_out_batches,
)
from saekit_steering.cluster import Classes, ClassMoments, Cluster
from saekit_steering.continuations import Continuation, continuations
from saekit_steering.html_page import html_page
from saekit_steering.measurements import Measurements
from saekit_steering.prompts import Prompt, batches, tokenise
from saekit_steering.scoring import Scored, Scorer, held_out_text, logit_lens
from saekit_steering.steering_log import layer_of, steering_log
from saekit_steering.steering_vectors import (
    SteeringVector,
    Strength,
    latent_vectors,
    on_the_sphere,
    other_latent_vectors,
    random_vectors,
    strengths,
)
from saekit_steering.summary import summarise
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
"""Random directions are also added at these multiples of the largest strength, to see whether they ever reach the effect."""
LENS_TOKENS = 10
"""Logit-lens tokens of a direction; the likeliest of them counts in the output score."""


class SteeringExperiment:
    """One run of the analyzer `settings` on a finished run."""

    def __init__(self, context: RunContext, settings: Steer) -> None:
        self.context, self.settings = context, settings
        self.subject = context.source.subject
        self.column = concept_column(context, settings.concept)
        self.trained = context.sae.trained_positions.with_bos(self.subject.bos_token_id)
        self.prompts = tokenise(settings.texts, self.subject, self.trained, settings.max_new_tokens)
        self.cluster = Cluster(context, settings.latent, settings.neighbours)

    def run(self) -> Result:
        context, settings = self.context, self.settings
        batches_read = held_out_batches(context, settings.statistics_tokens)
        statistics = activation_statistics(context.sae, batches_read)
        size = self._unit(statistics)
        if size is None:
            return Result(
                notes=[
                    f"Nothing was steered: latent {settings.latent} never fired on {statistics.rows} held-out activations, so "
                    f"strengths in units of its {settings.unit} mean nothing. Use unit = 'norm' or 'absolute'."
                ]
            )
        typical, by_class = self._estimates()
        like_activations = directions_like(batches_read, settings.controls, context.seed)
        vectors = self._vectors(size, statistics, like_activations)
        scorer = Scorer(context, self.cluster, typical)
        scored = scorer(vectors, batches(self.prompts, self.trained, settings.batch_tokens), self._lens(vectors))
        self._on_held_out(scorer, vectors, scored)
        written = self._written(vectors, typical)
        result = summarise(
            Measurements(
                settings=settings,
                kinds=list(dict.fromkeys(prompt.kind for prompt in self.prompts)),
                concept=context.source.concepts[self.column],
                cluster=self.cluster,
                classes=by_class,
                statistics=statistics,
                vectors=vectors,
                scored=scored,
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
        for number, vector in enumerate(vectors):
            if vector.kind == "latent":
                self._write(self._record(statistics, scored, vector, number, written), vector, result)
        return result

    def _unit(self, statistics: ActivationStatistics) -> float | None:
        """How much one unit of strength adds to the latent's activation; None if the unit is
        its maximum or RMS and it never fired."""
        latent = self.settings.latent
        row_norm = float(self.context.sae.W_dec[latent].detach().norm())
        size = {
            "absolute": 1.0,
            "max": float(statistics.largest[latent]),
            "rms": float(statistics.rms[latent]),
            "norm": statistics.norm / row_norm,
        }[self.settings.unit]
        return size if math.isfinite(size) and size > 0 else None

    def _vectors(
        self, size: float, statistics: ActivationStatistics, like_activations: torch.Tensor
    ) -> list[SteeringVector]:
        settings, sae = self.settings, self.context.sae
        row_norm = float(sae.W_dec[settings.latent].detach().norm())

        def sweep(values: list[float]) -> list[Strength]:
            return strengths(values, settings.unit, size, row_norm)

        asked = [value for value in settings.strengths if value != 0]
        end = max(asked, key=abs)
        further = sorted({*asked, *(factor * end for factor in REACH)})
        seed, n = self.context.seed, settings.controls
        return [
            *latent_vectors(sae, settings.latent, sweep(asked)),
            *random_vectors(sae, settings.latent, on_the_sphere(n, sae.d_in, seed), sweep(further)),
            *random_vectors(sae, settings.latent, like_activations, sweep(further), "random covariance"),
            *other_latent_vectors(sae, settings.latent, statistics.std > 0, sweep(asked), n, seed),
        ]

    def _lens(self, vectors: list[SteeringVector]) -> dict[int, torch.Tensor]:
        """The logit-lens tokens of each vector, by its number; empty if the model has no unembedding."""
        found = {}
        for number, vector in enumerate(vectors):
            row = vector.sae.W_dec[vector.row].detach() * math.copysign(1.0, vector.strength.absolute)
            tokens = logit_lens(self.subject, row, LENS_TOKENS)
            if tokens is not None:
                found[number] = tokens
        return found

    def _estimates(self) -> tuple[TypicalTokens, Classes]:
        """The concept's typical tokens, and the cluster's activity with and without the concept, from one pass."""
        settings = self.settings
        vocabulary = self.subject.logits(TokenBatch.of_rows([(0, 0)])).shape[-1]
        counts = TokenCounts(self.column, vocabulary)
        moments = ClassMoments(self.context.sae, self.cluster, self.column, self.context.scale)
        for batch in held_out_sequences(self.context, self.column, settings.set_sequences):
            counts.add(batch)
            moments.add(batch)
        return typical_tokens(counts.counts, settings.set_size, settings.min_count), moments.found()

    def _on_held_out(self, scorer: Scorer, vectors: list[SteeringVector], scored: Scored) -> None:
        """Add the steered latent's scores on held-out text; controls are compared on prompts alone."""
        own = [number for number, vector in enumerate(vectors) if vector.kind == "latent"]
        text = held_out_text(self.context, self.settings.held_out_tokens)
        found = scorer([vectors[number] for number in own], text, {})
        scored.unsteered |= found.unsteered
        for number, scores in zip(own, found.steered, strict=True):
            scored.steered[number] |= scores

    def _written(self, vectors: list[SteeringVector], typical: TypicalTokens) -> list[Continuation]:
        """Continuations of the first prompts of every kind under every vector of the steered latent."""
        settings = self.settings
        chosen: list[Prompt] = []
        for kind in dict.fromkeys(prompt.kind for prompt in self.prompts):
            chosen += [prompt for prompt in self.prompts if prompt.kind == kind][: settings.continued]
        if not chosen:
            return []
        return [
            one
            for number, vector in enumerate(vectors)
            if vector.kind == "latent"
            for one in continuations(
                self.subject,
                chosen,
                vector,
                number,
                typical,
                settings.judge_function,
                max_new_tokens=settings.max_new_tokens,
                temperature=settings.temperature,
                seed=self.context.seed,
            )
        ]

    def _record(
        self, statistics: ActivationStatistics, scored: Scored, vector: SteeringVector, number: int, written: list[Continuation]
    ) -> dict[str, Any]:
        return steering_log(
            self.context, self.cluster, self.settings.neighbours, statistics, self.prompts, scored, vector, number, written
        )

    def _write(self, document: dict[str, Any], vector: SteeringVector, result: Result) -> None:
        name = f"L{layer_of(self.subject)}_S{vector.strength.name}"
        path = self.context.directory / f"{name}.json"
        write_json(path, document)
        result.files.append(path.name)
        if self.settings.pages:
            path = self.context.directory / f"feature_{vector.row}_{name}.html"
            write_text(path, html_page(document))
            result.files.append(path.name)
