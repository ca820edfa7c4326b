"""Labels of single positions: a latent that was fixed on a span's label fires at its positions and nowhere else."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from saekit_contrastive.vectors import vectors_of

from saekit import SequenceBatch
from saekit.estimate import value_of
from saekit.testing import tiny_run
from saekit.testing.tiny import language_source

NAME = "Zoë"  # 4 bytes, and so 4 tokens; the last of them, of ë, is in no other word


def source_of(directory: Path, **options: Any) -> dict[str, Any]:
    """Texts of which every one has the name once, at any place."""
    draws, lines = random.Random(0), []
    for _ in range(160):
        words = draws.choices(["lamp", "door", "Ido", "café", "zoo"], k=3)
        words.insert(draws.randrange(4), NAME)
        text = " ".join(words)
        start = text.index(NAME)
        lines.append(json.dumps({"text": text, "name": [[start, start + len(NAME)]]}))
    (directory / "names.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return language_source() | {"data": str(directory / "names.jsonl"), "labels": ["name"], "context": 28} | options


def run_of(place: Path, source: dict[str, Any], **concept: Any) -> Any:
    return tiny_run(
        place,
        source=source,
        architecture={"use": "hsae", "base": {"use": "batchtopk", "k": 4}, "d_sae": 32},
        loss=[{"use": "mse"}, {"use": "concept", **concept}],
        metric=[{"use": "concept_auroc"}],
        training={"tokens": 64 * 250, "batch_size": 64, "buffer": 1024, "lr": 3e-3, "device": "cpu"},
    )


def fires(run: Any) -> tuple[float, float]:
    """The share of held-out positions of the label, and of the others, where latent 0 fires."""
    batch = run.context.source.sequences("held_out", 30, 0, 0)
    x = batch.x[batch.mask] * run.context.scale
    on = run.context.sae.encode(x).columns(torch.tensor([0]))[:, 0] > 0
    label = batch.labels_of_positions()[:, 0] > 0.5
    assert 0.03 < float(label.float().mean()) < 0.1
    return float(on[label].float().mean()), float(on[~label].float().mean())


def test_a_latent_fixed_on_a_spans_label_fires_at_its_positions_and_not_elsewhere(tmp_path: Path) -> None:
    """Every text has the label, so that labels of whole texts could teach nothing."""
    source = source_of(tmp_path, span_tokens="last")
    run = run_of(tmp_path / "run", source)
    there, elsewhere = fires(run)
    assert there > 0.95 and elsewhere < 0.02, (there, elsewhere)
    found = {name: value_of(value) for name, value in run.summary["metrics"].items() if name.startswith("concept_")}
    assert found["concept_auroc_tokens"] > 0.99 and found["concept_other_auroc_tokens"] < found["concept_auroc_tokens"]
    of_sequences = [name for name in found if name.endswith("sequences") or name == "concept_leakage"]
    assert len(of_sequences) == 7 and not any(found[name] is not None for name in of_sequences)
    assert any("Every held-out sequence with a label has concept 'name'" in told for told in run.summary["warnings"])
    assert found["concept_firing_pos"] == pytest.approx(there, abs=0.05)
    shuffled = fires(run_of(tmp_path / "shuffled", source, shuffled=True))  # the control
    assert shuffled[0] - shuffled[1] < 0.5, shuffled


def test_a_vector_and_a_correlation_are_of_positions(tmp_path: Path) -> None:
    """The difference of means against a plain loop over the positions."""

    class Source:
        concepts = ("name",)

        def sequences(self, split: str, n: int, seed: int, number: int) -> SequenceBatch:
            draws = torch.Generator().manual_seed(number)
            each = torch.randint(0, 2, (n, 5, 1), generator=draws).float()
            mask = torch.ones(n, 5, dtype=torch.bool)
            mask[:, 0] = False
            x = torch.randn(n, 5, 6, generator=draws)
            labels = each.masked_fill(~mask[..., None], 0).amax(1)
            return SequenceBatch(x, mask, labels, position_labels=each)

    (vector,) = vectors_of(Source(), "difference_of_means", [0], sequences=32, seed=0)
    batch = Source().sequences("train", 32, 0, 0)
    with_it, without = [], []
    for x, mask, label in zip(batch.x, batch.mask, batch.position_labels, strict=True):
        for t in range(5):
            if mask[t]:
                (with_it if label[t, 0] == 1 else without).append(x[t])
    difference = torch.stack(with_it).mean(0) - torch.stack(without).mean(0)
    torch.testing.assert_close(vector, difference / difference.norm())
