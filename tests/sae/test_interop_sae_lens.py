"""SAEs go to sae_lens and come from there with the same latents and reconstruction; what is not the same is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import write_config
from safetensors.torch import load_file, save_file

import saekit
from saekit.errors import RunError, UsageError
from saekit.plugins import Registry
from saekit.sae import interop
from saekit.sae.base import SparseAutoencoder
from saekit.sae.formats import CONFIG, WEIGHTS, SavedSAE, open_sae
from saekit.sae.saelens_format import SaeLensFormat

D_IN, D_SAE = 16, 64
OWN = [c for c in Registry().components("architecture") if c.distribution == "saekit"]
NAMES = [c.name for c in OWN]
CLASSES = {c.name: c.load() for c in OWN}
FORMATS = {name: SaeLensFormat.of(cls) for name, cls in CLASSES.items()}
CLOSE = {"atol": 1e-5, "rtol": 1e-5}

# (sae_lens's architecture, its own options, whether it takes b_dec from the input, ours)
THEIRS = [
    ("standard", {}, True, "standard"),
    ("standard", {}, False, "standard"),
    ("topk", {"k": 5}, True, "topk"),
    ("topk", {"k": 5}, False, "topk"),
    ("topk", {"k": 5, "rescale_acts_by_decoder_norm": True}, True, "topk"),
    ("topk", {"k": 5, "rescale_acts_by_decoder_norm": True}, False, "topk"),
    ("jumprelu", {}, True, "jumprelu"),
    ("jumprelu", {}, False, "jumprelu"),
    ("gated", {}, True, "gated"),
    ("gated", {}, False, "gated"),
    ("transcoder", {"d_out": 12}, False, "standard"),
    ("transcoder", {"d_out": D_IN}, False, "standard"),
    ("jumprelu_transcoder", {"d_out": 12}, False, "jumprelu"),
    ("skip_transcoder", {"d_out": 12}, False, "standard"),
    ("skip_transcoder", {"d_out": D_IN}, False, "standard"),
    ("jumprelu_skip_transcoder", {"d_out": 12}, False, "jumprelu"),
]
NOT_OURS = ["abstopk", "matching_pursuit", "temporal"]


def drawn(name: str, options: dict[str, Any], centred: bool, dtype: str = "float32") -> Any:
    """An SAE of sae_lens with random weights."""
    pytest.importorskip("sae_lens")
    from sae_lens.registry import get_sae_class

    sae_class, config_class = get_sae_class(name)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sae = sae_class(config_class(d_in=D_IN, d_sae=D_SAE, apply_b_dec_to_input=centred, dtype=dtype, **options))
        for key, parameter in sae.named_parameters():
            parameter.data = (0.6 * torch.randn(parameter.shape)).to(parameter.dtype)
            if key == "threshold":  # some below zero, where its ReLU is what cuts
                parameter.data += 0.5
    sae.cfg.metadata.hook_name = "blocks.0.hook_out"
    sae.cfg.metadata.model_name = "m"
    return sae.requires_grad_(False)


def same(ours: SparseAutoencoder, theirs: Any, x: torch.Tensor) -> None:
    """`theirs` may be one of ours as well."""
    code = ours.encode(x)
    assert 2 < float(code.count().mean()) < D_SAE / 1.5
    there = theirs.encode(x)
    torch.testing.assert_close(code.dense(), there.dense() if isinstance(there, saekit.Code) else there, **CLOSE)
    torch.testing.assert_close(ours.reconstruct(x, code), theirs(x), **CLOSE)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "options", "centred", "ours"), THEIRS)
def test_from_sae_lens(name, options, centred, ours, inputs: torch.Tensor, tmp_path: Path) -> None:
    theirs = drawn(name, options, centred)
    theirs.save_model(tmp_path)
    saved = open_sae(tmp_path)
    assert type(saved.sae) is CLASSES[ours]
    assert saved.sae.transcoder == ("d_out" in options)
    assert (saved.sae.W_skip is not None) == ("skip" in name)
    assert saved.metadata["hook_name"] == "blocks.0.hook_out"
    same(saved.sae, theirs, inputs)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "options", "centred", "ours"), THEIRS)
def test_from_sae_lens_and_back(name, options, centred, ours, inputs: torch.Tensor, tmp_path: Path) -> None:
    import sae_lens

    theirs = drawn(name, options, centred)
    theirs.save_model(tmp_path / "theirs")
    interop.sae_lens.write(open_sae(tmp_path / "theirs"), tmp_path / "back")
    back = sae_lens.SAE.load_from_disk(str(tmp_path / "back"))
    assert back.cfg.metadata.hook_name == "blocks.0.hook_out"
    assert back.cfg.architecture() == name
    torch.testing.assert_close(back(inputs), theirs(inputs), **CLOSE)
    same(saekit.load_sae(tmp_path / "back"), back, inputs)


@pytest.mark.slow
@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("name", [name for name in NAMES if FORMATS[name].name])
def test_to_sae_lens(name: str, centred: bool, random_sae, inputs: torch.Tensor, tmp_path: Path) -> None:
    """Every installed architecture that says it has a counterpart there; without our own part of the file as well."""
    import sae_lens

    ours = random_sae(name, centred=centred)
    interop.sae_lens.write(SavedSAE(ours, name, {"hook_name": "blocks.0.hook_out"}), tmp_path)
    same(ours, sae_lens.SAE.load_from_disk(str(tmp_path)), inputs)
    again = saekit.load_sae(tmp_path)
    assert again.options() == ours.options()
    assert all(torch.equal(tensor, again.state_dict()[key]) for key, tensor in ours.state_dict().items())
    cfg = json.loads((tmp_path / CONFIG).read_text())
    del cfg["metadata"]["saekit"]
    write_config(tmp_path, cfg)
    same(ours, saekit.load_sae(tmp_path), inputs)


TRANSCODERS = [
    (name, d_out, skip)
    for name in NAMES
    for d_out in (12, D_IN)
    for skip in (False, True)
    if (FORMATS[name].skip_transcoder if skip else FORMATS[name].transcoder)
    or (FORMATS[name].name and d_out == D_IN and not skip)  # the SAE that does not centre is the same function
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "d_out", "skip"), TRANSCODERS)
def test_transcoders_to_sae_lens(
    name: str, d_out: int, skip: bool, random_sae, inputs: torch.Tensor, tmp_path: Path
) -> None:
    """Without our own part of the file as well, from which it must be known again for what it is."""
    import sae_lens

    ours = random_sae(name, d_out=d_out, skip=skip)
    interop.sae_lens.write(SavedSAE(ours, name, {}), tmp_path)
    same(ours, sae_lens.SAE.load_from_disk(str(tmp_path)), inputs)
    again = saekit.load_sae(tmp_path)
    assert (again.options(), again.transcoder, again.d_out) == (ours.options(), True, d_out)
    assert all(torch.equal(tensor, again.state_dict()[key]) for key, tensor in ours.state_dict().items())
    cfg = json.loads((tmp_path / CONFIG).read_text())
    del cfg["metadata"]["saekit"]
    write_config(tmp_path, cfg)
    foreign = saekit.load_sae(tmp_path)
    assert (foreign.transcoder, foreign.W_skip is not None) == (True, skip)
    same(ours, foreign, inputs)


@pytest.mark.parametrize("name", NAMES)
def test_what_sae_lens_lacks_is_refused(name: str, random_sae, tmp_path: Path) -> None:
    refused = {}
    if FORMATS[name].name is None:
        refused["has no architecture that computes what"] = random_sae(name)
    if FORMATS[name].transcoder is None:
        refused["has no (transcoder|architecture)"] = random_sae(name, d_out=12)
    if FORMATS[name].skip_transcoder is None:
        path = r"has no transcoder .*\(a linear path \(skip\), d_in 16, d_out 16\)"
        reason = path if FORMATS[name].name else "has no architecture"
        refused[reason] = random_sae(name, d_out=D_IN, skip=True)
    for reason, sae in refused.items():
        with pytest.raises(UsageError, match=reason):
            interop.sae_lens.write(SavedSAE(sae, name, {}), tmp_path)
    assert not any(tmp_path.iterdir())
    assert FORMATS["clipped"].name is None


def test_a_subclass_inherits_no_counterpart() -> None:
    """Another gate under the name of its parent would be loaded elsewhere as what it is not."""

    class Odd(CLASSES["topk"]):  # type: ignore[name-defined, misc]
        pass

    assert SaeLensFormat.of(Odd) == SaeLensFormat()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["batchtopk", "matryoshka_batchtopk"])
@pytest.mark.parametrize("rescale", [True, False])
def test_from_an_sae_in_training(name: str, rescale: bool, inputs: torch.Tensor, tmp_path: Path) -> None:
    """What sae_lens saves in the middle of training keeps k and its threshold; it must equal what it saves at the end."""
    pytest.importorskip("sae_lens")
    import sae_lens
    from sae_lens.registry import get_sae_training_class

    sae_class, config_class = get_sae_training_class(name)
    more = {"matryoshka_widths": [8, 32, D_SAE]} if name.startswith("matryoshka") else {}
    config = config_class(d_in=D_IN, d_sae=D_SAE, k=7, topk_threshold_lr=0.02, rescale_acts_by_decoder_norm=rescale, **more)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        theirs = sae_class(config)
        for parameter in theirs.parameters():
            parameter.data = 0.6 * torch.randn(parameter.shape)
    theirs.topk_threshold.fill_(0.7)
    theirs.save_model(tmp_path / "training")
    theirs.save_inference_model(tmp_path / "inference")
    ours = saekit.load_sae(tmp_path / "training")
    options = ours.options()
    assert (options["k"], options["threshold_memory"]) == (7, 0.98)
    assert options.get("prefixes", [8, 32, D_SAE]) == [8, 32, D_SAE]
    same(ours, sae_lens.SAE.load_from_disk(str(tmp_path / "inference")), inputs)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float64", "bfloat16", "float16"])
def test_other_precisions_are_read_as_float32(dtype: str, inputs: torch.Tensor, tmp_path: Path) -> None:
    import sae_lens

    drawn("jumprelu", {}, True, dtype).save_model(tmp_path)
    ours = saekit.load_sae(tmp_path)
    assert {t.dtype for t in ours.state_dict().values()} == {torch.float32}
    same(ours, sae_lens.SAE.load_from_disk(str(tmp_path), dtype="float32"), inputs)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "options", "centred", "_"), THEIRS[:10])
def test_a_scale_that_the_file_does_not_keep_is_folded(name, options, centred, _, inputs: torch.Tensor, tmp_path: Path) -> None:
    theirs = drawn(name, {**options, "normalize_activations": "expected_average_only_in"}, centred)
    theirs.save_model(tmp_path)
    with pytest.raises(UsageError, match=r"expected_average_only_in.*--mean-norm"):
        saekit.load_sae(tmp_path)
    mean_norm = 23.0
    ours = interop.take_in(interop.sae_lens.read(tmp_path, mean_norm), Registry()).sae
    if options.get("rescale_acts_by_decoder_norm"):  # its own fold would change which latents are the largest
        scaled = theirs(inputs * D_IN**0.5 / mean_norm) / (D_IN**0.5 / mean_norm)
        torch.testing.assert_close(ours(inputs), scaled, **CLOSE)
        return
    theirs.fold_activation_norm_scaling_factor(D_IN**0.5 / mean_norm)
    torch.testing.assert_close(ours.encode(inputs).dense(), theirs.encode(inputs), **CLOSE)
    torch.testing.assert_close(ours(inputs), theirs(inputs), **CLOSE)


@pytest.mark.slow
@pytest.mark.parametrize("activation", ["relu", "topk"])
def test_files_from_before_version_6(activation: str, inputs: torch.Tensor, tmp_path: Path) -> None:
    """Flat, with top-k as an activation function of the standard architecture."""
    import sae_lens

    theirs = drawn("standard", {}, True)
    theirs.save_model(tmp_path)
    old = {
        "architecture": "standard", "d_in": D_IN, "d_sae": D_SAE, "dtype": "float32", "device": "cpu",
        "model_name": "gpt2-small", "hook_name": "blocks.3.hook_resid_pre", "hook_layer": 3,
        "activation_fn_str": activation, "activation_fn_kwargs": {"k": 6} if activation == "topk" else {},
        "apply_b_dec_to_input": True, "finetuning_scaling_factor": False, "normalize_activations": "none",
        "context_size": 128, "sae_lens_training_version": "3.20.1", "prepend_bos": True,
    }  # fmt: skip
    (tmp_path / CONFIG).write_text(json.dumps(old))
    saved = open_sae(tmp_path)
    assert saved.metadata["hook_name"] == "blocks.3.hook_resid_pre"
    same(saved.sae, sae_lens.SAE.load_from_disk(str(tmp_path)), inputs)


@pytest.mark.slow
def test_every_architecture_of_sae_lens_is_read_or_refused() -> None:
    """A new one there makes this fail, so that it is decided on."""
    pytest.importorskip("sae_lens")
    from sae_lens.registry import SAE_CLASS_REGISTRY, SAE_TRAINING_CLASS_REGISTRY

    known = {name for form in FORMATS.values() for name in form.names_in("sae_lens")}
    assert {*SAE_CLASS_REGISTRY, *SAE_TRAINING_CLASS_REGISTRY} == known | set(NOT_OURS)


# --- without sae_lens itself ---------------------------------------------------------------------------------------


@pytest.fixture
def directory(random_sae, tmp_path: Path) -> Path:
    """A directory as sae_lens writes it: a top-k SAE, nothing of ours in it."""
    saekit.save_sae(random_sae("topk", k=5), tmp_path / "sae", name="topk")
    cfg = json.loads((tmp_path / "sae" / CONFIG).read_text())
    del cfg["metadata"]["saekit"]
    write_config(tmp_path / "sae", cfg)
    return tmp_path / "sae"


def change(directory: Path, **keys: Any) -> None:
    cfg = json.loads((directory / CONFIG).read_text())
    cfg = {key: value for key, value in (cfg | keys).items() if value != "GONE"}
    write_config(directory, cfg)


def test_the_options_come_from_the_file(directory: Path) -> None:
    assert saekit.load_sae(directory).options() == {"decoder_norm": "free", "k": 5}


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"architecture": "topc"}, r"no installed architecture computes sae_lens's 'topc'.* Did you mean 'topk'"),
        ({"architecture": "matching_pursuit"}, "no installed architecture computes sae_lens's 'matching_pursuit'"),
        ({"architecture": "skip_transcoder", "d_out": 16, "apply_b_dec_to_input": False}, "tensor 'W_skip' is missing"),
        ({"architecture": "GONE"}, "cfg.json: key 'architecture' is missing"),
        ({"k": "GONE"}, r"key 'k' is missing, which sae_lens's topk has"),
        ({"k": 5.5}, r"k: .*integer"),
        ({"k": 65}, "65 latents cannot be active of d_sae = 64"),
        ({"d_in": 17}, r"W_enc is \[16, 64\], but cfg.json says \[17, 64\]"),
        ({"d_sae": 10**15}, "W_enc is"),
        ({"d_sae": True}, "d_sae is True, but must be a positive integer"),
        ({"d_in": "sixteen"}, "d_in is 'sixteen'"),
        ({"d_out": 12}, "apply_b_dec_to_input is true, but b_dec has the width of what is rebuilt"),
        ({"normalize_activations": "layer_norm"}, "normalize_activations is layer_norm: .*by its own statistics"),
        ({"normalize_activations": "covariance_whitening"}, "normalize_activations is covariance_whitening"),
        ({"activation_fn": "tanh-relu"}, "activation_fn is 'tanh-relu'"),
        ({"finetuning_scaling_factor": True}, "finetuning_scaling_factor is true"),
        ({"metadata": {}, "activation_fn_str": "tanh-relu"}, "no installed architecture computes sae_lens's 'tanh-relu'"),
        ({"metadata": [1]}, "metadata is not a table"),
        ({"reshape_activations": "hook_q"}, "reshape_activations is 'hook_q'"),
    ],
)
def test_what_cannot_be_said_here_is_refused(directory: Path, keys: dict[str, Any], words: str) -> None:
    change(directory, **keys)
    with pytest.raises(UsageError, match=words) as caught:
        saekit.load_sae(directory)
    assert str(directory) in str(caught.value) or "k" in keys


def test_missing_and_extra_tensors_are_named(directory: Path) -> None:
    tensors = load_file(directory / WEIGHTS)
    save_file({**tensors, "threshold": torch.zeros(D_SAE)}, directory / WEIGHTS)
    with pytest.raises(UsageError, match=f"{WEIGHTS}: tensor 'threshold' is not expected"):
        saekit.load_sae(directory)
    del tensors["b_enc"]
    save_file(tensors, directory / WEIGHTS)
    with pytest.raises(UsageError, match=f"{WEIGHTS}: tensor 'b_enc' is missing"):
        saekit.load_sae(directory)
    save_file({**tensors, "b_enc": torch.full((D_SAE,), torch.nan)}, directory / WEIGHTS)
    with pytest.raises(UsageError, match="b_enc holds values that are not finite"):
        saekit.load_sae(directory)
    (directory / WEIGHTS).write_bytes(b"\x08")
    with pytest.raises(UsageError, match="damaged or cut short"):
        saekit.load_sae(directory)
    (directory / WEIGHTS).unlink()
    with pytest.raises(UsageError, match=f"has no {WEIGHTS}"):
        saekit.load_sae(directory)


def test_attention_heads_stay_marked(directory: Path, tmp_path: Path) -> None:
    """An SAE of sae_lens that flattens [heads, d_head] reads the flat vector here, and does so there again."""
    change(directory, reshape_activations="hook_z")
    interop.sae_lens.write(open_sae(directory), tmp_path / "back")
    assert json.loads((tmp_path / "back" / CONFIG).read_text())["reshape_activations"] == "hook_z"
    interop.sae_lens.write(open_sae(tmp_path / "back"), tmp_path / "again")
    assert json.loads((tmp_path / "again" / CONFIG).read_text())["reshape_activations"] == "hook_z"


def test_a_third_party_takes_over_an_architecture(directory: Path, tmp_path: Path, inputs: torch.Tensor) -> None:
    """An architecture that a plugin brings reads what nobody else does, by its name there."""
    (tmp_path / "halved.py").write_text(
        """
from saekit import Component, SaeLensFormat, SparseAutoencoder, hookimpl

class HalvedFormat(SaeLensFormat):
    def options(self, cfg):
        return {"by": cfg["halved_by"]}

class Halved(SparseAutoencoder):
    interop = HalvedFormat(known_as=("sae_lens:halved",))

    def __init__(self, d_in, d_sae, d_out=None, *, by: float = 2.0):
        super().__init__(d_in, d_sae, d_out, decoder_norm="free")
        self.by = by

    def gate(self, x):
        return self.dense_code(x, (self.pre_activations(x) / self.by).relu())

@hookimpl
def saekit_architectures():
    yield Component("halved", Halved)
"""
    )
    change(directory, architecture="halved", halved_by=4.0)
    saved = open_sae(directory, registry=Registry(files=[tmp_path / "halved.py"]))
    assert saved.name == "halved.halved" and saved.sae.by == 4.0
    tensors = load_file(directory / WEIGHTS)
    pre = (inputs - tensors["b_dec"]) @ tensors["W_enc"] + tensors["b_enc"]
    torch.testing.assert_close(saved.sae.encode(inputs).dense(), pre.relu() / 4)


# --- releases ------------------------------------------------------------------------------------------------------


def test_how_a_release_is_written(tmp_path: Path) -> None:
    assert interop.release_of("gpt2-small-res-jb:blocks.8.hook_resid_pre") == ("gpt2-small-res-jb", "blocks.8.hook_resid_pre")
    assert interop.release_of("someone/some-saes:layer_1/width_16k") == ("someone/some-saes", "layer_1/width_16k")
    (tmp_path / "a:b").mkdir()
    assert interop.release_of(tmp_path / "a:b") is None
    assert interop.release_of("C:/saes/mine") is None
    assert interop.release_of("runs/mine/sae") is None


@pytest.mark.slow
def test_unknown_releases_are_named() -> None:
    pytest.importorskip("sae_lens")
    with pytest.raises(UsageError, match="no release 'gpt2-small-res-jc'.* Did you mean 'gpt2-small-res-jb'"):
        saekit.load_sae("gpt2-small-res-jc:blocks.8.hook_resid_pre")
    with pytest.raises(UsageError, match=r"release gpt2-small-res-jb has no SAE 'blocks.99.hook_resid_pre'. Did you mean"):
        saekit.load_sae("gpt2-small-res-jb:blocks.99.hook_resid_pre")


@pytest.mark.slow
def test_a_release_without_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    sae_lens = pytest.importorskip("sae_lens")

    def away(*args: Any, **kwargs: Any) -> None:
        raise ConnectionError("Couldn't reach the host\nwith many more lines")

    monkeypatch.setattr(sae_lens.SAE, "from_pretrained", away)
    with pytest.raises(RunError, match=r"cannot be fetched: ConnectionError: Couldn't reach the host Check the network"):
        saekit.load_sae("gpt2-small-res-jb:blocks.8.hook_resid_pre")


@pytest.mark.slow
def test_what_a_release_holds_is_taken_in(monkeypatch: pytest.MonkeyPatch, inputs: torch.Tensor) -> None:
    sae_lens = pytest.importorskip("sae_lens")
    theirs = drawn("gated", {}, True)
    asked = []

    def fetched(release: str, sae_id: str, **kwargs: Any) -> Any:
        asked.append((release, sae_id, kwargs))
        return theirs

    monkeypatch.setattr(sae_lens.SAE, "from_pretrained", fetched)
    saved = open_sae("gpt2-small-res-jb:blocks.8.hook_resid_pre")
    assert asked == [("gpt2-small-res-jb", "blocks.8.hook_resid_pre", {"device": "cpu", "dtype": "float32"})]
    assert saved.metadata["hook_name"] == "blocks.0.hook_out"
    same(saved.sae, theirs, inputs)


@pytest.mark.slow
def test_the_architecture_of_the_documentation(inputs: torch.Tensor, tmp_path: Path) -> None:
    """docs/interop.md brings sae_lens's abstopk; it computes the same, and goes there and back."""
    sae_lens = pytest.importorskip("sae_lens")
    page = (Path(__file__).parents[2] / "docs" / "interop.md").read_text(encoding="utf-8")
    (tmp_path / "abstopk.py").write_text(page.partition('title="abstopk.py"\n')[2].partition("```")[0], encoding="utf-8")
    registry = Registry(files=[tmp_path / "abstopk.py"])
    theirs = drawn("abstopk", {"k": 6}, True)
    theirs.save_model(tmp_path / "theirs")
    saved = open_sae(tmp_path / "theirs", registry=registry)
    same(saved.sae, theirs, inputs)
    assert float(saved.sae.encode(inputs).dense().min()) < 0
    interop.sae_lens.write(saved, tmp_path / "back")
    same(saved.sae, sae_lens.SAE.load_from_disk(str(tmp_path / "back")), inputs)
