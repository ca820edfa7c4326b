from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from saekit_quality.losses import bce, quality_loss
from saekit_quality.model import ContrastiveQualityModel, pool
from saekit_quality.pairs import VotePairs
from transformers import RobertaModel, T5Config

from saekit import OptionError

CRITERIA = 3


def made(place, **options):
    torch.manual_seed(0)
    return ContrastiveQualityModel(model_name=str(place), **{"num_labels": CRITERIA, "projection_dim": 8, **options})


def test_only_the_heads_are_new(roberta) -> None:
    own, model = RobertaModel.from_pretrained(roberta).state_dict(), made(roberta)
    kept = {name: value for name, value in own.items() if not name.startswith("pooler.")}
    assert kept.keys() == model.encoder.state_dict().keys()
    assert all(torch.equal(value, model.encoder.state_dict()[name]) for name, value in kept.items())
    assert model.classifier.out_features == CRITERIA and model.classifier.weight.std() > 0


@pytest.mark.parametrize("kind", ["roberta", "gpt2"])
def test_saved_and_loaded_it_says_the_same(kind, request, tmp_path) -> None:
    model = made(request.getfixturevalue(kind), temperature=0.2).eval()
    ids, mask = torch.randint(5, 60, (4, 8)), torch.ones(4, 8, dtype=torch.long)
    mask[0, 5:] = 0
    model.save_pretrained(tmp_path)
    again = ContrastiveQualityModel.from_pretrained(tmp_path).eval()
    for name, value in model(ids, mask).items():
        torch.testing.assert_close(again(ids, mask)[name], value, rtol=0, atol=0)
    assert again.config.contrastive_temperature == 0.2
    assert again.config.pooling == ("cls" if kind == "roberta" else "last")
    torch.testing.assert_close(model(ids, mask).embedding.norm(dim=1), torch.ones(4))


def test_pooling_does_not_read_padding() -> None:
    hidden = torch.arange(8.0).reshape(2, 4, 1)  # rows 0 1 2 3 and 4 5 6 7
    mask = torch.tensor([[1, 1, 1, 0], [0, 1, 1, 1]])  # padded on the right, and on the left
    assert pool(hidden, mask, "cls").flatten().tolist() == [0, 5]
    assert pool(hidden, mask, "last").flatten().tolist() == [2, 7]
    assert pool(hidden, mask, "mean").flatten().tolist() == [1, 6]
    assert pool(hidden, torch.zeros_like(mask), "mean").flatten().tolist() == [0, 0]


@pytest.mark.parametrize("kind", ["roberta", "gpt2"])
@pytest.mark.parametrize("pairs", ["agreement", "jaccard"])
def test_cached_gradients_are_those_of_the_whole_batch(kind, pairs, request) -> None:
    """With dropout: the same chunks with the same random state, all of them held at once, are the reference."""
    model = made(request.getfixturevalue(kind)).double().train()
    draws = torch.Generator().manual_seed(1)
    ids = torch.randint(5, 60, (10, 8), generator=draws)
    share = torch.randint(0, 4, (10, CRITERIA), generator=draws) / 3
    mask = torch.ones_like(ids)
    mask[3, 4:] = 0

    def gradients(encode):
        model.zero_grad()
        torch.manual_seed(2)
        logits, embedding = encode()
        loss = quality_loss(
            logits, embedding.double(), share, VotePairs(share, pairs), lambda_contrastive=0.5, temperature=0.07
        ).loss
        loss.backward()
        return loss.detach(), [p.grad.clone() for p in model.parameters()], torch.rand(1)

    def whole():
        found = [model(ids[i : i + 3], mask[i : i + 3]) for i in range(0, 10, 3)]
        return torch.cat([o.logits for o in found]), torch.cat([o.embedding for o in found])

    def cached():
        output = model(ids, mask, chunk_size=3)
        return output.logits, output.embedding

    loss, wanted, after = gradients(whole)
    value, found, same = gradients(cached)
    torch.testing.assert_close(value, loss, rtol=1e-12, atol=1e-12)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6 * float(b.abs().max()) + 1e-12)
    assert torch.equal(after, same)  # what is drawn next does not notice
    torch.manual_seed(2)
    model.eval()
    _, without, _ = gradients(cached)
    assert not torch.allclose(without[0], wanted[0], rtol=1e-2, atol=0)  # dropout was on


def test_bce_leaves_missing_targets_out() -> None:
    logits = torch.randn(4, 2, dtype=torch.float32)
    targets = torch.tensor([[1.0, 0.5], [0.0, float("nan")], [1.0, 0.0], [float("nan"), 1.0]])
    weight = torch.tensor([2.0, 1.0])
    chances = logits.sigmoid()
    each = -(weight * targets * chances.log() + (1 - targets) * (1 - chances).log())
    torch.testing.assert_close(bce(logits, targets, weight), each[~targets.isnan()].mean())
    assert bce(logits, torch.full_like(targets, float("nan"))) == 0


def test_a_directory_that_is_none(tmp_path, roberta) -> None:
    with pytest.raises(OptionError, match="model_name: there is no directory '.*gone'. Give one with config.json"):
        made(tmp_path / "gone")
    with pytest.raises(OptionError, match=r"there is no model that can be read at .*Give a local directory"):
        made(tmp_path)
    with pytest.raises(OptionError, match="there is no directory"):
        ContrastiveQualityModel.from_pretrained(str(tmp_path / "gone"))
    with pytest.raises(OptionError, match="is no ContrastiveQualityModel: make one with"):
        ContrastiveQualityModel.from_pretrained(roberta)


def test_options_that_do_not_fit(roberta, gpt2, tmp_path) -> None:
    with pytest.raises(OptionError, match="pooling: the first token of a decoder .gpt2. sees no other. Take 'last' or 'mean'."):
        made(gpt2, pooling="cls")
    with pytest.raises(OptionError, match="pooling: 'max' is none of cls, mean, last."):
        made(roberta, pooling="max")
    with pytest.raises(OptionError, match="temperature: must be above 0, got 0."):
        made(roberta, temperature=0)
    T5Config().save_pretrained(tmp_path)
    with pytest.raises(OptionError, match="t5 has an encoder and a decoder"):
        made(tmp_path)


def test_saekit_finds_the_plugin_without_torch() -> None:
    script = "import sys, pluggy, saekit_quality; pluggy.PluginManager('saekit').register(saekit_quality)"
    subprocess.run([sys.executable, "-c", f"{script}; assert 'torch' not in sys.modules"], check=True)
