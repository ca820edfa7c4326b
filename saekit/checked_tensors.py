"""A safetensors file that carries facts about its tensors and a checksum of both, written whole and checked when it is read.

Facts and checksum are one text in the file's metadata, under `saekit`: safetensors writes several texts in no fixed order, and
equal content should be equal bytes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saekit.errors import UsageError
from saekit.files import disk_errors, whole_file

if TYPE_CHECKING:
    from torch import Tensor

_KEY, _SUM = "saekit", "sha256"


def save_checked(path: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Write tensors, and facts that JSON can hold, as one whole file. Its directory is made if it is not there."""
    from safetensors.torch import save_file

    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as temporary:
        save_file(plain, temporary, {_KEY: json.dumps({**facts, _SUM: _digest(plain, facts)})})


def load_checked(path: Path) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """(tensors, facts) of a safetensors file; facts are None if it has none, as files of other programs.

    UsageError that names the file if it is missing, cut short, or not what `save_checked` wrote: one changed byte is noticed."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is not a dictionary
        if not metadata.keys() - {"format"}:  # which says "pt", for torch
            return tensors, None
        facts = json.loads(metadata[_KEY])
        told = facts.pop(_SUM)
    except FileNotFoundError:
        raise UsageError(f"{path.parent}: has no {path.name}.") from None
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{path}: is damaged or cut short: {error}.") from None
    except (LookupError, RuntimeError) as error:
        raise UsageError(f"{path}: holds a dtype or a shape that torch lacks: {error}. Save it as float32.") from None
    if told != _digest(tensors, facts):
        raise UsageError(f"{path}: is damaged: its content has changed since it was written, as its checksum shows.")
    return tensors, facts


def facts_of(path: Path) -> dict[str, Any] | None:
    """The facts alone, from the header of a file that was read whole before."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        text = (file.metadata() or {}).get(_KEY)
    return None if text is None else json.loads(text)


def _digest(tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> str:
    described = {name: [str(tensor.dtype), list(tensor.shape)] for name, tensor in sorted(tensors.items())}
    digest = hashlib.sha256(json.dumps([described, facts], sort_keys=True).encode())
    for name in described:
        digest.update(bytes_of(tensors[name]))
    return digest.hexdigest()


def bytes_of(tensor: Tensor) -> memoryview:
    """The bytes of a tensor on the host, without a copy if it is contiguous."""
    import torch

    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
