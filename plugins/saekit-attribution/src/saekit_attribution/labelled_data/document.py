"""`LabelledData`: a JSON document of prompts with responses, some flagged as sycophantic; it is written back unchanged."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from saekit import UsageError, to_jsonable, write_text
from saekit_attribution.labelled_data.strict_json import kind_of, read_json

BASE = "base"
ANALYSIS = "atp_analysis"
Place = tuple[int, int]
"""(number of the result, number of the variation in it), both from 0."""

_FORMAT = (
    'The format is {"metadata": {...}, "results": [{"variations": [{"template_type": "base", "prompt": "...", '
    '"response": "...", "sycophancy_flag": 0}, ...]}, ...]}.'
)


@dataclass(frozen=True)
class Pair:
    """A flagged variation, and the base variation of the same result. Neither response is empty, and they differ."""

    place: Place
    template_type: str
    prompt: str
    response: str
    base_prompt: str
    base_response: str


@dataclass(frozen=True)
class Skipped:
    """A flagged variation that cannot be analysed. reason: a sentence without its full stop, for `atp_analysis`."""

    place: Place
    template_type: str
    reason: str


@dataclass(frozen=True)
class Variation:
    """The fields of a variation that are read; a prompt or response that is absent or null is empty."""

    place: Place
    template_type: str
    prompt: str
    response: str
    flagged: bool


@dataclass(frozen=True)
class LabelledData:
    """document: the whole JSON document, keys in their order. name: where it came from, for messages.

    UsageError if a field that is read has the wrong type; everything else in the document is ignored.
    """

    document: dict[str, Any]
    name: str

    def __post_init__(self) -> None:
        _ = self._results  # checks every type now rather than in the middle of an analysis

    @classmethod
    def load(cls, path: str | Path) -> LabelledData:
        """Read a file. UsageError if it is missing, cut off, malformed, or not a document of labelled data.

        A number keeps its value but not its spelling: 1.50 is written back as 1.5. A key that occurs twice in an object is
        refused, and so are NaN, Infinity and numbers beyond a double, since they could not be written back unchanged."""
        path = Path(path)
        document = read_json(path, _FORMAT)
        if not isinstance(document, dict):
            raise UsageError(f"{path}: is {kind_of(document)}, not an object. {_FORMAT}")
        return cls(document, str(path))

    @cached_property
    def digest(self) -> str:
        """sha256 of the document; the order of its keys counts."""
        return hashlib.sha256(json.dumps(self.document).encode()).hexdigest()

    @cached_property
    def _results(self) -> list[list[Variation]]:
        """The variations of each result."""
        results = self._checked(self.document, "results", list, "results")
        found = []
        for r, result in enumerate(results):
            where = f"results[{r}]"
            self._check(result, dict, where)
            variations = self._checked(result, "variations", list, f"{where}.variations")
            found.append([self._variation(v, (r, i), f"{where}.variations[{i}]") for i, v in enumerate(variations)])
        return found

    def _variation(self, variation: Any, place: Place, where: str) -> Variation:
        self._check(variation, dict, where)
        texts = {}
        for key in ("template_type", "prompt", "response"):
            texts[key] = variation.get(key)
            if texts[key] is None:
                texts[key] = ""
            self._check(texts[key], str, f"{where}.{key}")
        flag = variation.get("sycophancy_flag")
        if flag is not None and not isinstance(flag, bool | int | float):
            raise UsageError(f"{self.name}: {where}.sycophancy_flag: is {kind_of(flag)}. Make it 1 (flagged) or 0.")
        return Variation(place, **texts, flagged=flag == 1)

    def _checked(self, table: dict[str, Any], key: str, kind: type, where: str) -> Any:
        if key not in table:
            raise UsageError(f"{self.name}: {where}: is missing. {_FORMAT}")
        return self._check(table[key], kind, where)

    def _check(self, value: Any, kind: type, where: str) -> Any:
        if not isinstance(value, kind):
            names: dict[Any, str] = {list: "a list", dict: "an object", str: "text"}
            raise UsageError(f"{self.name}: {where}: is {kind_of(value)}, not {names[kind]}. {_FORMAT}")
        return value

    @property
    def variations(self) -> Iterator[Variation]:
        """Every variation, in the order of the document."""
        for variations in self._results:
            yield from variations

    def pairs(self) -> list[Pair | Skipped]:
        """Each flagged variation with the `base` variation of its result, in the order of the document; `Skipped` if
        there is no such pair."""
        return [_paired(v, variations) for variations in self._results for v in variations if v.flagged]

    def analysed(self, analyses: Mapping[Place, Any]) -> dict[str, Any]:
        """A copy of the document with `atp_analysis` added to the named variations, or replacing an earlier one."""
        results = []
        for r, result in enumerate(self.document["results"]):
            variations = [
                {**v, ANALYSIS: to_jsonable(analyses[r, i])} if (r, i) in analyses else v
                for i, v in enumerate(result["variations"])
            ]
            results.append({**result, "variations": variations})
        return {**self.document, "results": results}

    def write(self, path: Path, analyses: Mapping[Place, Any]) -> None:
        """Write the document with the analyses, whole or not at all."""
        document = self.analysed(analyses)
        text = json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False)
        if not _encodable(text):  # half of a surrogate pair, which JSON can only write as an escape
            text = json.dumps(document, indent=2, allow_nan=False)
        write_text(path, text + "\n")


def _paired(flagged: Variation, variations: list[Variation]) -> Pair | Skipped:
    bases = [v for v in variations if v.template_type == BASE]
    reason = _hindrance(flagged, bases)
    if reason is not None:
        return Skipped(flagged.place, flagged.template_type, reason)
    base = bases[0]
    return Pair(flagged.place, flagged.template_type, flagged.prompt, flagged.response, base.prompt, base.response)


def _hindrance(flagged: Variation, bases: list[Variation]) -> str | None:
    if not bases:
        return "No base variation"
    if len(bases) > 1:
        return "Several base variations"
    base = bases[0]
    texts = {
        "prompt": flagged.prompt,
        "response": flagged.response,
        "base prompt": base.prompt,
        "base response": base.response,
    }
    if base is flagged:
        return "The base variation itself is flagged"
    for name, text in texts.items():
        if not text.strip():
            return f"Empty {name}"
        if not _encodable(text):
            return f"The {name} is not valid Unicode"
    if flagged.response.strip() == base.response.strip():
        return "The response equals the base response"
    return None


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
