"""sparsify's files, against the formula of its SparseCoder, and against the library where it is installed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import saekit
from saekit.errors import UsageError
from saekit.plugins import Registry
from saekit.sae import interop
from saekit.sae.formats import CONFIG, SavedSAE
from saekit.sae.interop.sparsify import WEIGHTS, read, write

D_IN, D_SAE, K = 16, 64, 5


def lay(directory: Path, **keys: Any) -> dict[str, Tensor]:
    """A directory as sparsify writes it; a key of "GONE" is left out."""
    generator = torch.Generator().manual_seed(3)
    shapes = {"encoder.weight": (D_SAE, D_IN), "encoder.bias": (D_SAE,), "W_dec": (D_SAE, D_IN), "b_dec": (D_IN,)}
    if keys.get("skip_connection"):
        shapes["W_skip"] = (D_IN, D_IN)
    state = {name: 0.6 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    cfg = {
        "activation": "topk", "expansion_factor": 4, "normalize_decoder": True, "num_latents": 0, "k": K,
        "multi_topk": False, "skip_connection": False, "transcode": False, "d_in": D_IN, **keys,
    }  # fmt: skip
    directory.mkdir(exist_ok=True)
    save_file(state, directory / WEIGHTS)
    (directory / CONFIG).write_text(json.dumps({key: value for key, value in cfg.items() if value != "GONE"}))
    return state


def computed(directory: Path, x: Tensor) -> tuple[Tensor, Tensor]:
    """(latents, reconstruction) by the formula."""
    cfg, s = json.loads((directory / CONFIG).read_text()), load_file(directory / WEIGHTS)
    pre = ((x if cfg["transcode"] else x - s["b_dec"]) @ s["encoder.weight"].t() + s["encoder.bias"]).relu()
    best = pre.topk(cfg["k"], dim=1)
    latents = torch.zeros_like(pre).scatter(1, best.indices, best.values)
    skipped = x @ s["W_skip"].t() if cfg["skip_connection"] else 0.0
    return latents, latents @ s["W_dec"] + s["b_dec"] + skipped


def take(directory: Path) -> SavedSAE:
    return interop.take_in(read(directory), Registry())


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"transcode": True},
        {"transcode": True, "skip_connection": True},
        {"skip_connection": True},
        {"num_latents": D_SAE, "expansion_factor": 3},
        {"activation": "GONE"},
    ],
)
def test_it_is_read_and_written_as_it_was(keys: dict[str, Any], inputs: Tensor, tmp_path: Path) -> None:
    state = lay(tmp_path / "theirs", **keys)
    saved = take(tmp_path / "theirs")
    latents, rebuilt = computed(tmp_path / "theirs", inputs)
    code = saved.sae.encode(inputs)
    torch.testing.assert_close(code.dense(), latents, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(saved.sae.reconstruct(inputs, code), rebuilt, atol=1e-5, rtol=1e-5)
    assert saved.sae.transcoder == bool(keys.get("transcode") or keys.get("skip_connection"))
    write(saved, tmp_path / "back")
    back = load_file(tmp_path / "back" / WEIGHTS)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[key], tensor) for key, tensor in state.items())
    there = {"activation": "topk", "k": K, "d_in": D_IN, "num_latents": D_SAE}
    there |= {key: keys.get(key, False) for key in ("transcode", "skip_connection")}
    assert json.loads((tmp_path / "back" / CONFIG).read_text()).items() >= there.items()


@pytest.mark.parametrize("centred", [True, False])
def test_round_trips_of_ours(centred: bool, random_sae, inputs: Tensor, tmp_path: Path) -> None:
    ours = random_sae("topk", k=K, centred=centred)
    write(SavedSAE(ours, "topk", {}), tmp_path)
    again = take(tmp_path).sae
    assert again.options() == ours.options()
    assert torch.equal(again.encode(inputs).dense(), ours.encode(inputs).dense())
    assert torch.equal(again(inputs), ours(inputs))
    latents, rebuilt = computed(tmp_path, inputs)
    torch.testing.assert_close(latents, ours.encode(inputs).dense(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(rebuilt, ours(inputs), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("options", [{"centred": True}, {"centred": False}, {"d_out": D_IN}, {"d_out": D_IN, "skip": True}])
def test_the_library_itself_opens_it(options: dict[str, Any], random_sae, inputs: Tensor, tmp_path: Path) -> None:
    sparsify = pytest.importorskip("sparsify")
    ours = random_sae("topk", k=K, **options)
    write(SavedSAE(ours, "topk", {}), tmp_path / "layers.1")
    theirs = sparsify.SparseCoder.load_from_disk(tmp_path / "layers.1")
    acts, indices, _ = theirs.encode(inputs)
    latents = torch.zeros(len(inputs), D_SAE).scatter(1, indices, acts)
    torch.testing.assert_close(latents, ours.encode(inputs).dense(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(theirs(inputs).sae_out, ours(inputs), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["standard", "clipped", "batchtopk", "jumprelu", "gated"])
def test_what_it_lacks_is_refused(name: str, random_sae, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=f"sparsify has nothing that computes what {name} does"):
        write(SavedSAE(random_sae(name), name, {}), tmp_path / "new")
    with pytest.raises(UsageError, match="rebuilds width 12"):
        write(SavedSAE(random_sae("topk", d_out=12), "topk", {}), tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"signed": True}, "signed is true: its latents have both signs"),
        ({"activation": "groupmax"}, "no installed architecture computes sparsify's 'groupmax'"),
        ({"k": "GONE"}, "k is None"),
        ({"k": 0}, "k is 0"),
        ({"d_in": "GONE"}, "d_in is None"),
        ({"expansion_factor": 5}, r"W_enc is \[16, 64\], but cfg.json says \[16, 80\]"),
    ],
)
def test_what_cannot_be_said_here_is_refused(keys: dict[str, Any], words: str, tmp_path: Path) -> None:
    lay(tmp_path, **keys)
    with pytest.raises(UsageError, match=words):
        take(tmp_path)


def test_missing_and_extra_tensors_are_named(tmp_path: Path) -> None:
    state = lay(tmp_path)
    save_file({**state, "W_skip": torch.zeros(D_IN, D_IN)}, tmp_path / WEIGHTS)
    with pytest.raises(UsageError, match="sae.safetensors: tensor 'W_skip' is not expected"):
        read(tmp_path)
    save_file({key: value for key, value in state.items() if key != "W_dec"}, tmp_path / WEIGHTS)
    with pytest.raises(UsageError, match="sae.safetensors: tensor 'W_dec' is missing"):
        read(tmp_path)


def test_load_sae_says_how_to_take_it_in(tmp_path: Path) -> None:
    lay(tmp_path)
    with pytest.raises(UsageError, match=r"holds an SAE of sparsify.* saekit import"):
        saekit.load_sae(tmp_path)
