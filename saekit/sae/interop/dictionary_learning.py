"""dictionary_learning: `ae.pt` (a state dict) and `config.json`.

`ae.pt` is a pickle. It is read only by `saekit import`, with torch's restricted unpickler (`weights_only=True`), which creates
nothing but tensors and containers. What is written holds plain tensors.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saekit.errors import UsageError, near_names
from saekit.files import disk_errors, whole_file, write_json
from saekit.sae.formats import SavedSAE, plain, read_object, text
from saekit.sae.interop.foreign import Foreign, exported_as, key_of, recentred

LIBRARY = "dictionary_learning"
WEIGHTS, CONFIG = "ae.pt", "config.json"


@dataclass(frozen=True)
class Layout:
    """A class of dictionary_learning.

    centred: whether it subtracts the decoder's bias from the input.
    names: its tensor for each of sae_lens's. One that ends in .weight belongs to a torch.nn.Linear and is transposed.
    counts: other tensors: k, the threshold of a running mean, sizes of groups.
    """

    centred: bool
    names: dict[str, str]
    counts: tuple[str, ...] = ()


_LINEAR = {"W_enc": "encoder.weight", "b_enc": "encoder.bias", "W_dec": "decoder.weight"}
_PLAIN = {name: name for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
CLASSES = {
    "AutoEncoder": Layout(True, {**_LINEAR, "b_dec": "bias"}),
    "AutoEncoderNew": Layout(False, {**_LINEAR, "b_dec": "decoder.bias"}),
    "AutoEncoderTopK": Layout(True, {**_LINEAR, "b_dec": "b_dec"}, ("k", "threshold")),
    "BatchTopKSAE": Layout(True, {**_LINEAR, "b_dec": "b_dec", "threshold": "threshold"}, ("k",)),
    "MatryoshkaBatchTopKSAE": Layout(True, {**_PLAIN, "threshold": "threshold"}, ("k", "group_sizes")),
    "JumpReluAutoEncoder": Layout(False, {**_PLAIN, "threshold": "threshold"}),
    "GatedAutoEncoder": Layout(
        True,
        {
            "W_enc": "encoder.weight",
            "W_dec": "decoder.weight",
            "b_dec": "decoder_bias",
            "b_gate": "gate_bias",
            "b_mag": "mag_bias",
            "r_mag": "r_mag",
        },
    ),
}


def matches(directory: Path) -> bool:
    """Whether `directory` holds the files of dictionary_learning."""
    return (directory / WEIGHTS).is_file()


def read(directory: Path) -> Foreign:
    """The SAE that dictionary_learning saved in `directory`."""
    path = directory / CONFIG
    config = read_object(path)
    trainer = config.get("trainer")
    if not isinstance(trainer, dict) or "dict_class" not in trainer:
        raise UsageError(f"{path}: key 'trainer.dict_class' is missing, so the architecture is not known.")
    name = text(trainer, "dict_class", path)
    if name not in CLASSES:
        raise UsageError(
            f"{path}: trainer.dict_class is {name!r}, which cannot be read.{near_names(str(name), CLASSES)} "
            f"Known: {', '.join(CLASSES)}."
        )
    layout = CLASSES[name]
    state = _load(directory / WEIGHTS)
    tensors = _in_saelens_words(layout, state, directory / WEIGHTS)
    d_in, d_sae = tensors["W_enc"].shape
    buffer = config.get("buffer")
    metadata = {
        "model_name": trainer.get("lm_name"),
        "layer": trainer.get("layer"),
        "submodule_name": trainer.get("submodule_name"),
        "context_size": buffer.get("ctx_len") if isinstance(buffer, dict) else None,
    }
    keys = _keys(layout, state, trainer, path)
    return Foreign(LIBRARY, name, directory / WEIGHTS, d_in, d_sae, None, layout.centred, tensors, keys, metadata)


def write(saved: SavedSAE, directory: Path) -> None:
    """Write `ae.pt` and `config.json` as dictionary_learning's `load_dictionary` opens them."""
    sae = saved.sae
    names = exported_as(LIBRARY, saved)
    if sae.skip:
        raise UsageError(f"--to {LIBRARY}: none of its classes has a linear path past the latents (skip).")
    # If two classes differ only in whether they subtract the bias, choose the one that fits; otherwise the bias moves.
    name = next((n for n in names if CLASSES[n].centred == sae.reads_centred), names[0])
    layout = CLASSES[name]
    tensors = recentred(sae, layout.centred)
    state: dict[str, Tensor] = {}
    for ours, theirs in layout.names.items():
        tensor = tensors[ours].t() if theirs.endswith(".weight") else tensors[ours]
        if theirs == "threshold" and "k" in layout.counts:
            tensor = tensor.max()  # one for all latents
        state[theirs] = tensor.cpu().float().contiguous().clone()
    trainer: dict[str, Any] = {"dict_class": name, "activation_dim": sae.d_in, "dict_size": sae.d_sae}
    if "k" in layout.counts:
        trainer["k"] = key_of(sae, "k")
        state["k"] = torch.tensor(trainer["k"], dtype=torch.int32)
    if "threshold" in layout.counts:
        state["threshold"] = torch.tensor(-1.0)  # not set
    if "group_sizes" in layout.counts:
        widths = key_of(sae, "matryoshka_widths")
        trainer["group_sizes"] = [after - before for before, after in pairwise([0, *widths])]
        state["group_sizes"] = torch.tensor(trainer["group_sizes"])
    known = saved.metadata
    hook = str(known.get("hook_name") or "")
    layer = re.search(r"blocks\.(\d+)\.", hook)
    trainer |= {
        "layer": known.get("layer", int(layer[1]) if layer else None),
        "lm_name": known.get("model_name"),
        "submodule_name": known.get("submodule_name") or hook or None,
    }
    with disk_errors(directory):
        directory.mkdir(parents=True, exist_ok=True)
    with whole_file(directory / WEIGHTS) as temporary:
        torch.save(state, temporary)
    write_json(directory / CONFIG, {"trainer": trainer, "buffer": {"ctx_len": known.get("context_size")}})


def _load(path: Path) -> dict[str, Tensor]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UsageError(f"{path.parent}: has no {path.name}.") from None
    except Exception:  # from the unpickler, the zip file or torch's own checks, whose advice is to unpickle whatever is there
        raise UsageError(
            f"{path}: is damaged or holds more than tensors, so it is not opened: a pickle can run any code. Save the state "
            "dict alone: torch.save(dictionary.state_dict(), \"ae.pt\")."
        ) from None
    if not isinstance(state, dict) or not all(isinstance(t, Tensor) and isinstance(n, str) for n, t in state.items()):
        raise UsageError(f"{path}: does not hold a state dict of tensors.")
    return plain(state, path)


def _in_saelens_words(layout: Layout, state: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    tensors = {}
    for ours, theirs in layout.names.items():
        if theirs not in state:
            raise UsageError(f"{path}: tensor {theirs!r} is missing.")
        tensor = state[theirs].float()
        turned = theirs.endswith(".weight")
        if tensor.dim() != (2 if ours in ("W_enc", "W_dec") else tensor.dim()):
            raise UsageError(f"{path}: {theirs} has {tensor.dim()} dimensions, not 2.")
        tensors[ours] = tensor.t() if turned else tensor
    unknown = sorted(state.keys() - set(layout.names.values()) - set(layout.counts))
    if unknown:
        known = ", ".join(layout.names.values())
        raise UsageError(f"{path}: tensor {unknown[0]!r} is not expected in this class, which has {known}.")
    return tensors


def _keys(layout: Layout, state: dict[str, Tensor], trainer: dict[str, Any], path: Path) -> dict[str, Any]:
    """What the class needs besides its weights, under the keys of sae_lens."""
    keys: dict[str, Any] = {}
    if "k" in layout.counts:
        k = state["k"].tolist() if "k" in state else trainer.get("k")
        if trainer.get("k", k) != k:
            raise UsageError(f"{path}: trainer.k is {trainer['k']!r}, but {WEIGHTS} says {k!r}.")
        keys["k"] = k
    if "group_sizes" in layout.counts:
        sizes = state["group_sizes"].tolist() if "group_sizes" in state else trainer.get("group_sizes")
        if not isinstance(sizes, list) or not all(isinstance(size, int) for size in sizes):
            raise UsageError(f"{path}: trainer.group_sizes is {sizes!r}, but must be a list of sizes.")
        keys["matryoshka_widths"] = list(accumulate(sizes))
    return keys
