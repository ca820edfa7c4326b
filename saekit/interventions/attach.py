"""`attach`: an SAE in a model's forward that is read, replaces the activation by its reconstruction, or edits latents."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from enum import StrEnum
from types import TracebackType
from typing import Self

import torch
from torch import Tensor, nn

from saekit.activations.sites import Site
from saekit.activations.trained_positions import TrainedPositions
from saekit.errors import UsageError
from saekit.interventions.downstream import ReadAfter, site_of
from saekit.interventions.edits import Edit, EditTable, Statistics, change_of, replaced_columns
from saekit.interventions.positions import Positions, TextTracker, checked_positions, chosen
from saekit.numerics import own_numerics
from saekit.sae.base import SparseAutoencoder
from saekit.sae.code import Code


class Mode(StrEnum):
    """What an attached SAE passes on: BYPASS the activation, bit for bit; NO_CHANGE its reconstruction; EDIT the
    activation with the effect of the edited latents."""

    BYPASS = "bypass"
    NO_CHANGE = "no_change"
    EDIT = "edit"


class Attachment:
    """An SAE at a site of a model, made by `attach` or `read`. It acts inside its `with` block and can be used again.

    site: where it is attached.
    sae: the SAE.
    mode: what it passes on.
    codes: with `record`, the codes of the latest text, one for each forward.
    visits: how often a forward has reached the site in the latest block.
    changed: how many positions were changed in the latest block.
    """

    def __init__(
        self,
        model: nn.Module,
        sae: SparseAutoencoder,
        site: Site,
        mode: Mode,
        *,
        edits: EditTable | None = None,
        keep_error: bool = True,
        positions: Positions | None = None,
        record: bool = False,
        reads: Iterable[Site] = (),
        after: Iterable[Attachment] = (),
    ) -> None:
        self.model, self.sae, self.site, self.mode = model, sae, site, mode
        self.codes: list[Code] = []
        self.visits = self.changed = 0
        self._edits = edits or EditTable({}, sae.d_sae)
        self._keep_error, self._record = keep_error, record
        self._positions = positions
        if positions is None and not sae.trained_positions.everywhere:
            self._positions = sae.trained_positions
        self._reads, self._after = list(reads), list(after)
        self._acts = mode is Mode.NO_CHANGE or (mode is Mode.EDIT and bool(len(self._edits) or not keep_error))
        self._text = TextTracker(model) if record or self._positions is not None else None
        self._orders: list[ReadAfter] = []
        self._stack: ExitStack | None = None

    @property
    def code(self) -> Code:
        """The code of the latest forward before this attachment's edits, with a row for each of the n * T positions."""
        if not self.codes:
            fix = "Run the model inside the block." if self._record else "Attach with record=True."
            raise UsageError(f"the SAE at {self.site.name!r} has recorded no code. {fix}")
        return self.codes[-1]

    @property
    def active(self) -> bool:
        """Whether its block is open."""
        return self._stack is not None

    def restart(self) -> None:
        """The next forward begins a new text. Needed only if the model's arguments do not show it (see docs/interventions.md)."""
        if self._text is not None:
            self._text.restart()

    def __enter__(self) -> Self:
        if self.active:
            raise UsageError(f"the SAE at {self.site.name!r} is attached already. Make another with saekit.attach.")
        for edit in self._after:
            if not edit.active:
                raise UsageError(
                    f"reading at {self.site.name!r} after the edit at {edit.site.name!r}: the edit is not attached. "
                    "Open its block first."
                )
        self.codes, self.visits, self.changed = [], 0, 0
        self._orders = [ReadAfter(edit, self.site.name) for edit in self._after]
        with ExitStack() as stack:
            if self._text is not None:
                stack.enter_context(self._text.listening())
            stack.enter_context(self.site.replaced(self._visit))
            for site in self._reads:
                stack.enter_context(site.replaced(ReadAfter(self, site.name).passed))
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        stack, self._stack = self._stack, None
        if stack is not None:
            stack.close()
        if kind is None and self._acts and not self.changed:
            why = "its positions chose none" if self.visits else "no forward of the model reached it"
            warnings.warn(f"the SAE at {self.site.name!r} changed nothing: {why}.", stacklevel=2)

    def _visit(self, activation: Tensor) -> Tensor:
        """What replaces the activation: [n, T, d], or [n, d] if there are no positions."""
        for order in self._orders:
            order.check()
        self._check(activation)
        with own_numerics(self.sae, activation.device):
            passed = self._passed_on(activation)
        self.visits += 1  # the edit counts as applied from here on
        return passed

    def _passed_on(self, activation: Tensor) -> Tensor:
        lead = activation.shape[:-1]  # [n, T]
        stretch = None
        if self._text is not None and len(lead) == 2:
            stretch = self._text.stretch(lead[0], lead[1], activation.device)
        mask = None  # [n, T]; None for everywhere
        if self._positions is not None and stretch is not None:
            mask = chosen(self._positions, stretch)
        rows = activation.reshape(-1, activation.shape[-1])  # [n * T, d]
        code = None
        if self._record:
            code = self.sae.encode(self._read(rows))
            begins = stretch is None or stretch.past == 0
            self.codes = [code] if begins else [*self.codes, code]
        if not self._acts:
            return activation
        if mask is not None:
            rows, code = activation[mask], None  # [m, d]; encoded again, so that recording does not change the rounding
        self.changed += len(rows)
        if not len(rows):
            return activation

        def at_rows(value: Tensor) -> Tensor:  # broadcasts over [n, T] -> [m]
            try:
                spread = value.to(activation.device).expand(lead)
            except RuntimeError:
                raise UsageError(
                    f"hook point {self.site.name!r}: a strength of shape {list(value.shape)} does not fit a forward of "
                    f"{list(lead)}. Give one number, or a tensor that broadcasts to it."
                ) from None
            return spread.reshape(-1) if mask is None else spread[mask]

        if self.mode is Mode.EDIT and self._keep_error:
            change = self._change(rows, code, at_rows)
            wide = torch.promote_types(rows.dtype, change.dtype)
            new = rows.to(wide) + change.to(wide)
        else:
            new = self._rebuilt(rows, code, at_rows)
        new = new.to(activation.dtype)
        if mask is None:
            return new.view(activation.shape)
        passed = activation.clone()
        passed[mask] = new
        return passed

    def _change(self, rows: Tensor, code: Code | None, at_rows: Callable[[Tensor], Tensor]) -> Tensor:
        """decode(edited code) - decode(code) for `rows` [m, d]: [m, d], or [d] if it is the same for all."""
        sae, latents = self.sae, self._edits.latents.to(rows.device)
        linear = type(sae).decode is SparseAutoencoder.decode
        if linear and self._edits.only_adds:  # the sum added does not depend on the code
            return self._edits.strengths(self._read(rows), at_rows) @ sae.W_dec[latents]
        return change_of(sae, sae.encode(self._read(rows)) if code is None else code, self._edits, at_rows)

    def _rebuilt(self, rows: Tensor, code: Code | None, at_rows: Callable[[Tensor], Tensor]) -> Tensor:
        """The reconstruction of `rows` [m, d], from the edited code if there are edits: [m, d]."""
        code = self.sae.encode(self._read(rows)) if code is None else code
        if len(self._edits):
            latents = self._edits.latents.to(rows.device)
            code = replaced_columns(code, latents, self._edits(code.columns(latents), at_rows))
        return self.sae.decode(code)

    def _read(self, rows: Tensor) -> Tensor:
        return rows.to(self.sae.W_dec.dtype)

    def _check(self, activation: Tensor) -> None:
        where = f"hook point {self.site.name!r}"
        if activation.ndim not in (2, 3):
            raise UsageError(f"{where}: the activation is {list(activation.shape)}; it must be [n, T, d] or [n, d].")
        if activation.shape[-1] != self.sae.d_in:
            raise UsageError(
                f"{where}: the activation is {activation.shape[-1]} wide and the SAE reads {self.sae.d_in}. "
                "Attach the SAE to the model and the hook point that it was trained on."
            )
        if activation.device != self.sae.W_dec.device:
            raise UsageError(
                f"{where}: the activation is on {activation.device} and the SAE on {self.sae.W_dec.device}. "
                f"Move the SAE: sae.to({str(activation.device)!r})."
            )
        if activation.ndim == 2 and not isinstance(self._positions, TrainedPositions | None):
            raise UsageError(
                f"{where}: the activation is {list(activation.shape)}, which has no positions to choose from. "
                "Leave `positions` out."
            )


def attach(
    model: nn.Module,
    sae: SparseAutoencoder,
    at: str | Site,
    *,
    mode: Mode | str | None = None,
    edits: Mapping[int, Edit | Callable[[Tensor], Tensor]] | None = None,
    keep_error: bool = True,
    positions: Positions | None = None,
    statistics: Statistics | None = None,
    record: bool = False,
    reads: str | Site | Iterable[str | Site] = (),
) -> Attachment:
    """Attach `sae` to `model` at the hook point `at`, until the `with` block ends, even by an exception.

    model: a Hugging Face model, a TransformerLens bridge, or any module with a submodule of that path.
    mode: "bypass", "no_change" or "edit". The default is "edit" if there are `edits`, and "bypass" otherwise.
    edits: {latent: edit} with `saekit.add`, `set_to`, `scale`, `ablate`, `clamp`, or a function from the latent's
        activations [m], in the order of the positions, to new ones. They act on activations after gating.
    keep_error: add the SAE's reconstruction error back to the edited reconstruction; for edits only.
    positions: where to act: a slice, a position or a list of them, a boolean mask [n, T], or a function from positions
        [n, T] to booleans, or `TrainedPositions`; None for `sae.trained_positions`, those that the SAE was trained on, and
        `slice(None)` for everywhere. Negative positions count from the end, if the text has one.
    statistics: {"max": ..., "rms": ...}, each [d_sae] or {latent: number}, for edits in these units.
    record: keep the codes in `Attachment.code` and `codes`.
    reads: hook points that will be read by other means; a forward that reaches one before the edit is an error.

    UsageError for an unknown hook point or latent, edits with another mode, a unit without statistics, or a site of
    another width: at once if possible, otherwise in the first forward.
    """
    if not isinstance(model, nn.Module):
        raise UsageError(f"attach: the model must be a torch.nn.Module, not {type(model).__name__}.")
    if not isinstance(sae, SparseAutoencoder):
        raise UsageError(
            f"attach: the SAE must be a saekit.SparseAutoencoder, not {type(sae).__name__}. saekit.load_sae loads one."
        )
    site = site_of(model, at)
    chosen_mode = _mode(mode, edits)
    if chosen_mode is Mode.BYPASS:
        for name, given in (("positions", positions is not None), ("keep_error=False", not keep_error)):
            if given:
                raise UsageError(
                    f"attach at {site.name!r}: {name} is for changes, and mode 'bypass' changes nothing."
                )
    elif sae.transcoder:
        raise UsageError(
            f"attach at {site.name!r}: the SAE is a transcoder (it reads {sae.d_in} dimensions and writes {sae.d_out} at "
            "another site), so it cannot change the activation that it reads. Use mode 'bypass'."
        )
    return Attachment(
        model,
        sae,
        site,
        chosen_mode,
        edits=EditTable(edits or {}, sae.d_sae, statistics),
        keep_error=keep_error,
        positions=checked_positions(positions),
        record=record,
        reads=[site_of(model, name) for name in ([reads] if isinstance(reads, (str, Site)) else reads)],
    )


def read(
    model: nn.Module,
    sae: SparseAutoencoder,
    at: str | Site,
    *,
    after: Attachment | Iterable[Attachment] = (),
) -> Attachment:
    """Read codes at the hook point `at` without changing anything: `attach` in mode "bypass" with `record`.

    after: attached edits whose effect is to be read. A forward that reaches `at` before such an edit raises a
        UsageError that names both hook points. `ensure_downstream` also finds parallel branches.
    """
    attachment = attach(model, sae, at, mode=Mode.BYPASS, record=True)
    attachment._after = [after] if isinstance(after, Attachment) else list(after)
    return attachment


@contextmanager
def attach_all(attachments: Iterable[Attachment]) -> Iterator[list[Attachment]]:
    """Enter several attachments in order. At the same site, later ones see what earlier ones pass on."""
    with ExitStack() as stack:
        yield [stack.enter_context(attachment) for attachment in attachments]


def _mode(mode: Mode | str | None, edits: Mapping[int, object] | None) -> Mode:
    if edits is not None and not isinstance(edits, Mapping):
        raise UsageError(f"attach: edits must be {{latent: edit}}, not {type(edits).__name__}.")
    if mode is None:
        return Mode.BYPASS if edits is None else Mode.EDIT
    try:
        found = Mode(str(mode).lower())
    except ValueError:
        raise UsageError(
            f"attach: there is no mode {mode!r}. Choose {', '.join(repr(str(m)) for m in Mode)}."
        ) from None
    if found is Mode.EDIT and edits is None:
        raise UsageError("attach: mode 'edit' needs edits={latent: edit}.")
    if found is not Mode.EDIT and edits:
        raise UsageError(f"attach: there are edits, but mode {str(found)!r} edits nothing. Leave one of the two out.")
    return found
