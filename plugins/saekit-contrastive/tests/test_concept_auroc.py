from __future__ import annotations

import types

import pytest
import torch
from saekit_contrastive import labelled_codes
from saekit_contrastive.concept_auroc import ConceptAUROC, _others
from saekit_contrastive.labelled_codes import LabelledCodes, encode_labelled
from sklearn.metrics import roc_auc_score

from saekit import Estimate, SequenceBatch, auroc, auroc_interval
from saekit.testing import make_step

D_IN, N_HELD_OUT = 16, 70


class Sorted:
    """Sequences of two concepts, whose held-out ones are sorted by the first. Position 0 of each is left out."""

    concepts = ("code", "sub ject")

    def sequences(self, split: str, n: int, seed: int, number: int) -> SequenceBatch:
        numbers = list(range(number * n, (number + 1) * n))
        if split == "held_out":
            numbers = [i for i in numbers if i < N_HELD_OUT]
        parts = [self._one(split, i) for i in numbers]
        x = torch.stack([x for x, _ in parts]) if parts else torch.zeros(0, 6, D_IN)
        labels = torch.tensor([y for _, y in parts]) if parts else torch.zeros(0, 2)
        mask = torch.ones(x.shape[:2], dtype=torch.bool)
        mask[:, 0] = False
        return SequenceBatch(x, mask, labels)

    def _one(self, split: str, number: int) -> tuple[torch.Tensor, list[float]]:
        draws = torch.Generator().manual_seed(number + 1000 * (split == "train"))
        code = float(number % 2 if split == "train" else number < N_HELD_OUT // 2)
        x = torch.randn(6, D_IN, generator=draws)
        x[:, 3] += 1.5 * code
        return x, [code, torch.nan if number % 3 == 0 else float(number % 3 == 1)]


def context_of(sae, source=None) -> types.SimpleNamespace:
    told: list[str] = []
    return types.SimpleNamespace(sae=sae, source=source or Sorted(), seed=0, scale=1.0, warn=told.append, told=told)


def sae_of(architecture: str = "topk", **options):
    return make_step(architecture=architecture, options=options, d_in=D_IN).sae


def estimated(context, **options) -> dict[str, Estimate | float | None]:
    metric = ConceptAUROC(**options)
    metric.prepare(context)
    values = metric.measure(context)
    assert set(values) == set(metric.meanings) and set(metric.headline) <= set(values)
    return values


def plain(values: dict[str, Estimate | float | None]) -> dict[str, float | None]:
    return {name: value.value if isinstance(value, Estimate) else value for name, value in values.items()}


def measured(context, **options) -> dict[str, float | None]:
    return plain(estimated(context, **options))


@pytest.mark.parametrize("architecture", ["topk", "standard"])
def test_a_latent_is_measured_on_the_gated_code_of_held_out_sequences(architecture: str) -> None:
    sae = sae_of(architecture)
    with torch.no_grad():
        sae.W_enc[:, 2] = 4 * torch.eye(D_IN)[3]
        sae.b_enc[2] = -3.0
    values = measured(context_of(sae), latents={"code": 2})
    parts = [Sorted().sequences("held_out", 16, 0, n) for n in range(5)]
    x, mask = (torch.cat([getattr(part, name) for part in parts]) for name in ("x", "mask"))
    labels = torch.cat([part.labels for part in parts])[:, 0]
    assert len(x) == N_HELD_OUT
    f = sae.encode(x[mask]).dense()[:, 2].detach()
    y = labels[mask.nonzero()[:, 0]]
    assert values["concept_auroc_tokens"] == pytest.approx(roc_auc_score(y, f))
    assert values["concept_auroc_sequences"] == pytest.approx(roc_auc_score(labels, f.view(len(x), -1).mean(1)))
    assert values["concept_e_pos"] == pytest.approx(float(f[y == 1].mean()), rel=1e-5)
    assert values["concept_e_neg"] == pytest.approx(float(f[y == 0].mean()), rel=1e-5)
    assert values["concept_ratio"] == pytest.approx(float(f[y == 1].mean() / f[y == 0].mean()), rel=1e-5)
    assert values["concept_firing_neg"] == pytest.approx(float((f[y == 0] > 0).float().mean()))
    assert values["concept_std"] == pytest.approx(float(f.std(correction=0)), rel=1e-4)
    assert values["concept_auroc_tokens"] > 0.7
    assert values["concept_means_auroc_tokens"] > 0.8 and values["concept_probe_auroc_tokens"] > 0.8


def test_held_out_sequences_are_taken_from_all_over() -> None:
    found = encode_labelled(context_of(sae_of()), "held_out", [0], sequences=32, tokens=10_000)
    assert found.labels.shape == (32, 2)
    assert 0 < float(found.labels[:, 0].mean()) < 1  # the first 32 alone are all of one class
    assert len(encode_labelled(context_of(sae_of()), "held_out", [0], sequences=999, tokens=10_000).labels) == N_HELD_OUT
    assert len(encode_labelled(context_of(sae_of()), "train", [0], sequences=999, tokens=200).x) <= 200


def test_every_auroc_has_its_interval_clustered_by_sequence_and_what_it_was_measured_on() -> None:
    sae = sae_of()
    values = estimated(context_of(sae), latents={"code": 2})
    of_aurocs = {name: value for name, value in values.items() if "auroc" in name}
    assert len(of_aurocs) == 9 and all(isinstance(value, Estimate) for value in of_aurocs.values())
    assert not any(isinstance(value, Estimate) for name, value in values.items() if name not in of_aurocs)
    for name, value in of_aurocs.items():
        assert value.interval.low <= value.value <= value.interval.high
        positions = {"positions with it": 175, "positions without it": 175} if name.endswith("tokens") else {}
        assert value.n == {**positions, "sequences with it": 35, "sequences without it": 35}
    data = encode_labelled(context_of(sae), "held_out", [2], sequences=256, tokens=10_000)
    scores = data.columns[2].detach()
    expected = auroc_interval(scores, data.of_tokens(0), data.sequence)
    assert values["concept_auroc_tokens"].interval == pytest.approx(expected)
    best = int(values["concept_other_latent_tokens"])
    scores = values["concept_other_sign_tokens"] * sae.encode(data.x).dense()[:, best].detach()
    expected = auroc_interval(scores, data.of_tokens(0), data.sequence)
    assert values["concept_other_auroc_tokens"].interval == pytest.approx(expected)


def test_a_latent_at_chance_below_it_and_above_it_is_told_as_one() -> None:
    sae = sae_of()
    with torch.no_grad():
        sae.W_enc[:, 2], sae.W_enc[:, 4] = 4 * torch.eye(D_IN)[3], -4 * torch.eye(D_IN)[3]
        sae.W_enc[:, 5] = 4 * torch.eye(D_IN)[9]  # of a coordinate that has nothing to do with the concept
    notes = {
        latent: estimated(context_of(sae), latents={"code": latent})["concept_auroc_sequences"].note for latent in (2, 4, 5)
    }
    assert notes[2] == ""
    assert notes[4].startswith("Below chance: its 95% interval ends at 0.")
    assert notes[5].startswith("At chance: its 95% interval, 0.") and notes[5].endswith("includes 0.5.")


def test_few_sequences_are_told() -> None:
    """16 sequences printed .9167 without a word."""
    source, plain = Sorted(), Sorted()._one
    source._one = lambda split, number: plain("train", number)  # both classes in turn
    context = context_of(sae_of(), source)
    few = estimated(context, latents={"code": 2}, sequences=16)
    n = few["concept_auroc_sequences"].n
    assert n == {"sequences with it": 8, "sequences without it": 8}
    said = [text for text in context.told if "too few for more than a rough AUROC" in text]
    assert len(said) == 1
    assert f"Concept 'code' was measured on {n['sequences with it']} held-out sequences with it and" in said[0]
    enough = context_of(sae_of())
    estimated(enough, latents={"code": 2})
    assert not any("too few" in text for text in enough.told)


def test_scaling_the_encoder_and_the_decoder_changes_no_score(kit) -> None:
    sae = sae_of(decoder_norm="free")
    before, after = (measured(context_of(one), latents={"code": 2}) for one in (sae, kit.scaled(sae, 8.0)))
    scores = [name for name in before if "auroc" in name or "firing" in name or "leakage" in name or "ratio" in name]
    assert len(scores) == 13
    assert {name: before[name] for name in scores} == pytest.approx({name: after[name] for name in scores}, rel=1e-4)
    assert after["concept_e_pos"] == pytest.approx(8 * before["concept_e_pos"], rel=1e-5)


def test_a_latent_that_never_fires_is_told_and_scores_half() -> None:
    sae = sae_of()
    with torch.no_grad():
        sae.b_enc[0] = -1000.0
    context = context_of(sae)
    values = measured(context, latents={"code": 0})
    assert values["concept_auroc_tokens"] == values["concept_auroc_sequences"] == 0.5
    assert values["concept_ratio"] is None and values["concept_firing_pos"] == 0.0
    assert "never fires" in context.told[0]


def test_positions_that_are_not_finite_are_left_out_and_told() -> None:
    source, plain = Sorted(), Sorted()._one
    whole = measured(context_of(sae_of(), Sorted()), latents={"code": 2})

    def one(split: str, number: int) -> tuple[torch.Tensor, list[float]]:
        x, labels = plain(split, number)
        if split == "held_out" and number == 4:
            x[:] = torch.nan
        return x, labels

    source._one = one
    context = context_of(sae_of(), source)
    found = measured(context, latents={"code": 2})
    assert all(value is None or value == pytest.approx(whole[name], abs=0.1) for name, value in found.items() if "auroc" in name)
    assert context.told[0].startswith("5 of 350 activations") and "'held_out'" in context.told[0]


def test_one_class_alone_gives_no_values_and_the_reason() -> None:
    source = Sorted()
    plain = source._one
    source._one = lambda split, number: (plain(split, number)[0], [1.0, plain(split, number)[1][1]])
    context = context_of(sae_of(), source)
    values = measured(context, latents={"code": 0})
    assert set(values.values()) == {None} and "'code'" in context.told[0]


def test_several_concepts_have_names_of_their_own_and_unknown_labels_take_no_part() -> None:
    sae = sae_of()
    values = measured(context_of(sae))
    alone = measured(context_of(sae), latents={"sub ject": 1})
    assert {name.removesuffix("_sub_ject"): v for name, v in values.items() if name.endswith("_sub_ject")} == alone
    data = encode_labelled(context_of(sae), "held_out", [1], sequences=256, tokens=10_000)
    labels = data.of_tokens(1)
    known = ~labels.isnan()
    assert 0 < known.sum() < len(known)
    assert alone["concept_auroc_tokens"] == auroc(data.columns[1][known], labels[known])


def coded(codes: list[list[float]]) -> LabelledCodes:
    """Four sequences of one position with these codes; the first two are of the concept."""
    dense = torch.tensor(codes)
    rows, latents = dense.nonzero(as_tuple=True)
    labels = torch.tensor([[1.0], [1.0], [0.0], [0.0]])
    sums = torch.stack([dense.sum(0), dense.square().sum(0), (dense > 0).sum(0)])
    x, four = torch.zeros(4, 2), torch.arange(4)
    return LabelledCodes(x, four, labels, labels[four], {}, x, dense, sums, four, rows, latents, dense[rows, latents])


def test_the_best_other_latent_is_chosen_on_training_data() -> None:
    """Latent 1 is best on training data, latent 2 on held-out data: the value is that of latent 1 on held-out data."""
    train = coded([[1, 1, 0], [1, 1, 1], [0, 0, 0], [0, 0, 1]])
    held_out = coded([[1, 1, 1], [1, 0, 1], [0, 1, 0], [0, 0, 0]])
    found = plain(_others(train, held_out, 0, 0))
    assert found["other_auroc_tokens"] == found["other_auroc_sequences"] == found["leakage"] == 0.5
    assert plain(_others(train, held_out, 0, 1))["other_auroc_tokens"] == 1.0  # latent 0 is another one then


def test_another_latent_that_fires_against_the_concept_is_found_with_its_sign() -> None:
    """Latent 1 fires a little for the concept, latent 2 always against it; latent 3 changes sides on held-out data."""
    train = coded([[0, 1, 0, 1], [0, 0, 0, 1], [0, 0, 1, 0], [0, 0, 1, 1]])
    found = plain(_others(train, coded([[0, 1, 0, 0], [0, 0, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]]), 0, 0))
    for unit in ("tokens", "sequences"):
        assert found[f"other_auroc_{unit}"] == 1.0
        assert found[f"other_latent_{unit}"] == 2.0 and found[f"other_sign_{unit}"] == -1.0
    assert found["leakage"] == pytest.approx(1 / 3)  # latent 3 has the other sign on training data
    turned = plain(_others(train, coded([[0, 1, 1, 1], [0, 0, 1, 1], [0, 0, 0, 0], [0, 0, 0, 0]]), 0, 0))
    assert turned["other_latent_tokens"] == 2.0 and turned["other_auroc_tokens"] == 0.0  # no sign is chosen on held-out data


def test_of_a_dense_code_some_positions_are_kept_whole(monkeypatch) -> None:
    sae = sae_of("standard")
    whole = encode_labelled(context_of(sae), "held_out", [0], sequences=256, tokens=10_000)
    monkeypatch.setattr(labelled_codes, "_ENTRIES", len(whole.values) // 3)
    monkeypatch.setattr(labelled_codes, "_ROWS", 64)
    part = encode_labelled(context_of(sae), "held_out", [0], sequences=256, tokens=10_000)
    assert len(whole.some) == len(whole.x) and len(part.some) < 0.4 * len(whole.x)
    dense = sae.encode(part.x[part.some]).dense().detach()
    found = torch.zeros_like(dense)
    found[part.rows, part.latents] = part.values
    torch.testing.assert_close(found, dense)
    for name in ("pooled_code", "sums", "rebuilt"):
        torch.testing.assert_close(getattr(part, name), getattr(whole, name), rtol=1e-4, atol=1e-5)
    expected = torch.stack([sae.encode(part.x[part.sequence == i]).dense().mean(0) for i in range(N_HELD_OUT)]).detach()
    torch.testing.assert_close(part.pooled_code, expected)
