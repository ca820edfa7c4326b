"""What a run file may hold. How it is read: `run_file.py`.

Options of components are not validated here, since that needs their targets; `saekit.runner.plan` does it.
"""

from __future__ import annotations

import inspect
import typing
from enum import Enum
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from saekit.options import refuse_odd_numbers
from saekit.schedules import Scheduled


class Mark(Enum):
    """What is allowed with a key. A key without a mark is the same for all variants and must not change on a resume.

    VARIES: variants may differ in it.
    IDLE: it does not decide the weights, so a resumed run may change it.
    """

    VARIES = "varies"
    IDLE = "idle"


VARIES, IDLE = Mark


def keys_with(mark: Mark, model: type[BaseModel]) -> set[str]:
    """The keys of a section that carry this mark."""
    return {info.alias or name for name, info in model.model_fields.items() if mark in info.metadata}


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, protected_namespaces=(), allow_inf_nan=False)
    _numbers = field_validator("*", mode="before")(classmethod(refuse_odd_numbers))


class _Section(_Strict):
    model_config = ConfigDict(extra="forbid")


class Use(_Strict):
    """A component by name, and its options: every key that is not a field of the section."""

    model_config = ConfigDict(extra="allow")

    use: str = Field(min_length=1, description="The component's name, short or qualified.")
    name: str | None = Field(
        default=None,
        pattern=r"^[A-Za-z0-9_-]+$",  # it becomes part of file names and of dotted keys
        description="The name of this entry in this run; `use` by default.",
    )

    @property
    def options(self) -> dict[str, Any]:
        """The keys that belong to the component itself."""
        return dict(self.model_extra or {})

    @property
    def label(self) -> str:
        """The entry's name in logs, metrics and overrides."""
        return self.name or self.use.rpartition(".")[2]


class SourceUse(Use):
    """Where activations come from."""

    # Its place does not decide the weights; what it holds is part of the source's identity.
    cache: Annotated[str | None, IDLE] = Field(
        default=None, description="A directory for the activations: the first run writes it, later runs read it."
    )
    cache_tokens: int | None = Field(
        default=None, gt=0, description="Training activations to store; one pass over the data by default."
    )
    cache_dtype: Literal["float32", "float16", "bfloat16"] | None = Field(
        default=None, description="Their type on disk; float32 by default, the other two take half the space."
    )


class ArchitectureUse(Use):
    """The sparse autoencoder."""

    d_sae: int | None = Field(
        default=None, gt=0, description="Number of latents; that of `from` if it is given."
    )
    from_: str | None = Field(
        default=None, alias="from", description="Start from this SAE: a directory, or RELEASE:SAE_ID."
    )


class LossUse(Use):
    """One term of the total loss."""

    weight: Scheduled = Field(default=1.0, description="Multiplies the loss; a number or a schedule.")


class GraphUse(Use):
    """The feature graph of the trained SAE."""

    tokens: int | None = Field(
        default=None, gt=0, description="Training activations whose codes the builder gets; `evaluation.tokens` by default."
    )


_Share = Annotated[float, Field(ge=0, lt=1)]


class TrainingConfig(_Section):
    """How the SAE is trained."""

    tokens: int = Field(default=1_000_000, ge=0, description="Activations to train on; 0 to analyse only.")
    batch_size: int = Field(default=2048, gt=0, description="Activations per step.")
    lr: Annotated[Scheduled, VARIES] = Field(default=1e-3, description="Learning rate; a number or a schedule.")
    betas: Annotated[tuple[_Share, _Share], VARIES] = Field(default=(0.9, 0.999), description="Adam's decay rates.")
    clip: Annotated[float, VARIES] = Field(
        default=1.0, ge=0, description="Largest norm of the whole gradient; 0 does not clip."
    )
    normalize: bool = Field(
        default=True, description="Train on activations scaled to a mean norm of sqrt(d), each site separately."
    )
    seed: Annotated[int, VARIES] = Field(
        default=0, ge=0, description="Decides the initial weights, the order of the data and every random draw."
    )
    data_seed: int | None = Field(
        default=None, ge=0, description="Decides the order of the data alone; `seed` by default."
    )
    device: str = Field(default="auto", description="auto, cpu, cuda, cuda:1, mps.")
    precision: Annotated[Literal["fp32", "bf16"], VARIES] = Field(default="fp32", description="bf16 runs on CUDA only.")
    threads: int | None = Field(default=None, gt=0, le=1024, description="CPU threads; torch's own choice by default.")
    sequences: int = Field(default=32, gt=0, description="Whole labelled sequences per step, if a loss needs them.")
    buffer: int = Field(
        default=65_536, gt=0, description="Activations in a shuffle block; each block is held in memory."
    )
    prefetch: Annotated[int, IDLE] = Field(
        default=1, ge=0, description="Blocks harvested ahead in the background; 0 harvests each when it is needed."
    )
    dead_after: Annotated[int, VARIES] = Field(
        default=1_000_000, gt=0, description="A latent that is silent for this many activations is dead."
    )
    log_every: Annotated[int, VARIES, IDLE] = Field(default=10, gt=0, description="Steps between logged lines.")
    checkpoint_every: Annotated[int, IDLE] = Field(default=200, gt=0, description="Steps between checkpoints.")
    keep_checkpoints: Annotated[int, IDLE] = Field(default=2, gt=0, description="How many of the newest checkpoints are kept.")
    guard_steps: Annotated[int, VARIES, IDLE] = Field(
        default=20, gt=0, description="Steps after which the gradient guard reports what received no gradient."
    )

    @property
    def order_seed(self) -> int:
        """The seed of everything drawn for the data: its order, and samples of it."""
        return self.seed if self.data_seed is None else self.data_seed


class EvaluationConfig(_Section):
    """What the metrics see."""

    tokens: int = Field(default=100_000, gt=0, description="Held-out activations for the metrics.")
    batch_size: int = Field(default=4096, gt=0, description="Activations per batch of evaluation.")


Entries = list[dict[str, Any]] | dict[str, dict[str, Any]] | None
"""A list instead of the run's, or changed keys of its entries by name: `loss.l1.weight = 2`."""


class Variant(_Section):
    """One SAE of several. What it does not name is as in the run file."""

    name: str = Field(
        pattern=r"^[A-Za-z0-9_][A-Za-z0-9_-]*$",  # it becomes a directory, and part of dotted keys
        max_length=100,
        description="Its name, and that of its directory under `variants/`.",
    )
    architecture: dict[str, Any] = Field(
        default_factory=dict, description="Keys of `[architecture]`; with another `use` only `d_sae` is kept."
    )
    graph: dict[str, Any] = Field(
        default_factory=dict, description="Keys of `[graph]`; with another `use` nothing is kept."
    )
    training: dict[str, Any] = Field(
        default_factory=dict, description="Keys of `[training]`, except those that all variants share."
    )
    loss: Entries = Field(default=None, description="Losses instead of the run's, or changed keys of them by name.")
    callback: Entries = Field(default=None, description="The same for callbacks.")
    metric: Entries = Field(default=None, description="The same for metrics.")
    analyzer: Entries = Field(default=None, description="The same for analyzers.")
    tracker: Entries = Field(default=None, description="The same for trackers.")


class RunConfig(_Section):
    """A run file, whole."""

    recipe: str | None = Field(default=None, description="A word for what this run does; the file's stem by default.")
    directory: str = Field(default="runs", description="Where run directories are made.")
    plugins: list[str] = Field(default_factory=list, description="Python files to load as plugins.")
    requires: list[str] = Field(
        default_factory=list, description="pip requirements of the plugins that this file names."
    )
    defaults: bool = Field(default=True, description="Add the components that their plugins mark as default.")
    source: SourceUse = Field(description="Where activations come from.")
    architecture: ArchitectureUse = Field(description="The sparse autoencoder.")
    loss: list[LossUse] = Field(default_factory=list, description="The terms of the total loss.")
    graph: GraphUse | None = Field(default=None, description="The feature graph to build for the trained SAE.")
    callback: list[Use] = Field(default_factory=list, description="Listeners that may change the run.")
    metric: list[Use] = Field(default_factory=list, description="Measures on held-out data.")
    analyzer: list[Use] = Field(default_factory=list, description="Questions about the trained SAE.")
    comparison: list[Use] = Field(default_factory=list, description="Questions about all variants together.")
    tracker: list[Use] = Field(default_factory=list, description="Listeners that record what happens.")
    training: TrainingConfig = Field(default_factory=TrainingConfig, description="How the SAE is trained.")
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig, description="What the metrics see.")
    variant: list[Variant] = Field(default_factory=list, description="SAEs to train in one pass instead of a single one.")

    def to_toml(self) -> str:
        """The configuration as a run file that says the same."""
        import tomli_w

        # Not in pydantic's JSON mode, which has no infinity: an option of a component may be one.
        return tomli_w.dumps(_without_none(self.model_dump(by_alias=True)))


def use_model(section: str) -> type[Use]:
    """What an entry of this section may hold besides its component's options."""
    annotation = RunConfig.model_fields[section].annotation  # a Use, Use | None, or list[Use]
    inside = (annotation, *typing.get_args(annotation))
    return next(found for found in inside if inspect.isclass(found) and issubclass(found, Use))


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_none(v) for k, v in value.items() if v is not None}
    if isinstance(value, list | tuple):
        return [_without_none(v) for v in value]
    return value
