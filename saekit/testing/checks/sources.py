"""What is asked of a source, on the CPU and mostly in float32."""

from __future__ import annotations

import itertools
import json
from typing import Any

import torch

from saekit.activations.batch import Activations, SequenceBatch
from saekit.activations.trained_positions import TrainedPositions
from saekit.examples import Example, Tokens, example_of
from saekit.protocols import Source
from saekit.testing.checks import any_kind
from saekit.testing.checks.shared import changed, copied, seeded
from saekit.testing.kit import Check, Failed, NotApplicable, Subject

_SIZE, _BLOCKS, _MOST_HELD_OUT = 256, 3, 20_000
_KNOWN = {"model", "hook_point", "target_hook_point", "d_in", "d_out", "data"}


_OPEN: dict[Any, Any] = {}
"""Opened sources of the component that was checked last: opening one may take long."""


def opened(subject: Subject, dtype: torch.dtype = torch.float32, instance: int = 0) -> Any:
    """The source, ready to give; the same object for the same arguments. instance: another number gives another one."""
    whose = subject.component, repr(subject.options)
    key = (whose, dtype, instance)
    if key not in _OPEN:
        if any(other[0] != whose for other in _OPEN):
            _OPEN.clear()
        source = subject.build()
        source.open(device=torch.device("cpu"), dtype=dtype)
        if hasattr(source, "push"):  # the kit is the program that feeds it
            generator = torch.Generator().manual_seed(0)
            for number in range(8):
                source.push(torch.randn(_SIZE, source.d_in, generator=generator), held_out=number % 2 == 1)
        _OPEN[key] = source
    return _OPEN[key]


def first_blocks(source: Source, n: int = _BLOCKS, *, split: str = "train", seed: int = 0, start: int = 0) -> list[Activations]:
    """Blocks `start` to `start + n - 1`, or fewer if the split ends before."""
    with seeded(0), torch.random.fork_rng(devices=[]):
        return list(itertools.islice(source.blocks(split, size=_SIZE, seed=seed, start=start), n))


def _differ(a: list[Activations], b: list[Activations]) -> str:
    return changed(copied(a), copied(b), "block")


# --- the checks ------------------------------------------------------------------------------------------------


def peek_is_light(subject: Subject) -> None:
    source = subject.build()
    made: list[str] = []
    real = torch.nn.Module.__init__

    def counting(module: Any, *args: Any, **kwargs: Any) -> None:
        made.append(type(module).__name__)
        real(module, *args, **kwargs)

    torch.nn.Module.__init__ = counting  # type: ignore[method-assign, assignment]
    try:
        found = source.peek()
    finally:
        torch.nn.Module.__init__ = real  # type: ignore[method-assign]
    if made:
        raise Failed(f"peek builds a {made[0]}. It is called to plan a run: read a configuration's file, and load in `open`.")
    if not isinstance(found, dict) or not set(found) <= _KNOWN:
        raise Failed(f"peek gives {found!r}. Return a dictionary with any of {', '.join(sorted(_KNOWN))}.")
    try:
        json.dumps(found)
    except TypeError as error:
        raise Failed(f"what peek gives is not plain: {error}.") from None


def peek_is_right(subject: Subject) -> None:
    told = subject.build().peek()
    source = opened(subject)
    for name in ("d_in", "d_out", "hook_point"):
        if name in told and told[name] != getattr(source, name, None):
            raise Failed(f"peek says {name} = {told[name]!r}, but after open it is {getattr(source, name, None)!r}.")


def shapes_and_columns(subject: Subject) -> None:
    for dtype in (torch.float32, torch.float64):
        source = opened(subject, dtype)
        block = first_blocks(source, 1)[0]
        _shape(block, source, dtype)
    promised = set(subject.component.provides) - set(getattr(source, "withheld", {}))
    for name in ("tokens", "labels", "target"):
        if name in promised and getattr(block, name) is None:
            raise Failed(
                f"it provides {name!r}, but its blocks have none. Give them, or say in `withheld` what these options lack."
            )
        if name not in subject.component.provides and getattr(block, name) is not None:
            raise Failed(f'its blocks have {name}, which it does not provide. Declare it: Component(..., provides=("{name}",)).')


def _shape(block: Any, source: Source, dtype: torch.dtype) -> None:
    if not isinstance(block, Activations):
        raise Failed(f"blocks gives {type(block).__name__}. Give saekit.Activations.")
    n = len(block)
    if block.x.ndim != 2 or block.x.shape[1] != source.d_in or block.x.dtype != dtype:
        raise Failed(f"x is {block.x.dtype} {list(block.x.shape)}, not {dtype} [n, {source.d_in}], as open was asked for.")
    if not 0 < n <= 4 * _SIZE:
        raise Failed(f"a block has {n} activations where about {_SIZE} were asked for.")
    if not bool(torch.isfinite(block.x).all()):
        raise Failed("some activations are not finite.")
    for name in ("target", "tokens", "sequence", "position", "labels"):
        column = getattr(block, name)
        if column is not None and len(column) != n:
            raise Failed(f"{name} has {len(column)} rows for {n} activations.")
    if block.target is not None and list(block.target.shape) != [n, source.d_out]:
        raise Failed(f"target is {list(block.target.shape)}, not [n, {source.d_out}].")
    if block.target is None and source.d_in != source.d_out:
        raise Failed(f"d_out is {source.d_out} and d_in {source.d_in}, but its blocks have no target.")
    if block.labels is not None:
        concepts = getattr(source, "concepts", [])
        known = block.labels[~block.labels.isnan()]
        if list(block.labels.shape) != [n, len(concepts)]:
            raise Failed(f"labels are {list(block.labels.shape)}, but `concepts` names {len(concepts)} columns.")
        if not bool(((known == 0) | (known == 1)).all()):
            raise Failed("labels are 0 or 1, or NaN where unknown; it gives others.")


def same_block_for_its_number(subject: Subject) -> None:
    source = opened(subject)
    in_order = first_blocks(source)
    if _differ(in_order, first_blocks(opened(subject, instance=1))):
        raise Failed("another instance with the same options and seed gives different blocks. Draw from (seed, number) alone.")
    first_blocks(source, seed=1)
    first_blocks(source, 1, split="held_out")
    if _differ(in_order, first_blocks(source)):
        raise Failed(
            "a block depends on what was asked before: asked for again, it is different. Make each block from the split, the "
            "seed and its number alone; only then does a resumed run get the same."
        )


def begins_anywhere(subject: Subject) -> None:
    in_order = first_blocks(opened(subject))
    if _differ(in_order[-1:], first_blocks(opened(subject, instance=1), 1, start=len(in_order) - 1)):
        raise Failed(f"blocks(start={len(in_order) - 1}) does not begin with the block of that number. A resume begins there.")


def held_out_ends(subject: Subject) -> None:
    rows, blocks = 0, []
    for block in opened(subject).blocks("held_out", size=_SIZE, seed=0):
        rows += len(block)
        blocks.append(block)
        if rows > _MOST_HELD_OUT:
            raise NotApplicable(f"more than {_MOST_HELD_OUT} activations are held out; it was not followed to its end.")
    if not rows:
        raise Failed("nothing is held out with these options, so nothing could be measured. Hold something out.")
    if _differ(blocks, list(opened(subject).blocks("held_out", size=_SIZE, seed=1))):
        raise Failed("what is held out, or its order, depends on the seed. Metrics of two runs could not be compared.")


def held_out_is_in_no_order(subject: Subject) -> None:
    source = opened(subject)
    blocks = first_blocks(source, split="held_out")
    if hasattr(source, "token_batches"):
        rows = next(source.token_batches("held_out", rows=4))
        wanted = rows.tokens[rows.keep]
        given = torch.cat([block.tokens for block in blocks if block.tokens is not None])[: len(wanted)]
        if not torch.equal(given, wanted[: len(given)]):
            raise Failed("token_batches gives other held-out rows than blocks, or in another order. Metrics would see other text.")
    if not hasattr(source, "documents") or blocks[0].sequence is None:
        raise NotApplicable("it does not tell which documents its held-out sequences are from.")
    sequences = [block.sequence for block in blocks if block.sequence is not None]
    order = torch.tensor(list(dict.fromkeys(torch.cat(sequences).tolist())))  # [n], as they come
    found = source.documents(order)
    if list(found.shape) != [len(order), 2] or bool((found[:, 0] > found[:, 1]).any()):
        raise Failed(f"documents gives {list(found.shape)} for {len(order)} sequences. Give the first and the last of each.")
    if int(found.max() - found.min()) >= 8 and bool((found[:, 0].diff() >= 0).all()):
        raise Failed(
            "what is held out comes in the order of the documents, so that a small budget sees only the first of them. Take it in "
            "an order drawn once for all runs."
        )


def positions_left_out_are_told(subject: Subject) -> None:
    source = opened(subject)
    if not hasattr(source, "token_batches"):
        raise NotApplicable("it has no rows of tokens.")
    rows = next(source.token_batches("held_out", rows=4))
    told = TrainedPositions.of_source(source.identity(), getattr(source, "special_tokens", ()))
    if not torch.equal(told.in_rows(rows.tokens) & rows.mask, rows.keep):
        raise Failed(
            "its rows keep other positions than identity() tells. Say drop_first = true there if the first is left out, and "
            "drop_special = true if those of special_tokens are: what uses the SAE later leaves the same positions alone."
        )


def train_does_not_end(subject: Subject) -> None:
    source = opened(subject)
    wanted, rows = 20, 0
    for block in itertools.islice(source.blocks("train", size=_SIZE, seed=0), wanted):
        rows += len(block)
        wanted -= 1
    if wanted:
        raise Failed(f'the split "train" ends after {rows} activations. Begin another pass over the data, in another order.')


def held_out_is_apart(subject: Subject) -> None:
    source = opened(subject)
    trained = _documents(first_blocks(source, 8))
    held_out = _documents(first_blocks(source, 8, split="held_out"))
    shared = held_out & trained
    # Short pieces of text may be equal by chance; if nothing were held out, all of them would be.
    if len(shared) > 0.5 * len(held_out):
        raise Failed(
            f"of {len(held_out)} held-out pieces {len(shared)} are in the training data too. Hold out whole documents, by "
            "their content or their number."
        )


def _documents(blocks: list[Activations]) -> set[bytes]:
    """What can be told apart in some blocks: the tokens of each sequence or, without tokens, the activations."""
    found: set[bytes] = set()
    for block in blocks:
        if block.tokens is None or block.sequence is None:
            found |= {row.numpy().tobytes() for row in block.x}
        else:
            for sequence in block.sequence.unique():
                found.add(block.tokens[block.sequence == sequence].numpy().tobytes())
    return found


def identity_is_plain(subject: Subject) -> None:
    first, second = (opened(subject, instance=n).identity() for n in range(2))
    try:
        json.dumps(first)
    except TypeError as error:
        raise Failed(f"identity() is not plain JSON: {error}. Give texts, numbers, lists; a digest for what is large.") from None
    if first != second:
        raise Failed("two instances with the same options have different identities, so no run could be resumed.")


def sequences_by_number(subject: Subject) -> None:
    source = opened(subject)
    if "sequences" not in set(subject.component.provides) - set(getattr(source, "withheld", {})):
        raise NotApplicable("it provides no labelled sequences with these options.")
    batch = source.sequences("train", 4, 0, 1)
    if batch.x.ndim != 3 or batch.mask.shape != batch.x.shape[:2] or batch.mask.dtype != torch.bool:
        got = f"x {list(batch.x.shape)} and mask {list(batch.mask.shape)}"
        raise Failed(f"a batch of sequences has {got}. Give x [n, T, d_in] and a mask [n, T] of booleans.")
    if bool(batch.labels.isnan().all(1).any()):
        raise Failed("a sequence has no label at all. Give only labelled sequences.")
    _labels_by_position(batch)
    source.sequences("train", 4, 0, 0)
    again = source.sequences("train", 4, 0, 1)
    if changed(copied(batch), copied(again)):
        raise Failed("batch number 1 of sequences is different when it is asked for again. Draw from (seed, number) alone.")


def _labels_by_position(batch: SequenceBatch) -> None:
    """Labels of positions, if a batch has any, agree with those of its sequences."""
    each = batch.position_labels
    if each is None:
        return
    if list(each.shape) != [*batch.mask.shape, batch.labels.shape[1]]:
        raise Failed(f"position_labels are {list(each.shape)}, not {[*batch.mask.shape, batch.labels.shape[1]]}.")
    largest = each.masked_fill(~batch.mask[..., None] & (each == 1), 0).amax(1)
    if not torch.equal(largest.nan_to_num(-1), batch.labels.nan_to_num(-1)):
        raise Failed("a sequence's label is not the largest of its positions'. Give 1 if one of them has the label, 0 if none has.")


def examples_of_places(subject: Subject) -> None:
    source = opened(subject)
    if not hasattr(source, "examples"):
        raise NotApplicable("it renders no examples; its tokens or its activations are shown.")
    block = first_blocks(source, 1, split="held_out")[0]
    if block.sequence is None or block.position is None:
        raise Failed("it has `examples`, but its blocks have no sequence and position to ask for. Give both.")
    rows = torch.tensor([len(block) - 1, 0, len(block) // 2, 0])  # in no order, one of them twice
    found = source.examples(block.sequence[rows], block.position[rows])
    if len(found) != len(rows) or not all(isinstance(one, Example) for one in found):
        raise Failed(f"examples gives {[type(one).__name__ for one in found]} for {len(rows)} rows. Give an Example for each.")
    alone = source.examples(block.sequence[:1], block.position[:1])[0]
    if not found[1] == found[3] == alone:
        raise Failed("a row looks different when it is asked for among others. Render it from its sequence and position alone.")
    for row, example in zip(rows.tolist(), found, strict=True):
        try:
            again = example_of(json.loads(json.dumps(example.to_json())))
        except (TypeError, ValueError) as error:
            raise Failed(f"an example is not plain: {error} Give texts and numbers in lists.") from None
        if again.to_json() != example.to_json():
            raise Failed("an example read from its own JSON is another one. Give texts and numbers in lists.")
        if block.tokens is not None and isinstance(example, Tokens) and example.at is not None:
            told = source.token_strings(block.tokens[row : row + 1])[0]
            if example.parts[example.at] != told:
                raise Failed(f"an example shows {example.parts[example.at]!r} at `at`, and the row's token is {told!r}.")


def runs_again(subject: Subject) -> None:
    source = opened(subject)
    if "outputs" not in set(subject.component.provides) - set(getattr(source, "withheld", {})):
        raise NotApplicable("it provides no outputs with these options.")
    blocks = first_blocks(source, 1, split="held_out")
    batch = next(iter(source.runs("held_out")))
    k, n = batch.outputs.shape
    if batch.x.shape[1] != source.d_in or len(batch.sequence) != k or len(batch.names) != n or len(set(batch.names)) < n:
        raise Failed(
            f"a batch has x {list(batch.x.shape)}, outputs [{k}, {n}], {len(batch.sequence)} sequences and {len(set(batch.names))} "
            f"names. Give x [m, {source.d_in}], a sequence for each row of the outputs, and another name for each column."
        )
    n_concepts = len(getattr(source, "concepts", ()))
    if batch.labels is not None and list(batch.labels.shape) != [k, n_concepts]:
        raise Failed(f"labels are {list(batch.labels.shape)}, not {[k, n_concepts]}: one row for each row of the outputs.")
    known = {row.numpy().tobytes() for row in blocks[0].x}
    if not known & {row.numpy().tobytes() for row in batch.x}:
        raise Failed("its activations are none of those that `blocks` gives. Give the same: masked, pooled, in the same dtype.")
    nothing, much = torch.zeros_like(batch.x), torch.ones_like(batch.x)
    if not torch.equal(batch.run(nothing), batch.outputs):
        raise Failed("a change of zero changes the outputs. Add the change to the activations of the same forward.")
    changed_to = batch.run(much)
    if changed_to.shape != batch.outputs.shape or torch.equal(changed_to, batch.outputs):
        raise Failed("adding 1 to every activation leaves the outputs as they are. Run the layers above with the change.")
    if not torch.equal(batch.run(nothing), batch.outputs):
        raise Failed("after a run with a change the outputs are others. Leave the model as it was.")


CHECKS: tuple[Check, ...] = (
    *any_kind.CHECKS,
    Check("peek_is_light", "`peek` builds no module, and gives plain values that are known without loading.", peek_is_light),
    Check("peek_is_right", "What `peek` says still holds after `open`.", peek_is_right),
    Check(
        "shapes_and_columns",
        "Blocks have the width and dtype that were asked for, and exactly the columns that it provides.",
        shapes_and_columns,
    ),
    Check(
        "same_block_for_its_number",
        "A block is decided by split, seed and number, whatever was asked before.",
        same_block_for_its_number,
    ),
    Check("begins_anywhere", "`blocks(start=n)` begins with block n, where a resumed run goes on.", begins_anywhere),
    Check("train_does_not_end", "The split `train` begins another pass where the data ends.", train_does_not_end),
    Check("held_out_ends", "The split `held_out` is not empty, ends, and keeps its order for every seed.", held_out_ends),
    Check(
        "held_out_is_in_no_order",
        "Held-out documents, if it tells them, do not come in their own order; `token_batches` gives the same rows as `blocks`.",
        held_out_is_in_no_order,
    ),
    Check(
        "positions_left_out_are_told",
        "Which positions its rows of tokens leave out follows from `identity` (`drop_first`, `drop_special`).",
        positions_left_out_are_told,
    ),
    Check("held_out_is_apart", "What is held out is not in the training data, as far as can be seen.", held_out_is_apart),
    Check("identity_is_plain", "`identity` is plain JSON, and the same for the same options.", identity_is_plain),
    Check(
        "sequences_by_number",
        "Labelled sequences, if it provides them, are decided by seed and number; labels of their positions agree with their own.",
        sequences_by_number,
    ),
    Check(
        "examples_of_places",
        "Examples of held-out rows, if it renders them, are plain data, one for each row, decided by the row alone.",
        examples_of_places,
    ),
    Check(
        "runs_again",
        "The model, if it provides outputs, runs again with a change of the activations that `blocks` gives, and stays as it was.",
        runs_again,
    ),
)
