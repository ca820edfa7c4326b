"""`SaeLensFormat`: an architecture in the words of sae_lens, which every other library's format is translated from and to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from saekit.sae.base import SparseAutoencoder


@dataclass(frozen=True)
class SaeLensFormat:
    """What other libraries call an architecture, and how its options and tensors are written there.

    name: the architecture of sae_lens that computes the same; None if there is none.
    transcoder: the same for a transcoder.
    skip_transcoder: the same for a transcoder with `skip`.
    known_as: the names, in any library, of what this architecture can load: `("sae_lens:topk", "sparsify:topk")`.

    An architecture names its format in one line, `interop = SaeLensFormat("standard", ...)`. If it has options that other
    libraries keep under other names, or tensors of other names or shapes, it derives a format of its own and overrides
    the methods below.
    """

    name: str | None = None
    transcoder: str | None = None
    skip_transcoder: str | None = None
    known_as: tuple[str, ...] = ()

    @classmethod
    def of(cls, architecture: type[SparseAutoencoder]) -> SaeLensFormat:
        """The format that the class itself names. A subclass inherits none: with another gate it computes something else."""
        return vars(architecture).get("interop") or cls()

    def names_in(self, library: str) -> tuple[str, ...]:
        """What `library` calls what this architecture can load."""
        pairs = (name.partition(":") for name in self.known_as)
        return tuple(name for of, _, name in pairs if of == library)

    def counterpart(self, sae: SparseAutoencoder) -> str | None:
        """What sae_lens calls this SAE, or None if sae_lens has nothing that computes the same.

        A transcoder without `skip` between two sites of equal width computes the same as an SAE that does not subtract b_dec
        from its input."""
        if sae.skip:
            return self.skip_transcoder
        if not sae.transcoder:
            return self.name
        return self.transcoder or (self.name if sae.d_out == sae.d_in else None)

    def options(self, cfg: Mapping[str, Any]) -> dict[str, Any]:
        """The options of an SAE that another library made, from its keys in sae_lens's words (`k`, ...).

        Decoder rows keep the norms they have. A KeyError is reported to the user as a key that is missing."""
        return {"decoder_norm": "free"}

    def keys(self, sae: SparseAutoencoder) -> dict[str, Any]:
        """The keys that `options` reads, of this SAE: the inverse of `options`."""
        return {}

    def to(self, sae: SparseAutoencoder) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """(the architecture's own keys of cfg.json, tensors) as sae_lens has them."""
        return {"apply_b_dec_to_input": sae.reads_centred}, sae.state_dict()

    def state(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The SAE's state dict, from the tensors that sae_lens has: the inverse of `to`."""
        return dict(tensors)
