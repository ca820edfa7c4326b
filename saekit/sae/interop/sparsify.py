"""sparsify (EleutherAI): `cfg.json` and `sae.safetensors`."""

from __future__ import annotations

from pathlib import Path

import torch

from saekit.errors import UsageError
from saekit.files import disk_errors, whole_file, write_json
from saekit.sae.formats import CONFIG, SavedSAE, read_object, read_tensors, width
from saekit.sae.interop.foreign import Foreign, exported_as, key_of
from saekit.sae.saelens_format import SaeLensFormat

LIBRARY = "sparsify"
WEIGHTS = "sae.safetensors"
NAMES = {"W_enc": "encoder.weight", "b_enc": "encoder.bias", "W_dec": "W_dec", "b_dec": "b_dec"}
SKIP = {"W_skip": "W_skip"}
UNNAMED = "unnamed"
"""The activation of a file from before there were two. An architecture that can load it lists this name too."""


def matches(directory: Path) -> bool:
    """Whether `directory` holds the files of sparsify."""
    return (directory / CONFIG).is_file() and (directory / WEIGHTS).is_file()


def read(directory: Path) -> Foreign:
    """The SAE that sparsify saved in `directory`."""
    path = directory / CONFIG
    cfg = read_object(path)
    if cfg.get("signed"):
        raise UsageError(f"{path}: signed is true: its latents have both signs, which no architecture here supports.")
    skip, transcode = bool(cfg.get("skip_connection")), bool(cfg.get("transcode"))
    names = NAMES | SKIP if skip else NAMES
    d_in = width(cfg, "d_in", path)
    d_sae = width(cfg, "num_latents", path) if cfg.get("num_latents") else d_in * width(cfg, "expansion_factor", path)
    stored = read_tensors(directory / WEIGHTS)
    for theirs in names.values():
        if theirs not in stored:
            raise UsageError(f"{directory / WEIGHTS}: tensor {theirs!r} is missing.")
    unknown = sorted(stored.keys() - set(names.values()))
    if unknown:
        raise UsageError(f"{directory / WEIGHTS}: tensor {unknown[0]!r} is not expected; there are {', '.join(names.values())}.")
    tensors = {ours: stored[theirs].float() for ours, theirs in names.items()}
    if tensors["W_enc"].dim() == 2:
        tensors["W_enc"] = tensors["W_enc"].t()  # [d_in, d_sae]
    return Foreign(
        LIBRARY,
        str(cfg.get("activation", UNNAMED)),
        directory / WEIGHTS,
        d_in,
        d_sae,
        d_in if transcode or skip else None,
        centred=not transcode,
        tensors=tensors,
        cfg={"k": width(cfg, "k", path)},
        skip=skip,
    )


def write(saved: SavedSAE, directory: Path) -> None:
    """Write `cfg.json` and `sae.safetensors` as sparsify's `SparseCoder.load_from_disk` opens them."""
    from safetensors.torch import save_file

    sae = saved.sae
    activation = exported_as(LIBRARY, saved)[0]
    tensors = SaeLensFormat.of(type(sae)).to(sae)[1]
    cfg = {
        "activation": activation,
        "expansion_factor": max(1, sae.d_sae // sae.d_in),
        "normalize_decoder": sae.decoder_norm == "unit",
        "num_latents": sae.d_sae,
        "k": key_of(sae, "k"),
        "multi_topk": False,
        "skip_connection": sae.skip,
        "transcode": not sae.reads_centred,
        "d_in": sae.d_in,
    }
    with disk_errors(directory):
        directory.mkdir(parents=True, exist_ok=True)
    stored: dict[str, torch.Tensor] = {}
    for ours, theirs in (NAMES | SKIP if sae.skip else NAMES).items():
        tensor = tensors[ours].detach().cpu().float()
        stored[theirs] = (tensor.t() if ours == "W_enc" else tensor).contiguous()
    with whole_file(directory / WEIGHTS) as temporary:
        save_file(stored, temporary)
    write_json(directory / CONFIG, cfg)
