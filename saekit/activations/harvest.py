"""The harvest: rows of tokens go through the layers below the site and come out as blocks of activations."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from saekit.activations.batch import Activations, RunBatch, SequenceBatch, TokenBatch
from saekit.activations.huggingface import load_subject, model_digest, peek_model, refuse_encoder
from saekit.activations.packing import Rows
from saekit.activations.shuffle import stop_point
from saekit.activations.sites import RESIDUAL
from saekit.activations.subject import Subject
from saekit.errors import ComponentError, OptionError, UsageError
from saekit.examples import Example, Tokens
from saekit.files import sha256_of
from saekit.seeds import derived_seed

ModelDtype = Literal["float32", "bfloat16"]
HookPoint = Annotated[
    str, Field(description="Where to read: blocks.2.hook_out, a submodule's path, a TransformerLens name.")
]
TargetHookPoint = Annotated[
    str | None, Field(description="For a transcoder: where to read what is rebuilt from the hook point.")
]
NO_TARGET = {"target": "For a transcoder, set source.target_hook_point."}
"""What a source that reads only one site withholds, and the fix."""
ONE_SITE = {"outputs": "Leave source.target_hook_point out: what a transcoder reads cannot be changed by it."}
"""The same of one that reads two."""


@dataclass(kw_only=True, eq=False, repr=False)
class HarvestSource:
    """What all sources that read text through a language model share; it implements `protocols.Source`.

    A subclass has `model`, the model's directory or hub name, as an option or a property, and `prepare`, which loads the
    `Subject` and the `Rows` of each split. Row r of "train" means the same tokens whenever it is asked for (given the
    seed), and block b is always the rows b * R to (b + 1) * R - 1; R depends only on the block's size and the mean
    length of the rows.

    Both sites are read in one forward. Activations are handed over in the dtype that `open` is given.
    """

    hook_point: HookPoint
    target_hook_point: TargetHookPoint = None
    context: Annotated[int, Field(gt=1, description="Tokens in a row.")] = 128
    drop_first: Annotated[bool, Field(description="Leave the first position of each row out (an attention sink).")] = (
        True
    )
    drop_special: Annotated[bool, Field(description="Leave BOS, EOS and other special tokens out.")] = False
    rows: Annotated[int, Field(gt=0, description="Rows of tokens in one forward.")] = 32
    model_dtype: Annotated[ModelDtype, Field(description="What the model computes in; bfloat16 on CUDA only.")] = (
        "float32"
    )

    if TYPE_CHECKING:  # a property that is really there would count as the default of a subclass's option

        @property
        def model(self) -> str: ...

    trust_remote_code = False  # an option of those sources that read a model of the user's choice

    def __post_init__(self) -> None:
        self.withheld = dict(ONE_SITE if self.target_hook_point else NO_TARGET)

    def peek(self) -> dict[str, Any]:
        """What config.json says about the model and the sites; see `protocols.Source.peek`.

        OptionError for a block or a context that the model lacks, and for rows of which too little would be kept."""
        known = peek_model(self.model)
        refuse_encoder(self.model, known)
        if self.drop_first and self.context == 2:
            raise OptionError(
                "context",
                "2, but drop_first leaves only the last position of such a row, which has no next token. "
                "Make it 3 or more, or set drop_first = false.",
            )
        found: dict[str, Any] = {"model": self.model, "hook_point": self.hook_point}
        self._check_context(self.model, known.get("context"))
        if self.target_hook_point is not None:
            found["target_hook_point"] = self.target_hook_point
        for option, name, width in (
            ("hook_point", self.hook_point, "d_in"),
            ("target_hook_point", self.target_hook_point or self.hook_point, "d_out"),
        ):
            residual = RESIDUAL.fullmatch(name)
            if residual and int(residual[1]) >= known.get("layers", int(residual[1]) + 1):
                raise OptionError(
                    option, f"{name!r}, but {self.model} has {known['layers']} blocks, 0 to {known['layers'] - 1}."
                )
            if residual and "hidden_size" in known:
                found[width] = known["hidden_size"]
        return found

    def prepare(self, device: torch.device, dtype: torch.dtype) -> tuple[Subject, dict[str, Rows], dict[str, Any]]:
        """The subject, the rows of "train" and "held_out", and what identifies the data."""
        raise NotImplementedError

    def load(self, device: torch.device, dtype: torch.dtype) -> Subject:
        """The model with its sites."""
        return load_subject(
            self.model,
            self.hook_point,
            target_hook_point=self.target_hook_point,
            device=device,
            dtype=dtype,
            trust_remote_code=self.trust_remote_code,
        )

    def open(self, *, device: torch.device, dtype: torch.dtype) -> None:
        """Load model and data. UsageError for anything that cannot be used."""
        self._dtype = dtype
        self._device = torch.device(device)
        self.subject, self._splits, self._data = self.prepare(self._device, getattr(torch, self.model_dtype))
        self._check_context(self.subject.name, self.subject.context)
        self.d_in, self.d_out = self.subject.widths()
        self._special = np.asarray(
            sorted(self.subject.tokenizer.all_special_ids) if self.drop_special else [], dtype=np.int64
        )

    def blocks(self, split: str, *, size: int, seed: int, start: int = 0) -> Iterator[Activations]:
        """Blocks `start`, `start + 1`, ... of about `size` activations; see `protocols.Source.blocks`.

        Each is one tensor [n, d_in] with its tokens, row numbers and positions. Memory: the block, and the activations
        of one forward; nothing here keeps a block after handing it over.
        """
        count = self._split(split).count if split == "held_out" else None
        yield from self._numbered(split, size, seed, start, count)

    def first_pass(self, *, size: int, seed: int, start: int = 0) -> Iterator[Activations]:
        """The blocks of the first pass over "train"; see `protocols.Source.first_pass`."""
        yield from self._numbered("train", size, seed, start, self._split("train").count)

    @property
    def pass_size(self) -> int:
        """About how many activations `first_pass` gives."""
        available = self._split("train")
        return round(available.count * max(1.0, available.length - self.drop_first))

    def _numbered(self, split: str, size: int, seed: int, start: int, count: int | None) -> Iterator[Activations]:
        """Blocks `start`, `start + 1`, ... of the first `count` rows, or of rows without end."""
        available = self._split(split)
        height = max(1, round(size / max(1.0, available.length - self.drop_first)))  # rows a block
        number = start
        while count is None or number * height < count:
            last = (number + 1) * height if count is None else min((number + 1) * height, count)
            yield self._block(available, np.arange(number * height, last), seed if split == "train" else None)
            number += 1

    def token_batches(self, split: str, *, rows: int) -> Iterator[TokenBatch]:
        """Rows of tokens, in the order and numbering of `blocks` for "held_out"; for "train", each once, in a fixed order."""
        available = self._split(split)
        for first in range(0, available.count, rows):
            yield self._tokens(available, np.arange(first, min(first + rows, available.count)), None)

    def runs(self, split: str) -> Iterator[RunBatch]:
        """Rows of tokens through the whole model, whose outputs are the logits at the positions that are kept, named by their
        tokens; see `protocols.Source.runs`."""
        available = self._split(split)
        names: list[str] = []
        for first in range(0, available.count, self.rows):
            numbers = np.arange(first, min(first + self.rows, available.count))
            batch = self._tokens(available, numbers, None)
            longest = int(batch.mask.sum(1).max())
            cut = slice(None), slice(longest)
            batch = TokenBatch(batch.tokens[cut], batch.mask[cut], batch.keep[cut], batch.sequence)
            row, position = batch.keep.to(self._device).nonzero(as_tuple=True)
            found = self._run_again(batch, self._labels_of(available, numbers, None, row, position))
            found.names = names = names or self._output_names(found.outputs.shape[1])
            yield found

    def _run_again(self, batch: TokenBatch, labels: Tensor | None) -> RunBatch:
        keep = batch.keep.to(self._device)
        found: list[Tensor] = []

        def seen(activation: Tensor) -> Tensor:
            found.append(activation[keep])
            return activation

        def run(change: Tensor) -> Tensor:
            def changed(activation: Tensor) -> Tensor:
                added = torch.zeros_like(activation)
                added[keep] = change.to(activation.dtype)
                return activation + added

            with self.subject.replaced(changed):
                return self.subject.logits(batch)[keep]

        with self.subject.replaced(seen):
            outputs = self.subject.logits(batch)[keep]
        sequence = batch.sequence.to(self._device)[keep.nonzero()[:, 0]]
        return RunBatch(found[0].to(self._dtype), outputs, (), sequence, labels, run)

    def _output_names(self, n: int) -> list[str]:
        """Each token as text, with its number where another one has the same."""
        known = len(self.subject.tokenizer)
        texts = [*self.token_strings(torch.arange(min(n, known))), *[""] * max(0, n - known)]
        often = Counter(texts)
        return [text if text and often[text] == 1 else f"{text}#{token}" for token, text in enumerate(texts)]

    def documents(self, sequences: Tensor) -> Tensor:
        """The documents of held-out rows: [n] -> [n, 2]; see `protocols.Source.documents`."""
        return torch.from_numpy(self._split("held_out").documents(sequences.cpu().numpy()))

    def identity(self) -> dict[str, Any]:
        """What determines the activations; see `protocols.Source.identity`."""
        return {
            "model": self.subject.name,
            "model_digest": self.subject.digest(),
            "tokenizer_digest": _tokenizer_digest(self.subject.tokenizer),
            **self._data,
            "hook_point": self.hook_point,
            "target_hook_point": self.target_hook_point,
            "context": self.context,
            "drop_first": self.drop_first,
            "drop_special": self.drop_special,
            "model_dtype": self.model_dtype,
        }

    def token_strings(self, tokens: Tensor) -> list[str]:
        """Each token id of a [n] tensor as readable text, with the leading space if the token has one."""
        tokenizer = self.subject.tokenizer
        texts = {}
        for token in set(tokens.tolist()):
            text = tokenizer.decode([token], clean_up_tokenization_spaces=False)
            piece = tokenizer.convert_ids_to_tokens(token) or ""
            # SentencePiece drops the space at the beginning of a text when it decodes.
            texts[token] = f" {text}" if piece.startswith("\u2581") and not text.startswith(" ") else text
        return [texts[token] for token in tokens.tolist()]

    def examples(self, sequence: Tensor, position: Tensor) -> list[Example]:
        """The tokens of held-out rows; see `protocols.Source.examples`."""
        rows, which = sequence.cpu().unique(return_inverse=True)
        ids, mask = self._split("held_out").take(rows.numpy(), None)
        parts = [self.token_strings(torch.from_numpy(row[there])) for row, there in zip(ids, mask, strict=True)]
        return [Tokens(parts=parts[row], at=at) for row, at in zip(which.tolist(), position.tolist(), strict=True)]

    @property
    def special_tokens(self) -> list[int]:
        """The ids of BOS, EOS and the other special tokens."""
        return sorted(self.subject.tokenizer.all_special_ids)

    def _fingerprint(self, files: list[Path] | None, *options: str) -> dict[str, Any] | None:
        """`protocols.Source.fingerprint`: hashes of the model's and the data's files, and the options that matter.

        None if the files are not known: for a model that was never downloaded, or (files is None) a data set of the hub."""
        digest = model_digest(self.model)
        if digest is None or files is None:
            return None
        shared = ("hook_point", "target_hook_point", "context", "drop_first", "drop_special", "model_dtype")
        return {
            "model_digest": digest,
            "data_digest": {path.name: sha256_of(path) for path in files},
            **{name: getattr(self, name) for name in (*shared, *options)},
        }

    def _check_context(self, model: str, limit: int | None) -> None:
        if limit is not None and self.context > limit:
            raise OptionError("context", f"{self.context}, but {model} takes {limit} tokens at most. Lower context.")

    def _split(self, split: str) -> Rows:
        if split not in self._splits:
            raise UsageError(f"split {split!r}: there are only {' and '.join(map(repr, self._splits))}.")
        return self._splits[split]

    def _tokens(self, available: Rows, numbers: np.ndarray, seed: int | None) -> TokenBatch:
        ids, mask = available.take(numbers, seed)  # [n, T], [n, T]
        keep = mask.copy()  # [n, T]
        if self.drop_first:
            keep[:, 0] = False
        if len(self._special):
            keep &= ~np.isin(ids, self._special)
        return TokenBatch(*map(torch.from_numpy, (ids, mask, keep, numbers.astype(np.int64))))

    def _block(self, available: Rows, numbers: np.ndarray, seed: int | None) -> Activations:
        whole = self._tokens(available, numbers, seed)
        row, position = (index.to(self._device) for index in whole.keep.nonzero(as_tuple=True))  # [n], [n]
        place = torch.zeros_like(whole.tokens)  # [rows, T]: which activation of the block each position gives
        place[whole.keep] = torch.arange(len(row))
        x = torch.empty(len(row), self.d_in, dtype=self._dtype, device=self._device)  # [n, d_in]
        target = None if self.target_hook_point is None else x.new_empty(len(row), self.d_out)  # [n, d_out]
        for some, batch in self._forwards(whole):
            activations, targets = self.subject.pair(batch)  # [r, t, d_in], [r, t, d_out]
            # Indices come from the host, so that nothing waits for the device.
            into = place[some, : batch.keep.shape[1]][batch.keep].to(self._device)  # [k]
            at = tuple(index.to(self._device) for index in batch.keep.nonzero(as_tuple=True))  # [k], [k]
            x[into] = activations[at].to(x.dtype)
            if target is not None:
                target[into] = targets[at].to(x.dtype)
        tokens, sequence = whole.tokens.to(self._device), whole.sequence.to(self._device)
        labels = self._labels_of(available, numbers, seed, row, position)
        return Activations(x, target, tokens[row, position], sequence[row], position, labels)

    def _labels_of(
        self, available: Rows, numbers: np.ndarray, seed: int | None, row: Tensor, position: Tensor
    ) -> Tensor | None:
        """The labels of positions of some rows: [n, n_concepts], None if there are none."""
        each = available.position_labels(numbers, seed)  # [rows, T, n_concepts]
        if each is not None:
            return torch.from_numpy(each).to(self._device)[row, position]
        known = available.labels(numbers, seed)  # [rows, n_concepts]
        return None if known is None else torch.from_numpy(known).to(self._device)[row]

    def _forwards(self, whole: TokenBatch) -> Iterator[tuple[Tensor, TokenBatch]]:
        """The rows in portions for one forward: their places in `whole`, [r], and their tokens, cut to the longest.

        Rows of similar length go together, so that little padding goes through the model."""
        lengths, kept = whole.mask.sum(1), whole.keep.sum(1)  # [rows], [rows]
        done, total = 0, int(kept.sum())
        for some in lengths.argsort(stable=True).split(self.rows):
            stop_point(done, total)
            done += int(kept[some].sum())
            longest = int(lengths[some].max())
            tokens, mask, keep = (t[some, :longest] for t in (whole.tokens, whole.mask, whole.keep))
            yield some, TokenBatch(tokens, mask, keep, whole.sequence[some])


class LabelledHarvestSource(HarvestSource):
    """A harvest whose rows have labels: besides the positions it gives the second stream, `sequences`.

    A subclass's `prepare` also sets `concepts`, the names of the columns of labels, and `labelled`, the rows of each
    split that have at least one label. These are not the objects that it returns, because a background thread reads those.
    """

    concepts: list[str]
    labelled: dict[str, Rows]

    def sequences(self, split: str, n: int, seed: int, number: int) -> SequenceBatch:
        """Batch `number` of `n` whole rows with labels, cut to the longest; see `protocols.Source.sequences`."""
        self._split(split)
        if split not in self.labelled:
            raise ComponentError(f"no row of the split {split!r} has a label, so there are no labelled sequences.")
        available = self.labelled[split]
        numbers, order = np.arange(number * n, (number + 1) * n), None
        if split == "held_out":
            numbers = numbers[numbers < available.count]
        else:
            order = derived_seed("sequences", seed)
        whole = self._tokens(available, numbers, order)
        longest = int(whole.mask.sum(1).max()) if len(numbers) else 0
        x = torch.zeros(len(numbers), longest, self.d_in, dtype=self._dtype, device=self._device)  # [n, T, d_in]
        target = None if self.target_hook_point is None else x.new_zeros(*x.shape[:2], self.d_out)  # [n, T, d_out]
        for some, batch in self._forwards(whole) if len(numbers) else ():
            row, position = batch.keep.nonzero(as_tuple=True)
            activations, targets = self.subject.pair(batch)  # [r, t, d_in], [r, t, d_out]
            into, row, position = (index.to(self._device) for index in (some[row], row, position))  # [k] each
            x[into, position] = activations[row, position].to(x.dtype)
            if target is not None:
                target[into, position] = targets[row, position].to(x.dtype)
        mask, tokens = (t[:, :longest].to(self._device) for t in (whole.keep, whole.tokens))
        each = available.position_labels(numbers, order)
        if each is None:
            labels = torch.from_numpy(available.labels(numbers, order)).to(self._device)
            return SequenceBatch(x, mask, labels, tokens, target)
        by_position = torch.from_numpy(each)  # [n, context, n_concepts]
        # Only positions of the data count: a mark on one that is left out does not make its sequence one with the label.
        labels = by_position.masked_fill(~whole.keep[..., None] & (by_position == 1), 0).amax(1)
        labels, by_position = labels.to(self._device), by_position[:, :longest].to(self._device)
        return SequenceBatch(x, mask, labels, tokens, target, position_labels=by_position)


def _tokenizer_digest(tokenizer: Any) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    text = backend.to_str() if backend is not None else repr(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
