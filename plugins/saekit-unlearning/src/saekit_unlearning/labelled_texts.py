"""Text with the label `forget`, for the source `labelled`: ``python -m saekit_unlearning.labelled_texts OUT.jsonl``.

The texts of what is to be forgotten have the label 1, those of what is to stay and other text, from a data set of the Hugging Face
hub, have 0. What is known of the facts is little text beside the rest, so it is written several times.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from saekit import UsageError
from saekit_unlearning.data import FORGET
from saekit_unlearning.files import WMDP, load


def lines(data: str, others: Iterable[str], repeat: int) -> Iterator[str]:
    """The facts that the analyzer's option `data` names, `repeat` times, each followed by one of the other texts while there are
    any; then the rest of these."""
    rest = iter(others)
    facts = [{"text": text.text, "forget": int(text.group == FORGET)} for text in load(data).texts]
    for _ in range(repeat):
        for fact in facts:
            yield json.dumps(fact)
            yield from (json.dumps({"text": text, "forget": 0}) for text in itertools.islice(rest, 1))
    yield from (json.dumps({"text": text, "forget": 0}) for text in rest)


def documents(name: str, number: int) -> Iterator[str]:
    """The first `number` texts of a data set on the Hugging Face hub. UsageError if it cannot be loaded, or has none."""
    import datasets

    try:
        rows = datasets.load_dataset(name, split="train", streaming=True)
        for row in itertools.islice(rows, number):
            yield row["text"]
    except Exception as error:  # no network, no consent, no column: datasets has no common class
        raise UsageError(
            f"data set {name!r}: cannot be read: {type(error).__name__}: {error} Check the network and the data set's page; it "
            "must have a split train with a column text."
        ) from error


def main(arguments: list[str] | None = None) -> None:
    """Write the file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("out", type=Path, help="the .jsonl file to write")
    parser.add_argument("--data", default=WMDP, help="the facts, as the analyzer unlearn names them")
    parser.add_argument("--text", default="monology/pile-uncopyrighted", help="the other text")
    parser.add_argument("--documents", type=int, default=25_000, help="how many texts of it")
    parser.add_argument("--repeat", type=int, default=20, help="how often each fact is written")
    options = parser.parse_args(arguments)
    made = lines(options.data, documents(options.text, options.documents), options.repeat)
    with options.out.open("w", encoding="utf-8") as file:
        file.writelines(f"{line}\n" for line in made)


if __name__ == "__main__":
    main()
