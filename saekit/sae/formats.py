"""An SAE on disk: the layout of sae_lens (`cfg.json` and `sae_weights.safetensors`), with our own keys under
`metadata.saekit`.

`sae_lens.SAE.load_from_disk` opens a directory written here if the architecture has a counterpart there, and `load_sae` opens
what sae_lens wrote. For the files of other libraries see `saekit.sae.interop`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from saekit.activations.trained_positions import TrainedPositions
from saekit.checked_tensors import facts_of, load_checked, save_checked
from saekit.errors import UsageError
from saekit.files import disk_errors, given_path, parse_json, sha256_of, write_json
from saekit.plugins import Registry
from saekit.registered import OWN_DISTRIBUTION
from saekit.sae.base import SparseAutoencoder
from saekit.sae.saelens_format import SaeLensFormat

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
# The version of the layout, not of the library: sae_lens drops nested metadata that claims to be older than 6.0.0.
SAELENS_LAYOUT = "6.0.0"
FORMAT_VERSION = 1
_COPY_AGAIN = "Copy the directory again from where it is whole, or train again."


@dataclass(frozen=True)
class SavedSAE:
    """An SAE as it was read.

    name: the qualified name of its architecture.
    metadata: what else is known of it (model_name, hook_name, ...).
    """

    sae: SparseAutoencoder
    name: str
    metadata: dict[str, Any]


def save_sae(sae: SparseAutoencoder, directory: str | Path, *, name: str, metadata: dict[str, Any] | None = None) -> Path:
    """Write `sae` into `directory`.

    name: the name of the architecture in the registry, by which `load_sae` finds it again.
    metadata: the keys of sae_lens (model_name, hook_name, ...) and anything else that describes the SAE.
    """
    directory = Path(directory)
    metadata = dict(metadata or {})
    form = SaeLensFormat.of(type(sae))
    own, tensors = form.to(sae)
    ours = {
        "format": FORMAT_VERSION,
        "architecture": name,
        "options": sae.options(),
        "d_out": sae.d_out,
        "transcoder": sae.transcoder,
        "trained_positions": sae.trained_positions.to_dict(),
    }
    cfg = {
        "architecture": form.counterpart(sae) or name,
        "d_in": sae.d_in,
        "d_sae": sae.d_sae,
        **({"d_out": sae.d_out} if sae.transcoder else {}),
        "dtype": str(sae.W_dec.dtype).removeprefix("torch."),
        "device": "cpu",
        "normalize_activations": "none",
        "reshape_activations": metadata.pop("reshape_activations", "none"),
        **own,
        "metadata": {"sae_lens_version": SAELENS_LAYOUT, **metadata, "saekit": ours},
    }
    with disk_errors(directory):
        directory.mkdir(parents=True, exist_ok=True)
    write_json(directory / CONFIG, cfg)
    save_checked(directory / WEIGHTS, tensors, {CONFIG: sha256_of(directory / CONFIG)})
    return directory


def load_sae(
    source: str | Path, *, device: str | torch.device = "cpu", registry: Registry | None = None
) -> SparseAutoencoder:
    """The SAE in the directory `source`, ready to encode: float32, in evaluation mode, without gradients.

    source: a directory that saekit or sae_lens wrote, or `RELEASE:SAE_ID` of a release that sae_lens lists, which is
        downloaded. Raises UsageError if the SAE is incomplete, or if no installed architecture computes the same.
    """
    return open_sae(source, device=device, registry=registry).sae


def open_sae(source: str | Path, *, device: str | torch.device = "cpu", registry: Registry | None = None) -> SavedSAE:
    """The same as `load_sae`, together with what is known about the SAE."""
    from saekit.sae import interop  # here, because it imports this module

    registry = registry or Registry()
    directory = given_path(source)
    release = interop.release_of(source)
    if release is not None:
        saved = interop.take_in(interop.sae_lens.fetch(*release), registry)
    else:
        library = interop.library_of(directory)
        if library not in (None, interop.sae_lens.LIBRARY):
            raise UsageError(
                f"{directory}: holds an SAE of {library}. Import it first, and name the new directory: "
                f"saekit import {directory} NEW_DIRECTORY"
            )
        cfg = read_config(directory)
        ours = cfg.get("metadata", {}).get("saekit") if isinstance(cfg.get("metadata"), dict) else None
        saved = _own(directory, cfg, ours, registry) if ours else interop.take_in(interop.sae_lens.read(directory), registry)
        _refuse_changed(directory)
    saved.sae.to(device)
    return saved


def _own(directory: Path, cfg: dict[str, Any], ours: Any, registry: Registry) -> SavedSAE:
    path = directory / CONFIG
    if not isinstance(ours, dict):
        raise UsageError(f"{path}: metadata.saekit is not a table.")
    if ours.get("format") != FORMAT_VERSION:
        raise UsageError(
            f"{path}: metadata.saekit.format is {ours.get('format')!r}, and saekit {version(OWN_DISTRIBUTION)} reads "
            f"{FORMAT_VERSION}. A later one wrote it: upgrade saekit."
        )
    for key in ("architecture", "options", "d_out"):
        if key not in ours:
            raise UsageError(f"{path}: key 'metadata.saekit.{key}' is missing.")
    d_in, d_sae = width(cfg, "d_in", path), width(cfg, "d_sae", path)
    if not isinstance(ours["options"], dict):
        raise UsageError(f"{path}: metadata.saekit.options is not a table.")
    component = registry.find("architecture", text(ours, "architecture", path), where=str(path))
    options = component.validate(ours["options"], f"{path}: metadata.saekit.options")
    tensors = read_tensors(directory / WEIGHTS)
    d_out = width(ours, "d_out", path)
    check_widths(tensors, d_in, d_sae, d_out, directory / WEIGHTS)
    sae = component.build(options, d_in, d_sae, d_out if ours.get("transcoder", d_out != d_in) else None)
    sae.trained_positions = TrainedPositions.from_dict(ours.get("trained_positions", {}))
    sae.reads_centred = bool(cfg.get("apply_b_dec_to_input", sae.reads_centred))
    fill(sae, tensors, directory / WEIGHTS)
    metadata = {key: value for key, value in cfg["metadata"].items() if key not in ("saekit", "sae_lens_version")}
    if cfg.get("reshape_activations", "none") != "none":
        metadata["reshape_activations"] = cfg["reshape_activations"]
    return SavedSAE(sae, component.qualified_name, metadata)


def fill(sae: SparseAutoencoder, tensors: Mapping[str, torch.Tensor], path: Path | str) -> None:
    """Give `sae` the weights in `tensors` (the layout of sae_lens, read from `path`), and make it ready to encode."""
    state = SaeLensFormat.of(type(sae)).state(tensors)
    wanted = sae.state_dict()
    names = f"the architecture has {', '.join(wanted)}"
    for name in wanted:
        if name not in state:
            raise UsageError(f"{path}: tensor {name!r} is missing; {names}.")
    for name, tensor in state.items():
        if name not in wanted:
            raise UsageError(f"{path}: tensor {name!r} is not expected; {names}.")
        if tensor.shape != wanted[name].shape:
            raise UsageError(f"{path}: {name} is {_shape(tensor)}, but {CONFIG} says {_shape(wanted[name])}.")
    sae.load_state_dict(state)
    sae.requires_grad_(False).eval()


def read_config(directory: Path) -> dict[str, Any]:
    """The content of cfg.json. UsageError if it is missing or broken."""
    path = directory / CONFIG
    if not path.is_file():
        raise UsageError(f"{directory}: has no {CONFIG}, so it is not the directory of an SAE.")
    cfg = read_object(path)
    for key in ("architecture", "d_in", "d_sae"):
        if key not in cfg:
            raise UsageError(f"{path}: key {key!r} is missing.")
    return cfg


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in the file `path`. UsageError if there is none."""
    try:
        value = parse_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"{path.parent}: has no {path.name}.") from None
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: cannot be read as JSON: {error}.") from None
    if not isinstance(value, dict):
        raise UsageError(f"{path}: does not hold a JSON object.")
    return value


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors in a safetensors file. UsageError if it is missing or damaged."""
    try:
        tensors, _ = load_checked(path)
    except UsageError as error:
        raise UsageError(f"{error} {_COPY_AGAIN}") from None
    return plain(tensors, path)


def _refuse_changed(directory: Path) -> None:
    """UsageError if cfg.json is not the one that was written with the weights, which know its checksum if they are ours."""
    facts = facts_of(directory / WEIGHTS)
    if facts is not None and facts.get(CONFIG) != sha256_of(directory / CONFIG):
        raise UsageError(
            f"{directory / CONFIG}: has changed since it was written: its checksum is not the one in {WEIGHTS}. {_COPY_AGAIN} "
            f"If it was changed on purpose, write {WEIGHTS} without metadata: then neither file is checked."
        )


def plain(tensors: dict[str, torch.Tensor], path: Path | str) -> dict[str, torch.Tensor]:
    """The tensors, if each is an array of real numbers. UsageError for what would lose something on its way to float32."""
    for name, tensor in tensors.items():
        odd = {
            "complex": tensor.is_complex(),
            "sparse": tensor.layout != torch.strided,
            "quantised": tensor.is_quantized,
            "empty": tensor.numel() == 0,
            "without numbers (on the device meta)": tensor.is_meta,
        }
        found = next((word for word, applies in odd.items() if applies), None)
        if found:
            raise UsageError(f"{path}: {name} is {found}. Save it dense, as float32.")
    return tensors


def text(table: Mapping[str, Any], key: str, path: Path | str) -> str:
    """The value of `key`. UsageError unless it is text."""
    value = table.get(key)
    if not isinstance(value, str) or not value:
        raise UsageError(f"{path}: {key} is {value!r}, but must be text.")
    return value


def width(table: Mapping[str, Any], key: str, path: Path | str) -> int:
    """The value of `key`. UsageError unless it is a positive integer."""
    value = table.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UsageError(f"{path}: {key} is {value!r}, but must be a positive integer.")
    return value


def check_widths(tensors: Mapping[str, torch.Tensor], d_in: int, d_sae: int, d_out: int, path: Path | str) -> None:
    """UsageError if the encoder is not [d_in, d_sae], or if an SAE of these widths has more numbers than the file; checked
    before an SAE of a wrong size takes up memory."""
    if "W_enc" in tensors and tensors["W_enc"].shape != (d_in, d_sae):
        raise UsageError(f"{path}: W_enc is {_shape(tensors['W_enc'])}, but {CONFIG} says [{d_in}, {d_sae}].")
    held = sum(tensor.numel() for tensor in tensors.values())
    if (d_in + d_out) * d_sae > 2 * held:  # an architecture may keep one matrix for both sides
        raise UsageError(f"{path}: holds {held} numbers, too few for the [{d_in}, {d_sae}, {d_out}] that {CONFIG} says.")


def _shape(tensor: torch.Tensor) -> str:
    return "[" + ", ".join(map(str, tensor.shape)) + "]"
