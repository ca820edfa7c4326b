"""Components that break the contract in one way each: the check that asks for it fails, and no other.

Each class or function below is what an author might really write.
"""

from __future__ import annotations

import copy
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import pytest
import torch
from helpers import Fakes
from pydantic import Field

from saekit import (
    Activations,
    Component,
    DenseCode,
    Estimate,
    FeatureGraph,
    Interval,
    Numbers,
    Pattern,
    Result,
    RunBatch,
    SaeLensFormat,
    SequenceBatch,
    SparseAutoencoder,
    SparseCode,
    Text,
    hookimpl,
)
from saekit.plugins import Registry
from saekit.testing import Failed, check, registry_of
from saekit.testing.checks.any_kind import words_are_known
from saekit.testing.checks.architectures import activations, built
from saekit.testing.checks.commands import check_command
from saekit.testing.kit import Report, Subject

# --- losses ----------------------------------------------------------------------------------------------------


def sound(step):
    """The mean of the code."""
    return step.code.sum().mean()


def one_for_each_row(step):
    """Forgets the mean."""
    return step.code.sum()


def a_plain_number(step):
    """Reads the value to the host."""
    return float(step.code.sum().mean())


def spread_of_the_batch(step):
    """The standard deviation over the batch, which one row alone does not have."""
    return step.code.sum().std()


def detached(step):
    """Cuts the gradient off."""
    return step.code.sum().detach().mean()


def root_of_the_error(step):
    """A norm of what may be zero: its slope is infinite there."""
    return (step.code.sum() - step.code.sum()).abs().sqrt().sum() + step.error.square().mean()


def blind_to_whole_codes(step):
    """Knows compressed codes only."""
    values = getattr(step.code, "values", None)
    return step.error.square().mean() if values is None else values.sum() / len(step.code)


def in_place(step):
    """Centres the batch for everyone."""
    step.x.sub_(step.x.mean(0))
    return step.code.sum().mean()


def undeclared(step):
    """Reads labels without saying so."""
    known = step.labels.nan_to_num(0.0).sum(1)
    return (step.code.sum() * (1 + known)).mean()


def by_chance(step):
    """Draws from what no checkpoint holds."""
    return step.code.sum().mean() * (1 + random.random())


def undocumented(step, *, power: float = 1.0):
    """An option that nobody explains."""
    return (step.code.sum() * power).mean()


def untyped(step, *, power=1.0):
    """An option of any type."""
    return (step.code.sum() * power).mean()


def beyond_its_limit(step, *, power: Annotated[float, Field(gt=0, description="Exponent of the sum.")] = 0.0):
    """A default that its own rule forbids."""
    return (step.code.sum() * (1 + power)).mean()


def own_backward(step):
    """Calls backward itself."""
    loss = step.code.sum().mean()
    loss.backward(retain_graph=True)
    return loss


def of_positives(step):
    """The mean over the rows with a label, of which there may be none."""
    positive = step.labels[:, 0] == 1
    rows = step.code.sum()[positive]
    return rows.sum() / rows.shape[0]


class Forgetful:
    """Keeps a running mean and does not save it."""

    def __init__(self):
        self.mean = 0.0

    def __call__(self, step):
        value = step.code.sum().mean()
        self.mean = 0.9 * self.mean + 0.1 * float(value.detach())
        return (value - self.mean) ** 2


class SavesHalf(Forgetful):
    """Saves its running mean and does not take it back."""

    def state_dict(self):
        return {"mean": self.mean}

    def load_state_dict(self, state):
        pass


class SaysARow:
    """Logs one number for each row, in place of a scalar."""

    def __call__(self, step):
        return step.code.sum().mean()

    def measures(self, step):
        return {"sum": step.code.sum()}


LOSSES: dict[str, tuple[Any, set[str], dict[str, Any]]] = {
    "sound": (sound, set(), {}),
    "one_for_each_row": (one_for_each_row, {"scalar"}, {}),
    "a_plain_number": (a_plain_number, {"scalar"}, {}),
    "spread_of_the_batch": (spread_of_the_batch, {"batch_of_one"}, {}),
    "detached": (detached, {"gradient_reaches"}, {}),
    "blind_to_whole_codes": (blind_to_whole_codes, {"sparse_and_dense_codes_agree"}, {}),
    "in_place": (in_place, {"inputs_unchanged"}, {}),
    "undeclared": (undeclared, {"declared_needs_suffice"}, {}),
    "by_chance": (by_chance, {"deterministic"}, {}),
    "undocumented": (undocumented, {"options_documented"}, {}),
    "untyped": (untyped, {"options_documented"}, {}),
    "beyond_its_limit": (beyond_its_limit, {"defaults_are_valid"}, {}),
    "own_backward": (own_backward, {"gradient_only_there"}, {}),
    "of_positives": (of_positives, {"without_positives", "batch_of_one"}, {"needs": ("labels",)}),
    "forgetful": (Forgetful, {"state_round_trip"}, {}),
    "saves_half": (SavesHalf, {"state_round_trip"}, {}),
    "says_a_row": (SaysARow, {"measures_are_scalars"}, {}),
    # An infinite slope shows wherever gradients are looked at.
    "root_of_the_error": (
        root_of_the_error,
        {"finite", "any_dtype", "batch_of_one", "weight_zero_harmless", "sparse_and_dense_codes_agree"},
        {},
    ),
}

# --- architectures ---------------------------------------------------------------------------------------------


class Small(SparseAutoencoder):
    """The 8 largest pre-activations, through a ReLU: what the others below spoil."""

    def chosen(self, x):
        pre = self.dense_pre(x)
        return pre, Pattern.regular(pre.topk(8, dim=1).indices, self.d_sae)

    def gate(self, x):
        pre, pattern = self.chosen(x)
        return self.sparse_code(x, pattern, self.pre_at(x, pre, pattern).relu())


class WithoutGradient(Small):
    """Takes its values from pre-activations that carry no gradient."""

    def gate(self, x):
        pre, pattern = self.chosen(x)
        return self.sparse_code(x, pattern, pre.gather(1, pattern.indices.view(-1, 8)).reshape(-1).relu())


class TwiceTheGradient(Small):
    """A gradient that is twice what it should be."""

    def gate(self, x):
        pre, pattern = self.chosen(x)
        values = self.pre_at(x, pre, pattern).relu()
        return self.sparse_code(x, pattern, 2 * values - values.detach())


class LooksAside(Small):
    """Normalises by the batch, in evaluation too."""

    def gate(self, x):
        pre, pattern = self.chosen(x)
        values = self.pre_at(x, pre, pattern).relu()
        return self.sparse_code(x, pattern, values * self.scale(x))

    def scale(self, x):
        # In training a constant, so that nothing else is wrong with it.
        return 1.0 if self.training or len(x) != 24 else 0.5


class FollowsSlowly(Small):
    """Has one threshold for evaluation, the running mean of training's, and leaves it where it lags behind."""

    def __init__(self, d_in, d_sae, d_out=None):
        super().__init__(d_in, d_sae, d_out)
        self.register_buffer("least", torch.zeros(()))

    def gate(self, x):
        pre, pattern = self.chosen(x)
        if self.training:
            values = self.pre_at(x, pre, pattern).relu()
            self.least.lerp_(values.detach().amin(), 0.05)
            return self.sparse_code(x, pattern, values)
        pattern = Pattern.of_mask(pre > self.least)
        return self.sparse_code(x, pattern, self.pre_at(x, pre, pattern), threshold=self.least.clone())

    @torch.no_grad()
    def rescale(self, scale):
        super().rescale(scale)
        self.least.div_(scale)


class ForgetsAnOption(SparseAutoencoder):
    """Does not tell its `floor`."""

    def __init__(
        self, d_in, d_sae, d_out=None, *, floor: Annotated[float, Field(ge=0, description="Smaller ones are cut.")] = 0.05
    ):
        super().__init__(d_in, d_sae, d_out)
        self.floor = floor

    def gate(self, x):
        pre = self.dense_pre(x)
        pattern = Pattern.of_mask(pre > self.floor)
        return self.sparse_code(x, pattern, self.pre_at(x, pre, pattern))

    @torch.no_grad()
    def rescale(self, scale):
        super().rescale(scale)
        self.floor /= scale

    def options(self):
        return {}


class KeepsItsFloor(ForgetsAnOption):
    """Its threshold is in units of the activations, and `rescale` leaves it."""

    def __init__(
        self, d_in, d_sae, d_out=None, *, floor: Annotated[float, Field(ge=0, description="Smaller ones are cut.")] = 0.05
    ):
        super().__init__(d_in, d_sae, d_out, floor=floor)

    def rescale(self, scale):
        SparseAutoencoder.rescale(self, scale)

    def options(self):
        return SparseAutoencoder.options(self)


class KeepsUnderAnotherName(SparseAutoencoder):
    """Keeps its `floor` where nobody finds it."""

    def __init__(
        self, d_in, d_sae, d_out=None, *, floor: Annotated[float, Field(ge=0, description="Smaller ones are cut.")] = 0.0
    ):
        super().__init__(d_in, d_sae, d_out)
        self.minimum = floor

    def gate(self, x):
        return self.dense_code(x, self.pre_activations(x).relu())


class ForgetsALatentParameter(SparseAutoencoder):
    """Has a sharpness for each latent, which a revived latent does not get back."""

    def __init__(self, d_in, d_sae, d_out=None):
        super().__init__(d_in, d_sae, d_out)
        self.sharpness = torch.nn.Parameter(torch.ones(d_sae))

    def gate(self, x):
        return self.dense_code(x, self.sharpness * self.pre_activations(x).relu())

    @torch.no_grad()
    def initialise(self, generator, sample):
        super().initialise(generator, sample)
        self.sharpness.fill_(1.0)


class ShiftsHalf(SparseAutoencoder):
    """Has a second bias, which is added to the same product, and shifts the first alone."""

    def __init__(self, d_in, d_sae, d_out=None):
        super().__init__(d_in, d_sae, d_out)
        self.second = torch.nn.Parameter(torch.zeros(d_sae))

    @property
    def latent_parameters(self):
        return {**super().latent_parameters, "second": 0.0}

    def gate(self, x):
        pre = self.pre_activations(x)
        activations = pre.relu() + (pre - self.b_enc + self.second).relu()
        return self.dense_code(x, activations, threshold=(self.b_enc - self.second).clamp_max(0.0))

    @torch.no_grad()
    def rescale(self, scale):
        super().rescale(scale)
        self.second.div_(scale)


class KeepsItsThresholds(SparseAutoencoder):
    """Has a threshold for each latent, and does not hand them on with the code."""

    def __init__(self, d_in, d_sae, d_out=None):
        super().__init__(d_in, d_sae, d_out)
        self.floors = torch.nn.Parameter(torch.zeros(d_sae))

    @property
    def latent_parameters(self):
        return {**super().latent_parameters, "floors": 0.0}

    def gate(self, x):
        pre = self.pre_activations(x)
        return self.dense_code(x, pre * (pre > self.floors), **self.told())

    def told(self):
        return {}

    @torch.no_grad()
    def rescale(self, scale):
        super().rescale(scale)
        self.floors.div_(scale)


class TellsItsThresholds(KeepsItsThresholds):
    """The same, said."""

    def told(self):
        return {"threshold": self.floors}


class AnotherGate(Small):
    """Claims sae_lens's ReLU for a gate that is none."""

    interop = SaeLensFormat("standard")


class FormatOfNoReturn(SaeLensFormat):
    """Reads an option from a key that it does not write."""

    def options(self, cfg):
        return {"floor": cfg["floor"]}


class ReadsWhatItDoesNotWrite(KeepsItsFloor):
    """Is known elsewhere, but an SAE of ours does not get back from there."""

    interop = FormatOfNoReturn(known_as=("sae_lens:floored",))

    def __init__(
        self, d_in, d_sae, d_out=None, *, floor: Annotated[float, Field(ge=0, description="Smaller ones are cut.")] = 0.05
    ):
        super().__init__(d_in, d_sae, d_out, floor=floor)

    def rescale(self, scale):
        ForgetsAnOption.rescale(self, scale)


class DrawsElsewhere(Small):
    """Its first weights come from torch's global generator."""

    @torch.no_grad()
    def initialise(self, generator, sample):
        super().initialise(generator, sample)
        self.b_enc.normal_(std=0.01)


ARCHITECTURES: dict[str, tuple[Any, set[str]]] = {
    "small": (Small, set()),
    "without_gradient": (WithoutGradient, {"gradient_is_the_derivative"}),
    "twice_the_gradient": (TwiceTheGradient, {"gradient_is_the_derivative"}),
    "follows_slowly": (FollowsSlowly, {"calibrated_at_the_end"}),
    "looks_aside": (LooksAside, {"rows_alone_in_eval"}),
    "keeps_its_floor": (KeepsItsFloor, {"rescale_is_homogeneous"}),
    "draws_elsewhere": (DrawsElsewhere, {"initialise_draws_from_its_generator", "deterministic", "latents_start_again"}),
    "keeps_under_another_name": (KeepsUnderAnotherName, {"options_rebuild", "saved_and_loaded"}),
    "forgets_a_latent_parameter": (ForgetsALatentParameter, {"latents_start_again"}),
    "tells_its_thresholds": (TellsItsThresholds, set()),
    "keeps_its_thresholds": (KeepsItsThresholds, {"margin_tells_who_fires"}),
    "shifts_half": (ShiftsHalf, {"shift_moves_pre_activations"}),
    "reads_what_it_does_not_write": (ReadsWhatItDoesNotWrite, {"saelens_format"}),
}

# --- metrics ---------------------------------------------------------------------------------------------------


class Mean:
    """The mean of the code's sums, over rows: what the others below spoil."""

    meanings = {"mean_sum": "the sum of a row's activations, on average"}  # noqa: RUF012

    def __init__(self):
        self.total, self.rows = 0.0, 0

    def update(self, step):
        self.total += float(step.code.sum().sum())
        self.rows += len(step.code)

    def compute(self):
        return {"mean_sum": self.total / self.rows if self.rows else None}


class KeepsEveryBatch(Mean):
    """Puts every batch aside."""

    def __init__(self):
        self.sums = []

    def update(self, step):
        self.sums.append(step.code.sum())

    def compute(self):
        return {"mean_sum": float(torch.cat(self.sums).mean()) if self.sums else None}


class MeanOfMeans(Mean):
    """Weighs a batch of one row like one of a thousand."""

    def update(self, step):
        self.total += float(step.code.sum().mean())
        self.rows += 1


class Unexplained(Mean):
    """Gives a number that nobody explains."""

    meanings: dict[str, str] = {}  # noqa: RUF012


class NamesByData(Mean):
    """Gives one name or another."""

    meanings = {"few": "rows, where there are few", "many": "rows, where there are many"}  # noqa: RUF012

    def compute(self):
        return {"few" if self.rows < 50 else "many": float(self.rows) if self.rows else None}


class ZeroOfNothing(Mean):
    """Says 0 of no data."""

    def compute(self):
        return {"mean_sum": self.total / max(1, self.rows)}


class Tensors(Mean):
    """Gives tensors."""

    def compute(self):
        return {"mean_sum": torch.tensor(self.total / self.rows) if self.rows else None}


class ZeroesTheInput(Mean):
    """Works in place."""

    def update(self, step):
        super().update(step)
        step.reconstruction.zero_()


class Estimates(Mean):
    """Says how many rows stand behind the mean, and how far it may be off."""

    off = 0.0

    def compute(self):
        value = super().compute()["mean_sum"]
        ends = None if value is None else Interval(value + self.off, value + self.off + 1.0)
        return {"mean_sum": Estimate(value, ends, {"rows": self.rows}, "A mean.")}


class OutsideItsInterval(Estimates):
    """An interval of something else."""

    off = 2.0


METRICS: dict[str, tuple[Any, set[str]]] = {
    "mean": (Mean, set()),
    "estimates": (Estimates, set()),
    "outside_its_interval": (OutsideItsInterval, {"estimates_hold"}),
    "keeps_every_batch": (KeepsEveryBatch, {"bounded_memory"}),
    "mean_of_means": (MeanOfMeans, {"whole_or_in_pieces"}),
    "unexplained": (Unexplained, {"names_and_meanings"}),
    "names_by_data": (NamesByData, {"names_and_meanings"}),
    "zero_of_nothing": (ZeroOfNothing, {"empty_stream"}),
    "tensors": (Tensors, {"plain_numbers"}),
    "zeroes_the_input": (ZeroesTheInput, {"inputs_unchanged"}),
}

# --- analyzers -------------------------------------------------------------------------------------------------


def norms(context):
    """The mean norm of the decoder's rows."""
    return Result(scalars={"norm": float(context.sae.W_dec.norm(dim=1).mean())})


def no_result(context):
    """Returns what it should put into a Result."""
    return {"norm": 1.0}


def in_the_working_directory(context):
    """Writes where the command was run."""
    with open("norms.txt", "w", encoding="utf-8") as file:
        file.write("1.0")
    return Result(scalars={"norm": 1.0})


def a_tensor(context):
    """Forgets float()."""
    return Result(scalars={"norm": context.sae.W_dec.norm()})


def edits_for_good(context):
    """Ablates a latent and does not put it back."""
    norm = float(context.sae.W_dec[0].norm())
    context.sae.W_dec.data[0] *= 0.999
    return Result(scalars={"norm": round(norm, 1)})


def at_random(context):
    """Draws from what nobody seeds."""
    return Result(scalars={"draw": random.SystemRandom().random()})


ANALYZERS: dict[str, tuple[Any, set[str]]] = {
    "norms": (norms, set()),
    "in_the_working_directory": (in_the_working_directory, {"writes_in_its_directory"}),
    "edits_for_good": (edits_for_good, {"inputs_unchanged"}),
    "at_random": (at_random, {"deterministic"}),
    "a_tensor": (a_tensor, {"gives_a_result", "can_be_written"}),
}

# --- comparisons -----------------------------------------------------------------------------------------------


def mean_norms(context):
    """The mean norm of each variant's decoder rows."""
    return Result(scalars={name: float(one.context.sae.W_dec.norm(dim=1).mean()) for name, one in context.variants.items()})


def first_and_second(context):
    """Takes two variants for granted."""
    first, second = (one.context.sae.W_dec.norm() for one in context.variants.values())
    return Result(scalars={"difference": float(first - second)})


def edits_the_last(context):
    """Scales a row of the last variant, where that has one, and does not put it back."""
    name = list(context.variants)[-1]
    context.variants[name].context.sae.W_dec.data[0] *= 0.999
    return Result(scalars={"variants": len(context.variants)})


def in_the_runs_directory(context):
    """Writes where a variant keeps its own."""
    for one in context.variants.values():
        (one.context.directory / "norms.txt").write_text("1.0", encoding="utf-8")
    return Result(scalars={"norm": 1.0})


COMPARISONS: dict[str, tuple[Any, set[str]]] = {
    "mean_norms": (mean_norms, set()),
    "first_and_second": (first_and_second, {"takes_one"}),
    "edits_the_last": (edits_the_last, {"inputs_unchanged"}),
    "in_the_runs_directory": (in_the_runs_directory, {"writes_in_its_directory"}),
    "at_random": (at_random, {"deterministic"}),
}

# --- callbacks -------------------------------------------------------------------------------------------------


class EveryThird:
    """Shortens the encoder's biases at every third step, and keeps count."""

    def __init__(self):
        self.count = 0

    @hookimpl
    def step_ended(self, trainer):
        self.count += 1
        if self.count % 3 == 0:
            trainer.sae.b_enc.data.mul_(0.5).add_(0.01 * self.count)

    def state_dict(self):
        return {"count": self.count}

    def load_state_dict(self, state):
        self.count = state["count"]


class LosesCount(EveryThird):
    """Begins to count anew after a resume."""

    def __getattribute__(self, name):
        if name in ("state_dict", "load_state_dict"):
            raise AttributeError(name)
        return super().__getattribute__(name)


class SavesAnObject(EveryThird):
    """Saves what a checkpoint cannot hold."""

    def state_dict(self):
        return {"count": self.count, "seen": {1, 2}}


class NoHooks:
    """Forgets the decorator."""

    def step_ended(self, trainer):
        trainer.sae.b_enc.data.zero_()


class OwnDice(EveryThird):
    """Draws from a generator that nobody seeds."""

    @hookimpl
    def step_ended(self, trainer):
        trainer.sae.b_enc.data.add_(0.01 * random.SystemRandom().random())


class FindsNothingAgain(EveryThird):
    """Has a result that a resumed run does not have."""

    def __init__(self):
        super().__init__()
        self.largest = 0.0

    @hookimpl
    def step_ended(self, trainer):
        self.largest = max(self.largest, float(trainer.sae.W_enc.detach().abs().max()))

    def result(self):
        return Result(scalars={"largest": self.largest})


CALLBACKS: dict[str, tuple[Any, set[str]]] = {
    "every_third": (EveryThird, set()),
    "loses_count": (LosesCount, {"resumes_to_the_same_bits"}),
    "finds_nothing_again": (FindsNothingAgain, {"result_is_whole"}),
    "no_hooks": (NoHooks, {"has_hooks"}),
    "own_dice": (OwnDice, {"deterministic", "resumes_to_the_same_bits"}),
}

# --- sources ---------------------------------------------------------------------------------------------------


class Numbered:
    """Random rows, each block from (seed, number): what the others below spoil."""

    subject = hook_point = None
    d_in = d_out = 8

    def peek(self):
        return {"d_in": 8, "data": "numbers"}

    def open(self, *, device, dtype):
        self.device, self.dtype = device, dtype
        self.generator = torch.Generator().manual_seed(0)

    def generator_of(self, split, seed, number):
        return torch.Generator().manual_seed(1000 * seed + number if split == "train" else 10**6 + number)

    def blocks(self, split, *, size, seed, start=0):
        number = start
        while split == "train" or number < 3:
            draws = torch.randn(size, 8, generator=self.generator_of(split, seed, number))
            yield Activations(draws.to(self.device, self.dtype))
            number += 1

    def identity(self):
        return {"data": "numbers"}


class InOrder(Numbered):
    """One generator for all: a block is what is drawn next."""

    def generator_of(self, split, seed, number):
        return self.generator if split == "train" else super().generator_of(split, seed, number)


class TrainsOnHeldOut(Numbered):
    """Holds out what it trains on."""

    def generator_of(self, split, seed, number):
        return torch.Generator().manual_seed(number % 3)


class OnePass(Numbered):
    """Ends with the data."""

    def blocks(self, split, *, size, seed, start=0):
        for number, block in enumerate(super().blocks(split, size=size, seed=seed, start=start), start):
            if number == 5:
                return
            yield block


class AlwaysFloat32(Numbered):
    """Gives its own dtype."""

    def open(self, *, device, dtype):
        super().open(device=device, dtype=torch.float32)


class LoadsToPeek(Numbered):
    """Loads the model to tell its width."""

    def peek(self):
        return {"d_in": torch.nn.Linear(8, 8).in_features, "data": "numbers"}


class TellsObjects(Numbered):
    """Its identity is no JSON."""

    def identity(self):
        return {"data": "numbers", "dtype": self.dtype}


class FromTheBeginning(Numbered):
    """Gives its held-out documents, one a row, in the order in which they lie."""

    def blocks(self, split, *, size, seed, start=0):
        for number, block in enumerate(super().blocks(split, size=size, seed=seed, start=start), start):
            block.sequence = torch.arange(len(block)) + number * size
            yield block

    def documents(self, sequences):
        return sequences[:, None].expand(-1, 2)


class FromAllOver(FromTheBeginning):
    """The same in another order."""

    def documents(self, sequences):
        return (sequences * 5 % 1024)[:, None].expand(-1, 2)


class Shown(FromAllOver):
    """Shows each row, which is a sequence of its own."""

    def blocks(self, split, *, size, seed, start=0):
        for block in super().blocks(split, size=size, seed=seed, start=start):
            block.position = torch.zeros_like(block.sequence)
            yield block

    def examples(self, sequence, position):
        return [Text(text=f"row {number}") for number in sequence.tolist()]


class ShownInTurn(Shown):
    """Numbers its examples as they are asked for."""

    def examples(self, sequence, position):
        return [Text(text=f"row {number}") for number in range(len(sequence))]


class ShownOnce(Shown):
    """Gives one example for all that are asked for twice."""

    def examples(self, sequence, position):
        return super().examples(sequence.unique(), position)


class ShownAsTensor(Shown):
    """Puts a tensor where numbers belong."""

    def examples(self, sequence, position):
        return [Numbers(values=[1.0], shape=torch.Size([1])) for _ in sequence]


class Runs(Numbered):
    """Its model gives the sum of the activations and its double."""

    shift = 0.0

    def model(self, x):
        return x.sum(1, keepdim=True) * torch.tensor([1.0, 2.0])

    def runs(self, split):
        block = next(self.blocks(split, size=256, seed=0))
        names, sequence = ["sum", "double"], torch.arange(256)
        yield RunBatch(block.x, self.model(block.x), names, sequence, None, lambda change: self.again(block.x, change))

    def again(self, x, change):
        return self.model(x + change)


class RunsOthers(Runs):
    """Runs on activations that `blocks` never gives."""

    def runs(self, split):
        for batch in super().runs(split):
            batch.x = 2 * batch.x
            yield batch


class RunsDeaf(Runs):
    """Does not hear of the change."""

    def again(self, x, change):
        return self.model(x)


class RunsForGood(Runs):
    """Goes on with what it was changed to."""

    def again(self, x, change):
        self.shift += float(change.sum())
        return self.model(x + change) + self.shift - (float(change.sum()) if self.shift else 0.0)


class RunsWithOneName(Runs):
    """Calls both outputs the same."""

    def runs(self, split):
        for batch in super().runs(split):
            batch.names = ["sum", "sum"]
            yield batch


RUNS: dict[str, tuple[Any, set[str]]] = {
    "runs": (Runs, set()),
    "runs_others": (RunsOthers, {"runs_again"}),
    "runs_deaf": (RunsDeaf, {"runs_again"}),
    "runs_for_good": (RunsForGood, {"runs_again"}),
    "runs_with_one_name": (RunsWithOneName, {"runs_again"}),
}
SOURCES: dict[str, tuple[Any, set[str]]] = {
    "shown": (Shown, set()),
    "shown_in_turn": (ShownInTurn, {"examples_of_places"}),
    "shown_once": (ShownOnce, {"examples_of_places"}),
    "shown_as_tensor": (ShownAsTensor, {"examples_of_places"}),
    "from_the_beginning": (FromTheBeginning, {"held_out_is_in_no_order"}),
    "from_all_over": (FromAllOver, set()),
    "numbered": (Numbered, set()),
    "in_order": (InOrder, {"same_block_for_its_number", "begins_anywhere"}),
    "trains_on_held_out": (TrainsOnHeldOut, {"held_out_is_apart"}),
    "one_pass": (OnePass, {"train_does_not_end"}),
    "always_float32": (AlwaysFloat32, {"shapes_and_columns"}),
    "loads_to_peek": (LoadsToPeek, {"peek_is_light"}),
    "tells_objects": (TellsObjects, {"identity_is_plain"}),
}

# --- trackers --------------------------------------------------------------------------------------------------


class Lines:
    """A line for each logged step, in the run directory."""

    @hookimpl
    def run_started(self, run):
        self.path = run.directory.path / "lines.txt"

    @hookimpl
    def logged(self, number, values):
        with self.path.open("a", encoding="utf-8") as file:
            file.write(f"{number} {values['loss']}\n")


class StopsTheRun(Lines):
    """Takes a full disk for a mistake of the user's."""

    @hookimpl
    def logged(self, number, values):
        from saekit import UsageError

        try:
            super().logged(number, values)
        except OSError as error:
            raise UsageError(f"{error}") from None


class Meddles(Lines):
    """Changes what it should write down."""

    @hookimpl
    def step_ended(self, trainer):
        if hasattr(trainer, "sae"):
            trainer.sae.b_enc.data.add_(0.1)


class NoNone(Lines):
    """Cannot take a value that is not defined."""

    @hookimpl
    def evaluated(self, metrics):
        self.values = [float(value) for value in metrics.values()]


TRACKERS: dict[str, tuple[Any, set[str]]] = {
    "lines": (Lines, set()),
    "stops_the_run": (StopsTheRun, {"a_failing_disk_only_warns"}),
    "meddles": (Meddles, {"changes_nothing"}),
    "no_none": (NoNone, {"survives_every_hook"}),
}

# --- graph builders --------------------------------------------------------------------------------------------


def _top(sae, codes):
    """The four latents that fire most, each with each."""
    fired = sum(code.fired() for code in codes)
    top = fired.topk(4).indices
    return torch.cartesian_prod(top, top).t(), fired


def often_together(sae, codes):
    """Edges between the latents that fire most."""
    edges, fired = _top(sae, codes)
    return FeatureGraph.of(sae, edges, fired[edges[0]].float())


def of_another(sae, codes):
    """A graph of a dictionary that it has normalised first."""
    edges, fired = _top(sae, codes)
    other = copy.deepcopy(sae)
    other.W_dec.data.mul_(2.0)
    return FeatureGraph.of(other, edges, fired[edges[0]].float())


def divides_by_silence(sae, codes):
    """Divides by how often a latent fires."""
    edges, fired = _top(sae, codes)
    return FeatureGraph.of(sae, edges, fired[edges[0]].float() / fired[edges[1]].float())


def sorts_the_decoder(sae, codes):
    """Leaves the decoder otherwise than it found it."""
    graph = often_together(sae, codes)
    sae.b_enc.data.add_(1e-6)
    return graph


GRAPH_BUILDERS: dict[str, tuple[Any, set[str]]] = {
    "often_together": (often_together, set()),
    "of_another": (of_another, {"gives_a_graph"}),
    "divides_by_silence": (divides_by_silence, {"dead_latents"}),
    "sorts_the_decoder": (sorts_the_decoder, {"inputs_unchanged"}),
}

# --- what each is caught by ------------------------------------------------------------------------------------


def failing(report: Report) -> set[str]:
    return {outcome.check for outcome in report.failures}


def checked(kind: str, name: str, target: Callable[..., Any], **declared: Any) -> Report:
    registry = registry_of(**{kind: Component(name, target, **declared)})
    report = check(kind, name, registry=registry)
    for outcome in report.failures:
        assert outcome.message, outcome.check
    return report


@pytest.mark.parametrize("name", LOSSES)
def test_losses(name: str) -> None:
    target, expected, declared = LOSSES[name]
    assert failing(checked("loss", name, target, **declared)) == expected


@pytest.mark.parametrize(
    ("declared", "message"),
    [
        ({"needs": ("lables",)}, "needs 'lables', which nothing installed provides. Did you mean 'labels'"),
        ({"provides": ("subject-model",)}, "provides 'subject-model', which nothing needs. Did you mean 'subject_model'?"),
        ({"needs": ("labels", "graph", "activations"), "provides": ("horoscope",)}, None),
    ],
)
def test_misspelt_needs_and_provides(declared: dict[str, tuple[str, ...]], message: str | None) -> None:
    registry = registry_of(loss=Component("spelt", lambda step: step.x.sum(), "A loss.", **declared))
    subject = Subject(registry.find("loss", "spelt"), {}, registry, Path())
    if message is None:
        words_are_known(subject)
        return
    with pytest.raises(Failed, match=re.escape(message)):
        words_are_known(subject)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architectures(name: str) -> None:
    target, expected = ARCHITECTURES[name]
    assert failing(checked("architecture", name, target)) == expected


@pytest.mark.parametrize("name", ["standard", "clipped"])
def test_architectures_that_begin_dense_are_checked_in_both_forms(name: str) -> None:
    registry = Registry()
    subject = Subject(registry.find("architecture", name), {}, registry, Path())
    assert isinstance(built(subject).encode(activations()), DenseCode)
    assert isinstance(built(subject, sparse=True).encode(activations()), SparseCode)
    assert bool(built(subject, sparse=True).encode(activations()).count().any())


@pytest.mark.slow
def test_an_architecture_under_a_name_of_sae_lens_that_computes_something_else() -> None:
    pytest.importorskip("sae_lens")
    assert failing(checked("architecture", "another_gate", AnotherGate)) == {"saelens_format"}


def test_an_option_that_options_does_not_tell() -> None:
    registry = registry_of(architecture=Component("forgets", ForgetsAnOption))
    report = check("architecture", "forgets", options={"floor": 0.3}, registry=registry)
    assert failing(report) == {"options_rebuild", "saved_and_loaded"}


@pytest.mark.parametrize("name", METRICS)
def test_metrics(name: str) -> None:
    target, expected = METRICS[name]
    assert failing(checked("metric", name, target)) == expected


@pytest.mark.parametrize("name", ANALYZERS)
def test_analyzers(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    target, expected = ANALYZERS[name]
    assert failing(checked("analyzer", name, target)) == expected


def test_an_analyzer_without_a_result() -> None:
    assert "gives_a_result" in failing(checked("analyzer", "no_result", no_result))


@pytest.mark.parametrize("name", COMPARISONS)
def test_comparisons(name: str) -> None:
    target, expected = COMPARISONS[name]
    assert failing(checked("comparison", name, target)) == expected


@pytest.mark.parametrize("name", CALLBACKS)
def test_callbacks(name: str) -> None:
    target, expected = CALLBACKS[name]
    assert failing(checked("callback", name, target)) == expected


def test_a_callback_whose_state_no_checkpoint_can_hold() -> None:
    assert "state_round_trip" in failing(checked("callback", "saves_an_object", SavesAnObject))


@pytest.mark.parametrize("name", SOURCES)
def test_sources(name: str) -> None:
    target, expected = SOURCES[name]
    assert failing(checked("source", name, target)) == expected


class LabelsOfPositions(Numbered):
    """Sequences with labels of positions, which `spoil` may spoil."""

    concepts = ("one", "two")

    def spoil(self, labels, each):
        return labels, each

    def sequences(self, split, n, seed, number):
        draws = self.generator_of(split, seed, number)
        each = torch.randint(0, 2, (n, 5, 2), generator=draws).float()
        labels, each = self.spoil(each.amax(1), each)
        x, mask = torch.randn(n, 5, 8, generator=draws), torch.ones(n, 5, dtype=torch.bool)
        return SequenceBatch(x, mask, labels, position_labels=each)


@pytest.mark.parametrize("name", RUNS)
def test_sources_that_run_again(name: str) -> None:
    target, expected = RUNS[name]
    assert failing(checked("source", name, target, provides=("outputs",))) == expected


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda self, labels, each: (labels, each), ""),
        (lambda self, labels, each: (torch.zeros_like(labels), each), "a sequence's label is not the largest of its positions'"),
        (lambda self, labels, each: (labels, each[:, :4]), r"position_labels are \[4, 4, 2\], not \[4, 5, 2\]"),
    ],
)
def test_labels_of_positions_agree_with_those_of_their_sequences(spoil: Any, message: str) -> None:
    spoilt = type("Spoilt", (LabelsOfPositions,), {"spoil": spoil})
    report = checked("source", "spoilt", spoilt, provides=("sequences",))
    assert failing(report) == ({"sequences_by_number"} if message else set())
    assert not message or re.search(message, report.failures[0].message)


@pytest.mark.parametrize("name", GRAPH_BUILDERS)
def test_graph_builders(name: str) -> None:
    target, expected = GRAPH_BUILDERS[name]
    assert failing(checked("graph_builder", name, target)) == expected


def test_a_metric_that_needs_a_graph_is_given_one() -> None:
    class Edges(Mean):
        """How many edges the graph has."""

        meanings = {"edges": "edges of the feature graph"}  # noqa: RUF012

        def prepare(self, context):
            context.graph.require(context.sae)
            self.edges = len(context.graph.weight)

        def compute(self):
            return {"edges": float(self.edges) if self.rows else None}

    builder = Component("often_together", often_together)
    registry = registry_of(graph_builder=builder, metric=Component("edges", Edges, needs=("graph",)))
    assert failing(check("metric", "edges", registry=registry)) == set()


@pytest.mark.parametrize("name", TRACKERS)
def test_trackers(name: str) -> None:
    target, expected = TRACKERS[name]
    assert failing(checked("tracker", name, target)) == expected


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("import torch", "imports torch"),
        ("import heavy_target", "imports its target's module heavy_target"),
    ],
)
def test_a_plugin_that_is_heavy_to_declare(text: str, word: str, fakes: Fakes) -> None:
    hooks = f"""
    {text}
    from saekit import Component, hookimpl

    @hookimpl
    def saekit_losses():
        yield Component("heavy", "heavy_target:heavy", "A loss.")
    """
    target = """
    def heavy(step):
        return step.code.sum().mean()
    """
    name = f"heavy_{word.split()[-1]}"
    fakes.install("saekit-heavy", "0.1", name, f"{name}_hooks", **{f"{name}_hooks": hooks, "heavy_target": target})
    report = check("loss", "heavy")
    assert failing(report) == {"light_to_declare"}
    assert word in report.failures[0].message


COMMANDS = {
    "sound": ("command = click.command()(lambda: None)\ncommand.help = 'Does it.'", "Does it.", set()),
    "silent": ("command = click.command()(lambda: None)", "Does it.", {"shows_its_help"}),
    "not_a_command": ("def command():\n    'Does it.'", "Does it.", {"shows_its_help"}),
    "breaks_when_imported": ("raise RuntimeError('no licence')", "Does it.", {"shows_its_help"}),
    "no_summary": ("command = click.command()(lambda: None)\ncommand.help = 'Does it.'", "", {"has_summary"}),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_commands(name: str, fakes: Fakes) -> None:
    target, summary, expected = COMMANDS[name]
    hooks = f"""
    from saekit import Command, hookimpl

    @hookimpl
    def saekit_commands():
        yield Command("does", "does_{name}_cli:command", {summary!r})
    """
    sources = {f"does_{name}": hooks, f"does_{name}_cli": f"import click\n{target}\n"}
    fakes.install("saekit-does", "0.1", f"does_{name}", f"does_{name}", **sources)
    registry = Registry()
    (plugin,) = (plugin for plugin in registry.plugins if plugin.name == f"does_{name}")
    assert failing(check_command(plugin.commands[0], plugin, registry)) == expected
