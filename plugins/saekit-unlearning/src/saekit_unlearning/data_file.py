"""The option `data`: the organism's facts, a JSON file of texts and questions, or what `files` reads."""

from __future__ import annotations

import json
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from saekit import OptionError, UsageError
from saekit_unlearning import files
from saekit_unlearning.data import UnlearningData, checked, organism_data

ORGANISM = "organism"


def load(data: str) -> UnlearningData:
    """The organism's facts, those of a file {"texts": [...], "questions": [...]} with the fields of `Text` and `Question`, or
    what `files.load` knows: a directory of JSON Lines, WMDP-bio with MMLU.

    OptionError for the option `data` if nothing can be unlearned or measured with them."""
    if data == ORGANISM:
        return organism_data()
    if Path(data).is_dir() or data.partition(":")[0] == files.WMDP:
        return files.load(data)
    try:
        found = TypeAdapter(UnlearningData).validate_python(json.loads(Path(data).read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise OptionError("data", f"there is no file {data!r}.") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise OptionError("data", f"{data!r} is not a JSON file that can be read: {error}.") from None
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "the file"
        raise OptionError("data", f"{data!r}: {place}: {first['msg']}.") from None
    try:
        return checked(found, repr(data))
    except UsageError as error:
        raise OptionError("data", str(error)) from None
