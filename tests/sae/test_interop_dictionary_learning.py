"""dictionary_learning's files, against the formulas of its classes, and against the library where it is installed."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import saekit
from saekit.errors import UsageError
from saekit.plugins import Registry
from saekit.sae import interop
from saekit.sae.formats import SavedSAE
from saekit.sae.interop.dictionary_learning import CLASSES, CONFIG, WEIGHTS, read, write

D_IN, D_SAE = 16, 64
CLOSE = {"atol": 1e-6, "rtol": 1e-6}
EXPORTED = {
    "standard": "AutoEncoder",
    "topk": "AutoEncoderTopK",
    "batchtopk": "BatchTopKSAE",
    "matryoshka": "MatryoshkaBatchTopKSAE",
    "jumprelu": "JumpReluAutoEncoder",
    "gated": "GatedAutoEncoder",
}
OPTIONS: dict[str, dict[str, Any]] = {"topk": {"k": 5}, "batchtopk": {"k": 5}, "matryoshka": {"k": 5, "prefixes": [8, 24, 64]}}


def state_of(name: str) -> dict[str, Tensor]:
    """A state dict as the class `name` saves it, drawn."""
    generator = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> Tensor:
        return 0.6 * torch.randn(shape, generator=generator)

    linear = {"encoder.weight": normal(D_SAE, D_IN), "decoder.weight": normal(D_IN, D_SAE)}
    bias = {"encoder.bias": normal(D_SAE)}
    plain = {"W_enc": normal(D_IN, D_SAE), "b_enc": normal(D_SAE), "W_dec": normal(D_SAE, D_IN), "b_dec": normal(D_IN)}
    followed = {"k": torch.tensor(5, dtype=torch.int32), "threshold": torch.tensor(0.8)}
    return {
        "AutoEncoder": {"bias": normal(D_IN), **linear, **bias},
        "AutoEncoderNew": {**linear, **bias, "decoder.bias": normal(D_IN)},
        "AutoEncoderTopK": {"b_dec": normal(D_IN), **followed, **linear, **bias},
        "BatchTopKSAE": {"b_dec": normal(D_IN), **followed, **linear, **bias},
        "MatryoshkaBatchTopKSAE": {**plain, **followed, "group_sizes": torch.tensor([8, 16, 40])},
        "JumpReluAutoEncoder": {**plain, "threshold": normal(D_SAE).abs()},
        "GatedAutoEncoder": {
            "decoder_bias": normal(D_IN), **linear,
            "r_mag": normal(D_SAE), "gate_bias": normal(D_SAE), "mag_bias": normal(D_SAE),
        },
    }[name]  # fmt: skip


def computed(name: str, s: dict[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """(features, reconstruction) of the class `name` by its formula."""
    if name == "AutoEncoder":
        f = ((x - s["bias"]) @ s["encoder.weight"].t() + s["encoder.bias"]).relu()
        return f, f @ s["decoder.weight"].t() + s["bias"]
    if name == "AutoEncoderNew":
        f = (x @ s["encoder.weight"].t() + s["encoder.bias"]).relu()
        return f, f @ s["decoder.weight"].t() + s["decoder.bias"]
    if name == "AutoEncoderTopK":
        f = ((x - s["b_dec"]) @ s["encoder.weight"].t() + s["encoder.bias"]).relu()
        best = f.topk(int(s["k"]), dim=1)
        f = torch.zeros_like(f).scatter(1, best.indices, best.values)
        return f, f @ s["decoder.weight"].t() + s["b_dec"]
    if name == "BatchTopKSAE":
        f = ((x - s["b_dec"]) @ s["encoder.weight"].t() + s["encoder.bias"]).relu()
        f = f * (f > s["threshold"])
        return f, f @ s["decoder.weight"].t() + s["b_dec"]
    if name == "MatryoshkaBatchTopKSAE":
        f = ((x - s["b_dec"]) @ s["W_enc"] + s["b_enc"]).relu()
        f = f * (f > s["threshold"])
        return f, f @ s["W_dec"] + s["b_dec"]
    if name == "JumpReluAutoEncoder":
        pre = x @ s["W_enc"] + s["b_enc"]
        f = (pre * (pre > s["threshold"])).relu()
        return f, f @ s["W_dec"] + s["b_dec"]
    assert name == "GatedAutoEncoder"
    shared = (x - s["decoder_bias"]) @ s["encoder.weight"].t()
    f = (shared + s["gate_bias"] > 0) * (s["r_mag"].exp() * shared + s["mag_bias"]).relu()
    return f, f @ s["decoder.weight"].t() + s["decoder_bias"]


def lay(directory: Path, name: str, state: dict[str, Any], **trainer: Any) -> Path:
    directory.mkdir(exist_ok=True)
    torch.save(state, directory / WEIGHTS)
    trainer = {"dict_class": name, "activation_dim": D_IN, "dict_size": D_SAE, "lm_name": "m", "layer": 2, **trainer}
    (directory / CONFIG).write_text(json.dumps({"trainer": trainer, "buffer": {"ctx_len": 128}}))
    return directory


def take(directory: Path) -> SavedSAE:
    return interop.take_in(read(directory), Registry())


def stored(directory: Path) -> dict[str, Tensor]:
    return torch.load(directory / WEIGHTS, weights_only=True)


@pytest.mark.parametrize("name", CLASSES)
def test_each_class_is_read(name: str, inputs: Tensor, tmp_path: Path) -> None:
    state = state_of(name)
    saved = take(lay(tmp_path, name, state))
    features, rebuilt = computed(name, state, inputs)
    assert 2 < float((features > 0).sum(1).float().mean()) < D_SAE / 1.5
    code = saved.sae.encode(inputs)
    torch.testing.assert_close(code.dense(), features, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(saved.sae.decode(code), rebuilt, atol=1e-5, rtol=1e-5)
    assert saved.metadata == {"model_name": "m", "layer": 2, "context_size": 128}
    if "k" in state:
        assert saved.sae.options()["k"] == 5
    if "group_sizes" in state:
        assert saved.sae.options()["prefixes"] == [8, 24, 64]


@pytest.mark.parametrize("name", CLASSES)
def test_each_class_is_written_as_it_was_read(name: str, tmp_path: Path) -> None:
    state = state_of(name)
    saved = take(lay(tmp_path / "theirs", name, state))
    write(saved, tmp_path / "back")
    back = stored(tmp_path / "back")
    assert back.keys() == state.keys()
    for key, tensor in state.items():
        if not (name == "AutoEncoderTopK" and key == "threshold"):  # which top-k does not use
            torch.testing.assert_close(back[key], tensor, **CLOSE, check_dtype=False)
    trainer = json.loads((tmp_path / "back" / CONFIG).read_text())["trainer"]
    assert (trainer["dict_class"], trainer["lm_name"], trainer["layer"]) == (name, "m", 2)


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("name", EXPORTED)
def test_round_trips_of_ours(name: str, centred: bool, random_sae, inputs: Tensor, tmp_path: Path) -> None:
    ours = random_sae(name, centred=centred, **OPTIONS.get(name, {}))
    write(SavedSAE(ours, name, {"hook_name": "blocks.3.hook_out", "model_name": "m", "context_size": 64}), tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    assert config["trainer"]["dict_class"] == ("AutoEncoderNew" if name == "standard" and not centred else EXPORTED[name])
    assert (config["trainer"]["layer"], config["trainer"]["lm_name"], config["buffer"]["ctx_len"]) == (3, "m", 64)
    again = take(tmp_path).sae
    assert type(again) is type(ours)
    code, there = ours.encode(inputs), again.encode(inputs)
    scale = float(code.dense().abs().max())
    assert float((there.dense() - code.dense()).abs().max()) < 1e-6 * scale
    assert float((again(inputs) - ours(inputs)).abs().max()) < 1e-6 * float(ours(inputs).abs().max())
    features, rebuilt = computed(config["trainer"]["dict_class"], stored(tmp_path), inputs)
    torch.testing.assert_close(features, code.dense(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(rebuilt, ours.decode(code), atol=1e-5, rtol=1e-5)
    kept = {**ours.options()}
    kept.pop("threshold_memory", None)  # belongs to training, and has no place there
    assert {key: again.options()[key] for key in kept} == kept


@pytest.mark.parametrize("name", EXPORTED)
def test_the_library_itself_opens_it(name: str, random_sae, inputs: Tensor, tmp_path: Path) -> None:
    utils = pytest.importorskip("dictionary_learning.utils")
    ours = random_sae(name, **OPTIONS.get(name, {}))
    ours.W_dec.div_(ours.W_dec.norm(dim=1, keepdim=True))  # its loader folds the norms of one class into the encoder
    write(SavedSAE(ours, name, {}), tmp_path)
    theirs, _ = utils.load_dictionary(str(tmp_path), device="cpu")
    torch.testing.assert_close(theirs.encode(inputs), ours.encode(inputs).dense(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(theirs(inputs), ours(inputs), atol=1e-5, rtol=1e-5)


def test_what_it_lacks_is_refused(random_sae, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="dictionary_learning has nothing that computes what clipped does"):
        write(SavedSAE(random_sae("clipped"), "clipped", {}), tmp_path / "new")
    with pytest.raises(UsageError, match="reads width 16 and rebuilds width 12"):
        write(SavedSAE(random_sae("topk", d_out=12), "topk", {}), tmp_path / "new")
    assert not (tmp_path / "new").exists()


class Boom:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path("ran_code"),))


def test_code_in_the_file_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    directory = lay(tmp_path / "sae", "AutoEncoder", state_of("AutoEncoder"))
    evil = pickle.dumps(Boom(), protocol=2)
    for write_evil in (lambda path: torch.save({"bias": Boom()}, path), lambda path: path.write_bytes(evil)):
        write_evil(directory / WEIGHTS)
        with pytest.raises(UsageError, match=r"ae.pt: is damaged or holds more than tensors"):
            read(directory)
    assert not Path("ran_code").exists()


def test_it_is_opened_only_where_it_is_asked_for(tmp_path: Path) -> None:
    directory = lay(tmp_path / "sae", "AutoEncoder", state_of("AutoEncoder"))
    with pytest.raises(UsageError, match=r"holds an SAE of dictionary_learning.* saekit import"):
        saekit.load_sae(directory)


def test_bad_files_are_named(tmp_path: Path) -> None:
    state = state_of("BatchTopKSAE")
    cases: list[tuple[dict[str, Any], dict[str, Any], str]] = [
        ({**state, "extra": torch.zeros(1)}, {}, "ae.pt: tensor 'extra' is not expected"),
        ({k: v for k, v in state.items() if k != "encoder.bias"}, {}, "ae.pt: tensor 'encoder.bias' is missing"),
        ({**state, "encoder.bias": torch.zeros(9)}, {}, r"b_enc is \[9\]"),
        ({**state, "encoder.weight": torch.zeros(9)}, {}, "encoder.weight has 1 dimensions"),
        ({**state, "decoder.weight": torch.zeros(D_SAE, D_IN)}, {}, "W_dec is"),
        ({**state, "threshold": torch.zeros(0)}, {}, "threshold is"),
        (state, {"dict_class": "CrossCoder"}, "trainer.dict_class is 'CrossCoder', which cannot be read"),
        (state, {"k": 6}, "trainer.k is 6, but ae.pt says 5"),
        ({"bias": "text"}, {}, "does not hold a state dict"),
    ]
    for number, (content, trainer, words) in enumerate(cases):
        with pytest.raises(UsageError, match=words):
            take(lay(tmp_path / str(number), "BatchTopKSAE", content, **trainer))
    directory = lay(tmp_path / "cut", "BatchTopKSAE", state)
    (directory / WEIGHTS).write_bytes((directory / WEIGHTS).read_bytes()[:700])
    with pytest.raises(UsageError, match="ae.pt: is damaged"):
        read(directory)
    (directory / CONFIG).write_text("{}")
    with pytest.raises(UsageError, match=r"'trainer.dict_class' is missing"):
        read(directory)
    (directory / CONFIG).unlink()
    with pytest.raises(UsageError, match=r"has no config.json"):
        read(directory)
