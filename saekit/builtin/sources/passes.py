"""`Passes`: batches that a function of the user's makes, pass after pass, and those of them that are held out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sized
from typing import Any

from saekit.activations.shuffle import stop_point
from saekit.builtin.sources.users_code import called, failure, name_of, parameters_of
from saekit.errors import OptionError, RunError, SaekitError
from saekit.seeds import derived_seed

Numbered = Iterator[tuple[int, Any]]


class Passes:
    """The batches of `factory`, numbered over all passes.

    factory: gives a new iterable at each call; it may take `split` and `seed`. It may also be the iterable itself.
    made_by: what the user called it. held_out: the share of batches held out, by their number, if it takes no `split`.
    """

    def __init__(self, factory: Any, made_by: Any, held_out: float) -> None:
        self._factory, self._made_by = factory, made_by
        self.name = name_of(made_by)
        self.splits = "split" in parameters_of(factory, {"split"})
        self._takes = parameters_of(factory, {"split", "seed"})
        self._period = max(2, round(1.0 / held_out))
        self.count: int | None = None
        """Batches of a pass over the training data, once one is over."""
        self._last: Any = None

    def first(self) -> Any:
        """The first training batch. OptionError if there is none."""
        for batch in self._of("train", derived_seed("pass", 0, 0)):
            return batch
        raise OptionError("data", f"{self.name} gave no batch. Give an iterable that is not empty.")

    def training(self, seed: int, first: int) -> Numbered:
        """The training batches number `first`, `first + 1`, ..., pass after pass; those before are only passed over."""
        begins, number = 0, 0  # batches before this pass, and its number
        while True:
            if self.count is not None and first - begins >= self.count:
                skipped = (first - begins) // self.count
                begins, number = begins + skipped * self.count, number + skipped
            count = 0
            for batch in self._of("train", derived_seed("pass", seed, number)):
                if begins + count >= first:
                    yield begins + count, batch
                else:
                    stop_point()
                count += 1
            if count == 0 or self.count not in (None, count):
                raise RunError(
                    f"{self.name} gave {count} training batches in pass {number}"
                    + (f" and {self.count} before" if self.count else "")
                    + ". Give as many in each pass."
                )
            self.count = count
            begins, number = begins + count, number + 1

    def one_pass(self, seed: int, first: int) -> Numbered:
        """The training batches of the first pass from number `first` on."""
        for number, batch in enumerate(self._of("train", derived_seed("pass", seed, 0))):
            if number >= first:
                yield number, batch

    def held_out(self, first: int = 0) -> Numbered:
        """The held-out batches from number `first` on. OptionError if there is none at all."""
        number = -1
        for number, batch in enumerate(self._of("held_out", derived_seed("held out"))):
            if number >= first:
                yield number, batch
        if number < 0:
            fix = 'give some for split = "held_out"' if self.splits else "give at least two batches, or take the parameter split"
            raise OptionError("data", f"{self.name} leaves no batch to hold out, so nothing could be measured: {fix}.")

    @property
    def pass_length(self) -> float:
        """About how many training batches a pass has. AttributeError if the data has no length."""
        data = self._called("train", 0)
        if not isinstance(data, Sized):
            raise AttributeError("pass_size")
        return len(data) * (1.0 if self.splits else 1.0 - 1.0 / self._period)

    def _called(self, split: str, seed: int) -> Iterable[Any]:
        given: dict[str, Any] = {"split": split, "seed": seed}
        if not callable(self._factory):
            return self._factory
        data = called(self._factory, "data", self._made_by, **{n: given[n] for n in given if n in self._takes})
        if not isinstance(data, Iterable):
            raise OptionError("data", f"{self.name} gives {type(data).__name__}; give an iterable of batches.")
        return data

    def _of(self, split: str, seed: int) -> Iterator[Any]:
        """The batches of one pass over a split, in their order."""
        data = self._called(split, seed)
        batches = iter(data)
        if batches is self._last:
            raise OptionError(
                "data",
                f"{self.name} gave the same iterator a second time, which has been used. Make a new one "
                "each time it is called.",
            )
        self._last = batches if batches is data else None
        held_out = split == "held_out"
        for number, batch in enumerate(self._guarded(batches)):
            if self.splits or (number % self._period == 1) == held_out:
                yield batch

    def _guarded(self, batches: Iterator[Any]) -> Iterator[Any]:
        """The same batches; an error in the user's code is named with the number of the batch."""
        number = 0
        while True:
            try:
                batch = next(batches)
            except StopIteration:
                return
            except SaekitError:
                raise
            except Exception as error:
                raise OptionError("data", f"{self.name} failed at batch {number}: {failure(error)}.") from error
            yield batch
            number += 1
