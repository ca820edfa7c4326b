from __future__ import annotations

import pytest
import torch
from saekit_contrastive.infonce import InfoNCE, InfoNCECluster
from saekit_contrastive.pooling import halves, pooled
from saekit_contrastive.tiled import LEFT_OUT, contrastive_loss

from saekit import UsageError


@pytest.mark.parametrize("sparse", [True, False])
@pytest.mark.parametrize("how", ["mean", "max", "last"])
def test_pooled_codes_and_their_gradients_are_those_of_the_dense_code(kit, sparse: bool, how) -> None:
    step = kit.step_of(sparse=sparse)
    batch = step.sequences
    sequence = batch.mask.nonzero()[:, 0]
    found = pooled(batch.code, sequence, len(batch), how)
    dense = batch.code.dense()
    parts = [dense[sequence == i] for i in range(len(batch))]
    by = {"mean": lambda rows: rows.mean(0), "max": lambda rows: rows.amax(0), "last": lambda rows: rows[-1]}
    expected = torch.stack([by[how](rows) for rows in parts])
    torch.testing.assert_close(found, expected)
    weights = torch.randn_like(found)
    grads = [torch.autograd.grad((z * weights).sum(), step.sae.W_enc, retain_graph=True)[0] for z in (found, expected)]
    torch.testing.assert_close(*grads)


def test_halves_share_each_sequence_as_equally_as_can_be() -> None:
    sequence = torch.arange(50).repeat_interleave(torch.arange(50) % 7)
    half = halves(sequence)
    counts = torch.stack([torch.bincount(sequence[half == side], minlength=50) for side in (0, 1)])
    assert ((counts[0] - counts[1]).abs() <= 1).all()
    assert not torch.equal(half, halves(sequence))


def test_by_labels_it_is_the_kernel_on_pooled_cosines(kit) -> None:
    step = kit.step_of()
    batch = step.sequences
    z = torch.nn.functional.normalize(pooled(batch.code, batch.mask.nonzero()[:, 0], len(batch)), dim=1)
    groups = torch.where(batch.labels.isnan(), -1.0, batch.labels).long()
    value = kit.prepared(InfoNCE(temperature=0.3), step.sae)(step)
    torch.testing.assert_close(value, contrastive_loss(z, groups, temperature=0.3))
    one = kit.prepared(InfoNCE(temperature=0.3, concepts=["prose"]), step.sae)(step)
    torch.testing.assert_close(one, contrastive_loss(z, groups[:, 1:], temperature=0.3))


@pytest.mark.parametrize("positives", ["labels", "halves"])
def test_the_scale_of_the_code_does_not_matter(kit, positives) -> None:
    step = kit.step_of()
    values = []
    for one in (step, kit.step_of(kit.scaled(step.sae, 7.0))):
        torch.manual_seed(0)
        values.append(kit.prepared(InfoNCE(positives=positives), one.sae)(one))
    torch.testing.assert_close(*values)


def test_focus_weighs_latents_and_a_cluster_its_neighbours_too(kit) -> None:
    step = kit.step_of(graph=True)
    plain = kit.prepared(InfoNCE(), step.sae)(step)
    focused = kit.prepared(InfoNCE(focus=[3, 4, 5, 6], emphasis=20.0), step.sae)(step)
    cluster = kit.prepared(InfoNCECluster(focus=[3], emphasis=20.0), step.sae)
    assert sorted(step.graph.neighbours(3)[0].tolist()) == [4, 5, 6]
    assert not torch.isclose(plain, focused)
    torch.testing.assert_close(cluster(step), focused)
    step.graph = None
    assert not cluster.active(step)


@pytest.mark.parametrize("positives", ["labels", "halves"])
def test_the_queue_holds_the_last_codes_without_gradient_and_survives_a_checkpoint(kit, positives) -> None:
    first, second = kit.step_of(), None
    second = kit.step_of(first.sae, seed=1)
    loss = kit.prepared(InfoNCE(positives=positives, queue=30), first.sae)
    alone = kit.prepared(InfoNCE(positives=positives), first.sae)
    rows = 12 if positives == "labels" else 24
    torch.manual_seed(0)
    start = loss(first)
    torch.manual_seed(0)
    torch.testing.assert_close(start, alone(first))  # nothing is in the queue yet
    state = loss.state_dict()
    assert len(state["z"]) == rows and not state["z"].requires_grad
    other = kit.prepared(InfoNCE(positives=positives, queue=30), first.sae)
    other.load_state_dict(state)
    values = []
    for part in (loss, other, alone):
        torch.manual_seed(1)
        values.append(part(second))
    assert torch.equal(values[0], values[1])
    assert not torch.isclose(values[0], values[2])
    for _ in range(4):
        loss(second)
    assert len(loss.state_dict()["z"]) == 30


def test_a_sequence_without_active_latents_is_left_out(kit) -> None:
    step = kit.step_of()
    step.sequences.code.values.data[step.sequences.code.pattern.rows == 0] = 0.0
    value = kit.prepared(InfoNCE(), step.sae)(step)
    assert torch.isfinite(value)
    assert all(torch.isfinite(g).all() for g in torch.autograd.grad(value, [step.sae.W_enc]))


def test_one_class_alone_says_nothing(kit) -> None:
    step = kit.step_of(sequences=torch.ones(12, 2))
    assert not kit.prepared(InfoNCE(), step.sae).active(step)
    assert kit.prepared(InfoNCE(positives="halves"), step.sae).active(step)
    step.sequences = None
    assert not kit.prepared(InfoNCE(positives="halves"), step.sae).active(step)


def test_what_is_not_there_is_refused(kit) -> None:
    sae = kit.step_of().sae
    with pytest.raises(UsageError, match=r"^concepts: .*'poetry'.*code, prose"):
        kit.prepared(InfoNCE(concepts=["poetry"]), sae)
    with pytest.raises(UsageError, match=r"^focus: .*64.*0 to 63"):
        kit.prepared(InfoNCE(focus=[64]), sae)


def test_accuracy_counts_sequences_whose_nearest_other_is_of_their_kind(kit) -> None:
    step = kit.step_of()
    loss = kit.prepared(InfoNCE(concepts=["code"]), step.sae)
    z, groups = (t.detach() for t in loss._of_step(step))
    right = []
    for i in range(len(z)):
        others = [j for j in range(len(z)) if j != i and groups[j, 0] != LEFT_OUT]
        if groups[i, 0] != LEFT_OUT and any(groups[j, 0] == groups[i, 0] for j in others):
            right.append(float(groups[max(others, key=lambda j: float(z[i] @ z[j])), 0] == groups[i, 0]))
    assert 1 < len(right) <= len(z)
    assert float(loss.measures(step)["accuracy"]) == pytest.approx(sum(right) / len(right))
    assert kit.prepared(InfoNCE(positives="halves"), step.sae).measures(step) == {}
