"""One safetensors file that carries a checksum of all that is in it, written whole and checked when it is read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from saekit.files import disk_errors, whole_file

if TYPE_CHECKING:
    from torch import Tensor

_SUM = "sha256"


class DamagedFile(ValueError):
    """A file's content is not what was written."""


def save_checked(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write tensors and metadata as one whole file. Its directory is made if it is not there."""
    from safetensors.torch import save_file

    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as temporary:
        save_file(plain, temporary, {**metadata, _SUM: _digest(plain, metadata)})


def load_checked(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors, metadata) of a file that `save_checked` wrote.

    DamagedFile if anything in it has changed; FileNotFoundError and other OSErrors as they come."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is not a dictionary
    except (SafetensorError, ValueError) as error:
        raise DamagedFile(f"{path}: is damaged or cut short: {error}.") from None
    if metadata.pop(_SUM, None) != _digest(tensors, metadata):
        raise DamagedFile(f"{path}: is damaged: its content is not what its checksum was taken of.")
    return tensors, metadata


def _digest(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    described = {name: [str(tensor.dtype), list(tensor.shape)] for name, tensor in sorted(tensors.items())}
    digest = hashlib.sha256(json.dumps([described, dict(sorted(metadata.items()))]).encode())
    for name in described:
        digest.update(bytes_of(tensors[name]))
    return digest.hexdigest()


def bytes_of(tensor: Tensor) -> memoryview:
    """The bytes of a tensor on the host, without a copy if it is contiguous."""
    import torch

    return memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
