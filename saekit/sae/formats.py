"""An SAE on disk: SAELens's layout (`cfg.json` and `sae_weights.safetensors`), with ours under `metadata.saekit`.

`sae_lens.SAE.load_from_disk` opens a directory written here whenever the architecture has a counterpart there.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from saekit.errors import UsageError
from saekit.files import disk_errors, whole_file, write_json
from saekit.plugins import Registry
from saekit.sae.base import SparseAutoencoder

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
# sae_lens drops nested metadata that claims to be older than 6.0.0; this is the layout's version, not the library's.
SAELENS_LAYOUT = "6.0.0"
FORMAT_VERSION = 1


def save_sae(sae: SparseAutoencoder, directory: str | Path, *, name: str, metadata: dict[str, Any] | None = None) -> Path:
    """Write `sae` into `directory`.

    name: the architecture's name in the registry, by which `load_sae` finds it again. metadata: SAELens's own keys
    (model_name, hook_name, ...) and anything else that describes the SAE.
    """
    from safetensors.torch import save_file

    directory = Path(directory)
    own, tensors = sae.to_saelens()
    ours = {
        "format": FORMAT_VERSION,
        "architecture": name,
        "options": sae.options(),
        "d_out": sae.d_out,
    }
    cfg = {
        "architecture": sae.saelens_name or name,
        "d_in": sae.d_in,
        "d_sae": sae.d_sae,
        "dtype": str(sae.W_dec.dtype).removeprefix("torch."),
        "device": "cpu",
        "normalize_activations": "none",
        "reshape_activations": "none",
        **own,
        "metadata": {"sae_lens_version": SAELENS_LAYOUT, **(metadata or {}), "saekit": ours},
    }
    with disk_errors(directory):
        directory.mkdir(parents=True, exist_ok=True)
    with whole_file(directory / WEIGHTS) as temporary:
        save_file({key: t.detach().cpu().contiguous() for key, t in tensors.items()}, temporary)
    write_json(directory / CONFIG, cfg)
    return directory


def load_sae(
    directory: str | Path, *, device: str | torch.device = "cpu", registry: Registry | None = None
) -> SparseAutoencoder:
    """The SAE in `directory`, with the architecture that its cfg.json names. Raises UsageError if it is not whole."""
    directory = Path(directory)
    cfg = read_config(directory)
    ours = cfg.get("metadata", {}).get("saekit")
    if not isinstance(ours, dict):
        raise UsageError(
            f"{directory / CONFIG}: has no metadata.saekit, so it was not written by saekit."
        )
    component = (registry or Registry()).find("architecture", ours["architecture"], where=str(directory / CONFIG))
    options = component.validate(ours["options"], f"{directory / CONFIG}: metadata.saekit.options")
    sae = component.build(options, cfg["d_in"], cfg["d_sae"], ours["d_out"])
    sae.load_state_dict(_tensors(directory / WEIGHTS, sae))
    return sae.to(device).requires_grad_(False).eval()


def read_config(directory: Path) -> dict[str, Any]:
    """The content of cfg.json; a UsageError where it is missing or broken."""
    path = directory / CONFIG
    try:
        cfg = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"{directory}: holds no {CONFIG}, so it is not the directory of an SAE.") from None
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: cannot be read as JSON: {error}.") from None
    for key in ("architecture", "d_in", "d_sae"):
        if key not in cfg:
            raise UsageError(f"{path}: key {key!r} is missing.")
    return cfg


def _tensors(path: Path, sae: SparseAutoencoder) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(path)
    except FileNotFoundError:
        raise UsageError(f"{path.parent}: holds no {path.name}.") from None
    except (OSError, SafetensorError) as error:
        raise UsageError(f"{path}: is damaged or cut short: {error}.") from None
    wanted = {name: tuple(t.shape) for name, t in sae.state_dict().items()}
    got = {name: tuple(t.shape) for name, t in tensors.items()}
    if wanted != got:
        odd = sorted({*wanted.items()} ^ {*got.items()})
        raise UsageError(f"{path}: its tensors are not those of the architecture in {CONFIG}; they differ in {odd}.")
    return tensors
