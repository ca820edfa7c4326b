"""`Foreign`: an SAE of another library in the words of sae_lens, and how it becomes an architecture of ours."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saekit.errors import PluginError, UsageError, near_names
from saekit.plugins import Registry
from saekit.registered import OWN_DISTRIBUTION, RegisteredComponent
from saekit.sae.base import SparseAutoencoder
from saekit.sae.formats import SavedSAE, check_widths, fill
from saekit.sae.saelens_format import SaeLensFormat


@dataclass(frozen=True)
class Foreign:
    """An SAE as another library keeps it.

    library, architecture: the library, and what it calls the architecture.
    where: the file that errors name.
    d_in, d_sae, d_out: widths; d_out is None unless it is a transcoder.
    centred: whether b_dec is subtracted from the input of the encoder.
    tensors: with the names and shapes of sae_lens.
    cfg: what else the architecture needs, under the keys of sae_lens (`k`, ...).
    metadata: what is known about it (model_name, hook_name, ...).
    skip: whether a linear map of the input is added to what the latents rebuild.
    """

    library: str
    architecture: str
    where: Path | str
    d_in: int
    d_sae: int
    d_out: int | None
    centred: bool
    tensors: dict[str, Tensor]
    cfg: Mapping[str, Any] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)
    skip: bool = False


def take_in(foreign: Foreign, registry: Registry) -> SavedSAE:
    """The SAE in float32, with the architecture that claims its name. UsageError if none does."""
    component = _component(foreign, registry)
    try:
        options = SaeLensFormat.of(component.load()).options(foreign.cfg)
    except KeyError as error:
        raise UsageError(
            f"{foreign.where}: key {error} is missing, which {foreign.library}'s {foreign.architecture} has."
        ) from None
    if foreign.skip:
        options["skip"] = True
    options = component.validate(options, str(foreign.where))
    for name, tensor in foreign.tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise UsageError(f"{foreign.where}: {name} holds values that are not finite.")
    check_widths(foreign.tensors, foreign.d_in, foreign.d_sae, foreign.d_out or foreign.d_in, foreign.where)
    sae = component.build(options, foreign.d_in, foreign.d_sae, foreign.d_out)
    sae.reads_centred = foreign.centred
    fill(sae, foreign.tensors, foreign.where)
    return SavedSAE(sae, component.qualified_name, {k: v for k, v in foreign.metadata.items() if v is not None})


def _component(foreign: Foreign, registry: Registry) -> RegisteredComponent:
    """The installed architecture that claims the library's name; a third party's comes before a built-in one."""
    found: list[RegisteredComponent] = []
    known: set[str] = set()
    for component in registry.components("architecture"):
        try:
            names = SaeLensFormat.of(component.load()).names_in(foreign.library)
        except PluginError:  # a broken plugin stops only a run that names it
            continue
        known |= set(names)
        if foreign.architecture in names:
            found.append(component)
    if not found:
        raise UsageError(
            f"{foreign.where}: no installed architecture computes {foreign.library}'s {foreign.architecture!r}."
            f"{near_names(foreign.architecture, known)} Known: {', '.join(sorted(known)) or 'none'}. A plugin can add it "
            "(known_as in its SaeLensFormat)."
        )
    others = [c for c in found if c.distribution != OWN_DISTRIBUTION]
    if len(others) > 1:
        claims = " and ".join(f"{c.qualified_name} ({c.distribution} {c.version})" for c in others)
        raise UsageError(
            f"{foreign.where}: {claims} both claim {foreign.library}'s {foreign.architecture}. Disable one "
            "(SAEKIT_DISABLE_PLUGINS)."
        )
    return (others or found)[0]


def exported_as(library: str, saved: SavedSAE) -> tuple[str, ...]:
    """What `library` calls the architecture of `saved`. UsageError if the library cannot compute the same."""
    names = SaeLensFormat.of(type(saved.sae)).names_in(library)
    if not names:
        raise UsageError(f"--to {library}: {library} has nothing that computes what {saved.name} does.")
    if saved.sae.d_out != saved.sae.d_in:
        raise UsageError(
            f"--to {library}: the SAE reads width {saved.sae.d_in} and rebuilds width {saved.sae.d_out}, but {library}'s "
            "files have one width."
        )
    return names


def key_of(sae: SparseAutoencoder, name: str) -> Any:
    """The value of a key in the words of sae_lens, such as `k`."""
    keys = SaeLensFormat.of(type(sae)).keys(sae)
    if name not in keys:
        raise PluginError(f"{type(sae).__name__}: its SaeLensFormat has no {name!r}. Return it from keys(sae).")
    return keys[name]


def recentred(sae: SparseAutoencoder, centred: bool) -> dict[str, Tensor]:
    """The tensors, as sae_lens has them, of the same function with b_dec subtracted from the input (or not).

    (x - b_dec) W_enc = x W_enc - b_dec W_enc, so the difference moves into the encoder's biases."""
    if sae.reads_centred != centred:
        sae = copy.deepcopy(sae)
        shift = sae.b_dec.detach().double() @ sae.W_enc.detach().double()  # [d_sae]
        sae.shift_pre_activations(shift if centred else -shift)
        sae.reads_centred = centred
    return SaeLensFormat.of(type(sae)).to(sae)[1]
