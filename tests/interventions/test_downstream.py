"""The guard: a read that cannot see the edit is an error that names both hook points."""

from __future__ import annotations

import pytest
import torch
from interventions.models import TOKENS, Case, D, make_sae
from torch import nn

import saekit
from saekit import UsageError
from saekit.activations.sites import resolve, run_to_site

MLP = {"gpt2": "transformer.h.1.mlp", "llama": "model.layers.1.mlp", "gemma2": "model.layers.1.mlp"}


def mlp_of(case: Case) -> str:
    return MLP[case.model.config.model_type]


def test_the_residual_before_a_block_read_while_its_mlp_is_edited(language: Case) -> None:
    """hidden_states[1] is read and layers[1].mlp is steered: whatever the edit, the difference would be zero."""
    edited_at, read_at = mlp_of(language), "blocks.1.hook_in"
    both = rf"{read_at}.*not downstream of the edit at '{edited_at}'.*Read at a later hook point"
    reader_sae = make_sae("topk", language.activation(read_at))
    edit_sae = make_sae("topk", language.activation(edited_at))
    edit = saekit.attach(language.model, edit_sae, edited_at, edits={3: saekit.add(50.0)})

    plain = language.activation(read_at)
    with edit, resolve(language.model, read_at).capture() as seen:  # what the guard is for
        language.logits()
    assert torch.equal(seen.value, plain)

    with pytest.raises(UsageError, match=both):
        saekit.ensure_downstream(language.model, edited_at, read_at, TOKENS)
    with pytest.raises(UsageError, match=both), edit, saekit.read(language.model, reader_sae, read_at, after=edit):
        language.logits()
    with (
        pytest.raises(UsageError, match=both),
        saekit.attach(language.model, edit_sae, edited_at, edits={3: saekit.add(50.0)}, reads=read_at),
    ):
        language.logits()


def test_the_other_way_round_it_is_downstream(language: Case) -> None:
    edited_at, read_at = "blocks.1.hook_in", mlp_of(language)
    saekit.ensure_downstream(language.model, edited_at, read_at, TOKENS)
    saes = [make_sae("topk", language.activation(at)) for at in (edited_at, read_at)]
    plain = saes[1].encode(language.activation(read_at).reshape(-1, D)).dense()
    with (
        saekit.attach(
            language.model, saes[0], edited_at, edits={3: saekit.add(5.0)}, reads=[read_at, edited_at]
        ) as edit,
        saekit.read(language.model, saes[1], read_at, after=[edit]) as reader,
    ):
        for _ in range(3):
            language.logits()
    assert not torch.equal(reader.code.dense(), plain)


def test_every_pair_of_sites_along_the_stream(case: Case) -> None:
    sites = [case.below, case.middle, case.above]
    for i, edited_at in enumerate(sites):
        for j, read_at in enumerate(sites):
            if j >= i:
                saekit.ensure_downstream(case.model, edited_at, read_at, TOKENS)
            else:
                with pytest.raises(UsageError, match=f"{read_at}.*not downstream of the edit at '{edited_at}'"):
                    saekit.ensure_downstream(case.model, edited_at, read_at, TOKENS)


def test_at_one_site_the_order_of_attaching_decides(case: Case) -> None:
    sae = make_sae("topk", case.activation(case.middle))
    edit = saekit.attach(case.model, sae, case.middle, edits={3: saekit.add(1.0)})
    with edit, saekit.read(case.model, sae, case.middle, after=edit) as reader:
        case.logits()
    assert len(reader.codes) == 1
    reader = saekit.read(case.model, sae, case.middle, after=edit)
    with pytest.raises(UsageError, match="the edit is not attached. Open its block first"), reader:
        pass
    above = resolve(case.model, case.middle)
    saekit.ensure_downstream(case.model, above, above, TOKENS)


class Parallel(nn.Module):
    """Two branches of one input, summed: the second runs later and does not depend on the first."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.idle = nn.Linear(D, D), nn.Linear(D, D), nn.Linear(D, D)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.dropout(self.first(x)) + self.second(self.dropout(x))


def test_a_parallel_branch_is_not_downstream() -> None:
    model, x = Parallel(), torch.randn(2, 5, D)
    for _ in range(2):  # in training mode too, where dropout alone would make a difference
        with pytest.raises(UsageError, match="'second' shows nothing of an edit at 'first': .* parallel branch"):
            saekit.ensure_downstream(model, "first", "second", x)
        with pytest.raises(UsageError, match="'first' is not downstream of the edit at 'second'"):
            saekit.ensure_downstream(model, "second", "first", (x,))
        model.eval()
    saekit.ensure_downstream(model, "first", "dropout", {"x": x})


def test_sites_that_are_never_reached() -> None:
    model, x = Parallel(), torch.randn(2, 5, D)
    for pair in (("idle", "second"), ("second", "idle")):
        with pytest.raises(UsageError, match="'idle': the model's forward never calls"):
            saekit.ensure_downstream(model, *pair, x)
    with pytest.raises(UsageError, match="Did you mean 'first'"):
        saekit.ensure_downstream(model, "frist", "second", x)


def test_the_guard_leaves_no_hooks(case: Case) -> None:
    before = case.hooks()
    with pytest.raises(UsageError):
        saekit.ensure_downstream(case.model, case.above, case.below, TOKENS)
    saekit.ensure_downstream(case.model, case.below, case.above, TOKENS)
    with pytest.raises(IndexError):
        saekit.ensure_downstream(case.model, case.below, case.above, TOKENS + 10_000)
    assert case.hooks() == before
    assert run_to_site(resolve(case.model, case.below), lambda: case.model(TOKENS)).shape == (*TOKENS.shape, D)
