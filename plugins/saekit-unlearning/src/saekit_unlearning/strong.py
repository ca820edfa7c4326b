"""The strong method on the bundled organism, measured: `python -m saekit_unlearning.strong --seeds 0 1 2`.

Detectors and rows stand beside the model, which is the path `error_kept`. For each seed the entities to stay are divided in
two halves, and the method is fitted twice, each time with one half shown, so that every question about near facts is asked once
about an entity that was never shown. Settings are chosen on seen wordings of shown entities alone.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from saekit import TrainedPositions, load_subject
from saekit_unlearning.answers import Examination
from saekit_unlearning.data import FORGET, Question, UnlearningData, checked, organism_data
from saekit_unlearning.detectors import Choice, Detectors, chosen, detectors_for
from saekit_unlearning.edits import Parts, Pushing
from saekit_unlearning.kl import retain_kl
from saekit_unlearning.passages import Passages, Site
from saekit_unlearning.push import Pushed, random_rows, train_rows


def beside(detectors: Detectors) -> Parts:
    """The parts of detectors that stand beside the model: the activation as it is, and theirs."""
    return lambda passages: (passages.x, detectors(passages.x))


def halves(data: UnlearningData, seed: int) -> list[UnlearningData]:
    """The same data twice: with a random half of each group to stay shown, and with the other half."""
    first = data.divided(0.5, seed)
    every = {text.entity for text in data.texts if text.group != FORGET}
    return [first, replace(first, shown=frozenset(every - first.shown))]


@torch.no_grad()
def damage(site: Site, texts: Sequence[str], edit: Pushing) -> tuple[float, float]:
    """(mean KL(base || edited) over all positions of `texts`, the share of texts in which a latent fires)."""
    total = fired = positions = 0.0
    rows = [site.subject.tokenizer(text, verbose=False)["input_ids"][:128] for text in texts]
    for passages in site.passages(rows):
        positions += float(passages.mask.sum())
        at = _fires(passages, edit.parts(passages)[1])
        fired += float(at.sum())
        if bool(at.any()):
            some = passages.chosen(at.nonzero()[:, 0])
            base, edited = site.logits(some)[some.mask], site.logits(some, edit)[some.mask]
            total += float(retain_kl(base, edited).sum())
    return total / positions, fired / len(rows)


def interval(right: np.ndarray, entities: Sequence[str], seed: int = 0, draws: int = 2000) -> tuple[float, float]:
    """The 95% interval of the mean of `right`, resampled by entity."""
    names, index = np.unique(np.array(entities), return_inverse=True)
    total, n = np.bincount(index, right.astype(float)), np.bincount(index)
    drawn = np.random.default_rng(seed).integers(len(names), size=(draws, len(names)))
    low, high = np.quantile(total[drawn].sum(1) / n[drawn].sum(1), [0.025, 0.975])
    return float(low), float(high)


def right_after(site: Site, questions: Sequence[Question], edit: Pushing, before: np.ndarray) -> np.ndarray:
    """Which questions are right under the edit. Those in whose prompt no latent fires are answered as before."""
    fired = np.zeros(len(questions), dtype=bool)
    prompts = [site.subject.tokenizer(question.prompt, verbose=False)["input_ids"] for question in questions]
    for passages in site.passages(prompts):
        fired[passages.rows.cpu().numpy()] = _fires(passages, edit.parts(passages)[1]).cpu().numpy()
    right = before.copy()
    if fired.any():
        right[fired] = Examination(site, [q for q, yes in zip(questions, fired, strict=True) if yes]).right(edit)
    return right


def _fires(passages: Passages, active: Tensor) -> Tensor:
    """In which rows a latent fires anywhere: [n]."""
    return torch.zeros_like(passages.keep).masked_scatter(passages.keep, active.any(1)).any(1)


@dataclass(frozen=True)
class General:
    """Code and prose: texts to fit detectors to, and held-out ones to measure damage on."""

    train: list[str]
    held_out: list[str]

    @classmethod
    def of_organism(cls, n: int = 150) -> General:
        """`n` documents of each kind, of each split."""
        from saekit import organism

        split = {
            name: [d.text[:600] for kind in ("code", "prose") for d in organism.documents(name, (kind,))[:n]]
            for name in ("train", "held_out")
        }
        return cls(split["train"], split["held_out"])


@dataclass(frozen=True)
class Fitted:
    """What was fitted, with the settings that were chosen."""

    detectors: Detectors
    pushed: Pushed
    choice: Choice

    @property
    def edit(self) -> Pushing:
        return Pushing(beside(self.detectors), self.pushed.rows)


def fitted(site: Site, data: UnlearningData, general: General, *, seed: int, steps: int) -> Fitted:
    """The method, from texts to rows."""
    detectors, tried = detectors_for(site, data, general.train, seed=seed)
    best, parts = chosen(tried), beside(detectors)
    tokenize = site.subject.tokenizer
    retain = [
        tokenize(text, verbose=False)["input_ids"][:128] for text in (*general.train, *(t.text for t in data.retain))
    ]
    pushed = train_rows(site, parts, data.forget, retain, target="others", steps=steps, seed=seed)
    return Fitted(detectors, pushed, best)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--block", type=int, default=0)
    parser.add_argument("--steps", type=int, default=300)
    options = parser.parse_args()
    from saekit import organism

    subject = load_subject(str(organism.directory("base")), hook_point=f"blocks.{options.block}.hook_out")
    subject.model.requires_grad_(False)
    site, data, general = (
        Site(subject, TrainedPositions(False)),
        checked(organism_data(), "organism"),
        General.of_organism(),
    )
    questions = list(data.questions)
    before = Examination(site, questions).right()
    for seed in options.seeds:
        for fold, half in enumerate(halves(data, seed)):
            started = time.monotonic()
            found = fitted(site, half, general, seed=seed, steps=options.steps)
            edits = {
                "strong": found.edit,
                "random rows": replace(found.edit, rows=random_rows(found.pushed.rows, torch.Generator().manual_seed(seed))),
            }
            for name, edit in edits.items():
                right = right_after(site, questions, edit, before)
                kl, fired = damage(site, general.held_out, edit)
                line = {"seed": seed, "fold": fold, "edit": name, "seconds": round(time.monotonic() - started)}
                line |= {"l2": found.choice.l2, "margin": found.choice.margin, "detected": found.choice.detected}
                line |= {"false": found.choice.false, "kl_forget": float(found.pushed.forget[-10:].mean())}
                line |= table(half, questions, before, right) | {"kl": kl, "texts_that_fire": fired}
                print(json.dumps(line), flush=True)


def table(
    data: UnlearningData, questions: Sequence[Question], before: np.ndarray, right: np.ndarray
) -> dict[str, object]:
    """{group: [right after, right before, questions, the interval's ends]}, by what was shown and by wording."""
    groups: dict[str, list[int]] = {}
    for i, q in enumerate(questions):
        kind = "" if q.group == FORGET else ", shown" if q.entity in data.shown else ", never shown"
        groups.setdefault(f"{q.group}{kind}, {q.wording}", []).append(i)
    return {
        name: [
            int(right[at].sum()),
            int(before[at].sum()),
            len(at),
            *interval(right[at], [questions[i].entity for i in at]),
        ]
        for name, at in sorted(groups.items())
    }


if __name__ == "__main__":
    main()
