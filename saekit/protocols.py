"""What plugins are given, and what the target of each kind of component must be able to do.

`Training` and `RunInfo` are what lifecycle hooks hand to listeners. The other protocols say what a component must have; nothing
here needs to be inherited from. The core looks for an optional method when it needs one (`hasattr`), so it may be left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from saekit.activations.batch import Activations, RunBatch, SequenceBatch, TokenBatch
    from saekit.activations.subject import Subject
    from saekit.config import RunConfig, TrainingConfig
    from saekit.estimate import Estimate
    from saekit.examples import Example
    from saekit.graph import FeatureGraph
    from saekit.result import Result
    from saekit.run_directory import RunDirectory
    from saekit.runner.comparison import ComparisonContext
    from saekit.runner.context import RunContext
    from saekit.runner.plan import RunPlan
    from saekit.sae.base import SparseAutoencoder
    from saekit.sae.code import Code
    from saekit.training.firing import FiringStatistics
    from saekit.training.loss_input import Step

# --- what listeners are given ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RunInfo:
    """The run that a listener belongs to: the argument `run` of the hooks."""

    directory: RunDirectory
    """Where everything is written: `directory.path`, and the paths in it by name. For a variant, its own directory."""

    config: RunConfig
    """The run file with every default filled in. For a variant, as if it were run alone."""

    plan: RunPlan
    """What the whole run will do: `plan.members` has one plan for each SAE, `plan.facts` what is known of the source."""

    variant: str
    """The variant's name; empty if the run has none, and for the view, which follows all of them."""


class Training(Protocol):
    """One SAE in training: the argument `trainer` of the hooks.

    A callback may change the weights of `sae`, the state of `optimizer`, `graph` and `provided`; the rest is for reading.
    """

    sae: SparseAutoencoder
    """The SAE, which reads the source's activations times `scale`."""

    optimizer: torch.optim.Optimizer
    """Adam over the parameters of the SAE and of its losses."""

    generator: torch.Generator
    """The generator for a listener's random draws, on the CPU: its state is in the checkpoint, so a resumed run draws the same."""

    step: Step
    """The last step with its batch, code and reconstruction; available from the first `gradients_ready` on."""

    losses: dict[str, Tensor]
    """The losses of the last step by name, unweighted and detached; `loss` is their weighted sum."""

    fired: Tensor
    """[d_sae], in how many rows of the last batch each latent fired; available from the first `step_ended` on."""

    firing: FiringStatistics
    """Which latents are silent: `silent`, `dead`, `n_dead`; `revive(latents)` counts them as living after they got new weights.
    `retired` and `n_retired`: those that `retire` took out, which are never dead and must not be revived."""

    number: int
    """How many steps are done."""

    total_steps: int
    """How many steps the run will do."""

    config: TrainingConfig
    """The section `[training]`."""

    device: torch.device
    """Where the SAE and its batches are."""

    scale: float
    """What the source's activations are multiplied by before the SAE reads them."""

    target_scale: float
    """What the targets of a transcoder are multiplied by."""

    graph: FeatureGraph | None
    """The feature graph that losses see in their `Step`; a callback that provides one sets it."""

    provided: dict[str, Tensor]
    """What else callbacks keep up to date for losses (`Step.provided`) and for each other, by the word of their `provides`:
    `groups` [d_sae], the number of each latent's group or -1; `importance` [d_sae], from 0 to 1. Empty until one is set. A
    callback sets a new tensor and does not write into the old one."""

    variant: str
    """The variant's name; empty if the run has none."""

    @property
    def tokens(self) -> int:
        """How many activations it has been trained on."""
        ...

    @property
    def lr(self) -> float:
        """The learning rate of the next step."""
        ...

    def warn(self, message: str) -> None:
        """Tell the user something that does not stop the run; the same message is shown only once."""
        ...

    def retire(self, latents: Tensor) -> None:
        """Take these latents [n] out of the dictionary for the rest of training: they are silent, no loss moves them, and nothing
        that revives dead latents (`auxk`, `resample`) may bring them back."""
        ...


# --- what a component must be able to do -------------------------------------------------------------------------


@runtime_checkable
class Loss(Protocol):
    """A function or an object that takes a `Step` and returns an unweighted scalar tensor.

    An object may also have: `prepare(context)`, called with a `RunContext` before training; `active(step) -> bool`,
    False when it does not apply (it is then skipped, and the gradient guard excuses it); parameters, if it is
    an `nn.Module` (they join the optimiser); `state_dict()` and `load_state_dict()` (they join the checkpoint);
    `measures(step)`, scalars by name that are logged as `LABEL/NAME` (numbers or tensors, read only then).

    `measures` is called after a step that is logged, and only if the loss was active in it. The weights have moved by then: what
    the code holds is of the step, but `pre` and `margin` are computed anew. It leaves out what is not defined.
    """

    def __call__(self, step: Step) -> Tensor:
        """The loss of one batch, before its weight."""
        ...


class Source(Protocol):
    """Where activations come from.

    `blocks` must be a function of the options, the split, the seed and the block's number alone: that is what makes
    a run resumable bit for bit. The first four attributes are set by `open`.

    If its blocks have a `target`, a transcoder is trained; its component provides "target".
    """

    d_in: int
    """The width of the activations."""

    d_out: int
    """The width of what is rebuilt; equal to `d_in` for an SAE."""

    hook_point: str | None
    """Where in the model the activations are read; None if there is no model."""

    subject: Subject
    """The model; None if there is none, and then the component does not provide "subject_model"."""

    target_hook_point: str | None
    """Optional: where a transcoder's targets are read."""

    concepts: Sequence[str]
    """Optional: the names of the columns of labels."""

    truth: Tensor
    """Optional: [n_features, d_in], the directions that the activations are made of."""

    special_tokens: Sequence[int]
    """Optional: the ids of BOS, EOS and the other special tokens."""

    withheld: Mapping[str, str]
    """Optional, set by the constructor: what `provides` promises and these options do not give, each with the fix."""

    warnings: Sequence[str]
    """Optional, set by `peek` and `open`: what the user should know about the data."""

    def peek(self) -> dict[str, Any]:
        """What is known without loading a model or data: any of `model`, `hook_point`, `d_in`, `d_out`, `data`.

        Raises UsageError for a mistake that can be seen already, such as a missing file."""
        ...

    def open(self, *, device: torch.device, dtype: torch.dtype) -> None:
        """Load what is needed to give activations of `dtype` on `device`."""
        ...

    def blocks(self, split: str, *, size: int, seed: int, start: int = 0) -> Iterator[Activations]:
        """Blocks number `start`, `start + 1`, ... of about `size` activations each.

        The split "train" never ends: after one pass over the data another begins, in another order. "held_out" ends, shares
        no document with "train", and comes in an order that no seed changes but that does not follow the data: its first
        activations are those of a small budget, and should be from all over the split."""
        ...

    def identity(self) -> dict[str, Any]:
        """What determines the activations, for provenance and caches: names and hashes of model, tokenizer and data,
        hook point; `drop_first` and `drop_special`, whether the first position and those of `special_tokens` are left out, which
        is recorded with the SAE."""
        ...

    def fingerprint(self) -> dict[str, Any] | None:
        """What determines the activations, found without loading the model or the data: hashes of files, options. If two
        fingerprints are equal, so are the identities; the reverse need not hold. None if it cannot be known.

        Optional; with it a cache is checked without loading anything."""
        ...

    def first_pass(self, *, size: int, seed: int, start: int = 0) -> Iterator[Activations]:
        """The blocks of "train" for the same arguments, up to the end of the first pass over the data, where the last block
        is cut. Optional, together with `pass_size`, about how many activations a pass has."""
        ...

    def token_batches(self, split: str, *, rows: int) -> Iterator[TokenBatch]:
        """Rows of tokens, in the order and numbering of `blocks` for "held_out". Only with a `subject`."""
        ...

    def documents(self, sequences: Tensor) -> Tensor:
        """The first and the last of the documents that each held-out sequence (by `Activations.sequence`) holds, those
        between them included: [n] -> [n, 2]. Optional; without it the report counts sequences, or rows, not documents."""
        ...

    def examples(self, sequence: Tensor, position: Tensor) -> list[Example]:
        """What held-out activations come from, as a reader should see it: for n rows, by `Activations.sequence` and
        `Activations.position` ([n] each, in any order, some perhaps twice), n examples.

        Optional; without it what a latent fires on is shown by its tokens or, if there are none, by the numbers of the activation.
        An example of `saekit.examples` is data: `Tokens` (with `at`, the place that the activation belongs to; without it the
        activation belongs to all of them), `Items` of a set, `Numbers`, an `Image`, a `Text`, each with a caption. The same rows
        give the same examples."""
        ...

    def token_strings(self, tokens: Tensor) -> list[str]:
        """Each token id of a [n] tensor as readable text. Needed only if `Activations.tokens` is given."""
        ...

    def sequences(self, split: str, n: int, seed: int, number: int) -> SequenceBatch:
        """Batch `number` of `n` whole labelled sequences, the second stream beside `blocks`. Only with `concepts`.

        Labels that hold for some positions only stand in `position_labels`; a sequence's own label is then 1 if one of its
        positions has it. A function of the arguments alone, so that a resumed run is given the same. The split "train" never ends;
        "held_out" gives each sequence once, in order: its last batch may be short, and those after it are empty."""
        ...

    def runs(self, split: str) -> Iterator[RunBatch]:
        """The sequences of a split batch by batch, each once, through the whole model, which can be run again with other
        activations. Only if the component provides "outputs".

        "train" is one pass, "held_out" has the sequences of `blocks` in their order. A sequence is never in two batches."""
        ...


class PushedSource(Source, Protocol):
    """A source that a program feeds while it runs, through `saekit.Online`, and that draws from what it holds just then.

    Nothing can be read ahead of the program: `blocks` of "train" never ends but may change between two calls, and a block that
    was asked for with a size of `rows` or more may be a view of what is held, which later pushes change. As long as nothing is
    pushed, the same arguments give the same blocks. `identity` cannot tell what was pushed."""

    rows: int
    """The most activations that are held for training; each of them is as likely to be drawn as any other."""

    held: int
    """How many are held for training now."""

    def push(self, x: Tensor, held_out: bool | None = None) -> None:
        """Take in finite float activations, [n, d_in] on any device. held_out: whether for measuring alone; None to decide."""
        ...

    def due(self) -> bool:
        """Count a step of the program; True if enough is held and the SAE is to have a step now."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps: tensors, and plain values such as how many pushes there were."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave, after `open`."""
        ...


class GraphBuilder(Protocol):
    """A function or an object that makes a feature graph of a finished SAE. It is called once, after training."""

    def __call__(self, sae: SparseAutoencoder, codes: Iterator[Code]) -> FeatureGraph:
        """The graph over the latents of `sae`, as `FeatureGraph.of(sae, edge_index, weight)` makes it.

        sae: as it is saved, for raw activations.
        codes: those of activations that it was trained on, batch by batch, `graph.tokens` rows in all; nothing is
            harvested for a builder that takes none of them."""
        ...


class Metric(Protocol):
    """A streaming measure of held-out batches; a `torchmetrics.Metric` fits if its update takes a `Step`.

    It may have `prepare(context)`, called with a `RunContext` before the first update: for the source, the seed, or the
    feature graph.
    Three class attributes may help the reader: `headline` names the values that are shown in the live view and the summary's
    table, `meanings` gives a line for each value, shown in the report, and `undefined` the reason for which a value may be
    None, told as a warning where it is.
    """

    def update(self, step: Step) -> None:
        """Take in one held-out batch."""
        ...

    def compute(self) -> dict[str, float | Estimate | None]:
        """Named plain numbers; None if a value is not defined (with the reason in `undefined` or given to `context.warn`).

        An `Estimate` in place of a number has its interval, what it was measured on and a sentence beside it."""
        ...


class ModelMetric(Protocol):
    """A measure that needs the subject model, not only a batch of activations."""

    def measure(self, context: RunContext) -> dict[str, float | Estimate | None]:
        """Named plain numbers or estimates, measured on held-out data."""
        ...


class Callback(Protocol):
    """An object with lifecycle hooks, marked with `hookimpl`; it may change the run. What else it may have:

    `prepare(context)`, called with a `RunContext` before training; `state_dict()` and `load_state_dict()`, which join the
    checkpoint; `measures(trainer)`, scalars by name that are logged as `LABEL/NAME`; and `result()`.
    """

    def result(self) -> Result:
        """Optional: what it found, asked once after the last step. It is written to `analysis/LABEL/`, shown like an analyzer's,
        and given to metrics and analyzers as `context.found[LABEL]`.

        What it needs for that must be in its `state_dict`: a run may be resumed after its last step."""
        ...


class Analyzer(Protocol):
    """A question asked of a finished SAE.

    It may have `prepare(context)`, called before training, to refuse what is known to be wrong by then: a prompt that is
    too long, a concept that the source does not have.
    """

    def __call__(self, context: RunContext) -> Result:
        """The answer; files may be written under `context.directory`."""
        ...


class Comparison(Protocol):
    """A question asked of all the SAEs of a run, when everything is known of each."""

    def __call__(self, context: ComparisonContext) -> Result:
        """The answer; files may be written under `context.directory`."""
        ...
