"""`LabelledData`: a JSON document of prompts with responses, some flagged; it is written back unchanged."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from saekit import OptionError, UsageError, to_jsonable, write_text
from saekit_attribution.labelled_data.strict_json import kind_of, read_json

ANALYSIS = "atp_analysis"
Place = tuple[int, int]
"""(number of the result, number of the variation in it), both from 0."""

KeyName = Literal["results", "variations", "template_type", "prompt", "response", "flag", "base"]


@dataclass(frozen=True)
class Keys:
    """What the keys of a labelled document are called, and `base`, the template type of base variations.

    OptionError if two fields of a variation have one key."""

    results: str = "results"
    variations: str = "variations"
    template_type: str = "template_type"
    prompt: str = "prompt"
    response: str = "response"
    flag: str = "sycophancy_flag"
    base: str = "base"

    def __post_init__(self) -> None:
        own = [self.template_type, self.prompt, self.response, self.flag]
        if len(set(own)) < len(own):
            raise OptionError("keys", f"two fields of a variation have one key: {', '.join(own)}. Give each its own.")

    @property
    def format(self) -> str:
        """A sentence that shows the format, for messages."""
        k = {name: json.dumps(value, ensure_ascii=False) for name, value in vars(self).items()}
        variation = (
            f'{{{k["template_type"]}: {k["base"]}, {k["prompt"]}: "...", {k["response"]}: "...", {k["flag"]}: 0}}'
        )
        inside = f"{k['results']}: [{{{k['variations']}: [{variation}, ...]}}, ...]"
        return f'The format is {{"metadata": {{...}}, {inside}}}.'


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
    """The fields of a variation that are read; a prompt or response that is absent or null is empty. is_base: others are
    compared with it."""

    place: Place
    template_type: str
    prompt: str
    response: str
    flagged: bool
    is_base: bool


@dataclass(frozen=True)
class LabelledData:
    """document: the whole JSON document, keys in their order. name: where it came from, for messages. keys: what its keys
    are called.

    UsageError if a field that is read has the wrong type; everything else in the document is ignored.
    """

    document: dict[str, Any]
    name: str
    keys: Keys = Keys()

    def __post_init__(self) -> None:
        _ = self._results  # checks every type now rather than in the middle of an analysis

    @classmethod
    def load(cls, path: str | Path, keys: Mapping[KeyName, str] | None = None) -> LabelledData:
        """Read a file. UsageError if it is missing, cut off, malformed, or not a document of labelled data.

        A number keeps its value but not its spelling: 1.50 is written back as 1.5. A key that occurs twice in an object is
        refused, and so are NaN, Infinity and numbers beyond a double, since they could not be written back unchanged."""
        path, named = Path(path), Keys(**{str(name): key for name, key in (keys or {}).items()})
        document = read_json(path, named.format)
        if not isinstance(document, dict):
            raise UsageError(f"{path}: is {kind_of(document)}, not an object. {named.format}")
        return cls(document, str(path), named)

    @cached_property
    def digest(self) -> str:
        """sha256 of the document; the order of its keys counts."""
        return hashlib.sha256(json.dumps(self.document).encode()).hexdigest()

    @property
    def behaviour(self) -> str | None:
        """What the flagged answers show, if the document's metadata name it under "behaviour"."""
        metadata = self.document.get("metadata")
        named = metadata.get("behaviour") if isinstance(metadata, dict) else None
        return None if named is None else self._check(named, str, "metadata.behaviour")

    @cached_property
    def _results(self) -> list[list[Variation]]:
        """The variations of each result."""
        keys = self.keys
        found = []
        for r, result in enumerate(self._checked(self.document, keys.results, list, keys.results)):
            where = f"{keys.results}[{r}]"
            self._check(result, dict, where)
            inside = f"{where}.{keys.variations}"
            variations = self._checked(result, keys.variations, list, inside)
            found.append([self._variation(v, (r, i), f"{inside}[{i}]") for i, v in enumerate(variations)])
        return found

    def _variation(self, variation: Any, place: Place, where: str) -> Variation:
        self._check(variation, dict, where)
        keys, texts = self.keys, []
        for key in (keys.template_type, keys.prompt, keys.response):
            text = variation.get(key)
            texts.append("" if text is None else self._check(text, str, f"{where}.{key}"))
        flag = variation.get(keys.flag)
        if flag is not None and not isinstance(flag, bool | int | float):
            raise UsageError(f"{self.name}: {where}.{keys.flag}: is {kind_of(flag)}. Make it 1 (flagged) or 0.")
        template_type, prompt, response = texts
        return Variation(place, template_type, prompt, response, flagged=flag == 1, is_base=template_type == keys.base)

    def _checked(self, table: dict[str, Any], key: str, kind: type, where: str) -> Any:
        if key not in table:
            raise UsageError(f"{self.name}: {where}: is missing. {self.keys.format}")
        return self._check(table[key], kind, where)

    def _check(self, value: Any, kind: type, where: str) -> Any:
        if not isinstance(value, kind):
            names: dict[Any, str] = {list: "a list", dict: "an object", str: "text"}
            raise UsageError(f"{self.name}: {where}: is {kind_of(value)}, not {names[kind]}. {self.keys.format}")
        return value

    @property
    def variations(self) -> Iterator[Variation]:
        """Every variation, in the order of the document."""
        for variations in self._results:
            yield from variations

    def pairs(self) -> list[Pair | Skipped]:
        """Each flagged variation with the base variation of its result, in the order of the document; `Skipped` if
        there is no such pair."""
        return [_paired(v, variations) for variations in self._results for v in variations if v.flagged]

    def analysed(self, analyses: Mapping[Place, Any]) -> dict[str, Any]:
        """A copy of the document with `atp_analysis` added to the named variations, or replacing an earlier one."""
        keys, results = self.keys, []
        for r, result in enumerate(self.document[keys.results]):
            variations = [
                {**v, ANALYSIS: to_jsonable(analyses[r, i])} if (r, i) in analyses else v
                for i, v in enumerate(result[keys.variations])
            ]
            results.append({**result, keys.variations: variations})
        return {**self.document, keys.results: results}

    def write(self, path: Path, analyses: Mapping[Place, Any]) -> None:
        """Write the document with the analyses, whole or not at all."""
        document = self.analysed(analyses)
        text = json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False)
        if not _encodable(text):  # half of a surrogate pair, which JSON can only write as an escape
            text = json.dumps(document, indent=2, allow_nan=False)
        write_text(path, text + "\n")


def _paired(flagged: Variation, variations: list[Variation]) -> Pair | Skipped:
    bases = [v for v in variations if v.is_base]
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
