"""Positions that an SAE was not trained on are left alone by whatever edits, splices or counts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from interventions.models import TOKENS, Case, D, make_sae

import saekit
from saekit import TrainedPositions
from saekit.sae.formats import load_sae, save_sae
from saekit.testing import tiny_language_run, tiny_run
from saekit.testing.tiny import language_source

SPECIAL = int(TOKENS[0, 5])


@pytest.mark.parametrize(
    ("rule", "bos", "wanted"),
    [
        (TrainedPositions(), None, [1, 1, 1, 1]),
        (TrainedPositions(), 7, [0, 1, 1, 1]),
        (TrainedPositions(True), 7, [1, 1, 1, 1]),
        (TrainedPositions(False), None, [0, 1, 1, 1]),
        (TrainedPositions(True, (9,)), 7, [1, 1, 0, 1]),
    ],
)
def test_the_rule(rule: TrainedPositions, bos: int | None, wanted: list[int]) -> None:
    tokens = torch.tensor([[7, 8, 9, 7]])
    rule = rule.with_bos(bos)
    assert rule.in_rows(tokens).int().tolist() == [wanted] and rule.everywhere is all(wanted)
    padded = torch.tensor([[-1, 0, 1, 2]])
    assert not rule.among(padded, tokens)[0, 0] and rule.among(padded, None)[0, 1] == (rule.first is not False)
    assert TrainedPositions.from_dict(rule.to_dict()).with_bos(bos) == rule


@pytest.mark.parametrize("mode", ["edit", "no_change"])
def test_attach_changes_nothing_where_the_sae_was_not_trained(case: Case, mode: str) -> None:
    sae = make_sae("topk", case.activation(case.middle))
    sae.trained_positions = TrainedPositions(False, (SPECIAL,))
    edits = {n: saekit.add(3.0) for n in range(4)} if mode == "edit" else None
    before = case.activation(case.middle)
    with saekit.attach(case.model, sae, case.middle, mode=mode, edits=edits) as attachment:
        after = case.activation(case.middle)
    changed = (before != after).any(-1)  # [n, T]
    known = not isinstance(case.model, torch.nn.Sequential) and hasattr(case.model, "config")  # shows its tokens
    expected = sae.trained_positions.among(torch.arange(TOKENS.shape[1]).expand_as(TOKENS), TOKENS if known else None)
    assert torch.equal(changed, expected) and attachment.changed == int(expected.sum())
    with saekit.attach(case.model, sae, case.middle, mode=mode, edits=edits, positions=slice(None)):
        assert (before != case.activation(case.middle)).any(-1).all()  # asked for by name


def test_the_positions_are_kept_with_the_sae(tmp_path: Path, gpt2: Case) -> None:
    sae = make_sae("topk", gpt2.activation(gpt2.middle))
    sae.trained_positions = TrainedPositions(False, (3, 4))
    save_sae(sae, tmp_path, name="topk")
    assert load_sae(tmp_path).trained_positions == sae.trained_positions
    assert sae.d_in == D


@pytest.mark.parametrize(("drop_first", "drop_special"), [(True, False), (False, True)])
def test_a_run_records_what_its_source_left_out(tmp_path: Path, drop_first: bool, drop_special: bool) -> None:
    source = {**language_source(), "drop_first": drop_first, "drop_special": drop_special}
    run = tiny_language_run(tmp_path / "run", source=source, metric=[{"use": "l0"}])
    found = load_sae(run.directory / "sae").trained_positions
    assert found.first is not drop_first and bool(found.left_out) is drop_special
    for batch in run.context.source.token_batches("held_out", rows=8):
        assert torch.equal(found.in_rows(batch.tokens) & batch.mask, batch.keep)


def test_without_texts_there_is_no_position_to_leave_out(tmp_path: Path) -> None:
    run = tiny_run(tmp_path / "run")
    assert load_sae(run.directory / "sae").trained_positions == TrainedPositions(True)
