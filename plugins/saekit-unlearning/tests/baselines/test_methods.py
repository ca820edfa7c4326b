"""The methods that unlearning through an SAE is compared with: their losses, and what they leave alone."""

from __future__ import annotations

import hashlib
import math
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from saekit_unlearning.answers import Examination
from saekit_unlearning.baselines.baseline import AsMethod
from saekit_unlearning.baselines.difference_of_means import DifferenceOfMeans, Shift, mean_at_names
from saekit_unlearning.baselines.lora import LoRA
from saekit_unlearning.baselines.material import Material, Rows, rows_of
from saekit_unlearning.baselines.npo import NPO, answer_log_p, npo_loss
from saekit_unlearning.baselines.oracle import Oracle
from saekit_unlearning.baselines.rmu import RMU, activation, misdirection, mlp_weights
from saekit_unlearning.baselines.training import stays, trainable
from saekit_unlearning.baselines.uniform import FineTuning, to_uniform
from saekit_unlearning.data import FORGET
from saekit_unlearning.edited import copied, model_logits
from saekit_unlearning.kl import forget_kl
from torch import Tensor, nn

from saekit import UsageError

FEW: dict[str, Any] = {"checkpoints": (2,), "rates": (1e-2,)}
METHODS = [
    DifferenceOfMeans(strengths=(1.0,)),
    FineTuning(**FEW),
    NPO(**FEW),
    RMU(norms=(1.0,), checkpoints=(2,)),
    pytest.param(LoRA(**FEW), marks=pytest.mark.slow, id="lora"),  # importing peft takes several seconds
]


def name_of(method: Any) -> str | None:
    return getattr(method, "name", None)


def digest(model: nn.Module) -> str:
    return hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in model.state_dict().values())).hexdigest()


def moved(material: Material) -> Any:
    """A copy of the subject whose weights are no longer the base's."""
    site = copied(material.site)
    for p in trainable(site.subject.model):
        p.data += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1), dtype=p.dtype)
    return site.subject


def batch(material: Material) -> tuple[Rows, list[Rows]]:
    return next(material.batches(0))


def probabilities(subject: Any, rows: Rows) -> Tensor:
    return torch.softmax(model_logits(subject, rows.tokens, rows.mask), -1)


def test_the_loss_to_uniform_is_the_written_formula(material: Material) -> None:
    subject, (forget, stay) = moved(material), batch(material)
    p = probabilities(subject, forget)
    vocabulary = p.shape[-1]
    of_answers = [(p[i, t] * torch.log(p[i, t] * vocabulary)).sum() for i, t in forget.answer.nonzero().tolist()]
    expected = torch.stack(of_answers).mean()
    for rows in stay:
        q, b = probabilities(subject, rows), probabilities(material.site.subject, rows)
        kept = [(b[i, t] * torch.log(b[i, t] / q[i, t])).sum() for i, t in rows.mask.nonzero().tolist()]
        expected = expected + 3.0 * torch.stack(kept).mean()
    found = to_uniform(material.site.subject, 3.0)(subject, forget, stay)
    parameters = [p for p in subject.model.parameters() if p.requires_grad]
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    for ours, theirs in zip(*(torch.autograd.grad(loss, parameters) for loss in (found, expected)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-10)


def test_what_is_to_stay_costs_nothing_before_training(material: Material) -> None:
    subject, (_, stay) = material.site.subject, batch(material)
    assert len(stay) == 2
    assert abs(float(stays(subject, subject, stay))) < 1e-12
    assert float(stays(subject, moved(material), stay).detach()) > 1e-3


def test_npo_is_the_written_formula() -> None:
    log_p = torch.tensor([-1.0, -5.0, -0.1], dtype=torch.float64, requires_grad=True)
    log_base, beta = torch.tensor([-2.0, -1.0, -0.1], dtype=torch.float64), 0.3
    ratio = [math.exp(float(p - b)) for p, b in zip(log_p, log_base, strict=True)]
    expected = 2 / beta * sum(math.log(1 + r**beta) for r in ratio) / 3
    loss = npo_loss(log_p, log_base, beta)
    assert float(loss) == pytest.approx(expected, rel=1e-12)
    # Zhang et al. 2024: that of gradient ascent, weighted by 2 r^beta / (1 + r^beta).
    (gradient,) = torch.autograd.grad(loss, log_p)
    assert gradient.tolist() == pytest.approx([2 * r**beta / (1 + r**beta) / 3 for r in ratio], rel=1e-12)


def test_npo_becomes_gradient_ascent_as_beta_goes_to_0() -> None:
    log_p = torch.tensor([-1.0, -5.0], dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(npo_loss(log_p, torch.tensor([-3.0, -1.0]), 1e-9), log_p)
    assert gradient.tolist() == pytest.approx([0.5, 0.5], rel=1e-6)


def test_an_answers_likelihood_is_that_of_its_tokens(material: Material, facts: Any) -> None:
    subject = material.site.subject
    text = facts.forget[3]
    row = material.forget[3]
    ids = subject.tokenizer(text.text)["input_ids"]
    p = probabilities(subject, Rows.of([row], subject.device))[0]
    answer = subject.tokenizer(" " + text.text[slice(*text.answer)], add_special_tokens=False)["input_ids"]
    assert [ids[t + 1] for t in row.answer] == answer
    expected = sum(math.log(p[t, ids[t + 1]]) for t in row.answer)
    several = Rows.of(material.forget[:8], subject.device)  # padded
    assert float(answer_log_p(subject, several)[3]) == pytest.approx(expected, rel=1e-9)


def test_misdirection_is_the_written_formula(material: Material) -> None:
    forget, _ = batch(material)
    h = activation(material.site.subject, forget)
    assert len(h) == int(forget.mask.sum())
    target = torch.arange(h.shape[1], dtype=h.dtype)
    expected = sum(sum((float(a) - float(b)) ** 2 for a, b in zip(row, target, strict=True)) for row in h) / len(h)
    assert float(misdirection(h, target)) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("method", METHODS, ids=name_of)
def test_no_method_changes_the_subject(material: Material, method: Any) -> None:
    subject = material.site.subject
    before = digest(subject.model)
    found = list(method.settings(material, 0))
    assert digest(subject.model) == before
    assert not any(p.requires_grad or p.grad is not None for p in subject.model.parameters())
    for one in found:
        assert one.changed == (digest(one.site.subject.model) != before)


@pytest.mark.parametrize("method", METHODS[1:], ids=name_of)
def test_the_seed_decides(material: Material, method: Any) -> None:
    def weights(seed: int) -> str:
        torch.manual_seed(np.random.default_rng().integers(1000))  # whatever was drawn before
        return digest(next(iter(method.settings(material, seed))).site.subject.model)

    assert weights(0) == weights(0) != weights(1)


@pytest.mark.parametrize("of", [FineTuning, NPO])
def test_a_method_goes_down_its_loss_and_weight_keeps_the_rest(material: Material, of: Any) -> None:
    forget, stay = batch(material)
    base = material.site.subject

    @torch.no_grad()
    def measured(method: Any) -> list[tuple[float, float]]:
        found = []
        for one in method.settings(material, 0):
            subject = one.site.subject
            if of is FineTuning:
                forgotten = forget_kl(model_logits(subject, forget.tokens, forget.mask)[forget.answer]).mean()
            else:
                forgotten = answer_log_p(subject, forget).mean()
            found.append((float(forgotten), float(stays(base, subject, stay))))
        return found

    (before, nothing), (after, drift) = measured(of(rates=(3e-3,), checkpoints=(0, 12), weight=1.0))
    assert nothing == pytest.approx(0.0, abs=1e-12)
    assert after < before - 0.1
    ((_, free),) = measured(of(rates=(3e-3,), checkpoints=(12,), weight=0.0))
    assert free > 1.5 * drift


def test_rmu_moves_forget_text_to_its_vector_below_the_site_alone(material: Material) -> None:
    forget, _ = batch(material)
    base, (one,) = (
        material.site.subject,
        RMU(norms=(1.0,), alpha=0.0, rate=1e-2, checkpoints=(15,)).settings(material, 0),
    )
    some, _ = next(material.batches(0))
    random = torch.rand(32, generator=torch.Generator().manual_seed(0)).double()
    target = random / random.norm() * activation(base, some).norm(dim=1).mean()
    assert float(target.norm()) == pytest.approx(float(activation(base, some).norm(dim=1).mean()))
    subject = one.site.subject
    assert float(misdirection(activation(subject, forget), target)) < 0.5 * float(
        misdirection(activation(base, forget), target)
    )
    changed = {
        n for (n, a), b in zip(base.model.named_parameters(), subject.model.parameters(), strict=True) if not a.equal(b)
    }
    assert changed
    assert all(name.startswith(("transformer.h.0.", "transformer.h.1.")) for name in changed)


def test_rmu_may_train_the_mlps_of_some_blocks_alone_and_shares_the_rest(material: Material) -> None:
    base = dict(material.site.subject.model.named_parameters())
    few: dict[str, Any] = {"norms": (1.0,), "rate": 1e-2, "checkpoints": (1, 2)}
    for blocks, prefixes in ((1, ("transformer.h.1.mlp.",)), (9, ("transformer.h.0.mlp.", "transformer.h.1.mlp."))):
        first, second = RMU(**few, blocks=blocks).settings(material, 0)
        own, later = (dict(one.site.subject.model.named_parameters()) for one in (first, second))
        assert {name for name, p in own.items() if not p.equal(base[name])} == {n for n in base if n.startswith(prefixes)}
        for name, p in own.items():
            assert (p.data_ptr() == later[name].data_ptr()) != name.startswith(prefixes)
    with pytest.raises(UsageError, match=r"baselines\.rmu\.blocks = 1: no block up to 'wte' has a part called mlp"):
        mlp_weights(SimpleNamespace(model=nn.ModuleList([nn.Linear(1, 1)]), site=SimpleNamespace(module=None, name="wte")), 1)  # type: ignore[arg-type]


def test_training_leaves_embeddings_and_unembedding_alone(material: Material) -> None:
    (one,) = FineTuning(**FEW).settings(material, 0)
    base = dict(material.site.subject.model.named_parameters())
    same = {name for name, p in one.site.subject.model.named_parameters() if p.equal(base[name])}
    assert {name for name in base if "wte" in name or "wpe" in name} <= same
    assert any("attn" in name for name in base.keys() - same)


def test_a_shift_is_the_written_formula(material: Material) -> None:
    site = material.site
    passages = next(site.passages([row.tokens for row in material.forget[:6]]))
    origin, d = mean_at_names(site, material.retain), site.subject.width()
    direction = mean_at_names(site, material.forget) - origin
    t = torch.tensor([float((x - origin) @ direction) / float(direction @ direction) for x in passages.x])
    assert (t > 0.5).any()
    assert (t <= 0.5).any()
    for projected in (False, True):
        for everywhere in (False, True):
            new = Shift(origin, direction, 2.0, projected, everywhere)(passages)[passages.keep]
            for x, y, share in zip(passages.x, new, t.tolist(), strict=True):
                by = (share if projected else 1.0) if everywhere or share > 0.5 else 0.0
                torch.testing.assert_close(y, x - 2.0 * by * direction, rtol=1e-5, atol=1e-6)
    assert d == len(origin)


def test_the_mean_difference_is_taken_at_names_ends(material: Material, facts: Any) -> None:
    subject, text, row = material.site.subject, facts.forget[0], material.forget[0]
    ends = len(subject.tokenizer(text.text[: text.name[1]])["input_ids"]) - 1
    h = activation(subject, Rows.of([row], subject.device))
    torch.testing.assert_close(mean_at_names(material.site, [row]), h[ends])


def test_projecting_out_once_puts_every_activation_at_the_mean_of_what_stays(material: Material) -> None:
    one = next(
        e
        for e in DifferenceOfMeans(strengths=(1.0,)).settings(material, 0)
        if e.label.startswith("projected out everywhere")
    )
    passages = next(material.site.passages([material.forget[0].tokens]))
    shift: Any = one.edit
    new = shift(passages)[passages.keep]
    assert ((new - shift.origin) @ shift.direction).abs().max() < 1e-8 * float(shift.direction @ shift.direction)


def test_the_oracle_is_another_model_at_the_same_hook_point(
    material: Material, tiny_directory: Any, facts: Any
) -> None:
    (one,) = Oracle(str(tiny_directory)).settings(material, 0)
    assert one.site.subject is not material.site.subject
    exam = Examination(material.site, [q for q in facts.questions if q.group == FORGET][:8])
    assert exam.right_by(one.logits).tolist() == exam.right().tolist()  # it is the same model here


def test_an_oracle_with_other_tokens_is_refused(material: Material, tiny_directory: Any, monkeypatch: Any) -> None:
    class Reversed:
        def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
            return {"input_ids": material.site.subject.tokenizer(text)["input_ids"][::-1]}

    other = SimpleNamespace(tokenizer=Reversed())
    monkeypatch.setattr("saekit_unlearning.baselines.oracle.load_subject", lambda *_, **__: other)
    with pytest.raises(UsageError, match="divides text into other tokens than .* Give a model with the same tokenizer"):
        Oracle(str(tiny_directory)).at(material.site)


def test_texts_longer_than_the_context_are_left_out(material: Material, facts: Any) -> None:
    subject: Any = material.site.subject
    longest = max(len(row.tokens) for row in material.forget)
    short = SimpleNamespace(tokenizer=subject.tokenizer, context=longest - 1)
    kept: Any = rows_of(short, facts.forget)
    assert kept == [row for row in material.forget if len(row.tokens) < longest]
    assert len(kept) < len(facts.forget)
    with pytest.raises(UsageError, match="texts about 'forget' has more tokens than the model's context, 2. Shorten them"):
        rows_of(SimpleNamespace(tokenizer=subject.tokenizer, context=2), facts.forget)  # type: ignore[arg-type]


def test_without_peft_the_error_names_what_to_install(material: Material, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UsageError, match=r"pip install 'saekit-unlearning\[lora\]'"):
        next(iter(LoRA(**FEW).settings(material, 0)))


@pytest.mark.slow
def test_lora_changes_every_linear_map_by_its_rank_at_most(material: Material) -> None:
    (one,) = LoRA(**FEW, rank=3).settings(material, 0)
    base, after = material.site.subject.model, one.site.subject.model
    assert type(after) is type(base)
    assert [n for n, _ in after.named_parameters()] == [n for n, _ in base.named_parameters()]
    for (name, a), b in zip(base.named_parameters(), after.parameters(), strict=True):
        maps = name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))
        assert a.equal(b) != maps, name
        if maps:
            assert torch.linalg.matrix_rank(b - a, rtol=1e-6) <= 3


def test_a_baseline_is_a_method_of_the_analyzer(material: Material, facts: Any) -> None:
    seen: Any = SimpleNamespace(
        site=material.site, forget=facts.forget, retain=facts.retain, general=[[2, 3, 4, 5]], seed=0
    )
    method = AsMethod(FineTuning(rates=(1e-2,), checkpoints=(0, 1)))
    prepared = method.prepare(seen)
    assert (method.name, prepared.candidates) == ("fine_tuning", None)
    assert [trial.path for trial in prepared.trials] == [None, None]
    passages = next(material.site.passages([material.forget[0].tokens]))
    same, changed = (trial.logits(passages) for trial in prepared.trials)
    torch.testing.assert_close(same, material.site.logits(passages))
    assert not torch.allclose(changed, same)
