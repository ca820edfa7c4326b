"""What makes a transcoder: it reads its input as it is, may have a linear path, and is folded by two scales."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from helpers import write_config

import saekit
from saekit.builtin.architectures.topk import TopK
from saekit.errors import UsageError
from saekit.plugins import Registry
from saekit.sae.formats import CONFIG, SavedSAE
from saekit.sae.interop import dictionary_learning

D_IN = 16
OWN = [c.name for c in Registry().components("architecture") if c.distribution == "saekit"]


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("d_out", [12, D_IN])
@pytest.mark.parametrize("name", OWN)
def test_two_scales_are_folded(name: str, d_out: int, skip: bool, random_sae) -> None:
    """From an SAE of 3 x and 0.2 y to one of x and y: the same reconstruction, activations in the target's units."""
    scaled = random_sae(name, d_out=d_out, skip=skip).double()
    x = torch.randn(200, D_IN, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    raw = copy.deepcopy(scaled)
    raw.unscale(3.0, 0.2)
    code = scaled.encode(3.0 * x)
    assert 0 < float(code.count().mean()) < scaled.d_sae
    torch.testing.assert_close(raw.encode(x).dense(), code.dense() / 0.2)
    torch.testing.assert_close(raw(x), scaled(3.0 * x) / 0.2)
    assert torch.equal(raw.W_dec, scaled.W_dec)
    raw.unscale(1 / 3.0, 1 / 0.2)
    for key, tensor in scaled.state_dict().items():
        torch.testing.assert_close(raw.state_dict()[key], tensor)


def test_one_scale_is_what_it_was_for_an_sae(random_sae) -> None:
    """To the bit: the encoder is not touched."""
    one, two = random_sae("topk", k=5), random_sae("topk", k=5)
    one.rescale(0.3)
    two.unscale(0.3, 0.3)
    assert all(torch.equal(tensor, two.state_dict()[key]) for key, tensor in one.state_dict().items())


def test_only_a_transcoder_reads_its_input_as_it_is() -> None:
    assert TopK(D_IN, 64, k=4).reads_centred
    same_width = TopK(D_IN, 64, D_IN, k=4)
    assert same_width.transcoder and not same_width.reads_centred
    x = torch.randn(30, D_IN)
    same_width.initialise(torch.Generator().manual_seed(0), 5.0 + torch.randn(100, D_IN))
    torch.testing.assert_close(same_width.pre_activations(x), x @ same_width.W_enc)
    assert not torch.allclose(same_width.W_enc, same_width.W_dec.t())  # two sites share no directions


def test_a_linear_path_begins_at_zero() -> None:
    sae = TopK(D_IN, 64, 12, k=4, skip=True)
    sample = 5.0 + torch.randn(100, 12)
    sae.initialise(torch.Generator().manual_seed(0), sample)
    assert sae.W_skip.shape == (12, D_IN) and not sae.W_skip.any()
    assert torch.equal(sae.b_dec, sample.mean(0))


@pytest.mark.parametrize("name", OWN)
def test_a_linear_path_from_what_is_read_to_itself_is_refused(name: str) -> None:
    component = Registry().find("architecture", name)
    with pytest.raises(UsageError, match="^skip: .* would learn the identity"):
        component.build(component.validate({"skip": True}, name), D_IN, 64)


@pytest.mark.parametrize(
    "options", [{}, {"d_out": D_IN}, {"d_out": 12}, {"d_out": D_IN, "skip": True}, {"centred": False}]
)
@pytest.mark.parametrize("name", OWN)
def test_a_directory_says_what_it_is(
    name: str, options: dict, random_sae, inputs: torch.Tensor, tmp_path: Path
) -> None:
    """An SAE that does not centre its input is no transcoder, though both read it as it is."""
    sae = random_sae(name, **options)
    again = saekit.load_sae(saekit.save_sae(sae, tmp_path, name=name))
    for attribute in ("transcoder", "reads_centred", "d_out"):
        assert getattr(again, attribute) == getattr(sae, attribute)
    assert again.options() == sae.options()
    assert again.state_dict().keys() == sae.state_dict().keys()
    assert torch.equal(again(inputs), sae(inputs))


@pytest.mark.parametrize("d_out", [12, D_IN])
def test_a_directory_from_before_transcoders_were_marked(
    d_out: int, random_sae, inputs: torch.Tensor, tmp_path: Path
) -> None:
    sae = random_sae("topk", d_out=d_out)
    saekit.save_sae(sae, tmp_path, name="topk")
    cfg = json.loads((tmp_path / CONFIG).read_text())
    del cfg["metadata"]["saekit"]["transcoder"]
    write_config(tmp_path, cfg)
    again = saekit.load_sae(tmp_path)
    assert torch.equal(again(inputs), sae(inputs)) and not again.reads_centred


def test_a_linear_path_does_not_go_to_dictionary_learning(random_sae, tmp_path: Path) -> None:
    sae = random_sae("topk", d_out=D_IN, skip=True)
    with pytest.raises(UsageError, match="none of its classes has a linear path"):
        dictionary_learning.write(SavedSAE(sae, "topk", {}), tmp_path / "new")
    assert not (tmp_path / "new").exists()
