"""A model that is to have forgotten something: its weights changed, or its activation at the site edited, or both."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from saekit import Recording, Subject
from saekit_unlearning.passages import Passages, Site, SiteEdit


@dataclass(frozen=True)
class Edited:
    """The model of a site's subject as a method leaves it.

    label: the method's setting, in words.
    site: of the subject itself, or of a copy of it whose weights were changed.
    changed: whether it is such a copy. What passages recorded below the site is of no use then.
    edit: what takes the activation's place at the site; None for nothing.
    """

    label: str
    site: Site
    changed: bool = False
    edit: SiteEdit | None = None

    def logits(self, passages: Passages) -> Tensor:
        """[n, T, vocab]: the `Logits` of answers.py."""
        return self.whole(passages.tokens, passages.mask) if self.changed else self.site.logits(passages, self.edit)

    def whole(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """The logits [n, T, vocab] of tokens [n, T] by a forward of the whole model, with gradients to its weights."""
        edit, subject = self.edit, self.site.subject
        if edit is None:
            with subject.lock:
                return model_logits(subject, tokens, mask)
        keep = mask & self.site.trained.in_rows(tokens)
        rows = torch.arange(len(tokens), device=tokens.device)
        with subject.replaced(lambda activation: edit(Passages(rows, Recording(tokens, mask, activation), keep))):
            return model_logits(subject, tokens, mask)

    def copied(self) -> Edited:
        """The same with weights of its own, which may be trained."""
        return replace(self, site=copied(self.site), changed=True)

    def without_edit(self) -> Edited:
        """The same after somebody took the edit at the site away."""
        return replace(self, label=f"{self.label}, edit taken away", edit=None)


def copied(site: Site, only: Sequence[nn.Parameter] | None = None) -> Site:
    """The site in a copy of its subject's model, with gradients to nothing yet.

    only: the parameters that get a copy; all others, which nobody may train, are shared. All get one by default."""
    subject = site.subject
    own_copy = None if only is None else {id(p) for p in only}
    shared = [] if own_copy is None else [p for p in subject.model.parameters() if id(p) not in own_copy]
    # In one call, so that the sites refer to modules of the copied model.
    model, own, target = copy.deepcopy((subject.model, subject.site, subject.target_site), {id(p): p for p in shared})
    model.requires_grad_(False)
    return Site(Subject(model, subject.tokenizer, own, name=subject.name, target_site=target), site.trained)


def model_logits(subject: Subject, tokens: Tensor, mask: Tensor) -> Tensor:
    """The logits [n, T, vocab] of a subject's model, in float32 or better, with gradients to its weights."""
    takes_cache = "use_cache" in inspect.signature(subject.model.forward).parameters
    output = subject.model(tokens, attention_mask=mask.long(), **({"use_cache": False} if takes_cache else {}))
    logits: Tensor = output if isinstance(output, Tensor) else output.logits
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
