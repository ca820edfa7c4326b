"""sae_lens: `cfg.json` and `sae_weights.safetensors`, which is our own layout too, and the releases that it lists."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from saekit.errors import RunError, UsageError, near_names
from saekit.sae.formats import CONFIG, WEIGHTS, SavedSAE, read_config, read_tensors, save_sae, text, width
from saekit.sae.interop.foreign import Foreign
from saekit.sae.saelens_format import SaeLensFormat

LIBRARY = "sae_lens"
# Before version 6 these were among the SAE's own keys.
DESCRIPTIVE = (
    "model_name", "hook_name", "hook_head_index", "prepend_bos", "context_size", "dataset_path", "seqpos_slice",
    "neuronpedia_id", "model_from_pretrained_kwargs",
)  # fmt: skip
OLD_NAMES = {"hook_point": "hook_name", "hook_point_head_index": "hook_head_index", "activation_fn_str": "activation_fn"}
SCALED, RELU = "expected_average_only_in", "relu"
SKIP_TRANSCODERS = ("skip_transcoder", "jumprelu_skip_transcoder")


def matches(directory: Path) -> bool:
    """Whether `directory` holds the files of sae_lens."""
    return (directory / CONFIG).is_file() and (directory / WEIGHTS).is_file()


def read(directory: Path, mean_norm: float | None = None) -> Foreign:
    """The SAE that sae_lens saved in `directory`.

    mean_norm: mean norm of the raw activations, for an SAE that reads them scaled to a mean norm of sqrt(d_in) and does
        not keep the factor. Raises UsageError if nothing here computes the same.
    """
    cfg = read_config(directory)
    foreign = _foreign(cfg, read_tensors(directory / WEIGHTS), directory / CONFIG, mean_norm)
    return replace(foreign, where=directory / WEIGHTS)


def fetch(release: str, sae_id: str, mean_norm: float | None = None) -> Foreign:
    """An SAE of a release that sae_lens lists, or of a repository on the Hugging Face hub in its layout."""
    where = f"{release}:{sae_id}"
    try:
        import sae_lens
        from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory
    except ImportError as error:
        raise UsageError(f"{where}: releases are found through sae_lens ({error}). Install it: pip install sae_lens") from None
    releases = get_pretrained_saes_directory()
    if release not in releases and "/" not in release:
        raise UsageError(
            f"{where}: there is no such file, and sae_lens knows no release {release!r}.{near_names(release, releases)}"
        )
    if release in releases and sae_id not in releases[release].saes_map:
        ids = list(releases[release].saes_map)
        few = ", ".join(ids[:5]) + (", ..." if len(ids) > 5 else "")
        raise UsageError(f"{where}: release {release} has no SAE {sae_id!r}.{near_names(sae_id, ids)} It has {few}.")
    try:
        sae = sae_lens.SAE.from_pretrained(release, sae_id, device="cpu", dtype="float32")
    except Exception as error:  # from any of the libraries that it uses
        raise RunError(
            f"{where}: cannot be fetched: {type(error).__name__}: {str(error).strip().partition(chr(10))[0]} "
            "Check the network, or name a directory."
        ) from error
    tensors = sae.state_dict()
    sae.process_state_dict_for_saving(tensors)
    return _foreign(sae.cfg.to_dict(), tensors, where, mean_norm)


def write(saved: SavedSAE, directory: Path) -> None:
    """Write a directory that `sae_lens.SAE.load_from_disk` opens. UsageError if it has no such architecture."""
    sae, form = saved.sae, SaeLensFormat.of(type(saved.sae))
    if form.counterpart(sae) is None:
        what = f"architecture that computes what {saved.name} does"
        if sae.transcoder and form.name is not None:
            path = "a linear path (skip), " if sae.skip else ""
            what = f"transcoder with the gate of {saved.name} ({path}d_in {sae.d_in}, d_out {sae.d_out})"
        raise UsageError(f"--to {LIBRARY}: {LIBRARY} has no {what}.")
    save_sae(sae, directory, name=saved.name, metadata=saved.metadata)


def _foreign(cfg: dict[str, Any], tensors: dict[str, Tensor], where: Path | str, mean_norm: float | None) -> Foreign:
    if not isinstance(cfg.get("metadata", {}), dict):
        raise UsageError(f"{where}: metadata is not a table.")
    if _major_version(cfg) < 6:
        cfg = _modern(cfg)
    _refuse(cfg, where, mean_norm)
    d_in, d_sae = width(cfg, "d_in", where), width(cfg, "d_sae", where)
    d_out = width(cfg, "d_out", where) if "d_out" in cfg else None  # only transcoders have one
    centred = bool(cfg.get("apply_b_dec_to_input", True))
    if centred and d_out not in (None, d_in):
        raise UsageError(f"{where}: apply_b_dec_to_input is true, but b_dec has the width of what is rebuilt, d_out = {d_out}.")
    tensors = {name: tensor.float() for name, tensor in tensors.items()}
    if cfg.get("rescale_acts_by_decoder_norm"):
        tensors = _norms_folded(tensors)
    if cfg.get("normalize_activations") == SCALED:
        assert mean_norm is not None  # see _refuse
        tensors = _scale_folded(tensors, d_in**0.5 / mean_norm)
    described = cfg.get("metadata")
    metadata = {k: v for k, v in described.items() if k not in ("sae_lens_version", "saekit")} if described else {}
    if cfg.get("reshape_activations", "none") != "none":
        metadata["reshape_activations"] = cfg["reshape_activations"]
    name = text(cfg, "architecture", where)
    return Foreign(
        LIBRARY, name, where, d_in, d_sae, d_out, centred, tensors, cfg, metadata, skip=name in SKIP_TRANSCODERS
    )


def _major_version(cfg: Mapping[str, Any]) -> int:
    version = cfg.get("sae_lens_version") or cfg.get("metadata", {}).get("sae_lens_version")
    major = str(version or "").partition(".")[0]
    return int(major) if major.isdecimal() and len(major) < 10 else 0


def _modern(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """The cfg.json of a version before 6, as version 6 writes it. An activation function other than the ReLU is now an
    architecture of that name."""
    new = {OLD_NAMES.get(key, key): value for key, value in cfg.items()}
    function = new.pop("activation_fn", RELU)
    if function != RELU:
        options = new.get("activation_fn_kwargs")
        new |= {**(options if isinstance(options, dict) else {}), "architecture": function}
    scaled = new.get("normalize_activations")
    if scaled is None or isinstance(scaled, bool):
        new["normalize_activations"] = SCALED if scaled else "none"
    if "hook_z" in str(new.get("hook_name", "")):
        new.setdefault("reshape_activations", "hook_z")
    new["metadata"] = {key: new[key] for key in DESCRIPTIVE if new.get(key) is not None}
    return new


def _refuse(cfg: Mapping[str, Any], where: Path | str, mean_norm: float | None) -> None:
    """UsageError for what an SAE of sae_lens may do besides its architecture and ours never do."""
    normalised = cfg.get("normalize_activations", "none")
    if normalised == SCALED and mean_norm is None:
        raise UsageError(
            f"{where}: normalize_activations is {SCALED}: the SAE reads activations scaled to a mean norm of sqrt(d_in), and "
            "its file does not keep the factor. Give the mean norm of the raw activations at its hook point: "
            f"saekit import {_source(where)} NEW_DIRECTORY --mean-norm NORM"
        )
    if normalised not in ("none", SCALED):
        raise UsageError(
            f"{where}: normalize_activations is {normalised}: each activation is normalised by its own statistics, which "
            "no architecture here does."
        )
    if mean_norm is not None and normalised != SCALED:
        raise UsageError(f"{where}: --mean-norm: the SAE reads activations as they are (normalize_activations is none).")
    if cfg.get("finetuning_scaling_factor"):
        raise UsageError(
            f"{where}: finetuning_scaling_factor is true: latents are scaled after the gate, which no architecture here does."
        )
    function = cfg.get("activation_fn", RELU)
    if function != RELU:
        raise UsageError(f"{where}: activation_fn is {function!r}, which no architecture here has in place of the ReLU.")
    reshaped = cfg.get("reshape_activations", "none")
    if reshaped not in ("none", "hook_z"):
        raise UsageError(f"{where}: reshape_activations is {reshaped!r}, which is unknown.")


def _source(where: Path | str) -> Path | str:
    return where.parent if isinstance(where, Path) else where


def _norms_folded(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Turn an SAE that scales its pre-activations by the norms of its decoder rows into one whose rows have norm 1."""
    if not {"W_enc", "b_enc", "W_dec"} <= tensors.keys():
        return tensors  # `fill` names what is missing
    norms = tensors["W_dec"].double().norm(dim=1).clamp_min(1e-12)  # [d_sae]
    return {
        **tensors,
        "W_enc": (tensors["W_enc"].double() * norms).float(),
        "b_enc": (tensors["b_enc"].double() * norms).float(),
        "W_dec": (tensors["W_dec"].double() / norms[:, None]).float(),
    }


def _scale_folded(tensors: dict[str, Tensor], scale: float) -> dict[str, Tensor]:
    """Turn an SAE of `scale * x` into one of x, with the same latents."""
    factors = {"W_enc": scale, "W_dec": 1.0 / scale, "b_dec": 1.0 / scale}
    return {name: tensor * factors[name] if name in factors else tensor for name, tensor in tensors.items()}
