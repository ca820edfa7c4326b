"""The source `module` on real batches: padding, pooling, labels, whole sequences, captions, examples, and what cannot be used."""

from __future__ import annotations

import dataclasses
import itertools
import re
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from saekit import Component, Image, Items, Numbers, OptionError, SaekitError, Text
from saekit.builtin.sources import ModuleSource
from saekit.builtin.sources.pooling import labels_of, pooled
from saekit.testing import check, registry_of

CPU = torch.device("cpu")


class Sets(nn.Module):
    """Passes [n, T, 2] on, and can do so in other ways."""

    def __init__(self):
        super().__init__()
        self.site = nn.Identity()

    def forward(self, x, names=None, *, factor=1.0, **extra):
        if isinstance(x, list):  # texts: the numbers of their letters
            x = torch.tensor([[len(text), text.count("a")] for text in x]).float()
        if dataclasses.is_dataclass(x) or hasattr(x, "values_of"):
            x = x.values_of
        return self.site(x * factor)


def sets(split="train", seed=0):
    """Four batches of three sets of up to four items, each batch of another width; NaN stands at the padding."""
    for number in range(4):
        lengths = torch.tensor([1, 2 + number % 3, 1 + number % 2])
        mask = torch.arange(int(lengths.max())) < lengths[:, None]
        x = torch.full((*mask.shape, 2), torch.nan)
        x[mask] = torch.arange(2.0 * mask.sum()).view(-1, 2) + 100 * number
        kind = torch.tensor([number % 2, -1, 1])
        yield {"x": x, "mask": mask, "kind": kind, "name": [f"set {number}.{row}" for row in range(3)]}


def opened(data=sets, module=Sets, hook_point="site", args=("x",), **options):
    source = ModuleSource(module=module, data=data, hook_point=hook_point, args=None if args is None else list(args), **options)
    source.open(device=CPU, dtype=torch.float32)
    return source


def held_out(source):
    return next(iter(source.blocks("held_out", size=1000, seed=0)))


def test_padding_is_never_a_row():
    block = held_out(opened(mask="mask"))
    batches = list(sets())
    assert torch.equal(block.x, torch.cat([batch["x"][batch["mask"]] for batch in batches]))
    assert not block.x.isnan().any()
    positions = [position for batch in batches for length in batch["mask"].sum(1).tolist() for position in range(length)]
    assert block.position.tolist() == positions and block.sequence.unique().numel() == 12


@pytest.mark.parametrize(
    ("pool", "of"),
    [("mean", lambda x: x.mean(0)), ("max", lambda x: x.amax(0)), ("first", lambda x: x[0]), ("last", lambda x: x[-1])],
)
def test_pooling_is_over_the_positions_that_count(pool, of):
    block = held_out(opened(mask="mask", pool=pool))
    expected = [of(row[there]) for batch in sets() for row, there in zip(batch["x"], batch["mask"], strict=True)]
    torch.testing.assert_close(block.x, torch.stack(expected))
    assert block.position.tolist() == [0] * 12


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 4), st.integers(1, 5), st.sampled_from(["mean", "max", "first", "last"]), st.integers(0, 10**6))
def test_what_stands_at_padding_does_not_matter(n, length, pool, seed):
    draws = torch.Generator().manual_seed(seed)
    mask = torch.rand(n, length, generator=draws) < 0.5
    mask[:, int(torch.randint(length, (1,), generator=draws))] = True
    x = torch.randn(n, length, 3, generator=draws)
    other = torch.where(mask[:, :, None], x, torch.tensor([torch.nan, torch.inf, -torch.inf]))
    found = pooled(other, mask, pool)
    assert torch.equal(found, pooled(x, mask, pool)) and found.shape == (n, 1, 3) and found.isfinite().all()


def test_labels_by_row_by_class_and_by_position():
    by_class = held_out(opened(mask="mask", pool="mean", labels="kind", concepts=["even", "odd"]))
    even, odd = by_class.labels[:3].T
    assert even[[0, 2]].tolist() == [1, 0] and odd[[0, 2]].tolist() == [0, 1] and by_class.labels[1].isnan().all()
    by_position = held_out(opened(mask="mask", labels="kind", concepts=["even", "odd"]))
    lengths = [length for batch in sets() for length in batch["mask"].sum(1).tolist()]
    repeated = by_class.labels.repeat_interleave(torch.tensor(lengths), 0)
    torch.testing.assert_close(by_position.labels, repeated, equal_nan=True)

    large = opened(mask="mask", labels=lambda batch: (batch["x"][:, :, 0] >= 100).float(), concepts=["large"])
    assert torch.equal(held_out(large).labels[:, 0], (held_out(large).x[:, 0] >= 100).float())
    batch = large.sequences("held_out", 12, 0, 0)
    assert torch.equal(batch.labels_of_positions(), held_out(large).labels)
    assert torch.equal(batch.labels, batch.position_labels.amax(1))  # a sequence has what one of its positions has


@pytest.mark.parametrize(
    ("value", "concepts", "expected"),
    [
        (torch.tensor([True, False]), ["a"], [[1], [0]]),
        ([1, None], ["a"], [[1], [None]]),
        (torch.tensor([[0, 1], [1, 1]]), ["a", "b"], [[0, 1], [1, 1]]),
        (["b", None], ["a", "b"], [[0, 1], [None, None]]),
        (torch.tensor([2, -1]), ["a", "b", "c"], [[0, 0, 1], [None] * 3]),
    ],
)
def test_what_labels_may_be(value, concepts, expected):
    found = labels_of(value, concepts, 2, 1, "a batch")
    assert [[None if v != v else v for v in row] for row in found.tolist()] == expected


@pytest.mark.parametrize("pool", ["none", "mean"])
def test_whole_sequences_come_by_number_with_their_labels(pool):
    options = {"mask": "mask", "pool": pool, "labels": "kind", "concepts": ["even", "odd"]}
    source, again = opened(**options), opened(**options)
    in_order = [source.sequences("train", 3, 5, number) for number in range(7)]  # of 8 labelled ones a pass: into the third
    for number in (4, 0, 6):
        one, other = in_order[number], again.sequences("train", 3, 5, number)
        assert torch.equal(one.x, other.x) and torch.equal(one.mask, other.mask) and torch.equal(one.labels, other.labels)
    assert not any(batch.labels.isnan().any() for batch in in_order)
    whole = [source.sequences("held_out", 3, 0, number) for number in range(4)]
    assert [len(batch) for batch in whole] == [3, 3, 2, 0]
    assert all(not batch.x[~batch.mask].any() for batch in [*in_order, *whole])  # zeros, whatever stood there
    rows = torch.cat([batch.x[batch.mask] for batch in whole])
    known = held_out(source)
    assert torch.equal(rows, known.x[~known.labels.isnan().any(1)])
    assert all(batch.mask.shape[1] == batch.mask.sum(1).max() for batch in whole[:3])  # cut to the longest


def test_labelled_sequences_are_passed_over_without_the_module():
    source, calls = opened(mask="mask", labels="kind", concepts=["even", "odd"]), []
    source.network.site.register_forward_hook(lambda *_: calls.append(1))
    source.sequences("train", 2, 0, 3)  # begins at the seventh of eight, which is in the fourth batch
    assert len(calls) == 1


def test_unlabelled_data_ends_with_an_error_instead_of_never():
    source = opened(mask="mask", labels=lambda batch: [None] * 3)
    with pytest.raises(OptionError, match="^labels: no training row of .*sets has a label"):
        source.sequences("train", 2, 0, 0)


class Pair(NamedTuple):
    values_of: torch.Tensor
    words: list


@dataclasses.dataclass
class Record:
    values_of: torch.Tensor
    words: list


X = torch.arange(12.0).view(2, 3, 2)


@pytest.mark.parametrize(
    ("batch", "options", "expected"),
    [
        (["banana", "a"], {"args": None}, torch.tensor([[6.0, 3.0], [1.0, 1.0]])),
        ({"x": ["banana", "a"], "n": 3}, {"args": ["x"]}, torch.tensor([[6.0, 3.0], [1.0, 1.0]])),
        (Record(X, ["w"]), {"args": None}, X.view(6, 2)),
        (Pair(X, ["w"]), {"args": None}, X.view(6, 2)),
        ({"x": X, "names": ["p", "q"], "other": {"deep": [X]}}, {"args": None, "keywords": {"factor": 2.0}}, 2 * X.view(6, 2)),
    ],
)
def test_batches_that_are_more_than_tensors_reach_the_module(batch, options, expected):
    block = held_out(opened(data=lambda: [batch] * 3, **options))
    assert torch.equal(block.x, expected)


def test_examples_are_the_rows_that_were_asked_for():
    source = opened(mask="mask", caption="name", example=lambda batch, row: [f"{v:g}" for v in batch["x"][row, :, 0] if v == v])
    block = held_out(source)
    some = torch.tensor([len(block) - 1, 0, 3, 0])
    found = source.examples(block.sequence[some], block.position[some])
    for at, example in zip(some.tolist(), found, strict=True):
        assert isinstance(example, Items) and float(example.parts[example.at]) == block.x[at, 0]
    assert found[1] == found[3] and found[1].caption == "set 0.0"
    pooled_source = opened(mask="mask", pool="mean", example=lambda batch, row: batch["name"][row])
    assert pooled_source.examples(torch.tensor([1 << 20]), torch.tensor([0])) == [Text(text="set 1.0")]


@pytest.mark.parametrize(
    ("batch", "kind"),
    [(torch.rand(2, 3, 8, 8), Image), (torch.rand(2, 5), Numbers), (["a text", "another"], Text), ([["a", "b"], ["c"]], Items)],
)
def test_without_a_function_a_row_is_shown_by_what_went_in(batch, kind):
    class Any(nn.Module):
        def forward(self, x):
            return torch.ones(2, 3)

    source = opened(data=lambda: [[batch]] * 3, module=Any, hook_point=".", args=[0])
    (example,) = source.examples(torch.tensor([1]), torch.tensor([0]))
    assert isinstance(example, kind)


def all_of(**options):
    source = opened(**options)
    return [*source.blocks("held_out", size=100, seed=0), *itertools.islice(source.blocks("train", size=2, seed=0), 12)]


def changing():
    return [{"x": torch.ones(2, 2 + number // 2)} for number in range(4)]


def ends_early():
    lengths = itertools.count(6, -1)
    return lambda split: [{"x": X}] * next(lengths)


def breaks():
    yield {"x": X}
    yield {"x": X}
    raise OSError("the disk is gone")


def empties(split, seed):
    for batch in sets(split, seed):
        batch["mask"] = batch["mask"] & (torch.arange(3) != 2)[:, None]
        yield batch


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hook_point": "sight"}, "hook point 'sight': .* Did you mean 'site'"),
        ({"hook_point": ".", "module": lambda: Gives("a text")}, "hook point '.': the module returns str, not a tensor"),
        ({"hook_point": ".", "module": lambda: Gives((X, X))}, r"not one tensor. Name an item, for example .\[0\]"),
        ({"hook_point": ".", "module": lambda: Gives(X.long())}, r"the activation is int64 \[2, 3, 2\]; floating-point"),
        ({"data": changing}, "hook point 'site': the activation of batch 1 of .*changing has the width 3, and those before 2"),
        ({"data": ends_early()}, "gave 2 training batches in pass 1 and 3 before. Give as many in each pass"),
        ({"data": lambda: breaks()}, r"^data: .* failed at batch 2: OSError: the disk is gone \(.*, line \d+\)"),
        ({"data": lambda: [{"x": X}]}, "^data: .* leaves no batch to hold out.* give at least two batches"),
        ({"data": empties, "mask": "mask"}, "^mask: row 2 of batch 0 of .*empties is all padding.* Leave such rows out"),
        ({"mask": "maks"}, "^mask: a batch of .* has no item 'maks'; it is dict"),
        ({"mask": lambda b: b["mask"][:, :1]}, r"^mask: it is bool \[3, 1\] and the activation float32 \[3, 2, 2\] in batch 0"),
        ({"mask": lambda b: b["mask"] * 2}, "^mask: it holds other numbers than 0 and 1"),
        ({"data": lambda: [{"x": X[:, 0], "mask": X > 0}] * 3, "mask": "mask"}, r"^mask: .* has no positions. Leave mask out"),
        ({"labels": lambda b: b["kind"][:2]}, r"^labels: they are float32 \[2\] for the 3 rows of batch 0"),
        ({"labels": lambda b: b["kind"] + 5}, "^labels: 5 in batch 0 .* is no label. Give 0, 1, or NaN"),
        ({"labels": "kind", "concepts": ["only", "these"], "data": lambda: [{"x": X, "kind": torch.tensor([0, 2])}] * 3},
         "^labels: 2 in batch 0 of .* is not the number of a class; concepts names 2, 0 to 1"),
        ({"labels": lambda b: torch.ones(3, 3), "concepts": ["a", "b"]}, r"^labels: they are float32 \[3, 3\] .* 2 concepts"),
        ({"labels": "name", "concepts": ["set 0.0", "other"]}, "^concepts: there is no class 'set 0.1'"),
        ({"labels": lambda b: object()}, "^labels: object holds no labels"),
        ({"labels": lambda b: b["mask"].float(), "concepts": ["a"], "mask": "mask", "pool": "mean"}, r'^labels: .*pool = "mean"'),
        ({"concepts": ["a"]}, "^concepts: there are no labels that they could name. Name the item"),
        ({"caption": lambda b: b["name"][:2]}, "^caption: .* gives 2 for a batch of 3 rows. Give one for each row, None where"),
        ({"caption": lambda b: "all"}, "^caption: .* gives one text. Give a list"),
        ({"example": lambda b, row: 3}, "^example: it gives int for row 0 of a batch: an example is a text"),
        ({"example": lambda b, row: b["nothing"]}, "^example: .* failed: KeyError: 'nothing'"),
        ({"example": "nowhere.py:show"}, "^example: .*nowhere.py: there is no such file"),
        ({"keywords": {"factor": "x"}}, "^module: .* cannot run on a batch of .*TypeError"),
    ],
)
def test_what_cannot_be_used(options, message):
    with pytest.raises(SaekitError, match=message) as raised:
        all_of(**options)
    assert "\n" not in str(raised.value)


class Gives(nn.Module):
    """Returns what it is told to."""

    def __init__(self, what):
        super().__init__()
        self.what = what

    def forward(self, x):
        return self.what


def test_a_caption_for_some_rows_only():
    source = opened(mask="mask", pool="mean", caption=lambda batch: [None, *batch["name"][1:]])
    assert [one.caption for one in source.examples(torch.tensor([0, 1]), torch.tensor([0, 0]))] == ["", "set 0.1"]


def test_labels_and_options_are_in_the_identity():
    plain = opened(mask="mask").identity()
    assert plain != opened(mask="mask", pool="max").identity() != opened().identity()
    assert opened(mask="mask", labels="kind", concepts=["a", "b"]).identity()["concepts"] == ["a", "b"]


def seeded_sets(split, seed):
    draws = torch.Generator().manual_seed(seed + (split == "train"))
    for batch in itertools.islice(itertools.cycle(sets()), 40):
        yield {**batch, "x": batch["x"] + torch.rand(1, generator=draws)}


@pytest.mark.parametrize("pool", ["none", "mean"])
def test_conformance(pool):
    class Mine(ModuleSource):
        """Sets of items."""

        def __init__(self):
            super().__init__(
                module=Sets, data=seeded_sets, hook_point="site", args=["x"], mask="mask", pool=pool, labels="kind",
                concepts=["even", "odd"], caption="name", example=lambda batch, row: [f"{v:g}" for v in batch["x"][row, :, 0]],
            )

    registry = registry_of(source=Component("sets", Mine, provides=("target", "labels", "sequences")))
    report = check("source", "sets", registry=registry)
    assert not report.failures, "\n".join(map(str, report.failures))
    assert {"sequences_by_number", "examples_of_places"} <= {one.check for one in report.outcomes if one.status == "passed"}


def test_withheld_says_what_to_name():
    source = ModuleSource(module=Sets, data=sets, hook_point="site")
    assert set(source.withheld) == {"target", "labels", "sequences"} and re.search("source.labels", source.withheld["labels"])
