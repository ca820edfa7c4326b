"""The subject: a language model, its tokenizer, and the site whose activations are studied (for a transcoder, two)."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from saekit.activations.batch import TokenBatch
from saekit.activations.shuffle import stop_point
from saekit.activations.sites import RESIDUAL, Site, resolve, run_to_site, run_to_sites
from saekit.errors import SaekitError, UsageError

_TIMEOUT = 10.0  # seconds for the hub to say whether it has a model


class Subject:
    """A model with a tokenizer and a site; every forward of saekit's goes through here.

    site: whose activations an SAE reads. target_site: for a transcoder, whose activations it rebuilds; else None.
    model: takes token ids [n, T] and `attention_mask` [n, T], and returns logits [n, T, vocab] or an object with them.
    name: the directory or the hub name it came from. directory: the local directory, None for a hub name.

    A prefetching source and an evaluation may use one subject from two threads. Hooks belong to the model and not
    to a thread, so `lock` is held during a forward and for as long as an activation is `replaced`: another thread
    waits meanwhile, so do not ask for prefetched batches of this subject inside `replaced`.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        site: Site,
        *,
        name: str,
        directory: Path | None = None,
        target_site: Site | None = None,
    ):
        self.model = model
        self.tokenizer = tokenizer
        self.site = site
        self.target_site = target_site
        self.name = name
        self.directory = directory
        self.lock = threading.RLock()
        self._digest: str | None = None
        self._widths: tuple[int, int] | None = None

    @property
    def config(self) -> Any:
        """The Hugging Face configuration of the text model; None where the model has none."""
        config: Any = getattr(getattr(self.model, "original_model", self.model), "config", None)
        return config.get_text_config() if hasattr(config, "get_text_config") else config

    @property
    def device(self) -> torch.device:
        """Where the model's parameters are."""
        return next(self.model.parameters()).device

    @property
    def bos_token_id(self) -> int | None:
        """The token that begins a text, if the tokenizer has one."""
        return getattr(self.tokenizer, "bos_token_id", None)

    @property
    def context(self) -> int | None:
        """The most positions that the model takes; None where its configuration sets no limit."""
        return getattr(self.config, "max_position_embeddings", None)

    @torch.no_grad()
    def activations(self, batch: TokenBatch) -> Tensor:
        """The activation at the site, [n, T, d], in the model's dtype; no layer above the site runs."""
        with self._alone():
            return run_to_site(self.site, lambda: self._forward(batch))

    @torch.no_grad()
    def pair(self, batch: TokenBatch) -> tuple[Tensor, Tensor]:
        """The activations at the site, [n, T, d], and at the target's, [n, T, d_out], of one forward.

        It stops at the later of the two. Without a target's site both are the same tensor."""
        if self.target_site is None:
            activation = self.activations(batch)
            return activation, activation
        with self._alone():
            x, target = run_to_sites([self.site, self.target_site], lambda: self._forward(batch))
        return x, target

    @torch.no_grad()
    def logits(self, batch: TokenBatch) -> Tensor:
        """The whole model's logits, [n, T, vocab]."""
        with self._alone():
            output = self._forward(batch)
        return output if isinstance(output, Tensor) else output.logits

    @contextmanager
    def replaced(self, function: Callable[[Tensor], Tensor]) -> Iterator[None]:
        """Replace the activation at the site by `function(activation)` in every forward inside: [n, T, d] -> [n, T, d]."""
        with self._alone(), self.site.replaced(function):
            yield

    @contextmanager
    def spliced(self, function: Callable[[Tensor, Tensor], Tensor]) -> Iterator[None]:
        """Replace what an SAE or a transcoder rebuilds by `function(x, target)` in every forward inside.

        x: [n, T, d], the activation at the site. target: [n, T, d_out], that at the target's site, or `x` again where
        there is none; the result takes its place. UsageError where the target's site comes before the site."""
        if self.target_site is None:
            with self.replaced(lambda activation: function(activation, activation)):
                yield
            return
        with self._alone(), self.site.capture() as captured:

            def replace(target: Tensor) -> Tensor:
                x = captured.take()
                if x is None:
                    raise UsageError(
                        f"target_hook_point = {self.target_site.name!r}: comes before the hook point {self.site.name!r}, so "  # type: ignore[union-attr]
                        "nothing read there can take its place in the same forward. Leave out what splices it."
                    )
                return function(x, target)

            with self.target_site.replaced(replace):
                yield

    def width(self) -> int:
        """The number of dimensions `d` at the site, from a forward of 2 rows of 3 tokens.

        UsageError where the activation is not a vector at each position of each row.
        """
        return self.widths()[0]

    def widths(self) -> tuple[int, int]:
        """The numbers of dimensions at the site and at the target's; see `width`."""
        if self._widths is None:
            tokens = torch.zeros(2, 3, dtype=torch.long)
            everywhere = torch.ones(2, 3, dtype=torch.bool)
            pair = self.pair(TokenBatch(tokens, everywhere, everywhere, torch.arange(2)))
            for site, activation in zip((self.site, self.target_site or self.site), pair, strict=True):
                if activation.ndim != 3 or tuple(activation.shape[:2]) != (2, 3):
                    raise UsageError(
                        f"hook point {site.name!r}: for 2 rows of 3 tokens the activation has shape "
                        f"{list(activation.shape)}; it must be [2, 3, d], a vector at each position. Choose another hook point."
                    )
            self._widths = pair[0].shape[2], pair[1].shape[2]
        return self._widths

    def digest(self) -> str:
        """sha256 that identifies configuration, weights and tokenizer.

        For a local directory over the contents of its files; for a hub name over the name and the commit, if known.
        """
        if self._digest is None:
            if self.directory is not None:
                self._digest = _directory_digest(self.directory)
            else:
                commit = getattr(self.config, "_commit_hash", None) or ""
                self._digest = _hub_digest(self.name, commit)
        return self._digest

    @contextmanager
    def _alone(self) -> Iterator[None]:
        while not self.lock.acquire(timeout=0.1):
            stop_point()  # a background thread may be told to stop while it waits
        try:
            yield
        finally:
            self.lock.release()

    def _forward(self, batch: TokenBatch) -> Any:
        device = self.device
        options: dict[str, Any] = {"attention_mask": batch.mask.to(device, torch.long)}
        if getattr(self.config, "use_cache", False) and not hasattr(self.model, "hook_dict"):
            options["use_cache"] = False
        return self.model(batch.tokens.to(device), **options)


def load_subject(
    model: str,
    hook_point: str,
    *,
    target_hook_point: str | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    trust_remote_code: bool = False,
) -> Subject:
    """A Hugging Face causal language model, from a local directory or the hub, frozen and in evaluation mode.

    target_hook_point: the other site of a transcoder. trust_remote_code: let a model run code that it brings with it.
    TransformerLens is imported, and the model wrapped in its bridge, only for a hook point that the plain model does
    not have.

    UsageError for a model that is missing, broken or of an unknown type, and for a hook point that means nothing.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    device = torch.device(device)
    if dtype == torch.bfloat16 and device.type != "cuda":
        raise UsageError(f"model {model!r}: bfloat16 is for CUDA; on {device.type} it is far slower. Use float32.")
    directory = _local_directory(model)
    if directory is not None:
        peek_model(model)
        _check_weight_files(directory)
    source = str(directory) if directory is not None else model
    settings: dict[str, Any] = {
        "trust_remote_code": trust_remote_code,
        "local_files_only": _local_only(model, directory),
    }
    with _quiet(), _explained(source):
        # A mismatch is only told of in a log; here it is an error below.
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True, **settings
        )
        network, loading = loaded
        tokenizer = AutoTokenizer.from_pretrained(source, **settings)
    if loading["missing_keys"]:
        missing = sorted(loading["missing_keys"])
        raise UsageError(
            f"{model}: the weights lack {len(missing)} tensors that its config.json asks for, such as {missing[0]!r}. "
            "Download or save the model again, configuration and weights together."
        )
    if loading["mismatched_keys"]:
        key, there, asked = sorted(loading["mismatched_keys"])[0]
        raise UsageError(
            f"{model}: the weights do not fit config.json: {key!r} is {list(there)} and should be {list(asked)}. "
            "Download or save the model again, configuration and weights together."
        )
    if len(tokenizer) <= len(tokenizer.all_special_ids):  # transformers makes an empty one where the files are missing
        raise UsageError(f"{model}: has no tokenizer (tokenizer.json). Download or save it again, next to the weights.")
    network.eval().requires_grad_(False)
    network.to(device)
    names = [hook_point] if target_hook_point is None else [hook_point, target_hook_point]
    sites, network = _sites(network, tokenizer, names, source, device, dtype)
    target_site = sites[1] if len(sites) > 1 else None
    return Subject(network, tokenizer, sites[0], name=model, directory=directory, target_site=target_site)


def peek_model(model: str) -> dict[str, Any]:
    """What config.json says, without loading weights: `model_type`, `hidden_size`, `layers`, `context`.

    A key is left out where it is not known: all of them for a hub name that is not in the local cache.
    UsageError for a directory that holds no readable configuration, or one of a type that transformers does not know.
    """
    directory = _local_directory(model)
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
        table = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: is not valid JSON: {error}. Download or save the model again.") from None
    kind = table.get("model_type") if isinstance(table, dict) else None
    if not isinstance(kind, str):
        raise UsageError(f"{path}: has no model_type. Download or save the model again with transformers.")
    from transformers import CONFIG_MAPPING

    if kind not in CONFIG_MAPPING and "auto_map" not in table:
        import transformers

        raise UsageError(
            f"{path}: model_type {kind!r} is unknown to transformers {transformers.__version__}. "
            "Upgrade transformers, or choose another model."
        )
    found: dict[str, Any] = {"model_type": kind}
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


def model_digest(model: str) -> str | None:
    """What `Subject.digest` gives of this model, without loading it; None for a hub name that is not in the local cache."""
    directory = _local_directory(model)
    if directory is not None:
        return _directory_digest(directory)
    cached = _cached(model, "config.json")  # .../snapshots/COMMIT/config.json
    return None if cached is None else _hub_digest(model, cached.parent.name)


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

    with _quiet(), _explained(source):
        bridge = TransformerBridge.boot_transformers(
            source, hf_model=network, tokenizer=tokenizer, device=str(device), dtype=dtype
        )
    bridge.eval().requires_grad_(False)
    return [resolve(bridge, name) for name in names], bridge


def _local_directory(model: str) -> Path | None:
    """The directory that `model` names, None for a hub name; UsageError for a path where nothing is."""
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if path.is_file():
        raise UsageError(f"model {model!r}: is a file. Name the directory that holds config.json and the weights.")
    if not model or model.startswith((".", "/", "~")) or model.count("/") > 1 or "\\" in model:
        raise UsageError(f"model {model!r}: there is no such directory.")
    return None


def _cached(model: str, name: str) -> Path | None:
    """A file of a hub model in the local cache."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(model, name)
    except HFValidationError:
        raise UsageError(f"model {model!r}: is neither a directory nor a name on the Hugging Face hub.") from None
    return Path(found) if isinstance(found, str) else None


def _local_only(model: str, directory: Path | None) -> bool:
    """Whether to load without the network; asks the hub, briefly, about a model that is not in the local cache.

    transformers alone retries for more than twenty seconds where there is no network.
    """
    weights = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")
    if directory is not None or (_cached(model, "config.json") and any(_cached(model, name) for name in weights)):
        return True
    fix = "Name a local directory with config.json, or a model of the hub (https://huggingface.co/models)."
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        raise UsageError(
            f"model {model!r}: no such directory, not in the local cache, and HF_HUB_OFFLINE is set. {fix}"
        )
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    try:
        HfApi().model_info(model, timeout=_TIMEOUT)
    except GatedRepoError:
        raise UsageError(
            f"model {model!r}: its owner asks for consent. Accept on its page, then log in: hf auth login."
        ) from None
    except RepositoryNotFoundError:
        raise UsageError(f"model {model!r}: neither a directory nor a model of the hub. {fix}") from None
    except Exception as error:  # whichever of the client's network errors
        raise UsageError(
            f"model {model!r}: no such directory, and the Hugging Face hub cannot be reached "
            f"({type(error).__name__}: {_first_line(error)}). {fix}"
        ) from None
    return False


def _check_weight_files(directory: Path) -> None:
    """Open every safetensors file; its header tells whether the file is whole."""
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


def _hub_digest(name: str, commit: str) -> str:
    return hashlib.sha256(f"{name}@{commit}".encode()).hexdigest()


def _directory_digest(directory: Path) -> str:
    digest = hashlib.sha256()
    wanted = (".json", ".safetensors", ".bin", ".model", ".txt")
    for path in sorted(p for p in directory.iterdir() if p.is_file() and p.suffix in wanted):
        with path.open("rb") as file:
            digest.update(f"{path.name}\0{hashlib.file_digest(file, 'sha256').hexdigest()}\0".encode())
    return digest.hexdigest()


@contextmanager
def _explained(model: str) -> Iterator[None]:
    """Whatever transformers raises about a model's files, as one UsageError."""
    try:
        yield
    except SaekitError:
        raise
    except Exception as error:  # OSError, ValueError, KeyError, RuntimeError, ... by model type
        broken = _broken_json(Path(model))
        if broken:
            raise UsageError(f"{broken}. Download or save the model again.") from None
        raise UsageError(
            f"model {model!r}: cannot be loaded: {type(error).__name__}: {_first_line(error)} "
            "Check its directory, or download or save it again."
        ) from error


def _broken_json(directory: Path) -> str:
    """Which of a directory's JSON files cannot be read, and why; empty where all can."""
    for path in sorted(directory.glob("*.json")):
        try:
            json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            return f"{path}: is not valid JSON: {error}"
    return ""


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "")


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' progress bars and remarks: the terminal belongs to the run."""
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
