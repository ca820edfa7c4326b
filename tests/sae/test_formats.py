"""`sae/` on disk: ours again bit for bit, sae_lens's with the same numbers, and a clear word for anything broken."""

import json
from pathlib import Path

import pytest
import torch

import saekit
from saekit.builtin.architectures.standard import Standard
from saekit.builtin.architectures.topk import TopK
from saekit.errors import UsageError
from saekit.sae.formats import CONFIG, WEIGHTS


def trained(name: str) -> saekit.SparseAutoencoder:
    """An SAE whose every parameter differs from its initial value, decoder rows of several norms included."""
    sae = TopK(16, 64, k=5, decoder_norm="free") if name == "topk" else Standard(16, 64, decoder_norm="free")
    generator = torch.Generator().manual_seed(0)
    sae.initialise(generator, torch.randn(50, 16, generator=generator))
    for parameter in sae.parameters():
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    return sae


@pytest.mark.parametrize("name", ["topk", "standard"])
def test_an_sae_comes_back_bit_for_bit(name: str, tmp_path: Path) -> None:
    sae = trained(name)
    saekit.save_sae(sae, tmp_path, name=name, metadata={"hook_name": "blocks.0.hook_out"})
    again = saekit.load_sae(tmp_path)
    assert type(again) is type(sae)
    assert again.options() == sae.options()
    for key, tensor in sae.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[key])
    assert again.W_enc.t().is_contiguous()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["topk", "standard"])
def test_sae_lens_gives_the_same_latents_and_reconstruction(name: str, tmp_path: Path) -> None:
    sae_lens = pytest.importorskip("sae_lens")
    sae = trained(name)
    saekit.save_sae(sae, tmp_path, name=name, metadata={"hook_name": "blocks.0.hook_out", "model_name": "m"})
    theirs = sae_lens.SAE.load_from_disk(str(tmp_path))
    x = torch.randn(200, 16)
    code = sae.encode(x)
    torch.testing.assert_close(theirs.encode(x), code.dense(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(theirs(x), sae.decode(code), atol=1e-5, rtol=1e-5)
    assert theirs.cfg.metadata.hook_name == "blocks.0.hook_out"


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """The directory of a whole SAE."""
    return saekit.save_sae(trained("topk"), tmp_path / "sae", name="topk")


def test_a_missing_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="has no cfg.json"):
        saekit.load_sae(tmp_path / "nothing")


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
def test_weights_cut_short_are_refused(saved: Path, share: float) -> None:
    content = (saved / WEIGHTS).read_bytes()
    (saved / WEIGHTS).write_bytes(content[: int(len(content) * share)])
    with pytest.raises(UsageError, match=f"{WEIGHTS}: is damaged or cut short"):
        saekit.load_sae(saved)


def test_a_broken_configuration_is_named(saved: Path) -> None:
    (saved / CONFIG).write_text("{", encoding="utf-8")
    with pytest.raises(UsageError, match="cfg.json: cannot be read as JSON"):
        saekit.load_sae(saved)


def test_tensors_of_another_shape_are_named(saved: Path) -> None:
    cfg = json.loads((saved / CONFIG).read_text(encoding="utf-8"))
    (saved / CONFIG).write_text(json.dumps({**cfg, "d_sae": 63}), encoding="utf-8")
    with pytest.raises(UsageError, match="W_enc"):
        saekit.load_sae(saved)


def test_an_architecture_that_is_not_installed_is_named(saved: Path) -> None:
    cfg = json.loads((saved / CONFIG).read_text(encoding="utf-8"))
    cfg["metadata"]["saekit"]["architecture"] = "builtin.topq"
    (saved / CONFIG).write_text(json.dumps(cfg), encoding="utf-8")
    with pytest.raises(UsageError, match="no architecture 'builtin.topq'"):
        saekit.load_sae(saved)
