"""The subject: the language model whose activations are studied, its tokenizer, and the site (for a transcoder, two)."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from saekit.activations.batch import TokenBatch
from saekit.activations.shuffle import stop_point
from saekit.activations.sites import Site, run_to_site, run_to_sites
from saekit.errors import UsageError


class Subject:
    """A model with a tokenizer and a site.

    site: where an SAE reads its activations.
    target_site: where a transcoder's targets are; None for an SAE.
    model: takes token ids [n, T] and `attention_mask` [n, T], and returns logits [n, T, vocab] or an object with `.logits`.
    name: the directory or the hub name it was loaded from.
    directory: the local directory; None for a hub name.

    A prefetching source and an evaluation may use one subject from two threads. Hooks belong to the model, not to a
    thread, so `lock` is held during a forward and while an activation is `replaced`. Other threads wait meanwhile: do
    not ask for prefetched batches of the same subject inside `replaced`.
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
        """The Hugging Face configuration of the text model; None if the model has none."""
        config: Any = getattr(getattr(self.model, "original_model", self.model), "config", None)
        return config.get_text_config() if hasattr(config, "get_text_config") else config

    @property
    def device(self) -> torch.device:
        """Where the model's parameters are."""
        return next(self.model.parameters()).device

    @property
    def bos_token_id(self) -> int | None:
        """The token at the beginning of a text, if the tokenizer has one."""
        return getattr(self.tokenizer, "bos_token_id", None)

    @property
    def context(self) -> int | None:
        """How many positions the model takes; None if its configuration sets no limit."""
        return getattr(self.config, "max_position_embeddings", None)

    @torch.no_grad()
    def activations(self, batch: TokenBatch) -> Tensor:
        """The activation at the site, [n, T, d], in the model's dtype. No layer above the site runs."""
        with self._alone():
            return run_to_site(self.site, lambda: self._forward(batch))

    @torch.no_grad()
    def pair(self, batch: TokenBatch) -> tuple[Tensor, Tensor]:
        """The activations at the site, [n, T, d], and at the target site, [n, T, d_out], from one forward.

        The forward stops at the later of the two. Without a target site both are the same tensor."""
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
        """In every forward inside, replace what an SAE or a transcoder reconstructs by `function(x, target)`.

        x: [n, T, d], the activation at the site.
        target: [n, T, d_out], the activation at the target site, or `x` if there is none; the result replaces it.

        UsageError if the target site comes before the site."""
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
                        "it cannot be replaced in the same forward. Leave out metrics and analyzers that need the logits."
                    )
                return function(x, target)

            with self.target_site.replaced(replace):
                yield

    def width(self) -> int:
        """The number of dimensions `d` at the site, found by a forward of 2 rows of 3 tokens.

        UsageError if the activation is not one vector at each position of each row.
        """
        return self.widths()[0]

    def widths(self) -> tuple[int, int]:
        """The numbers of dimensions at the site and at the target site; see `width`."""
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
        """A SHA-256 that identifies configuration, weights and tokenizer.

        It is taken of the files of a local directory, or of a hub name with its commit, if that is known.
        """
        if self._digest is None:
            if self.directory is not None:
                self._digest = directory_digest(self.directory)
            else:
                commit = getattr(self.config, "_commit_hash", None) or ""
                self._digest = hub_digest(self.name, commit)
        return self._digest

    @contextmanager
    def _alone(self) -> Iterator[None]:
        while not self.lock.acquire(timeout=0.1):
            stop_point()  # a waiting background thread may be told to stop
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


def hub_digest(name: str, commit: str) -> str:
    """The digest of a model of the Hugging Face hub."""
    return hashlib.sha256(f"{name}@{commit}".encode()).hexdigest()


def directory_digest(directory: Path) -> str:
    """The digest of a model in a local directory."""
    digest = hashlib.sha256()
    wanted = (".json", ".safetensors", ".bin", ".model", ".txt")
    for path in sorted(p for p in directory.iterdir() if p.is_file() and p.suffix in wanted):
        with path.open("rb") as file:
            digest.update(f"{path.name}\0{hashlib.file_digest(file, 'sha256').hexdigest()}\0".encode())
    return digest.hexdigest()
