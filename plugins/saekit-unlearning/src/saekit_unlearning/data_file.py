"""The option `data`: the organism's facts, or a JSON file of texts and questions."""

from __future__ import annotations

import json
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from saekit import OptionError, UsageError
from saekit_unlearning.data import UnlearningData, checked, organism_data

ORGANISM = "organism"


def load(data: str) -> UnlearningData:
    """The organism's facts, or those of a file {"texts": [...], "questions": [...]} with the fields of `Text` and `Question`.

    OptionError for the option `data` if nothing can be unlearned or measured with them."""
    if data == ORGANISM:
        return organism_data()
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
