"""Judged responses: a documented JSONL file (docs/quality.md), and the arrays made of it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import ArrayLike
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from saekit import UsageError, write_text
from saekit_quality.votes import Floats, hard_targets


def _plain_number(value: Any) -> Any:
    """pydantic takes true and 1.0 for 1; a file in which votes are written in three ways has probably been mixed up."""
    if type(value) is not int:
        raise ValueError("not a whole number")
    return value


Vote = Annotated[Literal[0, 1], BeforeValidator(_plain_number)] | None
Share = Annotated[float, Field(ge=0, le=1)]


class Record(BaseModel):
    """One line of the file. Further keys are kept, and ignored.

    response: what is judged.
    context: what was said before it: a text, or a list of turns, which are joined by line breaks.
    dialogue: which dialogue it belongs to; by default its context. Splits and intervals go by dialogue.
    votes: for each criterion a vote of each annotator, always in the same order: 0, 1, or null where it is missing. None for
        responses that are only to be scored.
    vote_probabilities: for each criterion how likely each annotator was to say yes. Known of generated data only.
    """

    model_config = ConfigDict(extra="allow", frozen=True)

    response: str
    context: str | list[str] = ""
    dialogue: str | int | None = None
    votes: dict[str, list[Vote]] | None = None
    vote_probabilities: dict[str, list[Share]] | None = None

    @property
    def context_text(self) -> str:
        """The context as one text."""
        return self.context if isinstance(self.context, str) else "\n".join(self.context)


@dataclass(frozen=True, eq=False)
class QualityData:
    """Judged responses: n of them, A annotators, C criteria.

    contexts, responses, dialogues: [n] each.
    votes: [n, A, C], each 0, 1 or NaN where it is missing.
    vote_probabilities: [n, A, C], how likely each vote was to be yes; known of generated data only.
    """

    contexts: tuple[str, ...]
    responses: tuple[str, ...]
    dialogues: tuple[str, ...]
    criteria: tuple[str, ...]
    votes: Floats
    vote_probabilities: Floats | None = None

    def __len__(self) -> int:
        return len(self.responses)

    def take(self, rows: ArrayLike) -> QualityData:
        """The responses with these numbers, or where this mask is true, in that order."""
        chosen = np.arange(len(self))[np.asarray(rows)].tolist()
        known = self.vote_probabilities
        return replace(
            self,
            contexts=tuple(self.contexts[i] for i in chosen),
            responses=tuple(self.responses[i] for i in chosen),
            dialogues=tuple(self.dialogues[i] for i in chosen),
            votes=self.votes[chosen],
            vote_probabilities=None if known is None else known[chosen],
        )

    def records(self) -> Iterator[Record]:
        """The lines of the file."""
        for i, (context, response, dialogue) in enumerate(zip(self.contexts, self.responses, self.dialogues, strict=True)):
            votes: dict[str, Any] = {
                name: [None if np.isnan(vote) else int(vote) for vote in self.votes[i, :, c]]
                for c, name in enumerate(self.criteria)
            }
            known = None
            if self.vote_probabilities is not None:
                known = {name: self.vote_probabilities[i, :, c].tolist() for c, name in enumerate(self.criteria)}
            yield Record(context=context, response=response, dialogue=dialogue, votes=votes, vote_probabilities=known)

    def summary(self) -> dict[str, Any]:
        """How many there are of everything, and for each criterion the shares of yes, of missing votes, and of responses on
        which at least two annotators voted and all agreed (None with one annotator)."""
        several = self.votes.shape[1] > 1
        present = (~np.isnan(self.votes)).sum(1)  # [n, C]
        mean = np.nan_to_num(self.votes).sum(1) / np.maximum(present, 1)
        whole = (present > 1) & ((mean == 0) | (mean == 1))
        labels = hard_targets(self.votes)
        criteria = {}
        for c, name in enumerate(self.criteria):
            column = self.votes[:, :, c]
            judged = int((present[:, c] > 1).sum())
            criteria[name] = {
                "yes": None if np.isnan(column).all() else float(np.nanmean(column)),
                "missing": float(np.isnan(column).mean()),
                "unanimous": float(whole[:, c].sum() / judged) if several and judged else None,
                "labelled": int((~np.isnan(labels[:, c])).sum()),
            }
        return {
            "responses": len(self), "dialogues": len(set(self.dialogues)), "annotators": self.votes.shape[1],
            "criteria": criteria,
        }  # fmt: skip


def read_records(lines: Iterable[str], name: str) -> Iterator[Record]:
    """The records of a file's lines, judged or not. UsageError, which begins with `name` and the line, for a wrong one.

    Empty lines are left out. A response without a visible character is refused: nothing in it can be judged.
    """
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{name}, line {number}"
        try:
            record = Record.model_validate(json.loads(line))
        except ValidationError as error:
            raise UsageError(f"{where}: {_told(error)}") from None
        except (ValueError, RecursionError) as error:
            raise UsageError(f"{where}: is not JSON: {error}. Write one object a line.") from None
        if not record.response.strip():
            raise UsageError(f"{where}: the response is empty. Leave the line out, or write what was said.")
        yield record


def from_records(records: Iterable[Record], name: str) -> QualityData:
    """Arrays of judged records. UsageError, which begins with `name` and the record's number, where they do not fit together."""
    kept = list(records)
    if not kept:
        raise UsageError(f"{name}: there is no response in it. Add at least one line.")
    criteria, annotators = _criteria(kept[0], f"{name}, response 1")
    for number, record in enumerate(kept, 1):
        _check(record, criteria, annotators, f"{name}, response {number}")
    probabilities: Floats | None = None
    known = [record.vote_probabilities for record in kept if record.vote_probabilities is not None]
    if len(known) == len(kept):
        probabilities = np.array([[one[c] for c in criteria] for one in known]).transpose(0, 2, 1)
    votes = np.array([[(record.votes or {})[c] for c in criteria] for record in kept], dtype=np.float64)
    return QualityData(
        contexts=tuple(record.context_text for record in kept),
        responses=tuple(record.response for record in kept),
        dialogues=tuple(r.context_text if r.dialogue is None else str(r.dialogue) for r in kept),
        criteria=criteria,
        votes=votes.transpose(0, 2, 1),  # [n, A, C]
        vote_probabilities=probabilities,
    )


def read_jsonl(path: str | Path) -> QualityData:
    """Judged responses of a file. UsageError for a file that cannot be read, and as `read_records` and `from_records`."""
    try:
        with Path(path).open(encoding="utf-8") as file:
            return from_records(read_records(file, str(path)), str(path))
    except UnicodeDecodeError:
        raise UsageError(f"{path}: is not UTF-8 text. Save it as UTF-8.") from None
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror or error}.") from None


def write_jsonl(path: str | Path, data: QualityData) -> None:
    """Write the file that `read_jsonl` reads."""
    lines = (record.model_dump_json(exclude_none=False, exclude_unset=False) for record in data.records())
    write_text(Path(path), "".join(f"{line}\n" for line in lines))


def split(data: QualityData, shares: Mapping[str, float], seed: int = 0) -> dict[str, QualityData]:
    """Parts in which no dialogue is shared, by name, drawn by `seed`. UsageError if a part would be empty.

    shares: of the dialogues, in total at most 1; what is left over is in none.
    """
    if any(share <= 0 for share in shares.values()) or sum(shares.values()) > 1 + 1e-9:
        raise UsageError(f"split: shares must be above 0 and at most 1 in total, got {dict(shares)}.")
    names, dialogue = np.unique(data.dialogues, return_inverse=True)
    order = np.random.default_rng(seed).permutation(len(names))
    ends = np.round(np.cumsum([0.0, *shares.values()]) * len(names)).astype(int)
    parts = {}
    for name, start, end in zip(shares, ends, ends[1:], strict=False):
        if end <= start:
            raise UsageError(f"split: the part {name!r} has no dialogue; there are {len(names)}. Give it more, or add dialogues.")
        parts[name] = data.take(np.isin(dialogue, order[start:end]))
    return parts


def _criteria(record: Record, where: str) -> tuple[tuple[str, ...], int]:
    if not record.votes:
        raise UsageError(f'{where}: has no votes. Add "votes": {{"relevance": [1, 0, null], ...}}.')
    return tuple(record.votes), len(next(iter(record.votes.values())))


def _check(record: Record, criteria: Sequence[str], annotators: int, where: str) -> None:
    names, _ = _criteria(record, where)
    if set(names) != set(criteria):
        extra, lacking = sorted(set(names) - set(criteria)), sorted(set(criteria) - set(names))
        told = [*(f"has {name!r}" for name in extra), *(f"lacks {name!r}" for name in lacking)]
        raise UsageError(
            f"{where}: its criteria differ from those of response 1: it {' and '.join(told)}. Every response needs the same; "
            "write null for a vote that is missing."
        )
    if annotators == 0:
        raise UsageError(f"{where}: there is no annotator: the lists of votes are empty.")
    for key in ("votes", "vote_probabilities"):
        for name, given in (getattr(record, key) or {}).items():
            if len(given) != annotators:
                raise UsageError(
                    f"{where}: {key}.{name} has {len(given)} entries, and {criteria[0]!r} of response 1 has {annotators}. "
                    "Write null for a vote that is missing."
                )
    if record.vote_probabilities is not None and set(record.vote_probabilities) != set(criteria):
        raise UsageError(f"{where}: vote_probabilities needs the same criteria as votes: {', '.join(criteria)}.")


def _told(error: ValidationError) -> str:
    """What is wrong with a line, in one sentence, with the fix."""
    first = error.errors(include_url=False)[0]
    place, given = [part for part in first["loc"] if isinstance(part, int) or part.isidentifier()], first["input"]
    key = place[0] if place else ""
    if key == "votes" and len(first["loc"]) > 2:
        criterion, annotator = first["loc"][1:3]
        who = f"annotator {int(annotator) + 1} on {criterion!r}"
        return f"the vote {given!r} of {who} is none. Write 0, 1, or null if it is missing."
    if first["type"] == "missing":
        return f"has no {key}. A line needs a response, and votes to learn from."
    if not key:
        return 'is not an object. Write {"context": ..., "response": ..., "votes": {...}}.'
    return f"{key}: {first['msg'][0].lower()}{first['msg'][1:]}, got {given!r}."
