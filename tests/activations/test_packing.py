"""Packing keeps every token, once a pass, in rows that can be addressed in any order."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from saekit.activations.documents import Document
from saekit.activations.packing import (
    MixedRows,
    PackedRows,
    SequenceRows,
    TokenStore,
    first_token,
    held_out_order,
    tokenise,
)
from saekit.errors import UsageError

BOS, PAD = 100, 101


def store(lengths):
    """Documents of given lengths whose tokens are all different, above 1000."""
    offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int64)
    return TokenStore(
        np.arange(1000, 1000 + offsets[-1], dtype=np.int32), offsets, np.arange(len(lengths), dtype=np.uint64)
    )


def rows_of(lengths, context, bos=BOS):
    return PackedRows(store(lengths), np.arange(len(lengths)), context=context, bos=bos, pad=PAD)


documents = st.lists(st.integers(0, 30), min_size=1, max_size=20).filter(lambda lengths: sum(lengths) > 0)
contexts = st.integers(2, 17)
firsts = st.sampled_from([BOS, None])


@given(documents, contexts, firsts, st.sampled_from([None, 0, 7]), st.integers(0, 3))
def test_every_token_comes_once_a_pass_in_full_rows(lengths, context, bos, seed, number):
    rows = rows_of(lengths, context, bos)
    number = number if seed is not None else 0
    ids, mask = rows.take(np.arange(number * rows.count, (number + 1) * rows.count), seed)
    assert ids.shape == mask.shape == (rows.count, context)
    short = (~mask).any(1)
    assert short.sum() <= 1 and mask.any(1).all()  # padding at the end of one row alone
    assert (ids[~mask] == PAD).all() and not (np.diff(mask.astype(int), axis=1) > 0).any()
    if bos is not None:
        assert (ids[:, 0] == bos).all()
        ids, mask = ids[:, 1:], mask[:, 1:]
    assert sorted(ids[mask]) == list(range(1000, 1000 + sum(lengths)))


@given(documents, contexts, firsts)
def test_held_out_rows_are_those_of_documents_one_after_the_other_in_an_order_of_their_own(lengths, context, bos):
    rows = rows_of(lengths, context, bos)
    ids, mask = rows.take(np.arange(rows.count), None)
    first = int(bos is not None)
    in_order = np.argsort(held_out_order(rows.count))
    assert (ids[in_order, first:][mask[in_order, first:]] == np.arange(1000, 1000 + sum(lengths))).all()


def test_the_first_held_out_rows_are_from_all_over_the_split():
    rows = rows_of([40] * 200, 8)
    found = rows.documents(np.arange(100))[:, 0]  # a tenth of the rows
    assert found.min() < 20 and found.max() > 180 and len(set(found)) > 60
    sequences = SequenceRows(store([5] * 200), np.arange(200), context=8, bos=None, pad=PAD)
    assert np.ptp(sequences.documents(np.arange(20))) > 150


@given(documents, contexts, firsts)
def test_which_documents_a_held_out_row_holds(lengths, context, bos):
    whole, first = store(lengths), int(bos is not None)
    for kind in (PackedRows, SequenceRows):
        rows = kind(whole, np.arange(len(lengths)), context=context, bos=bos, pad=PAD)
        ids, mask = rows.take(np.arange(rows.count), None)
        for row, (begin, end) in enumerate(rows.documents(np.arange(rows.count))):
            tokens = ids[row, first:][mask[row, first:]] - 1000
            of = np.searchsorted(whole.offsets, tokens, side="right") - 1
            if len(of):
                assert (of[0], of[-1]) == (begin, end)


@given(documents, contexts, st.integers(0, 5), st.data())
def test_a_row_is_the_same_however_it_is_asked_for(lengths, context, seed, data):
    rows = rows_of(lengths, context)
    every, mask = rows.take(np.arange(3 * rows.count), seed)
    chosen = np.asarray(data.draw(st.lists(st.integers(0, 3 * rows.count - 1), min_size=1, max_size=9)))
    again, again_mask = rows_of(lengths, context).take(chosen, seed)
    assert (again == every[chosen]).all() and (again_mask == mask[chosen]).all()


def test_passes_and_seeds_have_orders_of_their_own():
    rows = rows_of([5] * 40, 16)
    orders = [
        tuple(rows.take(np.arange(rows.count) + number * rows.count, seed)[0].ravel())
        for seed in (0, 1)
        for number in (0, 1)
    ]
    assert len(set(orders)) == 4


def test_only_the_documents_chosen():
    whole = store([3, 4, 5])
    rows = PackedRows(whole, np.asarray([2, 0]), context=4, bos=None, pad=PAD)
    ids, mask = rows.take(np.arange(rows.count), None)
    assert list(ids[mask]) == [1007, 1008, 1009, 1010, 1011, 1000, 1001, 1002]


def test_no_room_and_no_tokens():
    with pytest.raises(UsageError, match="^context: 1: leaves no room"):
        rows_of([3], 1)
    with pytest.raises(UsageError, match="no tokens at all"):
        rows_of([0, 0], 8)


def mixed():
    parts = [rows_of([20] * n, 8) for n in (30, 9, 2)]
    return parts, MixedRows(parts, [5, 2, 1])


def test_a_mixture_holds_its_proportions_in_every_cycle_and_each_part_its_own_passes():
    parts, rows = mixed()
    kinds, within = rows.places(np.arange(800), seed=3)
    for cycle in kinds.reshape(100, 8):
        assert Counter(cycle.tolist()) == {0: 5, 1: 2, 2: 1}
    ids, _ = rows.take(np.arange(800), 3)
    for k, part in enumerate(parts):
        assert list(within[kinds == k]) == list(range((kinds == k).sum()))
        assert (ids[kinds == k] == part.take(within[kinds == k], 3)[0]).all()
    assert (rows.take(np.asarray([790, 3]), 3)[0] == ids[[790, 3]]).all()


def test_a_mixture_without_a_seed_gives_every_row_once_mixed_from_the_start():
    parts, rows = mixed()
    kinds, within = rows.places(np.arange(rows.count), seed=None)
    assert {(k, w) for k, w in zip(kinds, within, strict=True)} == {
        (k, w) for k, p in enumerate(parts) for w in range(p.count)
    }
    assert Counter(kinds[:8].tolist()) == {0: 5, 1: 2, 2: 1}
    for k in range(3):
        assert (np.diff(within[kinds == k]) == 1).all()


def test_tokenising_gives_each_document_its_tokens_and_eos(tiny_tokenizer):
    texts = ["A long bridge.", "", "Ünïcode — Пример", "lamps\n"]
    found = tokenise((Document(str(i), text) for i, text in enumerate(texts)), tiny_tokenizer)
    assert len(found) == 4 and found.ids.dtype == np.int32
    for i, text in enumerate(texts):
        ids = found.ids[found.offsets[i] : found.offsets[i + 1]]
        assert ids[-1] == tiny_tokenizer.eos_token_id and tiny_tokenizer.decode(ids[:-1]) == text
    assert found.digest() != tokenise([Document("0", "other")], tiny_tokenizer).digest()
    assert len(tokenise([], tiny_tokenizer)) == 0


def test_tokenising_in_pieces_is_tokenising_at_once(tiny_tokenizer, monkeypatch):
    texts = [Document(str(i), f"copper wire {i}") for i in range(50)]
    whole = tokenise(texts, tiny_tokenizer)
    monkeypatch.setattr("saekit.activations.packing._BATCH_CHARACTERS", 40)
    assert tokenise(texts, tiny_tokenizer).digest() == whole.digest()


def test_which_token_begins_a_row(tiny_tokenizer):
    class Without:
        bos_token_id = None

    assert first_token(tiny_tokenizer, "auto") == first_token(tiny_tokenizer, True) == 0
    assert first_token(tiny_tokenizer, False) is None and first_token(Without, "auto") is None
    with pytest.raises(UsageError, match="the tokenizer has no BOS token"):
        first_token(Without, True)
