"""The added vector: strength x decoder row, in every unit, of the same norm for every direction, read after the edit."""

from __future__ import annotations

import pytest
import torch
from saekit_steering.activation_statistics import directions_like
from saekit_steering.cluster import Cluster
from saekit_steering.prompts import Prompt, batches, tokenise
from saekit_steering.scoring import Scorer, output_score
from saekit_steering.steering_vectors import (
    latent_vectors,
    on_the_sphere,
    other_latent_vectors,
    random_vectors,
    strengths,
)
from saekit_steering.typical_tokens import typical_tokens

import saekit
from saekit import RunContext, TrainedPositions, UsageError

TOKENS = (0, 40, 41, 42, 43)


def measured(context: RunContext, vectors, prompts=None):
    typical = typical_tokens(torch.randint(1, 9, (2, 258), generator=torch.Generator().manual_seed(0)), 20, 1)
    some = prompts or [Prompt("neutral", "", TOKENS)]
    return Scorer(context, Cluster(context, 0, 10), typical)(vectors, batches(some, context.sae.trained_positions, 512), {})


def test_f_is_read_after_the_edit_and_rises_by_the_strength(context: RunContext) -> None:
    vector = latent_vectors(context.sae, 0, strengths([2.5], "absolute", 1.0, 1.0))[0]
    found = measured(context, [vector])
    before, after = found.readings_before[0][0], found.readings[0][0][0]
    assert before.shape == (len(TOKENS) - 1, 5)
    torch.testing.assert_close(after[:, 0] - before[:, 0], torch.full((4,), 2.5), atol=1e-4, rtol=0)


def test_the_first_position_is_not_steered(context: RunContext) -> None:
    subject = context.source.subject
    vector = latent_vectors(context.sae, 0, strengths([2.5], "absolute", 1.0, 1.0))[0]
    ids = torch.tensor([TOKENS])
    edit = vector.edit(subject)
    with saekit.attach_all([edit, saekit.read(subject.model, context.sae, subject.site, after=edit)]) as both:
        subject.model(ids)
    with saekit.read(subject.model, context.sae, subject.site) as plain:
        subject.model(ids)
    change = both[1].code.column(0) - plain.code.column(0)
    assert change[0] == 0
    assert (change[1:] > 2).all()


def test_whatever_is_steered_is_steered_where_the_sae_was_trained(context: RunContext, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the first position too, if it was trained there, and at no special token that was left out."""
    sae, subject = context.sae, context.source.subject
    monkeypatch.setattr(sae, "trained_positions", TrainedPositions(True, (TOKENS[2],)))
    sweep = strengths([2.5], "absolute", 1.0, 1.0)
    own, drawn = latent_vectors(sae, 0, sweep)[0], random_vectors(sae, 0, on_the_sphere(1, sae.d_in, 0), sweep)[0]
    ids = torch.tensor([TOKENS])
    wanted = [True, True, False, True, True]
    for vector in (own, drawn):
        with vector.edit(subject) as edit, saekit.read(subject.model, sae, subject.site, after=edit) as reader:
            subject.model(ids)
        with saekit.read(subject.model, sae, subject.site) as plain:
            subject.model(ids)
        changed = (reader.code.dense() - plain.code.dense()).abs().amax(1) > 0.1
        assert changed.tolist() == wanted
    (batch,) = batches([Prompt("neutral", "", TOKENS)], sae.trained_positions, 512)
    assert batch.tokens.keep.tolist() == [wanted]
    assert (own.added_to(torch.zeros(1, 5, sae.d_in), batch.tokens.keep)[0] != 0).any(1).tolist() == wanted
    (score,) = measured(context, [own]).steered
    assert score["neutral"].positions == sum(wanted)
    texts = {"neutral": [subject.tokenizer.decode([TOKENS[2]])]}
    assert len(tokenise(texts, subject, sae.trained_positions, 4)[0].tokens) == 2  # BOS is steered
    with pytest.raises(UsageError, match="no position that the SAE was trained on"):
        tokenise(texts, subject, TrainedPositions(False, (TOKENS[2],)), 4)


def test_g_is_the_weighted_mean_of_the_neighbours(context: RunContext) -> None:
    found = measured(context, [])
    _, g = found.readings_before[0]
    with saekit.read(context.source.subject.model, context.sae, context.source.subject.site) as reader:
        context.source.subject.model(torch.tensor([TOKENS]))
    f = reader.code.dense()[1:]
    expected = (f[:, [1, 2, 3, 4]] @ torch.tensor([0.1, 0.2, 0.3, 0.4])).relu()
    torch.testing.assert_close(g[:, 0], expected, atol=1e-5, rtol=0)
    assert Cluster(context, 0, 2).latents == [0, 4, 3]  # heaviest edges first


def test_g_is_that_of_the_graph_plugin(context: RunContext) -> None:
    """Both plugins compute g, since this one does without torch_geometric."""
    graphs = pytest.importorskip("saekit_graph.propagation")
    cluster = Cluster(context, 0, 10)
    x = torch.randn(20, 16, generator=torch.Generator().manual_seed(4))
    code = context.sae.encode(x)
    expected = graphs.Propagation(context.graph, context.sae).at(code, torch.tensor(cluster.latents))
    torch.testing.assert_close(cluster.read(code)[1], expected)


def test_negative_edges_pull_down_and_g_stays_above_zero(context: RunContext) -> None:
    assert context.graph is not None
    context.graph.weight = torch.tensor([-1.0, -1.0, -1.0, -1.0, -1.0])
    _, g = measured(context, []).readings_before[0]
    assert (g == 0).all()


def test_a_graph_of_another_dictionary_is_refused(context: RunContext) -> None:
    assert context.graph is not None
    context.graph.dictionary = "0" * 64
    with pytest.raises(UsageError, match="another dictionary"):
        Cluster(context, 0, 10)


def test_reading_upstream_of_the_edit_is_refused(context: RunContext) -> None:
    """The defect that this analyzer rules out: reading the SAE before the steered layer."""
    subject = context.source.subject
    edit = saekit.attach(subject.model, context.sae, "blocks.1.hook_out", edits={0: saekit.add(2.0)})
    reader = saekit.read(subject.model, context.sae, subject.site, after=edit)  # blocks.0
    with pytest.raises(UsageError, match="not downstream"), saekit.attach_all([edit, reader]):
        subject.model(torch.tensor([TOKENS]))


def test_every_direction_of_one_strength_is_equally_long(context: RunContext) -> None:
    sae = context.sae
    with torch.no_grad():
        sae.W_dec[5] *= 7  # decoder rows need not be of one length
    try:
        row_norm = float(sae.W_dec[0].norm())
        sweep = strengths([0.5, 2.0], "absolute", 1.0, row_norm)
        living = torch.ones(sae.d_sae, dtype=torch.bool)
        drawn = on_the_sphere(3, sae.d_in, 0)
        for make in (random_vectors(sae, 0, drawn, sweep), other_latent_vectors(sae, 0, living, sweep, 23, 0)):
            for vector in make:
                added = vector.scale * vector.strength.absolute * vector.sae.W_dec[vector.row]
                assert float(added.norm()) == pytest.approx(vector.strength.norm, rel=1e-5)
                assert vector.strength.norm == pytest.approx(vector.strength.given * row_norm)
        drawn = {vector.row for vector in other_latent_vectors(sae, 0, living, sweep, 23, 0)}
        assert drawn == set(range(1, 24))
    finally:
        with torch.no_grad():
            sae.W_dec[5] /= 7


def test_random_directions_come_from_the_seed_and_point_anywhere(context: RunContext) -> None:
    sweep = strengths([1.0], "absolute", 1.0, 1.0)
    drawn = (on_the_sphere(4, context.sae.d_in, seed) for seed in (0, 0, 1))
    first, again, other = (random_vectors(context.sae, 0, rows, sweep)[0].sae.W_dec for rows in drawn)
    assert torch.equal(first, again)
    assert not torch.allclose(first, other)
    assert torch.linalg.matrix_rank(first) == 4


def test_directions_with_the_covariance_of_activations_have_it() -> None:
    """Over many draws, in batches of any size, whatever the mean of the activations is."""
    mixed = torch.randn(4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = torch.randn(300, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64) @ mixed + 100.0
    drawn = directions_like([x[:7], x[7:200], x[200:]], 20_000, 0)
    assert drawn.shape == (20_000, 4) and float(drawn.mean(0).abs().max()) < 0.1
    torch.testing.assert_close(drawn.t() @ drawn / 20_000, torch.cov(x.t(), correction=0), rtol=0.1, atol=0.1)
    assert torch.equal(directions_like([x], 3, 5), directions_like([x], 3, 5))
    in_a_plane = torch.cat([x[:, :2], torch.full_like(x[:, :2], 3.0)], 1)  # what never varies is in no direction
    assert float(directions_like([in_a_plane], 5, 0)[:, 2:].abs().max()) < 1e-9


def test_strength_zero_changes_nothing(context: RunContext) -> None:
    vector = latent_vectors(context.sae, 0, strengths([0.0], "absolute", 1.0, 1.0))[0]
    found = measured(context, [vector])
    score = found.steered[0]["neutral"]
    assert score.kl == pytest.approx(0.0, abs=1e-6)
    assert score.log_odds == pytest.approx(found.unsteered["neutral"].log_odds, abs=1e-4)


def test_padding_does_not_change_what_is_measured(context: RunContext) -> None:
    vector = latent_vectors(context.sae, 0, strengths([2.5], "absolute", 1.0, 1.0))[0]
    rows = [Prompt("neutral", "", TOKENS), Prompt("neutral", "", (0, *range(50, 62)))]
    alone = [measured(context, [vector], [row]) for row in rows]
    together = measured(context, [vector], rows)
    for name in ("log_odds", "probability", "kl", "positions"):
        total = sum(getattr(one.steered[0]["neutral"], name) for one in alone)
        assert getattr(together.steered[0]["neutral"], name) == pytest.approx(total, rel=1e-4, abs=1e-5)
    for number, one in enumerate(alone):
        torch.testing.assert_close(together.readings[0][number][0], one.readings[0][0][0], atol=1e-4, rtol=1e-4)


def test_the_output_score_counts_rank_and_probability() -> None:
    p = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.2, 0.7]])
    score = output_score(p.log(), torch.tensor([0, 1]))
    torch.testing.assert_close(score, torch.tensor([0.5, (1 - 1 / 3) * 0.2]))
