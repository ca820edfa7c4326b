"""Sets of latents removed, kept alone, and put into the base run: against reruns of the model, and where the truth is known."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import pytest
import torch
from saekit_attribution.effects.attribute import attribute
from saekit_attribution.effects.batching import Failed
from saekit_attribution.effects.latent_sets import set_effects
from saekit_attribution.effects.logit_difference import LogitDifference
from saekit_attribution.effects.nodes import base_activation
from saekit_attribution.labelled_data.teacher_forcing import Sample
from torch import Tensor, nn

import saekit
from saekit import SparseAutoencoder, Subject
from saekit.builtin.architectures.standard import Standard

PLACES = ["decisive", "all"]


# --- against reruns of the whole model ---------------------------------------------------------------------------


def difference(tiny, subject, sample: Sample, sae, edits: dict[int, Tensor], where: list[int]) -> float:
    """The metric with the latents in `edits` at these values, [positions] each; the SAE's error stays."""
    functions = {latent: lambda values, to=to: to for latent, to in edits.items()}
    with torch.no_grad(), saekit.attach(subject.model, sae, subject.site, edits=functions, positions=where):
        logits = tiny.last_logits(subject, sample)
    return float(logits[sample.target] - logits[sample.base])


def code_of(subject, sae, tokens: Sequence[int]) -> Tensor:
    with torch.no_grad(), saekit.read(subject.model, sae, subject.site) as attached:
        subject.model(torch.tensor([tokens]))
    return attached.code.dense()


@pytest.mark.parametrize("reference", ["zero", "base"])
@pytest.mark.parametrize("positions", PLACES)
def test_every_effect_is_a_rerun_of_the_whole_model(tiny, subject, sae, positions: str, reference: str) -> None:
    samples = tiny.samples([9, 12, 9])
    (first, *_) = attribute(subject, sae, samples[:1], positions=positions)
    sets = [first["atp"].latents[:3].tolist(), first["atp"].latents[2:5].tolist(), []]
    found = set_effects(subject, sae, samples, sets, positions=positions, reference=reference)
    for sample, effects in zip(samples, found, strict=True):
        assert not isinstance(effects, Failed)
        length = len(sample.tokens)
        where = list(range(1, length)) if positions == "all" else [length - 1]
        here, base = code_of(subject, sae, sample.tokens), code_of(subject, sae, sample.base_tokens)
        aligned = torch.tensor(sample.aligned)
        before = torch.where(aligned[:, None] >= 0, base[aligned], 0.0)[where]
        to = before if reference == "base" else torch.zeros_like(before)
        every = ((here[where] != 0) | (before != 0)).any(0).nonzero().flatten().tolist()

        def changed(latents: Iterable[int], sample=sample, to=to, where=where) -> float:
            return difference(tiny, subject, sample, sae, {j: to[:, j] for j in latents}, where)

        plain, bare = changed([]), changed(every)
        assert effects.whole == pytest.approx(plain - bare, abs=1e-9)
        based = Sample(sample.base_tokens, sample.target, sample.base, sample.base_tokens, ())
        there = [sample.aligned[p] for p in where if sample.aligned[p] >= 0]
        values = here[[p for p in where if sample.aligned[p] >= 0]]

        def put_in(latents: Iterable[int], based=based, there=there, values=values) -> float:
            return difference(tiny, subject, based, sae, {j: values[:, j] for j in latents}, there)

        assert effects.gap == pytest.approx(plain - put_in([]), abs=1e-9)
        assert effects.all_put_in == pytest.approx(put_in(every) - put_in([]), abs=1e-9)
        for i, chosen in enumerate(sets):
            assert effects.removed[i] == pytest.approx(plain - changed(chosen), abs=1e-9)
            assert effects.kept[i] == pytest.approx(changed(j for j in every if j not in chosen) - bare, abs=1e-9)
            assert effects.put_in[i] == pytest.approx(put_in(chosen) - put_in([]), abs=1e-9)
        assert [effects.removed[2], effects.kept[2], effects.put_in[2]] == pytest.approx([0, 0, 0], abs=1e-12)


def test_the_same_prompt_has_nothing_to_be_put_into(tiny, gpt2) -> None:
    sae, samples = tiny.sae(gpt2), tiny.samples([9])
    same = Sample(samples[0].tokens, 3, 5, samples[0].tokens, tuple(range(9)))
    apart = Sample(samples[0].tokens, 3, 5, samples[0].base_tokens, (-1,) * 9)
    for effects in set_effects(gpt2, sae, [same, apart], [[1]]):
        assert (effects.gap, effects.put_in, effects.all_put_in) == (None, None, None)
        assert effects.whole != 0


def test_batched_equals_one_by_one_and_a_failure_is_of_its_sample(tiny, gpt2, monkeypatch) -> None:
    sae, samples = tiny.sae(gpt2), tiny.samples([9, 12, 9, 9])
    sets = [[1, 2, 3], list(range(sae.d_sae))]
    together = set_effects(gpt2, sae, samples, sets, positions="all")
    for sample, effects in zip(samples, together, strict=True):
        (alone,) = set_effects(gpt2, sae, [sample], sets, positions="all", batch_tokens=1)
        for name in ("removed", "kept", "put_in"):
            assert getattr(effects, name) == pytest.approx(getattr(alone, name), abs=1e-9)
        assert effects.removed[1] == pytest.approx(effects.whole) == pytest.approx(effects.kept[1])
        assert effects.put_in[1] == pytest.approx(effects.all_put_in)
    monkeypatch.setattr(
        "saekit_attribution.effects.latent_sets._into_base",
        lambda *given: 1 / 0 if samples[2] in given[2] else [(None, None, None)] * len(given[2]),
    )
    found = set_effects(gpt2, sae, samples, sets)
    assert [isinstance(effects, Failed) for effects in found] == [False, False, True, False]

@torch.no_grad()
def test_the_base_run_is_known_where_the_inserted_text_begins_as_the_rest_does(tiny, gpt2) -> None:
    """The prompts 5 6 and 5 6 7 8 with the answer 7 9: both texts begin with 5 6 7, but that 7 is not the same one."""
    sample = Sample((0, 5, 6, 7, 8, 7, 9), 3, 4, (0, 5, 6, 7, 9), (0, 1, 2, -1, -1, 3, 4))
    metric = LogitDifference(gpt2, [sample], last=False, batch_tokens=4096)
    found, known = base_activation(metric, [sample], torch.ones(1, 7, dtype=torch.bool))
    truth = LogitDifference(gpt2, [Sample(sample.base_tokens, 3, 4, (), (-1,) * 5)], last=False, batch_tokens=4096)
    assert known[0].tolist() == [True, True, True, False, False, True, True]
    torch.testing.assert_close(found[0, known[0]], truth.activation[0], atol=1e-12, rtol=0)


# --- where the truth is known ------------------------------------------------------------------------------------

D, LATENTS, TARGET, BASE = 8, 6, 3, 5  # two directions of the activation are in no latent


class Known(nn.Module):
    """tokens [n, T] -> logits [n, T, 20]. A token's activation is 8 amounts, and the logit of token 3 is `readout` of their
    sums up to each position [n, T, 8]; all others are 0."""

    def __init__(self, readout: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.amounts = torch.rand(20, D, generator=generator, dtype=torch.float64) + 0.5
        self.embed = nn.Embedding.from_pretrained(self.amounts)
        self.site = nn.Identity()
        self.scale = nn.Parameter(torch.ones((), dtype=torch.float64))
        self.readout = readout

    def forward(self, tokens: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        logits = torch.zeros(*tokens.shape, 20, dtype=torch.float64)
        logits[..., TARGET] = self.scale * self.readout(self.site(self.embed(tokens)).cumsum(1))
        return logits


def known(tiny, readout: Callable[[Tensor], Tensor]) -> tuple[Subject, SparseAutoencoder, Tensor]:
    model = Known(readout).eval()
    sae = Standard(D, LATENTS).double()
    with torch.no_grad():
        sae.W_dec.copy_(torch.eye(D)[:LATENTS])
        sae.W_enc.copy_(torch.eye(D)[:, :LATENTS])
    return tiny.subject(model, "site"), sae.eval(), model.amounts


SAMPLE = Sample((2, 7, 9, 11), TARGET, BASE, (2, 8, 10, 12), (0, 1, 2, 3))
WEIGHTS = torch.tensor([4.0, 2.0, -1.0, 0.0, 0.5, 3.0, 1.0, 2.0], dtype=torch.float64)


@pytest.mark.parametrize("positions", PLACES)
def test_in_a_linear_model_what_is_removed_and_what_is_kept_are_the_sum_of_the_scores(tiny, positions: str) -> None:
    subject, sae, amounts = known(tiny, lambda sums: sums @ WEIGHTS)
    chosen = [0, 2, 5]
    rest = [1, 3, 4]
    (effects,) = set_effects(subject, sae, [SAMPLE], [chosen, rest], positions=positions)
    (found,) = attribute(subject, sae, [SAMPLE], methods=["atp", "exact"], positions=positions)
    at = slice(None) if positions == "all" else slice(3, 4)
    here, there = (amounts[list(tokens)][at].sum(0) * WEIGHTS for tokens in (SAMPLE.tokens, SAMPLE.base_tokens))
    truth = float(here[chosen].sum())
    assert effects.removed[0] == pytest.approx(truth) == pytest.approx(effects.kept[0])
    for method in ("atp", "exact"):
        assert float(found[method].scores[chosen].sum()) == pytest.approx(truth)
    assert effects.whole == pytest.approx(float(here[:LATENTS].sum()))
    assert effects.removed[0] + effects.kept[1] == pytest.approx(effects.whole)
    assert effects.removed[0] + effects.removed[1] == pytest.approx(effects.whole)
    assert effects.put_in[0] == pytest.approx(float((here - there)[chosen].sum()))
    assert effects.all_put_in == pytest.approx(float((here - there)[:LATENTS].sum()))
    whole_gap = amounts[list(SAMPLE.tokens)].sum(0) - amounts[list(SAMPLE.base_tokens)].sum(0)
    assert effects.gap == pytest.approx(float(whole_gap @ WEIGHTS))  # the error and earlier positions included


def test_where_one_of_two_is_enough_each_is_sufficient_and_neither_necessary(tiny) -> None:
    subject, sae, _ = known(tiny, lambda sums: 6 * torch.tanh(9 * (sums[..., 1] + sums[..., 4])))
    (effects,) = set_effects(subject, sae, [SAMPLE], [[1], [4], [1, 4], [0, 2]], positions="all")
    assert effects.whole == pytest.approx(6, abs=1e-6)
    assert effects.removed == pytest.approx([0, 0, 6, 0], abs=1e-6)
    assert effects.kept == pytest.approx([6, 6, 6, 0], abs=1e-6)


def test_where_both_are_needed_each_is_necessary_and_neither_sufficient(tiny) -> None:
    subject, sae, _ = known(tiny, lambda sums: sums[..., 1] * sums[..., 4])
    (effects,) = set_effects(subject, sae, [SAMPLE], [[1], [4], [1, 4]], positions="all")
    assert effects.removed == pytest.approx([effects.whole] * 3)
    assert effects.kept == pytest.approx([0, 0, effects.whole])
    assert effects.whole > 1


def test_position_by_position_the_scores_of_a_linear_model_are_exact_and_add_up(tiny) -> None:
    subject, sae, amounts = known(tiny, lambda sums: sums @ WEIGHTS)
    methods = ("atp", "ig", "exact")
    (found,) = attribute(subject, sae, [SAMPLE], methods=methods, positions="all", per_position=LATENTS)
    (few,) = attribute(subject, sae, [SAMPLE], methods=methods, positions="all", per_position=2)
    for method in ("atp", "ig"):
        places = found[method].by_position
        assert [place.position for place in places] == [0, 1, 2, 3]
        total = torch.zeros(LATENTS, dtype=torch.float64)
        for place, token in zip(places, SAMPLE.tokens, strict=True):
            truth = (amounts[token] * WEIGHTS)[:LATENTS]
            assert place.scores == pytest.approx(truth[place.latents].tolist())
            assert place.activations == pytest.approx(amounts[token][place.latents].tolist())
            assert [abs(s) for s in place.scores] == sorted((abs(s) for s in place.scores), reverse=True)
            assert 3 not in place.latents  # no weight: a score of zero is not written
            assert place.error == pytest.approx(float((amounts[token] * WEIGHTS)[LATENTS:].sum()))
            total[place.latents] += torch.tensor(place.scores, dtype=torch.float64)
        torch.testing.assert_close(total, found[method].scores)
        assert sum(place.error for place in places) == pytest.approx(found[method].error)
        assert [(p.latents, p.scores) for p in few[method].by_position] == [(p.latents[:2], p.scores[:2]) for p in places]
    assert found["exact"].by_position is None
    (none,) = attribute(subject, sae, [SAMPLE], positions="all")
    assert none["atp"].by_position is None


def test_positions_are_those_of_the_text_where_only_the_last_runs_again(tiny, gpt2) -> None:
    sae, samples = tiny.sae(gpt2), tiny.samples([9, 12, 9])
    for sample, found in zip(samples, attribute(gpt2, sae, samples, per_position=99), strict=True):
        (place,) = found["atp"].by_position
        assert place.position == len(sample.tokens) - 1
        by_latent = dict(zip(place.latents, place.scores, strict=True))
        expected = dict(zip(found["atp"].latents.tolist(), found["atp"].scores.tolist(), strict=True))
        assert by_latent == pytest.approx(expected, abs=1e-12)
