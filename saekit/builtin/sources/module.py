"""The source `module`: activations of any nn.Module on any batches, both made by functions that the user names."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from saekit.activations.batch import Activations, RunBatch, SequenceBatch
from saekit.activations.harvest import NO_TARGET, ONE_SITE, HookPoint, TargetHookPoint
from saekit.activations.shuffle import stop_point
from saekit.activations.sites import resolve
from saekit.builtin.sources.batches import Part, digest, equal
from saekit.builtin.sources.forward import Forward
from saekit.builtin.sources.module_examples import Shower
from saekit.builtin.sources.passes import Numbered, Passes
from saekit.builtin.sources.pooling import Pool
from saekit.builtin.sources.rerun import Rerun
from saekit.builtin.sources.users_code import MadeBy, called, name_of, named_object
from saekit.errors import OptionError, UsageError
from saekit.examples import Example
from saekit.seeds import derived_seed

_BATCH = 1 << 20  # `sequence` is the number of the batch times this, plus the row's place in the batch
_NO_LABELS = "Name the item of a batch that holds labels in source.labels."


class ModuleSource:
    """Activations of any `nn.Module` at a submodule, on batches from any iterable.

    module: a function (or class) without arguments that returns the module; it is frozen and put in evaluation mode.
    data: a function that returns a new iterable of batches, such as a DataLoader, each time it is called. It may take
        `split`, "train" or "held_out", and `seed`, which differs from pass to pass. Without `split` every n-th batch is
        held out, by its number, so the batches must come in the same order each time. A batch is a tensor, a tuple or
        list (`module(*batch)`), a dictionary (`module(**batch)`), or anything else (`module(batch)`); `args` takes some of its
        items. Texts, lists and dataclasses in it reach the module as they are, with their tensors on the device.

    The activation must be [n, d] or [n, T, d]. In the second case each position becomes a row, but for those at which `mask` is 0;
    `pool` makes one row of each sequence instead.

    `labels`, `mask` and `caption` name an item of the batch, or a function that is given the batch. `example` names a function
    that is given the batch and the number of a row, and returns what to show of it: a text, a list or set of items, a tensor or a
    `saekit.Example`.

    Called twice with the same `seed`, `data` must give the same batches, and as many in each pass: only
    then can a run resume exactly. Shuffle with a generator seeded with `seed`. At the start the first batch is made twice;
    a warning says so if the two differ.

    In Python, `module`, `data` and the others may be the functions themselves: derive a class that passes them on, in a file for
    `--plugin`. Resuming skips the batches that were used, without running the module.
    """

    subject = None

    def __init__(
        self,
        *,
        module: Annotated[MadeBy, Field(description="package.module:function or file.py:function that gives the module.")],
        data: Annotated[MadeBy, Field(description="package.module:function or file.py:function that gives the batches.")],
        hook_point: HookPoint,
        target_hook_point: TargetHookPoint = None,
        args: Annotated[
            list[int | str] | None, Field(description="The items of a batch that the module is given; all by default.")
        ] = None,
        keywords: Annotated[
            dict[str, Any] | None, Field(description="Further keyword arguments of each call of the module.")
        ] = None,
        mask: Annotated[
            Part | MadeBy | None, Field(description="What of a batch is 0 at padding, [n, T]: an item, or file.py:function.")
        ] = None,
        pool: Annotated[
            Pool, Field(description="One row of each sequence, from its positions; none: a row for each position.")
        ] = "none",
        labels: Annotated[
            Part | MadeBy | None, Field(description="What of a batch are labels, by row or position: an item, or file.py:function.")
        ] = None,
        concepts: Annotated[
            list[str] | None, Field(description="Names of the columns of labels, or of the classes that they number.")
        ] = None,
        caption: Annotated[
            Part | MadeBy | None, Field(description="What of a batch is a caption for each row: an item, or file.py:function.")
        ] = None,
        example: Annotated[
            MadeBy | None, Field(description="file.py:function of a batch and a row's number, which gives what to show of it.")
        ] = None,
        held_out: Annotated[
            float, Field(gt=0, le=0.5, description="The share of batches held out if data takes no split.")
        ] = 0.05,
        output: Annotated[
            str, Field(description="What the module's outputs are, as a hook point: .[logits] is an item of what it returns.")
        ] = ".",
        output_names: Annotated[
            list[str] | None, Field(description="What the outputs are called, such as the classes; numbered by default.")
        ] = None,
    ) -> None:
        self.module, self.data = module, data
        self.hook_point: str = hook_point
        self.target_hook_point = target_hook_point
        self.args, self.keywords, self.held_out = args, keywords or {}, held_out
        self.mask, self.pool, self.labels, self.caption, self.example = mask, pool, labels, caption, example
        self.concepts = self._given_concepts = list(concepts or [])
        if labels is None and concepts:
            raise OptionError("concepts", f"there are no labels that they could name. {_NO_LABELS}")
        self.output, self.output_names = output, output_names
        self.withheld = {} if target_hook_point else dict(NO_TARGET)
        if target_hook_point:
            self.withheld |= ONE_SITE
        elif pool == "max":
            self.withheld["outputs"] = 'A maximum has no one place to change: set source.pool to "mean", "first", "last" or "none".'
        if labels is None:
            self.withheld |= dict.fromkeys(("labels", "sequences"), _NO_LABELS)
        self.warnings: list[str] = []
        self._readers: dict[str, tuple[tuple[int, int], int, Iterator[tuple[Tensor, ...]]]] = {}

    def peek(self) -> dict[str, Any]:
        """The names. OptionError if they cannot be imported. See `protocols.Source.peek`."""
        for option in ("module", "data", "mask", "labels", "caption", "example"):
            what = getattr(self, option)
            if option in ("module", "data", "example") or (isinstance(what, str) and ":" in what):
                named_object(what, option)
        return {"model": name_of(self.module), "hook_point": self.hook_point, "data": name_of(self.data)}

    def open(self, *, device: torch.device, dtype: torch.dtype) -> None:
        """Make the module, and run it on the first batch up to the hook point."""
        self._device, self._dtype = torch.device(device), dtype
        self.warnings.clear()
        self._readers.clear()
        self.network = self._made().eval().requires_grad_(False).to(self._device)
        names = [self.hook_point] if self.target_hook_point is None else [self.hook_point, self.target_hook_point]
        sites = [resolve(self.network, name) for name in names]
        self._passes = Passes(named_object(self.data, "data"), self.data, self.held_out)
        self._show = Shower(self.args, self.caption, named_object(self.example, "example"), self._passes.name)
        first = self._passes.first()
        if not equal(first, self._passes.first()):
            self.warnings.append(
                f"{self._passes.name} gave another first batch when it was called again, so a resumed run will "
                "not go on with the same data, and what is held out may have been trained on. Shuffle by a generator "
                "seeded with a fixed number, or with the parameter seed."
            )
        self._forward = Forward(
            self.network, sites, name=name_of(self.module), data=self._passes.name, device=self._device, dtype=dtype,
            args=self.args, keywords=self.keywords, mask=self.mask, pool=self.pool, labels=self.labels,
            concepts=list(self._given_concepts),
        )
        shown = self._forward.rows(first, 0)
        self.concepts = self._forward.concepts
        self.d_in, self.d_out = self._forward.widths[0], self._forward.widths[-1]
        self._height = int(shown.mask.sum())  # activations of a batch
        self._show.check(first, len(shown.x))
        self._first = digest(first)

    def blocks(self, split: str, *, size: int, seed: int, start: int = 0) -> Iterator[Activations]:
        """Blocks `start`, `start + 1`, ... of about `size` activations; see `protocols.Source.blocks`."""
        height = self._batches_of(size)
        yield from self._grouped(self._numbered(split, seed, start * height), height)

    def first_pass(self, *, size: int, seed: int, start: int = 0) -> Iterator[Activations]:
        """The blocks of the first pass over "train"; see `protocols.Source.first_pass`."""
        height = self._batches_of(size)
        yield from self._grouped(self._passes.one_pass(seed, start * height), height)

    @property
    def pass_size(self) -> int:
        """About how many activations a pass gives. AttributeError if the data has no length."""
        return round(self._passes.pass_length * self._height)

    def sequences(self, split: str, n: int, seed: int, number: int) -> SequenceBatch:
        """Batch `number` of `n` labelled sequences; see `protocols.Source.sequences`. What is pooled has one position each."""
        if self.labels is None:
            raise OptionError("labels", f"there are no labelled sequences without labels. {_NO_LABELS}")
        begun, at, reader = self._readers.get(split, (None, 0, iter(())))
        if begun != (n, seed) or at != number:
            reader = self._labelled(split, derived_seed("sequences", seed), number * n)
        parts = list(itertools.islice(reader, n))
        self._readers[split] = ((n, seed), number + 1, reader)
        longest = max((len(part[0]) for part in parts), default=0)
        x = torch.zeros(len(parts), longest, self.d_in, dtype=self._dtype, device=self._device)  # [n, T, d_in]
        target = None if self.target_hook_point is None else x.new_zeros(*x.shape[:2], self.d_out)  # [n, T, d_out]
        mask = torch.zeros(x.shape[:2], dtype=torch.bool, device=self._device)
        labels = torch.zeros(len(parts), len(self.concepts), device=self._device)
        each = labels.new_zeros(*x.shape[:2], len(self.concepts)) if self._forward.labels_by_position else None
        for row, (activation, there, known, rebuilt, by_position) in enumerate(parts):
            mask[row, : len(there)], labels[row] = there, known
            x[row, mask[row]] = activation[there]
            if target is not None:
                target[row, mask[row]] = rebuilt[there]
            if each is not None:
                each[row, mask[row]] = by_position[there]
        return SequenceBatch(x, mask, labels, None, target, position_labels=each)

    def runs(self, split: str) -> Iterator[RunBatch]:
        """The batches of one pass through the whole module; see `protocols.Source.runs`."""
        again = Rerun(self._forward, self.pool, self.output, self.output_names)
        numbered = self._passes.held_out() if split == "held_out" else self._passes.one_pass(0, 0)
        for number, batch in numbered:
            yield again.batch(batch, number, first=number * _BATCH)

    def examples(self, sequence: Tensor, position: Tensor) -> list[Example]:
        """What held-out rows look like; see `protocols.Source.examples`. The batches are made again, without the module."""
        by_batch: dict[int, list[tuple[int, int, int]]] = {}
        for place, (number, at) in enumerate(zip(sequence.tolist(), position.tolist(), strict=True)):
            by_batch.setdefault(number // _BATCH, []).append((place, number % _BATCH, at))
        found: dict[int, Example] = {}
        batches = self._passes.held_out() if by_batch else iter(())
        for number, batch in itertools.takewhile(lambda of: of[0] <= max(by_batch), batches):
            for place, row, at in by_batch.get(number, ()):
                found[place] = self._show.example(batch, row, at if self._forward.by_position else None)
        if len(found) != len(sequence):
            raise UsageError(f"{self._passes.name} gives fewer held-out batches than before. Give the same ones each time.")
        return [found[place] for place in range(len(sequence))]

    def identity(self) -> dict[str, Any]:
        """What determines the activations, as far as that is known; see `protocols.Source.identity`."""
        return {
            "model": name_of(self.module),
            "model_digest": digest([t for _, t in sorted(self.network.state_dict().items())]),
            "data": self._passes.name,
            "first_batch_digest": self._first,
            "hook_point": self.hook_point,
            "target_hook_point": self.target_hook_point,
            "args": self.args,
            "keywords": {key: repr(value) for key, value in self.keywords.items()},
            **{name: _plain(getattr(self, name)) for name in ("mask", "pool", "labels", "concepts")},
            "held_out": None if self._passes.splits else self.held_out,
        }

    # --- batches -----------------------------------------------------------------------------------------------

    def _made(self) -> nn.Module:
        """The module. The random numbers of the run are as they were before."""
        maker = named_object(self.module, "module")
        with torch.random.fork_rng(devices=[]):  # a seed set in there must not change the run's
            made = maker if isinstance(maker, nn.Module) else called(maker, "module", self.module)
        if not isinstance(made, nn.Module):
            raise OptionError("module", f"{name_of(self.module)} gives {type(made).__name__}, not an nn.Module.")
        return made

    def _batches_of(self, size: int) -> int:
        return max(1, round(size / self._height))  # batches a block

    def _numbered(self, split: str, seed: int, first: int) -> Numbered:
        if split not in ("train", "held_out"):
            raise UsageError(f"split {split!r}: there are only 'train' and 'held_out'.")
        return self._passes.training(seed, first) if split == "train" else self._passes.held_out(first)

    def _grouped(self, numbered: Numbered, height: int) -> Iterator[Activations]:
        """Blocks of `height` batches each; the last one may have less."""
        parts: list[Activations] = []
        for number, batch in numbered:
            rows = sum(map(len, parts))
            stop_point(rows, rows * height // max(1, len(parts)))
            parts.append(self._forward.rows(batch, number).activations(number * _BATCH))
            if len(parts) == height:
                whole, parts = Activations.join(parts), []
                yield whole
                del whole
        if parts:
            yield Activations.join(parts)

    def _labelled(self, split: str, seed: int, first: int) -> Iterator[tuple[Tensor, ...]]:
        """Labelled sequences from number `first` on: x [T, d_in], mask [T], labels [n_concepts], target [T, d_out], and
        the labels of each position [T, n_concepts]."""
        without = 0  # batches in a row without any label
        for number, batch in self._numbered(split, seed, 0):
            known = self._forward.known_rows(batch)
            if known is not None and sum(known) <= first:  # passed over without running the module
                first -= sum(known)
                labelled = any(known)
            else:
                rows = self._forward.rows(batch, number)
                assert rows.labels is not None  # or there would be no option `labels`
                labels = rows.sequence_labels
                chosen = (~labels.isnan().all(1)).nonzero()[:, 0].tolist()
                labelled = bool(chosen)
                for row in chosen[first:]:
                    cut = slice(0, int(rows.mask[row].nonzero()[-1]) + 1)
                    target = rows.x if rows.target is None else rows.target
                    yield rows.x[row, cut], rows.mask[row, cut], labels[row], target[row, cut], rows.labels[row, cut]
                first = max(0, first - len(chosen))
            without = 0 if labelled else without + 1
            if self._passes.count is not None and without > self._passes.count:
                raise OptionError("labels", f"no training row of {self._passes.name} has a label. Label some, or leave labels out.")


def _plain(value: Any) -> Any:
    return name_of(value) if callable(value) else value
