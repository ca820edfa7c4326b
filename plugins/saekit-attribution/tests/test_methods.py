"""The methods against their definitions: a plain loop, one rerun of the model for each latent, completeness."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from saekit_attribution.effects import logit_difference, methods
from saekit_attribution.effects.attribute import Refused, attribute
from saekit_attribution.effects.batching import Failed
from saekit_attribution.effects.fidelity import fidelity
from saekit_attribution.effects.logit_difference import LogitDifference
from saekit_attribution.effects.nodes import nodes_of
from torch import Tensor, nn

import saekit
from saekit import TrainedPositions, UsageError

LENGTHS = [9, 12, 9, 20, 12, 9]
EVERY = ("atp", "ig", "exact")
PLACES = ["decisive", "all"]
REFERENCES = ["zero", "base"]


@torch.no_grad()
def difference(tiny, subject, sample) -> float:
    logits = tiny.last_logits(subject, sample)
    return float(logits[sample.target] - logits[sample.base])


def codes(subject, sae, sample) -> tuple[Tensor, Tensor]:
    """Dense codes of the sample and of its base run at the aligned positions (zero elsewhere), [T, d_sae] each."""
    found = []
    for tokens in (sample.tokens, sample.base_tokens):
        with saekit.read(subject.model, sae, subject.site) as attached:
            subject.model(torch.tensor([tokens]))
        found.append(attached.code.dense().detach())
    aligned = torch.tensor(sample.aligned)
    return found[0], torch.where(aligned[:, None] >= 0, found[1][aligned], 0.0)


def test_scores_are_those_of_the_loop_written_literally(tiny, subject, sae) -> None:
    samples = tiny.samples(LENGTHS)
    for sample, found in zip(samples, attribute(subject, sae, samples), strict=True):
        kept = []

        def spliced(activation: Tensor, kept: list[Tensor] = kept) -> Tensor:
            last = activation[:, -1]
            code = sae.encode(last).dense().detach().requires_grad_(True)
            kept.append(code)
            rebuilt = code @ sae.W_dec + sae.b_dec
            return torch.cat([activation[:, :-1], (rebuilt + (last - rebuilt).detach())[:, None]], 1)

        with subject.site.replaced(spliced):
            logits = tiny.last_logits(subject, sample)
        (logits[sample.target] - logits[sample.base]).backward()
        atp, code, gradient = found["atp"], kept[0][0], kept[0].grad[0]
        assert torch.equal(atp.latents, code.nonzero().flatten())
        for have, want in ((atp.gradients, gradient), (atp.activations, code), (atp.scores, code * gradient)):
            torch.testing.assert_close(have, want.detach()[atp.latents], rtol=0, atol=1e-9)
        assert atp.logit_diff == pytest.approx(difference(tiny, subject, sample), abs=1e-9)


@pytest.mark.parametrize("reference", REFERENCES)
@pytest.mark.parametrize("positions", PLACES)
def test_exact_is_a_rerun_of_the_whole_model_for_each_latent(
    tiny, subject, sae, positions: str, reference: str
) -> None:
    samples = tiny.samples([9, 20])
    outcomes = attribute(subject, sae, samples, methods=["exact"], positions=positions, reference=reference)
    for sample, found in zip(samples, outcomes, strict=True):
        exact = found["exact"]
        length = len(sample.tokens)
        active, before = codes(subject, sae, sample)
        where = list(range(1, length)) if positions == "all" else [length - 1]
        gone = (active != 0) | (before != 0) if reference == "base" else active != 0
        assert torch.equal(exact.latents, gone[where].any(0).nonzero().flatten())
        plain = difference(tiny, subject, sample)
        for latent, score in zip(exact.latents.tolist(), exact.scores.tolist(), strict=True):
            to = before[where, latent] if reference == "base" else torch.zeros(len(where), dtype=active.dtype)
            edit = {latent: lambda values, to=to: to}
            with saekit.attach(subject.model, sae, subject.site, edits=edit, positions=where):
                assert score == pytest.approx(plain - difference(tiny, subject, sample), abs=1e-9)
        assert exact.gradients is None
        assert exact.weighted is None


@pytest.mark.parametrize("method", ["atp", "ig"])
def test_weighted_scores_take_the_part_that_the_base_run_lacks(tiny, subject, sae, method: str) -> None:
    for sample in tiny.samples([9, 20]):
        (found,) = attribute(subject, sae, [sample], methods=[method])
        active, before = codes(subject, sae, sample)
        lacking = (active - before).clamp_min(0)[-1][found[method].latents]
        assert lacking.count_nonzero() > 0
        torch.testing.assert_close(found[method].weighted, lacking * found[method].gradients, rtol=0, atol=1e-9)


@pytest.mark.parametrize("positions", PLACES)
def test_with_everything_at_zero_the_decoder_bias_is_left(tiny, subject, sae, positions: str) -> None:
    for sample in tiny.samples([9, 20]):
        (found,) = attribute(subject, sae, [sample], methods=["exact"], positions=positions)

        def bare(x: Tensor) -> Tensor:
            x = x.clone()
            x[:, 1 if positions == "all" else -1 :] = sae.b_dec
            return x

        def without_error(x: Tensor) -> Tensor:
            start = 1 if positions == "all" else x.shape[1] - 1
            rebuilt = sae(x[0])
            return torch.cat([x[:, :start], rebuilt[None, start:]], 1)

        plain = difference(tiny, subject, sample)
        for function, value in ((bare, found["exact"].moved), (without_error, found["exact"].error)):
            with subject.site.replaced(function):
                assert value == pytest.approx(plain - difference(tiny, subject, sample), abs=1e-9)
                assert abs(value) > 1e-4


@pytest.mark.parametrize("reference", REFERENCES)
@pytest.mark.parametrize("positions", PLACES)
def test_batched_equals_one_by_one(tiny, subject, sae, positions: str, reference: str) -> None:
    subject.model.float()
    sae.float()
    samples = tiny.samples(LENGTHS)
    options = {"methods": EVERY, "positions": positions, "reference": reference, "steps": 3}
    together = attribute(subject, sae, samples, **options)
    for sample, batched, small in zip(
        samples, together, attribute(subject, sae, samples, batch_tokens=15, **options), strict=True
    ):
        (alone,) = attribute(subject, sae, [sample], **options)
        for other in (batched, small):
            for method in EVERY:
                assert torch.equal(alone[method].latents, other[method].latents)
                torch.testing.assert_close(alone[method].scores, other[method].scores, rtol=0, atol=1e-5)
                if method != "exact":
                    torch.testing.assert_close(alone[method].weighted, other[method].weighted, rtol=0, atol=1e-5)
                for name in ("error", "logit_diff", "moved"):
                    assert getattr(alone[method], name) == pytest.approx(getattr(other[method], name), abs=1e-5)


def test_positions_that_the_sae_was_not_trained_on_are_no_nodes(tiny, subject, sae, monkeypatch: pytest.MonkeyPatch) -> None:
    # Nothing but what is recorded with the SAE tells that the first position is left out.
    monkeypatch.setattr(subject.tokenizer, "bos_token_id", None)
    samples = tiny.samples([20, 20])
    metric = LogitDifference(subject, samples, last=False, batch_tokens=4096)
    left_out = samples[0].tokens[7]
    for rule, wanted in ((TrainedPositions(True), 0), (TrainedPositions(False), 1), (TrainedPositions(False, (left_out,)), 1)):
        monkeypatch.setattr(sae, "trained_positions", rule)
        nodes = nodes_of(subject, sae, samples, metric, positions="all", reference="zero")
        assert int(nodes.positions.min()) == wanted
        assert (7 in nodes.positions[nodes.rows == 0].tolist()) is not bool(rule.left_out)


@pytest.mark.parametrize("reference", REFERENCES)
@pytest.mark.parametrize("positions", PLACES)
def test_latents_and_error_together_are_the_activation(tiny, subject, sae, positions: str, reference: str) -> None:
    subject.model.float()
    sae.float()
    samples = tiny.samples([20, 20])
    metric = LogitDifference(subject, samples, last=positions == "decisive", batch_tokens=4096)
    with torch.no_grad():
        nodes = nodes_of(subject, sae, samples, metric, positions=positions, reference=reference)
        spliced = (nodes.reference + nodes.error).index_put(
            (nodes.rows, nodes.positions), nodes.deltas[:, None] * sae.W_dec[nodes.latents], accumulate=True
        )
    torch.testing.assert_close(spliced, nodes.x, rtol=0, atol=1e-5)
    assert not torch.allclose(nodes.reference, nodes.x, atol=0.1)
    whole = torch.cat([metric.activation[:, : metric.offset], spliced], 1)
    logits = [tiny.last_logits(subject, sample) for sample in samples]
    for row, sample in enumerate(samples):
        with subject.site.replaced(lambda x, row=row: whole[row : row + 1]):
            torch.testing.assert_close(tiny.last_logits(subject, sample), logits[row], rtol=0, atol=1e-5)


@pytest.mark.parametrize("reference", REFERENCES)
@pytest.mark.parametrize("positions", PLACES)
def test_with_a_linear_readout_all_methods_agree_and_are_complete(tiny, positions: str, reference: str) -> None:
    model = tiny.model("gpt2")
    model.transformer.ln_f = nn.Identity()  # above the last block the head alone is left
    for subject in (tiny.subject(model, "blocks.2.hook_out"), tiny.subject(_linear_above(tiny.d), "below")):
        sae = tiny.sae(subject, "standard")
        options = {"positions": positions, "reference": reference, "steps": 1}
        outcomes = attribute(subject, sae, tiny.samples(LENGTHS), methods=EVERY, **options)
        for found in outcomes:
            assert float(found["exact"].scores.abs().max()) > 1e-3
            for method in EVERY:
                torch.testing.assert_close(found[method].scores, found["exact"].scores, rtol=0, atol=1e-6)
                assert found[method].error == pytest.approx(found["exact"].error, abs=1e-6)
                measured = fidelity(found[method], found["exact"])
                assert abs(measured.completeness_gap) < 1e-6
                assert measured.pearson == pytest.approx(1)


class _LinearAbove(nn.Module):
    """Mixing below the site; above it a mean over earlier positions and a head, all linear."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.embed, self.below = nn.Embedding(120, d), nn.Sequential(nn.Linear(d, d), nn.Tanh())
        self.mixed, self.head = nn.Linear(d, d), nn.Linear(d, 120)

    def forward(self, tokens: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        embedded = self.embed(tokens)
        counts = torch.arange(1, tokens.shape[1] + 1, dtype=embedded.dtype)[:, None]
        x = self.below(embedded + 2 * embedded.cumsum(1) / counts)
        return self.head(x + self.mixed(x.cumsum(1) / counts))


def _linear_above(d: int) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return _LinearAbove(d).double().eval()


@pytest.mark.parametrize("positions", PLACES)
def test_integrated_gradients_become_complete_as_the_steps_grow(tiny, subject, sae, positions: str) -> None:
    samples = tiny.samples([12, 12, 12, 12])
    gaps = {}
    for steps in (1, 4, 64):
        found = attribute(subject, sae, samples, methods=["ig"], positions=positions, steps=steps)
        gaps[steps] = max(abs(fidelity(f["ig"], f["ig"]).completeness_gap) for f in found)
    assert gaps[64] < gaps[4] < gaps[1]
    assert gaps[64] < 1e-3
    found = attribute(subject, sae, samples, methods=["atp"], positions=positions)
    assert max(abs(fidelity(f["atp"], f["atp"]).completeness_gap) for f in found) > 10 * gaps[64]


def test_parameters_get_no_gradient_and_keep_their_flags(tiny, gpt2) -> None:
    sae = tiny.sae(gpt2)
    parameters = [*gpt2.model.parameters(), *sae.parameters()]
    parameters[0].requires_grad_(False)
    flags = [p.requires_grad for p in parameters]
    assert any(flags)
    found = attribute(gpt2, sae, tiny.samples([9, 12]), methods=EVERY)
    assert all(p.grad is None for p in parameters)
    assert [p.requires_grad for p in parameters] == flags
    results = [a for f in found for a in f.values()]
    assert not any(t.requires_grad for a in results for t in (a.scores, a.activations, a.gradients) if t is not None)


def test_only_two_logits_of_one_position_are_made(tiny, gpt2) -> None:
    sae, shapes = tiny.sae(gpt2), []
    head = gpt2.model.get_output_embeddings()
    head.register_forward_hook(lambda module, args, output: shapes.append(tuple(output.shape)))
    attribute(gpt2, sae, tiny.samples([9, 9, 12]), methods=["atp"])
    assert shapes
    assert {shape[1:] for shape in shapes} == {(1, 2)}
    shapes.clear()
    gpt2.model(torch.tensor([[1, 2, 3]]))
    assert shapes == [(1, 3, 120)], "the head is itself again"


@pytest.mark.parametrize("reference", REFERENCES)
def test_where_the_base_prompt_begins_alike_nothing_differs(tiny, subject, sae, reference: str) -> None:
    (sample,) = tiny.samples([20])
    same = replace(sample, tokens=(*sample.base_tokens[:-1], 7), aligned=tuple(range(18)))  # another last token
    (found,) = attribute(subject, sae, [same], methods=EVERY, positions="all", reference=reference)
    active, before = codes(subject, sae, same)
    last = set(torch.cat([active[-1].nonzero(), before[-1].nonzero()]).flatten().tolist())
    for method in EVERY if reference == "base" else ("atp", "ig"):
        values = found[method].scores if reference == "base" else found[method].weighted
        having = {latent for latent, v in zip(found[method].latents.tolist(), values.tolist(), strict=True) if v != 0}
        assert having
        assert having <= last, "before the position that differs, the difference is exactly zero"


def test_a_sample_that_is_its_own_base_is_refused(tiny, gpt2) -> None:
    one, other = tiny.samples([9, 12])
    own = replace(one, base_tokens=one.tokens, aligned=tuple(range(9)))
    sae = tiny.sae(gpt2)
    found = attribute(gpt2, sae, [own, other], reference="base")
    assert isinstance(found[0], Refused)
    assert "causality" in found[0].reason
    assert set(found[1]) == {"atp"}
    (found,) = attribute(gpt2, sae, [own])
    assert float(found["atp"].weighted.abs().max()) == 0


def test_one_bad_sample_does_not_stop_the_rest(tiny, gpt2) -> None:
    sae = tiny.sae(gpt2)
    good = tiny.samples([9, 9, 9])
    bad = replace(good[1], tokens=(0, 10_000, *good[1].tokens[2:]))  # a token that the model does not have
    empty = replace(good[1], tokens=(), aligned=())
    samples = [good[0], bad, empty, good[2]]
    found = attribute(gpt2, sae, samples, on_error="keep")
    assert found[1] == Failed("IndexError", "index out of range in self")
    assert isinstance(found[2], Refused)
    for place in (0, 3):
        (alone,) = attribute(gpt2, sae, [samples[place]])
        torch.testing.assert_close(found[place]["atp"].scores, alone["atp"].scores, rtol=0, atol=1e-9)
    with pytest.raises(IndexError):
        attribute(gpt2, sae, samples)
    (alone,) = attribute(gpt2, sae, good[:1])  # and the model is as it was
    torch.testing.assert_close(found[0]["atp"].scores, alone["atp"].scores, rtol=0, atol=1e-9)


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate memory"),
    RuntimeError("not enough memory: you tried to allocate 99 bytes"),
]


@pytest.mark.parametrize("fault", OUT_OF_MEMORY, ids=["cuda", "cpu", "windows"])
@pytest.mark.parametrize("positions", PLACES)
def test_batches_are_halved_where_memory_is_short(tiny, gpt2, monkeypatch, fault: Exception, positions: str) -> None:
    sae, samples = tiny.sae(gpt2), tiny.samples([9] * 6)
    options = {"methods": EVERY, "positions": positions}
    expected = attribute(gpt2, sae, samples, **options)
    sizes: list[int] = []
    own = LogitDifference._value

    def short(self, rows: Tensor, activation: Tensor) -> Tensor:
        sizes.append(len(rows))
        if len(rows) > 2:
            raise fault
        return own(self, rows, activation)

    monkeypatch.setattr(LogitDifference, "_value", short)
    found = attribute(gpt2, sae, samples, **options)
    assert max(sizes) > 2
    for one, other in zip(found, expected, strict=True):
        for method in EVERY:
            torch.testing.assert_close(one[method].scores, other[method].scores, rtol=0, atol=1e-9)


def test_a_sample_too_large_for_memory_is_said_to_be_so(tiny, gpt2, monkeypatch) -> None:
    sae, samples = tiny.sae(gpt2), tiny.samples([9, 12, 9])
    own = logit_difference.Replay.record

    def short(self, tokens: Tensor, *args, **kwargs):
        if tokens.shape[1] == 12:
            raise OUT_OF_MEMORY[0]
        return own(self, tokens, *args, **kwargs)

    monkeypatch.setattr(logit_difference.Replay, "record", short)
    found = attribute(gpt2, sae, samples, on_error="keep")
    assert [isinstance(f, Failed) for f in found] == [False, True, False]
    assert found[1].error == "OOM"
    with pytest.raises(torch.OutOfMemoryError):
        attribute(gpt2, sae, samples)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"methods": ["shapley"]}, "methods: there is no 'shapley'"),
        ({"positions": "first"}, "positions: there is no 'first'"),
        ({"reference": "mean"}, "reference: there is no 'mean'"),
        ({"steps": 0}, "steps: must be 1 or more"),
        ({"batch_tokens": 0}, "batch_tokens: must be 1 or more"),
    ],
)
def test_options_that_mean_nothing_are_refused(tiny, gpt2, options: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        attribute(gpt2, tiny.sae(gpt2), tiny.samples([9]), **options)


def test_an_sae_that_does_not_fit_is_refused(tiny, gpt2) -> None:
    from saekit.builtin.architectures.topk import TopK

    class Curved(TopK):
        def decode(self, code):
            return torch.tanh(super().decode(code))

    for sae, message in (
        (TopK(16, 24, k=2), "32 wide and the SAE reads 16"),
        (TopK(32, 24, 32, k=2), "transcoder"),
        (Curved(32, 24, k=2), "more than a product with W_dec"),
        (TopK(32, 24, k=2).to("meta"), "Move the SAE"),
    ):
        with pytest.raises(UsageError, match=message):
            attribute(gpt2, sae, tiny.samples([9]))


def test_no_samples_no_outcomes(tiny, gpt2) -> None:
    assert attribute(gpt2, tiny.sae(gpt2), []) == []
    assert methods.METHODS == EVERY
