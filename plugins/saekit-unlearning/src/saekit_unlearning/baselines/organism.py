"""Every method without an SAE on the organism's facts: ``python -m saekit_unlearning.baselines.organism [--seed 0] [--out FILE]``.

Settings are chosen on wordings that the model's training showed, by what is forgotten and by the entities that were shown as what
is to stay, among those that move predictions on code and prose of the training split by at most `MOST_KL`. All figures are of the
chosen setting: forgotten facts in the wording never shown, entities that no method saw, KL on held-out code and prose, and
relearning. Writes lines of JSON as it goes, then a table.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from saekit import Interval, TrainedPositions, load_subject, organism, wilson_interval
from saekit_unlearning.answers import Examination
from saekit_unlearning.baselines.baseline import Baseline
from saekit_unlearning.baselines.difference_of_means import DifferenceOfMeans
from saekit_unlearning.baselines.lora import LoRA
from saekit_unlearning.baselines.material import Material
from saekit_unlearning.baselines.npo import NPO
from saekit_unlearning.baselines.oracle import Oracle
from saekit_unlearning.baselines.rmu import RMU
from saekit_unlearning.baselines.training import CHECKPOINTS, WEIGHT
from saekit_unlearning.baselines.uniform import FineTuning
from saekit_unlearning.data import FORGET, Question, UnlearningData, organism_data
from saekit_unlearning.edited import Edited
from saekit_unlearning.kl import retain_kl
from saekit_unlearning.passages import Passages, Site
from saekit_unlearning.relearning import DRAWS, Relearned, relearn, verdict
from saekit_unlearning.score import Setting, chosen_setting, held_back_score

HOOK_POINT = "blocks.2.hook_out"
KINDS = ("code", "prose")
WIDTH, GENERAL, HELD_OUT = 32, 600, 24
"""Tokens in a row of general text; rows of each kind for training; held-out rows of 128 of each kind for the divergence."""
MOST_KL = 0.02
"""Nats a token that a setting may cost on general text it was trained on, if any setting keeps to it."""


def methods(weight: float, checkpoints: Sequence[int]) -> list[Baseline]:
    """All of them; the oracle comes first, because it is the control of relearning.

    weight: of what is to stay, for the methods whose loss keeps it by KL. checkpoints: numbers of steps."""
    trained: dict[str, Any] = {"weight": weight, "checkpoints": tuple(checkpoints)}
    return [
        Oracle(str(organism.directory("oracle"))),
        DifferenceOfMeans(),
        FineTuning(**trained),
        NPO(**trained),
        LoRA(**trained),
        RMU(checkpoints=tuple(checkpoints)),
    ]


@dataclass(frozen=True)
class Exam:
    """Questions by name of their group, each group's answered together."""

    groups: dict[str, Examination]

    @classmethod
    def of(cls, site: Site, groups: dict[str, list[Question]]) -> Exam:
        return cls({name: Examination(site, questions) for name, questions in groups.items()})

    def setting(self, edited: Edited) -> Setting:
        """The shares of each group that are right; FORGET is among them."""
        right = {name: exam.right_by(edited.logits) for name, exam in self.groups.items()}
        return Setting(
            float(right[FORGET].mean()), {n: (int(r.sum()), len(r)) for n, r in right.items() if n != FORGET}
        )

    def shares(self, edited: Edited, seed: int) -> dict[str, tuple[float, Interval]]:
        """Each group's share, and its interval: entities drawn with replacement; Wilson's over entities if they all agree."""
        found = {}
        for name, exam in self.groups.items():
            right = exam.right_by(edited.logits)
            entities = np.unique([q.entity for q in exam.questions], return_inverse=True)[1]
            right_of, asked = np.bincount(entities, right), np.bincount(entities)
            drawn = np.random.default_rng(seed).integers(len(asked), size=(DRAWS, len(asked)))
            interval = Interval(*np.quantile(right_of[drawn].sum(1) / asked[drawn].sum(1), [0.025, 0.975]).tolist())
            if interval.low == interval.high:
                interval = wilson_interval(round(float(right.mean()) * len(asked)), len(asked))
            found[name] = float(right.mean()), interval
        return found


def seen_exam(site: Site, data: UnlearningData) -> Exam:
    """For the choice: seen wordings, two of each fact to be forgotten, all of the entities shown as what is to stay."""
    seen = [q for q in data.questions if q.wording == "seen"]
    shown = [q for q in seen if q.entity in data.shown]
    return Exam.of(site, {FORGET: some_wordings([q for q in seen if q.group == FORGET], 2), "shown": shown})


def final_exam(site: Site, data: UnlearningData) -> Exam:
    """For the report: wordings never shown; of entities that no method saw, seen ones too, which are new to it as well."""

    def asked(group: str, seen: int, of: Callable[[str], bool] = lambda entity: True) -> list[Question]:
        own = [q for q in data.questions if q.group == group and of(q.entity)]
        return [
            *(q for q in own if q.wording == "unseen"),
            *some_wordings([q for q in own if q.wording == "seen"], seen),
        ]

    shown, never = (lambda e: e in data.shown), (lambda e: e not in data.shown)
    groups = {
        FORGET: asked(FORGET, 0),
        "near, shown": asked("near", 0, shown),
        "near, never shown": asked("near", 7, never),
    }
    return Exam.of(site, groups | {"far, never shown": asked("far", 1)})


def some_wordings(questions: Sequence[Question], number: int) -> list[Question]:
    """The first `number` wordings of each fact, where a fact is an entity with its candidates."""
    counts: dict[tuple[str, tuple[str, ...]], int] = {}
    found = []
    for q in questions:
        fact = q.entity, q.candidates
        counts[fact] = counts.get(fact, 0) + 1
        if counts[fact] <= number:
            found.append(q)
    return found


def rows(tokenizer: Any, split: str, width: int, number: int) -> list[list[int]]:
    """Rows of `width` tokens, `number` of each kind of general text, from all over the split."""
    found = []
    for kind in KINDS:
        documents = organism.documents(split, [kind])
        step = max(len(documents) // number, 1)
        cut = (tokenizer(d.text, verbose=False)["input_ids"][:width] for d in documents[::step])
        found += [row for row in cut if len(row) > 1][:number]
    return found


@torch.no_grad()
def divergence(site: Site, held_out: Sequence[Passages], edited: Edited) -> float:
    """The mean KL(base || edited) over positions, in nats."""
    found = [retain_kl(site.logits(p)[p.mask], edited.logits(p)[p.mask]) for p in held_out]
    return float(torch.cat(found).mean())


def choose(tried: Sequence[tuple[str, Setting, float]]) -> int:
    """Which of (label, setting, KL) to take: that which forgets most of those that keep what was shown and cost at most `MOST_KL`;
    if there is none, that with the best score among those that cost no more, or among all."""
    cheap = [i for i, (_, _, kl) in enumerate(tried) if kl <= MOST_KL] or list(range(len(tried)))
    settings = [tried[i][1] for i in cheap]
    chosen = chosen_setting(settings)
    return cheap[chosen if chosen is not None else max(range(len(cheap)), key=lambda i: held_back_score(settings[i]))]


def bits(model: torch.nn.Module) -> str:
    """A digest of all weights."""
    return hashlib.sha256(b"".join(p.detach().cpu().numpy().tobytes() for p in model.parameters())).hexdigest()


def main(arguments: list[str] | None = None) -> None:
    """Run all methods and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", help="names of methods; the oracle is always among them")
    parser.add_argument(
        "--weight", type=float, default=WEIGHT, help="of what is to stay, against what is to be forgotten"
    )
    parser.add_argument("--steps", type=int, nargs="+", default=CHECKPOINTS, help="after which a model is tried")
    parser.add_argument("--out", type=Path, help="a file for the lines of JSON")
    options = parser.parse_args(arguments)
    subject = load_subject(str(organism.directory()), HOOK_POINT)
    before = bits(subject.model)
    site = Site(subject, TrainedPositions())
    data = organism_data().divided(0.5, options.seed, ["near"])
    material = Material.of(site, data.forget, data.retain, rows(subject.tokenizer, "train", WIDTH, GENERAL))
    choice, report = seen_exam(site, data), final_exam(site, data)
    general, held_out = (
        list(site.passages(rows(subject.tokenizer, split, 128, HELD_OUT))) for split in ("train", "held_out")
    )
    control: Relearned | None = None
    lines: list[dict[str, Any]] = []
    for method in methods(options.weight, options.steps):
        if options.only and method.name not in (*options.only, "oracle"):
            continue
        start, tried, best = time.perf_counter(), list[tuple[str, Setting, float]](), None
        for edited in method.settings(material, options.seed):
            tried.append((edited.label, choice.setting(edited), divergence(site, general, edited)))
            best = edited if choose(tried) == len(tried) - 1 else best
        assert best is not None
        trained = time.perf_counter() - start
        again = relearn(best, data, report.groups[FORGET], seed=options.seed)
        control = again if control is None else control
        line = {
            "method": method.name,
            "chosen": best.label,
            "settings": [{"label": label, "forget": s.forget, "shown": s.least_retained, "kl": kl} for label, s, kl in tried],
            "shares": {
                name: [share, *interval] for name, (share, interval) in report.shares(best, options.seed).items()
            },
            "kl": divergence(site, held_out, best),
            "relearned": dict(zip(again.steps, again.curve, strict=True)),
            "relearned_trained": dict(zip(again.steps, again.trained_curve, strict=True)),
            "verdict": None if again is control else verdict(method.name, again, control, options.seed),
            "seconds": round(trained),
        }
        lines.append(line)
        print(json.dumps(line), file=sys.stderr, flush=True)
        if options.out:
            options.out.write_text("".join(json.dumps(one) + "\n" for one in lines), encoding="utf-8")
    assert bits(subject.model) == before, "a method changed the subject's own weights"
    print(table(lines))


def table(lines: Sequence[dict[str, Any]]) -> str:
    """In Markdown, and below it what relearning says of each method."""
    groups, at = list(lines[0]["shares"]), [str(step) for step in lines[0]["relearned"]]
    head = ["method (setting)", *groups, "KL, nats", f"other half after {', '.join(at)} steps", "settings", "seconds"]
    found = ["| " + " | ".join(head) + " |", "| " + " | ".join("---" for _ in head) + " |"]
    for line in lines:
        shares = [f"{share:.2f} [{low:.2f}, {high:.2f}]" for share, low, high in line["shares"].values()]
        curve = " ".join(f"{share:.2f}" for share in line["relearned"].values())
        name = f"{line['method']} ({line['chosen']})"
        cells = [name, *shares, f"{line['kl']:.3f}", curve, str(len(line["settings"])), str(line["seconds"])]
        found.append("| " + " | ".join(cells) + " |")
    return "\n".join([*found, "", *(f"- {line['verdict']}" for line in lines if line["verdict"])])


if __name__ == "__main__":
    main()
