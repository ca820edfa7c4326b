"""What a method of unlearning is to the analyzer: what it may look at, and the settings that it tries."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch

from saekit import SparseAutoencoder
from saekit_unlearning.activity import Activity
from saekit_unlearning.answers import Examination, Logits
from saekit_unlearning.data import FORGET, Question, Text
from saekit_unlearning.edited import Edited
from saekit_unlearning.edits import Ablate, Codes, LatentEdit, Operation, Path
from saekit_unlearning.passages import Passages, Site


@dataclass(frozen=True)
class Seen:
    """All that a method may look at before it is measured.

    forget, retain: texts of what is to be forgotten, and of the entities to stay that are shown.
    general: rows of tokens of other text, from the training split.
    examination: questions about both, in seen wordings. Settings are chosen on these.
    codes: of passages, encoded once.
    """

    site: Site
    sae: SparseAutoencoder
    forget: Sequence[Text]
    retain: Sequence[Text]
    general: Sequence[Sequence[int]]
    examination: Examination
    codes: Codes
    seed: int

    @property
    def questions(self) -> list[Question]:
        """Those of `examination`."""
        return self.examination.questions

    def forgets(self, question: Question) -> bool:
        """Whether a question is about what is to be forgotten."""
        return question.group == FORGET

    def passages(self, texts: Sequence[Text], batch_tokens: int = 4096) -> list[Passages]:
        """Texts as passages, cut to the model's context."""
        subject = self.site.subject
        rows = [subject.tokenizer(text.text, verbose=False)["input_ids"][: subject.context] for text in texts]
        return list(self.site.passages(rows, batch_tokens))

    @cached_property
    def on_forget(self) -> Activity:
        """How active latents are on the texts of what is to be forgotten."""
        return Activity.of(self.sae, self.passages(self.forget))

    @cached_property
    def on_retain(self) -> Activity:
        """How active they are on the texts of what is to stay."""
        return Activity.of(self.sae, self.passages(self.retain))

    @cached_property
    def on_general(self) -> Activity:
        """How active they are on other text."""
        return Activity.of(self.sae, self.site.passages(self.general))

    def trial(self, label: str, latents: Sequence[int], operation: Operation, path: Path) -> Trial:
        """An edit of some latents as a setting."""
        chosen = torch.tensor(list(latents), dtype=torch.long)
        edit = LatentEdit(self.sae, chosen, operation, path, self.codes)
        # Once layers below the site are trained, every code is another.
        edited = Edited(label, self.site, edit=LatentEdit(self.sae, chosen, operation, path))
        return Trial(label, path, lambda passages: self.site.logits(passages, edit), tuple(latents), operation, edited)

    def splice(self) -> Trial:
        """The reconstruction alone, without any edit: what the path "spliced" is compared with."""
        return self.trial("the reconstruction alone", [], Ablate(), "spliced")


@dataclass(frozen=True)
class Trial:
    """A method with one setting.

    label: the setting, in words; the same on both paths.
    path: how the SAE is edited; None if the model itself was changed.
    logits: what the edited model computes for passages.
    latents, operation: what was edited and how, so that controls can do the same with other latents; empty for a method
        without latents.
    edited: the same model, to be trained further by whoever wants the facts back; None if that cannot be tried.
    """

    label: str
    path: Path | None
    logits: Logits
    latents: tuple[int, ...] = ()
    operation: Operation | None = None
    edited: Edited | None = None


@dataclass(frozen=True)
class Prepared:
    """What a method tries.

    candidates: how many latents it could have edited; None for a method without latents.
    trials: every setting on every path.
    paths: where a method without trials, for want of candidates, is reported nevertheless.
    """

    candidates: int | None
    trials: Sequence[Trial]
    paths: Sequence[Path | None] = (None,)


class Method(Protocol):
    """A way to make a model forget, with its settings."""

    @property
    def name(self) -> str:
        """What tables and scalars call it."""
        ...

    def prepare(self, seen: Seen) -> Prepared:
        """Select or train whatever is needed, from what is seen alone."""
        ...
