"""What the target of each kind of component must be able to do, as protocols: nothing here is inherited from.

The core asks for a capability where it needs one (`hasattr`), so an optional method may simply be left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from saekit.activations.batch import Activations, SequenceBatch, TokenBatch
    from saekit.activations.subject import Subject
    from saekit.graph import FeatureGraph
    from saekit.result import Result
    from saekit.runner.context import RunContext
    from saekit.sae.base import SparseAutoencoder
    from saekit.sae.code import Code
    from saekit.training.step import Step


@runtime_checkable
class Loss(Protocol):
    """A function or an object that takes a `Step` and returns an unweighted scalar tensor.

    An object may also have: `prepare(context)`, called with a `RunContext` before training; `active(step) -> bool`,
    False when it has nothing to say (it is then skipped, and excused by the gradient guard); parameters, if it is
    an `nn.Module` (they join the optimiser); `state_dict()` and `load_state_dict()` (they join the checkpoint).
    """

    def __call__(self, step: Step) -> Tensor:
        """The loss of one batch, before its weight."""
        ...


class Source(Protocol):
    """Where activations come from.

    `blocks` must be a function of the options, the split, the seed and the block's number alone: that is what makes
    a run resumable bit for bit. Attributes after `open`: `d_in`, `d_out` (equal for an SAE), `hook_point` (or None),
    `subject` (a `Subject`, or None where there is no model).

    Where its blocks have a `target`, a transcoder is trained; its component provides "target".

    Optional attributes: `concepts`, the names of the columns of labels; `truth` [n_features, d_in], the directions that
    the activations are made of, where they are known; `withheld`, set by the constructor: what the component's
    `provides` promises but these options do not give, and for each the fix in a sentence; `warnings`, set by `open`:
    what the user should know of the data.
    """

    d_in: int
    d_out: int
    hook_point: str | None
    subject: Subject | None

    def peek(self) -> dict[str, Any]:
        """What is known without loading a model or data: any of `model`, `hook_point`, `d_in`, `d_out`, `data`.

        Raises UsageError for what can already be seen to be wrong (a missing file, say)."""
        ...

    def open(self, *, device: torch.device, dtype: torch.dtype) -> None:
        """Load what is needed to give activations, of `dtype` and on `device`."""
        ...

    def blocks(self, split: str, *, size: int, seed: int, start: int = 0) -> Iterator[Activations]:
        """Blocks number `start`, `start + 1`, ... of about `size` activations each.

        The split "train" never ends (it begins another pass over the data, in another order); "held_out" ends, keeps
        the order of the documents, and shares no document with "train"."""
        ...

    def identity(self) -> dict[str, Any]:
        """What determines the activations, for provenance and caches: names and hashes of model, tokenizer and data,
        hook point, whether the first position is left out."""
        ...

    def fingerprint(self) -> dict[str, Any] | None:
        """What determines the activations, found without loading the model or the data: hashes of files, options. It may
        differ where `identity` does not; where it is equal, `identity` is. None where it cannot be had.

        Optional; with it a cache is checked without loading anything."""
        ...

    def first_pass(self, *, size: int, seed: int, start: int = 0) -> Iterator[Activations]:
        """The blocks of "train", called with the same arguments, as far as the first pass over the data: it ends with
        the pass, where the last block is cut. Optional, with `pass_size`, about how many activations that is."""
        ...

    def token_batches(self, split: str, *, rows: int) -> Iterator[TokenBatch]:
        """Rows of tokens, in the order and numbering of `blocks` for "held_out". Only with a `subject`."""
        ...

    def token_strings(self, tokens: Tensor) -> list[str]:
        """Each token id of a [n] tensor as readable text. Only where `Activations.tokens` is given."""
        ...

    def sequences(self, split: str, n: int, seed: int, number: int) -> SequenceBatch:
        """Batch `number` of `n` whole labelled sequences, the second stream beside `blocks`. Only with `concepts`.

        A function of the arguments alone, so that a resumed run is given the same. The split "train" never ends;
        "held_out" gives each sequence once, in order: its last batch may be short, and those after it are empty."""
        ...


class GraphBuilder(Protocol):
    """A function or an object that makes a feature graph of a finished SAE. It is called once, after training."""

    def __call__(self, sae: SparseAutoencoder, codes: Iterator[Code]) -> FeatureGraph:
        """The graph over the latents of `sae`, as `FeatureGraph.of(sae, edge_index, weight)` makes it.

        sae: as it stands on disk, for raw activations. codes: those of activations that it was trained on, batch by batch,
        `graph.tokens` rows in all; nothing is harvested for a builder that takes none of them."""
        ...


class Metric(Protocol):
    """A streaming measure of held-out batches; a `torchmetrics.Metric` fits if its update takes a `Step`.

    It may have `prepare(context)`, called with a `RunContext` before the first update: for the source, the seed, or the
    feature graph.
    Two class attributes may help the reader: `headline` names those of its values that belong into the live view and
    the summary's table, and `meanings` gives a line for each value, shown in the report.
    """

    def update(self, step: Step) -> None:
        """Take in one held-out batch."""
        ...

    def compute(self) -> dict[str, float | None]:
        """Named plain numbers; None where a value is not defined (with the reason given to `context.warn`)."""
        ...


class ModelMetric(Protocol):
    """A measure that needs the subject model, not only a batch of activations."""

    def measure(self, context: RunContext) -> dict[str, float | None]:
        """Named plain numbers, measured on held-out data."""
        ...


class Analyzer(Protocol):
    """A question asked of a finished SAE.

    It may have `prepare(context)`, called before training: for what can be seen to be wrong by then (a prompt that is
    too long, a concept that the source does not have).
    """

    def __call__(self, context: RunContext) -> Result:
        """The answer; files may be written under `context.directory`."""
        ...
