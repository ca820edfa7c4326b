"""The analyzer `steer`: a latent's decoder row added at several strengths, compared with control directions."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, Field

from saekit import ComponentError, OptionError, Result, RunContext
from saekit_steering.continuations import load_judge
from saekit_steering.experiment import SteeringExperiment
from saekit_steering.prompts import load_prompts, tokenise
from saekit_steering.steering_vectors import Unit
from saekit_steering.typical_tokens import concept_column


def _existing(path: str) -> str:
    if not Path(path).expanduser().is_file():
        raise ValueError("there is no such file. Name a JSON file {kind: [texts]}")
    return path


@dataclass(kw_only=True, eq=False)
class Steer:
    """Adds strength x decoder row of one latent at the site that the SAE reads, for a sweep of strengths, and measures: the
    log-odds of the concept's tokens coming next, KL divergence, the latent and its graph neighbours (f, and g propagated
    over the graph) before and after at the same site, and the text that the model writes. The controls are random
    directions, isotropic and with the activations' covariance, and other latents, all of the same norm; a note says whether
    the effect exceeds theirs, and KL divergence is compared at equal effect.

    Every position but the first is steered. No judge model is needed; `judge` can name one.
    """

    latent: Annotated[int, Field(ge=0, description="Which latent to steer by.")] = 0
    strengths: Annotated[
        list[float], Field(min_length=1, description="Strengths, in `unit`; negative ones steer away.")
    ] = field(default_factory=lambda: [0.1, 0.2, 0.4, 0.6, 0.8])
    unit: Annotated[
        Unit,
        Field(
            description="norm: the activations' mean norm; absolute: the latent's activation; max, rms: "
            "its largest or RMS activation."
        ),
    ] = "norm"
    concept: Annotated[
        str | None, Field(description="The label whose typical tokens are scored; the source's first by default.")
    ] = None
    prompts: Annotated[
        str | None,
        AfterValidator(lambda path: None if path is None else _existing(path)),
        Field(description="JSON {kind: [texts]} with kinds neutral and unrelated; by default those of the plugin."),
    ] = None
    neighbours: Annotated[int, Field(ge=0, description="Graph neighbours to read with the latent (top_k).")] = 10
    controls: Annotated[
        int, Field(ge=0, description="Directions of each of the three kinds of control, of the same norm.")
    ] = 10
    effect: Annotated[
        float | None,
        Field(gt=0, description="Log-odds gain at which KL is compared; by default half of the latent's largest."),
    ] = None
    continued: Annotated[int, Field(ge=0, description="Prompts of each kind from which text is generated.")] = 2
    max_new_tokens: Annotated[int, Field(gt=0, description="Tokens of a continuation.")] = 32
    temperature: Annotated[float, Field(gt=0, description="The temperature of sampled continuations.")] = 1.0
    set_size: Annotated[int, Field(gt=0, description="Tokens typical of the concept, and of its absence.")] = 50
    min_count: Annotated[int, Field(gt=0, description="How often a typical token must be seen in total.")] = 20
    set_sequences: Annotated[
        int, Field(gt=0, description="Held-out labelled sequences from which both sets and the classes are estimated.")
    ] = 256
    held_out_tokens: Annotated[int, Field(gt=0, description="Held-out tokens on which KL is measured too.")] = 1000
    statistics_tokens: Annotated[
        int, Field(gt=0, description="Held-out activations for units and standard deviations.")
    ] = 20_000
    pages: Annotated[bool, Field(description="Write an HTML page (5 MB) for each strength.")] = True
    judge: Annotated[
        str | None,
        Field(description="module:function of (prompt, before, after) that gives a dictionary of numbers."),
    ] = None
    batch_tokens: Annotated[int, Field(gt=0, description="Tokens of prompts that go through the model at a time.")] = (
        512
    )

    def __post_init__(self) -> None:
        self.texts = load_prompts(self.prompts)
        self.judge_function = load_judge(self.judge) if self.judge else None
        if not any(self.strengths):
            raise OptionError("strengths", "all are 0, which changes nothing. Give some that are not.")
        self.strengths = sorted(set(self.strengths))

    def prepare(self, context: RunContext) -> None:
        """Refuse what cannot be done with this model, SAE and source, before anything is measured: a latent that is not
        there, a prompt that does not fit, an unknown concept. UsageError."""
        sae, latent = context.sae, self.latent
        if sae.transcoder:
            raise ComponentError("the SAE is a transcoder, which cannot pass on what it reads. Use an SAE.")
        if latent >= sae.d_sae:
            raise OptionError("latent", f"there is no latent {latent}; the SAE has {sae.d_sae}, 0 to {sae.d_sae - 1}.")
        concept_column(context, self.concept)
        subject = context.source.subject
        tokenise(self.texts, subject, sae.trained_positions.with_bos(subject.bos_token_id), self.max_new_tokens)

    def __call__(self, context: RunContext) -> Result:
        """scalars: see `summary.scalars`. tables: sweep, controls, cluster, texts, examples. figures: effect, damage.
        files: one JSON (and page) for each strength, and the typical tokens."""
        self.prepare(context)
        latent = self.latent
        if not float(context.sae.W_dec[latent].detach().norm()) > 0:
            raise OptionError("latent", f"the decoder row of latent {latent} is zero, so nothing can be added.")
        result = SteeringExperiment(context, self).run()
        for note in result.notes:
            context.warn(f"steer: {note}")
        return result
