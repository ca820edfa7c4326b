"""The source `encoder`: any Hugging Face encoder on texts or images, pooled or position by position."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import nn

from saekit.activations.documents import TextUnit
from saekit.activations.encoders import load_encoder, token_texts
from saekit.activations.harvest import HookPoint, TargetHookPoint
from saekit.activations.huggingface import peek_model
from saekit.activations.sites import RESIDUAL
from saekit.builtin.sources.encoder_data import files_of, read
from saekit.builtin.sources.module import ModuleSource
from saekit.builtin.sources.pooling import Pool
from saekit.errors import OptionError
from saekit.examples import Example, Image, Text, Tokens


class EncoderSource(ModuleSource):
    """Activations of an encoder (BERT, RoBERTa, a sentence encoder, ViT) at any hook point.

    Texts come from .txt or .jsonl files, images from a directory or from a .jsonl file that names them; a .jsonl file also holds
    labels and captions. Each text or image is a sequence of its own: `pool` makes one row of it, over the positions that are not
    padding; with `pool = "none"` each position is a row. A text longer than `context` is cut, and a warning says how many are.

    Examples are shown as the text, with the tokens highlighted if they are not pooled, or as the image.
    """

    def __init__(
        self,
        *,
        model: Annotated[str, Field(description="A local directory or a name on the Hugging Face hub.")],
        data: Annotated[str, Field(description="A .txt or .jsonl file, a directory or glob of them; pictures for a vision model.")],
        hook_point: HookPoint,
        target_hook_point: TargetHookPoint = None,
        pool: Annotated[Pool, Field(description="One row of each text or image; none: a row for each position.")] = "mean",
        column: Annotated[str, Field(description="The key that holds the text, or the path of the picture.")] = "text",
        labels: Annotated[list[str] | None, Field(description="Keys that hold 0, 1, true, false, or null.")] = None,
        classes: Annotated[
            str | None, Field(description='A key that holds the name of a class; "folder" for pictures in folders by class.')
        ] = None,
        caption: Annotated[str | None, Field(description="A key that holds a caption.")] = None,
        unit: Annotated[TextUnit, Field(description="One text of a .txt: file, paragraph, line.")] = "auto",
        context: Annotated[int, Field(gt=1, description="The most tokens of a text.")] = 128,
        drop_special: Annotated[bool, Field(description="Leave CLS, SEP and other special tokens out.")] = False,
        rows: Annotated[int, Field(gt=0, description="Texts or images in one forward.")] = 32,
        limit: Annotated[int | None, Field(gt=1, description="The most texts or images to read.")] = None,
        held_out: Annotated[float, Field(gt=0, lt=1, description="The share of texts or images that is held out.")] = 0.05,
        trust_remote_code: Annotated[bool, Field(description="Run code that comes with the model.")] = False,
    ) -> None:
        self.model, self.texts, self.context, self.rows, self.limit = model, data, context, rows, limit
        self.column, self.label_keys, self.classes, self.caption_key, self.unit = column, labels or [], classes, caption, unit
        self.drop_special, self.trust_remote_code, self.share = drop_special, trust_remote_code, held_out
        super().__init__(
            module=_said(self._network, model), data=_said(self._batches, data),
            hook_point=hook_point, target_hook_point=target_hook_point, pool=pool,
            labels="labels" if labels or classes else None, caption="caption", example=self._example,
        )  # fmt: skip
        fix_labels = 'Name keys of the data in source.labels or source.classes, such as classes = "language".'
        self.withheld = {name: fix if name == "target" else fix_labels for name, fix in self.withheld.items()}
        self.withheld["outputs"] = "An encoder is read without a head: give a model that has one to the source module."

    def peek(self) -> dict[str, Any]:
        """Model and data by name, and the width for a residual hook point; see `protocols.Source.peek`."""
        known = peek_model(self.model)
        files_of(self.texts, bool(known.get("images")))
        found: dict[str, Any] = {"model": self.model, "hook_point": self.hook_point, "data": self.texts}
        for name, width in ((self.hook_point, "d_in"), (self.target_hook_point or self.hook_point, "d_out")):
            if RESIDUAL.fullmatch(name) and "hidden_size" in known:
                found[width] = known["hidden_size"]
        return found

    def open(self, *, device: torch.device, dtype: torch.dtype) -> None:
        """Load model and data. UsageError for anything that cannot be used."""
        self._loaded, self._processor, self._images = load_encoder(
            self.model, self.hook_point, trust_remote_code=self.trust_remote_code
        )
        self._records = read(
            self.texts, images=self._images, column=self.column, labels=self.label_keys, classes=self.classes,
            caption=self.caption_key, unit=self.unit, limit=self.limit, held_out=self.share,
        )  # fmt: skip
        self._given_concepts = self._records.concepts
        if self._images:
            self.args, self.mask, cut = ["pixel_values"], None, 0
        else:
            self.args, self.mask, cut = ["input_ids", "attention_mask"], "mask", self._tokenise()
        super().open(device=device, dtype=dtype)
        if cut:
            total = len(self._records.content)
            self.warnings.append(
                f"{cut} of {total} texts of {self.texts} have more than {self.context} tokens and are cut: see source.context."
            )

    def identity(self) -> dict[str, Any]:
        """What determines the activations; see `protocols.Source.identity`."""
        options = ("column", "classes", "unit", "limit", "context", "drop_special", "rows")
        return {
            **super().identity(),
            "data_digest": self._records.digests(),
            "labels": self.label_keys,
            "held_out": self.share,
            **{name: getattr(self, name) for name in options},
        }

    # --- what `module` asks for --------------------------------------------------------------------------------

    def _network(self) -> nn.Module:
        return self._loaded

    def _tokenise(self) -> int:
        """Keep the tokens of each text. Returns how many texts were cut."""
        limit = self._most_tokens()
        if self.context > limit:
            raise OptionError("context", f"{self.context}, but {self.model} takes {limit} tokens at most. Lower context.")
        whole = self._processor(self._records.content, verbose=False)["input_ids"]
        given = self._processor(
            self._records.content, truncation=True, max_length=self.context, return_special_tokens_mask=True, verbose=False
        )
        self._ids: list[list[int]] = given["input_ids"]
        self._special: list[list[int]] = given["special_tokens_mask"]
        return sum(len(ids) > self.context for ids in whole)

    def _most_tokens(self) -> int:
        """The longest text that the model can read. Where padding has a position of its own (RoBERTa), those up to it are lost."""
        positions = getattr(self._loaded.config, "max_position_embeddings", None) or 1 << 30
        tables = [module for name, module in self._loaded.named_modules() if name.endswith("position_embeddings")]
        lost = max((table.padding_idx + 1 for table in tables if getattr(table, "padding_idx", None) is not None), default=0)
        return min(positions - lost, self._processor.model_max_length)

    def _batches(self, split: str, seed: int) -> Iterator[dict[str, Any]]:
        records = self._records
        for numbers in records.batches(split, seed, self.rows):
            some = numbers.tolist()
            known = torch.from_numpy(records.labels[numbers])  # [n, n_concepts]
            batch = {"number": some, "caption": [records.captions[i] for i in some], "labels": known}
            yield batch | (self._pictures(some) if self._images else self._padded(some))

    def _padded(self, some: list[int]) -> dict[str, Any]:
        """The tokens of some texts, padded on the right to the longest: [n, T]."""
        longest = max(len(self._ids[i]) for i in some)
        ids = torch.full((len(some), longest), self._processor.pad_token_id)
        read, kept = torch.zeros_like(ids), torch.zeros_like(ids, dtype=torch.bool)
        for row, i in enumerate(some):
            length = len(self._ids[i])
            ids[row, :length], read[row, :length] = torch.tensor(self._ids[i]), 1
            kept[row, :length] = ~torch.tensor(self._special[i], dtype=torch.bool) if self.drop_special else True
        return {"input_ids": ids, "attention_mask": read, "mask": kept}

    def _pictures(self, some: list[int]) -> dict[str, Any]:
        """Some images as the model reads them: [n, 3, h, w]."""
        try:
            from PIL import Image as Picture
        except ImportError:
            raise OptionError("data", "pictures are read with Pillow, which is not installed: pip install pillow.") from None
        paths = [self._records.content[i] for i in some]
        opened = []
        for path in paths:
            try:
                opened.append(Picture.open(path).convert("RGB"))
            except OSError as error:
                raise OptionError("data", f"{path} cannot be read as a picture ({error}). Remove or replace it.") from None
        return {"pixel_values": self._processor(images=opened, return_tensors="pt")["pixel_values"]}

    def _example(self, batch: dict[str, Any], row: int) -> Example:
        """The text or the image; the tokens if each is a row."""
        if self._images:
            return Image.of(batch["pixel_values"][row])
        number = batch["number"][row]
        if self.pool == "none":
            return Tokens(parts=token_texts(self._processor, self._ids[number]))
        return Text(text=self._records.content[number])


def _said(function: Any, name: str) -> Any:
    """The function, which messages call by this name."""

    def said(**given: Any) -> Any:
        return function(**given)

    said.__signature__ = inspect.signature(function)  # type: ignore[attr-defined]
    said.said_as = name  # type: ignore[attr-defined]
    return said
