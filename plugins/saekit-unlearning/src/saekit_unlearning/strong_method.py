"""The strong method inside the run's SAE: latents that detect each thing to forget, added to it, with rows that push.

The rows are trained with the activation as it is, in which they are added to what the rest of the SAE leaves alone; the same rows
are tried on both paths. Controls, of the setting that is reported: random rows of the same norms on the same latents, and rows
trained in the same way on others of the SAE's latents, drawn from those that are active about as often on forget text. How strongly
these are active does not count, since rows are trained in units of it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache, partial

import torch
from torch import Tensor

from saekit import Registry, Result, RunContext, SparseAutoencoder, Step, UsageError, matched_latents
from saekit_unlearning.activity import Activity
from saekit_unlearning.answers import Logits
from saekit_unlearning.data import UnlearningData
from saekit_unlearning.detectors import Choice, Detectors, chosen, detectors_for
from saekit_unlearning.edited import Edited
from saekit_unlearning.edits import Path, Pushing, parts_of
from saekit_unlearning.experiment import Found
from saekit_unlearning.grown import grown, save_grown, with_rows
from saekit_unlearning.methods import Control, Prepared, Seen, Trial
from saekit_unlearning.passages import Site
from saekit_unlearning.push import Target, random_rows, train_rows

DIRECTORY = "strong_sae"
"""Where the SAE with its added latents is written, in the analyzer's directory."""


@dataclass(frozen=True)
class Added:
    """Detectors as latents [n] of `sae`, which were added after its own and whose rows are zeros there.

    rate: [d_sae + n], the share of positions of forget text at which each latent of `sae` is active.
    trained: from latents of `sae`, a target and a number of steps to rows that push for these latents; each trained once.
    """

    sae: SparseAutoencoder
    latents: Tensor
    detectors: Detectors
    choice: Choice
    rate: Tensor
    trained: Callable[[tuple[int, ...], Target, int], Tensor]


@dataclass
class Strong:
    """A setting for each target and number of steps. The detectors' own settings are chosen by leaving out; see detectors.py."""

    targets: Sequence[Target]
    steps: Sequence[int]
    paths: Sequence[Path]
    name: str = "strong"
    _added: Added | None = field(default=None, init=False)
    _rows: dict[str, Tensor] = field(default_factory=dict, init=False)  # by the setting's label

    def prepare(self, seen: Seen) -> Prepared:
        """Fit detectors, add them to the SAE and train rows. No trials, with the reason, if the SAE cannot hold them or the texts
        do not allow it."""
        self._added, self._rows = None, {}
        try:
            added = self._added = _added(seen)
            settings = [_Setting(seen.site, added, target, steps) for target in self.targets for steps in self.steps]
            self._rows = {setting.label: setting.rows() for setting in settings}
        except UsageError as error:
            return Prepared(0, [], self.paths, f"It cannot be done with this SAE and these texts: {error}")
        return Prepared(len(added.latents), [setting.trial(path) for setting in settings for path in self.paths])

    def report(self, found: Sequence[Found], context: RunContext) -> Result:
        """What the SAE rebuilds with the added latents and without, and that SAE itself, with the rows of the setting that does
        best on seen wordings."""
        tried = [one for one in found if one.shown is not None]
        if self._added is None or not tried:
            return Result()
        added, best = self._added, max(tried, key=lambda one: one.seen_score)
        assert best.shown is not None
        label = best.trials[best.shown].label
        whole = with_rows(copy.deepcopy(added.sae), added.latents, self._rows[label])
        metadata = {"model_name": context.source.subject.name, "hook_name": context.source.hook_point}
        name = context.config.architecture.use
        place = context.directory / DIRECTORY
        save_grown(whole, place, name=name, latents=added.latents, detectors=added.detectors, metadata=metadata)
        before, own, pushing, fired = _rebuilt(context, added, whole)
        scalars = {
            "explained_variance_before": before,
            "explained_variance_own_latents": own,
            "explained_variance_pushing": pushing,
            "pushed_share": fired,
            "detected": added.choice.detected,
            "detected_by_mistake": added.choice.false,
        }
        files = sorted(f"{DIRECTORY}/{file.name}" for file in place.iterdir())
        within = "" if best.chosen is not None else ", beyond the bound"
        notes = [
            f"{len(added.latents)} latents were added to the SAE's {context.sae.d_sae}. When left out of the fit, "
            f"{added.choice.detected:.2f} of texts are detected, and {added.choice.false:.3f} of those about others by mistake.",
            f"Explained variance of held-out activations: {_number(before)} by the SAE, {_number(own)} with the added latents but "
            f"not their rows, {_number(pushing)} with these, which push and do not rebuild. An added latent fires in {fired:.4f} "
            "of these activations.",
            f"{DIRECTORY}/ holds that SAE with the rows of one setting ({label}{within}); saekit.load_sae reads it.",
        ]
        return Result(scalars={f"{self.name}_{key}": value for key, value in scalars.items()}, files=files, notes=notes)


@dataclass(frozen=True)
class _Setting:
    """A target and a number of steps, with the trial of them on each path and its controls."""

    site: Site
    added: Added
    target: Target
    steps: int

    @property
    def label(self) -> str:
        return f"pushed to {self.target}, {self.steps} steps"

    @property
    def latents(self) -> tuple[int, ...]:
        return tuple(self.added.latents.tolist())

    def rows(self) -> Tensor:
        """[n, d]. UsageError if no latent fires on any forget text."""
        return self.added.trained(self.latents, self.target, self.steps)

    def trial(self, path: Path) -> Trial:
        controls = (
            Control("draws of random rows on the same latents", partial(self._random_rows, path)),
            Control("draws of rows trained on matched random latents", partial(self._matched, path)),
        )
        edited = self._edited(path, self.latents, self.rows())
        return Trial(self.label, path, edited.logits, self.latents, controls, edited)

    def _edited(self, path: Path, latents: Sequence[int], rows: Tensor) -> Edited:
        parts = parts_of(self.added.sae, torch.tensor(latents, dtype=torch.long), path)
        return Edited(self.label, self.site, edit=Pushing(parts, rows))

    def _random_rows(self, path: Path, generator: torch.Generator) -> Logits:
        return self._edited(path, self.latents, random_rows(self.rows(), generator)).logits

    def _matched(self, path: Path, generator: torch.Generator) -> Logits:
        """Those that never fire where rows could learn push nothing."""
        rate, own = self.added.rate, self.rows()
        drawn = tuple(matched_latents(self.latents, rate, torch.ones_like(rate), generator))
        try:
            rows = self.added.trained(drawn, self.target, self.steps)
        except UsageError:
            rows = own.new_zeros(len(drawn), own.shape[1])
        return self._edited(path, drawn, rows).logits


def _added(seen: Seen) -> Added:
    """UsageError if the SAE cannot hold the detectors."""
    site, tokenizer = seen.site, seen.site.subject.tokenizer
    data = UnlearningData((*seen.forget, *seen.retain), (), frozenset(text.entity for text in seen.retain))
    general = [tokenizer.decode(row, skip_special_tokens=True) for row in seen.general]
    detectors, tried = detectors_for(site, data, general, seed=seen.seed)
    sample = torch.cat([passages.x for passages in seen.passages([*seen.forget, *seen.retain])])
    sae, latents = grown(seen.sae, seen.architecture, detectors, sample)
    context = site.subject.context
    retain = [*seen.general, *(tokenizer(text.text, verbose=False)["input_ids"][:context] for text in seen.retain)]

    @cache
    def trained(of: tuple[int, ...], target: Target, steps: int) -> Tensor:
        # The rows of latents that rebuild stay in the reconstruction; what is trained is added to it.
        parts = parts_of(sae, torch.tensor(of, dtype=torch.long), "error_kept")
        return train_rows(site, parts, seen.forget, retain, target=target, steps=steps, seed=seen.seed).rows

    rate = Activity.of(sae, seen.passages(seen.forget)).rate
    return Added(sae, latents, detectors, chosen(tried), rate, trained)


@torch.no_grad()
def _rebuilt(
    context: RunContext, added: Added, whole: SparseAutoencoder
) -> tuple[float | None, float | None, float | None, float]:
    """The explained variance of held-out activations by the run's SAE, by the grown one without and with its rows, and the share
    of activations in which an added latent fires."""
    component = Registry().find("metric", "explained_variance")
    saes = context.sae, added.sae, whole
    metrics, fired, n = [component.build({}) for _ in saes], 0, 0
    for batch in context.held_out_activations(context.config.evaluation.tokens):
        for sae, metric in zip(saes, metrics, strict=True):
            metric.update(Step.of(sae, batch))
        active = added.sae.encode(batch.x.to(added.sae.W_dec)).columns(added.latents)  # [m, n]
        fired, n = fired + int((active > 0).any(1).sum()), n + len(batch)
    before, own, pushing = (metric.compute()["explained_variance"] for metric in metrics)
    return before, own, pushing, fired / n


def _number(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.3f}"
