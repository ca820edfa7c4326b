"""The analyzer `intervene`: its options, and what is refused before anything is measured."""

from __future__ import annotations

import itertools
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from saekit.builtin.intervene.choice import Survey
from saekit.builtin.intervene.findings import result_of
from saekit.builtin.intervene.measured import KEPT, SPLICED, Measured
from saekit.errors import ComponentError, OptionError, near_names
from saekit.interventions.edits import Edit, EditTable, Unit, ablate, scale, set_to
from saekit.result import Result
from saekit.runner.context import RunContext

MOST_OUTPUTS = 2000
"""With more outputs than this, such as a language model's tokens, those to measure must be named."""


class Intervene:
    """Edits one latent at a time while the model runs on held-out sequences, and measures the change of each of its outputs on
    rows with the concept's label and on those without, beside the same edit of random latents of similar density and size.

    Two ways are measured, and reported apart. `kept` adds the effect of the edit to the activation, so that what the SAE does not
    rebuild stays as it is. `spliced` puts the edited reconstruction in place of the activation; its changes are counted from
    the unedited reconstruction, and what that alone changes stands beside them.

    Intervals are clustered by sequence. Memory: one batch of the source, the active entries of `training_tokens` activations, and
    72 bytes for each output of each latent and control.
    """

    def __init__(
        self,
        *,
        latents: Annotated[list[int] | None, Field(description="Latents to edit, by number.")] = None,
        concepts: Annotated[
            list[str] | None,
            Field(description="Labels whose best latent on training data is edited; all by default, if no latents are named."),
        ] = None,
        edit: Annotated[Literal["ablate", "scale", "set"], Field(description="What is done to the latent.")] = "ablate",
        value: Annotated[float | None, Field(description="The factor of scale, or what set sets it to.")] = None,
        unit: Annotated[
            Unit, Field(description="The unit of set: absolute, or the latent's largest or RMS activation in training data.")
        ] = "absolute",
        error: Annotated[
            Literal["both", "kept", "spliced"],
            Field(description="What becomes of the reconstruction error: kept, spliced away, or both, apart from each other."),
        ] = "both",
        targets: Annotated[
            dict[str, str | list[str]] | None,
            Field(description="For each concept the outputs that it should move; by default the output of the same name."),
        ] = None,
        outputs: Annotated[list[str] | None, Field(description="The outputs to measure; all by default.")] = None,
        scale: Annotated[
            Literal["as_given", "softmax", "sigmoid"], Field(description="What the outputs go through before they are compared.")
        ] = "as_given",
        controls: Annotated[int, Field(ge=0, description="Matched random latents for each edited one.")] = 10,
        sequences: Annotated[int, Field(gt=0, description="Held-out sequences, up to a whole batch more.")] = 1024,
        training_tokens: Annotated[
            int, Field(gt=0, description="Training activations on which latents and controls are chosen.")
        ] = 20_000,
    ) -> None:
        if (edit == "ablate") != (value is None):
            fix = "none. Leave it out" if edit == "ablate" else "one. Give a number"
            raise OptionError("value", f"edit = {edit!r} takes {fix}.")
        if unit != "absolute" and edit != "set":
            raise OptionError("unit", f"it is for edit = 'set', not {edit!r}. Leave it out.")
        if latents is not None and len(set(latents)) < len(latents):
            raise OptionError("latents", "one is named twice. Name each once.")
        self.latents, self.concepts, self.edit, self.value, self.unit, self.error = latents, concepts, edit, value, unit, error
        self.targets, self.outputs, self.scale, self.controls = targets, outputs, scale, controls
        self.sequences, self.training_tokens = sequences, training_tokens

    def prepare(self, context: RunContext) -> None:
        """Refuse what cannot be done with this SAE and source: a latent or a concept that is not there, an output that does not
        depend on the hook point. UsageError. One held-out batch goes through the model twice."""
        if context.sae.transcoder:
            raise ComponentError("the SAE is a transcoder, which cannot change what it reads. Use an SAE.")
        last = context.sae.d_sae - 1
        for latent in self.latents or ():
            if not 0 <= latent <= last:
                raise OptionError("latents", f"there is no latent {latent}; the SAE has {last + 1}, 0 to {last}.")
        known = list(getattr(context.source, "concepts", None) or [])
        for option, names in (("concepts", self.concepts or ()), ("targets", self.targets or ())):
            for name in names:
                if name not in known:
                    raise OptionError(option, f"the source has no concept {name!r}.{near_names(name, known)}")
        if not known and not self.latents:
            raise OptionError("latents", "the source has no labels to choose latents by. Name some.")
        batch = next(iter(context.source.runs("held_out")))
        if self.outputs is None and len(batch.names) > MOST_OUTPUTS:
            raise OptionError("outputs", f"there are {len(batch.names):,}. Name those to measure.")
        measured = list(self.outputs or batch.names)
        aimed = list(itertools.chain(*self._targets(known, measured).values()))
        for option, wanted, there in (("outputs", self.outputs or [], batch.names), ("targets", aimed, measured)):
            for name in wanted:
                if name not in there:
                    raise OptionError(option, f"there is no output {name!r}.{near_names(name, there)}")
        if self.scale == "softmax" and len(batch.names) == 1:
            raise OptionError("scale", 'there is one output, whose softmax is 1. Use "sigmoid" or "as_given".')
        noise = torch.randn(batch.x.shape, generator=torch.Generator().manual_seed(0)).to(batch.x)
        if torch.equal(batch.run(noise * batch.x.std().clamp_min(1e-3)), batch.outputs):
            raise ComponentError(
                "the outputs do not depend on the activations at the hook point. Name a hook point before them in the source."
            )

    def __call__(self, context: RunContext) -> Result:
        """scalars: by mode, how many latents move their targets, and the others, more than their controls do. tables: effects.
        figures: effects."""
        self.prepare(context)
        survey = Survey(context, self.training_tokens)
        chosen = survey.given(self.latents or [])
        wanted = self.concepts if self.concepts is not None else [] if self.latents else survey.concepts
        taken = {one.latent for one in chosen}
        chosen += [one for one in survey.best(wanted) if one.latent not in taken]
        survey.add_controls(chosen, self.controls, context.seed)
        every = list(dict.fromkeys(latent for one in chosen for latent in [one.latent, *one.controls]))
        tables = {latent: EditTable({latent: self._edit()}, context.sae.d_sae, survey.statistics) for latent in every}
        names = list(next(iter(context.source.runs("held_out"))).names)
        measured = Measured(
            context.sae,
            chosen,
            tables,
            modes=[mode for mode, word in ((KEPT, "kept"), (SPLICED, "spliced")) if self.error in (word, "both")],
            concepts=survey.concepts,
            outputs=self.outputs,
            targets=self._targets(survey.concepts, self.outputs or names),
            scale=self._scaled,
        )
        measured.measure(context.source.runs("held_out"), self.sequences)
        rises = {one.latent: float(tables[one.latent](torch.tensor([[one.usual]]), lambda v: v)) > one.usual for one in chosen}
        result = result_of(measured, what=repr(self._edit()), rises=rises, asked=self.controls)
        for note in result.notes:
            context.warn(f"intervene: {note}")
        return result

    def _edit(self) -> Edit:
        if self.edit == "ablate":
            return ablate()
        assert self.value is not None
        return scale(self.value) if self.edit == "scale" else set_to(self.value, unit=self.unit)

    def _scaled(self, outputs: Tensor) -> Tensor:
        if self.scale == "softmax":
            return outputs.softmax(1)
        return outputs.sigmoid() if self.scale == "sigmoid" else outputs

    def _targets(self, concepts: list[str], outputs: list[str]) -> dict[str, list[str]]:
        """The outputs that each concept should move, where that is known."""
        by_name = {name: [name] for name in concepts if name in outputs}
        named = {name: [some] if isinstance(some, str) else list(some) for name, some in (self.targets or {}).items()}
        return by_name | named
