"""The loss `kl_unlearn`: while the SAE trains, the model with its reconstruction spliced in forgets, and keeps the rest."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, ClassVar

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from saekit import OptionError, RunContext, Step
from saekit_unlearning.data import Text, UnlearningData
from saekit_unlearning.files import load
from saekit_unlearning.kl import forget_kl, retain_kl
from saekit_unlearning.passages import Passages, Site
from saekit_unlearning.places import Batch, batches, placed


class KLUnlearn:
    """KL(edited || uniform) on forget text plus `retain_weight` * KL(base || edited) on retain text, in nats a position.

    The edited model has the SAE's reconstruction in the activation's place, at the positions that the SAE is trained on; the
    formulas are those of `saekit_unlearning.kl`. Texts are recorded once, below the site, and each step takes the next batch of
    an order drawn anew for each pass from the run's seed and the step's number alone, so that a resumed run takes the same.
    """

    read: ClassVar[Callable[[str], UnlearningData]] = staticmethod(load)
    """What makes data of the option of that name."""

    def __init__(
        self,
        *,
        data: Annotated[
            str,
            Field(description="What is to be forgotten: organism, wmdp-bio, or a directory of texts and questions."),
        ] = "organism",
        shown: Annotated[
            float, Field(ge=0, le=1, description="Share of the entities to stay whose texts are retain text.")
        ] = 0.5,
        texts: Annotated[int, Field(gt=0, description="Forget texts, and retain texts, in each step.")] = 16,
        retain_weight: Annotated[float, Field(ge=0, description="Weight of the retain text's divergence.")] = 1.0,
        every: Annotated[int, Field(gt=0, description="Steps from one application to the next.")] = 1,
    ) -> None:
        self.data, self.shown, self.texts, self.retain_weight, self.every = data, shown, texts, retain_weight, every

    def prepare(self, context: RunContext) -> None:
        """Record the texts. OptionError if the data are not good enough."""
        data = type(self).read(self.data).divided(self.shown, context.seed)
        subject = context.source.subject
        self._site = Site(subject, context.sae.trained_positions)
        self._scale, self._seed = context.scale, context.seed
        self._forget, too_long = self._recorded(data.forget)
        self._retain, more = self._recorded(data.retain)
        if not self._forget:
            raise OptionError(
                "data", f"no text about anything to forget fits the {subject.context} positions of the model."
            )
        if too_long + more:
            context.warn(
                f"kl_unlearn leaves out {too_long + more} texts that do not fit the model's {subject.context} positions."
            )

    def _recorded(self, texts: Sequence[Text]) -> tuple[list[Batch], int]:
        """(the texts, in an order drawn from the seed; how many are too long for the model)."""
        every = [placed(self._site.subject.tokenizer, text) for text in texts]
        context = self._site.subject.context
        fitting = [one for one in every if context is None or len(one.tokens) <= context]
        order = np.random.default_rng(self._seed).permutation(len(fitting))
        return batches(self._site, [fitting[i] for i in order], self.texts), len(every) - len(fitting)

    def active(self, step: Step) -> bool:
        """Every `every` steps."""
        return step.number % self.every == 0

    def __call__(self, step: Step) -> Tensor:
        forget = self._at(self._forget, step.number)
        edited = self._logits(step, forget.passages)[forget.predicting].float()  # [k, vocab]
        loss = forget_kl(edited).mean()
        if self._retain and self.retain_weight:
            passages = self._at(self._retain, step.number).passages
            with torch.no_grad():
                base = self._site.logits(passages)[passages.mask].float()
            loss = (
                loss + self.retain_weight * retain_kl(base, self._logits(step, passages)[passages.mask].float()).mean()
            )
        return loss

    def _at(self, recorded: list[Batch], number: int) -> Batch:
        turn, place = divmod(number // self.every, len(recorded))
        return recorded[np.random.default_rng((self._seed, turn)).permutation(len(recorded))[place]]

    def _logits(self, step: Step, passages: Passages) -> Tensor:
        x = passages.x.to(step.x) * self._scale  # [m, d]
        rebuilt = step.sae(x) / self._scale
        return self._site.logits(passages, lambda _: passages.with_x(rebuilt))
