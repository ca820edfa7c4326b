"""Loading a subject from Hugging Face: a local directory or a model of the hub, checked so that errors name the fix."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from saekit.activations.encoder_types import is_encoder, reads_images
from saekit.activations.hub import ask_hub
from saekit.activations.sites import RESIDUAL, Site, resolve
from saekit.activations.subject import Subject, directory_digest, hub_digest
from saekit.errors import OptionError, SaekitError, UsageError
from saekit.files import parse_json


def load_subject(
    model: str,
    hook_point: str,
    *,
    target_hook_point: str | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    trust_remote_code: bool = False,
) -> Subject:
    """Load a Hugging Face causal language model from a local directory or the hub, frozen and in evaluation mode.

    target_hook_point: the target site of a transcoder.
    trust_remote_code: whether a model may run code that it brings with it.

    TransformerLens is imported, and the model wrapped in its bridge, only for a hook point that the plain model does
    not have. UsageError for a model that is missing, broken or of an unknown type, and for an unknown hook point.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    device = torch.device(device)
    refuse_encoder(model, peek_model(model))
    if dtype == torch.bfloat16 and device.type != "cuda":
        raise OptionError("model", f"{model!r}: bfloat16 is for CUDA; on {device.type} it is far slower. Use float32.")
    directory = local_directory(model)
    if directory is not None:
        check_weight_files(directory)
    source = str(directory) if directory is not None else model
    settings: dict[str, Any] = {
        "trust_remote_code": trust_remote_code,
        "local_files_only": local_only(model, directory),
    }
    with quiet(), explained(source):
        # transformers only logs a mismatch; it becomes an error below.
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True, **settings
        )
        network, loading = loaded
        tokenizer = AutoTokenizer.from_pretrained(source, **settings)
    if loading["missing_keys"]:
        missing = sorted(loading["missing_keys"])
        raise UsageError(
            f"{model}: the weights lack {len(missing)} tensors that config.json asks for, such as {missing[0]!r}. "
            "Download or save the model again, configuration and weights together."
        )
    if loading["mismatched_keys"]:
        key, there, asked = sorted(loading["mismatched_keys"])[0]
        raise UsageError(
            f"{model}: the weights do not fit config.json: {key!r} is {list(there)} and should be {list(asked)}. "
            "Download or save the model again, configuration and weights together."
        )
    if len(tokenizer) <= len(tokenizer.all_special_ids):  # transformers makes an empty one if the files are missing
        raise UsageError(f"{model}: has no tokenizer (tokenizer.json). Download or save it again, next to the weights.")
    network.eval().requires_grad_(False)
    network.to(device)
    names = [hook_point] if target_hook_point is None else [hook_point, target_hook_point]
    sites, network = _sites(network, tokenizer, names, source, device, dtype)
    target_site = sites[1] if len(sites) > 1 else None
    return Subject(network, tokenizer, sites[0], name=model, directory=directory, target_site=target_site)


def peek_model(model: str) -> dict[str, Any]:
    """What config.json says, without loading weights: `model_type`, `hidden_size`, `layers`, `context`,
    `encoder` (it reads and does not write), `images` (what it reads).

    Unknown keys are left out: all of them for a hub name that is not in the local cache. UsageError for a directory
    without a readable configuration, or of a model type that transformers does not know.
    """
    directory = local_directory(model)
    if directory is not None:
        path = directory / "config.json"
        if not path.is_file():
            raise UsageError(
                f"{path}: there is no such file, so {model!r} is not a Hugging Face model. Name its directory."
            )
    else:
        cached = _cached(model, "config.json")
        if cached is None:
            return {}
        path = cached
    try:
        table = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: is not valid JSON: {error}. Download or save the model again.") from None
    kind = table.get("model_type") if isinstance(table, dict) else None
    if not isinstance(kind, str):
        raise UsageError(f"{path}: has no model_type. Download or save the model again with transformers.")
    if "auto_map" not in table and not _is_known(kind):
        import transformers

        raise UsageError(
            f"{path}: model_type {kind!r} is unknown to transformers {transformers.__version__}. "
            "Upgrade transformers, or choose another model."
        )
    found: dict[str, Any] = {"model_type": kind, "encoder": is_encoder(table), "images": reads_images(table)}
    text = table.get("text_config") if isinstance(table.get("text_config"), dict) else table
    names = {
        "hidden_size": ("hidden_size", "n_embd", "d_model"),
        "layers": ("num_hidden_layers", "n_layer", "num_layers"),
        "context": ("max_position_embeddings", "n_positions", "max_seq_len"),
    }
    for key, spellings in names.items():
        values = [text[spelling] for spelling in spellings if isinstance(text.get(spelling), int)]
        if values:
            found[key] = values[0]
    return found


def refuse_encoder(model: str, known: dict[str, Any]) -> None:
    """OptionError if a model does not write, so that no language model can be made of it. known: from `peek_model`."""
    if known.get("encoder"):
        raise OptionError(
            "model",
            f"{model!r}: is an encoder ({known['model_type']}), which reads and does not write. Use the source encoder: "
            'use = "encoder".',
        )


def _is_known(model_type: str) -> bool:
    """Whether transformers has this type of model. Most have a folder of the same name, which spares its import."""
    name = model_type.replace("-", "_")
    spec = importlib.util.find_spec("transformers")
    folders = spec.submodule_search_locations if spec else None
    if any(Path(folder, "models", name, f"configuration_{name}.py").is_file() for folder in folders or ()):
        return True
    from transformers import CONFIG_MAPPING

    return model_type in CONFIG_MAPPING


def model_digest(model: str) -> str | None:
    """`Subject.digest` of this model, without loading it; None for a hub name that is not in the local cache."""
    directory = local_directory(model)
    if directory is not None:
        return directory_digest(directory)
    cached = _cached(model, "config.json")  # .../snapshots/COMMIT/config.json
    return None if cached is None else hub_digest(model, cached.parent.name)


def _sites(
    network: nn.Module, tokenizer: Any, names: list[str], source: str, device: torch.device, dtype: torch.dtype
) -> tuple[list[Site], nn.Module]:
    """The sites, and the model that has them: the plain one, or a TransformerLens bridge around it."""
    try:
        return [resolve(network, name) for name in names], network
    except UsageError:
        if not any("hook_" in name and not RESIDUAL.fullmatch(name) for name in names):
            raise
    from transformer_lens.model_bridge import TransformerBridge

    with quiet(), explained(source):
        bridge = TransformerBridge.boot_transformers(
            source, hf_model=network, tokenizer=tokenizer, device=str(device), dtype=dtype
        )
    bridge.eval().requires_grad_(False)
    return [resolve(bridge, name) for name in names], bridge


def local_directory(model: str) -> Path | None:
    """The directory `model`, or None for a hub name. UsageError for a path that does not exist."""
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if path.is_file():
        raise OptionError("model", f"{model!r}: is a file. Name the directory that holds config.json and the weights.")
    if not model or model.startswith((".", "/", "~")) or model.count("/") > 1 or "\\" in model:
        raise OptionError("model", f"{model!r}: there is no such directory.")
    return None


def _cached(model: str, name: str) -> Path | None:
    """A file of a hub model in the local cache."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(model, name)
    except HFValidationError:
        raise OptionError("model", f"{model!r}: is neither a directory nor a name on the Hugging Face hub.") from None
    return Path(found) if isinstance(found, str) else None


def local_only(model: str, directory: Path | None) -> bool:
    """Whether to load without the network. The hub is asked about a model that is not in the local cache."""
    weights = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")
    if directory is not None or (_cached(model, "config.json") and any(_cached(model, name) for name in weights)):
        return True
    fix = "Name a local directory with config.json, or a model of the hub (https://huggingface.co/models)."
    ask_hub("model", model, fix)
    return False


def check_weight_files(directory: Path) -> None:
    """Open every safetensors file: the header tells whether the file is whole."""
    from safetensors import SafetensorError, safe_open

    weights = sorted(directory.glob("*.safetensors"))
    if not weights and not list(directory.glob("*.bin")):
        raise UsageError(f"{directory}: there are no weights (model.safetensors). Download or save the model again.")
    for path in weights:
        try:
            with safe_open(path, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise UsageError(
                f"{path}: is truncated or not a safetensors file ({error}). Download or save it again."
            ) from None


@contextmanager
def explained(model: str) -> Iterator[None]:
    """Turn whatever transformers raises about a model's files into one UsageError."""
    try:
        yield
    except SaekitError:
        raise
    except Exception as error:  # OSError, ValueError, KeyError, RuntimeError, ..., depending on the model type
        broken = _broken_json(Path(model))
        if broken:
            raise UsageError(f"{broken}. Download or save the model again.") from None
        raise OptionError(
            "model",
            f"{model!r}: cannot be loaded: {type(error).__name__}: {_first_line(error)} "
            "Check its directory, or download or save it again.",
        ) from error


def _broken_json(directory: Path) -> str:
    """The first JSON file of a directory that cannot be read, and why; empty if there is none."""
    for path in sorted(directory.glob("*.json")):
        try:
            parse_json(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            return f"{path}: is not valid JSON: {error}"
    return ""


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "")


@contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers' progress bars and remarks: the terminal belongs to the run."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
